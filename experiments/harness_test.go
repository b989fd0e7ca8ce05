package experiments

import (
	"math"
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

// The A/A harness: experiments without an effect, watched all the time. Whatever
// decides must be wrong in few of them. By default a slice runs; OUTRIGGER_LONG=1 runs
// more and longer experiments with more looks.
type harness struct {
	runs, units int // experiments, and units of both arms in each
	every       int // units between looks of the cheap rules
	analyses    int // looks through Analyse
}

func harnessSize() harness {
	if os.Getenv("OUTRIGGER_LONG") == "1" {
		return harness{runs: 2000, units: 40_000, every: 2, analyses: 40}
	}
	if raceEnabled { // nothing here is concurrent
		return harness{runs: 100, units: 4_000, every: 40, analyses: 2}
	}
	return harness{runs: 500, units: 4_000, every: 40, analyses: 2}
}

// firstLook is the units of both arms before the first look: what Plan.MinUnits waits for.
const firstLook = 2 * defaultMinUnits

// outcomes are the three kinds of data.
var outcomes = []struct {
	name string
	kind MetricKind
	draw func(*rand.Rand) float64
}{
	{"Bernoulli .05", KindProportion, func(r *rand.Rand) float64 { return bernoulli(r, .05) }},
	{"Bernoulli .95", KindProportion, func(r *rand.Rand) float64 { return bernoulli(r, .95) }},
	{"lognormal", KindMean, func(r *rand.Rand) float64 { return math.Exp(r.NormFloat64()) }},
}

func bernoulli(r *rand.Rand, p float64) float64 {
	if r.Float64() < p {
		return 1
	}
	return 0
}

// A rule says whether it would call the two arms different now.
type rule func(control, treatment Sums) bool

// falsePositives returns the share of A/A experiments in which the rule ever fires.
func (h harness) falsePositives(t *testing.T, draw func(*rand.Rand) float64, seed uint64, fires rule) float64 {
	wrong := 0
	for run := range h.runs {
		r := rand.New(rand.NewPCG(seed, uint64(run)))
		var arms [2]Sums
		for n := 1; n <= h.units; n++ {
			if err := arms[r.Uint64()&1].Add(draw(r), 0); err != nil {
				t.Fatal(err)
			}
			if n >= firstLook && n%h.every == 0 && fires(arms[0], arms[1]) {
				wrong++
				break
			}
		}
	}
	return float64(wrong) / float64(h.runs)
}

// sequenceRule is the primary test of MethodCS, without the report around it.
func sequenceRule(t *testing.T) rule {
	s := Sequence{Alpha: .05, Tuning: DefaultTuning}
	return func(a, b Sums) bool {
		x, err := a.Mean()
		if err != nil {
			t.Fatal(err)
		}
		y, err := b.Mean()
		if err != nil {
			t.Fatal(err)
		}
		z := (y.Value - x.Value) / math.Sqrt(x.Variance+y.Variance)
		return s.P(z, a.N+b.N) <= .05
	}
}

// seedRule is a formula once proposed for "significance": more than 9.5 % apart. It
// knows nothing of chance.
func seedRule(a, b Sums) bool {
	if min(a.N, b.N) < 500 {
		return false
	}
	x, y := a.SumX/float64(a.N), b.SumX/float64(b.N)
	return min(10*math.Abs(y-x)/x, 1) > .95
}

const falsePositiveLimit = .075

func TestPeekedAATests(t *testing.T) {
	h := harnessSize()
	for i, o := range outcomes {
		if got := h.falsePositives(t, o.draw, uint64(i), sequenceRule(t)); got > falsePositiveLimit {
			t.Errorf("%s: the confidence sequence was wrong in %.1f %% of %d experiments", o.name, 100*got, h.runs)
		} else {
			t.Logf("%s: wrong in %.1f %% of %d experiments", o.name, 100*got, h.runs)
		}
	}
}

// The harness must be able to fail a rule: it fails the formula, and a z-test that is
// looked at all the time.
func TestHarnessFailsBadRules(t *testing.T) {
	h := harnessSize()
	h.runs = 100
	z := func(a, b Sums) bool {
		c, err := Compare(must(a.Mean()), must(b.Mean()))
		return err == nil && math.Abs(c.Z()) > 1.96
	}
	for name, bad := range map[string]rule{"the formula": seedRule, "the peeked z-test": z} {
		worst := 0.0
		for i, o := range outcomes {
			worst = max(worst, h.falsePositives(t, o.draw, uint64(i), bad))
		}
		t.Logf("%s: wrong in up to %.1f %%", name, 100*worst)
		if worst <= falsePositiveLimit {
			t.Errorf("%s passes the harness with %.1f %%", name, 100*worst)
		}
	}
}

// The same through Analyse, with assignment by chance: neither the primary metric nor
// the sample ratio may conclude anything.
func TestPeekedAATestsAnalysed(t *testing.T) {
	h := harnessSize()
	for i, o := range outcomes {
		goal := Goal{Baseline: .5, MDE: .02, Alpha: .05, Power: .8, Method: MethodCS, Tuning: DefaultTuning}
		if o.kind == KindMean {
			goal.Baseline, goal.SD = 0, 2.16
		}
		plan := must(Plan{Control: "a", Treatments: []string{"b"}, Primary: Metric{Name: "m", Kind: o.kind}, Goal: goal}.Freeze())
		concluded, ratio := 0, 0
		for run := range h.runs {
			r := rand.New(rand.NewPCG(uint64(i)+10, uint64(run)))
			var arms [2]Sums
			wrong, mismatch := false, false
			for n := 1; n <= h.units; n++ {
				if err := arms[r.Uint64()&1].Add(o.draw(r), 0); err != nil {
					t.Fatal(err)
				}
				if n%(h.units/h.analyses) != 0 {
					continue
				}
				res := must(Analyse(plan, oneStratum(48*time.Hour, arms[0], arms[1])))
				wrong = wrong || res.Primary[0].Significant
				mismatch = mismatch || res.Decision.Outcome == OutcomeStoppedSRM
			}
			concluded += int(bernoulliOf(wrong))
			ratio += int(bernoulliOf(mismatch))
		}
		t.Logf("%s: of %d experiments %d concluded, %d stopped for the sample ratio", o.name, h.runs, concluded, ratio)
		if limit := falsePositiveLimit * float64(h.runs); float64(concluded) > limit || float64(ratio) > limit {
			t.Errorf("%s: of %d experiments %d concluded and %d stopped for the sample ratio", o.name, h.runs, concluded, ratio)
		}
	}
}

func bernoulliOf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// oneStratum is data of one region and epoch, split evenly between a and b.
func oneStratum(elapsed time.Duration, a, b Sums) Data {
	arm := func(name string, s Sums) ArmData {
		return ArmData{Name: name, Weight: Buckets / 2, Units: s.N, Cells: map[string]Cell{"m": {Sums: s}}}
	}
	return Data{Elapsed: elapsed, Strata: []StratumData{{Stratum{"eu", 1}, []ArmData{arm("a", a), arm("b", b)}}}}
}

// The sequential sample ratio test on correct assignment, looked at all the time.
func TestPeekedSampleRatio(t *testing.T) {
	h := harnessSize()
	wrong := 0
	for run := range h.runs {
		r := rand.New(rand.NewPCG(99, uint64(run)))
		arms := []Exposed{{"a", 5000, 0}, {"b", 5000, 0}}
		for n := 1; n <= h.units; n++ {
			arms[r.Uint64()&1].Units++
			if n%h.every == 0 && must(CheckSampleRatio(arms, .05)).Mismatch {
				wrong++
				break
			}
		}
	}
	t.Logf("wrong in %d of %d experiments at α = 5 %%", wrong, h.runs)
	if float64(wrong) > falsePositiveLimit*float64(h.runs) {
		t.Errorf("wrong in %d of %d experiments", wrong, h.runs)
	}
}

// Users with 20 requests each, alike among themselves (intra-user correlation 0.2), seen
// in pieces by three sidecars and put together by the ledger: per user the error rate is
// right, per request it is wrong in every third.
func TestClusteredAATests(t *testing.T) {
	const users, p, correlation = 500, .2, .2 // and 20 requests each
	h := harnessSize()
	plan := must(Plan{Control: "a", Treatments: []string{"b"}, Primary: Metric{Name: "m", Kind: KindRatio, LowerIsBetter: true},
		Goal: Goal{SD: .5, MDE: .02, Alpha: .05, Power: .8, Method: MethodFixed}, UnitsPerArm: users / 2 * 9 / 10}.Freeze())
	watched := plan
	watched.Goal.Method, watched.Goal.Tuning = MethodCS, users
	fixed, peeked, naive := 0, 0, 0
	for run := range h.runs {
		r := rand.New(rand.NewPCG(5, uint64(run)))
		ledger := NewLedger(users)
		var byRequest [2]Sums
		ever := false
		for u := range uint32(users) {
			arm := r.Uint64() & 1
			rate := betaDraw(r, p, correlation)
			for sidecar := range 3 {
				row := UnitRow{Unit: u, Arm: string(rune('a' + arm)), Stratum: Stratum{"eu", 1}}
				for range [...]int{7, 7, 6}[sidecar] {
					x := bernoulli(r, rate)
					row.X, row.Y = row.X+x, row.Y+1
					if err := byRequest[arm].Add(x, 0); err != nil {
						t.Fatal(err)
					}
				}
				if err := ledger.Add(row); err != nil {
					t.Fatal(err)
				}
			}
			if u%50 == 49 && u >= firstLook {
				ever = ever || must(Analyse(watched, ledgerData(t, ledger))).Primary[0].Significant
			}
		}
		res := must(Analyse(plan, ledgerData(t, ledger)))
		if res.Information < 1 {
			t.Fatalf("information %v: the fixed test was not due", res.Information)
		}
		fixed += int(bernoulliOf(res.Primary[0].Significant))
		peeked += int(bernoulliOf(ever))
		_, pv, err := PooledZ(uint64(byRequest[0].SumX), byRequest[0].N, uint64(byRequest[1].SumX), byRequest[1].N)
		if err != nil {
			t.Fatal(err)
		}
		naive += int(bernoulliOf(pv <= .05))
	}
	t.Logf("of %d: fixed %d, watched %d, per request %d", h.runs, fixed, peeked, naive)
	if limit := .085 * float64(h.runs); float64(fixed) > limit || float64(peeked) > limit {
		t.Errorf("of %d clustered experiments the fixed test was wrong in %d, the watched one in %d", h.runs, fixed, peeked)
	}
	if float64(naive) < .2*float64(h.runs) {
		t.Errorf("the per-request test was wrong in %d of %d: the data are not clustered", naive, h.runs)
	}
}

// betaDraw draws a rate with the given mean and intra-class correlation.
func betaDraw(r *rand.Rand, mean, correlation float64) float64 {
	n := 1/correlation - 1
	x, y := gammaDraw(r, mean*n), gammaDraw(r, (1-mean)*n)
	return x / (x + y)
}

// gammaDraw is Marsaglia and Tsang's method, boosted for shapes below 1.
func gammaDraw(r *rand.Rand, shape float64) float64 {
	if shape < 1 {
		return gammaDraw(r, shape+1) * math.Pow(r.Float64(), 1/shape)
	}
	d := shape - 1.0/3
	for {
		x := r.NormFloat64()
		v := 1 + x/math.Sqrt(9*d)
		v = v * v * v
		if v > 0 && math.Log(r.Float64()) < x*x/2+d-d*v+d*math.Log(v) {
			return d * v
		}
	}
}

func ledgerData(t *testing.T, l *Ledger) Data {
	d := Data{Elapsed: 48 * time.Hour, Exposure: l.Exposure(), Strata: []StratumData{{Stratum: Stratum{"eu", 1}}}}
	cells, err := l.Cells(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cells {
		d.Strata[0].Arms = append(d.Strata[0].Arms, ArmData{Name: c.Arm, Weight: Buckets / 2, Units: c.Sums.N, Cells: map[string]Cell{"m": {Sums: c.Sums}}})
	}
	return d
}

// A lift from 90 to 92 % with the 3 213 units per arm the planner asks for: found in
// about 80 % of experiments, and never in the wrong direction.
func TestPowerIsAsPlanned(t *testing.T) {
	h := harnessSize()
	plan := must(Plan{Control: "a", Treatments: []string{"b"}, Primary: Metric{Name: "m", Kind: KindProportion},
		Goal: Goal{Baseline: .9, MDE: .02, Alpha: .05, Power: .8, Method: MethodFixed}}.Freeze())
	if plan.UnitsPerArm != 3213 {
		t.Fatalf("%d units per arm, want 3213", plan.UnitsPerArm)
	}
	shipped, kept := 0, 0
	for run := range h.runs {
		r := rand.New(rand.NewPCG(11, uint64(run)))
		var k [2]uint64
		for range plan.UnitsPerArm {
			k[0] += uint64(bernoulli(r, .90))
			k[1] += uint64(bernoulli(r, .92))
		}
		res := must(Analyse(plan, oneStratum(48*time.Hour, must(Count(k[0], plan.UnitsPerArm)), must(Count(k[1], plan.UnitsPerArm)))))
		switch {
		case res.Decision.Outcome == OutcomeShip:
			shipped++
		case res.Primary[0].Significant:
			kept++
		}
	}
	t.Logf("of %d: found %d, wrong way %d", h.runs, shipped, kept)
	if float64(shipped) < .75*float64(h.runs) || kept > 0 {
		t.Errorf("of %d: found %d, wrong way %d; want at least 75 %% and none", h.runs, shipped, kept)
	}
}

// Group sequential plans: 10 looks, no effect and the planned one.
func TestGroupSequentialErrorAndPower(t *testing.T) {
	h := harnessSize()
	g := Goal{Baseline: .9, MDE: .02, Alpha: .05, Power: .8, Method: MethodOBF, Looks: 10}
	size := must(g.Size())
	fractions := make([]float64, g.Looks)
	for i := range fractions {
		fractions[i] = float64(i+1) / float64(g.Looks)
	}
	bounds := must(Boundaries(g.Alpha, fractions))
	stops := func(seed uint64, p float64) (share float64, units float64) {
		for run := range h.runs {
			r := rand.New(rand.NewPCG(seed, uint64(run)))
			var k [2]uint64
			n := uint64(0)
			for i, f := range fractions {
				for ; n < uint64(f*float64(size.PerArm)); n++ {
					k[0] += uint64(bernoulli(r, .90))
					k[1] += uint64(bernoulli(r, p))
				}
				if z, _, err := PooledZ(k[0], n, k[1], n); err != nil {
					t.Fatal(err)
				} else if math.Abs(z) >= bounds[i] {
					share += 1 / float64(h.runs)
					break
				}
			}
			units += float64(n) / float64(h.runs)
		}
		return share, units
	}
	wrong, _ := stops(21, .90)
	found, mean := stops(22, .92)
	t.Logf("wrong %.1f %%, found %.1f %% after a mean of %.0f units per arm (planned %d)", 100*wrong, 100*found, mean, size.ExpectedPerArm)
	if wrong > falsePositiveLimit || found < .75 || math.Abs(mean/float64(size.ExpectedPerArm)-1) > .05 {
		t.Errorf("wrong %v, found %v, mean %v of %+v", wrong, found, mean, size)
	}
}

// The 2×2 e-process is exact from the first unit: rare events, watched from n = 1.
func TestTwoByTwoIsSafe(t *testing.T) {
	h := harnessSize()
	for _, p := range []float64{.01, .5} {
		wrong := 0
		for run := range h.runs {
			r := rand.New(rand.NewPCG(31, uint64(run)))
			var e TwoByTwo
			for range h.units / 4 {
				if err := e.Add(uint64(bernoulli(r, p)), 1, uint64(bernoulli(r, p)), 1); err != nil {
					t.Fatal(err)
				}
				if e.P() <= .05 {
					wrong++
					break
				}
			}
		}
		t.Logf("p = %v: wrong in %d of %d", p, wrong, h.runs)
		if float64(wrong) > falsePositiveLimit*float64(h.runs) {
			t.Errorf("p = %v: wrong in %d of %d", p, wrong, h.runs)
		}
	}
}
