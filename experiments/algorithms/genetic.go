package algorithms

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
)

// genetic is a steady-state genetic algorithm: parents by tournament of three, blend
// crossover BLX-α (Eshelman and Schaffer 1993) for ordered parameters and a coin per
// gene for unordered ones, normal mutation whose size adapts by the one-fifth success
// rule (Rechenberg 1973). A child replaces the worst when it is at least as good, so
// evaluations never wait for a generation to end.
type genetic struct {
	p        *problem
	Proposed int
	Pop      []individual
	Sigma    float64
}

type individual struct {
	U []float64
	Y loss
}

// size is min(40, budget/5), at least 4: the seed design's 100 would spend a budget of 200
// half on random points.
func (g *genetic) size() int {
	if n := int(g.p.set["population_size"]); n > 0 {
		return n
	}
	return max(min(40, g.p.budget/5), 4)
}

func (g *genetic) next(r *rand.Rand) ([]float64, int, bool) {
	g.Proposed++
	if g.Proposed <= g.size() || len(g.Pop) < 2 {
		return g.p.design(g.Proposed - 1), 0, true
	}
	if g.Sigma == 0 {
		g.Sigma = 0.2
	}
	a, b := g.tournament(r), g.tournament(r)
	child := slices.Clone(a.U)
	if r.Float64() < 0.9 {
		child = g.cross(r, a.U, b.U)
	}
	rate := g.p.set["mutation_rate"]
	if rate == 0 {
		rate = max(0.1, 1/float64(g.p.d))
	}
	for j := range child {
		if r.Float64() < rate {
			child[j] = g.p.jump(r, &g.p.space.params[j], child[j], g.Sigma)
		}
	}
	return child, 1, true
}

func (g *genetic) tournament(r *rand.Rand) individual {
	best := g.Pop[r.IntN(len(g.Pop))]
	for range 2 {
		if o := g.Pop[r.IntN(len(g.Pop))]; o.Y < best.Y {
			best = o
		}
	}
	return best
}

func (g *genetic) cross(r *rand.Rand, a, b []float64) []float64 {
	child := make([]float64, len(a))
	for j := range child {
		if g.p.space.params[j].unordered() {
			child[j] = a[j]
			if r.IntN(2) == 0 {
				child[j] = b[j]
			}
			continue
		}
		lo, hi := min(a[j], b[j]), max(a[j], b[j])
		spread := (hi - lo) * g.p.set["blend"]
		child[j] = reflect01(lo - spread + r.Float64()*(hi-lo+2*spread))
	}
	return child
}

func (g *genetic) observe(_ *rand.Rand, tag int, u []float64, y loss) {
	ind := individual{slices.Clone(u), y}
	if len(g.Pop) < g.size() {
		g.Pop = append(g.Pop, ind)
		return
	}
	worst, better := 0, 0
	for i, o := range g.Pop {
		if o.Y >= g.Pop[worst].Y {
			worst = i
		}
		if o.Y <= y {
			better++
		}
	}
	success := better < len(g.Pop)/4 // among the best quarter
	if tag == 1 && g.Sigma > 0 {
		change := -0.05
		if success {
			change = 0.2
		}
		g.Sigma = min(max(g.Sigma*math.Exp(change), 1e-4), 0.3)
	}
	if y <= g.Pop[worst].Y {
		g.Pop[worst] = ind
	}
}

func (g *genetic) check([]int) error {
	if len(g.Pop) > g.size() || g.Proposed < 0 || g.Proposed > 1<<31 || !(g.Sigma >= 0 && g.Sigma <= 1) {
		return errors.New("population is out of range")
	}
	for _, i := range g.Pop {
		if !validPoint(i.U, g.p.d) || !i.Y.valid() {
			return errors.New("an individual is out of range")
		}
	}
	return nil
}
