// Package adsserver serves xDS: one source of resources, state-of-the-world ADS for
// gRPC clients and delta ADS for sidecars and Envoys, and a ledger of who accepted what.
//
//	srv := adsserver.New(adsserver.Options{Logger: log})
//	srv.Register(grpcServer)
//	err := srv.Publish(adsserver.DefaultGroup, resources, position)
//	acked, laggards, done := srv.Acked(position)
//
// The gRPC plumbing is go-control-plane's stream server; what it asks for resources is
// ours, because the stock caches resend a rejected resource in a loop, leave repeated
// and impossible subscriptions unanswered, and cost O(all resources) per stream.
//
// # Promises
//
//   - A push is one consistent set. A stream is given one push at a time, in the order
//     of xds.Types, and the newest one next; nothing queues per stream.
//   - Every resource is marshalled and hashed once per version, whatever the number of
//     streams, and the responses most streams get once for all (TransportOptions). A Publish that changes nothing sends nothing.
//   - A rejected response is not repeated before one of its resources changes; then all
//     its resources are sent again.
//   - An Envoy gets listeners and routes that refer to clusters new to it once it has
//     acknowledged their endpoints, two seconds later at most: no request meets a cluster
//     that is still warming (see warm.go).
//   - Streams that arrive before the first Publish of their group wait; they never get
//     an empty configuration.
//   - A client that comes back with something the source never had (Know) keeps it: it is
//     sent nothing until the source has had it, and shows as such in the ledger.
//   - Publish refuses an empty set, a set with dangling references, the removal of every
//     model, and a position below the current one. PublishForced does not.
//   - A set can be staged to some nodes of a group first (Stage); the others keep what is
//     published, and the staged nodes come back to it when the stage is over.
//   - Removed clusters stay served until all connected streams accepted the routes that
//     no longer need them.
//   - What every node was sent and has in force is known per resource (Nodes, Config,
//     Explain), as is how the newest MaxPushes pushes of a group went, for MaxPushAge
//     (Pushes, SetAt).
//     The same is served as CSDS (RegisterStatus).
//   - Load reports are counted per cluster and region (Loads), named metrics included.
//   - A resource with a time to live (translate.Resources.PutLeased) is sent with it to delta
//     clients and renewed four times per lease, for as long as Options.Lease allows. Clients
//     drop it by themselves when this server is dead, stopped or cut off. A heartbeat is one
//     response and one answer, about 200 bytes together; it counts as no push anywhere. Streams
//     of the other protocol are not given such a resource at all.
//   - An Envoy that comes back is told of removed clusters once it has acknowledged routes
//     that do without them (see part.go).
//   - A server that stops hands its clients over (Drain): their streams end spread over a
//     time, while there is somebody to go to.
//   - The ledger counts a position as accepted by a sidecar when every response of that
//     push was ACKed and no rejection stands.
//   - A relay (package xds/relay) is one stream, and each pod behind it a line of the ledger
//     of its own, as the relay says and for as long as its stream lasts. Of several streams
//     that claim a node the newest counts. A relay's own line holds back what its position
//     holds back, but is not counted among those that accepted; see relayed.go.
//
// # Failure and load
//
// A slow client holds up only itself: it owes an answer, so it gets the next push 2 s later,
// and shows as a laggard until it has answered everything. A client that leaves 64 responses unanswered, asks for 64 types
// or 20,000 names, or is one stream too many (Options.MaxStreams) is ended with
// ResourceExhausted. When the server dies clients keep what they have; after a restart
// the same content has the same versions, so nothing is resent to delta clients.
//
// # Concurrency
//
// All methods may be called concurrently; Publish calls of one group take turns. New
// starts nothing. Streams run on goroutines of gRPC; with
// more than 128 streams Publish starts one, at most one per group, that tells them of the
// newest set and ends when it has.
package adsserver

import (
	"context"
	"hash/maphash"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	lrs "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// DefaultGroup is the group of sidecars when Options.Group is nil.
const DefaultGroup = "default"

// KindGroup is the group of one kind of client when Options.Group is nil.
func KindGroup(kind translate.Kind) string {
	switch kind {
	case translate.KindGRPC, translate.KindEnvoy:
		return string(kind)
	}
	return DefaultGroup
}

// Options configure a Server. The zero value is usable.
type Options struct {
	Logger *slog.Logger // nil discards
	Meter  metric.Meter // nil measures nothing
	// Authorise decides on the first request of a stream whether its node may have the
	// configuration; its error ends the stream. nil admits everyone: wire it to the
	// peer's identity in ctx, because a node's id is only a claim.
	Authorise func(ctx context.Context, node *core.Node) error
	// Group says which Publish group a node follows; nil = KindGroup of its kind, and
	// DefaultGroup if that is not known. It must give the same answer for equal nodes.
	Group func(outrigger.Node) string
	// Isolation is how long a disconnected sidecar still counts in Acked; after that
	// its own dead-man lease has returned it to stable. 0 = 15 s, one and a half times
	// the default lease.
	Isolation time.Duration
	// MaxStreams bounds concurrent streams; 0 = 50,000.
	MaxStreams int
	// Lease is how much longer this server may speak for what is leased (resources with a
	// time to live): heartbeats promise no more than that, and stop at 0. It is called for
	// every heartbeat, concurrently, and must not block. nil = without limit.
	Lease func() time.Duration
	// Loads is told what load reports say; nil = nobody.
	Loads LoadSink
	// Vouch is for a relay, which may not say by itself that the control plane is there: it
	// is given each liveness probe of a client (a repeated subscription to MeshPolicy), whose
	// answer is sent, marked as vouched for, once answer is called. first is the first probe
	// of a stream, and ctx the stream's. One probe of a stream waits at a time, further ones
	// are ignored. It must not block, nor call answer before it returns. nil = probes are
	// answered at once.
	Vouch func(ctx context.Context, first bool, answer func())
	// SendAway ends the streams of clients that hold what the source never had (Know), with
	// an error of kind Locked, instead of leaving them as they are: a relay's source is not
	// the one that can judge them.
	SendAway bool
}

// Defaults of Options, and how long a node that is gone stays in the ledger; of these
// nodes at most Options.MaxStreams.
const (
	DefaultIsolation  = 15 * time.Second
	DefaultMaxStreams = 50_000
	ledgerRetention   = time.Hour
)

// Server is the xDS server of one control plane replica.
type Server struct {
	opt      Options
	log      *slog.Logger
	metrics  *metrics
	ledger   *ledger
	tellNow  int           // the constant, but for tests
	ids      atomic.Uint64 // of typeStates
	streams  atomic.Int64
	draining atomic.Bool                                      // see drain.go
	empty    chan struct{}                                    // capacity 1: the last stream of a draining server has ended
	source   atomic.Pointer[func(model, version string) bool] // see Know

	loads       loads
	loadStreams atomic.Int64

	mu     sync.Mutex
	groups map[string]*group
}

// New returns a Server that serves nothing yet. It panics only if the Meter refuses
// the constant instrument names of this package.
func New(opt Options) *Server {
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	if opt.Group == nil {
		opt.Group = func(n outrigger.Node) string { return KindGroup(translate.Kind(n.Kind)) }
	}
	if opt.Isolation == 0 {
		opt.Isolation = DefaultIsolation
	}
	if opt.MaxStreams == 0 {
		opt.MaxStreams = DefaultMaxStreams
	}
	return &Server{
		opt: opt, log: opt.Logger, metrics: newMetrics(opt.Meter), tellNow: tellNow,
		ledger: newLedger(max(ledgerRetention, opt.Isolation), opt.MaxStreams), groups: make(map[string]*group),
		empty: make(chan struct{}, 1), loads: loads{rows: make(map[loadKey]*Load)},
	}
}

// Discovery is the aggregated discovery service alone.
func (s *Server) Discovery() discovery.AggregatedDiscoveryServiceServer { return &ads{srv: s} }

// Register adds the aggregated discovery service and the load reporting service to a
// gRPC server.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	lrs.RegisterLoadReportingServiceServer(r, &loadReports{srv: s})
	discovery.RegisterAggregatedDiscoveryServiceServer(r, &ads{srv: s})
}

// Publish makes res, compiled from position, the configuration of a group and starts
// pushing it; it returns without waiting for clients. res is not modified and must not
// be modified afterwards. It refuses, with an Invalid error, what would cause an outage
// (see the package comment); nothing is changed then.
func (s *Server) Publish(group string, res *translate.Resources, position uint64) error {
	return s.publish(group, res, position, false)
}

// PublishForced is Publish without the refusals, for an operator who means it.
func (s *Server) PublishForced(group string, res *translate.Resources, position uint64) error {
	return s.publish(group, res, position, true)
}

func (s *Server) publish(name string, res *translate.Resources, position uint64, force bool) error {
	g := s.group(name)
	g.publishing.Lock()
	defer g.publishing.Unlock()
	prev := g.current.Load()
	if !force {
		if err := g.check(prev, res, position); err != nil {
			return err
		}
	}
	touched, known := res.Since(g.wanted)
	union, carried := g.retain(res, touched, known)
	next, err := newGeneration(&s.ids, prev, g.served, union, mergeKeys(touched, g.carried, carried), known, position, time.Now())
	if err != nil {
		return err
	}
	next.known = s.known()
	retaining := len(carried) > 0
	if prev != nil && prev.position == position && prev.same(next) {
		return nil
	}
	g.wanted, g.served, g.carried, g.sound = res, union, carried, !force
	g.serve(next, retaining)
	return nil
}

// check holds the rules of Publish. Called with publishing held.
func (g *group) check(prev *generation, res *translate.Resources, position uint64) error {
	if res.Get(xds.TypeMeshPolicy, xds.MeshName) == nil {
		return outrigger.Errorf(outrigger.Invalid, "the set of %d resources has no %s resource; publish the output of translate.Encode", res.Len(), xds.MeshName)
	}
	sound := g.wanted
	if !g.sound {
		sound = nil // it was forced, so what it refers to may not be there
	}
	if missing := res.MissingSince(sound); len(missing) > 0 {
		return outrigger.Errorf(outrigger.Invalid, "the set lacks %s, and %d more; clients would fail", missing[0], len(missing)-1)
	}
	if prev == nil {
		return nil
	}
	if position < prev.position {
		return outrigger.Errorf(outrigger.Invalid, "position %d is below the published %d; force it if the log was replaced", position, prev.position)
	}
	if n := len(prev.types[xds.TypeListener].names); n > 0 && res.Count(xds.TypeListener) == 0 {
		return outrigger.Errorf(outrigger.Invalid, "the set removes all %d models; force it if that is meant", n)
	}
	return nil
}

// Ledger returns one line per known node, sorted by node id.
func (s *Server) Ledger() []NodeState { return s.ledger.list() }

// Acked sorts the sidecars that count (connected, or gone for less than
// Options.Isolation) into those that accepted position or a later one and those that
// did not, by node id. done means there are no laggards, also when there are no
// sidecars at all. Envoy and gRPC clients are in Ledger only: they cannot say that all
// of a position is in force.
func (s *Server) Acked(position uint64) (acked, laggards []string, done bool) {
	acked, laggards = verdicts(s.ledger.list(), position, s.opt.Isolation, time.Now())
	return acked, laggards, len(laggards) == 0
}

// Changed returns a channel that is closed by the next change of the ledger. Take it
// before reading, or a change in between is missed. Time alone (Options.Isolation)
// changes Acked without closing it.
func (s *Server) Changed() <-chan struct{} { return s.ledger.wait() }

func (s *Server) open(ctx context.Context, delta bool) (*session, error) {
	if s.draining.Load() {
		return nil, errStopping
	}
	if n := s.streams.Add(1); n > int64(s.opt.MaxStreams) {
		s.left()
		return nil, outrigger.Errorf(outrigger.Exhausted, "%d streams are open, the limit is %d; use another replica", n-1, s.opt.MaxStreams)
	}
	s.metrics.streams(ctx, 1)
	ctx, cancel := context.WithCancel(ctx)
	return &session{srv: s, ctx: ctx, cancel: cancel, delta: delta, types: make(map[string]*typeSub)}, nil
}

// left counts a stream out.
func (s *Server) left() {
	if s.streams.Add(-1) == 0 && s.draining.Load() {
		select {
		case s.empty <- struct{}{}:
		default:
		}
	}
}

func (s *Server) done(sess *session) {
	sess.close()
	sess.cancel()
	sess.tellTraffic()
	s.metrics.streams(sess.ctx, -1)
	s.left()
}

// group returns the group of that name, made on first use.
func (s *Server) group(name string) *group {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.groups[name]
	if g == nil {
		g = &group{srv: s, name: name, seed: maphash.MakeSeed()}
		for i := range g.shards {
			g.shards[i].sessions = make(map[*session]struct{})
		}
		s.groups[name] = g
	}
	return g
}
