//go:build !dataplane

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/smtp"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/internal/netnstest"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/redirect"
)

// ownUID is the user the sidecar runs as; everything else in the pod is root.
const ownUID = 1337

// pod is a network namespace with a sidecar in it, and a server beside it.
type pod struct {
	t          *testing.T
	ns, server *netnstest.NS
	dir        string
	program    string
	control    string // of the control plane
	http       string // of the sidecar
	pid        int
	log        *syncBuffer
}

// syncBuffer is what a process wrote.
type syncBuffer struct {
	lock chan struct{}
	b    bytes.Buffer
}

func newSyncBuffer() *syncBuffer { return &syncBuffer{lock: make(chan struct{}, 1)} }

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.lock <- struct{}{}
	defer func() { <-s.lock }()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.lock <- struct{}{}
	defer func() { <-s.lock }()
	return s.b.String()
}

const (
	pod4, pod6       = "10.77.0.1", "fd77::1"
	server4, server6 = "10.77.0.2", "fd77::2"
)

// newPod starts a control plane and a sidecar, which runs as its own user, in a
// namespace; rules are the arguments of init, none = not run.
func newPod(t *testing.T, mode string, rules ...string) *pod {
	t.Helper()
	if testing.Short() {
		t.Skip("starts processes")
	}
	p := &pod{t: t, ns: netnstest.New(t), server: netnstest.New(t), dir: t.TempDir()}
	netnstest.Link(t, p.ns, p.server, pod4+"/24", server4+"/24", pod6+"/64", server6+"/64")
	// A copy: the sidecar's user may not look into the folder of the test binary.
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	p.program = filepath.Join(p.dir, "outrigger")
	if err := os.WriteFile(p.program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	for d := p.dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	control, _, _ := p.start(nil, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(p.dir, "data"))
	p.control = control["listen"]
	args := []string{"sidecar", "--log-level", "debug", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--control", p.control,
		"--intercept-outbound", ":15001", "--intercept-inbound", ":15006", "--intercept-routes", "8000"}
	as := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ownUID, Gid: ownUID}}
	if mode == "tproxy" {
		args = append(args, "--intercept-transparent")
		as.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN}
	}
	var bound map[string]string
	bound, p.pid, p.log = p.start(as, args...)
	p.http = bound["http"]
	if len(rules) > 0 {
		p.init(append([]string{"--mode", mode}, rules...)...)
	}
	return p
}

func (p *pod) init(args ...string) {
	p.t.Helper()
	p.ns.Do(func() {
		if code, _, errs := outrigger1(p.t, append([]string{"init"}, args...)...); code != 0 {
			p.t.Errorf("init %q: exit code %d, %s", args, code, errs)
		}
	})
}

// start runs a command of this binary in the pod until the test ends.
func (p *pod) start(as *syscall.SysProcAttr, args ...string) (bound map[string]string, pid int, log *syncBuffer) {
	t := p.t
	t.Helper()
	cmd := exec.Command(p.program, args...)
	cmd.Dir, cmd.SysProcAttr, log = p.dir, as, newSyncBuffer()
	cmd.Stderr = log
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.ns.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Errorf("stop %s: %v", args[0], err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v\n%s", args[0], err, log)
		}
	})
	var said struct{ Listening map[string]string }
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &said)
	}
	if err != nil {
		t.Fatalf("%s said %q, %v\n%s", args[0], line, err, log)
	}
	return said.Listening, cmd.Process.Pid, log
}

// dial connects as a program of the pod.
func (p *pod) dial(address string) (net.Conn, error) {
	return p.ns.DialContext(p.t.Context(), net.Dialer{Timeout: patience}, "tcp", address)
}

// client is an ordinary HTTP client in the pod.
func (p *pod) client() *http.Client {
	return &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return p.ns.DialContext(ctx, net.Dialer{}, network, address)
		}}}
}

func (p *pod) call(method, url, body string) (int, http.Header, string, error) {
	req, err := http.NewRequestWithContext(p.t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		return 0, nil, "", err
	}
	if body != "" {
		req.Header.Set("content-type", "application/json")
	}
	res, err := p.client().Do(req)
	if err != nil {
		return 0, nil, "", err
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	return res.StatusCode, res.Header, string(raw), err
}

// counts asks the sidecar.
func (p *pod) counts() redirect.Counts {
	p.t.Helper()
	_, _, body, err := p.call("GET", "http://"+p.http+"/stats", "")
	var doc struct{ Intercept redirect.Counts }
	if err == nil {
		err = json.Unmarshal([]byte(body), &doc)
	}
	if err != nil {
		p.t.Fatalf("stats: %v\n%s", err, p.log)
	}
	return doc.Intercept
}

// eventually waits for what another process does.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline, tick := time.After(patience), time.NewTicker(10*time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("in vain: %s", what)
		}
	}
}

// echoHTTP answers with what it received.
func echoHTTP(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(w, "%s %s hops=%s", r.Method, r.URL.Path, r.Header.Get("X-Outrigger-Hops"))
}

// visits are the connections a server has seen.
type visits struct{ made, used atomic.Int64 } // accepted; of these, brought a request

// serveHTTP serves echoHTTP in a namespace and counts connections.
func serveHTTP(t *testing.T, ns *netnstest.NS, address string) *visits {
	t.Helper()
	l := ns.Listen("tcp", address)
	var n visits
	s := &http.Server{Handler: http.HandlerFunc(echoHTTP), ReadHeaderTimeout: patience, ConnState: func(_ net.Conn, st http.ConnState) {
		switch st {
		case http.StateNew:
			n.made.Add(1)
		case http.StateActive:
			n.used.Add(1)
		}
	}}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close() })
	return &n
}

// Unmodified programs in a pod, in both modes and both families.
func TestTransparent(t *testing.T) {
	for _, mode := range []string{"redirect", "tproxy"} {
		t.Run(mode, func(t *testing.T) {
			p := newPod(t, mode, "--own-uids", fmt.Sprint(ownUID), "--inbound-port", "15006", "--loopback-ports", "50051")
			t.Run("curl", p.curl)
			t.Run("opaque HTTP", p.opaqueHTTP)
			t.Run("echo", p.echo)
			t.Run("loopback port", p.loopback)
			t.Run("refused", p.refused)
			t.Run("inbound", p.inbound)
			if mode == "redirect" {
				t.Run("server first", p.serverFirst)
				t.Run("descriptors", p.descriptors)
			}
			t.Run("uninstall", p.uninstall)
		})
	}
}

// A destination that is looked into: HTTP goes through the sidecar's HTTP side.
func (p *pod) curl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("curl is not installed")
		}
		t.Skip("skipped: curl is not installed; `make deps` installs it")
	}
	for _, host := range []string{server4, "[" + server6 + "]"} {
		n := serveHTTP(t, p.server, host+":8000")
		before := p.counts()
		out, err := p.ns.Run(exec.CommandContext(t.Context(), curl, "-sS", "--max-time", "60", "http://"+host+":8000/hello"))
		if err != nil || string(out) != "GET /hello hops=1" {
			t.Errorf("%s: %q, %v\n%s", host, out, err, p.log)
		}
		// A client that needs longer than 2 ms to speak has its destination dialled meanwhile.
		if after := p.counts(); after.Looked != before.Looked+1 || n.used.Load() != 1 || n.made.Load() > 2 {
			t.Errorf("%s: %d connections looked into and %d at the server, %d with a request; want 1, 1 or 2, 1", host, after.Looked-before.Looked, n.made.Load(), n.used.Load())
		}
	}
}

// Any other destination: the bytes pass as they are, in exactly one connection.
func (p *pod) opaqueHTTP(t *testing.T) {
	for _, host := range []string{server4, "[" + server6 + "]"} {
		n := serveHTTP(t, p.server, host+":8001")
		before := p.counts()
		code, _, body, err := p.call("POST", "http://"+host+":8001/x", "data")
		if err != nil || code != 200 || body != "POST /x hops=" {
			t.Errorf("%s: %d %q %v\n%s", host, code, body, err, p.log)
		}
		if after := p.counts(); after.Passed != before.Passed+1 || after.Accepted != before.Accepted+1 || n.made.Load() != 1 {
			t.Errorf("%s: %+v, then %+v, %d at the server", host, before, after, n.made.Load())
		}
	}
}

// 10 MB both ways; the answer begins when the client has finished sending.
func (p *pod) echo(t *testing.T) {
	l := p.server.Listen("tcp", server4+":7000")
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		all, err := io.ReadAll(c)
		if err == nil {
			_, _ = c.Write(all)
		}
	}()
	c, err := p.dial(server4 + ":7000")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sent := make([]byte, 10<<20)
	if _, err := rand.Read(sent); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(sent); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("%d bytes came back, %v", len(got), err)
	}
}

// A port nobody listens on is served by the sidecar, on both loopback addresses; one
// that is not listed stays closed.
func (p *pod) loopback(t *testing.T) {
	before := p.counts()
	url := "http://127.0.0.1:50051/v1/variables/s1/temperature"
	if code, _, body, err := p.call("PUT", url, `{"value":0.7,"type":"float"}`); err != nil || code != 201 && code != 200 {
		t.Fatalf("set: %d %s %v\n%s", code, body, err, p.log)
	}
	for _, host := range []string{"127.0.0.1", "[::1]", "localhost"} {
		code, _, body, err := p.call("GET", "http://"+host+":50051/v1/variables/s1/temperature", "")
		if err != nil || code != 200 || !strings.Contains(body, `"value":0.7`) {
			t.Errorf("%s: %d %s %v", host, code, body, err)
		}
	}
	if after := p.counts(); after.Served != before.Served+4 {
		t.Errorf("%d served, want 4", after.Served-before.Served)
	}
	if c, err := p.dial("127.0.0.1:50052"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a loopback port that is not listed: %v, %v", c, err)
	}
}

// gone says that the peer ended the connection without a byte.
func gone(c net.Conn, err error) bool {
	if err != nil {
		return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET)
	}
	defer c.Close()
	if c.SetDeadline(time.Now().Add(patience)) != nil {
		return false
	}
	n, err := c.Read(make([]byte, 1))
	return n == 0 && err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

// Metadata and the sidecar's own listeners, by every address, are refused; not one
// further connection comes of it.
func (p *pod) refused(t *testing.T) {
	for _, address := range []string{"169.254.169.254:80", "[fd00:ec2::254]:80", "127.0.0.1:15001", "[::1]:15001", pod4 + ":15001", "[" + pod6 + "]:15006"} {
		before := p.counts()
		if c, err := p.dial(address); !gone(c, err) {
			t.Errorf("%s was not refused: %v", address, err)
		}
		eventually(t, address+" is counted", func() bool { return p.counts().Refused == before.Refused+1 })
		if after := p.counts(); after.Accepted != before.Accepted+1 {
			t.Errorf("%s: one connection became %d", address, after.Accepted-before.Accepted)
		}
	}
}

// A connection from outside reaches the program by way of the sidecar.
func (p *pod) inbound(t *testing.T) {
	for _, host := range []string{pod4, "[" + pod6 + "]"} {
		n := serveHTTP(t, p.ns, host+":9000")
		before := p.counts()
		c, err := p.server.DialContext(t.Context(), net.Dialer{}, "tcp", host+":9000")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "GET /in HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(got), "GET /in hops=") {
			t.Errorf("%s: %q, %v\n%s", host, got, err, p.log)
		}
		if after := p.counts(); after.Passed != before.Passed+1 || n.made.Load() != 1 {
			t.Errorf("%s: %+v, then %+v, %d at the program", host, before, after, n.made.Load())
		}
	}
}

// A real mail server, which speaks first: also when its port is named as one to look
// into, nobody waits for the client.
func (p *pod) serverFirst(t *testing.T) {
	python := pythonEnvironment(t)
	for _, port := range []string{"2525", "8000"} { // passed on at once; looked into
		cmd := exec.Command(python, filepath.Join("testdata", "smtp_server.py"), server4, port)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stderr = newSyncBuffer()
		if err := p.server.Start(cmd); err != nil {
			t.Fatal(err)
		}
		said := bufio.NewScanner(stdout)
		if !said.Scan() || said.Text() != "listening" {
			t.Fatalf("the mail server said %q: %s", said.Text(), cmd.Stderr)
		}
		start := time.Now()
		c, err := p.dial(server4 + ":" + port)
		if err != nil {
			t.Fatal(err)
		}
		m, err := smtp.NewClient(c, "mail.test") // reads the greeting
		if err != nil {
			t.Fatalf("port %s: %v\n%s", port, err, p.log)
		}
		t.Logf("port %s: greeting after %v", port, time.Since(start))
		w, err := io.Writer(nil), errors.Join(m.Mail("a@mail.test"), m.Rcpt("b@mail.test"))
		if err == nil {
			if wc, derr := m.Data(); derr != nil {
				err = derr
			} else {
				w = wc
				_, werr := io.WriteString(w, "subject: x\r\n\r\nhello\r\n")
				err = errors.Join(werr, wc.Close(), m.Quit())
			}
		}
		if err != nil || !said.Scan() || !strings.HasPrefix(said.Text(), "mail a@mail.test") {
			t.Errorf("port %s: %v, the server said %q", port, err, said.Text())
		}
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("mail server: %v: %s", err, cmd.Stderr)
		}
	}
}

// limit sets the sidecar's limit of descriptors, unless to is nil, and returns the old.
func (p *pod) limit(t *testing.T, to *unix.Rlimit) (old unix.Rlimit) {
	t.Helper()
	var err error
	p.ns.Do(func() {
		// As the sidecar's user, on this thread alone: then no capability is asked for.
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
			if _, _, e := unix.RawSyscall(call, ownUID, ownUID, ownUID); e != 0 {
				err = e
				return
			}
		}
		err = unix.Prlimit(p.pid, unix.RLIMIT_NOFILE, to, &old)
	})
	if err != nil {
		t.Fatalf("limit the sidecar's descriptors: %v", err)
	}
	return old
}

// Out of descriptors the sidecar turns connections away and goes on; afterwards
// everything works.
func (p *pod) descriptors(t *testing.T) {
	l := p.server.Listen("tcp", server4+":7001")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); c.Close() }()
		}
	}()
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.pid))
	if err != nil {
		t.Fatal(err)
	}
	old := p.limit(t, nil)
	p.limit(t, &unix.Rlimit{Cur: uint64(len(open) + 16), Max: old.Max})
	var conns []net.Conn
	for range 64 {
		c, err := p.dial(server4 + ":7001")
		if err != nil {
			continue
		}
		conns = append(conns, c)
	}
	eventually(t, "the sidecar runs out of descriptors", func() bool { return strings.Contains(p.log.String(), "accept failed; backing off") })
	for _, c := range conns {
		c.Close()
	}
	eventually(t, "connections pass again", func() bool {
		c, err := p.dial(server4 + ":7001")
		if err != nil {
			return false
		}
		defer c.Close()
		if c.SetDeadline(time.Now().Add(time.Second)) != nil {
			return false
		}
		_, werr := io.WriteString(c, "ping")
		_, rerr := io.ReadFull(c, make([]byte, 4))
		return werr == nil && rerr == nil
	})
	p.limit(t, &old)
	if p.counts().Shed == 0 {
		t.Error("no connection was turned away")
	}
}

// Without the rules connections go where they go.
func (p *pod) uninstall(t *testing.T) {
	p.init("uninstall")
	serveHTTP(t, p.server, server4+":8002")
	before := p.counts()
	if code, _, _, err := p.call("GET", "http://"+server4+":8002/", ""); err != nil || code != 200 {
		t.Errorf("%d, %v", code, err)
	}
	if after := p.counts(); after.Accepted != before.Accepted {
		t.Errorf("%d connections are still intercepted", after.Accepted-before.Accepted)
	}
}

// Rules that do not leave out the sidecar send its connections back to it: the first one
// that comes back is recognised and refused, and so is the application's, visibly.
func TestForgottenExclusion(t *testing.T) {
	p := newPod(t, "redirect", "--own-uids", "4242")
	n := serveHTTP(t, p.server, server4+":8001")
	if c, err := p.dial(server4 + ":8001"); !gone(c, err) {
		t.Errorf("the connection was not refused: %v", err)
	}
	eventually(t, "the loop is noticed", func() bool {
		return strings.Contains(p.log.String(), "do not leave out the sidecar's user")
	})
	if c := p.counts(); c.Accepted != 2 || c.Refused != 1 || n.made.Load() != 0 {
		t.Errorf("one connection became %+v, %d at the server", c, n.made.Load())
	}
}
