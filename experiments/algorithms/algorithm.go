package algorithms

import (
	"encoding/json"
	"maps"
	"slices"

	"github.com/outrigger-mesh/outrigger"
)

// Family groups algorithms by how they search.
type Family string

// The families; the first four are those of the seed design's registry.
const (
	GradientBased Family = "gradient_based"
	Evolutionary  Family = "evolutionary"
	Metaheuristic Family = "metaheuristic"
	ModelBased    Family = "model_based"
	DirectSearch  Family = "direct_search"
	Sampling      Family = "sampling"
)

// Info describes an algorithm to people and to feature_matching.
type Info struct {
	ID     string `json:"id"`   // stable snake_case name
	Name   string `json:"name"` // for people
	Family Family `json:"family"`
	// What it accepts; other spaces are refused with kind Invalid.
	Kinds       []Kind `json:"kinds"`
	Conditional bool   `json:"conditional"` // accepts parameters with When
	// What suits it.
	Gradient  bool     `json:"gradient"`   // follows slopes, so the loss must be smooth
	Noise     bool     `json:"noise"`      // still works when the loss is noisy
	Parallel  int      `json:"parallel"`   // trials in flight that it uses well; 0 means any number
	MinBudget int      `json:"min_budget"` // evaluations from which
	MaxBudget int      `json:"max_budget"` // and to which it is a good choice
	MaxParams int      `json:"max_params"` // parameters up to which it is a good choice
	Rank      int      `json:"rank"`       // order among equals in feature_matching, lower first
	Tags      []string `json:"tags"`       // words a Task may ask for
	// Baseline marks yardsticks that do not learn; they are chosen only as a fallback.
	Baseline bool      `json:"baseline,omitempty"`
	Settings []Setting `json:"settings,omitempty"`
}

// Setting is one tunable number of an algorithm.
type Setting struct {
	Name    string  `json:"name"`
	Default float64 `json:"default"`
	Min     float64 `json:"min"`
	Max     float64 `json:"max"`
	Doc     string  `json:"doc"`
}

// Accepts returns nil if the algorithm can work on the space at all, or an error of
// kind Invalid that names the first parameter in the way.
func (i Info) Accepts(s *Space) error {
	for _, p := range s.params {
		if !slices.Contains(i.Kinds, p.Kind) {
			return outrigger.Errorf(outrigger.Invalid, "algorithm %s works on %v parameters, %q is %s; choose another, for example bayesian_optimization", i.ID, i.Kinds, p.Name, p.Kind)
		}
		if p.When != nil && !i.Conditional {
			return outrigger.Errorf(outrigger.Invalid, "algorithm %s does not work on conditional parameters, %q is one; choose another, for example bayesian_optimization", i.ID, p.Name)
		}
	}
	return nil
}

// settings returns the defaults overridden by over.
func (i Info) settings(over map[string]float64) (map[string]float64, error) {
	out := make(map[string]float64, len(i.Settings))
	for _, s := range i.Settings {
		out[s.Name] = s.Default
		if v, ok := over[s.Name]; ok {
			if !(v >= s.Min && v <= s.Max) {
				return nil, outrigger.Errorf(outrigger.Invalid, "setting %s of %s: %v is outside [%v, %v]", s.Name, i.ID, v, s.Min, s.Max)
			}
			out[s.Name] = v
		}
	}
	for _, name := range slices.Sorted(maps.Keys(over)) {
		if _, ok := out[name]; !ok {
			return nil, outrigger.Errorf(outrigger.Invalid, "setting %q is unknown to %s; it has %q", name, i.ID, slices.Sorted(maps.Keys(out)))
		}
	}
	return out, nil
}

// Algorithm is one entry of a registry: built in, or foreign.
type Algorithm struct {
	Info
	// New starts an optimisation. Bad configuration is an error of kind Invalid.
	New func(Config) (Optimizer, error)
	// Restore continues from Optimizer.State; a state it did not write is Invalid.
	Restore func(state []byte) (Optimizer, error)
}

type builtin struct {
	Info
	engine func(*problem) engine
}

// Builtin returns the built-in algorithms in a fixed order. The caller owns the slice.
func Builtin() []Algorithm {
	var out []Algorithm
	for _, b := range builtins() {
		out = append(out, Algorithm{
			Info: b.Info,
			New: func(c Config) (Optimizer, error) {
				d, err := newDriver(b, c)
				if err != nil {
					return nil, err
				}
				return d, nil
			},
			Restore: func(state []byte) (Optimizer, error) {
				d, err := restoreDriver(b, state)
				if err != nil {
					return nil, err
				}
				return d, nil
			},
		})
	}
	return out
}

// New starts an optimisation with the built-in algorithm id. An unknown id has kind
// NotFound.
func New(id string, cfg Config) (Optimizer, error) {
	for _, a := range Builtin() {
		if a.ID == id {
			return a.New(cfg)
		}
	}
	return nil, outrigger.Errorf(outrigger.NotFound, "algorithm %q not found among the built-in ones", id)
}

// Restore continues a built-in algorithm from its state, which names it.
func Restore(state []byte) (Optimizer, error) {
	var head struct {
		Algorithm string `json:"algorithm"`
	}
	if err := json.Unmarshal(state, &head); err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, "state")
	}
	for _, a := range Builtin() {
		if a.ID == head.Algorithm {
			return a.Restore(state)
		}
	}
	return nil, outrigger.Errorf(outrigger.NotFound, "state names algorithm %q, which is not found among the built-in ones", head.Algorithm)
}
