package experiments

import (
	"math"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

// Units per arm to find a two-point lift at 80 and 90 %, α = 0.05 two-sided; and what
// the sequential methods need. The sequential sizes agree with simulations of 2 000
// experiments each (CS: 15 900, 11 500, 5 150, 2 440, 3 650) within their error.
func TestSizes(t *testing.T) {
	for _, c := range []struct {
		base            float64
		fixed80, fixed9 uint64
		cs              float64
		obfMean         uint64
	}{
		{.50, 9806, 13127, 15900, 7788}, {.75, 7157, 9581, 11500, 5684}, {.90, 3213, 4301, 5150, 2551},
		{.95, 1506, 2016, 2440, 1194}, {.05, 2213, 2962, 3650, 1756},
	} {
		g := Goal{Baseline: c.base, MDE: .02, Alpha: .05, Power: .8, Method: MethodFixed}
		if s := must(g.Size()); s.PerArm != c.fixed80 || s.Factor != 1 {
			t.Errorf("%v: %+v, want %d", c.base, s, c.fixed80)
		}
		g.Power = .9
		if s := must(g.Size()); s.PerArm != c.fixed9 {
			t.Errorf("%v at 90 %%: %+v, want %d", c.base, s, c.fixed9)
		}
		g.Power, g.Method, g.Looks = .8, MethodOBF, 10
		if s := must(g.Size()); s.Factor < 1.03 || s.Factor > 1.05 || s.ExpectedPerArm > c.obfMean+5 || s.ExpectedPerArm < c.obfMean-50 {
			t.Errorf("%v, OBF: %+v", c.base, s)
		}
		g.Method, g.Tuning = MethodCS, 0
		if s := must(g.Size()); math.Abs(float64(s.PerArm)/c.cs-1) > .05 || s.Factor < 1.55 || s.Factor > 1.65 || s.ExpectedPerArm >= s.PerArm {
			t.Errorf("%v, CS: %+v, simulated %v", c.base, s, c.cs)
		}
		if p := must(g.PowerAt(c.fixed80)); p < .5 || p > .6 {
			t.Errorf("%v, CS at the fixed size: power %v, simulated .53 to .55", c.base, p)
		}
		g.Method = MethodEProcess
		if s := must(g.Size()); s.Factor < 1.9 || s.Factor > 2.1 {
			t.Errorf("%v, e-process: %+v", c.base, s)
		}
	}
}

func TestPlannerIsConsistent(t *testing.T) {
	for _, g := range []Goal{
		{Baseline: .1, MDE: -.02, Alpha: .05, Power: .8, Method: MethodFixed},
		{SD: 12, MDE: 1, Alpha: .01, Power: .9, Method: MethodFixed},
		{SD: 12, MDE: 1, Alpha: .05, Power: .9, Method: MethodOBF, Looks: 5},
		{Baseline: .1, MDE: .02, Alpha: .05, Power: .8, Method: MethodCS, Treatments: 3},
	} {
		s := must(g.Size())
		if p := must(g.PowerAt(s.PerArm)); p < g.Power-1e-3 || p > g.Power+.01 {
			t.Errorf("%+v: power at its own size is %v", g, p)
		}
		if d := must(g.MDEAt(s.PerArm)); math.Abs(d/g.MDE-1) > .01 {
			t.Errorf("%+v: MDE at its own size is %v", g, d)
		}
	}
	if d := (Size{PerArm: 3000}).Days(1000, 2); d != 6 {
		t.Errorf("days %v, want 6", d)
	}
	if d := (Size{PerArm: 3000}).Days(0, 2); !math.IsInf(d, 1) {
		t.Errorf("days without traffic %v", d)
	}
}

// To prove error_rate < 1 %, 0.5 %, 0.1 % at 95 % takes 299, 598, 2 995 units without a
// failure, and about 2 000, 3 900, 20 000 when the true rate is half the bound.
func TestGateArithmetic(t *testing.T) {
	for _, c := range []struct {
		bound             float64
		zero, half, allow uint64
	}{{.01, 299, 1941, 12}, {.005, 598, 3885, 12}, {.001, 2995, 19439, 12}} {
		n := must(ZeroFailureUnits(c.bound, .05))
		if n != c.zero {
			t.Errorf("%v: %d units without a failure, want %d", c.bound, n, c.zero)
		}
		// One-sided Clopper–Pearson agrees, and one unit fewer does not.
		if hi := must(ClopperPearson(0, n, .1)).High; hi >= c.bound {
			t.Errorf("%v: %d units prove only %v", c.bound, n, hi)
		}
		if hi := must(ClopperPearson(0, n-1, .1)).High; hi < c.bound {
			t.Errorf("%v: %d units already prove %v", c.bound, n-1, hi)
		}
		units, allowed, err := GateUnits(c.bound, c.bound/2, .05, .8)
		if err != nil || units != c.half || allowed != c.allow {
			t.Errorf("%v: %d units, %d failures, %v", c.bound, units, allowed, err)
		}
		if hi := must(ClopperPearson(allowed, units, .1)).High; hi > c.bound+1e-12 {
			t.Errorf("%v: %d of %d prove only %v", c.bound, allowed, units, hi)
		}
		if p := atMostProbability(float64(allowed), float64(units), c.bound/2); p < .8 {
			t.Errorf("%v: power %v", c.bound, p)
		}
	}
	for name, err := range map[string]error{
		"rate above bound": third(GateUnits(.01, .01, .05, .8)), "alpha": second(ZeroFailureUnits(.01, 0)),
		"bound": second(ZeroFailureUnits(1, .05)), "too close": third(GateUnits(.01, .01*(1-1e-7), .05, .8)),
	} {
		if !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: %v, want kind invalid", name, err)
		}
	}
}

func TestGoalsRefused(t *testing.T) {
	ok := Goal{Baseline: .1, MDE: .02, Alpha: .05, Power: .8, Method: MethodFixed}
	for name, change := range map[string]func(*Goal){
		"alpha": func(g *Goal) { g.Alpha = 0 }, "alpha NaN": func(g *Goal) { g.Alpha = math.NaN() },
		"alpha per treatment": func(g *Goal) { g.Alpha, g.Treatments = 5e-12, 10 },
		"power":               func(g *Goal) { g.Power = .05 }, "mde": func(g *Goal) { g.MDE = 0 },
		"baseline": func(g *Goal) { g.Baseline = 1 }, "beyond 1": func(g *Goal) { g.MDE = .9 },
		"sd": func(g *Goal) { g.SD = math.Inf(1) }, "tiny mde": func(g *Goal) { g.MDE = 1e-9 },
		"tiny mean mde": func(g *Goal) { g.SD, g.MDE = 1, 1e-9 }, "treatments": func(g *Goal) { g.Treatments = -1 },
		"looks": func(g *Goal) { g.Method = MethodOBF }, "method": func(g *Goal) { g.Method = "bayes" },
		"e-process of means": func(g *Goal) { g.Method, g.SD = MethodEProcess, 1 }, "tuning": func(g *Goal) { g.Tuning = -1 },
	} {
		g := ok
		change(&g)
		for what, err := range map[string]error{"check": g.Check(), "size": second(g.Size()), "power": second(g.PowerAt(100))} {
			if !outrigger.IsKind(err, outrigger.Invalid) {
				t.Errorf("%s, %s: %v, want kind invalid", name, what, err)
			}
		}
	}
	if _, err := ok.MDEAt(3); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("MDE at 3 units: %v", err)
	}
}
