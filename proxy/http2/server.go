package http2

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"
)

// Run accepts from l and serves until ctx ends; see the package comment. It closes l. It
// returns nil after an orderly end, or the error that kept it from accepting.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	r := &run{s: s, base: context.WithValue(base, http.ServerContextKey, s.identity), conns: map[*conn]struct{}{},
		slots: make(chan struct{}, s.o.MaxConns)}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	err := r.accept(ctx, l)
	stop()
	l.Close()
	r.drain()
	ended := make(chan struct{})
	go func() { r.wg.Wait(); close(ended) }()
	grace := time.NewTimer(s.o.Grace)
	defer grace.Stop()
	select {
	case <-ended:
	case <-grace.C:
		s.o.Logger.Warn("streams were cut at the end of the grace", "grace", s.o.Grace)
		r.kill() // first: an answer to the cancellation would look like a complete one
		cancel()
		<-ended
	}
	return err
}

// run is one call of Run.
type run struct {
	s     *Server
	base  context.Context // of requests; ends with the grace
	slots chan struct{}
	wg    sync.WaitGroup // connections, drains and handlers

	mu    sync.Mutex
	conns map[*conn]struct{}
}

func (r *run) accept(ctx context.Context, l net.Listener) error {
	delay := time.Duration(0)
	for {
		select {
		case r.slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		nc, err := l.Accept()
		if err == nil {
			delay = 0
			r.start(nc)
			continue
		}
		<-r.slots
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		// Most likely out of descriptors: existing connections must free some first.
		delay = min(max(2*delay, 5*time.Millisecond), time.Second)
		r.s.o.Logger.Warn("accept failed; backing off", "error", err, "delay", delay)
		t := time.NewTimer(delay)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

// start serves nc on a goroutine of its own.
func (r *run) start(nc net.Conn) {
	c := newConn(r, nc)
	r.s.stats.accepted.Add(1)
	r.mu.Lock()
	r.conns[c] = struct{}{}
	r.mu.Unlock()
	r.wg.Go(func() {
		defer func() {
			r.mu.Lock()
			delete(r.conns, c)
			r.mu.Unlock()
			r.s.stats.closed.Add(1)
			<-r.slots
		}()
		c.serve()
	})
}

func (r *run) all() []*conn {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]*conn, 0, len(r.conns))
	for c := range r.conns {
		out = append(out, c)
	}
	return out
}

// drain tells every connection to finish.
func (r *run) drain() {
	for _, c := range r.all() {
		r.wg.Go(c.drain)
	}
}

// kill ends what is left.
func (r *run) kill() {
	for _, c := range r.all() {
		c.kill()
	}
}
