package experiments

import "math"

// Sequence is an asymptotic confidence sequence: an interval that covers the true value
// at all sample sizes at once with probability 1−Alpha, so it may be looked at as often
// as one likes and the experiment stopped whenever it pleases. Source: Waudby-Smith,
// Arbour, Sinha, Kennedy and Ramdas, Time-uniform central limit theory and asymptotic
// confidence sequences (arXiv 2103.06476v7), equations 9, 134, 155 and 161.
//
// It is asymptotic: begin at about 100 units an arm or more (Plan.MinUnits).
type Sequence struct {
	// Alpha is the error probability over all looks, two-sided unless the method's name
	// says OneSided.
	Alpha float64
	// Tuning is N*, the number of units of both arms at which the sequence is tightest;
	// a factor of ten off costs about a tenth of the width.
	Tuning float64
}

// DefaultTuning is N* where a plan gives none.
const DefaultTuning = 5000

// Check reports a parameter out of range with kind Invalid.
func (s Sequence) Check() error {
	if err := checkLevel("alpha", s.Alpha); err != nil {
		return err
	}
	if !(s.Tuning >= 1 && s.Tuning <= maxCount) {
		return invalid("tuning is %v; it lies in [1, 2^40] units", s.Tuning)
	}
	return nil
}

// rho2 is ρ², the variance of the mixing normal, for a two-sided alpha.
func (s Sequence) rho2(alpha float64) float64 {
	l := -2 * math.Log(alpha)
	return (l + math.Log1p(l)) / s.Tuning
}

// HalfWidth returns the half width of the two-sided interval in standard errors after n
// units of both arms: the boundary that |z| must cross. +Inf for n = 0.
func (s Sequence) HalfWidth(n uint64) float64 {
	r := float64(n) * s.rho2(s.Alpha)
	return math.Sqrt(2 * (r + 1) / r * (math.Log1p(r)/2 - math.Log(s.Alpha)))
}

// P returns the always-valid p-value of z after n units of both arms: at most Alpha
// exactly when |z| has crossed HalfWidth. It is 1 for a z that is NaN.
func (s Sequence) P(z float64, n uint64) float64 {
	r := float64(n) * s.rho2(s.Alpha)
	p := math.Exp(math.Log1p(r)/2 - r*z*z/(2*(r+1)))
	if !(p < 1) { // also NaN
		return 1
	}
	return p
}

// HalfWidthOneSided is HalfWidth for one bound only: tighter, as Alpha is spent on one
// side. It wants Alpha < 1/2.
func (s Sequence) HalfWidthOneSided(n uint64) float64 {
	r := float64(n) * s.rho2(2*s.Alpha)
	return math.Sqrt(2 * (r + 1) / r * math.Log1p(math.Sqrt(r+1)/(2*s.Alpha)))
}

// POneSided is the always-valid p-value against "not greater than 0"; it is 1 for z ≤ 0
// and for NaN. It wants Alpha < 1/2.
func (s Sequence) POneSided(z float64, n uint64) float64 {
	r := float64(n) * s.rho2(2*s.Alpha)
	p := math.Sqrt(r+1) / (2 * math.Expm1(z*z*r/(2*(r+1))))
	if !(z > 0) || !(p < 1) {
		return 1
	}
	return p
}

// Interval returns the two-sided interval of value with the given variance of the
// estimator after n units of both arms. Errors have kind Invalid.
func (s Sequence) Interval(value, variance float64, n uint64) (Interval, error) {
	if err := s.Check(); err != nil {
		return Interval{}, err
	}
	if !finite(value, variance) || variance < 0 || n == 0 {
		return Interval{}, invalid("estimate %v with variance %v over %d units; they are finite, not negative and at least 1", value, variance, n)
	}
	half := s.HalfWidth(n) * math.Sqrt(variance)
	return Interval{value - half, value + half}, nil
}
