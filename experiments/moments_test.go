package experiments

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

// Whatever combination is asked for afterwards comes out as if it had been summed up
// observation by observation, however the observations were split and merged.
func TestMomentsProject(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 11))
	a, b := []float64{0, 2.5e-6, 1e-5, -3}, []float64{1, 0, 0, 0}
	var parts [3]Moments
	var want Sums
	for i := range 3000 {
		v := []float64{float64(r.IntN(50) + 1), 1e6 + 1e3*r.NormFloat64(), 400 * r.Float64(), float64(r.IntN(2))}
		if err := parts[i%7%3].Add(v); err != nil {
			t.Fatal(err)
		}
		x := a[1]*v[1] + a[2]*v[2] + a[3]*v[3]
		if err := want.Add(x, v[0]); err != nil {
			t.Fatal(err)
		}
	}
	var all Moments
	for _, i := range []int{2, 0, 1} {
		if err := all.Merge(&parts[i]); err != nil {
			t.Fatal(err)
		}
	}
	got, err := all.Project(a, b)
	if err != nil {
		t.Fatal(err)
	}
	near := func(name string, x, y float64) {
		if math.Abs(x-y) > 1e-6*max(1, math.Abs(y)) {
			t.Errorf("%s is %v, want %v", name, x, y)
		}
	}
	if got.N != want.N {
		t.Errorf("N is %d, want %d", got.N, want.N)
	}
	near("SumX", got.SumX, want.SumX)
	near("SumY", got.SumY, want.SumY)
	near("DevXX", got.DevXX, want.DevXX)
	near("DevYY", got.DevYY, want.DevYY)
	near("DevXY", got.DevXY, want.DevXY)
}

func TestMomentsRefuse(t *testing.T) {
	var m Moments
	if s, err := m.Project(nil, nil); err != nil || s != (Sums{}) {
		t.Errorf("empty: %v, %v", s, err)
	}
	if err := m.Add([]float64{1, 2}); err != nil {
		t.Fatal(err)
	}
	before := m.Sum[0]
	other := Moments{}
	_ = other.Add([]float64{1}) // one quantity is fine
	_, projected := m.Project([]float64{1}, []float64{1, 2})
	for name, err := range map[string]error{"none": m.Add(nil), "fewer": m.Add([]float64{1}), "infinite": m.Add([]float64{1, math.Inf(1)}),
		"no number": m.Add([]float64{math.NaN(), 1}), "too many": new(Moments).Add(make([]float64, MaxQuantities+1)), "merge": m.Merge(&other), "project": projected} {
		if !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if m.N != 1 || m.Sum[0] != before {
		t.Errorf("what was refused changed the summary: %+v", m)
	}
}
