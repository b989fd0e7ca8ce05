package algorithms

import (
	"math"
	"slices"
	"testing"
)

// objective is a test function with its known minimum.
type objective struct {
	name  string
	space *Space
	f     func(x []float64) float64
	min   float64
}

func cube(t testing.TB, d int, lo, hi float64) *Space {
	t.Helper()
	var ps []Param
	for i := range d {
		ps = append(ps, Param{Name: string(rune('a' + i)), Kind: Float, Min: lo, Max: hi})
	}
	s, err := NewSpace(ps...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// at returns the float parameters in the order of the space.
func at(s *Space, p Params) []float64 {
	x := make([]float64, s.Len())
	for i, d := range s.params {
		x[i] = p[d.Name].(float64)
	}
	return x
}

// sphere has its optimum off the centre, so that no algorithm gains from starting there.
func sphere(t testing.TB) objective {
	shift := []float64{1.3, -2.1, 0.7, 2.9, -0.4}
	return objective{"sphere5", cube(t, 5, -5.12, 5.12), func(x []float64) float64 {
		s := 0.0
		for i, v := range x {
			s += (v - shift[i]) * (v - shift[i])
		}
		return s
	}, 0}
}

func rosenbrock(t testing.TB) objective {
	return objective{"rosenbrock5", cube(t, 5, -2.048, 2.048), func(x []float64) float64 {
		s := 0.0
		for i := range x[:len(x)-1] {
			a, b := x[i+1]-x[i]*x[i], 1-x[i]
			s += 100*a*a + b*b
		}
		return s
	}, 0}
}

func branin(t testing.TB) objective {
	s, err := NewSpace(Param{Name: "x", Kind: Float, Min: -5, Max: 10}, Param{Name: "y", Kind: Float, Min: 0, Max: 15})
	if err != nil {
		t.Fatal(err)
	}
	return objective{"branin", s, func(x []float64) float64 { return Branin(x[0], x[1]) }, BraninMin}
}

func hartmann6(t testing.TB) objective {
	a := [4][6]float64{{10, 3, 17, 3.5, 1.7, 8}, {0.05, 10, 17, 0.1, 8, 14}, {3, 3.5, 1.7, 10, 17, 8}, {17, 8, 0.05, 10, 0.1, 14}}
	p := [4][6]float64{{1312, 1696, 5569, 124, 8283, 5886}, {2329, 4135, 8307, 3736, 1004, 9991},
		{2348, 1451, 3522, 2883, 3047, 6650}, {4047, 8828, 8732, 5743, 1091, 381}}
	c := [4]float64{1, 1.2, 3, 3.2}
	return objective{"hartmann6", cube(t, 6, 0, 1), func(x []float64) float64 {
		s := 0.0
		for i := range c {
			e := 0.0
			for j := range x {
				d := x[j] - p[i][j]*1e-4
				e += a[i][j] * d * d
			}
			s -= c[i] * math.Exp(-e)
		}
		return s
	}, -3.32236801}
}

// regret minimises o once and returns the best loss above the minimum.
func regret(t testing.TB, id string, o objective, seed uint64, budget int) float64 {
	t.Helper()
	opt, err := New(id, Config{Space: o.space, Seed: seed, Budget: budget})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for {
		trials := opt.Ask(1)
		if len(trials) == 0 {
			break
		}
		n++
		if err := opt.Tell([]Result{{ID: trials[0].ID, Loss: o.f(at(o.space, trials[0].Params))}}); err != nil {
			t.Fatal(err)
		}
	}
	best, ok := opt.Best()
	if !ok || n != budget {
		t.Fatalf("%s on %s stopped after %d of %d evaluations", id, o.name, n, budget)
	}
	return best.Loss - o.min
}

func median(xs []float64) float64 {
	s := slices.Sorted(slices.Values(xs))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}
