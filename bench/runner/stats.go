package main

import (
	"math"
	"slices"
)

// maxForeign is the share of the machine's CPU time that processes other than the
// benchmark's own may have used during a round before the round is dropped.
const maxForeign = 0.10

// sample is one measurement of one contender in one round.
type sample struct {
	Values  map[string]float64 `json:"values"`
	Foreign float64            `json:"foreign_cpu"`  // share of all cores, 0 to 1
	Load    float64            `json:"load_average"` // 1 minute, before the sample
	Seconds float64            `json:"seconds"`
}

// round is one sample of every contender that could be measured, by name.
type round map[string]sample

// summary is what a comparison comes to for one peer and one metric.
type summary struct {
	Ours, Peer       float64 // medians over the kept rounds
	Ratio            float64 // median of ours/peer of each kept round
	Min, Max         float64 // extremes of that ratio
	Kept, Dropped    int     // rounds
	Foreign          float64 // highest foreign share among the kept rounds
	OursMin, OursMax float64 // extremes of our value over the kept rounds
}

// summarise pairs our sample with the peer's of the same round. Rounds in which either
// saw more than maxForeign of foreign CPU are dropped while others remain. With no peer
// ("") it describes our values alone and leaves the ratio NaN. ok is false when no round
// holds what is asked for.
func summarise(rounds []round, ours, peer, metric string) (s summary, ok bool) {
	type pair struct{ a, b, foreign float64 }
	var quiet, noisy []pair
	for _, r := range rounds {
		a, okA := r[ours]
		b, okB := r[peer]
		if !okA || peer != "" && !okB {
			continue
		}
		p := pair{a.Values[metric], b.Values[metric], max(a.Foreign, b.Foreign)}
		if p.foreign > maxForeign {
			noisy = append(noisy, p)
		} else {
			quiet = append(quiet, p)
		}
	}
	kept := quiet
	if len(kept) == 0 {
		kept = noisy
	}
	if len(kept) == 0 {
		return summary{}, false
	}
	s.Kept, s.Dropped = len(kept), len(quiet)+len(noisy)-len(kept)
	var as, bs, ratios []float64
	for _, p := range kept {
		as, bs, ratios = append(as, p.a), append(bs, p.b), append(ratios, p.a/p.b)
		s.Foreign = max(s.Foreign, p.foreign)
	}
	s.Ours, s.OursMin, s.OursMax = median(as), slices.Min(as), slices.Max(as)
	s.Peer, s.Ratio, s.Min, s.Max = math.NaN(), math.NaN(), math.NaN(), math.NaN()
	if peer != "" {
		s.Peer, s.Ratio, s.Min, s.Max = median(bs), median(ratios), slices.Min(ratios), slices.Max(ratios)
	}
	return s, true
}

// median returns the middle of xs, the mean of the middle two for an even number, and
// NaN for none. xs is not modified.
func median(xs []float64) float64 {
	if len(xs) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(xs))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}
