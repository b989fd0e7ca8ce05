package proxy

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/outrigger-mesh/outrigger/proxy/intercept"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
)

// Run serves l until ctx ends, then drains within Grace. It returns when everything has
// ended; the error says what failed, nil after an orderly end. Call it once.
func (s *Sidecar) Run(ctx context.Context, l net.Listener) error {
	g, gctx := errgroup.WithContext(ctx)
	// Reports go on through the drain: what finishes then must be counted too.
	reporting, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	if s.reporter != nil {
		g.Go(func() error { return s.reporter.Run(reporting) })
	}
	g.Go(func() error { return s.inference.RunShadows(gctx) })
	g.Go(func() error { return s.inference.RunAnswers(gctx) })
	late := gctx
	if hasDescriptor(l) {
		late = s.afterLinger(gctx)
		g.Go(func() error { return s.loop.Run(gctx, l) })
		context.AfterFunc(late, s.door.Close)
	} else {
		g.Go(func() error { return s.door.Run(gctx, l) })
		g.Go(func() error { return ended(gctx, s.http.Serve(s.door.HTTP1())) })
	}
	g.Go(func() error { return ended(late, s.http2.Run(late, s.door.HTTP2())) })
	s.runIntercept(gctx, late, g)
	g.Go(func() error {
		<-gctx.Done()
		s.drain(late)
		stop()
		return nil
	})
	err := g.Wait()
	s.grpc.Stop() // it has no connections of its own, and its calls have ended with http2's
	s.cut()       // for a connection that slipped in while the drain began
	s.http1.wait()
	s.tunnels.wait()
	return err
}

// handOverLinger is how long connections between requests stay after a hand-over: a
// client that is at work sends its next request sooner, and is told to connect anew.
const handOverLinger = 2 * time.Second

// HandOver says that another process serves the same listeners from now on. The end of
// Run's context then leaves what has not been accepted to it, and closes no connection on
// which a request may be on its way: such connections stay for up to 2 s or half of Grace,
// and the next answer on each announces the close. Call it before that end, once.
func (s *Sidecar) HandOver() {
	s.handedOver.Store(true)
	s.loop.HandOver(handOverLinger)
}

// afterLinger ends with ctx, or, after a hand-over, when connections that were accepted
// just before have had the time to say what they speak.
func (s *Sidecar) afterLinger(ctx context.Context) context.Context {
	late, cancel := context.WithCancel(context.WithoutCancel(ctx))
	context.AfterFunc(ctx, func() {
		if s.handedOver.Load() {
			time.AfterFunc(min(handOverLinger, s.opts.Grace/2), cancel)
			return
		}
		cancel()
	})
	return late
}

// hasDescriptor reports whether l is a socket of the kernel; in-memory ones, as tests
// have them, cannot be polled.
func hasDescriptor(l net.Listener) bool {
	switch l.(type) {
	case *net.TCPListener, *net.UnixListener:
		return true
	}
	return false
}

// ended hides the error a server returns because the door was closed on purpose.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// drain lets what is in flight finish, cuts what is left, and waits for its end.
func (s *Sidecar) drain(late context.Context) {
	close(s.draining)
	grace, cancel := context.WithTimeout(context.Background(), s.opts.Grace)
	defer cancel()
	var all sync.WaitGroup
	all.Go(func() {
		// Its error is that of grace; connections that were taken over are not its business.
		_ = s.http.Shutdown(grace)
		s.http1.wait()
	})
	all.Go(s.tunnels.wait)
	if s.routed != nil {
		all.Go(func() {
			<-late.Done()
			_ = s.routed.Shutdown(grace) // as above
		})
	}
	over := context.AfterFunc(grace, func() {
		s.opts.Logger.Warn("calls in flight are cut at the end of the grace", "grace", s.opts.Grace,
			"http", s.http1.count(), "tunnels", s.tunnels.count())
		s.cut()
		// It fails only where a connection is broken already.
		_ = s.http.Close()
		if s.routed != nil {
			_ = s.routed.Close()
		}
	})
	all.Wait()
	over()
	s.direct.CloseIdleConnections()
	s.secure.CloseIdleConnections()
	s.transport.CloseIdleConnections()
	s.models.Close()
}

// Limits of passed-through connections.
const (
	maxTunnels  = 4096
	dialTimeout = 5 * time.Second
)

// passTCP takes connections that are neither HTTP nor h2c. It returns at once: its
// caller holds one of the places for connections that are being looked at.
func (s *Sidecar) passTCP(c net.Conn, p intercept.Protocol) {
	if s.opts.UpstreamTCP == "" {
		s.opts.Logger.Debug("connection refused: no --upstream-tcp", "protocol", p, "from", c.RemoteAddr())
		c.Close()
		return
	}
	if s.tunnels.count() >= maxTunnels {
		s.opts.Logger.Warn("connection refused: too many are passed through", "limit", maxTunnels, "from", c.RemoteAddr())
		c.Close()
		return
	}
	s.tunnels.enter()
	go func() {
		defer s.tunnels.leave()
		defer c.Close()
		s.tunnel(c)
	}()
}

func (s *Sidecar) tunnel(c net.Conn) {
	bare, prefix, err := unwrap(c)
	if err != nil {
		return // the peer left
	}
	out, err := upstream.GuardedDial(s.opts.Dial, s.guard, dialTimeout)(s.life, "tcp", s.opts.UpstreamTCP)
	if err != nil {
		s.opts.Logger.Warn("pass-through failed", "upstream", s.opts.UpstreamTCP, "error", err)
		return
	}
	if _, err := upstream.Tunnel(s.life, bare, out, upstream.TunnelOptions{Prefix: prefix}); err != nil {
		s.opts.Logger.Debug("tunnel ended", "error", err)
	}
}

// unwrap returns the connection below c and what was read from it already: bare
// connections are copied in the kernel and can be closed one direction at a time.
func unwrap(c net.Conn) (bare net.Conn, prefix []byte, err error) {
	w, ok := c.(interface{ Unwrap() net.Conn })
	if !ok {
		return c, nil, nil
	}
	var buf [512]byte
	for bare = w.Unwrap(); bare == c; bare = w.Unwrap() {
		n, err := c.Read(buf[:])
		if err != nil {
			return nil, nil, err
		}
		prefix = append(prefix, buf[:n]...)
	}
	return bare, prefix, nil
}

// inflight counts things under way. Unlike a WaitGroup's, its wait may race with enter.
type inflight struct {
	mu    sync.Mutex
	n     int
	ended sync.Cond
}

func newInflight() *inflight {
	f := &inflight{}
	f.ended.L = &f.mu
	return f
}

func (f *inflight) enter() {
	f.mu.Lock()
	f.n++
	f.mu.Unlock()
}

func (f *inflight) leave() {
	f.mu.Lock()
	f.n--
	f.mu.Unlock()
	f.ended.Broadcast()
}

func (f *inflight) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.n
}

// wait blocks until nothing is under way.
func (f *inflight) wait() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.n > 0 {
		f.ended.Wait()
	}
}
