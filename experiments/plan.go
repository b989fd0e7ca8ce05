package experiments

import "time"

// MetricKind says how a metric is estimated.
type MetricKind string

// The kinds of metric.
const (
	KindProportion MetricKind = "proportion" // share of units with outcome 1
	KindMean       MetricKind = "mean"       // mean of the units' totals
	KindRatio      MetricKind = "ratio"      // Σx/Σy, e.g. failures per request with users randomised
	KindQuantile   MetricKind = "quantile"   // a quantile of values, for guardrails and secondary metrics
)

// Metric is what is compared.
type Metric struct {
	Name string
	Kind MetricKind
	// LowerIsBetter is true for errors, latency and cost.
	LowerIsBetter bool
	// Quantile is the level of KindQuantile, in (0, 1).
	Quantile float64
	// Adjust turns on CUPED: y of the sums is the unit's pre-period covariate, or for a
	// ratio, Cell.Joint is used instead of Cell.Sums.
	Adjust bool
}

// Guardrail is a metric that must not get worse. It is tested one-sided with an
// always-valid test of its own, whatever the method of the primary metric.
type Guardrail struct {
	Metric Metric
	// Margin is the worsening that is tolerated, relative to the control: 0.02 is 2 %.
	Margin float64
	// Alpha is the probability of stopping although no arm is worse by more than the
	// margin; 0 means 0.01. It is divided by the number of treatments.
	Alpha float64
}

// Plan is an experiment before it starts. Freeze it, keep the frozen plan, and never
// change it while the experiment runs: every promise of Analyse is relative to it.
type Plan struct {
	Control    string
	Treatments []string
	Primary    Metric // KindProportion, KindMean or KindRatio
	// Goal sizes the experiment on the primary metric and holds MDE, alpha, power and
	// method. Goal.Treatments is filled in.
	Goal       Goal
	Secondary  []Metric // described with BH-adjusted p-values, never decide
	Guardrails []Guardrail
	// MinDuration is the least time before a conclusion (default 24 h: take whole days
	// or weeks so that every hour of the day is in); stops come at any time.
	// MaxDuration is when to give up (default 28 days).
	MinDuration, MaxDuration time.Duration
	// MinUnits is the least number of units in either arm for tests that rest on the
	// central limit theorem; 0 means 150.
	MinUnits uint64
	// SRMAlpha is the probability of stopping for a sample ratio mismatch although
	// assignment is right; 0 means 0.01.
	SRMAlpha float64
	// UnitsPerArm is the horizon: where MethodFixed looks and MethodOBF ends. 0 takes
	// it from the goal.
	UnitsPerArm uint64
}

// Defaults of a plan.
const (
	defaultMinUnits       = 150
	defaultSRMAlpha       = 0.01
	defaultGuardrailAlpha = 0.01
	defaultMinDuration    = 24 * time.Hour
	defaultMaxDuration    = 28 * 24 * time.Hour
	maxMetrics            = 100
)

// Freeze checks the plan and fills in what was left out, sizing the experiment if need
// be (up to a tenth of a second). The result is independent of the receiver and freezing
// it again changes nothing. Errors have kind Invalid and name
// the field.
func (p Plan) Freeze() (Plan, error) {
	p.Treatments = append([]string(nil), p.Treatments...)
	p.Secondary = append([]Metric(nil), p.Secondary...)
	p.Guardrails = append([]Guardrail(nil), p.Guardrails...)
	p.Goal.Treatments = len(p.Treatments)
	if p.MinUnits == 0 {
		p.MinUnits = defaultMinUnits
	}
	if p.SRMAlpha == 0 {
		p.SRMAlpha = defaultSRMAlpha
	}
	if p.MinDuration == 0 {
		p.MinDuration = defaultMinDuration
	}
	if p.MaxDuration == 0 {
		p.MaxDuration = max(defaultMaxDuration, 2*p.MinDuration)
	}
	for i := range p.Guardrails {
		if p.Guardrails[i].Alpha == 0 {
			p.Guardrails[i].Alpha = defaultGuardrailAlpha
		}
	}
	if err := p.check(); err != nil {
		return Plan{}, err
	}
	if p.UnitsPerArm == 0 {
		size, err := p.Goal.Size()
		if err != nil {
			return Plan{}, err
		}
		p.UnitsPerArm = size.PerArm
	}
	if p.Goal.Tuning == 0 {
		p.Goal.Tuning = p.Goal.tuning(p.Goal.fixedUnits())
	}
	return p, nil
}

func (p Plan) check() error {
	seen := map[string]bool{p.Control: true}
	if p.Control == "" || len(p.Treatments) == 0 {
		return invalid("control is %q with %d treatments; name the control and at least one treatment", p.Control, len(p.Treatments))
	}
	for _, a := range p.Treatments {
		if a == "" || seen[a] {
			return invalid("arm name %q is empty or used twice; names must be distinct", a)
		}
		seen[a] = true
	}
	if err := p.Goal.Check(); err != nil {
		return err
	}
	if err := checkLevel("srm alpha", p.SRMAlpha); err != nil {
		return err
	}
	switch {
	case p.Primary.Kind == KindQuantile:
		return invalid("primary metric %q is a quantile; quantiles serve as guardrails or secondary metrics", p.Primary.Name)
	case p.Primary.Kind == KindProportion && p.Goal.SD > 0:
		return invalid("primary metric %q is a proportion but the goal has a standard deviation", p.Primary.Name)
	case p.Primary.Kind != KindProportion && p.Goal.SD == 0:
		return invalid("primary metric %q needs the standard deviation of a unit in the goal", p.Primary.Name)
	case p.Goal.Method == MethodEProcess && p.Primary.Adjust:
		return invalid("method %q is exact for counts and cannot be adjusted for a covariate", MethodEProcess)
	case p.MinDuration < 0 || p.MaxDuration <= p.MinDuration:
		return invalid("durations are %v to %v; the maximum is the greater and neither is negative", p.MinDuration, p.MaxDuration)
	case p.UnitsPerArm > maxCount || p.MinUnits > maxCount:
		return invalid("%d units per arm, minimum %d; the limit is 2^40", p.UnitsPerArm, p.MinUnits)
	case len(p.Secondary)+len(p.Guardrails) > maxMetrics:
		return invalid("%d secondary metrics and guardrails; the limit is %d", len(p.Secondary)+len(p.Guardrails), maxMetrics)
	}
	return p.checkMetrics()
}

func (p Plan) checkMetrics() error {
	if err := p.Primary.check(); err != nil {
		return err
	}
	for _, m := range p.Secondary {
		if err := m.check(); err != nil {
			return err
		}
	}
	for _, g := range p.Guardrails {
		if err := g.Metric.check(); err != nil {
			return err
		}
		if checkLevel("", 2*g.Alpha) != nil || checkLevel("", g.Alpha/float64(len(p.Treatments))) != nil {
			return invalid("guardrail %q has alpha %v; it lies below 1/2 and, per treatment, in [1e-12, 1)", g.Metric.Name, g.Alpha)
		}
		if !(g.Margin >= 0 && g.Margin < 1) {
			return invalid("guardrail %q has margin %v; it lies in [0, 1)", g.Metric.Name, g.Margin)
		}
	}
	return nil
}

func (m Metric) check() error {
	if m.Name == "" {
		return invalid("a metric has no name")
	}
	switch m.Kind {
	case KindProportion, KindMean, KindRatio:
		return nil
	case KindQuantile:
		if m.Adjust {
			return invalid("metric %q: quantiles cannot be adjusted", m.Name)
		}
		return checkLevel("quantile of metric "+m.Name, m.Quantile)
	}
	return invalid("metric %q has kind %q; use %q, %q, %q or %q", m.Name, m.Kind, KindProportion, KindMean, KindRatio, KindQuantile)
}

// sequence is the confidence sequence of the plan at the given alpha.
func (p Plan) sequence(alpha float64) Sequence { return Sequence{Alpha: alpha, Tuning: p.Goal.Tuning} }

// Data is what has been observed so far. Nothing in it is modified or kept.
type Data struct {
	// Elapsed is the time since the start.
	Elapsed time.Duration
	Strata  []StratumData
	// Exposure is the ledger's.
	Exposure Exposure
	// Looks are the information fractions of the looks MethodOBF has taken: the caller
	// appends Result.Look.Fraction whenever there is one.
	Looks []float64
	// Concluded is the decision of an earlier call once it was final; it is returned
	// unchanged, so an experiment concludes once.
	Concluded *Decision
}

// StratumData is one region in one weight epoch. Its position in Data.Strata must not
// change from call to call for the numbers to be comparable; new strata are appended.
type StratumData struct {
	Stratum Stratum
	// Arms holds every arm of the plan, and may hold others of weight 0.
	Arms []ArmData
}

// ArmData is one arm in one stratum.
type ArmData struct {
	Name string
	// Weight is the intended share in parts of 10 000; a stratum's weights sum to that.
	Weight uint32
	// Units counts the distinct units assigned here.
	Units uint64
	// Cells are the metrics by name. A missing one is no data.
	Cells map[string]Cell
}

// Cell is one metric's summary in one arm and stratum, over units seen in one arm only.
type Cell struct {
	Sums      Sums      // KindProportion, KindMean, KindRatio
	Joint     Joint     // KindRatio with Adjust, instead of Sums
	Quantiles Quantiles // KindQuantile
	// EProcess compares this treatment with the control of the same stratum; primary
	// metric under MethodEProcess only.
	EProcess TwoByTwo
}
