package experiments

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/DataDog/sketches-go/ddsketch"
	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
)

func TestQuantilesLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		values := rapid.SliceOfN(rapid.OneOf(rapid.Just(0.0), rapid.Float64Range(1, 1e6), rapid.Float64Range(1e-9, 1e-3)), 1, 80).Draw(t, "values")
		var whole Quantiles
		var parts [3]Quantiles
		for _, v := range values {
			k := rapid.IntRange(0, 2).Draw(t, "part")
			if whole.Add(v) != nil || parts[k].Add(v) != nil {
				t.Fatal("refused")
			}
		}
		left, right := parts[0].Clone(), parts[2].Clone()
		left.Merge(parts[1])
		left.Merge(parts[2])
		right.Merge(parts[1])
		right.Merge(parts[0])
		slices.Sort(values)
		if left.N() != uint64(len(values)) || right.N() != left.N() {
			t.Fatalf("%d and %d values of %d", left.N(), right.N(), len(values))
		}
		for k, v := range values {
			w, l, r := whole.order(uint64(k+1)), left.order(uint64(k+1)), right.order(uint64(k+1))
			if w != l || w != r {
				t.Fatalf("order %d: whole %v, merged %v and %v", k+1, w, l, r)
			}
			if math.Abs(w-v) > SketchAccuracy*v*(1+1e-9)+1e-300 {
				t.Fatalf("order %d is %v, the sketch says %v", k+1, v, w)
			}
		}
	})
}

func TestQuantilesRefuse(t *testing.T) {
	coarse, err := ddsketch.LogCollapsingLowestDenseDDSketch(.05, 100)
	if err != nil {
		t.Fatal(err)
	}
	negative := newSketch()
	if err := negative.Add(-1); err != nil {
		t.Fatal(err)
	}
	var q Quantiles
	if err := q.Add(3); err != nil {
		t.Fatal(err)
	}
	s := Sequence{Alpha: .05, Tuning: 100}
	for name, err := range map[string]error{
		"coarse sketch":   second(QuantilesOf(coarse)),
		"negative sketch": second(QuantilesOf(negative)),
		"empty":           second(Quantiles{}.Value(.5)),
		"level 0":         second(q.Value(0)),
		"level NaN":       second(q.Fixed(math.NaN(), .05)),
		"alpha 1":         second(q.Fixed(.5, 1)),
		"sequence":        second(q.Sequence(.5, Sequence{})),
		"margin":          second(CompareQuantiles(q, q, .5, -1, s)),
		"margin NaN":      second(CompareQuantiles(q, q, .5, math.NaN(), s)),
	} {
		if !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: %v, want kind invalid", name, err)
		}
	}
	if got, err := QuantilesOf(nil); err != nil || got.N() != 0 {
		t.Errorf("no sketch: %v, %v", got, err)
	}
	if log, err := CompareQuantiles(Quantiles{}, q, .5, 0, s); err != nil || log != 0 {
		t.Errorf("empty arm: %v, %v; want no evidence", log, err)
	}
}

// The band for a 95th percentile: at 1 000 values the ranks .928 to .969, at 100 no
// upper bound yet; and the binomial band is textbook (n = 100, median: 40th to 61st).
func TestRankBands(t *testing.T) {
	s := Sequence{Alpha: .05, Tuning: 1000}
	if lo, hi := s.rankBand(.95, 1000); lo != 928 || hi != 969 {
		t.Errorf("sequence: ranks %d to %d", lo, hi)
	}
	if _, hi := s.rankBand(.95, 100); hi != 100 {
		t.Errorf("sequence at 100 values: rank %d", hi)
	}
	if lo, hi := binomialBand(100, .5, .05); lo != 40 || hi != 60 {
		t.Errorf("binomial: %d to %d", lo, hi)
	}
}

// The interval's ends are the order statistics themselves, widened by the sketch's error.
func TestQuantileIntervalEnds(t *testing.T) {
	var q Quantiles
	x := func(i int) float64 { return math.Pow(1.3, float64(i)) }
	for i := range 100 {
		if err := q.Add(x(i + 1)); err != nil {
			t.Fatal(err)
		}
	}
	ci := must(q.Fixed(.5, .05)) // the 40th and the 61st value
	if !(ci.Low <= x(40) && ci.Low > .97*x(40) && ci.High >= x(61) && ci.High < 1.03*x(61)) {
		t.Errorf("%v, want %v to %v", ci, x(40), x(61))
	}
	if ci := must(q.Fixed(.99, .05)); !math.IsInf(ci.High, 1) || ci.Low > x(99) {
		t.Errorf("99th percentile of 100 values: %v", ci)
	}
	if ci := must(q.Fixed(.01, .05)); ci.Low != 0 || ci.High < x(3) {
		t.Errorf("1st percentile of 100 values: %v", ci)
	}
}

// Fixed intervals cover as often as they say; the sequence covers at all looks at once,
// where the fixed interval, peeked, misses about half of the time.
func TestQuantileCoverage(t *testing.T) {
	const runs, level = 160, .95
	truth := math.Exp(1.6448536269514722) // of the standard lognormal
	s := Sequence{Alpha: .05, Tuning: 1000}
	missedEnd, missedEver, peeked := 0, 0, 0
	for seed := range uint64(runs) {
		r := rand.New(rand.NewPCG(seed, 3))
		var q Quantiles
		ever, peek := false, false
		for n := 1; n <= 2000; n++ {
			if err := q.Add(math.Exp(r.NormFloat64())); err != nil {
				t.Fatal(err)
			}
			if n%40 == 0 {
				ever = ever || !must(q.Sequence(level, s)).Contains(truth)
				peek = peek || !must(q.Fixed(level, .05)).Contains(truth)
			}
		}
		if !must(q.Fixed(level, .05)).Contains(truth) {
			missedEnd++
		}
		if ever {
			missedEver++
		}
		if peek {
			peeked++
		}
	}
	t.Logf("of %d: fixed missed %d, sequence ever missed %d, fixed peeked %d", runs, missedEnd, missedEver, peeked)
	if missedEnd > runs*75/1000 || missedEver > runs*75/1000 {
		t.Errorf("fixed missed %d and the sequence %d of %d, want ≤ 7.5 %%", missedEnd, missedEver, runs)
	}
	if peeked < runs/6 {
		t.Errorf("the peeked fixed interval missed %d of %d: the test proves nothing", peeked, runs)
	}
}

// Two arms alike never give evidence more often than α, however watched; a 30 % slower
// tail does, and a margin above it is not exceeded.
func TestCompareQuantiles(t *testing.T) {
	const runs = 60
	s := Sequence{Alpha: .05, Tuning: 2000}
	alarms, found, beyond := 0, 0, 0
	for seed := range uint64(runs) {
		r := rand.New(rand.NewPCG(seed, 4))
		var a, b, slow Quantiles
		alarm, hit, over := false, false, false
		for n := 1; n <= 4000; n++ {
			x, y := math.Exp(.5*r.NormFloat64()), math.Exp(.5*r.NormFloat64())
			if a.Add(x) != nil || b.Add(y) != nil || slow.Add(1.3*y) != nil {
				t.Fatal("refused")
			}
			if n%400 == 0 {
				alarm = alarm || must(CompareQuantiles(a, b, .9, 0, s)) >= math.Log(20)
				hit = hit || must(CompareQuantiles(a, slow, .9, .05, s)) >= math.Log(20)
				over = over || must(CompareQuantiles(a, slow, .9, .35, s)) >= math.Log(20)
			}
		}
		for _, c := range []struct {
			is bool
			n  *int
		}{{alarm, &alarms}, {hit, &found}, {over, &beyond}} {
			if c.is {
				*c.n++
			}
		}
	}
	t.Logf("of %d: %d false alarms, %d found, %d beyond the margin", runs, alarms, found, beyond)
	if alarms > runs*75/1000 || beyond > 0 || found < runs*9/10 {
		t.Errorf("of %d: %d false alarms, %d found, %d beyond the margin", runs, alarms, found, beyond)
	}
}
