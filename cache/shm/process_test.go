//go:build linux

package shm

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary runs itself in these roles. Descriptor 3 is the first extra file.
const roleEnv = "SHM_TEST_ROLE"

func TestMain(m *testing.M) {
	var err error
	switch os.Getenv(roleEnv) {
	case "writer":
		err = writerProcess(os.NewFile(3, "socket"))
	case "reader":
		err = readerProcess(os.NewFile(3, "table"))
	case "intruder":
		err = intruderProcess(os.NewFile(3, "table"))
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

const (
	procKeys  = 64
	procValue = 200
)

func procNames() []string {
	names := make([]string, procKeys)
	for i := range names {
		names[i] = fmt.Sprintf("default/session/name-%03d", i)
	}
	return names
}

// writerProcess makes a small table, hands its descriptor over and writes until killed.
func writerProcess(socket *os.File) error {
	w, err := Create(Options{Bytes: 64 << 10})
	if err != nil {
		return err
	}
	names, value := procNames(), make([]byte, procValue)
	f, err := w.Descriptor()
	if err != nil {
		return err
	}
	conn, err := net.FileConn(socket)
	if err != nil {
		return err
	}
	if _, _, err := conn.(*net.UnixConn).WriteMsgUnix([]byte{1}, unix.UnixRights(int(f.Fd())), nil); err != nil {
		return err
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for version := uint64(1); ; version++ {
		k := rnd.IntN(procKeys)
		switch version % 16 {
		case 3:
			w.Invalidate(names[k])
		case 5:
			w.Remove(names[k])
		default:
			if _, _, err := w.Put(names[k], Present, versioned(value, k, version)); err != nil {
				return err
			}
		}
	}
}

// report is one line of a reader process.
type report struct {
	Hits, Absent, Invalid, GaveUp, Corrupt uint64
	Bad                                    string // the first wrong answer
}

// readerProcess reads until its standard input ends and reports every so many reads.
func readerProcess(table *os.File) error {
	r, err := Open(table)
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	go func() {
		defer close(stop)
		_, _ = os.Stdin.Read(make([]byte, 1))
	}()
	names, last := procNames(), make([]uint64, procKeys)
	out, rep, buf := json.NewEncoder(os.Stdout), report{}, make([]byte, 0, procValue)
	every := 20_000
	if raceEnabled {
		every = 2000
	}
	for i := 0; ; i++ {
		if i%every == 0 {
			rep.GaveUp, rep.Corrupt = r.GaveUp(), r.Corrupt()
			if err := out.Encode(rep); err != nil {
				return err
			}
			select {
			case <-stop:
				return nil
			default:
			}
		}
		k := i * 31 % procKeys
		e, got := r.Get(names[k], buf)
		if e.State == Absent {
			rep.Absent++
			continue
		}
		version, ok := whole(got, k)
		if (!ok || version < last[k]) && rep.Bad == "" {
			rep.Bad = fmt.Sprintf("%s: %+v % x after version %d", names[k], e, got[:16], last[k])
		}
		last[k] = version
		if e.State == Invalid {
			rep.Invalid++
		} else {
			rep.Hits++
		}
	}
}

func role(t *testing.T, name string, extra *os.File) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), roleEnv+"="+name)
	cmd.ExtraFiles = []*os.File{extra}
	cmd.Stderr = os.Stderr
	return cmd
}

// startWriter runs a writer process and receives its table as a sidecar would.
func startWriter(t *testing.T) (*exec.Cmd, *os.File) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs, mine := os.NewFile(uintptr(pair[0]), "theirs"), os.NewFile(uintptr(pair[1]), "mine")
	cmd := role(t, "writer", theirs)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	conn, err := net.FileConn(mine)
	if err != nil {
		t.Fatal(err)
	}
	mine.Close()
	defer conn.Close()
	oob := make([]byte, 64)
	_, n, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		t.Fatal(err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		t.Fatalf("control messages: %v, %v", msgs, err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		t.Fatal(err)
	}
	return cmd, os.NewFile(uintptr(fds[0]), "table")
}

type readerProc struct {
	cmd   *exec.Cmd
	lines *bufio.Scanner
	stop  func() error
	last  report
}

func startReader(t *testing.T, table *os.File) *readerProc {
	t.Helper()
	cmd := role(t, "reader", table)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return &readerProc{cmd: cmd, lines: bufio.NewScanner(out), stop: in.Close}
}

func (p *readerProc) next(t *testing.T) bool {
	t.Helper()
	if !p.lines.Scan() {
		return false
	}
	if err := json.NewDecoder(bytes.NewReader(p.lines.Bytes())).Decode(&p.last); err != nil {
		t.Fatal(err)
	}
	return true
}

// Reader processes read while a writer process writes at full speed and is killed after a
// random number of their reads; they go on reading the table it left behind.
func TestWriterKilledUnderReaders(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	var total report
	for range 4 {
		w, table := startWriter(t)
		readers := []*readerProc{startReader(t, table), startReader(t, table)}
		for _, p := range readers {
			for p.last.Hits == 0 {
				if !p.next(t) {
					t.Fatalf("reader process ended early: %+v", p.last)
				}
			}
		}
		for range 3 + rnd.IntN(8) {
			for _, p := range readers {
				p.next(t)
			}
		}
		if err := w.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = w.Wait() // always "signal: killed"
		for _, p := range readers {
			atKill := p.last.Hits
			for range 3 {
				p.next(t)
			}
			if p.last.Hits == atKill {
				t.Errorf("no hits after the writer died: %+v", p.last)
			}
			_ = p.stop()
			for p.next(t) {
			}
			if err := p.cmd.Wait(); err != nil {
				t.Errorf("reader process: %v", err)
			}
			if p.last.Bad != "" || p.last.Corrupt != 0 {
				t.Errorf("wrong answer: %+v", p.last)
			}
			total.Hits += p.last.Hits
			total.Invalid += p.last.Invalid
			total.GaveUp += p.last.GaveUp
			total.Absent += p.last.Absent
		}
		table.Close()
	}
	t.Logf("%+v", total)
	if total.Invalid == 0 || total.Absent == 0 {
		t.Errorf("readers saw no invalidations or removals: %+v", total)
	}
}
