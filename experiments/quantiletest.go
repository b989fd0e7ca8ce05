package experiments

import (
	"math"
	"slices"

	"gonum.org/v1/gonum/mathext"
)

// CompareQuantiles returns the log of an e-value against "the treatment's quantile of
// the given level is not above (1+margin) times the control's": exact for independent
// values of any distribution and always valid, so it ever reaches ln(1/α) with
// probability at most α; Tuning is the number of units per arm at which it is most
// sensitive. It may be negative; over strata the logs add. Values a sketch cannot tell
// apart count for the null, so differences below 2 % are not seen. An empty arm gives 0.
//
// level lies in (0, 1) and margin in (−1, 1e6]; errors have kind Invalid. Source: the
// quantile A/B test of Howard and Ramdas, Sequential estimation of quantiles (2022), as
// in confseq, made one-sided: the product of both arms' mixture martingales at the
// least favourable common value.
func CompareQuantiles(control, treatment Quantiles, level, margin float64, s Sequence) (logE float64, err error) {
	if err := checkLevel("quantile", level); err != nil {
		return 0, err
	}
	if err := s.Check(); err != nil {
		return 0, err
	}
	if !(margin > -1 && margin <= 1e6) {
		return 0, invalid("margin is %v; it lies in (-1, 1e6]", margin)
	}
	if control.N() == 0 || treatment.N() == 0 {
		return 0, nil
	}
	return quantileEvidence(control.bins(1+margin), treatment.bins(1), level, s), nil
}

// bin counts values known to lie between low and high.
type bin struct{ low, high, count float64 }

// bins returns the non-empty bins in ascending order, scaled.
func (q Quantiles) bins(scale float64) []bin {
	out := make([]bin, 0, 64)
	q.sketch.ForEach(func(value, count float64) bool {
		if count > 0 {
			out = append(out, bin{scale * value / (1 + SketchAccuracy), scale * value / (1 - SketchAccuracy), count})
		}
		return false
	})
	slices.SortFunc(out, func(a, b bin) int {
		switch {
		case a.low < b.low:
			return -1
		case a.low > b.low:
			return 1
		}
		return 0
	})
	out[0].low = 0 // the lowest bin also holds what was collapsed into it
	return out
}

// quantileEvidence minimises over v the evidence that a's quantile is below v plus the
// evidence that b's is above v. Under the null some v makes both false, and there each
// term is at most that arm's log martingale.
func quantileEvidence(a, b []bin, level float64, s Sequence) float64 {
	below, above := newRankEvidence(a, level, s), newRankEvidence(b, level, s)
	least := below.atLeast(0) + above.atMost(0)
	// The second term falls where a bin of b begins, the first only rises: these points
	// are the only candidates.
	i, surely, maybe := 0, 0.0, 0.0
	for _, x := range b {
		for i < len(a) && a[i].high < x.low {
			surely += a[i].count
			i++
		}
		maybe += x.count
		least = min(least, below.atLeast(surely)+above.atMost(maybe))
	}
	return least
}

// rankEvidence is the log martingale of one arm for "v is the quantile" as a function
// of the number of values at or below v. It is convex; cutting it at its least value
// makes it one-sided.
type rankEvidence struct{ n, level, c, mode float64 }

func newRankEvidence(bins []bin, level float64, s Sequence) rankEvidence {
	r := rankEvidence{level: level, c: s.concentration()}
	for _, b := range bins {
		r.n += b.count
	}
	// The least value is within one of level·n + ½ − level.
	guess := math.Floor(level*r.n + .5 - level)
	r.mode = guess
	for k := max(0, guess-2); k <= min(r.n, guess+2); k++ {
		if r.at(k) < r.at(r.mode) {
			r.mode = k
		}
	}
	return r
}

func (r rankEvidence) at(k float64) float64 { return betaMixture(k, r.n, r.level, r.c) }

func (r rankEvidence) atLeast(k float64) float64 { return r.at(max(k, r.mode)) }
func (r rankEvidence) atMost(k float64) float64  { return r.at(min(k, r.mode)) }

// binomialBand returns the counts lo..hi of n values at or below a quantile that a
// binomial variable leaves on neither side with more than alpha/2.
func binomialBand(n uint64, level, alpha float64) (lo, hi uint64) {
	f := float64(n)
	cdf := func(k float64) float64 {
		switch {
		case k < 0:
			return 0
		case k >= f:
			return 1
		}
		return mathext.RegIncBeta(f-k, k+1, 1-level)
	}
	// The least k whose CDF reaches p, by bisection.
	least := func(reached func(float64) bool) float64 {
		no, yes := -1.0, f
		for yes-no > 1 {
			if mid := math.Floor((no + yes) / 2); reached(mid) {
				yes = mid
			} else {
				no = mid
			}
		}
		return yes
	}
	lo = uint64(least(func(k float64) bool { return cdf(k) > alpha/2 }))
	hi = uint64(least(func(k float64) bool { return cdf(k) >= 1-alpha/2 }))
	return lo, hi
}
