package node

import (
	"context"
	"maps"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/coherence"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// maxViolations bounds the violations kept for one report.
const maxViolations = 16

// freshness keeps what the freshness monitor found.
type freshness struct {
	mu      sync.Mutex
	byAge   map[string]uint64
	found   []*pb.FreshnessViolation // since the last report
	dropped uint64
}

// ageOf says how long ago the origin changed, by its wall clock and ours: the scale a
// person looks at, not a measurement.
func ageOf(v *pb.Variable, now time.Time) string {
	at := v.GetUpdatedAt()
	if at == nil {
		return "unknown" // a deletion, which the origin does not date
	}
	switch age := now.Sub(at.AsTime()); {
	case age <= time.Second:
		return "1s"
	case age <= 5*time.Second:
		return "5s"
	case age <= time.Minute:
		return "60s"
	}
	return "more"
}

// violated records that the table showed something outdated as current. The entry is
// replaced by the same step.
func (a *Agent) violated(o coherence.Stale) {
	now := time.Now()
	v := &pb.FreshnessViolation{Key: wire.KeyPB(o.Key), Current: o.Current.GetVersion().GetDot(),
		Age: ageOf(o.Current, now), FoundUnixNano: uint64(now.UnixNano())}
	if !o.Shown.IsZero() {
		v.Shown = wire.DotPB(o.Shown)
	}
	a.metrics.stale.Add(context.Background(), 1, metric.WithAttributes(attribute.String("age", v.Age)))
	a.o.Logger.Error("an entry was served as current and was not; it is repaired",
		"key", o.Key.String(), "shown", o.Shown.String(), "current", wire.Dot(v.Current).String(), "age", v.Age)
	f := &a.fresh
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.byAge == nil {
		f.byAge = map[string]uint64{}
	}
	f.byAge[v.Age]++
	if len(f.found) >= maxViolations {
		f.dropped++
		return
	}
	f.found = append(f.found, v)
}

// drain returns what was found since the last call, and how many more there were.
func (f *freshness) drain() (found []*pb.FreshnessViolation, dropped uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	found, dropped = f.found, f.dropped
	f.found, f.dropped = nil, 0
	return found, dropped
}

func (f *freshness) counts() map[string]uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.byAge)
}
