package deploy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/expr"
)

// Kinds of gates.
const (
	GateMetrics    = "metrics_threshold"
	GateApproval   = "manual_approval"
	GateTest       = "automated_test"
	GateTime       = "time_based"
	GateExperiment = "experiment"
)

// Outcome is what a gate says. Whatever is not known is inconclusive: no data never
// passes and never fails.
type Outcome string

// The outcomes.
const (
	Pass         Outcome = "pass"
	Fail         Outcome = "fail"
	Inconclusive Outcome = "inconclusive"
)

// What a gate may lead to beside passing.
const (
	OnHold     = "hold"
	OnRollback = "rollback"
	OnAdvance  = "advance"
)

// Metrics are the names conditions may use:
//
//	error_rate, success_rate            shares of the candidate's requests, since the weight last changed
//	baseline_error_rate                 of the last good version, over the same time
//	response_time, baseline_response_time  95th percentile, milliseconds
//	performance_degradation             response_time / baseline_response_time − 1
//	requests                            of the candidate, counted
//	user_satisfaction, accuracy         mean over users of what applications report, 0 to 1
//	cost_per_request                    by the model's cost formula, per logical request and in
//	                                    its currency; without a formula what applications report
//	system_failure                      true: most of the candidate's requests of the last minute failed
//
// Intervals hold at every look (confidence sequences), so that looking each second does
// not make them wrong.
func Metrics() []expr.Name {
	var out []expr.Name
	for _, n := range append([]string{"error_rate", "success_rate", "baseline_error_rate", "response_time", "baseline_response_time",
		"performance_degradation", "requests"}, Reported()...) {
		out = append(out, expr.Name{Name: n})
	}
	return append(out, expr.Name{Name: MetricFailure, Bool: true})
}

// Metrics that Decide treats in a way of their own.
const (
	MetricFailure     = "system_failure"
	MetricDegradation = "performance_degradation"
)

// Metrics that applications report, since sidecars cannot know them.
const (
	MetricSatisfaction = "user_satisfaction"
	MetricAccuracy     = "accuracy"
	MetricCost         = "cost_per_request"
)

// Reported are the metrics that applications report.
func Reported() []string { return []string{MetricSatisfaction, MetricAccuracy, MetricCost} }

// Observed is what gates are judged on beside the rollout itself.
type Observed struct {
	// Measure returns what is known about a metric now.
	Measure func(name string) expr.Measure
	// Experiment says whether an experiment has concluded for the candidate; nil = none
	// is known.
	Experiment func(name string) (Outcome, string)
}

// Keeper holds the gates and rollback conditions of one phase, compiled. It is immutable
// and safe for concurrent use.
type Keeper struct {
	gates    []gate
	triggers []*expr.Condition
}

type gate struct {
	*pb.RolloutGate
	conditions []*expr.Condition
	hours      []span
	freezes    []days
	offset     time.Duration
}

// NewKeeper checks and compiles. Errors have kind Invalid and name phase and gate.
func NewKeeper(p Phase) (*Keeper, error) {
	if len(p.Gates) > MaxGates || len(p.RollbackWhen) > MaxConditions {
		return nil, outrigger.Errorf(outrigger.Invalid, "phase %s has %d gates and %d conditions for a rollback; the limits are %d and %d", p.Name, len(p.Gates), len(p.RollbackWhen), MaxGates, MaxConditions)
	}
	k := &Keeper{}
	for _, source := range p.RollbackWhen {
		c, err := expr.Compile(source, Metrics())
		if err != nil {
			return nil, outrigger.Wrap(outrigger.Invalid, err, fmt.Sprintf("phase %s, rollback", p.Name))
		}
		k.triggers = append(k.triggers, c)
	}
	for i, g := range p.Gates {
		one, err := newGate(g)
		if err == nil && slices.ContainsFunc(p.Gates[:i], func(o *pb.RolloutGate) bool { return o.GetName() == g.GetName() }) {
			err = outrigger.Errorf(outrigger.Invalid, "the name is used twice")
		}
		if err != nil {
			return nil, outrigger.Wrap(outrigger.Invalid, err, fmt.Sprintf("phase %s, gate %q", p.Name, g.GetName()))
		}
		k.gates = append(k.gates, one)
	}
	return k, nil
}

// Closed is the keeper of a phase whose gates cannot be judged: one gate that is
// inconclusive for ever.
func Closed(phase string, cause error) *Keeper {
	return &Keeper{gates: []gate{{RolloutGate: &pb.RolloutGate{Name: phase, Kind: "unknown: " + cause.Error()}}}}
}

func newGate(g *pb.RolloutGate) (gate, error) {
	out := gate{RolloutGate: g}
	bad := func(format string, args ...any) error { return outrigger.Errorf(outrigger.Invalid, format, args...) }
	if err := outrigger.CheckName("name", g.GetName()); err != nil {
		return out, err
	}
	if !slices.Contains([]string{"", OnHold, OnRollback, OnAdvance}, g.GetOnInconclusive()) || !slices.Contains([]string{"", OnHold, OnRollback}, g.GetOnFail()) {
		return out, bad("on_inconclusive is %q and on_fail %q; the first is hold, rollback or advance, the second hold or rollback", g.GetOnInconclusive(), g.GetOnFail())
	}
	if d := g.GetMaxWait().AsDuration(); d < 0 || d > MaxPhaseDuration {
		return out, bad("max_wait %v is outside 0..%v", d, MaxPhaseDuration)
	}
	switch g.GetKind() {
	case GateMetrics:
		if n := len(g.GetConditions()); n == 0 || n > MaxConditions {
			return out, bad("%d conditions; give 1 to %d", n, MaxConditions)
		}
		for _, source := range g.GetConditions() {
			c, err := expr.Compile(source, Metrics())
			if err != nil {
				return out, err
			}
			out.conditions = append(out.conditions, c)
		}
	case GateApproval:
		if n := len(g.GetApprovers()); n > 0 && int(g.GetApprovals()) > n || g.GetApprovals() > 100 || g.GetExpiry().AsDuration() < 0 {
			return out, bad("%d approvals of %d approvers, expiry %v; ask for at most as many as there are, at most 100, expiry not negative", g.GetApprovals(), n, g.GetExpiry().AsDuration())
		}
	case GateTest:
		return out, checkTest(g.GetCheck())
	case GateTime:
		return out, out.times(g)
	case GateExperiment:
		return out, outrigger.CheckName("experiment", g.GetExperiment())
	default:
		return out, bad("kind is %q; it is %s", g.GetKind(), strings.Join([]string{GateMetrics, GateApproval, GateTest, GateTime, GateExperiment}, ", "))
	}
	return out, nil
}

// Result is what one gate said.
type Result struct {
	Gate    string
	Outcome Outcome
	Reason  string
	DryRun  bool
	gate    *gate
}

// PB returns the form that events and the API use.
func (r Result) PB(phase int) *pb.RolloutGateDecided {
	return &pb.RolloutGateDecided{Phase: uint32(phase), Gate: r.Gate, Outcome: string(r.Outcome), Reason: r.Reason, DryRun: r.DryRun}
}

// Judge asks every gate of the phase. Gates that only act elsewhere (hooks rollback,
// post-rollout and event) are not among the results.
func (k *Keeper) Judge(r *Rollout, o Observed, now time.Time) []Result {
	var out []Result
	for i := range k.gates {
		g := &k.gates[i]
		if h := g.GetCheck().GetHook(); h == HookRollback || h == HookPostRollout || h == HookEvent {
			continue
		}
		outcome, reason := g.judge(r, o, now)
		out = append(out, Result{Gate: g.GetName(), Outcome: outcome, Reason: reason, DryRun: g.GetDryRun(), gate: g})
	}
	return out
}

func (g *gate) judge(r *Rollout, o Observed, now time.Time) (Outcome, string) {
	switch g.GetKind() {
	case GateMetrics:
		return g.metrics(o)
	case GateApproval:
		return g.approval(r, now)
	case GateTest:
		if d := r.Decided[g.GetName()]; d != nil {
			return Outcome(d.GetOutcome()), d.GetReason()
		}
		return Inconclusive, "not run yet"
	case GateTime:
		return g.open(r, now)
	case GateExperiment:
		if o.Experiment == nil {
			return Inconclusive, fmt.Sprintf("nothing is known about experiment %q", g.GetExperiment())
		}
		return o.Experiment(g.GetExperiment())
	}
	return Inconclusive, "unknown kind " + g.GetKind()
}

func (g *gate) metrics(o Observed) (Outcome, string) {
	measure := o.Measure
	if measure == nil {
		measure = func(string) expr.Measure { return expr.Measure{} }
	}
	outcome, why := Pass, make([]string, 0, len(g.conditions))
	for _, c := range g.conditions {
		answer, err := c.Eval(measure)
		if err != nil {
			return Inconclusive, err.Error()
		}
		why = append(why, fmt.Sprintf("%s is %v (%s)", c.Source, answer, c.Explain(measure)))
		switch {
		case answer == expr.False:
			outcome = Fail
		case answer == expr.Unknown && outcome == Pass:
			outcome = Inconclusive
		}
	}
	return outcome, strings.Join(why, "; ")
}

// approval counts different people who said yes, may say so, are not the author and did
// so less than the expiry ago.
func (g *gate) approval(r *Rollout, now time.Time) (Outcome, string) {
	want := max(int(g.GetApprovals()), 1)
	var who []string
	for _, a := range r.Approvals {
		fresh := g.GetExpiry().AsDuration() == 0 || now.Sub(a.At) < g.GetExpiry().AsDuration()
		if a.Gate == g.GetName() && fresh && MayApprove(r, g.RolloutGate, a.Approver) == nil {
			who = append(who, a.Approver)
		}
	}
	if len(who) >= want {
		return Pass, "approved by " + strings.Join(who, ", ")
	}
	return Inconclusive, fmt.Sprintf("%d of %d approvals", len(who), want)
}

// MayApprove says why a person may not approve a gate, or nil. Errors have kind Denied.
func MayApprove(r *Rollout, g *pb.RolloutGate, approver string) error {
	switch {
	case approver == "":
		return outrigger.Errorf(outrigger.Denied, "an approval needs a name; say who approves")
	case approver == r.Author:
		return outrigger.Errorf(outrigger.Denied, "%s asked for rollout %s and may not approve it; ask somebody else", approver, r.ID)
	case len(g.GetApprovers()) > 0 && !slices.Contains(g.GetApprovers(), approver):
		return outrigger.Errorf(outrigger.Denied, "%s may not approve gate %q; %s may", approver, g.GetName(), strings.Join(g.GetApprovers(), ", "))
	}
	return nil
}
