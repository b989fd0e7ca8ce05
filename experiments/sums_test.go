package experiments

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
)

func drawUnits(t *rapid.T) [][4]float64 {
	scale := rapid.SampledFrom([]float64{1, 1e-9, 1e9}).Draw(t, "scale")
	offset := rapid.SampledFrom([]float64{0, 1, 1e6}).Draw(t, "offset")
	value := rapid.Custom(func(t *rapid.T) float64 { return scale * (offset + rapid.Float64Range(-10, 10).Draw(t, "v")) })
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) [4]float64 {
		return [4]float64{value.Draw(t, "a"), value.Draw(t, "b"), value.Draw(t, "c"), value.Draw(t, "d")}
	}), 0, 60).Draw(t, "units")
}

// twoPass is the definition of Sums.
func twoPass(units [][4]float64) Joint {
	j := Joint{N: uint64(len(units))}
	for _, u := range units {
		for i := range u {
			j.Sum[i] += u[i]
		}
	}
	for _, u := range units {
		for a := range u {
			for b := range u {
				j.Dev[a][b] += (u[a] - j.Sum[a]/float64(j.N)) * (u[b] - j.Sum[b]/float64(j.N))
			}
		}
	}
	return j
}

// alike compares with a tolerance set by the size of the units, not of the result.
func alike(a, b Joint, units [][4]float64) bool {
	size := 0.0
	for _, u := range units {
		for _, v := range u {
			size = max(size, math.Abs(v))
		}
	}
	n := float64(len(units))
	ok := a.N == b.N
	for i := range variables {
		ok = ok && math.Abs(a.Sum[i]-b.Sum[i]) <= 1e-12*n*size
		for k := range variables {
			// The spread is at most 20 of offset+10: its squares, and twice the rounding of the mean.
			ok = ok && math.Abs(a.Dev[i][k]-b.Dev[i][k]) <= 1e-13*n*size*size
		}
	}
	return ok
}

func TestSummaryLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		units := drawUnits(t)
		whole, parts := Joint{}, [3]Joint{}
		pair, pairs := Sums{}, [3]Sums{}
		for _, u := range units {
			k := rapid.IntRange(0, 2).Draw(t, "part")
			for _, err := range []error{whole.Add(u[0], u[1], u[2], u[3]), parts[k].Add(u[0], u[1], u[2], u[3]), pair.Add(u[0], u[1]), pairs[k].Add(u[0], u[1])} {
				if err != nil {
					t.Fatal(err)
				}
			}
		}
		a, b, c := parts[0], parts[1], parts[2]
		for name, got := range map[string]Joint{
			"add one by one": whole, "left": a.Merge(b).Merge(c), "right": a.Merge(b.Merge(c)), "commuted": c.Merge(b).Merge(a),
		} {
			if !alike(got, twoPass(units), units) {
				t.Fatalf("%s: %+v, definition %+v", name, got, twoPass(units))
			}
			if err := got.Check(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		// Sums is Joint without the pre-period, bit for bit.
		if whole.Sums() != pair || a.Merge(b).Sums() != pairs[0].Merge(pairs[1]) {
			t.Fatalf("sums %+v differ from the joint summary's %+v", pair, whole.Sums())
		}
		if (Sums{}).Merge(pair) != pair || pair.Merge(Sums{}) != pair {
			t.Fatal("the empty summary is not neutral")
		}
	})
}

// A million values of spread 1 around 1e9: raw squares would have no digit left.
func TestSummaryDoesNotCancel(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var far, near0 Sums
	parts := make([]Sums, 16)
	for i := range 1_000_000 {
		v := math.Round(r.NormFloat64()*1024) / 1024 // exact after adding 1e9
		for _, err := range []error{far.Add(1e9+v, 0), near0.Add(v, 0), parts[i%16].Add(1e9+v, 0)} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	var merged Sums
	for _, p := range parts {
		merged = merged.Merge(p)
	}
	for _, got := range []Sums{far, merged} {
		if math.Abs(got.DevXX/near0.DevXX-1) > 1e-6 {
			t.Errorf("variance %v, want %v", got.DevXX, near0.DevXX)
		}
	}
	raw, err := SumsOf(far.N, far.SumX, far.DevXX+far.SumX*far.SumX/float64(far.N), 0, 0, 0)
	if err == nil && math.Abs(raw.DevXX/near0.DevXX-1) < .01 {
		t.Error("raw squares would have done; the test proves nothing")
	}
}

func TestSummariesRefuse(t *testing.T) {
	for _, bad := range []float64{math.NaN(), math.Inf(1), math.Inf(-1), 2e60} {
		var s Sums
		var j Joint
		var q Quantiles
		for name, err := range map[string]error{"x": s.Add(bad, 0), "y": s.Add(0, bad), "joint": j.Add(0, 0, bad, 0), "quantiles": q.Add(bad), "negative": q.Add(-1e-9)} {
			if !outrigger.IsKind(err, outrigger.Invalid) {
				t.Errorf("%s = %v: %v, want kind invalid", name, bad, err)
			}
		}
		if s != (Sums{}) || j != (Joint{}) || q.N() != 0 {
			t.Error("a refused value was counted")
		}
	}
	for name, err := range map[string]error{
		"empty with sums":    second(SumsOf(0, 1, 0, 0, 0, 0)),
		"negative square":    second(SumsOf(2, 0, -1, 0, 0, 0)),
		"below the mean":     second(SumsOf(2, 4, 3, 0, 0, 0)),
		"Cauchy–Schwarz":     second(SumsOf(3, 0, 2, 0, 2, 3)),
		"NaN":                second(SumsOf(3, math.NaN(), 2, 0, 2, 0)),
		"successes":          second(Count(3, 2)),
		"half a success":     second(Sums{N: 2, SumX: .5, DevXX: .5}.Proportion()),
		"one unit":           second(Sums{N: 1}.Mean()),
		"denominator":        second(Sums{N: 2, SumX: 1, DevXX: .5}.Ratio()),
		"joint denominator":  third(CUPEDRatio([]Joint{{N: 2}})),
		"joint asymmetric":   Joint{N: 2, Dev: [4][4]float64{{1, 1}, {0, 1}}}.Check(),
		"deviations of none": Sums{DevXX: 1}.Check(),
	} {
		if !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: %v, want kind invalid", name, err)
		}
	}
}

func second[T any](_ T, err error) error        { return err }
func third[T, U any](_ T, _ U, err error) error { return err }

func TestAddingDoesNotAllocate(t *testing.T) {
	var s Sums
	var j Joint
	var q Quantiles
	var e TwoByTwo
	for i := range 1000 {
		if err := q.Add(float64(i)); err != nil {
			t.Fatal(err)
		}
	}
	x := 0.0
	n := testing.AllocsPerRun(1000, func() {
		x += .9
		if s.Add(x, 1) != nil || j.Add(x, 1, x, 1) != nil || q.Add(x) != nil || e.Add(1, 2, 1, 2) != nil {
			t.Fatal("refused")
		}
	})
	if n != 0 {
		t.Errorf("adding a unit allocates %v times, want 0", n)
	}
}

func BenchmarkSumsAdd(b *testing.B) {
	var s Sums
	for b.Loop() {
		if err := s.Add(1.5, 2); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkQuantilesAdd(b *testing.B) {
	var q Quantiles
	for b.Loop() {
		if err := q.Add(12.5); err != nil {
			b.Fatal(err)
		}
	}
}

// The delta method must agree with what the variance of the ratio is over resampled
// populations, and CUPED must reduce the variance by 1−ρ².
func TestEstimatorsAgainstSimulation(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	var ratios, adjusted, plain Sums
	var delta, cuped float64
	const runs = 2000
	for range runs {
		var s, c, c2 Sums
		for range 200 {
			n := float64(1 + r.IntN(30)) // requests of the user
			if err := s.Add(n*(.1+.1*r.Float64()), n); err != nil {
				t.Fatal(err)
			}
			pre := r.NormFloat64()
			if err := c.Add(5+.8*pre+.6*r.NormFloat64(), 3+2*pre); err != nil {
				t.Fatal(err)
			}
			pre = r.NormFloat64()
			if err := c2.Add(5+.8*pre+.6*r.NormFloat64(), 3+2*pre); err != nil {
				t.Fatal(err)
			}
		}
		e := must(s.Ratio())
		delta += e.Variance / runs
		_, adj, err := CUPED([]Sums{c, c2})
		if err != nil {
			t.Fatal(err)
		}
		cuped += (adj[0].Variance + adj[1].Variance) / runs
		for _, err := range []error{ratios.Add(e.Value, 0), adjusted.Add(adj[1].Value-adj[0].Value, 0),
			plain.Add(must(c2.Mean()).Value-must(c.Mean()).Value, 0)} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string][2]float64{
		"ratio": {delta, ratios.DevXX / (runs - 1)}, "CUPED": {cuped, adjusted.DevXX / (runs - 1)},
		"variance reduction": {adjusted.DevXX / plain.DevXX, 1 - .8*.8},
	} {
		if math.Abs(c[0]/c[1]-1) > .1 { // the simulated variance has a standard error of 3 %
			t.Errorf("%s: %v, simulated or theoretical %v", name, c[0], c[1])
		}
	}
}

// Simpson's paradox: in each stratum the arms are alike, but the treatment is mostly in
// the worse one. Pooling sees a huge effect, stratifying none.
func TestStratificationResistsSimpson(t *testing.T) {
	p := func(k, n uint64) Estimate { return must(must(Count(k, n)).Proportion()) }
	c := must(Stratified([]Pair{{p(9900, 99000), p(100, 1000)}, {p(2000, 5000), p(2000, 5000)}}))
	pooled := must(Compare(p(11900, 104000), p(2100, 6000)))
	if math.Abs(c.Difference) > 1e-12 || c.N != 110000 {
		t.Errorf("stratified difference %v of %d units", c.Difference, c.N)
	}
	if pooled.Z() < 30 {
		t.Errorf("pooled z %v: the example proves nothing", pooled.Z())
	}
	// By hand: weights 990 and 2 500, so the control's mean is (990·0.1+2500·0.4)/3490.
	if !near(c.Information, 3490) || !near(c.Control.Value, (990*.1+2500*.4)/3490) {
		t.Errorf("information %v, control %v", c.Information, c.Control.Value)
	}
	// Strata with an empty arm change nothing.
	if d := must(Stratified([]Pair{{p(9900, 99000), p(100, 1000)}, {p(2000, 5000), p(2000, 5000)}, {p(7, 900), Estimate{}}})); d != c {
		t.Errorf("an empty stratum changed %+v to %+v", c, d)
	}
	if _, err := Stratified(nil); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("no strata: %v", err)
	}
}

// Rows of one unit from many reporters, in any order and split, give the same cells.
func TestLedgerLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rows := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) UnitRow {
			return UnitRow{
				Unit: rapid.Uint32Range(0, 12).Draw(t, "unit"), Arm: rapid.SampledFrom([]string{"a", "a", "a", "b"}).Draw(t, "arm"),
				Stratum: Stratum{rapid.SampledFrom([]string{"eu", "us"}).Draw(t, "region"), rapid.Uint64Range(1, 3).Draw(t, "epoch")},
				X:       float64(rapid.IntRange(0, 5).Draw(t, "x")), Y: float64(rapid.IntRange(0, 20).Draw(t, "y")),
			}
		}), 0, 40).Draw(t, "rows")
		shuffled := slices.Clone(rows)
		rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0)).Shuffle(len(rows), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		a, b := ledgerOf(t, rows), ledgerOf(t, shuffled)
		x, y := must(a.Cells(nil)), must(b.Cells(nil))
		if a.Exposure() != b.Exposure() || len(x) != len(y) {
			t.Fatalf("%+v %+v, shuffled %+v %+v", a.Exposure(), x, b.Exposure(), y)
		}
		units, single := map[uint32]map[string]bool{}, 0
		for _, r := range rows {
			if units[r.Unit] == nil {
				units[r.Unit] = map[string]bool{}
			}
			units[r.Unit][r.Arm] = true
		}
		for _, arms := range units {
			if len(arms) == 1 {
				single++
			}
		}
		counted := 0
		for i := range x {
			d := math.Abs(x[i].Sums.DevXX-y[i].Sums.DevXX) + math.Abs(x[i].Sums.DevXY-y[i].Sums.DevXY)
			x[i].Sums.DevXX, x[i].Sums.DevXY, x[i].Sums.DevYY = 0, 0, 0
			y[i].Sums.DevXX, y[i].Sums.DevXY, y[i].Sums.DevYY = 0, 0, 0
			if x[i] != y[i] || d > 1e-9 {
				t.Fatalf("cell %+v, shuffled %+v", x[i], y[i])
			}
			counted += int(x[i].Sums.N)
		}
		if e := a.Exposure(); int(e.Units) != len(units) || int(e.Multiple) != len(units)-single || counted != single {
			t.Fatalf("exposure %+v and %d units in cells; %d units, %d of them in one arm", e, counted, len(units), single)
		}
	})
}

func ledgerOf(t interface{ Fatal(...any) }, rows []UnitRow) *Ledger {
	l := NewLedger(100)
	for _, r := range rows {
		if err := l.Add(r); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

func TestLedgerLimitsAndViews(t *testing.T) {
	l := NewLedger(2)
	for _, c := range []struct {
		row  UnitRow
		kind outrigger.Kind
		ok   bool
	}{
		{UnitRow{Unit: 1, Arm: "a", X: 2, Y: 3}, 0, true},
		{UnitRow{Unit: 2, Arm: "a", X: 0, Y: 5}, 0, true},
		{UnitRow{Unit: 3, Arm: "a"}, outrigger.Exhausted, false},
		{UnitRow{Unit: 2, Arm: "a", X: 0, Y: 1}, 0, true}, // known units are still served
		{UnitRow{Unit: 1, X: 1}, outrigger.Invalid, false},
		{UnitRow{Unit: 1, Arm: "a", X: math.NaN()}, outrigger.Invalid, false},
		{UnitRow{Unit: 1, Arm: "a", X: 1e60}, 0, true},
		{UnitRow{Unit: 1, Arm: "a", X: 1e60}, outrigger.Invalid, false},
		{UnitRow{Unit: 1, Arm: "a", X: -1e60}, 0, true},
	} {
		err := l.Add(c.row)
		if (err == nil) != c.ok || err != nil && !outrigger.IsKind(err, c.kind) {
			t.Errorf("%+v: %v", c.row, err)
		}
	}
	failed := must(l.Cells(func(x, _ float64) (float64, float64) { return min(1, x), 0 }))
	if len(failed) != 1 || failed[0].Sums.N != 2 || failed[0].Sums.SumX > 1 {
		t.Errorf("%+v", failed)
	}
	if _, err := l.Cells(func(x, _ float64) (float64, float64) { return math.NaN(), 0 }); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("view of NaN: %v", err)
	}
}

func TestExposureBanner(t *testing.T) {
	for _, c := range []struct {
		e    Exposure
		want bool
	}{{Exposure{}, false}, {Exposure{1000, 9}, false}, {Exposure{1000, 10}, true}, {Exposure{10, 0}, false}} {
		if c.e.Banner() != c.want {
			t.Errorf("%+v: banner %v, share %v", c.e, c.e.Banner(), c.e.Share())
		}
	}
}
