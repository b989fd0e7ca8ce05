package algorithms

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"

	"gonum.org/v1/gonum/mat"
)

// cmaes is the covariance matrix adaptation evolution strategy, (μ/μ_w, λ) with
// rank-one and rank-μ updates as in Hansen, The CMA Evolution Strategy: A Tutorial
// (arXiv 1604.00772), and restarts in turns: large with twice the population somewhere
// new, small near the best (after BIPOP, Hansen 2009). Points that leave the cube are
// folded back at the walls and learned from where they land.
type cmaes struct {
	p      *problem
	Design []start
	Best   start
	Starts int
	Lambda int
	Mean   []float64
	Sigma  float64
	C      []float64 // d×d covariance, row by row
	Pc, Ps []float64
	Gen    int
	Gen0   int       // generations of this start without a better point
	LegY   loss      // best loss of this start
	B, D   []float64 // eigenvectors (columns) and square roots of the eigenvalues of C
}

func (c *cmaes) designSize() int { return min(max(c.p.budget/20, 4), 40) }

// weights are the recombination weights of the best half.
func (c *cmaes) weights() (w []float64, mueff float64) {
	mu := c.Lambda / 2
	w = make([]float64, mu)
	sum, sq := 0.0, 0.0
	for i := range w {
		w[i] = math.Log(float64(c.Lambda+1)/2) - math.Log(float64(i+1))
		sum += w[i]
	}
	for i := range w {
		w[i] /= sum
		sq += w[i] * w[i]
	}
	return w, 1 / sq
}

func (c *cmaes) step(r *rand.Rand, xs [][]float64, ys []loss) [][]float64 {
	if xs == nil {
		for i := range c.designSize() {
			xs = append(xs, c.p.design(i))
		}
		return xs
	}
	all := make([]start, len(xs))
	for i, x := range xs {
		all[i] = start{slices.Clone(x), ys[i]}
	}
	slices.SortStableFunc(all, func(a, b start) int { return compareLoss(a.Y, b.Y) })
	if c.Best.U == nil || all[0].Y < c.Best.Y {
		c.Best = all[0]
	}
	if c.Design == nil {
		c.Design = all
		c.begin()
	} else {
		c.update(all)
		if c.done(all) {
			c.begin()
		}
	}
	c.decompose()
	out := make([][]float64, c.Lambda)
	for i := range out {
		out[i] = c.sample(r)
	}
	return out
}

// begin starts a search.
func (c *cmaes) begin() {
	base := 4 + int(3*math.Log(float64(c.p.d)))
	switch {
	case c.Starts == 0:
		c.Mean, c.Sigma, c.Lambda = slices.Clone(c.Design[0].U), c.p.set["sigma"], base
	case c.Starts%2 == 1:
		c.Mean, c.Sigma, c.Lambda = slices.Clone(c.Best.U), 0.05, base
	default:
		c.Mean, c.Sigma = c.p.design(len(c.Design)+c.Starts), 0.3
		c.Lambda = min(base<<min(c.Starts/2, 6), max(base, c.p.budget/10), 512)
	}
	c.Starts++
	d := c.p.d
	c.C, c.Pc, c.Ps = make([]float64, d*d), make([]float64, d), make([]float64, d)
	for j := range d {
		c.C[j*d+j] = 1
	}
	c.Gen, c.Gen0, c.LegY = 0, 0, loss(math.Inf(1))
}

// decompose refreshes B and D and keeps the spread of integer parameters wide enough to
// reach the next value.
func (c *cmaes) decompose() {
	d := c.p.d
	var e mat.EigenSym
	ok := e.Factorize(mat.NewSymDense(d, slices.Clone(c.C)), true)
	c.B, c.D = make([]float64, d*d), make([]float64, d)
	if !ok { // only numerical accidents come here: forget the shape, keep the place
		clear(c.C)
		for j := range d {
			c.C[j*d+j], c.B[j*d+j], c.D[j] = 1, 1, 1
		}
		return
	}
	var vec mat.Dense
	e.VectorsTo(&vec)
	for j, v := range e.Values(nil) {
		c.D[j] = math.Sqrt(max(v, 1e-14))
		for i := range d {
			c.B[i*d+j] = vec.At(i, j)
		}
	}
}

func (c *cmaes) sample(r *rand.Rand) []float64 {
	d := c.p.d
	z := make([]float64, d)
	for j := range z {
		z[j] = r.NormFloat64() * c.D[j]
	}
	x := make([]float64, d)
	for i := range x {
		step := 0.0
		for j := range z {
			step += c.B[i*d+j] * z[j]
		}
		x[i] = c.Mean[i] + c.Sigma*step
		if n := c.p.space.params[i].bins(); n > 0 && c.Sigma*math.Sqrt(c.C[i*d+i]) < 0.3/n {
			x[i] = c.Mean[i] + r.NormFloat64()*0.3/n
		}
		x[i] = reflect01(x[i])
	}
	return x
}

// update is one generation of the tutorial's figure 6; all is sorted by loss.
func (c *cmaes) update(all []start) {
	d, n := c.p.d, float64(c.p.d)
	w, mueff := c.weights()
	cc := (4 + mueff/n) / (n + 4 + 2*mueff/n)
	cs := (mueff + 2) / (n + mueff + 5)
	c1 := 2 / ((n+1.3)*(n+1.3) + mueff)
	cmu := min(1-c1, 2*(mueff-2+1/mueff)/((n+2)*(n+2)+mueff))
	damps := 1 + 2*max(0, math.Sqrt((mueff-1)/(n+1))-1) + cs
	chi := math.Sqrt(n) * (1 - 1/(4*n) + 1/(21*n*n))

	c.Gen++
	mean := make([]float64, d)
	for k, wk := range w {
		for j := range mean {
			mean[j] += wk * all[k].U[j]
		}
	}
	y := make([]float64, d)
	for j := range y {
		y[j] = (mean[j] - c.Mean[j]) / c.Sigma
	}
	white := c.whiten(y)
	norm := 0.0
	for j := range white {
		c.Ps[j] = (1-cs)*c.Ps[j] + math.Sqrt(cs*(2-cs)*mueff)*white[j]
		norm = math.Hypot(norm, c.Ps[j])
	}
	hs := 0.0
	if norm/math.Sqrt(1-math.Pow(1-cs, 2*float64(c.Gen)))/chi < 1.4+2/(n+1) {
		hs = 1
	}
	for j := range y {
		c.Pc[j] = (1-cc)*c.Pc[j] + hs*math.Sqrt(cc*(2-cc)*mueff)*y[j]
	}
	old := 1 - c1 - cmu + (1-hs)*c1*cc*(2-cc)
	for i := range d {
		for j := range i + 1 {
			v := old*c.C[i*d+j] + c1*c.Pc[i]*c.Pc[j]
			for k, wk := range w {
				v += cmu * wk * (all[k].U[i] - c.Mean[i]) / c.Sigma * (all[k].U[j] - c.Mean[j]) / c.Sigma
			}
			c.C[i*d+j], c.C[j*d+i] = v, v
		}
	}
	c.Mean = mean
	c.Sigma = min(max(c.Sigma*math.Exp(min(1, cs/damps*(norm/chi-1))), 1e-12), 1)
}

// whiten returns C^(-1/2)·y.
func (c *cmaes) whiten(y []float64) []float64 {
	d := len(y)
	out := make([]float64, d)
	for j := range d {
		dot := 0.0
		for i := range d {
			dot += c.B[i*d+j] * y[i]
		}
		dot /= c.D[j]
		for i := range d {
			out[i] += c.B[i*d+j] * dot
		}
	}
	return out
}

// done ends a search that has converged, stalled or lost its shape.
func (c *cmaes) done(all []start) bool {
	if all[0].Y < c.LegY {
		c.LegY, c.Gen0 = all[0].Y, 0
	} else {
		c.Gen0++
	}
	size, shape := 0.0, true
	for j := range c.p.d {
		v := c.C[j*c.p.d+j]
		size = max(size, c.Sigma*math.Sqrt(v))
		shape = shape && v > 0 && v < 1e14
	}
	shape = shape && finite(c.Sigma) && finite(c.C...) && finite(c.Pc...) && finite(c.Ps...)
	return !shape || size < 1e-7 || c.Gen0 > 10+30*c.p.d/c.Lambda
}

func (c *cmaes) check() error {
	d := c.p.d
	bad := c.Starts < 0 || c.Starts > MaxBudget || len(c.Design) > 64
	for _, v := range c.Design {
		bad = bad || !validPoint(v.U, d) || !v.Y.valid()
	}
	if len(c.Design) > 0 && !bad {
		bad = !validPoint(c.Best.U, d) || !c.Best.Y.valid() || c.Starts < 1 || c.Lambda < 4 || c.Lambda > 1024 ||
			!validPoint(c.Mean, d) || !(c.Sigma >= 1e-13 && c.Sigma <= 1) || len(c.C) != d*d || len(c.Pc) != d ||
			len(c.Ps) != d || len(c.B) != d*d || len(c.D) != d || c.Gen < 0 || c.Gen0 < 0 || !c.LegY.valid() ||
			!finite(slices.Concat(c.C, c.Pc, c.Ps, c.B, c.D)...) ||
			slices.ContainsFunc(c.D, func(x float64) bool { return !(x >= 1e-8) })
	}
	if bad {
		return errors.New("evolution strategy is out of range")
	}
	return nil
}

func (c *cmaes) width() int {
	if len(c.Design) == 0 {
		return c.designSize()
	}
	return c.Lambda
}

func (c *cmaes) fresh() bool { return len(c.Design) == 0 }
