//go:build !dataplane

package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/outrigger-mesh/outrigger/internal/netnstest"
)

// newEnvoyPod is newPod with a real Envoy in the sidecar's place: the rules of `init`
// redirect to its capture listener, and it runs as the user they leave out.
func newEnvoyPod(t *testing.T) *pod {
	t.Helper()
	if testing.Short() {
		t.Skip("starts processes")
	}
	binary := envoyProgram(t)
	p := &pod{t: t, ns: netnstest.New(t), server: netnstest.New(t), dir: t.TempDir()}
	netnstest.Link(t, p.ns, p.server, pod4+"/24", server4+"/24", pod6+"/64", server6+"/64")
	p.program = filepath.Join(p.dir, "outrigger")
	envoy := filepath.Join(p.dir, "envoy")
	for from, to := range map[string]string{"/proc/self/exe": p.program, binary: envoy} {
		copyProgram(t, from, to)
	}
	for d := p.dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	control, _, _ := p.start(nil, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(p.dir, "data"))
	p.control = control["listen"]
	p.verb("model", "register", "chat", "v1", "--endpoint", server4+":9001@local", "--wait", "60s")
	file := filepath.Join(p.dir, "bootstrap.json")
	if err := os.WriteFile(file, []byte(p.verb("xds", "bootstrap", "--control", p.control, "--node", "envoy-1")), 0o644); err != nil {
		t.Fatal(err)
	}
	p.log = newSyncBuffer()
	// The shell kills it when its input closes, however this process ends.
	const guard = `"$@" & child=$!; cat >/dev/null; kill -9 $child; wait $child`
	cmd := exec.Command("sh", "-c", guard, "sh", envoy, "-c", file, "--concurrency", "1", "--disable-hot-restart", "-l", "warning")
	cmd.Dir, cmd.Stdout, cmd.Stderr = p.dir, p.log, p.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ownUID, Gid: ownUID}}
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.ns.Start(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		input.Close()
		_ = cmd.Wait() // the status is that of the kill
		if t.Failed() {
			t.Logf("Envoy said:\n%s", p.log)
		}
	})
	eventually(t, "Envoy accepts the policy", func() bool {
		out := p.verb("xds", "status", "--group", "envoy")
		return strings.Contains(out, "1 clients, 0 behind, 0 rejecting")
	})
	eventually(t, "Envoy listens", func() bool {
		c, err := p.dial("127.0.0.1:15001")
		if err != nil {
			return false
		}
		return c.Close() == nil
	})
	p.init("--mode", "redirect", "--own-uids", fmt.Sprint(ownUID))
	return p
}

// verb runs an operator's verb in the pod and returns what it printed.
func (p *pod) verb(args ...string) string {
	p.t.Helper()
	if args[1] != "bootstrap" {
		args = append(args, "--server", p.control)
	}
	out, err := p.ns.Run(exec.Command(p.program, args...))
	if err != nil {
		p.t.Fatalf("%q: %v\n%s", args, err, out)
	}
	return string(out)
}

// envoyProgram is the Envoy of the wheel in the Python environment.
func envoyProgram(t *testing.T) string {
	t.Helper()
	root := filepath.Join("..", "..")
	out, err := exec.Command("bash", filepath.Join(root, ".ci", "venv")).CombinedOutput()
	found, _ := filepath.Glob(filepath.Join(root, ".cache", "venv", "lib", "python3*", "site-packages", "envoy", "_bin", "envoy"))
	if err == nil && len(found) == 1 {
		return found[0]
	}
	reason := fmt.Sprintf("%d Envoy binaries, %v: %s", len(found), err, out)
	if os.Getenv("CI") == "true" {
		t.Fatal(reason)
	}
	t.Skip("skipped: " + reason)
	return ""
}

// copyProgram copies: another user may not look into where the original is.
func copyProgram(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err == nil {
		_, err = io.Copy(out, in)
		if cerr := out.Close(); err == nil {
			err = cerr
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// name serves its name.
func name(t *testing.T, ns *netnstest.NS, address, text string) {
	l := ns.Listen("tcp", address)
	s := &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) })}
	go func() { _ = s.Serve(l) }() // ends with Close
	t.Cleanup(func() { s.Close() })
}

// An unmodified program in a pod whose connections the kernel redirects to a real Envoy:
// a request that names a model goes by policy, wherever it was sent; one that does not,
// and what is not HTTP, goes where it was going.
func TestEnvoyTakesRedirectedTraffic(t *testing.T) {
	p := newEnvoyPod(t)
	name(t, p.server, server4+":9001", "the model")
	name(t, p.server, server4+":8000", "the original")
	if out := p.verb("xds", "config", "envoy-1", "--type", "Listener", "--prefix", "envoy/capture"); !strings.Contains(out, `"traffic_direction": "OUTBOUND"`) ||
		!strings.Contains(out, "listener.original_dst") {
		t.Errorf("listener in force: %s", out)
	}
	for _, c := range []struct{ body, want string }{
		{`{"model":"chat","messages":[]}`, "the model"},
		{`{"model":"another","messages":[]}`, "the original"},
		{``, "the original"},
	} {
		code, header, got, err := p.call("POST", "http://"+server4+":8000/v1/chat/completions", c.body)
		if err != nil || code != 200 || got != c.want {
			t.Errorf("%s: %d %q, %v, want %q", c.body, code, got, err, c.want)
		}
		if version := header.Get("x-outrigger-version"); (version == "v1") != (c.want == "the model") {
			t.Errorf("%s: served by version %q", c.body, version)
		}
	}
	echo := p.server.Listen("tcp", server4+":7000")
	from := make(chan net.Addr, 1)
	go func() {
		c, err := echo.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		from <- c.RemoteAddr()
		_, _ = io.Copy(c, c)
	}()
	c, err := p.dial(server4 + ":7000")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sent := "\x00\x01 not HTTP at all"
	if _, err := io.WriteString(c, sent); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != sent {
		t.Fatalf("%q came back, %v", got, err)
	}
	if a := <-from; a.String() == c.LocalAddr().String() {
		t.Errorf("the connection from %v was not redirected", a)
	}
}
