package inference

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"

	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// limits are those of a version's circuit_breakers, defaults filled in.
type limits struct{ connections, pending, retries uint32 }

func limitOf(v *policy.Version) limits {
	requests := orDefault(v.MaxRequests, policy.DefaultMaxRequests)
	return limits{orDefault(v.MaxConnections, requests), orDefault(v.MaxPending, requests), v.MaxRetries}
}

// places are the connections of one version: whoever has one may make one request of
// HTTP/1.1 at a time. The limits come with each call, because a new policy keeps the
// places in use and may change how many there are.
type places struct {
	mu      sync.Mutex // held for bookkeeping only
	used    uint32
	limit   uint32 // of the last call
	waiting []chan struct{}
}

// pass gives free places to those who have waited longest; the lock is held.
func (p *places) pass() {
	for len(p.waiting) > 0 && p.used < p.limit {
		p.used++
		close(p.waiting[0])
		p.waiting = slices.Delete(p.waiting, 0, 1)
	}
}

// try takes a place if there is one and nobody waits.
func (p *places) try(limit uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limit = limit
	if p.pass(); p.used >= limit {
		return false
	}
	p.used++
	return true
}

// errPending: as many requests wait as may.
var errPending = errors.New("too many requests wait for a connection")

// enter takes a place, and waits for one in turn until ctx ends.
func (p *places) enter(ctx context.Context, l limits) error {
	p.mu.Lock()
	p.limit = l.connections
	if p.pass(); p.used < p.limit {
		p.used++
		p.mu.Unlock()
		return nil
	}
	if uint64(len(p.waiting)) >= uint64(l.pending) {
		p.mu.Unlock()
		return errPending
	}
	turn := make(chan struct{})
	p.waiting = append(p.waiting, turn)
	p.mu.Unlock()
	select {
	case <-turn: // the place is ours
		return nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	i := slices.Index(p.waiting, turn)
	if i >= 0 {
		p.waiting = slices.Delete(p.waiting, i, i+1)
	}
	p.mu.Unlock()
	if i < 0 { // given a place just now
		p.leave()
	}
	return context.Cause(ctx)
}

// leave gives a place back, or to who has waited longest.
func (p *places) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used--
	p.pass()
}

func (c *call) gate() *gate { return c.model.versions[c.assign.Version].gate }

// connect takes a connection's place for the request. If it is false there is none: the
// refusal says why, or the client is gone.
func (c *call) connect(ctx context.Context, g *gate) (ending, bool) {
	l := limitOf(c.assign.Version)
	switch err := g.conns.enter(ctx, l); {
	case err == nil:
		return ending{}, true
	case errors.Is(err, errPending):
		c.refusal.message = "version " + c.assign.Version.Name + " has all its connections in use and no room for more requests to wait; try again"
	case c.gone():
		return ending{verdict: relayed, cancelled: true, tag: "cancelled"}, false
	default:
		c.refusal = apiError{status: http.StatusGatewayTimeout, code: "timeout", retry: retryNo,
			message: "no connection to version " + c.assign.Version.Name + " became free within the time limit of the request"}
	}
	return ending{}, false
}

// mayRetry takes what another attempt of the call needs: a place among the retries in
// flight, given back by retried, and a part of the budget.
func (c *call) mayRetry() bool {
	g := c.gate()
	n := g.retries.Add(1)
	if most := c.assign.Version.MaxRetries; most > 0 && n > int64(most) || !c.model.budget.withdraw() {
		g.retries.Add(-1)
		return false
	}
	return true
}

func (c *call) retried() { c.gate().retries.Add(-1) }
