package adsserver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// environment is the folder of .cache/venv, which is made if need be. Where it cannot be
// had the test is skipped, except in CI.
func environment(t testing.TB) string {
	t.Helper()
	root := filepath.Join("..", "..")
	out, err := exec.Command("bash", filepath.Join(root, ".ci", "venv")).CombinedOutput()
	if err != nil {
		unavailable(t, fmt.Sprintf("%v: %s", err, strings.TrimSpace(string(out))))
	}
	return filepath.Join(root, ".cache", "venv")
}

func unavailable(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// envoyBinary is the Envoy of the wheel.
func envoyBinary(t testing.TB) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(environment(t), "lib", "python3*", "site-packages", "envoy", "_bin", "envoy"))
	if err != nil || len(found) != 1 {
		unavailable(t, fmt.Sprintf("the environment holds %d Envoy binaries (%v)", len(found), err))
	}
	return found[0]
}

// freePort is a loopback address nobody listens on. It is below the ports that systems
// give to connections and to listeners on port 0, and its host is one of the sixteen
// million of 127.0.0.0/8, so that nothing which runs beside this test, and no second call
// of this function, takes it before it is used.
func freePort(t testing.TB) string {
	t.Helper()
	var err error
	for range 100 {
		var lis net.Listener
		host := net.IPv4(127, byte(1+rand.IntN(254)), byte(rand.IntN(256)), byte(1+rand.IntN(254)))
		lis, err = net.Listen("tcp", fmt.Sprintf("%s:%d", host, 10_000+rand.IntN(22_000)))
		if err == nil {
			defer lis.Close()
			return lis.Addr().String()
		}
	}
	t.Fatal(err)
	return ""
}

// envoy is a running Envoy that follows a Server of this process.
type envoy struct {
	t             *testing.T
	srv           *adsserver.Server
	opt           translate.Options
	egress, admin string
	log           string
	http          *http.Client
	position      uint64
}

// startEnvoy publishes p, starts an Envoy with a generated bootstrap and waits until it
// has accepted the policy and listens.
func startEnvoy(t *testing.T, srv *adsserver.Server, control string, p *policy.Policy) *envoy {
	t.Helper()
	binary := envoyBinary(t)
	e := &envoy{t: t, srv: srv, egress: freePort(t), admin: freePort(t), log: filepath.Join(t.TempDir(), "envoy.log")}
	e.opt.Envoy = translate.EnvoyOptions{Egress: e.egress, Capture: freePort(t)}
	e.http = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}, Timeout: time.Minute}
	t.Cleanup(e.http.CloseIdleConnections)
	e.position = p.Position - 1
	e.publish(p)
	raw, err := translate.Bootstrap(translate.KindEnvoy, translate.BootstrapOptions{
		Control: control, Admin: e.admin, Node: outrigger.Node{ID: "envoy-1", Region: "eu", Zone: "a"}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "bootstrap.json")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	runGuarded(t, binary, "-c", file, "--concurrency", "1", "--disable-hot-restart", "-l", "warning", "--log-path", e.log)
	t.Cleanup(func() {
		if t.Failed() {
			raw, _ := os.ReadFile(e.log)
			t.Logf("Envoy said:\n%s", raw)
		}
	})
	e.settled()
	return e
}

// runGuarded runs a program until the test ends or this process does, however it does:
// the shell in between kills it when its standard input closes.
func runGuarded(t *testing.T, program string, args ...string) {
	t.Helper()
	const guard = `"$@" & child=$!; cat >/dev/null; kill -9 $child; wait $child`
	cmd := exec.Command("sh", append([]string{"-c", guard, "sh", program}, args...)...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Wait() // the status is that of the kill
		if t.Failed() {
			t.Logf("%s printed:\n%s", filepath.Base(program), &said)
		}
	})
}

// publish pushes p to every kind of client, under the next position.
func (e *envoy) publish(p *policy.Policy) {
	e.t.Helper()
	e.position++
	p.Position = e.position
	publishWith(e.t, e.srv, p, e.opt)
}

// put pushes p and waits until every client has accepted it.
func (e *envoy) put(p *policy.Policy) {
	e.t.Helper()
	e.publish(p)
	e.settled()
}

// settled waits until the Envoy has accepted the newest position.
func (e *envoy) settled() {
	e.t.Helper()
	eventually(e.t, func() (string, bool) {
		for _, n := range e.srv.Ledger() {
			if n.Node.Kind != string(translate.KindEnvoy) {
				continue
			}
			if n.Nack != nil {
				e.t.Fatalf("Envoy rejected %s %s: %s", n.Nack.Type, n.Nack.Resource, n.Nack.Message)
			}
			return fmt.Sprintf("Envoy accepted position %d of %d", n.Acked, e.position), n.Acked == e.position
		}
		return "no Envoy has connected", false
	}, e.srv.Changed)
}

// eventually waits for a condition; changed wakes it, and it looks again every 20 ms
// for conditions nothing announces.
func eventually(t *testing.T, done func() (string, bool), changed func() <-chan struct{}) {
	t.Helper()
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for {
		var wake <-chan struct{}
		if changed != nil {
			wake = changed()
		}
		state, ok := done()
		if ok {
			return
		}
		select {
		case <-wake:
		case <-look.C:
		case <-deadline.C:
			t.Fatalf("after a minute: %s", state)
		}
	}
}

func publishAll(t testing.TB, srv *adsserver.Server, p *policy.Policy) {
	t.Helper()
	publishWith(t, srv, p, translate.Options{})
}

func publishWith(t testing.TB, srv *adsserver.Server, p *policy.Policy, opt translate.Options) {
	t.Helper()
	for _, kind := range translate.Kinds() {
		res, err := translate.EncodeFor(kind, p, opt)
		if err != nil {
			t.Fatal(err)
		}
		if err := srv.Publish(adsserver.KindGroup(kind), res, p.Position); err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
	}
}

// answer is what came back through the Envoy.
type answer struct {
	status               int
	arm, version, served string // served: which upstream answered
	err                  error
}

// ask sends one inference request for model chat; headers are pairs.
func (e *envoy) ask(headers ...string) answer {
	return e.askBody(`{"model":"chat","messages":[]}`, headers...)
}

func (e *envoy) askBody(body string, headers ...string) answer {
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, "http://"+e.egress+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		return answer{err: err}
	}
	req.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := e.http.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	return answer{status: resp.StatusCode, arm: resp.Header.Get(outrigger.HeaderArm), version: resp.Header.Get(outrigger.HeaderVersion),
		served: string(raw), err: err}
}

// runtimeValue is the value Envoy has in force for a runtime key.
func (e *envoy) runtimeValue(key string) string {
	resp, err := e.http.Get("http://" + e.admin + "/runtime")
	if err != nil {
		e.t.Fatal(err)
	}
	defer resp.Body.Close()
	var out struct {
		Entries map[string]struct {
			Final string `json:"final_value"`
		} `json:"entries"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil {
		e.t.Fatal(err)
	}
	return out.Entries[key].Final
}

// ejected reports whether outlier detection has taken the endpoint out of a cluster.
func (e *envoy) ejected(address string) bool {
	resp, err := e.http.Get("http://" + e.admin + "/clusters")
	if err != nil {
		e.t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		e.t.Fatal(err)
	}
	return strings.Contains(string(raw), "::"+address+"::health_flags::/failed_outlier_check")
}

// upstream is one HTTP endpoint that answers with its name.
type upstream struct {
	name  string
	addr  string
	calls atomic.Int64
	fail  atomic.Int64 // status to fail with, 0 = do not
	// block, if set, holds requests until it is closed; entered tells of each.
	block   atomic.Pointer[chan struct{}]
	entered chan struct{}
	seen    atomic.Pointer[http.Header] // of the last request
}

func startUpstream(t *testing.T, name string) *upstream {
	t.Helper()
	u := &upstream{name: name, entered: make(chan struct{}, 1024)}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u.calls.Add(1)
		h := r.Header.Clone()
		u.seen.Store(&h)
		if c := u.block.Load(); c != nil {
			u.entered <- struct{}{}
			<-*c
		}
		if code := u.fail.Load(); code != 0 {
			w.WriteHeader(int(code))
		}
		_, _ = io.WriteString(w, name)
	}))
	t.Cleanup(s.Close)
	u.addr = s.Listener.Addr().String()
	return u
}

func itoa(n int) string { return strconv.Itoa(n) }
