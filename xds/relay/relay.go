// Package relay lets one ADS stream per node serve the sidecars of all its pods, so that what
// a control plane pays grows with nodes and not with pods. The node agent has one:
//
//	r, err := relay.New(relay.Options{Node: node, Dial: dials})
//	r.Register(grpcServer)        // on the agent's Unix socket
//	err = r.Run(ctx)
//
// # Who is served
//
// Sidecars (node kind "sidecar") that speak delta ADS. They are one group at the control plane,
// so all pods get the same; the unit of a configuration canary is then the node: its agent's
// id decides, and an operator who names nodes names the agent. Envoys and gRPC clients go to
// the control plane themselves and are refused here (kind Denied).
//
// The stream to the control plane is opened for the first pod and kept from then on, with the
// agent's id and the node kind "relay".
//
// # What is passed on
//
// Resources are the control plane's bytes under the control plane's versions; nothing is
// decoded but the length of the dead-man lease. So a sidecar that moves between relay and
// control plane is sent nothing anew, and a relay of an older build passes on what it does not
// know. Private keys reach a relay, as anybody else, over connections that cannot be read on their
// way only, and its pods over the Unix socket. A push is given to the pods when it is complete, in the order of xds.Pushed, to each pod
// one push at a time and the newest one next. A pod that joins is served from memory; the
// control plane is not asked.
//
// # What is said about delivery
//
// How far each pod is, and what it rejects and why, is told to the control plane on the same
// stream (outrigger.v1.RelayStanding), so its ledger has a line per pod, and what waits for
// sidecars there (the end of a rollback, a canary, a push's record) waits for pods.
//
//   - A push is acknowledged when every pod has accepted it. A rejection is passed on at once,
//     with the pod's id before its words; the rest is acknowledged when all have answered.
//   - A pod that has not answered within a second is a laggard until it has: the relay's
//     acknowledgements do not wait for it, so it holds up neither newer pushes nor the other
//     pods, and the control plane is told that it has not accepted before they are sent.
//
// # Losing the control plane
//
// A relay never speaks for the control plane. A pod's liveness probe is answered once the
// control plane has answered one that the relay sent after it, so no lease is held up longer
// than with a stream of the pod's own. Probes that wait share one; between two of the relay's
// there is an eighth of the shortest dead-man lease, 5 s with no candidate live.
//
// Streams are retried over Options.Dial in order, with pauses from 100 ms growing to 10 s,
// randomised by a fifth. Meanwhile the relay says that it is cut off in the header of each new
// stream, and sidecars follow the control plane directly if they can. If they cannot, they are
// served what the relay has, unvouched. A relay is in memory only: one that restarts with the
// control plane away has nothing, refuses (kind Unavailable), and sidecars use their own file.
//
// A sidecar that comes back with something this relay was never sent is ended with kind
// Locked: only a control plane can tell whether it was removed or lost.
//
// # Limits
//
// Options.MaxPods streams (then Exhausted), Options.MaxBytes of resources: a control plane that
// has more is left, and the relay is cut off. One push is waited for at a time; nothing queues
// but the newest set. Pods are who they say they are, to whoever may open the socket.
//
// # Concurrency
//
// Register and the services may be used concurrently. New starts nothing; Run may be called
// once and owns every goroutine but those of gRPC's streams.
package relay

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.opentelemetry.io/otel/metric"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/internal/upstream"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Dialer connects to one control plane replica.
type Dialer = upstream.Dialer

// Options configure a Relay. Node.ID and at least one Dialer are required.
type Options struct {
	// Node is the node agent: its id has to differ from those of all pods. The Kind is ignored.
	Node outrigger.Node
	// Dial lists the control planes in order of preference.
	Dial     []Dialer
	MaxPods  int          // streams; 0 = 256
	MaxBytes int          // of resources; 0 = 256 MiB
	Logger   *slog.Logger // nil discards
	Meter    metric.Meter // nil measures nothing; the instruments are those of package adsserver
}

// Defaults of Options.
const (
	DefaultMaxPods  = 256
	DefaultMaxBytes = 256 << 20
)

// Timing; see the package comment.
const (
	linkPatience  = time.Second // how long a new pod's stream waits for the link
	answerLag     = time.Second // after which a pod is a laggard; below the server's patience
	gather        = 20 * time.Millisecond
	probeIdle     = 5 * time.Second // between probes with no candidate live
	probeLeast    = 100 * time.Millisecond
	probesPerDead = 8
	unproven      = 2 * time.Second // an unanswered probe of that age means cut off
)

// Relay is one node's relay. Make it with New.
type Relay struct {
	opt     Options
	log     *slog.Logger
	down    *adsserver.Server
	service discovery.AggregatedDiscoveryServiceServer
	running atomic.Bool

	first  sync.Once
	wanted chan struct{} // closed when the first pod came
	probes chan struct{} // capacity 1: somebody waits for a probe

	mu      sync.Mutex
	link    link
	waiting []waiter // probes of pods that no probe of ours was sent for
	urgent  bool     // one of them is the first of its stream
	had     map[[2]string]struct{}

	// Of Run's goroutine.
	cache cache
}

// link is how the relay stands with the control plane.
type link struct {
	synced  bool
	asked   time.Time     // when the unanswered probe was sent, zero if none
	holds   bool          // there is something to serve
	changed chan struct{} // closed and replaced when synced becomes true
}

// waiter is a pod's probe.
type waiter struct {
	ctx    context.Context // of the pod's stream
	answer func()
}

// New returns a Relay that does nothing until Run. Errors have kind Invalid.
func New(opt Options) (*Relay, error) {
	if opt.Node.ID == "" {
		return nil, outrigger.Errorf(outrigger.Invalid, "node id is empty; the control plane tells relays apart by it")
	}
	if len(opt.Dial) == 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "no control plane to dial; give at least one")
	}
	if opt.MaxPods < 0 || opt.MaxBytes < 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "MaxPods is %d and MaxBytes %d; give 0 for the defaults, or more", opt.MaxPods, opt.MaxBytes)
	}
	if opt.MaxPods == 0 {
		opt.MaxPods = DefaultMaxPods
	}
	if opt.MaxBytes == 0 {
		opt.MaxBytes = DefaultMaxBytes
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	opt.Node.Kind = xds.KindRelay
	r := &Relay{opt: opt, log: opt.Logger, wanted: make(chan struct{}), probes: make(chan struct{}, 1),
		link: link{changed: make(chan struct{})}, had: make(map[[2]string]struct{}), cache: newCache(opt.MaxBytes)}
	r.down = adsserver.New(adsserver.Options{Logger: opt.Logger, Meter: opt.Meter, MaxStreams: opt.MaxPods,
		Authorise: authorise, Vouch: r.vouch, SendAway: true})
	r.down.Know(r.known)
	r.service = r.down.Discovery()
	return r, nil
}

// authorise admits sidecars.
func authorise(_ context.Context, n *core.Node) error {
	if kind := translate.NodeOf(n).Kind; kind != string(translate.KindSidecar) {
		return outrigger.Errorf(outrigger.Denied, "a node of kind %q is not served by a relay, which is for sidecars; ask the control plane", kind)
	}
	return nil
}

// Run follows the control plane, from the first pod on, until ctx ends; it returns nil and
// leaves no goroutine. A second call fails with kind Conflict.
func (r *Relay) Run(ctx context.Context) error {
	if r.running.Swap(true) {
		return outrigger.Errorf(outrigger.Conflict, "relay of node %s runs already", r.opt.Node.ID)
	}
	select {
	case <-r.wanted:
	case <-ctx.Done():
		return nil
	}
	var backoff upstream.Backoff
	for {
		for i, dial := range r.opt.Dial {
			synced, err := r.follow(ctx, dial)
			if ctx.Err() != nil {
				return nil
			}
			r.log.Warn("relay's stream to the control plane ended", "server", i, "synced", synced, "error", err)
			if synced {
				backoff.Reset()
				break
			}
		}
		if !backoff.Wait(ctx) {
			return nil
		}
	}
}

// vouch is Options.Vouch of the server for pods.
func (r *Relay) vouch(ctx context.Context, first bool, answer func()) {
	r.mu.Lock()
	if len(r.waiting) >= 2*r.opt.MaxPods { // streams that have ended meanwhile; one probe of each waits
		r.waiting = living(r.waiting)
	}
	r.waiting = append(r.waiting, waiter{ctx, answer})
	r.urgent = r.urgent || first
	r.mu.Unlock()
	select {
	case r.probes <- struct{}{}:
	default:
	}
}

func living(all []waiter) (out []waiter) {
	for _, w := range all {
		if w.ctx.Err() == nil {
			out = append(out, w)
		}
	}
	return out
}

// linked reports whether the control plane answers. Called with mu held.
func (r *Relay) linked(now time.Time) bool {
	return r.link.synced && (r.link.asked.IsZero() || now.Sub(r.link.asked) < unproven)
}

// known reports whether this relay was ever sent a model or a version; see adsserver.Know.
func (r *Relay) known(model, version string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.had[[2]string{model, version}]
	return ok
}
