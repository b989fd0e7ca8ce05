package adsserver

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"

	"github.com/outrigger-mesh/outrigger/xds"
)

// metrics of the push path. Labels are type URLs only, never nodes.
type metrics struct {
	open      metric.Int64UpDownCounter
	responses metric.Int64Counter
	resources metric.Int64Counter
	nacks     metric.Int64Counter
	ack       metric.Float64Histogram
	beats     metric.Int64Counter
	resent    metric.Int64Counter
	// byType are the labels of the types we publish. To make them for every response
	// costs more than to count it.
	byType map[string]metric.MeasurementOption
}

func typeLabel(typeURL string) metric.MeasurementOption {
	return metric.WithAttributeSet(attribute.NewSet(attribute.String("type", typeURL)))
}

func (m *metrics) label(typeURL string) metric.MeasurementOption {
	if known := m.byType[typeURL]; known != nil {
		return known
	}
	return typeLabel(typeURL)
}

func newMetrics(m metric.Meter) *metrics {
	if m == nil {
		m = noop.Meter{}
	}
	out := metrics{byType: make(map[string]metric.MeasurementOption)}
	for _, typeURL := range xds.Pushed() {
		out.byType[typeURL] = typeLabel(typeURL)
	}
	var errs [7]error
	out.open, errs[0] = m.Int64UpDownCounter("outrigger.xds.streams", metric.WithUnit("{stream}"), metric.WithDescription("Open ADS streams"))
	out.responses, errs[1] = m.Int64Counter("outrigger.xds.responses", metric.WithUnit("{response}"), metric.WithDescription("Discovery responses sent, by type"))
	out.resources, errs[2] = m.Int64Counter("outrigger.xds.resources", metric.WithUnit("{resource}"), metric.WithDescription("Resources sent, by type"))
	out.nacks, errs[3] = m.Int64Counter("outrigger.xds.nacks", metric.WithUnit("{response}"), metric.WithDescription("Responses rejected by clients, by type"))
	out.ack, errs[4] = m.Float64Histogram("outrigger.xds.push.duration", metric.WithUnit("s"), metric.WithDescription("From Publish until a stream accepted all of the push"))
	out.beats, errs[5] = m.Int64Counter("outrigger.xds.heartbeats", metric.WithUnit("{response}"), metric.WithDescription("Responses that renew what is leased and say nothing else"))
	out.resent, errs[6] = m.Int64Counter("outrigger.xds.resent", metric.WithUnit("{resource}"), metric.WithDescription("Resources sent to clients that had them at that version, by type"))
	for _, err := range errs {
		if err != nil {
			panic("adsserver: instrument refused: " + err.Error())
		}
	}
	return &out
}

func (m *metrics) streams(ctx context.Context, n int64) { m.open.Add(ctx, n) }

func (m *metrics) response(ctx context.Context, typeURL string, resources int) {
	by := m.label(typeURL)
	m.responses.Add(ctx, 1, by)
	m.resources.Add(ctx, int64(resources), by)
}

func (m *metrics) heartbeat(ctx context.Context) { m.beats.Add(ctx, 1) }

func (m *metrics) again(ctx context.Context, typeURL string, resources int) {
	m.resent.Add(ctx, int64(resources), m.label(typeURL))
}

func (m *metrics) nacked(ctx context.Context, typeURL string) {
	m.nacks.Add(ctx, 1, m.label(typeURL))
}

func (m *metrics) settled(ctx context.Context, d time.Duration) { m.ack.Record(ctx, d.Seconds()) }
