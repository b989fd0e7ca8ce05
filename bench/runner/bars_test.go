package main

import (
	"math"
	"testing"
)

// What a bar says for each relation, and that it says nothing without a figure.
func TestBars(t *testing.T) {
	at := func(ours, peer, foreign float64) round {
		return round{us: {Values: map[string]float64{"m": ours}, Foreign: foreign}, "peer": {Values: map[string]float64{"m": peer}}}
	}
	rounds := []round{at(8, 10, 0), at(9, 10, 0), at(9, 10, 0)}
	none := math.NaN()
	for _, c := range []struct {
		b    bar
		r    []round
		got  float64
		says string
	}{
		{bar{peer: "peer", must: 0.95, aim: 0.8}, rounds, 0.9, "reached, aim missed"},
		{bar{peer: "peer", must: 0.95, aim: 0.9}, rounds, 0.9, "aim reached"},
		{bar{peer: "peer", must: 0.85, aim: 0.8}, rounds, 0.9, "missed"},
		{bar{peer: "peer", must: 2.5, aim: 4, higher: true}, []round{at(30, 10, 0)}, 3, "reached, aim missed"},
		{bar{peer: "peer", must: 2.5, aim: none, higher: true}, []round{at(20, 10, 0)}, 2, "missed"},
		{bar{of: absolute, must: 9, aim: none}, rounds, 9, "reached"},
		{bar{peer: "peer", of: difference, must: 30, aim: 10}, rounds, -1, "aim reached"},
		{bar{peer: "peer", must: 1, aim: none}, []round{at(9, 10, 0.5)}, 0.9, "reached (busy machine: not to be quoted)"},
	} {
		c.b.metric = "m"
		v, ok := c.b.judge(c.r)
		if !ok || v.Got != c.got || v.Says != c.says {
			t.Errorf("%+v: %+v, %v; want %v, %q", c.b, v, ok, c.got, c.says)
		}
	}
	for _, b := range []bar{{metric: "n"}, {metric: "m", peer: "nobody"}} {
		if v, ok := b.judge(rounds); ok {
			t.Errorf("%+v judged %+v", b, v)
		}
	}
	rows := []result{{Peer: "other"}, {Peer: "peer"}}
	withBars(rows, []bar{{what: "alone", metric: "m", of: absolute}, {what: "pair", peer: "peer", metric: "m"}}, rounds)
	if len(rows[0].Bars) != 1 || rows[0].Bars[0].What != "alone" || len(rows[1].Bars) != 1 || rows[1].Bars[0].What != "pair" {
		t.Errorf("%+v", rows)
	}
}
