// Package deploy decides how a new model version takes over traffic: phases of growing
// weight, the evidence that it is worse than the last good version, and what to do next.
//
// It is pure. Rollout is a fold over the events of one "rollout/<id>" aggregate;
// Detector accumulates evidence from counts; Step maps (rollout, detector, now) to a
// decision. Whoever owns the log (control/monitor) carries decisions out by appending
// events, and state follows from the events alone, so a crash at any point resumes.
//
//	r := new(deploy.Rollout)
//	for _, ev := range events { err := r.Apply(ev) … }
//	det := deploy.NewDetector(deploy.Config{Alpha: r.Alpha, WeightEpoch: r.WeightEpoch})
//	det.Observe(samples)
//	keeper, err := deploy.NewKeeper(r.CurrentPhase())
//	j := deploy.Look(r, keeper, observed, now)
//	switch d := deploy.Decide(*r, det, j, now); d.Kind { … }
//
// # Phases
//
// A phase has a weight (the candidate's share of units, by ranges of the bucket rule, so
// that nobody who has it loses it while the weight grows), minima, gates and conditions
// for a rollback. StandardPhases are the five of the published strategy. A phase of
// another environment (development, staging) has weight 0 here: its traffic is that
// environment's, what it asks for are its gates.
//
// Gates are pass, fail or inconclusive; no data is inconclusive and never passes. A phase
// that ends forgets approvals and tests of its gates. A rollback goes to the last good
// version at weight 0 whatever the phase; ReturnPhase, one before the phase that failed,
// is where a retry begins.
//
// # Crash
//
// State is in the events only. After a crash at any event the fold of what the log holds
// is a state from which Decide continues; what a Detector knew begins anew, which delays
// and never causes a decision.
//
// # Promises
//
// A candidate that is no worse than the baseline is rolled back with probability at
// most α per phase (default 1 %), however often one looks and whatever the common
// failure rate does over time, given independent units; see Detector for the exact
// statement. No data is no evidence. A failure rate that is high for candidate and
// baseline alike holds the rollout and never rolls it back.
//
// Comparison needs a baseline: a phase of weight 10 000 leaves none, so in it only the
// absolute limit is watched (hold). Plan a phase of 9 900 or less where a regression
// must still be able to roll back by itself.
//
// # Bad input and concurrency
//
// Apply refuses events that are illegal in the present state and then changes nothing.
// Values are not safe for concurrent modification; a Rollout may be copied freely, its
// Phases are never modified after RolloutStarted.
package deploy

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// FullWeight is the weight of all traffic: weights are parts of 10 000.
const FullWeight = 10_000

// AggregatePrefix precedes the rollout id in the name of its aggregate.
const AggregatePrefix = "rollout/"

// State is where a rollout stands.
type State string

// The states. A rollout starts Running and ends in one of the last three.
const (
	Running     State = "running"
	Held        State = "held"         // the weight stays; a person decides how it goes on
	Draining    State = "draining"     // a graceful rollback: the weight falls in steps
	RollingBack State = "rolling_back" // weight is 0, not every sidecar has acknowledged it yet
	RolledBack  State = "rolled_back"
	Completed   State = "completed" // the candidate is the champion
	Aborted     State = "aborted"
)

// Ended reports whether no further event is legal.
func (s State) Ended() bool { return s == RolledBack || s == Completed || s == Aborted }

// Rollout is the state of one rollout. The zero value is a rollout that has not
// started; Apply is the only thing that changes it.
type Rollout struct {
	ID        string
	Model     string
	Candidate string
	LastGood  string
	Phases    []Phase
	Phase     int // index into Phases
	State     State
	Alpha     float64 // false-rollback probability per phase
	// WeightEpoch is the log position of the event that last changed the candidate's
	// weight. Statistics never pool across it. While rolling back it is the position of
	// RollbackStarted, which is what sidecars must have acknowledged.
	WeightEpoch uint64
	StartedAt   time.Time
	PhaseSince  time.Time
	// Rollback and Completed are the events, nil before they happen.
	Rollback  *pb.RollbackStarted
	Completed *pb.RollbackCompleted
	Reason    string // of the last change
	// Sequence of the last event folded in: what the next writer expects.
	Sequence uint64

	Author  string // who asked for it
	RetryOf string // the rollout it tries again, "" = none
	// ReturnPhase is where a retry begins: until a rollback the phase before the present
	// one, after it the one before the phase that failed.
	ReturnPhase int
	Cooldown    time.Duration // after a rollback, until the model may be rolled out again
	EndedAt     time.Time     // zero while it has not ended
	Notify      []string      // whom to tell, those on call first
	// ManualRollback turns every rollback by rule into a hold that waits for a person.
	ManualRollback bool
	// Approvals and Decided belong to the present phase and are replaced, never modified.
	Approvals []Approval
	Decided   map[string]*pb.RolloutGateDecided // by gate
	// Drain is what a graceful rollback does, nil without one; Ramp is its weight now,
	// RampedAt when it was set.
	Drain    *pb.RolloutDraining
	Ramp     uint32
	RampedAt time.Time
	// DrillAt is the position of a drill that has not been completed, 0 without one, and
	// DrillSince its time. Drill is the last one that was.
	DrillAt    uint64
	DrillSince time.Time
	Drill      *pb.RollbackDrillCompleted
}

// Approval is one person's yes to one gate of the present phase.
type Approval struct {
	Gate, Approver, Comment string
	At                      time.Time
}

// CandidateWeight is the share of requests, in parts of 10 000, that the candidate gets
// now: 0 before the start, from the moment of RollbackStarted on, and after an abort.
func (r *Rollout) CandidateWeight() uint32 {
	switch {
	case r.State == Draining:
		return r.Ramp
	case r.State != Running && r.State != Held && r.State != Completed, r.Phase >= len(r.Phases):
		return 0
	}
	return r.Phases[r.Phase].Weight
}

// Live reports whether the candidate may have requests: something can still go wrong
// with it, and a rollback is legal.
func (r *Rollout) Live() bool { return r.State == Running || r.State == Held || r.State == Draining }

// CurrentPhase returns the phase the rollout is in, or the zero Phase before the start.
func (r *Rollout) CurrentPhase() Phase {
	if r.Phase >= len(r.Phases) {
		return Phase{}
	}
	return r.Phases[r.Phase]
}

// PB returns the rollout as the admin API shows it. evidence is as of now and may be nil.
func (r *Rollout) PB(evidence []*pb.Evidence) *pb.Rollout {
	out := &pb.Rollout{
		Id: r.ID, Model: r.Model, Candidate: r.Candidate, LastGood: r.LastGood,
		Phases: PhasesPB(r.Phases), Phase: uint32(r.Phase), State: string(r.State),
		WeightEpoch: r.WeightEpoch, Evidence: evidence,
		Rollback: r.Rollback, RollbackCompleted: r.Completed, Reason: r.Reason,
	}
	out.Sequence, out.Weight, out.ReturnPhase, out.RetryOf = r.Sequence, r.CandidateWeight(), uint32(r.ReturnPhase), r.RetryOf
	out.Notify, out.Drill, out.Author = r.Notify, r.Drill, r.Author
	for _, a := range r.Approvals {
		out.Approvals = append(out.Approvals, &pb.RolloutApproved{Phase: uint32(r.Phase), Gate: a.Gate, Approver: a.Approver, Comment: a.Comment})
	}
	if !r.StartedAt.IsZero() {
		out.StartedAt = timestamppb.New(r.StartedAt)
		out.PhaseSince = timestamppb.New(r.PhaseSince)
	}
	return out
}
