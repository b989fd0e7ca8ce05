package algorithms

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
)

// maxModelled is the most observations the surrogate of bayes looks at; the cost of a
// trial grows with its cube.
const maxModelled = 300

// bayes is Bayesian optimisation: a Gaussian process on warped losses, and the trial
// with the highest expected improvement (Jones, Schonlau and Welch 1998). Pending trials
// count as observed at their predicted mean (Ginsbourger's kriging believer), which
// keeps parallel trials apart. Beyond maxModelled observations the worst are forgotten
// in favour of the best third and the most recent.
type bayes struct {
	p        *problem
	Proposed int
	Told     int
	Xs       [][]float64
	Ys       []loss
	Open     []open
	Theta    []float64 // log lengthscales and log noise, at the last fit
	NextFit  int       // observations at which to fit again
}

type open struct {
	Tag int
	U   []float64
}

func (b *bayes) designSize() int {
	if n := int(b.p.set["initial"]); n > 0 {
		return n
	}
	return min(max(b.p.d+3, 5), max(b.p.budget/2, 1), 40)
}

func (b *bayes) next(r *rand.Rand) ([]float64, int, bool) {
	b.Proposed++
	u := b.p.space.canonical(b.choose(r))
	b.Open = append(b.Open, open{b.Proposed, u})
	return u, b.Proposed, true
}

func (b *bayes) choose(r *rand.Rand) []float64 {
	ok := 0
	for _, y := range b.Ys {
		if !y.failed() {
			ok++
		}
	}
	if b.Proposed <= b.designSize() || ok < 2 {
		return b.p.design(b.Proposed - 1)
	}
	g := b.model()
	best := b.incumbent(g)
	const believed = 64 // of the pending trials, the latest
	for _, o := range b.Open[max(0, len(b.Open)-believed):] {
		g.believe(o.U)
	}
	return b.maximise(r, g, best)
}

// model conditions a process on the observations, fitting its scales when due.
func (b *bayes) model() *process {
	g := &process{p: b.p, inv: make([]float64, b.p.d), xs: slices.Clone(b.Xs), z: warp(b.Ys)}
	if len(b.Xs) >= b.NextFit || b.Theta == nil {
		fresh := make([]float64, b.p.d+1)
		for j := range b.p.d {
			fresh[j] = math.Log(scalePrior) + 0.5*math.Log(float64(b.p.d))
		}
		fresh[b.p.d] = math.Log(quietNoise)
		if b.p.noisy {
			fresh[b.p.d] = math.Log(0.05)
		}
		if b.Theta == nil {
			b.Theta = slices.Clone(fresh)
		}
		y := g.fit(b.Theta, 25)
		if len(b.Xs) < 60 { // while fits are cheap, escape a bad local maximum
			if fy := g.fit(fresh, 25); fy > y {
				b.Theta = fresh
			}
		}
		b.NextFit = len(b.Xs) + max(1, len(b.Xs)/8)
	}
	for j := range g.inv {
		g.inv[j] = math.Exp(-b.Theta[j])
	}
	g.noise = math.Exp(b.Theta[b.p.d])
	g.condition()
	return g
}

// incumbent is the level to improve on: the best warped loss or, as that is a lucky
// draw when losses are noisy, the lowest predicted mean at an observed point.
func (b *bayes) incumbent(g *process) float64 {
	best := slices.Min(g.z)
	if b.p.noisy {
		best = math.Inf(1)
		for _, x := range g.xs {
			mean, _ := g.predict(x, nil, nil)
			best = min(best, mean)
		}
	}
	return best
}

// warp maps losses to standardised model targets: the logarithm of the distance to just
// below the best, so that a few terrible settings do not flatten the good region, and
// progress near the optimum stays visible. A failure counts as the worst success.
func warp(ys []loss) []float64 {
	z := make([]float64, len(ys))
	var good []float64
	for _, y := range ys {
		if !y.failed() {
			good = append(good, float64(y))
		}
	}
	slices.Sort(good)
	n := len(good)
	floor := (good[n/2] - good[0]) * warpShift
	for i, y := range ys {
		v := min(float64(y), good[n-1])
		if floor > 0 {
			v = math.Log1p(min((v-good[0])/floor, 1e12))
		}
		z[i] = v
	}
	return standardise(z)
}

// warpShift is how far below the best loss the logarithm has its pole, as a share of
// the distance from the best to the median.
const warpShift = 1.0

func standardise(z []float64) []float64 {
	mean, sq := 0.0, 0.0
	for _, v := range z {
		mean += v / float64(len(z))
	}
	for _, v := range z {
		sq += (v - mean) * (v - mean) / float64(len(z))
	}
	dev := math.Sqrt(sq)
	for i := range z {
		if dev > 0 {
			z[i] = (z[i] - mean) / dev
		} else {
			z[i] = 0
		}
	}
	return z
}

// maximise searches the cube for the highest expected improvement: a scatter of points
// everywhere and around the best observations, then gradient ascent from the top few
// along the float parameters.
func (b *bayes) maximise(r *rand.Rand, g *process, best float64) []float64 {
	type candidate struct {
		u []float64
		y float64
	}
	var cs []candidate
	consider := func(u []float64) {
		u = b.p.space.canonical(u)
		cs = append(cs, candidate{u, g.logExpectedImprovement(best, u, nil)})
	}
	seed := r.Uint64()
	for i := range 120 {
		consider(sobolPoint(seed, i, b.p.d))
	}
	for _, i := range b.top(4) {
		for _, sigma := range []float64{0.1, 0.03, 0.01, 0.003, 0.001} {
			consider(b.p.perturb(r, b.Xs[i], sigma, 1))
			consider(b.p.perturb(r, b.Xs[i], sigma, 0))
		}
	}
	slices.SortStableFunc(cs, func(a, b candidate) int { return compareLoss(loss(b.y), loss(a.y)) })
	lo, hi := make([]float64, b.p.d), make([]float64, b.p.d)
	for j := range hi {
		hi[j] = 1
	}
	win := cs[0]
	for i := range 4 {
		c := cs[i]
		c.y = ascend(func(x, grad []float64) float64 { return g.logExpectedImprovement(best, x, grad) }, c.u, lo, hi, 25)
		if c.y > win.y {
			win = c
		}
	}
	return win.u
}

// top returns the indices of the n best observations.
func (b *bayes) top(n int) []int {
	idx := make([]int, len(b.Ys))
	for i := range idx {
		idx[i] = i
	}
	slices.SortStableFunc(idx, func(i, j int) int { return compareLoss(b.Ys[i], b.Ys[j]) })
	return idx[:min(n, len(idx))]
}

func (b *bayes) observe(_ *rand.Rand, tag int, u []float64, y loss) {
	b.Told++
	b.Open = slices.DeleteFunc(b.Open, func(o open) bool { return o.Tag == tag })
	b.Xs = append(b.Xs, slices.Clone(u))
	b.Ys = append(b.Ys, y)
	if len(b.Xs) > maxModelled {
		b.forget()
	}
}

// forget drops the oldest observation that is not among the best third.
func (b *bayes) forget() {
	keep := b.top(maxModelled / 3)
	for i := range b.Xs {
		if !slices.Contains(keep, i) {
			b.Xs = slices.Delete(b.Xs, i, i+1)
			b.Ys = slices.Delete(b.Ys, i, i+1)
			b.NextFit = min(b.NextFit, maxModelled+maxModelled/8)
			return
		}
	}
}

func (b *bayes) check(tags []int) error {
	if err := checkRows(b.Xs, b.Ys, b.p.d); err != nil {
		return err
	}
	bad := len(b.Xs) > maxModelled || b.Told < 0 || b.Proposed < 0 || b.Proposed > 1<<31 || b.NextFit < 0 ||
		len(b.Open) != len(tags)
	for i, o := range b.Open {
		bad = bad || !validPoint(o.U, b.p.d) || !slices.Contains(tags, o.Tag) || i > 0 && o.Tag <= b.Open[i-1].Tag
	}
	if b.Theta != nil {
		bad = bad || len(b.Theta) != b.p.d+1 || slices.ContainsFunc(b.Theta, func(t float64) bool { return !(t >= -20 && t <= 20) })
	}
	if bad {
		return errors.New("surrogate is out of range")
	}
	return nil
}
