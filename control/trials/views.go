package trials

import (
	"math"
	"slices"

	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// view is how a metric of a plan is read off a unit.
type view struct {
	name  string
	kind  experiments.MetricKind
	named int // index of its values, −1 for what sidecars report
}

// viewsOf lists all metrics of a plan, each once, and how many of them are named.
func viewsOf(p *experiments.Plan) (views []view, named int) {
	add := func(m experiments.Metric) {
		if slices.ContainsFunc(views, func(v view) bool { return v.name == m.Name }) {
			return
		}
		v := view{name: m.Name, kind: m.Kind, named: -1}
		if !facts.ReportedBySidecars(m.Name) {
			v.named = named
			named++
		}
		views = append(views, v)
	}
	add(p.Primary)
	for _, m := range p.Secondary {
		add(m)
	}
	for _, g := range p.Guardrails {
		add(g.Metric)
	}
	return views, named
}

// of is a unit's x and y; ok is false for a unit the metric says nothing about.
func (v view) of(u *unit) (x, y float64, ok bool) {
	if v.named >= 0 {
		return v.ofNamed(u)
	}
	n := float64(u.n)
	switch v.name {
	case facts.MetricErrorRate:
		x, y = u.failures, n
	case facts.MetricSuccessRate:
		x, y = n-u.failures, n
	case facts.MetricResponseTime:
		x, y = u.ms, n
	case facts.MetricFailedUnits:
		x = min(1, math.Ceil(u.failures))
	}
	return x, y, u.n > 0
}

// ofNamed: a ratio is about the units that have values, mean and proportion about every
// unit that was exposed.
func (v view) ofNamed(u *unit) (x, y float64, ok bool) {
	var s sample
	if u.values != nil {
		s = u.values[v.named]
	}
	switch v.kind {
	case experiments.KindRatio:
		return s.sum, float64(s.n), s.n > 0
	case experiments.KindProportion:
		if s.sum > 0 {
			x = 1
		}
		return x, 0, true
	}
	return s.sum, 0, true
}
