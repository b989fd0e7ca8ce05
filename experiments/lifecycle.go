package experiments

import (
	"fmt"
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

// State is where an experiment is in its life.
type State string

// The states. An experiment moves forward only: units that were released are not the
// units of a second run.
const (
	StateDraft     State = "draft"     // arms are known
	StatePlanned   State = "planned"   // the rule is known and frozen
	StateRunning   State = "running"   // units are assigned
	StateConcluded State = "concluded" // by the rule: ship, keep or inconclusive
	StateStopped   State = "stopped"   // before a conclusion: guardrail, SRM or a person
	StateArchived  State = "archived"  // kept for the record
)

// States returns all states in the order of a life.
func States() []State {
	return []State{StateDraft, StatePlanned, StateRunning, StateConcluded, StateStopped, StateArchived}
}

// Next returns the states that may follow s; nil after the last one and for what is no
// state. A draft may be started without a plan: it then splits traffic, no rule
// judges it, and a person concludes it. The empty state is that of an experiment that
// does not exist yet.
func (s State) Next() []State {
	switch s {
	case "":
		return []State{StateDraft, StatePlanned, StateRunning}
	case StateDraft:
		return []State{StatePlanned, StateRunning, StateArchived}
	case StatePlanned:
		return []State{StatePlanned, StateRunning, StateArchived} // planned again: not started, so nothing was seen
	case StateRunning:
		return []State{StateConcluded, StateStopped}
	case StateConcluded, StateStopped:
		return []State{StateArchived}
	}
	return nil
}

// Cause says why an experiment was stopped.
type Cause string

// The causes.
const (
	CauseGuardrail Cause = "guardrail"
	CauseSRM       Cause = "srm"
	CauseManual    Cause = "manual"
)

// Transition is one event in the life of an experiment. It moves it To a state, or, with
// To StateRunning and Look > 0, records a look of a running group sequential plan.
type Transition struct {
	To State
	At time.Time
	// Plan is given with StatePlanned only; it need not be frozen.
	Plan *Plan
	// Look is the information fraction of a look that was taken.
	Look float64
	// Outcome and Serve are given with StateConcluded of a planned experiment: ship,
	// keep or inconclusive, and the arm that gets the traffic.
	Outcome Outcome
	Serve   string
	// Cause is given with StateStopped.
	Cause Cause
}

// Lifecycle is an experiment's life up to now. The zero value is that of one which does
// not exist yet. It is a value; Apply shares nothing that is written later.
type Lifecycle struct {
	State State
	// Plan is frozen, nil without one.
	Plan *Plan
	// StartedAt and EndedAt are zero before.
	StartedAt, EndedAt time.Time
	Looks              []float64
	Outcome            Outcome
	Serve              string
	Cause              Cause
}

// Apply returns the life after t. Errors leave nothing changed: kind Locked for a move
// that is not allowed from here (the text names state, wish and what is allowed),
// Invalid for a transition that makes no sense by itself.
func (l Lifecycle) Apply(t Transition) (Lifecycle, error) {
	if t.Look != 0 {
		return l.look(t)
	}
	if !slices.Contains(States(), t.To) {
		return l, invalid("state %q is unknown; it is one of %q", t.To, States())
	}
	if allowed := l.State.Next(); !slices.Contains(allowed, t.To) {
		return l, outrigger.Errorf(outrigger.Locked, "state is %q and cannot become %q; allowed are %q", l.State, t.To, allowed)
	}
	if t.Plan != nil && t.To != StatePlanned {
		return l, outrigger.Errorf(outrigger.Locked, "plan comes with state %q; it is given with %q and frozen from the start on", t.To, StatePlanned)
	}
	switch t.To {
	case StatePlanned:
		return l.planned(t)
	case StateRunning:
		l.StartedAt = t.At
	case StateConcluded:
		return l.concluded(t)
	case StateStopped:
		if !slices.Contains([]Cause{CauseGuardrail, CauseSRM, CauseManual}, t.Cause) {
			return l, invalid("cause of a stop is %q; it is %q, %q or %q", t.Cause, CauseGuardrail, CauseSRM, CauseManual)
		}
		l.Cause, l.EndedAt = t.Cause, t.At
		if l.Plan != nil {
			l.Serve = l.Plan.Control
		}
	}
	l.State = t.To
	return l, nil
}

func (l Lifecycle) planned(t Transition) (Lifecycle, error) {
	if t.Plan == nil {
		return l, invalid("state %q comes without a plan", StatePlanned)
	}
	frozen, err := t.Plan.Freeze()
	if err != nil {
		return l, err
	}
	l.State, l.Plan = StatePlanned, &frozen
	return l, nil
}

func (l Lifecycle) concluded(t Transition) (Lifecycle, error) {
	if l.Plan != nil {
		if !slices.Contains([]Outcome{OutcomeShip, OutcomeKeep, OutcomeInconclusive}, t.Outcome) {
			return l, outrigger.Errorf(outrigger.Locked, "outcome %q does not conclude a planned experiment; its rule decides %q, %q or %q, a person may stop it",
				t.Outcome, OutcomeShip, OutcomeKeep, OutcomeInconclusive)
		}
		serve := l.Plan.Treatments
		if t.Outcome != OutcomeShip {
			serve = []string{l.Plan.Control}
		}
		if !slices.Contains(serve, t.Serve) {
			return l, invalid("outcome %q serves arm %q; allowed are %q", t.Outcome, t.Serve, serve)
		}
	}
	l.State, l.Outcome, l.Serve, l.EndedAt = StateConcluded, t.Outcome, t.Serve, t.At
	return l, nil
}

// look remembers a look; fractions grow, so that the spending function is never turned back.
func (l Lifecycle) look(t Transition) (Lifecycle, error) {
	last := 0.0
	if n := len(l.Looks); n > 0 {
		last = l.Looks[n-1]
	}
	switch {
	case t.To != StateRunning || l.State != StateRunning || l.Plan == nil || l.Plan.Goal.Method != MethodOBF:
		return l, outrigger.Errorf(outrigger.Locked, "a look is taken by a running experiment of method %q; state is %q", MethodOBF, l.State)
	case !(t.Look > last && t.Look <= 1):
		return l, invalid("look at fraction %v; it lies in (%v, 1]", t.Look, last)
	}
	l.Looks = append(slices.Clone(l.Looks), t.Look)
	return l, nil
}

// Verdict is what Step found. Next is what to record, in this order; nothing while the
// experiment goes on or once it has ended.
type Verdict struct {
	Result Result
	Next   []Transition
}

// Step judges an experiment on the evidence so far and says what follows. It is pure:
// the same life, evidence and time give the same verdict, and after its transitions have
// been applied it has nothing more to say, so an experiment concludes once. Elapsed,
// Looks and Concluded of the evidence are filled in from the life.
//
// Errors: Locked if there is no plan or it was never started, Invalid for evidence that
// cannot be.
func Step(l Lifecycle, evidence Data, now time.Time) (Verdict, error) {
	if l.Plan == nil || l.StartedAt.IsZero() {
		return Verdict{}, outrigger.Errorf(outrigger.Locked, "state is %q, planned: %v; only an experiment that was planned and started has results", l.State, l.Plan != nil)
	}
	end := now
	if !l.EndedAt.IsZero() {
		end = l.EndedAt
	}
	evidence.Elapsed = max(0, end.Sub(l.StartedAt))
	evidence.Looks = l.Looks
	evidence.Concluded = l.decision()
	r, err := Analyse(*l.Plan, evidence)
	if err != nil || l.State != StateRunning {
		return Verdict{Result: r}, err
	}
	v := Verdict{Result: r}
	if r.Look != nil {
		v.Next = append(v.Next, Transition{To: StateRunning, At: now, Look: r.Look.Fraction})
	}
	switch d := r.Decision; d.Outcome {
	case OutcomeShip, OutcomeKeep, OutcomeInconclusive:
		v.Next = append(v.Next, Transition{To: StateConcluded, At: now, Outcome: d.Outcome, Serve: d.Serve})
	case OutcomeStoppedSRM:
		v.Next = append(v.Next, Transition{To: StateStopped, At: now, Cause: CauseSRM})
	case OutcomeStoppedGuardrail:
		v.Next = append(v.Next, Transition{To: StateStopped, At: now, Cause: CauseGuardrail})
	}
	return v, nil
}

// decision is what was decided before, nil while nothing was.
func (l Lifecycle) decision() *Decision {
	switch {
	case l.Outcome != "":
		return &Decision{Outcome: l.Outcome, Serve: l.Serve, Reasons: []string{fmt.Sprintf("concluded after %v", l.EndedAt.Sub(l.StartedAt))}}
	case l.Cause == CauseSRM:
		return &Decision{Outcome: OutcomeStoppedSRM, Serve: l.Serve, Reasons: []string{"stopped for a sample ratio mismatch"}}
	case l.Cause == CauseGuardrail:
		return &Decision{Outcome: OutcomeStoppedGuardrail, Serve: l.Serve, Reasons: []string{"stopped by a guardrail"}}
	case l.Cause == CauseManual:
		return &Decision{Outcome: OutcomeStoppedManual, Serve: l.Serve, Reasons: []string{"stopped by a person"}}
	}
	return nil
}
