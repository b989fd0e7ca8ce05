package control_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
)

const reportedRules = `deployment:
  monitoring:
    alerts:
      user_satisfaction: {warning: 0.9, critical: 0.7}
      accuracy: {warning: 0.9, critical: 0.7}
      cost_per_request: {warning: 0.01, critical: 0.02}
`

// priced is a version's second: requests that take so many LLM tokens each.
func priced(version string, requests, tokens uint64) *pb.OutcomeDelta {
	o := outcomes(version, 1, requests, 0, time.Now())
	o.TokensIn, o.TokensOut = requests*100, requests*tokens
	return o
}

// severities are those an alert was raised with, and "resolved", in order.
func (p *plane) severities(id string) (out []string) {
	for _, e := range p.events("alert/" + id) {
		switch x := e.GetPayload().(type) {
		case *pb.Event_AlertRaised:
			out = append(out, x.AlertRaised.GetSeverity())
		case *pb.Event_AlertResolved:
			out = append(out, "resolved")
		}
	}
	return out
}

// A rule on each metric that sidecars cannot see fires for the version that is bad and not
// for its neighbour, gets worse as more is certain, and resolves:
//
//  1. ratings of 19 in 20 and calls of 0.6 ¢: within the limits, nothing stands
//  2. ratings of 1 in 2, calls of 3 ¢, of new users each second: certainly beyond the
//     warning at first, beyond the critical level later
//  3. as before: a minute later certainly within the limits again
func TestRulesOnReportedMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		defer p.stop()
		p.register("chat", "v1", "v2")
		if _, err := p.admin.ConfigureDeployment(t.Context(), &pb.ConfigureDeploymentRequest{Name: "plan.yaml", Text: []byte(reportedRules), Actor: "ann"}); err != nil {
			t.Fatal(err)
		}
		cost := "tokens_in * 1.0e-5 + tokens_out * 1.0e-4"
		if _, err := p.admin.ConfigureModel(t.Context(), &pb.ConfigureModelRequest{Model: "chat", Cost: &cost, Actor: "ann"}); err != nil {
			t.Fatal(err)
		}
		users := 0
		second := func(n int, good func(i int) bool, tokens uint64) {
			for range n {
				r := &pb.RecordOutcomesRequest{RequestId: fmt.Sprint("batch ", users)}
				for i := range 40 {
					users++
					value, version := 0.0, "v2"
					if i%2 == 0 {
						version = "v1" // does well all the time
					}
					if version == "v1" || good(i/2) {
						value = 1
					}
					for _, metric := range []string{"user_satisfaction", "accuracy"} {
						r.Outcomes = append(r.Outcomes, &pb.OutcomeRecord{Model: "chat", Version: version, Unit: fmt.Sprint("user-", users), Metric: metric, Value: value})
					}
				}
				if out := p.record(r); out.Counted != 80 || len(out.Errors) != 0 {
					t.Fatalf("%v", out)
				}
				if out := p.record(r); out.Repeated != 80 || out.Counted != 0 {
					t.Fatalf("again: %v", out)
				}
				p.push("pod", uint64(users), priced("v1", 20, 50), priced("v2", 20, tokens))
				time.Sleep(time.Second)
			}
		}
		rules := []string{"user_satisfaction", "accuracy", "cost_per_request"}
		most := func(i int) bool { return i%20 != 0 }
		second(70, most, 50)
		for _, r := range rules {
			if a := p.alert("rule-" + r + "-chat-v2"); a != nil {
				t.Fatalf("within its limits: %v", a)
			}
		}
		second(70, func(i int) bool { return i%2 == 0 }, 290)
		for _, r := range rules {
			a, was := p.alert("rule-"+r+"-chat-v2"), p.severities("rule-"+r+"-chat-v2")
			if a.GetState() != "firing" || a.GetSeverity() != "critical" || len(was) < 2 || was[0] == "critical" || !slices.Contains(was, "critical") {
				t.Errorf("%s: %v, raised %v", r, a, was)
			}
			if n := a.GetNumbers(); n[r] == "" || n[r+" low"] == "" || n[r+" high"] == "" || n[r+" n"] == "0" || n["version"] != "v2" {
				t.Errorf("%s: numbers %v", r, n)
			}
			if a := p.alert("rule-" + r + "-chat-v1"); a != nil {
				t.Errorf("the version that does well: %v", a)
			}
		}
		second(90, most, 50)
		for _, r := range rules {
			if was := p.severities("rule-" + r + "-chat-v2"); was[len(was)-1] != "resolved" {
				t.Errorf("%s did not resolve: %v", r, was)
			}
		}
	})
}

// Which version an outcome is about: the one it names, else the one its unit is assigned to,
// else that of the arm the unit was exposed to. What cannot be told is refused, in words.
func TestOutcomesOfVersions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		defer p.stop()
		epoch := p.planned(&pb.ExperimentPlan{Sd: 1, Mde: .1, Metrics: []*pb.ExperimentMetric{{Name: "accuracy", Kind: "ratio"}, {Name: "revenue", Kind: "mean"}}})
		p.expose(epoch, "n1/a", 0, 400)
		if _, err := p.admin.ConfigureDeployment(t.Context(), &pb.ConfigureDeploymentRequest{Name: "plan.yaml", Actor: "ann", Text: []byte(
			"deployment:\n  monitoring:\n    alerts:\n      wrong: {condition: accuracy < 0.8, severity: high}\n      unhappy: {condition: user_satisfaction < 0.8, severity: high}\n")}); err != nil {
			t.Fatal(err)
		}
		// By the arm: persons of odd numbers are under the treatment, which v2 serves. Revenue is
		// the experiment's own business, accuracy in percent too.
		r := &pb.RecordOutcomesRequest{}
		for i := range 400 {
			r.Outcomes = append(r.Outcomes, &pb.OutcomeRecord{Experiment: "ab", Unit: person(i), Metric: "accuracy", Value: float64(1 - i%2)},
				&pb.OutcomeRecord{Experiment: "ab", Unit: person(i), Metric: "revenue", Value: 30})
		}
		r.Outcomes = append(r.Outcomes, &pb.OutcomeRecord{Experiment: "ab", Unit: person(1), Metric: "accuracy", Value: 95})
		if out := p.record(r); out.Counted != 801 {
			t.Fatalf("%v", out)
		}
		// By assignment: the bucket rule of the running experiment.
		r = &pb.RecordOutcomesRequest{}
		for i := range 400 {
			user := fmt.Sprint("visitor-", i)
			good := 1.0
			if experiments.Bucket("experiment:ab", user) < 5000 {
				good = 0 // control, which v1 serves
			}
			r.Outcomes = append(r.Outcomes, &pb.OutcomeRecord{Model: "chat", Unit: user, Metric: "user_satisfaction", Value: good})
		}
		if out := p.record(r); out.Counted != 400 {
			t.Fatalf("%v", out)
		}
		time.Sleep(2 * time.Second)
		for id, want := range map[string]bool{"rule-wrong-chat-v2": true, "rule-wrong-chat-v1": false, "rule-unhappy-chat-v1": true, "rule-unhappy-chat-v2": false} {
			if a := p.alert(id); (a != nil) != want {
				t.Errorf("%s: %v, want it raised: %v", id, a, want)
			}
		}
		if n := p.alert("rule-wrong-chat-v2").GetNumbers()["accuracy n"]; n != "200" {
			t.Errorf("%s units of v2, want 200", n)
		}
		long := time.Now().Add(-time.Hour)
		about := func(edit func(*pb.OutcomeRecord)) *pb.OutcomeRecord {
			o := &pb.OutcomeRecord{Model: "chat", Version: "v1", Unit: "u", Metric: "accuracy", Value: 1}
			edit(o)
			return o
		}
		for _, c := range []struct {
			o          *pb.OutcomeRecord
			kind, want string
		}{
			{about(func(o *pb.OutcomeRecord) { o.Model = "zz" }), "not_found", `model "zz"`},
			{about(func(o *pb.OutcomeRecord) { o.Version = "v9" }), "not_found", `version "v9"`},
			{about(func(o *pb.OutcomeRecord) { o.Metric = "mood" }), "not_found", "user_satisfaction, accuracy, cost_per_request"},
			{about(func(o *pb.OutcomeRecord) { o.Value = 1.5 }), "invalid", "within 0 and 1"},
			{about(func(o *pb.OutcomeRecord) { o.Metric, o.Value = "cost_per_request", -1 }), "invalid", "within 0 and"},
			{about(func(o *pb.OutcomeRecord) { o.Unit = "" }), "invalid", "unit"},
			{about(func(o *pb.OutcomeRecord) { o.At = timestamppb.New(time.Now().Add(time.Hour)) }), "invalid", "ahead"},
			{about(func(o *pb.OutcomeRecord) { o.Version, o.At = "", timestamppb.New(long) }), "invalid", "x-outrigger-version"},
			{about(func(o *pb.OutcomeRecord) { o.Experiment, o.Unit = "ab", person(1) }), "invalid", "leave version out"},
			{about(func(o *pb.OutcomeRecord) { o.Experiment, o.Model, o.Version = "ab", "other", "" }), "invalid", `about model "chat"`},
		} {
			out := p.record(&pb.RecordOutcomesRequest{Outcomes: []*pb.OutcomeRecord{c.o}})
			if len(out.Errors) != 1 || out.Errors[0].Kind != c.kind || !strings.Contains(out.Errors[0].Message, c.want) {
				t.Errorf("%v: %v, want %s %q", c.o, out, c.kind, c.want)
			}
		}
	})
}

// Gates on such metrics: inconclusive without data, and with too little; a candidate that is
// accurate and cheap enough goes on, on evidence since its weight last changed only.
func TestGatesOnReportedMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		defer p.stop()
		p.register("chat", "v1", "v2")
		cost := "tokens_out * 1.0e-4"
		if _, err := p.admin.ConfigureModel(t.Context(), &pb.ConfigureModelRequest{Model: "chat", Cost: &cost, Actor: "ann"}); err != nil {
			t.Fatal(err)
		}
		gate := &pb.RolloutGate{Name: "quality", Kind: "metrics_threshold", Conditions: []string{"accuracy > 0.8", "cost_per_request < 0.01"}}
		last := &pb.RolloutPhase{Name: "full", Weight: 10_000, MinDuration: durationpb.New(time.Hour)}
		if _, err := p.admin.StartRollout(t.Context(), &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "v2", Actor: "ann",
			Phases: []*pb.RolloutPhase{{Name: "canary", Weight: 1000, Gates: []*pb.RolloutGate{gate}}, last}}); err != nil {
			t.Fatal(err)
		}
		seconds, users := uint64(0), 0
		serve := func(n, ratings int, at time.Time) {
			for range n {
				seconds++
				o := outcomes("v2", p.rollout("r").GetWeightEpoch(), 20, 0, time.Now())
				o.TokensOut = 20 * 50
				p.push("pod", seconds, o)
				r := &pb.RecordOutcomesRequest{}
				for range ratings {
					users++
					r.Outcomes = append(r.Outcomes, &pb.OutcomeRecord{Model: "chat", Version: "v2", Unit: fmt.Sprint("user-", users), Metric: "accuracy", Value: 1})
				}
				if at.IsZero() {
					at = time.Now()
				}
				for _, o := range r.Outcomes {
					o.At = timestamppb.New(at)
				}
				if len(r.Outcomes) > 0 {
					if out := p.record(r); int(out.Counted) != ratings {
						t.Fatalf("%v", out)
					}
				}
				time.Sleep(time.Second)
			}
		}
		began := time.Now()
		for _, step := range []struct {
			name             string
			seconds, ratings int
			at               time.Time
		}{{"requests, and no rating", 30, 0, time.Time{}}, {"ratings of answers before it", 5, 100, began.Add(-time.Minute)},
			{"ratings that prove nothing as yet", 1, 5, time.Time{}}} {
			if serve(step.seconds, step.ratings, step.at); p.rollout("r").GetPhase() != 0 {
				t.Fatalf("%s: %v", step.name, p.rollout("r"))
			}
		}
		gates := p.rollout("r").GetGates()
		if len(gates) != 1 || gates[0].GetOutcome() != "inconclusive" || !strings.Contains(gates[0].GetReason(), "accuracy > 0.8 is unknown") || !strings.Contains(gates[0].GetReason(), "cost_per_request < 0.01 is true") {
			t.Errorf("%v", gates)
		}
		serve(5, 100, time.Time{})
		if r := p.rollout("r"); r.GetPhase() != 1 {
			t.Errorf("%v", r)
		}
	})
}
