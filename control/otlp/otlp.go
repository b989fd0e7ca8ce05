// Package otlp receives OpenTelemetry metrics and turns those that say which experiment
// they are about into evidence, so that any instrumented application can report accuracy,
// satisfaction or cost.
//
//	r := otlp.New(otlp.Options{Sink: trials})
//	colmetrics.RegisterMetricsServiceServer(grpcServer, r) // OTLP/gRPC
//	mux.Handle("POST /v1/metrics", r)                      // OTLP/HTTP, protobuf and JSON
//
// # Which points count
//
// A point, or its resource, has these attributes; the point's win:
//
//	experiment.id       the experiment. Points without it are taken and passed over
//	outrigger.unit      the unit, as the sidecar saw it; else user.id, enduser.id, session.id
//	experiment.variant  the arm, for points that have no unit
//
// The instrument's name is the metric's, as the experiment's plan names it. Values with a
// unit count for the arm that the unit was exposed to, whatever the variant says. Values
// without one are added up per arm and shown with the results, but they decide nothing:
// what is randomised is the unit, and sums over requests hide how units differ.
//
//	kind of metric      sum        gauge                        (exponential) histogram
//	ratio               refused    one value per new timestamp  count and sum
//	mean, proportion    its value  refused                      sum
//
// Of a histogram only count and sum are used, which are exact; buckets are passed over.
//
// # Temporality
//
// Delta points count once: a point that is not later than the last of its series is a
// repetition. Cumulative points count by their increase. A series that starts anew (a
// later start time, or a monotonic value or count that fell) counts from zero; the first
// point ever seen counts whole if it started after the experiment did, and else is only
// what the next is compared with. What is refused moves no state, so a cumulative series
// loses nothing by a unit that was not known yet.
//
// # Answers
//
// Points that cannot count (unknown experiment, metric, unit or arm, a kind that does not
// fit, no sum) are named in partial_success: how many, and the first reasons. An exporter
// must not send them again. Bodies beyond MaxBytes, unreadable ones and media types other
// than application/x-protobuf and application/json are errors of the whole request.
//
// Bounds: MaxBytes per request after decompression, MaxPoints looked at, Options.MaxSeries
// series remembered (about 120 bytes each); when they are full, those idle for an hour
// make room, and otherwise new ones are refused.
//
// A Receiver may be used by any number of goroutines; it starts none.
package otlp

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	colmetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	metrics "go.opentelemetry.io/proto/otlp/metrics/v1"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// Bounds of one request.
const (
	MaxBytes  = 4 << 20
	MaxPoints = 10_000
)

const (
	maxReasons = 4 // in a partial_success
	idle       = time.Hour
)

// Target is where the values of a metric go.
type Target struct {
	Start time.Time // of the experiment
	Kind  experiments.MetricKind
}

// Observation is what a series adds to one metric of one unit, or of an arm if Unit is "".
type Observation struct {
	Experiment, Metric, Unit, Arm string
	N                             uint64  // values; 0 if only their sum is known
	Sum                           float64 // of the values
}

// Sink takes what was observed.
type Sink interface {
	// Find says what a metric of an experiment is. Kinds: NotFound, Locked, Invalid.
	Find(experiment, metric string, now time.Time) (Target, error)
	// Observe counts an observation, all or nothing.
	Observe(o Observation, now time.Time) error
}

// Options of a Receiver.
type Options struct {
	Sink      Sink             // required
	Ready     func() error     // why nothing can be taken yet; nil = always ready
	MaxSeries int              // default 100,000
	Now       func() time.Time // default time.Now
}

// Receiver implements OTLP's metrics service.
type Receiver struct {
	colmetrics.UnimplementedMetricsServiceServer
	o Options

	mu     sync.Mutex
	series map[seriesKey]*series
	swept  time.Time
}

// New starts nothing.
func New(o Options) *Receiver {
	o.MaxSeries = cmp.Or(o.MaxSeries, 100_000)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Ready == nil {
		o.Ready = func() error { return nil }
	}
	return &Receiver{o: o, series: map[seriesKey]*series{}}
}

// Export implements colmetrics.MetricsServiceServer.
func (r *Receiver) Export(_ context.Context, req *colmetrics.ExportMetricsServiceRequest) (*colmetrics.ExportMetricsServiceResponse, error) {
	out, err := r.export(req)
	return out, status.ToGRPC(err)
}

func (r *Receiver) export(req *colmetrics.ExportMetricsServiceRequest) (*colmetrics.ExportMetricsServiceResponse, error) {
	if err := r.o.Ready(); err != nil {
		return nil, err
	}
	b := batch{r: r, now: r.o.Now()}
	for _, rm := range req.GetResourceMetrics() {
		resource := attributes(rm.GetResource().GetAttributes())
		for _, sm := range rm.GetScopeMetrics() {
			for _, m := range sm.GetMetrics() {
				b.metric(resource, sm.GetScope().GetName(), m)
			}
		}
	}
	out := &colmetrics.ExportMetricsServiceResponse{}
	if b.rejected > 0 {
		out.PartialSuccess = &colmetrics.ExportMetricsPartialSuccess{RejectedDataPoints: b.rejected, ErrorMessage: strings.Join(b.reasons, "; ")}
	}
	return out, nil
}

// batch is one request being worked through.
type batch struct {
	r        *Receiver
	now      time.Time
	points   int
	rejected int64
	reasons  []string
}

func (b *batch) reject(metric string, err error) {
	b.rejected++
	why := fmt.Sprintf("%s: %v", metric, err)
	if len(b.reasons) < maxReasons && (len(b.reasons) == 0 || b.reasons[len(b.reasons)-1] != why) {
		b.reasons = append(b.reasons, why)
	}
}

// metric takes the points of one instrument apart.
func (b *batch) metric(resource []pair, scope string, m *metrics.Metric) {
	s := stream{resource: resource, scope: scope, name: m.GetName()}
	switch d := m.GetData().(type) {
	case *metrics.Metric_Gauge:
		s.shape = shapeGauge
		for _, p := range d.Gauge.GetDataPoints() {
			b.number(s, p)
		}
	case *metrics.Metric_Sum:
		s.shape, s.temporality, s.monotonic = shapeSum, d.Sum.GetAggregationTemporality(), d.Sum.GetIsMonotonic()
		for _, p := range d.Sum.GetDataPoints() {
			b.number(s, p)
		}
	case *metrics.Metric_Histogram:
		s.shape, s.temporality = shapeHistogram, d.Histogram.GetAggregationTemporality()
		for _, p := range d.Histogram.GetDataPoints() {
			b.point(s, point{attributes: p.GetAttributes(), start: p.GetStartTimeUnixNano(), at: p.GetTimeUnixNano(), flags: p.GetFlags(), n: p.GetCount(), sum: p.Sum})
		}
	case *metrics.Metric_ExponentialHistogram:
		s.shape, s.temporality = shapeHistogram, d.ExponentialHistogram.GetAggregationTemporality()
		for _, p := range d.ExponentialHistogram.GetDataPoints() {
			b.point(s, point{attributes: p.GetAttributes(), start: p.GetStartTimeUnixNano(), at: p.GetTimeUnixNano(), flags: p.GetFlags(), n: p.GetCount(), sum: p.Sum})
		}
	case *metrics.Metric_Summary:
		for range d.Summary.GetDataPoints() {
			b.reject(m.GetName(), outrigger.Errorf(outrigger.Invalid, "summaries cannot be put together; report a histogram"))
		}
	}
}

// number is a point of a sum or a gauge.
func (b *batch) number(s stream, p *metrics.NumberDataPoint) {
	v := p.GetAsDouble()
	if i, ok := p.GetValue().(*metrics.NumberDataPoint_AsInt); ok {
		v = float64(i.AsInt)
	}
	q := point{attributes: p.GetAttributes(), start: p.GetStartTimeUnixNano(), at: p.GetTimeUnixNano(), flags: p.GetFlags(), sum: &v}
	if s.shape == shapeGauge {
		q.n = 1
	}
	b.point(s, q)
}

// point counts one point, or says why not.
func (b *batch) point(s stream, p point) {
	labels := merge(s.resource, attributes(p.attributes))
	o := Observation{Experiment: labels.get("experiment.id"), Metric: s.name, Arm: labels.get("experiment.variant"),
		Unit: labels.first("outrigger.unit", "user.id", "enduser.id", "session.id")}
	if o.Experiment == "" || p.flags&uint32(metrics.DataPointFlags_DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK) != 0 {
		return
	}
	if b.points++; b.points > MaxPoints {
		b.reject(s.name, outrigger.Errorf(outrigger.Exhausted, "more than %d points in one request", MaxPoints))
		return
	}
	if o.Unit == "" && o.Arm == "" {
		b.reject(s.name, outrigger.Errorf(outrigger.Invalid, "the point has neither outrigger.unit nor experiment.variant"))
		return
	}
	target, err := b.r.o.Sink.Find(o.Experiment, o.Metric, b.now)
	if err == nil {
		err = s.fits(target.Kind, p)
	}
	if err == nil {
		err = b.r.count(s.key(labels), s, p, target, o, b.now)
	}
	if err != nil {
		b.reject(s.name, err)
	}
}
