package experiments

import (
	"cmp"
	"math"
	"slices"

	"gonum.org/v1/gonum/integrate/quad"
	"gonum.org/v1/gonum/mathext"
	"gonum.org/v1/gonum/stat/distuv"
)

// ChanceToWin is the Bayesian view of two proportions under uniform priors: the
// probability that the treatment's is the greater, and the expected loss of shipping
// it, E max(0, control − treatment). It is a description, not a stopping rule: watched,
// it finds winners among equals. Exact up to quadrature (relative error about 1e-9).
// Errors have kind Invalid.
func ChanceToWin(controlK, controlN, treatmentK, treatmentN uint64) (chance, loss float64, err error) {
	if controlK > controlN || treatmentK > treatmentN || controlN > maxCount || treatmentN > maxCount {
		return 0, 0, invalid("%d of %d and %d of %d successes; successes are at most the units, units at most 2^40", controlK, controlN, treatmentK, treatmentN)
	}
	c := distuv.Beta{Alpha: float64(controlK) + 1, Beta: float64(controlN-controlK) + 1}
	t := distuv.Beta{Alpha: float64(treatmentK) + 1, Beta: float64(treatmentN-treatmentK) + 1}
	// E[c; c > t] = E[c]·P(c⁺ > t), where c⁺ has one success more; likewise for t.
	plus := func(b distuv.Beta) distuv.Beta { return distuv.Beta{Alpha: b.Alpha + 1, Beta: b.Beta} }
	chance = exceeds(t, c)
	loss = c.Mean()*exceeds(plus(c), t) - t.Mean()*exceeds(c, plus(t))
	return chance, max(0, loss), nil
}

// ChanceToWinNormal is ChanceToWin for any estimate, from the normal approximation with
// a flat prior. With no variance it is 0, ½ or 1 by the sign of the difference.
func ChanceToWinNormal(c Contrast) (chance, loss float64) {
	se := c.SE()
	if se == 0 {
		return (float64(cmp.Compare(c.Difference, 0)) + 1) / 2, max(0, -c.Difference)
	}
	z := c.Difference / se
	chance = math.Erfc(-z/math.Sqrt2) / 2
	return chance, max(0, se*math.Exp(-z*z/2)/math.Sqrt(2*math.Pi)-c.Difference*(1-chance))
}

// exceeds returns P(a > b) for independent beta variables with parameters ≥ 1: the
// integral of a's density times b's distribution function, by Gauss–Legendre pieces
// that follow whichever of the two changes faster.
func exceeds(a, b distuv.Beta) float64 {
	lo, hi := support(a)
	lb, hb := support(b)
	cuts := []float64{lo, hi}
	for _, x := range [...]float64{lb, (lb + b.Mean()) / 2, b.Mean(), (b.Mean() + hb) / 2, hb, a.Mean()} {
		if x > lo && x < hi {
			cuts = append(cuts, x)
		}
	}
	slices.Sort(cuts)
	norm := mathext.Lbeta(a.Alpha, a.Beta)
	f := func(x float64) float64 {
		density := math.Exp(xlogy(a.Alpha-1, x) + xlog1py(a.Beta-1, -x) - norm)
		switch {
		case density == 0 || x <= lb:
			return 0
		case x >= hb:
			return density
		}
		return density * b.CDF(x)
	}
	sum := 0.0
	for i := range cuts[1:] {
		sum += quad.Fixed(f, cuts[i], cuts[i+1], 24, nil, 0)
	}
	return min(1, max(0, sum))
}

// support bounds where all but 1e-12 or so of a beta variable lies.
func support(b distuv.Beta) (lo, hi float64) {
	sd := math.Sqrt(b.Variance())
	wide := 8.0
	if min(b.Alpha, b.Beta) < 200 { // a skewed tail decays exponentially rather than like a normal one
		wide = 30
	}
	return max(0, b.Mean()-wide*sd), min(1, b.Mean()+wide*sd)
}

func xlog1py(x, y float64) float64 {
	if x == 0 {
		return 0
	}
	return x * math.Log1p(y)
}
