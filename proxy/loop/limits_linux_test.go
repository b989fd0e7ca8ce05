package loop

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestChildServer is no test: with OUTRIGGER_LOOP_CHILD set it is a server in a process of
// its own, for tests and measurements that need one. The value is "loop", or "nethttp" for
// net/http with the same answers; OUTRIGGER_LOOP_FILES lowers the descriptor limit to that
// many above what is open. The first line of output is the address; it serves until its
// standard input ends or it is interrupted.
func TestChildServer(t *testing.T) {
	kind := os.Getenv("OUTRIGGER_LOOP_CHILD")
	if kind == "" {
		t.Skip("a helper of other tests")
	}
	addr := "127.0.0.1:0"
	if a := os.Getenv("OUTRIGGER_LOOP_ADDR"); a != "" {
		addr = a
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := signal.NotifyContext(t.Context(), os.Interrupt)
	defer stop()
	if kind == "nethttp" {
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			io.WriteString(w, r.RequestURI)
		})}
		context.AfterFunc(ctx, func() { srv.Close() })
		fmt.Println(l.Addr())
		_ = srv.Serve(l)
		return
	}
	s, err := New(Options{Fast: echoFast, Slow: echoSlow})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := strconv.Atoi(os.Getenv("OUTRIGGER_LOOP_FILES")); err == nil {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		// Four more: the loop's epoll, event and listening descriptors, and one for ReadDir.
		limit := uint64(len(entries) + 4 + n)
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: limit}); err != nil {
			t.Fatal(err)
		}
	}
	fmt.Println(l.Addr())
	go func() {
		if os.Getenv("OUTRIGGER_LOOP_ADDR") == "" {
			io.Copy(io.Discard, os.Stdin)
			stop()
		}
	}()
	if err := s.Run(ctx, l); err != nil {
		t.Fatal(err)
	}
}

// child starts TestChildServer in a process of its own.
func child(t *testing.T, env ...string) (s *server, pid int) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestChildServer$")
	cmd.Env = append(os.Environ(), append(env, "OUTRIGGER_LOOP_CHILD=loop")...)
	cmd.Stderr = os.Stderr
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
	rd := bufio.NewReader(out)
	addr, err := rd.ReadString('\n')
	if err != nil {
		t.Fatalf("child: %v", err)
	}
	t.Cleanup(func() {
		in.Close()
		rest, _ := io.ReadAll(rd)
		if err := cmd.Wait(); err != nil {
			t.Errorf("child: %v\n%s", err, rest)
		}
	})
	return &server{network: "tcp", addr: strings.TrimSpace(addr)}, cmd.Process.Pid
}

// TestDescriptorsRunOut: with descriptors for 8 connections, 40 clients come at once. The
// server survives, serves the ones it holds, and the others as those close.
func TestDescriptorsRunOut(t *testing.T) {
	s, _ := child(t, "OUTRIGGER_LOOP_FILES=8")
	var clients []*raw
	for i := range 40 {
		c := s.dial(t)
		c.send(get(fmt.Sprintf("/fast/%d", i)))
		clients = append(clients, c)
	}
	last := clients[len(clients)-1]
	_ = last.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := last.r.Peek(1); err == nil {
		t.Fatal("the last is served while the first are open: the limit was not reached")
	}
	for i, c := range clients { // the kernel queues them in order
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		c.want("GET", 200, fmt.Sprintf("/fast/%d", i))
		c.send(get("/slow/again"))
		c.want("GET", 200, "/slow/again\n")
		c.Close()
	}
}

// TestTenThousandIdle: 10,000 keep-alive connections, each used once, cost the server at
// most 200 MiB of resident memory, and a hit is served among them.
func TestTenThousandIdle(t *testing.T) {
	n := 500
	if os.Getenv("OUTRIGGER_LONG") != "" {
		n = 10_000
	}
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil || lim.Cur < uint64(n)+100 {
		t.Skipf("needs %d descriptors, the limit is %d", n+100, lim.Cur)
	}
	s, pid := child(t)
	for i := range n {
		c, err := net.Dial(s.network, s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		target := "/fast/x"
		if i%2 == 1 {
			target = "/slow/x"
		}
		io.WriteString(c, get(target))
		if _, err := c.Read(make([]byte, 512)); err != nil {
			t.Fatal(err)
		}
	}
	c := s.dial(t)
	c.send(get("/fast/y"))
	c.want("GET", 200, "/fast/y")
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	var kib int
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d idle connections: %d KiB resident", n, kib)
	if kib > 200<<10 {
		t.Errorf("%d KiB resident, the limit is 200 MiB", kib)
	}
}

// hit sends one request and reads its answer, without allocating.
func hit(t testing.TB, c net.Conn, request, buf []byte, size int) {
	if _, err := c.Write(request); err != nil {
		t.Fatal(err)
	}
	for n := 0; n < size; {
		m, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		n += m
	}
}

// TestHitAllocatesNothing counts the whole process: client, loop and kernel interface.
func TestHitAllocatesNothing(t *testing.T) {
	s := start(t, "tcp", Options{})
	c := s.dial(t)
	request, buf := []byte(get("/fast/abc")), make([]byte, 4096)
	c.Write(request)
	size, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(500, func() { hit(t, c.Conn, request, buf, size) }); n != 0 {
		t.Errorf("%v allocations per hit", n)
	}
}

// TestPipelinedHitsShareAWrite: 32 hits in one segment
// are answered with one write, as the reader of a Unix socket can tell.
func TestPipelinedHitsShareAWrite(t *testing.T) {
	s := start(t, "unix", Options{})
	c := s.dial(t)
	c.send(strings.Repeat(get("/fast/abc"), 32))
	b := make([]byte, 64<<10)
	// A Unix stream socket hands out one write at a time only if the reader is faster, so
	// look at the first: it must hold all 32 answers.
	n, err := c.Read(b)
	if err != nil || strings.Count(string(b[:n]), "/fast/abc") != 32 {
		t.Errorf("the first read has %d of 32 answers, %v", strings.Count(string(b[:n]), "/fast/abc"), err)
	}
}

// BenchmarkHit is one hit at a time over loopback, against net/http in the same process.
// Server CPU per request and saturated rates are measured by the project's benchmark
// runner, with the client in a process of its own.
func BenchmarkHit(b *testing.B) {
	run := func(b *testing.B, addr string) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		request, buf := []byte(get("/fast/abc")), make([]byte, 4096)
		c.Write(request)
		size, err := c.Read(buf)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportAllocs()
		var before, after syscall.Rusage
		_ = syscall.Getrusage(syscall.RUSAGE_SELF, &before)
		for b.Loop() {
			hit(b, c, request, buf, size)
		}
		_ = syscall.Getrusage(syscall.RUSAGE_SELF, &after)
		cpu := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
		b.ReportMetric(float64(cpu)/float64(b.N), "cpu-ns/op") // both ends
	}
	b.Run("loop", func(b *testing.B) { run(b, start(b, "tcp", Options{}).addr) })
	b.Run("goroutines", func(b *testing.B) { run(b, start(b, "goroutines", Options{}).addr) })
	b.Run("slow", func(b *testing.B) {
		run(b, start(b, "tcp", Options{Slow: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RequestURI) }),
			Fast: declineAll}).addr)
	})
	b.Run("nethttp", func(b *testing.B) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RequestURI) })}
		go srv.Serve(l)
		b.Cleanup(func() { srv.Close() })
		run(b, l.Addr().String())
	})
}

// TestIdleUnderSignals: signals that interrupt the loop's sleep more often than a
// connection may be idle, as a profiler's do, do not keep that connection open.
func TestIdleUnderSignals(t *testing.T) {
	s := start(t, "tcp", Options{IdleTimeout: 200 * time.Millisecond})
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			threads, err := os.ReadDir("/proc/self/task")
			if err != nil {
				t.Error(err)
				return
			}
			for _, e := range threads {
				if id, err := strconv.Atoi(e.Name()); err == nil {
					_ = unix.Tgkill(os.Getpid(), id, unix.SIGURG) // the thread may have ended; the runtime expects this signal
				}
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	s.dial(t).ends()
}
