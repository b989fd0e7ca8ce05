package experiments

import (
	"fmt"
	"math"
)

// Outcome is what has been decided.
type Outcome string

// The outcomes. All but OutcomeContinue are final.
const (
	OutcomeContinue         Outcome = "continue"
	OutcomeShip             Outcome = "ship"              // a treatment is better: serve it
	OutcomeKeep             Outcome = "keep"              // the control is better, or nothing worth having is left
	OutcomeInconclusive     Outcome = "inconclusive"      // no evidence in the planned time: serve the control
	OutcomeStoppedSRM       Outcome = "stopped_srm"       // units did not arrive as intended: believe nothing
	OutcomeStoppedGuardrail Outcome = "stopped_guardrail" // a treatment does harm
	OutcomeStoppedManual    Outcome = "stopped_manual"    // a person ended it; no evidence either way
)

// Decision is the verdict of the rule, with the numbers behind it in words.
type Decision struct {
	Outcome Outcome
	// Serve is the arm to give all traffic to once the outcome is final; empty before.
	Serve   string
	Reasons []string
}

// Final reports whether the experiment is over.
func (d Decision) Final() bool { return d.Outcome != OutcomeContinue && d.Outcome != "" }

// decide applies the rule. In this order: an earlier conclusion stands; a sample ratio
// mismatch and then a guardrail stop at once; then, after the minimum duration and
// without leaks, a significant result concludes; the horizon and the maximum duration
// end the experiment without evidence in favour of the control.
func (a analysis) decide(r Result) Decision {
	if a.data.Concluded != nil && a.data.Concluded.Final() {
		return *a.data.Concluded
	}
	if r.Ratio.Mismatch {
		return a.final(OutcomeStoppedSRM, a.plan.Control, fmt.Sprintf(
			"sample ratio mismatch: log Bayes factor %.4g reached %.4g; assignment or logging is broken",
			r.Ratio.LogBayesFactor, -math.Log(a.plan.SRMAlpha)))
	}
	for _, g := range r.Guardrails {
		if g.State == GuardrailWorse {
			return a.final(OutcomeStoppedGuardrail, a.plan.Control, fmt.Sprintf(
				"guardrail %s: arm %s is worse than the margin allows (p %.4g ≤ %.4g)", g.Metric, g.Arm, g.PWorse, g.Alpha))
		}
	}
	var waits []string
	if a.data.Elapsed < a.plan.MinDuration {
		waits = append(waits, fmt.Sprintf("%v of at least %v have passed", a.data.Elapsed, a.plan.MinDuration))
	}
	for _, l := range r.Ratio.Leaks {
		waits = append(waits, fmt.Sprintf("arm %s of weight 0 received units in region %q, epoch %d", l.Arm, l.Stratum.Region, l.Stratum.Epoch))
	}
	if len(waits) == 0 {
		if d, done := a.verdict(r); done {
			return d
		}
	}
	if a.data.Elapsed >= a.plan.MaxDuration {
		return a.final(OutcomeInconclusive, a.plan.Control, append(waits, fmt.Sprintf("no conclusion within %v", a.plan.MaxDuration))...)
	}
	return Decision{Outcome: OutcomeContinue, Reasons: append(waits, a.progress(r))}
}

func (a analysis) final(o Outcome, serve string, reasons ...string) Decision {
	return Decision{Outcome: o, Serve: serve, Reasons: reasons}
}

// verdict concludes from the primary metric.
func (a analysis) verdict(r Result) (Decision, bool) {
	best, worse, small := -1, 0, 0
	for i, c := range r.Primary {
		switch {
		case c.Significant && c.Better:
			if best < 0 || a.gain(c) > a.gain(r.Primary[best]) {
				best = i
			}
		case c.Significant:
			worse++
		case a.hopeless(r, c):
			small++
		}
	}
	if best >= 0 {
		c := r.Primary[best]
		return a.final(OutcomeShip, c.Arm, describe("better", c, a.plan.Goal.Alpha)), true
	}
	if worse+small == len(r.Primary) {
		var why []string
		for _, c := range r.Primary {
			if c.Significant {
				why = append(why, describe("worse", c, a.plan.Goal.Alpha))
			} else {
				why = append(why, fmt.Sprintf("%s: any gain of arm %s is below the %.4g that was sought (interval %.4g to %.4g)",
					c.Metric, c.Arm, math.Abs(a.plan.Goal.MDE), c.Interval.Low, c.Interval.High))
			}
		}
		return a.final(OutcomeKeep, a.plan.Control, why...), true
	}
	if a.plan.Goal.Method == MethodFixed && r.Information >= 1 || r.Look != nil && r.Look.Final {
		return a.final(OutcomeInconclusive, a.plan.Control, fmt.Sprintf("the planned %d units per arm show no difference", a.plan.UnitsPerArm)), true
	}
	return Decision{}, false
}

// gain is the difference in the direction that is better.
func (a analysis) gain(c Comparison) float64 {
	if a.plan.Primary.LowerIsBetter {
		return -c.Difference
	}
	return c.Difference
}

// hopeless says whether an interval that may be acted on rules out the gain sought.
func (a analysis) hopeless(r Result, c Comparison) bool {
	switch a.plan.Goal.Method {
	case MethodOBF:
		if r.Look == nil {
			return false
		}
	case MethodFixed:
		if r.Information < 1 {
			return false
		}
	}
	most := c.Interval.High
	if a.plan.Primary.LowerIsBetter {
		most = -c.Interval.Low
	}
	return most < math.Abs(a.plan.Goal.MDE)
}

func describe(how string, c Comparison, alpha float64) string {
	return fmt.Sprintf("%s: arm %s is %s than the control by %.4g (interval %.4g to %.4g, adjusted p %.4g ≤ %.4g, %d and %d units)",
		c.Metric, c.Arm, how, math.Abs(c.Difference), c.Interval.Low, c.Interval.High, c.AdjustedP, alpha, c.Treatment.N, c.Control.N)
}

func (a analysis) progress(r Result) string {
	switch {
	case r.Look != nil:
		return fmt.Sprintf("look %d at %.4g of the information: no boundary (%.4g) reached", r.Look.Number, r.Look.Fraction, r.Look.Boundary)
	case a.plan.Goal.Method == MethodFixed || a.plan.Goal.Method == MethodOBF:
		return fmt.Sprintf("%.4g of the planned information has arrived; no look is due", r.Information)
	}
	return fmt.Sprintf("no significant difference yet; %.4g of the planned information has arrived", r.Information)
}

func (a analysis) warnings(r Result) []string {
	var out []string
	if r.Exposure.Banner() {
		out = append(out, fmt.Sprintf("%d of %d units (%.3g %%) were seen in several arms and left out; results may be biased",
			r.Exposure.Multiple, r.Exposure.Units, 100*r.Exposure.Share()))
	}
	for _, c := range r.Primary {
		if c.N > 0 && c.Variance == 0 {
			out = append(out, fmt.Sprintf("%s: arm %s and the control have no variance", c.Metric, c.Arm))
		}
	}
	return out
}

func (a analysis) guardrails() ([]GuardrailResult, error) {
	var out []GuardrailResult
	for _, g := range a.plan.Guardrails {
		var arms []stratumEstimates
		var err error
		if g.Metric.Kind != KindQuantile {
			if arms, err = a.estimates(g.Metric); err != nil {
				return nil, err
			}
		}
		alpha := g.Alpha / float64(len(a.plan.Treatments))
		for i, name := range a.plan.Treatments {
			r := GuardrailResult{Metric: g.Metric.Name, Arm: name, State: GuardrailUnproven, Alpha: alpha,
				HarmInterval: everywhere(), PWorse: 1, POK: 1}
			if g.Metric.Kind == KindQuantile {
				err = a.quantileHarm(g, &r)
			} else {
				var c Comparison
				c, err = a.compare(g.Metric, arms, i+1, name, alpha)
				r.Contrast = c.Contrast
				a.harm(g, &r)
			}
			if err != nil {
				return nil, err
			}
			switch {
			case r.PWorse <= alpha:
				r.State = GuardrailWorse
			case r.POK <= alpha:
				r.State = GuardrailOK
			}
			out = append(out, r)
		}
	}
	return out, nil
}

// harm tests treatment − control − margin·|control| (signed so that more is worse). It
// is linear in the arms' means, so no division by a small control is needed.
func (a analysis) harm(g Guardrail, r *GuardrailResult) {
	if !a.ready(r.Contrast) {
		return
	}
	c, t := r.Contrast.Control, r.Contrast.Treatment
	sign := -1.0
	if g.Metric.LowerIsBetter {
		sign = 1
	}
	factor := 1 + sign*g.Margin*math.Copysign(1, c.Value)
	r.Harm = sign * (t.Value - factor*c.Value)
	se := math.Sqrt(t.Variance + factor*factor*c.Variance)
	s := a.plan.sequence(r.Alpha)
	half := s.HalfWidthOneSided(r.Contrast.N) * se
	r.HarmInterval = Interval{r.Harm - half, r.Harm + half}
	r.PWorse = s.POneSided(r.Harm/se, r.Contrast.N)
	r.POK = s.POneSided(-r.Harm/se, r.Contrast.N)
}

func (a analysis) quantileHarm(g Guardrail, r *GuardrailResult) error {
	s := a.plan.sequence(r.Alpha)
	worse, ok := 0.0, 0.0
	for _, st := range a.data.Strata {
		c, t := st.arm(a.plan.Control).Cells[g.Metric.Name].Quantiles, st.arm(r.Arm).Cells[g.Metric.Name].Quantiles
		factor := 1 + g.Margin
		low, high := c, t // worse is "high above factor·low"
		if !g.Metric.LowerIsBetter {
			low, high, factor = t, c, 1/(1-g.Margin)
		}
		w, err := CompareQuantiles(low, high, g.Metric.Quantile, factor-1, s)
		if err != nil {
			return err
		}
		o, err := CompareQuantiles(high, low, g.Metric.Quantile, 1/factor-1, s)
		if err != nil {
			return err
		}
		worse, ok = worse+w, ok+o
	}
	r.PWorse, r.POK = math.Exp(-max(0, worse)), math.Exp(-max(0, ok))
	return nil
}
