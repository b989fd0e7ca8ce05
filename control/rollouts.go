package control

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/plan"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/internal/authz"
)

// manual is the reason of what an operator decided instead of the monitor: "manual", and
// what was given after a colon.
func manual(reason string) string {
	if reason == "" {
		return "manual"
	}
	return "manual: " + reason
}

// StartRollout begins to move a model from its champion, which becomes the last good
// version, to a candidate. The monitor takes it from there.
func (a *admin) StartRollout(ctx context.Context, r *pb.StartRolloutRequest) (*pb.Rollout, error) {
	if err := checkReason(r.GetReason()); err != nil {
		return nil, err
	}
	var id string
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		m, candidate, err := version(f, r.GetModel(), r.GetCandidate())
		if err != nil {
			return nil, err
		}
		if what := underTest(m); what != "" {
			return nil, locked("model %q is in %s; one test or rollout at a time", m.Name, what)
		}
		champion := m.Aliases[facts.Champion]
		if !m.Version(champion).Servable() {
			return nil, locked("model %q has no servable champion to return to; move the alias champion to a good version first", m.Name)
		}
		if err := mayReplacePlan(ctx, f, r); err != nil {
			return nil, err
		}
		started, err := a.begin(f, r, champion)
		if err != nil {
			return nil, err
		}
		if !candidate.Servable() {
			return nil, locked("candidate %q of model %q is %s; set it to registered first", candidate.Name, m.Name, candidate.State)
		}
		if until := coolUntil(f, m.Name); until.After(a.now()) && !r.GetForce() {
			return nil, locked("model %q was rolled back and cools down until %s; wait, or force it with a reason", m.Name, until.UTC().Format(time.RFC3339))
		}
		if id = r.GetId(); id == "" {
			id = nextRolloutID(f, m.Name, candidate.Name)
		}
		if err := outrigger.CheckName("id", id); err != nil {
			return nil, err
		}
		if f.Rollout(id) != nil {
			return nil, outrigger.Errorf(outrigger.Exists, "rollout %q exists already; choose another id or leave it empty", id)
		}
		// The facts draw the same conclusions from RolloutStarted alone; the model's
		// aggregate gets them too, for its own history and so that an experiment decided at
		// the same moment conflicts.
		return []eventlog.Write{
			toModel(f, m.Name, aliasMoved(facts.LastGood, m.Aliases[facts.LastGood], champion),
				versionState(candidate.Name, facts.Candidate, "rollout "+id)),
			write(f, facts.RolloutPrefix+id, &pb.Event{Metadata: reasonMetadata(r.GetReason()), Payload: &pb.Event_RolloutStarted{RolloutStarted: started}}),
		}, nil
	})
	return a.rolloutReply(f, err, id)
}

// mayReplacePlan refuses phases of an operator's own where a deployment plan is configured: its
// gates and approvals would be no more than a suggestion.
func mayReplacePlan(ctx context.Context, f *facts.Facts, r *pb.StartRolloutRequest) error {
	caller, known := authz.CallerFrom(ctx)
	if d := f.Deployment(); d == nil || !known || len(r.GetPhases()) == 0 && r.GetPlan() == "" {
		return nil
	}
	return caller.Need(authz.Admin, "StartRollout with phases that replace those of the configured deployment plan")
}

// begin turns a request into the event that starts a rollout, by the plan it names: its
// own phases, else the configured deployment, else the default.
func (a *admin) begin(f *facts.Facts, r *pb.StartRolloutRequest, champion string) (*pb.RolloutStarted, error) {
	r = proto.CloneOf(r)
	r.Actor = cmp.Or(r.GetActor(), anonymous)
	var notify []string
	if d := f.Deployment(); d != nil {
		p, err := plan.Of(d.File)
		if err != nil {
			return nil, err
		}
		notify = p.Notify
		if len(r.GetPhases()) == 0 && r.GetPlan() == "" {
			r.Phases, r.ManualRollback = p.Phases, r.GetManualRollback() || p.ManualRollback
		}
		if r.GetCooldown() == nil {
			r.Cooldown = p.Cooldown
		}
	}
	started, err := deploy.Start(r, champion)
	if err != nil {
		return nil, err
	}
	started.Notify = notify
	return started, a.checkExec(started.GetPhases())
}

// checkExec refuses commands where nobody allowed them: whoever may start a rollout may
// not by that run programs here.
func (a *admin) checkExec(phases []*pb.RolloutPhase) error {
	for _, p := range phases {
		for _, g := range p.GetGates() {
			if len(g.GetCheck().GetCommand()) > 0 && !a.allowExec {
				return denied("phase %s, gate %q runs a command, which this control plane does not allow; use a url, or start it with --allow-exec-checks", p.GetName(), g.GetName())
			}
		}
	}
	return nil
}

// coolUntil is when a model may be rolled out again after its last rollback. Once a
// person has cleared the version that was blamed, there is nothing to wait for.
func coolUntil(f *facts.Facts, model string) (until time.Time) {
	for _, r := range f.Rollouts() {
		if r.Model == model && r.State == deploy.RolledBack && blamed(f.Model(model), r.Candidate) {
			if at := r.Rollout.EndedAt.Add(r.Cooldown); at.After(until) {
				until = at
			}
		}
	}
	return until
}

func blamed(m *facts.Model, version string) bool {
	v := m.Version(version)
	return v != nil && v.State == facts.Quarantined
}

// reasonMetadata keeps a reason for payloads that have no field for it.
func reasonMetadata(reason string) map[string]string {
	if reason == "" {
		return nil
	}
	return map[string]string{"reason": reason}
}

// nextRolloutID is "<model>-<candidate>-<n>" with the smallest free n.
func nextRolloutID(f *facts.Facts, model, candidate string) string {
	for n := 1; ; n++ {
		if id := fmt.Sprintf("%s-%s-%d", nameOf(model), candidate, n); f.Rollout(id) == nil {
			return id
		}
	}
}

// AdvanceRollout ends the present phase by hand, whatever its minima and the evidence:
// the phase asked for (default the next one) begins, or after the last one the candidate
// becomes the champion. Gates that have not passed refuse it (kind Locked), unless it is
// forced, which is recorded.
func (a *admin) AdvanceRollout(ctx context.Context, r *pb.RolloutActionRequest) (*pb.Rollout, error) {
	return a.act(ctx, r, []deploy.State{deploy.Running}, func(f *facts.Facts, ro *facts.Rollout) ([]eventlog.Write, error) {
		to := ro.Phase + 1
		if name := r.GetToPhase(); name != "" {
			to = slices.IndexFunc(ro.Phases, func(p deploy.Phase) bool { return p.Name == name })
			if to <= ro.Phase {
				return nil, invalid("to_phase %q is not a phase after %q; the rollout has %s", name, ro.CurrentPhase().Name, phaseNames(ro))
			}
		}
		gates, err := a.monitor.Judge(&ro.Rollout)
		if err != nil {
			return nil, err
		}
		forced := false
		for _, g := range gates {
			if g.Outcome == deploy.Pass || g.DryRun {
				continue
			}
			if !r.GetForce() {
				return nil, locked("gate %q of phase %s has not passed (%s: %s); wait for it, or force it with a reason", g.Gate, ro.CurrentPhase().Name, g.Outcome, g.Reason)
			}
			forced = true
		}
		e := deploy.Advanced(&ro.Rollout, to, manual(r.GetReason()), gates)
		e.Metadata, e.Forced = r.GetMetadata(), forced
		if to == len(ro.Phases) {
			return []eventlog.Write{onRollout(f, ro, &pb.Event{Metadata: maps.Clone(r.GetMetadata()), Payload: &pb.Event_RolloutEnded{
				RolloutEnded: &pb.RolloutEnded{Outcome: string(deploy.Completed), Reason: manual(r.GetReason())}}})}, nil
		}
		return []eventlog.Write{onRollout(f, ro, &pb.Event{Payload: &pb.Event_RolloutAdvanced{RolloutAdvanced: e}})}, nil
	})
}

// HoldRollout keeps the weight as it is until ResumeRollout. A proven regression still
// rolls back.
func (a *admin) HoldRollout(ctx context.Context, r *pb.RolloutActionRequest) (*pb.Rollout, error) {
	return a.act(ctx, r, []deploy.State{deploy.Running}, func(f *facts.Facts, ro *facts.Rollout) ([]eventlog.Write, error) {
		return []eventlog.Write{onRollout(f, ro, &pb.Event{Metadata: maps.Clone(r.GetMetadata()),
			Payload: &pb.Event_RolloutHeld{RolloutHeld: &pb.RolloutHeld{Reason: manual(r.GetReason())}}})}, nil
	})
}

// ResumeRollout lets a held rollout go on.
func (a *admin) ResumeRollout(ctx context.Context, r *pb.RolloutActionRequest) (*pb.Rollout, error) {
	return a.act(ctx, r, []deploy.State{deploy.Held}, func(f *facts.Facts, ro *facts.Rollout) ([]eventlog.Write, error) {
		return []eventlog.Write{onRollout(f, ro, &pb.Event{Metadata: maps.Clone(r.GetMetadata()),
			Payload: &pb.Event_RolloutResumed{RolloutResumed: &pb.RolloutResumed{Reason: manual(r.GetReason())}}})}, nil
	})
}

// ApproveRollout records one person's yes to a gate of the present phase, or takes it
// back. The person is the one the caller's credential names, never one the request names.
// Refused with kind Denied: callers without a name, the author, and who is not among the
// approvers.
func (a *admin) ApproveRollout(ctx context.Context, r *pb.ApproveRolloutRequest) (*pb.Rollout, error) {
	if err := checkReason(r.GetComment()); err != nil {
		return nil, err
	}
	caller, _ := authz.CallerFrom(ctx)
	if caller.Name == "" {
		return nil, denied("an approval needs a name, and the caller's credential has none; present a token of the access file")
	}
	action := &pb.RolloutActionRequest{Id: r.GetId(), Actor: caller.Name, ExpectedSequence: r.GetExpectedSequence()}
	return a.act(ctx, action, []deploy.State{deploy.Running, deploy.Held}, func(f *facts.Facts, ro *facts.Rollout) ([]eventlog.Write, error) {
		g, err := approvalGate(ro, r.GetGate())
		if err != nil {
			return nil, err
		}
		if err := deploy.MayApprove(&ro.Rollout, g, caller.Name); err != nil {
			return nil, err
		}
		return []eventlog.Write{onRollout(f, ro, &pb.Event{Payload: &pb.Event_RolloutApproved{RolloutApproved: &pb.RolloutApproved{
			Phase: uint32(ro.Phase), Gate: g.GetName(), Approver: caller.Name, Comment: r.GetComment(), Withdrawn: r.GetWithdraw()}}})}, nil
	})
}

// approvalGate finds the manual_approval gate of the present phase that is meant.
func approvalGate(ro *facts.Rollout, name string) (*pb.RolloutGate, error) {
	var found *pb.RolloutGate
	for _, g := range ro.CurrentPhase().Gates {
		if g.GetKind() != deploy.GateApproval || name != "" && g.GetName() != name {
			continue
		}
		if found != nil {
			return nil, invalid("phase %s has several gates that wait for approval; name one of them", ro.CurrentPhase().Name)
		}
		found = g
	}
	if found == nil {
		return nil, locked("phase %s of rollout %q has no gate %q that waits for approval", ro.CurrentPhase().Name, ro.ID, name)
	}
	return found, nil
}

func phaseNames(ro *facts.Rollout) string {
	names := make([]string, len(ro.Phases))
	for i, p := range ro.Phases {
		names[i] = p.Name
	}
	return strings.Join(names, ", ")
}

// onRollout writes to a rollout's aggregate as it is in the facts.
func onRollout(f *facts.Facts, ro *facts.Rollout, e *pb.Event) eventlog.Write {
	return write(f, facts.RolloutPrefix+ro.ID, e)
}

// act runs what verbs on one rollout have in common: it is in one of the states, and
// still where whoever acts saw it.
func (a *admin) act(ctx context.Context, r *pb.RolloutActionRequest, in []deploy.State, writes func(*facts.Facts, *facts.Rollout) ([]eventlog.Write, error)) (*pb.Rollout, error) {
	if err := checkReason(r.GetReason()); err != nil {
		return nil, err
	}
	if err := checkMetadata(r.GetMetadata()); err != nil {
		return nil, err
	}
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		ro := f.Rollout(r.GetId())
		switch {
		case ro == nil:
			return nil, errNoRollout(r.GetId())
		case r.GetExpectedSequence() != 0 && r.GetExpectedSequence() != f.Sequence(facts.RolloutPrefix+ro.ID):
			return nil, outrigger.Errorf(outrigger.Conflict, "rollout %q has moved on: its last event is %d, you saw %d; look again", ro.ID, f.Sequence(facts.RolloutPrefix+ro.ID), r.GetExpectedSequence())
		case !slices.Contains(in, ro.State):
			return nil, locked("rollout %q is %s; this needs one that is %s", ro.ID, ro.State, joinStates(in))
		}
		return writes(f, ro)
	})
	return a.rolloutReply(f, err, r.GetId())
}

func joinStates(in []deploy.State) string {
	names := make([]string, len(in))
	for i, s := range in {
		names[i] = string(s)
	}
	return strings.Join(names, " or ")
}

// GetRollout returns one rollout with the evidence as of now.
func (a *admin) GetRollout(_ context.Context, r *pb.NameRequest) (*pb.Rollout, error) {
	return a.rolloutReply(a.facts.Facts(), nil, r.GetName())
}

// ListRollouts returns rollouts, those that started last first.
func (a *admin) ListRollouts(_ context.Context, r *pb.ListRequestAll) (*pb.ListRolloutsResponse, error) {
	limit, err := listLimit(r.GetLimit())
	if err != nil {
		return nil, err
	}
	return &pb.ListRolloutsResponse{Rollouts: a.rollouts(a.facts.Facts(), limit)}, nil
}

func (a *admin) rollouts(f *facts.Facts, limit int) []*pb.Rollout {
	all := f.Rollouts()
	slices.SortStableFunc(all, func(x, y *facts.Rollout) int { return y.StartedAt.Compare(x.StartedAt) })
	out := make([]*pb.Rollout, 0, min(limit, len(all)))
	for _, ro := range all[:min(limit, len(all))] {
		out = append(out, a.rolloutPB(f, ro))
	}
	return out
}

// rolloutPB shows a rollout with what the monitor saw at its last look.
func (a *admin) rolloutPB(f *facts.Facts, ro *facts.Rollout) *pb.Rollout {
	out := ro.PB(a.evidence(ro.ID))
	out.Gates, out.Waiting = a.monitor.Gates(ro.ID)
	out.Sequence = f.Sequence(facts.RolloutPrefix + ro.ID)
	return out
}

func errNoRollout(id string) error {
	return outrigger.Errorf(outrigger.NotFound, "rollout %q not found", id)
}

func (a *admin) rolloutReply(f *facts.Facts, err error, id string) (*pb.Rollout, error) {
	if err != nil {
		return nil, err
	}
	ro := f.Rollout(id)
	if ro == nil {
		return nil, errNoRollout(id)
	}
	return a.rolloutPB(f, ro), nil
}

// timestamp is now, for times an event carries beside the log's own.
func (a *admin) timestamp() *timestamppb.Timestamp { return timestamppb.New(a.now()) }
