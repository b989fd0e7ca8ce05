package algorithms

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

// suited returns a space of everything the algorithm accepts.
func suited(t testing.TB, a Algorithm) *Space {
	t.Helper()
	s, err := mixedSpace(a.Info)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func start1(t testing.TB, a Algorithm, c Config) Optimizer {
	t.Helper()
	o, err := a.New(c)
	if err != nil {
		t.Fatalf("%s: %v", a.ID, err)
	}
	return o
}

func tell(t testing.TB, o Optimizer, rs ...Result) {
	t.Helper()
	if err := o.Tell(rs); err != nil {
		t.Fatal(err)
	}
}

// Eight at a time, told backwards, every seventh failed: still inside the space, still
// the whole budget, and the failure is never the best.
func TestParallelFailingEvaluations(t *testing.T) {
	for _, a := range Builtin() {
		space := suited(t, a)
		o := start1(t, a, Config{Space: space, Seed: 3, Budget: 70})
		n := 0
		for trials := o.Ask(8); len(trials) > 0; trials = o.Ask(8) {
			slices.Reverse(trials)
			for _, tr := range trials {
				n++
				if err := space.Check(tr.Params); err != nil {
					t.Fatalf("%s: %v", a.ID, err)
				}
				r := Result{ID: tr.ID, Loss: mixedLoss(tr.Params)}
				if tr.ID%7 == 0 {
					r = Result{ID: tr.ID, Loss: -1e9, Failed: true}
				}
				tell(t, o, r)
			}
		}
		best, ok := o.Best()
		if n != 70 || !ok || best.Loss == -1e9 || best.ID%7 == 0 {
			t.Errorf("%s: %d evaluations of 70, best %v (%v)", a.ID, n, best, ok)
		}
	}
}

// If everything fails there is no best, and the search still ends with its budget.
func TestEverythingFails(t *testing.T) {
	for _, a := range Builtin() {
		o := start1(t, a, Config{Space: suited(t, a), Seed: 1, Budget: 40})
		n := 0
		for trials := o.Ask(3); len(trials) > 0; trials = o.Ask(3) {
			for _, tr := range trials {
				n++
				tell(t, o, Result{ID: tr.ID, Failed: true})
			}
		}
		if _, ok := o.Best(); ok || n != 40 {
			t.Errorf("%s: %d failures of 40, best %v", a.ID, n, ok)
		}
	}
}

// A constant loss gives no direction; nothing may divide by the lack of it.
func TestConstantLoss(t *testing.T) {
	for _, a := range Builtin() {
		o := start1(t, a, Config{Space: suited(t, a), Seed: 1, Budget: 60, Noisy: true})
		n := 0
		for trials := o.Ask(1); len(trials) > 0; trials = o.Ask(1) {
			n++
			tell(t, o, Result{ID: trials[0].ID, Loss: 5})
		}
		if n != 60 {
			t.Errorf("%s stopped after %d of 60", a.ID, n)
		}
	}
}

// Losses at the ends of what is allowed, of alternating sign, in one dimension.
func TestExtremeLosses(t *testing.T) {
	s, err := NewSpace(Param{Name: "x", Kind: Float, Min: 0, Max: 1})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range Builtin() {
		o := start1(t, a, Config{Space: s, Seed: 1, Budget: 60})
		n := 0
		for trials := o.Ask(1); len(trials) > 0; trials = o.Ask(1) {
			x := trials[0].Params["x"].(float64)
			if !(x >= 0 && x <= 1) {
				t.Fatalf("%s: %v is outside", a.ID, x)
			}
			y := maxLoss * (2*x - 1)
			if n++; n%2 == 0 {
				y = 1e-300
			}
			tell(t, o, Result{ID: trials[0].ID, Loss: y})
		}
		if n != 60 {
			t.Errorf("%s stopped after %d of 60", a.ID, n)
		}
		if _, err := a.Restore(o.State()); err != nil {
			t.Errorf("%s: its own state is refused: %v", a.ID, err)
		}
	}
}

// One Tell with many results does not depend on their order.
func TestOrderWithinTellIsIrrelevant(t *testing.T) {
	for _, a := range Builtin() {
		run := func(reverse bool) (trace []byte) {
			o := start1(t, a, Config{Space: suited(t, a), Seed: 5, Budget: 48})
			for trials := o.Ask(6); len(trials) > 0; trials = o.Ask(6) {
				var rs []Result
				for _, tr := range trials {
					trace = fmt.Appendf(trace, "%v\n", tr)
					rs = append(rs, Result{ID: tr.ID, Loss: mixedLoss(tr.Params)})
				}
				if reverse {
					slices.Reverse(rs)
				}
				tell(t, o, rs...)
			}
			return trace
		}
		if !bytes.Equal(run(false), run(true)) {
			t.Errorf("%s depends on the order of results within one Tell", a.ID)
		}
	}
}

// Different seeds search differently; the same seed is covered by the sanity task.
func TestSeedsDiffer(t *testing.T) {
	for _, a := range Builtin() {
		x := start1(t, a, Config{Space: suited(t, a), Seed: 1, Budget: 10}).Ask(1)
		y := start1(t, a, Config{Space: suited(t, a), Seed: 2, Budget: 10}).Ask(1)
		if fmt.Sprint(x) == fmt.Sprint(y) {
			t.Errorf("%s: seeds 1 and 2 both begin with %v", a.ID, x)
		}
	}
}

// Restoring with trials pending continues with the same trials, wherever it happens.
func TestRestoreAnywhere(t *testing.T) {
	for _, a := range Builtin() {
		budget := 90
		if a.ID == "bayesian_optimization" {
			budget = 30
		}
		run := func(every int) (trace []byte) {
			o := start1(t, a, Config{Space: suited(t, a), Seed: 8, Budget: budget, Settings: map[string]float64{}})
			steps := 0
			for trials := o.Ask(3); len(trials) > 0; trials = o.Ask(3) {
				for _, tr := range trials {
					trace = fmt.Appendf(trace, "%v\n", tr)
					if steps++; every > 0 && steps%every == 0 {
						state := o.State()
						var err error
						if o, err = a.Restore(state); err != nil {
							t.Fatalf("%s: %v", a.ID, err)
						}
						if !bytes.Equal(o.State(), state) {
							t.Fatalf("%s: restored state differs", a.ID)
						}
					}
					r := Result{ID: tr.ID, Loss: mixedLoss(tr.Params), Failed: tr.ID == 11}
					tell(t, o, r)
				}
			}
			return trace
		}
		plain := run(0)
		for _, every := range []int{1, 4} {
			if !bytes.Equal(plain, run(every)) {
				t.Errorf("%s: restoring every %d results changes the search", a.ID, every)
			}
		}
	}
}

func TestTellIsAllOrNothing(t *testing.T) {
	a := Builtin()[0]
	o := start1(t, a, Config{Space: suited(t, a), Seed: 1, Budget: 10})
	trials := o.Ask(2)
	before := o.State()
	for _, c := range []struct {
		kind outrigger.Kind
		rs   []Result
	}{
		{outrigger.NotFound, []Result{{ID: trials[0].ID}, {ID: 99}}},
		{outrigger.NotFound, []Result{{ID: trials[0].ID}, {ID: trials[0].ID}}},
		{outrigger.Invalid, []Result{{ID: trials[0].ID}, {ID: trials[1].ID, Loss: math.NaN()}}},
		{outrigger.Invalid, []Result{{ID: trials[0].ID}, {ID: trials[1].ID, Loss: math.Inf(-1)}}},
		{outrigger.Invalid, []Result{{ID: trials[0].ID}, {ID: trials[1].ID, Loss: 2e100}}},
	} {
		if err := o.Tell(c.rs); !outrigger.IsKind(err, c.kind) {
			t.Errorf("Tell(%v) = %v, want %v", c.rs, err, c.kind)
		}
		if !bytes.Equal(o.State(), before) {
			t.Fatalf("a refused Tell(%v) changed the state", c.rs)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	floats := cube(t, 2, 0, 1)
	mixed := everyKind(t)
	for _, c := range []struct {
		id   string
		cfg  Config
		kind outrigger.Kind
	}{
		{"hill_climbing", Config{Space: floats, Budget: 10}, outrigger.NotFound},
		{"random", Config{Budget: 10}, outrigger.Invalid},
		{"random", Config{Space: &Space{}, Budget: 10}, outrigger.Invalid},
		{"random", Config{Space: floats}, outrigger.Invalid},
		{"random", Config{Space: floats, Budget: MaxBudget + 1}, outrigger.Invalid},
		{"random", Config{Space: floats, Budget: 10, Start: Params{"a": 0.5}}, outrigger.Invalid},
		{"adam_optimizer", Config{Space: mixed, Budget: 10}, outrigger.Invalid},
		{"nelder_mead", Config{Space: mixed, Budget: 10}, outrigger.Invalid},
		{"adam_optimizer", Config{Space: floats, Budget: 10, Settings: map[string]float64{"beta1": 1}}, outrigger.Invalid},
		{"adam_optimizer", Config{Space: floats, Budget: 10, Settings: map[string]float64{"beta_1": 0.5}}, outrigger.Invalid},
	} {
		if o, err := New(c.id, c.cfg); !outrigger.IsKind(err, c.kind) || o != nil {
			t.Errorf("New(%s, %+v) = %v, %v, want %v and no optimiser", c.id, c.cfg, o, err, c.kind)
		}
	}
}

// The setting in production is the first trial of every algorithm.
func TestStartComesFirst(t *testing.T) {
	for _, a := range Builtin() {
		space := suited(t, a)
		p, err := space.Decode(slices.Repeat([]float64{0.875}, space.Len()))
		if err != nil {
			t.Fatal(err)
		}
		u, err := space.Encode(p)
		if err != nil {
			t.Fatal(err)
		}
		o := start1(t, a, Config{Space: space, Seed: 4, Budget: 20, Start: p})
		got, err := space.Encode(o.Ask(1)[0].Params)
		if err != nil {
			t.Fatal(err)
		}
		for j := range u {
			if math.Abs(got[j]-u[j]) > 1e-9 {
				t.Errorf("%s begins at %v, want %v", a.ID, got, u)
				break
			}
		}
	}
}

func TestPendingAndBudgetAreBounded(t *testing.T) {
	o, err := New("random", Config{Space: cube(t, 1, 0, 1), Budget: MaxPending + 5})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(o.Ask(1 << 30)); n != MaxPending {
		t.Errorf("%d trials pending, the limit is %d", n, MaxPending)
	}
	if n := len(o.Ask(1)); n != 0 {
		t.Errorf("%d more beyond the limit", n)
	}
	tell(t, o, Result{ID: 1}, Result{ID: 2}, Result{ID: 3}, Result{ID: 4}, Result{ID: 5}, Result{ID: 6})
	if n := len(o.Ask(9)); n != 5 {
		t.Errorf("%d trials, the budget leaves 5", n)
	}
	if n := len(o.Ask(-1)); n != 0 {
		t.Errorf("Ask(-1) gave %d trials", n)
	}
}

// With no float parameter and no noise a setting is evaluated once: twelve settings are
// all found within a budget of twelve by whichever algorithm keeps moving.
func TestDiscreteSettingsAreNotRepeated(t *testing.T) {
	s, err := NewSpace(Param{Name: "n", Kind: Int, Min: 1, Max: 4}, Param{Name: "c", Kind: Categorical, Choices: []string{"a", "b", "c"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"random", "sobol", "simulated_annealing", "genetic_algorithm", "bayesian_optimization"} {
		o, err := New(id, Config{Space: s, Seed: 2, Budget: 12})
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for trials := o.Ask(1); len(trials) > 0; trials = o.Ask(1) {
			seen[fmt.Sprint(trials[0].Params)] = true
			tell(t, o, Result{ID: trials[0].ID, Loss: float64(len(seen))})
		}
		if len(seen) < 12 {
			t.Errorf("%s looked at %d of 12 settings in 12 evaluations", id, len(seen))
		}
	}
}

// On a mixed, conditional space the algorithms that accept it find the optimum, which
// lies behind a condition, where random search does not.
func TestMixedSpace(t *testing.T) {
	for _, a := range Builtin() {
		if a.Baseline || !a.Conditional {
			continue
		}
		space, budget := suited(t, a), 150
		if a.ID == "bayesian_optimization" {
			budget = 50
		}
		var got []float64
		for seed := range uint64(5) {
			o := start1(t, a, Config{Space: space, Seed: seed, Budget: budget})
			for trials := o.Ask(1); len(trials) > 0; trials = o.Ask(1) {
				tell(t, o, Result{ID: trials[0].ID, Loss: mixedLoss(trials[0].Params)})
			}
			best, _ := o.Best()
			got = append(got, best.Loss+1) // the minimum is −1
		}
		if m := median(got); m > 0.2 {
			t.Errorf("%s: median regret %.3g on the mixed space in %d evaluations, want at most 0.2", a.ID, m, budget)
		}
	}
}

// Noise of ±2, on losses of 0 to about 200: those that claim to stand it get closer to
// the true optimum than random search, whose luckiest draw is rarely its best.
func TestNoise(t *testing.T) {
	o := sphere(t)
	for _, a := range Builtin() {
		if a.Baseline || !a.Noise {
			continue
		}
		seeds, budget := 5, 200
		if a.ID == "bayesian_optimization" {
			seeds, budget = 2, 60
		}
		var got []float64
		for seed := range uint64(seeds) {
			opt := start1(t, a, Config{Space: o.space, Seed: seed, Budget: budget, Noisy: true})
			for trials := opt.Ask(1); len(trials) > 0; trials = opt.Ask(1) {
				noise := float64(mix(seed<<32+uint64(trials[0].ID))>>11)/(1<<53) - 0.5
				tell(t, opt, Result{ID: trials[0].ID, Loss: o.f(at(o.space, trials[0].Params)) + 4*noise})
			}
			best, _ := opt.Best()
			got = append(got, o.f(at(o.space, best.Params)))
		}
		if m := median(got); m > 2 {
			t.Errorf("%s: median true loss %.3g under noise, want at most 2; random search has about 9", a.ID, m)
		}
	}
}
