package control

import (
	"context"
	"slices"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// experimentMoves lists where an experiment may go from each state. A stopped test does
// not start again: its units have been released, and a second run over the same salt
// would carry the first one's effects into its numbers.
func experimentMoves(from string) []string {
	switch from {
	case facts.Draft, facts.Planned:
		return []string{facts.Running, facts.Archived}
	case facts.Running:
		return []string{facts.Concluded, facts.Stopped}
	case facts.Concluded, facts.Stopped:
		return []string{facts.Archived}
	}
	return nil
}

// CreateExperiment plans an A/B test and starts it if asked to. A model has at most one
// running experiment, and none during a rollout.
func (a *admin) CreateExperiment(ctx context.Context, r *pb.CreateExperimentRequest) (*pb.Experiment, error) {
	if err := outrigger.CheckName("name", r.GetName()); err != nil {
		return nil, err
	}
	if len(r.GetName()) > MaxModelName {
		return nil, invalid("name is %d bytes long, the limit is %d; shorten it", len(r.GetName()), MaxModelName)
	}
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		switch {
		case f.Experiment(r.GetName()) != nil:
			return nil, outrigger.Errorf(outrigger.Exists, "experiment %q exists already; choose another name, its buckets depend on it", r.GetName())
		case len(f.Experiments()) >= MaxExperiments:
			return nil, outrigger.Errorf(outrigger.Exhausted, "there are %d experiments, the limit is %d", len(f.Experiments()), MaxExperiments)
		}
		m, err := model(f, r.GetModel())
		if err != nil {
			return nil, err
		}
		if err := checkArms(m, r.GetArms()); err != nil {
			return nil, err
		}
		if err := checkConfiguration(r.GetArms()); err != nil {
			return nil, err
		}
		if err := checkEnrolment(f, r.GetName(), r.GetEnrolment()); err != nil {
			return nil, err
		}
		e := &pb.ExperimentChanged{State: facts.Draft, Model: m.Name, Arms: r.GetArms(), Plan: r.GetPlan(), Enrolment: r.GetEnrolment()}
		created := write(f, facts.ExperimentPrefix+r.GetName(), experimentChanged(e))
		if !r.GetStart() {
			return []eventlog.Write{created}, nil
		}
		if r.GetPlan() != nil {
			return nil, invalid("start is true and a plan is given; it is frozen by PlanExperiment, and then the experiment is started")
		}
		e.State = facts.Running
		claim, err := claimForExperiment(f, m, r.GetArms())
		return []eventlog.Write{claim, created}, err
	})
	return experimentReply(f, err, r.GetName())
}

// claimForExperiment moves the alias challenger in the model's aggregate, in the same
// append that starts the test: of two starts, or a start and a rollout, decided at the
// same moment on two replicas, the log lets one through.
func claimForExperiment(f *facts.Facts, m *facts.Model, arms []*pb.ExperimentArm) (eventlog.Write, error) {
	if what := underTest(m); what != "" {
		return eventlog.Write{}, locked("model %q is in %s; one test or rollout at a time", m.Name, what)
	}
	champion := m.Aliases[facts.Champion]
	challenger, weight := "", uint32(0)
	for _, arm := range arms {
		if arm.GetVersion() != champion && (challenger == "" || arm.GetWeight() > weight) {
			challenger, weight = arm.GetVersion(), arm.GetWeight()
		}
	}
	if challenger == "" {
		challenger = champion // an A/A test
	}
	return toModel(f, m.Name, aliasMoved(facts.Challenger, m.Aliases[facts.Challenger], challenger)), nil
}

// SetExperimentState starts, concludes, stops or archives an experiment.
func (a *admin) SetExperimentState(ctx context.Context, r *pb.SetExperimentStateRequest) (*pb.Experiment, error) {
	if err := checkReason(r.GetReason()); err != nil {
		return nil, err
	}
	known := []string{facts.Draft, facts.Planned, facts.Running, facts.Concluded, facts.Stopped, facts.Archived}
	if !slices.Contains(known, r.GetState()) {
		return nil, invalid("state %q is not one of %v", r.GetState(), known[1:])
	}
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		e := f.Experiment(r.GetName())
		if e == nil {
			return nil, errNoExperiment(r.GetName())
		}
		if e.State == r.GetState() {
			return nil, nil
		}
		if allowed := experimentMoves(e.State); !slices.Contains(allowed, r.GetState()) {
			return nil, locked("experiment %q is %s and cannot become %s; allowed are %v", e.Name, e.State, r.GetState(), allowed)
		}
		m, err := model(f, e.Model)
		if err != nil {
			return nil, err
		}
		changed := &pb.ExperimentChanged{State: r.GetState(), Reason: r.GetReason()}
		if r.GetState() == facts.Stopped {
			changed.Cause = string(experiments.CauseManual)
		}
		if _, err := e.Life.Apply(experiments.Transition{To: experiments.State(r.GetState()), At: a.now(), Cause: experiments.Cause(changed.Cause)}); err != nil {
			return nil, err
		}
		writes := []eventlog.Write{write(f, facts.ExperimentPrefix+e.Name, experimentChanged(changed))}
		switch {
		case r.GetState() == facts.Running:
			if err := checkArms(m, armsPB(e)); err != nil {
				return nil, err
			}
			claim, err := claimForExperiment(f, m, armsPB(e))
			return append(writes, claim), err
		case e.State == facts.Running && m.Aliases[facts.Challenger] != "":
			writes = append(writes, toModel(f, m.Name, aliasMoved(facts.Challenger, m.Aliases[facts.Challenger], "")))
		}
		return writes, nil
	})
	return experimentReply(f, err, r.GetName())
}

// ListExperiments returns experiments by name.
func (a *admin) ListExperiments(_ context.Context, r *pb.ListRequestAll) (*pb.ListExperimentsResponse, error) {
	limit, err := listLimit(r.GetLimit())
	if err != nil {
		return nil, err
	}
	out := new(pb.ListExperimentsResponse)
	for _, e := range a.facts.Facts().Experiments() {
		if len(out.Experiments) == limit {
			break
		}
		out.Experiments = append(out.Experiments, experimentPB(e))
	}
	return out, nil
}

func errNoExperiment(name string) error {
	return outrigger.Errorf(outrigger.NotFound, "experiment %q not found", name)
}

func experimentReply(f *facts.Facts, err error, name string) (*pb.Experiment, error) {
	if err != nil {
		return nil, err
	}
	e := f.Experiment(name)
	if e == nil {
		return nil, errNoExperiment(name)
	}
	return experimentPB(e), nil
}

func experimentChanged(e *pb.ExperimentChanged) *pb.Event {
	return &pb.Event{Payload: &pb.Event_ExperimentChanged{ExperimentChanged: e}}
}

func experimentPB(e *facts.Experiment) *pb.Experiment {
	return &pb.Experiment{Name: e.Name, Model: e.Model, State: e.State, Arms: armsPB(e), Reason: e.Reason, ChangedAt: timestamppb.New(e.ChangedAt),
		Plan: e.Plan, StartedAt: wire.TimePB(e.Life.StartedAt), EndedAt: wire.TimePB(e.Life.EndedAt),
		Enrolment: e.Enrolment, Outcome: string(e.Life.Outcome), Serve: e.Life.Serve, Cause: string(e.Life.Cause)}
}

func armsPB(e *facts.Experiment) []*pb.ExperimentArm {
	out := make([]*pb.ExperimentArm, len(e.Arms))
	for i, a := range e.Arms {
		out[i] = &pb.ExperimentArm{Name: a.Name, Version: a.Version, Weight: a.Weight, Configuration: a.Configuration}
	}
	return out
}
