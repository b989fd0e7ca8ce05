package algorithms

import (
	"math"

	"gonum.org/v1/gonum/floats"
)

// cholesky is the lower factor L of a positive definite matrix, kept by rows so that a
// row can be appended in O(n²) when a point joins.
type cholesky struct{ rows [][]float64 }

// add appends the row of the matrix for one more point (its covariances with the
// earlier ones, then its variance). ok is false if the matrix is not positive definite.
func (c *cholesky) add(a []float64) (ok bool) {
	n := len(c.rows)
	row := make([]float64, n+1)
	for j, lj := range c.rows {
		row[j] = (a[j] - floats.Dot(row[:j], lj[:j])) / lj[j]
	}
	rest := a[n] - floats.Dot(row[:n], row[:n])
	if !(rest > 1e-12) {
		return false
	}
	row[n] = math.Sqrt(rest)
	c.rows = append(c.rows, row)
	return true
}

// forward returns L⁻¹·b in dst, which may be b.
func (c *cholesky) forward(dst, b []float64) []float64 {
	for j, lj := range c.rows {
		dst[j] = (b[j] - floats.Dot(dst[:j], lj[:j])) / lj[j]
	}
	return dst
}

// backward returns L⁻ᵀ·b in dst, which may be b.
func (c *cholesky) backward(dst, b []float64) []float64 {
	copy(dst, b)
	for j := len(c.rows) - 1; j >= 0; j-- {
		dst[j] /= c.rows[j][j]
		floats.AddScaled(dst[:j], -dst[j], c.rows[j][:j])
	}
	return dst
}

// logDet is the logarithm of the determinant of the matrix.
func (c *cholesky) logDet() float64 {
	s := 0.0
	for j, row := range c.rows {
		s += 2 * math.Log(row[j])
	}
	return s
}

// inverse returns the full inverse of the matrix, by rows.
func (c *cholesky) inverse() [][]float64 {
	n := len(c.rows)
	// Row j of t is column j of L⁻¹, from its first non-zero entry j on.
	t := make([][]float64, n)
	for j := range n {
		col := make([]float64, n)
		col[j] = 1 / c.rows[j][j]
		for i := j + 1; i < n; i++ {
			col[i] = -floats.Dot(c.rows[i][j:i], col[j:i]) / c.rows[i][i]
		}
		t[j] = col
	}
	inv := make([][]float64, n)
	for i := range n {
		inv[i] = make([]float64, n)
		for j := range i + 1 {
			v := floats.Dot(t[i][i:], t[j][i:])
			inv[i][j], inv[j][i] = v, v
		}
	}
	return inv
}

// ascend maximises f inside [lo, hi] by the spectral projected gradient method (Birgin,
// Martínez and Raydan, SIAM J. Optim. 10, 2000) with at most evals evaluations. f
// returns the value and fills the gradient; a NaN value is a forbidden place. x is
// overwritten by the best point, whose value is returned.
func ascend(f func(x, grad []float64) float64, x, lo, hi []float64, evals int) float64 {
	d := len(x)
	g, trial, tg := make([]float64, d), make([]float64, d), make([]float64, d)
	y := f(x, g)
	if math.IsNaN(y) {
		return y
	}
	rate := 0.1 / max(floats.Norm(g, math.Inf(1)), 1e-12)
	for evals--; evals > 0; {
		moved := false
		for t := rate; evals > 0; t /= 4 {
			gain := 0.0
			for j := range x {
				trial[j] = min(max(x[j]+t*g[j], lo[j]), hi[j])
				gain += g[j] * (trial[j] - x[j])
			}
			if !(gain > 1e-12) {
				return y
			}
			evals--
			ty := f(trial, tg)
			if ty >= y+1e-4*gain {
				ss, sy := 0.0, 0.0
				for j := range x {
					s := trial[j] - x[j]
					ss += s * s
					sy += s * (g[j] - tg[j])
				}
				rate = 4 * t
				if sy > 0 {
					rate = ss / sy
				}
				copy(x, trial)
				copy(g, tg)
				y, moved = ty, true
				break
			}
		}
		if !moved {
			break
		}
	}
	return y
}
