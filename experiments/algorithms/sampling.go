package algorithms

import (
	"errors"
	"math/rand/v2"
)

// sampler is random search, and Sobol search: no learning.
type sampler struct {
	p     *problem
	Sobol bool
	N     int // points proposed
}

func (s *sampler) next(r *rand.Rand) ([]float64, int, bool) {
	s.N++
	if s.Sobol || s.N == 1 && s.p.start != nil {
		return s.p.design(s.N - 1), 0, true
	}
	u := make([]float64, s.p.d)
	for j := range u {
		u[j] = r.Float64()
	}
	return u, 0, true
}

func (s *sampler) observe(*rand.Rand, int, []float64, loss) {}

func (s *sampler) check([]int) error {
	if s.N < 0 || s.N > 1<<31 {
		return errors.New("count of points is out of range")
	}
	return nil
}
