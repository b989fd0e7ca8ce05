package inference

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/sony/gobreaker/v2"

	"github.com/outrigger-mesh/outrigger/proxy/inference/balance"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Load is what this sidecar has seen of one endpoint.
type Load struct {
	Latency  time.Duration // moving average of the time to a response head; 0 = not measured
	InFlight int
	Open     bool // its breaker refuses requests now, or it is ejected as an outlier
	// Cost is the expected wait in seconds, by a peak-sensitive average of latency and what
	// is in flight (package balance): comparable between endpoints, nothing more.
	Cost float64
}

// OrderInfo is what an ordering may consider besides the endpoints.
type OrderInfo struct {
	Region  string          // of this sidecar
	Regions []policy.Region // from the policy; must not be modified
	Load    func(i int) Load
	Rand    uint64 // fresh per request
}

// OrderFunc returns the endpoints of one version in the order to try them. endpoints
// must not be modified; the result may leave some out, and what is not among them is
// ignored. It is called concurrently, once per logical request with more than one
// endpoint.
type OrderFunc func(endpoints []policy.Endpoint, info OrderInfo) []policy.Endpoint

// order returns the targets of a version in the order to try.
func (h *Handler) order(p *policy.Policy, vp *versionPlan, sequence string) []*target {
	if len(vp.targets) <= 1 || sequence != "" {
		return h.arrange(p, vp, sequence, time.Time{})
	}
	now := h.now()
	vp.eject(now, h.log)
	return h.arrange(p, vp, sequence, now)
}

// arrange is order without the look for outliers: it changes nothing. now matters only where
// loads do, among several endpoints and without a sequence.
func (h *Handler) arrange(p *policy.Policy, vp *versionPlan, sequence string, now time.Time) []*target {
	if len(vp.targets) <= 1 {
		return vp.targets
	}
	if sequence != "" {
		return stickyOrder(vp.targets, h.o.Region, p.Regions, sequence)
	}
	seed := rand.Uint64()
	if h.o.Order == nil {
		return defaultOrder(vp.targets, h.o.Region, p.Regions, seed, now)
	}
	got := h.o.Order(vp.endpoints, OrderInfo{Region: h.o.Region, Regions: p.Regions, Rand: seed, Load: func(i int) Load {
		t := vp.targets[i]
		return Load{Latency: time.Duration(t.latency() * float64(time.Second)), InFlight: int(t.inflight.Load()), Open: t.breaker.State() == gobreaker.StateOpen || t.out(now.UnixNano()), Cost: t.cost(now)}
	}})
	out := make([]*target, 0, len(got))
	for i := range got {
		for j := range vp.endpoints {
			if vp.endpoints[j] == got[i] {
				out = append(out, vp.targets[j])
				break
			}
		}
	}
	return out
}

// defaultOrder puts the local region first, then healthy regions, then the others;
// within them by priority; and within a priority by repeated weighted power of two
// choices on balance.Cost. Ejected endpoints come last.
func defaultOrder(targets []*target, local string, regions []policy.Region, seed uint64, now time.Time) []*target {
	rnd, at := rand.New(rand.NewPCG(seed, 0x9e3779b97f4a7c15)), now.UnixNano()
	rankOf := func(t *target) groupRank {
		g := groupOf(t, local, regions)
		if t.out(at) {
			g.distance += 3 // tried when nothing else is left
		}
		return g
	}
	out := append(make([]*target, 0, len(targets)), targets...)
	for done := 0; done < len(out); done++ {
		// Gather the best remaining group at out[done:group].
		best := rankOf(out[done])
		for _, t := range out[done+1:] {
			if g := rankOf(t); g.less(best) {
				best = g
			}
		}
		group := done
		for i := done; i < len(out); i++ {
			if rankOf(out[i]) == best {
				out[group], out[i] = out[i], out[group]
				group++
			}
		}
		pick := done + choose(out[done:group], rnd, now)
		out[done], out[pick] = out[pick], out[done]
	}
	return out
}

// stickyOrder gives requests of one sequence the same endpoint whatever the load, and the
// same next one when it is lost: groups as in defaultOrder, within them by highest random
// weight (Thaler and Ravishankar, 1998). A sequence is state that one server keeps.
func stickyOrder(targets []*target, local string, regions []policy.Region, sequence string) []*target {
	out := append(make([]*target, 0, len(targets)), targets...)
	weight := func(t *target) uint64 { return xxhash.Sum64String(sequence + "\x00" + t.key.address) }
	slices.SortFunc(out, func(a, b *target) int {
		ga, gb := groupOf(a, local, regions), groupOf(b, local, regions)
		return cmp.Or(cmp.Compare(ga.distance, gb.distance), cmp.Compare(ga.priority, gb.priority), cmp.Compare(weight(b), weight(a)))
	})
	return out
}

type groupRank struct {
	distance int // 0 local, 1 healthy, 2 unhealthy
	priority uint32
}

func (a groupRank) less(b groupRank) bool {
	return a.distance < b.distance || a.distance == b.distance && a.priority < b.priority
}

func groupOf(t *target, local string, regions []policy.Region) groupRank {
	g := groupRank{distance: 1, priority: t.endpoint.Priority}
	if t.endpoint.Region == local {
		g.distance = 0
		return g
	}
	for i := range regions {
		if regions[i].Name == t.endpoint.Region && !regions[i].Healthy {
			g.distance = 2
		}
	}
	return g
}

// choose draws two of ts by weight and returns the index of the less loaded.
func choose(ts []*target, rnd *rand.Rand, now time.Time) int {
	if len(ts) == 1 {
		return 0
	}
	i := weighted(ts, rnd, -1)
	j := weighted(ts, rnd, i)
	if ts[j].cost(now) < ts[i].cost(now) {
		return j
	}
	return i
}

func weighted(ts []*target, rnd *rand.Rand, except int) int {
	var total uint64
	for i, t := range ts {
		if i != except {
			total += uint64(max(t.endpoint.Weight, 1))
		}
	}
	n := rnd.Uint64N(total)
	for i, t := range ts {
		if i == except {
			continue
		}
		w := uint64(max(t.endpoint.Weight, 1))
		if n < w {
			return i
		}
		n -= w
	}
	return 0
}

func (t *target) cost(now time.Time) float64 {
	return balance.Cost(balance.Peak(t.peak.Load()), t.inflight.Load(), now)
}
