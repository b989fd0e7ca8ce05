package telemetry

import (
	"bytes"
	"context"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/outrigger-mesh/outrigger"
)

// A counter that was incremented is visible in the Prometheus text with its labels,
// next to the Go runtime's own metrics.
func TestMetricsAreServed(t *testing.T) {
	tel, err := New(context.Background(), Options{Service: "test", Node: "n1", LogTo: &bytes.Buffer{}})
	if err != nil {
		t.Fatal(err)
	}
	c, err := tel.Meter("unit").Int64Counter("outrigger_things")
	if err != nil {
		t.Fatal(err)
	}
	c.Add(context.Background(), 3)
	rec := httptest.NewRecorder()
	tel.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{"outrigger_things_total{", "} 3", "go_goroutines"} {
		if !strings.Contains(rec.Body.String(), want) {
			t.Errorf("metrics lack %q", want)
		}
	}
	if err := tel.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// Bad settings are refused by name; good ones select level and format.
func TestLogSettings(t *testing.T) {
	for _, o := range []Options{{LogLevel: "loud"}, {LogFormat: "xml"}, {TraceRatio: 2}} {
		o.LogTo = &bytes.Buffer{}
		if _, err := New(context.Background(), o); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%+v: got %v", o, err)
		}
	}
	var buf bytes.Buffer
	tel, err := New(context.Background(), Options{Service: "s", LogLevel: "warn", LogFormat: "json", LogTo: &buf})
	if err != nil {
		t.Fatal(err)
	}
	tel.Logger.Info("hidden")
	tel.Logger.Warn("shown")
	if got := buf.String(); strings.Contains(got, "hidden") || !strings.Contains(got, `"msg":"shown"`) {
		t.Fatalf("log is %s", got)
	}
}

// Our histograms report what the SDK's would, by Record as by Bind, exemplars included.
func TestHistogramsAsTheSDK(t *testing.T) {
	ctx := trace.ContextWithSpanContext(context.Background(), trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled}))
	a, b := attribute.NewSet(attribute.String("k", "a"), attribute.Int("n", 1)), attribute.NewSet(attribute.String("k", "b"))
	var got [2]string
	for i := range got {
		tel, err := New(context.Background(), Options{Service: "test", Node: "n1", LogTo: &bytes.Buffer{}})
		if err != nil {
			t.Fatal(err)
		}
		m := tel.Meter("unit")
		if i == 0 {
			m = tel.metrics.Meter("unit")
		}
		again := metric.WithDescription("d")
		f, err0 := m.Float64Histogram("things.took", metric.WithUnit("s"), again, metric.WithExplicitBucketBoundaries(0.5, 1, 2))
		same, err1 := m.Float64Histogram("things.took", metric.WithUnit("s"), again, metric.WithExplicitBucketBoundaries(0.5, 1, 2))
		n, err2 := m.Int64Histogram("things.size", metric.WithUnit("By"), again, metric.WithExplicitBucketBoundaries(10))
		if err0 != nil || err1 != nil || err2 != nil {
			t.Fatal(err0, err1, err2)
		}
		f.Record(ctx, 0.75, metric.WithAttributeSet(a))
		same.Record(context.Background(), 1, metric.WithAttributeSet(a))
		f.Record(context.Background(), 99, metric.WithAttributes(attribute.String("k", "b")))
		n.Record(context.Background(), 10)
		n.Record(context.Background(), 11)
		if bound, ok := f.(interface {
			Bind(attribute.Set) func(float64)
		}); ok != (i == 1) {
			t.Fatal("only our own histograms can be bound")
		} else if ok {
			bound.Bind(b)(0.5)
		} else {
			f.Record(context.Background(), 0.5, metric.WithAttributeSet(b))
		}
		if _, err := m.Float64Histogram("bad name!", metric.WithExplicitBucketBoundaries(1)); err == nil {
			t.Error("a bad name is accepted")
		}
		rec, req := httptest.NewRecorder(), httptest.NewRequest("GET", "/metrics", nil)
		req.Header.Set("Accept", "application/openmetrics-text; version=1.0.0")
		tel.Handler().ServeHTTP(rec, req)
		for line := range strings.Lines(rec.Body.String()) {
			if strings.Contains(line, "things_") && !strings.Contains(line, "_created") {
				line, exemplar, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " # {")
				exemplar, _, _ = strings.Cut(exemplar, "} 0.75 ") // its time
				labels := strings.Split(exemplar, ",")            // in no order
				slices.Sort(labels)
				got[i] += line + " " + strings.Join(labels, ",") + "\n"
			}
		}
	}
	if got[0] != got[1] || !strings.Contains(got[1], `trace_id="01`) {
		t.Errorf("the SDK reports\n%s\nwe\n%s", got[0], got[1])
	}
}

// Attribute sets beyond the limit share one series; a bound one takes no allocation.
func TestHistogramLimits(t *testing.T) {
	h := newHistogram[float64]("h", "", "", []float64{1})
	for i := range 2 * maxSeries {
		h.at(attribute.NewSet(attribute.Int("i", i))).observe(1)
	}
	if n := len(h.series); n != maxSeries+1 {
		t.Errorf("%d series", n)
	}
	rest := h.at(attribute.NewSet(attribute.Bool("otel.metric.overflow", true)))
	if n := rest.counts[0].Load(); n != maxSeries {
		t.Errorf("%d are in the series of the rest, want %d", n, maxSeries)
	}
	observe := h.Bind(attribute.NewSet(attribute.Int("i", 1)))
	if n := testing.AllocsPerRun(100, func() { observe(2) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
