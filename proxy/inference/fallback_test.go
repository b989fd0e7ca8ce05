package inference

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// outcomes sums what is waiting over the regions, by arm.
func outcomes(h *Handler) map[string]*pb.OutcomeDelta {
	out := map[string]*pb.OutcomeDelta{}
	for _, d := range h.Recorder().Drain(time.Now()) {
		if sum := out[d.Arm]; sum != nil {
			sum.Requests, sum.Failures, sum.Attempts = sum.Requests+d.Requests, sum.Failures+d.Failures, sum.Attempts+d.Attempts
			continue
		}
		out[d.Arm] = d
	}
	return out
}

// A candidate that cannot be reached: the last good version serves the same request and
// the candidate is charged. A candidate that answers, however badly, is not covered up.
func TestFallBackToLastGood(t *testing.T) {
	refused := []step{{err: errCut}}
	ok := []step{{status: 200, body: answerOf("gpt-v1", "from v1")}}
	okStream := []step{{status: 200, ctype: "text/event-stream", body: streamOf("gpt-v1", "from v1")}}
	two := []policy.Endpoint{at("c1:1", "eu"), at("c2:1", "us")}
	tests := []struct {
		name      string
		candidate []policy.Endpoint
		steps     map[string][]step
		edit      func(m *policy.Model)
		stream    bool

		status       int
		arm, version string
		attempts     string
		has          string
		charged      bool // the candidate has one failure
		moved        bool // the last good version has an outcome
	}{
		{"one endpoint refuses", two[:1], map[string][]step{"c1:1": refused, "g:1": ok}, nil, false, 200, ArmLastGood, "v1", "2", "from v1", true, true},
		{"all endpoints refuse", two, map[string][]step{"c1:1": refused, "c2:1": refused, "g:1": ok}, nil, false, 200, ArmLastGood, "v1", "3", "from v1", true, true},
		{"a stream", two[:1], map[string][]step{"c1:1": refused, "g:1": okStream}, nil, true, 200, ArmLastGood, "v1", "2", "[DONE]", true, true},
		{"attempts used up: one more for the last good", two, map[string][]step{"c1:1": refused, "g:1": ok},
			func(m *policy.Model) { m.MaxAttempts = 1 }, false, 200, ArmLastGood, "v1", "2", "from v1", true, true},
		{"no endpoint at all", nil, map[string][]step{"g:1": ok}, nil, false, 200, ArmLastGood, "v1", "1", "from v1", true, true},
		{"last good is down too", two[:1], map[string][]step{"c1:1": refused, "g:1": refused}, nil, false, 503, ArmLastGood, "v1", "2", "no endpoint of version v1 answered", true, true},
		{"last good fails by itself", two[:1], map[string][]step{"c1:1": refused, "g:1": {{status: 500, body: `{"error":{"message":"v1 broke"}}`}}}, nil, false, 500, ArmLastGood, "v1", "2", "v1 broke", true, true},
		{"last good has no endpoint", two[:1], map[string][]step{"c1:1": refused},
			func(m *policy.Model) { m.Versions[0].Endpoints = nil }, false, 503, "candidate", "v2", "1", "no endpoint of version v2 answered", true, false},
		{"last good is quarantined", two[:1], map[string][]step{"c1:1": refused, "g:1": ok},
			func(m *policy.Model) { m.Versions[0].Quarantined = true }, false, 503, "candidate", "v2", "1", "version v2", true, false},
		{"there is no last good", two[:1], map[string][]step{"c1:1": refused, "g:1": ok},
			func(m *policy.Model) { m.LastGood = "" }, false, 503, "candidate", "v2", "1", "version v2", true, false},
		{"the candidate is the last good", two[:1], map[string][]step{"c1:1": refused, "g:1": ok},
			func(m *policy.Model) { m.LastGood = "v2" }, false, 503, "candidate", "v2", "1", "version v2", true, false},

		{"an answer, though bad", two[:1], map[string][]step{"c1:1": {{status: 500, body: `{"error":{"message":"v2 broke"}}`}}, "g:1": ok}, nil, false, 500, "candidate", "v2", "1", "v2 broke", true, false},
		{"one answers badly, the other refuses", two, map[string][]step{"c1:1": {{status: 500, body: "{}"}}, "c2:1": refused, "g:1": ok}, nil, false, 503, "candidate", "v2", "2", "version v2", true, false},
		{"busy", two[:1], map[string][]step{"c1:1": {{status: 429, body: `{"error":{"message":"busy"}}`}}, "g:1": ok}, nil, false, 429, "candidate", "v2", "1", "busy", false, false},
		{"a stream lost before content", two[:1], map[string][]step{"c1:1": {{status: 200, ctype: "text/event-stream", body: chunkOf("gpt-v2", roleDelta), cut: true}}, "g:1": okStream}, nil, true, 503, "candidate", "v2", "1", "version v2", true, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := newPolicy(1000, []policy.Endpoint{at("g:1", "eu")}, tt.candidate)
			if tt.edit != nil {
				tt.edit(&p.Models[0])
			}
			tr := &scripted{steps: tt.steps}
			h := mustNew(t, Options{Transport: tr, Policy: newSource(p).get})
			user := unitIn("salt-1", 0, 1000)
			w := post(h, chatPath, chatBody(user, tt.stream))
			head := w.Header()
			if w.Code != tt.status || head.Get("x-outrigger-arm") != tt.arm || head.Get("x-outrigger-version") != tt.version || head.Get("x-outrigger-attempts") != tt.attempts {
				t.Errorf("%d arm %s version %s after %s attempts, want %d %s %s %s", w.Code, head.Get("x-outrigger-arm"), head.Get("x-outrigger-version"), head.Get("x-outrigger-attempts"), tt.status, tt.arm, tt.version, tt.attempts)
			}
			if !strings.Contains(w.Body.String(), tt.has) {
				t.Errorf("body %s", w.Body)
			}
			if tt.version == "v1" && !strings.Contains(tr.body, `"gpt-v1"`) {
				t.Errorf("the last good version was asked for %s", tr.body)
			}
			got := outcomes(h)
			candidate, good := got["candidate"], got[ArmLastGood]
			if candidate == nil || candidate.Version != "v2" || candidate.Requests != 1 || (candidate.Failures == 1) != tt.charged || (len(candidate.FailedUnits) == 1) != tt.charged {
				t.Errorf("candidate: %v", candidate)
			}
			if (good != nil) != tt.moved || len(got) > 2 {
				t.Fatalf("outcomes %v", got)
			}
			total := candidate.Attempts
			if good != nil {
				total += good.Attempts
				failed := uint64(0)
				if tt.status >= 500 {
					failed = 1
				}
				if good.Version != "v1" || good.Requests != 1 || good.Failures != failed || candidate.FailedUnits[0] != experiments.UnitHash("salt-1", user) {
					t.Errorf("last good: %v", good)
				}
			}
			if want := uint64(len(tr.log)); total != want {
				t.Errorf("%d attempts accounted for, %d made", total, want)
			}
		})
	}
}

// A candidate that stays down costs its users the failed attempts until its breakers
// open, and from then on nothing; evidence accrues all the while, also from a client's
// point of view only once per logical request.
func TestFallBackWithOpenBreakers(t *testing.T) {
	p := newPolicy(1000, []policy.Endpoint{at("g:1", "eu")}, []policy.Endpoint{at("c1:1", "eu"), at("c2:1", "us")})
	p.Models[0].Versions[1].ConsecutiveFailures = 3
	tr := &scripted{steps: map[string][]step{"c1:1": {{err: errCut}}, "c2:1": {{err: errCut}}, "g:1": {{status: 200, body: answerOf("gpt-v1", "x")}}}}
	h := mustNew(t, Options{Transport: tr, Policy: newSource(p).get})
	user := unitIn("salt-1", 0, 1000)
	const n = 50
	for i := range n {
		w := post(h, chatPath, chatBody(user, false))
		want := "3"
		if i >= 3 {
			want = "1"
		}
		if w.Code != 200 || w.Header().Get("x-outrigger-attempts") != want {
			t.Fatalf("request %d: %d after %s attempts, want %s", i, w.Code, w.Header().Get("x-outrigger-attempts"), want)
		}
	}
	if w := post(h, chatPath, chatBody(user, false), "X-Stainless-Retry-Count", "1"); w.Code != 200 {
		t.Errorf("retry of the client: %d", w.Code)
	}
	got := outcomes(h)
	if c, g := got["candidate"], got[ArmLastGood]; c.Requests != n || c.Failures != n || c.Attempts != 6 || g.Requests != n || g.Failures != 0 || g.Attempts != n+1 {
		t.Errorf("candidate %v\nlast good %v", c, g)
	}
}

// The failure is known while the fallback is still answering, and the last good
// version's own limits hold for what is moved to it.
func TestFallBackReportsAtOnceAndObeysLimits(t *testing.T) {
	p := newPolicy(1000, []policy.Endpoint{at("g:1", "eu")}, []policy.Endpoint{at("c:1", "eu")})
	p.Models[0].Versions[0].MaxRequests = 1
	asked, answer := make(chan struct{}), make(chan struct{})
	tr := roundTripper(func(r *http.Request) (*http.Response, error) {
		if r.URL.Host == "c:1" {
			return nil, errCut
		}
		close(asked)
		<-answer
		return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader("{}")), ContentLength: 2}, nil
	})
	h := mustNew(t, Options{Transport: tr, Policy: newSource(p).get})
	user := unitIn("salt-1", 0, 1000)
	done := make(chan int)
	go func() { done <- post(h, chatPath, chatBody(user, false)).Code }()
	<-asked
	select {
	case <-h.Recorder().Urgent():
	default:
		t.Error("the failure is not reported while the fallback runs")
	}
	if w := post(h, chatPath, chatBody(user, false)); w.Code != 503 || w.Header().Get("x-outrigger-arm") != "candidate" {
		t.Errorf("beyond the last good version's limit: %d %v", w.Code, w.Header())
	}
	close(answer)
	if code := <-done; code != 200 {
		t.Errorf("the first: %d", code)
	}
	got := outcomes(h)
	if c, g := got["candidate"], got[ArmLastGood]; c.Failures != 2 || c.Requests != 2 || g.Requests != 1 {
		t.Errorf("candidate %v\nlast good %v", c, g)
	}
}

// A client that leaves while the candidate is tried is no reason to try another.
func TestNoFallBackForAClientThatLeft(t *testing.T) {
	p := newPolicy(1000, []policy.Endpoint{at("g:1", "eu")}, []policy.Endpoint{at("c:1", "eu")})
	tried, asked := 0, make(chan struct{})
	h := mustNew(t, Options{Policy: newSource(p).get, Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
		if tried++; tried == 1 {
			close(asked)
		}
		<-r.Context().Done()
		return nil, r.Context().Err()
	})})
	ctx, cancel := context.WithCancel(t.Context())
	r := httptest.NewRequestWithContext(ctx, "POST", chatPath, strings.NewReader(chatBody(unitIn("salt-1", 0, 1000), false)))
	done := make(chan struct{})
	go func() { h.ServeHTTP(httptest.NewRecorder(), r); close(done) }()
	<-asked
	cancel()
	<-done
	if d := only(t, h); tried != 1 || d.Cancelled != 1 || d.Failures != 0 || d.Arm != "candidate" {
		t.Errorf("%d tries, outcome %v", tried, d)
	}
}
