package algorithms

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
)

// gradient is stochastic gradient descent with momentum (Polyak 1964) or Adam (Kingma
// and Ba 2015) on estimated gradients. A leg starts at the best point not yet descended
// from of a space-filling design and ends when its step has shrunk to nothing; the next
// leg starts elsewhere, so a long budget is not spent in one valley.
//
// The gradient comes from forward differences (parameters + 1 evaluations), or from
// simultaneous perturbation, SPSA (Spall 1992; pairs of evaluations), which is the
// default for noisy losses and above 16 parameters.
type gradient struct {
	p    *problem
	adam bool

	Design  []start   // evaluated starting points, best first
	X, V, S []float64 // position, momentum, second moment
	T       int       // steps in this leg
	Legs    int
	Rate    float64   // present step size
	Scale   float64   // first gradient norm of the leg (SGD)
	BestX   []float64 // best centre of the leg
	BestY   loss
	Bad     int         // steps since the leg's best improved
	Delta   [][]float64 // signs of the SPSA pairs under way
	Width   float64     // difference step of the round under way
}

type start struct {
	U []float64
	Y loss
}

const (
	spsaPairs = 2     // averaged per step: halves the variance, keeps rounds short
	steepest  = 1_000 // slopes beyond this multiple of the first count as this
)

func (g *gradient) spsa() bool {
	switch g.p.set["spsa"] {
	case 0:
		return false
	case 1:
		return true
	}
	return g.p.noisy || g.p.d > 16
}

func (g *gradient) designSize() int { return min(max(g.p.budget/20, 3), 32) }

func (g *gradient) step(r *rand.Rand, xs [][]float64, ys []loss) [][]float64 {
	switch {
	case xs == nil:
		for i := range g.designSize() {
			xs = append(xs, g.p.design(i))
		}
		return xs
	case g.Design == nil:
		for i, x := range xs {
			g.Design = append(g.Design, start{slices.Clone(x), ys[i]})
		}
		slices.SortStableFunc(g.Design, func(a, b start) int { return compareLoss(a.Y, b.Y) })
		g.begin()
	default:
		g.move(xs, ys)
	}
	return g.probe(r)
}

func compareLoss(a, b loss) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// begin starts a leg.
func (g *gradient) begin() {
	if g.Legs < len(g.Design) {
		g.X = slices.Clone(g.Design[g.Legs].U)
	} else {
		g.X = g.p.design(g.Legs)
	}
	g.Legs++
	g.V, g.S = make([]float64, g.p.d), make([]float64, g.p.d)
	g.T, g.Bad, g.Scale, g.Rate = 0, 0, 0, g.p.set["learning_rate"]
	g.BestX, g.BestY = slices.Clone(g.X), loss(math.Inf(1))
}

// probe lays out the evaluations for the gradient at X.
func (g *gradient) probe(r *rand.Rand) [][]float64 {
	if g.spsa() {
		g.Width, g.Delta = 0.1/math.Pow(float64(g.T+1), 0.101), nil
		if !g.p.noisy {
			g.Width = 0.01 / math.Pow(float64(g.T+1), 0.101)
		}
		var xs [][]float64
		for range spsaPairs {
			up, down, sign := slices.Clone(g.X), slices.Clone(g.X), make([]float64, g.p.d)
			for j := range sign {
				sign[j] = float64(2*r.IntN(2) - 1)
				up[j], down[j] = clamp01(up[j]+g.Width*sign[j]), clamp01(down[j]-g.Width*sign[j])
			}
			g.Delta = append(g.Delta, sign)
			xs = append(xs, up, down)
		}
		return xs
	}
	g.Width = 1e-5
	if g.p.noisy {
		g.Width = 0.05
	}
	xs := [][]float64{slices.Clone(g.X)}
	for j := range g.p.d {
		x := slices.Clone(g.X)
		if x[j] += g.Width; x[j] > 1 {
			x[j] -= 2 * g.Width
		}
		xs = append(xs, x)
	}
	return xs
}

// slope turns the losses of a round into a gradient and the loss at the centre (the
// mean of the pairs for SPSA). A failed evaluation contributes no slope.
func (g *gradient) slope(xs [][]float64, ys []loss) (grad []float64, centre loss) {
	grad = make([]float64, g.p.d)
	if g.Delta == nil {
		for j := range grad {
			if w := xs[j+1][j] - xs[0][j]; w != 0 && !ys[j+1].failed() && !ys[0].failed() {
				grad[j] = float64(ys[j+1]-ys[0]) / w
			}
		}
		return grad, ys[0]
	}
	used := 0
	for k, sign := range g.Delta {
		up, down := ys[2*k], ys[2*k+1]
		if up.failed() || down.failed() {
			continue
		}
		used++
		centre += (up + down) / 2
		for j := range grad {
			grad[j] += float64(up-down) / (2 * g.Width) * sign[j]
		}
	}
	if used == 0 {
		return grad, loss(math.Inf(1))
	}
	for j := range grad {
		grad[j] /= float64(used)
	}
	return grad, centre / loss(used)
}

// move takes the step for one finished round, or ends the leg.
func (g *gradient) move(xs [][]float64, ys []loss) {
	grad, centre := g.slope(xs, ys)
	norm := 0.0
	for _, v := range grad {
		norm = math.Hypot(norm, v)
	}
	if norm == 0 && centre.failed() {
		g.begin()
		return
	}
	if centre < g.BestY {
		g.BestX, g.BestY, g.Bad = slices.Clone(g.X), centre, 0
	} else if g.Bad++; g.Bad >= g.patience() {
		// Too fast for this valley: back to its best point at half the speed.
		g.Rate, g.Bad = g.Rate/2, 0
		g.X = slices.Clone(g.BestX)
		clear(g.V)
		if g.Rate < 1e-4*g.p.set["learning_rate"] {
			g.begin()
		}
		return
	}
	if norm == 0 {
		g.begin()
		return
	}
	g.T++
	if g.Scale == 0 {
		g.Scale = norm
	}
	g.update(grad)
}

func (g *gradient) patience() int {
	if g.p.noisy {
		return 10
	}
	return 3
}

func (g *gradient) update(grad []float64) {
	b1, b2 := g.p.set["beta1"], g.p.set["beta2"]
	for j, v := range grad {
		var step float64
		// In units of the leg's first slope; a cliff must not throw the search away.
		v = min(max(v/g.Scale, -steepest), steepest)
		if g.adam {
			g.V[j] = b1*g.V[j] + (1-b1)*v
			g.S[j] = b2*g.S[j] + (1-b2)*v*v
			step = g.Rate * g.V[j] / (1 - math.Pow(b1, float64(g.T))) / (math.Sqrt(g.S[j]/(1-math.Pow(b2, float64(g.T)))) + 1e-12)
		} else {
			g.V[j] = g.p.set["momentum"]*g.V[j] + v
			step = g.Rate * g.V[j]
		}
		x := g.X[j] - step
		if g.X[j] = clamp01(x); g.X[j] != x {
			g.V[j] = 0 // at a wall
		}
	}
}

func (g *gradient) check() error {
	bad := len(g.Design) > 64 || g.T < 0 || g.Legs < 0 || g.Legs > MaxBudget || !(g.Rate >= 0 && g.Rate <= 1) ||
		!(g.Scale >= 0) || !finite(g.Scale) || !g.BestY.valid() || g.Bad < 0 || !(g.Width >= 0 && g.Width <= 1)
	for _, s := range g.Design {
		bad = bad || !validPoint(s.U, g.p.d) || !s.Y.valid()
	}
	if g.Legs > 0 {
		bad = bad || len(g.Design) == 0 || !validPoint(g.X, g.p.d) || !validPoint(g.BestX, g.p.d) ||
			len(g.V) != g.p.d || len(g.S) != g.p.d || !finite(g.V...) || !finite(g.S...) || g.Width == 0 ||
			slices.ContainsFunc(g.S, func(x float64) bool { return x < 0 })
	} else {
		bad = bad || g.Design != nil
	}
	for _, s := range g.Delta {
		bad = bad || len(s) != g.p.d || !finite(s...)
	}
	if bad || g.spsa() != (g.Delta != nil) && g.Legs > 0 || len(g.Delta) > spsaPairs {
		return errors.New("descent state is out of range")
	}
	return nil
}

// width is the number of points of a round, for a restored batch to check against.
func (g *gradient) width() int {
	switch {
	case g.Legs == 0:
		return g.designSize()
	case g.Delta != nil:
		return 2 * len(g.Delta)
	}
	return g.p.d + 1
}

func (g *gradient) fresh() bool { return g.Design == nil }
