package experiments

import (
	"math"

	"github.com/DataDog/sketches-go/ddsketch"
	"github.com/DataDog/sketches-go/ddsketch/mapping"
	"github.com/DataDog/sketches-go/ddsketch/store"
)

// The sketches of reports: see OutcomeDelta.latency_sketch.
const (
	// SketchAccuracy is the greatest relative error of a value read from a sketch.
	SketchAccuracy = 0.01
	// sketchBins bounds a sketch to 16 KiB; 2 048 bins of 2 % span 17 decades below the
	// greatest value, and what lies lower is counted in the lowest bin.
	sketchBins = 2_048
)

// Quantiles is the mergeable summary of a metric whose quantiles matter (latency, cost,
// tokens; values ≥ 0): a DDSketch with 1 % relative accuracy. Source: Masson, Rim and
// Lee (VLDB 2019). Its intervals count units as independent: feed it one value per unit
// of randomisation, or say that the interval is per request.
//
// The zero value is empty and ready to use; a copy shares its data, see Clone. Merge is
// commutative and associative exactly. Not safe for concurrent writing.
type Quantiles struct{ sketch *ddsketch.DDSketch }

// QuantilesOf wraps a sketch, which the caller must not use any more. The error has
// kind Invalid if it is not logarithmic with 1 % accuracy or holds negative values.
func QuantilesOf(s *ddsketch.DDSketch) (Quantiles, error) {
	if s == nil {
		return Quantiles{}, nil
	}
	if !s.IndexMapping.Equals(newSketch().IndexMapping) {
		return Quantiles{}, invalid("sketch mapping is not logarithmic with %v relative accuracy", SketchAccuracy)
	}
	if !s.GetNegativeValueStore().IsEmpty() {
		return Quantiles{}, invalid("sketch holds negative values; quantile metrics are not negative")
	}
	if n := s.GetCount(); !(n >= 0 && n <= maxCount) {
		return Quantiles{}, invalid("sketch counts %v values; the limit is 2^40", n)
	}
	return Quantiles{s}, nil
}

func newSketch() *ddsketch.DDSketch {
	m, err := mapping.NewLogarithmicMapping(SketchAccuracy)
	if err != nil {
		panic(err) // only for an accuracy outside (0, 1)
	}
	return ddsketch.NewDDSketchFromStoreProvider(m, func() store.Store { return store.NewCollapsingLowestDenseStore(sketchBins) })
}

// Add adds one value. It allocates only while the range of values grows. The error has
// kind Invalid if x is negative, not finite or above 1e60; nothing is changed then.
func (q *Quantiles) Add(x float64) error {
	if !(x >= 0 && x <= maxMagnitude) {
		return invalid("value %v; quantile metrics lie in [0, %g]", x, float64(maxMagnitude))
	}
	if q.sketch == nil {
		q.sketch = newSketch()
	}
	if err := q.sketch.Add(x); err != nil {
		return invalid("value %v: %v", x, err)
	}
	return nil
}

// Merge adds the values of o, which is not modified.
func (q *Quantiles) Merge(o Quantiles) {
	if o.sketch == nil {
		return
	}
	if q.sketch == nil {
		q.sketch = newSketch()
	}
	if err := q.sketch.MergeWith(o.sketch); err != nil {
		panic(err) // only for another mapping, which QuantilesOf refuses
	}
}

// Clone returns an independent copy.
func (q Quantiles) Clone() Quantiles {
	if q.sketch == nil {
		return q
	}
	return Quantiles{q.sketch.Copy()}
}

// N returns the number of values.
func (q Quantiles) N() uint64 {
	if q.sketch == nil {
		return 0
	}
	return uint64(math.Round(q.sketch.GetCount()))
}

// Value returns the quantile of the given level within 1 %. The error has kind Invalid
// if the level is outside (0, 1) or there is no value.
func (q Quantiles) Value(level float64) (float64, error) {
	if err := q.check(level); err != nil {
		return 0, err
	}
	n := q.N()
	return q.order(min(max(1, uint64(math.Ceil(level*float64(n)))), n)), nil
}

func (q Quantiles) check(level float64) error {
	if err := checkLevel("quantile", level); err != nil {
		return err
	}
	if q.N() == 0 {
		return invalid("there are no values to take a quantile of")
	}
	return nil
}

// order returns the k-th smallest value, 1 ≤ k ≤ N.
func (q Quantiles) order(k uint64) float64 {
	zeros := uint64(math.Round(q.sketch.GetZeroCount()))
	if k <= zeros {
		return 0
	}
	// The store returns the first bin whose cumulative count exceeds the rank; half a
	// rank off, rounding cannot reach the neighbour.
	return q.sketch.Value(q.sketch.GetPositiveValueStore().KeyAtRank(float64(k-zeros) - .5))
}

// Fixed returns the interval of a quantile at a fixed horizon, from order statistics
// whose ranks are binomial: coverage ≥ 1−alpha for any distribution of values. An end
// that the data cannot bound is 0 or +Inf. Errors have kind Invalid.
func (q Quantiles) Fixed(level, alpha float64) (Interval, error) {
	if err := q.check(level); err != nil {
		return Interval{}, err
	}
	if err := checkLevel("alpha", alpha); err != nil {
		return Interval{}, err
	}
	lo, hi := binomialBand(q.N(), level, alpha)
	return q.between(lo, hi), nil
}

// Sequence returns the confidence sequence of a quantile: exact for independent values
// of any distribution and valid at all sample sizes at once. The quantile's rank is a
// proportion, whose mixture martingale is inverted. An end that the data cannot bound
// yet is 0 or +Inf. Errors have kind Invalid. Source: Howard and Ramdas, Sequential
// estimation of quantiles (2022).
func (q Quantiles) Sequence(level float64, s Sequence) (Interval, error) {
	if err := q.check(level); err != nil {
		return Interval{}, err
	}
	if err := s.Check(); err != nil {
		return Interval{}, err
	}
	lo, hi := s.rankBand(level, q.N())
	return q.between(lo, hi), nil
}

// between returns the values between which the quantile lies if lo..hi values are at or
// below it, widened by what the sketch may be off.
func (q Quantiles) between(lo, hi uint64) Interval {
	out := Interval{0, math.Inf(1)}
	if lo > 0 {
		out.Low = q.order(lo) / (1 + SketchAccuracy)
	}
	if hi < q.N() {
		out.High = q.order(hi+1) / (1 - SketchAccuracy)
	}
	return out
}
