package adsserver

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
)

// metrics of the push path. Labels are type URLs only, never nodes.
type metrics struct {
	open      metric.Int64UpDownCounter
	responses metric.Int64Counter
	resources metric.Int64Counter
	nacks     metric.Int64Counter
	ack       metric.Float64Histogram
}

func newMetrics(m metric.Meter) *metrics {
	if m == nil {
		m = noop.Meter{}
	}
	var out metrics
	var errs [5]error
	out.open, errs[0] = m.Int64UpDownCounter("outrigger.xds.streams", metric.WithUnit("{stream}"), metric.WithDescription("Open ADS streams"))
	out.responses, errs[1] = m.Int64Counter("outrigger.xds.responses", metric.WithUnit("{response}"), metric.WithDescription("Discovery responses sent, by type"))
	out.resources, errs[2] = m.Int64Counter("outrigger.xds.resources", metric.WithUnit("{resource}"), metric.WithDescription("Resources sent, by type"))
	out.nacks, errs[3] = m.Int64Counter("outrigger.xds.nacks", metric.WithUnit("{response}"), metric.WithDescription("Responses rejected by clients, by type"))
	out.ack, errs[4] = m.Float64Histogram("outrigger.xds.push.duration", metric.WithUnit("s"), metric.WithDescription("From Publish until a stream accepted all of the push"))
	for _, err := range errs {
		if err != nil {
			panic("adsserver: instrument refused: " + err.Error())
		}
	}
	return &out
}

func (m *metrics) streams(ctx context.Context, n int64) { m.open.Add(ctx, n) }

func (m *metrics) response(ctx context.Context, typeURL string, resources int) {
	by := metric.WithAttributes(attribute.String("type", typeURL))
	m.responses.Add(ctx, 1, by)
	m.resources.Add(ctx, int64(resources), by)
}

func (m *metrics) nacked(ctx context.Context, typeURL string) {
	m.nacks.Add(ctx, 1, metric.WithAttributes(attribute.String("type", typeURL)))
}

func (m *metrics) settled(ctx context.Context, d time.Duration) { m.ack.Record(ctx, d.Seconds()) }
