package experiments

import (
	"math"
	"testing"
)

// Numbers in this file come from elsewhere: published tables and examples, or other
// implementations (scipy 1.17, statsmodels 0.15, mpmath at 40 digits, as named).

// near asks for a relative difference of at most 1e-6, absolute below 1e-9.
func near(got, want float64) bool { return within(got, want, 1e-6) }

func within(got, want, tol float64) bool {
	return got == want || math.Abs(got-want) <= tol*max(math.Abs(want), 1e-3)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// 81/263, 15/148, 0/20 and 1/29 are table I of Newcombe, Two-sided confidence intervals
// for the single proportion (1998); digits from statsmodels proportion_confint.
func TestOneProportionIntervals(t *testing.T) {
	for _, c := range []struct {
		k, n          uint64
		alpha         float64
		wilson, exact Interval
	}{
		{81, 263, .05, Interval{0.255288519878, 0.366209576983}, Interval{0.252736745585, 0.367621922601}},
		{15, 148, .05, Interval{0.0623863995307, 0.160487241723}, Interval{0.0578440100834, 0.161650490349}},
		{0, 20, .05, Interval{0, 0.161125158053}, Interval{0, 0.168433470983}},
		{1, 29, .05, Interval{0.00611321429276, 0.171755218793}, Interval{0.00087264688358, 0.177644295489}},
		{29, 29, .05, Interval{0.8830302015, 1}, Interval{0.88055513093, 1}},
		{950, 1000, .01, Interval{0.929093027309, 0.964974924277}, Interval{0.929495624799, 0.96607333729}},
		{3, 1000000, .05, Interval{1.02027124097e-06, 8.82114977431e-06}, Interval{6.18672550191e-07, 8.76724778807e-06}},
	} {
		w, e := must(Wilson(c.k, c.n, c.alpha)), must(ClopperPearson(c.k, c.n, c.alpha))
		for _, v := range [][2]float64{{w.Low, c.wilson.Low}, {w.High, c.wilson.High}, {e.Low, c.exact.Low}, {e.High, c.exact.High}} {
			if math.Abs(v[0]-v[1]) > 1e-6*v[1]+1e-17 {
				t.Errorf("%d of %d: got %.12g, want %.12g (Wilson %v, Clopper–Pearson %v)", c.k, c.n, v[0], v[1], w, e)
			}
		}
	}
}

// The first six are examples (a) to (f) of Newcombe, Interval estimation for the
// difference between independent proportions (1998), method 10; digits from statsmodels.
func TestNewcombe(t *testing.T) {
	for _, c := range []struct {
		kc, nc, kt, nt uint64
		want           Interval
	}{
		{48, 80, 56, 70, Interval{0.0524314724024, 0.333872654037}},
		{3, 10, 9, 10, Interval{0.170522723935, 0.809017973535}},
		{2, 7, 6, 7, Interval{0.0582279274823, 0.806249637524}},
		{0, 29, 5, 56, Interval{-0.0381371479035, 0.192560013855}},
		{0, 20, 0, 10, Interval{-0.161125158053, 0.277532799863}},
		{0, 20, 10, 10, Interval{0.679086037142, 1}},
		{2890, 3213, 2970, 3213, Interval{0.0110502185994, 0.0387943070795}},
	} {
		got := must(Newcombe(c.kc, c.nc, c.kt, c.nt, .05))
		if !near(got.Low, c.want.Low) || !near(got.High, c.want.High) {
			t.Errorf("%+v: got %v", c, got)
		}
	}
}

// scipy fisher_exact and statsmodels proportions_ztest; 3/4 against 1/4 is Fisher's tea.
func TestTwoProportionTests(t *testing.T) {
	for _, c := range []struct {
		kc, nc, kt, nt uint64
		fisher, z, p   float64
	}{
		{8, 10, 1, 6, 0.034965034965, -2.4722801848, 0.0134254248815},
		{3, 4, 1, 4, 0.485714285714, -1.41421356237, 0.15729920705},
		{2, 1000, 12, 1000, 0.0126410305968, 2.68201596008, 0.00731799683849},
		{0, 29, 5, 56, 0.160621443209, 1.65864886924, 0.0971865681706},
		{500, 1000, 540, 1000, 0.0808666323211, 1.7902871851, 0.0734077553235},
		{1, 100000, 15, 100000, 0.000518560827325, 3.5001400084, 0.000465013852119},
		{4, 500000, 10, 250000, 0.00403922860447, 3.02374400582, 0.00249667602068},
		{30, 60, 30, 60, 1, 0, 1},
	} {
		f := must(Fisher(c.kc, c.nc, c.kt, c.nt))
		z, p, err := PooledZ(c.kc, c.nc, c.kt, c.nt)
		if err != nil || !near(f, c.fisher) || !near(z, c.z) || !near(p, c.p) {
			t.Errorf("%+v: Fisher %.12g, z %.12g, p %.12g, %v", c, f, z, p, err)
		}
	}
}

// Fisher's test by adding up every table, for all small tables.
func TestFisherAgainstEnumeration(t *testing.T) {
	choose := func(n, k uint64) float64 {
		return math.Round(math.Exp(logChoose(float64(n), float64(k))))
	}
	for nc := uint64(1); nc <= 7; nc++ {
		for nt := uint64(1); nt <= 6; nt++ {
			for kc := range nc + 1 {
				for kt := range nt + 1 {
					seen, sum, all := choose(nc, kc)*choose(nt, kt), 0.0, 0.0
					for i := range min(nc, kc+kt) + 1 {
						if kc+kt-i > nt {
							continue
						}
						w := choose(nc, i) * choose(nt, kc+kt-i)
						all += w
						if w <= seen {
							sum += w
						}
					}
					if got := must(Fisher(kc, nc, kt, nt)); !near(got, sum/all) {
						t.Fatalf("%d/%d against %d/%d: %v, enumeration %v", kc, nc, kt, nt, got, sum/all)
					}
				}
			}
		}
	}
}

// scipy ttest_ind(equal_var=False) on the sample of Welch's test in common textbooks
// (one value changed), and scipy's t distribution.
func TestWelch(t *testing.T) {
	a := []float64{27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4}
	b := []float64{27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4}
	c := must(Compare(must(sample(a).Mean()), must(sample(b).Mean())))
	z, p, ci, err := WelchT(c, .05)
	if err != nil || !near(z, 2.45535639829) || !near(p, 0.0213780014629) || !near(c.DF, 24.9885292902) ||
		!near(ci.Low, 0.349237066192) || !near(ci.High, 3.98409626714) {
		t.Errorf("t %.12g, p %.12g, df %.12g, %v, %v", z, p, c.DF, ci, err)
	}
	for _, v := range []struct{ t, df, p, crit float64 }{
		{2, 5, 0.10193947883, 2.57058183564}, {12, 3.5, 0.000574534192856, 2.94008863798},
		{40, 1000, 1.04788521552e-209, 1.96233908083}, {3, 1e6, 0.00269986254142, 1.95996635681},
		{5, 9e6, 5.73313881258e-07, 1.95996424813}, {.001, 2, 0.999292893396, 4.30265272975},
	} {
		if p, c := twoSidedT(v.t, v.df), upperT(.025, v.df); math.Abs(p/v.p-1) > 1e-6 || !near(c, v.crit) {
			t.Errorf("%+v: p %.12g, critical %.12g", v, p, c)
		}
	}
}

func sample(xs []float64) Sums {
	var s Sums
	for _, x := range xs {
		if err := s.Add(x, 0); err != nil {
			panic(err)
		}
	}
	return s
}

// The inputs and five-digit results are those of GrowthBook's own tests (gbstats,
// tests/frequentist/test_tests.py), here with its t-test and its sequential test.
func TestGrowthBook(t *testing.T) {
	a := must(SumsOf(3407, 1396.87, 52377.9767, 0, 0, 0))
	b := must(SumsOf(3461, 2422.7, 134698.29, 0, 0, 0))
	c := must(Compare(must(a.Mean()), must(b.Mean())))
	_, p, ci, err := WelchT(c, .05)
	if err != nil || !digits(c.Difference, .29) || !digits(c.SE(), .12478) || !digits(p, .02016) || !digits(ci.Low, .04538) || !digits(ci.High, .53462) {
		t.Errorf("absolute: %v ± %v, p %v, %v, %v", c.Difference, c.SE(), p, ci, err)
	}
	se := math.Sqrt(c.RelativeVariance)
	if !digits(c.Relative, .70732) || !digits(se, .37879) {
		t.Errorf("relative: %v ± %v", c.Relative, se)
	}
	if p := twoSidedT(c.Relative/se, c.DF); !digits(p, .06191) {
		t.Errorf("relative: p %v", p)
	}

	a = must(SumsOf(3000, 1396.87, 52377.9767, 0, 0, 0))
	c = must(Compare(must(a.Mean()), must(b.Mean())))
	s := Sequence{Alpha: .05, Tuning: 1000}
	ci = must(s.Interval(c.Relative, c.RelativeVariance, c.N))
	if !digits(ci.Low, -.55844) || !digits(ci.High, 1.56516) || s.P(c.Relative/math.Sqrt(c.RelativeVariance), c.N) != 1 {
		t.Errorf("sequential mean: %v", ci)
	}

	c = must(Compare(must(must(Count(1396, 3000)).Proportion()), must(must(Count(2422, 3461)).Proportion())))
	ci = must(Sequence{Alpha: .05, Tuning: 5000}.Interval(c.Relative, c.RelativeVariance, c.N))
	if !digits(ci.Low, .40098) || !digits(ci.High, .60675) {
		t.Errorf("sequential proportion: %v", ci)
	}
	c = must(Compare(must(must(Count(14, 28)).Proportion()), must(must(Count(16, 30)).Proportion())))
	if se := math.Sqrt(c.RelativeVariance); !digits(c.Relative, .06667) || !digits(se, .2717) {
		t.Errorf("binomial: %v ± %v", c.Relative, se)
	}
}

// GrowthBook's one-sided sequential test, all digits; its p-value is the point after the
// one at which its bisection converged, so only its first three digits are right. Both p-values reach alpha exactly where z reaches the half width.
func TestOneSidedSequence(t *testing.T) {
	a, b := must(SumsOf(3000, 1396.87, 52377.9767, 0, 0, 0)), must(SumsOf(3461, 2422.7, 134698.29, 0, 0, 0))
	c := must(Compare(must(a.Mean()), must(b.Mean())))
	s := Sequence{Alpha: .05, Tuning: 5000}
	half := s.HalfWidthOneSided(c.N)
	if se := math.Sqrt(c.RelativeVariance); !near(se, 0.3334122146400735) || !near(c.Relative-half*se, -0.42356454602790883) {
		t.Errorf("relative: ± %v, bound %v", se, c.Relative-half*se)
	}
	if p := s.POneSided(c.Z(), c.N); !near(c.Difference-half*c.SE(), -0.12656844172804982) || !within(p, 0.46316491943359384, 5e-4) {
		t.Errorf("absolute: bound %v, p %v", c.Difference-half*c.SE(), p)
	}
	for _, alpha := range []float64{1e-9, .01, .05, .4} {
		for _, n := range []uint64{1, 300, 5000, 1 << 40} {
			s := Sequence{Alpha: alpha, Tuning: 5000}
			if p := s.P(s.HalfWidth(n), n); !within(p/alpha, 1, 1e-6) {
				t.Errorf("alpha %v, %d units: p %v at the boundary", alpha, n, p)
			}
			if p := s.POneSided(s.HalfWidthOneSided(n), n); !within(p/alpha, 1, 1e-6) {
				t.Errorf("alpha %v, %d units: one-sided p %v at the boundary", alpha, n, p)
			}
			if alpha <= .05 && n > 1 && s.HalfWidthOneSided(n) >= s.HalfWidth(n) {
				t.Errorf("alpha %v, %d units: one bound is not tighter than two", alpha, n)
			}
		}
	}
	if s.POneSided(-3, 100) != 1 || s.POneSided(math.NaN(), 100) != 1 || s.P(math.NaN(), 100) != 1 {
		t.Error("no evidence is not p = 1")
	}
}

func digits(got, want float64) bool { return math.Abs(got-want) <= 5.1e-6 }

// The same numbers to twelve digits from the formulas in numpy; the means are those of
// GrowthBook's regression-adjusted ratio test, whose relative difference is -0.0007.
func TestCUPEDRatioReference(t *testing.T) {
	a := jointOf(100, [4]float64{485.112236689623, 679.9093275844917, 192.59138069991536, 290.1398399750233},
		[4]float64{2715.484666118136, 4939.424001640236, 460.076026390857, 920.9461385038898},
		map[[2]int]float64{{0, 2}: 1113.6215759318352, {1, 3}: 2130.9404074446747, {2, 3}: 634.239482353647,
			{0, 1}: 3602.146836776702, {0, 3}: 1559.2878434944676, {1, 2}: 1460.3181079276983})
	b := jointOf(100, [4]float64{514.7757826608777, 705.4090874383759, 206.94157227402536, 302.54389139107326},
		[4]float64{2994.897482705013, 5291.36604146392, 514.2703902246757, 994.4506208125663},
		map[[2]int]float64{{0, 2}: 1237.0953021125997, {1, 3}: 2292.081739775257, {2, 3}: 698.4173425817908,
			{0, 1}: 3918.1561431600717, {0, 3}: 1701.0287270040265, {1, 2}: 1604.0759503266522})
	theta, e, err := CUPEDRatio([]Joint{a, b})
	if err != nil || !near(theta, 0.82964977079) || !near(e[0].Value, 0.722057519253) || !near(e[0].Variance*1e6, 3.36264737414) ||
		!near(e[1].Value, 0.721543967113) || !near(e[1].Variance*1e6, 4.26009820097) {
		t.Fatalf("θ %.12g, %+v, %v", theta, e, err)
	}
	if c := must(Compare(e[0], e[1])); math.Abs(c.Relative+.0007) > 5e-5 {
		t.Errorf("relative difference %v", c.Relative)
	}
}

func jointOf(n uint64, sum, squares [4]float64, products map[[2]int]float64) Joint {
	j := Joint{N: n, Sum: sum}
	for i := range 4 {
		j.Dev[i][i] = squares[i] - sum[i]*sum[i]/float64(n)
	}
	for ij, p := range products {
		d := p - sum[ij[0]]*sum[ij[1]]/float64(n)
		j.Dev[ij[0]][ij[1]], j.Dev[ij[1]][ij[0]] = d, d
	}
	return j
}

// The six-digit values are from confseq's unit tests (bernoulli_confidence_interval in
// test/uniform_boundaries_unittest.cpp); more digits, and the last two rows, from mpmath.
func TestProportionSequence(t *testing.T) {
	for _, c := range []struct {
		k, n          uint64
		alpha, tuning float64
		want          Interval
	}{
		{700, 1000, .05, 100, Interval{0.6516298138699, 0.745949500785}},
		{15, 50, .05, 50, Interval{0.1295569949751, 0.5118964025365}},
		{5, 50, .05, 50, Interval{0.013021, 0.269264}},
		{1, 50, .05, 50, Interval{0, 0.1348915866818}},
		{1, 2, .05, 50, Interval{0, 1}},
		{100, 200, .05, 1, Interval{0.328923, 0.671076}},
		{0, 1, .05, 50, Interval{0, 1}},
		{1, 1, .05, 50, Interval{0, 1}},
		{950, 1000, .01, 5000, Interval{0.9185272016919, 0.9721428182114}},
		{3, 100000, .05, 10000, Interval{3.542394134575e-7, 0.0001216796599931}},
	} {
		got := must(Sequence{Alpha: c.alpha, Tuning: c.tuning}.Proportion(c.k, c.n))
		// The published values have six digits after the point.
		if math.Abs(got.Low-c.want.Low) > 1e-6 || math.Abs(got.High-c.want.High) > 1e-6 {
			t.Errorf("%+v: got %.12g %.12g", c, got.Low, got.High)
		}
	}
	got := must(Sequence{Alpha: .05, Tuning: 10000}.Proportion(3, 100000))
	if math.Abs(got.Low/3.542394134575e-7-1) > 1e-6 || math.Abs(got.High/0.0001216796599931-1) > 1e-6 {
		t.Errorf("3 of 100000: %.12g %.12g", got.Low, got.High)
	}
}

// confseq's QuantileABTest unit test: 1..1000 against the same shifted by an offset.
func TestQuantileComparisonReference(t *testing.T) {
	arm := func(offset int) []bin {
		out := make([]bin, 1000)
		for i := range out {
			v := float64(offset + i + 1)
			out[i] = bin{v, v, 1}
		}
		return out
	}
	for _, c := range []struct {
		level  float64
		offset int
		p      float64
	}{{.5, 70, 0.814704}, {.5, 85, 0.0838055}, {.5, 100, 0.0054947}, {.9, 55, 0.0340463}} {
		log := quantileEvidence(arm(0), arm(c.offset), c.level, Sequence{Alpha: .05, Tuning: 100})
		if p := math.Exp(-log); math.Abs(p/c.p-1) > 2e-5 {
			t.Errorf("%+v: p %.7g", c, p)
		}
		if back := quantileEvidence(arm(c.offset), arm(0), c.level, Sequence{Alpha: .05, Tuning: 100}); back >= 0 {
			t.Errorf("%+v: the other direction has log e-value %v", c, back)
		}
	}
}

// The first row is the example of the R package safestats (safeTwoProportionsTest, one
// unit per arm and block); the values are the definition in mpmath.
func TestTwoByTwoReference(t *testing.T) {
	var e TwoByTwo
	ya, yb := []uint64{1, 0, 1, 0, 0, 0, 1}, []uint64{1, 0, 1, 1, 1, 0, 1}
	for i := range ya {
		if err := e.Add(ya[i], 1, yb[i], 1); err != nil {
			t.Fatal(err)
		}
	}
	if !near(e.LogE, 0.09121509707630547) {
		t.Errorf("log e-value %.16g", e.LogE)
	}
	e = TwoByTwo{}
	for _, b := range [][4]uint64{{2, 5, 4, 5}, {0, 0, 3, 9}, {1, 10, 9, 12}, {20, 1000, 60, 900}} {
		if err := e.Add(b[0], b[1], b[2], b[3]); err != nil {
			t.Fatal(err)
		}
	}
	if !near(e.LogE, -83.86703562365612) {
		t.Errorf("log e-value %.16g", e.LogE)
	}
}

// Five equal looks at two-sided 0.05: the table of Reboussin, DeMets, Kim and Lan's
// program (4.8769 3.3569 2.6803 2.2898 2.0310), which gsDesign's sfLDOF repeats. More
// digits, other rows and the powers from a Simpson rule on 2 001 points in numpy.
func TestOBrienFlemingBoundaries(t *testing.T) {
	for _, c := range []struct {
		alpha     float64
		fractions []float64
		want      []float64
		drift     float64
		power     float64
	}{
		{.05, []float64{.2, .4, .6, .8, 1}, []float64{4.8768849488, 3.3570119216, 2.6802800645, 2.2898167677, 2.0310320433}, 2.80158521811, 0.7902948718},
		{.05, []float64{.3, .45, 1}, []float64{3.9285725426, 3.1489758868, 1.9647923805}, 2.80158521811, 0.7991616223},
		{.01, []float64{.25, .5, .75, 1}, []float64{5.4929610255, 3.8013950260, 3.0444831704, 2.6030071999}, 3.41745053712, 0.7956994654},
		{.05, []float64{.1, .2, .3, .4, .5, .6, .7, .8, .9, 1}, []float64{6.9913517071, 4.8768851528, 3.9296822966, 3.3670790834, 2.9893298313, 2.7148089547, 2.5040772750, 2.3358290390, 2.1975032888, 2.0811757525}, 2.80158521811, 0.7851770302},
	} {
		got := must(Boundaries(c.alpha, c.fractions))
		for i := range got {
			if !near(got[i], c.want[i]) {
				t.Errorf("look %d of %v: %.10f, want %.10f", i+1, c.fractions, got[i], c.want[i])
			}
		}
		power, size := 0.0, 0.0
		for _, p := range must(CrossingProbabilities(got, c.fractions, c.drift)) {
			power += p
		}
		for _, p := range must(CrossingProbabilities(got, c.fractions, 0)) {
			size += p
		}
		if !near(power, c.power) || !near(size, c.alpha) {
			t.Errorf("%v: power %.10f, want %.10f; size %.10f", c.fractions, power, c.power, size)
		}
	}
}

// Jennison and Turnbull, Group Sequential Methods (2000), table 2.3: the constants C of
// the original O'Brien–Fleming boundaries C·√(K/k) at two-sided 0.05, and table 2.1 of
// Pocock's constant boundaries. They do not use spending, so they check the integration.
func TestClassicalBoundariesHaveTheirSize(t *testing.T) {
	for _, c := range []struct {
		looks       int
		obf, pocock float64
	}{{2, 1.977, 2.178}, {3, 2.004, 2.289}, {4, 2.024, 2.361}, {5, 2.040, 2.413}, {10, 2.087, 2.555}, {20, 2.126, 2.672}} {
		var fractions, obf, pocock []float64
		for k := 1; k <= c.looks; k++ {
			fractions = append(fractions, float64(k)/float64(c.looks))
			obf = append(obf, c.obf*math.Sqrt(float64(c.looks)/float64(k)))
			pocock = append(pocock, c.pocock)
		}
		for name, bounds := range map[string][]float64{"O'Brien–Fleming": obf, "Pocock": pocock} {
			sum := 0.0
			for _, p := range must(CrossingProbabilities(bounds, fractions, 0)) {
				sum += p
			}
			if math.Abs(sum-.05) > 1e-4 { // the constants have three digits after the point
				t.Errorf("%s, %d looks: size %v", name, c.looks, sum)
			}
		}
	}
}

func TestSpendingFunction(t *testing.T) {
	for _, c := range [][2]float64{{-1, 0}, {0, 0}, {1, .05}, {2, .05}, {math.NaN(), 0}} {
		if got := OBrienFlemingSpending(.05, c[0]); got != c[1] {
			t.Errorf("spent at %v: %v, want %v", c[0], got, c[1])
		}
	}
}

// statsmodels multipletests, scipy chisquare.
func TestMultiplicityReference(t *testing.T) {
	p := []float64{0.01, 0.04, 0.03, 0.005, 0.2, 0.03}
	for name, c := range map[string]struct{ got, want []float64 }{
		"Holm": {must(Holm(p)), []float64{.05, .12, .12, .03, .2, .12}},
		"BH":   {must(BenjaminiHochberg(p)), []float64{.03, .048, .045, .03, .2, .045}},
	} {
		for i := range p {
			if !near(c.got[i], c.want[i]) {
				t.Errorf("%s: %v, want %v", name, c.got, c.want)
				break
			}
		}
	}
	// Wang and Ramdas, by hand: n/(q·k) is 80, 40, 26.7, 20 for q = 0.05 and n = 4; the
	// third meets its threshold and carries the second with it.
	for _, c := range []struct {
		e    []float64
		want [4]bool
	}{
		{[]float64{30, 1, 90, 27}, [4]bool{true, false, true, true}},
		{[]float64{30, 1, 79, 20}, [4]bool{}},
		{[]float64{20, 20, 20, 20}, [4]bool{true, true, true, true}},
		{[]float64{math.Inf(1), 0, 0, 0}, [4]bool{true}},
	} {
		if got := must(EBH(c.e, .05)); [4]bool(got) != c.want {
			t.Errorf("e-BH %v: %v, want %v", c.e, got, c.want)
		}
	}
	chi := must(ChiSquareRatio([]Exposed{{"a", 3333, 821}, {"b", 3333, 781}, {"c", 3334, 800}}, .001))
	if math.Abs(chi.Statistic-1) > 1e-2 || chi.DF != 2 || chi.Mismatch || chi.Small {
		t.Errorf("chi-square %+v", chi)
	}
	chi = must(ChiSquareRatio([]Exposed{{"a", 5000, 5100}, {"b", 5000, 4900}, {"off", 0, 3}}, .05))
	if !near(chi.Statistic, 4) || !near(chi.P, 0.0455002638964) || !chi.Mismatch {
		t.Errorf("chi-square %+v", chi)
	}
	if chi = must(ChiSquareRatio([]Exposed{{"a", 9999, 9999}, {"b", 1, 9}}, .05)); !chi.Small || chi.Mismatch || chi.P != 1 {
		t.Errorf("chi-square with a small cell: %+v", chi)
	}
}

// Evan Miller, Formulas for Bayesian A/B testing (2014), closed form summed in mpmath;
// the loss by quadrature there. The normal values are GrowthBook's (tests/bayesian).
func TestChanceToWinReference(t *testing.T) {
	for _, c := range []struct {
		kc, nc, kt, nt uint64
		chance, loss   float64
	}{
		{49, 100, 51, 100, 0.6107705226878, 0.0191164612021},
		{2, 10, 9, 12, 0.9938609311001, 0.000390602465242},
		{0, 5, 0, 5, .5, 0.0659340659341},
		{120, 1000, 150, 1000, 0.9750678368121, 0.000144177855112},
		{950, 1000, 30, 31, 0.4865594054184, 0.0206269726126},
		{3, 20000, 9, 400, 1, 0},
	} {
		chance, loss, err := ChanceToWin(c.kc, c.nc, c.kt, c.nt)
		if err != nil || !near(chance, c.chance) || math.Abs(loss-c.loss) > 1e-6*c.loss+1e-12 {
			t.Errorf("%+v: chance %.12g, loss %.12g, %v", c, chance, loss, err)
		}
	}
	a, b := must(SumsOf(10, 100, 1002.25, 0, 0, 0)), must(SumsOf(10, 105, 1111.5, 0, 0, 0))
	c := must(Compare(must(a.Mean()), must(b.Mean())))
	rel := Contrast{Difference: c.Relative, Variance: c.RelativeVariance}
	if chance, loss := ChanceToWinNormal(rel); !digits(chance, .91923) || !digits(loss, .00131) {
		t.Errorf("normal: chance %v, loss %v", chance, loss)
	}
}

// R: power.t.test(n = 20, delta = 1, sd = 1) gives power 0.8689528, power.t.test(power =
// .90, delta = 1) gives n 22.02110, power.prop.test(n = 50, p1 = .50, p2 = .75) gives
// power 0.7401659, power.prop.test(p1 = .50, p2 = .75, power = .90) gives n 76.7 (R's
// documented examples); d = 0.5 needs 64 per arm for 80 % (Cohen 1988, table 2.4.1).
// Other digits from scipy's noncentral t.
func TestPlannerReference(t *testing.T) {
	for _, c := range []struct{ n, d, alpha, power float64 }{
		{20, 1, .05, 0.868953027724}, {64, .5, .05, 0.801459557922}, {15, 1, .05, 0.752923034503}, {1000, .1, .01, 0.366320125538},
	} {
		g := Goal{SD: 1, MDE: c.d, Alpha: c.alpha, Power: .9, Method: MethodFixed}
		if p := must(g.PowerAt(uint64(c.n))); !near(p, c.power) {
			t.Errorf("%+v: power %.12g", c, p)
		}
	}
	if n := (Goal{SD: 1, MDE: 1, Alpha: .05, Power: .9, Method: MethodFixed}).fixedUnits(); !near(n, 22.0210884264) {
		t.Errorf("n %.10g", n)
	}
	if n := must(Goal{SD: 1, MDE: -.5, Alpha: .05, Power: .8, Method: MethodFixed}.Size()).PerArm; n != 64 {
		t.Errorf("Cohen's example: %d", n)
	}
	g := Goal{Baseline: .5, MDE: .25, Alpha: .05, Power: .9, Method: MethodFixed}
	if n, p := g.fixedUnits(), must(g.PowerAt(50)); math.Abs(n-76.7) > .05 || math.Abs(p-.7401659) > 1e-7 {
		t.Errorf("power.prop.test: n %v, power %v", n, p)
	}
}
