package deploy

import (
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/expr"
)

// epoch is a Sunday, 12:00 UTC.
func TestGates(t *testing.T) {
	known := map[string]expr.Measure{"error_rate": {Low: .001, High: .004, Point: .002, N: 3000, Known: true}}
	decided := func(o Outcome) map[string]*pb.RolloutGateDecided {
		return map[string]*pb.RolloutGateDecided{"g": {Gate: "g", Outcome: string(o), Reason: "answered"}}
	}
	test := &pb.RolloutCheck{Url: "http://ci/test"}
	approvals := func(who ...string) (out []Approval) {
		for i, w := range who {
			out = append(out, Approval{Gate: "g", Approver: w, At: at(60 * i)})
		}
		return out
	}
	for _, c := range []struct {
		name    string
		gate    *pb.RolloutGate
		rollout Rollout
		after   time.Duration // since the phase began
		want    Outcome
		reason  string
	}{
		{"metric passes", &pb.RolloutGate{Kind: GateMetrics, Conditions: []string{"error_rate < 0.01"}}, Rollout{}, 0, Pass, "n = 3000"},
		{"metric fails", &pb.RolloutGate{Kind: GateMetrics, Conditions: []string{"error_rate < 0.0005"}}, Rollout{}, 0, Fail, "false"},
		{"metric needs more", &pb.RolloutGate{Kind: GateMetrics, Conditions: []string{"error_rate < 0.002"}}, Rollout{}, 0, Inconclusive, "unknown"},
		{"no data is no pass", &pb.RolloutGate{Kind: GateMetrics, Conditions: []string{"error_rate < 0.01", "user_satisfaction > 0.95"}}, Rollout{}, 0, Inconclusive, "no data"},
		{"one certain failure is enough", &pb.RolloutGate{Kind: GateMetrics, Conditions: []string{"user_satisfaction > 0.95", "error_rate > 0.01"}}, Rollout{}, 0, Fail, "false"},
		{"nobody", &pb.RolloutGate{Kind: GateApproval}, Rollout{}, 0, Inconclusive, "0 of 1"},
		{"one of one", &pb.RolloutGate{Kind: GateApproval}, Rollout{Approvals: approvals("bob")}, 0, Pass, "approved by bob"},
		{"the author", &pb.RolloutGate{Kind: GateApproval}, Rollout{Author: "bob", Approvals: approvals("bob")}, 0, Inconclusive, "0 of 1"},
		{"a stranger", &pb.RolloutGate{Kind: GateApproval, Approvers: []string{"cat"}}, Rollout{Approvals: approvals("bob")}, 0, Inconclusive, "0 of 1"},
		{"two of two", &pb.RolloutGate{Kind: GateApproval, Approvals: 2}, Rollout{Approvals: approvals("bob", "cat")}, 0, Pass, "bob, cat"},
		{"one of two expired", &pb.RolloutGate{Kind: GateApproval, Approvals: 2, Expiry: durationpb.New(time.Minute)}, Rollout{Approvals: approvals("bob", "cat")}, 90 * time.Second, Inconclusive, "1 of 2"},
		{"not run", &pb.RolloutGate{Kind: GateTest, Check: test}, Rollout{}, 0, Inconclusive, "not run"},
		{"run", &pb.RolloutGate{Kind: GateTest, Check: test}, Rollout{Decided: decided(Pass)}, 0, Pass, "answered"},
		{"run and failed", &pb.RolloutGate{Kind: GateTest, Check: test}, Rollout{Decided: decided(Fail)}, 0, Fail, "answered"},
		{"dwell", &pb.RolloutGate{Kind: GateTime, Dwell: durationpb.New(time.Hour)}, Rollout{}, 59 * time.Minute, Inconclusive, "1m0s of 1h0m0s left"},
		{"dwelt", &pb.RolloutGate{Kind: GateTime, Dwell: durationpb.New(time.Hour)}, Rollout{}, time.Hour, Pass, ""},
		{"Sunday", &pb.RolloutGate{Kind: GateTime, Hours: []string{"mon-fri 09:00-17:00"}}, Rollout{}, 0, Inconclusive, "outside"},
		{"Monday", &pb.RolloutGate{Kind: GateTime, Hours: []string{"mon-fri 09:00-17:00"}}, Rollout{}, 24 * time.Hour, Pass, "within"},
		{"over the week's end", &pb.RolloutGate{Kind: GateTime, Hours: []string{"fri-mon 09:00-17:00"}}, Rollout{}, 0, Pass, "within"},
		{"the end is outside", &pb.RolloutGate{Kind: GateTime, Hours: []string{"sun 09:00-12:00"}}, Rollout{}, 0, Inconclusive, "outside"},
		{"any day", &pb.RolloutGate{Kind: GateTime, Hours: []string{"12:00-24:00"}}, Rollout{}, 0, Pass, "within"},
		{"elsewhere it is later", &pb.RolloutGate{Kind: GateTime, Hours: []string{"sun 17:00-18:00"}, UtcOffset: "+05:30"}, Rollout{}, 0, Pass, "within"},
		{"frozen", &pb.RolloutGate{Kind: GateTime, Freezes: []string{"2026-02-27/2026-03-01"}}, Rollout{}, 0, Inconclusive, "frozen until the end of 2026-03-01"},
		{"thawed", &pb.RolloutGate{Kind: GateTime, Freezes: []string{"2026-02-27/2026-03-01"}}, Rollout{}, 12 * time.Hour, Pass, ""},
		{"one day", &pb.RolloutGate{Kind: GateTime, Freezes: []string{"2026-03-01"}}, Rollout{}, 0, Inconclusive, "frozen"},
		{"experiment", &pb.RolloutGate{Kind: GateExperiment, Experiment: "ab"}, Rollout{}, 0, Fail, "kept"},
	} {
		c.gate.Name = "g"
		k, err := NewKeeper(Phase{Name: "p", Gates: []*pb.RolloutGate{c.gate}})
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		c.rollout.PhaseSince = epoch
		got := k.Judge(&c.rollout, Observed{Measure: func(n string) expr.Measure { return known[n] },
			Experiment: func(n string) (Outcome, string) { return Fail, n + " kept the control" }}, epoch.Add(c.after))
		if len(got) != 1 || got[0].Outcome != c.want || !strings.Contains(got[0].Reason, c.reason) {
			t.Errorf("%s: %+v, want %s with %q", c.name, got, c.want, c.reason)
		}
		// What an experiment says comes from outside; everything else knows nothing by itself.
		if c.gate.GetKind() != GateTime && c.gate.GetKind() != GateExperiment {
			if bare := k.Judge(&Rollout{PhaseSince: epoch}, Observed{}, epoch.Add(c.after)); bare[0].Outcome != Inconclusive {
				t.Errorf("%s: without data %+v", c.name, bare[0])
			}
		}
	}
}

// What a gate that does not pass does to its phase.
func TestGatePolicies(t *testing.T) {
	failing := func(g *pb.RolloutGate) *pb.RolloutGate {
		g.Name, g.Kind, g.Check = "g", GateTest, &pb.RolloutCheck{Command: []string{"x"}}
		return g
	}
	minute := durationpb.New(time.Minute)
	for _, c := range []struct {
		name    string
		gate    *pb.RolloutGate
		outcome Outcome
		after   int
		want    Kind
	}{
		{"passes", &pb.RolloutGate{}, Pass, 0, Advance},
		{"fails", &pb.RolloutGate{}, Fail, 0, Hold},
		{"fails and rolls back", &pb.RolloutGate{OnFail: OnRollback}, Fail, 0, Rollback},
		{"fails in a dry run", &pb.RolloutGate{OnFail: OnRollback, DryRun: true}, Fail, 0, Advance},
		{"waits for ever", &pb.RolloutGate{OnInconclusive: OnAdvance}, Inconclusive, 1 << 20, None},
		{"waits", &pb.RolloutGate{OnInconclusive: OnRollback, MaxWait: minute}, Inconclusive, 59, None},
		{"waited, rolls back", &pb.RolloutGate{OnInconclusive: OnRollback, MaxWait: minute}, Inconclusive, 60, Rollback},
		{"waited, advances", &pb.RolloutGate{OnInconclusive: OnAdvance, MaxWait: minute}, Inconclusive, 60, Advance},
		{"waited, holds", &pb.RolloutGate{MaxWait: minute}, Inconclusive, 60, Hold},
	} {
		var r Rollout
		p, _ := StandardPhase(Development)
		p.Gates = []*pb.RolloutGate{failing(c.gate)}
		full, _ := StandardPhase(FullProduction)
		if err := r.Apply(wrap(0, &pb.RolloutStarted{Model: "m", Candidate: "v2", LastGood: "v1", Phases: PhasesPB([]Phase{p, full})})); err != nil {
			t.Fatal(err)
		}
		if c.outcome != Inconclusive {
			if err := r.Apply(wrap(1, &pb.RolloutGateDecided{Gate: "g", Outcome: string(c.outcome)})); err != nil {
				t.Fatal(err)
			}
		}
		k, err := NewKeeper(p)
		if err != nil {
			t.Fatal(err)
		}
		now := at(c.after)
		if d := Decide(r, nil, Look(&r, k, Observed{}, now), now); d.Kind != c.want {
			t.Errorf("%s: %v %q, want %v", c.name, d.Kind, d.Reason, c.want)
		}
	}
}

func TestRollbackHook(t *testing.T) {
	var r Rollout
	s := startEvent()
	s.Phases[0].Gates = []*pb.RolloutGate{{Name: "panic", Kind: GateTest, Check: &pb.RolloutCheck{Hook: HookRollback, Url: "https://ops/panic"}}}
	if err := r.Apply(wrap(0, s)); err != nil {
		t.Fatal(err)
	}
	k, err := NewKeeper(r.CurrentPhase())
	if err != nil {
		t.Fatal(err)
	}
	for outcome, want := range map[Outcome]Kind{Inconclusive: None, Fail: None, Pass: Rollback} {
		again := r
		if err := again.Apply(wrap(1, &pb.RolloutGateDecided{Gate: "panic", Outcome: string(outcome)})); err != nil {
			t.Fatal(err)
		}
		if d := Decide(again, nil, Look(&again, k, Observed{}, at(1)), at(1)); d.Kind != want || len(d.Gates) != 0 {
			t.Errorf("%s: %v", outcome, d)
		}
	}
}

func TestHooksArePlaced(t *testing.T) {
	gate := func(hook string) *pb.RolloutGate {
		return &pb.RolloutGate{Name: hook, Kind: GateTest, Check: &pb.RolloutCheck{Hook: hook, Command: []string{"x"}}}
	}
	names := func(ps []Phase) (out []string) {
		for _, p := range ps {
			for _, g := range p.Gates {
				out = append(out, p.Name+"/"+g.GetName())
			}
		}
		return out
	}
	canary := Phase{Name: "canary", Weight: 100, Gates: []*pb.RolloutGate{gate(HookConfirmRollout), gate(HookRollout), gate(HookPreRollout), gate(HookConfirmPromote)}}
	limited, full := Phase{Name: "limited", Weight: 1000}, Phase{Name: "full", Weight: FullWeight}
	got := placeHooks([]Phase{canary, limited, full})
	if want := []string{"pending/confirm-rollout", "pending/pre-rollout", "canary/rollout", "limited/confirm-promotion"}; !slices.Equal(names(got), want) {
		t.Errorf("%v, want %v", names(got), want)
	}
	if err := checkPhases(got); err != nil || got[0].Weight != 0 {
		t.Errorf("%v, %v", got[0], err)
	}
	dev, _ := StandardPhase(Development)
	got = placeHooks([]Phase{dev, canary, full})
	if want := []string{"development/confirm-rollout", "development/pre-rollout", "canary/rollout", "canary/confirm-promotion"}; !slices.Equal(names(got), want) {
		t.Errorf("%v, want %v", names(got), want)
	}
	if len(canary.Gates) != 4 {
		t.Error("the phases given were changed")
	}
}

func TestGateRefusals(t *testing.T) {
	for want, g := range map[string]*pb.RolloutGate{
		"kind is \"vibes\"":    {Name: "g", Kind: "vibes"},
		"name":                 {Kind: GateApproval},
		"0 conditions":         {Name: "g", Kind: GateMetrics},
		"undeclared reference": {Name: "g", Kind: GateMetrics, Conditions: []string{"eror_rate > 1"}},
		"3 approvals of 2":     {Name: "g", Kind: GateApproval, Approvals: 3, Approvers: []string{"a", "b"}},
		"either a url or":      {Name: "g", Kind: GateTest, Check: &pb.RolloutCheck{}},
		"url \"file:///x\"":    {Name: "g", Kind: GateTest, Check: &pb.RolloutCheck{Url: "file:///x"}},
		"without a password":   {Name: "g", Kind: GateTest, Check: &pb.RolloutCheck{Url: "http://u:p@h/"}},
		"hook is \"later\"":    {Name: "g", Kind: GateTest, Check: &pb.RolloutCheck{Url: "http://h/", Hook: "later"}},
		"timeout":              {Name: "g", Kind: GateTest, Check: &pb.RolloutCheck{Url: "http://h/", Timeout: durationpb.New(time.Hour)}},
		"interval":             {Name: "g", Kind: GateTest, Check: &pb.RolloutCheck{Url: "http://h/", Interval: durationpb.New(time.Millisecond)}},
		"neither dwell":        {Name: "g", Kind: GateTime},
		"hours \"9-5\"":        {Name: "g", Kind: GateTime, Hours: []string{"9-5"}},
		"hours \"mon 17":       {Name: "g", Kind: GateTime, Hours: []string{"mon 17:00-09:00"}},
		"utc_offset":           {Name: "g", Kind: GateTime, Hours: []string{"mon 09:00-17:00"}, UtcOffset: "CET"},
		"freeze":               {Name: "g", Kind: GateTime, Freezes: []string{"2026-01-02/2026-01-01"}},
		"on_inconclusive":      {Name: "g", Kind: GateApproval, OnInconclusive: "pray"},
		"max_wait":             {Name: "g", Kind: GateApproval, MaxWait: durationpb.New(-1)},
		"experiment":           {Name: "g", Kind: GateExperiment},
	} {
		_, err := NewKeeper(Phase{Name: "p", Gates: []*pb.RolloutGate{g}})
		if !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "phase p") {
			t.Errorf("%v: %v, want %s", g, err, want)
		}
	}
	if err := MayApprove(&Rollout{ID: "r", Author: "ann"}, &pb.RolloutGate{}, "ann"); !outrigger.IsKind(err, outrigger.Denied) {
		t.Errorf("the author: %v", err)
	}
}

// The arithmetic of proof: to prove an error rate below 1 % takes about 2 000 requests at
// half of that with one look, and more when every look must be right.
func TestForecast(t *testing.T) {
	p, _ := StandardPhase(Canary)
	p.MinRequests = 1000
	p.Gates = []*pb.RolloutGate{
		{Name: "quality", Kind: GateMetrics, Conditions: []string{"error_rate < 0.01", "performance_degradation < 0.1", "user_satisfaction > 0.95", "error_rate < 0.0001"}},
		{Name: "people", Kind: GateApproval, Approvals: 2},
		{Name: "night", Kind: GateTime, Dwell: durationpb.New(time.Hour)},
	}
	got, warnings := Forecast([]Phase{p}, 100) // 1 request a second for the candidate
	if len(got) != 7 || got[0].GetRequests() != 1000 || !got[0].GetProvable() || got[0].GetExpected().AsDuration() != 1000*time.Second {
		t.Fatalf("%v", got)
	}
	if n := got[1].GetRequests(); n < 2000 || n > 6000 || !got[1].GetProvable() {
		t.Errorf("error_rate < 0.01: %v", got[1])
	}
	if n := got[2].GetRequests(); n < 500 || n > 20_000 || !got[2].GetProvable() {
		t.Errorf("performance_degradation < 0.1: %v", got[2])
	}
	if got[3].GetProvable() || got[4].GetProvable() || !got[5].GetProvable() || !got[6].GetProvable() {
		t.Errorf("%v", got)
	}
	if len(warnings) != 2 || !strings.Contains(warnings[0], "user_satisfaction") || !strings.Contains(warnings[1], "planned to last 24h") {
		t.Errorf("warnings %q", warnings)
	}
	if _, warnings := Forecast([]Phase{p}, 0); len(warnings) != 5 || !strings.Contains(warnings[0], "unknown without traffic") {
		t.Errorf("without traffic: %q", warnings)
	}
	// The least number is the least: one percent below it proves nothing.
	n := shareRequests(.01)
	if m := shareRequests(.005); math.Abs(float64(m)/float64(n)-2) > .5 {
		t.Errorf("%d requests for 1 %%, %d for 0.5 %%", n, m)
	}
}
