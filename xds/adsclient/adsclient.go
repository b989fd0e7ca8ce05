// Package adsclient is the xDS client of a sidecar: one delta ADS stream, one immutable
// policy behind one atomic pointer, one last-known-good file.
//
//	c := adsclient.New(adsclient.Options{Node: node, Dial: []adsclient.Dialer{local, remote}, Dir: "/var/lib/outrigger"})
//	go c.Run(ctx)
//	<-c.Ready()
//	m := c.Policy().Model("chat")
//
// # Promises
//
//   - Policy is always a consistent set: it is assembled when a push is complete
//     (MeshPolicy, the last resource of every push, has arrived) and every reference in
//     it resolves, validated, put in force, and only then acknowledged.
//   - A model whose resources are wrong keeps its last good state (or stays unknown)
//     while the other models of the push take effect. The response that holds the wrong
//     resource is rejected with the resource's name and the reason; MeshPolicy is when
//     the cause came with an earlier push. A rejection is sent once per push.
//   - Secrets (trust bundles, client certificates) are checked before they are used and are
//     there before the policy that names them. A broken one is rejected, and the one before it
//     stays. That one is missing keeps no policy from being put in force: what needs it fails.
//   - After a lost stream only what changed is transferred: the client reports the
//     versions it has in force.
//   - What is in force is saved to Dir shortly after the acknowledgement (temporary file,
//     fsync, rename) and loaded when Run starts, so a sidecar restarts without a control
//     plane. A damaged file is logged and ignored; the file is never trusted unchecked. It
//     holds the private keys of client certificates, too, so nobody but its owner can read it
//     (mode 0600 in a directory of mode 0700); without Dir keys are in memory only.
//
// # Losing the control plane
//
// The last policy stays in force. Streams are retried over Options.Dial in order, with
// pauses from 100 ms growing to 10 s, randomised by a fifth. A stream is given up when
// its first sync takes longer than 15 s or a liveness probe (a repeated subscription to
// MeshPolicy, which a server must answer) stays unanswered for three probe intervals.
// After a fail-over the client stays with the fallback until that stream ends, then
// starts from the first server again.
//
// # Through a relay
//
// With Options.Relay the client follows the relay of its node (package xds/relay) for as long
// as that is linked to the control plane, and goes to Options.Dial when it is not. It looks
// every 10 s whether it can go back. Nothing is transferred anew by either move, because
// versions are the control plane's. Of what comes through a relay only the answers to probes
// that the control plane vouched for count as having heard it, so a relay that is cut off
// holds up no dead-man lease: until the first such answer the policy of a client that starts
// is SourceRelay. A relay that has an older position than the client gives the client nothing.
// With no control plane in reach a relay that is cut off is followed all the same: it may have
// what this client has not.
//
// # Dead-man lease
//
// While a model has a candidate live (policy.Model.DeadMan > 0) probes are sent four
// times per lease. LeaseExpired says that the control plane has been silent for longer,
// counted from when the last answered probe was sent, or that the policy comes from
// disk: then the caller must send everything to LastGood.
//
// # Concurrency
//
// All methods may be called concurrently; Policy, Status and LeaseExpired never block
// and do not allocate. Run may be called once and owns every goroutine.
package adsclient

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/xds/internal/upstream"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Dialer connects to one control plane replica.
type Dialer = upstream.Dialer

// Options configure a Client. Node.ID and at least one Dialer are required.
type Options struct {
	Node outrigger.Node
	// Dial lists the servers in order of preference.
	Dial []Dialer
	// Relay is preferred to all of these while it is linked to the control plane; nil = none.
	Relay Dialer
	// Dir holds the last-known-good file; "" keeps none. One client per directory.
	Dir    string
	Logger *slog.Logger // nil discards
	Meter  metric.Meter // nil measures nothing
	// OnPolicy is called after every change of Policy, from Run's goroutines, one call
	// at a time; the acknowledgement waits for it, so it must not block. May be nil.
	OnPolicy func(*policy.Policy)
}

// Status says where the policy comes from and how fresh it is.
type Status struct {
	// Live: a stream is open and in sync.
	Live bool
	// LastContact is when the last question that the control plane answered was asked,
	// or the last push arrived; zero before the first.
	LastContact time.Time
	// Position of the policy in force.
	Position uint64
	// Source of the policy in force: SourceADS, SourceRelay, SourceDisk, or "" before the
	// first.
	Source string
	// LastNack is the reason of the rejection that stands, "" if none does.
	LastNack string
	// Server is the index in Options.Dial of the open stream; -1 if there is none of these.
	Server int
	// Relayed: the open stream is one to Options.Relay.
	Relayed bool
}

// Sources of a policy.
const (
	SourceADS   = "ads"
	SourceRelay = "relay" // a relay had it, and the control plane has not been heard through it yet
	SourceDisk  = "disk"
)

// Timing of streams; see the package comment.
const (
	warmTimeout  = 10 * time.Second // how long a push may wait for references
	probeIdle    = 10 * time.Second // between probes with no candidate live
	probeLeast   = 250 * time.Millisecond
	probesMissed = 3
	relayTimeout = 3 * time.Second  // for a relay to say whether it is linked
	homeEvery    = 10 * time.Second // between looks whether a relay can be followed again
	relayServer  = -1               // Status.Server of a relay
)

// Client follows one control plane. Make it with New.
type Client struct {
	opt     Options
	log     *slog.Logger
	metrics *metrics
	ready   chan struct{}
	once    sync.Once
	running atomic.Bool

	policy atomic.Pointer[policy.Policy]
	// material is what the versions of policy, and of the one before it, name.
	material atomic.Pointer[identity.Material]
	status   atomic.Pointer[Status]
	// backlog hands the newest set to the goroutine that writes it; room for one.
	backlog chan *view

	// good is what is in force, with versions. Owned by Run's goroutine.
	good *view
	// secrets is what good holds of material. Owned by Run's goroutine.
	secrets *identity.Material
}

// New returns a client that does nothing until Run. Errors have kind Invalid.
func New(opt Options) (*Client, error) {
	if opt.Node.ID == "" {
		return nil, outrigger.Errorf(outrigger.Invalid, "node id is empty; the control plane tracks delivery by it")
	}
	if len(opt.Dial) == 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "no control plane to dial; give at least one")
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Client{opt: opt, log: opt.Logger, metrics: newMetrics(opt.Meter), ready: make(chan struct{}), backlog: make(chan *view, 1), good: newView()}
	c.status.Store(&Status{Server: -1})
	c.material.Store(&identity.Material{})
	return c, nil
}

// Policy returns the policy in force, nil before the first.
func (c *Client) Policy() *policy.Policy { return c.policy.Load() }

// Material returns the certificates, keys and trust bundles that the policy in force names,
// as far as the control plane has them. It is replaced, also without a change of Policy, when
// they rotate; never nil.
func (c *Client) Material() *identity.Material { return c.material.Load() }

// Status returns the present state.
func (c *Client) Status() Status { return *c.status.Load() }

// Ready is closed once there is a policy, from the control plane or from disk.
func (c *Client) Ready() <-chan struct{} { return c.ready }

// LeaseExpired reports whether the model has a candidate live and the control plane has
// not been heard for longer than its dead-man lease, or not at all since the start.
func (c *Client) LeaseExpired(m *policy.Model, now time.Time) bool {
	if m.DeadMan <= 0 {
		return false
	}
	s := c.status.Load()
	return s.Source != SourceADS || now.Sub(s.LastContact) > m.DeadMan
}

// DeadManExpired reports LeaseExpired for any model in force.
func (c *Client) DeadManExpired(now time.Time) bool {
	p := c.policy.Load()
	if p == nil {
		return false
	}
	for i := range p.Models {
		if c.LeaseExpired(&p.Models[i], now) {
			return true
		}
	}
	return false
}

// Run loads the last-known-good file and follows the control plane until ctx ends; it
// then saves what is unsaved, returns nil, and leaves no goroutine. Servers that fail
// are retried for ever. A second call fails with kind Conflict.
func (c *Client) Run(ctx context.Context) error {
	if c.running.Swap(true) {
		return outrigger.Errorf(outrigger.Conflict, "client of node %s runs already", c.opt.Node.ID)
	}
	c.load()
	var saver sync.WaitGroup
	saver.Go(c.saveLoop)
	defer saver.Wait()
	defer close(c.backlog)
	var backoff upstream.Backoff
	for {
		synced, home := c.round(ctx)
		if synced {
			backoff.Reset()
		}
		if home {
			continue // the relay is there, and was not for homeEvery at least
		}
		if !backoff.Wait(ctx) {
			return nil
		}
	}
}

// round tries the servers in order until one stream got in sync; it reports whether one
// did, after that stream has ended. home says that it ended for the relay's sake.
func (c *Client) round(ctx context.Context) (synced, home bool) {
	cut := false
	if c.opt.Relay != nil {
		synced, err := c.attempt(ctx, &stream{server: relayServer, relay: true, linked: true}, c.opt.Relay)
		if synced || ctx.Err() != nil {
			return synced, false
		}
		cut = errors.Is(err, errCut)
	}
	for i, dial := range c.opt.Dial {
		synced, err := c.attempt(ctx, &stream{server: i}, dial)
		if synced || ctx.Err() != nil {
			return synced, errors.Is(err, errHome)
		}
	}
	if cut {
		// That there was no stream is logged, and was not for the relay's sake.
		synced, _ = c.attempt(ctx, &stream{server: relayServer, relay: true}, c.opt.Relay)
	}
	return synced, false
}

// attempt runs one stream and says in the status that there is none any more.
func (c *Client) attempt(ctx context.Context, s *stream, dial Dialer) (synced bool, err error) {
	synced, err = c.follow(ctx, s, dial)
	moving := errors.Is(err, errHome)
	c.update(func(st *Status) { st.Live, st.Server, st.Relayed = st.Live && moving, -1, false })
	if ctx.Err() == nil {
		c.log.Warn("control plane stream ended", "server", s.server, "relay", s.relay, "synced", synced, "error", err)
	}
	return synced, err
}

// follow runs one stream.
func (c *Client) follow(ctx context.Context, s *stream, dial Dialer) (synced bool, err error) {
	err = upstream.Follow(ctx, dial, func(ctx context.Context, conn grpc.ClientConnInterface, inSync func()) error {
		s.c, s.view, s.started, s.inSync = c, c.good.clone(), time.Now(), inSync
		return s.run(ctx, conn)
	})
	return s.synced, err
}

var (
	errCut   = outrigger.Errorf(outrigger.Unavailable, "the relay is cut off from the control plane")
	errHome  = outrigger.Errorf(outrigger.Unavailable, "the relay can be followed again")
	errProbe = outrigger.Errorf(outrigger.Unavailable, "no answer to %d liveness probes", probesMissed)
)

// update replaces the status by a changed copy. Only Run's goroutine calls it.
func (c *Client) update(f func(*Status)) {
	s := *c.status.Load()
	f(&s)
	c.status.Store(&s)
}

// enforce puts p in force. Only Run's goroutine calls it. The order matters: a reader
// that sees a policy from the control plane must not judge it by the old status.
func (c *Client) enforce(p *policy.Policy, f func(*Status)) {
	c.update(func(s *Status) { s.Position = p.Position; f(s) })
	c.policy.Store(p)
	if c.opt.OnPolicy != nil {
		c.opt.OnPolicy(p)
	}
	c.once.Do(func() { close(c.ready) })
}

// equip makes the secrets of v available, beside those of before: whoever works by the
// policy of before may still ask for them. Only Run's goroutine calls it, before the policy
// that names them is in force.
func (c *Client) equip(v *view) {
	prev := c.secrets
	c.secrets = translate.DecodeSecrets(&v.res, prev)
	both := &identity.Material{Bundles: maps.Clone(c.secrets.Bundles), Pairs: maps.Clone(c.secrets.Pairs)}
	if prev != nil {
		for name, b := range prev.Bundles {
			if both.Bundles[name] == nil {
				both.Bundles[name] = b
			}
		}
		for name, p := range prev.Pairs {
			if both.Pairs[name] == nil {
				both.Pairs[name] = p
			}
		}
	}
	c.material.Store(both)
}
