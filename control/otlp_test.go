package control_test

import (
	"context"
	"fmt"
	"math"
	"net/http/httptest"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetrichttp"
	"go.opentelemetry.io/otel/metric"
	sdk "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/resource"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// An application with the OpenTelemetry SDK, over gRPC and HTTP, with either temporality:
// what it records counts once per user, for the arm the user was exposed to.
func TestOpenTelemetrySDK(t *testing.T) {
	p := newPlane(t)
	ctx := context.Background()
	epoch := p.planned(&pb.ExperimentPlan{Sd: 1, Mde: .1, Metrics: []*pb.ExperimentMetric{{Name: "revenue", Kind: "mean"},
		{Name: "accuracy", Kind: "ratio"}, {Name: "answer_score", Kind: "ratio"}, {Name: "satisfaction", Kind: "ratio"}}})
	p.expose(epoch, "n1/a", 0, 40)
	web := httptest.NewServer(p.srv.Handler())
	defer web.Close()
	lives := 0
	for _, temporality := range []metricdata.Temporality{metricdata.CumulativeTemporality, metricdata.DeltaTemporality} {
		of := func(sdk.InstrumentKind) metricdata.Temporality { return temporality }
		overGRPC, err := otlpmetricgrpc.New(ctx, otlpmetricgrpc.WithGRPCConn(p.conn), otlpmetricgrpc.WithTemporalitySelector(of))
		if err != nil {
			t.Fatal(err)
		}
		overHTTP, err := otlpmetrichttp.New(ctx, otlpmetrichttp.WithEndpointURL(web.URL+"/v1/metrics"), otlpmetrichttp.WithTemporalitySelector(of),
			otlpmetrichttp.WithCompression(otlpmetrichttp.GzipCompression))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range []sdk.Exporter{overGRPC, overHTTP} {
			lives++
			application(t, e, lives)
		}
	}
	// Each of four lives of the application: 40 users, each twice.
	n := float64(lives)
	if v := p.arm("arms", "treatment", "value").(float64); math.Abs(v-n*6) > 1e-9 {
		t.Errorf("revenue of a user %v, want %v", v, n*6)
	}
	for i, want := range []float64{.75, .25, 5} { // accuracy, answer_score, satisfaction
		s := p.results().Results.AsMap()["secondary"].([]any)[i].(map[string]any)
		tr := s["treatment"].(map[string]any)
		if v := tr["value"].(float64); math.Abs(v-want) > 1e-9 || tr["n"] != 20.0 {
			t.Errorf("%v: %v over %v users, want %v over 20", s["metric"], v, tr["n"], want)
		}
	}
	if got := fmt.Sprint(p.results().Ledger.AsMap()["without_unit"]); got != fmt.Sprintf("map[revenue:map[control:map[sum:%v values:0]]]", n*2) {
		t.Errorf("values without a unit: %s", got)
	}
}

// application records, exports, records and exports again, and ends.
func application(t *testing.T, e sdk.Exporter, life int) {
	t.Helper()
	ctx := context.Background()
	res := resource.NewSchemaless(attribute.String("service.name", "shop"), attribute.String("experiment.id", "ab"), attribute.Int("life", life))
	provider := sdk.NewMeterProvider(sdk.WithResource(res), sdk.WithReader(sdk.NewPeriodicReader(e, sdk.WithInterval(time.Hour))),
		sdk.WithView(sdk.NewView(sdk.Instrument{Name: "answer_score"}, sdk.Stream{Aggregation: sdk.AggregationBase2ExponentialHistogram{MaxSize: 160, MaxScale: 20}})))
	m := provider.Meter("shop")
	revenue, err1 := m.Float64Counter("revenue")
	accuracy, err2 := m.Float64Histogram("accuracy")
	score, err3 := m.Float64Histogram("answer_score")
	satisfaction, err4 := m.Int64Gauge("satisfaction")
	for _, err := range []error{err1, err2, err3, err4} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for round := range 2 {
		for i := range 40 {
			who := metric.WithAttributes(attribute.String("user.id", person(i)))
			revenue.Add(ctx, float64(2+2*round), who)
			accuracy.Record(ctx, .5+.5*float64(round), who)
			score.Record(ctx, .25, who)
			satisfaction.Record(ctx, 5, who)
		}
		revenue.Add(ctx, 1, metric.WithAttributes(attribute.String("experiment.variant", "control")))
		if err := provider.ForceFlush(ctx); err != nil { // a partial_success is an error here
			t.Fatal(err)
		}
	}
	if err := provider.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
}
