package proxy

import (
	"context"
	"slices"
	"sync"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
)

// maxTouches bounds the sessions remembered between two reports. A session that does
// not fit is touched by its next read.
const maxTouches = 8192

// outcomes passes late outcomes on to the control plane, so that an application knows its
// sidecar's address and nothing else.
type outcomes struct {
	pb.UnimplementedOutcomesServer
	to pb.OutcomesClient
}

// Record implements pb.OutcomesServer.
func (o outcomes) Record(ctx context.Context, r *pb.RecordOutcomesRequest) (*pb.RecordOutcomesResponse, error) {
	return o.to.Record(ctx, r)
}

// touches is the set of sessions that reads used since the last report: their sliding
// expiry moves when the control plane hears of it.
type touches struct {
	mu   sync.Mutex
	seen map[touched]struct{}
}

type touched struct{ tenant, session string }

func newTouches() *touches { return &touches{seen: map[touched]struct{}{}} }

func (t *touches) add(tenant, session string) {
	key := touched{tenant, session}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.seen) < maxTouches {
		t.seen[key] = struct{}{}
	}
}

// drain returns what was touched as "tenant/session", sorted, and forgets it.
func (t *touches) drain() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.seen) == 0 {
		return nil
	}
	out := make([]string, 0, len(t.seen))
	for k := range t.seen {
		out = append(out, k.tenant+"/"+k.session)
	}
	clear(t.seen)
	slices.Sort(out)
	return out
}

// hits are counters of answered reads at one moment.
type hits struct{ process, node, origin, stale, errors uint64 }

func (s *Sidecar) hits() hits {
	c := s.counters
	return hits{c.Process.Load(), c.Node.Load(), c.Origin.Load(), c.Stale.Load(), c.Errors.Load()}
}

// collect fills one delta with everything since the last: model calls of every version,
// good and bad, and what the cache did. One caller, the reporter.
func (s *Sidecar) collect(now time.Time, d *pb.Delta) bool {
	d.Outcomes = s.inference.Recorder().Drain(now)
	was, is := s.reported, s.hits()
	s.reported = is
	touched := s.touches.drain()
	if is != was || len(touched) > 0 {
		d.Cache = &pb.CacheDelta{HitsProcess: is.process - was.process, HitsNode: is.node - was.node, HitsOrigin: is.origin - was.origin,
			StaleServed: is.stale - was.stale, Errors: is.errors - was.errors, TouchedSessions: touched}
	}
	return len(d.Outcomes) > 0 || d.Cache != nil
}

// Clusters is the state of every endpoint of the policy in force: its breaker, requests in
// flight and latency.
func (s *Sidecar) Clusters() []inference.EndpointStats { return s.inference.LocalStats().Endpoints }
