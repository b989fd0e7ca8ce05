package trials

import (
	"context"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/twmb/murmur3"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/otlp"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// Bounds of Record.
const (
	MaxBatch      = 1000
	maxIDBytes    = 256
	maxUnitBytes  = 1024
	maxValue      = 1e12            // of one outcome, either sign
	maxClockAhead = 5 * time.Minute // an outcome's time may be in the future by that much
)

// Record counts late outcomes. Every outcome belongs to the arm its unit was exposed to,
// whoever reports it; a unit no sidecar has reported is not_found, and may be tried again,
// since reports take a second. Outcomes are taken from the start of the experiment until
// Options.Late after its end. One of deploy.Reported also counts for the version of the arm,
// unless the unit was seen in several; one without an experiment counts for the model's
// version it names only, or that its unit is assigned to. The error is that of the batch (kind Invalid: empty or too
// long); what is wrong with one outcome stands in the answer, and only the others count.
func (s *Service) Record(_ context.Context, r *pb.RecordOutcomesRequest) (*pb.RecordOutcomesResponse, error) {
	if n := len(r.GetOutcomes()); n == 0 || n > MaxBatch {
		return nil, outrigger.Errorf(outrigger.Invalid, "outcomes has %d entries; give 1 to %d", n, MaxBatch)
	}
	if n := len(r.GetRequestId()); n > maxIDBytes {
		return nil, outrigger.Errorf(outrigger.Invalid, "request_id is %d bytes long, the limit is %d", n, maxIDBytes)
	}
	s.counting.RLock()
	defer s.counting.RUnlock()
	s.news.Store(true)
	f, now := s.opts.Facts(), s.opts.Now()
	out := &pb.RecordOutcomesResponse{}
	for i, o := range r.GetOutcomes() {
		id := o.GetId()
		if id == "" && r.GetRequestId() != "" {
			id = r.GetRequestId() + "\x00" + strconv.Itoa(i)
		}
		repeated, err := s.record(f, o, id, now)
		switch {
		case err != nil:
			out.Errors = append(out.Errors, &pb.OutcomeError{Index: uint32(i), Kind: outrigger.KindOf(err).String(), Message: err.Error()})
		case repeated:
			out.Repeated++
		default:
			out.Counted++
		}
	}
	return out, nil
}

func (s *Service) record(f *facts.Facts, o *pb.OutcomeRecord, id string, now time.Time) (repeated bool, err error) {
	switch {
	case o.GetUnit() == "" || len(o.GetUnit()) > maxUnitBytes:
		return false, outrigger.Errorf(outrigger.Invalid, "unit is %d bytes long; give 1 to %d", len(o.GetUnit()), maxUnitBytes)
	case len(o.GetId()) > maxIDBytes:
		return false, outrigger.Errorf(outrigger.Invalid, "id is %d bytes long, the limit is %d", len(o.GetId()), maxIDBytes)
	case !(math.Abs(o.GetValue()) <= maxValue):
		return false, outrigger.Errorf(outrigger.Invalid, "value is %v; it lies within ±%g", o.GetValue(), float64(maxValue))
	case o.GetAt() != nil && o.GetAt().CheckValid() != nil:
		return false, outrigger.Errorf(outrigger.Invalid, "at is no time: %v", o.GetAt().CheckValid())
	}
	if o.GetExperiment() == "" && o.GetModel() != "" {
		return s.direct(f, o, id, now)
	}
	e := f.Experiment(o.GetExperiment())
	switch {
	case e == nil:
		return false, outrigger.Errorf(outrigger.NotFound, "experiment %q not found", o.GetExperiment())
	case o.GetModel() != "" && o.GetModel() != e.Model:
		return false, outrigger.Errorf(outrigger.Invalid, "experiment %q is about model %q, not %q", e.Name, e.Model, o.GetModel())
	case o.GetVersion() != "":
		return false, outrigger.Errorf(outrigger.Invalid, "the arm of experiment %q says which version answered; leave version out", e.Name)
	}
	t, err := s.open(e, now)
	if err != nil {
		return false, err
	}
	at, err := outcomeTime(o, now)
	if err != nil {
		return false, err
	}
	if o.GetAt() != nil && at.Before(e.Life.StartedAt) {
		return false, outrigger.Errorf(outrigger.Invalid, "at is %v, before the start of experiment %q at %v", at, e.Name, e.Life.StartedAt)
	}
	m, err := t.metric(o.GetMetric())
	if err != nil {
		return false, err
	}
	v := sample{1, o.GetValue()}
	arm, repeated, err := t.ledger.outcome(experiments.UnitHash(facts.ExperimentSalt(e.Name), o.GetUnit()), m, v, id)
	if err == nil && !repeated {
		s.answered(e, arm, o.GetMetric(), o.GetUnit(), v, at)
	}
	return repeated, err
}

// open returns the evidence of an experiment that still takes some. Kinds: Locked for one
// that is not planned, not started or over for longer than the window.
func (s *Service) open(e *facts.Experiment, now time.Time) (*trial, error) {
	if t := s.trial(e); t != nil && (e.Life.EndedAt.IsZero() || now.Sub(e.Life.EndedAt) <= s.opts.Late) {
		return t, nil
	}
	if e.Life.EndedAt.IsZero() {
		return nil, outrigger.Errorf(outrigger.Locked, "experiment %q is %s; outcomes are taken from its start on, by a plan", e.Name, e.State)
	}
	return nil, outrigger.Errorf(outrigger.Locked, "experiment %q ended at %v; outcomes are taken for %v after that", e.Name, e.Life.EndedAt, s.opts.Late)
}

// metric returns the number of a named metric.
func (t *trial) metric(name string) (int, error) {
	var known []string
	for _, v := range t.metrics {
		switch {
		case v.named >= 0 && v.name == name:
			return v.named, nil
		case v.named >= 0:
			known = append(known, v.name)
		}
	}
	if facts.ReportedBySidecars(name) {
		return 0, outrigger.Errorf(outrigger.Invalid, "metric %q is reported by sidecars; outcomes may give %q", name, known)
	}
	return 0, outrigger.Errorf(outrigger.NotFound, "metric %q not found in the plan of experiment %q; it has %q", name, t.name, known)
}

// outcome adds values of one metric to a unit that was exposed, and says to which arm; −1 for
// a unit seen in several. With an id it counts once.
func (l *ledger) outcome(u uint32, metric int, v sample, id string) (arm int, repeated bool, err error) {
	sh := &l.shards[u%shards]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	known := sh.units[u]
	if known == nil {
		return -1, false, outrigger.Errorf(outrigger.NotFound, "unit not found: no sidecar has reported that it was exposed (reports take a second)")
	}
	var hash uint64
	if id != "" {
		h := murmur3.SeedNew64(uint64(u)<<16 | uint64(metric))
		_, _ = h.Write([]byte(id)) // never fails
		hash = h.Sum64()
		if _, dup := sh.ids[hash]; dup {
			l.repeated.Add(1)
			return -1, true, nil
		}
	}
	if known.values == nil {
		if !l.take(sh, l.valuesCost()) {
			return -1, false, outrigger.Errorf(outrigger.Exhausted, "the unit ledger is full; end another experiment or raise the limit")
		}
		known.values = make([]sample, l.named)
	}
	was := &known.values[metric]
	if sum := was.sum + v.sum; !(math.Abs(sum) <= maxTotal) {
		return -1, false, outrigger.Errorf(outrigger.Invalid, "value %v takes the sum of the unit to %v; the limit is %g", v.sum, sum, float64(maxTotal))
	}
	was.n, was.sum = was.n+v.n, was.sum+v.sum
	if id != "" {
		sh.remember(hash)
	}
	l.outcomes.Add(v.n)
	l.changed.Store(true)
	if known.multiple {
		return -1, false, nil
	}
	return int(known.arm), false, nil
}

// remember keeps an id, and forgets the oldest beyond the bound.
func (sh *shard) remember(hash uint64) {
	if sh.ids == nil {
		sh.ids = map[uint64]struct{}{}
	}
	if len(sh.ring) < maxIDs {
		sh.ring = append(sh.ring, hash)
	} else {
		delete(sh.ids, sh.ring[sh.next])
		sh.ring[sh.next] = hash
		sh.next = (sh.next + 1) % maxIDs
	}
	sh.ids[hash] = struct{}{}
}

// Find says what a named metric of an experiment that takes values is. Kinds: NotFound,
// Locked, Invalid.
func (s *Service) Find(experiment, metric string, now time.Time) (otlp.Target, error) {
	t, e, err := s.named(experiment, now)
	if err != nil {
		return otlp.Target{}, err
	}
	n, err := t.metric(metric)
	if err != nil {
		return otlp.Target{}, err
	}
	i := slices.IndexFunc(t.metrics, func(v view) bool { return v.named == n })
	return otlp.Target{Start: e.Life.StartedAt, Kind: t.metrics[i].kind}, nil
}

// Observe counts what a series of an application adds: for a unit like an outcome without
// an id, else for an arm, where it is only shown.
func (s *Service) Observe(o otlp.Observation, now time.Time) error {
	s.counting.RLock()
	defer s.counting.RUnlock()
	s.news.Store(true)
	t, e, err := s.named(o.Experiment, now)
	if err != nil {
		return err
	}
	m, err := t.metric(o.Metric)
	if err != nil {
		return err
	}
	if o.N > maxTotal || !(math.Abs(o.Sum) <= maxTotal) {
		return outrigger.Errorf(outrigger.Invalid, "%d values with sum %v; the limit is %g", o.N, o.Sum, float64(maxTotal))
	}
	v := sample{o.N, o.Sum}
	if o.Unit != "" {
		if len(o.Unit) > maxUnitBytes {
			return outrigger.Errorf(outrigger.Invalid, "unit is %d bytes long; give 1 to %d", len(o.Unit), maxUnitBytes)
		}
		arm, _, err := t.ledger.outcome(experiments.UnitHash(facts.ExperimentSalt(e.Name), o.Unit), m, v, "")
		if err == nil {
			s.answered(e, arm, o.Metric, o.Unit, v, now)
		}
		return err
	}
	arm := slices.IndexFunc(t.arms, func(w experiments.Weighted) bool { return w.Name == o.Arm })
	if arm < 0 {
		return outrigger.Errorf(outrigger.NotFound, "arm %q not found in experiment %q", o.Arm, e.Name)
	}
	t.ledger.describe(arm, m, v)
	return nil
}

func (s *Service) named(experiment string, now time.Time) (*trial, *facts.Experiment, error) {
	e := s.opts.Facts().Experiment(experiment)
	if e == nil {
		return nil, nil, outrigger.Errorf(outrigger.NotFound, "experiment %q not found", experiment)
	}
	t, err := s.open(e, now)
	return t, e, err
}

// describe adds values whose unit is not known.
func (l *ledger) describe(arm, metric int, v sample) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := [2]int{arm, metric}
	was := l.described[k]
	l.described[k] = sample{was.n + v.n, was.sum + v.sum}
}

// shown lists what is known of arms without units: by metric, then arm.
func (t *trial) shown() map[string]any {
	t.ledger.mu.RLock()
	defer t.ledger.mu.RUnlock()
	out := map[string]any{}
	for k, v := range t.ledger.described {
		i := slices.IndexFunc(t.metrics, func(m view) bool { return m.named == k[1] })
		of, ok := out[t.metrics[i].name].(map[string]any)
		if !ok {
			of = map[string]any{}
			out[t.metrics[i].name] = of
		}
		of[t.arms[k[0]].Name] = map[string]any{"values": float64(v.n), "sum": v.sum}
	}
	return out
}
