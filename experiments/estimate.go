package experiments

import (
	"encoding/json"
	"math"
)

// Interval is a closed interval; an end may be infinite.
type Interval struct{ Low, High float64 }

// Contains reports whether x lies in the interval.
func (i Interval) Contains(x float64) bool { return i.Low <= x && x <= i.High }

// everywhere is the interval of no evidence.
func everywhere() Interval { return Interval{math.Inf(-1), math.Inf(1)} }

// MarshalJSON writes {"low": …, "high": …} with null for an infinite end.
func (i Interval) MarshalJSON() ([]byte, error) {
	end := func(v float64) *float64 {
		if !finite(v) {
			return nil
		}
		return &v
	}
	return json.Marshal(struct {
		Low  *float64 `json:"low"`
		High *float64 `json:"high"`
	}{end(i.Low), end(i.High)})
}

// Estimate is the value of an asymptotically normal estimator over N units and the
// variance of that estimator (the squared standard error, not the spread of units).
type Estimate struct {
	N               uint64
	Value, Variance float64
}

func estimate(n uint64, value, variance float64) (Estimate, error) {
	// Rounding can leave a variance below 0 that is 0; anything more is bad input.
	if variance < 0 && variance > -1e-9*value*value {
		variance = 0
	}
	if !finite(value, variance) || variance < 0 {
		return Estimate{}, invalid("estimate of %v with variance %v over %d units is not usable; are the values too large or the denominator 0?", value, variance, n)
	}
	return Estimate{n, value, variance}, nil
}

// Mean estimates the mean of x with the unbiased sample variance. It wants N ≥ 2; the
// error has kind Invalid.
func (s Sums) Mean() (Estimate, error) {
	if err := s.enough(); err != nil {
		return Estimate{}, err
	}
	n := float64(s.N)
	return estimate(s.N, s.SumX/n, s.DevXX/(n*(n-1)))
}

// Proportion estimates the share of units with x = 1, with the variance p(1−p)/N. It
// wants N ≥ 2 and a whole number of successes; the error has kind Invalid.
func (s Sums) Proportion() (Estimate, error) {
	if err := s.enough(); err != nil {
		return Estimate{}, err
	}
	k, err := s.successes()
	if err != nil {
		return Estimate{}, err
	}
	n := float64(s.N)
	p := float64(k) / n
	return estimate(s.N, p, p*(1-p)/n)
}

// Ratio estimates Σx/Σy over units by the delta method, which is what makes a ratio of
// requests right when users were randomised. It wants N ≥ 2 and Σy ≠ 0; the error has
// kind Invalid. Source: Deng, Knoblich and Lu, Applying the delta method in metric
// analytics (KDD 2018).
func (s Sums) Ratio() (Estimate, error) {
	if err := s.enough(); err != nil {
		return Estimate{}, err
	}
	if s.SumY == 0 {
		return Estimate{}, invalid("ratio over %d units has the denominator 0", s.N)
	}
	n := float64(s.N)
	r := s.SumX / s.SumY
	my := s.SumY / n
	return estimate(s.N, r, (s.DevXX-2*r*s.DevXY+r*r*s.DevYY)/(n*(n-1))/(my*my))
}

func (s Sums) enough() error {
	if s.N < 2 {
		return invalid("%d units; a variance needs at least 2", s.N)
	}
	return s.Check()
}

// CUPED adjusts the mean of x in every arm for the pre-period covariate y:
// x̄ − θ(ȳ − ȳ of all arms), θ = cov(x, y)/var(y) over the units of all arms together.
// Without variance in y, θ is 0. Each arm wants N ≥ 2; errors have kind Invalid.
// Source: Deng, Xu, Kohavi and Walker (WSDM 2013).
func CUPED(arms []Sums) (theta float64, out []Estimate, err error) {
	var all Sums
	for _, a := range arms {
		if err := a.enough(); err != nil {
			return 0, nil, err
		}
		all = all.Merge(a)
	}
	if all.DevYY > 0 {
		theta = all.DevXY / all.DevYY
	}
	for _, a := range arms {
		n := float64(a.N)
		shift := theta * (a.SumY/n - all.SumY/float64(all.N))
		e, err := estimate(a.N, a.SumX/n-shift, (a.DevXX+theta*theta*a.DevYY-2*theta*a.DevXY)/(n*(n-1)))
		if err != nil {
			return 0, nil, err
		}
		out = append(out, e)
	}
	return theta, out, nil
}

// CUPEDRatio adjusts the ratio of every arm for the same ratio of the pre-period:
// R − θ(R₀ − R₀ of all arms). Both ratios are linearised (delta method) and θ is the
// covariance of the linear parts over the variance of the pre-period's, over the units
// of all arms together. Units without a pre-period enter with pre-numerator and
// pre-denominator 0. Each arm wants N ≥ 2 and denominators ≠ 0; errors have kind Invalid.
func CUPEDRatio(arms []Joint) (theta float64, out []Estimate, err error) {
	var all Joint
	for _, a := range arms {
		if err := a.enough(); err != nil {
			return 0, nil, err
		}
		all = all.Merge(a)
	}
	if all.N == 0 {
		return 0, nil, nil
	}
	lin := all.linear()
	if lin.DevYY > 0 {
		theta = lin.DevXY / lin.DevYY
	}
	pre := all.Sum[preNumerator] / all.Sum[preDenominator]
	for _, a := range arms {
		n, lin := float64(a.N), a.linear()
		value := a.Sum[numerator]/a.Sum[denominator] - theta*(a.Sum[preNumerator]/a.Sum[preDenominator]-pre)
		e, err := estimate(a.N, value, (lin.DevXX+theta*theta*lin.DevYY-2*theta*lin.DevXY)/(n*(n-1)))
		if err != nil {
			return 0, nil, err
		}
		out = append(out, e)
	}
	return theta, out, nil
}

func (j Joint) enough() error {
	if j.N < 2 {
		return invalid("%d units; a variance needs at least 2", j.N)
	}
	if j.Sum[denominator] == 0 || j.Sum[preDenominator] == 0 {
		return invalid("ratio over %d units has the denominators %v and, before, %v; neither may be 0", j.N, j.Sum[denominator], j.Sum[preDenominator])
	}
	return j.Check()
}

// linear returns the deviations of the linearised ratio (x) and pre-ratio (y).
func (j Joint) linear() Sums {
	n := float64(j.N)
	var x, y [variables]float64 // gradients
	x[numerator], x[denominator] = n/j.Sum[denominator], -n*j.Sum[numerator]/j.Sum[denominator]/j.Sum[denominator]
	y[preNumerator], y[preDenominator] = n/j.Sum[preDenominator], -n*j.Sum[preNumerator]/j.Sum[preDenominator]/j.Sum[preDenominator]
	out := Sums{N: j.N}
	for a := range variables {
		for b := range variables {
			out.DevXX += x[a] * x[b] * j.Dev[a][b]
			out.DevYY += y[a] * y[b] * j.Dev[a][b]
			out.DevXY += x[a] * y[b] * j.Dev[a][b]
		}
	}
	return out
}

// Contrast compares a treatment with the control: everything a test needs.
type Contrast struct {
	// Control and Treatment are standardised to the same mix of strata.
	Control, Treatment Estimate
	// Difference is treatment minus control.
	Difference, Variance float64
	// Relative is treatment/control − 1 with its delta-method variance. RelativeKnown is
	// false, and both are 0, when the control is 0.
	Relative, RelativeVariance float64
	RelativeKnown              bool
	// N counts the units of both arms; DF are Welch–Satterthwaite degrees of freedom.
	N  uint64
	DF float64
	// Information is Σ n_c·n_t/(n_c+n_t), half the units per arm of an equal split.
	Information float64
}

// SE is the standard error of the difference.
func (c Contrast) SE() float64 { return math.Sqrt(c.Variance) }

// Z is the difference in standard errors: 0 if both are 0 (no evidence), and NaN if
// only the standard error is.
func (c Contrast) Z() float64 {
	if c.Difference == 0 {
		return 0
	}
	if c.Variance == 0 {
		return math.NaN()
	}
	return c.Difference / math.Sqrt(c.Variance)
}

// Pair is one stratum's estimates of the two arms.
type Pair struct{ Control, Treatment Estimate }

// Compare contrasts two estimates of one stratum.
func Compare(control, treatment Estimate) (Contrast, error) {
	return Stratified([]Pair{{control, treatment}})
}

// Stratified combines the strata (region × weight epoch) by the Cochran–Mantel–Haenszel
// weights n_c·n_t/(n_c+n_t): each stratum is compared with itself only, so a split or a
// population that changes between strata cannot pass for an effect (Simpson's paradox),
// and the weights do not depend on outcomes. Strata in which an arm has fewer than 2
// units carry no evidence and are left out; without any other stratum the error has
// kind Invalid, as for estimates that are not finite.
func Stratified(strata []Pair) (Contrast, error) {
	var c Contrast
	for _, p := range strata {
		c.Information += p.weight()
	}
	if c.Information == 0 {
		return Contrast{}, invalid("no stratum has 2 units in both arms")
	}
	var spread float64 // Satterthwaite's denominator
	for _, p := range strata {
		w := p.weight() / c.Information
		if w == 0 {
			continue
		}
		c.Control.add(p.Control, w)
		c.Treatment.add(p.Treatment, w)
		for _, e := range [...]Estimate{p.Control, p.Treatment} {
			v := w * w * e.Variance
			spread += v * v / float64(e.N-1)
		}
	}
	c.N = c.Control.N + c.Treatment.N
	c.Difference = c.Treatment.Value - c.Control.Value
	c.Variance = c.Treatment.Variance + c.Control.Variance
	c.DF = float64(c.N) - 2
	if spread > 0 {
		c.DF = c.Variance * c.Variance / spread
	}
	if !finite(c.Difference, c.Variance, c.DF) || c.Variance < 0 {
		return Contrast{}, invalid("difference %v with variance %v is not usable", c.Difference, c.Variance)
	}
	c.setRelative()
	return c, nil
}

func (e *Estimate) add(o Estimate, w float64) {
	e.N += o.N
	e.Value += w * o.Value
	e.Variance += w * w * o.Variance
}

func (p Pair) weight() float64 {
	if p.Control.N < 2 || p.Treatment.N < 2 {
		return 0
	}
	n, m := float64(p.Control.N), float64(p.Treatment.N)
	return n / (n + m) * m
}

func (c *Contrast) setRelative() {
	base := c.Control.Value
	q := c.Treatment.Value / base
	v := (c.Treatment.Variance + q*q*c.Control.Variance) / (base * base)
	if c.RelativeKnown = finite(q, v); c.RelativeKnown {
		c.Relative, c.RelativeVariance = q-1, v
	}
}
