package experiments

import (
	"math"

	"gonum.org/v1/gonum/mathext"
	"gonum.org/v1/gonum/stat/distuv"
)

// maxCount bounds the units of exact tests: above, counts are no longer exact in
// double precision arithmetic on log-factorials.
const maxCount = 1 << 40

// Wilson returns the score interval of a proportion at level 1−alpha, the one to
// display. Source: Wilson (1927). Errors have kind Invalid: n = 0, successes > n, alpha.
func Wilson(successes, n uint64, alpha float64) (Interval, error) {
	if err := checkCount(successes, n, alpha); err != nil {
		return Interval{}, err
	}
	p, f, z := float64(successes)/float64(n), float64(n), upperNormal(alpha/2)
	mid := (p + z*z/(2*f)) / (1 + z*z/f)
	half := z / (1 + z*z/f) * math.Sqrt(p*(1-p)/f+z*z/(4*f*f))
	return Interval{max(0, mid-half), min(1, mid+half)}, nil
}

// ClopperPearson returns the exact interval of a proportion at level ≥ 1−alpha, the one
// to gate on at a fixed number of units. For a one-sided bound pass 2·alpha. Source:
// Clopper and Pearson (1934). Errors have kind Invalid.
func ClopperPearson(successes, n uint64, alpha float64) (Interval, error) {
	if err := checkCount(successes, n, alpha); err != nil {
		return Interval{}, err
	}
	k, f := float64(successes), float64(n)
	out := Interval{0, 1}
	switch successes { // the ends have closed forms
	case 0:
		out.High = -math.Expm1(math.Log(alpha/2) / f)
		if n == 1 {
			out.High = 1 - alpha/2
		}
		return out, nil
	case n:
		out.Low = math.Exp(math.Log(alpha/2) / f)
		return out, nil
	}
	out.Low = mathext.InvRegIncBeta(k, f-k+1, alpha/2)
	out.High = 1 - mathext.InvRegIncBeta(f-k, k+1, alpha/2)
	return out, nil
}

// Newcombe returns the interval of the difference of two proportions, treatment minus
// control, from their Wilson intervals. Source: Newcombe (1998), method 10. Errors have
// kind Invalid.
func Newcombe(controlK, controlN, treatmentK, treatmentN uint64, alpha float64) (Interval, error) {
	c, err := Wilson(controlK, controlN, alpha)
	if err != nil {
		return Interval{}, err
	}
	t, err := Wilson(treatmentK, treatmentN, alpha)
	if err != nil {
		return Interval{}, err
	}
	pc, pt := float64(controlK)/float64(controlN), float64(treatmentK)/float64(treatmentN)
	return Interval{
		Low:  pt - pc - math.Hypot(pt-t.Low, c.High-pc),
		High: pt - pc + math.Hypot(t.High-pt, pc-c.Low),
	}, nil
}

// PooledZ tests two proportions for equality at a fixed horizon: z of treatment minus
// control with the pooled variance, and its two-sided p. All successes or none give
// z = 0, p = 1. Errors have kind Invalid.
func PooledZ(controlK, controlN, treatmentK, treatmentN uint64) (z, p float64, err error) {
	if err := checkCounts(controlK, controlN, treatmentK, treatmentN); err != nil {
		return 0, 0, err
	}
	n, m := float64(controlN), float64(treatmentN)
	pool := (float64(controlK) + float64(treatmentK)) / (n + m)
	v := pool * (1 - pool) * (1/n + 1/m)
	if v == 0 {
		return 0, 1, nil
	}
	z = (float64(treatmentK)/m - float64(controlK)/n) / math.Sqrt(v)
	return z, twoSidedNormal(z), nil
}

// Fisher is the exact two-sided test of two proportions for equality: the probability
// of all tables with the same margins that are no more likely than the one seen. Errors
// have kind Invalid. It takes O(√n) steps.
func Fisher(controlK, controlN, treatmentK, treatmentN uint64) (p float64, err error) {
	if err := checkCounts(controlK, controlN, treatmentK, treatmentN); err != nil {
		return 0, err
	}
	h := hypergeometric{float64(controlN), float64(treatmentN), float64(controlK) + float64(treatmentK)}
	lo, hi := max(0, h.k-h.m), min(h.n, h.k)
	seen := h.logP(float64(controlK)) + 1e-7 // tables as likely as this one count, whatever rounding says
	mode := min(max(math.Floor((h.n+1)*(h.k+1)/(h.n+h.m+2)), lo), hi)
	// On either side of the mode the probability falls, so the tables that count are
	// two tails; find where each begins, then add outwards.
	left := farthest(mode, lo, func(x float64) bool { return h.logP(x) > seen })
	right := farthest(mode, hi, func(x float64) bool { return h.logP(x) > seen })
	if left == right && h.logP(mode) <= seen { // the mode itself was seen
		return 1, nil
	}
	return min(1, h.tail(left-1, lo, -1)+h.tail(right+1, hi, 1)), nil
}

// farthest returns the last whole x going from start towards end for which in holds,
// given that it holds up to some point and not after. It returns start if never.
func farthest(start, end float64, in func(float64) bool) float64 {
	if in(end) {
		return end
	}
	yes, no := start, end
	for math.Abs(no-yes) > 1 {
		if mid := math.Trunc((yes + no) / 2); in(mid) {
			yes = mid
		} else {
			no = mid
		}
	}
	return yes
}

// hypergeometric counts the control's successes when k of n+m units succeeded.
type hypergeometric struct{ n, m, k float64 }

func (h hypergeometric) logP(x float64) float64 {
	return logChoose(h.n, x) + logChoose(h.m, h.k-x) - logChoose(h.n+h.m, h.k)
}

func (h hypergeometric) tail(from, to, step float64) float64 {
	if (to-from)*step < 0 {
		return 0
	}
	p := math.Exp(h.logP(from))
	sum := p
	for x := from; x != to && p > sum*1e-17; x += step {
		if step > 0 {
			p *= (h.n - x) / (x + 1) * (h.k - x) / (h.m - h.k + x + 1)
		} else {
			p *= x / (h.n - x + 1) * (h.m - h.k + x) / (h.k - x + 1)
		}
		sum += p
	}
	return sum
}

func logChoose(n, k float64) float64 {
	if k == 0 || k == n {
		return 0
	}
	return -mathext.Lbeta(k+1, n-k+1) - math.Log(n+1)
}

// WelchT tests two means for equality at a fixed horizon: t, its two-sided p with the
// contrast's degrees of freedom, and the interval of the difference at level 1−alpha.
// With no variance at all, t = 0 and p = 1 when the difference is 0, and the error has
// kind Invalid when it is not. Source: Welch (1947).
func WelchT(c Contrast, alpha float64) (t, p float64, ci Interval, err error) {
	if err := checkLevel("alpha", alpha); err != nil {
		return 0, 0, Interval{}, err
	}
	t = c.Z()
	if math.IsNaN(t) || !(c.DF > 0) {
		return 0, 0, Interval{}, invalid("difference %v has variance %v with %v degrees of freedom; there is nothing to test against", c.Difference, c.Variance, c.DF)
	}
	half := upperT(alpha/2, c.DF) * c.SE()
	return t, twoSidedT(t, c.DF), Interval{c.Difference - half, c.Difference + half}, nil
}

func checkCount(successes, n uint64, alpha float64) error {
	if err := checkLevel("alpha", alpha); err != nil {
		return err
	}
	if n == 0 || successes > n || n > maxCount {
		return invalid("%d successes of %d units; units are 1..2^40 and successes no more", successes, n)
	}
	return nil
}

func checkCounts(controlK, controlN, treatmentK, treatmentN uint64) error {
	if err := checkCount(controlK, controlN, .5); err != nil {
		return err
	}
	return checkCount(treatmentK, treatmentN, .5)
}

// upperNormal returns the z that a standard normal exceeds with probability p.
func upperNormal(p float64) float64 { return math.Sqrt2 * math.Erfcinv(2*p) }

func twoSidedNormal(z float64) float64 { return math.Erfc(math.Abs(z) / math.Sqrt2) }

// normalDF is where Student's t and the normal agree to 1e-8 of the p-value's scale
// and the incomplete beta function begins to lose digits.
const normalDF = 1e7

func twoSidedT(t, df float64) float64 {
	if df > normalDF {
		return twoSidedNormal(t)
	}
	return mathext.RegIncBeta(df/2, .5, df/(df+t*t))
}

func upperT(p, df float64) float64 {
	if df > normalDF {
		return upperNormal(p)
	}
	return -distuv.StudentsT{Sigma: 1, Nu: df}.Quantile(p)
}
