package control

import (
	"context"
	"fmt"
	"slices"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/deploy"
)

// manual precedes the reason of everything an operator decided instead of the monitor.
const manual = "manual: "

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
		started, err := deploy.Start(r, champion)
		if err != nil {
			return nil, err
		}
		if !candidate.Servable() {
			return nil, locked("candidate %q of model %q is %s; set it to registered first", candidate.Name, m.Name, candidate.State)
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
		if id := fmt.Sprintf("%s-%s-%d", model, candidate, n); f.Rollout(id) == nil {
			return id
		}
	}
}

// AdvanceRollout ends the present phase by hand, whatever its minima and the evidence:
// the next phase begins, or after the last one the candidate becomes the champion.
func (a *admin) AdvanceRollout(ctx context.Context, r *pb.RolloutActionRequest) (*pb.Rollout, error) {
	return a.act(ctx, r, func(f *facts.Facts, ro *facts.Rollout) []eventlog.Write {
		e := &pb.Event{Payload: &pb.Event_RolloutAdvanced{RolloutAdvanced: &pb.RolloutAdvanced{
			Phase: uint32(ro.Phase + 1), Reason: manual + r.GetReason()}}}
		if ro.Phase == len(ro.Phases)-1 {
			e.Payload = &pb.Event_RolloutEnded{RolloutEnded: &pb.RolloutEnded{Outcome: string(deploy.Completed), Reason: manual + r.GetReason()}}
		}
		return []eventlog.Write{write(f, facts.RolloutPrefix+ro.ID, e)}
	})
}

// AbortRollout takes all traffic back to the last good version at once: a rollback that
// a person decided. The candidate is not blamed for it: it goes back to registered and
// may be rolled out again.
func (a *admin) AbortRollout(ctx context.Context, r *pb.RolloutActionRequest) (*pb.Rollout, error) {
	return a.act(ctx, r, func(f *facts.Facts, ro *facts.Rollout) []eventlog.Write {
		started := &pb.RollbackStarted{Reason: manual + r.GetReason(), FromVersion: ro.Candidate, ToVersion: ro.LastGood,
			DecidedAt: a.timestamp(), Evidence: a.evidence(ro.ID)}
		return []eventlog.Write{
			write(f, facts.RolloutPrefix+ro.ID, &pb.Event{Payload: &pb.Event_RollbackStarted{RollbackStarted: started}}),
			toModel(f, ro.Model, versionState(ro.Candidate, facts.Registered, "rollout "+ro.ID+" aborted")),
		}
	})
}

// act runs what advance and abort have in common: both need a running rollout.
func (a *admin) act(ctx context.Context, r *pb.RolloutActionRequest, writes func(*facts.Facts, *facts.Rollout) []eventlog.Write) (*pb.Rollout, error) {
	if err := checkReason(r.GetReason()); err != nil {
		return nil, err
	}
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		ro := f.Rollout(r.GetId())
		if ro == nil {
			return nil, errNoRollout(r.GetId())
		}
		if ro.State != deploy.Running {
			return nil, locked("rollout %q is %s; only a running rollout can be advanced or aborted", ro.ID, ro.State)
		}
		return writes(f, ro), nil
	})
	return a.rolloutReply(f, err, r.GetId())
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
		out = append(out, ro.PB(a.evidence(ro.ID)))
	}
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
	return ro.PB(a.evidence(ro.ID)), nil
}

// timestamp is now, for times an event carries beside the log's own.
func (a *admin) timestamp() *timestamppb.Timestamp { return timestamppb.New(a.now()) }
