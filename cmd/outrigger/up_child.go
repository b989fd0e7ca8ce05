//go:build !dataplane

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// child is one process of the mesh, started from this same binary. It announces its
// addresses as one JSON line on standard output; its log goes to a file.
type child struct {
	name string
	cmd  *exec.Cmd
	log  *os.File

	addresses map[string]string
	lines     func([]byte) // called for every line after the announcement

	done chan struct{} // closed when the process has ended
	err  error         // set before done closes

	mu       sync.Mutex
	stopping bool // guarded by mu
}

// startTimeout bounds how long a child may take to bind its sockets.
const startTimeout = 30 * time.Second

// startChild runs this binary with args and waits for its announcement. announces is
// false for children that only print records.
func startChild(ctx context.Context, dir, name string, announces bool, lines func([]byte), args ...string) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(dir+"/"+name+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	c := &child{name: name, log: log, lines: lines, done: make(chan struct{})}
	c.cmd = exec.Command(self, args...)
	c.cmd.Stderr = log
	// A child must not see the terminal's Ctrl-C: the parent stops it in order. It must
	// not outlive a killed parent either.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	announced := make(chan error, 1)
	go c.read(out, announces, announced)
	if !announces {
		return c, nil
	}
	t := time.NewTimer(startTimeout)
	defer t.Stop()
	select {
	case err := <-announced:
		if err != nil {
			return nil, fmt.Errorf("%s did not start: %w; %s", name, err, c.tail())
		}
		return c, nil
	case <-t.C:
		c.stop(0)
		return nil, fmt.Errorf("%s did not announce its addresses within %v; %s", name, startTimeout, c.tail())
	case <-ctx.Done():
		c.stop(0)
		return nil, ctx.Err()
	}
}

// read consumes standard output until the process ends, then reaps it.
func (c *child) read(out io.Reader, announces bool, announced chan<- error) {
	defer close(c.done)
	sc := bufio.NewScanner(out)
	sc.Buffer(make([]byte, 64<<10), 1<<20)
	for sc.Scan() {
		if announces && c.addresses == nil {
			var a struct {
				Listening map[string]string `json:"listening"`
			}
			if err := json.Unmarshal(sc.Bytes(), &a); err != nil || a.Listening == nil {
				continue
			}
			c.addresses = a.Listening
			announced <- nil
			continue
		}
		if c.lines != nil {
			c.lines(sc.Bytes())
		}
	}
	err := c.cmd.Wait()
	c.mu.Lock()
	stopping := c.stopping
	c.mu.Unlock()
	switch {
	case stopping:
		c.err = errInterrupted
	case err != nil:
		c.err = fmt.Errorf("%s ended by itself: %w", c.name, err)
	}
	if announces && c.addresses == nil {
		announced <- errors.Join(errors.New("it ended before it announced its addresses"), err)
	}
	c.log.Close()
}

// tail returns the last lines of the child's log for an error message.
func (c *child) tail() string {
	raw, err := os.ReadFile(c.log.Name())
	if err != nil {
		return "its log cannot be read: " + err.Error()
	}
	const keep = 2000
	if len(raw) > keep {
		raw = raw[len(raw)-keep:]
	}
	return "its log ends with:\n" + string(raw)
}

// stop asks the process to end and kills it after grace; it returns when it has ended.
func (c *child) stop(grace time.Duration) {
	c.mu.Lock()
	c.stopping = true
	c.mu.Unlock()
	select {
	case <-c.done:
		return
	default:
	}
	// An error means the process has just ended; done says when it is reaped.
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-c.done:
	case <-t.C:
		_ = c.cmd.Process.Kill()
		<-c.done
	}
}
