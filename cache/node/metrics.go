package node

import (
	"context"
	"sync"

	"github.com/DataDog/sketches-go/ddsketch"
	"go.opentelemetry.io/otel/metric"

	"github.com/outrigger-mesh/outrigger/cache/coherence"
	"github.com/outrigger-mesh/outrigger/cache/shm"
)

// Stats is a snapshot of what an Agent did since New.
type Stats struct {
	coherence.Stats
	Table  shm.Stats // of all tables together; Generation and WriteSealed of one
	Tables int       // there are

	Stale map[string]uint64 // entries found outdated, by age

	FeedUp      bool   // a feed stream is delivering
	LeaseLive   bool   // the table may be served now
	Streams     uint64 // feed streams opened
	Region      string // of the feed
	Incarnation uint64 // of the log followed, 0 = none yet
	Applied     uint64 // feed position applied
	Sidecars    int    // processes attached to tables
	Denied      uint64 // calls and attachments refused to processes by Options.Access

	// Lag is the time in seconds from the commit of a change, by the origin's wall clock,
	// to the moment the table shows it: a DDSketch with 1 % relative error, and the
	// receiver's own copy.
	Lag *ddsketch.DDSketch
}

// Stats returns a snapshot.
func (a *Agent) Stats() Stats {
	a.mu.Lock()
	s := Stats{Stats: a.state.Stats(), LeaseLive: a.state.Fresh(a.o.Clock())}
	s.Region, s.Incarnation, s.Applied = a.state.Position()
	a.mu.Unlock()
	s.FeedUp, s.Streams = a.feedUp.Load(), a.streams.Load()
	for i, t := range a.tables.Load().list {
		st := t.w.Stats()
		if i == 0 {
			s.Table = st
		} else {
			s.Table.Entries += st.Entries
			s.Table.LiveBytes += st.LiveBytes
			s.Table.ArenaBytes += st.ArenaBytes
			s.Table.TotalBytes += st.TotalBytes
			s.Table.Slots += st.Slots
			s.Table.Evictions += st.Evictions
			s.Table.Relocations += st.Relocations
		}
		s.Tables++
	}
	s.Table.Evictions += a.evicted.Load()
	if a.o.Access != nil {
		s.Denied = a.o.Access.denied.Load()
	}
	s.Sidecars, s.Lag, s.Stale = a.readers.count(), a.lag.copy(), a.fresh.counts()
	return s
}

// lagSketch is a DDSketch for several goroutines.
type lagSketch struct {
	mu     sync.Mutex
	s      *ddsketch.DDSketch // since New, seconds
	recent *ddsketch.DDSketch // since the last report, milliseconds; nil = none
}

func newLagSketch() (*lagSketch, error) {
	s, err := ddsketch.LogCollapsingLowestDenseDDSketch(0.01, 2048)
	return &lagSketch{s: s}, err
}

func (l *lagSketch) add(seconds float64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	// It refuses only negative and non-finite values, which callers exclude.
	_ = l.s.Add(seconds)
	if l.recent == nil {
		// The parameters are those of s, which were accepted.
		l.recent, _ = ddsketch.LogCollapsingLowestDenseDDSketch(0.01, 2048)
	}
	_ = l.recent.Add(max(seconds*millis, 1e-6)) // reports carry no zeros
}

func (l *lagSketch) copy() *ddsketch.DDSketch {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.s.Copy()
}

// metrics are the agent's instruments.
type metrics struct {
	lag          metric.Float64Histogram
	stale        metric.Int64Counter
	registration metric.Registration
}

func newMetrics(m metric.Meter, a *Agent) (metrics, error) {
	lag, err := m.Float64Histogram("outrigger.cache.invalidation.lag", metric.WithUnit("s"),
		metric.WithDescription("Time from the commit of a change to the store that makes the node's table show it."),
		metric.WithExplicitBucketBoundaries(.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 5))
	if err != nil {
		return metrics{}, err
	}
	stale, err := m.Int64Counter("outrigger.cache.stale_total", metric.WithUnit("{entry}"),
		metric.WithDescription("Entries served as current that the origin had changed, by how long ago it had (age)."))
	if err != nil {
		return metrics{}, err
	}
	counters := []struct {
		name, unit, help string
		of               func(Stats) uint64
	}{
		{"outrigger.cache.fills", "{fetch}", "Fetches from the origin, retries included.", func(s Stats) uint64 { return s.Fetches }},
		{"outrigger.cache.joined", "{read}", "Reads that waited for another read's fetch: stampedes avoided.", func(s Stats) uint64 { return s.Joined }},
		{"outrigger.cache.refused", "{fill}", "Answers of the origin below the floor, asked for again.", func(s Stats) uint64 { return s.Refused }},
		{"outrigger.cache.changes", "{change}", "Changes applied from the feed.", func(s Stats) uint64 { return s.Changes }},
		{"outrigger.cache.gaps", "{gap}", "Gaps seen in the feed.", func(s Stats) uint64 { return s.Gaps }},
		{"outrigger.cache.resyncs", "{flush}", "Times the whole table was dropped.", func(s Stats) uint64 { return s.Flushes }},
		{"outrigger.cache.checked", "{entry}", "Entries the freshness monitor compared with the origin.", func(s Stats) uint64 { return s.Checked }},
		{"outrigger.cache.repairs", "{entry}", "Entries that differed from the origin although nothing was missing.", func(s Stats) uint64 { return s.Repaired }},
		{"outrigger.cache.evictions", "{entry}", "Entries the table dropped for room.", func(s Stats) uint64 { return s.Table.Evictions }},
		{"outrigger.cache.denied", "{call}", "Calls and attachments refused because of the caller's user.", func(s Stats) uint64 { return s.Denied }},
	}
	var instruments []metric.Observable
	var observe []func(metric.Observer, Stats)
	for _, c := range counters {
		i, err := m.Int64ObservableCounter(c.name, metric.WithUnit(c.unit), metric.WithDescription(c.help))
		if err != nil {
			return metrics{}, err
		}
		instruments = append(instruments, i)
		observe = append(observe, func(o metric.Observer, s Stats) { o.ObserveInt64(i, int64(c.of(s))) })
	}
	r, err := m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		s := a.Stats()
		for _, f := range observe {
			f(o, s)
		}
		return nil
	}, instruments...)
	return metrics{lag: lag, stale: stale, registration: r}, err
}

func (m metrics) close() {
	if m.registration != nil {
		// It fails only for a registration of another SDK.
		_ = m.registration.Unregister()
	}
}
