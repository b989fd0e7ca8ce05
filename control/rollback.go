package control

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/deploy"
)

// Modes of RollbackRollout.
const (
	modeManual   = "manual"
	modeGraceful = "graceful"
	modeDrill    = "drill"
)

// live are the states in which a candidate may have requests.
var live = []deploy.State{deploy.Running, deploy.Held, deploy.Draining}

// AbortRollout takes all traffic back to the last good version at once: a rollback that
// a person decided. The candidate is not blamed for it: it goes back to registered and
// may be rolled out again.
func (a *admin) AbortRollout(ctx context.Context, r *pb.RolloutActionRequest) (*pb.Rollout, error) {
	return a.act(ctx, r, live, func(f *facts.Facts, ro *facts.Rollout) ([]eventlog.Write, error) {
		return a.goBack(f, ro, &pb.RollbackStarted{Reason: manual(r.GetReason()), Blameless: true, Metadata: r.GetMetadata()}), nil
	})
}

// goBack builds the writes of a rollback at once.
func (a *admin) goBack(f *facts.Facts, ro *facts.Rollout, started *pb.RollbackStarted) []eventlog.Write {
	started.FromVersion, started.ToVersion, started.DecidedAt = ro.Candidate, ro.LastGood, a.timestamp()
	started.Evidence, started.ReturnPhase, started.Notify = a.evidence(ro.ID), uint32(ro.ReturnPhase), ro.Notify
	started.Mode = cmp.Or(started.Mode, modeManual)
	state, why := facts.Quarantined, started.GetReason()
	if started.GetBlameless() {
		state, why = facts.Registered, "rollout "+ro.ID+" aborted"
	}
	return []eventlog.Write{
		onRollout(f, ro, &pb.Event{Payload: &pb.Event_RollbackStarted{RollbackStarted: started}}),
		toModel(f, ro.Model, versionState(ro.Candidate, state, why)),
	}
}

// RollbackRollout goes back because a person says so: at once, gracefully (the weight
// falls by quarters, then what is in flight may end), to an earlier phase, or as a drill
// that moves nothing.
func (a *admin) RollbackRollout(ctx context.Context, r *pb.RollbackRolloutRequest) (*pb.Rollout, error) {
	mode := cmp.Or(r.GetMode(), modeManual)
	if !slices.Contains([]string{modeManual, modeGraceful, modeDrill}, mode) {
		return nil, invalid("mode %q is not %s, %s or %s; an emergency has a call of its own, BreakGlass", mode, modeManual, modeGraceful, modeDrill)
	}
	for name, d := range map[string]time.Duration{"ramp": r.GetRamp().AsDuration(), "drain": r.GetDrain().AsDuration()} {
		if d < 0 || d > 24*time.Hour {
			return nil, invalid("%s %v is outside 0..24h", name, d)
		}
	}
	states := []deploy.State{deploy.Running, deploy.Held}
	if mode == modeManual && r.GetToPhase() == "" {
		states = live
	}
	action := &pb.RolloutActionRequest{Id: r.GetId(), Actor: r.GetActor(), Reason: r.GetReason(), Metadata: r.GetMetadata(), ExpectedSequence: r.GetExpectedSequence()}
	return a.act(ctx, action, states, func(f *facts.Facts, ro *facts.Rollout) ([]eventlog.Write, error) {
		if r.GetToPhase() != "" {
			if mode != modeManual {
				return nil, invalid("to_phase goes with mode %s only", modeManual)
			}
			return stepBack(f, ro, r)
		}
		switch mode {
		case modeGraceful:
			return a.drain(f, ro, r)
		case modeDrill:
			if ro.DrillAt != 0 {
				return nil, locked("a drill of rollout %q is under way; one at a time", ro.ID)
			}
			return []eventlog.Write{onRollout(f, ro, &pb.Event{Metadata: maps.Clone(r.GetMetadata()),
				Payload: &pb.Event_RollbackDrillStarted{RollbackDrillStarted: &pb.RollbackDrillStarted{Reason: r.GetReason()}}})}, nil
		}
		return a.goBack(f, ro, &pb.RollbackStarted{Reason: manual(r.GetReason()), Blameless: r.GetBlameless(), Metadata: r.GetMetadata()}), nil
	})
}

// stepBack returns to an earlier phase and holds there.
func stepBack(f *facts.Facts, ro *facts.Rollout, r *pb.RollbackRolloutRequest) ([]eventlog.Write, error) {
	to := slices.IndexFunc(ro.Phases, func(p deploy.Phase) bool { return p.Name == r.GetToPhase() })
	if to < 0 || to >= ro.Phase {
		return nil, invalid("to_phase %q is not a phase before %q; the rollout has %s", r.GetToPhase(), ro.CurrentPhase().Name, phaseNames(ro))
	}
	return []eventlog.Write{onRollout(f, ro, &pb.Event{Metadata: maps.Clone(r.GetMetadata()), Payload: &pb.Event_RolloutSteppedBack{
		RolloutSteppedBack: &pb.RolloutSteppedBack{Phase: uint32(to), Reason: manual(r.GetReason())}}})}, nil
}

// drain begins a graceful rollback once what it goes back to has been looked at: it can
// serve, and the sidecars listen.
func (a *admin) drain(f *facts.Facts, ro *facts.Rollout, r *pb.RollbackRolloutRequest) ([]eventlog.Write, error) {
	if !r.GetSkipChecks() {
		var wrong []string
		if m := f.Model(ro.Model); !m.Version(ro.LastGood).Servable() {
			wrong = append(wrong, "the last good version "+ro.LastGood+" is not servable")
		}
		for _, n := range a.ledger.Ledger() {
			if n.Nack != nil && len(wrong) < 10 {
				wrong = append(wrong, "node "+n.Node.ID+" rejects the policy: "+nackText(n.Nack))
			}
		}
		if len(wrong) > 0 {
			return nil, locked("not rolled back gracefully: %s; repair it, skip the checks, or roll back at once", strings.Join(wrong, "; "))
		}
	}
	d := deploy.Drain(ro.CandidateWeight(), r.GetRamp().AsDuration(), r.GetDrain().AsDuration(), manual(r.GetReason()))
	d.Blameless, d.Metadata = r.GetBlameless(), r.GetMetadata()
	return []eventlog.Write{onRollout(f, ro, &pb.Event{Payload: &pb.Event_RolloutDraining{RolloutDraining: d}})}, nil
}

// RetryRollout starts a new rollout by the plan of one that was rolled back or aborted,
// in the phase before the one that failed. A quarantined candidate must be cleared first.
func (a *admin) RetryRollout(ctx context.Context, r *pb.RolloutActionRequest) (*pb.Rollout, error) {
	if err := checkReason(r.GetReason()); err != nil {
		return nil, err
	}
	var id string
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		old := f.Rollout(r.GetId())
		switch {
		case old == nil:
			return nil, errNoRollout(r.GetId())
		case old.State != deploy.RolledBack && old.State != deploy.Aborted:
			return nil, locked("rollout %q is %s; one that was rolled back can be tried again", old.ID, old.State)
		}
		m, candidate, err := version(f, old.Model, old.Candidate)
		if err != nil {
			return nil, err
		}
		champion := m.Aliases[facts.Champion]
		until := coolUntil(f, m.Name)
		switch {
		case underTest(m) != "":
			return nil, locked("model %q is in %s; one test or rollout at a time", m.Name, underTest(m))
		case !m.Version(champion).Servable():
			return nil, locked("model %q has no servable champion to return to", m.Name)
		case champion == candidate.Name:
			return nil, locked("candidate %q serves already", champion)
		case !candidate.Servable():
			return nil, locked("candidate %q of model %q is %s; set it to registered first, or roll out a new version", candidate.Name, m.Name, candidate.State)
		case until.After(a.now()) && !r.GetForce():
			return nil, locked("model %q was rolled back and cools down until %s; wait, or force it with a reason", m.Name, until.UTC().Format(time.RFC3339))
		}
		started := &pb.RolloutStarted{Model: m.Name, Candidate: candidate.Name, LastGood: champion, Phases: deploy.PhasesPB(old.Phases), Alpha: old.Alpha,
			RetryOf: old.ID, FirstPhase: uint32(old.ReturnPhase), Cooldown: durationPB(old.Cooldown), Notify: old.Notify, Author: cmp.Or(r.GetActor(), anonymous)}
		if err := a.checkExec(started.GetPhases()); err != nil {
			return nil, err
		}
		id = nextRolloutID(f, m.Name, candidate.Name)
		return []eventlog.Write{
			toModel(f, m.Name, aliasMoved(facts.LastGood, m.Aliases[facts.LastGood], champion), versionState(candidate.Name, facts.Candidate, "rollout "+id)),
			write(f, facts.RolloutPrefix+id, &pb.Event{Metadata: reasonMetadata(r.GetReason()), Payload: &pb.Event_RolloutStarted{RolloutStarted: started}}),
		}, nil
	})
	return a.rolloutReply(f, err, id)
}

// PlanRollout says what StartRollout would do now: phases with every default filled in,
// how many requests and how long each gate needs, and what cannot be proved in time.
func (a *admin) PlanRollout(_ context.Context, r *pb.StartRolloutRequest) (*pb.RolloutPlan, error) {
	f := a.facts.Facts()
	m, _, err := version(f, r.GetModel(), r.GetCandidate())
	if err != nil {
		return nil, err
	}
	started, err := a.begin(f, r, m.Aliases[facts.Champion])
	if err != nil {
		return nil, err
	}
	rps := r.GetRequestsPerSecond()
	if !(rps >= 0 && rps < 1e9) {
		return nil, outrigger.Errorf(outrigger.Invalid, "requests_per_second %v is outside 0..1e9; 0 means as measured", rps)
	}
	out := &pb.RolloutPlan{RequestsPerSecond: cmp.Or(rps, a.monitor.RequestsPerSecond(m.Name)),
		Rollout: &pb.Rollout{Id: r.GetId(), Model: m.Name, Candidate: started.GetCandidate(), LastGood: started.GetLastGood(),
			Phases: started.GetPhases(), Notify: started.GetNotify(), Author: started.GetAuthor()}}
	out.Forecasts, out.Warnings = deploy.Forecast(deploy.PhasesOf(started.GetPhases()), out.RequestsPerSecond)
	if what := underTest(m); what != "" {
		out.Warnings = append(out.Warnings, "model "+m.Name+" is in "+what+"; one test or rollout at a time")
	}
	if until := coolUntil(f, m.Name); until.After(a.now()) {
		out.Warnings = append(out.Warnings, "the model cools down until "+until.UTC().Format(time.RFC3339))
	}
	return out, nil
}
