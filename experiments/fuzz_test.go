package experiments

import (
	"encoding/json"
	"math"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

// checkErr demands that whatever floats come in, failure is of kind Invalid.
func checkErr(t *testing.T, what string, err error, values ...float64) {
	t.Helper()
	if err != nil {
		if !outrigger.IsKind(err, outrigger.Invalid) {
			t.Fatalf("%s: %v, want kind invalid", what, err)
		}
		return
	}
	for _, v := range values {
		if math.IsNaN(v) {
			t.Fatalf("%s gives NaN and no error", what)
		}
	}
}

func probability(t *testing.T, what string, p float64) {
	t.Helper()
	if !(p >= 0 && p <= 1) {
		t.Fatalf("%s is %v, not a probability", what, p)
	}
}

func FuzzNumbers(f *testing.F) {
	for _, s := range [][4]float64{{.05, 1, 2, 3}, {math.NaN(), math.Inf(1), -1, 0}, {1e-12, 1e60, 1e-300, 1e308}, {.5, 0, 0, 0}, {1e-11, 1 << 40, 1e-5, 1}} {
		f.Add(s[0], s[1], s[2], s[3], uint64(3), uint64(10), uint64(1<<39), uint64(1<<40))
	}
	f.Fuzz(func(t *testing.T, alpha, x, y, z float64, k, n, l, m uint64) {
		w, err := Wilson(k, n, alpha)
		checkErr(t, "Wilson", err, w.Low, w.High)
		w, err = ClopperPearson(k, n, alpha)
		checkErr(t, "ClopperPearson", err, w.Low, w.High)
		w, err = Newcombe(k, n, l, m, alpha)
		checkErr(t, "Newcombe", err, w.Low, w.High)
		score, p, err := PooledZ(k, n, l, m)
		checkErr(t, "PooledZ", err, score, p)
		probability(t, "PooledZ", p)
		p, err = Fisher(k, n, l, m)
		checkErr(t, "Fisher", err)
		probability(t, "Fisher", p)
		p, loss, err := ChanceToWin(k, n, l, m)
		checkErr(t, "ChanceToWin", err, loss)
		probability(t, "ChanceToWin", p)

		s := Sequence{Alpha: alpha, Tuning: x}
		w, err = s.Proportion(k, n)
		checkErr(t, "Proportion", err, w.Low, w.High)
		w, err = s.Interval(y, z, n)
		checkErr(t, "Interval", err, w.Low, w.High)
		if s.Check() == nil && n > 0 {
			probability(t, "P", s.P(y, n))
			if alpha < .5 {
				probability(t, "POneSided", s.POneSided(y, n))
			}
		}
		var e TwoByTwo
		checkErr(t, "TwoByTwo", e.Add(k, n, l, m))
		checkErr(t, "TwoByTwo", e.Add(l, m, k, n), e.LogE)
		probability(t, "TwoByTwo", e.P())

		b, err := Boundaries(alpha, []float64{x, y})
		checkErr(t, "Boundaries", err, b...)
		b, err = CrossingProbabilities([]float64{x, y}, []float64{.5, 1}, z)
		checkErr(t, "CrossingProbabilities", err, b...)
		for name, f := range map[string]func([]float64) ([]float64, error){"Holm": Holm, "BH": BenjaminiHochberg} {
			b, err = f([]float64{x, y, z, alpha})
			checkErr(t, name, err, b...)
			for _, p := range b {
				probability(t, name, p)
			}
		}
		_, err = EBH([]float64{x, y, z}, alpha)
		checkErr(t, "EBH", err)
		_, err = ZeroFailureUnits(x, alpha)
		checkErr(t, "ZeroFailureUnits", err)
	})
}

func FuzzSummaries(f *testing.F) {
	f.Add(uint64(3), 1.0, 2.0, 3.0, 4.0, 5.0, .05)
	f.Add(uint64(2), 1e60, 1e60, 1e120, 1e120, 1e120, .01)
	f.Add(uint64(100), -5.0, 1e-320, 10.0, 1e-300, 0.0, .5)
	f.Fuzz(func(t *testing.T, n uint64, sx, sy, xx, yy, xy, alpha float64) {
		s := Sums{N: n, SumX: sx, SumY: sy, DevXX: xx, DevYY: yy, DevXY: xy}
		o, err := SumsOf(n, sx, xx, sy, yy, xy)
		checkErr(t, "SumsOf", err)
		for _, s := range []Sums{s, o} {
			if s.Check() != nil {
				continue
			}
			for name, f := range map[string]func() (Estimate, error){"Mean": s.Mean, "Ratio": s.Ratio, "Proportion": s.Proportion} {
				e, err := f()
				checkErr(t, name, err, e.Value, e.Variance)
				if err != nil {
					continue
				}
				c, err := Compare(e, e)
				checkErr(t, "Compare", err, c.Variance, c.Relative, c.RelativeVariance, c.DF)
				if err == nil {
					_, p, ci, err := WelchT(c, alpha)
					checkErr(t, "WelchT", err, p, ci.Low, ci.High)
				}
			}
			theta, e, err := CUPED([]Sums{s, s})
			checkErr(t, "CUPED", err, theta)
			for _, e := range e {
				checkErr(t, "CUPED", nil, e.Value, e.Variance)
			}
		}
		j := Joint{N: n, Sum: [4]float64{sx, sy, sy, sx}}
		for i, v := range []float64{xx, yy, yy, xx} {
			j.Dev[i][i] = v
		}
		theta, _, err := CUPEDRatio([]Joint{j, j})
		checkErr(t, "CUPEDRatio", err, theta)
	})
}

func FuzzAnalyse(f *testing.F) {
	f.Add(uint8(0), uint8(0), .9, .02, .05, uint64(900), uint64(1000), uint64(950), uint64(1000), 10.0, 3.0, .5, int64(48))
	f.Add(uint8(1), uint8(1), .9, .02, .05, uint64(900), uint64(1000), uint64(950), uint64(1000), 10.0, 3.0, .5, int64(48))
	f.Add(uint8(2), uint8(2), .1, -.02, .01, uint64(0), uint64(0), uint64(1<<39), uint64(1<<40), -1e60, math.NaN(), 1.0, int64(1000))
	f.Add(uint8(3), uint8(0), .1, -.02, .01, uint64(1), uint64(2), uint64(2), uint64(2), 1e60, 1e120, .1, int64(1000))
	f.Fuzz(func(t *testing.T, method, kind uint8, base, mde, alpha float64, ka, na, kb, nb uint64, x, dev, look float64, hours int64) {
		plan := Plan{Control: "a", Treatments: []string{"b"},
			Primary:     Metric{Name: "m", Kind: []MetricKind{KindProportion, KindMean, KindRatio}[kind%3], LowerIsBetter: kind&4 > 0, Adjust: kind&8 > 0},
			Goal:        Goal{Baseline: base, MDE: mde, Alpha: alpha, Power: .8, Looks: 4, Tuning: 1000, Method: []Method{MethodCS, MethodFixed, MethodOBF, MethodEProcess}[method%4]},
			Guardrails:  []Guardrail{{Metric: Metric{Name: "g", Kind: KindMean, LowerIsBetter: true}, Margin: .1}, {Metric: Metric{Name: "q", Kind: KindQuantile, Quantile: .9}}},
			Secondary:   []Metric{{Name: "g", Kind: KindRatio, Adjust: true}},
			UnitsPerArm: 1000}
		if kind%3 > 0 {
			plan.Goal.SD = 1
		}
		var q Quantiles
		_ = q.Add(math.Abs(x)) // refused values leave it empty, which is also a case
		side := func(name string, k, n uint64) ArmData {
			s, _ := Count(k, n) // empty if refused
			if kind%3 > 0 {
				s = Sums{N: n, SumX: x, SumY: dev, DevXX: dev, DevYY: dev, DevXY: dev / 2}
			}
			j := Joint{N: n, Sum: [4]float64{x, dev, x, dev}}
			return ArmData{Name: name, Weight: 5000, Units: n, Cells: map[string]Cell{
				"m": {Sums: s, Joint: j, EProcess: TwoByTwo{LogE: x}},
				"g": {Sums: Sums{N: n, SumX: x, DevXX: dev}, Joint: j}, "q": {Quantiles: q}}}
		}
		data := Data{Elapsed: time.Duration(hours) * time.Hour, Looks: []float64{look},
			Strata: []StratumData{{Stratum{"eu", 1}, []ArmData{side("a", ka, na), side("b", kb, nb)}}}}
		r, err := Analyse(plan, data)
		if err != nil {
			checkErr(t, "Analyse", err)
			return
		}
		for _, c := range append(r.Primary, r.Secondary...) {
			for _, p := range []float64{c.P, c.NominalP, c.AdjustedP, c.ChanceToWin} {
				probability(t, c.Metric, p)
			}
		}
		if _, err := json.Marshal(r); err != nil {
			t.Fatalf("not to be sent as JSON: %v", err)
		}
		if d := r.Decision; d.Outcome == "" || len(d.Reasons) == 0 || d.Final() != (d.Serve != "") {
			t.Fatalf("decision %+v", d)
		}
	})
}
