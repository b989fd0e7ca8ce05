package experiments

import (
	"math"

	"github.com/outrigger-mesh/outrigger"
)

// maxMagnitude bounds every value that enters a summary: beyond any unit of measure,
// and low enough that fourth powers of it stay finite.
const maxMagnitude = 1e60

// Sums is the mergeable summary of one metric in one arm and stratum: N units of
// randomisation, each with a pair (x, y). Squares are kept as deviations from the
// means, so that nothing cancels when the mean is large against the spread.
//
// What x and y are depends on the metric: x is the unit's outcome (0 or 1 for a
// proportion, a total for a mean, the numerator of a ratio), y the denominator of a
// ratio or the unit's pre-period covariate for CUPED, otherwise 0.
//
// The zero value is empty. Merge is commutative and associative up to rounding.
type Sums struct {
	N                   uint64
	SumX, SumY          float64 // Σx, Σy
	DevXX, DevYY, DevXY float64 // Σ(x−x̄)², Σ(y−ȳ)², Σ(x−x̄)(y−ȳ)
}

// SumsOf converts raw sums, as a data warehouse gives them, to Sums. It loses digits
// when the mean is large against the spread; where the units are at hand, use Add.
// The error has kind Invalid if an argument is not finite, a sum without units is not
// 0, or the sums break the Cauchy–Schwarz inequality.
func SumsOf(n uint64, sumX, sumXX, sumY, sumYY, sumXY float64) (Sums, error) {
	if n == 0 {
		if sumX != 0 || sumXX != 0 || sumY != 0 || sumYY != 0 || sumXY != 0 {
			return Sums{}, invalid("sums without units must be 0")
		}
		return Sums{}, nil
	}
	f := float64(n)
	s := Sums{N: n, SumX: sumX, SumY: sumY,
		DevXX: clampRounding(sumXX-sumX*sumX/f, sumXX),
		DevYY: clampRounding(sumYY-sumY*sumY/f, sumYY),
		DevXY: sumXY - sumX*sumY/f}
	return s, s.Check()
}

// clampRounding takes a difference that rounding made slightly negative for 0.
func clampRounding(d, scale float64) float64 {
	if d < 0 && d > -1e-9*math.Abs(scale) {
		return 0
	}
	return d
}

// Count summarises a proportion: successes of n units. The error has kind Invalid if
// successes > n.
func Count(successes, n uint64) (Sums, error) {
	if successes > n {
		return Sums{}, invalid("%d successes of %d units", successes, n)
	}
	if n == 0 {
		return Sums{}, nil
	}
	k, f := float64(successes), float64(n)
	return Sums{N: n, SumX: k, DevXX: k * (f - k) / f}, nil
}

// Add adds one unit. It does not allocate unless it fails; on failure the summary is
// unchanged and the error has kind Invalid (not finite, or beyond ±1e60).
func (s *Sums) Add(x, y float64) error {
	if !storable(x) || !storable(y) {
		return invalid("unit has x = %v, y = %v; values are finite and within ±%g", x, y, float64(maxMagnitude))
	}
	*s = s.Merge(Sums{N: 1, SumX: x, SumY: y})
	return nil
}

// Merge returns the summary of the units of both, which must be distinct units: see
// Ledger for units that are reported in pieces. Source: Chan, Golub and LeVeque,
// Updating formulae and a pairwise algorithm for computing sample variances (1979).
func (s Sums) Merge(o Sums) Sums {
	switch {
	case s.N == 0:
		return o
	case o.N == 0:
		return s
	}
	n, m := float64(s.N), float64(o.N)
	dx, dy, w := o.SumX/m-s.SumX/n, o.SumY/m-s.SumY/n, n*m/(n+m)
	return Sums{
		N: s.N + o.N, SumX: s.SumX + o.SumX, SumY: s.SumY + o.SumY,
		DevXX: s.DevXX + o.DevXX + w*dx*dx,
		DevYY: s.DevYY + o.DevYY + w*dy*dy,
		DevXY: s.DevXY + o.DevXY + w*dx*dy,
	}
}

// Check reports, with kind Invalid, sums no set of units can have.
func (s Sums) Check() error {
	for _, v := range [...]float64{s.SumX, s.SumY, s.DevXX, s.DevYY, s.DevXY} {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return invalid("summary has the value %v; values are finite", v)
		}
	}
	f := float64(s.N)
	switch {
	case s.N == 0 && s != Sums{}:
		return invalid("summary without units is not empty: %+v", s)
	case math.Abs(s.SumX) > f*maxMagnitude || math.Abs(s.SumY) > f*maxMagnitude:
		return invalid("summary has means of %g and %g; the limit is ±%g", s.SumX/f, s.SumY/f, float64(maxMagnitude))
	case s.DevXX < 0 || s.DevYY < 0 || s.DevXX > 4*f*maxMagnitude*maxMagnitude || s.DevYY > 4*f*maxMagnitude*maxMagnitude:
		return invalid("summary has squared deviations %g and %g; they are not negative", s.DevXX, s.DevYY)
	// Beyond Cauchy–Schwarz, with slack for cancellation in raw sums and for squares that
	// underflow where their products do not.
	case math.Abs(s.DevXY) > math.Sqrt(s.DevXX)*math.Sqrt(s.DevYY)*(1+1e-6)+1e-9*(math.Abs(s.SumX*s.SumY)/max(f, 1))+1e-90:
		return invalid("summary has co-deviation %g, above √(%g·%g)", s.DevXY, s.DevXX, s.DevYY)
	}
	return nil
}

// successes returns the count of a proportion, which must be a whole number in 0..N.
func (s Sums) successes() (uint64, error) {
	k := math.Round(s.SumX)
	if math.Abs(k-s.SumX) > 1e-6*max(1, k) || k < 0 || k > float64(s.N) {
		return 0, invalid("proportion has %v successes of %d units; outcomes are 0 or 1", s.SumX, s.N)
	}
	return uint64(k), nil
}

// The variables of Joint.
const (
	numerator = iota
	denominator
	preNumerator
	preDenominator
	variables
)

// Joint is the mergeable summary of a ratio metric with a pre-period: each unit has a
// numerator, a denominator and both again from before the experiment. The zero value
// is empty. Merge is commutative and associative up to rounding.
type Joint struct {
	N   uint64
	Sum [variables]float64            // numerator, denominator, pre-numerator, pre-denominator
	Dev [variables][variables]float64 // sums of products of deviations, symmetric
}

// Add adds one unit; failure and cost are as for Sums.Add.
func (j *Joint) Add(num, den, preNum, preDen float64) error {
	unit := Joint{N: 1, Sum: [variables]float64{num, den, preNum, preDen}}
	for _, v := range unit.Sum {
		if !storable(v) {
			return invalid("unit has the value %v; values are finite and within ±%g", v, float64(maxMagnitude))
		}
	}
	*j = j.Merge(unit)
	return nil
}

// Merge returns the summary of the units of both, which must be distinct.
func (j Joint) Merge(o Joint) Joint {
	switch {
	case j.N == 0:
		return o
	case o.N == 0:
		return j
	}
	n, m := float64(j.N), float64(o.N)
	w := n * m / (n + m)
	var d [variables]float64
	out := Joint{N: j.N + o.N}
	for i := range variables {
		d[i] = o.Sum[i]/m - j.Sum[i]/n
		out.Sum[i] = j.Sum[i] + o.Sum[i]
	}
	for a := range variables {
		for b := a; b < variables; b++ {
			out.Dev[a][b] = j.Dev[a][b] + o.Dev[a][b] + w*d[a]*d[b]
			out.Dev[b][a] = out.Dev[a][b]
		}
	}
	return out
}

// Sums returns the summary without the pre-period: x the numerator, y the denominator.
func (j Joint) Sums() Sums { return j.pair(numerator, denominator) }

func (j Joint) pair(x, y int) Sums {
	return Sums{N: j.N, SumX: j.Sum[x], SumY: j.Sum[y], DevXX: j.Dev[x][x], DevYY: j.Dev[y][y], DevXY: j.Dev[x][y]}
}

// Check reports, with kind Invalid, sums no set of units can have.
func (j Joint) Check() error {
	for a := range variables {
		for b := range a + 1 {
			if j.Dev[a][b] != j.Dev[b][a] {
				return invalid("deviation matrix is not symmetric: %g and %g", j.Dev[a][b], j.Dev[b][a])
			}
			if err := j.pair(a, b).Check(); err != nil {
				return err
			}
		}
	}
	return nil
}

func storable(v float64) bool { return math.Abs(v) <= maxMagnitude } // false for NaN

func finite(vs ...float64) bool {
	for _, v := range vs {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return false
		}
	}
	return true
}

func invalid(format string, args ...any) error {
	return outrigger.Errorf(outrigger.Invalid, format, args...)
}

// checkLevel refuses an error probability outside (0, 1). Below 1e-12 the boundaries
// would ask for more digits than double precision has.
func checkLevel(name string, p float64) error {
	if !(p >= 1e-12 && p < 1) {
		return invalid("%s is %v; it lies in [1e-12, 1)", name, p)
	}
	return nil
}
