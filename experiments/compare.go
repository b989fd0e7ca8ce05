package experiments

import (
	"math"

	"gonum.org/v1/gonum/mathext"
)

func chiSquareTail(stat float64, df int) float64 {
	return mathext.GammaIncRegComp(float64(df)/2, stat/2)
}

func (d Data) check(plan Plan) error {
	if d.Elapsed < 0 {
		return invalid("elapsed time is %v", d.Elapsed)
	}
	if d.Exposure.Multiple > d.Exposure.Units {
		return invalid("%d of %d units were seen in several arms", d.Exposure.Multiple, d.Exposure.Units)
	}
	if len(d.Looks) > 0 {
		if err := checkFractions(d.Looks); err != nil {
			return err
		}
	}
	seen := make(map[Stratum]bool, len(d.Strata))
	for _, s := range d.Strata {
		if seen[s.Stratum] {
			return invalid("stratum %+v is given twice", s.Stratum)
		}
		seen[s.Stratum] = true
		if err := s.check(plan); err != nil {
			return err
		}
	}
	return nil
}

func (s StratumData) check(plan Plan) error {
	planned := map[string]bool{plan.Control: false}
	for _, t := range plan.Treatments {
		planned[t] = false
	}
	for _, a := range s.Arms {
		if _, ok := planned[a.Name]; !ok && a.Weight > 0 {
			return invalid("stratum %+v has arm %q of weight %d, which the plan does not know", s.Stratum, a.Name, a.Weight)
		}
		planned[a.Name] = true
		if a.Units > maxCount {
			return invalid("stratum %+v, arm %q has %d units; the limit is 2^40", s.Stratum, a.Name, a.Units)
		}
		for name, c := range a.Cells {
			if max(c.Sums.N, c.Joint.N) > a.Units {
				return invalid("stratum %+v, arm %q has metric %q over %d units but %d were assigned", s.Stratum, a.Name, name, max(c.Sums.N, c.Joint.N), a.Units)
			}
		}
	}
	for name, ok := range planned {
		if !ok {
			return invalid("stratum %+v lacks arm %q", s.Stratum, name)
		}
	}
	return nil
}

func (s StratumData) arm(name string) ArmData {
	for _, a := range s.Arms {
		if a.Name == name {
			return a
		}
	}
	return ArmData{} // not reached after check
}

// stratumEstimates are the arms' estimates in one stratum, control first; N 0 or 1 is
// no data.
type stratumEstimates struct {
	stratum  Stratum
	arms     []Estimate
	theta    float64
	adjusted bool
}

// weight is 1/Σ(1/n) over the arms that have data, or 0 if arm i has none.
func (s stratumEstimates) weight(i int) float64 {
	if s.arms[i].N < 2 {
		return 0
	}
	sum := 0.0
	for _, e := range s.arms {
		if e.N >= 2 {
			sum += 1 / float64(e.N)
		}
	}
	return 1 / sum
}

// estimates computes the metric in every stratum.
func (a analysis) estimates(m Metric) ([]stratumEstimates, error) {
	names := append([]string{a.plan.Control}, a.plan.Treatments...)
	out := make([]stratumEstimates, len(a.data.Strata))
	for i, s := range a.data.Strata {
		cells := make([]Cell, len(names))
		for j, name := range names {
			cells[j] = s.arm(name).Cells[m.Name]
		}
		var err error
		out[i].stratum = s.Stratum
		if out[i].arms, out[i].theta, err = m.estimate(cells); err != nil {
			return nil, invalid("metric %q in stratum %+v: %v", m.Name, s.Stratum, err)
		}
		out[i].adjusted = m.Adjust
	}
	return out, nil
}

// estimate returns one estimate per cell; cells that cannot give one yet have N 0.
func (m Metric) estimate(cells []Cell) (out []Estimate, theta float64, err error) {
	out = make([]Estimate, len(cells))
	var at []int // the cells with data
	var sums []Sums
	var joints []Joint
	for i, c := range cells {
		if err := c.check(m); err != nil {
			return nil, 0, err
		}
		s := c.Sums
		if m.Kind == KindRatio && m.Adjust {
			if c.Joint.N < 2 || c.Joint.Sum[denominator] == 0 || c.Joint.Sum[preDenominator] == 0 {
				continue
			}
			joints = append(joints, c.Joint)
		} else if s.N < 2 || m.Kind == KindRatio && s.SumY == 0 {
			continue
		}
		at, sums = append(at, i), append(sums, s)
	}
	var got []Estimate
	switch {
	case m.Adjust && m.Kind == KindRatio:
		theta, got, err = CUPEDRatio(joints)
	case m.Adjust:
		theta, got, err = CUPED(sums)
	default:
		got = make([]Estimate, len(sums))
		for i, s := range sums {
			switch m.Kind {
			case KindProportion:
				got[i], err = s.Proportion()
			case KindRatio:
				got[i], err = s.Ratio()
			default:
				got[i], err = s.Mean()
			}
			if err != nil {
				return nil, 0, err
			}
		}
	}
	if err != nil {
		return nil, 0, err
	}
	for i, j := range at {
		out[j] = got[i]
	}
	return out, theta, nil
}

func (c Cell) check(m Metric) error {
	if m.Kind == KindRatio && m.Adjust {
		return c.Joint.Check()
	}
	if err := c.Sums.Check(); err != nil {
		return err
	}
	if m.Kind == KindProportion {
		_, err := c.Sums.successes()
		return err
	}
	return nil
}

// compare contrasts arm i with the control, with the fixed-horizon test.
func (a analysis) compare(m Metric, strata []stratumEstimates, i int, name string, alpha float64) (Comparison, error) {
	c := Comparison{Metric: m.Name, Arm: name, NominalP: 1, P: 1, AdjustedP: 1, ChanceToWin: .5,
		Interval: everywhere(), RelativeInterval: everywhere()}
	pairs := make([]Pair, len(strata))
	usable := false
	for j, s := range strata {
		pairs[j] = Pair{s.arms[0], s.arms[i]}
		usable = usable || pairs[j].weight() > 0
		c.Strata = append(c.Strata, StratumComparison{Stratum: s.stratum, Control: s.arms[0], Treatment: s.arms[i],
			ControlInterval: everywhere(), TreatmentInterval: everywhere()})
		if s.adjusted {
			c.Theta = append(c.Theta, s.theta)
		}
	}
	if !usable {
		return c, nil
	}
	var err error
	if c.Contrast, err = Stratified(pairs); err != nil {
		return c, err
	}
	for j := range c.Strata {
		c.Strata[j].Weight = pairs[j].weight() / c.Information
	}
	c.Better = better(m, c.Difference)
	if c.ChanceToWin, c.ExpectedLoss, err = c.bayes(m); err != nil {
		return c, err
	}
	return c, c.nominal(m, pairs)
}

// table returns the 2×2 table of a proportion if exactly one stratum is used.
func (c *Comparison) table() (k [4]uint64, ok bool) {
	used := 0
	for _, s := range c.Strata {
		if s.Weight == 0 {
			continue
		}
		used++
		for i, e := range [...]Estimate{s.Control, s.Treatment} {
			k[2*i] = uint64(math.Round(e.Value * float64(e.N)))
			k[2*i+1] = e.N
		}
	}
	return k, used == 1
}

// nominal fills in the fixed-horizon test: Fisher's for one table with a small cell, the
// score test for proportions, otherwise Welch's.
func (c *Comparison) nominal(m Metric, pairs []Pair) (err error) {
	if m.Kind != KindProportion || m.Adjust {
		if c.Variance == 0 {
			return nil // nothing to test against: no evidence
		}
		c.Z = c.Contrast.Z()
		c.NominalP = twoSidedT(c.Z, c.DF)
		return nil
	}
	c.Z = scoreZ(pairs)
	c.NominalP = twoSidedNormal(c.Z)
	if k, ok := c.table(); ok && min(k[0], k[1]-k[0], k[2], k[3]-k[2]) < 5 {
		c.NominalP, err = Fisher(k[0], k[1], k[2], k[3])
	}
	return err
}

// scoreZ is the Cochran–Mantel–Haenszel statistic: with one stratum, the pooled z.
func scoreZ(pairs []Pair) float64 {
	diff, variance := 0.0, 0.0
	for _, p := range pairs {
		w := p.weight()
		if w == 0 {
			continue
		}
		n, m := float64(p.Control.N), float64(p.Treatment.N)
		pool := (p.Control.Value*n + p.Treatment.Value*m) / (n + m)
		diff += w * (p.Treatment.Value - p.Control.Value)
		variance += w * pool * (1 - pool) // w²·p(1−p)·(1/n+1/m)
	}
	if variance <= 0 {
		return 0
	}
	return diff / math.Sqrt(variance)
}

func (c *Comparison) bayes(m Metric) (chance, loss float64, err error) {
	k, one := c.table()
	switch {
	case m.Kind == KindProportion && !m.Adjust && one && m.LowerIsBetter:
		return ChanceToWin(k[1]-k[0], k[1], k[3]-k[2], k[3])
	case m.Kind == KindProportion && !m.Adjust && one:
		return ChanceToWin(k[0], k[1], k[2], k[3])
	}
	d := c.Contrast
	if m.LowerIsBetter {
		d.Difference = -d.Difference
	}
	chance, loss = ChanceToWinNormal(d)
	return chance, loss, nil
}

// compareQuantiles tests a quantile in both directions: the mean of two e-values is one.
func (a analysis) compareQuantiles(m Metric, name string) (Comparison, error) {
	c := Comparison{Metric: m.Name, Arm: name, NominalP: 1, P: 1, AdjustedP: 1, ChanceToWin: .5,
		Interval: everywhere(), RelativeInterval: everywhere()}
	s := a.plan.sequence(a.alpha())
	up, down := 0.0, 0.0
	for _, st := range a.data.Strata {
		q, r := st.arm(a.plan.Control).Cells[m.Name].Quantiles, st.arm(name).Cells[m.Name].Quantiles
		part := StratumComparison{Stratum: st.Stratum, ControlInterval: everywhere(), TreatmentInterval: everywhere()}
		var err error
		if part.Control, part.ControlInterval, err = quantileOf(q, m.Quantile, s); err != nil {
			return c, err
		}
		if part.Treatment, part.TreatmentInterval, err = quantileOf(r, m.Quantile, s); err != nil {
			return c, err
		}
		c.Strata = append(c.Strata, part)
		u, err := CompareQuantiles(q, r, m.Quantile, 0, s)
		if err != nil {
			return c, err
		}
		d, err := CompareQuantiles(r, q, m.Quantile, 0, s)
		if err != nil {
			return c, err
		}
		up, down = up+u, down+d
	}
	log := max(up, down) + math.Log1p(math.Exp(-math.Abs(up-down))) - math.Ln2
	c.EValue, c.P = eValue(log), math.Exp(-max(0, log))
	c.Better = better(m, up-down)
	return c, nil
}

func quantileOf(q Quantiles, level float64, s Sequence) (Estimate, Interval, error) {
	if q.N() == 0 {
		return Estimate{}, everywhere(), nil
	}
	v, err := q.Value(level)
	if err != nil {
		return Estimate{}, everywhere(), err
	}
	ci, err := q.Sequence(level, s)
	return Estimate{N: q.N(), Value: v}, ci, err
}
