package node

import (
	"context"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/pause"
)

const (
	touchEvery = time.Second
	// maxTouched bounds the sessions remembered between two reports. One that is left out
	// was used in a second with 65,536 others; its expiry is an hour away, not a second.
	maxTouched = 1 << 16
)

type sessionKey struct{ tenant, id string }

// touches are the sessions reads through this agent used since the last report: reads
// from the table are invisible to the origin, which moves sliding expiries.
type touches struct {
	some chan struct{} // one element: there is something to report

	mu   sync.Mutex
	used map[sessionKey]struct{}
}

func (t *touches) add(k outrigger.Key) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.used == nil {
		t.used = map[sessionKey]struct{}{}
		select {
		case t.some <- struct{}{}:
		default: // a report is on its way that finds it
		}
	}
	if s := (sessionKey{k.Tenant, k.Session}); len(t.used) < maxTouched {
		t.used[s] = struct{}{}
	}
}

// take returns and forgets them, by tenant.
func (t *touches) take() map[string][]string {
	t.mu.Lock()
	used := t.used
	t.used = nil
	t.mu.Unlock()
	out := map[string][]string{}
	for s := range used {
		out[s.tenant] = append(out[s.tenant], s.id)
	}
	return out
}

// report reports touches until ctx ends, those of a second together. A node that is not used
// is not woken for it.
func (a *Agent) report(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.touched.some:
		}
		if pause.For(ctx, touchEvery) {
			a.reportTouches(ctx)
		}
	}
}

// reportTouches tells the origin. It is soft state: what cannot be told is dropped, and
// sessions the origin does not know are no error.
func (a *Agent) reportTouches(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, a.o.FetchTimeout)
	defer cancel()
	for tenant, ids := range a.touched.take() {
		for len(ids) > 0 {
			n := min(len(ids), outrigger.MaxBatch)
			if _, err := a.vars.TouchSessions(ctx, &pb.TouchSessionsRequest{Tenant: tenant, Ids: ids[:n]}); err != nil {
				a.o.Logger.Debug("touches are not reported", "error", err)
				return
			}
			ids = ids[n:]
		}
	}
}
