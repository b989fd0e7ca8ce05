package experiments

import (
	"cmp"
	"slices"

	"gonum.org/v1/gonum/stat/distuv"
)

// Holm returns p-values adjusted for the number of tests, in the order given: rejecting
// where the result is ≤ α makes any false rejection at all at most α likely, however
// the tests depend on each other. Source: Holm (1979). Values outside [0, 1] have kind
// Invalid.
func Holm(p []float64) ([]float64, error) {
	order, err := ascending(p)
	if err != nil {
		return nil, err
	}
	out, worst := make([]float64, len(p)), 0.0
	for i, j := range order {
		worst = max(worst, min(1, float64(len(p)-i)*p[j]))
		out[j] = worst
	}
	return out, nil
}

// BenjaminiHochberg returns p-values adjusted for the number of tests, in the order
// given: rejecting where the result is ≤ q keeps the expected share of false ones among
// the rejections at most q, for independent or positively dependent tests. Source:
// Benjamini and Hochberg (1995). Values outside [0, 1] have kind Invalid.
func BenjaminiHochberg(p []float64) ([]float64, error) {
	order, err := ascending(p)
	if err != nil {
		return nil, err
	}
	out, best := make([]float64, len(p)), 1.0
	for i, j := range slices.Backward(order) {
		best = min(best, float64(len(p))/float64(i+1)*p[j])
		out[j] = best
	}
	return out, nil
}

func ascending(p []float64) ([]int, error) {
	order := make([]int, len(p))
	for i, v := range p {
		if !(v >= 0 && v <= 1) {
			return nil, invalid("p-value %d is %v; p-values lie in [0, 1]", i, v)
		}
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(p[a], p[b]) })
	return order, nil
}

// EBH says which of the e-values to reject so that the expected share of false ones is
// at most q, under any dependence: the k greatest with e ≥ n/(q·k), for the greatest
// such k. Source: Wang and Ramdas, False discovery rate control with e-values (2022).
// Negative or NaN e-values and q outside (0, 1) have kind Invalid; +Inf is allowed.
func EBH(e []float64, q float64) ([]bool, error) {
	if err := checkLevel("q", q); err != nil {
		return nil, err
	}
	order := make([]int, len(e))
	for i, v := range e {
		if !(v >= 0) {
			return nil, invalid("e-value %d is %v; e-values are not negative", i, v)
		}
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(e[b], e[a]) })
	out, rejected := make([]bool, len(e)), 0
	for i, j := range order {
		if e[j] >= float64(len(e))/(q*float64(i+1)) {
			rejected = i + 1
		}
	}
	for _, j := range order[:rejected] {
		out[j] = true
	}
	return out, nil
}

// ChiSquare is the classical test of a sample ratio.
type ChiSquare struct {
	Statistic float64
	DF        int
	P         float64
	// Mismatch is P < alpha; always false when Small.
	Mismatch bool
	// Small is true when an arm's expected count is below 5 (or only one arm has any
	// weight): the approximation does not hold and P is 1.
	Small bool
}

// ChiSquareRatio tests once, at a fixed horizon, whether units arrived as intended; the
// customary alpha is 0.001. Watched continuously it raises false alarms: use
// CheckSampleRatio for that. Arms of weight 0 are left out. Weights must sum to Buckets
// and alpha lie in (0, 1); errors have kind Invalid.
func ChiSquareRatio(arms []Exposed, alpha float64) (ChiSquare, error) {
	if err := checkLevel("alpha", alpha); err != nil {
		return ChiSquare{}, err
	}
	weights := make([]Weighted, len(arms))
	n := 0.0
	for i, a := range arms {
		weights[i] = Weighted{a.Name, a.Weight}
		if a.Weight > 0 {
			n += float64(a.Units)
		}
	}
	if err := checkWeights(weights); err != nil {
		return ChiSquare{}, err
	}
	out := ChiSquare{DF: -1, P: 1}
	for _, a := range arms {
		if a.Weight == 0 {
			continue
		}
		want := n * float64(a.Weight) / Buckets
		if want < 5 {
			out.Small = true
			continue
		}
		out.DF++
		out.Statistic += (float64(a.Units) - want) * (float64(a.Units) - want) / want
	}
	if out.Small || out.DF < 1 {
		return ChiSquare{P: 1, Small: true}, nil
	}
	out.P = distuv.ChiSquared{K: float64(out.DF)}.Survival(out.Statistic)
	out.Mismatch = out.P < alpha
	return out, nil
}

// Exposure counts units that were seen in more than one arm. They are left out of the
// results; if there are many, leaving them out biases what remains.
type Exposure struct {
	Units, Multiple uint64 // distinct units seen, and of them those in several arms
}

// multipleLimit is the share of multiply exposed units from which to warn.
const multipleLimit = 0.01

// Share is the share of units that were seen in several arms; 0 without units.
func (e Exposure) Share() float64 {
	if e.Units == 0 {
		return 0
	}
	return float64(e.Multiple) / float64(e.Units)
}

// Banner is true when at least 1 % of the units were seen in several arms.
func (e Exposure) Banner() bool { return e.Multiple > 0 && e.Share() >= multipleLimit }
