// Package proxy assembles the sidecar: one listener for the application, split by
// protocol, with variables answered from the cache, model calls routed by policy, and
// everything else passed through.
//
//	s, err := proxy.New(proxy.Options{…})
//	err = s.Run(ctx, listener)
//
// A connection's path, in order: proxy/loop accepts it, answers plain variable reads
// from memory, carries simple model calls to their endpoint and back (unless spans are
// made), and runs every other HTTP/1 request on a goroutine; what is not HTTP/1
// goes to proxy/intercept, which finds the protocol. HTTP/2 in the clear goes to
// proxy/http2, which answers the unary reads of variables from memory too; other gRPC calls
// go to the bridge and the native variable service, unknown ones are forwarded byte for
// byte. HTTP, of either version, goes to variables (/v1/variables, /v1/sessions), to
// inference (the OpenAI paths), /v1/outcomes to the control plane, /ofrep/v1 (flags), /v1/select-model (which version a context gets), or on to the configured upstream. TLS and unknown protocols
// are passed to the upstream address as they are when there is one, and refused otherwise.
//
// Promises: the listener answers as soon as Run starts, before the first policy and
// with the control plane away (what can be answered is, the rest fails with a clear
// error). At the end no new connection or request is taken, watches end at once, and
// everything else in flight gets Grace to finish, streams and tunnels included; then it
// is cut, and what it reported is sent last. Everything has a bound: header and body
// sizes, connections being looked at, streams of an HTTP/2 connection, tunnels, sessions
// remembered for touching.
package proxy

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/internal/report"
	"github.com/outrigger-mesh/outrigger/internal/rest"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/proxy/http2"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/proxy/intercept"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/redirect"
	"github.com/outrigger-mesh/outrigger/proxy/loop"
	"github.com/outrigger-mesh/outrigger/proxy/ofrep"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
	"github.com/outrigger-mesh/outrigger/proxy/variable"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Options of a Sidecar. Node, Reader, Authority and Policy are required.
type Options struct {
	Node      outrigger.Node
	Reader    variable.Reader    // cached reads
	Authority pb.VariablesClient // writes: node agent, else control plane
	// Policy returns the policy in force and how far to trust it; called per request.
	Policy func() (*policy.Policy, inference.PolicyStatus)
	// Material are the certificates and trust bundles that versions of the policy name; called
	// per request. nil = there are none.
	Material func() *identity.Material
	// Reports is where observations go; nil = nowhere.
	Reports grpc.ClientConnInterface

	// Hits answers plain reads, REST and gRPC, as soon as they are read; nil = they take the
	// ordinary path. HitEncoding is the index among its encoders where those that
	// variable.Tokens.Encoders returns begin.
	Hits        variable.Hits
	HitEncoding int

	// Tokens are the session tokens of this sidecar; nil = tokens only it can verify.
	Tokens             *variable.Tokens
	AutoCreateSessions bool // the first use of a session creates it
	// UpstreamGRPC takes gRPC calls the sidecar does not serve (tools); nil = none.
	UpstreamGRPC grpc.ClientConnInterface
	// UpstreamHTTP takes HTTP requests the sidecar does not serve; nil = 404.
	UpstreamHTTP *url.URL
	// UpstreamTCP is host:port for connections that are neither HTTP nor h2c; "" = refuse.
	UpstreamTCP string
	// Own are the sidecar's own listeners, which are never dialled.
	Own []netip.AddrPort
	// Intercept takes the connections that `outrigger init` redirects; nil = none.
	Intercept *Interception
	// MaxPerHost bounds the HTTP connections to one address of UpstreamHTTP or of an
	// intercepted destination; requests wait. 0 = 1024. For models the policy says it.
	MaxPerHost int
	// Dial replaces the network, for tests; nil = TCP.
	Dial upstream.DialFunc

	// Models are further settings of model calls; what the sidecar itself provides (Policy,
	// Region, Order, Transport, Passthrough, Logger, Meter) is filled in.
	Models inference.Options

	Tracing *Tracing // nil = no spans

	Grace  time.Duration // default 10 s
	Start  time.Time     // of the process; tells report streams of two lives apart
	Logger *slog.Logger
	Meter  metric.Meter
}

// Sidecar is one pod's proxy.
type Sidecar struct {
	opts      Options
	inference *inference.Handler
	http      *http.Server
	grpc      *grpc.Server // a handler below http2
	http2     *http2.Server
	door      *intercept.Door
	redirect  *redirect.Server // nil without Intercept
	routed    *http.Server     // of HTTP/1 at intercepted destinations
	loop      *loop.Server     // of listeners that have descriptors; the door serves the others
	counters  *variable.Counters
	touches   *touches
	reported  hits             // what earlier deltas said; owned by collect
	reporter  *report.Reporter // nil without Reports

	transport *http.Transport    // to UpstreamHTTP and to intercepted destinations
	direct    *upstream.Direct   // to models
	secure    *upstream.Secure   // to models over TLS
	models    *upstream.GRPCPool // to models that speak gRPC
	guard     *upstream.Guard    // of everything dialled; nil with an injected network
	draining  chan struct{}      // closed when no more is taken
	life      context.Context    // ends when what is left at the end of Grace is cut
	cut       context.CancelFunc
	http1     *inflight // requests being handled
	tunnels   *inflight

	handedOver atomic.Bool // see HandOver
}

// New wires a sidecar; it starts nothing. Errors have kind Invalid.
func New(o Options) (*Sidecar, error) {
	if o.Grace == 0 {
		o.Grace = 10 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Reader == nil || o.Authority == nil || o.Policy == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "proxy: Reader, Authority and Policy are required")
	}
	if o.Material == nil {
		o.Material = func() *identity.Material { return &identity.Material{} }
	}
	s := &Sidecar{opts: o, counters: new(variable.Counters), touches: newTouches(), draining: make(chan struct{}),
		http1: newInflight(), tunnels: newInflight()}
	s.life, s.cut = context.WithCancel(context.Background())
	s.wireUpstream()
	var others http.Handler
	if o.UpstreamHTTP != nil {
		others = upstream.NewForwarder(upstream.ForwarderOptions{Transport: s.transport, Base: o.UpstreamHTTP, Logger: o.Logger})
	}
	var err error
	pass, passes := s.passthrough(others)
	mo := o.Models
	mo.Policy, mo.Region, mo.Order, mo.Transport, mo.Passthrough, mo.Passes, mo.Logger, mo.Meter = o.Policy, o.Node.Region, orderByRegion, s.direct, pass, passes, o.Logger, o.Meter
	tokens := o.Tokens
	if tokens == nil {
		tokens = variable.NewTokens(variable.TokenOptions{Logger: o.Logger})
	}
	mo.Grants, mo.Pinned = tokens.Grant, pinnedBy(o.Reader)
	mo.Secure = s.secure.For
	if s.inference, err = inference.New(mo); err != nil {
		return nil, err
	}
	vo := variable.Options{Reader: o.Reader, Authority: variable.Counted(o.Authority, s.counters), AutoCreateSessions: o.AutoCreateSessions,
		Touched: s.touches.add, Counters: s.counters, Draining: s.draining, Tokens: tokens, Logger: o.Logger}
	s.wireGRPC(vo)
	s.wireHTTP(vo, pass)
	if s.http2, err = s.newHTTP2(); err != nil {
		return nil, err
	}
	s.door = intercept.New(intercept.Options{Logger: o.Logger, Refused: s.passTCP})
	if s.loop, err = s.newLoop(); err != nil {
		return nil, err
	}
	if err := s.wireIntercept(); err != nil {
		return nil, err
	}
	if o.Reports != nil {
		s.reporter = report.New(report.Options{Conn: o.Reports, Node: wire.NodePB(o.Node), Start: o.Start,
			Collect: s.collect, Urgent: s.inference.Recorder().Urgent(), Logger: o.Logger})
	}
	return s, nil
}

// maxModelConnections to one address is more than it can have local ports for: to models the
// policy's max_connections decides, over all the addresses of a version.
const maxModelConnections = 1 << 16

// wireUpstream makes the pool of connections to models and to UpstreamHTTP. Both may be
// on this machine: operators name them, not clients. An injected network has names, not
// addresses, so there is nothing to guard.
func (s *Sidecar) wireUpstream() {
	if s.opts.Dial == nil {
		o := upstream.GuardOptions{Own: s.opts.Own, Allow: []upstream.Rule{
			{Prefix: netip.MustParsePrefix("127.0.0.0/8")}, {Prefix: netip.MustParsePrefix("::1/128")}}}
		if i := s.opts.Intercept; i != nil {
			o.Sockets, o.Mark = i.Sockets, i.Mark
		}
		s.guard = upstream.NewGuard(o)
	}
	to := upstream.TransportOptions{Dial: s.opts.Dial, Guard: s.guard, MaxPerHost: s.opts.MaxPerHost}
	s.transport = upstream.NewTransport(to)
	to.MaxPerHost = maxModelConnections
	s.direct = upstream.NewDirect(to, upstream.NewTransport(to))
	s.secure = upstream.NewSecure(to, s.opts.Material)
	s.models = upstream.NewGRPCPool(upstream.GRPCPoolOptions{Dial: s.opts.Dial, Guard: s.guard, MaxMessage: variable.MaxMessage, Material: s.opts.Material})
}

// maxStreams bounds the streams of one HTTP/2 connection: each watch and each tool call
// in flight is one.
const maxStreams = 4096

func (s *Sidecar) wireGRPC(vo variable.Options) {
	s.grpc = grpc.NewServer(grpc.ForceServerCodecV2(variable.Codec()), grpc.UnknownServiceHandler(s.inference.GRPC(s.models, variable.Forward(s.opts.UpstreamGRPC))),
		grpc.MaxRecvMsgSize(variable.MaxMessage), grpc.StreamInterceptor(takeMessages))
	snakepit.RegisterBridgeServiceServer(s.grpc, variable.NewBridge(s.rendering(vo, variable.EncodingBridge)))
	pb.RegisterVariablesServer(s.grpc, variable.NewNative(s.rendering(vo, variable.EncodingNative)))
	if s.opts.Reports != nil {
		pb.RegisterOutcomesServer(s.grpc, outcomes{to: pb.NewOutcomesClient(s.opts.Reports)})
	}
}

// rendering makes reads leave behind what a hit will be answered with.
func (s *Sidecar) rendering(vo variable.Options, encoding int) variable.Options {
	if s.opts.Hits != nil {
		vo.Render = s.opts.HitEncoding + encoding + 1
	}
	return vo
}

// newHTTP2 serves HTTP/2 in the clear: reads of variables from memory, gRPC, and whatever
// HTTP/1 has.
func (s *Sidecar) newHTTP2() (*http2.Server, error) {
	o := http2.Options{MaxStreams: maxStreams, Grace: s.opts.Grace, Logger: s.opts.Logger, Meter: s.opts.Meter,
		HeaderTimeout: headerTimeout, IdleTimeout: idleTimeout,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if http2.IsGRPC(r) {
				r, done := withInflow(r, s.opts.Models.Room)
				defer done()
				s.grpc.ServeHTTP(w, r)
				return
			}
			s.http.Handler.ServeHTTP(w, r)
		})}
	if s.opts.Hits != nil {
		o.Inline = &variable.Calls{Hits: s.opts.Hits, Encoding: s.opts.HitEncoding, Counters: s.counters, Touched: s.touches.add}
	}
	return http2.New(o)
}

// Limits of the HTTP side.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 5 * time.Minute
	maxHeader     = 64 << 10
)

func (s *Sidecar) wireHTTP(vo variable.Options, others http.Handler) {
	vars := http.NewServeMux()
	rest.Register(vars, rest.VariableRoutes(variable.NewNative(s.rendering(vo, variable.EncodingHTTP))), nil)
	if s.opts.Reports != nil {
		rest.Register(vars, rest.OutcomeRoutes(outcomes{to: pb.NewOutcomesClient(s.opts.Reports)}.Record), nil)
	}
	flags := ofrep.New(ofrep.Options{Policy: func() *policy.Policy { p, _ := s.opts.Policy(); return p }, Region: s.opts.Node.Region,
		Recorder: s.inference.Recorder()})
	if others == nil {
		others = http.HandlerFunc(notServed)
	}
	s.http = &http.Server{ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog:    slog.NewLogLogger(s.opts.Logger.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return s.life },
		Handler: s.opts.Tracing.wrap(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.http1.enter()
			defer s.http1.leave()
			switch {
			case s.inference.Match(r):
				s.inference.ServeHTTP(w, r)
			case isVariablePath(r.URL.Path):
				vars.ServeHTTP(w, r)
			case r.URL.Path == inference.SelectPath:
				s.inference.ServeSelect(w, r)
			case ofrep.Match(r):
				flags.ServeHTTP(w, r)
			default:
				others.ServeHTTP(w, r)
			}
		}))}
}

// newLoop serves HTTP/1 from event loops; connections that speak something else go on
// to the door.
func (s *Sidecar) newLoop() (*loop.Server, error) {
	o := loop.Options{Slow: s.http.Handler, Grace: s.opts.Grace, Logger: s.opts.Logger, Meter: s.opts.Meter,
		HeaderTimeout: headerTimeout, IdleTimeout: idleTimeout,
		Other: func(c net.Conn, first []byte) { s.door.Admit(s.life, c, first) }}
	if s.opts.Tracing == nil { // a span is the handler's to make
		o.Relay = s.inference.Relay(s.direct)
	}
	if s.opts.Hits != nil {
		fast := &variable.Fast{Hits: s.opts.Hits, Encoding: s.opts.HitEncoding, Counters: s.counters, Touched: s.touches.add}
		o.Fast = fast.Serve
	}
	return loop.New(o)
}

// isVariablePath says what the sidecar serves beside model calls.
func isVariablePath(p string) bool {
	return strings.HasPrefix(p, "/v1/variables/") || p == "/v1/outcomes" || p == "/v1/sessions" || strings.HasPrefix(p, "/v1/sessions/")
}

func notServed(w http.ResponseWriter, r *http.Request) {
	status.WriteHTTP(w, outrigger.Errorf(outrigger.NotFound, "%s %s not found: the sidecar serves variables and model calls; set --upstream-http to pass others on", r.Method, r.URL.Path))
}

// Handler serves the sidecar's own page: GET /stats, JSON.
func (s *Sidecar) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("content-type", "application/json")
		body := map[string]any{
			"node":      s.opts.Node.ID,
			"inference": s.inference.LocalStats(),
			"variables": map[string]uint64{"process": s.counters.Process.Load(), "node": s.counters.Node.Load(),
				"origin": s.counters.Origin.Load(), "stale": s.counters.Stale.Load(), "errors": s.counters.Errors.Load(),
				"writes": s.counters.Writes.Load(), "write_errors": s.counters.WriteErrors.Load()},
		}
		if s.redirect != nil {
			body["intercept"] = s.redirect.Counts()
		}
		if err := json.NewEncoder(w).Encode(body); err != nil {
			s.opts.Logger.Debug("stats answer", "error", err)
		}
	})
}
