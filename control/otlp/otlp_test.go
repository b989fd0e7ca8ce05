package otlp

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	colmetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	metrics "go.opentelemetry.io/proto/otlp/metrics/v1"
	resource "go.opentelemetry.io/proto/otlp/resource/v1"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
)

var began = time.Unix(1_700_000_000, 0)

// book is a sink with the metrics accuracy (ratio) and revenue (mean) of experiment ab.
type book struct {
	n       map[string]uint64
	sum     map[string]float64
	refused error
}

func newBook() *book { return &book{n: map[string]uint64{}, sum: map[string]float64{}} }

func (b *book) Find(experiment, metric string, _ time.Time) (Target, error) {
	kind, ok := map[string]experiments.MetricKind{"accuracy": experiments.KindRatio, "revenue": experiments.KindMean}[metric]
	if experiment != "ab" || !ok {
		return Target{}, outrigger.Errorf(outrigger.NotFound, "metric %q of %q not found", metric, experiment)
	}
	return Target{Start: began, Kind: kind}, nil
}

func (b *book) Observe(o Observation, _ time.Time) error {
	if b.refused != nil {
		return b.refused
	}
	k := o.Metric + " " + o.Unit + o.Arm
	b.n[k] += o.N
	b.sum[k] += o.Sum
	return nil
}

func label(kv ...string) (out []*common.KeyValue) {
	for i := 0; i < len(kv); i += 2 {
		out = append(out, &common.KeyValue{Key: kv[i], Value: &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: kv[i+1]}}})
	}
	return out
}

func at(seconds float64) uint64 { return uint64(began.UnixNano() + int64(seconds*1e9)) }

const (
	delta      = metrics.AggregationTemporality_AGGREGATION_TEMPORALITY_DELTA
	cumulative = metrics.AggregationTemporality_AGGREGATION_TEMPORALITY_CUMULATIVE
)

// One request each; start and time are seconds after the experiment's start.
func sum(t metrics.AggregationTemporality, monotonic bool, start, end, v float64, labels ...string) *metrics.Metric {
	return &metrics.Metric{Name: "revenue", Data: &metrics.Metric_Sum{Sum: &metrics.Sum{AggregationTemporality: t, IsMonotonic: monotonic, DataPoints: []*metrics.NumberDataPoint{
		{Attributes: label(labels...), StartTimeUnixNano: at(start), TimeUnixNano: at(end), Value: &metrics.NumberDataPoint_AsDouble{AsDouble: v}}}}}}
}

func gauge(end float64, v int64, labels ...string) *metrics.Metric {
	return &metrics.Metric{Name: "accuracy", Data: &metrics.Metric_Gauge{Gauge: &metrics.Gauge{DataPoints: []*metrics.NumberDataPoint{
		{Attributes: label(labels...), TimeUnixNano: at(end), Value: &metrics.NumberDataPoint_AsInt{AsInt: v}}}}}}
}

func histogram(t metrics.AggregationTemporality, start, end float64, n uint64, v float64, labels ...string) *metrics.Metric {
	return &metrics.Metric{Name: "accuracy", Data: &metrics.Metric_Histogram{Histogram: &metrics.Histogram{AggregationTemporality: t, DataPoints: []*metrics.HistogramDataPoint{
		{Attributes: label(labels...), StartTimeUnixNano: at(start), TimeUnixNano: at(end), Count: n, Sum: &v}}}}}
}

func exponential(t metrics.AggregationTemporality, start, end float64, n uint64, v *float64, labels ...string) *metrics.Metric {
	return &metrics.Metric{Name: "accuracy", Data: &metrics.Metric_ExponentialHistogram{ExponentialHistogram: &metrics.ExponentialHistogram{AggregationTemporality: t,
		DataPoints: []*metrics.ExponentialHistogramDataPoint{{Attributes: label(labels...), StartTimeUnixNano: at(start), TimeUnixNano: at(end), Count: n, Sum: v, Scale: 3}}}}}
}

func request(ms ...*metrics.Metric) *colmetrics.ExportMetricsServiceRequest {
	return &colmetrics.ExportMetricsServiceRequest{ResourceMetrics: []*metrics.ResourceMetrics{{
		Resource: &resource.Resource{Attributes: label("service.name", "shop", "experiment.id", "ab")}, ScopeMetrics: []*metrics.ScopeMetrics{{Metrics: ms}}}}}
}

// Every case is a transcript: exports in order, and what has been counted at the end.
func TestSeries(t *testing.T) {
	unit := []string{"user.id", "ann"}
	v := 1.5
	for name, c := range map[string]struct {
		exports []*metrics.Metric
		key     string
		n       uint64
		sum     float64
	}{
		"delta sums add up, a repetition does not": {[]*metrics.Metric{sum(delta, true, 0, 1, 5, unit...), sum(delta, true, 1, 2, 7, unit...), sum(delta, true, 1, 2, 7, unit...)},
			"revenue ann", 0, 12},
		"cumulative sums count by their increase": {[]*metrics.Metric{sum(cumulative, true, 0, 1, 5, unit...), sum(cumulative, true, 0, 2, 12, unit...), sum(cumulative, true, 0, 2, 12, unit...)},
			"revenue ann", 0, 12},
		"a series older than the experiment is compared with": {[]*metrics.Metric{sum(cumulative, true, -9, 1, 100, unit...), sum(cumulative, true, -9, 2, 103, unit...)},
			"revenue ann", 0, 3},
		"reset by start time":                 {[]*metrics.Metric{sum(cumulative, true, 0, 1, 5, unit...), sum(cumulative, true, 2, 3, 6, unit...)}, "revenue ann", 0, 11},
		"reset seen by a value that fell":     {[]*metrics.Metric{sum(cumulative, true, 0, 1, 5, unit...), sum(cumulative, true, 0, 3, 2, unit...)}, "revenue ann", 0, 7},
		"what is not monotonic may fall":      {[]*metrics.Metric{sum(cumulative, false, 0, 1, 5, unit...), sum(cumulative, false, 0, 3, 2, unit...)}, "revenue ann", 0, 2},
		"a gauge is a value per time":         {[]*metrics.Metric{gauge(1, 3, unit...), gauge(1, 3, unit...), gauge(2, 4, unit...)}, "accuracy ann", 2, 7},
		"histograms, delta":                   {[]*metrics.Metric{histogram(delta, 0, 1, 3, 2, unit...), histogram(delta, 1, 2, 2, 1, unit...)}, "accuracy ann", 5, 3},
		"histograms, cumulative with a reset": {[]*metrics.Metric{histogram(cumulative, 0, 1, 3, 2, unit...), histogram(cumulative, 0, 2, 4, 3, unit...), histogram(cumulative, 0, 3, 1, 1, unit...)}, "accuracy ann", 5, 4},
		"exponential histograms":              {[]*metrics.Metric{exponential(cumulative, 0, 1, 2, &v, unit...), exponential(cumulative, 0, 2, 2, &v, unit...)}, "accuracy ann", 2, 1.5},
		"series are told apart":               {[]*metrics.Metric{sum(cumulative, true, 0, 1, 5, "user.id", "ann", "pod", "a"), sum(cumulative, true, 0, 1, 5, "user.id", "ann", "pod", "b")}, "revenue ann", 0, 10},
		"without a unit for the arm":          {[]*metrics.Metric{sum(delta, true, 0, 1, 5, "experiment.variant", "b")}, "revenue b", 0, 5},
		"the named unit comes first":          {[]*metrics.Metric{sum(delta, true, 0, 1, 5, "user.id", "ann", "outrigger.unit", "u1", "experiment.variant", "b")}, "revenue u1b", 0, 5},
		"other experiments are passed over":   {[]*metrics.Metric{sum(delta, true, 0, 1, 5, "user.id", "ann", "experiment.id", "")}, "revenue ann", 0, 0},
	} {
		b := newBook()
		r := New(Options{Sink: b, Now: func() time.Time { return began }})
		for i, m := range c.exports {
			out, err := r.Export(context.Background(), request(m))
			if err != nil || out.PartialSuccess != nil {
				t.Errorf("%s: export %d: %v, %v", name, i, out, err)
			}
		}
		if b.n[c.key] != c.n || b.sum[c.key] != c.sum || len(b.sum) > 1 {
			t.Errorf("%s: %v values with sum %v, want %d with %v under %q", name, b.n, b.sum, c.n, c.sum, c.key)
		}
	}
}

// What cannot count is named in the answer; the rest of the request counts.
func TestPartialSuccess(t *testing.T) {
	unit := []string{"user.id", "ann"}
	summary := &metrics.Metric{Name: "accuracy", Data: &metrics.Metric_Summary{Summary: &metrics.Summary{DataPoints: []*metrics.SummaryDataPoint{{}}}}}
	wrong := sum(delta, true, 0, 1, 5, unit...)
	wrong.Name = "profit"
	asRatio := sum(delta, true, 0, 1, 5, unit...)
	asRatio.Name = "accuracy"
	asMean := gauge(1, 1, unit...)
	asMean.Name = "revenue"
	for want, m := range map[string]*metrics.Metric{
		`profit: metric "profit" of "ab" not found`: wrong, "accuracy: the metric is a ratio": asRatio, "revenue: the metric is a mean": asMean,
		"neither outrigger.unit nor": sum(delta, true, 0, 1, 5), "temporality is unspecified": sum(0, true, 0, 1, 5, unit...),
		"value is NaN": sum(delta, true, 0, 1, math.NaN(), unit...), "has no sum": exponential(delta, 0, 1, 1, nil, unit...), "summaries cannot": summary,
	} {
		b := newBook()
		out, err := New(Options{Sink: b}).Export(context.Background(), request(m, histogram(delta, 0, 1, 3, 2, unit...)))
		if err != nil || out.GetPartialSuccess().GetRejectedDataPoints() != 1 || !strings.Contains(out.GetPartialSuccess().GetErrorMessage(), want) {
			t.Errorf("%s: %v, %v", want, out, err)
		}
		if b.n["accuracy ann"] != 3 || len(b.n) != 1 {
			t.Errorf("%s: counted %v", want, b.n)
		}
	}
}

// A refused cumulative point moves nothing: once its unit is known, all of it counts.
func TestRefusedIsNotLost(t *testing.T) {
	b := newBook()
	b.refused = outrigger.Errorf(outrigger.NotFound, "unit not found")
	r := New(Options{Sink: b})
	for i, v := range []float64{5, 8} {
		if out, err := r.Export(context.Background(), request(sum(cumulative, true, 0, float64(i+1), v, "user.id", "ann"))); err != nil || (out.PartialSuccess == nil) != (i == 1) {
			t.Errorf("%d: %v, %v", i, out, err)
		}
		b.refused = nil
	}
	if b.sum["revenue ann"] != 8 {
		t.Errorf("counted %v, want 8", b.sum)
	}
}

// Series are bounded: the idle make room, the busy do not. Points are, too.
func TestBounds(t *testing.T) {
	now := began
	b := newBook()
	r := New(Options{Sink: b, MaxSeries: 2, Now: func() time.Time { return now }})
	export := func(user string, end float64) int64 {
		out, err := r.Export(context.Background(), request(sum(delta, true, 0, end, 1, "user.id", user)))
		if err != nil {
			t.Fatal(err)
		}
		return out.GetPartialSuccess().GetRejectedDataPoints()
	}
	if export("a", 1)+export("b", 1) != 0 || export("c", 1) != 1 || export("a", 2) != 0 {
		t.Errorf("counted %v of %d series", b.sum, len(r.series))
	}
	now = now.Add(2 * time.Hour)
	if export("c", 3) != 0 || len(r.series) != 1 {
		t.Errorf("idle series made no room: %d", len(r.series))
	}
	var many []*metrics.Metric
	for i := range MaxPoints + 3 {
		many = append(many, sum(delta, true, 0, float64(i+10), 1, "user.id", "c"))
	}
	if out, err := r.Export(context.Background(), request(many...)); err != nil || out.GetPartialSuccess().GetRejectedDataPoints() != 3 {
		t.Errorf("%v, %v", out, err)
	}
}

func TestHTTP(t *testing.T) {
	raw, err := proto.Marshal(request(histogram(delta, 0, 1, 3, 2, "user.id", "ann")))
	if err != nil {
		t.Fatal(err)
	}
	zip := func(b []byte) []byte {
		var out bytes.Buffer
		z := gzip.NewWriter(&out)
		if _, err := z.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	js := fmt.Sprintf(`{"resourceMetrics":[{"resource":{"attributes":[{"key":"experiment.id","value":{"stringValue":"ab"}}]},"scopeMetrics":[{"metrics":[{"name":"accuracy","future":1,
		"histogram":{"aggregationTemporality":1,"dataPoints":[{"timeUnixNano":"%d","count":"3","sum":2,"attributes":[{"key":"user.id","value":{"stringValue":"ann"}}]}]}}]}]}]}`, at(1))
	for name, c := range map[string]struct {
		kind, encoding string
		body           []byte
		code           int
		counted        uint64
		want           string
	}{
		"protobuf":      {typeProtobuf, "", raw, 200, 3, ""},
		"gzip":          {typeProtobuf, "gzip", zip(raw), 200, 3, ""},
		"json":          {"application/json; charset=utf-8", "", []byte(js), 200, 3, "{}"},
		"other type":    {"text/plain", "", raw, 415, 0, "application/x-protobuf"},
		"other coding":  {typeProtobuf, "br", raw, 415, 0, "content-encoding"},
		"not gzip":      {typeJSON, "gzip", raw, 400, 0, "not gzip"},
		"not protobuf":  {typeProtobuf, "", []byte("hello"), 400, 0, "ExportMetricsServiceRequest"},
		"not json":      {typeJSON, "", []byte("{"), 400, 0, "ExportMetricsServiceRequest"},
		"too long":      {typeJSON, "", make([]byte, MaxBytes+1), 413, 0, "4194304"},
		"too long once": {typeJSON, "gzip", zip(make([]byte, MaxBytes+1)), 413, 0, "4194304"},
	} {
		b := newBook()
		req := httptest.NewRequest(http.MethodPost, "/v1/metrics", bytes.NewReader(c.body))
		req.Header.Set("content-type", c.kind)
		req.Header.Set("content-encoding", c.encoding)
		rec := httptest.NewRecorder()
		New(Options{Sink: b}).ServeHTTP(rec, req)
		if rec.Code != c.code || b.n["accuracy ann"] != c.counted || !strings.Contains(rec.Body.String(), c.want) {
			t.Errorf("%s: %d %q, counted %d", name, rec.Code, rec.Body, b.n["accuracy ann"])
		}
	}
	rec := httptest.NewRecorder()
	req := httptest.NewRequest(http.MethodPost, "/v1/metrics", bytes.NewReader(raw))
	req.Header.Set("content-type", typeProtobuf)
	New(Options{Sink: newBook(), Ready: func() error { return outrigger.Errorf(outrigger.Unavailable, "catching up") }}).ServeHTTP(rec, req)
	if rec.Code != 503 || rec.Header().Get("retry-after") == "" {
		t.Errorf("not ready: %d %v", rec.Code, rec.Header())
	}
}

// FuzzBody: no body makes the receiver panic, or count what is not finite.
func FuzzBody(f *testing.F) {
	raw, err := proto.Marshal(request(histogram(delta, 0, 1, 3, 2, "user.id", "ann"), sum(cumulative, true, 0, 1, 5, "user.id", "b"), gauge(1, 3, "user.id", "c")))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw, false)
	f.Add([]byte(`{"resourceMetrics":[{}]}`), true)
	f.Fuzz(func(t *testing.T, body []byte, json bool) {
		kind := typeProtobuf
		if json {
			kind = typeJSON
		}
		b := newBook()
		req := httptest.NewRequest(http.MethodPost, "/v1/metrics", bytes.NewReader(body))
		req.Header.Set("content-type", kind)
		New(Options{Sink: b}).ServeHTTP(httptest.NewRecorder(), req)
		for k, v := range b.sum {
			if math.IsNaN(v) {
				t.Fatalf("%s is %v", k, v)
			}
		}
	})
}
