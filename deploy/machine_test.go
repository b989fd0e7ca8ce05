package deploy

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/expr"
)

// wrap puts any rollout payload into an event, n seconds after epoch.
func wrap(n int, payload any) *pb.Event {
	ev := event(n, payload)
	switch p := payload.(type) {
	case *pb.RolloutHeld:
		ev.Payload = &pb.Event_RolloutHeld{RolloutHeld: p}
	case *pb.RolloutResumed:
		ev.Payload = &pb.Event_RolloutResumed{RolloutResumed: p}
	case *pb.RolloutApproved:
		ev.Payload = &pb.Event_RolloutApproved{RolloutApproved: p}
	case *pb.RolloutGateDecided:
		ev.Payload = &pb.Event_RolloutGateDecided{RolloutGateDecided: p}
	case *pb.RolloutSteppedBack:
		ev.Payload = &pb.Event_RolloutSteppedBack{RolloutSteppedBack: p}
	case *pb.RolloutDraining:
		ev.Payload = &pb.Event_RolloutDraining{RolloutDraining: p}
	case *pb.RolloutRamped:
		ev.Payload = &pb.Event_RolloutRamped{RolloutRamped: p}
	case *pb.RollbackDrillStarted:
		ev.Payload = &pb.Event_RollbackDrillStarted{RollbackDrillStarted: p}
	case *pb.RollbackDrillCompleted:
		ev.Payload = &pb.Event_RollbackDrillCompleted{RollbackDrillCompleted: p}
	}
	return ev
}

// Each script is what happens after a rollout by the standard plan has reached canary.
func TestStandardMachine(t *testing.T) {
	type step = any
	started := &pb.RolloutStarted{Model: "m", Candidate: "v2", LastGood: "v1", Phases: PhasesPB(StandardPhases()), Author: "ann"}
	advance := func(to uint32) step { return &pb.RolloutAdvanced{Phase: to} }
	hold, resume, back := step(&pb.RolloutHeld{Reason: "lunch"}), step(&pb.RolloutResumed{}), step(&pb.RollbackStarted{})
	drain := step(&pb.RolloutDraining{Weights: []uint32{60, 30, 0}})
	ramp := func(w uint32) step { return &pb.RolloutRamped{Weight: w} }
	drill, drilled := step(&pb.RollbackDrillStarted{}), step(&pb.RollbackDrillCompleted{Push: 3})
	for _, c := range []struct {
		name   string
		script []step
		refuse outrigger.Kind
		state  State
		phase  string
		weight uint32
		back   string // ReturnPhase
	}{
		{"canary", nil, 0, Running, Canary, 100, Staging},
		{"hold", []step{hold}, 0, Held, Canary, 100, Staging},
		{"hold twice", []step{hold, hold}, outrigger.Conflict, Held, Canary, 100, Staging},
		{"resume", []step{hold, resume}, 0, Running, Canary, 100, Staging},
		{"resume what runs", []step{resume}, outrigger.Conflict, Running, Canary, 100, Staging},
		{"advance while held", []step{hold, advance(3)}, outrigger.Conflict, Held, Canary, 100, Staging},
		{"limited", []step{advance(3)}, 0, Running, LimitedProduction, 1000, Canary},
		{"roll back from limited", []step{advance(3), back}, 0, RollingBack, LimitedProduction, 0, Canary},
		{"roll back while held", []step{hold, back}, 0, RollingBack, Canary, 0, Staging},
		{"step back", []step{advance(3), &pb.RolloutSteppedBack{Phase: 2}}, 0, Held, Canary, 100, Staging},
		{"step forward", []step{&pb.RolloutSteppedBack{Phase: 3}}, outrigger.Conflict, Running, Canary, 100, Staging},
		{"drain", []step{drain}, 0, Draining, Canary, 60, Staging},
		{"drain on", []step{drain, ramp(30), ramp(0)}, 0, Draining, Canary, 0, Staging},
		{"drain upwards", []step{drain, ramp(60)}, outrigger.Conflict, Draining, Canary, 60, Staging},
		{"drain that rises", []step{&pb.RolloutDraining{Weights: []uint32{60, 70, 0}}}, outrigger.Invalid, Running, Canary, 100, Staging},
		{"drain that stays", []step{&pb.RolloutDraining{Weights: []uint32{60}}}, outrigger.Invalid, Running, Canary, 100, Staging},
		{"drain of nothing", []step{&pb.RolloutDraining{}}, outrigger.Invalid, Running, Canary, 100, Staging},
		{"roll back while draining", []step{drain, back}, 0, RollingBack, Canary, 0, Staging},
		{"resume a drain", []step{drain, resume}, outrigger.Conflict, Draining, Canary, 60, Staging},
		{"drill", []step{drill, drilled}, 0, Running, Canary, 100, Staging},
		{"two drills", []step{drill, drill}, outrigger.Conflict, Running, Canary, 100, Staging},
		{"no drill", []step{drilled}, outrigger.Conflict, Running, Canary, 100, Staging},
		{"late decision", []step{&pb.RolloutGateDecided{Phase: 0, Gate: "x"}}, 0, Running, Canary, 100, Staging},
		{"ramp what runs", []step{ramp(1)}, outrigger.Conflict, Running, Canary, 100, Staging},
	} {
		var r Rollout
		var err error
		for i, p := range append([]step{started, advance(1), advance(2)}, c.script...) {
			if err != nil {
				t.Fatalf("%s: step %d: %v", c.name, i, err)
			}
			err = r.Apply(wrap(i+1, p))
		}
		if c.refuse == 0 && err != nil || c.refuse != 0 && !outrigger.IsKind(err, c.refuse) {
			t.Errorf("%s: error %v, want kind %v", c.name, err, c.refuse)
		}
		if got := r.Phases[r.ReturnPhase].Name; r.State != c.state || r.CurrentPhase().Name != c.phase || r.CandidateWeight() != c.weight || got != c.back {
			t.Errorf("%s: %s in %s, weight %d, returns to %s; want %s %s %d %s", c.name, r.State, r.CurrentPhase().Name, r.CandidateWeight(), got, c.state, c.phase, c.weight, c.back)
		}
	}
}

// TestDevelopmentToFull is the seed's readiness test: every phase is reached in order,
// with the published share, and a rollback from canary leads back to staging.
func TestDevelopmentToFull(t *testing.T) {
	ev, err := Start(&pb.StartRolloutRequest{Model: "m", Candidate: "v2", Plan: PlanStandard, Actor: "ann"}, "v1")
	if err != nil {
		t.Fatal(err)
	}
	var r Rollout
	if err := r.Apply(wrap(1, ev)); err != nil {
		t.Fatal(err)
	}
	now := at(1)
	for i, want := range []struct {
		phase         string
		share, weight uint32
		level         string
		lasts         time.Duration
	}{
		{Development, FullWeight, 0, "debug", 0}, {Staging, FullWeight, 0, "info", 0}, {Canary, 100, 100, "warn", 24 * time.Hour},
		{LimitedProduction, 1000, 1000, "warn", 72 * time.Hour}, {FullProduction, FullWeight, FullWeight, "error", 0},
	} {
		p := r.CurrentPhase()
		if p.Name != want.phase || p.Share != want.share || r.CandidateWeight() != want.weight || p.MonitoringLevel != want.level || p.MinDuration != want.lasts {
			t.Fatalf("phase %d is %+v, weight %d; want %+v", i, p, r.CandidateWeight(), want)
		}
		now = now.Add(want.lasts)
		d := Decide(r, nil, Judgement{}, now)
		if want.phase == FullProduction {
			if d.Kind != Complete {
				t.Fatalf("%v", d)
			}
			break
		}
		if d.Kind != Advance {
			t.Fatalf("phase %s: %v", want.phase, d)
		}
		next := wrap(i+2, &pb.RolloutAdvanced{Phase: uint32(r.Phase + 1)})
		next.At = proto.CloneOf(next.At)
		next.At.Seconds = now.Unix()
		if err := r.Apply(next); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSteps(t *testing.T) {
	p, _ := StandardPhase(Canary)
	p.MinDuration, p.Gates = 3*time.Hour, []*pb.RolloutGate{{Name: "g", Kind: GateApproval}}
	got, err := Steps(p, []uint32{100, 200, 500})
	if err != nil || len(got) != 3 || got[0].Name != "canary-1" || got[2].Name != Canary || got[1].Weight != 200 || got[1].MinDuration != time.Hour ||
		got[0].Stage != Canary || len(got[0].Gates) != 0 || len(got[2].Gates) != 1 {
		t.Errorf("%+v, %v", got, err)
	}
	if err := checkPhases(got); err != nil {
		t.Error(err)
	}
	p, _ = StandardPhase(Staging)
	if _, err := Steps(p, []uint32{1}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("steps of staging: %v", err)
	}
}

// robot carries decisions out as the monitor does; the log is a slice. Every event it
// may append is a function of the fold and the clock.
type robot struct {
	r   Rollout
	log []*pb.Event
	now time.Time
}

func (b *robot) append(t *testing.T, payload any) {
	t.Helper()
	ev := wrap(len(b.log)+1, payload)
	ev.Sequence = uint64(len(b.log) + 1)
	ev.At = proto.CloneOf(ev.At)
	ev.At.Seconds = b.now.Unix()
	if err := b.r.Apply(ev); err != nil {
		t.Fatalf("%T after %d events: %v", payload, len(b.log), err)
	}
	b.log = append(b.log, ev)
}

// step does one thing and reports whether there was one. bad makes the candidate fail.
func (b *robot) step(t *testing.T, bad bool) bool {
	t.Helper()
	b.now = b.now.Add(10 * time.Minute)
	r := &b.r
	switch {
	case r.State.Ended():
		return false
	case r.State == RollingBack && r.Completed == nil:
		b.append(t, &pb.RollbackCompleted{Push: r.WeightEpoch})
		return true
	case r.State == RollingBack:
		b.append(t, ended(RolledBack))
		return true
	case r.State == Held:
		b.append(t, &pb.RolloutResumed{})
		return true
	case r.DrillAt != 0:
		b.append(t, &pb.RollbackDrillCompleted{Push: r.DrillAt})
		return true
	}
	if w, change, over := NextRamp(r, false, b.now); change {
		b.append(t, &pb.RolloutRamped{Weight: w})
		return true
	} else if over {
		b.append(t, &pb.RollbackStarted{Mode: "graceful"})
		return true
	} else if r.State == Draining {
		return true
	}
	k, err := NewKeeper(r.CurrentPhase())
	if err != nil {
		t.Fatal(err)
	}
	det := NewDetector(Config{WeightEpoch: r.WeightEpoch})
	s := sample(1000, 10, 9000, 90)
	s.Stratum.WeightEpoch = r.WeightEpoch
	if bad {
		s.CandidateFailures = 300
	}
	if r.CandidateWeight() > 0 {
		det.Observe([]Sample{s})
	}
	d := Decide(*r, det, Look(r, k, Observed{}, b.now), b.now)
	switch d.Kind {
	case Advance:
		b.append(t, &pb.RolloutAdvanced{Phase: uint32(r.Phase + 1), Gates: nil})
	case Complete:
		b.append(t, ended(Completed))
	case Rollback:
		b.append(t, &pb.RollbackStarted{Reason: d.Reason})
	default:
		for _, g := range d.Gates {
			if g.Outcome == Inconclusive && g.Gate == "test" {
				b.append(t, &pb.RolloutGateDecided{Phase: uint32(r.Phase), Gate: "test", Outcome: string(Pass)})
				return true
			}
			if g.Outcome == Inconclusive && g.Gate == "people" {
				b.append(t, &pb.RolloutApproved{Phase: uint32(r.Phase), Gate: "people", Approver: fmt.Sprintf("p%d", len(r.Approvals))})
				return true
			}
		}
	}
	return true
}

// TestCrashAtEveryEvent: whatever prefix of its events a rollout wakes up with, it goes on
// to the same end, legally, and the fold of the prefix is the state that was left.
func TestCrashAtEveryEvent(t *testing.T) {
	phases := StandardPhases()
	phases[0].Gates = []*pb.RolloutGate{{Name: "test", Kind: GateTest, Check: &pb.RolloutCheck{Command: []string{"true"}}}}
	phases[2].Gates = []*pb.RolloutGate{{Name: "people", Kind: GateApproval, Approvals: 2}}
	phases[2].MinDuration, phases[3].MinDuration = time.Hour, time.Hour
	started := &pb.RolloutStarted{Model: "m", Candidate: "v2", LastGood: "v1", Phases: PhasesPB(phases), Author: "ann"}
	interventions := map[string]func(n int) any{
		"none": func(int) any { return nil },
		"hold": func(n int) any { return map[int]any{6: &pb.RolloutHeld{}}[n] },
		"drain": func(n int) any {
			return map[int]any{6: Drain(100, time.Hour, time.Minute, "enough")}[n]
		},
		"drill": func(n int) any { return map[int]any{6: &pb.RollbackDrillStarted{}}[n] },
	}
	for name, intervene := range interventions {
		for _, bad := range []bool{false, true} {
			// play runs from the events given to the end.
			play := func(events []*pb.Event) *robot {
				b := &robot{now: epoch}
				for _, e := range events {
					if err := b.r.Apply(e); err != nil {
						t.Fatalf("%s: replay: %v", name, err)
					}
					b.log, b.now = append(b.log, e), e.GetAt().AsTime()
				}
				if len(events) == 0 {
					b.append(t, started)
				}
				for i := 0; i < 500; i++ {
					if what := intervene(len(b.log)); what != nil && b.r.State == Running && b.r.DrillAt == 0 {
						b.append(t, what)
						continue
					}
					if !b.step(t, bad) {
						return b
					}
				}
				t.Fatalf("%s, bad %v: does not end: %s in phase %d", name, bad, b.r.State, b.r.Phase)
				return nil
			}
			whole := play(nil)
			want := Completed
			if bad || name == "drain" {
				want = RolledBack
			}
			if whole.r.State != want {
				t.Errorf("%s, bad %v: ends %s after %d events, want %s", name, bad, whole.r.State, len(whole.log), want)
			}
			for n := 1; n <= len(whole.log); n++ {
				again := play(slices.Clone(whole.log[:n]))
				if again.r.State != whole.r.State || len(again.log) != len(whole.log) {
					t.Errorf("%s, bad %v: after a crash at event %d it ends %s with %d events, want %s with %d", name, bad, n, again.r.State, len(again.log), whole.r.State, len(whole.log))
				}
				for i, e := range again.log {
					if fmt.Sprintf("%T", e.GetPayload()) != fmt.Sprintf("%T", whole.log[i].GetPayload()) {
						t.Errorf("%s: event %d is %T after a crash at %d, was %T", name, i+1, e.GetPayload(), n, whole.log[i].GetPayload())
					}
				}
			}
		}
	}
}

func TestRamp(t *testing.T) {
	d := Drain(1000, 4*time.Second, time.Minute, "why")
	if !slices.Equal(d.GetWeights(), []uint32{750, 500, 250, 0}) || d.GetEvery().AsDuration() != time.Second {
		t.Errorf("%v", d)
	}
	if got := Drain(1, 0, 0, "").GetWeights(); !slices.Equal(got, []uint32{0}) {
		t.Errorf("from 1: %v", got)
	}
	r := Rollout{State: Draining, Drain: d, Ramp: 750, RampedAt: epoch}
	for _, c := range []struct {
		ramp   uint32
		after  time.Duration
		idle   bool
		weight uint32
		change bool
		over   bool
	}{
		{750, 500 * time.Millisecond, true, 0, false, false},
		{750, time.Second, false, 500, true, false},
		{250, time.Second, false, 0, true, false},
		{0, time.Second, false, 0, false, false},
		{0, time.Second, true, 0, false, true},
		{0, time.Minute, false, 0, false, true},
	} {
		r.Ramp = c.ramp
		if w, change, over := NextRamp(&r, c.idle, epoch.Add(c.after)); w != c.weight || change != c.change || over != c.over {
			t.Errorf("%+v: %d %v %v", c, w, change, over)
		}
	}
}

// The numbers a rollback condition is judged on.
func TestDecideOnThresholds(t *testing.T) {
	measure := func(low, high, baseLow, baseHigh float64) func(string) expr.Measure {
		return func(n string) expr.Measure {
			switch n {
			case "error_rate":
				return expr.Measure{Low: low, High: high, Known: true}
			case "baseline_error_rate":
				return expr.Measure{Low: baseLow, High: baseHigh, Known: baseHigh > 0}
			}
			return expr.Measure{}
		}
	}
	failure := func(string) expr.Measure { return expr.Exactly(1) }
	for _, c := range []struct {
		name    string
		when    string
		phase   int
		measure func(string) expr.Measure
		kind    Kind
		breach  bool
	}{
		{"below", "error_rate > 0.02", 0, measure(.001, .01, .001, .01), None, false},
		{"not certain", "error_rate > 0.02", 0, measure(.01, .03, .001, .002), None, false},
		{"certain and worse", "error_rate > 0.02", 0, measure(.03, .05, .001, .01), Rollback, false},
		{"both above", "error_rate > 0.02", 0, measure(.03, .05, .03, .04), Hold, true},
		{"nothing to compare with", "error_rate > 0.02", 2, measure(.03, .05, 0, 0), Rollback, false},
		{"nothing known", "error_rate > 0.02", 0, func(string) expr.Measure { return expr.Measure{} }, None, false},
		{"failure of everything", "system_failure", 0, failure, Rollback, false},
		{"degradation", "performance_degradation > 0.3", 0, func(n string) expr.Measure {
			return expr.Measure{Low: .4, High: .6, Known: n == MetricDegradation}
		}, Rollback, false},
	} {
		var r Rollout
		s := startEvent()
		for _, p := range s.Phases {
			p.RollbackWhen = []string{c.when}
		}
		s.Phases[0].MinDuration = durationpb.New(time.Hour)
		s.Phases[2].MinDuration = durationpb.New(time.Hour)
		if err := r.Apply(event(0, s)); err != nil {
			t.Fatal(err)
		}
		r.Phase = c.phase
		k, err := NewKeeper(r.CurrentPhase())
		if err != nil {
			t.Fatal(err)
		}
		now := at(1)
		d := Decide(r, nil, Look(&r, k, Observed{Measure: c.measure}, now), now)
		if d.Kind != c.kind || d.Breach != c.breach {
			t.Errorf("%s: %v %q, breach %v; want %v %v", c.name, d.Kind, d.Reason, d.Breach, c.kind, c.breach)
		}
	}
}
