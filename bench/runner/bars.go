package main

import (
	"fmt"
	"math"
	"slices"
)

// bar is a target of a row: what one figure of ours must come to, and should.
type bar struct {
	what   string // the figure, in words
	peer   string // whom it is compared with; "" = ours alone
	metric string
	of     relation
	higher bool    // at least must, not at most
	must   float64 // in the figure's unit
	aim    float64 // NaN = none beyond must
}

// relation is how a bar's figure comes from our value and the peer's.
type relation int

const (
	ratio      relation = iota // ours/peer within a round, median over the rounds
	absolute                   // ours, median over the rounds
	difference                 // ours − peer, difference of the medians over the rounds
)

// verdict is what a bar came to; the README of the results explains it to readers.
type verdict struct {
	What string   `json:"what"`
	Must float64  `json:"must"`
	Aim  *float64 `json:"aim,omitempty"`
	Got  float64  `json:"got"`
	Says string   `json:"says"`
}

// judge looks at the rounds; false when they hold no such figure.
func (b bar) judge(rounds []round) (verdict, bool) {
	known := slices.ContainsFunc(rounds, func(r round) bool {
		_, ours := r[us].Values[b.metric]
		_, theirs := r[b.peer].Values[b.metric]
		return ours && (theirs || b.peer == "")
	})
	s, ok := summarise(rounds, us, b.peer, b.metric)
	if !known || !ok {
		return verdict{}, false
	}
	got := s.Ratio
	switch b.of {
	case absolute:
		got = s.Ours
	case difference:
		got = s.Ours - s.Peer
	}
	v := verdict{What: b.what, Must: b.must, Aim: optional(b.aim), Got: figures(got), Says: "missed"}
	reaches := func(limit float64) bool {
		if b.higher {
			return got >= limit
		}
		return got <= limit
	}
	switch {
	case !math.IsNaN(b.aim) && reaches(b.aim):
		v.Says = "aim reached"
	case reaches(b.must):
		v.Says = "reached"
		if !math.IsNaN(b.aim) {
			v.Says = "reached, aim missed"
		}
	}
	if s.Foreign > maxForeign {
		v.Says += " (busy machine: not to be quoted)"
	}
	return v, true
}

// String is the verdict's line under the table.
func (v verdict) String() string {
	aim := ""
	if v.Aim != nil {
		aim = fmt.Sprintf(", aim %.4g", *v.Aim)
	}
	return fmt.Sprintf("%s: %.4g (must %.4g%s): %s", v.What, v.Got, v.Must, aim, v.Says)
}

// withBars adds to each row the bars that compare with its peer, and to the first row
// those that compare with nobody.
func withBars(rows []result, bars []bar, rounds []round) {
	for i := range rows {
		for _, b := range bars {
			if b.peer != rows[i].Peer && (b.peer != "" || i > 0) {
				continue
			}
			if v, ok := b.judge(rounds); ok {
				rows[i].Bars = append(rows[i].Bars, v)
			}
		}
	}
}
