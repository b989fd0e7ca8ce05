package inference

import (
	"fmt"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/expr"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// limited is the test policy as an experiment that not everybody takes part in.
func limited(e policy.Enrolment, endpoints []policy.Endpoint) *policy.Policy {
	p := newPolicy(5000, endpoints, endpoints)
	p.Models[0].Experiment, p.Models[0].Enrolment, p.Models[0].DeadMan = "ab", e, 0
	return p
}

func bucketGate(salt string, start, end uint32) policy.Gate {
	return policy.Gate{Salt: salt, Range: experiments.Range{Start: start, End: end}}
}

// Coverage and namespaces are drawn apart from the arms: a fifth of the users takes part,
// and of those half are in either arm; two experiments of one namespace share nobody, and
// together they leave nobody out.
func TestGatesAreIndependentOfArms(t *testing.T) {
	e := policy.Enrolment{Gates: []policy.Gate{bucketGate("coverage:ab", 0, 2000)}, Version: "v1"}
	one, two := policy.Enrolment{Gates: []policy.Gate{bucketGate("namespace:n", 0, 5000)}}, policy.Enrolment{Gates: []policy.Gate{bucketGate("namespace:n", 5000, 10_000)}}
	in, first := 0, 0
	const n = 20_000
	for i := range n {
		unit := fmt.Sprintf("user-%d", i)
		if one.Admits(unit) == two.Admits(unit) {
			t.Fatalf("%s is in both or neither of two experiments that share a namespace", unit)
		}
		if e.Admits(unit) {
			in++
			if experiments.Bucket("salt-1", unit) < 5000 {
				first++
			}
		}
	}
	if in < n/5-200 || in > n/5+200 || first < in/2-150 || first > in/2+150 {
		t.Errorf("%d of %d take part, %d of them in the first arm", in, n, first)
	}
	wider := policy.Enrolment{Gates: []policy.Gate{bucketGate("coverage:ab", 0, 4000)}}
	for i := range n {
		if unit := fmt.Sprintf("user-%d", i); e.Admits(unit) && !wider.Admits(unit) {
			t.Fatalf("%s left when coverage grew", unit)
		}
	}
	if a := testing.AllocsPerRun(100, func() { e.Admits("user-12345@example.org") }); a != 0 {
		t.Errorf("%v allocations per gate, want 0", a)
	}
}

// Who is not meant by the target gets the version of those outside, and leaves no unit
// row that could be taken for evidence.
func TestTargetedCalls(t *testing.T) {
	ep := []policy.Endpoint{at("a:1", "eu")}
	tr := &scripted{steps: map[string][]step{"a:1": {{status: 200, body: "{}"}}}}
	p := limited(policy.Enrolment{Target: `attributes["x-plan"] == "pro"`, Version: "v1"}, ep)
	h := mustNew(t, Options{Transport: tr, Policy: newSource(p).get})
	unit := unitIn("salt-1", 0, 5000) // in the candidate's range
	for _, c := range []struct{ plan, arm, version string }{
		{"pro", "candidate", "v2"}, {"free", policy.ArmNotEnrolled, "v1"}, {"", policy.ArmNotEnrolled, "v1"},
	} {
		w := post(h, chatPath, chatBody(unit, false), "x-plan", c.plan)
		if got := w.Header(); got.Get("x-outrigger-arm") != c.arm || got.Get("x-outrigger-version") != c.version {
			t.Errorf("plan %q: arm %q version %q, want %q %q", c.plan, got.Get("x-outrigger-arm"), got.Get("x-outrigger-version"), c.arm, c.version)
		}
	}
	for _, d := range h.Recorder().Drain(time.Now()) {
		if rows := len(d.Units); policy.Assigned(d.Arm) != (rows == 1) {
			t.Errorf("arm %s has %d unit rows", d.Arm, rows)
		}
	}
	// A target nobody here can read enrols nobody, rather than everybody.
	broken, err := CompileEnrolment(&policy.Enrolment{Target: "future(syntax)", Version: "v1"})
	if !outrigger.IsKind(err, outrigger.Invalid) || broken.Includes(expr.Subject{Unit: unit}) {
		t.Errorf("%v, %v", broken, err)
	}
	if all, err := CompileEnrolment(&policy.Enrolment{}); all != nil || err != nil || !all.Includes(expr.Subject{Unit: unit}) {
		t.Errorf("no enrolment: %v, %v", all, err)
	}
}

func TestOutside(t *testing.T) {
	m := &limited(policy.Enrolment{Target: "false", Version: "v1"}, nil).Models[0]
	if a, err := Outside(m); err != nil || a.Arm != policy.ArmNotEnrolled || a.Version.Name != "v1" || a.HasUnit {
		t.Errorf("%+v, %v", a, err)
	}
	m.Enrolment.Version, m.Versions[1].Quarantined = "v2", true
	if a, err := Outside(m); err != nil || a.Arm != ArmLastGood || a.Version.Name != "v1" {
		t.Errorf("quarantined: %+v, %v", a, err)
	}
	m.LastGood = ""
	if _, err := Outside(m); !outrigger.IsKind(err, outrigger.Unavailable) {
		t.Errorf("nothing may serve: %v", err)
	}
}

// A tester with a grant sees the arm it names, whatever the bucket; without a valid one
// the request is refused rather than made a sample of.
func TestForcedArm(t *testing.T) {
	ep := []policy.Endpoint{at("a:1", "eu")}
	tr := &scripted{steps: map[string][]step{"a:1": {{status: 200, body: "{}"}}}}
	keys, now := identity.NewKeys(), time.Now()
	p := limited(policy.Enrolment{}, ep)
	h := mustNew(t, Options{Transport: tr, Policy: newSource(p).get, Grants: keys.VerifyGrant})
	denies := mustNew(t, Options{Transport: tr, Policy: newSource(p).get})
	grant := func(k *identity.Keys, experiment, arm string) string {
		s, err := k.SignGrant(identity.Grant{Experiment: experiment, Arm: arm, Until: now.Add(time.Hour)}, now)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	body := chatBody(unitIn("salt-1", 5000, experiments.Buckets), false) // in the stable range
	for _, c := range []struct {
		name    string
		h       *Handler
		text    string
		status  int
		version string
	}{
		{"granted", h, grant(keys, "ab", "candidate"), 200, "v2"},
		{"another experiment", h, grant(keys, "cd", "candidate"), 401, ""},
		{"unknown arm", h, grant(keys, "ab", "z"), 401, ""},
		{"others' keys", h, grant(identity.NewKeys(), "ab", "candidate"), 401, ""},
		{"rubbish", h, "candidate", 401, ""},
		{"nobody verifies", denies, grant(keys, "ab", "candidate"), 401, ""},
	} {
		w := post(c.h, chatPath, body, HeaderForce, c.text)
		if c.status == 200 && tr.last.Header.Get(HeaderForce) != "" {
			t.Error("the grant was passed on to the model")
		}
		if w.Code != c.status || w.Header().Get("x-outrigger-version") != c.version {
			t.Errorf("%s: %d, version %q, %s", c.name, w.Code, w.Header().Get("x-outrigger-version"), w.Body)
		}
	}
	for _, d := range h.Recorder().Drain(time.Now()) {
		if d.Arm != policy.ArmForced || d.Requests != 0 || len(d.Units) != 0 {
			t.Errorf("a forced call was counted: %v", d)
		}
	}
}
