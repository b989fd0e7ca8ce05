package deploy

import (
	"maps"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Apply folds one event of the rollout's aggregate in. Legal are
//
//	(nothing) ─RolloutStarted→ running ─RolloutAdvanced→ running (a later phase)
//	running ─RolloutHeld→ held ─RolloutResumed→ running
//	running or held ─RolloutSteppedBack→ held (an earlier phase)
//	running or held ─RolloutApproved, RolloutGateDecided (of the present phase)→ the same
//	running or held ─RolloutDraining→ draining ─RolloutRamped→ draining (less weight)
//	running, held or draining ─RollbackStarted→ rolling_back ─RollbackCompleted→ rolling_back
//	running in its last phase ─RolloutEnded completed→ completed
//	rolling_back after RollbackCompleted ─RolloutEnded rolled_back→ rolled_back
//	not ended ─RolloutEnded aborted→ aborted
//	running or held ─RollbackDrillStarted, then RollbackDrillCompleted→ the same
//
// A decision about a phase that has been left changes nothing and is no error: it was
// on its way.
// Everything else, another aggregate, or a sequence that does not follow, is an error
// (kind Conflict or Invalid) and changes nothing.
func (r *Rollout) Apply(ev *pb.Event) error {
	id, ok := strings.CutPrefix(ev.GetAggregate(), AggregatePrefix)
	if !ok || id == "" || (r.ID != "" && id != r.ID) {
		return outrigger.Errorf(outrigger.Invalid, "event of aggregate %q given to rollout %q", ev.GetAggregate(), r.ID)
	}
	if s := ev.GetSequence(); s != 0 && s != r.Sequence+1 {
		return outrigger.Errorf(outrigger.Invalid, "rollout %s: event %d does not follow event %d", id, s, r.Sequence)
	}
	next := *r
	next.ID = id
	next.Sequence++
	if err := next.apply(ev); err != nil {
		return err
	}
	if next.CandidateWeight() != r.CandidateWeight() {
		next.WeightEpoch = ev.GetPosition()
	}
	*r = next
	return nil
}

func (r *Rollout) apply(ev *pb.Event) error {
	at := ev.GetAt().AsTime()
	switch p := ev.GetPayload().(type) {
	case *pb.Event_RolloutStarted:
		return r.started(p.RolloutStarted, at)
	case *pb.Event_RolloutAdvanced:
		return r.advanced(p.RolloutAdvanced, at)
	case *pb.Event_RolloutHeld:
		if r.State != Running {
			return r.illegal("RolloutHeld")
		}
		r.State, r.Reason = Held, p.RolloutHeld.GetReason()
	case *pb.Event_RolloutResumed:
		if r.State != Held {
			return r.illegal("RolloutResumed")
		}
		r.State, r.Reason = Running, p.RolloutResumed.GetReason()
	case *pb.Event_RolloutSteppedBack:
		return r.steppedBack(p.RolloutSteppedBack, at)
	case *pb.Event_RolloutApproved:
		return r.approved(p.RolloutApproved, at)
	case *pb.Event_RolloutGateDecided:
		return r.decided(p.RolloutGateDecided)
	case *pb.Event_RolloutDraining:
		return r.draining(p.RolloutDraining, at)
	case *pb.Event_RolloutRamped:
		if r.State != Draining || p.RolloutRamped.GetWeight() >= r.Ramp {
			return r.illegal("RolloutRamped")
		}
		r.Ramp, r.RampedAt = p.RolloutRamped.GetWeight(), at
	case *pb.Event_RollbackDrillStarted:
		if r.State != Running && r.State != Held || r.DrillAt != 0 {
			return r.illegal("RollbackDrillStarted")
		}
		r.DrillAt, r.DrillSince = ev.GetPosition(), at
	case *pb.Event_RollbackDrillCompleted:
		if r.DrillAt == 0 {
			return r.illegal("RollbackDrillCompleted")
		}
		r.DrillAt, r.DrillSince, r.Drill = 0, time.Time{}, p.RollbackDrillCompleted
	case *pb.Event_RollbackStarted:
		if !r.Live() {
			return r.illegal("RollbackStarted")
		}
		r.State, r.Rollback, r.Reason = RollingBack, p.RollbackStarted, p.RollbackStarted.GetReason()
		r.Drain, r.DrillAt = nil, 0
	case *pb.Event_RollbackCompleted:
		if r.State != RollingBack || r.Completed != nil {
			return r.illegal("RollbackCompleted")
		}
		r.Completed = p.RollbackCompleted
	case *pb.Event_RolloutEnded:
		return r.ended(p.RolloutEnded, at)
	default:
		return outrigger.Errorf(outrigger.Invalid, "rollout %s: payload %T does not belong to a rollout", r.ID, p)
	}
	return nil
}

func (r *Rollout) started(p *pb.RolloutStarted, at time.Time) error {
	if r.State != "" {
		return r.illegal("RolloutStarted")
	}
	phases := PhasesOf(p.GetPhases())
	if err := checkPhases(phases); err != nil {
		return err
	}
	r.Model, r.Candidate, r.LastGood, r.Alpha = p.GetModel(), p.GetCandidate(), p.GetLastGood(), p.GetAlpha()
	first := int(p.GetFirstPhase())
	if first >= len(phases) {
		return outrigger.Errorf(outrigger.Invalid, "rollout %s begins in phase %d of %d", r.ID, first, len(phases))
	}
	r.Phases, r.State, r.StartedAt = phases, Running, at
	r.RetryOf, r.Author, r.Cooldown, r.Notify = p.GetRetryOf(), p.GetAuthor(), p.GetCooldown().AsDuration(), p.GetNotify()
	r.ManualRollback = p.GetManualRollback()
	r.enter(first, at)
	return nil
}

// enter begins a phase. What was said about the one before counts no more.
func (r *Rollout) enter(phase int, at time.Time) {
	r.Phase, r.PhaseSince, r.ReturnPhase = phase, at, max(0, phase-1)
	r.Approvals, r.Decided = nil, nil
}

func (r *Rollout) steppedBack(p *pb.RolloutSteppedBack, at time.Time) error {
	if r.State != Running && r.State != Held {
		return r.illegal("RolloutSteppedBack")
	}
	to := int(p.GetPhase())
	if to >= r.Phase {
		return outrigger.Errorf(outrigger.Conflict, "rollout %s cannot step back from phase %d to %d", r.ID, r.Phase, to)
	}
	r.enter(to, at)
	r.State, r.Reason = Held, p.GetReason()
	return nil
}

func (r *Rollout) approved(p *pb.RolloutApproved, at time.Time) error {
	if r.State != Running && r.State != Held {
		return r.illegal("RolloutApproved")
	}
	if int(p.GetPhase()) != r.Phase {
		return nil
	}
	kept := make([]Approval, 0, len(r.Approvals)+1)
	for _, a := range r.Approvals {
		if a.Gate != p.GetGate() || a.Approver != p.GetApprover() {
			kept = append(kept, a)
		}
	}
	if !p.GetWithdrawn() {
		kept = append(kept, Approval{Gate: p.GetGate(), Approver: p.GetApprover(), Comment: p.GetComment(), At: at})
	}
	r.Approvals = kept
	return nil
}

func (r *Rollout) decided(p *pb.RolloutGateDecided) error {
	if int(p.GetPhase()) != r.Phase || !r.Live() {
		return nil
	}
	next := make(map[string]*pb.RolloutGateDecided, len(r.Decided)+1)
	maps.Copy(next, r.Decided)
	next[p.GetGate()] = p
	r.Decided = next
	return nil
}

func (r *Rollout) draining(p *pb.RolloutDraining, at time.Time) error {
	if r.State != Running && r.State != Held {
		return r.illegal("RolloutDraining")
	}
	before := r.CandidateWeight() + 1
	for _, w := range p.GetWeights() {
		if w >= before {
			return outrigger.Errorf(outrigger.Invalid, "rollout %s: the weights %v of a drain must fall to 0", r.ID, p.GetWeights())
		}
		before = w
	}
	if before != 0 {
		return outrigger.Errorf(outrigger.Invalid, "rollout %s: the weights %v of a drain must end with 0", r.ID, p.GetWeights())
	}
	r.Ramp = p.GetWeights()[0]
	r.State, r.Drain, r.RampedAt, r.Reason = Draining, p, at, p.GetReason()
	return nil
}

func (r *Rollout) advanced(p *pb.RolloutAdvanced, at time.Time) error {
	if r.State != Running {
		return r.illegal("RolloutAdvanced")
	}
	to := int(p.GetPhase())
	if to <= r.Phase || to >= len(r.Phases) {
		return outrigger.Errorf(outrigger.Conflict, "rollout %s cannot advance from phase %d to %d of %d", r.ID, r.Phase, to, len(r.Phases))
	}
	r.enter(to, at)
	r.Reason = p.GetReason()
	return nil
}

func (r *Rollout) ended(p *pb.RolloutEnded, at time.Time) error {
	legal := false
	switch State(p.GetOutcome()) {
	case Completed:
		legal = r.State == Running && r.Phase == len(r.Phases)-1
	case RolledBack:
		legal = r.State == RollingBack && r.Completed != nil
	case Aborted:
		legal = r.Live() || r.State == RollingBack
	}
	if !legal {
		return r.illegal("RolloutEnded " + p.GetOutcome())
	}
	r.State, r.EndedAt = State(p.GetOutcome()), at
	if p.GetReason() != "" {
		r.Reason = p.GetReason()
	}
	return nil
}

func (r *Rollout) illegal(event string) error {
	state := string(r.State)
	if state == "" {
		state = "not started"
	}
	return outrigger.Errorf(outrigger.Conflict, "rollout %s is %s (phase %d of %d); %s is not legal now", r.ID, state, r.Phase, len(r.Phases), event)
}
