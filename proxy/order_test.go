package proxy

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// The regions of the tables: Dublin is here, Virginia is 5,500 km away, Tokyo 9,600.
var (
	eu      = policy.Region{Name: "eu", Latitude: 53.35, Longitude: -6.26, Healthy: true}
	us      = policy.Region{Name: "us", Latitude: 37.43, Longitude: -78.66, Healthy: true}
	ap      = policy.Region{Name: "ap", Latitude: 35.68, Longitude: 139.77, Healthy: true}
	nowhere = policy.Region{Name: "xx", Healthy: true}
)

func down(r policy.Region) policy.Region { r.Healthy = false; return r }

// ep is an endpoint "name/region[/priority]" with what was measured of it.
func ep(name string, l inference.Load) measured {
	parts := strings.Split(name, "/")
	e := policy.Endpoint{Address: parts[0], Region: parts[1], Weight: 1}
	if len(parts) > 2 {
		fmt.Sscan(parts[2], &e.Priority)
	}
	return measured{e, l}
}

type measured struct {
	e policy.Endpoint
	l inference.Load
}

func took(ms int) inference.Load {
	return inference.Load{Latency: time.Duration(ms) * time.Millisecond}
}

func order(in []measured, regions []policy.Region, seed uint64) string {
	endpoints := make([]policy.Endpoint, len(in))
	for i := range in {
		endpoints[i] = in[i].e
	}
	got := orderByRegion(endpoints, inference.OrderInfo{Region: "eu", Regions: regions, Rand: seed, Load: func(i int) inference.Load { return in[i].l }})
	var out []string
	for _, e := range got {
		out = append(out, e.Address)
	}
	return strings.Join(out, " ")
}

func TestOrderByRegion(t *testing.T) {
	all := []policy.Region{ap, eu, us, nowhere}
	open := func(ms int) inference.Load { return inference.Load{Latency: took(ms).Latency, Open: true} }
	none := inference.Load{}
	for _, tt := range []struct {
		name    string
		in      []measured
		regions []policy.Region
		want    string
	}{
		{"nothing", nil, all, ""},
		{"local first, then by distance", []measured{ep("a/ap", none), ep("u/us", none), ep("e/eu", none), ep("x/xx", none)}, all, "e u x a"},
		{"unhealthy last, local or not", []measured{ep("e/eu", none), ep("a/ap", none), ep("u/us", none)}, []policy.Region{ap, down(eu), down(us)}, "a e u"},
		{"all unhealthy: as if they were not", []measured{ep("a/ap", none), ep("u/us", none), ep("e/eu", none)}, []policy.Region{down(ap), down(eu), down(us)}, "e u a"},
		{"a region the policy does not describe counts as healthy", []measured{ep("q/qq", none), ep("u/us", none)}, []policy.Region{eu, down(us)}, "q u"},
		{"policy without regions: local, then by name", []measured{ep("b/b", none), ep("a/a", none), ep("e/eu", none)}, nil, "e a b"},

		{"measured latency beats distance", []measured{ep("u/us", took(900)), ep("a/ap", took(300))}, all, "a u"},
		{"a slow model is no reason to leave: nobody knows the others are faster", []measured{ep("u/us", none), ep("e/eu", took(2000))}, all, "e u"},
		{"nor is one that others share", []measured{ep("u/us", took(2050)), ep("e/eu", took(2000))}, all, "e u"},
		{"nor noise", []measured{ep("u/us", took(1950)), ep("e/eu", took(2000))}, all, "e u"},
		{"a clearly faster region is", []measured{ep("e/eu", took(2000)), ep("u/us", took(500))}, all, "u e"},
		{"endpoints of a region are one measurement", []measured{ep("e1/eu", took(2000)), ep("e2/eu", took(2000)), ep("e3/eu", took(2000)), ep("u/us", took(2060))}, all, "e1 e2 e3 u"},
		{"a region that is never used is not taken for fast", []measured{ep("a/ap", none), ep("u/us", took(1000))}, all, "u a"},
		{"but for near", []measured{ep("a/ap", took(1000)), ep("u/us", none)}, all, "u a"},
		{"an endpoint whose breaker is open says nothing of its region", []measured{ep("e1/eu", open(9000)), ep("e2/eu", took(20)), ep("u/us", took(150))}, all, "e2 e1 u"},
		{"health before latency", []measured{ep("u/us", took(1)), ep("e/eu", took(2000))}, []policy.Region{eu, down(us)}, "e u"},

		{"priority groups", []measured{ep("c/eu/7", none), ep("b/eu/1", none), ep("a/eu/0", none)}, all, "a b c"},
		{"priority before latency", []measured{ep("b/eu/1", took(1)), ep("a/eu", took(500))}, all, "a b"},
		{"open breakers last in their region", []measured{ep("a/eu", open(0)), ep("b/eu/9", none), ep("u/us", none)}, all, "b a u"},
		{"all open: by priority", []measured{ep("b/eu/1", open(0)), ep("a/eu", open(0))}, all, "a b"},
		{"the faster of two", []measured{ep("a/eu", took(30)), ep("b/eu", took(10))}, all, "b a"},
		{"the less loaded of two", []measured{ep("a/eu", inference.Load{Latency: 10, InFlight: 9}), ep("b/eu", inference.Load{Latency: 15, InFlight: 1})}, all, "b a"},
		{"unmeasured and idle: to be measured", []measured{ep("a/eu", took(10)), ep("b/eu", none)}, all, "b a"},
		{"unmeasured and busy: not before it has answered", []measured{ep("a/eu", took(10)), ep("b/eu", inference.Load{InFlight: 3})}, all, "a b"},
		{"both unmeasured", []measured{ep("a/eu", inference.Load{InFlight: 2}), ep("b/eu", inference.Load{InFlight: 1})}, all, "b a"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := order(tt.in, tt.regions, 1); got != tt.want && !sameRegionTie(tt.name, got) {
				t.Errorf("got %s, want %s", got, tt.want)
			}
			// Of two, chance has no say; of three equals it has.
			for seed := range uint64(50) {
				if got := order(tt.in, tt.regions, seed); got != tt.want && !sameRegionTie(tt.name, got) {
					t.Fatalf("seed %d: got %s, want %s", seed, got, tt.want)
				}
			}
		})
	}
}

// sameRegionTie: three equal endpoints come in any order, but before the other region.
func sameRegionTie(name, got string) bool {
	return strings.HasPrefix(name, "endpoints of a region") && strings.HasSuffix(got, " u")
}

// Equals are chosen by weight, in every priority group, also when others are present.
func TestOrderIsFair(t *testing.T) {
	in := []measured{ep("last/eu/5", inference.Load{}), ep("a/eu", took(10)), ep("b/eu", took(10)), ep("c/eu", took(10)), ep("broken/eu", inference.Load{Open: true})}
	in[0].e.Weight, in[3].e.Weight = 1000, 2
	const n = 20_000
	first := map[string]float64{}
	for seed := range uint64(n) {
		first[strings.Fields(order(in, []policy.Region{eu}, seed))[0]]++
	}
	for name, want := range map[string]float64{"a": 0.25, "b": 0.25, "c": 0.5} {
		if got := first[name] / n; math.Abs(got-want) > 0.02 {
			t.Errorf("%s is first in %.3f of the orders, want %.2f", name, got, want)
		}
	}
	if len(first) != 3 {
		t.Errorf("first were %v", first)
	}
	// Power of two choices: the slowest of three is never first.
	in = []measured{ep("slow/eu", took(30)), ep("a/eu", took(10)), ep("b/eu", took(20))}
	for seed := range uint64(1000) {
		if got := order(in, nil, seed); strings.HasPrefix(got, "slow") {
			t.Fatalf("seed %d: %s", seed, got)
		}
	}
}

// For any endpoints, any regions and any load: the result is a permutation of the input,
// the same for the same input, with the order of regions, breakers and priorities kept.
func TestOrderLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		names := []string{"eu", "us", "ap", "xx", "unknown"}
		regions := rapid.SliceOfN(rapid.SampledFrom([]policy.Region{eu, us, ap, nowhere, down(eu), down(us)}), 0, 4).Draw(t, "regions")
		n := rapid.IntRange(0, 12).Draw(t, "n")
		endpoints, loads := make([]policy.Endpoint, n), make([]inference.Load, n)
		for i := range endpoints {
			endpoints[i] = policy.Endpoint{Address: fmt.Sprint("e", i), Region: rapid.SampledFrom(names).Draw(t, "region"),
				Weight: rapid.Uint32Range(0, 1_000_000).Draw(t, "weight"), Priority: rapid.Uint32Range(0, 2).Draw(t, "priority")}
			loads[i] = inference.Load{Latency: time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "latency")),
				InFlight: rapid.IntRange(0, 100).Draw(t, "inflight"), Open: rapid.Bool().Draw(t, "open")}
		}
		before := slices.Clone(endpoints)
		info := inference.OrderInfo{Region: "eu", Regions: regions, Rand: rapid.Uint64().Draw(t, "rand"), Load: func(i int) inference.Load { return loads[i] }}
		got := orderByRegion(endpoints, info)
		if !slices.Equal(got, orderByRegion(endpoints, info)) || !slices.Equal(endpoints, before) {
			t.Fatal("not deterministic, or the input was changed")
		}
		index := map[string]int{}
		for i, e := range endpoints {
			index[e.Address] = i
		}
		seen := map[string]bool{}
		done := map[string]bool{}
		for i, e := range got {
			if seen[e.Address] || e != endpoints[index[e.Address]] {
				t.Fatalf("%v is no permutation", got)
			}
			seen[e.Address] = true
			if i == 0 {
				continue
			}
			last := got[i-1]
			if last.Region != e.Region {
				if done[last.Region] = true; done[e.Region] {
					t.Fatalf("region %s is split: %v", e.Region, got)
				}
				continue
			}
			a, b := loads[index[last.Address]], loads[index[e.Address]]
			if a.Open && !b.Open || a.Open == b.Open && last.Priority > e.Priority {
				t.Fatalf("%v (%+v) before %v (%+v)", last, a, e, b)
			}
		}
		if len(got) != n {
			t.Fatalf("%d of %d endpoints", len(got), n)
		}
	})
}

func TestTouchesAreBounded(t *testing.T) {
	s := newTouches()
	for i := range 2 * maxTouches {
		s.add("t", fmt.Sprint("s", i))
	}
	got := s.drain()
	if len(got) != maxTouches || !slices.IsSorted(got) || !strings.HasPrefix(got[0], "t/s") {
		t.Errorf("%d sessions, first %q", len(got), got[0])
	}
	if s.drain() != nil {
		t.Error("touches are reported twice")
	}
	s.add("t", "again")
	s.add("t", "again")
	if got := s.drain(); len(got) != 1 || got[0] != "t/again" {
		t.Errorf("after a drain: %v", got)
	}
	if n := testing.AllocsPerRun(100, func() { s.add("t", "again") }); n != 0 {
		t.Errorf("%v allocations to touch a session again", n)
	}
}
