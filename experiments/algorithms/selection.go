package algorithms

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// Strategy is a way to choose an algorithm.
type Strategy string

// The strategies.
const (
	// PerformanceWeighted draws by softmax of the decayed mean score.
	PerformanceWeighted Strategy = "performance_weighted"
	// FeatureMatching filters by what the task is and ranks by what the budget allows.
	FeatureMatching Strategy = "feature_matching"
	// Adaptive is Thompson sampling on the scores.
	Adaptive Strategy = "adaptive"
	// Experimental assigns tasks to algorithms as units to the arms of an experiment.
	Experimental Strategy = "experimental"
)

// ParseStrategy returns the strategy of that exact name; another is Invalid.
func ParseStrategy(name string) (Strategy, error) {
	all := []Strategy{PerformanceWeighted, FeatureMatching, Adaptive, Experimental}
	if s := Strategy(name); slices.Contains(all, s) {
		return s, nil
	}
	return "", outrigger.Errorf(outrigger.Invalid, "selection strategy %q is none of %q", name, all)
}

// Task describes an optimisation to choose an algorithm for.
type Task struct {
	Type     string   // history is kept per type, for example "prompt/classification"
	Unit     string   // what Experimental assigns: the id of the optimisation
	Space    *Space   // nil means unknown: nothing is ruled out by kind
	Budget   int      // evaluations; 0 means unknown
	Noisy    bool     // evaluating twice gives different losses
	Smooth   bool     // the loss has a slope to follow
	Parallel int      // evaluations at once; 0 means 1
	Wants    []string // families or tags, any of which will do; empty means any
}

// Choice is the answer of Select.
type Choice struct {
	Algorithm string // Info.ID
	Reason    string // one sentence for people
	// Fallback says that the strategy itself had no answer.
	Fallback bool
	// Probability with which this algorithm was drawn, for inverse-propensity weighting;
	// 1 for a deterministic choice, 0 where it is not known in closed form (Adaptive).
	Probability float64
}

// Comparison is a running experiment between algorithms on one task type.
type Comparison struct {
	Salt string
	Arms []experiments.Allocation // Name is an Info.ID; buckets may be left uncovered
}

// Selector chooses among Algorithms. The zero value of every option is its default.
type Selector struct {
	Strategy   Strategy
	Algorithms []Info
	History    *History              // nil means empty
	Running    map[string]Comparison // by task type, for Experimental
	// InverseTemperature multiplies scores before the exponential of
	// PerformanceWeighted. 0 fits it to their spread: ten between worst and best. A fixed
	// 5, the value of the seed design, is nearly uniform for scores in [0,1].
	InverseTemperature float64
	// Decay is the rate by which older records lose weight, e^(−Decay·age in records);
	// 0 means 0.02.
	Decay float64
}

// Select chooses an algorithm for the task; randomness comes from r alone. There is
// always an answer: the strategies choose among the algorithms that accept the task's
// space, and where that leaves a strategy nothing, the choice is "random" (or, for
// Experimental, PerformanceWeighted) with Fallback set and the reason. Baselines are
// never drawn, only fallen back to.
func (s *Selector) Select(t Task, r *rand.Rand) Choice {
	pool := s.pool(t)
	if len(pool) == 0 {
		return fallback("no registered algorithm works on this space")
	}
	switch s.Strategy {
	case FeatureMatching:
		return matchFeatures(pool, t)
	case Adaptive:
		return s.thompson(pool, t, r)
	case Experimental:
		return s.experiment(pool, t, r)
	case PerformanceWeighted, "":
		return s.weighted(pool, t, r)
	}
	return fallback(fmt.Sprintf("selection strategy %q is unknown", s.Strategy))
}

func fallback(reason string) Choice {
	return Choice{Algorithm: "random", Reason: reason + "; random search works on everything", Fallback: true, Probability: 1}
}

func (s *Selector) pool(t Task) []Info {
	return slices.DeleteFunc(slices.Clone(s.Algorithms), func(i Info) bool {
		return i.Baseline || t.Space != nil && i.Accepts(t.Space) != nil
	})
}

func (s *Selector) records(t Task, i Info) []Record {
	if s.History == nil {
		return nil
	}
	return s.History.types[t.Type][i.ID]
}

// weighted draws by softmax. An algorithm without records counts as good as the best,
// so each is tried; a fiftieth of the draws is uniform, so none is forgotten for good.
func (s *Selector) weighted(pool []Info, t Task, r *rand.Rand) Choice {
	const uniform = 0.02
	scores, tried := make([]float64, len(pool)), make([]bool, len(pool))
	best, worst := math.Inf(-1), math.Inf(1)
	for k, i := range pool {
		if scores[k], tried[k] = s.decayed(s.records(t, i)); tried[k] {
			best, worst = max(best, scores[k]), min(worst, scores[k])
		}
	}
	if math.IsInf(best, -1) {
		best, worst = 0.5, 0.5
	}
	inverse, share := s.InverseTemperature, 0.0
	if inverse <= 0 {
		inverse, share = 10/max(best-worst, 0.05), uniform
	}
	weights, sum := make([]float64, len(pool)), 0.0
	for k := range pool {
		if !tried[k] {
			scores[k] = best
		}
		weights[k] = math.Exp(inverse * (scores[k] - best))
		sum += weights[k]
	}
	for k := range weights {
		weights[k] = (1-share)*weights[k]/sum + share/float64(len(pool))
	}
	k := draw(weights, r.Float64())
	reason := fmt.Sprintf("drawn with probability %.2f by its decayed score %.3f on %q", weights[k], scores[k], t.Type)
	if !tried[k] {
		reason = fmt.Sprintf("drawn with probability %.2f: no record on %q yet", weights[k], t.Type)
	}
	return Choice{Algorithm: pool[k].ID, Reason: reason, Probability: weights[k]}
}

// draw returns the index whose share of the unit interval contains x.
func draw(weights []float64, x float64) int {
	for k, w := range weights {
		if x -= w; x < 0 {
			return k
		}
	}
	return len(weights) - 1
}

func (s *Selector) decayed(rs []Record) (mean float64, ok bool) {
	rate := s.Decay
	if rate <= 0 {
		rate = 0.02
	}
	sum, norm, w := 0.0, 0.0, 1.0
	for k := len(rs) - 1; k >= 0 && w > 1e-9; k-- {
		sum += w * rs[k].Score
		norm += w
		w *= math.Exp(-rate)
	}
	return sum / max(norm, 1e-300), norm > 0
}

// thompson draws a mean score for each algorithm from its posterior and takes the
// highest (Thompson 1933): normal scores of common variance, pooled over the algorithms
// of the task type, and a prior worth one record at their grand mean.
func (s *Selector) thompson(pool []Info, t Task, r *rand.Rand) Choice {
	const priorDev, priorCount = 0.25, 2.0 // of the spread of scores, in records
	n, means := make([]float64, len(pool)), make([]float64, len(pool))
	grand, total, squares := 0.0, 0.0, priorCount*priorDev*priorDev
	for k, i := range pool {
		rs := s.records(t, i)
		n[k] = float64(len(rs))
		for _, rec := range rs {
			means[k] += rec.Score / n[k]
		}
		for _, rec := range rs {
			squares += (rec.Score - means[k]) * (rec.Score - means[k])
		}
		grand += n[k] * means[k]
		total += n[k]
	}
	if grand = grand / max(total, 1); total == 0 {
		grand = 0.5
	}
	dev := math.Sqrt(squares / (total + priorCount))
	best, high := 0, math.Inf(-1)
	for k := range pool {
		mean := (grand + n[k]*means[k]) / (1 + n[k])
		if v := mean + dev/math.Sqrt(1+n[k])*r.NormFloat64(); v > high {
			best, high = k, v
		}
	}
	return Choice{Algorithm: pool[best].ID, Reason: fmt.Sprintf("highest draw (%.3f) from what %d tasks of type %q showed, %d of them its own", high, int(total), t.Type, int(n[best]))}
}

func (s *Selector) experiment(pool []Info, t Task, r *rand.Rand) Choice {
	back := func(why string) Choice {
		c := s.weighted(pool, t, r)
		c.Fallback, c.Reason = true, why+"; "+c.Reason
		return c
	}
	e, ok := s.Running[t.Type]
	if !ok {
		return back(fmt.Sprintf("no experiment runs on %q", t.Type))
	}
	if t.Unit == "" {
		return back("the task has no unit to assign")
	}
	bucket := experiments.Bucket(e.Salt, t.Unit)
	for _, arm := range e.Arms {
		if !slices.ContainsFunc(arm.Ranges, func(g experiments.Range) bool { return bucket >= g.Start && bucket < g.End }) {
			continue
		}
		if !slices.ContainsFunc(pool, func(i Info) bool { return i.ID == arm.Name }) {
			return back(fmt.Sprintf("arm %s is not registered or does not work on this space", arm.Name))
		}
		return Choice{Algorithm: arm.Name, Reason: fmt.Sprintf("bucket %d of the experiment on %q", bucket, t.Type),
			Probability: float64(arm.Weight()) / experiments.Buckets}
	}
	return back(fmt.Sprintf("bucket %d is outside the experiment on %q", bucket, t.Type))
}

// matchFeatures filters hard by what must hold, then prefers algorithms in whose range
// the budget and dimension lie. Published experience behind the ranges: Gaussian
// processes to a few hundred evaluations, evolution strategies and genetic search above
// (Optuna's AutoSampler, nevergrad's NGOpt).
func matchFeatures(pool []Info, t Task) Choice {
	pool = slices.DeleteFunc(slices.Clone(pool), func(i Info) bool { return i.Gradient && !t.Smooth || t.Noisy && !i.Noise })
	if len(pool) == 0 {
		return fallback(fmt.Sprintf("no algorithm suits a loss with noisy=%v, smooth=%v on this space", t.Noisy, t.Smooth))
	}
	note := ""
	if wanted := slices.DeleteFunc(slices.Clone(pool), func(i Info) bool { return !i.hasAny(t.Wants) }); len(wanted) > 0 {
		pool = wanted
	} else {
		note = fmt.Sprintf("; none that fits is %s, so that wish was dropped", strings.Join(t.Wants, " or "))
	}
	best := slices.MinFunc(pool, func(a, b Info) int {
		if x, y := a.fit(t), b.fit(t); x != y {
			if x > y {
				return -1
			}
			return 1
		}
		return a.Rank - b.Rank
	})
	return Choice{Algorithm: best.ID, Probability: 1, Fallback: note != "", Reason: fmt.Sprintf(
		"best match of %d for budget %d (it suits %d to %d), noisy=%v, smooth=%v%s", len(pool), t.Budget, best.MinBudget, best.MaxBudget, t.Noisy, t.Smooth, note)}
}

func (i Info) hasAny(wants []string) bool {
	return len(wants) == 0 || slices.ContainsFunc(wants, func(w string) bool { return w == string(i.Family) || slices.Contains(i.Tags, w) })
}

// fit is how well the algorithm suits the size of the task; 0 is perfect, each factor
// of two outside a range costs one.
func (i Info) fit(t Task) float64 {
	outside := func(x, lo, hi int) float64 {
		if x <= 0 {
			return 0
		}
		return max(0, math.Log2(float64(lo)/float64(x)), math.Log2(float64(x)/float64(max(hi, 1))))
	}
	cost := outside(t.Budget, max(i.MinBudget, 1), i.MaxBudget)
	if t.Space != nil {
		cost += outside(t.Space.Len(), 1, i.MaxParams)
	}
	if i.Parallel > 0 {
		cost += outside(t.Parallel, 1, i.Parallel)
	}
	if t.Smooth && !i.Gradient && t.Budget > maxModelled {
		cost += 0.5 // a slope is worth following once a surrogate is out of reach
	}
	return -cost
}
