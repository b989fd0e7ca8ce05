package inference

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

func askSelect(t *testing.T, h *Handler, method, target, body string, header ...string) (int, Selection, string) {
	t.Helper()
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeSelect(w, r)
	var s Selection
	if err := json.Unmarshal(w.Body.Bytes(), &s); err != nil {
		t.Fatalf("%s: %v", w.Body, err)
	}
	return w.Code, s, w.Body.String()
}

// TestSelectAgreesWithRouting: whatever the policy, a call that carries what a selection
// says goes to the version that it names, under its arm.
func TestSelectAgreesWithRouting(t *testing.T) {
	v1, v2 := serve(t, &modelServer{name: "gpt-v1"}), serve(t, &modelServer{name: "gpt-v2"})
	for _, unit := range []string{"user", "session", "request"} {
		p := newPolicy(5000, eps(v1), eps(v2))
		m := &p.Models[0]
		m.Unit = experiments.Unit(unit)
		m.Experiment = "ab"
		w := newMesh(t, p, Options{})
		seen := map[string]int{}
		for i := range 40 {
			context := fmt.Sprintf(`{%q: "n%d"}`, unit, i)
			if i%10 == 9 {
				context = `{}`
			}
			code, s, raw := askSelect(t, w.handler, "POST", SelectPath, `{"type":"gpt","context":`+context+`}`)
			if code != 200 {
				t.Fatalf("%d %s", code, raw)
			}
			r := httptest.NewRequest("POST", chatPath, strings.NewReader(`{"model":"gpt","messages":[{"content":"hi"}]}`))
			for name, v := range s.Headers {
				r.Header.Set(name, v)
			}
			a := httptest.NewRecorder()
			w.handler.ServeHTTP(a, r)
			if got := a.Header(); a.Code != 200 || got.Get("X-Outrigger-Version") != s.Version || got.Get("X-Outrigger-Arm") != s.Arm {
				t.Fatalf("unit %s: selected %s, routed to %s %s (%d %s)", unit, raw, got.Get("X-Outrigger-Version"), got.Get("X-Outrigger-Arm"), a.Code, a.Body)
			}
			seen[s.Reason+" "+s.Version]++
		}
		if seen["experiment v1"] == 0 || seen["experiment v2"] == 0 || (unit != "request") != (seen["no_unit v1"] == 4) {
			t.Errorf("unit %s: %v", unit, seen)
		}
	}
}

func TestSelectReasons(t *testing.T) {
	src := newSource(newPolicy(0, eps("a:1"), eps("b:1")))
	h := mustNew(t, Options{Policy: src.get, Transport: &scripted{}})
	want := func(reason, version string, body string, header ...string) Selection {
		t.Helper()
		code, s, raw := askSelect(t, h, "POST", SelectPath, body, header...)
		if code != 200 || s.Reason != reason || s.Version != version || s.Why == "" {
			t.Errorf("%d %s; want %s by %s", code, raw, version, reason)
		}
		return s
	}
	in, out := unitIn("salt-1", 0, 1000), unitIn("salt-1", 1000, 10_000)
	s := want("champion", "v1", `{"type":"gpt","context":{"user":"`+in+`"}}`)
	if s.Upstream != "gpt-v1" || len(s.Endpoints) != 1 || s.Endpoints[0] != "a:1" || s.Policy != "live" || s.Bucket < 0 || s.WeightEpoch != 3 {
		t.Errorf("%+v", s)
	}
	p := newPolicy(1000, eps("a:1"), eps("b:1"))
	src.p.Store(p)
	want("rollout", "v2", `{"type":"gpt","context":{"user_id":"`+in+`"}}`)
	want("rollout", "v1", `{"type":"gpt","context":{"user":"`+out+`"}}`)
	want("rollout", "v2", `{"type":"gpt"}`, "X-User-Id", in)
	if s = want("no_unit", "v1", `{"type":"gpt","context":{"plan":7,"new":true}}`); s.Bucket != -1 {
		t.Errorf("%+v", s)
	}
	src.s.Store(&PolicyStatus{DeadManExpired: true})
	if s = want("last_good", "v1", `{"type":"gpt","context":{"user":"`+in+`"}}`); s.Policy != "last-good" {
		t.Errorf("%+v", s)
	}
	src.s.Store(&PolicyStatus{Live: true})
	p = newPolicy(1000, eps("a:1"), eps("b:1"))
	p.Models[0].Experiment = "ab"
	p.Models[0].Arms[1].Settings = []policy.Setting{{Name: "temperature", JSON: "0.2"}}
	p.Models[0].Enrolment = policy.Enrolment{Target: `attributes.plan == "pro"`, Version: "v1"}
	src.p.Store(p)
	if s = want("experiment", "v2", `{"type":"gpt","context":{"user":"`+in+`","plan":"pro"}}`); string(s.Settings["temperature"]) != "0.2" || s.Experiment != "ab" {
		t.Errorf("%+v", s)
	}
	want("not_enrolled", "v1", `{"type":"gpt","context":{"user":"`+in+`","plan":"free"}}`)
	if code, s, raw := askSelect(t, h, "GET", SelectPath+"?type=gpt&plan=pro&user="+url.QueryEscape(in), ""); code != 200 || s.Version != "v2" {
		t.Errorf("%d %s", code, raw)
	}
	if len(h.Recorder().Drain(h.now())) != 0 {
		t.Error("selecting was reported as a sample")
	}
	for _, c := range []struct {
		method, target, body string
		header               []string
		code                 int
		text                 string
	}{
		{"POST", SelectPath, `{"type":"nope"}`, nil, 404, "nope"},
		{"POST", SelectPath, `{}`, nil, 400, "type is missing"},
		{"POST", SelectPath, `{"type":"gpt","context":{"x":[]}}`, nil, 400, "context.x"},
		{"POST", SelectPath, `{"type":`, nil, 400, "the body"},
		{"GET", SelectPath + "?type=gpt&user=a&user=b", "", nil, 400, "2 times"},
		{"PUT", SelectPath, "", nil, 400, "GET and POST"},
		{"POST", SelectPath, `{"type":"gpt","context":{"x-outrigger-force":"forged"}}`, []string{"X-Outrigger-Force", "forged"}, 401, "not accepted"},
	} {
		if code, _, raw := askSelect(t, h, c.method, c.target, c.body, c.header...); code != c.code || !strings.Contains(raw, c.text) {
			t.Errorf("%s %s %s: %d %s; want %d with %q", c.method, c.target, c.body, code, raw, c.code, c.text)
		}
	}
	src.p.Store(nil)
	if code, _, raw := askSelect(t, h, "POST", SelectPath, `{"type":"gpt"}`); code != http.StatusServiceUnavailable {
		t.Errorf("without a policy: %d %s", code, raw)
	}
}
