package deploy

import (
	"fmt"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
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
	Evidence []*pb.Evidence
}

// suspect is the E above which a phase does not end although its minima are met: the
// candidate looks bad at ten to one, which is too weak to convict and too strong to
// ignore. It falls below again by itself if the candidate is innocent.
const suspect = 10

// Step decides from what has been seen. It is a pure function: same arguments, same
// decision. In order: a proven regression rolls back; a failure rate over the absolute
// limit holds; unmet minima wait; suspicion holds; then the phase ends. det may be nil
// (nothing observed yet). No data never rolls back, and passes only minima of zero.
func Step(r Rollout, det *Detector, now time.Time) Decision {
	if r.State != Running {
		return Decision{Reason: "the rollout is not running"}
	}
	if det == nil {
		det = NewDetector(Config{Alpha: r.Alpha, WeightEpoch: r.WeightEpoch})
	}
	v := det.Verdict()
	d := Decision{Evidence: v.Evidence}
	phase := r.CurrentPhase()
	left := r.PhaseSince.Add(phase.MinDuration).Sub(now)
	seen := det.CandidateRequests()
	switch {
	case v.Roll:
		d.Kind, d.FirstBad = Rollback, v.FirstBad
		d.Reason = rollbackReason(r, v)
	case v.Breach:
		d.Kind, d.Breach = Hold, true
		d.Reason = fmt.Sprintf("%s fails %.2f %% of requests, limit %.2f %%; %s fails %.2f %%, so the candidate is not proven to be the cause",
			r.Candidate, 100*v.FailureRate, 100*det.cfg.MaxFailureRate, r.LastGood, 100*v.BaselineRate)
	case left > 0:
		d.Reason = fmt.Sprintf("phase %s lasts %v more", phase.Name, left.Round(time.Second))
	case seen < phase.MinRequests:
		d.Reason = fmt.Sprintf("phase %s needs %d more candidate requests", phase.Name, phase.MinRequests-seen)
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
	return d
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
