package http2

import (
	"log/slog"
	"net/http"
	"sync/atomic"
	"time"

	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/outrigger-mesh/outrigger"
)

// Inline answers calls from memory. Its methods are called by many goroutines at once,
// while they hold up a connection: they must not block.
type Inline interface {
	// Class says what kind of request this is, by its head alone; 0 = not one for Answer.
	// It is asked once for equal heads in a row.
	Class(h *Head) int
	// Answer answers a request of a class other than 0 with the given body, which is valid
	// during the call only. It fills in a, or declines with false.
	Answer(class int, body []byte, a *Answer) bool
}

// Answer is an answer ready to be sent. Its slices are not changed and not kept, but Block
// may be appended to where it points: it comes empty, with what was used before as room.
type Answer struct {
	Block   []byte // header block, made by AppendStatus and AppendField
	Body    []byte
	Trailer []byte // header block of the trailer; nil = none
}

// maxInline is how much of a body is waited for before Handler is asked, in bytes: a read
// is two names.
const maxInline = 4 << 10

// Options of a Server. Handler is required.
type Options struct {
	Inline  Inline // nil = nothing is answered from memory
	Handler http.Handler

	MaxStreams int // at once, per connection; default 1024
	MaxConns   int // open at once; default 16384

	// HeaderTimeout bounds how long the rest of a frame or header block may take; default 10 s.
	HeaderTimeout time.Duration
	// IdleTimeout ends a connection without a stream; default 5 min.
	IdleTimeout time.Duration
	// BodyTimeout bounds each wait for more of a request body, WriteTimeout each wait for a
	// client that takes nothing of its answer; default 30 s. A handler replaces them with a
	// deadline of its own through http.ResponseController. The streams of gRPC have neither;
	// what the socket takes has WriteTimeout for all.
	BodyTimeout, WriteTimeout time.Duration
	// Grace is how long streams may go on once Run's context ends; default 10 s.
	Grace time.Duration

	Logger *slog.Logger // nil discards
	Meter  metric.Meter // nil records nothing
}

// Server serves connections. Its methods may be called by several goroutines.
type Server struct {
	o     Options
	stats stats

	// identity is in every request's context under http.ServerContextKey, because
	// httputil.ReverseProxy breaks an answer off visibly only if it is.
	identity *http.Server
}

type stats struct {
	accepted, closed, inline, handled, refused, abused, panics atomic.Int64
}

// New checks the options; it starts nothing. Errors have kind Invalid.
func New(o Options) (*Server, error) {
	if o.Handler == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "http2: Options.Handler is nil; give a handler for what Inline declines")
	}
	if o.MaxStreams <= 0 {
		o.MaxStreams = 1024
	}
	if o.MaxConns <= 0 {
		o.MaxConns = 16384
	}
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{{&o.HeaderTimeout, 10 * time.Second}, {&o.IdleTimeout, 5 * time.Minute}, {&o.BodyTimeout, 30 * time.Second},
		{&o.WriteTimeout, 30 * time.Second}, {&o.Grace, 10 * time.Second}} {
		if *d.v <= 0 {
			*d.v = d.def
		}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{o: o, identity: &http.Server{Handler: o.Handler}}
	return s, s.observe()
}

// Counts are totals since New.
type Counts struct {
	Accepted int64 // connections
	Open     int64 // connections now
	Inline   int64 // requests answered by Inline
	Handled  int64 // requests given to Handler
	Refused  int64 // streams that were malformed or too many
	Abused   int64 // connections ended because their budget was used up or a bound exceeded
	Panics   int64
}

// Counts are each exact and together approximate.
func (s *Server) Counts() Counts {
	st := &s.stats
	accepted := st.accepted.Load()
	return Counts{Accepted: accepted, Open: accepted - st.closed.Load(), Inline: st.inline.Load(), Handled: st.handled.Load(),
		Refused: st.refused.Load(), Abused: st.abused.Load(), Panics: st.panics.Load()}
}

// observe registers the instruments; they read the counters when scraped.
func (s *Server) observe() error {
	m := s.o.Meter
	if m == nil {
		return nil
	}
	open, err := m.Int64ObservableUpDownCounter("outrigger.http2.connections", metric.WithUnit("{connection}"),
		metric.WithDescription("HTTP/2 client connections open."))
	if err != nil {
		return outrigger.Wrap(outrigger.Invalid, err, "http2: create metric")
	}
	requests, err := m.Int64ObservableCounter("outrigger.http2.requests", metric.WithUnit("{request}"),
		metric.WithDescription("HTTP/2 requests by path: fast (answered from memory), slow (by a handler), refused (malformed or too many)."))
	if err != nil {
		return outrigger.Wrap(outrigger.Invalid, err, "http2: create metric")
	}
	fast := metric.WithAttributes(attribute.String("path", "fast"))
	slow := metric.WithAttributes(attribute.String("path", "slow"))
	refused := metric.WithAttributes(attribute.String("path", "refused"))
	_, err = m.RegisterCallback(func(_ context.Context, ob metric.Observer) error {
		c := s.Counts()
		ob.ObserveInt64(open, c.Open)
		ob.ObserveInt64(requests, c.Inline, fast)
		ob.ObserveInt64(requests, c.Handled, slow)
		ob.ObserveInt64(requests, c.Refused, refused)
		return nil
	}, open, requests)
	return outrigger.Wrap(outrigger.Invalid, err, "http2: register metric")
}
