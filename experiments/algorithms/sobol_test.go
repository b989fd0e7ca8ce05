package algorithms

import (
	"math"
	"slices"
	"testing"
)

// The first points of the plain sequence, in natural order, as published.
func TestSobolFirstPoints(t *testing.T) {
	want := [][3]float64{{0, 0, 0}, {.5, .5, .5}, {.25, .75, .75}, {.75, .25, .25},
		{.125, .625, .375}, {.625, .125, .875}, {.375, .375, .625}, {.875, .875, .125}}
	for i, w := range want {
		for j := range w {
			if got := float64(sobolBits(uint32(i), j)) / (1 << 32); got != w[j] {
				t.Errorf("point %d coordinate %d = %v, want %v", i, j, got, w[j])
			}
		}
	}
}

// Scrambled or not, 2^k points put exactly one in each of 2^k equal slices of every axis.
func TestSobolStratifiesEveryAxis(t *testing.T) {
	const n = 256
	d := len(joeKuo) + 1
	for seed := range uint64(3) {
		for j := range d {
			var slots []int
			for i := range n {
				slots = append(slots, int(sobolPoint(seed, i, d)[j]*n))
			}
			slices.Sort(slots)
			for i, s := range slots {
				if s != i {
					t.Fatalf("seed %d axis %d: slice %d holds %d instead", seed, j, i, s)
				}
			}
		}
	}
}

// Integration error of a smooth function is far below that of random points, in the
// dimensions past the table it is at least no worse than random.
func TestSobolIntegrates(t *testing.T) {
	const n = 1024
	mean := func(seed uint64, lo, hi, d int) float64 {
		sum := 0.0
		for i := range n {
			p, u := 1.0, sobolPoint(seed, i, d)
			for _, x := range u[lo:hi] {
				p *= 1 + 0.5*(x-0.5)
			}
			sum += p
		}
		return sum / n
	}
	for seed := range uint64(5) {
		if e := math.Abs(mean(seed, 0, 5, 5) - 1); e > 5e-4 {
			t.Errorf("seed %d: error %.2g in five dimensions, random points have 1e-2", seed, e)
		}
		if e := math.Abs(mean(seed, 40, 45, 64) - 1); e > 5*0.35/math.Sqrt(n) {
			t.Errorf("seed %d: error %.2g past the table", seed, e)
		}
	}
}
