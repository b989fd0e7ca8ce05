package experiments

import (
	"math"

	"gonum.org/v1/gonum/mathext"
)

// betaMixture is the log of the beta-binomial mixture martingale for a proportion p
// after k of n successes: M = B(a+k, b+n−k) / (B(a,b) p^k (1−p)^(n−k)), with the prior
// centred at p, a = c·p and b = c·(1−p). Under p it is a martingale from 1, so by Ville's
// inequality it ever reaches 1/α with probability at most α.
func betaMixture(k, n, p, c float64) float64 {
	a, b := c*p, c*(1-p)
	return mathext.Lbeta(a+k, b+n-k) - mathext.Lbeta(a, b) - xlogy(k, p) - xlogy(n-k, 1-p)
}

func xlogy(x, y float64) float64 {
	if x == 0 {
		return 0
	}
	return x * math.Log(y)
}

// concentration is the prior's for the given tuning. Source: Howard, Ramdas, McAuliffe
// and Sekhon, Time-uniform, nonparametric, nonasymptotic confidence sequences (2021),
// as in their library confseq, whose prior has this form for every p.
func (s Sequence) concentration() float64 {
	l := -2 * math.Log(s.Alpha)
	return max(s.Tuning/(l+math.Log1p(l))-1, 1e-3)
}

// Proportion returns the confidence sequence of one proportion: exact at every n from
// 1, for gates that are watched. Tuning is the number of units at which it is tightest.
// Errors have kind Invalid.
func (s Sequence) Proportion(successes, n uint64) (Interval, error) {
	if err := s.Check(); err != nil {
		return Interval{}, err
	}
	if err := checkCount(successes, n, s.Alpha); err != nil {
		return Interval{}, err
	}
	k, f, c, limit := float64(successes), float64(n), s.concentration(), -math.Log(s.Alpha)
	inside := func(p float64) bool { return betaMixture(k, f, p, c) < limit }
	out := Interval{0, 1}
	if successes > 0 {
		out.Low = edge(k/f, 0, inside)
	}
	if successes < n {
		out.High = edge(k/f, 1, inside)
	}
	return out, nil
}

// edge bisects from a point inside to an end that may be outside, and returns the
// first point found outside, so that rounding widens the interval.
func edge(in, out float64, inside func(float64) bool) float64 {
	for range 100 {
		mid := (in + out) / 2
		if mid == in || mid == out {
			break
		}
		if inside(mid) {
			in = mid
		} else {
			out = mid
		}
	}
	return out
}

// rankBand returns the ranks a quantile of the given level may have among n values:
// the counts k of values at or below it with mixture below 1/α. lo is the least and hi
// the greatest such count.
func (s Sequence) rankBand(level float64, n uint64) (lo, hi uint64) {
	f, c, limit := float64(n), s.concentration(), -math.Log(s.Alpha)
	inside := func(k float64) bool { return betaMixture(k, f, level, c) < limit }
	mode := math.Round(level * f)
	return uint64(farthest(mode, 0, inside)), uint64(farthest(mode, f, inside))
}

// TwoByTwo is the e-process of Turner, Ly and Grünwald (Generic E-variables for exact
// sequential k-sample tests that allow for optional stopping, 2021) for "both arms have
// the same success probability". It is exact from the first unit, whatever that
// probability is and however it is watched: E ever reaches 1/α with probability at most
// α if the arms are alike. It costs about twice the units of the asymptotic sequence.
//
// Its value depends on how units are blocked, so it is a state that one writer keeps
// per stratum; over strata the values multiply. The zero value is ready to use.
type TwoByTwo struct {
	ControlK, ControlN, TreatmentK, TreatmentN uint64
	LogE                                       float64
}

// twoByTwoPrior is Beta(0.18, 0.18) for either arm, which the authors found to lose
// least in the worst case.
const twoByTwoPrior = 0.18

// Add adds the units that arrived since the last call. The block's sizes must not
// depend on its outcomes (a tick of the clock does not). A block with units in one arm
// only teaches the process but is no evidence. Errors have kind Invalid and change
// nothing. It does not allocate unless it fails.
func (e *TwoByTwo) Add(controlK, controlN, treatmentK, treatmentN uint64) error {
	if controlK > controlN || treatmentK > treatmentN || controlN > maxCount || treatmentN > maxCount {
		return invalid("%d of %d and %d of %d successes; successes are at most the units, units at most 2^40", controlK, controlN, treatmentK, treatmentN)
	}
	c := (float64(e.ControlK) + twoByTwoPrior) / (float64(e.ControlN) + 2*twoByTwoPrior)
	t := (float64(e.TreatmentK) + twoByTwoPrior) / (float64(e.TreatmentN) + 2*twoByTwoPrior)
	n, m := float64(controlN), float64(treatmentN)
	if n+m > 0 {
		// The least favourable common probability for a block of these sizes.
		null := (n*c + m*t) / (n + m)
		k, l := float64(controlK), float64(treatmentK)
		e.LogE += k*math.Log(c/null) + (n-k)*math.Log((1-c)/(1-null)) +
			l*math.Log(t/null) + (m-l)*math.Log((1-t)/(1-null))
	}
	e.ControlK, e.ControlN = e.ControlK+controlK, e.ControlN+controlN
	e.TreatmentK, e.TreatmentN = e.TreatmentK+treatmentK, e.TreatmentN+treatmentN
	return nil
}

// E returns the e-value, capped at 1e300; 1 is no evidence, ≥ 1/α is enough at α.
func (e TwoByTwo) E() float64 { return eValue(e.LogE) }

// P returns the always-valid p-value min(1, 1/E).
func (e TwoByTwo) P() float64 { return math.Exp(-max(0, e.LogE)) }

// Check reports a state that no sequence of Add gives, with kind Invalid.
func (e TwoByTwo) Check() error {
	if e.ControlK > e.ControlN || e.TreatmentK > e.TreatmentN || !finite(e.LogE) {
		return invalid("e-process has %d of %d and %d of %d successes and log e-value %v", e.ControlK, e.ControlN, e.TreatmentK, e.TreatmentN, e.LogE)
	}
	return nil
}

func eValue(log float64) float64 { return min(math.Exp(log), 1e300) }
