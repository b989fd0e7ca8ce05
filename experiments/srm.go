package experiments

import (
	"math"

	"github.com/outrigger-mesh/outrigger"
)

// Exposed is one arm, the share it was meant to get in parts of 10 000, and how many
// distinct units were seen in it.
type Exposed struct {
	Name   string
	Weight uint32
	Units  uint64
}

// SampleRatio says whether units arrived in the proportions intended. If they did not,
// assignment or logging is broken and no result of the experiment can be trusted.
type SampleRatio struct {
	// BayesFactor is the evidence for a mismatch, 1 = none either way; capped at 1e300.
	BayesFactor float64
	// Mismatch is true when BayesFactor ≥ 1/α.
	Mismatch bool
	// Leaks names arms of weight 0 that nevertheless got more than max(5, 0.01 %) units.
	Leaks []string
}

// srmConcentration is the Dirichlet prior's: the larger, the smaller the mismatches it
// looks for. 10 000 finds 51/49 at about 31 000 units and 52/48 at about 11 000.
const srmConcentration = 10_000

// CheckSampleRatio tests the counts for a sample ratio mismatch. The Bayes factor of a
// Dirichlet-multinomial alternative against the intended shares is a martingale under
// "as intended", so the check may be repeated as often as one likes: with correct
// assignment Mismatch is ever true with probability at most alpha. Once true, it should
// be remembered. Source: Lindon and Malek, Anytime-valid inference for multinomial
// count data (NeurIPS 2022), as in Optimizely's ssrm.
//
// Weights must sum to Buckets and alpha lie in (0, 1); errors have kind Invalid.
func CheckSampleRatio(arms []Exposed, alpha float64) (SampleRatio, error) {
	if !(alpha > 0 && alpha < 1) {
		return SampleRatio{}, outrigger.Errorf(outrigger.Invalid, "alpha %v is outside (0, 1)", alpha)
	}
	log, leaks, err := ratioEvidence(arms)
	if err != nil {
		return SampleRatio{}, err
	}
	return SampleRatio{BayesFactor: eValue(log), Mismatch: log >= -math.Log(alpha), Leaks: leaks}, nil
}

// ratioEvidence returns the log of the Bayes factor and the leaking arms.
func ratioEvidence(arms []Exposed) (log float64, leaks []string, err error) {
	weights := make([]Weighted, len(arms))
	var all, wanted uint64 // units; units in arms that were meant to have some
	for i, a := range arms {
		weights[i] = Weighted{a.Name, a.Weight}
		all += a.Units
		if a.Weight > 0 {
			wanted += a.Units
		}
	}
	if err := checkWeights(weights); err != nil {
		return 0, nil, err
	}
	log = logGamma(srmConcentration) - logGamma(srmConcentration+float64(wanted))
	for _, a := range arms {
		if a.Weight == 0 {
			if float64(a.Units) > max(5, 1e-4*float64(all)) {
				leaks = append(leaks, a.Name)
			}
			continue
		}
		share, n := float64(a.Weight)/Buckets, float64(a.Units)
		log += logGamma(srmConcentration*share+n) - logGamma(srmConcentration*share) - n*math.Log(share)
	}
	return log, leaks, nil
}

func logGamma(x float64) float64 {
	y, _ := math.Lgamma(x) // positive for every x used here
	return y
}
