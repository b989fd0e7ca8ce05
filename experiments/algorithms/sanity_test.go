package algorithms

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

func TestBuiltinsPassTheSanityTask(t *testing.T) {
	for _, a := range Builtin() {
		s := SanityTask{}
		if a.ID == "bayesian_optimization" {
			s.Seeds = 3
		}
		if err := s.Check(a); err != nil {
			t.Errorf("%s: %v", a.ID, err)
		}
	}
}

// broken wraps a sound optimiser and spoils one promise.
type broken struct {
	Optimizer
	ask   func(Optimizer, int) []Trial
	tell  func(Optimizer, []Result) error
	best  func(Optimizer) (Evaluated, bool)
	state func(Optimizer) []byte
}

func (b broken) Ask(n int) []Trial {
	if b.ask != nil {
		return b.ask(b.Optimizer, n)
	}
	return b.Optimizer.Ask(n)
}

func (b broken) Tell(rs []Result) error {
	if b.tell != nil {
		return b.tell(b.Optimizer, rs)
	}
	return b.Optimizer.Tell(rs)
}

func (b broken) Best() (Evaluated, bool) {
	if b.best != nil {
		return b.best(b.Optimizer)
	}
	return b.Optimizer.Best()
}

func (b broken) State() []byte {
	if b.state != nil {
		return b.state(b.Optimizer)
	}
	return b.Optimizer.State()
}

// One broken promise each; the sanity task must name it.
func TestSanityTaskFindsBrokenPromises(t *testing.T) {
	annealing := Builtin()[3]
	wild := rand.New(rand.NewPCG(1, 1)) // shared between runs: not repeatable
	for name, c := range map[string]struct {
		want string
		b    broken
	}{
		"outside the space": {"outside the space", broken{ask: func(o Optimizer, n int) []Trial {
			ts := o.Ask(n)
			for _, t := range ts {
				if x, ok := t.Params["x"].(float64); ok {
					t.Params["x"] = x + 6
				}
			}
			return ts
		}}},
		"too many": {"3 trials for Ask(2)", broken{ask: func(o Optimizer, n int) []Trial { return o.Ask(n + 1) }}},
		"gives up": {"and then none", broken{ask: func(o Optimizer, n int) []Trial {
			ts := o.Ask(n)
			if len(ts) > 0 && ts[0].ID > 10 {
				return nil
			}
			return ts
		}}},
		"misnumbers": {"is the", broken{ask: func(o Optimizer, n int) []Trial {
			ts := o.Ask(n)
			for i := range ts {
				ts[i].ID += 100
			}
			return ts
		}}},
		"takes results twice": {"accepted twice", broken{tell: func(o Optimizer, rs []Result) error {
			_ = o.Tell(rs)
			return nil
		}}},
		"not repeatable": {"same seed gave different", broken{ask: func(o Optimizer, n int) []Trial {
			ts := o.Ask(n)
			for _, t := range ts {
				if _, ok := t.Params["x"].(float64); ok {
					t.Params["x"] = 0.001 + wild.Float64()
				}
			}
			return ts
		}}},
		"wrong best": {"Best is", broken{best: func(o Optimizer) (Evaluated, bool) {
			e, ok := o.Best()
			e.Loss--
			return e, ok
		}}},
		"forgets": {"Restore", broken{state: func(Optimizer) []byte { return []byte("{}") }}},
		"refuses results": {"Tell", broken{tell: func(Optimizer, []Result) error {
			return outrigger.Errorf(outrigger.Internal, "broken")
		}}},
	} {
		a := annealing
		a.New = func(cfg Config) (Optimizer, error) {
			o, err := annealing.New(cfg)
			b := c.b
			b.Optimizer = o
			return b, err
		}
		err := SanityTask{}.Check(a)
		if !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: Check = %v, want Invalid with %q", name, err, c.want)
		}
	}
}

func TestSanityTaskWantsMoreThanRandom(t *testing.T) {
	lazy := Builtin()[7]
	if err := (SanityTask{}).Check(lazy); err != nil {
		t.Fatalf("a declared baseline fails: %v", err)
	}
	lazy.ID, lazy.Baseline = "lazy", false
	lazy.New = func(cfg Config) (Optimizer, error) {
		// All but at a corner: legal, repeatable, and useless.
		cfg.Start = nil
		return cornered{}.new(cfg)
	}
	lazy.Restore = func(state []byte) (Optimizer, error) {
		o, err := Restore(state)
		return cornered{o}, err
	}
	if err := (SanityTask{}).Check(lazy); !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), "random search reaches") {
		t.Errorf("a useless algorithm gave %v", err)
	}
	if err := (SanityTask{}).Check(Algorithm{Info: Info{ID: "empty"}}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("an empty algorithm gave %v", err)
	}
}

// cornered is random search that never leaves the upper end of x.
type cornered struct{ Optimizer }

func (cornered) new(cfg Config) (Optimizer, error) {
	o, err := New("random", cfg)
	return cornered{o}, err
}

func (c cornered) Ask(n int) []Trial {
	ts := c.Optimizer.Ask(n)
	for _, t := range ts {
		if x, ok := t.Params["x"].(float64); ok {
			t.Params["x"] = 4.9 + x/200
		}
	}
	return ts
}

func TestSanityTaskStops(t *testing.T) {
	calls := 0
	s := SanityTask{Stop: func() bool { calls++; return calls > 10 }}
	if err := s.Check(Builtin()[3]); !outrigger.IsKind(err, outrigger.Timeout) || calls != 11 {
		t.Errorf("stopped at call %d with %v, want Timeout at 11", calls, err)
	}
}
