package experiments

// Result is everything Analyse found, in numbers that can be checked by hand.
type Result struct {
	Arms       []ArmResult // the control, then the treatments in the plan's order
	Primary    []Comparison
	Secondary  []Comparison
	Guardrails []GuardrailResult
	Ratio      RatioResult
	Exposure   Exposure
	// Information is the least over treatments of Σ n_c·n_t/(n_c+n_t) against the
	// plan's horizon: 1 when the planned units have arrived.
	Information float64
	// Look is set when this call was a look of MethodOBF; the caller must remember its
	// Fraction in Data.Looks.
	Look     *Look
	Decision Decision
	Warnings []string
}

// ArmResult is one arm on the primary metric.
type ArmResult struct {
	Name  string
	Units uint64 // assigned, over all strata
	// Estimate is standardised: strata weigh as in the comparison of all arms, so with
	// two arms the difference of the arms is the comparison's. N 0 means no data yet.
	Estimate
	// Interval is at level 1−alpha: a confidence sequence unless the method is fixed or
	// group sequential.
	Interval Interval
}

// Comparison is one treatment against the control on one metric.
type Comparison struct {
	Metric, Arm string
	Contrast              // zero for quantiles: see Strata
	Theta       []float64 // CUPED's coefficient per stratum used, if adjusted
	Z           float64   // of the test behind NominalP
	// NominalP is the p-value of the fixed-horizon test. It means what it says only if
	// this is the one planned look.
	NominalP float64
	// P may be acted on now, whatever was looked at before; it is 1 while no test is
	// due. EValue is set where the method has one. AdjustedP is P by Holm over
	// treatments (primary) or by Benjamini–Hochberg over all secondary comparisons.
	P, EValue, AdjustedP float64
	// Interval and RelativeInterval go with P, at level 1−alpha/treatments.
	Interval, RelativeInterval Interval
	// Significant is AdjustedP ≤ alpha, and Better is the direction of the difference.
	Significant, Better bool
	// ChanceToWin and ExpectedLoss are the Bayesian view (no prior information): not a
	// stopping rule.
	ChanceToWin, ExpectedLoss float64
	Strata                    []StratumComparison
}

// StratumComparison is one stratum's part.
type StratumComparison struct {
	Stratum            Stratum
	Weight             float64 // share in the combined difference; 0 means left out
	Control, Treatment Estimate
	// Intervals of the arms' quantiles, for KindQuantile.
	ControlInterval, TreatmentInterval Interval
}

// GuardrailState is what is proved about a guardrail.
type GuardrailState string

// The states of a guardrail.
const (
	GuardrailOK       GuardrailState = "ok"       // proved not worse than the margin allows
	GuardrailWorse    GuardrailState = "worse"    // proved worse
	GuardrailUnproven GuardrailState = "unproven" // neither, yet
)

// GuardrailResult is one treatment on one guardrail.
type GuardrailResult struct {
	Metric, Arm string
	State       GuardrailState
	// Harm is how much worse than the margin allows the treatment is, in the metric's
	// unit (negative: within it), and HarmInterval holds its two one-sided bounds, each
	// at 1−Alpha. Both are empty for quantiles.
	Harm         float64
	HarmInterval Interval
	// PWorse and POK are the always-valid one-sided p-values against "not worse" and
	// "worse"; State follows from comparing them with Alpha.
	PWorse, POK, Alpha float64
	Contrast           Contrast
}

// RatioResult is the sample ratio over all strata.
type RatioResult struct {
	// LogBayesFactor is the evidence for a mismatch, summed over strata; Mismatch is
	// true when it reaches ln(1/SRMAlpha).
	LogBayesFactor float64
	Mismatch       bool
	// Leaks are arms that got units in strata in which their weight is 0.
	Leaks []Leak
	// ChiSquareP is the fixed-horizon p-value, χ² and degrees of freedom summed over
	// strata with all expected counts ≥ 5; for display.
	ChiSquareP float64
}

// Leak is an arm that got units it should not have.
type Leak struct {
	Stratum Stratum
	Arm     string
}

// Look is one look of a group sequential plan.
type Look struct {
	Number   int // from 1
	Fraction float64
	// Boundary is the |z| to reach at alpha/treatments, and Spent the alpha spent up to
	// and including this look.
	Boundary, Spent float64
	Final           bool
}
