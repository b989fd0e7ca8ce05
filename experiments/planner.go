package experiments

import (
	"math"

	"gonum.org/v1/gonum/mathext"
	"gonum.org/v1/gonum/stat/distuv"
)

// Method says when an experiment may conclude.
type Method string

// The methods.
const (
	// MethodCS looks at any time: asymptotic confidence sequence (Sequence). It needs
	// about 1.6 times the units of MethodFixed if the effect is just the MDE, and stops
	// early if it is larger.
	MethodCS Method = "cs"
	// MethodOBF looks at planned fractions of a known horizon: O'Brien–Fleming
	// boundaries by spending (Boundaries). It needs 2–4 % more units at most and about
	// a fifth fewer on average.
	MethodOBF Method = "obf"
	// MethodFixed looks once, when the planned units have arrived.
	MethodFixed Method = "fixed"
	// MethodEProcess looks at any time and is exact from the first unit: TwoByTwo, for
	// proportions only. It needs about twice the units of MethodFixed.
	MethodEProcess Method = "eprocess"
)

// Goal is what an experiment should be able to find.
type Goal struct {
	// Baseline is the control's proportion in (0, 1). It is not used when SD is set.
	Baseline float64
	// SD is the standard deviation of a unit's outcome, for means; 0 means proportion.
	SD float64
	// MDE is the least difference worth finding, treatment minus control, ≠ 0.
	MDE float64
	// Alpha is the two-sided error probability and Power the probability of finding
	// the MDE.
	Alpha, Power float64
	// Treatments is the number of arms besides the control, 0 meaning 1; alpha is
	// divided by it, which is what Holm's first step asks for.
	Treatments int
	Method     Method
	// Looks is the number of equally spaced looks of MethodOBF, 2..100.
	Looks int
	// Tuning is N* of MethodCS; 0 takes the units of both arms that MethodFixed needs.
	Tuning float64
}

// Size is how many units an experiment needs.
type Size struct {
	// FixedPerArm is what MethodFixed needs; PerArm is what the goal's method needs at
	// most to have the power.
	FixedPerArm, PerArm uint64
	// Factor is PerArm/FixedPerArm.
	Factor float64
	// ExpectedPerArm is the mean number at which it stops when the effect is the MDE.
	ExpectedPerArm uint64
	// Tuning is the N* used by MethodCS.
	Tuning float64
}

// Days returns the expected days until each of arms arms has PerArm units, when
// unitsPerDay new units arrive in all and split equally. +Inf if none arrive.
func (s Size) Days(unitsPerDay float64, arms int) float64 {
	if !(unitsPerDay > 0) {
		return math.Inf(1)
	}
	return float64(s.PerArm) * float64(arms) / unitsPerDay
}

// Check reports what is wrong with the goal, with kind Invalid.
func (g Goal) Check() error {
	if err := checkLevel("alpha", g.Alpha); err != nil {
		return err
	}
	if err := checkLevel("alpha per treatment", g.alpha()); err != nil {
		return err
	}
	other := g.Baseline + g.MDE
	switch {
	case !(g.Power > g.Alpha && g.Power < 1):
		return invalid("power is %v; it lies between alpha and 1", g.Power)
	case !finite(g.MDE) || g.MDE == 0:
		return invalid("mde is %v; it is a difference, not 0", g.MDE)
	case !(g.SD >= 0 && g.SD <= maxMagnitude):
		return invalid("standard deviation is %v; it lies in [0, %g], 0 meaning a proportion", g.SD, float64(maxMagnitude))
	case g.SD == 0 && !(g.Baseline > 0 && g.Baseline < 1 && other > 0 && other < 1):
		return invalid("baseline %v and baseline + mde %v must lie in (0, 1)", g.Baseline, other)
	case g.SD > 0 && math.Abs(g.MDE)/g.SD < 1e-5:
		return invalid("mde %v is below 1e-5 standard deviations; no experiment is that long", g.MDE)
	case g.SD == 0 && math.Abs(g.MDE) < 1e-6:
		return invalid("mde %v of a proportion is below 1e-6; no experiment is that long", g.MDE)
	case g.Treatments < 0 || g.Treatments > 100:
		return invalid("%d treatments; the limit is 100", g.Treatments)
	case g.Method == MethodOBF && (g.Looks < 2 || g.Looks > 100):
		return invalid("%d looks; group sequential plans have 2..100", g.Looks)
	case g.Method == MethodEProcess && g.SD > 0:
		return invalid("method %q is for proportions; use %q for means", g.Method, MethodCS)
	case g.Tuning != 0 && !(g.Tuning >= 1 && g.Tuning <= maxCount):
		return invalid("tuning is %v; it lies in [1, 2^40] units, or is 0", g.Tuning)
	}
	switch g.Method {
	case MethodCS, MethodOBF, MethodFixed, MethodEProcess:
		return nil
	}
	return invalid("method %q is unknown; use %q, %q, %q or %q", g.Method, MethodCS, MethodOBF, MethodFixed, MethodEProcess)
}

func (g Goal) alpha() float64 { return g.Alpha / float64(max(1, g.Treatments)) }

// tuning is N* where the goal leaves it open.
func (g Goal) tuning(fixed float64) float64 {
	if g.Tuning != 0 {
		return g.Tuning
	}
	return min(max(1, math.Round(2*fixed)), maxCount)
}

// Size returns the units the goal needs. For proportions the fixed size is the normal
// approximation of Fleiss, Levin and Paik without continuity correction (R's
// power.prop.test), for means exact by the noncentral t (R's power.t.test); the other
// methods' factor is computed from their boundaries at the MDE (MethodEProcess: 2, by
// simulation). Errors have kind Invalid.
func (g Goal) Size() (Size, error) {
	if err := g.Check(); err != nil {
		return Size{}, err
	}
	fixed := g.fixedUnits()
	out := Size{FixedPerArm: uint64(math.Ceil(fixed - 1e-9)), Tuning: g.tuning(fixed)}
	switch g.Method {
	case MethodFixed:
		out.PerArm, out.ExpectedPerArm = out.FixedPerArm, out.FixedPerArm
	case MethodEProcess:
		out.PerArm = uint64(math.Ceil(eProcessFactor * fixed))
		out.ExpectedPerArm = out.PerArm
	default:
		factor := g.factor(fixed, out.Tuning)
		out.PerArm = uint64(math.Ceil(factor*fixed - 1e-9))
		_, mean := g.sequentialPower(factor, fixed, out.Tuning)
		out.ExpectedPerArm = uint64(math.Ceil(mean * factor * fixed))
	}
	out.Factor = float64(out.PerArm) / float64(out.FixedPerArm)
	return out, nil
}

const eProcessFactor = 2

// factor finds by bisection how many times the fixed size gives the power.
func (g Goal) factor(fixed, tuning float64) float64 {
	lo, hi := 1.0, 1.5
	for range 6 {
		if p, _ := g.sequentialPower(hi, fixed, tuning); p >= g.Power {
			break
		}
		lo, hi = hi, hi*1.5
	}
	for hi-lo > 1e-4 {
		if mid := (lo + hi) / 2; g.crosses(mid, fixed, tuning) {
			hi = mid
		} else {
			lo = mid
		}
	}
	return hi
}

func (g Goal) crosses(factor, fixed, tuning float64) bool {
	p, _ := g.sequentialPower(factor, fixed, tuning)
	return p >= g.Power
}

// A continuously watched experiment is computed with csLooks looks whose boundaries are
// lowered by what a path overshoots between looks: 0.5826 standard deviations of one
// step (Siegmund, Sequential Analysis, 1985, ch. X).
const (
	csLooks   = 40
	overshoot = 0.5826
)

// sequentialPower returns the probability of stopping by factor·fixed units per arm and
// the mean share of them used, when the effect is the MDE.
func (g Goal) sequentialPower(factor, fixed, tuning float64) (power, mean float64) {
	looks := csLooks
	if g.Method == MethodOBF {
		looks = g.Looks
	}
	fractions := make([]float64, looks)
	for i := range fractions {
		fractions[i] = float64(i+1) / float64(looks)
	}
	var bounds []float64
	if g.Method == MethodOBF {
		bounds, _ = Boundaries(g.alpha(), fractions) // arguments were checked
	} else {
		s := Sequence{Alpha: g.alpha(), Tuning: tuning}
		bounds = make([]float64, looks)
		for i, t := range fractions {
			b := s.HalfWidth(max(1, uint64(2*t*factor*fixed)))
			bounds[i] = max(1e-3, b-overshoot/math.Sqrt(float64(i+1)))
		}
	}
	perLook, err := CrossingProbabilities(bounds, fractions, g.drift(factor*fixed))
	if err != nil {
		return 1, 0 // only for a drift beyond 100 standard errors, which is certain to cross
	}
	for i, p := range perLook {
		power += p
		mean += p * fractions[i]
	}
	return power, mean + (1 - power)
}

// drift is the mean of z with n units per arm and the MDE.
func (g Goal) drift(n float64) float64 { return math.Abs(g.MDE) / math.Sqrt(g.unitVariance()/n) }

// unitVariance is the variance of the difference for one unit per arm.
func (g Goal) unitVariance() float64 {
	if g.SD > 0 {
		return 2 * g.SD * g.SD
	}
	other := g.Baseline + g.MDE
	return g.Baseline*(1-g.Baseline) + other*(1-other)
}

// fixedUnits returns the units per arm for the power at a fixed horizon, not rounded.
func (g Goal) fixedUnits() float64 {
	za, zb := upperNormal(g.alpha()/2), upperNormal(1-g.Power)
	if g.SD == 0 {
		pool := g.Baseline + g.MDE/2
		r := (za*math.Sqrt(2*pool*(1-pool)) + zb*math.Sqrt(g.unitVariance())) / g.MDE
		return max(2, r*r)
	}
	n := (za + zb) * (za + zb) * g.unitVariance() / (g.MDE * g.MDE)
	lo, hi := 2.0, n+10
	for hi-lo > 1e-7*hi {
		if mid := (lo + hi) / 2; g.fixedPower(mid) < g.Power {
			lo = mid
		} else {
			hi = mid
		}
	}
	return hi
}

func (g Goal) fixedPower(n float64) float64 {
	za := upperNormal(g.alpha() / 2)
	if g.SD == 0 {
		pool := g.Baseline + g.MDE/2
		return upperTail((za*math.Sqrt(2*pool*(1-pool)) - math.Abs(g.MDE)*math.Sqrt(n)) / math.Sqrt(g.unitVariance()))
	}
	drift, df := g.drift(n), 2*(n-1)
	if drift > 37 { // beyond the noncentral t's range, and certain
		return 1
	}
	if df > 1e5 {
		return upperTail(za-drift) + upperTail(za+drift)
	}
	t := distuv.NoncentralT{Nu: df, Mu: drift}
	crit := upperT(g.alpha()/2, df)
	return 1 - t.CDF(crit) + t.CDF(-crit)
}

func upperTail(z float64) float64 { return math.Erfc(z/math.Sqrt2) / 2 }

// PowerAt returns the probability of finding the MDE with that many units per arm.
// MethodEProcess has no closed form; it is taken as MethodFixed at half the units.
// Errors have kind Invalid: the goal's, or fewer than 2 units.
func (g Goal) PowerAt(perArm uint64) (float64, error) {
	if err := g.Check(); err != nil {
		return 0, err
	}
	if perArm < 2 || perArm > maxCount {
		return 0, invalid("%d units per arm; there are 2..2^40", perArm)
	}
	n := float64(perArm)
	switch g.Method {
	case MethodFixed:
		return g.fixedPower(n), nil
	case MethodEProcess:
		return g.fixedPower(max(2, n/eProcessFactor)), nil
	}
	fixed := g.fixedUnits()
	p, _ := g.sequentialPower(n/fixed, fixed, g.tuning(fixed))
	return p, nil
}

// MDEAt returns the least difference, with the sign of MDE, that perArm units find with
// the goal's power; MDE itself is not used otherwise. Errors have kind Invalid, also
// when not even the largest possible difference is found.
func (g Goal) MDEAt(perArm uint64) (float64, error) {
	sign := math.Copysign(1, g.MDE)
	most := 1e4 * g.SD
	if g.SD == 0 {
		most = .999999 * (1 - g.Baseline)
		if sign < 0 {
			most = .999999 * g.Baseline
		}
	}
	at := func(d float64) (float64, error) {
		h := g
		h.MDE = sign * d
		return h.PowerAt(perArm)
	}
	p, err := at(most)
	if err != nil {
		return 0, err
	}
	if p < g.Power {
		return 0, invalid("%d units per arm find no difference with power %v", perArm, g.Power)
	}
	lo, hi := 0.0, most
	for hi-lo > 1e-7*hi {
		mid := (lo + hi) / 2
		if p, err := at(mid); err != nil || p < g.Power { // too small to plan for is too small
			lo = mid
		} else {
			hi = mid
		}
	}
	return sign * hi, nil
}

// ZeroFailureUnits returns how many units without a single failure prove, at level
// 1−alpha one-sided, that the failure rate is below bound: the least n with
// (1−bound)^n ≤ alpha. To prove error_rate < 1 % at 95 % it takes 299. Errors have kind
// Invalid.
func ZeroFailureUnits(bound, alpha float64) (uint64, error) {
	if err := checkLevel("alpha", alpha); err != nil {
		return 0, err
	}
	if err := checkLevel("bound", bound); err != nil {
		return 0, err
	}
	return uint64(math.Ceil(math.Log(alpha)/math.Log1p(-bound) - 1e-9)), nil
}

// GateUnits returns how many units a gate needs to prove, at level 1−alpha one-sided
// and with the given power, that the failure rate is below bound when it truly is rate,
// and how many failures among them it then allows. It is exact (Clopper–Pearson).
// Errors have kind Invalid: rate ≥ bound cannot be proved, and above 10 million
// failures allowed the two are too close.
func GateUnits(bound, rate, alpha, power float64) (units, allowed uint64, err error) {
	for _, p := range [...]struct {
		name string
		p    float64
	}{{"alpha", alpha}, {"bound", bound}, {"power", power}} {
		if err := checkLevel(p.name, p.p); err != nil {
			return 0, 0, err
		}
	}
	if !(rate >= 0 && rate < bound) {
		return 0, 0, invalid("rate %v is not below the bound %v; no number of units proves it", rate, bound)
	}
	enough := func(c float64) bool { return atMostProbability(c, gateSize(c, bound, alpha), rate) >= power }
	no, yes := -1.0, 0.0
	for !enough(yes) {
		if yes > 1e7 {
			return 0, 0, invalid("rate %v is too close to the bound %v to be told apart", rate, bound)
		}
		no, yes = yes, 2*yes+1
	}
	for yes-no > 1 {
		if mid := math.Floor((no + yes) / 2); enough(mid) {
			yes = mid
		} else {
			no = mid
		}
	}
	return uint64(gateSize(yes, bound, alpha)), uint64(yes), nil
}

// gateSize is the least n at which c failures still prove the rate below bound.
func gateSize(c, bound, alpha float64) float64 {
	no, yes := c, c+1
	for atMostProbability(c, yes, bound) > alpha {
		no, yes = yes, 2*yes
	}
	for yes-no > 1 {
		if mid := math.Floor((no + yes) / 2); atMostProbability(c, mid, bound) > alpha {
			no = mid
		} else {
			yes = mid
		}
	}
	return yes
}

// atMostProbability is P(X ≤ c) for X binomial(n, p).
func atMostProbability(c, n, p float64) float64 {
	if c >= n || p == 0 {
		return 1
	}
	return mathext.RegIncBeta(n-c, c+1, 1-p)
}
