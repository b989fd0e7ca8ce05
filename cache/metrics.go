package cache

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// register declares the Store's instruments. The registration lives as long as the
// meter's provider: a process has one Store.
func (s *Store) register(m metric.Meter) error {
	reads, err := m.Int64ObservableCounter("outrigger.cache.reads", metric.WithUnit("{read}"),
		metric.WithDescription("Reads by the tier that answered; process counts look-ups before their proof."))
	if err != nil {
		return err
	}
	size, err := m.Int64ObservableGauge("outrigger.cache.process.size", metric.WithUnit("By"),
		metric.WithDescription("Bytes charged to the process tier."))
	if err != nil {
		return err
	}
	warmed, err := m.Int64ObservableCounter("outrigger.cache.process.warmed", metric.WithUnit("{entry}"),
		metric.WithDescription("Entries the process tier was given from the node's table at the start."))
	if err != nil {
		return err
	}
	_, err = m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		st := s.Stats()
		for answered, n := range map[string]uint64{"process": st.Process.Hits, "node": st.Node, "origin": st.Origin, "stale": st.Stale, "failed": st.Failed} {
			o.ObserveInt64(reads, int64(n), metric.WithAttributes(attribute.String("answered", answered)))
		}
		o.ObserveInt64(size, st.ProcessSize)
		o.ObserveInt64(warmed, int64(st.Warmed))
		return nil
	}, reads, size, warmed)
	return err
}
