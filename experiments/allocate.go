package experiments

import (
	"cmp"
	"slices"

	"github.com/outrigger-mesh/outrigger"
)

// Weighted is one arm and its share of the traffic in parts of Buckets (10 000).
type Weighted struct {
	Name   string
	Weight uint32
}

// Allocation is one arm and the buckets it owns: ranges sorted by Start, disjoint and
// never touching (neighbours are joined). An arm of weight 0 has no ranges.
type Allocation struct {
	Name   string
	Ranges []Range
}

// Weight returns the number of buckets the arm owns, in parts of 10 000.
func (a Allocation) Weight() uint32 {
	var n uint32
	for _, r := range a.Ranges {
		n += r.End - r.Start
	}
	return n
}

// Allocate lays the arms out as one run of buckets each, in the order given. Names
// must be non-empty and distinct and the weights must sum to Buckets; otherwise the
// error has kind Invalid and says what the sum is.
func Allocate(arms []Weighted) ([]Allocation, error) {
	return Reallocate(nil, arms)
}

// Reallocate changes the split with the least possible movement: an arm whose weight
// falls gives up its highest buckets, an arm whose weight rises keeps all it has and
// takes freed buckets, lowest first. So a unit that was in a growing arm stays there,
// a unit of a shrinking arm either stays or moves once, and the number of buckets
// that change arms is exactly the sum of the falls.
//
// Arms that prev does not know start empty; arms of prev that are missing from arms
// have weight 0 and are left out of the result. The result is in the order of arms and
// depends on nothing else, so every replica computes the same one. prev may be nil;
// else it must cover all buckets. Inputs are not modified. Errors have kind Invalid.
func Reallocate(prev []Allocation, arms []Weighted) ([]Allocation, error) {
	if err := checkWeights(arms); err != nil {
		return nil, err
	}
	if prev == nil {
		prev = []Allocation{{Ranges: []Range{}}}
	} else if err := Covers(prev); err != nil {
		return nil, err
	}
	want := make(map[string]uint32, len(arms))
	for _, a := range arms {
		want[a.Name] = a.Weight
	}
	kept := make(map[string][]Range, len(prev))
	owned := make([]Range, 0, len(prev))
	for _, p := range prev {
		rs := lowest(p.Ranges, want[p.Name])
		kept[p.Name] = rs
		owned = append(owned, rs...)
	}
	free := gaps(owned)
	out := make([]Allocation, len(arms))
	for i, a := range arms {
		rs := kept[a.Name]
		if short := a.Weight - total(rs); short > 0 {
			var taken []Range
			taken, free = split(free, short)
			rs = join(append(rs, taken...))
		}
		out[i] = Allocation{Name: a.Name, Ranges: rs}
	}
	return out, nil
}

// Covers checks that the arms own every bucket of [0, Buckets) exactly once and have
// distinct, non-empty names. The error has kind Invalid and names the first bucket
// that is free or owned twice.
func Covers(arms []Allocation) error {
	type owner struct {
		Range
		name string
	}
	var all []owner
	seen := make(map[string]bool, len(arms))
	for _, a := range arms {
		if a.Name == "" || seen[a.Name] {
			return outrigger.Errorf(outrigger.Invalid, "arm name %q is empty or used twice; names must be distinct", a.Name)
		}
		seen[a.Name] = true
		for _, r := range a.Ranges {
			if r.Start >= r.End || r.End > Buckets {
				return outrigger.Errorf(outrigger.Invalid, "arm %q has range [%d,%d); ranges are non-empty and within [0,%d)", a.Name, r.Start, r.End, Buckets)
			}
			all = append(all, owner{r, a.Name})
		}
	}
	slices.SortFunc(all, func(a, b owner) int { return cmp.Compare(a.Start, b.Start) })
	var next uint32
	last := ""
	for _, o := range all {
		switch {
		case o.Start > next:
			return outrigger.Errorf(outrigger.Invalid, "buckets [%d,%d) belong to no arm; the arms must cover [0,%d)", next, o.Start, Buckets)
		case o.Start < next:
			return outrigger.Errorf(outrigger.Invalid, "bucket %d belongs to %q and to %q; each bucket belongs to one arm", o.Start, last, o.name)
		}
		next, last = o.End, o.name
	}
	if next != Buckets {
		return outrigger.Errorf(outrigger.Invalid, "buckets [%d,%d) belong to no arm; the arms must cover [0,%d)", next, Buckets, Buckets)
	}
	return nil
}

func checkWeights(arms []Weighted) error {
	var sum uint64
	seen := make(map[string]bool, len(arms))
	for _, a := range arms {
		if a.Name == "" || seen[a.Name] {
			return outrigger.Errorf(outrigger.Invalid, "arm name %q is empty or used twice; names must be distinct", a.Name)
		}
		seen[a.Name] = true
		sum += uint64(a.Weight)
	}
	if sum != Buckets {
		return outrigger.Errorf(outrigger.Invalid, "weights sum to %d, they must sum to %d (0.01 %% each)", sum, Buckets)
	}
	return nil
}

// lowest returns the first n buckets of rs as joined, sorted ranges.
func lowest(rs []Range, n uint32) []Range {
	head, _ := split(join(slices.Clone(rs)), n)
	return head
}

// split cuts sorted ranges after n buckets. The halves share no memory with rs.
func split(rs []Range, n uint32) (head, tail []Range) {
	for _, r := range rs {
		size := r.End - r.Start
		switch {
		case n >= size:
			head = append(head, r)
			n -= size
		case n == 0:
			tail = append(tail, r)
		default:
			head = append(head, Range{r.Start, r.Start + n})
			tail = append(tail, Range{r.Start + n, r.End})
			n = 0
		}
	}
	return head, tail
}

// join sorts ranges and merges those that touch.
func join(rs []Range) []Range {
	slices.SortFunc(rs, func(a, b Range) int { return cmp.Compare(a.Start, b.Start) })
	out := rs[:0]
	for _, r := range rs {
		if n := len(out); n > 0 && out[n-1].End == r.Start {
			out[n-1].End = r.End
			continue
		}
		out = append(out, r)
	}
	return out
}

// gaps returns the buckets none of the disjoint ranges owns.
func gaps(owned []Range) []Range {
	var out []Range
	var next uint32
	for _, r := range join(owned) {
		if r.Start > next {
			out = append(out, Range{next, r.Start})
		}
		next = r.End
	}
	if next < Buckets {
		out = append(out, Range{next, Buckets})
	}
	return out
}

func total(rs []Range) uint32 { return Allocation{Ranges: rs}.Weight() }
