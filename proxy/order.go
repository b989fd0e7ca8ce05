package proxy

import (
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/region"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// orderByRegion is the order in which a version's endpoints are tried: regions as
// package region ranks them (health, distance, and the latency this sidecar measured to
// the region's own endpoints), and within a region priority, closed breakers first,
// then the less loaded of two.
func orderByRegion(endpoints []policy.Endpoint, info inference.OrderInfo) []policy.Endpoint {
	byRegion := map[string][]int{}
	for i, e := range endpoints {
		byRegion[e.Region] = append(byRegion[e.Region], i)
	}
	from, candidates := candidatesOf(endpoints, byRegion, info)
	out := make([]policy.Endpoint, 0, len(endpoints))
	for _, c := range region.Order(from, candidates) {
		for _, i := range orderWithin(endpoints, byRegion[c.Name], info) {
			out = append(out, endpoints[i])
		}
	}
	return out
}

// candidatesOf describes the regions that have endpoints; an unknown region is healthy
// and nowhere.
func candidatesOf(endpoints []policy.Endpoint, byRegion map[string][]int, info inference.OrderInfo) (region.Location, []region.Candidate) {
	var from region.Location
	known := map[string]policy.Region{}
	for _, r := range info.Regions {
		known[r.Name] = r
		if r.Name == info.Region {
			from = region.Location{Latitude: r.Latitude, Longitude: r.Longitude}
		}
	}
	var out []region.Candidate
	for _, e := range endpoints { // in policy order, so that the result is deterministic
		idx, left := byRegion[e.Region]
		if !left || len(out) > 0 && containsRegion(out, e.Region) {
			continue
		}
		c := region.Candidate{Name: e.Region, Local: e.Region == info.Region, Healthy: true}
		if r, ok := known[e.Region]; ok {
			c.Healthy, c.Location = r.Healthy, region.Location{Latitude: r.Latitude, Longitude: r.Longitude}
		}
		for _, i := range idx {
			if l := info.Load(i); l.Latency > 0 {
				c.RTT = c.RTT.Observe(float64(l.Latency) / float64(time.Millisecond))
			}
		}
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

// orderWithin sorts one region's endpoints: priority groups in order; in a group the
// first is the better of two picked at random (power of two choices over latency ×
// requests in flight), the rest follow; open breakers go last.
func orderWithin(endpoints []policy.Endpoint, idx []int, info inference.OrderInfo) []int {
	out := make([]int, 0, len(idx))
	rest := append([]int(nil), idx...)
	rnd := info.Rand
	for len(rest) > 0 {
		a := pick(endpoints, rest, &rnd)
		b := pick(endpoints, rest, &rnd)
		best := a
		if better(endpoints, info, rest[b], rest[a]) {
			best = b
		}
		// Whatever chance picked, nothing of a lower group or with an open breaker may
		// precede something better in those two respects.
		for i := range rest {
			if rank(endpoints, info, rest[i]) < rank(endpoints, info, rest[best]) {
				best = i
			}
		}
		out = append(out, rest[best])
		rest = append(rest[:best], rest[best+1:]...)
	}
	return out
}

// rank orders by breaker, then priority.
func rank(endpoints []policy.Endpoint, info inference.OrderInfo, i int) uint64 {
	r := uint64(endpoints[i].Priority)
	if info.Load(i).Open {
		r |= 1 << 40
	}
	return r
}

// better compares two endpoints by expected wait.
func better(_ []policy.Endpoint, info inference.OrderInfo, a, b int) bool {
	la, lb := info.Load(a), info.Load(b)
	return la.Latency*time.Duration(la.InFlight+1) < lb.Latency*time.Duration(lb.InFlight+1)
}

// pick returns an index into rest, in proportion to weight.
func pick(endpoints []policy.Endpoint, rest []int, rnd *uint64) int {
	var total uint64
	for _, i := range rest {
		total += uint64(max(1, endpoints[i].Weight))
	}
	// splitmix64 step: one fresh request seed gives as many draws as are needed.
	*rnd += 0x9e3779b97f4a7c15
	z := *rnd
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	z ^= z >> 31
	at := z % total
	for k, i := range rest {
		w := uint64(max(1, endpoints[i].Weight))
		if at < w {
			return k
		}
		at -= w
	}
	return len(rest) - 1
}
