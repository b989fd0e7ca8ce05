// Package version is the algebra of variable versions: comparing and merging context
// vectors, deciding which of several versions of a variable counts, encoding vectors
// compactly, and stepping the hybrid logical clock.
//
// A version (outrigger.Version) is a dot, the one write that made the value, plus a
// context: per region the highest position of that variable the writer had seen.
// This is the dotted version vector of Preguiça, Baquero, Almeida, Fonte and
// Gonçalves, "Brief Announcement: Efficient Causality Tracking in Distributed Storage
// Systems with Dotted Version Vectors" (PODC 2012), with one entry per region rather
// than per client, so a vector has as many entries as regions ever wrote the variable:
// one, for every variable that has a single owner region.
//
// # Use
//
//	switch version.Compare(a, b) {
//	case version.Before:     // b was written by somebody who had seen a
//	case version.Concurrent: // neither had; Winner decides and both stay in the log
//	}
//
// # Promises
//
// Every function is pure and deterministic, and safe for concurrent use. None keeps
// or changes its arguments. A region missing from a vector counts as position 0, so
// a nil map is the empty vector and {"eu": 0} equals it. Compare and Winner give the
// same answer on every machine and in every order of arguments.
//
// Positions of two incarnations of one region's log count different events and are
// never compared: such versions are concurrent, and the hybrid logical clock decides.
//
// Decoding accepts exactly the bytes encoding produces (canonical: sorted, no
// duplicates, no zero positions, shortest varints), so equal vectors have equal
// bytes; anything else is an error of kind Invalid.
package version

import (
	"cmp"

	"github.com/outrigger-mesh/outrigger"
)

// Order is the causal relation of two vectors or versions.
type Order uint8

// The four relations.
const (
	Equal      Order = iota
	Before           // the first is strictly in the past of the second
	After            // the first is strictly in the future of the second
	Concurrent       // neither has seen the other
)

// String returns the lower-case word.
func (o Order) String() string {
	return [...]string{"equal", "before", "after", "concurrent"}[o&3]
}

// Flip returns the relation with the arguments exchanged.
func (o Order) Flip() Order {
	switch o {
	case Before:
		return After
	case After:
		return Before
	}
	return o
}

// CompareVectors relates two vectors componentwise.
func CompareVectors(a, b map[string]uint64) Order {
	var less, more bool
	for r, p := range a {
		less = less || p < b[r]
		more = more || p > b[r]
	}
	for r, p := range b {
		less = less || a[r] < p
	}
	switch {
	case less && more:
		return Concurrent
	case less:
		return Before
	case more:
		return After
	}
	return Equal
}

// Covers reports whether a ≥ b in every component.
func Covers(a, b map[string]uint64) bool {
	for r, p := range b {
		if a[r] < p {
			return false
		}
	}
	return true
}

// Merge returns the least vector that covers both: the componentwise maximum. The
// result is a new map without zero entries.
func Merge(a, b map[string]uint64) map[string]uint64 {
	out := make(map[string]uint64, max(len(a), len(b)))
	for _, v := range []map[string]uint64{a, b} {
		for r, p := range v {
			if p > out[r] {
				out[r] = p
			}
		}
	}
	return out
}

// Dominates reports whether the writer of a had seen b, or a is b:
// a.Context[b.Dot.Region] ≥ b.Dot.Position (see outrigger.Version). The zero version
// is dominated by every version.
func Dominates(a, b outrigger.Version) bool {
	if b.Dot.IsZero() || a.Dot == b.Dot {
		return true
	}
	if a.Dot.Region == b.Dot.Region && a.Dot.Incarnation != b.Dot.Incarnation {
		return false
	}
	return a.Context[b.Dot.Region] >= b.Dot.Position
}

// Compare relates two versions of one variable.
func Compare(a, b outrigger.Version) Order {
	ab, ba := Dominates(a, b), Dominates(b, a)
	switch {
	case ab && ba && a.Dot == b.Dot:
		return Equal
	case ab && ba:
		// Each claims to have seen the other, which no honest pair of writers can: two
		// broken contexts order nothing.
		return Concurrent
	case ab:
		return After
	case ba:
		return Before
	}
	return Concurrent
}

// Winner returns the index of the version that counts among candidates for one
// variable: of those no other candidate is After, the one with the highest
// (HLC, region, incarnation, position). The result names the same version whatever
// the order of the candidates. It returns -1 for none.
func Winner(candidates []outrigger.Version) int {
	best := -1
	for i, v := range candidates {
		if superseded(v, candidates) {
			continue
		}
		if best < 0 || tie(v, candidates[best]) > 0 {
			best = i
		}
	}
	if best < 0 && len(candidates) > 0 {
		// Only broken contexts can make a cycle; the tie-break alone still gives every
		// machine the same answer.
		best = 0
		for i, v := range candidates {
			if tie(v, candidates[best]) > 0 {
				best = i
			}
		}
	}
	return best
}

func superseded(v outrigger.Version, by []outrigger.Version) bool {
	for _, w := range by {
		if Compare(w, v) == After {
			return true
		}
	}
	return false
}

// tie is a total order on writes: a dot names one write, so only the same write ties.
func tie(a, b outrigger.Version) int {
	return cmp.Or(
		cmp.Compare(a.HLC, b.HLC),
		cmp.Compare(a.Dot.Region, b.Dot.Region),
		cmp.Compare(a.Dot.Incarnation, b.Dot.Incarnation),
		cmp.Compare(a.Dot.Position, b.Dot.Position),
	)
}
