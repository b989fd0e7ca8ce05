package pebble

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"

	"github.com/outrigger-mesh/outrigger"
)

// metrics are the instruments of one log. Safe for concurrent use.
type metrics struct {
	events, commits, refused metric.Int64Counter
	duration                 metric.Float64Histogram
}

func newMetrics(meter metric.Meter) (*metrics, error) {
	if meter == nil {
		meter = noop.NewMeterProvider().Meter("")
	}
	var m metrics
	var errs [4]error
	m.events, errs[0] = meter.Int64Counter("outrigger.eventlog.events", metric.WithDescription("events made durable"))
	m.commits, errs[1] = meter.Int64Counter("outrigger.eventlog.commits", metric.WithDescription("group commits"))
	m.refused, errs[2] = meter.Int64Counter("outrigger.eventlog.refused", metric.WithDescription("appends refused, by error kind"))
	m.duration, errs[3] = meter.Float64Histogram("outrigger.eventlog.commit.duration", metric.WithUnit("s"), metric.WithDescription("from taking a group to its sync"))
	for _, err := range errs {
		if err != nil {
			return nil, outrigger.Wrap(outrigger.Invalid, err, "event log metrics")
		}
	}
	return &m, nil
}

func (m *metrics) commit(events int, took time.Duration) {
	m.events.Add(context.Background(), int64(events))
	m.commits.Add(context.Background(), 1)
	m.duration.Record(context.Background(), took.Seconds())
}

func (m *metrics) refuse(err error) {
	m.refused.Add(context.Background(), 1, metric.WithAttributes(attribute.String("kind", outrigger.KindOf(err).String())))
}
