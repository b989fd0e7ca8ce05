// Package redirect takes the connections that the rules of proxy/intercept/rules bring
// to the sidecar, finds out where each was going, and serves it, looks into it, or passes
// it on.
//
// What becomes of a connection is decided from its addresses alone, before a byte is
// read (see decide):
//
//   - refused, with a reset: no original destination, one of the sidecar's own
//     listeners, a connection the sidecar itself has opened, cloud metadata and
//     link-local addresses, whatever else the guard refuses;
//   - served: loopback destinations, which only reach the sidecar if their port was
//     listed; they are given to Serve untouched and never dialled;
//   - looked into: destinations named by Routes, which carry model traffic. HTTP/1 goes
//     to the listener HTTP, TLS is routed by server name (SNI), the rest is passed on;
//   - passed on: everything else, at once. No byte is waited for, so protocols in which
//     the server speaks first lose nothing but the dial.
//
// Looking never stalls: a client that stays silent for Patience has its destination
// dialled, and from then on whoever speaks first decides. A server that does makes the
// connection a tunnel. (A destination that is looked into may therefore see a connection
// that is opened and closed again without a byte.)
//
// Passed-on connections are bare TCP on both sides, so the kernel copies (splice); the
// end of one direction is passed on alone; a silence of both longer than Idle ends them.
//
// Overload and failure: at most MaxConns connections, beyond that new ones wait in the
// kernel. Without descriptors the accept loop does not end: it sheds the oldest waiting
// connection by means of a descriptor kept in reserve, and backs off from 5 ms to 1 s. A
// destination that cannot be dialled is a reset. Nothing read is buffered beyond the
// 16 KiB of a TLS client hello. New starts nothing; Run returns when its goroutines have
// ended: what is under way goes on until it ends or Options.Life does.
package redirect

import (
	"cmp"
	"context"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/hello"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/proxyproto"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
)

// Options of a Server. Serve and Own are required.
type Options struct {
	// Own are the sidecar's listeners, these included. Their ports are refused as
	// destinations on every address of this machine.
	Own []netip.AddrPort
	// Guard says what may be dialled, and its Sockets, if any, which connections are the
	// sidecar's own.
	Guard   *upstream.Guard
	Sockets *upstream.Sockets
	// Serve owns a connection to a listed loopback port; nothing was read from it.
	Serve func(c *net.TCPConn)
	// Routes are the destinations that are looked into.
	Routes []upstream.Rule
	// Names route TLS at those destinations.
	Names []Name
	// Transparent says that the listeners are TPROXY's: a connection's local address is
	// its original destination.
	Transparent bool
	// ProxyFrom are peers whose inbound connections begin with a PROXY header, all of
	// them; one that does not is refused. ProxyOut is the version of the header that is
	// put before inbound connections when they are passed on; 0 = none.
	ProxyFrom []netip.Prefix
	ProxyOut  proxyproto.Version

	Patience     time.Duration // default 2 ms
	SniffTimeout time.Duration // bounds looking; default 10 s
	DialTimeout  time.Duration // default 5 s
	Idle         time.Duration // default 1 h
	MaxConns     int           // passed on or looked into at once; default 16384
	// Life ends the connections that are left; nil = never.
	Life   context.Context
	Logger *slog.Logger
}

// Name sends TLS connections for a server name elsewhere.
type Name struct {
	// Pattern is a host name in lower case, or "*." and a domain: exactly one label more.
	Pattern string
	To      netip.AddrPort
}

// Counts are totals since New.
type Counts struct {
	Accepted int64 `json:"accepted"`
	Served   int64 `json:"served"` // given to Serve
	Looked   int64 `json:"looked"` // at Routes
	Passed   int64 `json:"passed"` // dialled at once
	Refused  int64 `json:"refused"`
	Shed     int64 `json:"shed"`   // turned away for lack of descriptors; not accepted
	Failed   int64 `json:"failed"` // their destination could not be dialled
	Open     int64 `json:"open"`   // now
}

// Server takes intercepted connections.
type Server struct {
	o     Options
	ports []uint16
	dial  upstream.DialFunc
	slots chan struct{}
	http  *queue
	loud  atomic.Int64 // unix second of the last warning

	original func(*net.TCPConn) (netip.AddrPort, error)

	accepted, served, looked, passed, refused, shed, failed, open atomic.Int64
}

// New checks the options; it starts nothing. Errors have kind Invalid, or Unavailable on
// systems other than Linux.
func New(o Options) (*Server, error) {
	if err := supported(); err != nil {
		return nil, err
	}
	if o.Serve == nil || len(o.Own) == 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "redirect: Serve and Own are required")
	}
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{{&o.Patience, 2 * time.Millisecond}, {&o.SniffTimeout, 10 * time.Second}, {&o.DialTimeout, 5 * time.Second}, {&o.Idle, time.Hour}} {
		if *d.v <= 0 {
			*d.v = d.def
		}
	}
	if o.MaxConns <= 0 {
		o.MaxConns = 16384
	}
	if o.Life == nil {
		o.Life = context.Background()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{o: o, slots: make(chan struct{}, o.MaxConns), http: newQueue()}
	for _, a := range o.Own {
		s.ports = append(s.ports, a.Port())
	}
	// Whole names before patterns; of these at most one matches.
	s.o.Names = slices.SortedStableFunc(slices.Values(o.Names), func(a, b Name) int {
		return cmp.Compare(strings.Count(a.Pattern, "*"), strings.Count(b.Pattern, "*"))
	})
	s.original = originalDestination
	if o.Transparent {
		s.original = func(c *net.TCPConn) (netip.AddrPort, error) { return address(c.LocalAddr()), nil }
	}
	s.dial = upstream.GuardedDial(nil, o.Guard, o.DialTimeout)
	return s, nil
}

// HTTP is the listener of HTTP/1 connections at Routes; what it accepts has a method
// Destination. It ends with Close.
func (s *Server) HTTP() net.Listener { return s.http }

// Close ends HTTP. Call it when every Run has returned or is about to.
func (s *Server) Close() error { return s.http.Close() }

// Counts returns the totals.
func (s *Server) Counts() Counts {
	return Counts{Accepted: s.accepted.Load(), Served: s.served.Load(), Looked: s.looked.Load(), Passed: s.passed.Load(),
		Refused: s.refused.Load(), Shed: s.shed.Load(), Failed: s.failed.Load(), Open: s.open.Load()}
}

// Run accepts from l until ctx ends, closes it, and returns when the connections it
// accepted have ended or were given away. Several may run, one per listener.
func (s *Server) Run(ctx context.Context, l *net.TCPListener, d Direction) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	a := &acceptor{l: l, s: s}
	defer a.close()
	for {
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, err := a.accept(ctx)
		if err != nil || c == nil {
			<-s.slots
			if ctx.Err() != nil {
				return nil
			}
			if err != nil {
				return err
			}
			continue
		}
		s.accepted.Add(1)
		s.open.Add(1)
		wg.Go(func() {
			defer func() { s.open.Add(-1); <-s.slots }()
			s.handle(c, d)
		})
	}
}

// handle owns c.
func (s *Server) handle(c *net.TCPConn, d Direction) {
	x := &exchange{s: s, c: c, d: d, from: address(c.RemoteAddr()), client: address(c.RemoteAddr())}
	to, err := s.original(c)
	if err != nil {
		x.refuse("its original destination is not known: " + err.Error())
		return
	}
	x.to = to
	action, why := decide(d, x.from, to, facts{own: s.ports, local: isLocal, mine: s.mine, allowed: s.o.Guard.Check, routes: s.o.Routes})
	if action != refuse && action != serve && d == Inbound {
		if err := x.readProxyHeader(); err != nil {
			action, why = refuse, err.Error()
		}
	}
	switch action {
	case refuse:
		x.refuse(why)
	case serve:
		s.served.Add(1)
		s.o.Serve(c)
	case look:
		s.looked.Add(1)
		x.look()
	case pass:
		s.passed.Add(1)
		x.pass(nil)
	}
}

func (s *Server) mine(from, to netip.AddrPort) bool { return s.o.Sockets.Has(from, to) }

// isLocal asks the kernel each time: it is reached only for ports that are the
// sidecar's, and addresses come and go.
func isLocal(a netip.Addr) bool {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return true // rather refuse than loop
	}
	for _, have := range all {
		if n, ok := have.(*net.IPNet); ok {
			if b, ok := netip.AddrFromSlice(n.IP); ok && b.Unmap() == a.WithZone("") {
				return true
			}
		}
	}
	return false
}

// address is that of a TCP address, without ::ffff: mapping.
func address(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// name returns where TLS for a server name goes; false for the original destination.
func (s *Server) name(sni string) (netip.AddrPort, bool) {
	for _, n := range s.o.Names {
		if hello.Matches(n.Pattern, sni) {
			return n.To, true
		}
	}
	return netip.AddrPort{}, false
}
