package trials_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/trials"
	"github.com/outrigger-mesh/outrigger/experiments"
)

var began = time.Date(2026, 1, 5, 12, 0, 0, 0, time.UTC)

// running folds the events of a model "chat" with versions v1, v2, … and of the running
// experiment "ab" between them, whose weights are given.
func running(t testing.TB, weights ...uint32) *facts.Facts {
	t.Helper()
	f, n := new(facts.Facts), map[string]uint64{}
	apply := func(aggregate string, e *pb.Event) {
		n[aggregate]++
		e.Aggregate, e.Sequence, e.Position, e.At = aggregate, n[aggregate], f.Position()+1, timestamppb.New(began)
		f = facts.Apply(f, e)
	}
	changed := func(c *pb.ExperimentChanged) {
		apply("experiment/ab", &pb.Event{Payload: &pb.Event_ExperimentChanged{ExperimentChanged: c}})
	}
	var arms []*pb.ExperimentArm
	for i, w := range weights {
		v := fmt.Sprint("v", i+1)
		apply("model/chat", &pb.Event{Payload: &pb.Event_ModelVersionRegistered{ModelVersionRegistered: &pb.ModelVersionRegistered{
			Version: v, Endpoints: []*pb.Endpoint{{Address: "10.0.0.1:80"}}}}})
		arms = append(arms, &pb.ExperimentArm{Name: string(rune('a' + i)), Version: v, Weight: w})
	}
	apply("model/chat", &pb.Event{Payload: &pb.Event_AliasMoved{AliasMoved: &pb.AliasMoved{Alias: facts.Champion, To: "v1"}}})
	changed(&pb.ExperimentChanged{State: facts.Draft, Model: "chat", Arms: arms})
	changed(&pb.ExperimentChanged{State: facts.Planned, Plan: &pb.ExperimentPlan{Baseline: .9, Mde: .03, UnitsPerArm: 3000,
		Metrics:     []*pb.ExperimentMetric{{Name: "success_rate"}, {Name: "converted", Kind: "proportion"}},
		MinDuration: durationpb.New(time.Minute), MaxDuration: durationpb.New(time.Hour)}})
	changed(&pb.ExperimentChanged{State: facts.Running})
	if e := f.Experiment("ab"); e == nil || e.State != facts.Running || len(e.Epochs) != 1 {
		t.Fatalf("the world is %+v, %+v", e, f.Skipped())
	}
	return f
}

func service(t testing.TB, f *facts.Facts, maxUnits int) *trials.Service {
	t.Helper()
	s, err := trials.New(trials.Options{Log: memory.New(), Facts: func() *facts.Facts { return f }, Ready: make(chan struct{}), MaxUnits: maxUnits,
		Now: func() time.Time { return began.Add(10 * time.Minute) }})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// cell is n units of an arm from number first on; of every tenth the request fails.
func cell(f *facts.Facts, arm string, first, n int) *pb.OutcomeDelta {
	o := &pb.OutcomeDelta{Model: "chat", Arm: arm, Region: "eu", WeightEpoch: f.Model("chat").WeightEpoch}
	for i := range n {
		row := &pb.UnitRow{Unit: uint32(first + i), N: 1, SumY: float64(10 + i%7)}
		if i%10 == 0 {
			row.SumX = 1
		}
		o.Units = append(o.Units, row)
	}
	return o
}

func results(t testing.TB, s *trials.Service, f *facts.Facts) (results, ledger map[string]any) {
	t.Helper()
	r, l, err := s.Results(f.Experiment("ab"), began.Add(10*time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	return r.AsMap(), l.AsMap()
}

// An arm of weight 0 that gets units is a bug of whoever divides them: results name it, and
// nothing is concluded from the rest, however clear it looks. A few stragglers are none.
func TestUnitsOfAnArmWithoutWeight(t *testing.T) {
	f := running(t, 5000, 5000, 0)
	s := service(t, f, 0)
	better := cell(f, "b", 1_000_000, 4000)
	for _, u := range better.Units {
		u.SumX = 0
	}
	s.Ingest(&pb.Delta{Reporter: "n1/a", Sequence: 1, Outcomes: []*pb.OutcomeDelta{cell(f, "a", 0, 4000), better}})
	r, _ := results(t, s, f)
	if d := r["decision"].(map[string]any); d["outcome"] != "ship" {
		t.Fatalf("without a leak: %v", d)
	}
	s.Ingest(&pb.Delta{Reporter: "n1/a", Sequence: 2, Outcomes: []*pb.OutcomeDelta{cell(f, "c", 2_000_000, 6)}})
	r, _ = results(t, s, f)
	d := fmt.Sprint(r["decision"])
	if !strings.Contains(d, "outcome:continue") || !strings.Contains(d, `arm c of weight 0 received units in region "eu"`) {
		t.Errorf("with a leak: %s", d)
	}
	if leaks := r["ratio"].(map[string]any)["leaks"].([]any); len(leaks) != 1 || leaks[0].(map[string]any)["arm"] != "c" {
		t.Errorf("leaks %v", leaks)
	}
}

// The ledger never holds more units than it may: what has no room is counted, of every arm
// alike, known units still count, and outcomes say that it is full.
func TestLedgerIsBounded(t *testing.T) {
	f := running(t, 5000, 5000)
	s := service(t, f, 100)
	both := func(n int) []*pb.OutcomeDelta { return []*pb.OutcomeDelta{cell(f, "a", 0, n), cell(f, "b", 1000, n)} }
	s.Ingest(&pb.Delta{Reporter: "n1/a", Sequence: 1, Outcomes: both(40)})
	s.Ingest(&pb.Delta{Reporter: "n1/a", Sequence: 2, Outcomes: both(60)}) // 80 known, 40 new
	r, l := results(t, s, f)
	if l["rows"] != 160.0 || l["rows_without_room"] != 40.0 {
		t.Errorf("ledger %v", l)
	}
	if e := r["exposure"].(map[string]any); e["units"] != 80.0 {
		t.Errorf("exposure %v, want 80 units", e)
	}
	for _, a := range r["arms"].([]any) {
		if n := a.(map[string]any)["units"]; n != 40.0 {
			t.Errorf("an arm has %v units, want 40: the last to come must not have been the last to fit", n)
		}
	}
	// A person whose unit is known wants room for values, which is gone.
	known := "person-7"
	u := experiments.UnitHash(facts.ExperimentSalt("ab"), known)
	roomy := service(t, f, 1)
	roomy.Ingest(&pb.Delta{Reporter: "n1/a", Sequence: 1, Outcomes: []*pb.OutcomeDelta{{Model: "chat", Arm: "a", Region: "eu",
		WeightEpoch: f.Model("chat").WeightEpoch, Units: []*pb.UnitRow{{Unit: u, N: 1}}}}})
	out, err := roomy.Record(context.Background(), &pb.RecordOutcomesRequest{Outcomes: []*pb.OutcomeRecord{{Experiment: "ab", Unit: known, Metric: "converted", Value: 1}}})
	if err != nil || len(out.GetErrors()) != 1 || out.Errors[0].Kind != "exhausted" || !strings.Contains(out.Errors[0].Message, "ledger is full") {
		t.Errorf("%v, %v", out, err)
	}
}

// A look that falls into the middle of a report sees none of its units: of half of them, one
// arm's users would seem to be missing, and the experiment would be stopped for it.
func TestLookSeesWholeReports(t *testing.T) {
	f := running(t, 5000, 5000)
	s := service(t, f, 0)
	done := make(chan struct{})
	for reporter := range 2 {
		go func() {
			defer func() { done <- struct{}{} }()
			for i := range 100 {
				first := reporter<<20 + 200*i
				s.Ingest(&pb.Delta{Reporter: fmt.Sprint("n1/", reporter), Sequence: uint64(i + 1),
					Outcomes: []*pb.OutcomeDelta{cell(f, "a", first, 200), cell(f, "b", 1<<24+first, 200)}})
			}
		}()
	}
	looks, seen := 0, 0.0
	for left := 2; left > 0; looks++ {
		select {
		case <-done:
			left--
		default:
		}
		r, _ := results(t, s, f)
		var units []float64
		for _, a := range r["arms"].([]any) {
			n, _ := a.(map[string]any)["units"].(float64)
			units = append(units, n)
		}
		if units[0] != units[1] || units[0] < seen {
			t.Fatalf("look %d saw %v units of the arms, %v before", looks, units, seen)
		}
		seen = units[0]
	}
	if r, _ := results(t, s, f); r["exposure"].(map[string]any)["units"] != 80_000.0 {
		t.Errorf("in the end %v, want 80000 units", r["exposure"])
	}
	t.Logf("%d looks", looks)
}

// What cannot be is left out and counted: it must not reach the statistics.
func TestRowsThatCannotBe(t *testing.T) {
	f := running(t, 5000, 5000)
	s := service(t, f, 0)
	o := cell(f, "a", 0, 0)
	nan := 0.0
	nan /= nan
	o.Units = []*pb.UnitRow{{Unit: 1, N: 1, SumX: 2}, {Unit: 2, N: 1, SumX: -1}, {Unit: 3, N: 1, SumY: -1}, {Unit: 4, N: 1, SumY: nan},
		{Unit: 5, N: 1, SumY: 1e16}, {Unit: 6, N: 0, SumY: 3}, {Unit: 7, N: 2, SumX: 1, SumY: 40}, {Unit: 8, N: 2, SumX: 1, SumY: 50}}
	elsewhere := []*pb.OutcomeDelta{{Model: "other", Arm: "a", Region: "eu", WeightEpoch: o.WeightEpoch, Units: o.Units},
		{Model: "chat", Arm: "a", Region: "eu", WeightEpoch: o.WeightEpoch + 1, Units: o.Units}, {Model: "chat", Arm: "last-good", Region: "eu", WeightEpoch: o.WeightEpoch, Units: o.Units}}
	s.Ingest(&pb.Delta{Reporter: "n1/a", Sequence: 1, Outcomes: append(elsewhere, o)})
	r, l := results(t, s, f)
	if l["rows"] != 2.0 || l["rows_bad"] != 6.0 {
		t.Errorf("ledger %v", l)
	}
	if a := r["arms"].([]any)[0].(map[string]any); a["units"] != 2.0 || a["value"] != .5 {
		t.Errorf("arm %v", a)
	}
}

// Regions and weight epochs are bounded too, so that a reporter that makes them up costs
// no memory.
func TestStrataAreBounded(t *testing.T) {
	f := running(t, 5000, 5000)
	s := service(t, f, 0)
	for i := range 1030 {
		o := cell(f, "a", i, 1)
		o.Region = fmt.Sprint("r", i)
		s.Ingest(&pb.Delta{Reporter: "n1/a", Sequence: uint64(i + 1), Outcomes: []*pb.OutcomeDelta{o}})
	}
	if _, l := results(t, s, f); l["rows"] != 1024.0 || l["rows_without_room"] != 6.0 {
		t.Errorf("ledger %v", l)
	}
}

func TestNewRefuses(t *testing.T) {
	for _, o := range []trials.Options{{}, {Log: memory.New(), Facts: func() *facts.Facts { return nil }, Ready: make(chan struct{}), MaxUnits: -1}} {
		if _, err := trials.New(o); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%v", err)
		}
	}
}
