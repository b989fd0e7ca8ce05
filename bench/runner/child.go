package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// startTimeout bounds how long a server may take to bind and to become ready.
const startTimeout = 20 * time.Second

// server is a child process that serves until stopped.
type server struct {
	name      string
	pid       int
	addresses map[string]string // listener → host:port, when it announces them
	cmd       *exec.Cmd
	log       string
	done      chan struct{} // closed when the process has ended
}

// pin returns the command line that runs argv on the given cores; "" means all.
func (e *env) pin(cpus string, argv ...string) []string {
	if cpus == "" {
		return argv
	}
	return append([]string{"taskset", "-c", cpus}, argv...)
}

// start runs a server of the benchmark. With announces, it waits for the one JSON line
// {"listening":{name:address}} on standard output that our binary and our peers print.
func (e *env) start(ctx context.Context, name, cpus string, announces bool, argv ...string) (*server, error) {
	argv = e.pin(cpus, argv...)
	s := &server{name: name, log: filepath.Join(e.work, name+".log"), done: make(chan struct{})}
	log, err := os.Create(s.log)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the child has its own descriptor
	s.cmd = exec.Command(argv[0], argv[1:]...)
	s.cmd.Stderr = log
	// Ends with the runner, even a killed one, and does not see the terminal's Ctrl-C.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	var out io.Reader
	if announces {
		if out, err = s.cmd.StdoutPipe(); err != nil {
			return nil, err
		}
	} else {
		s.cmd.Stdout = log
	}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	s.pid = s.cmd.Process.Pid
	announced := make(chan map[string]string, 1)
	go s.follow(out, announced)
	if !announces {
		return s, nil
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	select {
	case s.addresses = <-announced:
		return s, nil
	case <-s.done:
		return nil, fmt.Errorf("%s ended at once; %s", name, s.tail())
	case <-ctx.Done():
		s.stop()
		return nil, fmt.Errorf("%s announced no address: %w; %s", name, ctx.Err(), s.tail())
	}
}

// follow reads standard output to its end and reaps the process.
func (s *server) follow(out io.Reader, announced chan<- map[string]string) {
	defer close(s.done)
	if out != nil {
		for sc := bufio.NewScanner(out); sc.Scan(); {
			var line struct {
				Listening map[string]string `json:"listening"`
			}
			if json.Unmarshal(sc.Bytes(), &line) == nil && line.Listening != nil {
				select {
				case announced <- line.Listening:
				default: // only the first line counts
				}
			}
		}
	}
	_ = s.cmd.Wait() // how it ended shows in its log; done is what matters here
}

// stop ends the process and whatever is left of its group.
func (s *server) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	t := time.NewTimer(5 * time.Second)
	defer t.Stop()
	select {
	case <-s.done:
	case <-t.C:
		_ = syscall.Kill(-s.pid, syscall.SIGKILL)
		<-s.done
	}
}

// tail is the end of the server's log, for errors.
func (s *server) tail() string {
	raw, err := os.ReadFile(s.log)
	if err != nil {
		return "its log cannot be read: " + err.Error()
	}
	const keep = 1500
	return "its log ends with:\n" + string(raw[max(0, len(raw)-keep):])
}

// until asks again every 10 ms until try succeeds, the server ends or time is up.
func (s *server) until(ctx context.Context, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-s.done:
			return fmt.Errorf("%s ended: %w; %s", s.name, err, s.tail())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready after %v: %w; %s", s.name, startTimeout, err, s.tail())
		}
	}
}

// accepts returns a try for until: something listens there.
func accepts(network, address string) func() error {
	return func() error {
		c, err := net.DialTimeout(network, address, time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	}
}

// freePort returns a loopback address nobody listens on, for servers that cannot choose
// one themselves and say which.
func freePort() (string, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// child runs one measurement in a process of its own and reads the JSON object it prints.
type child struct {
	cpus  string
	argv  []string
	in    any        // sent as JSON on standard input; nil = none
	files []*os.File // inherited as descriptor 3 and up
}

func (e *env) measureIn(ctx context.Context, c child, out any) error {
	argv := e.pin(c.cpus, c.argv...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.ExtraFiles = c.files
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if c.in != nil {
		raw, err := json.Marshal(c.in)
		if err != nil {
			return err
		}
		cmd.Stdin = bytes.NewReader(raw)
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%v: %w; %s", c.argv, err, bytes.TrimSpace(stderr.Bytes()))
	}
	if err := json.Unmarshal(stdout.Bytes(), out); err != nil {
		return errors.Join(fmt.Errorf("%v printed %.200q", c.argv, stdout.Bytes()), err)
	}
	return nil
}

// values is measureIn for programs that print an object of numbers.
func (e *env) values(ctx context.Context, argv ...string) (map[string]float64, error) {
	out := map[string]float64{}
	return out, e.measureIn(ctx, child{argv: argv}, &out)
}
