package dashboard

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
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

func viewOf(n uint64) *View {
	return &View{Status: full(n), Events: lastEvents(), Position: 40 + n, Rate: 12.5, Optimisers: []string{"sgd"},
		Forecasts:   map[string][]*pb.GateForecast{"r1": {{Phase: "limited", Gate: "quality", Requests: 5000}}},
		Experiments: []*pb.ExperimentResultsResponse{{Experiment: &pb.Experiment{Name: "e " + hostile, State: "draft"}}}}
}

func newDashboard(t *testing.T, edit func(*Options)) *Dashboard {
	t.Helper()
	o := Options{Region: "eu",
		View: func(context.Context, Moment) (*View, error) { return viewOf(0), nil },
		Who:  func(*http.Request) Who { return Who{Name: "ann", Role: "operator", CanAct: true, CSRF: "mine"} },
		Act:  func(context.Context, Action) error { return nil }}
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

// TestPages: every page stands alone, whatever the names in it, and the policy it is served
// under would catch it if it did not: no inline script or style, no address of another
// origin. Each shows what it is about.
func TestPages(t *testing.T) {
	d := newDashboard(t, func(o *Options) { o.Region = hostile })
	for path, wants := range map[string][]string{
		"/": {"94.55", "12.5", "v2 (candidate)", "&lt;img"}, "/rollouts": {"r1", "rolled back"}, "/experiments": {"draft", "no data"},
		"/rollouts/r1": {"limited", "aria-current=\"step\"", "rolls back at 200", "9.00 %"}, "/rollouts/r0": {"missing n9"},
		"/models": {"champion → v1", "1 %"}, "/optimisers": {"sgd"}, "/regions": {"last known", "gone since"}, "/cache": {"90.00 %", "9.00 ms"},
		"/alerts": {"critical", "resolved"}, "/audit": {"rollout advanced", "40"}} {
		w := get(d, path)
		page := w.Body.String()
		if w.Code != 200 {
			t.Errorf("%s: %d", path, w.Code)
		}
		for _, want := range wants {
			if !strings.Contains(page, want) {
				t.Errorf("%s does not show %q", path, want)
			}
		}
		csp := w.Header().Get("content-security-policy")
		for _, want := range []string{"default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'", "form-action 'self'"} {
			if !strings.Contains(csp, want) {
				t.Errorf("%s: the policy %q lacks %s", path, csp, want)
			}
		}
		if strings.Contains(csp, "unsafe") || w.Header().Get("x-content-type-options") != "nosniff" {
			t.Errorf("%s: headers %v", path, w.Header())
		}
		if strings.Contains(page, "<img") || strings.Contains(page, "hunter2") {
			t.Errorf("%s: a name became markup, or the value of a variable is shown", path)
		}
		for name, re := range map[string]string{"inline script": `<script[^>]*>[^<]`, "inline style": `<style|style="`, "handler": `\son[a-z]+="`, "other origin": `(src|href)="(https?:)?//`} {
			if found := regexp.MustCompile(re).FindString(page); found != "" {
				t.Errorf("%s has %s: %q", path, name, found)
			}
		}
	}
	if w := get(d, "/other"); w.Code != 404 {
		t.Errorf("/other: %d", w.Code)
	}
	if w := get(d, "/rollouts/none"); w.Code != 404 || !strings.Contains(w.Body.String(), "not found") {
		t.Errorf("/rollouts/none: %d", w.Code)
	}
}

// TestTimeTravel: ?at= is a position or a time, stays in the links, and takes the buttons away.
func TestTimeTravel(t *testing.T) {
	var asked Moment
	d := newDashboard(t, func(o *Options) {
		o.View = func(_ context.Context, m Moment) (*View, error) {
			asked = m
			v := viewOf(0)
			v.At = m.Time
			return v, nil
		}
	})
	page := get(d, "/rollouts/r1?at=2026-01-31T12:00:00Z").Body.String()
	if !asked.Time.Equal(time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)) || !strings.Contains(page, "looking at the past") ||
		!strings.Contains(page, `href="/models?at=2026-01-31T12%3A00%3A00Z"`) || strings.Contains(page, "<form method=\"post\" action=\"/act\"") {
		t.Errorf("%v\n%s", asked, page)
	}
	if get(d, "/?at=17"); asked.Position != 17 {
		t.Errorf("%v", asked)
	}
	if w := get(d, "/?at=yesterday"); w.Code != 400 || !strings.Contains(w.Body.String(), "give a log position or a time") {
		t.Errorf("%d", w.Code)
	}
}

// TestForms: what a form says reaches Act once, with the sequence that was seen; a form of
// another session does not; a refusal is shown with its status.
func TestForms(t *testing.T) {
	var acted []Action
	var refuse error
	d := newDashboard(t, func(o *Options) {
		o.Act = func(_ context.Context, a Action) error { acted = append(acted, a); return refuse }
	})
	post := func(form string) *httptest.ResponseRecorder {
		r := httptest.NewRequest("POST", "/act", strings.NewReader(form))
		r.Header.Set("content-type", "application/x-www-form-urlencoded")
		w := httptest.NewRecorder()
		d.Handler().ServeHTTP(w, r)
		return w
	}
	w := post("verb=approve&id=r1&gate=g&reason=ok&sequence=7&csrf=mine")
	if w.Code != 303 || w.Header().Get("location") != "/rollouts/r1?done=approve" || len(acted) != 1 || acted[0] != (Action{"approve", "r1", "g", "ok", 7}) {
		t.Errorf("%d %v %v", w.Code, w.Header(), acted)
	}
	for _, form := range []string{"verb=abort&id=r1&sequence=7", "verb=abort&id=r1&sequence=7&csrf=other"} {
		if w := post(form); w.Code != 403 || len(acted) != 1 {
			t.Errorf("%s: %d, %v", form, w.Code, acted)
		}
	}
	refuse = outrigger.Errorf(outrigger.Conflict, "it has moved on")
	if w := post("verb=abort&id=r1&sequence=7&csrf=mine"); w.Code != 412 || !strings.Contains(w.Body.String(), "it has moved on") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// TestScriptStaysSmall: the script makes no markup of its own and no code of text.
func TestScriptStaysSmall(t *testing.T) {
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

// TestFrames: the first viewer gets a frame at once and then one a second, all viewers the
// same ones; the stream ends with Run.
func TestFrames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDashboard(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan error, 1)
		go func() { ran <- d.Run(ctx) }()
		time.Sleep(time.Minute + 300*time.Millisecond) // between two ticks
		one, leaveOne := stream(t, d)
		synctest.Wait()
		if len(one) != 1 {
			t.Fatalf("%d frames at once, want 1", len(one))
		}
		if first := <-one; first != "data: 1\n\n" {
			t.Fatalf("%q: frames were made for nobody", first)
		}
		two, leaveTwo := stream(t, d)
		time.Sleep(10 * time.Second)
		if len(one) != 10 || len(two) != 11 {
			t.Fatalf("viewers got %d and %d", len(one), len(two))
		}
		leaveOne()
		cancel()
		if err := <-ran; err != nil {
			t.Fatal(err)
		}
		for range two { // ends because Run ended
		}
		leaveTwo()
		late, leaveLate := stream(t, d)
		if got := <-late; !strings.Contains(got, `"kind":"unavailable"`) {
			t.Fatalf("after the end: %s", got)
		}
		leaveLate()
	})
}

// TestProblemIsShown: without a view there is no page, and nothing of why leaks.
func TestProblemIsShown(t *testing.T) {
	d := newDashboard(t, func(o *Options) {
		o.View = func(context.Context, Moment) (*View, error) { return nil, errors.New("secret path /var/lib") }
	})
	if w := get(d, "/"); w.Code != 500 || strings.Contains(w.Body.String(), "secret") {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
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
