package loop

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// Options of a Server. Slow is required.
type Options struct {
	// Loops is the number of event loops; 0 = see the package comment.
	Loops int
	// Fast answers a request from memory: it appends the complete answer, head and body,
	// to dst and returns it, or declines with ok = false, whereupon what it appended is
	// dropped. It is asked only for requests that are Simple, and must mind the method
	// (HEAD has no body). req.Date is set; req and dst are valid during the call only. It
	// must not block and is called by several goroutines at once. nil = everything is Slow.
	Fast func(req *http1.Request, dst []byte) (out []byte, ok bool)
	// Relay carries calls to servers from the loops; nil = none. Where there are no loops
	// it is not asked.
	Relay Relay
	// Slow serves every other request.
	Slow http.Handler
	// Other owns a connection whose first bytes are not HTTP/1, and those bytes, which
	// were taken off it. nil closes such connections, with a 400.
	Other func(c net.Conn, first []byte)

	Limits   http1.Limits // of a head
	MaxConns int          // open at once; default 16384

	// HeaderTimeout bounds the time from the first byte of a request to the end of its
	// head; default 10 s.
	HeaderTimeout time.Duration
	// IdleTimeout closes a connection without a request; default 5 min.
	IdleTimeout time.Duration
	// BodyTimeout bounds each wait for more of a request body, WriteTimeout each wait for
	// a client that does not read its answer; default 30 s. A handler replaces them with a
	// deadline of its own through http.ResponseController.
	BodyTimeout, WriteTimeout time.Duration
	// BodyPatience is how long a loop waits for the rest of a body it may relay before a
	// worker does; default 200 ms.
	BodyPatience time.Duration
	// Grace is how long requests in flight may go on once Run's context ends; default 10 s.
	Grace time.Duration

	Logger *slog.Logger // nil discards
	Meter  metric.Meter // nil records nothing
}

// Server serves connections. Its methods may be called by several goroutines.
type Server struct {
	o       Options
	workers workers
	stats   []*stats // one per loop, and one for goroutine-per-connection serving
	buffers sync.Pool
	xs      sync.Pool

	// identity is in every request's context under http.ServerContextKey, because
	// httputil.ReverseProxy breaks an answer off visibly only if it is.
	identity *http.Server

	draining atomic.Bool
	linger   atomic.Int64                             // see HandOver
	adopter  atomic.Pointer[func(*net.TCPConn) error] // while Run runs
}

// Adopt serves a connection that somebody else has accepted, and nothing has read from,
// as one of Run's own: by the loops, counted against MaxConns. c is taken over whatever
// the result. Errors: Unavailable outside Run and where there are no loops, Exhausted at
// a limit.
func (s *Server) Adopt(c *net.TCPConn) error {
	if adopt := s.adopter.Load(); adopt != nil {
		return (*adopt)(c)
	}
	c.Close()
	return outrigger.Errorf(outrigger.Unavailable, "loop: no event loop is running")
}

// HandOver says that another process has the listening socket too. When Run's context then
// ends, connections nobody has accepted yet are left to that process, and those between
// requests, where a request may be on its way, get up to linger, at most half of Grace, to
// carry one more, which is answered with Connection: close. Call it before that end.
func (s *Server) HandOver(linger time.Duration) { s.linger.Store(int64(min(linger, s.o.Grace/2))) }

// stats are written by one goroutine each, except slow, and read by the meter; the
// padding keeps loops off each other's cache lines.
type stats struct {
	accepted, closed, fast, relayed, slow, refused, other, panics atomic.Int64
	_                                                             [128]byte
}

// New checks the options; it starts nothing. Errors have kind Invalid.
func New(o Options) (*Server, error) {
	if o.Slow == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "loop: Options.Slow is nil; give a handler for what Fast declines")
	}
	if o.Loops <= 0 {
		o.Loops = max(1, runtime.NumCPU()/2)
	}
	if o.MaxConns <= 0 {
		o.MaxConns = 16384
	}
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{{&o.HeaderTimeout, 10 * time.Second}, {&o.IdleTimeout, 5 * time.Minute}, {&o.BodyTimeout, 30 * time.Second},
		{&o.WriteTimeout, 30 * time.Second}, {&o.Grace, 10 * time.Second}, {&o.BodyPatience, 200 * time.Millisecond}} {
		if *d.v <= 0 {
			*d.v = d.def
		}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{o: o, identity: &http.Server{Handler: o.Slow}}
	for range o.Loops + 1 {
		s.stats = append(s.stats, new(stats))
	}
	s.workers.idle = make([]*worker, 0, maxIdleWorkers)
	return s, s.observe()
}

// Counts are totals since New.
type Counts struct {
	Accepted int64 // connections
	Open     int64 // connections now; those given to Other or hijacked count until that function returns
	Fast     int64 // requests answered by Fast
	Relayed  int64 // requests that the loop carried to a server and back, or until their client left
	Slow     int64 // requests given to Slow
	Refused  int64 // messages that could not be framed
	Other    int64 // connections given to Other
	Panics   int64 // in Fast and Slow
}

// Counts sums over the loops; the figures are each exact and together approximate.
func (s *Server) Counts() (c Counts) {
	for _, st := range s.stats {
		c.Accepted += st.accepted.Load()
		c.Open += st.accepted.Load() - st.closed.Load()
		c.Fast += st.fast.Load()
		c.Relayed += st.relayed.Load()
		c.Slow += st.slow.Load()
		c.Refused += st.refused.Load()
		c.Other += st.other.Load()
		c.Panics += st.panics.Load()
	}
	return c
}

// observe registers the instruments; they read the loops' counters when scraped.
func (s *Server) observe() error {
	m := s.o.Meter
	if m == nil {
		return nil
	}
	open, err := m.Int64ObservableUpDownCounter("outrigger.http1.connections", metric.WithUnit("{connection}"),
		metric.WithDescription("Client connections open, upgraded ones not counted."))
	if err != nil {
		return outrigger.Wrap(outrigger.Invalid, err, "loop: create metric")
	}
	requests, err := m.Int64ObservableCounter("outrigger.http1.requests", metric.WithUnit("{request}"),
		metric.WithDescription("Requests by path: fast (answered in the loop), relayed (to a server and back by the loop), slow (by a handler), refused (malformed)."))
	if err != nil {
		return outrigger.Wrap(outrigger.Invalid, err, "loop: create metric")
	}
	fast := metric.WithAttributes(attribute.String("path", "fast"))
	relayed := metric.WithAttributes(attribute.String("path", "relayed"))
	slow := metric.WithAttributes(attribute.String("path", "slow"))
	refused := metric.WithAttributes(attribute.String("path", "refused"))
	_, err = m.RegisterCallback(func(_ context.Context, ob metric.Observer) error {
		c := s.Counts()
		ob.ObserveInt64(open, c.Open)
		ob.ObserveInt64(requests, c.Fast, fast)
		ob.ObserveInt64(requests, c.Relayed, relayed)
		ob.ObserveInt64(requests, c.Slow, slow)
		ob.ObserveInt64(requests, c.Refused, refused)
		return nil
	}, open, requests)
	return outrigger.Wrap(outrigger.Invalid, err, "loop: register metric")
}
