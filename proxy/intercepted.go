package proxy

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/outrigger-mesh/outrigger/proxy/intercept/proxyproto"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/redirect"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
)

// Interception says where redirected connections arrive and what is done with them; see
// proxy/intercept/redirect. Listeners are closed by Run.
type Interception struct {
	Outbound, Inbound *net.TCPListener // either may be nil
	Transparent       bool             // they are TPROXY's

	Routes []upstream.Rule // destinations whose HTTP/1 is served: variables, models, else passed on
	Names  []redirect.Name // TLS server names that go elsewhere
	Allow  []upstream.Rule // destinations dialled although they are link-local or metadata

	ProxyFrom []netip.Prefix
	ProxyOut  proxyproto.Version
	Idle      time.Duration
	MaxConns  int

	// Sockets and Mark tell the sidecar's own connections; see upstream.GuardOptions.
	Sockets *upstream.Sockets
	Mark    uint32
}

// wireIntercept makes the server of redirected connections. Unlike what operators
// configure, the destinations are the application's choice: loopback and metadata are
// refused.
func (s *Sidecar) wireIntercept() error {
	i := s.opts.Intercept
	if i == nil {
		return nil
	}
	var err error
	s.redirect, err = redirect.New(redirect.Options{Own: s.opts.Own, Sockets: i.Sockets,
		Guard:  upstream.NewGuard(upstream.GuardOptions{Own: s.opts.Own, Allow: i.Allow, Sockets: i.Sockets, Mark: i.Mark}),
		Serve:  s.serveRedirected,
		Routes: i.Routes, Names: i.Names, Transparent: i.Transparent, ProxyFrom: i.ProxyFrom, ProxyOut: i.ProxyOut,
		Idle: i.Idle, MaxConns: i.MaxConns, Life: s.life, Logger: s.opts.Logger})
	if err != nil {
		return err
	}
	s.routed = &http.Server{Handler: s.http.Handler, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog: s.http.ErrorLog, BaseContext: s.http.BaseContext,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if d, ok := c.(interface{ Destination() netip.AddrPort }); ok {
				return upstream.WithDestination(ctx, d.Destination())
			}
			return ctx
		}}
	return nil
}

// serveRedirected takes a connection to a loopback port as if it had come to the
// sidecar's own listener.
func (s *Sidecar) serveRedirected(c *net.TCPConn) {
	if err := s.loop.Adopt(c); err != nil {
		s.opts.Logger.Warn("redirected connection dropped", "from", c.RemoteAddr(), "error", err)
	}
}

// runIntercept starts what serves redirected connections; late is when none that was
// accepted can still be on its way to a server.
func (s *Sidecar) runIntercept(ctx, late context.Context, g *errgroup.Group) {
	i := s.opts.Intercept
	if i == nil {
		return
	}
	for _, l := range []struct {
		l *net.TCPListener
		d redirect.Direction
	}{{i.Outbound, redirect.Outbound}, {i.Inbound, redirect.Inbound}} {
		if l.l != nil {
			s.tunnels.enter() // the drain waits for what is passed on, and cuts it in the end
			g.Go(func() error {
				defer s.tunnels.leave()
				return s.redirect.Run(ctx, l.l, l.d)
			})
		}
	}
	g.Go(func() error { return ended(ctx, s.routed.Serve(s.redirect.HTTP())) })
	context.AfterFunc(late, func() { _ = s.redirect.Close() }) // it cannot fail
}

// passthrough is the handler of what the sidecar does not serve, and whether it takes a
// request: those of redirected connections go where they were going, the others to base.
func (s *Sidecar) passthrough(base http.Handler) (http.Handler, func(*http.Request) bool) {
	if s.opts.Intercept == nil {
		return base, nil
	}
	origin := upstream.NewForwarder(upstream.ForwarderOptions{Transport: s.transport, Logger: s.opts.Logger})
	redirected := func(r *http.Request) bool {
		_, ok := upstream.Destination(r.Context())
		return ok
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case redirected(r):
			origin.ServeHTTP(w, r)
		case base != nil:
			base.ServeHTTP(w, r)
		default:
			notServed(w, r)
		}
	}), func(r *http.Request) bool { return base != nil || redirected(r) }
}
