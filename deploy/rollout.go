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
//	switch d := deploy.Step(*r, det, now); d.Kind { … }
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
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
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
	RollingBack State = "rolling_back" // weight is 0, not every sidecar has acknowledged it yet
	RolledBack  State = "rolled_back"
	Completed   State = "completed" // the candidate is the champion
	Aborted     State = "aborted"
)

// Ended reports whether no further event is legal.
func (s State) Ended() bool { return s == RolledBack || s == Completed || s == Aborted }

// Phase is one step of a rollout. It may end once both minima are met.
type Phase struct {
	Name        string
	Weight      uint32        // candidate's share in parts of 10 000, 1..10 000
	MinDuration time.Duration // since the phase began
	MinRequests uint64        // logical candidate requests seen in the phase
}

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
}

// CandidateWeight is the share of requests, in parts of 10 000, that the candidate gets
// now: 0 before the start, from the moment of RollbackStarted on, and after an abort.
func (r *Rollout) CandidateWeight() uint32 {
	if (r.State != Running && r.State != Completed) || r.Phase >= len(r.Phases) {
		return 0
	}
	return r.Phases[r.Phase].Weight
}

// CurrentPhase returns the phase the rollout is in, or the zero Phase before the start.
func (r *Rollout) CurrentPhase() Phase {
	if r.Phase >= len(r.Phases) {
		return Phase{}
	}
	return r.Phases[r.Phase]
}

// Apply folds one event of the rollout's aggregate in. Legal are
//
//	(nothing) ─RolloutStarted→ running ─RolloutAdvanced→ running (a later phase)
//	running ─RollbackStarted→ rolling_back ─RollbackCompleted→ rolling_back
//	running in its last phase ─RolloutEnded completed→ completed
//	rolling_back after RollbackCompleted ─RolloutEnded rolled_back→ rolled_back
//	running or rolling_back ─RolloutEnded aborted→ aborted
//
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
	case *pb.Event_RollbackStarted:
		if r.State != Running {
			return r.illegal("RollbackStarted")
		}
		r.State, r.Rollback, r.Reason = RollingBack, p.RollbackStarted, p.RollbackStarted.GetReason()
	case *pb.Event_RollbackCompleted:
		if r.State != RollingBack || r.Completed != nil {
			return r.illegal("RollbackCompleted")
		}
		r.Completed = p.RollbackCompleted
	case *pb.Event_RolloutEnded:
		return r.ended(p.RolloutEnded)
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
	r.Phases, r.State, r.StartedAt, r.PhaseSince = phases, Running, at, at
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
	r.Phase, r.PhaseSince, r.Reason = to, at, p.GetReason()
	return nil
}

func (r *Rollout) ended(p *pb.RolloutEnded) error {
	legal := false
	switch State(p.GetOutcome()) {
	case Completed:
		legal = r.State == Running && r.Phase == len(r.Phases)-1
	case RolledBack:
		legal = r.State == RollingBack && r.Completed != nil
	case Aborted:
		legal = r.State == Running || r.State == RollingBack
	}
	if !legal {
		return r.illegal("RolloutEnded " + p.GetOutcome())
	}
	r.State = State(p.GetOutcome())
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

// PB returns the rollout as the admin API shows it. evidence is as of now and may be nil.
func (r *Rollout) PB(evidence []*pb.Evidence) *pb.Rollout {
	out := &pb.Rollout{
		Id: r.ID, Model: r.Model, Candidate: r.Candidate, LastGood: r.LastGood,
		Phases: PhasesPB(r.Phases), Phase: uint32(r.Phase), State: string(r.State),
		WeightEpoch: r.WeightEpoch, Evidence: evidence,
		Rollback: r.Rollback, RollbackCompleted: r.Completed, Reason: r.Reason,
	}
	if !r.StartedAt.IsZero() {
		out.StartedAt = timestamppb.New(r.StartedAt)
		out.PhaseSince = timestamppb.New(r.PhaseSince)
	}
	return out
}

// PhasesOf converts from the API form.
func PhasesOf(in []*pb.RolloutPhase) []Phase {
	out := make([]Phase, len(in))
	for i, p := range in {
		out[i] = Phase{Name: p.GetName(), Weight: p.GetWeight(), MinDuration: p.GetMinDuration().AsDuration(), MinRequests: p.GetMinRequests()}
	}
	return out
}

// PhasesPB is the inverse of PhasesOf.
func PhasesPB(in []Phase) []*pb.RolloutPhase {
	out := make([]*pb.RolloutPhase, len(in))
	for i, p := range in {
		out[i] = &pb.RolloutPhase{Name: p.Name, Weight: p.Weight, MinDuration: durationpb.New(p.MinDuration), MinRequests: p.MinRequests}
	}
	return out
}

// DefaultPhases are used when a start request names none: canary 1 %, limited 10 %,
// full 100 %. The minima are what lets a doubled failure rate of 1 % show in each
// phase (about 1 300 candidate requests at the median).
func DefaultPhases() []Phase {
	return []Phase{
		{Name: "canary", Weight: 100, MinDuration: 10 * time.Minute, MinRequests: 1_500},
		{Name: "limited", Weight: 1_000, MinDuration: 10 * time.Minute, MinRequests: 5_000},
		{Name: "full", Weight: FullWeight, MinDuration: 10 * time.Minute, MinRequests: 5_000},
	}
}

// Limits on a start request.
const (
	MaxPhases        = 32
	MaxPhaseDuration = 90 * 24 * time.Hour
	MaxAlpha         = 0.1
	DefaultAlpha     = 0.01
)

// Start turns a start request into the event that starts the rollout, with defaults
// filled in; lastGood is the version that serves now. It checks what can be checked
// without knowing the model: names, candidate ≠ lastGood, at most MaxPhases phases with
// distinct names, weights 1..10 000 that never fall, minima in range, and alpha within
// (0, MaxAlpha] (0 = DefaultAlpha). Errors have kind Invalid and name the field.
func Start(req *pb.StartRolloutRequest, lastGood string) (*pb.RolloutStarted, error) {
	if req.GetId() != "" {
		if err := outrigger.CheckName("id", req.GetId()); err != nil {
			return nil, err
		}
	}
	for _, f := range []struct{ field, value string }{
		{"model", req.GetModel()}, {"candidate", req.GetCandidate()}, {"last_good", lastGood},
	} {
		if err := outrigger.CheckName(f.field, f.value); err != nil {
			return nil, err
		}
	}
	if req.GetCandidate() == lastGood {
		return nil, outrigger.Errorf(outrigger.Invalid, "candidate %q serves already; roll out another version", lastGood)
	}
	phases := PhasesOf(req.GetPhases())
	if len(phases) == 0 {
		phases = DefaultPhases()
	}
	if err := checkPhases(phases); err != nil {
		return nil, err
	}
	alpha := req.GetAlpha()
	if alpha == 0 {
		alpha = DefaultAlpha
	}
	if !(alpha > 0 && alpha <= MaxAlpha) {
		return nil, outrigger.Errorf(outrigger.Invalid, "alpha %v is outside (0, %v]; 0 means %v", alpha, MaxAlpha, DefaultAlpha)
	}
	return &pb.RolloutStarted{Model: req.GetModel(), Candidate: req.GetCandidate(), LastGood: lastGood,
		Phases: PhasesPB(phases), Alpha: alpha}, nil
}

func checkPhases(phases []Phase) error {
	if len(phases) == 0 || len(phases) > MaxPhases {
		return outrigger.Errorf(outrigger.Invalid, "rollout has %d phases; give 1 to %d", len(phases), MaxPhases)
	}
	for i, p := range phases {
		switch {
		case p.Name == "" || slices.ContainsFunc(phases[:i], func(q Phase) bool { return q.Name == p.Name }):
			return outrigger.Errorf(outrigger.Invalid, "phase %d: name %q is empty or used twice", i, p.Name)
		case p.Weight == 0 || p.Weight > FullWeight:
			return outrigger.Errorf(outrigger.Invalid, "phase %s: weight %d is outside 1..%d (parts of 10 000)", p.Name, p.Weight, FullWeight)
		case i > 0 && p.Weight < phases[i-1].Weight:
			return outrigger.Errorf(outrigger.Invalid, "phase %s: weight %d is below the %d of phase %s; weights never fall", p.Name, p.Weight, phases[i-1].Weight, phases[i-1].Name)
		case p.MinDuration < 0 || p.MinDuration > MaxPhaseDuration:
			return outrigger.Errorf(outrigger.Invalid, "phase %s: min_duration %v is outside 0..%v", p.Name, p.MinDuration, MaxPhaseDuration)
		}
	}
	return nil
}
