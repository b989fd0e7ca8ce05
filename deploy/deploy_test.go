package deploy

import (
	"math"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

var epoch = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func at(seconds int) time.Time { return epoch.Add(time.Duration(seconds) * time.Second) }

// event builds the envelope a log would: position 100·n, n seconds after epoch.
func event(n int, payload any) *pb.Event {
	ev := &pb.Event{Aggregate: "rollout/r1", Position: uint64(100 * n), At: timestamppb.New(at(n))}
	switch p := payload.(type) {
	case *pb.RolloutStarted:
		ev.Payload = &pb.Event_RolloutStarted{RolloutStarted: p}
	case *pb.RolloutAdvanced:
		ev.Payload = &pb.Event_RolloutAdvanced{RolloutAdvanced: p}
	case *pb.RollbackStarted:
		ev.Payload = &pb.Event_RollbackStarted{RollbackStarted: p}
	case *pb.RollbackCompleted:
		ev.Payload = &pb.Event_RollbackCompleted{RollbackCompleted: p}
	case *pb.RolloutEnded:
		ev.Payload = &pb.Event_RolloutEnded{RolloutEnded: p}
	case *pb.AliasMoved:
		ev.Payload = &pb.Event_AliasMoved{AliasMoved: p}
	}
	return ev
}

func startEvent() *pb.RolloutStarted {
	return &pb.RolloutStarted{Model: "m", Candidate: "v2", LastGood: "v1", Alpha: .01, Phases: []*pb.RolloutPhase{
		{Name: "canary", Weight: 100, MinDuration: durationpb.New(time.Minute), MinRequests: 100},
		{Name: "again", Weight: 100},
		{Name: "full", Weight: FullWeight},
	}}
}

func ended(outcome State) *pb.RolloutEnded { return &pb.RolloutEnded{Outcome: string(outcome)} }

// Each script is a sequence of payloads; the last one must be accepted or refused as
// said, and leave the rollout as said.
func TestFold(t *testing.T) {
	advance := func(to uint32) any { return &pb.RolloutAdvanced{Phase: to} }
	back, done := any(&pb.RollbackStarted{Reason: "bad"}), any(&pb.RollbackCompleted{Push: 9})
	start := any(startEvent())
	for _, c := range []struct {
		name   string
		script []any
		refuse outrigger.Kind // Internal (0) = accepted
		state  State
		phase  int
		weight uint32
		epoch  uint64
	}{
		{"start", []any{start}, 0, Running, 0, 100, 100},
		{"start twice", []any{start, start}, outrigger.Conflict, Running, 0, 100, 100},
		{"start without phases", []any{&pb.RolloutStarted{Model: "m"}}, outrigger.Invalid, "", 0, 0, 0},
		{"advance before start", []any{advance(1)}, outrigger.Conflict, "", 0, 0, 0},
		{"same weight keeps the epoch", []any{start, advance(1)}, 0, Running, 1, 100, 100},
		{"new weight, new epoch", []any{start, advance(1), advance(2)}, 0, Running, 2, FullWeight, 300},
		{"skip a phase", []any{start, advance(2)}, 0, Running, 2, FullWeight, 200},
		{"advance to where it is", []any{start, advance(0)}, outrigger.Conflict, Running, 0, 100, 100},
		{"advance past the end", []any{start, advance(3)}, outrigger.Conflict, Running, 0, 100, 100},
		{"complete", []any{start, advance(2), ended(Completed)}, 0, Completed, 2, FullWeight, 200},
		{"complete too early", []any{start, ended(Completed)}, outrigger.Conflict, Running, 0, 100, 100},
		{"roll back", []any{start, back}, 0, RollingBack, 0, 0, 200},
		{"roll back twice", []any{start, back, back}, outrigger.Conflict, RollingBack, 0, 0, 200},
		{"advance while rolling back", []any{start, back, advance(1)}, outrigger.Conflict, RollingBack, 0, 0, 200},
		{"end before the acknowledgement", []any{start, back, ended(RolledBack)}, outrigger.Conflict, RollingBack, 0, 0, 200},
		{"acknowledged", []any{start, back, done}, 0, RollingBack, 0, 0, 200},
		{"acknowledged twice", []any{start, back, done, done}, outrigger.Conflict, RollingBack, 0, 0, 200},
		{"acknowledged without rollback", []any{start, done}, outrigger.Conflict, Running, 0, 100, 100},
		{"rolled back", []any{start, back, done, ended(RolledBack)}, 0, RolledBack, 0, 0, 200},
		{"nothing after the end", []any{start, back, done, ended(RolledBack), ended(Aborted)}, outrigger.Conflict, RolledBack, 0, 0, 200},
		{"abort", []any{start, ended(Aborted)}, 0, Aborted, 0, 0, 200},
		{"abort a rollback", []any{start, back, ended(Aborted)}, 0, Aborted, 0, 0, 200},
		{"unknown outcome", []any{start, ended("won")}, outrigger.Conflict, Running, 0, 100, 100},
		{"foreign payload", []any{start, &pb.AliasMoved{}}, outrigger.Invalid, Running, 0, 100, 100},
	} {
		var r Rollout
		var err error
		for i, p := range c.script {
			if err != nil {
				t.Fatalf("%s: step %d: %v", c.name, i, err)
			}
			err = r.Apply(event(i+1, p))
		}
		if c.refuse == 0 && err != nil || c.refuse != 0 && !outrigger.IsKind(err, c.refuse) {
			t.Errorf("%s: error %v, want kind %v", c.name, err, c.refuse)
		}
		if r.State != c.state || r.Phase != c.phase || r.CandidateWeight() != c.weight || r.WeightEpoch != c.epoch {
			t.Errorf("%s: state %q phase %d weight %d epoch %d, want %q %d %d %d", c.name,
				r.State, r.Phase, r.CandidateWeight(), r.WeightEpoch, c.state, c.phase, c.weight, c.epoch)
		}
	}
}

func TestFoldChecksTheEnvelope(t *testing.T) {
	var r Rollout
	first := event(1, startEvent())
	first.Sequence = 1
	if err := r.Apply(first); err != nil {
		t.Fatal(err)
	}
	if r.ID != "r1" || r.Sequence != 1 || !r.StartedAt.Equal(at(1)) || !r.PhaseSince.Equal(at(1)) {
		t.Errorf("folded %+v", r)
	}
	gap := event(3, &pb.RolloutAdvanced{Phase: 1})
	gap.Sequence = 3
	other := event(2, &pb.RolloutAdvanced{Phase: 1})
	other.Aggregate = "rollout/r2"
	model := event(2, &pb.RolloutAdvanced{Phase: 1})
	model.Aggregate = "model/m"
	for _, ev := range []*pb.Event{gap, other, model, {}} {
		if err := r.Apply(ev); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("Apply(%v) = %v, want kind invalid", ev, err)
		}
	}
	got := r.PB(nil)
	want := &pb.Rollout{Id: "r1", Model: "m", Candidate: "v2", LastGood: "v1", Phases: startEvent().Phases,
		State: "running", Sequence: 1, Weight: 100, WeightEpoch: 100, StartedAt: timestamppb.New(at(1)), PhaseSince: timestamppb.New(at(1))}
	for _, p := range want.Phases {
		if p.MinDuration == nil {
			p.MinDuration = durationpb.New(0)
		}
	}
	if !proto.Equal(got, want) {
		t.Errorf("PB = %v\nwant %v", got, want)
	}
}

func TestStart(t *testing.T) {
	ev, err := Start(&pb.StartRolloutRequest{Model: "m", Candidate: "v2"}, "v1")
	if err != nil {
		t.Fatal(err)
	}
	if len(ev.Phases) != 3 || ev.Phases[0].Weight != 100 || ev.Phases[1].Weight != 1000 || ev.Phases[2].Weight != FullWeight ||
		ev.Alpha != DefaultAlpha || ev.LastGood != "v1" {
		t.Errorf("defaults: %v", ev)
	}
	phase := func(name string, weight uint32, d time.Duration) *pb.RolloutPhase {
		return &pb.RolloutPhase{Name: name, Weight: weight, MinDuration: durationpb.New(d)}
	}
	for want, req := range map[string]*pb.StartRolloutRequest{
		"model is empty":       {Candidate: "v2"},
		"candidate is empty":   {Model: "m"},
		"id \"a/b\"":           {Id: "a/b", Model: "m", Candidate: "v2"},
		"serves already":       {Model: "m", Candidate: "v1"},
		"weight 0":             {Model: "m", Candidate: "v2", Phases: []*pb.RolloutPhase{phase("a", 0, 0)}},
		"weight 10001":         {Model: "m", Candidate: "v2", Phases: []*pb.RolloutPhase{phase("a", 10_001, 0)}},
		"never fall":           {Model: "m", Candidate: "v2", Phases: []*pb.RolloutPhase{phase("a", 100, 0), phase("b", 99, 0)}},
		"used twice":           {Model: "m", Candidate: "v2", Phases: []*pb.RolloutPhase{phase("a", 100, 0), phase("a", 200, 0)}},
		"name \"\"":            {Model: "m", Candidate: "v2", Phases: []*pb.RolloutPhase{phase("", 100, 0)}},
		"min_duration -1s":     {Model: "m", Candidate: "v2", Phases: []*pb.RolloutPhase{phase("a", 100, -time.Second)}},
		"min_duration 2400h0":  {Model: "m", Candidate: "v2", Phases: []*pb.RolloutPhase{phase("a", 100, 2400*time.Hour)}},
		"33 phases":            {Model: "m", Candidate: "v2", Phases: make([]*pb.RolloutPhase, 33)},
		"alpha 0.2 is outside": {Model: "m", Candidate: "v2", Alpha: .2},
		"alpha -1 is outside":  {Model: "m", Candidate: "v2", Alpha: -1},
		"alpha NaN is outside": {Model: "m", Candidate: "v2", Alpha: math.NaN()},
	} {
		if _, err := Start(req, "v1"); !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("Start(%v) = %v, want it to say %q", req, err, want)
		}
	}
}

func sample(nc, ec, nt, et uint64) Sample {
	return Sample{Stratum: Stratum{"eu", 100}, CandidateRequests: nc, CandidateFailures: ec, BaselineRequests: nt, BaselineFailures: et}
}

func TestStep(t *testing.T) {
	running := func(phase int) Rollout {
		var r Rollout
		if err := r.Apply(event(0, startEvent())); err != nil {
			t.Fatal(err)
		}
		if phase > 0 {
			if err := r.Apply(event(0, &pb.RolloutAdvanced{Phase: uint32(phase)})); err != nil {
				t.Fatal(err)
			}
		}
		return r
	}
	over := running(0)
	over.State = RollingBack
	for _, c := range []struct {
		name    string
		rollout Rollout
		samples []Sample
		now     int
		kind    Kind
		reason  string
	}{
		{"no data", running(0), nil, 3600, None, "needs 100 more"},
		{"young", running(0), []Sample{sample(200, 2, 9800, 98)}, 59, None, "1s more"},
		{"few requests", running(0), []Sample{sample(99, 1, 9800, 98)}, 61, None, "needs 1 more"},
		{"passed", running(0), []Sample{sample(100, 1, 9800, 98)}, 60, Advance, "passed with 100"},
		{"last phase", running(2), []Sample{sample(100, 0, 0, 0)}, 0, Complete, "last phase full"},
		{"regression", running(0), []Sample{sample(50, 25, 4950, 50)}, 1, Rollback, "25 of 50 against 50 of 4950"},
		{"regression late", running(0), []Sample{sample(200, 25, 9800, 98)}, 600, Rollback, "threshold 400"},
		{"suspicion", running(0), []Sample{sample(100, 6, 9900, 100)}, 600, Hold, "to 1"},
		{"both above the limit", running(0), []Sample{sample(100, 20, 9900, 1980)}, 600, Hold, "not proven"},
		{"no baseline, above the limit", running(2), []Sample{sample(100, 50, 0, 0)}, 600, Hold, "not proven"},
		{"rolling back", over, []Sample{sample(50, 25, 4950, 50)}, 1, None, "not running"},
		{"older epoch", running(0), []Sample{{Stratum: Stratum{"eu", 0}, CandidateRequests: 50, CandidateFailures: 50, BaselineRequests: 5000}}, 600, None, "needs 100 more"},
	} {
		det := NewDetector(Config{WeightEpoch: 100})
		det.Observe(c.samples)
		if c.samples == nil {
			det = nil
		}
		c.rollout.WeightEpoch = 100
		d := Step(c.rollout, det, at(c.now))
		if d.Kind != c.kind || !strings.Contains(d.Reason, c.reason) {
			t.Errorf("%s: %v %q, want %v with %q", c.name, d.Kind, d.Reason, c.kind, c.reason)
		}
		if d.Breach != strings.Contains(d.Reason, "not proven") {
			t.Errorf("%s: breach %v with reason %q", c.name, d.Breach, d.Reason)
		}
		if c.kind == Rollback && len(d.Evidence) != 2 {
			t.Errorf("%s: evidence %v, want the combination and the stratum", c.name, d.Evidence)
		}
	}
}

func TestEvidenceNumbers(t *testing.T) {
	d := NewDetector(Config{Margin: 1})
	d.Observe([]Sample{sample(10, 2, 30, 1)})
	v := d.Verdict()
	var want float64 // by hand: w = 1/4, mean over k of (k/n)²/n with n = (k+3)/4
	for _, k := range []float64{1.5, 2, 3, 5, 10} {
		n := (k + 3) / 4
		want += k * k / (n * n * n) / 5
	}
	for i, name := range []string{All, "eu/100"} {
		e := v.Evidence[i]
		if e.Stratum != name || e.CandidateRequests != 10 || e.CandidateFailures != 2 || e.BaselineRequests != 30 || e.BaselineFailures != 1 {
			t.Errorf("evidence %d: %v", i, e)
		}
		if math.Abs(e.EValue-want) > 1e-12 || math.Abs(e.SrValue-want/86_400) > 1e-12 {
			t.Errorf("%s: E %v, SR/T %v; want %v and %v", name, e.EValue, e.SrValue, want, want/86_400)
		}
	}
	if a, s := v.Evidence[0].Threshold, v.Evidence[1].Threshold; math.Abs(a-400) > 1e-9 || math.Abs(s-800) > 1e-9 {
		t.Errorf("thresholds %v and %v, want 400 and 800", a, s)
	}
}

func TestChangeIsDated(t *testing.T) {
	d := NewDetector(Config{})
	one := func(second int, ec uint64) {
		s := sample(10, ec, 990, 10)
		if ec > 0 {
			s.FirstFailure = at(second)
		}
		d.Observe([]Sample{s})
	}
	for s := range 100 {
		one(s, uint64(s%10)/9) // a failure every ten seconds is the base rate
	}
	s := 100
	for ; !d.Verdict().Roll; s++ {
		one(s, 5)
	}
	first := d.Verdict().FirstBad
	if first.Before(at(89)) || first.After(at(100)) {
		t.Errorf("regression at %v dated %v", at(100), first)
	}
	one(s, 0)
	if v := d.Verdict(); !v.Roll || !v.FirstBad.Equal(first) {
		t.Errorf("verdict did not stay: %+v", v)
	}
}

// Whatever is fed in, evidence stays finite and ordered; one-sided traffic is no
// evidence; small batches wait and are not lost.
func TestDetectorIsNumericallySafe(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := NewDetector(Config{})
		n := rapid.OneOf(rapid.Uint64Range(0, 50), rapid.Uint64Range(0, 1<<40))
		var requests uint64
		for range rapid.IntRange(1, 30).Draw(t, "samples") {
			s := sample(n.Draw(t, "nc"), n.Draw(t, "ec"), n.Draw(t, "nt"), n.Draw(t, "et"))
			requests += s.CandidateRequests
			d.Observe([]Sample{s})
		}
		if got := d.CandidateRequests(); got != requests {
			t.Fatalf("%d candidate requests counted, %d fed", got, requests)
		}
		for _, e := range d.Verdict().Evidence {
			for _, x := range []float64{e.EValue, e.SrValue, e.Threshold} {
				if math.IsNaN(x) || math.IsInf(x, 0) || x < 0 {
					t.Fatalf("evidence %v", e)
				}
			}
		}
	})
}

func TestOneSidedTrafficIsNoEvidence(t *testing.T) {
	for name, s := range map[string]Sample{"candidate only": sample(1000, 1000, 0, 0), "baseline only": sample(0, 0, 1000, 1000)} {
		d := NewDetector(Config{})
		for range 100 {
			d.Observe([]Sample{s})
		}
		if v := d.Verdict(); v.Roll || v.Suspicion > 1.0000001 {
			t.Errorf("%s: %+v", name, v)
		}
	}
}

func TestStrataAreBoundedAndShareAlpha(t *testing.T) {
	d := NewDetector(Config{})
	for i := range MaxStrata + 10 {
		d.Observe([]Sample{{Stratum: Stratum{"r", uint64(i)}, CandidateRequests: 10, BaselineRequests: 10}})
	}
	share := 0.0
	for _, p := range d.processes() {
		share += p.share
	}
	if len(d.strata) != MaxStrata || share > 1 {
		t.Errorf("%d strata, shares of α sum to %v", len(d.strata), share)
	}
}

func TestObserveIsCheap(t *testing.T) {
	d := NewDetector(Config{})
	samples := []Sample{sample(10, 1, 990, 9)}
	d.Observe(samples)
	if n := testing.AllocsPerRun(100, func() { d.Observe(samples) }); n != 0 {
		t.Errorf("Observe allocates %v times per call, want 0", n)
	}
}

func BenchmarkObserve(b *testing.B) {
	d := NewDetector(Config{})
	samples := []Sample{sample(10, 0, 990, 9)}
	b.ReportAllocs()
	for b.Loop() {
		d.Observe(samples)
	}
}
