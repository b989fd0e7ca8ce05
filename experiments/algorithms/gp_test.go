package algorithms

import (
	"math"
	"math/rand/v2"
	"testing"

	"gonum.org/v1/gonum/mat"
	"gonum.org/v1/gonum/stat/distuv"
)

// someProcess is a process on random points of a space with ordered and unordered
// parameters.
func someProcess(t testing.TB, noisy bool) (*process, *rand.Rand) {
	t.Helper()
	s, err := NewSpace(Param{Name: "x", Kind: Float, Max: 1}, Param{Name: "y", Kind: Float, Max: 2},
		Param{Name: "c", Kind: Categorical, Choices: []string{"a", "b", "c"}})
	if err != nil {
		t.Fatal(err)
	}
	p, err := newProblem(builtins()[4].Info, Config{Space: s, Budget: 50, Noisy: noisy})
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	g := &process{p: p, inv: []float64{3, 2, 1}, noise: 0.01}
	for range 12 {
		u := s.canonical([]float64{r.Float64(), r.Float64(), r.Float64()})
		g.xs = append(g.xs, u)
		g.z = append(g.z, math.Sin(5*u[0])+u[1]*u[2])
	}
	standardise(g.z)
	g.condition()
	return g, r
}

func TestCholeskyAgainstGonum(t *testing.T) {
	g, r := someProcess(t, true)
	n := len(g.xs)
	k := mat.NewSymDense(n, nil)
	for i := range n {
		for j := range i + 1 {
			v, _ := g.kernel(g.xs[i], g.xs[j])
			if i == j {
				v += g.noise
			}
			k.SetSym(i, j, v)
		}
	}
	var ref mat.Cholesky
	if !ref.Factorize(k) {
		t.Fatal("not positive definite")
	}
	if a, b := g.chol.logDet(), ref.LogDet(); math.Abs(a-b) > 1e-9 {
		t.Errorf("log determinant %v, gonum has %v", a, b)
	}
	var inv mat.SymDense
	if err := ref.InverseTo(&inv); err != nil {
		t.Fatal(err)
	}
	ours := g.chol.inverse()
	b := make([]float64, n)
	for i := range n {
		b[i] = r.NormFloat64()
		for j := range n {
			if math.Abs(ours[i][j]-inv.At(i, j)) > 1e-8 {
				t.Fatalf("inverse[%d][%d] = %v, gonum has %v", i, j, ours[i][j], inv.At(i, j))
			}
		}
	}
	x := make([]float64, n)
	g.chol.backward(x, g.chol.forward(x, b))
	for i := range n {
		sum := 0.0
		for j := range n {
			sum += k.At(i, j) * x[j]
		}
		if math.Abs(sum-b[i]) > 1e-9 {
			t.Errorf("K·x = %v at %d, want %v", sum, i, b[i])
		}
	}
	if (&cholesky{rows: [][]float64{{1}}}).add([]float64{1, 1}) {
		t.Error("a singular matrix was taken")
	}
}

// Analytic derivatives against central differences.
func TestGradients(t *testing.T) {
	const h = 1e-6
	numeric := func(f func(x []float64) float64, x []float64, j int) float64 {
		keep := x[j]
		x[j] = keep + h
		up := f(x)
		x[j] = keep - h
		down := f(x)
		x[j] = keep
		return (up - down) / (2 * h)
	}
	g, _ := someProcess(t, true)
	theta := []float64{math.Log(0.4), math.Log(0.7), math.Log(1.3), math.Log(0.02)}
	g.slopes = make([][]float64, len(g.xs))
	for i := range g.slopes {
		g.slopes[i] = make([]float64, i)
	}
	scratch := make([]float64, 4)
	grad := make([]float64, 4)
	g.evidence(theta, grad)
	for j := range theta {
		want := numeric(func(x []float64) float64 { return g.evidence(x, scratch) }, theta, j)
		if math.Abs(grad[j]-want) > 1e-4*(1+math.Abs(want)) {
			t.Errorf("∂evidence/∂θ%d = %v, differences say %v", j, grad[j], want)
		}
	}
	g, r := someProcess(t, true)
	for range 20 {
		x := []float64{r.Float64(), r.Float64(), 0.5}
		for _, best := range []float64{-1, -8, 1} { // likely, nearly impossible, nearly sure
			grad := make([]float64, 3)
			g.logExpectedImprovement(best, x, grad)
			for j := range 2 {
				want := numeric(func(x []float64) float64 { return g.logExpectedImprovement(best, x, nil) }, x, j)
				if math.Abs(grad[j]-want) > 1e-3*(1+math.Abs(want)) {
					t.Errorf("∂log EI/∂x%d at %v for %v = %v, differences say %v", j, x, best, grad[j], want)
				}
			}
			if grad[2] != 0 {
				t.Errorf("the categorical parameter has slope %v", grad[2])
			}
		}
	}
}

// A process interpolates what it saw, is uncertain far away, and goes through a belief
// without changing its mean.
func TestProcessInterpolates(t *testing.T) {
	g, r := someProcess(t, false)
	g.noise = 1e-9
	g.condition()
	for i, x := range g.xs {
		if mean, dev := g.predict(x, nil, nil); math.Abs(mean-g.z[i]) > 1e-4 || dev > 1e-3 {
			t.Errorf("at point %d: %v ± %v, observed %v", i, mean, dev, g.z[i])
		}
	}
	x, far := []float64{0.31, 0.77, g.xs[0][2]}, []float64{r.Float64(), r.Float64(), g.xs[0][2]}
	mean, dev := g.predict(x, nil, nil)
	other, otherDev := g.predict(far, nil, nil)
	g.believe(x)
	m2, d2 := g.predict(x, nil, nil)
	o2, od2 := g.predict(far, nil, nil)
	if math.Abs(m2-mean) > 1e-6 || d2 > 0.01*dev || math.Abs(o2-other) > 1e-6 || od2 > otherDev+1e-9 {
		t.Errorf("a belief at its mean changed %v±%v to %v±%v there and %v±%v to %v±%v elsewhere", mean, dev, m2, d2, other, otherDev, o2, od2)
	}
}

// log(φ(u) + u·Φ(u)) against numerical integration of ∫ max(u−v, 0)·φ(v) dv.
func TestLogGain(t *testing.T) {
	for _, u := range []float64{-12, -7, -6.001, -5.999, -3, -1, 0, 2, 9} {
		sum, n := 0.0, 400_000
		lo := min(u, 0) - 12
		w := (u - lo) / float64(n)
		for i := range n {
			v := lo + (float64(i)+0.5)*w
			sum += (u - v) * distuv.UnitNormal.Prob(v) * w
		}
		got, slope := logGain(u)
		if math.Abs(got-math.Log(sum)) > 2e-3 {
			t.Errorf("logGain(%v) = %v, integral gives %v", u, got, math.Log(sum))
		}
		const h = 1e-5
		a, _ := logGain(u + h)
		b, _ := logGain(u - h)
		if want := (a - b) / (2 * h); math.Abs(u) > 6.1 && math.Abs(slope-want) > 0.01*want || math.Abs(u) < 5.9 && math.Abs(slope-want) > 1e-5*(1+want) {
			t.Errorf("slope at %v = %v, differences say %v", u, slope, want)
		}
	}
	if v, s := logGain(-1e8); math.IsInf(v, 0) || math.IsNaN(v) || !(s > 0) {
		t.Errorf("logGain(-1e8) = %v, %v", v, s)
	}
}

func TestAscendFindsABoundedMaximum(t *testing.T) {
	f := func(x, g []float64) float64 { // maximum at (0.3, 2), the second outside
		g[0], g[1] = -200*(x[0]-0.3), -2*(x[1]-2)
		return -100*(x[0]-0.3)*(x[0]-0.3) - (x[1]-2)*(x[1]-2)
	}
	x := []float64{0.9, 0.1}
	y := ascend(f, x, []float64{0, 0}, []float64{1, 1}, 60)
	if math.Abs(x[0]-0.3) > 1e-4 || x[1] != 1 || math.Abs(y+1) > 1e-4 {
		t.Errorf("ascended to %v with %v, want (0.3, 1) with −1", x, y)
	}
}

func TestWarp(t *testing.T) {
	z := warp([]loss{1, 2, 4, 1000, loss(math.Inf(1)), 1.5}, 2)
	for i, y := range []float64{1, 2, 4, 1000, 1000, 1.5} {
		for j, w := range []float64{1, 2, 4, 1000, 1000, 1.5} {
			if (y < w) != (z[i] < z[j]) {
				t.Errorf("order of losses %v and %v is not kept: %v, %v", y, w, z[i], z[j])
			}
		}
	}
	if z[3]-z[2] > 10*(z[2]-z[0]) { // 332 without
		t.Errorf("one terrible loss still flattens the rest: %v", z)
	}
	for _, flat := range [][]loss{{7, 7, 7}, {1e100, -1e100, 1e-300, 1e-300}, {0, 0, 0, 5}} {
		for _, v := range warp(flat, float64(flat[1])) {
			if math.IsNaN(v) || math.IsInf(v, 0) {
				t.Errorf("warp(%v) has %v", flat, v)
			}
		}
	}
}

// Beyond its cap the surrogate keeps the best third and stays within it.
func TestSurrogateIsCapped(t *testing.T) {
	p, err := newProblem(builtins()[4].Info, Config{Space: cube(t, 1, 0, 1), Budget: 1000})
	if err != nil {
		t.Fatal(err)
	}
	b := &bayes{p: p}
	for i := range 1000 {
		b.observe(nil, -1, []float64{float64(i) / 1000}, loss(i)) // the best come first
	}
	if len(b.Xs) != maxModelled || b.Ys[0] != 0 || b.Ys[maxModelled/3-1] != maxModelled/3-1 || b.Ys[maxModelled-1] != 999 {
		t.Errorf("kept %d points, %v … %v … %v", len(b.Xs), b.Ys[0], b.Ys[maxModelled/3-1], b.Ys[len(b.Ys)-1])
	}
}
