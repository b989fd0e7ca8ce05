package inference

import (
	"fmt"
	"math"
	"net/http"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

func secs(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func TestAssign(t *testing.T) {
	inCandidate, inStable := unitIn("salt-1", 0, 1000), unitIn("salt-1", 1000, experiments.Buckets)
	live, cut := PolicyStatus{Live: true}, PolicyStatus{DeadManExpired: true}
	tests := []struct {
		name         string
		edit         func(m *policy.Model)
		unit         string
		status       PolicyStatus
		arm, version string // version "" = refused
	}{
		{"candidate bucket", nil, inCandidate, live, "candidate", "v2"},
		{"stable bucket", nil, inStable, live, "stable", "v1"},
		{"no unit", nil, "", live, ArmUnassigned, "v1"},
		{"no unit, no last good: widest arm", func(m *policy.Model) { m.LastGood = "" }, "", live, ArmUnassigned, "v1"},
		{"no unit, widest arm quarantined", func(m *policy.Model) { m.LastGood, m.Versions[0].Quarantined = "", true }, "", live, ArmUnassigned, "v2"},
		{"control plane gone, lease not lapsed", nil, inCandidate, PolicyStatus{}, "candidate", "v2"},
		{"dead-man: candidate bucket", nil, inCandidate, cut, ArmLastGood, "v1"},
		{"dead-man: stable bucket keeps its arm", nil, inStable, cut, "stable", "v1"},
		{"dead-man without a candidate live", func(m *policy.Model) { m.DeadMan = 0 }, inCandidate, cut, "candidate", "v2"},
		{"dead-man without a last good", func(m *policy.Model) { m.LastGood = "" }, inCandidate, cut, "candidate", "v2"},
		{"candidate quarantined", func(m *policy.Model) { m.Versions[1].Quarantined = true }, inCandidate, live, ArmLastGood, "v1"},
		{"candidate unknown", func(m *policy.Model) { m.Arms[1].Version = "v9" }, inCandidate, live, ArmLastGood, "v1"},
		{"hole in the ranges", func(m *policy.Model) { m.Arms = m.Arms[:1] }, inCandidate, live, ArmLastGood, "v1"},
		{"all quarantined", func(m *policy.Model) { m.Versions[0].Quarantined, m.Versions[1].Quarantined = true, true }, inCandidate, live, "", ""},
		{"all quarantined, no unit", func(m *policy.Model) { m.Versions[0].Quarantined, m.Versions[1].Quarantined = true, true }, "", live, "", ""},
		{"quarantined and no last good", func(m *policy.Model) { m.LastGood, m.Versions[1].Quarantined = "", true }, inCandidate, live, "", ""},
	}
	for _, tt := range tests {
		m := &newPolicy(1000, nil, nil).Models[0]
		if tt.edit != nil {
			tt.edit(m)
		}
		a, err := Assign(m, tt.unit, tt.status)
		if tt.version == "" {
			if !outrigger.IsKind(err, outrigger.Unavailable) {
				t.Errorf("%s: %+v, %v", tt.name, a, err)
			}
			continue
		}
		if err != nil || a.Arm != tt.arm || a.Version.Name != tt.version {
			t.Errorf("%s: arm %s version %v, %v; want %s %s", tt.name, a.Arm, a.Version, err, tt.arm, tt.version)
			continue
		}
		if a.HasUnit != (tt.unit != "") || a.HasUnit && (a.Bucket != experiments.Bucket("salt-1", tt.unit) || a.Unit != experiments.UnitHash("salt-1", tt.unit)) {
			t.Errorf("%s: bucket %d unit %x", tt.name, a.Bucket, a.Unit)
		}
	}
}

func TestUnitOf(t *testing.T) {
	all := &shape.Envelope{User: "u", SafetyIdentifier: "s", PromptCacheKey: "p"}
	h := func(kv ...string) http.Header {
		h := http.Header{}
		for i := 0; i < len(kv); i += 2 {
			h.Set(kv[i], kv[i+1])
		}
		return h
	}
	tests := []struct {
		name string
		rule experiments.Unit
		h    http.Header
		e    *shape.Envelope
		want string
	}{
		{"header first", experiments.UnitUser, h("x-user-id", "h", "x-session-id", "sess"), all, "h"},
		{"safety identifier", experiments.UnitUser, h(), all, "s"},
		{"user", experiments.UnitUser, h(), &shape.Envelope{User: "u", PromptCacheKey: "p"}, "u"},
		{"user rule ignores sessions", experiments.UnitUser, h("x-session-id", "sess"), &shape.Envelope{PromptCacheKey: "p"}, ""},
		{"empty rule is user", "", h("x-session-id", "sess"), &shape.Envelope{}, ""},
		{"session rule prefers users", experiments.UnitSession, h("x-session-id", "sess"), all, "s"},
		{"session", experiments.UnitSession, h("x-session-id", "sess"), &shape.Envelope{PromptCacheKey: "p"}, "sess"},
		{"cache key", experiments.UnitSession, h("x-request-id", "r"), &shape.Envelope{PromptCacheKey: "p"}, "p"},
		{"session rule without", experiments.UnitSession, h("x-request-id", "r"), &shape.Envelope{}, ""},
		{"request id", experiments.UnitRequest, h("x-request-id", "r", "idempotency-key", "i"), &shape.Envelope{}, "r"},
		{"idempotency key", experiments.UnitRequest, h("idempotency-key", "i"), &shape.Envelope{}, "i"},
	}
	for _, tt := range tests {
		if got := unitOf(tt.rule, headerFields(tt.h), tt.e); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
	a, b := unitOf(experiments.UnitRequest, headerFields(h()), &shape.Envelope{}), unitOf(experiments.UnitRequest, headerFields(h()), &shape.Envelope{})
	if a == "" || a == b {
		t.Errorf("fresh request units %q, %q", a, b)
	}
}

// 20,000 distinct users over a 90/10 split: within a point of 10 %, and two sidecars
// agree on every one of them.
func TestSplit(t *testing.T) {
	ep := []policy.Endpoint{at("a:1", "eu")}
	tr := &scripted{steps: map[string][]step{"a:1": {{status: 200, body: "{}"}}}}
	h1 := mustNew(t, Options{Transport: tr, Policy: newSource(newPolicy(1000, ep, ep)).get})
	h2 := mustNew(t, Options{Transport: tr, Region: "us", Policy: newSource(newPolicy(1000, ep, ep)).get})
	const n = 20_000
	hits := 0
	for i := range n {
		body := chatBody(fmt.Sprintf("user-%d@example.org", i), false)
		w := post(h1, chatPath, body)
		arm := w.Header().Get("x-outrigger-arm")
		if arm == "candidate" {
			hits++
		}
		if i%10 == 0 { // every tenth is enough to tell, and halves the time
			if w2 := post(h2, chatPath, body); w2.Header().Get("x-outrigger-arm") != arm || w2.Header().Get("x-outrigger-bucket") != w.Header().Get("x-outrigger-bucket") {
				t.Fatalf("user %d: %q in one sidecar, %q in the other", i, arm, w2.Header().Get("x-outrigger-arm"))
			}
		}
		tr.log = tr.log[:0]
	}
	if share := float64(hits) / n; math.Abs(share-0.10) > 0.01 {
		t.Errorf("candidate share %.4f, want 0.10 ± 0.01", share)
	}
	var total uint64
	for _, d := range h1.Recorder().Drain(time.Now()) {
		if d.Version == "v2" && d.Requests != uint64(hits) {
			t.Errorf("candidate cell has %d, the client saw %d", d.Requests, hits)
		}
		total += d.Requests
		if uint64(len(d.Units))+d.UnitsDropped != d.Requests {
			t.Errorf("%s: %d rows and %d dropped for %d distinct users", d.Arm, len(d.Units), d.UnitsDropped, d.Requests)
		}
	}
	if total != n {
		t.Errorf("recorded %d of %d", total, n)
	}
}

// The assignment path (model look-up, unit, bucket, arm) does not allocate.
func TestAssignAllocs(t *testing.T) {
	p := newPolicy(1000, nil, nil)
	h := http.Header{"X-User-Id": {"user-12345@example.org"}}
	e := &shape.Envelope{}
	var sink Assignment
	if n := testing.AllocsPerRun(1000, func() {
		m := p.Model("gpt")
		sink, _ = Assign(m, unitOf(m.Unit, headerFields(h), e), PolicyStatus{Live: true})
	}); n != 0 {
		t.Errorf("%v allocations per assignment, want 0 (%+v)", n, sink)
	}
	body := []byte(`{"model":"gpt","messages":[{"role":"user","content":"hello \"there\""}],"temperature":0.7,"stream":true}`)
	// The model's name, and the callback's captured state.
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := shape.Scan(body); err != nil {
			t.Fatal(err)
		}
	}); n > 4 {
		t.Errorf("%v allocations per scan, want at most 4", n)
	}
}
