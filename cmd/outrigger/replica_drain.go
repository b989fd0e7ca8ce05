//go:build !dataplane

package main

import (
	"context"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
)

// A control plane's streams never end by themselves, so one that waits for them would stop when
// its grace is over, with clients that have heard of nothing for as long. This is how it stops
// instead: it takes no new connections and tells the old ones to go (GOAWAY), so that new calls
// go elsewhere; ends the xDS streams one after the other, with everything running, so that
// clients go to other replicas and not all at once; lets calls finish; and then cuts what is
// left: feeds, reports and copies of the log, whose owners go on elsewhere where they were.

// goAwaySettles is how long calls may still arrive that were made before their client had heard
// of the GOAWAY.
const goAwaySettles = 250 * time.Millisecond

// handOverPerStream is the pause between two xDS streams: a client that comes elsewhere costs
// well under it.
const handOverPerStream = time.Millisecond

// serveReplica serves until the process stops, then hands over and drains, within grace
// together. drain ends the xDS streams, with a pause between two.
func (p *process) serveReplica(l net.Listener, s *grpc.Server, calls *inFlight, drain func(context.Context, time.Duration) error, grace time.Duration) {
	p.group.Go(func() error { return s.Serve(l) })
	goAway := func() {
		p.group.Go(func() error { s.GracefulStop(); return nil }) // ends with Stop, below
	}
	told := make(chan time.Time, 1) // when clients were told to go
	p.handOver = func() {
		ctx, cancel := context.WithTimeout(p.ctx, grace/2)
		defer cancel()
		told <- time.Now()
		goAway()
		if err := drain(ctx, handOverPerStream); err != nil {
			p.log.Warn("not every client was handed over in time", "error", err)
		}
	}
	p.group.Go(func() error {
		<-p.ctx.Done()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(p.ctx), grace)
		defer cancel()
		var since time.Time
		select {
		case since = <-told:
		default:
			goAway() // a part failed: nobody was told before
			since = time.Now()
		}
		calls.finish(ctx, time.Until(since.Add(goAwaySettles)))
		s.Stop()
		return nil
	})
}

// inFlight counts the calls under way that have one answer.
type inFlight struct {
	n    atomic.Int64
	none chan struct{} // capacity 1: there were none for a moment
}

func newInFlight() *inFlight { return &inFlight{none: make(chan struct{}, 1)} }

// count is a grpc.UnaryServerInterceptor.
func (f *inFlight) count(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	f.n.Add(1)
	defer func() {
		if f.n.Add(-1) == 0 {
			select {
			case f.none <- struct{}{}:
			default:
			}
		}
	}()
	return next(ctx, req)
}

// finish waits at least so long, and then until there are none, or ctx ends.
func (f *inFlight) finish(ctx context.Context, least time.Duration) {
	t := time.NewTimer(max(0, least))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	for f.n.Load() > 0 {
		select {
		case <-f.none:
		case <-ctx.Done():
			return
		}
	}
}
