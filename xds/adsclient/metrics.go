package adsclient

import (
	"context"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
)

type metrics struct {
	commits metric.Int64Counter
	nacks   metric.Int64Counter
}

func newMetrics(m metric.Meter) *metrics {
	if m == nil {
		m = noop.Meter{}
	}
	var out metrics
	var errs [2]error
	out.commits, errs[0] = m.Int64Counter("outrigger.xds.client.policies", metric.WithUnit("{policy}"), metric.WithDescription("Policies put in force from the control plane"))
	out.nacks, errs[1] = m.Int64Counter("outrigger.xds.client.nacks", metric.WithUnit("{response}"), metric.WithDescription("Responses rejected"))
	for _, err := range errs {
		if err != nil {
			panic("adsclient: instrument refused: " + err.Error())
		}
	}
	return &out
}

// Commits and rejections belong to no request, so there is no context to carry.
func (m *metrics) commit() { m.commits.Add(context.Background(), 1) }
func (m *metrics) nack()   { m.nacks.Add(context.Background(), 1) }
