package telemetry

import (
	"google.golang.org/grpc"
	experimental "google.golang.org/grpc/experimental/opentelemetry"
	"google.golang.org/grpc/stats/opentelemetry"
)

// GRPCServer instruments a gRPC server: gRPC's own metrics (gRFC A66) and, with an OTLP
// endpoint configured, a span per call that continues the caller's trace.
func (t *Telemetry) GRPCServer() grpc.ServerOption {
	return opentelemetry.ServerOption(t.grpcOptions())
}

// GRPCClient is GRPCServer for connections.
func (t *Telemetry) GRPCClient() grpc.DialOption { return opentelemetry.DialOption(t.grpcOptions()) }

func (t *Telemetry) grpcOptions() opentelemetry.Options {
	o := opentelemetry.Options{MetricsOptions: opentelemetry.MetricsOptions{MeterProvider: t.metrics}}
	if t.traces != nil {
		o.TraceOptions = experimental.TraceOptions{TracerProvider: t.traces, TextMapPropagator: t.Propagator}
	}
	return o
}

// Tracing reports whether spans go anywhere.
func (t *Telemetry) Tracing() bool { return t.traces != nil }
