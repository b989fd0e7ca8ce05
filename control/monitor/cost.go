package monitor

import (
	"math"
	"sync"

	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/expr"
)

// CostNames are what a model's cost formula may use: the counts of one version over some
// time. seconds is the time of all requests together. Their order is that of the quantities
// of a cell's moments.
func CostNames() []string {
	return []string{"requests", "failures", "cancelled", "attempts", "tokens_in", "tokens_out", "seconds"}
}

// requestsAt is the place of requests in CostNames.
const requestsAt = 0

func (t *Totals) quantities() []float64 {
	return []float64{float64(t.Requests), float64(t.Failures), float64(t.Cancelled), float64(t.Attempts), float64(t.TokensIn), float64(t.TokensOut), t.LatencySum / 1000}
}

// Cost is what the totals cost by a formula (CostNames), in its currency; ok is false for no
// formula, one that this version cannot use and one without a finite value there.
func (m *Monitor) Cost(formula string, t Totals) (cost float64, ok bool) {
	f := m.formulas.of(formula)
	if f == nil {
		return 0, false
	}
	cost, err := evaluate(f, t.quantities())
	return cost, err == nil
}

// price is the compiled formula of a model, nil if it has none.
func (m *Monitor) price(model string) *expr.Formula {
	if m.opts.Cost == nil {
		return nil
	}
	return m.formulas.of(m.opts.Cost(model))
}

// maxFormulas bounds the formulas kept compiled; beyond it they are compiled anew.
const maxFormulas = 1024

// formulas keeps formulas compiled. Safe for concurrent use.
type formulas struct {
	mu       sync.Mutex
	compiled map[string]*expr.Formula // nil for one that does not compile
}

func (c *formulas) of(source string) *expr.Formula {
	if source == "" {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	f, known := c.compiled[source]
	if known {
		return f
	}
	// The log holds only formulas that were checked; one that does not compile is a newer
	// version's and costs nothing here.
	f, err := expr.CompileFormula(source, CostNames())
	if err != nil {
		f = nil
	}
	if c.compiled == nil || len(c.compiled) >= maxFormulas {
		c.compiled = make(map[string]*expr.Formula)
	}
	c.compiled[source] = f
	return f
}

func evaluate(f *expr.Formula, quantities []float64) (float64, error) {
	names := CostNames()
	return f.Eval(func(name string) float64 {
		for i, n := range names {
			if n == name {
				return quantities[i]
			}
		}
		return 0
	})
}

// Costs are compared as means per report and request. Fewer reports than minReports say
// nothing: the interval is asymptotic. reportTuning is where it is tightest, a minute or
// two of one sidecar.
const (
	minReports   = 20
	reportTuning = 100
)

// costPerRequest is the formula over the counts, per request. What varies from report to
// report (about a second of one sidecar each) makes the interval: the formula is taken as
// linear around the sums, which prices are, and the ratio's variance follows by the delta
// method.
func costPerRequest(f *expr.Formula, counts *experiments.Moments, alpha float64) expr.Measure {
	if f == nil || counts.N < minReports || counts.Sum[requestsAt] == 0 {
		return expr.Measure{}
	}
	requests := counts.Sum[requestsAt]
	total, err := evaluate(f, counts.Sum)
	if err != nil {
		return expr.Measure{}
	}
	slope, err := gradient(f, counts.Sum)
	if err != nil {
		return expr.Measure{}
	}
	per := make([]float64, len(slope))
	per[requestsAt] = 1
	sums, err := counts.Project(slope, per)
	if err != nil {
		return expr.Measure{}
	}
	ratio, err := sums.Ratio()
	if err != nil {
		return expr.Measure{}
	}
	in, err := experiments.Sequence{Alpha: alpha, Tuning: reportTuning}.Interval(total/requests, ratio.Variance, counts.N)
	return expr.Measure{Low: in.Low, High: in.High, Point: total / requests, N: uint64(requests), Known: err == nil}
}

// gradient is the formula's slope in each quantity, by central differences.
func gradient(f *expr.Formula, at []float64) ([]float64, error) {
	out := make([]float64, len(at))
	x := make([]float64, len(at))
	copy(x, at)
	for i := range at {
		h := math.Max(math.Abs(at[i]), 1) / 1024
		x[i] = at[i] + h
		up, err := evaluate(f, x)
		if err != nil {
			return nil, err
		}
		x[i] = at[i] - h
		down, err := evaluate(f, x)
		if err != nil {
			return nil, err
		}
		out[i], x[i] = (up-down)/(2*h), at[i]
	}
	return out, nil
}
