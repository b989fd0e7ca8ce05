package control_test

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// late starts the experiment "ab" whose plan decides on metrics that outcomes bring.
func (p *plane) late(metrics ...*pb.ExperimentMetric) (epoch uint64) {
	p.t.Helper()
	return p.planned(&pb.ExperimentPlan{Metrics: metrics, Baseline: .1, Mde: .05,
		MinDuration: durationpb.New(10 * time.Minute), MaxDuration: durationpb.New(24 * time.Hour)})
}

// planned registers two versions and starts the experiment "ab" between them.
func (p *plane) planned(plan *pb.ExperimentPlan) (epoch uint64) {
	p.t.Helper()
	ctx := context.Background()
	p.register("chat", "v1", "v2")
	_, err := p.admin.CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: "ab", Model: "chat", Actor: "ann", Arms: []*pb.ExperimentArm{
		{Name: "control", Version: "v1", Weight: 5000}, {Name: "treatment", Version: "v2", Weight: 5000}}})
	if err != nil {
		p.t.Fatal(err)
	}
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

// person is a unit's name; even ones are under control, odd ones under the treatment.
func person(i int) string { return fmt.Sprintf("person-%d", i) }

// push sends one delta and waits for its acknowledgement.
func (p *plane) push(reporter string, sequence uint64, outcomes ...*pb.OutcomeDelta) {
	p.t.Helper()
	stream, err := pb.NewReportsClient(p.conn).Push(context.Background())
	if err != nil {
		p.t.Fatal(err)
	}
	if err := stream.Send(&pb.Delta{Reporter: reporter, Sequence: sequence, Node: &pb.Node{Id: "n1"}, Outcomes: outcomes}); err != nil {
		p.t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		p.t.Fatal(err)
	}
	if err := stream.CloseSend(); err != nil {
		p.t.Fatal(err)
	}
}

// expose reports persons from to to, one good request each.
func (p *plane) expose(epoch uint64, reporter string, from, to int) {
	p.t.Helper()
	arms := []*pb.OutcomeDelta{{Model: "chat", Version: "v1", Arm: "control", Region: "eu", WeightEpoch: epoch},
		{Model: "chat", Version: "v2", Arm: "treatment", Region: "eu", WeightEpoch: epoch}}
	for i := from; i < to; i++ {
		o := arms[i%2]
		o.Requests++
		o.Units = append(o.Units, &pb.UnitRow{Unit: experiments.UnitHash(facts.ExperimentSalt("ab"), person(i)), N: 1, SumY: 20})
	}
	p.push(reporter, 1, arms...)
}

func (p *plane) record(r *pb.RecordOutcomesRequest) *pb.RecordOutcomesResponse {
	p.t.Helper()
	out, err := pb.NewOutcomesClient(p.conn).Record(context.Background(), r)
	if err != nil {
		p.t.Fatal(err)
	}
	return out
}

// arm reads a number of an arm from the results of "ab".
func (p *plane) arm(list, name, field string) any {
	p.t.Helper()
	for _, a := range p.results().Results.AsMap()[list].([]any) {
		if m := a.(map[string]any); m["name"] == name || m["metric"] == name {
			return m[field]
		}
	}
	p.t.Fatalf("no %s of %s in %v", field, name, p.results().Results)
	return nil
}

func converted(i int, id string) *pb.OutcomeRecord {
	return &pb.OutcomeRecord{Experiment: "ab", Unit: person(i), Metric: "converted", Value: 1, Id: id}
}

// Late orders decide: 10 % of the units of the control and 20 % of the treatment buy, the
// sellers' system posts every batch twice, and the treatment ships.
func TestOutcomesDecide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		epoch := p.late(&pb.ExperimentMetric{Name: "converted", Kind: "proportion"})
		p.expose(epoch, "n1/a", 0, 4000)
		for i := range 4 { // what is known by now of 1000 units each
			r := &pb.RecordOutcomesRequest{RequestId: fmt.Sprintf("batch-%d", i)}
			for n := i * 1000; n < (i+1)*1000; n++ {
				if n/2%10 == 0 || n%2 == 1 && n/2%10 == 1 {
					r.Outcomes = append(r.Outcomes, converted(n, ""))
				}
			}
			if out := p.record(r); int(out.Counted) != len(r.Outcomes) || out.Repeated != 0 || len(out.Errors) != 0 {
				t.Fatalf("batch %d of %d: %v", i, len(r.Outcomes), out)
			}
			if out := p.record(r); int(out.Repeated) != len(r.Outcomes) || out.Counted != 0 {
				t.Fatalf("batch %d again: %v", i, out)
			}
		}
		if a, b := p.arm("arms", "control", "value"), p.arm("arms", "treatment", "value"); a != .1 || b != .2 {
			t.Errorf("rates %v and %v, want 0.1 and 0.2", a, b)
		}
		time.Sleep(11 * time.Minute)
		if e := p.results().Experiment; e.State != "concluded" || e.Outcome != "ship" || e.Serve != "treatment" || p.champion() != "v2" {
			t.Fatalf("%v, champion %s", e, p.champion())
		}
		// What was decided stands, what comes late is still shown, and then the window closes.
		if out := p.record(&pb.RecordOutcomesRequest{Outcomes: []*pb.OutcomeRecord{converted(2, "")}}); out.Counted != 1 {
			t.Errorf("late: %v", out)
		}
		time.Sleep(11 * time.Minute)
		out := p.record(&pb.RecordOutcomesRequest{Outcomes: []*pb.OutcomeRecord{converted(4, "")}})
		if len(out.Errors) != 1 || out.Errors[0].Kind != "locked" || !strings.Contains(out.Errors[0].Message, "10m0s") {
			t.Errorf("too late: %v", out)
		}
	})
}

// What is wrong with one outcome is said of it and changes nothing about the others; what
// was refused may be sent again with its id.
func TestOutcomesRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		epoch := p.late(&pb.ExperimentMetric{Name: "converted", Kind: "proportion"}, &pb.ExperimentMetric{Name: "accuracy", Kind: "ratio"},
			&pb.ExperimentMetric{Name: "success_rate"})
		p.expose(epoch, "n1/a", 0, 2)
		with := func(edit func(*pb.OutcomeRecord)) *pb.OutcomeRecord {
			o := converted(0, "")
			edit(o)
			return o
		}
		cases := []struct {
			o          *pb.OutcomeRecord
			kind, want string
		}{
			{with(func(o *pb.OutcomeRecord) { o.Experiment = "zz" }), "not_found", `experiment "zz"`},
			{with(func(o *pb.OutcomeRecord) { o.Metric = "profit" }), "not_found", `["converted" "accuracy"]`},
			{with(func(o *pb.OutcomeRecord) { o.Metric = "success_rate" }), "invalid", "reported by sidecars"},
			{with(func(o *pb.OutcomeRecord) { o.Unit = person(77) }), "not_found", "unit not found"},
			{with(func(o *pb.OutcomeRecord) { o.Unit = "" }), "invalid", "unit is 0 bytes"},
			{with(func(o *pb.OutcomeRecord) { o.Value = math.NaN() }), "invalid", "value is NaN"},
			{with(func(o *pb.OutcomeRecord) { o.Value = 1e13 }), "invalid", "1e+12"},
			{with(func(o *pb.OutcomeRecord) { o.At = timestamppb.New(time.Now().Add(-time.Hour)) }), "invalid", "before the start"},
			{with(func(o *pb.OutcomeRecord) { o.At = timestamppb.New(time.Now().Add(time.Hour)) }), "invalid", "ahead"},
			{with(func(o *pb.OutcomeRecord) { o.Id = strings.Repeat("x", 257) }), "invalid", "the limit is 256"},
		}
		r := &pb.RecordOutcomesRequest{}
		for _, c := range cases {
			r.Outcomes = append(r.Outcomes, c.o)
		}
		r.Outcomes = append(r.Outcomes, converted(1, "order-1"))
		out := p.record(r)
		if out.Counted != 1 || out.Repeated != 0 || len(out.Errors) != len(cases) {
			t.Fatalf("%v", out)
		}
		for i, e := range out.Errors {
			if int(e.Index) != i || e.Kind != cases[i].kind || !strings.Contains(e.Message, cases[i].want) {
				t.Errorf("%d: %v, want %s %q", i, e, cases[i].kind, cases[i].want)
			}
		}
		// The unit that was unknown is exposed now; its order counts, once.
		again := &pb.RecordOutcomesRequest{Outcomes: []*pb.OutcomeRecord{converted(77, "order-77"), converted(1, "order-1")}}
		p.record(again)
		p.expose(epoch, "n1/b", 77, 78)
		if out := p.record(again); out.Counted != 1 || out.Repeated != 1 || len(out.Errors) != 0 {
			t.Errorf("after exposure: %v", out)
		}
		for _, bad := range []*pb.RecordOutcomesRequest{{}, {Outcomes: make([]*pb.OutcomeRecord, 1001)}, {RequestId: strings.Repeat("x", 257), Outcomes: again.Outcomes}} {
			if _, err := pb.NewOutcomesClient(p.conn).Record(context.Background(), bad); gstatus.Code(err) != codes.InvalidArgument {
				t.Errorf("%d outcomes, request id of %d bytes: %v", len(bad.Outcomes), len(bad.RequestId), err)
			}
		}
	})
}

// The kinds of named metrics: a ratio is about values, a mean about all exposed units.
// Values of units seen in both arms count nowhere.
func TestOutcomeKinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		plan := &pb.ExperimentPlan{Sd: 1, Mde: .1, Metrics: []*pb.ExperimentMetric{{Name: "revenue", Kind: "mean"}, {Name: "accuracy", Kind: "ratio"}}}
		epoch := p.planned(plan)
		p.expose(epoch, "n1/a", 0, 400)
		// Person 0 turns up in the other arm as well.
		p.push("n1/b", 1, &pb.OutcomeDelta{Model: "chat", Version: "v2", Arm: "treatment", Region: "eu", WeightEpoch: epoch, Requests: 1,
			Units: []*pb.UnitRow{{Unit: experiments.UnitHash(facts.ExperimentSalt("ab"), person(0)), N: 1}}})
		r := &pb.RecordOutcomesRequest{}
		for i := range 200 { // half of the units, two values of accuracy each; revenue −1 and 3
			r.Outcomes = append(r.Outcomes,
				&pb.OutcomeRecord{Experiment: "ab", Unit: person(i), Metric: "accuracy", Value: .5},
				&pb.OutcomeRecord{Experiment: "ab", Unit: person(i), Metric: "accuracy", Value: 1},
				&pb.OutcomeRecord{Experiment: "ab", Unit: person(i), Metric: "revenue", Value: -1},
				&pb.OutcomeRecord{Experiment: "ab", Unit: person(i), Metric: "revenue", Value: 3})
		}
		if out := p.record(r); out.Counted != 800 {
			t.Fatalf("%v", out)
		}
		if u, v := p.arm("arms", "treatment", "units"), p.arm("arms", "treatment", "value"); u != 200.0 || v != 1.0 {
			t.Errorf("treatment: %v units, revenue %v each; want 200 and 1", u, v)
		}
		if u, v := p.arm("arms", "control", "units"), p.arm("arms", "control", "value").(float64); u != 199.0 || math.Abs(v-2*99./199) > 1e-12 {
			t.Errorf("control: %v units, revenue %v each; want 199 and %v", u, v, 2*99./199)
		}
		second := p.results().Results.AsMap()["secondary"].([]any)[0].(map[string]any)
		if tr := second["treatment"].(map[string]any); tr["value"] != .75 || tr["n"] != 100.0 {
			t.Errorf("accuracy of the treatment %v, want 0.75 over 100 units", tr)
		}
	})
}

// The same over HTTP, with the standard header for repetitions.
func TestOutcomesREST(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), func(o *control.Options) { o.AdminToken = "0123456789abcdef0123456789abcdef" })
		srv := p.srv.Handler()
		post := func(token, body string) *httptest.ResponseRecorder {
			r := httptest.NewRequest(http.MethodPost, "http://localhost/v1/outcomes", bytes.NewBufferString(body))
			r.Header.Set("content-type", "application/json")
			r.Header.Set("idempotency-key", "k1")
			r.Header.Set("authorization", "Bearer "+token)
			rec := httptest.NewRecorder()
			srv.ServeHTTP(rec, r)
			return rec
		}
		body := `{"outcomes":[{"experiment":"zz","unit":"u","metric":"m","value":1}]}`
		if rec := post("wrong", body); rec.Code != http.StatusUnauthorized {
			t.Errorf("without the token: %d", rec.Code)
		}
		rec := post("0123456789abcdef0123456789abcdef", body)
		if rec.Code != http.StatusOK || !strings.Contains(rec.Body.String(), `not_found`) {
			t.Errorf("%d %s", rec.Code, rec.Body)
		}
		if rec := post("0123456789abcdef0123456789abcdef", `{"outcomes":[]}`); rec.Code != http.StatusBadRequest {
			t.Errorf("empty batch: %d %s", rec.Code, rec.Body)
		}
	})
}

// Evidence survives a restart, an orderly one wholly: units, outcomes, ids and sequences,
// so that what reporters and sellers send again after it still counts once.
func TestEvidenceSurvivesRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := memory.New()
		p := start(t, log, nil)
		epoch := p.late(&pb.ExperimentMetric{Name: "converted", Kind: "proportion"}, &pb.ExperimentMetric{Name: "success_rate"})
		p.expose(epoch, "n1/a", 0, 1000)
		orders := &pb.RecordOutcomesRequest{RequestId: "orders"}
		for i := range 100 {
			orders.Outcomes = append(orders.Outcomes, converted(i, ""))
		}
		p.record(orders)
		before := p.results()
		p.stop()
		again := start(t, log, nil)
		if after := again.results(); fmt.Sprint(after.Results.AsMap()["arms"]) != fmt.Sprint(before.Results.AsMap()["arms"]) || fmt.Sprint(after.Ledger) != fmt.Sprint(before.Ledger) {
			t.Errorf("after the restart\n%v\n%v\nwant\n%v\n%v", after.Results.AsMap()["arms"], after.Ledger, before.Results.AsMap()["arms"], before.Ledger)
		}
		again.expose(epoch, "n1/a", 0, 1000) // its acknowledgement was lost
		if out := again.record(orders); out.Repeated != 100 || out.Counted != 0 {
			t.Errorf("outcomes again: %v", out)
		}
		if rows := again.results().Ledger.AsMap()["rows"]; rows != 1000.0 {
			t.Errorf("%v rows, want 1000", rows)
		}
		again.expose(epoch, "n1/b", 1000, 1010)
		if rows := again.results().Ledger.AsMap()["rows"]; rows != 1010.0 {
			t.Errorf("%v rows after a new report, want 1010", rows)
		}
		again.stop()
		// A snapshot nobody can read costs evidence, not the control plane.
		if err := log.SaveSnapshot(context.Background(), "trials", log.Head(), []byte("rubbish")); err != nil {
			t.Fatal(err)
		}
		if rows := start(t, log, nil).results().Ledger.AsMap()["rows"]; rows != 0.0 {
			t.Errorf("%v rows from rubbish", rows)
		}
	})
}
