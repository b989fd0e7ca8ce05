package otlp

import (
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"math"
	"slices"
	"strconv"
	"time"

	common "go.opentelemetry.io/proto/otlp/common/v1"
	metrics "go.opentelemetry.io/proto/otlp/metrics/v1"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// shape is what a metric's points are.
type shape int

const (
	shapeGauge shape = iota
	shapeSum
	shapeHistogram
)

// stream is one instrument of one resource.
type stream struct {
	resource    []pair
	scope, name string
	shape       shape
	temporality metrics.AggregationTemporality
	monotonic   bool
}

// point is a data point of any type.
type point struct {
	attributes []*common.KeyValue
	start, at  uint64 // Unix nanoseconds
	flags      uint32
	n          uint64
	sum        *float64
}

// fits says whether points of this shape can tell anything about a metric of that kind.
func (s stream) fits(kind experiments.MetricKind, p point) error {
	switch {
	case p.sum == nil:
		return outrigger.Errorf(outrigger.Invalid, "the point has no sum")
	case math.IsNaN(*p.sum) || math.IsInf(*p.sum, 0):
		return outrigger.Errorf(outrigger.Invalid, "the value is %v", *p.sum)
	case p.at == 0:
		return outrigger.Errorf(outrigger.Invalid, "the point has no time")
	case s.shape == shapeSum && kind == experiments.KindRatio:
		return outrigger.Errorf(outrigger.Invalid, "the metric is a ratio and a sum does not say of how many values; report a histogram or a gauge")
	case s.shape == shapeGauge && kind != experiments.KindRatio:
		return outrigger.Errorf(outrigger.Invalid, "the metric is a %s and values of a gauge cannot be added up; report a sum or a histogram", kind)
	case s.shape != shapeGauge && s.temporality != metrics.AggregationTemporality_AGGREGATION_TEMPORALITY_DELTA &&
		s.temporality != metrics.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE:
		return outrigger.Errorf(outrigger.Invalid, "the temporality is unspecified; it is delta or cumulative")
	}
	return nil
}

type seriesKey [16]byte

// series is what was seen last.
type series struct {
	start, at uint64
	n         uint64
	sum       float64
	seen      time.Time
}

// count finds what a point adds to its series, counts that, and moves the series.
func (r *Receiver) count(k seriesKey, s stream, p point, t Target, o Observation, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.series[k]
	if was != nil && p.at <= was.at && p.start <= was.start {
		was.seen = now
		return nil // a repetition, or one that was overtaken
	}
	if was == nil && len(r.series) >= r.o.MaxSeries && !r.sweep(now) {
		return outrigger.Errorf(outrigger.Exhausted, "there are %d series, the limit is %d; use fewer attributes", len(r.series), r.o.MaxSeries)
	}
	next := series{start: p.start, at: p.at, n: p.n, sum: *p.sum, seen: now}
	known := true // whether what the point adds is known
	o.N, o.Sum = p.n, *p.sum
	if s.shape != shapeGauge && s.temporality == metrics.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE {
		switch {
		case was == nil:
			known = p.start != 0 && int64(p.start) >= t.Start.UnixNano()
		case !s.reset(was, p):
			o.N, o.Sum = p.n-was.n, *p.sum-was.sum
		}
	}
	if known && (o.N > 0 || o.Sum != 0) {
		if err := r.o.Sink.Observe(o, now); err != nil {
			return err
		}
	}
	r.series[k] = &next
	return nil
}

// reset says whether a cumulative series began again.
func (s stream) reset(was *series, p point) bool {
	return p.start > was.start || p.n < was.n || s.shape == shapeSum && s.monotonic && *p.sum < was.sum
}

// sweep makes room; it looks at all series at most once a minute.
func (r *Receiver) sweep(now time.Time) bool {
	if now.Sub(r.swept) < time.Minute {
		return false
	}
	r.swept = now
	for k, s := range r.series {
		if now.Sub(s.seen) > idle {
			delete(r.series, k)
		}
	}
	return len(r.series) < r.o.MaxSeries
}

// pair is an attribute with its value as text.
type pair struct{ key, value string }

type pairs []pair

// attributes returns the scalar attributes by key; of one given twice the last counts.
func attributes(in []*common.KeyValue) pairs {
	out := make(pairs, 0, len(in))
	for _, a := range in {
		out = append(out, pair{a.GetKey(), text(a.GetValue())})
	}
	slices.SortStableFunc(out, func(a, b pair) int { return cmp.Compare(a.key, b.key) })
	return out
}

func text(v *common.AnyValue) string {
	switch v := v.GetValue().(type) {
	case *common.AnyValue_StringValue:
		return v.StringValue
	case *common.AnyValue_IntValue:
		return strconv.FormatInt(v.IntValue, 10)
	case *common.AnyValue_BoolValue:
		return strconv.FormatBool(v.BoolValue)
	case *common.AnyValue_DoubleValue:
		return strconv.FormatFloat(v.DoubleValue, 'g', -1, 64)
	case *common.AnyValue_BytesValue:
		return base64.StdEncoding.EncodeToString(v.BytesValue)
	}
	return v.String() // lists and maps only tell series apart
}

// merge is the resource's attributes with the point's over them.
func merge(resource, own pairs) pairs {
	out := slices.Concat(own, resource)
	slices.SortStableFunc(out, func(a, b pair) int { return cmp.Compare(a.key, b.key) })
	return slices.CompactFunc(out, func(a, b pair) bool { return a.key == b.key })
}

func (ps pairs) get(key string) string {
	i, ok := slices.BinarySearchFunc(ps, key, func(p pair, k string) int { return cmp.Compare(p.key, k) })
	if !ok {
		return ""
	}
	return ps[i].value
}

func (ps pairs) first(keys ...string) string {
	for _, k := range keys {
		if v := ps.get(k); v != "" {
			return v
		}
	}
	return ""
}

// key tells series apart: resource, scope, instrument and attributes.
func (s stream) key(labels pairs) (k seriesKey) {
	var buf []byte
	put := func(t string) {
		buf = binary.AppendUvarint(buf, uint64(len(t)))
		buf = append(buf, t...)
	}
	put(s.scope)
	put(s.name)
	buf = append(buf, byte(s.shape), byte(s.temporality))
	for _, p := range labels {
		put(p.key)
		put(p.value)
	}
	sum := sha256.Sum256(buf)
	copy(k[:], sum[:])
	return k
}
