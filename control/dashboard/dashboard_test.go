package dashboard

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

const hostile = `<img src=x onerror=alert(1)>&"'`

// full is a status with every part of the page filled in, and names that are markup.
func full(n uint64) *pb.StatusResponse {
	at := timestamppb.New(time.Unix(1_700_000_000+int64(n), 0))
	evidence := []*pb.Evidence{{Stratum: "eu/7", CandidateRequests: 100, CandidateFailures: 9, BaselineRequests: 9900, BaselineFailures: 99, EValue: 50, SrValue: 3, Threshold: 200}}
	return &pb.StatusResponse{
		Region: "eu", Incarnation: "ab", Head: 40 + n, PolicyPosition: 38, StartedAt: at, Now: at,
		Models: []*pb.Model{{Name: "chat " + hostile, Unit: "user", Aliases: map[string]string{"champion": "v1"},
			Arms: []*pb.ExperimentArm{{Name: "candidate", Version: "v2", Weight: 100}, {Name: "stable", Version: "v1", Weight: 9900}},
			Versions: []*pb.ModelVersion{
				{Version: "v1", State: "production", Stats: &pb.VersionStats{Requests: 1000 + 10*n, Failures: 10, P50Ms: 4.25, P99Ms: 120}},
				{Version: "v2", State: "candidate", Stats: &pb.VersionStats{Requests: 100 + n, Failures: 50}}}}},
		Rollouts: []*pb.Rollout{
			{Id: "r1", Model: "chat", Candidate: "v2", LastGood: "v1", State: "running", Phase: 1, Evidence: evidence, StartedAt: at,
				Phases: []*pb.RolloutPhase{{Name: "canary", Weight: 100}, {Name: "limited", Weight: 1000}, {Name: "full", Weight: 10_000}}},
			{Id: "r0", Model: "chat", Candidate: "v0", LastGood: "v1", State: "rolled_back", StartedAt: at, Reason: hostile,
				Phases: []*pb.RolloutPhase{{Name: "canary", Weight: 100}}, Rollback: &pb.RollbackStarted{Evidence: evidence},
				RollbackCompleted: &pb.RollbackCompleted{Acked: 3, Laggards: []string{"n9"}, AckedAt: at}}},
		Cache: &pb.CacheStatus{HitsProcess: 900, HitsNode: 90, HitsOrigin: 10, StaleServed: 1, InvalidationLagP50Ms: 1.5, InvalidationLagP99Ms: 9},
		Nodes: []*pb.NodeStatus{{Node: &pb.Node{Id: "n1", Kind: "sidecar", Region: "eu"}, Connected: true, AckedPosition: 38, FeedApplied: 40 + n},
			{Node: &pb.Node{Id: "n2", Kind: "sidecar", Region: "eu"}, AckedPosition: 12, Nack: hostile, Since: at}},
		Regions: []*pb.Region{{Name: "eu", Health: "passing", Local: true, Gateway: "eu:1"}, {Name: "us", Health: "critical", Stale: true, RttMs: 80}},
		Alerts:  []*pb.Alert{{Id: "a1", Severity: "critical", Summary: hostile, RaisedAt: at}, {Id: "a2", Severity: "low", Summary: "old", RaisedAt: at, ResolvedAt: at}},
	}
}

func lastEvents() []*pb.Event {
	return []*pb.Event{
		{Position: 40, Aggregate: "rollout/r1", Actor: "monitor", At: timestamppb.New(time.Unix(1_700_000_000, 0)), Payload: &pb.Event_RolloutAdvanced{RolloutAdvanced: &pb.RolloutAdvanced{Phase: 1, Reason: hostile}}},
		{Position: 39, Aggregate: "var/default/s/secret", Actor: hostile, Payload: &pb.Event_VariableSet{VariableSet: &pb.VariableSet{Value: &pb.Value{Type: "string", Json: []byte(`"hunter2"`)}}}},
	}
}

func newDashboard(t *testing.T, edit func(*Options)) *Dashboard {
	t.Helper()
	o := Options{Region: "eu",
		Status: func(context.Context) (*pb.StatusResponse, error) { return full(0), nil },
		Audit:  func(context.Context) ([]*pb.Event, error) { return lastEvents(), nil }}
	if edit != nil {
		edit(&o)
	}
	d, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func get(d *Dashboard, target string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	d.Handler().ServeHTTP(w, httptest.NewRequest("GET", target, nil))
	return w
}

func TestNewRefuses(t *testing.T) {
	if _, err := New(Options{}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Fatal(err)
	}
}

// TestPage: the page stands alone, and the policy it is served under would catch it if it
// did not: no inline script or style, no address of another origin.
func TestPage(t *testing.T) {
	d := newDashboard(t, func(o *Options) { o.Region = hostile })
	w := get(d, "/")
	page := w.Body.String()
	csp := w.Header().Get("content-security-policy")
	for _, want := range []string{"default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'", "form-action 'none'"} {
		if !strings.Contains(csp, want) {
			t.Errorf("the policy %q lacks %s", csp, want)
		}
	}
	if strings.Contains(csp, "unsafe") || w.Header().Get("x-content-type-options") != "nosniff" {
		t.Errorf("headers %v", w.Header())
	}
	if strings.Contains(page, "<img") || !strings.Contains(page, "&lt;img") {
		t.Error("the region's name is not escaped")
	}
	for name, re := range map[string]string{"inline script": `<script[^>]*>[^<]`, "inline style": `<style|style="`, "handler": `\son[a-z]+="`, "other origin": `(src|href)="(https?:)?//`} {
		if m := regexp.MustCompile(re).FindString(page); m != "" {
			t.Errorf("the page has an %s: %s", name, m)
		}
	}
	for _, want := range []string{`<html lang="en">`, `<main`, `class="skip"`, `role="status"`, `name="viewport"`, `<noscript>`} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %s", want)
		}
	}
	for _, m := range regexp.MustCompile(`(?:src|href)="(/dashboard[^"]*)"`).FindAllStringSubmatch(page, -1) {
		if a := get(d, m[1]); a.Code != 200 || a.Body.Len() == 0 || !strings.Contains(a.Header().Get("cache-control"), "immutable") {
			t.Errorf("%s: %d, %v", m[1], a.Code, a.Header())
		}
	}
	if w := get(d, "/other"); w.Code != 404 {
		t.Errorf("/other: %d", w.Code)
	}
}

// TestScriptWritesTextOnly: nothing in the script can turn text into markup or code.
func TestScriptWritesTextOnly(t *testing.T) {
	js := get(newDashboard(t, nil), "/dashboard.js").Body.String()
	for _, banned := range []string{"innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "setAttribute(\"style", "http://", "https://"} {
		if strings.Contains(js, banned) {
			t.Errorf("the script uses %s", banned)
		}
	}
}

// stream reads server-sent events of one viewer into a channel.
func stream(t *testing.T, d *Dashboard) (frames chan string, leave func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	w := &pipeWriter{header: http.Header{}, out: make(chan []byte, 100)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(w.out)
		d.Handler().ServeHTTP(w, httptest.NewRequestWithContext(ctx, "GET", "/events", nil))
	}()
	frames = make(chan string, 100)
	go func() {
		defer close(frames)
		for b := range w.out {
			frames <- string(b)
		}
	}()
	return frames, func() { cancel(); <-done }
}

type pipeWriter struct {
	header http.Header
	out    chan []byte
	code   int
}

func (w *pipeWriter) Header() http.Header { return w.header }
func (w *pipeWriter) WriteHeader(code int) {
	w.code = code
}
func (w *pipeWriter) Write(b []byte) (int, error) { w.out <- bytes.Clone(b); return len(b), nil }
func (w *pipeWriter) Flush()                      {}

// TestFrames: the first viewer gets a frame at once and then one a second; two viewers
// cost one frame a second; none cost nothing; the stream ends with Run.
func TestFrames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		d := newDashboard(t, func(o *Options) {
			o.Status = func(context.Context) (*pb.StatusResponse, error) { return full(uint64(asked.Add(1))), nil }
		})
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan error, 1)
		go func() { ran <- d.Run(ctx) }()
		time.Sleep(time.Minute + 300*time.Millisecond) // between two ticks
		if n := asked.Load(); n != 0 {
			t.Fatalf("%d frames were made for nobody", n)
		}
		one, leaveOne := stream(t, d)
		synctest.Wait()
		if len(one) != 1 {
			t.Fatalf("%d frames at once, want 1", len(one))
		}
		two, leaveTwo := stream(t, d)
		time.Sleep(10 * time.Second)
		if n := asked.Load(); n != 11 || len(one) != int(n) || len(two) != int(n) {
			t.Fatalf("asked %d times; viewers got %d and %d", n, len(one), len(two))
		}
		var frame struct {
			Status map[string]any
			Audit  []auditEntry
		}
		text, _ := strings.CutPrefix(<-one, "data: ")
		if err := json.Unmarshal([]byte(text), &frame); err != nil || frame.Status["region"] != "eu" || len(frame.Audit) != 2 {
			t.Fatalf("%v: %s", err, text)
		}
		if strings.Contains(text, "hunter2") {
			t.Fatal("the page shows the value of a variable")
		}
		leaveOne()
		before := asked.Load()
		cancel()
		if err := <-ran; err != nil {
			t.Fatal(err)
		}
		for range two { // ends because Run ended
		}
		leaveTwo()
		if asked.Load() != before {
			t.Fatal("frames after the end")
		}
		late, leaveLate := stream(t, d)
		if got := <-late; !strings.Contains(got, `"kind":"unavailable"`) {
			t.Fatalf("after the end: %s", got)
		}
		leaveLate()
	})
}

// TestProblemIsShown: without a status the page says so, and recovers.
func TestProblemIsShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var broken atomic.Bool
		broken.Store(true)
		d := newDashboard(t, func(o *Options) {
			o.Status = func(context.Context) (*pb.StatusResponse, error) {
				if broken.Load() {
					return nil, errors.New("secret path /var/lib")
				}
				return full(0), nil
			}
		})
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = d.Run(ctx) }() // ends with cancel
		frames, leave := stream(t, d)
		if got := <-frames; !strings.HasPrefix(got, "event: problem\ndata: {") || strings.Contains(got, "secret") {
			t.Fatalf("%q", got)
		}
		broken.Store(false)
		if got := <-frames; !strings.HasPrefix(got, "data: {") {
			t.Fatalf("%q", got)
		}
		leave()
		cancel()
		synctest.Wait()
	})
}

// TestViewersAreBounded: one too many is told so, and a place that is left is free.
func TestViewersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDashboard(t, func(o *Options) { o.Viewers = 1 })
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = d.Run(ctx) }() // ends with cancel
		first, leaveFirst := stream(t, d)
		<-first
		second, leaveSecond := stream(t, d)
		if got := <-second; !strings.Contains(got, "1 viewers") {
			t.Fatalf("%q", got)
		}
		leaveSecond()
		leaveFirst()
		third, leaveThird := stream(t, d)
		if got := <-third; !strings.HasPrefix(got, "data: ") {
			t.Fatalf("%q", got)
		}
		leaveThird()
		cancel()
		synctest.Wait()
	})
}

func TestClip(t *testing.T) {
	if got := clip(strings.Repeat("ä", maxDetail)); len(got) > maxDetail+len("…") || !strings.HasSuffix(got, "ä…") {
		t.Fatalf("%q", got)
	}
}

// TestScriptRuns runs the real script over the real page in a small document model and
// two frames full of markup, and reads what a person would.
func TestScriptRuns(t *testing.T) {
	node, err := exec.LookPath("node")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("node is missing; the script of the page cannot be tested")
		}
		t.Skip("node is not installed; the script of the page is not tested")
	}
	var frames [2][]byte
	for i := range frames {
		d := newDashboard(t, func(o *Options) {
			o.Status = func(context.Context) (*pb.StatusResponse, error) { return full(uint64(i)), nil }
		})
		if frames[i], err = d.body(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	for name, body := range map[string][]byte{"page.html": get(newDashboard(t, nil), "/").Body.Bytes(), "0.json": frames[0], "1.json": frames[1]} {
		if err := os.WriteFile(filepath.Join(dir, name), body, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, node, "testdata/run.js", "assets/dashboard.js", dir).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	got := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(out))
	for lines.Scan() {
		k, v, _ := strings.Cut(lines.Text(), ": ")
		got[k] = v
	}
	for where, want := range map[string]string{
		"f-requests":   "1,111", // 1010 + 101
		"f-rate":       "11",
		"f-acked":      "1 of 2",
		"link":         "live",
		"alert-list":   hostile,
		"model-list":   "chat " + hostile,
		"rollout-list": "rollback at 200",
		"node-rows":    hostile,
		"audit-rows":   "rollout advanced",
		"region-rows":  "us",
		"c-process":    "90 %",
		"current":      "limited 10 %",
		"shares":       "1 %",
		"elements":     "clean",
		"kept":         "true",
	} {
		if !strings.Contains(got[where], want) {
			t.Errorf("%s shows %q, want %q in it", where, got[where], want)
		}
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
}
