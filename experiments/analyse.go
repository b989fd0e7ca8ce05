package experiments

import (
	"cmp"
	"math"
)

// Analyse computes all results of an experiment from its plan and the summaries so far,
// and decides. It is a pure function: same arguments, same result. It may be called as
// often as one likes; whatever the method, the probability that Decision ever ships an
// arm that is no better than the control is at most the plan's alpha (asymptotically,
// from MinUnits on; exactly for MethodEProcess), provided the caller keeps Looks and
// Concluded as described.
//
// Errors have kind Invalid: a plan or data that cannot be, with the field named. Missing
// data is not an error but no evidence.
func Analyse(plan Plan, data Data) (Result, error) {
	plan, err := plan.Freeze()
	if err != nil {
		return Result{}, err
	}
	if err := data.check(plan); err != nil {
		return Result{}, err
	}
	a := analysis{plan: plan, data: data}
	out := Result{Exposure: data.Exposure}
	if out.Ratio, err = a.ratio(); err != nil {
		return Result{}, err
	}
	if err := a.primary(&out); err != nil {
		return Result{}, err
	}
	if out.Secondary, err = a.secondary(); err != nil {
		return Result{}, err
	}
	if out.Guardrails, err = a.guardrails(); err != nil {
		return Result{}, err
	}
	out.Warnings = a.warnings(out)
	out.Decision = a.decide(out)
	return out, nil
}

type analysis struct {
	plan Plan
	data Data
}

// alpha is the primary metric's level per treatment.
func (a analysis) alpha() float64 { return a.plan.Goal.alpha() }

// ratio combines the strata: in each the weights are constant, and evidence multiplies.
func (a analysis) ratio() (RatioResult, error) {
	out := RatioResult{ChiSquareP: 1}
	stat, df := 0.0, 0
	for _, s := range a.data.Strata {
		arms := make([]Exposed, len(s.Arms))
		for i, arm := range s.Arms {
			arms[i] = Exposed{arm.Name, arm.Weight, arm.Units}
		}
		log, leaks, err := ratioEvidence(arms)
		if err != nil {
			return RatioResult{}, err
		}
		out.LogBayesFactor += log
		for _, arm := range leaks {
			out.Leaks = append(out.Leaks, Leak{s.Stratum, arm})
		}
		chi, err := ChiSquareRatio(arms, a.plan.SRMAlpha)
		if err != nil {
			return RatioResult{}, err
		}
		stat, df = stat+chi.Statistic, df+chi.DF
	}
	if df > 0 {
		out.ChiSquareP = chiSquareTail(stat, df)
	}
	out.Mismatch = out.LogBayesFactor >= -math.Log(a.plan.SRMAlpha)
	return out, nil
}

func (a analysis) primary(out *Result) error {
	m := a.plan.Primary
	arms, err := a.estimates(m)
	if err != nil {
		return err
	}
	out.Information = math.Inf(1)
	for i, name := range a.plan.Treatments {
		c, err := a.compare(m, arms, i+1, name, a.alpha())
		if err != nil {
			return err
		}
		out.Information = min(out.Information, 2*c.Information/float64(a.plan.UnitsPerArm))
		out.Primary = append(out.Primary, c)
	}
	if err := a.validate(out); err != nil {
		return err
	}
	ps := make([]float64, len(out.Primary))
	for i, c := range out.Primary {
		ps[i] = c.P
	}
	adjusted, err := Holm(ps)
	if err != nil {
		return err
	}
	for i := range out.Primary {
		out.Primary[i].AdjustedP = adjusted[i]
		out.Primary[i].Significant = adjusted[i] <= a.plan.Goal.Alpha
	}
	out.Arms, err = a.arms(m, arms)
	return err
}

// validate turns nominal p-values into ones that may be acted on, by the plan's method.
func (a analysis) validate(out *Result) error {
	if a.plan.Goal.Method == MethodOBF {
		return a.look(out)
	}
	for i := range out.Primary {
		c := &out.Primary[i]
		c.P, c.EValue = 1, 0
		ready := a.ready(c.Contrast)
		if ready {
			a.intervals(c, a.plan.sequence(a.alpha()).HalfWidth(c.N))
		}
		switch a.plan.Goal.Method {
		case MethodCS:
			if ready {
				c.P = a.plan.sequence(a.alpha()).P(c.Contrast.Z(), c.N)
			}
		case MethodEProcess:
			log, err := a.eProcess(c.Arm)
			if err != nil {
				return err
			}
			c.EValue, c.P = eValue(log), math.Exp(-max(0, log))
		case MethodFixed:
			if out.Information >= 1 && ready {
				c.P = c.NominalP
			}
			if ready {
				if err := a.fixedInterval(c); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// ready says whether the central limit theorem may be relied on.
func (a analysis) ready(c Contrast) bool {
	return c.Control.N >= a.plan.MinUnits && c.Treatment.N >= a.plan.MinUnits && c.Variance > 0
}

func (a analysis) intervals(c *Comparison, half float64) {
	d, r := half*c.SE(), half*math.Sqrt(c.RelativeVariance)
	c.Interval = Interval{c.Difference - d, c.Difference + d}
	if c.RelativeKnown {
		c.RelativeInterval = Interval{c.Relative - r, c.Relative + r}
	}
}

func (a analysis) fixedInterval(c *Comparison) error {
	a.intervals(c, upperT(a.alpha()/2, c.DF))
	if a.plan.Primary.Kind != KindProportion || a.plan.Primary.Adjust {
		return nil
	}
	k, ok := c.table()
	if !ok {
		return nil
	}
	ci, err := Newcombe(k[0], k[1], k[2], k[3], a.alpha())
	c.Interval = ci
	return err
}

func (a analysis) eProcess(arm string) (log float64, err error) {
	for _, s := range a.data.Strata {
		cell := s.arm(arm).Cells[a.plan.Primary.Name]
		if err := cell.EProcess.Check(); err != nil {
			return 0, err
		}
		log += cell.EProcess.LogE
	}
	return log, nil
}

// look performs a look of the group sequential plan if one is due: at the first call at
// or after each planned fraction, never before the minimum duration.
func (a analysis) look(out *Result) error {
	for i := range out.Primary {
		out.Primary[i].P = 1
	}
	last, looks := 0.0, float64(a.plan.Goal.Looks)
	if n := len(a.data.Looks); n > 0 {
		last = a.data.Looks[n-1]
	}
	t := min(1, out.Information)
	due := (math.Floor(last*looks+1e-9) + 1) / looks
	if last >= 1 || t < min(due, 1)-1e-12 || t-last < minLookGap || a.data.Elapsed < a.plan.MinDuration {
		return nil
	}
	for _, c := range out.Primary {
		if !a.ready(c.Contrast) {
			return nil
		}
	}
	fractions := append(append([]float64(nil), a.data.Looks...), t)
	bounds, err := Boundaries(a.alpha(), fractions)
	if err != nil {
		return err
	}
	out.Look = &Look{Number: len(fractions), Fraction: t, Boundary: bounds[len(bounds)-1],
		Spent: OBrienFlemingSpending(a.plan.Goal.Alpha, t), Final: t >= 1}
	for i := range out.Primary {
		c := &out.Primary[i]
		a.intervals(c, out.Look.Boundary)
		if c.P, err = repeatedP(c.Z, fractions); err != nil {
			return err
		}
	}
	return nil
}

// repeatedP is the least alpha whose boundary at the last look is reached by z: the
// p-value that Holm's procedure may be applied to. Source: Jennison and Turnbull (2000),
// chapter 9.
func repeatedP(z float64, fractions []float64) (float64, error) {
	// Boundaries are nearly linear in the normal quantile of alpha.
	var failed error
	excess := func(q float64) float64 {
		bounds, err := Boundaries(twoSidedNormal(q), fractions)
		if err != nil {
			failed = err
			return 0
		}
		return bounds[len(bounds)-1] - math.Abs(z)
	}
	lo, hi := upperNormal(.9999/2), upperNormal(2e-12/2)
	p := 1.0
	switch {
	case excess(lo) > 0:
	case excess(hi) <= 0:
		p = twoSidedNormal(hi)
	default:
		p = twoSidedNormal(root(excess, lo, hi))
	}
	return p, failed
}

// arms standardises every arm to the weights 1/Σ(1/n) of the strata.
func (a analysis) arms(m Metric, strata []stratumEstimates) ([]ArmResult, error) {
	names := append([]string{a.plan.Control}, a.plan.Treatments...)
	out := make([]ArmResult, len(names))
	for i, name := range names {
		out[i] = ArmResult{Name: name, Interval: everywhere()}
		var total float64
		for _, s := range strata {
			total += s.weight(i)
		}
		for j, s := range a.data.Strata {
			out[i].Units += s.arm(name).Units
			if w := strata[j].weight(i); w > 0 {
				out[i].Estimate.add(strata[j].arms[i], w/total)
			}
		}
		var err error
		if out[i].Interval, err = a.armInterval(m, strata, i, out[i].Estimate); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// armInterval is exact for a proportion in one stratum, else asymptotic.
func (a analysis) armInterval(m Metric, strata []stratumEstimates, i int, e Estimate) (Interval, error) {
	planned := a.plan.Goal.Method == MethodFixed || a.plan.Goal.Method == MethodOBF
	if m.Kind == KindProportion && !m.Adjust && e.N > 0 {
		for _, s := range strata {
			if s.arms[i].N != e.N { // exact for one stratum only
				continue
			}
			k := uint64(math.Round(e.Value * float64(e.N)))
			if planned {
				return Wilson(k, e.N, a.plan.Goal.Alpha)
			}
			return Sequence{Alpha: a.plan.Goal.Alpha, Tuning: max(1, a.plan.Goal.Tuning/2)}.Proportion(k, e.N)
		}
	}
	if e.N < a.plan.MinUnits || e.N == 0 {
		return everywhere(), nil
	}
	half := upperNormal(a.plan.Goal.Alpha/2) * math.Sqrt(e.Variance)
	if !planned {
		half = a.plan.sequence(a.plan.Goal.Alpha).HalfWidth(e.N) * math.Sqrt(e.Variance)
	}
	return Interval{e.Value - half, e.Value + half}, nil
}

func (a analysis) secondary() ([]Comparison, error) {
	var out []Comparison
	var ps []float64
	for _, m := range a.plan.Secondary {
		var arms []stratumEstimates
		var err error
		if m.Kind != KindQuantile {
			if arms, err = a.estimates(m); err != nil {
				return nil, err
			}
		}
		for i, name := range a.plan.Treatments {
			var c Comparison
			if m.Kind == KindQuantile {
				c, err = a.compareQuantiles(m, name)
			} else if c, err = a.compare(m, arms, i+1, name, a.alpha()); err == nil && a.ready(c.Contrast) {
				s := a.plan.sequence(a.alpha())
				a.intervals(&c, s.HalfWidth(c.N))
				c.P = s.P(c.Contrast.Z(), c.N)
			}
			if err != nil {
				return nil, err
			}
			out, ps = append(out, c), append(ps, c.P)
		}
	}
	adjusted, err := BenjaminiHochberg(ps)
	for i := range adjusted {
		out[i].AdjustedP = adjusted[i]
		out[i].Significant = adjusted[i] <= a.plan.Goal.Alpha
	}
	return out, err
}

func better(m Metric, difference float64) bool {
	return cmp.Compare(difference, 0) > 0 != m.LowerIsBetter && difference != 0
}
