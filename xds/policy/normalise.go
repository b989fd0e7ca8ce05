package policy

import (
	"cmp"
	"reflect"
	"slices"

	"github.com/outrigger-mesh/outrigger/experiments"
)

// Normalise returns the one canonical form of p, sharing nothing mutable with it:
// every list sorted, adjacent ranges of an arm merged, defaults written out,
// priorities of a version renumbered densely from 0 (only their order means
// anything, and gRPC clients refuse gaps), empty lists nil. It accepts invalid
// policies and never makes a valid one invalid; Normalise∘Normalise = Normalise.
func (p *Policy) Normalise() *Policy {
	out := &Policy{Position: p.Position, Models: cloneOrNil(p.Models), Regions: cloneOrNil(p.Regions)}
	for i := range out.Models {
		out.Models[i] = out.Models[i].Normalise()
	}
	slices.SortStableFunc(out.Models, func(a, b Model) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortStableFunc(out.Regions, func(a, b Region) int { return cmp.Compare(a.Name, b.Name) })
	for i := range out.Regions {
		// Adding zero turns -0 into 0, which is the same place but other bytes.
		out.Regions[i].Latitude += 0
		out.Regions[i].Longitude += 0
	}
	return out
}

// Normalise is Policy.Normalise for one model.
func (m *Model) Normalise() Model {
	out := *m
	if out.Timeout == 0 {
		out.Timeout = DefaultTimeout
	}
	if out.MaxAttempts == 0 {
		out.MaxAttempts = 1
	}
	out.Arms = cloneOrNil(m.Arms)
	for i := range out.Arms {
		out.Arms[i].Ranges = mergeRanges(out.Arms[i].Ranges)
		out.Arms[i].Settings = cloneOrNil(out.Arms[i].Settings)
		slices.SortFunc(out.Arms[i].Settings, func(a, b Setting) int { return cmp.Compare(a.Name, b.Name) })
	}
	slices.SortStableFunc(out.Arms, func(a, b Arm) int { return cmp.Compare(a.Name, b.Name) })
	out.Enrolment.Gates = cloneOrNil(m.Enrolment.Gates)
	slices.SortFunc(out.Enrolment.Gates, func(a, b Gate) int { return cmp.Compare(a.Salt, b.Salt) })
	out.Access = cloneOrNil(m.Access)
	slices.SortFunc(out.Access, func(a, b Access) int {
		return cmp.Or(cmp.Compare(a.Header, b.Header), cmp.Compare(a.Value, b.Value))
	})
	if out.Fault.AbortShare == 0 {
		out.Fault.AbortStatus = 0
	}
	if out.Fault.DelayShare == 0 {
		out.Fault.Delay = 0
	}
	out.Shadows = cloneOrNil(m.Shadows)
	slices.SortStableFunc(out.Shadows, func(a, b Shadow) int { return cmp.Compare(a.Version, b.Version) })
	out.Versions = cloneOrNil(m.Versions)
	for i := range out.Versions {
		out.Versions[i].normalise()
	}
	slices.SortStableFunc(out.Versions, func(a, b Version) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

func (v *Version) normalise() {
	if v.MaxRequests == 0 {
		v.MaxRequests = DefaultMaxRequests
	}
	v.MaxConnections, v.MaxPending = cmp.Or(v.MaxConnections, v.MaxRequests), cmp.Or(v.MaxPending, v.MaxRequests)
	if v.ConsecutiveFailures == 0 {
		v.ConsecutiveFailures = DefaultConsecutiveFailures
	}
	if v.OpenFor == 0 {
		v.OpenFor = DefaultOpenFor
	}
	v.Pins = cloneOrNil(v.Pins)
	slices.Sort(v.Pins)
	v.Endpoints, v.TLS = cloneOrNil(v.Endpoints), v.normaliseTLS()
	slices.SortStableFunc(v.Endpoints, compareEndpoints)
	dense, last := uint32(0), uint32(0)
	for i := range v.Endpoints {
		e := &v.Endpoints[i]
		if e.Weight == 0 {
			e.Weight = 1
		}
		if i > 0 && e.Priority != last {
			dense++
		}
		last, e.Priority = e.Priority, dense
	}
}

// compareEndpoints orders by priority, region, address: the order xDS groups them in.
func compareEndpoints(a, b Endpoint) int {
	return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(a.Region, b.Region), cmp.Compare(a.Address, b.Address))
}

// mergeRanges sorts and joins ranges that touch. Overlaps are kept: Validate names them.
func mergeRanges(in []experiments.Range) []experiments.Range {
	in = cloneOrNil(in)
	slices.SortFunc(in, func(a, b experiments.Range) int {
		return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(a.End, b.End))
	})
	out := in[:0]
	for _, r := range in {
		if n := len(out); n > 0 && out[n-1].End == r.Start && r.Start < r.End {
			out[n-1].End = r.End
			continue
		}
		out = append(out, r)
	}
	return out
}

// Equal reports whether two policies mean the same: their normal forms are equal. A
// nil policy equals only nil.
func Equal(a, b *Policy) bool {
	if a == nil || b == nil {
		return a == b
	}
	return reflect.DeepEqual(a.Normalise(), b.Normalise())
}

func cloneOrNil[T any](s []T) []T {
	if len(s) == 0 {
		return nil
	}
	return slices.Clone(s)
}
