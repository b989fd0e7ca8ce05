package algorithms

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"slices"

	"github.com/outrigger-mesh/outrigger"
)

// BraninMin is the minimum of Branin.
const BraninMin = 0.39788735772973816

// Branin is the Branin-Hoo function on [-5,10]×[0,15], with three equal minima (Dixon
// and Szegö 1978).
func Branin(x, y float64) float64 {
	a := y - 5.1/(4*math.Pi*math.Pi)*x*x + 5/math.Pi*x - 6
	return a*a + 10*(1-1/(8*math.Pi))*math.Cos(x) + 10
}

// SanityTask is the entrance examination of an algorithm before it is registered. The
// zero value is the usual one.
type SanityTask struct {
	Budget int    // evaluations per run; 0 means 40
	Seeds  int    // runs per problem; 0 means 5
	Seed   uint64 // first seed
	// Stop is asked before every call into the algorithm; true ends the examination
	// with an error of kind Timeout. Nil means never. A call that does not return, or
	// panics, is the caller's to isolate.
	Stop func() bool
}

// Check runs a on two standard problems and on a space with every kind of parameter it
// says it accepts, and reports the first broken promise as an error of kind Invalid:
// trials inside the space, numbered as promised and within the budget; unknown results
// refused; the same trials for the same seed; the same trials after State and Restore;
// and, unless it is a baseline, a median loss below that of random search.
func (s SanityTask) Check(a Algorithm) error {
	if s.Budget <= 0 {
		s.Budget = 40
	}
	if s.Seeds <= 0 {
		s.Seeds = 5
	}
	if a.ID == "" || a.New == nil || a.Restore == nil || len(a.Kinds) == 0 {
		return outrigger.Errorf(outrigger.Invalid, "algorithm %q: id, kinds, New and Restore are required", a.ID)
	}
	problems, err := s.problems(a.Info)
	if err != nil {
		return err
	}
	for _, p := range problems {
		if err := s.repeatable(a, p); err != nil {
			return err
		}
		if a.Baseline || !p.graded {
			continue
		}
		if err := s.beatsRandom(a, p); err != nil {
			return err
		}
	}
	return nil
}

type sanityProblem struct {
	name   string
	space  *Space
	loss   func(Params) float64
	graded bool
}

// problems adapts the two functions to the kinds the algorithm works on: floats if it
// can, else integers.
func (s SanityTask) problems(i Info) ([]sanityProblem, error) {
	kind, scale := Float, 1.0
	if !slices.Contains(i.Kinds, Float) {
		kind, scale = Int, 100
	}
	var out []sanityProblem
	if slices.Contains(i.Kinds, kind) {
		value := func(p Params, name string) float64 {
			x, _ := number(p[name])
			return x / scale
		}
		ball, err := NewSpace(Param{Name: "x", Kind: kind, Min: -5 * scale, Max: 5 * scale}, Param{Name: "y", Kind: kind, Min: -5 * scale, Max: 5 * scale})
		if err != nil {
			return nil, err
		}
		box, err := NewSpace(Param{Name: "x", Kind: kind, Min: -5 * scale, Max: 10 * scale}, Param{Name: "y", Kind: kind, Min: 0, Max: 15 * scale})
		if err != nil {
			return nil, err
		}
		out = append(out,
			sanityProblem{"sphere", ball, func(p Params) float64 {
				// Off centre, as the middle of the cube is a favourite first guess.
				x, y := value(p, "x")-1.3, value(p, "y")+2.1
				return x*x + y*y
			}, true},
			sanityProblem{"branin", box, func(p Params) float64 { return Branin(value(p, "x"), value(p, "y")) }, true})
	}
	mixed, err := mixedSpace(i)
	return append(out, sanityProblem{"mixed", mixed, mixedLoss, false}), err
}

// mixedSpace has a parameter of every kind the algorithm accepts.
func mixedSpace(i Info) (*Space, error) {
	var ps []Param
	for _, k := range i.Kinds {
		switch k {
		case Float:
			ps = append(ps, Param{Name: "rate", Kind: Float, Min: 1e-4, Max: 1, Log: true}, Param{Name: "warmth", Kind: Float, Min: 0, Max: 2})
		case Int:
			ps = append(ps, Param{Name: "shots", Kind: Int, Min: 0, Max: 8})
		case Boolean:
			ps = append(ps, Param{Name: "chain", Kind: Boolean})
		case Categorical:
			ps = append(ps, Param{Name: "style", Kind: Categorical, Choices: []string{"plain", "steps", "debate"}})
		}
	}
	if slices.Contains(i.Kinds, Categorical) && slices.Contains(i.Kinds, Int) && i.Conditional {
		ps = append(ps, Param{Name: "rounds", Kind: Int, Min: 1, Max: 5, When: &Condition{"style", []any{"debate"}}})
	}
	return NewSpace(ps...)
}

func mixedLoss(p Params) float64 {
	y := 0.0
	if v, ok := p["rate"].(float64); ok {
		y += math.Abs(math.Log10(v) + 2)
	}
	if v, ok := p["warmth"].(float64); ok {
		y += (v - 0.7) * (v - 0.7)
	}
	if v, ok := p["shots"].(int64); ok {
		y += math.Abs(float64(v)-3) / 4
	}
	if v, ok := p["rounds"].(int64); ok {
		y += math.Abs(float64(v)-2)/4 - 1
	}
	if v, ok := p["chain"].(bool); ok && !v {
		y += 0.5
	}
	return y
}

// run carries out one optimisation, checking every promise on the way. With reload the
// optimiser is saved and restored half-way, with a trial pending.
func (s SanityTask) run(a Algorithm, p sanityProblem, seed uint64, reload bool) (best float64, trace []byte, err error) {
	bad := func(format string, args ...any) (float64, []byte, error) {
		return 0, nil, outrigger.Errorf(outrigger.Invalid, "algorithm %s on %s, seed %d: %s", a.ID, p.name, seed, fmt.Sprintf(format, args...))
	}
	opt, err := a.New(Config{Space: p.space, Seed: seed, Budget: s.Budget})
	if err != nil {
		return bad("New: %v", err)
	}
	best = math.Inf(1)
	var log bytes.Buffer
	for asked := int64(0); asked <= int64(s.Budget); {
		if s.Stop != nil && s.Stop() {
			return 0, nil, outrigger.Errorf(outrigger.Timeout, "algorithm %s on %s: stopped after %d evaluations", a.ID, p.name, asked)
		}
		trials := opt.Ask(2)
		if len(trials) == 0 {
			if asked < int64(s.Budget) {
				return bad("asked %d trials of %d and then none with nothing pending", asked, s.Budget)
			}
			break
		}
		if reload && asked >= int64(s.Budget/2) {
			reload = false
			if opt, err = a.Restore(opt.State()); err != nil {
				return bad("Restore: %v", err)
			}
		}
		if len(trials) > 2 {
			return bad("%d trials for Ask(2)", len(trials))
		}
		for _, t := range trials {
			if asked++; t.ID != asked || asked > int64(s.Budget) {
				return bad("trial numbered %d is the %dth of a budget of %d", t.ID, asked, s.Budget)
			}
			if err := p.space.Check(t.Params); err != nil {
				return bad("trial %d is outside the space: %v", t.ID, err)
			}
			line, err := json.Marshal(t)
			if err != nil {
				return bad("trial %d: %v", t.ID, err)
			}
			log.Write(line)
			y := p.loss(t.Params)
			best = min(best, y)
			if err := opt.Tell([]Result{{ID: t.ID, Loss: y}}); err != nil {
				return bad("Tell: %v", err)
			}
		}
		if opt.Tell([]Result{{ID: trials[0].ID, Loss: 0}}) == nil {
			return bad("trial %d was accepted twice", trials[0].ID)
		}
	}
	if got, ok := opt.Best(); !ok || got.Loss != best {
		return bad("Best is %v (%v), the lowest loss told was %v", got.Loss, ok, best)
	}
	return best, log.Bytes(), nil
}

func (s SanityTask) repeatable(a Algorithm, p sanityProblem) error {
	_, first, err := s.run(a, p, s.Seed, false)
	if err != nil {
		return err
	}
	for _, reload := range []bool{false, true} {
		_, again, err := s.run(a, p, s.Seed, reload)
		if err != nil {
			return err
		}
		if !bytes.Equal(first, again) {
			return outrigger.Errorf(outrigger.Invalid, "algorithm %s on %s: the same seed gave different trials (restored half-way: %v)", a.ID, p.name, reload)
		}
	}
	return nil
}

func (s SanityTask) beatsRandom(a Algorithm, p sanityProblem) error {
	const yardsticks = 51
	var ours, random []float64
	for k := range s.Seeds {
		y, _, err := s.run(a, p, s.Seed+uint64(k), false)
		if err != nil {
			return err
		}
		ours = append(ours, y)
	}
	plain := Builtin()
	base := plain[slices.IndexFunc(plain, func(a Algorithm) bool { return a.ID == "random" })]
	for k := range yardsticks {
		y, _, err := s.run(base, p, s.Seed+uint64(k), false)
		if err != nil {
			return err
		}
		random = append(random, y)
	}
	if x, y := middle(ours), middle(random); !(x < y) {
		return outrigger.Errorf(outrigger.Invalid, "algorithm %s on %s: median loss %.4g in %d evaluations, random search reaches %.4g", a.ID, p.name, x, s.Budget, y)
	}
	return nil
}

// middle is the median; it sorts xs.
func middle(xs []float64) float64 {
	slices.Sort(xs)
	return (xs[(len(xs)-1)/2] + xs[len(xs)/2]) / 2
}
