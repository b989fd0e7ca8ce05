package telemetry

import (
	"context"
	"math"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/embedded"
	"go.opentelemetry.io/otel/sdk/instrumentation"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/trace"
)

// Histograms with explicit boundaries are kept here and not by the SDK, which looks
// through all attributes of every measurement (0.8 µs for the nine of a model call, of
// which there are three). What they report is the same, exemplars of sampled traces
// included. A caller that measures one attribute set again and again binds it:
//
//	if b, ok := histogram.(interface{ Bind(attribute.Set) func(float64) }); ok {
//		observe := b.Bind(set) // keep; observe(v) costs some 20 ns and does not allocate
//	}
//
// The function may be called by any number of goroutines.

// maxSeries bounds the attribute sets of one histogram; what exceeds it is counted in one
// series that says otel.metric.overflow, as in the SDK.
const maxSeries = 2000

// meter is an SDK's meter but for its histograms.
type meter struct {
	metric.Meter
	all   *histograms
	scope string
}

// Float64Histogram implements metric.Meter.
func (m meter) Float64Histogram(name string, options ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	c := metric.NewFloat64HistogramConfig(options...)
	if len(c.ExplicitBucketBoundaries()) == 0 {
		return m.Meter.Float64Histogram(name, options...)
	}
	if _, err := m.Meter.Float64Histogram(name, options...); err != nil { // its rules for names hold; it reports nothing unless recorded to
		return nil, err
	}
	return instrument(m, &float64Histogram{histogram: newHistogram[float64](name, c.Description(), c.Unit(), c.ExplicitBucketBoundaries())}, name), nil
}

// Int64Histogram implements metric.Meter.
func (m meter) Int64Histogram(name string, options ...metric.Int64HistogramOption) (metric.Int64Histogram, error) {
	c := metric.NewInt64HistogramConfig(options...)
	if len(c.ExplicitBucketBoundaries()) == 0 {
		return m.Meter.Int64Histogram(name, options...)
	}
	if _, err := m.Meter.Int64Histogram(name, options...); err != nil {
		return nil, err
	}
	return instrument(m, &int64Histogram{histogram: newHistogram[int64](name, c.Description(), c.Unit(), c.ExplicitBucketBoundaries())}, name), nil
}

// histograms are those of a process; it is a Producer for the SDK's reader.
type histograms struct {
	start time.Time
	mu    sync.Mutex
	of    map[instrumentName]collector
	order []instrumentName
}

type instrumentName struct{ scope, name string }

type collector interface {
	collect(start, now time.Time) (metricdata.Metrics, bool)
}

// instrument registers h, or returns what has its name already.
func instrument[H collector](m meter, h H, name string) H {
	m.all.mu.Lock()
	defer m.all.mu.Unlock()
	n := instrumentName{m.scope, name}
	if old, ok := m.all.of[n].(H); ok {
		return old
	}
	m.all.of[n] = h
	m.all.order = append(m.all.order, n)
	return h
}

// Produce implements the SDK's metric.Producer.
func (a *histograms) Produce(context.Context) ([]metricdata.ScopeMetrics, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	var out []metricdata.ScopeMetrics
	for _, n := range a.order {
		m, ok := a.of[n].collect(a.start, now)
		if !ok {
			continue
		}
		if len(out) == 0 || out[len(out)-1].Scope.Name != n.scope {
			out = append(out, metricdata.ScopeMetrics{Scope: instrumentation.Scope{Name: n.scope}})
		}
		last := &out[len(out)-1]
		last.Metrics = append(last.Metrics, m)
	}
	return out, nil
}

// histogram is one instrument.
type histogram[N int64 | float64] struct {
	name, description, unit string
	bounds                  []float64

	mu     sync.RWMutex // of the map; held for lookups only
	series map[attribute.Distinct]*series[N]
}

func newHistogram[N int64 | float64](name, description, unit string, bounds []float64) *histogram[N] {
	return &histogram[N]{name: name, description: description, unit: unit, bounds: bounds, series: map[attribute.Distinct]*series[N]{}}
}

// series is one attribute set. Its parts are read one by one, so a collection may see of a
// measurement under way one and not the other.
type series[N int64 | float64] struct {
	set       attribute.Set
	bounds    []float64
	sum       atomic.Uint64 // bits of a float64
	counts    []atomic.Uint64
	exemplars []atomic.Pointer[metricdata.Exemplar[N]] // the last of each bucket
}

// observe counts v and returns its bucket.
func (s *series[N]) observe(v N) int {
	i := sort.SearchFloat64s(s.bounds, float64(v))
	s.counts[i].Add(1)
	for {
		old := s.sum.Load()
		if s.sum.CompareAndSwap(old, math.Float64bits(math.Float64frombits(old)+float64(v))) {
			return i
		}
	}
}

// Bind returns a function that records under set, with which nothing is looked up.
func (h *histogram[N]) Bind(set attribute.Set) func(N) {
	s := h.at(set)
	return func(v N) { s.observe(v) }
}

// record is Record of the two kinds of instrument. A sampled trace becomes an exemplar.
func (h *histogram[N]) record(ctx context.Context, v N, set attribute.Set) {
	s := h.at(set)
	i := s.observe(v)
	if c := trace.SpanContextFromContext(ctx); c.IsSampled() {
		t, p := c.TraceID(), c.SpanID()
		s.exemplars[i].Store(&metricdata.Exemplar[N]{Time: time.Now(), Value: v, TraceID: t[:], SpanID: p[:]})
	}
}

// at returns the series of set, or that of all sets there was no room for.
func (h *histogram[N]) at(set attribute.Set) *series[N] {
	h.mu.RLock()
	s := h.series[set.Equivalent()]
	full := len(h.series) >= maxSeries
	h.mu.RUnlock()
	if s != nil {
		return s
	}
	if full {
		set = attribute.NewSet(attribute.Bool("otel.metric.overflow", true))
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if s = h.series[set.Equivalent()]; s == nil {
		n := len(h.bounds) + 1
		s = &series[N]{set: set, bounds: h.bounds, counts: make([]atomic.Uint64, n), exemplars: make([]atomic.Pointer[metricdata.Exemplar[N]], n)}
		h.series[set.Equivalent()] = s
	}
	return s
}

// collect implements collector; false if nothing was recorded.
func (h *histogram[N]) collect(start, now time.Time) (metricdata.Metrics, bool) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	data := metricdata.Histogram[N]{Temporality: metricdata.CumulativeTemporality}
	for _, s := range h.series {
		p := metricdata.HistogramDataPoint[N]{Attributes: s.set, StartTime: start, Time: now, Bounds: slices.Clone(h.bounds),
			Sum: N(math.Float64frombits(s.sum.Load()))}
		for i := range s.counts {
			n := s.counts[i].Load()
			p.Count += n
			p.BucketCounts = append(p.BucketCounts, n)
			if e := s.exemplars[i].Load(); e != nil {
				p.Exemplars = append(p.Exemplars, *e)
			}
		}
		data.DataPoints = append(data.DataPoints, p)
	}
	return metricdata.Metrics{Name: h.name, Description: h.description, Unit: h.unit, Data: data}, len(h.series) > 0
}

type float64Histogram struct {
	*histogram[float64]
	embedded.Float64Histogram
}

// Record implements metric.Float64Histogram.
func (h *float64Histogram) Record(ctx context.Context, v float64, options ...metric.RecordOption) {
	c := metric.NewRecordConfig(options)
	h.record(ctx, v, c.Attributes())
}

// Enabled implements metric.Float64Histogram.
func (h *float64Histogram) Enabled(context.Context) bool { return true }

type int64Histogram struct {
	*histogram[int64]
	embedded.Int64Histogram
}

// Record implements metric.Int64Histogram.
func (h *int64Histogram) Record(ctx context.Context, v int64, options ...metric.RecordOption) {
	c := metric.NewRecordConfig(options)
	h.record(ctx, v, c.Attributes())
}

// Enabled implements metric.Int64Histogram.
func (h *int64Histogram) Enabled(context.Context) bool { return true }
