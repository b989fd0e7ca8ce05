package experiments

import (
	"math"

	"gonum.org/v1/gonum/integrate/quad"
)

// OBrienFlemingSpending returns the part of a two-sided alpha that may be spent up to
// the information fraction t: on either side 2 − 2Φ(z_{α/4}/√t), so 4 − 4Φ(z_{α/4}/√t)
// in all. It is 0 at t = 0 and alpha from t = 1. Source: Lan and DeMets, Discrete
// sequential boundaries for clinical trials (1983), with alpha/2 as their one-sided
// level, as published tables and software have it.
func OBrienFlemingSpending(alpha, t float64) float64 {
	switch {
	case !(t > 0):
		return 0
	case t >= 1:
		return alpha
	}
	return 2 * twoSidedNormal(upperNormal(alpha/4)/math.Sqrt(t))
}

// Boundaries returns for each look the |z| at or above which to stop, such that under
// no effect the looks together stop with probability alpha (two-sided), spent by
// OBrienFlemingSpending. fractions are the looks' information fractions, ascending in
// (0, 1] by at least 1e-4; only past looks matter to a boundary, so they need not be planned. A boundary
// is 40, which nothing crosses, where less than 1e-14 may be spent. Errors have kind Invalid; at most 1 000
// looks. The boundaries come from numerical integration over the paths that have not
// stopped (Armitage, McPherson and Rowe 1969; Jennison and Turnbull 2000, ch. 19).
func Boundaries(alpha float64, fractions []float64) ([]float64, error) {
	if err := checkLevel("alpha", alpha); err != nil {
		return nil, err
	}
	if err := checkFractions(fractions); err != nil {
		return nil, err
	}
	out := make([]float64, len(fractions))
	w := newWalk(0)
	spent := 0.0
	for i, t := range fractions {
		spend := OBrienFlemingSpending(alpha, t) - spent
		w.advance(t)
		out[i] = neverCrossed
		if spend >= 1e-14 {
			out[i] = w.boundary(spend)
			spent += spend
		}
		w.stop(out[i])
	}
	return out, nil
}

// CrossingProbabilities returns the probability of stopping first at each look, for
// boundaries |z| ≥ b at the given information fractions, when z at full information has
// mean drift. Errors have kind Invalid.
func CrossingProbabilities(boundaries, fractions []float64, drift float64) ([]float64, error) {
	if len(boundaries) != len(fractions) {
		return nil, invalid("%d boundaries for %d looks", len(boundaries), len(fractions))
	}
	if err := checkFractions(fractions); err != nil {
		return nil, err
	}
	if !(math.Abs(drift) <= 100) {
		return nil, invalid("drift is %v; it lies in [-100, 100] standard errors", drift)
	}
	out := make([]float64, len(fractions))
	w := newWalk(drift)
	for i, t := range fractions {
		if !(boundaries[i] > 0) {
			return nil, invalid("boundary %d is %v; boundaries are above 0", i, boundaries[i])
		}
		w.advance(t)
		out[i] = w.beyond(boundaries[i])
		w.stop(boundaries[i])
	}
	return out, nil
}

// neverCrossed is a boundary in standard errors beyond all probability.
const neverCrossed = 40.0

// minLookGap is how close looks may be: closer would need a finer grid than is used.
const minLookGap = 1e-4

func checkFractions(fractions []float64) error {
	if len(fractions) > 1000 {
		return invalid("%d looks; the limit is 1000", len(fractions))
	}
	last := 0.0
	for i, t := range fractions {
		if !(t-last >= minLookGap && t <= 1) {
			return invalid("look %d is at information fraction %v after %v; fractions ascend in (0, 1] by at least %v", i+1, t, last, minLookGap)
		}
		last = t
	}
	return nil
}

// walk is the distribution of a Brownian motion with drift over the paths that no look
// has stopped, as weights on the nodes of a Gauss–Legendre rule.
type walk struct {
	drift, now, next float64
	x, w             []float64 // positions and probability weights at now
}

func newWalk(drift float64) *walk { return &walk{drift: drift, x: []float64{0}, w: []float64{1}} }

// advance announces the time of the next look.
func (k *walk) advance(t float64) { k.now, k.next = k.next, t }

// beyond is the probability of being at |z| ≥ b at the next look.
func (k *walk) beyond(b float64) float64 {
	dt := k.next - k.now
	sd, edge, sum := math.Sqrt(dt), b*math.Sqrt(k.next), 0.0
	for i, x := range k.x {
		mean := x + k.drift*dt
		sum += k.w[i] * (math.Erfc((edge-mean)/(sd*math.Sqrt2)) + math.Erfc((edge+mean)/(sd*math.Sqrt2))) / 2
	}
	return sum
}

// boundary finds the b with beyond(b) = p, on the scale of logarithms, where the tail is
// nearly quadratic.
func (k *walk) boundary(p float64) float64 {
	f := func(b float64) float64 { return math.Log(p) - math.Log(k.beyond(b)) }
	hi := min(upperNormal(p/2), neverCrossed) // paths that stopped before only lower it
	lo := hi
	for lo > 0 && f(lo) > 0 {
		hi, lo = lo, max(0, lo-.25)
	}
	return root(f, lo, hi)
}

// root finds the zero of an increasing function between lo and hi by false position
// with the Illinois weighting.
func root(f func(float64) float64, lo, hi float64) float64 {
	flo, fhi := f(lo), f(hi)
	side := 0
	for range 100 {
		if hi-lo < 1e-10 {
			break
		}
		x := lo - (hi-lo)*flo/(fhi-flo)
		if !(x > lo && x < hi) {
			x = (lo + hi) / 2
		}
		y := f(x)
		switch {
		case math.Abs(y) < 1e-10:
			return x
		case y < 0:
			lo, flo = x, y
			if side < 0 {
				fhi /= 2
			}
			side = -1
		default:
			hi, fhi = x, y
			if side > 0 {
				flo /= 2
			}
			side = 1
		}
	}
	return (lo + hi) / 2
}

// stop moves to the next look and drops the paths at |z| ≥ b.
func (k *walk) stop(b float64) {
	dt := k.next - k.now
	sd := math.Sqrt(dt)
	// Nothing that matters is farther than 8.5 standard deviations out.
	mean := k.drift * k.next
	far := 8.5 * math.Sqrt(k.next)
	edge := b * math.Sqrt(k.next)
	lo, hi := max(-edge, mean-far), min(edge, mean+far)
	if lo >= hi {
		k.x, k.w = nil, nil
		return
	}
	// The density is smooth on the scale of one step; so many nodes per step keep the
	// rule's error below 1e-9. Very unequal steps are capped.
	n := int(min(max(24, 4*(hi-lo)/sd+16), 800))
	x, w := make([]float64, n), make([]float64, n)
	quad.Legendre{}.FixedLocations(x, w, lo, hi)
	norm := 1 / (sd * math.Sqrt(2*math.Pi))
	for i := range x {
		density := 0.0
		for j, from := range k.x {
			d := (x[i] - from - k.drift*dt) / sd
			if d < 9 && d > -9 {
				density += k.w[j] * math.Exp(-d*d/2)
			}
		}
		w[i] *= density * norm
	}
	k.x, k.w = x, w
}
