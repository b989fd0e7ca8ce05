//go:build !dataplane

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
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// upgradable is a sidecar that is upgraded, the control plane behind it, and an upstream
// with /ping and /stream.
type upgradable struct {
	t       *testing.T
	dir     string
	address string
	admin   string // of the socket, a path
	http    string
	said    chan announcement // one by every process of the chain
	pid     int               // of the process that serves
}

type announcement struct {
	Listening map[string]string
	PID       int
}

func newUpgradable(t *testing.T, flags ...string) *upgradable {
	t.Helper()
	if testing.Short() {
		t.Skip("starts processes")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	t.Cleanup(cancel)
	u := &upgradable{t: t, dir: t.TempDir(), said: make(chan announcement, 64)}
	u.admin = filepath.Join(u.dir, "admin.sock")
	control := start(t, ctx, u.dir, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(u.dir, "data"))
	back := httptest.NewServer(http.HandlerFunc(upstreamOfUpgrades))
	t.Cleanup(back.Close)
	u.install("")
	// The chain's processes share the pipe, so that every one is heard.
	r, w, err := os.Pipe()
	must(t, err)
	cmd := exec.CommandContext(ctx, filepath.Join(u.dir, "outrigger"), append([]string{"sidecar", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--control", control,
		"--admin", "unix:" + u.admin, "--upstream-http", back.URL}, flags...)...)
	log, err := os.Create(filepath.Join(u.dir, "sidecar.log"))
	must(t, err)
	defer log.Close() // the processes have their own
	cmd.Dir, cmd.Stdout, cmd.Stderr = u.dir, w, log
	// The test binary calls itself by the program's bare name, which is looked up.
	cmd.Env = append(os.Environ(), "PATH="+u.dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	must(t, cmd.Start())
	w.Close()
	t.Cleanup(func() { r.Close() })
	go func() {
		sc := bufio.NewScanner(r)
		for sc.Scan() {
			var a announcement
			if json.Unmarshal(sc.Bytes(), &a) == nil {
				u.said <- a
			}
		}
		close(u.said)
	}()
	a := u.announced()
	u.pid, u.address, u.http = a.PID, a.Listening["listen"], a.Listening["http"]
	t.Cleanup(func() {
		_ = syscall.Kill(u.pid, syscall.SIGTERM)
		for range u.said { // ends when every process of the chain has
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the first process: %v", err)
		}
		if t.Failed() {
			t.Log(u.logs())
		}
	})
	u.until("ready", func() bool { return u.ready() })
	return u
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (u *upgradable) logs() string {
	b, _ := os.ReadFile(filepath.Join(u.dir, "sidecar.log"))
	return string(b)
}

// install puts a script where the sidecar's program is; "" is the real one.
func (u *upgradable) install(script string) {
	u.t.Helper()
	self, err := os.Executable()
	must(u.t, err)
	next := filepath.Join(u.dir, "next")
	if script == "" {
		must(u.t, os.Symlink(self, next))
	} else {
		must(u.t, os.WriteFile(next, []byte("#!/bin/sh\n"+script+"\n"), 0o700))
	}
	must(u.t, os.Rename(next, filepath.Join(u.dir, "outrigger")))
}

func (u *upgradable) announced() announcement {
	u.t.Helper()
	limit := time.NewTimer(time.Minute)
	defer limit.Stop()
	select {
	case a, ok := <-u.said:
		if ok {
			return a
		}
	case <-limit.C:
	}
	u.t.Fatalf("no process announced itself\n%s", u.logs())
	return announcement{}
}

// until polls what has no event of its own.
func (u *upgradable) until(what string, f func() bool) {
	u.t.Helper()
	limit := time.NewTimer(time.Minute)
	defer limit.Stop()
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for !f() {
		select {
		case <-look.C:
		case <-limit.C:
			u.t.Fatalf("%s: not within a minute\n%s", what, u.logs())
		}
	}
}

func (u *upgradable) ready() bool {
	resp, err := http.Get("http://" + u.http + "/ready")
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// page reads from the admin socket.
func (u *upgradable) page(path string) (int, string) {
	u.t.Helper()
	code, body, err := u.tryPage(path)
	must(u.t, err)
	return code, body
}

func (u *upgradable) tryPage(path string) (int, string, error) {
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", u.admin)
	}}}
	resp, err := c.Get("http://sidecar" + path)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// upgrade runs the operator's verb.
func (u *upgradable) upgrade() error {
	var out, errs bytes.Buffer
	code := Main{Stdout: &out, Stderr: &errs}.Run(u.t.Context(), []string{"sidecar", "upgrade", "--admin", "unix:" + u.admin, "-o", "json"})
	if code != 0 {
		return fmt.Errorf("exit code %d: %s", code, &errs)
	}
	var got struct{ PID int }
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		return err
	}
	if a := u.announced(); a.PID != got.PID || a.Listening["listen"] != u.address || a.Listening["http"] != u.http {
		return fmt.Errorf("process %d serves %v, want %d at %s", a.PID, a.Listening, got.PID, u.address)
	}
	u.pid = got.PID
	return nil
}

// upstreamOfUpgrades answers /ping at once and sends events on /stream as long as it is asked to.
func upstreamOfUpgrades(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/stream" {
		fmt.Fprint(w, "pong")
		return
	}
	w.Header().Set("content-type", "text/event-stream")
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for i := 0; ; i++ {
		fmt.Fprintf(w, "data: %d\n\n", i)
		w.(http.Flusher).Flush()
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		}
	}
}

// traffic is load that tolerates no failure: each worker opens a connection, sends up to
// perConn requests on it, one after the other, and opens another when the server says
// Connection: close or they are used up.
type traffic struct {
	address         string
	conns, requests atomic.Int64
	failed          atomic.Int64
	closed          atomic.Int64 // connections the server ended, politely
	mu              sync.Mutex
	first           error // guarded by mu
	stop            chan struct{}
	workers         sync.WaitGroup
}

func (l *traffic) run(workers, perConn int) {
	for i := range workers {
		l.workers.Go(func() {
			for turn := i; ; turn++ {
				select {
				case <-l.stop:
					return
				default:
				}
				l.conns.Add(1)
				if err := l.connection(turn, perConn); err != nil {
					l.failed.Add(1)
					l.mu.Lock()
					if l.first == nil {
						l.first = err
					}
					l.mu.Unlock()
				}
			}
		})
	}
}

func (l *traffic) connection(turn, n int) error {
	c, err := net.DialTimeout("tcp", l.address, time.Minute)
	if err != nil {
		return err
	}
	defer c.Close()
	r := bufio.NewReader(c)
	for i := range n {
		if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			return err
		}
		path, want := "/ping", "pong"
		if (turn+i)%2 == 0 {
			path, want = "/v1/variables/s/v", "value-of-v"
		}
		if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path); err != nil {
			return fmt.Errorf("request %d: %w", i, err)
		}
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return fmt.Errorf("answer %d to %s: %w", i, path, err)
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != 200 || !strings.Contains(string(b), want) {
			return fmt.Errorf("answer %d to %s: %s %q %v", i, path, resp.Status, b, err)
		}
		l.requests.Add(1)
		if resp.Close {
			l.closed.Add(1)
			return nil
		}
		select {
		case <-l.stop:
			return nil
		default:
		}
	}
	return nil
}

// setVariable makes the variable the load reads.
func (u *upgradable) setVariable() {
	u.t.Helper()
	conn, err := grpc.NewClient(u.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(u.t, err)
	defer conn.Close()
	_, err = pb.NewVariablesClient(conn).Register(u.t.Context(), &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "v"},
		Value:   &pb.Value{Type: "string", Json: []byte(`"value-of-v"`)},
		Options: &pb.WriteOptions{Actor: "a", Source: "test", AutoCreateSession: true}})
	must(u.t, err)
}

// Twenty rotations under load of fresh connections, kept-alive ones and one stream: none
// fails.
func TestUpgradeLosesNothing(t *testing.T) {
	const rotations = 20
	total := int64(4000)
	if os.Getenv("OUTRIGGER_LONG") == "1" {
		total = 40_000
	}
	u := newUpgradable(t, "--grace", "20m") // the first process lasts as long as its stream
	u.setVariable()
	stream, err := http.Get("http://" + u.address + "/stream")
	must(t, err)
	defer stream.Body.Close()
	events := bufio.NewReader(stream.Body)
	load := &traffic{address: u.address, stop: make(chan struct{})}
	load.run(4, 1)
	load.run(4, 1<<30)
	for i := range int64(rotations) {
		if err := u.upgrade(); err != nil {
			t.Errorf("rotation %d: %v", i, err)
			break
		}
		u.until("load", func() bool { return load.conns.Load() >= total*(i+1)/rotations })
	}
	close(load.stop)
	load.workers.Wait()
	if load.failed.Load() != 0 || load.conns.Load() < total || load.closed.Load() < rotations {
		t.Errorf("%d of %d connections failed, %d were ended by the server; first: %v", load.failed.Load(), load.conns.Load(), load.closed.Load(), load.first)
	}
	t.Logf("%d connections, %d requests, %d connections ended by the server", load.conns.Load(), load.requests.Load(), load.closed.Load())
	// The stream began with the first process, which has handed over twenty times removed.
	for i := range 3 * rotations {
		line, err := events.ReadString('\n')
		if err != nil || line != fmt.Sprintf("data: %d\n", i) {
			t.Fatalf("event %d: %q, %v", i, line, err)
		}
		if _, err := events.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
}

// A new program that crashes, or never gets ready, changes nothing; the real one then
// takes over, told by a signal. The admin socket goes on with whoever serves.
func TestUpgradeFails(t *testing.T) {
	u := newUpgradable(t, "--upgrade-timeout", "3s", "--grace", "5s")
	for what, script := range map[string]string{
		"crashes":          "exit 1",
		"never gets ready": "exec sleep 100",
	} {
		u.install(script)
		before := u.pid
		if err := u.upgrade(); err == nil {
			t.Fatalf("%s: it took over", what)
		}
		if err := syscall.Kill(before, 0); err != nil || !u.ready() {
			t.Fatalf("%s: the old process: %v, ready %v", what, err, u.ready())
		}
		if resp, err := http.Get("http://" + u.address + "/ping"); err != nil || resp.StatusCode != 200 {
			t.Errorf("%s: %v", what, err)
		} else {
			resp.Body.Close()
		}
	}
	u.install("")
	must(t, syscall.Kill(u.pid, syscall.SIGUSR2))
	a := u.announced()
	if a.PID == u.pid {
		t.Fatalf("process %d announced itself again", a.PID)
	}
	u.pid = a.PID
	// A connection to the admin socket that the old process accepted just before it let go of
	// it is told what is true of that one, or cut off.
	u.until("/ready of the new process", func() bool {
		code, _, err := u.tryPage("/ready")
		return err == nil && code == 200
	})
}

// The admin socket is this user's only, and shows what it promises; profiles need a flag.
func TestAdminSocket(t *testing.T) {
	u := newUpgradable(t)
	info, err := os.Stat(u.admin)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v %v", info.Mode(), err)
	}
	for path, want := range map[string]string{"/ready": "ready", "/healthz": "ok", "/metrics": "go_goroutines", "/config_dump": `"Position"`, "/clusters": "", "/stats": "variables"} {
		if code, body := u.page(path); code != 200 || !strings.Contains(body, want) {
			t.Errorf("%s: %d %.300s", path, code, body)
		}
	}
	if code, _ := u.page("/debug/pprof/goroutine"); code != 404 {
		t.Errorf("profiles without --pprof: %d", code)
	}
	resp, err := http.Post("http://"+u.http+"/upgrade", "", nil)
	must(t, err)
	resp.Body.Close()
	if resp.StatusCode != 404 {
		t.Errorf("POST /upgrade over TCP: %d", resp.StatusCode)
	}
}

// At SIGTERM the sidecar is not ready at once, serves for the drain delay, and ends.
func TestDrainDelay(t *testing.T) {
	u := newUpgradable(t, "--drain-delay", "4s", "--grace", "5s")
	c, err := net.Dial("tcp", u.address)
	must(t, err)
	defer c.Close()
	r := bufio.NewReader(c)
	asked := time.Now() // no later than the process hears of it
	must(t, syscall.Kill(u.pid, syscall.SIGTERM))
	u.until("not ready", func() bool { return !u.ready() })
	for time.Since(asked) < time.Second {
		err := pinged(u.address, c, r)
		if time.Since(asked) > 4*time.Second {
			break // the machine stood still: that was after the delay
		}
		must(t, err)
	}
	for range u.said {
	}
	if d := time.Since(asked); d < 4*time.Second {
		t.Errorf("it ended %v after SIGTERM, before the drain delay", d)
	}
	if _, err := os.Stat(u.admin); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the admin socket was left: %v", err)
	}
}

// pinged asks on a fresh connection and on an old one.
func pinged(address string, c net.Conn, r *bufio.Reader) error {
	resp, err := http.Get("http://" + address + "/ping")
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("a fresh connection: %s", resp.Status)
	}
	if _, err := fmt.Fprint(c, "GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		return err
	}
	if resp, err = http.ReadResponse(r, nil); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// An idle sidecar stays below 60 MiB, the bound it promises.
func TestIdleMemory(t *testing.T) {
	u := newUpgradable(t)
	var mib int
	u.until("memory", func() bool {
		raw, err := os.ReadFile("/proc/" + strconv.Itoa(u.pid) + "/status")
		must(t, err)
		_, rest, ok := strings.Cut(string(raw), "VmRSS:")
		if !ok {
			t.Fatalf("no VmRSS in %s", raw)
		}
		kib, err := strconv.Atoi(strings.Fields(rest)[0])
		must(t, err)
		mib = kib >> 10
		return mib < 60
	})
	t.Logf("%d MiB resident", mib)
}
