package variables

import (
	"context"
	"errors"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"

	"github.com/outrigger-mesh/outrigger"
)

// instruments are the metrics of the package, all declared in newInstruments.
type instruments struct {
	off       bool // nobody measures: skip what only a measurement needs
	meter     metric.Meter
	writes    metric.Int64Counter
	duration  metric.Float64Histogram
	conflicts metric.Int64Counter
	sweeps    metric.Int64Counter
	frames    metric.Int64Counter
	resets    metric.Int64Counter
	sessions  metric.Int64ObservableGauge
	live      metric.Int64ObservableGauge
	applied   metric.Int64ObservableGauge
	behind    metric.Int64ObservableGauge
	streams   metric.Int64ObservableGauge
	watches   metric.Int64ObservableGauge
}

func newInstruments(m metric.Meter) (*instruments, error) {
	off := m == nil
	if off {
		m = noop.NewMeterProvider().Meter("")
	}
	in := &instruments{off: off, meter: m}
	var first error
	counter := func(name, unit, what string) metric.Int64Counter {
		c, err := m.Int64Counter(name, metric.WithUnit(unit), metric.WithDescription(what))
		if first == nil {
			first = err
		}
		return c
	}
	gauge := func(name, unit, what string) metric.Int64ObservableGauge {
		g, err := m.Int64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(what))
		if first == nil {
			first = err
		}
		return g
	}
	in.writes = counter("outrigger.variables.writes", "{call}", "write calls by operation and outcome (ok or the error kind)")
	in.conflicts = counter("outrigger.variables.conflicts", "{append}", "appends that lost a race and were decided again")
	in.sweeps = counter("outrigger.variables.sessions_expired", "{session}", "sessions removed by the sweep")
	in.frames = counter("outrigger.feed.frames", "{frame}", "change frames sent to feed streams")
	in.resets = counter("outrigger.feed.resets", "{reset}", "feed streams told to flush")
	in.sessions = gauge("outrigger.variables.sessions", "{session}", "sessions")
	in.live = gauge("outrigger.variables.live", "{variable}", "live variables of all sessions")
	in.applied = gauge("outrigger.variables.applied", "{position}", "last log position in the projection")
	in.behind = gauge("outrigger.variables.behind", "{event}", "committed events not yet in the projection")
	in.streams = gauge("outrigger.feed.streams", "{stream}", "open feed streams")
	in.watches = gauge("outrigger.variables.watches", "{stream}", "open watch streams")
	var err error
	in.duration, err = m.Float64Histogram("outrigger.variables.write_duration", metric.WithUnit("s"),
		metric.WithDescription("time from a write call to its acknowledgement, by operation"))
	if first == nil {
		first = err
	}
	return in, outrigger.Wrap(outrigger.Invalid, first, "variables: create metrics")
}

// observe connects the gauges to s until unregister is called.
func (in *instruments) observe(s *Service) (unregister func(), err error) {
	reg, err := in.meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		st := s.Stats()
		o.ObserveInt64(in.sessions, int64(st.Sessions))
		o.ObserveInt64(in.live, int64(st.Variables))
		o.ObserveInt64(in.applied, int64(st.Applied))
		o.ObserveInt64(in.behind, int64(st.Head-min(st.Head, st.Applied)))
		o.ObserveInt64(in.streams, int64(len(st.Feeds)))
		o.ObserveInt64(in.watches, int64(st.Watches))
		return nil
	}, in.sessions, in.live, in.applied, in.behind, in.streams, in.watches)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, "variables: register metrics")
	}
	return func() {
		// Unregister fails only for a meter that has been shut down, which has forgotten us.
		_ = reg.Unregister()
	}, nil
}

// wrote records one write call.
func (in *instruments) wrote(ctx context.Context, op string, took time.Duration, err error) {
	if in.off {
		return
	}
	outcome := "ok"
	if err != nil {
		outcome = outrigger.KindOf(err).String()
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			outcome = outrigger.Cancelled.String()
		}
	}
	in.writes.Add(ctx, 1, metric.WithAttributes(attribute.String("op", op), attribute.String("outcome", outcome)))
	in.duration.Record(ctx, took.Seconds(), metric.WithAttributes(attribute.String("op", op)))
}

func (in *instruments) expired(ctx context.Context, n int) { in.sweeps.Add(ctx, int64(n)) }
