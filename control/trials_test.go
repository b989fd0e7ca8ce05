package control_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
)

// experiment registers two versions and starts a planned test between them: 10 minutes at
// least, 30 at most. It returns the weight epoch sidecars report under.
func (p *plane) experiment() (epoch uint64) {
	p.t.Helper()
	ctx := context.Background()
	p.register("chat", "v1", "v2")
	_, err := p.admin.CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: "ab", Model: "chat", Actor: "ann", Arms: []*pb.ExperimentArm{
		{Name: "control", Version: "v1", Weight: 5000, Configuration: map[string]string{"dspy_enabled": "false"}},
		{Name: "treatment", Version: "v2", Weight: 5000}}})
	if err != nil {
		p.t.Fatal(err)
	}
	plan := &pb.ExperimentPlan{Metrics: []*pb.ExperimentMetric{{Name: "success_rate"}, {Name: "response_time"}, {Name: "accuracy"}},
		Baseline: .9, Mde: .03, MinDuration: durationpb.New(10 * time.Minute), MaxDuration: durationpb.New(30 * time.Minute)}
	if _, err := p.admin.PlanExperiment(ctx, &pb.PlanExperimentRequest{Name: "ab", Plan: plan, Actor: "ann"}); err != nil {
		p.t.Fatal(err)
	}
	if _, err := p.admin.SetExperimentState(ctx, &pb.SetExperimentStateRequest{Name: "ab", State: "running", Actor: "ann"}); err != nil {
		p.t.Fatal(err)
	}
	m, err := p.admin.GetModel(ctx, &pb.NameRequest{Name: "chat"})
	if err != nil {
		p.t.Fatal(err)
	}
	return m.WeightEpoch
}

// report sends frames as two sidecars do: every unit has two requests, one seen by each;
// of ten units one fails under control, one of every nth under the treatment. Each frame
// is sent twice, as after a lost acknowledgement.
func (p *plane) report(epoch uint64, units, nth int) {
	p.t.Helper()
	stream, err := pb.NewReportsClient(p.conn).Push(context.Background())
	if err != nil {
		p.t.Fatal(err)
	}
	for _, pod := range []string{"n1/a", "n1/b"} {
		arms := []*pb.OutcomeDelta{{Model: "chat", Version: "v1", Arm: "control", Region: "eu", WeightEpoch: epoch},
			{Model: "chat", Version: "v2", Arm: "treatment", Region: "eu", WeightEpoch: epoch}}
		for i := range units {
			o, fails := arms[i%2], (i/2)%10 == 0
			if i%2 == 1 {
				fails = (i/2)%nth == 0
			}
			row := &pb.UnitRow{Unit: uint32(i), N: 1, SumY: 20}
			o.Requests++
			if fails {
				row.SumX = 1
				o.Failures++
			}
			o.Units = append(o.Units, row)
		}
		for range 2 {
			if err := stream.Send(&pb.Delta{Reporter: pod, Sequence: 1, Node: &pb.Node{Id: "n1"}, Outcomes: arms}); err != nil {
				p.t.Fatal(err)
			}
			if _, err := stream.Recv(); err != nil {
				p.t.Fatal(err)
			}
		}
	}
	if err := stream.CloseSend(); err != nil {
		p.t.Fatal(err)
	}
}

func (p *plane) results() *pb.ExperimentResultsResponse {
	p.t.Helper()
	r, err := p.admin.ExperimentResults(context.Background(), &pb.NameRequest{Name: "ab"})
	if err != nil {
		p.t.Fatal(err)
	}
	return r
}

func (p *plane) champion() string {
	p.t.Helper()
	m, err := p.admin.GetModel(context.Background(), &pb.NameRequest{Name: "chat"})
	if err != nil {
		p.t.Fatal(err)
	}
	return m.Aliases["champion"]
}

// A true difference concludes for the right arm, once, after the minimum duration; the
// winner becomes the champion, and a restart still shows the numbers of the decision.
func TestExperimentShipsTheBetterArm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := memory.New()
		p := start(t, log, nil)
		epoch := p.experiment()
		p.report(epoch, 8000, 25)
		time.Sleep(5 * time.Minute)
		r := p.results()
		if r.Experiment.State != "running" || p.champion() != "v1" {
			t.Fatalf("before the minimum duration: %v, champion %s", r.Experiment, p.champion())
		}
		primary := r.Results.AsMap()["primary"].([]any)[0].(map[string]any)
		if got := fmt.Sprintf("%.3f", primary["difference"]); got != "0.060" {
			t.Errorf("difference %s, want 0.060: frames sent twice must count once", got)
		}
		if rows := r.Ledger.AsMap()["rows"]; rows != 16000.0 {
			t.Errorf("%v rows counted, want 16000", rows)
		}
		time.Sleep(6 * time.Minute)
		r = p.results()
		if e := r.Experiment; e.State != "concluded" || e.Outcome != "ship" || e.Serve != "treatment" || e.Reason == "" || p.champion() != "v2" {
			t.Fatalf("after it: %v, champion %s", e, p.champion())
		}
		if r.Results.AsMap()["ratio"].(map[string]any)["mismatch"] != false {
			t.Errorf("ratio %v", r.Results.AsMap()["ratio"])
		}
		time.Sleep(time.Hour)
		if n := len(p.events("experiment/ab")); n != 4 { // created, planned, started, concluded
			t.Errorf("events %v", kinds(p.events("experiment/ab")))
		}
		p.stop()
		again := start(t, log, nil)
		if r := again.results(); r.Experiment.Outcome != "ship" || r.Results.AsMap()["decision"].(map[string]any)["serve"] != "treatment" {
			t.Errorf("after a restart: %v", r)
		}
	})
}

// Identical arms stay undecided however often they are looked at; when time is up the
// control is kept.
func TestExperimentWithoutDifference(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		p.report(p.experiment(), 600, 10)
		time.Sleep(29 * time.Minute)
		if e := p.results().Experiment; e.State != "running" {
			t.Fatalf("undecided: %v", e)
		}
		time.Sleep(2 * time.Minute)
		if e := p.results().Experiment; e.State != "concluded" || e.Outcome != "inconclusive" || e.Serve != "control" || p.champion() != "v1" {
			t.Fatalf("time is up: %v, champion %s", e, p.champion())
		}
	})
}

// A plan is frozen by the start, only its rule concludes, and what nothing reports
// cannot decide.
func TestExperimentRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		ctx := context.Background()
		p.experiment()
		_, err := p.srv.Admin().PlanExperiment(ctx, &pb.PlanExperimentRequest{Name: "ab", Plan: &pb.ExperimentPlan{Alpha: .5}})
		wantKind(t, err, outrigger.Locked)
		_, err = p.srv.Admin().SetExperimentState(ctx, &pb.SetExperimentStateRequest{Name: "ab", State: "concluded"})
		wantKind(t, err, outrigger.Locked)
		if _, err = p.srv.Admin().SetExperimentState(ctx, &pb.SetExperimentStateRequest{Name: "ab", State: "stopped"}); err != nil {
			t.Fatal(err)
		}
		if e := p.results().Experiment; e.Cause != "manual" || e.Serve != "control" {
			t.Errorf("stopped: %v", e)
		}
		arms := []*pb.ExperimentArm{{Name: "a", Version: "v1", Weight: 5000}, {Name: "b", Version: "v2", Weight: 5000, Configuration: map[string]string{"x": "{"}}}
		_, err = p.srv.Admin().CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: "cd", Model: "chat", Arms: arms})
		wantKind(t, err, outrigger.Invalid)
		arms[1].Configuration = nil
		if _, err = p.srv.Admin().CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: "cd", Model: "chat", Arms: arms}); err != nil {
			t.Fatal(err)
		}
		for _, bad := range []*pb.ExperimentPlan{nil, {Metrics: []*pb.ExperimentMetric{{Name: "accuracy"}}}, {Metrics: []*pb.ExperimentMetric{{Name: "error_rate"}}, Mde: -.01},
			{Method: "eprocess", Metrics: []*pb.ExperimentMetric{{Name: "failed_units"}}, Baseline: .1, Mde: -.01}, {Control: "z"}} {
			_, err = p.srv.Admin().PlanExperiment(ctx, &pb.PlanExperimentRequest{Name: "cd", Plan: bad})
			wantKind(t, err, outrigger.Invalid)
		}
	})
}
