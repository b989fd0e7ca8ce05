// Package proxy assembles the sidecar: one listener for the application, split by
// protocol, with variables answered from the cache, model calls routed by policy, and
// everything else passed through.
//
//	s, err := proxy.New(proxy.Options{…})
//	err = s.Run(ctx, listener)
//
// A connection's path, in order: proxy/intercept finds the protocol; gRPC goes to the
// bridge and the native variable service, unknown calls are forwarded byte for byte;
// HTTP/1 goes to variables (/v1/variables, /v1/sessions), to inference (the OpenAI
// paths), or on to the configured upstream. TLS and unknown protocols are passed to the
// upstream address as they are when there is one, and refused otherwise.
//
// Promises: the listener answers as soon as Run starts, before the first policy and
// with the control plane away (what can be answered is, the rest fails with a clear
// error); at the end no new request is taken and those in flight get Grace to finish,
// streams included. Everything has a bound: header and body sizes, connections being
// looked at, concurrent gRPC streams, sessions remembered for touching.
package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	"go.opentelemetry.io/otel/metric"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/internal/report"
	"github.com/outrigger-mesh/outrigger/internal/rest"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/proxy/intercept"
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
	// Reports is where observations go; nil = nowhere.
	Reports grpc.ClientConnInterface

	AutoCreateSessions bool
	// UpstreamGRPC takes gRPC calls the sidecar does not serve (tools); nil = none.
	UpstreamGRPC grpc.ClientConnInterface
	// UpstreamHTTP takes HTTP requests the sidecar does not serve; nil = 404.
	UpstreamHTTP *url.URL
	// UpstreamTCP is host:port for connections that are neither HTTP nor h2c; "" = refuse.
	UpstreamTCP string
	// Own are the sidecar's own listeners, which are never dialled.
	Own []netip.AddrPort
	// Dial replaces the network, for tests; nil = TCP.
	Dial upstream.DialFunc

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
	grpc      *grpc.Server
	door      *intercept.Door
	counters  *variable.Counters
	touches   *touches
	reported  hits             // what earlier deltas said; owned by collect
	reporter  *report.Reporter // nil without Reports
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
	s := &Sidecar{opts: o, counters: new(variable.Counters), touches: newTouches()}
	if err := s.wireInference(); err != nil {
		return nil, err
	}
	vo := variable.Options{Reader: o.Reader, Authority: o.Authority, AutoCreateSessions: o.AutoCreateSessions,
		Touched: s.touches.add, Counters: s.counters, Logger: o.Logger}
	s.wireGRPC(vo)
	s.wireHTTP(vo)
	s.door = intercept.New(intercept.Options{Logger: o.Logger, Refused: s.passTCP})
	if o.Reports != nil {
		s.reporter = report.New(report.Options{Conn: o.Reports, Node: wire.NodePB(o.Node), Start: o.Start,
			Collect: s.collect, Urgent: s.inference.Recorder().Urgent(), Logger: o.Logger})
	}
	return s, nil
}

// modelGuard lets model endpoints be on this machine: operators name them, not clients.
func (s *Sidecar) modelGuard() *upstream.Guard {
	return upstream.NewGuard(upstream.GuardOptions{Own: s.opts.Own, Allow: []upstream.Rule{
		{Prefix: netip.MustParsePrefix("127.0.0.0/8")}, {Prefix: netip.MustParsePrefix("::1/128")}}})
}

func (s *Sidecar) wireInference() (err error) {
	// An injected network has names, not addresses, so there is nothing to guard.
	to := upstream.TransportOptions{Dial: s.opts.Dial}
	if s.opts.Dial == nil {
		to.Guard = s.modelGuard()
	}
	rt := upstream.NewTransport(to)
	var pass http.Handler
	if s.opts.UpstreamHTTP != nil {
		pass = upstream.NewForwarder(upstream.ForwarderOptions{Transport: rt, Base: s.opts.UpstreamHTTP, Logger: s.opts.Logger})
	}
	s.inference, err = inference.New(inference.Options{Policy: s.opts.Policy, Region: s.opts.Node.Region, Order: orderByRegion,
		Transport: rt, Passthrough: pass, Logger: s.opts.Logger, Meter: s.opts.Meter})
	return err
}

// Limits of the gRPC side.
const (
	maxGRPCStreams = 4096
	maxGRPCMessage = 16 << 20
)

func (s *Sidecar) wireGRPC(vo variable.Options) {
	s.grpc = grpc.NewServer(grpc.ForceServerCodecV2(variable.Codec()), grpc.UnknownServiceHandler(variable.Forward(s.opts.UpstreamGRPC)),
		grpc.MaxConcurrentStreams(maxGRPCStreams), grpc.MaxRecvMsgSize(maxGRPCMessage))
	snakepit.RegisterBridgeServiceServer(s.grpc, variable.NewBridge(vo))
	pb.RegisterVariablesServer(s.grpc, variable.NewNative(vo))
}

// Limits of the HTTP side.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 5 * time.Minute
	maxHeader     = 64 << 10
)

func (s *Sidecar) wireHTTP(vo variable.Options) {
	vars := http.NewServeMux()
	rest.Register(vars, rest.VariableRoutes(variable.NewNative(vo)))
	var others http.Handler = http.HandlerFunc(notServed)
	if s.opts.UpstreamHTTP != nil {
		others = upstream.NewForwarder(upstream.ForwarderOptions{Base: s.opts.UpstreamHTTP, Logger: s.opts.Logger,
			Transport: upstream.NewTransport(upstream.TransportOptions{Dial: s.opts.Dial, Guard: s.modelGuard()})})
	}
	s.http = &http.Server{ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(s.opts.Logger.Handler(), slog.LevelDebug),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch {
			case s.inference.Match(r):
				s.inference.ServeHTTP(w, r)
			case isVariablePath(r.URL.Path):
				vars.ServeHTTP(w, r)
			default:
				others.ServeHTTP(w, r)
			}
		})}
}

func isVariablePath(p string) bool {
	return len(p) > len("/v1/variables/") && p[:len("/v1/variables/")] == "/v1/variables/" ||
		p == "/v1/sessions" || len(p) > len("/v1/sessions/") && p[:len("/v1/sessions/")] == "/v1/sessions/"
}

func notServed(w http.ResponseWriter, r *http.Request) {
	status.WriteHTTP(w, outrigger.Errorf(outrigger.NotFound, "%s %s not found: the sidecar serves variables and model calls; set --upstream-http to pass others on", r.Method, r.URL.Path))
}

// passTCP takes connections that are neither HTTP nor h2c.
func (s *Sidecar) passTCP(c net.Conn, p intercept.Protocol) {
	defer c.Close()
	if s.opts.UpstreamTCP == "" {
		s.opts.Logger.Debug("connection refused: no --upstream-tcp", "protocol", p, "from", c.RemoteAddr())
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	dial := s.opts.Dial
	if dial == nil {
		dial = (&net.Dialer{}).DialContext
		dial = upstream.GuardedDial(dial, s.modelGuard(), 5*time.Second)
	}
	out, err := dial(ctx, "tcp", s.opts.UpstreamTCP)
	if err != nil {
		s.opts.Logger.Warn("pass-through failed", "upstream", s.opts.UpstreamTCP, "error", err)
		return
	}
	defer out.Close()
	if _, err := upstream.Tunnel(context.Background(), c, out, upstream.TunnelOptions{}); err != nil {
		s.opts.Logger.Debug("tunnel ended", "error", err)
	}
}

// Run serves l until ctx ends, then drains within Grace. It returns when everything has
// ended; the error says what failed, nil after an orderly end.
func (s *Sidecar) Run(ctx context.Context, l net.Listener) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.door.Run(ctx, l) })
	g.Go(func() error { return ended(ctx, s.http.Serve(s.door.HTTP1())) })
	g.Go(func() error { return ended(ctx, s.grpc.Serve(s.door.HTTP2())) })
	g.Go(func() error { <-ctx.Done(); return s.drain(ctx) })
	if s.reporter != nil {
		g.Go(func() error { return s.reporter.Run(ctx) })
	}
	return g.Wait()
}

// ended hides the error a server returns because the door was closed on purpose.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// drain lets requests in flight finish, then cuts what is left.
func (s *Sidecar) drain(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.opts.Grace)
	defer cancel()
	stopped := make(chan struct{})
	go func() { s.grpc.GracefulStop(); close(stopped) }()
	if err := s.http.Shutdown(ctx); err != nil {
		s.opts.Logger.Warn("requests were cut at the end of the grace", "grace", s.opts.Grace)
		s.http.Close()
	}
	select {
	case <-stopped:
	case <-ctx.Done():
		s.grpc.Stop()
		<-stopped
	}
	return nil
}

// Handler serves the sidecar's own page: GET /stats, JSON.
func (s *Sidecar) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("content-type", "application/json")
		body := map[string]any{
			"inference": s.inference.LocalStats(),
			"variables": map[string]uint64{"process": s.counters.Process.Load(), "node": s.counters.Node.Load(),
				"origin": s.counters.Origin.Load(), "stale": s.counters.Stale.Load(), "errors": s.counters.Errors.Load()},
		}
		if err := json.NewEncoder(w).Encode(body); err != nil {
			s.opts.Logger.Debug("stats answer", "error", err)
		}
	})
}
