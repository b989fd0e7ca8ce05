//go:build !dataplane

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// envoyMesh is a control plane and a real Envoy, each a process of its own, and a model in
// two versions, the second of which is a canary with nearly all of the users.
type envoyMesh struct {
	*tenantMesh
	server *running // the control plane, in its present life
	lease  time.Duration
	egress string
	user   int          // one of the canary's
	asked  atomic.Int64 // requests that reached the candidate
}

func newEnvoyMesh(t *testing.T, lease time.Duration) *envoyMesh {
	if testing.Short() {
		t.Skip("starts processes")
	}
	binary, err := filepath.Abs(envoyProgram(t))
	must(t, err)
	m := &envoyMesh{tenantMesh: &tenantMesh{t: t, dir: t.TempDir()}, lease: lease, egress: ownAddress(t)}
	m.control = ownAddress(t)
	m.start()
	for _, version := range []string{"v1", "v2"} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if version == "v2" {
				m.asked.Add(1)
			}
			_, _ = io.WriteString(w, version)
		}))
		t.Cleanup(s.Close)
		m.verb("model", "register", "chat", version, "--endpoint", s.Listener.Addr().String()+"@local")
	}
	m.verb("rollout", "start", "chat", "v2", "--id", "canary", "--phase", "canary=9900:1h")
	raw, code := m.says(0, "xds", "bootstrap", "--control", m.control, "--node", "envoy-1")
	if code != 0 {
		t.Fatal(raw)
	}
	file := filepath.Join(m.dir, "bootstrap.json")
	must(t, os.WriteFile(file, []byte(raw), 0o644))
	m.envoy(binary, file)
	eventually(t, "the canary serves", func() bool {
		m.user++ // until one is in the canary
		return m.ask() == "v2"
	})
	return m
}

// ownAddress is an address nothing else takes between two lives of a process: a port below
// those that connections are given, of a host of its own in 127/8.
func ownAddress(t *testing.T) string {
	t.Helper()
	var err error
	for range 100 {
		var l net.Listener
		l, err = net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254), 10_000+rand.IntN(22_000)))
		if err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal(err)
	return ""
}

// start begins a life of the control plane.
func (m *envoyMesh) start() {
	m.server = m.run(0, "control", "--listen", m.control, "--http", "127.0.0.1:0", "--data", filepath.Join(m.dir, "data"), "--region", "local",
		"--dead-man", m.lease.String(), "--envoy-egress", m.egress, "--envoy-capture", ownAddress(m.t))
}

func (m *envoyMesh) verb(args ...string) {
	m.t.Helper()
	eventually(m.t, strings.Join(args, " "), func() bool {
		_, code := m.says(0, append(args, "--server", m.control)...)
		return code == 0
	})
}

// envoy runs Envoy until the test ends, or this process does: the shell kills it when its
// input closes.
func (m *envoyMesh) envoy(binary, file string) {
	const guard = `"$@" & child=$!; cat >/dev/null; kill -9 $child; wait $child`
	log := newSyncBuffer()
	cmd := exec.Command("sh", "-c", guard, "sh", binary, "-c", file, "--concurrency", "1", "--disable-hot-restart", "-l", "warning")
	cmd.Dir, cmd.Stdout, cmd.Stderr = m.dir, log, log
	input, err := cmd.StdinPipe()
	must(m.t, err)
	must(m.t, cmd.Start())
	m.t.Cleanup(func() {
		input.Close()
		_ = cmd.Wait() // the status is that of the kill
		if m.t.Failed() {
			m.t.Logf("Envoy said:\n%s", log)
		}
	})
}

// ask is which version serves the canary's user through Envoy; "" = none.
func (m *envoyMesh) ask() string {
	ctx, cancel := context.WithTimeout(m.t.Context(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+m.egress+"/v1/chat/completions", strings.NewReader(`{"model":"chat","messages":[]}`))
	must(m.t, err)
	req.Header.Set("content-type", "application/json")
	req.Header.Set("x-user-id", fmt.Sprint("user-", m.user))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return ""
	}
	return string(b)
}

func (m *envoyMesh) servedBy(version string) {
	m.t.Helper()
	eventually(m.t, "the canary's user is served by "+version, func() bool { return m.ask() == version })
}

// silenced makes the control plane silent and checks that the candidate is served for no
// longer than the lease, and not again before the control plane speaks.
func (m *envoyMesh) silenced(how string, s syscall.Signal) {
	m.t.Helper()
	must(m.t, m.server.cmd.Process.Signal(s))
	at := time.Now()
	m.servedBy("v1")
	m.t.Logf("%s: the last good version serves after %v, the lease is %v", how, time.Since(at).Round(time.Millisecond), m.lease)
	before := m.asked.Load()
	for range 100 {
		if got := m.ask(); got != "v1" {
			m.t.Fatalf("%s: after the lease the canary's user is served by %q", how, got)
		}
	}
	if n := m.asked.Load() - before; n > 0 {
		m.t.Fatalf("%s: %d requests reached the candidate after the lease", how, n)
	}
}

// A drill with Envoys, in small: the control plane is killed under a canary that has turned bad
// and no Envoy serves it beyond the lease.
func TestDrillWithEnvoys(t *testing.T) {
	if os.Getenv("OUTRIGGER_LONG") != "1" {
		t.Skip("skipped: half a minute of the long slice (OUTRIGGER_LONG=1)")
	}
	binary, err := filepath.Abs(envoyProgram(t))
	must(t, err)
	// A copy under its own name, which is what the drill's children are started from.
	program := filepath.Join(t.TempDir(), "outrigger")
	copyProgram(t, "/proc/self/exe", program)
	cmd := exec.Command(program, "drill", "rollback", "--sidecars", "4", "--runs", "1", "--kills", "2", "--dead-man", "3s", "--rps", "200", "--warm", "100ms",
		"--envoys", "2", "--envoy", binary, "--output", "json")
	log := newSyncBuffer()
	cmd.Stderr = log
	raw, err := cmd.Output()
	var r drillReport
	if err := errors.Join(err, json.Unmarshal(raw, &r)); err != nil {
		t.Fatalf("%v\n%s\n%s", err, raw, log)
	}
	if !r.OK || r.Envoys != 2 || len(r.Kills) != 2 || r.AfterLease != 0 {
		t.Errorf("%+v", r)
	}
}

// A control plane with a canary running is stopped, with its connections open, goes on, is
// killed, and (in the long slice) comes back: a real Envoy serves the candidate while it hears it, and only then.
func TestEnvoyGivesUpTheCandidateOfASilentControlPlane(t *testing.T) {
	lease, long := time.Second, os.Getenv("OUTRIGGER_LONG") == "1"
	if long {
		lease = 10 * time.Second // the default
	}
	m := newEnvoyMesh(t, lease)
	// Longer than the lease: what is heard is not given up.
	for end := time.Now().Add(lease + lease/4); time.Now().Before(end); {
		if got := m.ask(); got != "v2" {
			t.Fatalf("with the control plane well the canary's user is served by %q", got)
		}
	}
	stopped := m.server.cmd.Process
	t.Cleanup(func() { _ = stopped.Signal(syscall.SIGCONT) }) // or it would never end; it may have
	m.silenced("stopped", syscall.SIGSTOP)
	must(t, stopped.Signal(syscall.SIGCONT))
	m.servedBy("v2")
	m.silenced("killed", syscall.SIGKILL)
	_ = m.server.cmd.Wait() // killed
	if !long {
		return // the Envoy takes up to half a minute to try again
	}
	m.start()
	m.servedBy("v2")
	m.verb("rollout", "rollback", "canary", "--reason", "test")
	m.servedBy("v1")
}
