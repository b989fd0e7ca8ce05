package algorithms

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
)

// stepper is an algorithm that works in rounds: given the points of the last round and
// their losses (none at first) it returns the points of the next, at least one.
type stepper interface {
	step(r *rand.Rand, xs [][]float64, ys []loss) [][]float64
	check() error
	width() int  // points of the round under way, once there is one
	fresh() bool // no round has ended yet
}

// batch turns a stepper into an engine: the points of a round may be evaluated in
// parallel and told in any order; the next round starts when all are told, so the order
// does not influence the search.
type batch[S interface {
	stepper
	comparable
}] struct {
	p      *problem
	own    S // the same as Step, to notice a state that replaced it
	Step   S
	Points [][]float64
	Losses []loss
	Issued int
	Done   []bool
}

func newBatch[S interface {
	stepper
	comparable
}](p *problem, s S) *batch[S] {
	return &batch[S]{p: p, own: s, Step: s}
}

func (b *batch[S]) next(r *rand.Rand) ([]float64, int, bool) {
	if b.Issued == len(b.Points) {
		if slices.Contains(b.Done, false) {
			return nil, 0, false
		}
		b.Points = b.Step.step(r, b.Points, b.Losses)
		for _, x := range b.Points {
			for j := range x {
				x[j] = clamp01(x[j])
			}
		}
		b.Losses = make([]loss, len(b.Points))
		b.Done = make([]bool, len(b.Points))
		b.Issued = 0
	}
	b.Issued++
	return b.Points[b.Issued-1], b.Issued - 1, true
}

func (b *batch[S]) observe(_ *rand.Rand, tag int, _ []float64, y loss) {
	b.Losses[tag], b.Done[tag] = y, true
}

// byTag marks that results belong to the points of the round and to no other.
func (b *batch[S]) byTag() {}

func (b *batch[S]) check(tags []int) error {
	if b.Step != b.own || len(b.Losses) != len(b.Points) || len(b.Done) != len(b.Points) || b.Issued < 0 || b.Issued > len(b.Points) {
		return errors.New("round is inconsistent")
	}
	if err := checkRows(b.Points, b.Losses, b.p.d); err != nil {
		return err
	}
	open := map[int]bool{}
	for i, done := range b.Done {
		if done && i >= b.Issued {
			return errors.New("a point is told that was not asked")
		}
		if !done && i < b.Issued {
			open[i] = true
		}
	}
	for _, t := range tags {
		if !open[t] {
			return errors.New("a pending trial belongs to no point of the round")
		}
		delete(open, t)
	}
	if len(open) > 0 {
		return errors.New("a point of the round has no pending trial")
	}
	if err := b.Step.check(); err != nil {
		return err
	}
	if len(b.Points) == 0 && !b.Step.fresh() || len(b.Points) > 0 && len(b.Points) != b.Step.width() {
		return errors.New("round has the wrong number of points")
	}
	return nil
}

// checkRows validates points of the unit cube and their losses.
func checkRows(xs [][]float64, ys []loss, d int) error {
	if len(xs) > MaxBudget || len(xs) != len(ys) {
		return errors.New("points and losses do not match")
	}
	for i, x := range xs {
		if !validPoint(x, d) || !ys[i].valid() {
			return errors.New("a point or its loss is out of range")
		}
	}
	return nil
}

// finite reports whether every number is within ±1e200.
func finite(xs ...float64) bool {
	return !slices.ContainsFunc(xs, func(x float64) bool { return !(math.Abs(x) <= 1e200) })
}

// reflect01 folds x back into [0,1] at the walls, so steps near a bound are not lost.
func reflect01(x float64) float64 {
	if !(math.Abs(x) < 1e6) {
		return clamp01(x)
	}
	x = math.Abs(math.Mod(x, 2))
	if x > 1 {
		x = 2 - x
	}
	return x
}

// perturb returns a neighbour of u: each parameter moves with probability rate, at
// least one does. Ordered ones move by a normal step of standard deviation sigma (an
// int by one value at least), unordered ones jump to another value.
func (p *problem) perturb(r *rand.Rand, u []float64, sigma, rate float64) []float64 {
	v := slices.Clone(u)
	sure := r.IntN(p.d)
	for j := range v {
		if j != sure && r.Float64() >= rate {
			continue
		}
		v[j] = p.jump(r, &p.space.params[j], v[j], sigma)
	}
	return v
}

func (p *problem) jump(r *rand.Rand, d *dim, x, sigma float64) float64 {
	n := d.bins()
	switch {
	case d.unordered() && n > 1:
		bin := math.Mod(math.Floor(x*n)+1+float64(r.IntN(int(n)-1)), n)
		return (bin + 0.5) / n
	case d.Kind == Int && !d.Log:
		step := r.NormFloat64() * sigma
		if math.Abs(step) < 1/n {
			step = math.Copysign(1/n, step)
		}
		return reflect01(x + step)
	}
	return reflect01(x + r.NormFloat64()*sigma)
}
