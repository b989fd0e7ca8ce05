package inference

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/xds/policy"
)

func explain(h *Handler, path, body string) Explanation {
	return h.Explain(httptest.NewRequest(http.MethodPost, path, nil), []byte(body))
}

// An explanation names what the next call then does, and why; it sends, counts and changes
// nothing.
func TestExplain(t *testing.T) {
	stable, candidate := unitIn("salt-1", 5000, 10_000), unitIn("salt-1", 0, 5000)
	quarantined := newPolicy(5000, []policy.Endpoint{at("a:1", "eu")}, []policy.Endpoint{at("b:1", "us")})
	quarantined.Models[0].Versions[1].Quarantined = true
	split := newPolicy(5000, []policy.Endpoint{at("a:1", "eu"), at("a:2", "us")}, []policy.Endpoint{at("b:1", "us")})
	for _, c := range []struct {
		what     string
		policy   *policy.Policy
		expired  bool
		user     string
		version  string
		arm      string
		endpoint string
		why      string
	}{
		{"stable", split, false, stable, "v1", "stable", "a:1", "the bucket is arm stable's: version v1"},
		{"candidate", split, false, candidate, "v2", "candidate", "b:1", "endpoint b:1 in region us is first of 1"},
		{"no unit", split, false, "", "v1", ArmUnassigned, "a:1", `carries no unit (the rule is "user")`},
		{"lease over", split, true, candidate, "v1", ArmLastGood, "a:1", "dead-man lease of 10s"},
		{"quarantined", quarantined, false, candidate, "v1", ArmLastGood, "a:1", "arm candidate's, whose version v2 may not serve"},
	} {
		t.Run(c.what, func(t *testing.T) {
			src := newSource(c.policy)
			src.s.Store(&PolicyStatus{Live: !c.expired, DeadManExpired: c.expired})
			tr := &scripted{steps: map[string][]step{}}
			for _, a := range []string{"a:1", "a:2", "b:1"} {
				tr.steps[a] = []step{{status: 200, body: answerOf("x", "y")}}
			}
			h := mustNew(t, Options{Transport: tr, Policy: src.get})
			told := tap(t, h, TapFilter{})
			e := explain(h, chatPath, chatBody(c.user, false))
			if e.Version != c.version || e.Arm != c.arm || e.Endpoint != c.endpoint || e.Refused != "" || !strings.Contains(strings.Join(e.Why, "\n"), c.why) {
				t.Errorf("%+v", e)
			}
			if len(tr.log) != 0 || len(h.Recorder().Drain(h.now())) != 0 || len(told.Calls()) != 0 || h.inflight.Load() != 0 {
				t.Errorf("a dry run left traces: sent %v", tr.log)
			}
			w := post(h, chatPath, chatBody(c.user, false))
			if got := w.Header().Get("x-outrigger-version"); got != e.Version || w.Header().Get("x-outrigger-arm") != e.Arm || tr.log[0] != e.Endpoint {
				t.Errorf("the call went to %s by %v, the explanation said %s by %s", got, tr.log, e.Version, e.Endpoint)
			}
		})
	}
}

// Open breakers are seen, and what follows from them.
func TestExplainBreakers(t *testing.T) {
	candidate := unitIn("salt-1", 0, 5000)
	p := newPolicy(5000, []policy.Endpoint{at("a:1", "eu")}, []policy.Endpoint{at("b:1", "eu"), at("b:2", "us")})
	tr := &scripted{steps: map[string][]step{"a:1": {{status: 200, body: answerOf("x", "y")}}, "b:1": {{err: errCut}}, "b:2": {{status: 200, body: answerOf("x", "y")}}}}
	h := mustNew(t, Options{Transport: tr, Policy: newSource(p).get})
	for range 2 * policy.DefaultConsecutiveFailures {
		post(h, chatPath, chatBody(candidate, false))
	}
	e := explain(h, chatPath, chatBody(candidate, false))
	if e.Version != "v2" || e.Endpoint != "b:2" || !strings.Contains(strings.Join(e.Why, "\n"), "the breakers of b:1 are open") {
		t.Errorf("%+v", e)
	}
	tr.steps["b:2"] = []step{{err: errCut}}
	for range 2 * policy.DefaultConsecutiveFailures {
		post(h, chatPath, chatBody(candidate, false))
	}
	e = explain(h, chatPath, chatBody(candidate, false))
	if e.Version != "v1" || e.Arm != ArmLastGood || e.Endpoint != "a:1" || !strings.Contains(strings.Join(e.Why, "\n"), "no endpoint of version v2 takes requests now: last good version v1 serves") {
		t.Errorf("%+v", e)
	}
	if w := post(h, chatPath, chatBody(candidate, false)); w.Header().Get("x-outrigger-version") != e.Version {
		t.Errorf("the call went to %v", w.Header())
	}
}

// What would be refused or passed on is said to be, with the status and its reason.
func TestExplainRefusals(t *testing.T) {
	passed := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a dry run was passed on") })
	src := newSource(newPolicy(0, nil, nil))
	for _, c := range []struct {
		what, path, body string
		pass             http.Handler
		status           int
		code             string
	}{
		{"unknown model", chatPath, `{"model":"nope"}`, nil, 404, "model_not_found"},
		{"unknown model, passed", chatPath, `{"model":"nope"}`, passed, 0, ""},
		{"another path", "/v1/files", `{}`, nil, 404, "unknown_url"},
		{"another path, passed", "/v1/files", `{}`, passed, 0, ""},
		{"not JSON", chatPath, `{`, nil, 400, "invalid_body"},
		{"nobody serves", chatPath, `{"model":"gpt","user":"u"}`, nil, 503, "no_endpoint"},
	} {
		h := mustNew(t, Options{Transport: roundTripper(nil), Policy: src.get, Passthrough: c.pass})
		if e := explain(h, c.path, c.body); e.Status != c.status || e.Refused != c.code || e.Passed != (c.status == 0) || len(e.Why) == 0 {
			t.Errorf("%s: %+v", c.what, e)
		}
	}
}
