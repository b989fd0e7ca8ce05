package monitor

import (
	"time"

	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/expr"
)

// degradedLevel is the quantile that response times are compared at.
const degradedLevel = 0.95

// failureRequests is how many requests of the last minute a failure of everything needs
// to be seen in.
const failureRequests = 10

// region is what both versions did in one region since the weight last changed.
type region struct {
	candidate, baseline side
}

// side is one version's counts.
type side struct {
	requests, failed uint64 // failed: distinct units
	latency          sketch
	recent, bad      uint64 // of the last minute
	counts           experiments.Moments
}

// observe reads the counts of a rollout for gates and conditions.
func (m *Monitor) observe(r *deploy.Rollout, now time.Time) deploy.Observed {
	regions := m.counts.regions(r, now)
	all := side{}
	for _, x := range regions {
		all.add(x.candidate)
	}
	beside := told{price: m.price(r.Model), score: func(metric string) scored {
		return m.scores.sinceEpoch(scoreKey{r.Model, r.Candidate, metric}, r.WeightEpoch)
	}}
	o := deploy.Observed{Measure: func(name string) expr.Measure { return measure(name, regions, &all, beside) }}
	if m.opts.Experiment != nil {
		o.Experiment = func(name string) (deploy.Outcome, string) { return m.opts.Experiment(name, r.Model, r.Candidate) }
	}
	return o
}

// Judge asks the gates of the present phase of a rollout, as of now.
func (m *Monitor) Judge(r *deploy.Rollout) ([]deploy.Result, error) {
	k, err := deploy.NewKeeper(r.CurrentPhase())
	if err != nil {
		return nil, err
	}
	now := m.opts.Now()
	return k.Judge(r, m.observe(r, now), now), nil
}

// RequestsPerSecond is the traffic of a model over the last minute.
func (m *Monitor) RequestsPerSecond(model string) float64 {
	m.counts.mu.Lock()
	defer m.counts.mu.Unlock()
	var sum totals
	now := m.opts.Now()
	for key, t := range m.counts.cells {
		if key.model == model && !key.shadow {
			t.window.addTo(&sum, now)
		}
	}
	return float64(sum.Requests) / (slots * slotSeconds)
}

func (s *side) add(o side) {
	s.requests, s.failed, s.recent, s.bad = s.requests+o.requests, s.failed+o.failed, s.recent+o.recent, s.bad+o.bad
	merge(&s.latency, o.latency)
	mergeCounts(&s.counts, &o.counts)
}

// regions sums the cells of the rollout's two versions. Sketches are copies.
func (c *counts) regions(r *deploy.Rollout, now time.Time) map[string]*region {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make(map[string]*region)
	for key, t := range c.cells {
		candidate := key.version == r.Candidate
		if !key.assigned || key.model != r.Model || key.epoch < r.WeightEpoch || !candidate && key.version != r.LastGood {
			continue
		}
		if out[key.region] == nil {
			out[key.region] = new(region)
		}
		to := &out[key.region].baseline
		if candidate {
			to = &out[key.region].candidate
		}
		var last totals
		t.window.addTo(&last, now)
		to.add(side{requests: t.lifetime.Requests, failed: min(t.failed, t.lifetime.Requests), latency: t.lifetime.latency,
			recent: last.Requests, bad: last.Failures, counts: t.lifetime.counts})
	}
	return out
}

// lastSeen is when a version last reported a finished request; zero if never.
func (c *counts) lastSeen(model, version string) (at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, t := range c.cells {
		if key.model == model && key.version == version && t.lastSeen.After(at) {
			at = t.lastSeen
		}
	}
	return at
}

// measure answers one of deploy.Metrics. What nobody reports is not known.
func measure(name string, regions map[string]*region, all *side, beside told) expr.Measure {
	switch name {
	case deploy.MetricSatisfaction, deploy.MetricAccuracy, deploy.MetricCost:
		return beside.measure(name, &all.counts)
	case "requests":
		return expr.Exactly(float64(all.requests))
	case "error_rate":
		return share(all.failed, all.requests, deploy.GateAlpha)
	case "success_rate":
		e := share(all.failed, all.requests, deploy.GateAlpha)
		return expr.Measure{Low: 1 - e.High, High: 1 - e.Low, Point: 1 - e.Point, N: e.N, Known: e.Known}
	case "response_time":
		return percentile(all.latency, deploy.GateAlpha)
	case "baseline_error_rate":
		return weighted(regions, all, func(x *region, alpha float64) expr.Measure {
			return share(x.baseline.failed, x.baseline.requests, alpha)
		})
	case "baseline_response_time":
		return weighted(regions, all, func(x *region, alpha float64) expr.Measure { return percentile(x.baseline.latency, alpha) })
	case deploy.MetricDegradation:
		return weighted(regions, all, degradation)
	case deploy.MetricFailure:
		return failure(*all)
	}
	return expr.Measure{}
}

func sequence(alpha float64) experiments.Sequence {
	return experiments.Sequence{Alpha: alpha, Tuning: experiments.DefaultTuning}
}

func share(k, n uint64, alpha float64) expr.Measure {
	if n == 0 {
		return expr.Measure{}
	}
	in, err := sequence(alpha).Proportion(min(k, n), n)
	return expr.Measure{Low: in.Low, High: in.High, Point: float64(k) / float64(n), N: n, Known: err == nil}
}

func percentile(s sketch, alpha float64) expr.Measure {
	if s == nil || s.IsEmpty() {
		return expr.Measure{}
	}
	q, err := experiments.QuantilesOf(s)
	if err != nil {
		return expr.Measure{}
	}
	in, err := q.Sequence(degradedLevel, sequence(alpha))
	return expr.Measure{Low: in.Low, High: in.High, Point: quantile(s, degradedLevel), N: uint64(s.GetCount()), Known: err == nil}
}

// degradation is p95 of the candidate over that of the baseline, less one.
func degradation(x *region, alpha float64) expr.Measure {
	c, b := percentile(x.candidate.latency, alpha/2), percentile(x.baseline.latency, alpha/2)
	if !c.Known || !b.Known || b.Low <= 0 || b.Point <= 0 {
		return expr.Measure{}
	}
	return expr.Measure{Low: c.Low/b.High - 1, High: c.High/b.Low - 1, Point: c.Point/b.Point - 1, N: c.N, Known: true}
}

// weighted is the mean of a measure over regions, weighted by the candidate's requests.
// Every region's interval holds at alpha over their number, so the mean's holds at alpha.
// Regions in which only one version served cannot be compared; when they hold more than
// half of the candidate's requests nothing is known.
func weighted(regions map[string]*region, all *side, of func(*region, float64) expr.Measure) expr.Measure {
	alpha := deploy.GateAlpha / float64(max(len(regions), 1))
	var out expr.Measure
	var sum float64
	for _, x := range regions {
		m := of(x, alpha)
		w := float64(x.candidate.requests)
		if !m.Known || w == 0 {
			continue
		}
		out.Low, out.High, out.Point = out.Low+w*m.Low, out.High+w*m.High, out.Point+w*m.Point
		out.N += m.N
		sum += w
	}
	if sum == 0 || sum < float64(all.requests)/2 {
		return expr.Measure{}
	}
	out.Low, out.High, out.Point, out.Known = out.Low/sum, out.High/sum, out.Point/sum, true
	return out
}

// failure is 1 when most requests of the last minute certainly failed, 0 when most
// certainly did not.
func failure(s side) expr.Measure {
	if s.recent < failureRequests {
		return expr.Measure{}
	}
	in, err := experiments.Wilson(min(s.bad, s.recent), s.recent, 0.01)
	switch {
	case err != nil:
		return expr.Measure{}
	case in.Low > 0.5:
		return expr.Exactly(1)
	case in.High < 0.5:
		return expr.Exactly(0)
	}
	return expr.Measure{Low: 0, High: 1, Point: float64(s.bad) / float64(s.recent), N: s.recent, Known: true}
}
