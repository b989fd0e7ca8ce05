package algorithms

import (
	"errors"
	"math/rand/v2"
	"slices"
)

// simplex is Nelder and Mead's method (1965) with the dimension-dependent coefficients
// of Gao and Han (2012) and restarts: when a simplex has collapsed, or when it
// stops gaining, another starts, alternately large at a new point of the design and
// small at the best point so far (which rescues a degenerate simplex).
type simplex struct {
	p       *problem
	V       []start // d+1 vertices, best first
	Phase   phase
	Reflect start
	Design  []start
	Starts  int
	Edge    float64 // edge of the present start
	Best    start
}

type phase string

const (
	sampling    phase = ""
	building    phase = "build"
	reflecting  phase = "reflect"
	expanding   phase = "expand"
	contracting phase = "contract"
	shrinking   phase = "shrink"
)

func (s *simplex) designSize() int { return min(max(s.p.budget/20, 2), 20) }

func (s *simplex) step(r *rand.Rand, xs [][]float64, ys []loss) [][]float64 {
	if xs == nil {
		for i := range s.designSize() {
			xs = append(xs, s.p.design(i))
		}
		return xs
	}
	for i, x := range xs {
		if s.Best.U == nil || ys[i] < s.Best.Y {
			s.Best = start{slices.Clone(x), ys[i]}
		}
	}
	switch s.Phase {
	case sampling:
		for i, x := range xs {
			s.Design = append(s.Design, start{slices.Clone(x), ys[i]})
		}
		slices.SortStableFunc(s.Design, func(a, b start) int { return compareLoss(a.Y, b.Y) })
		return s.build(r)
	case building, shrinking:
		if s.Phase == building {
			s.V = nil
		} else {
			s.V = s.V[:1]
		}
		for i, x := range xs {
			s.V = append(s.V, start{slices.Clone(x), ys[i]})
		}
	case reflecting:
		got := start{slices.Clone(xs[0]), ys[0]}
		if next := s.reflected(got); next != nil {
			return next
		}
	case expanding:
		if ys[0] < s.Reflect.Y {
			s.replace(start{slices.Clone(xs[0]), ys[0]})
		} else {
			s.replace(s.Reflect)
		}
	case contracting:
		if ys[0] < min(s.Reflect.Y, s.V[s.p.d].Y) {
			s.replace(start{slices.Clone(xs[0]), ys[0]})
			break
		}
		return s.shrink()
	}
	slices.SortStableFunc(s.V, func(a, b start) int { return compareLoss(a.Y, b.Y) })
	if s.collapsed() {
		return s.build(r)
	}
	s.Phase = reflecting
	return [][]float64{s.line(1)}
}

// build lays out a new simplex of d+1 points.
func (s *simplex) build(r *rand.Rand) [][]float64 {
	s.Phase = building
	origin, edge := s.p.design(len(s.Design)+s.Starts), 0.15
	switch {
	case s.Starts == 0:
		origin = s.Design[0].U
	case s.Starts%2 == 1:
		origin, edge = s.Best.U, 0.02
	}
	s.Edge = edge
	s.Starts++
	xs := [][]float64{slices.Clone(origin)}
	for j := range s.p.d {
		x := slices.Clone(origin)
		step := edge
		if n := s.p.space.params[j].bins(); n > 0 {
			step = max(step, 1/n)
		}
		if r.IntN(2) == 0 {
			step = -step
		}
		if x[j]+step < 0 || x[j]+step > 1 {
			step = -step
		}
		x[j] += step
		xs = append(xs, x)
	}
	return xs
}

// line is the point at centroid + t·(centroid − worst).
func (s *simplex) line(t float64) []float64 {
	d := s.p.d
	x := make([]float64, d)
	for j := range x {
		c := 0.0
		for _, v := range s.V[:d] {
			c += v.U[j]
		}
		c /= float64(d)
		x[j] = clamp01(c + t*(c-s.V[d].U[j]))
	}
	return x
}

func (s *simplex) reflected(got start) [][]float64 {
	d := float64(max(s.p.d, 2))
	s.Reflect = got
	switch {
	case got.Y < s.V[0].Y:
		s.Phase = expanding
		return [][]float64{s.line(1 + 2/d)}
	case got.Y < s.V[max(s.p.d-1, 0)].Y:
		s.replace(got)
		return nil
	case got.Y < s.V[s.p.d].Y:
		s.Phase = contracting
		return [][]float64{s.line(0.75 - 1/(2*d))}
	}
	s.Phase = contracting
	return [][]float64{s.line(-(0.75 - 1/(2*d)))}
}

func (s *simplex) replace(v start) { s.V[s.p.d] = v }

func (s *simplex) shrink() [][]float64 {
	s.Phase = shrinking
	t := 1 - 1/float64(max(s.p.d, 2))
	var xs [][]float64
	for _, v := range s.V[1:] {
		x := make([]float64, s.p.d)
		for j := range x {
			x[j] = s.V[0].U[j] + t*(v.U[j]-s.V[0].U[j])
		}
		xs = append(xs, x)
	}
	return xs
}

// collapsed reports whether the simplex is too small, or too flat, to go on. Integer
// parameters make plateaus: a simplex inside one bin has nothing left to find.
func (s *simplex) collapsed() bool {
	size, flat := 0.0, s.V[0].Y == s.V[s.p.d].Y
	for _, v := range s.V[1:] {
		for j, x := range v.U {
			size = max(size, abs(x-s.V[0].U[j]))
		}
	}
	return size < 1e-7 || flat && size < 0.01
}

func abs(x float64) float64 { return max(x, -x) }

func (s *simplex) check() error {
	bad := s.Starts < 0 || s.Starts > MaxBudget || len(s.Design) > 64
	for _, v := range slices.Concat(s.V, s.Design) {
		bad = bad || !validPoint(v.U, s.p.d) || !v.Y.valid()
	}
	if s.Best.U != nil {
		bad = bad || !validPoint(s.Best.U, s.p.d) || !s.Best.Y.valid()
	}
	switch s.Phase {
	case sampling:
		bad = bad || len(s.Design) > 0
	case building:
		bad = bad || len(s.Design) == 0 || s.Best.U == nil
	case reflecting, expanding, contracting, shrinking:
		bad = bad || len(s.Design) == 0 || s.Best.U == nil || len(s.V) != s.p.d+1
		if s.Phase == expanding || s.Phase == contracting {
			bad = bad || !validPoint(s.Reflect.U, s.p.d) || !s.Reflect.Y.valid()
		}
	default:
		bad = true
	}
	if bad {
		return errors.New("simplex is out of range")
	}
	return nil
}

func (s *simplex) width() int {
	switch s.Phase {
	case sampling:
		return s.designSize()
	case building:
		return s.p.d + 1
	case shrinking:
		return s.p.d
	}
	return 1
}

func (s *simplex) fresh() bool { return s.Phase == sampling }
