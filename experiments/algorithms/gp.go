package algorithms

import (
	"math"

	"gonum.org/v1/gonum/floats"
)

// process is a Gaussian process with the Matérn 5/2 kernel and one lengthscale per
// parameter (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006,
// chapters 2 and 5), conditioned on standardised observations z at xs. Two values of an
// unordered parameter are at distance one, whatever they are.
type process struct {
	p       *problem
	inv     []float64 // one over the lengthscales, which are in edges of the cube
	noise   float64   // noise variance as a share of the signal's
	xs      [][]float64
	z       []float64
	chol    cholesky
	alpha   []float64   // (K + noise)⁻¹·z
	scratch []float64   // of predict
	signal  float64     // signal variance, its maximum likelihood estimate
	slopes  [][]float64 // of the kernel between xs, kept while fitting
}

// gap is the distance of a and b along parameter j, before scaling.
func (p *problem) gap(a, b []float64, j int) float64 {
	d := a[j] - b[j]
	if d != 0 && p.unordered[j] {
		return 1
	}
	return d
}

// kernel returns the correlation and the factor its derivatives share:
// ∂k/∂log l_j = slope·(gap_j/l_j)², ∂k/∂a_j = −slope·gap_j/l_j².
func (g *process) kernel(a, b []float64) (k, slope float64) {
	r2 := 0.0
	for j, inv := range g.inv {
		d := g.p.gap(a, b, j) * inv
		r2 += d * d
	}
	s := math.Sqrt(5 * r2)
	e := math.Exp(-s)
	return (1 + s + 5*r2/3) * e, 5.0 / 3 * (1 + s) * e
}

// condition computes the factor for the present scales and noise. Points that nearly
// coincide make the matrix singular; more noise then separates them.
func (g *process) condition() {
	n := len(g.xs)
	row := make([]float64, n)
	for {
		g.chol = cholesky{rows: make([][]float64, 0, n)}
		ok := true
		for i := 0; i < n && ok; i++ {
			for j := range i {
				k, slope := g.kernel(g.xs[i], g.xs[j])
				row[j] = k
				if g.slopes != nil {
					g.slopes[i][j] = slope
				}
			}
			row[i] = 1 + g.noise
			ok = g.chol.add(row[:i+1])
		}
		if ok {
			break
		}
		g.noise = max(10*g.noise, 1e-9)
	}
	half := g.chol.forward(make([]float64, n), g.z)
	g.signal = max(floats.Dot(half, half)/float64(n), 1e-12)
	g.alpha = g.chol.backward(half, half)
}

// believe conditions on a further point as if its predicted mean had been observed. The
// signal variance stays: a belief is no evidence about the spread. A point that nearly
// coincides with another adds nothing and is left out.
func (g *process) believe(x []float64) {
	mean, _ := g.predict(x, nil, nil)
	row := make([]float64, len(g.xs)+1)
	for i, xi := range g.xs {
		row[i], _ = g.kernel(x, xi)
	}
	row[len(g.xs)] = 1 + g.noise
	if !g.chol.add(row) {
		return
	}
	g.xs, g.z = append(g.xs, x), append(g.z, mean)
	half := g.chol.forward(make([]float64, len(g.z)), g.z)
	g.alpha = g.chol.backward(half, half)
}

// Prior of the hyperparameters: log-normal lengthscales that grow with the square root
// of the dimension, as distances do (Hvarfner, Hellsten and Nardi 2024), so that few
// points in many dimensions do not explain everything as wiggle.
const (
	scalePrior = 0.5 // median lengthscale in one dimension
	scaleWidth = 1.0 // standard deviation of its logarithm
	scaleMin   = 0.02
	scaleMax   = 30
	noisePrior = 0.02 // median noise share; without it few points are best explained as all noise
	noiseWidth = 1.5  // standard deviation of its logarithm
	quietNoise = 1e-6 // noise share when the loss is declared free of noise
)

// evidence sets the hyperparameters theta = (log lengthscales…, log noise) and returns
// the log marginal likelihood, with the signal variance at its best value, plus the log
// prior; grad receives the derivative.
func (g *process) evidence(theta, grad []float64) float64 {
	d, n := g.p.d, len(g.xs)
	for j := range d {
		g.inv[j] = math.Exp(-theta[j])
	}
	g.noise = math.Exp(theta[d])
	g.condition()
	value := -0.5*float64(n)*math.Log(g.signal) - 0.5*g.chol.logDet()
	clear(grad)
	inv := g.chol.inverse()
	for i := range n {
		for k := range i {
			w := g.alpha[i]*g.alpha[k]/g.signal - inv[i][k]
			w *= g.slopes[i][k]
			for j, inv := range g.inv {
				gap := g.p.gap(g.xs[i], g.xs[k], j) * inv
				grad[j] += w * gap * gap
			}
		}
		grad[d] += 0.5 * (g.alpha[i]*g.alpha[i]/g.signal - inv[i][i]) * g.noise
	}
	mode := math.Log(scalePrior) + 0.5*math.Log(float64(d))
	for j := range d {
		t := (theta[j] - mode) / scaleWidth
		value -= 0.5 * t * t
		grad[j] -= t / scaleWidth
	}
	t := (theta[d] - math.Log(noisePrior)) / noiseWidth
	value -= 0.5 * t * t
	grad[d] -= t / noiseWidth
	if !g.p.noisy {
		grad[d] = 0
	}
	return value
}

// fit maximises the evidence from theta, which is overwritten.
func (g *process) fit(theta []float64, evals int) float64 {
	d := g.p.d
	lo, hi := make([]float64, d+1), make([]float64, d+1)
	for j := range d {
		lo[j], hi[j] = math.Log(scaleMin), math.Log(scaleMax)
	}
	lo[d], hi[d] = math.Log(quietNoise), math.Log(quietNoise)
	if g.p.noisy {
		hi[d] = 0
	}
	g.slopes = make([][]float64, len(g.xs))
	for i := range g.slopes {
		g.slopes[i] = make([]float64, i)
	}
	defer func() { g.slopes = nil }()
	return ascend(g.evidence, theta, lo, hi, evals)
}

// predict returns mean and standard deviation at x; with grads not nil it also fills
// their derivatives.
func (g *process) predict(x []float64, dMean, dDev []float64) (mean, dev float64) {
	n := len(g.xs)
	if len(g.scratch) < 3*n {
		g.scratch = make([]float64, 3*(n+64))
	}
	k, slope, v := g.scratch[:n], g.scratch[n:2*n], g.scratch[2*n:3*n]
	for i, xi := range g.xs {
		k[i], slope[i] = g.kernel(x, xi)
	}
	mean = floats.Dot(k, g.alpha)
	g.chol.forward(v, k)
	dev = math.Sqrt(max(g.signal*(1-floats.Dot(v, v)), 1e-18))
	if dMean == nil {
		return mean, dev
	}
	w := g.chol.backward(v, v)
	clear(dMean)
	clear(dDev)
	for i, xi := range g.xs {
		for j := range x {
			if g.p.space.params[j].Kind != Float {
				continue
			}
			dk := -slope[i] * (x[j] - xi[j]) * g.inv[j] * g.inv[j]
			dMean[j] += dk * g.alpha[i]
			dDev[j] -= dk * w[i] * g.signal / dev
		}
	}
	return mean, dev
}

// logExpectedImprovement is log E[max(best − z, 0)] at x and its gradient, in a form
// that stays finite where the improvement itself underflows (Ament et al., Unexpected
// Improvements to Expected Improvement, 2023), so that the search for its maximum does
// not stall on a plateau of zeros.
func (g *process) logExpectedImprovement(best float64, x, grad []float64) float64 {
	if grad == nil {
		mean, dev := g.predict(x, nil, nil)
		h, _ := logGain((best - mean) / dev)
		return math.Log(dev) + h
	}
	dMean, dDev := make([]float64, len(x)), make([]float64, len(x))
	mean, dev := g.predict(x, dMean, dDev)
	u := (best - mean) / dev
	h, slope := logGain(u)
	for j := range grad {
		grad[j] = dDev[j]/dev + slope*(-dMean[j]-u*dDev[j])/dev
	}
	return math.Log(dev) + h
}

// logGain is log(φ(u) + u·Φ(u)) and its derivative.
func logGain(u float64) (value, slope float64) {
	const halfLog2Pi = 0.9189385332046727
	if u < -6 {
		// Asymptotic series: φ/u²·(1 − 3/u² + 15/u⁴), Φ = φ/|u|·(1 − 1/u² + 3/u⁴).
		t := 1 / (u * u)
		tail := 1 - 3*t + 15*t*t
		return -u*u/2 - halfLog2Pi + math.Log(t*tail), (1 - t + 3*t*t) / (-1 / u * tail) * 1
	}
	phi := math.Exp(-u*u/2 - halfLog2Pi)
	cdf := 0.5 * math.Erfc(-u/math.Sqrt2)
	h := phi + u*cdf
	return math.Log(h), cdf / h
}
