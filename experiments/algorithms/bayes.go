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
	Typical  *float64  // median loss of the initial design
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
	if b.Proposed <= b.designSize() || len(succeeded(b.Ys)) < 2 {
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
	g := &process{p: b.p, inv: make([]float64, b.p.d), xs: slices.Clone(b.Xs), z: b.targets()}
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

// targets are the warped losses. The scale of the warp follows the observations, so it
// sharpens as they gather near the optimum; with noise that would end in a magnified
// picture of the noise at whichever point was sampled most, so there the scale stays at
// that of the initial design.
func (b *bayes) targets() []float64 {
	if b.p.noisy && b.Typical != nil {
		return warp(b.Ys, *b.Typical)
	}
	good := succeeded(b.Ys)
	return warp(b.Ys, good[len(good)/2])
}

// succeeded returns the losses of the successes, ascending.
func succeeded(ys []loss) (good []float64) {
	for _, y := range ys {
		if !y.failed() {
			good = append(good, float64(y))
		}
	}
	slices.Sort(good)
	return good
}

// warp maps losses to standardised model targets: the logarithm of the distance to below
// the best, so that a few terrible settings do not flatten the good region, and progress
// near the optimum stays visible. The pole of the logarithm lies as far below the best as
// the typical loss lies above it. A failure counts as the worst success.
func warp(ys []loss, typical float64) []float64 {
	z := make([]float64, len(ys))
	good := succeeded(ys)
	floor := typical - good[0]
	for i, y := range ys {
		z[i] = min(float64(y), good[len(good)-1])
		if floor > 0 {
			z[i] = math.Log1p(min((z[i]-good[0])/floor, 1e12))
		}
	}
	return standardise(z)
}

// standardise brings z to mean zero and variance one, in place; a constant to zero.
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
	for _, c := range cs[:3] {
		c.y = ascend(func(x, grad []float64) float64 { return g.logExpectedImprovement(best, x, grad) }, c.u, lo, hi, 20)
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
	if good := succeeded(b.Ys); b.Told == b.designSize() && len(good) > 0 {
		b.Typical = &good[len(good)/2]
	}
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
	bad = bad || b.Typical != nil && !(math.Abs(*b.Typical) <= maxLoss)
	if b.Theta != nil {
		bad = bad || len(b.Theta) != b.p.d+1 || slices.ContainsFunc(b.Theta, func(t float64) bool { return !(t >= -20 && t <= 20) })
	}
	if bad {
		return errors.New("surrogate is out of range")
	}
	return nil
}
