package trials

import (
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// Answer is an outcome as evidence on the version that answered: N values of one of
// deploy.Reported that add up to Sum, of one unit.
type Answer struct {
	Model, Version, Metric, Unit string
	N                            uint64
	Sum                          float64
	At                           time.Time
	ID                           string // counts once; "" = always
}

// answered hands on what an experiment's outcome says about the version of the arm. A metric
// of another name is the experiment's own; so is a value that is none of the versions' metric
// (an accuracy in percent): the experiment has counted it, the versions do without.
func (s *Service) answered(e *facts.Experiment, arm int, metric, unit string, v sample, at time.Time) {
	if s.opts.Answers == nil || arm < 0 || arm >= len(e.Arms) || !slices.Contains(deploy.Reported(), metric) || v.n == 0 {
		return
	}
	_, err := s.opts.Answers(Answer{Model: e.Model, Version: e.Arms[arm].Version, Metric: metric, Unit: unit, N: v.n, Sum: v.sum, At: at})
	if err != nil && !outrigger.IsKind(err, outrigger.Invalid) {
		s.opts.Logger.Warn("outcome counts for its experiment only", "experiment", e.Name, "metric", metric, "error", err)
	}
}

// direct counts an outcome that is about a model and no experiment.
func (s *Service) direct(f *facts.Facts, o *pb.OutcomeRecord, id string, now time.Time) (repeated bool, err error) {
	if s.opts.Answers == nil {
		return false, outrigger.Errorf(outrigger.Invalid, "outcomes of versions are not taken here; name an experiment")
	}
	m := f.Model(o.GetModel())
	if m == nil {
		return false, outrigger.Errorf(outrigger.NotFound, "model %q not found", o.GetModel())
	}
	at, err := outcomeTime(o, now)
	if err != nil {
		return false, err
	}
	version := o.GetVersion()
	if version == "" {
		if version, err = assigned(m, o.GetUnit(), at); err != nil {
			return false, err
		}
	} else if m.Version(version) == nil {
		return false, outrigger.Errorf(outrigger.NotFound, "version %q of model %q not found", version, m.Name)
	}
	return s.opts.Answers(Answer{Model: m.Name, Version: version, Metric: o.GetMetric(), Unit: o.GetUnit(), N: 1, Sum: o.GetValue(), At: at, ID: id})
}

// outcomeTime is when an outcome happened.
func outcomeTime(o *pb.OutcomeRecord, now time.Time) (time.Time, error) {
	if o.GetAt() == nil {
		return now, nil
	}
	at := o.GetAt().AsTime()
	if at.After(now.Add(maxClockAhead)) {
		return at, outrigger.Errorf(outrigger.Invalid, "at is %v, and it is %v now; at most %v ahead are taken", at, now, maxClockAhead)
	}
	return at, nil
}

// assigned is the version that the bucket rule gives a unit, where that can be told from the
// unit alone: nothing about the model changed since, and everybody takes part.
func assigned(m *facts.Model, unit string, at time.Time) (string, error) {
	const remedy = "name the version, as x-outrigger-version of the answer says"
	switch {
	case at.Before(m.TouchedAt):
		return "", outrigger.Errorf(outrigger.Invalid, "at is %v, and model %q changed at %v; %s", at, m.Name, m.TouchedAt, remedy)
	case m.Split.Enrolment.Target != "":
		return "", outrigger.Errorf(outrigger.Invalid, "who takes part in experiment %q of model %q depends on the request; %s", m.Split.Experiment, m.Name, remedy)
	case !m.Split.Enrolment.Admits(unit):
		return m.Split.Enrolment.Version, nil
	}
	bucket := experiments.Bucket(m.Split.Salt, unit)
	for _, a := range m.Split.Arms {
		for _, r := range a.Ranges {
			if r.Start <= bucket && bucket < r.End {
				return a.Version, nil
			}
		}
	}
	return "", outrigger.Errorf(outrigger.Invalid, "no version of model %q serves; %s", m.Name, remedy)
}
