package monitor

import (
	"cmp"
	"slices"
	"strings"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// Totals are the sums of some outcomes.
type Totals struct {
	Requests, Failures, Cancelled, Attempts uint64 // logical requests; attempts upstream
	TokensIn, TokensOut                     uint64
	LatencySum                              float64 // milliseconds of all requests together
	// Quantiles in milliseconds, within 1 %; 0 without data.
	P50, P95, P99    float64 // whole request
	TTFTP50, TTFTP99 float64 // time to first token
}

// PB returns the form of the admin API.
func (t Totals) PB() *pb.VersionStats {
	out := &pb.VersionStats{Requests: t.Requests, Failures: t.Failures, Cancelled: t.Cancelled,
		P50Ms: t.P50, P95Ms: t.P95, P99Ms: t.P99, TokensIn: t.TokensIn, TokensOut: t.TokensOut, TtftP50Ms: t.TTFTP50, TtftP99Ms: t.TTFTP99}
	if t.Requests > 0 {
		out.MeanMs = t.LatencySum / float64(t.Requests)
	}
	if ended := t.Requests - min(t.Requests, t.Cancelled); ended > 0 {
		out.SuccessRate = 1 - float64(min(t.Failures, ended))/float64(ended)
	}
	return out
}

// Stats are the totals since this replica started and over the last Window: of requests
// that callers got answers to, and of copies that nobody waits for.
type Stats struct {
	Lifetime, Window             Totals
	ShadowLifetime, ShadowWindow Totals
}

// CellStats are the stats of one cell.
type CellStats struct {
	Model, Version, Region string
	WeightEpoch            uint64
	Shadow                 bool   // copies of requests, which callers do not see
	Assigned               bool   // false: requests without a unit, or moved by a fallback; no evidence
	FailedUnits            uint64 // distinct within each minute, since the start
	Stats
}

// totals are Totals that can still be added to. The quantile fields of the embedded
// Totals are filled by snapshot only.
type totals struct {
	Totals
	units         uint64 // distinct units with a failure
	latency, ttft sketch
	counts        experiments.Moments // CostNames, report by report
}

func totalsOf(o outcome) totals {
	d := o.delta
	t := totals{Totals: Totals{
		Requests: d.GetRequests(), Failures: d.GetFailures(), Cancelled: d.GetCancelled(), Attempts: d.GetAttempts(),
		TokensIn: d.GetTokensIn(), TokensOut: d.GetTokensOut(), LatencySum: d.GetLatencySumMs()}, latency: o.latency, ttft: o.ttft}
	if t.Requests == 0 {
		return t
	}
	if err := t.counts.Add(t.quantities()); err != nil {
		panic(err) // only for counts that check refuses
	}
	return t
}

// mergeCounts adds from to to, which it makes its own. from is not modified.
func mergeCounts(to, from *experiments.Moments) {
	if err := to.Merge(from); err != nil {
		panic(err) // only for another number of quantities
	}
}

func (t *totals) add(o *totals) {
	t.Requests += o.Requests
	t.Failures += o.Failures
	t.Cancelled += o.Cancelled
	t.Attempts += o.Attempts
	t.TokensIn += o.TokensIn
	t.TokensOut += o.TokensOut
	t.LatencySum += o.LatencySum
	t.units += o.units
	merge(&t.latency, o.latency)
	merge(&t.ttft, o.ttft)
	mergeCounts(&t.counts, &o.counts)
}

func (t *totals) snapshot() Totals {
	out := t.Totals
	out.P50, out.P95, out.P99 = quantile(t.latency, .5), quantile(t.latency, .95), quantile(t.latency, .99)
	out.TTFTP50, out.TTFTP99 = quantile(t.ttft, .5), quantile(t.ttft, .99)
	return out
}

// The window is a ring of slots, so it covers between 50 and 60 seconds.
const (
	slots       = 6
	slotSeconds = 10
)

// Window is the span that Stats.Window covers at most; it is between 50 and 60 seconds.
const Window = slots * slotSeconds * time.Second

type window struct {
	slot [slots]totals
	of   [slots]int64 // which ten seconds since 1970 the slot holds
}

func (w *window) add(o *totals, now time.Time) {
	n := now.Unix() / slotSeconds
	i := int(n % slots)
	if w.of[i] != n {
		w.slot[i], w.of[i] = totals{}, n
	}
	w.slot[i].add(o)
}

// addTo adds the slots that are still within the window to sum.
func (w *window) addTo(sum *totals, now time.Time) {
	n := now.Unix() / slotSeconds
	for i := range w.slot {
		if w.of[i] > n-slots {
			sum.add(&w.slot[i])
		}
	}
}

// nodeCache sums the cache deltas of one node.
type nodeCache struct {
	hits          [3]uint64 // process, node, origin
	stale, errors uint64
	lag           sketch
	seen          time.Time
}

func (n *nodeCache) add(d *pb.CacheDelta, lag sketch, now time.Time) {
	n.hits[0] += d.GetHitsProcess()
	n.hits[1] += d.GetHitsNode()
	n.hits[2] += d.GetHitsOrigin()
	n.stale += d.GetStaleServed()
	n.errors += d.GetErrors()
	merge(&n.lag, lag)
	n.seen = now
}

func (n *nodeCache) status() *pb.CacheStatus {
	return &pb.CacheStatus{HitsProcess: n.hits[0], HitsNode: n.hits[1], HitsOrigin: n.hits[2], StaleServed: n.stale,
		InvalidationLagP50Ms: quantile(n.lag, .5), InvalidationLagP99Ms: quantile(n.lag, .99)}
}

// node finds or makes the cache sums of a node; nil without an id or room.
func (c *counts) node(id string, now time.Time) *nodeCache {
	if id == "" || len(id) > 256 {
		return nil
	}
	if n := c.nodes[id]; n != nil {
		return n
	}
	if len(c.nodes) >= c.opts.MaxReporters {
		for name, n := range c.nodes {
			if now.Sub(n.seen) >= reporterIdle {
				delete(c.nodes, name)
			}
		}
	}
	if len(c.nodes) >= c.opts.MaxReporters {
		return nil
	}
	n := &nodeCache{}
	c.nodes[id] = n
	return n
}

// VersionStats sums over the regions and weight epochs of one version. An unknown
// version has zero stats.
func (m *Monitor) VersionStats(model, version string) Stats {
	now := m.opts.Now()
	c := m.counts
	c.mu.Lock()
	defer c.mu.Unlock()
	var life, recent, shadowLife, shadowRecent totals
	if t := c.gone[versionKey{model, version, false}]; t != nil {
		life.add(t)
	}
	if t := c.gone[versionKey{model, version, true}]; t != nil {
		shadowLife.add(t)
	}
	for k, t := range c.cells {
		if k.model != model || k.version != version {
			continue
		}
		if k.shadow {
			shadowLife.add(&t.lifetime)
			t.window.addTo(&shadowRecent, now)
			continue
		}
		life.add(&t.lifetime)
		t.window.addTo(&recent, now)
	}
	return Stats{life.snapshot(), recent.snapshot(), shadowLife.snapshot(), shadowRecent.snapshot()}
}

// Cells returns the stats of every cell, sorted by model, version, region and epoch,
// assigned before unassigned.
func (m *Monitor) Cells() []CellStats {
	now := m.opts.Now()
	c := m.counts
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]CellStats, 0, len(c.cells))
	for k, t := range c.cells {
		var recent totals
		t.window.addTo(&recent, now)
		out = append(out, CellStats{Model: k.model, Version: k.version, Region: k.region, WeightEpoch: k.epoch,
			Shadow: k.shadow, Assigned: k.assigned, FailedUnits: t.failed, Stats: Stats{Lifetime: t.lifetime.snapshot(), Window: recent.snapshot()}})
	}
	slices.SortFunc(out, func(a, b CellStats) int {
		for _, d := range []int{strings.Compare(a.Model, b.Model), strings.Compare(a.Version, b.Version), strings.Compare(a.Region, b.Region)} {
			if d != 0 {
				return d
			}
		}
		if d := cmp.Compare(a.WeightEpoch, b.WeightEpoch); d != 0 || a.Assigned == b.Assigned {
			return d
		}
		if a.Assigned {
			return -1
		}
		return 1
	})
	return out
}

// CacheStats sums over all nodes since this replica started.
func (m *Monitor) CacheStats() *pb.CacheStatus {
	m.counts.mu.Lock()
	defer m.counts.mu.Unlock()
	return m.counts.caches.status()
}

// NodeCacheStats returns the cache sums of each node by node id.
func (m *Monitor) NodeCacheStats() map[string]*pb.CacheStatus {
	m.counts.mu.Lock()
	defer m.counts.mu.Unlock()
	out := make(map[string]*pb.CacheStatus, len(m.counts.nodes))
	for id, n := range m.counts.nodes {
		out[id] = n.status()
	}
	return out
}

// NodeSeen is a reporter and when it was last heard.
type NodeSeen struct {
	Reporter string
	Node     *pb.Node // read-only; nil if it never said
	At       time.Time
	Sequence uint64 // of its last delta
}

// NodesSeen returns every remembered reporter, sorted by name.
func (m *Monitor) NodesSeen() []NodeSeen {
	m.counts.mu.Lock()
	defer m.counts.mu.Unlock()
	out := make([]NodeSeen, 0, len(m.counts.reporters))
	for id, r := range m.counts.reporters {
		out = append(out, NodeSeen{Reporter: id, Node: r.node, At: r.seen, Sequence: r.last})
	}
	slices.SortFunc(out, func(a, b NodeSeen) int { return strings.Compare(a.Reporter, b.Reporter) })
	return out
}
