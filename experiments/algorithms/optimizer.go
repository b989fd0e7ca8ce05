package algorithms

import (
	"encoding/json"
	"math"
	"slices"

	"github.com/outrigger-mesh/outrigger"
)

// Limits of an Optimizer.
const (
	MaxBudget  = 100_000 // evaluations of one optimisation
	MaxPending = 1_024   // trials asked and not yet told
	maxLoss    = 1e100   // finite losses beyond it are refused: their squares overflow
)

// Optimizer searches a Space for the setting with the lowest loss by ask and tell.
// It is used by one goroutine at a time.
type Optimizer interface {
	// Ask returns up to n trials to evaluate. Fewer, or none, come back when the
	// algorithm must first be told results that are pending, when MaxPending are
	// pending, or when the budget is used up. With nothing pending and budget left at
	// least one trial is returned for n ≥ 1.
	Ask(n int) []Trial
	// Tell takes results of pending trials, in any order and number. All are taken or,
	// with an error, none: NotFound for an ID that is not pending (so a result told
	// twice is refused), Invalid for a loss that is NaN or beyond ±1e100.
	Tell(results []Result) error
	// Best returns the told trial with the lowest loss; ok is false while there is none.
	// With a noisy loss that is partly luck: confirm it by an experiment.
	Best() (best Evaluated, ok bool)
	// State serialises everything, pending trials included, for Algorithm.Restore.
	State() []byte
}

// Trial is one evaluation to make.
type Trial struct {
	ID     int64  `json:"id"` // 1, 2, 3, … within one optimiser
	Params Params `json:"params"`
}

// Result is the outcome of one trial.
type Result struct {
	ID   int64   `json:"id"`
	Loss float64 `json:"loss"` // lower is better; any unit, within ±1e100
	// Failed says that there is no loss: the evaluation crashed or timed out. The
	// algorithms treat it as worse than every loss.
	Failed bool `json:"failed,omitempty"`
}

// Evaluated is a trial with its loss.
type Evaluated struct {
	Trial
	Loss float64 `json:"loss"`
}

// Config is what an optimisation is about.
type Config struct {
	Space *Space `json:"space"` // required
	Seed  uint64 `json:"seed"`
	// Budget is the number of trials that may be asked, 1 to MaxBudget. Schedules
	// (cooling, population size) are fitted to it.
	Budget int `json:"budget"`
	// Noisy says that evaluating the same setting twice gives different losses.
	Noisy bool `json:"noisy,omitempty"`
	// Start, if given, is the first trial, usually the setting in production.
	Start Params `json:"start,omitempty"`
	// Settings override the defaults listed in Info.Settings; unknown names and values
	// out of range are refused.
	Settings map[string]float64 `json:"settings,omitempty"`
}

// problem is a Config as the engines see it.
type problem struct {
	space  *Space
	d      int
	budget int
	noisy  bool
	seed   uint64
	set    map[string]float64
	start  []float64 // nil without Config.Start
	// unordered marks parameters whose distances mean nothing beyond "different".
	unordered []bool
}

// design is point i of the space-filling initial design; the first is Config.Start.
func (p *problem) design(i int) []float64 {
	if p.start != nil {
		if i == 0 {
			return slices.Clone(p.start)
		}
		i--
	}
	return sobolPoint(p.seed, i, p.d)
}

// loss is a float64 whose JSON form has null for a failed trial (+Inf).
type loss float64

func (l loss) failed() bool { return math.IsInf(float64(l), 1) }

func (l loss) MarshalJSON() ([]byte, error) {
	if l.failed() {
		return []byte("null"), nil
	}
	return json.Marshal(float64(l))
}

func (l *loss) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		*l = loss(math.Inf(1))
		return nil
	}
	return json.Unmarshal(b, (*float64)(l))
}

func (l loss) valid() bool { return l.failed() || math.Abs(float64(l)) <= maxLoss }

func newProblem(info Info, cfg Config) (*problem, error) {
	if cfg.Space == nil || cfg.Space.Len() == 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "config: space is missing; build one with NewSpace")
	}
	if cfg.Budget < 1 || cfg.Budget > MaxBudget {
		return nil, outrigger.Errorf(outrigger.Invalid, "config: budget %d evaluations, want 1 to %d", cfg.Budget, MaxBudget)
	}
	if err := info.Accepts(cfg.Space); err != nil {
		return nil, err
	}
	set, err := info.settings(cfg.Settings)
	if err != nil {
		return nil, err
	}
	p := &problem{space: cfg.Space, d: cfg.Space.Len(), budget: cfg.Budget, noisy: cfg.Noisy, seed: cfg.Seed, set: set}
	for _, q := range cfg.Space.params {
		p.unordered = append(p.unordered, q.unordered())
	}
	if cfg.Start != nil {
		if p.start, err = cfg.Space.Encode(cfg.Start); err != nil {
			return nil, outrigger.Wrap(outrigger.Invalid, err, "config: start")
		}
	}
	return p, nil
}
