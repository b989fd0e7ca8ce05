package algorithms

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
)

// annealer is simulated annealing (Kirkpatrick, Gelatt and Vecchi 1983). A short
// space-filling design gives the starting point, its best, and the spread of losses
// that calibrates T0; the temperature then falls geometrically to 1e-4·T0 over the
// budget, and the step size follows it. The seed design's fixed T0 = 100, cooled by 0.95 each
// step, is available through the settings.
type annealer struct {
	p        *problem
	Proposed int
	Told     int
	Sample   []float64 // losses of the design, finite ones
	T0       float64
	Current  []float64 // nil until the first success
	Y        loss
}

func (a *annealer) designSize() int { return min(max(a.p.budget/20, 4), 50, a.p.budget) }

// progress runs from 0 at the end of the design to 1 at the end of the budget.
func (a *annealer) progress() float64 {
	n := a.designSize()
	return min(max(float64(a.Told-n)/float64(max(a.p.budget-n, 1)), 0), 1)
}

func (a *annealer) temperature() float64 {
	if c := a.p.set["cooling_rate"]; c > 0 {
		return a.T0 * math.Pow(c, float64(max(a.Told-a.designSize(), 0)))
	}
	return a.T0 * math.Pow(1e-4, a.progress())
}

func (a *annealer) next(r *rand.Rand) ([]float64, int, bool) {
	a.Proposed++
	if a.Proposed <= a.designSize() || a.Current == nil {
		return a.p.design(a.Proposed - 1), 0, true
	}
	sigma := a.p.set["step"] * math.Pow(a.p.set["step_end"]/a.p.set["step"], a.progress())
	// Single-coordinate moves half the time keep acceptance up in many dimensions.
	rate := 1.0
	if r.IntN(2) == 0 {
		rate = 0
	}
	return a.p.perturb(r, a.Current, sigma, rate), 0, true
}

func (a *annealer) observe(r *rand.Rand, _ int, u []float64, y loss) {
	a.Told++
	if a.Told <= a.designSize() {
		if !y.failed() {
			a.Sample = append(a.Sample, float64(y))
		}
		if a.Current == nil && !y.failed() || y < a.Y {
			a.Current, a.Y = slices.Clone(u), y
		}
		if a.Told == a.designSize() {
			a.calibrate()
		}
		return
	}
	if y.failed() {
		return
	}
	if a.Current == nil || y <= a.Y || r.Float64() < math.Exp(float64(a.Y-y)/a.temperature()) {
		a.Current, a.Y = slices.Clone(u), y
	}
}

// calibrate sets T0 to a fraction of the mean gap between losses of the design.
func (a *annealer) calibrate() {
	a.T0 = a.p.set["initial_temp"]
	if a.T0 > 0 {
		return
	}
	slices.Sort(a.Sample)
	if n := len(a.Sample); n > 1 {
		a.T0 = (a.Sample[n/2] - a.Sample[0]) * a.p.set["heat"]
	}
	a.T0 = max(a.T0, 1e-12)
}

func (a *annealer) check([]int) error {
	bad := a.Current != nil && !validPoint(a.Current, a.p.d) || !a.Y.valid() || !finite(a.T0) || a.T0 < 0 ||
		a.Told < 0 || a.Proposed < a.Told || a.Proposed > 1<<31 || len(a.Sample) > 50 || !finite(a.Sample...) ||
		a.Told >= a.designSize() && a.T0 == 0
	if bad {
		return errors.New("annealing state is out of range")
	}
	return nil
}
