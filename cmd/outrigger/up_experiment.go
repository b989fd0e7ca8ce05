//go:build !dataplane

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// The experiment of the script: half of the users each, judged by the share of calls
// that succeed. The least difference worth finding is small, so that within the run two
// identical arms are neither told apart nor found to be as good as one another.
const (
	trialName    = "demo-experiment"
	trialControl = "control"
	trialArm     = "treatment"
	trialBase    = 0.92 // of version 1's calls succeed
	trialMDE     = 0.005
	trialSeed    = 20231116 // the day of the trace
	// trialRow is how many failures in a row open a breaker. With 8 % failures five in a row
	// come up in 1 of 100 runs, and the users of the arm would be answered by version 1.
	trialRow = 20
	// trialSettle is how long traffic goes on after every sidecar has the conclusion.
	trialSettle = 3 * time.Second
)

// startTrial makes both versions fail as often as they shall, and starts the experiment.
func (m *mesh) startTrial(ctx context.Context) error {
	m.stats.mu.Lock()
	m.stats.trial = &trialSummary{Name: trialName, TrueDifference: m.u.difference}
	m.stats.mu.Unlock()
	for i, success := range []float64{trialBase, trialBase + m.u.difference} {
		if err := m.fault(ctx, m.models[i], fmt.Sprintf(`{"error_rate": %.4f, "seed": %d}`, 1-success, trialSeed)); err != nil {
			return err
		}
	}
	if _, err := m.admin.ConfigureModel(ctx, &pb.ConfigureModelRequest{Model: demoModelID, Actor: "demo", Limits: &pb.Limits{ConsecutiveFailures: trialRow}}); err != nil {
		return fmt.Errorf("configure the model: %w", err)
	}
	if _, err := m.admin.CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: trialName, Model: demoModelID, Actor: "demo", Arms: []*pb.ExperimentArm{
		{Name: trialControl, Version: stableName, Weight: experiments.Buckets / 2},
		{Name: trialArm, Version: candidateName, Weight: experiments.Buckets / 2}}}); err != nil {
		return fmt.Errorf("create the experiment: %w", err)
	}
	plan := &pb.ExperimentPlan{Metrics: []*pb.ExperimentMetric{{Name: facts.MetricSuccessRate}, {Name: facts.MetricResponseTime}},
		Baseline: trialBase, Mde: trialMDE, MinDuration: durationPB(5 * time.Second), MaxDuration: durationPB(24 * time.Hour)}
	if _, err := m.admin.PlanExperiment(ctx, &pb.PlanExperimentRequest{Name: trialName, Plan: plan, Actor: "demo"}); err != nil {
		return fmt.Errorf("plan the experiment: %w", err)
	}
	if _, err := m.admin.SetExperimentState(ctx, &pb.SetExperimentStateRequest{Name: trialName, State: facts.Running, Actor: "demo", Reason: "demonstration"}); err != nil {
		return fmt.Errorf("start the experiment: %w", err)
	}
	return nil
}

// trialSummary is what came of the experiment.
type trialSummary struct {
	Name           string             `json:"name"`
	TrueDifference float64            `json:"true_difference"`
	State          string             `json:"state"`
	Outcome        string             `json:"outcome"`
	Serve          string             `json:"serve"`
	Champion       string             `json:"champion"`
	Units          map[string]float64 `json:"units"` // users by arm
	Success        map[string]float64 `json:"success"`
	Difference     float64            `json:"difference"` // of the success rates, treatment minus control
	Low            float64            `json:"low"`        // its confidence sequence
	High           float64            `json:"high"`
	P              float64            `json:"p"`
	SRMok          bool               `json:"srm_ok"`
	DecidedS       float64            `json:"decided_s,omitempty"` // from the start to the conclusion
	Reason         string             `json:"reason"`
	After          map[string]int     `json:"after,omitempty"` // calls by version that started when every sidecar had the conclusion
}

// pollTrial takes the results as they are now; a missed poll is made again.
func (m *mesh) pollTrial(ctx context.Context) {
	r, err := m.admin.ExperimentResults(ctx, &pb.NameRequest{Name: trialName})
	if err != nil {
		return
	}
	model, err := m.admin.GetModel(ctx, &pb.NameRequest{Name: demoModelID})
	if err != nil {
		return
	}
	if m.stats.results(r, model.Aliases[facts.Champion]) {
		m.pollObeyed(ctx)
	}
}

// pollObeyed looks whether every sidecar has acknowledged the policy that came of the
// conclusion.
func (m *mesh) pollObeyed(ctx context.Context) {
	audit, err := m.admin.Audit(ctx, &pb.AuditRequest{AggregatePrefix: "experiment/" + trialName, NewestFirst: true, Limit: 1})
	if err != nil || len(audit.Events) == 0 {
		return
	}
	s, err := m.admin.Status(ctx, &pb.ListRequestAll{})
	if err != nil {
		return
	}
	obeying := 0
	for _, n := range s.Nodes {
		if n.Connected && n.AckedPosition >= audit.Events[0].Position {
			obeying++
		}
	}
	if obeying == len(m.sidecars) {
		m.stats.obeyed(time.Now())
	}
}

// results takes the experiment as it is, and says whether it has ended and, as far as known,
// not every sidecar has heard of it.
func (t *tally) results(r *pb.ExperimentResultsResponse, champion string) (unheard bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s, e := t.trial, r.GetExperiment()
	s.State, s.Outcome, s.Serve, s.Champion, s.Reason = e.GetState(), e.GetOutcome(), e.GetServe(), champion, e.GetReason()
	f := r.GetResults().GetFields()
	s.Units, s.Success = map[string]float64{}, map[string]float64{}
	for _, a := range f["arms"].GetListValue().GetValues() {
		arm := a.GetStructValue().GetFields()
		name := arm["name"].GetStringValue()
		s.Units[name], s.Success[name] = arm["units"].GetNumberValue(), arm["value"].GetNumberValue()
	}
	if list := f["primary"].GetListValue().GetValues(); len(list) == 1 {
		c := list[0].GetStructValue().GetFields()
		interval := c["interval"].GetStructValue().GetFields()
		s.Difference, s.P = c["difference"].GetNumberValue(), c["p"].GetNumberValue()
		s.Low, s.High = interval["low"].GetNumberValue(), interval["high"].GetNumberValue()
	}
	ratio := f["ratio"].GetStructValue().GetFields()
	s.SRMok = ratio != nil && !ratio["mismatch"].GetBoolValue()
	if e.GetEndedAt() != nil && t.decidedAt.IsZero() {
		t.decidedAt = e.GetEndedAt().AsTime()
		s.DecidedS = t.decidedAt.Sub(e.GetStartedAt().AsTime()).Seconds()
	}
	return !t.decidedAt.IsZero() && t.obeyedAt.IsZero()
}

// obeyed notes that every sidecar has the conclusion.
func (t *tally) obeyed(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.obeyedAt, t.trial.After = now, map[string]int{}
}

// afterTrial counts a call that started when every sidecar had the conclusion. One that the
// winner could not serve and the last good version did is no disobedience.
func (t *tally) afterTrial(r record) {
	if !t.obeyedAt.IsZero() && r.Arm != policy.ArmLastGood && r.At > t.obeyedAt.UnixNano() {
		t.trial.After[r.Version]++
	}
}

// settled says whether the conclusion has been obeyed for long enough to end the run.
func (t *tally) settled(now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.obeyedAt.IsZero() && now.Sub(t.obeyedAt) > trialSettle
}

func (s *trialSummary) line() string {
	return fmt.Sprintf("difference %.2f points (%.2f to %.2f), %.0f and %.0f users, SRM ok %v",
		100*s.Difference, 100*s.Low, 100*s.High, s.Units[trialControl], s.Units[trialArm], s.SRMok)
}

func (s *trialSummary) print(w io.Writer) {
	fmt.Fprintf(w, "Experiment: true difference %.2f points; %s %s %s; %s.\n", 100*s.TrueDifference, s.State, s.Outcome, s.Serve, s.line())
	fmt.Fprintf(w, "Success %.2f %% and %.2f %%; champion %s", 100*s.Success[trialControl], 100*s.Success[trialArm], s.Champion)
	if s.State == facts.Concluded {
		fmt.Fprintf(w, "; concluded after %.1f s; calls by version from when every sidecar knew: %v;\n%s", s.DecidedS, s.After, s.Reason)
	}
	fmt.Fprintln(w, ".")
}

// verdict is what the script demands: a difference there is concludes for the better
// version, which gets all traffic; without one nothing is decided.
func (s *trialSummary) verdict(difference float64) error {
	var errs []error
	demand := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	outcome, serve, champion, state := experiments.OutcomeShip, trialArm, candidateName, facts.Concluded
	switch {
	case difference == 0:
		outcome, serve, champion, state = "", "", stableName, facts.Running
	case difference < 0:
		outcome, serve, champion = experiments.OutcomeKeep, trialControl, stableName
	}
	demand(s.State == state && s.Outcome == string(outcome) && s.Serve == serve, "the experiment is %s %q for arm %q; with a true difference of %v it should be %s %q for arm %q",
		s.State, s.Outcome, s.Serve, difference, state, outcome, serve)
	demand(s.Champion == champion, "the champion is %q, it should be %q", s.Champion, champion)
	demand(s.SRMok, "the units did not arrive in the ratio of the weights")
	if state == facts.Concluded {
		demand(s.After[champion] > 0, "no call was seen after the conclusion")
		for version, n := range s.After {
			demand(version == champion, "%d calls after the conclusion were answered by %q", n, version)
		}
	}
	return errors.Join(errs...)
}
