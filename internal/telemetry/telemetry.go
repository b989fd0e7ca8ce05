// Package telemetry owns logs, metrics and traces of a process: the only place that
// knows the OpenTelemetry SDK, the Prometheus exporter and log formats. Everything
// else takes a metric.Meter, a trace.Tracer or a *slog.Logger.
//
// New starts nothing that needs stopping unless an OTLP endpoint is given; Shutdown
// flushes and stops the exporters within the context's deadline. A Telemetry may be
// used by any number of goroutines.
package telemetry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/outrigger-mesh/outrigger"
)

// Options say how a process reports about itself.
type Options struct {
	Service string // "control", "node", "sidecar"
	Version string
	Node    string // instance name
	Region  string

	LogLevel  string    // debug, info, warn, error; "" = info
	LogFormat string    // text or json; "" = text
	LogTo     io.Writer // required

	OTLPEndpoint string  // host:port of an OTLP/gRPC trace collector; "" = traces off
	TraceRatio   float64 // share of root traces kept, 0..1
}

// Telemetry is a process's instruments.
type Telemetry struct {
	Logger     *slog.Logger
	Tracer     trace.TracerProvider
	Propagator propagation.TextMapPropagator

	metrics    *sdkmetric.MeterProvider
	histograms *histograms
	traces     *sdktrace.TracerProvider // nil when off
	registry   *prometheus.Registry
}

// New builds the instruments. Errors have kind Invalid and name the setting.
func New(ctx context.Context, o Options) (*Telemetry, error) {
	logger, err := newLogger(o)
	if err != nil {
		return nil, err
	}
	if o.TraceRatio < 0 || o.TraceRatio > 1 {
		return nil, outrigger.Errorf(outrigger.Invalid, "trace-ratio is %v; give a share from 0 to 1", o.TraceRatio)
	}
	res := resource.NewSchemaless(
		attribute.String("service.name", "outrigger-"+o.Service),
		attribute.String("service.version", o.Version),
		attribute.String("service.instance.id", o.Node),
		attribute.String("cloud.region", o.Region),
	)
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	own := &histograms{start: time.Now(), of: map[instrumentName]collector{}}
	exp, err := otelprom.New(otelprom.WithRegisterer(reg), otelprom.WithProducer(own))
	if err != nil {
		return nil, fmt.Errorf("prometheus exporter: %w", err)
	}
	t := &Telemetry{
		Logger:     logger,
		Propagator: propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{}),
		histograms: own,
		metrics:    sdkmetric.NewMeterProvider(sdkmetric.WithReader(exp), sdkmetric.WithResource(res)),
		registry:   reg,
	}
	if o.OTLPEndpoint == "" {
		t.Tracer = sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.NeverSample()))
		return t, nil
	}
	texp, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpoint(o.OTLPEndpoint), otlptracegrpc.WithInsecure())
	if err != nil {
		return nil, fmt.Errorf("trace exporter to %s: %w", o.OTLPEndpoint, err)
	}
	t.traces = sdktrace.NewTracerProvider(sdktrace.WithBatcher(texp), sdktrace.WithResource(res),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(o.TraceRatio))))
	t.Tracer = t.traces
	return t, nil
}

// Meter returns the meter of one package; name is its import path's last elements.
func (t *Telemetry) Meter(name string) metric.Meter {
	return meter{Meter: t.metrics.Meter(name), all: t.histograms, scope: name}
}

// Handler serves the metrics in Prometheus text and OpenMetrics form.
func (t *Telemetry) Handler() http.Handler {
	return promhttp.HandlerFor(t.registry, promhttp.HandlerOpts{EnableOpenMetrics: true, MaxRequestsInFlight: 4})
}

// Shutdown flushes what is buffered and stops the exporters.
func (t *Telemetry) Shutdown(ctx context.Context) error {
	err := t.metrics.Shutdown(ctx)
	if t.traces != nil {
		err = errors.Join(err, t.traces.Shutdown(ctx))
	}
	return err
}

func newLogger(o Options) (*slog.Logger, error) {
	var level slog.Level
	if o.LogLevel != "" {
		if err := level.UnmarshalText([]byte(o.LogLevel)); err != nil {
			return nil, outrigger.Errorf(outrigger.Invalid, "log-level is %q; one of debug, info, warn, error", o.LogLevel)
		}
	}
	ho := &slog.HandlerOptions{Level: level}
	var h slog.Handler
	switch o.LogFormat {
	case "", "text":
		h = slog.NewTextHandler(o.LogTo, ho)
	case "json":
		h = slog.NewJSONHandler(o.LogTo, ho)
	default:
		return nil, outrigger.Errorf(outrigger.Invalid, "log-format is %q; one of text, json", o.LogFormat)
	}
	return slog.New(h).With("service", o.Service, "node", o.Node), nil
}
