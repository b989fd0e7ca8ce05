package main

import (
	"math"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{[]float64{3}, 3}, {[]float64{5, 1, 3}, 3}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(c.in); got != c.want {
			t.Errorf("median of %v is %v, want %v", c.in, got, c.want)
		}
	}
	if in := []float64{2, 1}; median(in) != 1.5 || in[0] != 2 {
		t.Errorf("median changed its argument to %v", in)
	}
	if !math.IsNaN(median(nil)) {
		t.Error("the median of nothing is a number")
	}
}

// pairOf is one round with one metric.
func pairOf(ours, peer, oursForeign, peerForeign float64) round {
	return round{us: {Values: map[string]float64{"m": ours}, Foreign: oursForeign},
		"p": {Values: map[string]float64{"m": peer}, Foreign: peerForeign}}
}

// The ratio is the median of the rounds' ratios, not the ratio of medians.
func TestSummariseRatioIsPaired(t *testing.T) {
	s, ok := summarise([]round{pairOf(1, 1, 0, 0), pairOf(10, 40, 0, 0), pairOf(100, 50, 0, 0)}, us, "p", "m")
	want := summary{Ours: 10, Peer: 40, Ratio: 1, Min: 0.25, Max: 2, Kept: 3, OursMin: 1, OursMax: 100}
	if !ok || s != want {
		t.Errorf("got %+v, want %+v", s, want)
	}
}

// A round is noisy when either side saw foreign CPU; such rounds count only when there
// is nothing else.
func TestSummariseDropsNoise(t *testing.T) {
	quiet, noisyOurs, noisyPeer := pairOf(4, 2, 0.10, 0.02), pairOf(9, 1, 0.11, 0), pairOf(9, 1, 0, 0.5)
	s, _ := summarise([]round{noisyOurs, quiet, noisyPeer}, us, "p", "m")
	if s.Ratio != 2 || s.Kept != 1 || s.Dropped != 2 || s.Foreign != 0.10 {
		t.Errorf("with a quiet round: %+v", s)
	}
	s, _ = summarise([]round{noisyOurs, noisyPeer}, us, "p", "m")
	if s.Ratio != 9 || s.Kept != 2 || s.Dropped != 0 || s.Foreign != 0.5 {
		t.Errorf("with noisy rounds only: %+v", s)
	}
}

func TestSummariseMissingPeer(t *testing.T) {
	rounds := []round{pairOf(4, 2, 0, 0), pairOf(6, 2, 0, 0)}
	for _, r := range rounds {
		delete(r, "p")
	}
	if _, ok := summarise(rounds, us, "p", "m"); ok {
		t.Error("a peer without samples was summarised")
	}
	s, ok := summarise(rounds, us, "", "m")
	if !ok || s.Ours != 5 || s.OursMin != 4 || s.OursMax != 6 || !math.IsNaN(s.Ratio) || !math.IsNaN(s.Peer) {
		t.Errorf("ours alone: %+v", s)
	}
	if _, ok := summarise(nil, us, "", "m"); ok {
		t.Error("nothing was summarised")
	}
}
