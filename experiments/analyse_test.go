package experiments

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

const day = 24 * time.Hour

// ab is a frozen plan of control a and treatment b on the proportion "ok".
func ab(t *testing.T, method Method, change func(*Plan)) Plan {
	t.Helper()
	p := Plan{Control: "a", Treatments: []string{"b"}, Primary: Metric{Name: "ok", Kind: KindProportion},
		Goal: Goal{Baseline: .9, MDE: .02, Alpha: .05, Power: .8, Method: method, Looks: 5, Tuning: 5000}}
	// The goal's sizes, rounded, so that they need not be computed for every row.
	p.UnitsPerArm = map[Method]uint64{MethodCS: 5150, MethodFixed: 3213, MethodOBF: 3330, MethodEProcess: 6426}[method]
	if change != nil {
		change(&p)
	}
	f, err := p.Freeze()
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// arm builds an arm with k of n successes on "ok".
func arm(name string, weight uint32, k, n uint64) ArmData {
	return ArmData{Name: name, Weight: weight, Units: n, Cells: map[string]Cell{"ok": {Sums: must(Count(k, n))}}}
}

func stratum(region string, epoch uint64, arms ...ArmData) StratumData {
	return StratumData{Stratum{region, epoch}, arms}
}

// Every number of a small result, computed by hand (or with a pocket calculator).
func TestAnalyseByHand(t *testing.T) {
	plan := ab(t, MethodCS, nil)
	r := must(Analyse(plan, Data{Elapsed: 2 * day, Strata: []StratumData{
		stratum("eu", 1, arm("a", 5000, 1800, 2000), arm("b", 5000, 1900, 2000)),
		stratum("us", 1, arm("a", 5000, 700, 1000), arm("b", 5000, 800, 1000)),
	}}))
	c := r.Primary[0]
	// Weights 1000 and 500 of 1500; differences .05 and .10.
	if !near(c.Strata[0].Weight, 2.0/3) || !near(c.Strata[1].Weight, 1.0/3) {
		t.Errorf("weights %v and %v", c.Strata[0].Weight, c.Strata[1].Weight)
	}
	diff := 2.0/3*.05 + 1.0/3*.10
	variance := 4.0/9*(.9*.1/2000+.95*.05/2000) + 1.0/9*(.7*.3/1000+.8*.2/1000)
	for name, v := range map[string][2]float64{
		"difference": {c.Difference, diff}, "variance": {c.Variance, variance},
		"control":  {c.Control.Value, 2.0/3*.9 + 1.0/3*.7},
		"relative": {c.Relative, diff / (2.0/3*.9 + 1.0/3*.7)},
		// CMH: Σw·d/√Σw·p(1−p), w = 1000 and 500, pooled p = .925 and .75.
		"score z":     {c.Z, (1000*.05 + 500*.10) / math.Sqrt(1000*.925*.075+500*.75*.25)},
		"information": {r.Information, 1500 / (float64(plan.UnitsPerArm) / 2)},
		"arm a":       {r.Arms[0].Value, c.Control.Value}, "arm b": {r.Arms[1].Value, c.Treatment.Value},
	} {
		if !near(v[0], v[1]) {
			t.Errorf("%s %v, by hand %v", name, v[0], v[1])
		}
	}
	// ρ² = (−2ln.05 + ln(1−2ln.05))/5000 and N = 6 000 units.
	rho2 := (-2*math.Log(.05) + math.Log(1-2*math.Log(.05))) / 5000
	nr := 6000*rho2 + 1
	half := math.Sqrt(variance*6000) * math.Sqrt(2*nr/(6000*6000*rho2)*math.Log(math.Sqrt(nr)/.05))
	p := math.Sqrt(nr) * math.Exp(-rho2*6000*diff*diff/variance/(2*nr))
	if !near(c.Interval.Low, diff-half) || !near(c.Interval.High, diff+half) || !near(c.P*1e8, p*1e8) {
		t.Errorf("interval %v, p %v; by hand %v ± %v, p %v", c.Interval, c.P, diff, half, p)
	}
	d := r.Decision
	if d.Outcome != OutcomeShip || d.Serve != "b" || !d.Final() || len(d.Reasons) != 1 || !strings.Contains(d.Reasons[0], "better") {
		t.Errorf("decision %+v", d)
	}
	if r.Ratio.Mismatch || r.Ratio.ChiSquareP != 1 || r.Ratio.LogBayesFactor > 0 {
		t.Errorf("sample ratio %+v", r.Ratio)
	}
	if _, err := json.Marshal(r); err != nil {
		t.Errorf("not to be sent as JSON: %v", err)
	}
}

// One row per way an experiment can go.
func TestDecisions(t *testing.T) {
	even := func(ka, na, kb, nb uint64) []StratumData {
		return []StratumData{stratum("eu", 1, arm("a", 5000, ka, na), arm("b", 5000, kb, nb))}
	}
	lower := func(p *Plan) { p.Primary.LowerIsBetter = true; p.Goal.Baseline, p.Goal.MDE = .1, -.02 }
	leak := even(1800, 2000, 1900, 2000)
	leak[0].Arms = append(leak[0].Arms, arm("old", 0, 0, 20))
	for name, c := range map[string]struct {
		method Method
		change func(*Plan)
		data   Data
		want   Outcome
		serve  string
		reason string
	}{
		"better":                 {MethodCS, nil, Data{Elapsed: day, Strata: even(1800, 2000, 1900, 2000)}, OutcomeShip, "b", "better"},
		"worse":                  {MethodCS, nil, Data{Elapsed: day, Strata: even(1900, 2000, 1800, 2000)}, OutcomeKeep, "a", "worse"},
		"fewer errors":           {MethodCS, lower, Data{Elapsed: day, Strata: even(200, 2000, 100, 2000)}, OutcomeShip, "b", "better"},
		"more errors":            {MethodCS, lower, Data{Elapsed: day, Strata: even(100, 2000, 200, 2000)}, OutcomeKeep, "a", "worse"},
		"alike":                  {MethodCS, nil, Data{Elapsed: day, Strata: even(1800, 2000, 1810, 2000)}, OutcomeContinue, "", "no significant difference"},
		"alike for long":         {MethodCS, nil, Data{Elapsed: day, Strata: even(90_000, 100_000, 90_010, 100_000)}, OutcomeKeep, "a", "below the 0.02"},
		"no fewer, for long":     {MethodCS, lower, Data{Elapsed: day, Strata: even(10_010, 100_000, 10_000, 100_000)}, OutcomeKeep, "a", "below the 0.02"},
		"fewer, but few":         {MethodCS, lower, Data{Elapsed: day, Strata: even(220, 2000, 180, 2000)}, OutcomeContinue, "", "no significant"},
		"obf, too soon":          {MethodOBF, nil, Data{Elapsed: day - 1, Strata: even(603, 670, 650, 670)}, OutcomeContinue, "", "no look is due"},
		"nothing yet":            {MethodCS, nil, Data{}, OutcomeContinue, "", "0s of at least"},
		"too soon":               {MethodCS, nil, Data{Elapsed: day - 1, Strata: even(1800, 2000, 1900, 2000)}, OutcomeContinue, "", "of at least 24h"},
		"too few":                {MethodCS, nil, Data{Elapsed: day, Strata: even(50, 149, 149, 149)}, OutcomeContinue, "", "no significant"},
		"timeout":                {MethodCS, nil, Data{Elapsed: 28 * day, Strata: even(1800, 2000, 1810, 2000)}, OutcomeInconclusive, "a", "within 672h"},
		"timeout without data":   {MethodCS, nil, Data{Elapsed: 28 * day}, OutcomeInconclusive, "a", "within"},
		"sample ratio":           {MethodCS, nil, Data{Elapsed: 1, Strata: even(1800, 2000, 2850, 3000)}, OutcomeStoppedSRM, "a", "sample ratio mismatch"},
		"leak":                   {MethodCS, nil, Data{Elapsed: day, Strata: leak}, OutcomeContinue, "", "arm old of weight 0"},
		"leak for long":          {MethodCS, nil, Data{Elapsed: 28 * day, Strata: leak}, OutcomeInconclusive, "a", "arm old of weight 0"},
		"concluded before":       {MethodCS, nil, Data{Elapsed: day, Strata: even(1800, 2000, 1900, 2000), Concluded: &Decision{Outcome: OutcomeKeep, Serve: "a", Reasons: []string{"first"}}}, OutcomeKeep, "a", "first"},
		"fixed, before its time": {MethodFixed, nil, Data{Elapsed: day, Strata: even(2700, 3000, 2900, 3000)}, OutcomeContinue, "", "no look is due"},
		"fixed, better":          {MethodFixed, nil, Data{Elapsed: day, Strata: even(2892, 3213, 2970, 3213)}, OutcomeShip, "b", "better"},
		"fixed, no difference":   {MethodFixed, nil, Data{Elapsed: day, Strata: even(2892, 3213, 2930, 3213)}, OutcomeInconclusive, "a", "planned 3213 units"},
		"obf, between looks":     {MethodOBF, nil, Data{Elapsed: day, Strata: even(540, 600, 590, 600)}, OutcomeContinue, "", "no look is due"},
		"obf, first look":        {MethodOBF, nil, Data{Elapsed: day, Strata: even(603, 670, 650, 670)}, OutcomeShip, "b", "better"},
		"obf, first look taken":  {MethodOBF, nil, Data{Elapsed: day, Strata: even(603, 670, 650, 670), Looks: []float64{.2003}}, OutcomeContinue, "", "no look is due"},
		"obf, weak first look":   {MethodOBF, nil, Data{Elapsed: day, Strata: even(603, 670, 625, 670)}, OutcomeContinue, "", "look 1 at"},
		"obf, last look":         {MethodOBF, nil, Data{Elapsed: day, Strata: even(3000, 3330, 3040, 3330), Looks: []float64{.2, .4, .6, .8}}, OutcomeInconclusive, "a", "show no difference"},
		"obf after the end":      {MethodOBF, nil, Data{Elapsed: 28 * day, Strata: even(3000, 3330, 3300, 3330), Looks: []float64{.2, 1}}, OutcomeInconclusive, "a", "within"},
	} {
		r, err := Analyse(ab(t, c.method, c.change), c.data)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		d := r.Decision
		if d.Outcome != c.want || d.Serve != c.serve || !strings.Contains(strings.Join(d.Reasons, "; "), c.reason) || d.Final() != (c.serve != "") {
			t.Errorf("%s: %+v, want %s serving %q because %q", name, d, c.want, c.serve, c.reason)
		}
		again, err := Analyse(ab(t, c.method, c.change), c.data)
		if err != nil || again.Decision.Outcome != d.Outcome || len(again.Primary) != len(r.Primary) || again.Primary[0].P != r.Primary[0].P {
			t.Errorf("%s: a second call differs: %+v, %v", name, again.Decision, err)
		}
	}
}

// The canary sits mostly in the bad region: pooled it looks worse, stratified it is the
// same and nothing is concluded. A weight change between epochs is no effect either.
func TestAnalyseNeverPools(t *testing.T) {
	r := must(Analyse(ab(t, MethodCS, nil), Data{Elapsed: 2 * day, Strata: []StratumData{
		stratum("good", 1, arm("a", 9000, 17820, 18000), arm("b", 1000, 1980, 2000)),
		stratum("bad", 2, arm("a", 1000, 1600, 2000), arm("b", 9000, 14400, 18000)),
	}}))
	c := r.Primary[0]
	if math.Abs(c.Difference) > 1e-12 || c.P != 1 || c.Significant || r.Ratio.Mismatch {
		t.Errorf("%+v", c)
	}
}

// Evidence for a sample ratio mismatch adds up over strata: neither alone is enough.
func TestSampleRatioOverStrata(t *testing.T) {
	plan := ab(t, MethodCS, nil)
	skew := func(region string) StratumData {
		return stratum(region, 1, arm("a", 5000, 4000, 5210), arm("b", 5000, 4000, 4790))
	}
	one, two := must(Analyse(plan, Data{Strata: []StratumData{skew("eu")}})), must(Analyse(plan, Data{Strata: []StratumData{skew("eu"), skew("us")}}))
	if one.Ratio.Mismatch || !two.Ratio.Mismatch || !near(two.Ratio.LogBayesFactor, 2*one.Ratio.LogBayesFactor) {
		t.Errorf("one %+v, two %+v", one.Ratio, two.Ratio)
	}
	// χ² = 420²/10000 each; e^(-χ²/2) is the tail with two degrees of freedom.
	if !near(two.Ratio.ChiSquareP*1e6, 1e6*math.Exp(-17.64)) {
		t.Errorf("chi-square p %v, want %v", two.Ratio.ChiSquareP, math.Exp(-17.64))
	}
}

// The first look reaches |z| with Holm over treatments; one arm good, one bad.
func TestSeveralTreatments(t *testing.T) {
	three := func(p *Plan) { p.Treatments = []string{"b", "c"} }
	data := func(kb, kc uint64) Data {
		return Data{Elapsed: day, Strata: []StratumData{stratum("eu", 1, arm("a", 3334, 1800, 2000), arm("b", 3333, kb, 2000), arm("c", 3333, kc, 2000))}}
	}
	r := must(Analyse(ab(t, MethodCS, three), data(1880, 1900)))
	if r.Decision.Outcome != OutcomeShip || r.Decision.Serve != "c" {
		t.Errorf("of two good arms: %+v", r.Decision)
	}
	b, c := r.Primary[0], r.Primary[1]
	if !near(c.AdjustedP*1e6, 2*c.P*1e6) || b.AdjustedP != max(b.P, c.AdjustedP) {
		t.Errorf("Holm: p %v and %v, adjusted %v and %v", b.P, c.P, b.AdjustedP, c.AdjustedP)
	}
	if r = must(Analyse(ab(t, MethodCS, three), data(1700, 1805))); r.Decision.Outcome != OutcomeContinue || !r.Primary[0].Significant {
		t.Errorf("one bad arm and one open: %+v", r.Decision)
	}
	if r = must(Analyse(ab(t, MethodCS, three), data(1700, 1690))); r.Decision.Outcome != OutcomeKeep || len(r.Decision.Reasons) != 2 {
		t.Errorf("two bad arms: %+v", r.Decision)
	}
	o := ab(t, MethodOBF, three)
	n := uint64(.21*float64(o.UnitsPerArm)) + 1
	r = must(Analyse(o, Data{Elapsed: day, Strata: []StratumData{stratum("eu", 1, arm("a", 3334, n*85/100, n), arm("b", 3333, n*85/100, n), arm("c", 3333, n*97/100, n))}}))
	if r.Decision.Serve != "c" || r.Look == nil || r.Look.Number != 1 || r.Look.Final {
		t.Errorf("OBF: %+v, look %+v", r.Decision, r.Look)
	}
	// The repeated p-value meets alpha exactly where z meets the boundary.
	if c := r.Primary[1]; (math.Abs(c.Z) >= r.Look.Boundary) != (c.P <= .025) {
		t.Errorf("z %v, boundary %v, p %v", c.Z, r.Look.Boundary, c.P)
	}
}

// The exact method needs no minimum of units and multiplies over strata.
func TestAnalyseEProcess(t *testing.T) {
	plan := ab(t, MethodEProcess, nil)
	var eu, us TwoByTwo
	var strata [2]StratumData
	for range 60 {
		if eu.Add(0, 1, 1, 1) != nil || us.Add(1, 2, 2, 2) != nil {
			t.Fatal("refused")
		}
	}
	for i, e := range []TwoByTwo{eu, us} {
		b := arm("b", 5000, e.TreatmentK, e.TreatmentN)
		b.Cells["ok"] = Cell{Sums: b.Cells["ok"].Sums, EProcess: e}
		strata[i] = stratum([]string{"eu", "us"}[i], 1, arm("a", 5000, e.ControlK, e.ControlN), b)
	}
	r := must(Analyse(plan, Data{Elapsed: day, Strata: strata[:]}))
	if c := r.Primary[0]; !near(math.Log(c.EValue), eu.LogE+us.LogE) || !near(c.P*1e9, 1e9/c.EValue) {
		t.Errorf("e-value %v, p %v; strata %v and %v", c.EValue, c.P, eu.LogE, us.LogE)
	}
	if r.Decision.Outcome != OutcomeShip {
		t.Errorf("%+v", r.Decision)
	}
	r = must(Analyse(plan, Data{Elapsed: day, Strata: []StratumData{stratum("eu", 1, arm("a", 5000, 60, 60), arm("b", 5000, 0, 60))}}))
	if r.Decision.Outcome != OutcomeContinue || r.Primary[0].P != 1 {
		t.Errorf("without the process: %+v", r.Decision)
	}
}

func TestGuardrails(t *testing.T) {
	plan := ab(t, MethodCS, func(p *Plan) {
		p.Guardrails = []Guardrail{
			{Metric: Metric{Name: "cost", Kind: KindMean, LowerIsBetter: true}, Margin: .05},
			{Metric: Metric{Name: "p95", Kind: KindQuantile, LowerIsBetter: true, Quantile: .95}, Margin: .05},
			{Metric: Metric{Name: "rating", Kind: KindMean}, Margin: .02},
		}
	})
	// costs of mean c and spread 1, latencies spread 1..20 times l, ratings of mean r.
	data := func(c, l, r float64) Data {
		cell := func(s Sums) Cell { return Cell{Sums: s} }
		spread := func(mean float64) Sums { return Sums{N: 2000, SumX: 2000 * mean, DevXX: 2000} }
		latency := func(scale float64) Cell {
			var q Quantiles
			for i := range 2000 {
				if err := q.Add(scale * (1 + float64(i%400)/20)); err != nil {
					t.Fatal(err)
				}
			}
			return Cell{Quantiles: q}
		}
		a, b := arm("a", 5000, 1800, 2000), arm("b", 5000, 1805, 2000)
		a.Cells["cost"], a.Cells["p95"], a.Cells["rating"] = cell(spread(10)), latency(1), cell(spread(10))
		b.Cells["cost"], b.Cells["p95"], b.Cells["rating"] = cell(spread(c)), latency(l), cell(spread(r))
		return Data{Elapsed: 1, Strata: []StratumData{stratum("eu", 1, a, b)}}
	}
	for name, c := range map[string]struct {
		cost, latency, rating float64
		states                [3]GuardrailState
	}{
		"as before":            {10, 1, 10, [3]GuardrailState{GuardrailOK, GuardrailUnproven, GuardrailOK}},
		"faster":               {10, .7, 10, [3]GuardrailState{GuardrailOK, GuardrailOK, GuardrailOK}},
		"cost at the margin":   {10.5, 1, 10, [3]GuardrailState{GuardrailUnproven, GuardrailUnproven, GuardrailOK}},
		"cost above it":        {11, 1, 10, [3]GuardrailState{GuardrailWorse, GuardrailUnproven, GuardrailOK}},
		"latency far above it": {10, 1.4, 10, [3]GuardrailState{GuardrailOK, GuardrailWorse, GuardrailOK}},
		"rating below":         {10, 1, 9.5, [3]GuardrailState{GuardrailOK, GuardrailUnproven, GuardrailWorse}},
		"rating up":            {10, 1, 12, [3]GuardrailState{GuardrailOK, GuardrailUnproven, GuardrailOK}},
	} {
		r := must(Analyse(plan, data(c.cost, c.latency, c.rating)))
		worse := false
		for i, g := range r.Guardrails {
			worse = worse || g.State == GuardrailWorse
			if g.State != c.states[i] {
				t.Errorf("%s: guardrail %s is %s, want %s (%+v)", name, g.Metric, g.State, c.states[i], g)
			}
		}
		if stopped := r.Decision.Outcome == OutcomeStoppedGuardrail && r.Decision.Serve == "a"; stopped != worse {
			t.Errorf("%s: %+v", name, r.Decision)
		}
	}
	// By hand: cost 11 against 10·1.05 is 0.5 too much; the bounds are one-sided.
	g := must(Analyse(plan, data(11, 1, 10))).Guardrails[0]
	se := math.Sqrt(1.05*1.05+1) * math.Sqrt(2000.0/(2000*1999))
	s := Sequence{Alpha: .01, Tuning: 5000}
	if !near(g.Harm, .5) || !near(g.HarmInterval.Low, .5-se*s.HalfWidthOneSided(4000)) || !near(g.PWorse*1e6, 1e6*s.POneSided(.5/se, 4000)) {
		t.Errorf("%+v", g)
	}
}

// A quantile that should be high: the slowest tenth of the throughputs.
func TestQuantileGuardrailWhereHigherIsBetter(t *testing.T) {
	plan := ab(t, MethodCS, func(p *Plan) {
		p.Guardrails = []Guardrail{{Metric: Metric{Name: "speed", Kind: KindQuantile, Quantile: .1}, Margin: .1}}
	})
	for _, c := range []struct {
		scale float64
		want  GuardrailState
	}{{.6, GuardrailWorse}, {.92, GuardrailUnproven}, {1.5, GuardrailOK}} {
		var q [2]Quantiles
		for i := range 3000 {
			v := 1 + float64(i%300)/100
			if q[0].Add(v) != nil || q[1].Add(c.scale*v) != nil {
				t.Fatal("refused")
			}
		}
		a, b := arm("a", 5000, 2700, 3000), arm("b", 5000, 2700, 3000)
		a.Cells["speed"], b.Cells["speed"] = Cell{Quantiles: q[0]}, Cell{Quantiles: q[1]}
		if g := must(Analyse(plan, Data{Strata: []StratumData{stratum("eu", 1, a, b)}})).Guardrails[0]; g.State != c.want {
			t.Errorf("%v times the speed: %+v, want %s", c.scale, g, c.want)
		}
	}
}

func TestSecondaryMetrics(t *testing.T) {
	plan := ab(t, MethodCS, func(p *Plan) {
		p.Secondary = []Metric{{Name: "ratio", Kind: KindRatio, Adjust: true}, {Name: "p50", Kind: KindQuantile, Quantile: .5}, {Name: "none", Kind: KindMean}}
	})
	var ja, jb Joint
	var qa, qb Quantiles
	for i := range 1000 {
		x := float64(i % 10)
		if ja.Add(x, 10, x, 10) != nil || jb.Add(x+float64(i%2)/10, 10, x, 10) != nil || qa.Add(x+1) != nil || qb.Add(1.5*(x+1)) != nil {
			t.Fatal("refused")
		}
	}
	a, b := arm("a", 5000, 900, 1000), arm("b", 5000, 905, 1000)
	a.Cells["ratio"], a.Cells["p50"] = Cell{Joint: ja}, Cell{Quantiles: qa}
	b.Cells["ratio"], b.Cells["p50"] = Cell{Joint: jb}, Cell{Quantiles: qb}
	r := must(Analyse(plan, Data{Elapsed: day, Strata: []StratumData{stratum("eu", 1, a, b)}, Exposure: Exposure{2030, 30}}))
	ratio, p50, none := r.Secondary[0], r.Secondary[1], r.Secondary[2]
	// The covariate explains almost everything: θ is nearly 1 and the difference .005.
	if math.Abs(ratio.Theta[0]-1) > .01 || !near(ratio.Difference, .005) || !ratio.Significant || !ratio.Better {
		t.Errorf("adjusted ratio %+v", ratio)
	}
	if !p50.Significant || !p50.Better || p50.EValue < 20 || !p50.Strata[0].ControlInterval.Contains(5.5) {
		t.Errorf("median %+v", p50)
	}
	if none.P != 1 || none.AdjustedP != 1 || none.Significant || none.N != 0 {
		t.Errorf("metric without data %+v", none)
	}
	if want := must(BenjaminiHochberg([]float64{ratio.P, p50.P, none.P})); want[0] != ratio.AdjustedP || want[1] != p50.AdjustedP {
		t.Errorf("adjusted %v and %v, want %v", ratio.AdjustedP, p50.AdjustedP, want)
	}
	if r.Decision.Final() {
		t.Errorf("a secondary metric decided: %+v", r.Decision)
	}
	if len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], "30 of 2030 units") {
		t.Errorf("warnings %v", r.Warnings)
	}
	if _, err := json.Marshal(r); err != nil {
		t.Errorf("not to be sent as JSON: %v", err)
	}
}

func TestFreezeIsIdempotentAndIndependent(t *testing.T) {
	in := Plan{Control: "a", Treatments: []string{"b"}, Primary: Metric{Name: "ok", Kind: KindProportion},
		Goal:       Goal{Baseline: .9, MDE: .02, Alpha: .05, Power: .8, Method: MethodCS},
		Guardrails: []Guardrail{{Metric: Metric{Name: "g", Kind: KindMean}}}}
	p := must(in.Freeze())
	if in.Guardrails[0].Alpha != 0 {
		t.Error("freezing changed the draft")
	}
	if p.MinUnits != 150 || p.SRMAlpha != .01 || p.MinDuration != day || p.MaxDuration != 28*day || p.Guardrails[0].Alpha != .01 ||
		p.Goal.Treatments != 1 || p.Goal.Tuning != 6426 || math.Abs(float64(p.UnitsPerArm)-5128) > 50 {
		t.Errorf("%+v", p)
	}
	again := must(p.Freeze())
	if x, y := must(json.Marshal(p)), must(json.Marshal(again)); string(x) != string(y) {
		t.Errorf("frozen again: %s\n%s", x, y)
	}
}

func TestPlansAndDataRefused(t *testing.T) {
	ok := Plan{Control: "a", Treatments: []string{"b"}, Primary: Metric{Name: "ok", Kind: KindProportion},
		Goal: Goal{Baseline: .9, MDE: .02, Alpha: .05, Power: .8, Method: MethodFixed}}
	guard := func(g Guardrail) func(*Plan) { return func(p *Plan) { p.Guardrails = []Guardrail{g} } }
	mean := Metric{Name: "g", Kind: KindMean}
	for name, change := range map[string]func(*Plan){
		"no control": func(p *Plan) { p.Control = "" }, "no treatment": func(p *Plan) { p.Treatments = nil },
		"twice": func(p *Plan) { p.Treatments = []string{"a"} }, "quantile": func(p *Plan) { p.Primary.Kind, p.Primary.Quantile = KindQuantile, .5 },
		"kind": func(p *Plan) { p.Primary.Kind = "" }, "mean without sd": func(p *Plan) { p.Primary.Kind = KindMean },
		"proportion with sd": func(p *Plan) { p.Goal.SD = 1 }, "unnamed": func(p *Plan) { p.Secondary = []Metric{{Kind: KindMean}} },
		"durations": func(p *Plan) { p.MinDuration, p.MaxDuration = day, day }, "negative duration": func(p *Plan) { p.MinDuration = -1 },
		"srm alpha": func(p *Plan) { p.SRMAlpha = math.NaN() }, "guardrail alpha": guard(Guardrail{Metric: mean, Alpha: .5}),
		"margin": guard(Guardrail{Metric: mean, Margin: math.NaN()}), "margin 1": guard(Guardrail{Metric: mean, Margin: 1}),
		"adjusted quantile": guard(Guardrail{Metric: Metric{Name: "q", Kind: KindQuantile, Quantile: .5, Adjust: true}}),
		"level":             guard(Guardrail{Metric: Metric{Name: "q", Kind: KindQuantile, Quantile: 1}}),
		"adjusted e-process": func(p *Plan) {
			p.Primary.Adjust, p.Goal.Method = true, MethodEProcess
		},
		"units": func(p *Plan) { p.UnitsPerArm = 1 << 50 },
	} {
		p := ok
		change(&p)
		if _, err := p.Freeze(); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("plan, %s: %v, want kind invalid", name, err)
		}
	}
	plan := must(ok.Freeze())
	good := stratum("eu", 1, arm("a", 5000, 9, 10), arm("b", 5000, 9, 10))
	with := func(c Cell) StratumData {
		return stratum("eu", 1, arm("a", 5000, 9, 10), ArmData{Name: "b", Weight: 5000, Units: 10, Cells: map[string]Cell{"ok": c}})
	}
	for name, d := range map[string]Data{
		"elapsed": {Elapsed: -1}, "exposure": {Exposure: Exposure{1, 2}}, "looks": {Looks: []float64{.5, .4}},
		"twice":      {Strata: []StratumData{good, good}},
		"arm lacks":  {Strata: []StratumData{stratum("eu", 1, arm("a", 10_000, 1, 2))}},
		"weights":    {Strata: []StratumData{stratum("eu", 1, arm("a", 5000, 1, 2), arm("b", 4000, 1, 2))}},
		"extra arm":  {Strata: []StratumData{stratum("eu", 1, arm("a", 5000, 1, 2), arm("b", 4000, 1, 2), arm("c", 1000, 1, 2))}},
		"same arm":   {Strata: []StratumData{stratum("eu", 1, arm("a", 5000, 1, 2), arm("a", 5000, 1, 2), arm("b", 0, 1, 2))}},
		"more cells": {Strata: []StratumData{with(Cell{Sums: must(Count(9, 11))})}},
		"NaN":        {Strata: []StratumData{with(Cell{Sums: Sums{N: 10, SumX: math.NaN()}})}},
		"fraction":   {Strata: []StratumData{with(Cell{Sums: Sums{N: 10, SumX: 1.5, DevXX: 1}})}},
		"negative":   {Strata: []StratumData{with(Cell{Sums: Sums{N: 10, SumX: 1, DevXX: -1}})}},
		"units":      {Strata: []StratumData{stratum("eu", 1, ArmData{Name: "a", Weight: 5000, Units: 1 << 50}, arm("b", 5000, 1, 2))}},
	} {
		if _, err := Analyse(plan, d); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("data, %s: %v, want kind invalid", name, err)
		}
	}
}

// Details of a comparison: Fisher's test for small cells, the Bayesian view in the
// metric's direction, quantile evidence multiplied over strata.
func TestComparisonDetails(t *testing.T) {
	lower := ab(t, MethodFixed, func(p *Plan) {
		p.Primary.LowerIsBetter = true
		p.Secondary = []Metric{{Name: "p50", Kind: KindQuantile, Quantile: .5, LowerIsBetter: true}}
	})
	c := must(Analyse(lower, Data{Strata: []StratumData{stratum("eu", 1, arm("a", 5000, 2, 1000), arm("b", 5000, 12, 1000))}})).Primary[0]
	if !near(c.NominalP, 0.0126410305968) || c.P != 1 || c.Better || c.ChanceToWin > .05 || c.ExpectedLoss < .005 {
		t.Errorf("twelve errors against two: %+v", c)
	}
	if want := must(Newcombe(2, 1000, 12, 1000, .05)); c.Interval != want {
		t.Errorf("interval %v, want Newcombe's %v", c.Interval, want)
	}
	var fast, slow Quantiles
	for i := range 500 {
		if slow.Add(1+float64(i%100)/100) != nil || fast.Add(.8*(1+float64(i%100)/100)) != nil {
			t.Fatal("refused")
		}
	}
	with := func(region string) StratumData {
		a, b := arm("a", 5000, 9, 500), arm("b", 5000, 9, 500)
		a.Cells["p50"], b.Cells["p50"] = Cell{Quantiles: slow}, Cell{Quantiles: fast}
		return stratum(region, 1, a, b)
	}
	s := Sequence{Alpha: .05, Tuning: 5000}
	up, down := must(CompareQuantiles(slow, fast, .5, 0, s)), must(CompareQuantiles(fast, slow, .5, 0, s))
	got := must(Analyse(lower, Data{Strata: []StratumData{with("eu"), with("us")}})).Secondary[0]
	if want := (math.Exp(2*up) + math.Exp(2*down)) / 2; !near(got.EValue/want, 1) || !near(got.P*want, 1) || !got.Better {
		t.Errorf("%+v, want an e-value of %v", got, want)
	}
}
