package proxy

import (
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/region"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// orderByRegion is the order in which a version's endpoints are tried: regions as
// package region ranks them, and within a region closed breakers first, then priority,
// then repeatedly the better of two drawn by weight. The result has every endpoint of
// the input once; equal inputs, info.Rand included, give equal orders.
//
// The time to a response head, which is what a sidecar measures, is the way to the
// region plus the model's own time. The latter is much longer and the same for every
// region, so measured regions are compared by what they took, and one that was never
// used by geography: it is taken to need the fastest region's model time plus its own
// way. A region is one observation, however many endpoints it has. The local region
// stays first until another is clearly faster.
func orderByRegion(endpoints []policy.Endpoint, info inference.OrderInfo) []policy.Endpoint {
	loads := make([]inference.Load, len(endpoints)) // asked for once: the answer may change
	for i := range loads {
		loads[i] = info.Load(i)
	}
	from, candidates := candidatesOf(endpoints, loads, info)
	expectAlike(from, candidates)
	out := make([]policy.Endpoint, 0, len(endpoints))
	rest := make([]int, 0, len(endpoints))
	rnd := random(info.Rand)
	for _, c := range region.Order(from, candidates) {
		rest = rest[:0]
		for i := range endpoints {
			if endpoints[i].Region == c.Name {
				rest = append(rest, i)
			}
		}
		for len(rest) > 0 {
			k := next(endpoints, loads, rest, &rnd)
			out = append(out, endpoints[rest[k]])
			rest = append(rest[:k], rest[k+1:]...)
		}
	}
	return out
}

// candidatesOf describes the regions that have endpoints, in policy order; an unknown
// region is healthy and nowhere. RTT is the mean over a region's measured endpoints.
func candidatesOf(endpoints []policy.Endpoint, loads []inference.Load, info inference.OrderInfo) (from region.Location, out []region.Candidate) {
	for _, r := range info.Regions {
		if r.Name == info.Region {
			from = region.Location{Latitude: r.Latitude, Longitude: r.Longitude}
		}
	}
	for _, e := range endpoints {
		if containsRegion(out, e.Region) {
			continue
		}
		c := region.Candidate{Name: e.Region, Local: e.Region == info.Region, Healthy: true}
		for _, r := range info.Regions {
			if r.Name == e.Region {
				c.Healthy, c.Location = r.Healthy, region.Location{Latitude: r.Latitude, Longitude: r.Longitude}
			}
		}
		c.RTT = c.RTT.Observe(meanLatency(endpoints, loads, e.Region))
		out = append(out, c)
	}
	return from, out
}

func containsRegion(cs []region.Candidate, name string) bool {
	for _, c := range cs {
		if c.Name == name {
			return true
		}
	}
	return false
}

// meanLatency is in milliseconds, 0 when nothing was measured. Endpoints that take no
// requests now say nothing about the others.
func meanLatency(endpoints []policy.Endpoint, loads []inference.Load, name string) float64 {
	var sum time.Duration
	n := 0
	for i := range endpoints {
		if endpoints[i].Region != name {
			continue
		}
		if l := loads[i]; l.Latency > 0 && !l.Open {
			sum += l.Latency
			n++
		}
	}
	if n == 0 {
		return 0
	}
	return float64(sum) / float64(n) / float64(time.Millisecond)
}

// localGain is how much faster than the local region another must have been measured to
// go before it: leaving a region costs money and caches, and noise must not do it.
const localGain = 0.8

// expectAlike makes measured and unmeasured regions comparable.
func expectAlike(from region.Location, candidates []region.Candidate) {
	way := func(c region.Candidate) float64 {
		c.RTT = region.Estimate{}
		return region.ExpectedMs(from, c)
	}
	model, measured := 0.0, false
	for i := range candidates {
		c := &candidates[i]
		if c.RTT.Samples == 0 {
			continue
		}
		if own := max(0, c.RTT.MeanMs-way(*c)); !measured || own < model {
			model, measured = own, true
		}
	}
	if !measured {
		return
	}
	for i := range candidates {
		c := &candidates[i]
		if c.RTT.Samples == 0 {
			c.RTT = c.RTT.Observe(model + way(*c))
		} else if c.Local {
			c.RTT.MeanMs *= localGain
		}
	}
}

// next picks one of rest: of the best rank, the better of two drawn by weight.
func next(endpoints []policy.Endpoint, loads []inference.Load, rest []int, rnd *random) int {
	best := rank(endpoints[rest[0]], loads[rest[0]])
	for _, i := range rest[1:] {
		best = min(best, rank(endpoints[i], loads[i]))
	}
	draw := func(except int) (drawn int) {
		var total uint64
		drawn = -1
		for k, i := range rest {
			if k == except || rank(endpoints[i], loads[i]) != best {
				continue
			}
			// Of a weighted stream, keep each with probability weight/total so far.
			w := uint64(max(1, endpoints[i].Weight))
			if total += w; rnd.below(total) < w {
				drawn = k
			}
		}
		return drawn
	}
	a := draw(-1)
	b := draw(a)
	if b >= 0 && better(loads[rest[b]], loads[rest[a]]) {
		return b
	}
	return a
}

// rank orders by breaker, then priority.
func rank(e policy.Endpoint, l inference.Load) uint64 {
	r := uint64(e.Priority)
	if l.Open {
		r |= 1 << 40
	}
	return r
}

// better compares two endpoints by expected wait. One that was never measured and has
// nothing to do is tried, so that it gets measured; while it is, only the load counts,
// or everything would go there until its first answer.
func better(a, b inference.Load) bool {
	switch {
	case a.Cost > 0 && b.Cost > 0:
		return a.Cost < b.Cost
	case a.Latency > 0 && b.Latency > 0:
		return a.Latency*time.Duration(a.InFlight+1) < b.Latency*time.Duration(b.InFlight+1)
	case a.Latency > 0 && b.InFlight == 0, b.Latency > 0 && a.InFlight == 0:
		return a.Latency == 0
	}
	return a.InFlight < b.InFlight
}

// random is a splitmix64 sequence: one fresh seed per request gives as many draws as are
// needed.
type random uint64

// below returns a number in [0, n), for n far below 2⁶⁴.
func (r *random) below(n uint64) uint64 {
	*r += 0x9e3779b97f4a7c15
	z := uint64(*r)
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return (z ^ z>>31) % n
}
