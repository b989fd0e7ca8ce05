package deploy

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/expr"
)

// Kind is what to do with a rollout now.
type Kind uint8

// The decisions.
const (
	None     Kind = iota // wait: the phase's minima are not met, or the rollout is not running
	Advance              // append RolloutAdvanced to phase Rollout.Phase+1
	Rollback             // append RollbackStarted
	Complete             // append RolloutEnded completed
	Hold                 // would advance, or is in trouble, but nothing proves the candidate guilty
)

// String returns the word used in logs and metrics.
func (k Kind) String() string {
	names := [...]string{"none", "advance", "rollback", "complete", "hold"}
	if int(k) < len(names) {
		return names[k]
	}
	return fmt.Sprintf("kind(%d)", k)
}

// Decision is the outcome of Step, with everything needed to explain it.
type Decision struct {
	Kind   Kind
	Reason string
	// Breach is true for a Hold because of the absolute limit: somebody should look.
	Breach   bool
	FirstBad time.Time // with Rollback: see Verdict
	// Gates is what every gate of the phase said.
	Gates    []Result
	Evidence []*pb.Evidence
}

// suspect is the E above which a phase does not end although its minima are met: the
// candidate looks bad at ten to one, which is too weak to convict and too strong to
// ignore. It falls below again by itself if the candidate is innocent.
const suspect = 10

// proven is the E above which an absolute threshold that is certainly exceeded is put
// down to the candidate: twenty to one, or intervals of both error rates that do not
// touch. The threshold itself has been proven by then.
const proven = 20

// Judgement is what gates and conditions said in one look. The zero value says nothing.
type Judgement struct {
	Gates []Result
	// Exceeded are the rollback conditions that certainly hold, with the numbers.
	Exceeded []Exceeded
	// Worse is true when the candidate's error rate lies certainly above the baseline's.
	Worse bool
	// Hooks are reasons of gates with the hook rollback that passed.
	Hooks []string
}

// Exceeded is one rollback condition that certainly holds. Alone says that it needs no
// comparison with the baseline: it is one by itself, or a failure of the whole system.
type Exceeded struct {
	Condition, Numbers string
	Alone              bool
}

// Look asks everything a phase's keeper holds. k may be nil.
func Look(r *Rollout, k *Keeper, o Observed, now time.Time) (j Judgement) {
	if k == nil {
		return j
	}
	j.Gates = k.Judge(r, o, now)
	if o.Measure != nil {
		c, b := o.Measure("error_rate"), o.Measure("baseline_error_rate")
		j.Worse = c.Known && b.Known && c.Low > b.High
		for _, t := range k.triggers {
			if answer, err := t.Eval(o.Measure); err == nil && answer == expr.True {
				j.Exceeded = append(j.Exceeded, Exceeded{Condition: t.Source, Numbers: t.Explain(o.Measure),
					Alone: slices.Contains(t.Names, MetricFailure) || slices.Contains(t.Names, MetricDegradation)})
			}
		}
	}
	for i := range k.gates {
		g := &k.gates[i]
		if d := r.Decided[g.GetName()]; g.GetCheck().GetHook() == HookRollback && Outcome(d.GetOutcome()) == Pass && !g.GetDryRun() {
			j.Hooks = append(j.Hooks, fmt.Sprintf("gate %s: %s", g.GetName(), d.GetReason()))
		}
	}
	return j
}

// Step is Decide without gates and conditions.
func Step(r Rollout, det *Detector, now time.Time) Decision { return Decide(r, det, Judgement{}, now) }

// Decide decides from what has been seen. It is a pure function: same arguments, same
// decision. In order:
//
//   - a proven regression rolls back, also while the rollout is held or draining;
//   - so does a rollback condition that certainly holds and is a comparison by itself or a
//     failure of the whole system, or that no baseline can excuse (none is served); with a
//     baseline it must be proven that the candidate is worse, else this is an incident
//     that hits both and the rollout holds;
//   - a person's hold, the absolute limit of the detector, unmet minima wait;
//   - a gate that fails holds or rolls back as it says, one that is inconclusive waits, and
//     after max_wait does as it says; dry runs are not obeyed;
//   - suspicion holds; then the phase ends.
//
// A rollout with ManualRollback holds, with Breach, where this says roll back.
//
// det may be nil (nothing observed yet). No data never rolls back, and passes only minima
// of zero.
func Decide(r Rollout, det *Detector, j Judgement, now time.Time) Decision {
	if !r.Live() {
		return Decision{Reason: "the rollout is not running"}
	}
	if det == nil {
		det = NewDetector(Config{Alpha: r.Alpha, WeightEpoch: r.WeightEpoch})
	}
	v := det.Verdict()
	d := Decision{Evidence: v.Evidence, Gates: j.Gates}
	switch {
	case v.Roll:
		d.Kind, d.FirstBad = Rollback, v.FirstBad
		d.Reason = rollbackReason(r, v)
	case d.exceeded(r, v, j):
	case len(j.Hooks) > 0:
		d.Kind, d.Reason = Rollback, j.Hooks[0]
	case r.State != Running:
		d.Reason = fmt.Sprintf("the rollout is %s: %s", r.State, r.Reason)
	case v.Breach:
		d.Kind, d.Breach = Hold, true
		d.Reason = fmt.Sprintf("%s fails %.2f %% of requests, limit %.2f %%; %s fails %.2f %%, so the candidate is not proven to be the cause",
			r.Candidate, 100*v.FailureRate, 100*det.cfg.MaxFailureRate, r.LastGood, 100*v.BaselineRate)
	default:
		d.end(r, det, v, now)
	}
	if d.Kind == Rollback && r.ManualRollback {
		d.Kind, d.Breach, d.Reason = Hold, true, "a rollback waits for a person: "+d.Reason
	}
	return d
}

// exceeded acts on rollback conditions that certainly hold.
func (d *Decision) exceeded(r Rollout, v Verdict, j Judgement) bool {
	for _, x := range j.Exceeded {
		baseline := r.CandidateWeight() < FullWeight
		switch {
		case x.Alone:
			d.Kind, d.Reason = Rollback, fmt.Sprintf("%s: %s", x.Condition, x.Numbers)
		case !baseline:
			d.Kind, d.Reason = Rollback, fmt.Sprintf("%s, and nothing else serves that it could be compared with: %s", x.Condition, x.Numbers)
		case j.Worse || v.Suspicion >= proven:
			d.Kind, d.Reason = Rollback, fmt.Sprintf("%s, and %s is worse than %s: %s", x.Condition, r.Candidate, r.LastGood, x.Numbers)
		default:
			d.Kind, d.Breach = Hold, true
			d.Reason = fmt.Sprintf("%s, but %s is not proven to be worse than %s: %s", x.Condition, r.Candidate, r.LastGood, x.Numbers)
			continue // another condition may be proven
		}
		d.Breach = false
		return true
	}
	return d.Breach
}

// end decides whether a phase without trouble ends.
func (d *Decision) end(r Rollout, det *Detector, v Verdict, now time.Time) {
	phase := r.CurrentPhase()
	if d.gates(r, now) {
		return
	}
	left := r.PhaseSince.Add(phase.MinDuration).Sub(now)
	seen := det.CandidateRequests()
	switch {
	case left > 0:
		d.Reason = fmt.Sprintf("phase %s lasts %v more", phase.Name, left.Round(time.Second))
	case seen < phase.MinRequests:
		d.Reason = fmt.Sprintf("phase %s needs %d more candidate requests", phase.Name, phase.MinRequests-seen)
	case d.Reason != "": // a gate waits
	case v.Suspicion >= suspect:
		d.Kind = Hold
		d.Reason = fmt.Sprintf("phase %s has met its minima, but the evidence against %s is %.3g to 1", phase.Name, r.Candidate, v.Suspicion)
	case r.Phase == len(r.Phases)-1:
		d.Kind = Complete
		d.Reason = fmt.Sprintf("last phase %s passed with %d candidate requests", phase.Name, seen)
	default:
		d.Kind = Advance
		d.Reason = fmt.Sprintf("phase %s passed with %d candidate requests", phase.Name, seen)
	}
}

// gates looks at what the gates said. It returns true if that settles the matter;
// otherwise Reason tells which gate is waited for, if any.
func (d *Decision) gates(r Rollout, now time.Time) bool {
	for _, g := range d.Gates {
		if g.DryRun || g.Outcome == Pass {
			continue
		}
		text := fmt.Sprintf("gate %s: %s: %s", g.Gate, g.Outcome, g.Reason)
		what := OnHold
		switch wait := g.gate.GetMaxWait().AsDuration(); {
		case g.Outcome == Fail:
			what = cmp.Or(g.gate.GetOnFail(), OnHold)
		case wait == 0 || now.Sub(r.PhaseSince) < wait:
			if d.Kind == None && d.Reason == "" {
				d.Reason = text
			}
			continue
		default:
			what = cmp.Or(g.gate.GetOnInconclusive(), OnHold)
			text += fmt.Sprintf(" after %v", wait)
		}
		switch what {
		case OnRollback:
			d.Kind, d.Reason = Rollback, text
			return true
		case OnHold:
			d.Kind, d.Reason = Hold, text
		}
	}
	return d.Kind == Hold
}

func rollbackReason(r Rollout, v Verdict) string {
	for _, e := range v.Evidence {
		if e.GetStratum() == v.Stratum {
			return fmt.Sprintf("%s fails more than %s (%s): %d of %d against %d of %d; E %.3g, SR/T %.3g, threshold %.3g",
				r.Candidate, r.LastGood, v.Stratum, e.GetCandidateFailures(), e.GetCandidateRequests(),
				e.GetBaselineFailures(), e.GetBaselineRequests(), e.GetEValue(), e.GetSrValue(), e.GetThreshold())
		}
	}
	return r.Candidate + " fails more than " + r.LastGood
}

// Advanced is the event that ends the present phase of r and begins phase to, with who
// approved it and what its gates said.
func Advanced(r *Rollout, to int, reason string, gates []Result) *pb.RolloutAdvanced {
	out := &pb.RolloutAdvanced{Phase: uint32(to), Reason: reason}
	for _, g := range gates {
		out.Gates = append(out.Gates, g.PB(r.Phase))
	}
	for _, a := range r.Approvals {
		if !slices.Contains(out.Approvers, a.Approver) {
			out.Approvers = append(out.Approvers, a.Approver)
		}
	}
	return out
}
