package control

import (
	"context"
	"encoding/json"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
)

// trialsView is the evidence on experiments.
type trialsView interface {
	Results(e *facts.Experiment, now time.Time) (results, ledger *structpb.Struct, err error)
}

// PlanExperiment freezes the rule an experiment will be judged by. It may be called
// again until the experiment starts, never after.
func (a *admin) PlanExperiment(ctx context.Context, r *pb.PlanExperimentRequest) (*pb.Experiment, error) {
	if err := checkReason(r.GetReason()); err != nil {
		return nil, err
	}
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		e := f.Experiment(r.GetName())
		if e == nil {
			return nil, errNoExperiment(r.GetName())
		}
		if e.State != facts.Draft && e.State != facts.Planned {
			return nil, locked("experiment %q is %s; its plan is frozen. Allowed while it is %s or %s", e.Name, e.State, facts.Draft, facts.Planned)
		}
		wish := mergePlans(e.Plan, r.GetPlan())
		frozen, err := facts.PlanOf(e.Arms, wish)
		if err != nil {
			return nil, err
		}
		return []eventlog.Write{write(f, facts.ExperimentPrefix+e.Name, experimentChanged(
			&pb.ExperimentChanged{State: facts.Planned, Reason: r.GetReason(), Plan: facts.FrozenPB(wish, frozen)}))}, nil
	})
	return experimentReply(f, err, r.GetName())
}

// mergePlans is what was wished with what is asked for now over it. Horizon and tuning
// follow from the rest, so those of an earlier plan are computed anew, and new metrics
// replace the old list instead of joining it.
func mergePlans(wish, now *pb.ExperimentPlan) *pb.ExperimentPlan {
	out := new(pb.ExperimentPlan)
	if wish != nil {
		out = proto.CloneOf(wish)
		out.UnitsPerArm, out.Tuning = 0, 0
	}
	if len(now.GetMetrics()) > 0 {
		out.Metrics, out.Sd = nil, 0
	}
	if now.GetBaseline() != 0 {
		out.Sd = 0 // an earlier plan's may have followed from its baseline
	}
	if len(now.GetGuardrails()) > 0 {
		out.Guardrails = nil
	}
	if now != nil {
		proto.Merge(out, now)
	}
	return out
}

// ExperimentResults returns every number behind what was, or would now be, decided.
func (a *admin) ExperimentResults(_ context.Context, r *pb.NameRequest) (*pb.ExperimentResultsResponse, error) {
	e := a.facts.Facts().Experiment(r.GetName())
	if e == nil {
		return nil, errNoExperiment(r.GetName())
	}
	results, ledger, err := a.trials.Results(e, a.now())
	if err != nil {
		return nil, err
	}
	return &pb.ExperimentResultsResponse{Experiment: experimentPB(e), Results: results, Ledger: ledger}, nil
}

// checkConfiguration bounds what arms carry, and demands JSON.
func checkConfiguration(arms []*pb.ExperimentArm) error {
	for _, arm := range arms {
		if err := checkMetadata(arm.GetConfiguration()); err != nil {
			return outrigger.Errorf(outrigger.Invalid, "arm %q: configuration: %v", arm.GetName(), err)
		}
		for k, v := range arm.GetConfiguration() {
			if err := outrigger.CheckName("configuration", k); err != nil {
				return outrigger.Errorf(outrigger.Invalid, "arm %q: %v", arm.GetName(), err)
			}
			if !json.Valid([]byte(v)) {
				return invalid("arm %q: configuration %q is %q, which is not JSON", arm.GetName(), k, v)
			}
		}
	}
	return nil
}
