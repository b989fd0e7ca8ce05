//go:build !dataplane

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	tea "github.com/charmbracelet/bubbletea"
)

// console is a mesh to look at: a control plane and one sidecar, processes of their own,
// and two versions of a model, of which the second can turn bad.
type console struct {
	t              *testing.T
	control, front string
	admin          string // of the sidecar
	bad            atomic.Bool
}

func newConsole(t *testing.T) *console {
	t.Helper()
	if testing.Short() {
		t.Skip("starts processes")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	c, dir := &console{t: t}, t.TempDir()
	c.admin = "unix:" + filepath.Join(dir, "admin.sock")
	c.control = start(t, ctx, dir, "control", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(dir, "data"), "--monitor-tick", "100ms")
	c.front = start(t, ctx, dir, "sidecar", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--control", c.control, "--admin", c.admin, "--node-id", "node-a/pod")
	for _, v := range []string{"v1", "v2"} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if v == "v2" && c.bad.Load() {
				openAIError(w, http.StatusInternalServerError, "server_error", "broken")
				return
			}
			w.Header().Set("content-type", "application/json")
			fmt.Fprint(w, `{"choices":[{"message":{"content":"secret"}}],"usage":{"prompt_tokens":3,"completion_tokens":2}}`)
		}))
		t.Cleanup(s.Close)
		c.must("model", "register", "chat", v, "--endpoint", s.Listener.Addr().String()+"@local", "--wait", "1m", "--server", c.control)
	}
	return c
}

// run is one verb, in this process.
func (c *console) run(args ...string) (code int, out, errs string) {
	var o, e bytes.Buffer
	code = Main{Stdout: &o, Stderr: &e}.Run(c.t.Context(), args)
	return code, o.String(), e.String()
}

func (c *console) must(args ...string) string {
	c.t.Helper()
	code, out, errs := c.run(args...)
	if code != 0 {
		c.t.Fatalf("%v: exit code %d\n%s%s", args, code, out, errs)
	}
	return out
}

// until repeats what has no event of its own.
func (c *console) until(what string, f func() bool) {
	c.t.Helper()
	limit := time.NewTimer(time.Minute)
	defer limit.Stop()
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for !f() {
		select {
		case <-look.C:
		case <-limit.C:
			c.t.Fatalf("%s: not within a minute", what)
		}
	}
}

// call is one call by a user; it returns the version that answered.
func (c *console) call(user string) string {
	c.t.Helper()
	resp, err := http.Post("http://"+c.front+"/v1/chat/completions", "application/json", strings.NewReader(fmt.Sprintf(`{"model":"chat","user":%q,"messages":[]}`, user)))
	if err != nil {
		c.t.Fatal(err)
	}
	resp.Body.Close()
	return resp.Header.Get("x-outrigger-version")
}

// What an operator sees of a canary that turns bad: where calls would go, where they went,
// how much and how fast, and why it was rolled back.
func TestConsole(t *testing.T) {
	c := newConsole(t)
	c.must("rollout", "start", "chat", "v2", "--id", "r1", "--phase", "canary=5000:1h", "--server", c.control)
	var e struct {
		Version, Arm, Endpoint, Model string
		Bucket                        int
		Why                           []string
	}
	user := ""
	c.until("a user of the candidate", func() bool {
		for i := range 20 {
			user = fmt.Sprintf("user-%d", i)
			code, out, _ := c.run("explain", "request", "chat", "--user", user, "--admin", c.admin, "-o", "json")
			if code == 0 && json.Unmarshal([]byte(out), &e) == nil && e.Version == "v2" {
				return true
			}
		}
		return false
	})
	if e.Model != "chat" || e.Bucket < 0 || e.Endpoint == "" || len(e.Why) < 3 {
		t.Errorf("%+v", e)
	}
	if got := c.call(user); got != "v2" {
		t.Errorf("the call went to %s, the explanation said v2", got)
	}
	if out := c.must("explain", "request", "chat", "--user", user, "--admin", c.admin); !strings.Contains(out, "chat@v2, arm candidate") || !strings.Contains(out, "closed") {
		t.Errorf("explanation:\n%s", out)
	}
	c.tapped(user)
	c.watched(user)
	c.bad.Store(true)
	c.until("the rollback", func() bool {
		for i := range 40 {
			c.call(fmt.Sprintf("user-%d", i))
		}
		_, out, _ := c.run("rollout", "status", "r1", "--server", c.control)
		return strings.Contains(out, "rolled_back")
	})
	why := c.must("why", "r1", "--server", c.control)
	for _, want := range []string{"r1: rollback_started by monitor", "because: ", "mode automatic, from v2 to v1", "after the first bad answer", "acknowledged by 1 sidecars", "E ≥ "} {
		if !strings.Contains(why, want) {
			t.Errorf("why does not say %q:\n%s", want, why)
		}
	}
	var d struct {
		Decision struct {
			RollbackStarted struct{ Evidence []any } `json:"rollback_started"`
		}
		Rollout struct{ State string }
	}
	if err := json.Unmarshal([]byte(c.must("why", "--server", c.control, "-o", "json")), &d); err != nil || d.Rollout.State != "rolled_back" || len(d.Decision.RollbackStarted.Evidence) == 0 {
		t.Errorf("%+v, %v", d, err)
	}
}

// tapped: a tap shows calls of the version asked for, and not what was said or by whom.
func (c *console) tapped(user string) {
	c.t.Helper()
	type result struct {
		code      int
		out, errs string
	}
	done := make(chan result, 1)
	go func() {
		code, out, errs := c.run("tap", "--admin", c.admin, "--version", "v2", "--user", user, "--limit", "3", "-o", "json")
		done <- result{code, out, errs}
	}()
	var got result
	c.until("three calls of the tap", func() bool {
		c.call(user)
		c.call("somebody-else")
		select {
		case got = <-done:
			return true
		default:
			return false
		}
	})
	lines := strings.Split(strings.TrimSpace(got.out), "\n")
	if got.code != 0 || len(lines) != 3 || strings.Contains(got.out, "secret") || strings.Contains(got.out, user) {
		c.t.Fatalf("exit code %d: %s%s", got.code, got.out, got.errs)
	}
	for _, l := range lines {
		var call struct {
			Version, Outcome string
			TokensOut        int `json:"tokens_out"`
		}
		if err := json.Unmarshal([]byte(l), &call); err != nil || call.Version != "v2" || call.Outcome != "ok" || call.TokensOut != 2 {
			c.t.Errorf("%s: %v", l, err)
		}
	}
}

// watched: top tells of the calls that are made while it looks.
func (c *console) watched(user string) {
	c.t.Helper()
	c.until("calls in top", func() bool {
		for range 20 {
			c.call(user)
		}
		var v topView
		out := c.must("top", "--server", c.control, "--admin", c.admin, "--every", "100ms", "-o", "json")
		if err := json.Unmarshal([]byte(out), &v); err != nil {
			c.t.Fatal(err)
		}
		ok := len(v.Versions) == 2 && v.Versions[1].Version == "v2" && v.Versions[1].Requests >= 20 && v.Versions[1].Share == 0.5
		return ok && len(v.Sidecars) == 1 && v.Sidecars[0].Node == "node-a/pod" && len(v.Rollouts) == 1 && v.Rollouts[0].ID == "r1" &&
			len(v.Nodes) == 1 && v.Nodes[0].Connected && v.Nodes[0].Acked == v.Position
	})
	if out := c.must("top", "--server", c.control, "--every", "100ms"); !strings.Contains(out, "chat@v2") || !strings.Contains(out, "node-a/pod") {
		c.t.Errorf("top:\n%s", out)
	}
}

// Rates and ratios of two looks, with a counter that began anew in between.
func TestTopCompares(t *testing.T) {
	is := &sidecarStats{Node: "n", Variables: map[string]uint64{"process": 90, "node": 8, "origin": 2}}
	if err := json.Unmarshal([]byte(`{"arms":[{"requests":30,"failures":3,"latency_sum_ms":300}],"endpoints":[{"breaker":"open"},{"breaker":"closed"}],"in_flight":4}`), &is.Inference); err != nil {
		t.Fatal(err)
	}
	was := &sidecarStats{Node: "n", Variables: map[string]uint64{"process": 40, "node": 8, "origin": 2}}
	if err := json.Unmarshal([]byte(`{"arms":[{"requests":10,"failures":1,"latency_sum_ms":100}]}`), &was.Inference); err != nil {
		t.Fatal(err)
	}
	want := topSidecar{Node: "n", Rate: 10, ErrorRatio: 0.1, MeanMs: 10, InFlight: 4, Open: 1, Reads: 25, Process: 1}
	if got := compareSidecar(was, is, 2); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	want = topSidecar{Node: "n", Rate: 15, ErrorRatio: 0.1, MeanMs: 10, InFlight: 4, Open: 1, Reads: 50, Process: 0.9, NodeTier: 0.08, Origin: 0.02}
	if got := compareSidecar(&sidecarStats{}, is, 2); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	was.Inference.Arms[0].Requests = 50 // the sidecar was restarted
	if got := compareSidecar(was, is, 2); got.Rate != 15 {
		t.Errorf("a counter that fell: %+v", got)
	}
}

// Keys of the full-screen picture: pictures stop while it is paused, q ends it.
func TestTopScreen(t *testing.T) {
	var m tea.Model = topScreen{}
	send := func(msg tea.Msg) (cmd tea.Cmd) { m, cmd = m.Update(msg); return cmd }
	if !strings.Contains(m.View(), "looking") {
		t.Errorf("before the first picture: %s", m.View())
	}
	send(&topView{Region: "eu", Versions: []topVersion{{Model: "chat", Version: "v1", Rate: 12.5}}, Alerts: []string{"high: smoke"}})
	if v := m.View(); !strings.Contains(v, "chat@v1") || !strings.Contains(v, "12.5") || !strings.Contains(v, "alert high: smoke") {
		t.Errorf("picture:\n%s", v)
	}
	key := func(r rune) tea.Msg { return tea.KeyMsg{Type: tea.KeyRunes, Runes: []rune{r}} }
	send(key('p'))
	send(&topView{Region: "us"})
	if v := m.View(); !strings.Contains(v, "region eu") || !strings.Contains(v, "paused") {
		t.Errorf("while paused:\n%s", v)
	}
	send(key('p'))
	send(&topView{Region: "us"})
	if !strings.Contains(m.View(), "region us") {
		t.Errorf("after the pause:\n%s", m.View())
	}
	if cmd := send(key('q')); cmd == nil || cmd() != tea.Quit() {
		t.Error("q does not end it")
	}
}
