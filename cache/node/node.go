// Package node is the core of the node agent: it keeps one table of variables per node
// coherent with the origin, lets every process of the node read it from shared memory,
// and answers reads and forwards writes for those that ask.
//
// # Use
//
//	conn, err := grpc.NewClient(target, append(node.TransportOptions(), credentials)...)
//	agent, err := node.New(node.Options{Node: me, Origin: conn})
//	pb.RegisterVariablesServer(server, agent)
//	pb.RegisterCoherenceServer(server, agent)
//	go agent.ServeTable(ctx, unixListener)
//	err = agent.Run(ctx) // owns the feed and every fetch
//
// A sidecar attaches to the table with Attach; the same process uses Agent.Table.
//
// # What it promises
//
// Reads (Coherence.Read, Variables.Get and BatchGet) are answered from the table while
// the feed lease holds, else by one fetch per key for all who ask at the same time.
// ReadResponse.as_of is a position that every result is at least as new as; unlike at
// the origin the results need not all hold at that one position. A request with
// x-outrigger-consistency: strong is answered by the origin and moves the table forward.
//
// Writes go to the origin. When it has acknowledged one, the table shows it before the
// caller hears of it. When the outcome is unknown the table stops showing the old value
// and shows nothing until it has asked. The caller gets kind Unknown then, and kind
// Unavailable only if nothing was changed; package unary explains how that is known.
//
// Everything else (sessions, History, Rollback, Watch, List, Changes) is forwarded;
// Feed is not relayed and fails with UNIMPLEMENTED, because one feed per node is the
// point of an agent.
//
// Staleness is bounded by Options.Lease. A reader of the table must check
// Reader.Lease() against the same clock, CLOCK_MONOTONIC (see Clock). While the origin
// cannot be reached the lease lapses, the table keeps its last values for readers that
// accept them, and reads through the agent fail with kind Unavailable.
//
// The rules are in cache/coherence; this package carries them out. That they hold is
// watched while it runs: once per Options.RepairEvery the entry stored longest ago is read
// at the origin. One that differs although nothing was missing is a violation of the
// staleness bound: it is replaced, logged, counted by age and reported with CacheDelta,
// and the control plane raises an alert.
//
// Admin is the service behind "outrigger cache": statistics, one entry, a dump, a flush.
//
// # Tenants
//
// An agent has one table. Whoever may connect to its table socket can read all of it, and
// whoever may connect to its gRPC socket can ask for any tenant's keys; the permissions of
// the sockets' directory decide who that is, and nothing else does. Tenants that must not
// see each other get an agent each, with a directory each that only their pods' user may
// enter, and a server bound to the tenant by BindTenant ("outrigger node --tenant"): it
// refuses every other tenant's keys, so that none get into its table. The processes of one
// agent are not told apart, and what the control plane lets them ask directly is its own
// business.
//
// # Limits
//
// Variables above shm.MaxValueBytes (1 MiB with version and metadata) are not kept: every
// read of one asks the origin.
// Fetches, waiting readers, attached sidecars and remembered touches are bounded by
// Options and constants; beyond them callers get kind Exhausted. Beside the table the agent
// keeps about 70 bytes of heap for a key it holds and 140 for a session.
//
// # Metrics
//
//	outrigger.cache.invalidation.lag  s        histogram, from a change's commit to the store that shows it
//	outrigger.cache.fills             {fetch}  fetches from the origin, retries included
//	outrigger.cache.joined            {read}   reads that waited for another's fetch: stampedes avoided
//	outrigger.cache.refused           {fill}   answers below the floor, asked for again
//	outrigger.cache.changes           {change} applied from the feed
//	outrigger.cache.gaps              {gap}    seen in the feed
//	outrigger.cache.resyncs           {flush}  times the whole table was dropped
//	outrigger.cache.checked           {entry}  compared with the origin by the freshness monitor
//	outrigger.cache.repairs           {entry}  of these, outdated: must stay 0
//	outrigger.cache.stale_total       {entry}  the same by age=1s, 5s, 60s (at most), more, unknown
//	outrigger.cache.evictions         {entry}  dropped from the table for room
//
// # Concurrency
//
// All methods may be called concurrently; Run may be called once. One mutex orders the
// protocol's steps together with the table's stores; no I/O happens under it. A crash
// leaves the table to its readers with a lease that lapses; a new agent starts empty.
package node

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/coherence"
	"github.com/outrigger-mesh/outrigger/cache/internal/unary"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/identity"
)

// Options configures an Agent. Zero values mean the defaults in brackets.
type Options struct {
	Node   outrigger.Node           // who this is; ID is required, an empty Region is learned from the origin
	Origin grpc.ClientConnInterface // the control plane; required
	Table  shm.Options              // size and kind of the table

	Lease        time.Duration // feed lease, counted from the sending of a heartbeat [300 ms]
	Heartbeat    time.Duration // between heartbeats [100 ms]; at most a third of Lease
	FetchTimeout time.Duration // for one fetch, range or touch report [2 s]
	TTL          time.Duration // last resort: an entry is forgotten after this [60 s]
	RepairEvery  time.Duration // the freshness monitor compares one entry with the origin per this time [1 s]; < 0 = none
	MaxKeys      int           // keys the protocol keeps exact floors for [those the table has room for]
	MaxSidecars  int           // processes attached to the table [1024]

	// SessionKeys returns what is handed to the node's processes, asked at every hand-out
	// [those of the origin].
	SessionKeys func() *identity.Keys

	// Clock is the monotonic clock in ns that table readers compare leases with; it must
	// stay above 0 [Clock()].
	Clock  func() int64
	Logger *slog.Logger // [discarded]
	Meter  metric.Meter // [none]
}

// Agent is one node's agent. Build it with New.
type Agent struct {
	pb.UnimplementedVariablesServer
	pb.UnimplementedCoherenceServer

	// Immutable.
	o       Options
	vars    pb.VariablesClient
	coh     pb.CoherenceClient
	metrics metrics
	lag     *lagSketch
	fresh   freshness
	reads   readCounts

	table   atomic.Pointer[shm.Writer]
	reader  atomic.Pointer[shm.Reader] // of table
	feedUp  atomic.Bool
	streams atomic.Uint64 // feed streams opened
	touched touches
	readers attachments
	ready   chan struct{} // closed when the table may be served for the first time
	first   sync.Once     // closes ready

	mu         sync.Mutex // guards everything below, and all stores to the table
	state      *coherence.State
	waiters    map[coherence.Waiter]waiting
	lastWaiter coherence.Waiter
	batch      effects            // of the step in progress
	endStream  context.CancelFunc // of the present feed stream
	selects    chan *pb.Select    // to be sent on it
	runCtx     context.Context    // nil before Run and after it
	work       sync.WaitGroup     // fetches; added to only while runCtx is set
	buf, value []byte             // scratch: encoded variables, values read from the table
}

// New checks the options, creates the table and starts nothing. Errors have kind
// Invalid, or those of shm.Create.
func New(o Options) (*Agent, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	w, err := shm.Create(o.Table)
	if err != nil {
		return nil, err
	}
	cc := unary.Conn(o.Origin)
	a := &Agent{
		o: o, vars: pb.NewVariablesClient(cc), coh: pb.NewCoherenceClient(cc),
		state: coherence.New(coherence.Options{
			Region: o.Node.Region, Lease: int64(o.Lease), Patience: int64(o.Heartbeat) / 2,
			MaxKeys: o.maxKeys(w), TTL: int64(o.TTL), RepairEvery: int64(o.RepairEvery),
		}),
		waiters: map[coherence.Waiter]waiting{}, ready: make(chan struct{}),
	}
	a.table.Store(w)
	a.reader.Store(w.Reader())
	if a.lag, err = newLagSketch(); err != nil {
		return nil, err
	}
	if a.metrics, err = newMetrics(o.Meter, a); err != nil {
		return nil, err
	}
	return a, nil
}

func (o *Options) complete() error {
	def := func(p *time.Duration, v time.Duration) {
		if *p == 0 {
			*p = v
		}
	}
	def(&o.Lease, 300*time.Millisecond)
	def(&o.Heartbeat, 100*time.Millisecond)
	def(&o.FetchTimeout, 2*time.Second)
	def(&o.TTL, time.Minute)
	def(&o.RepairEvery, time.Second)
	if o.MaxSidecars == 0 {
		o.MaxSidecars = 1024
	}
	if o.Clock == nil {
		o.Clock = Clock()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Meter == nil {
		o.Meter = noop.Meter{}
	}
	switch {
	case o.Node.ID == "":
		return outrigger.Errorf(outrigger.Invalid, "Options.Node.ID is empty; give the node a name that is stable over restarts")
	case o.Origin == nil:
		return outrigger.Errorf(outrigger.Invalid, "Options.Origin is nil; give the connection to the control plane")
	case o.Heartbeat < 0 || o.Lease < 0 || o.FetchTimeout < 0 || o.TTL < 0 || o.MaxSidecars < 0 || o.MaxKeys < 0:
		return outrigger.Errorf(outrigger.Invalid, "a duration or limit in Options is negative")
	case o.Lease < 3*o.Heartbeat:
		// Two lost heartbeats in a row must not end the lease.
		return outrigger.Errorf(outrigger.Invalid, "Options.Lease is %v and Options.Heartbeat %v; the lease must be at least three heartbeats", o.Lease, o.Heartbeat)
	}
	return nil
}

// maxKeys is how many keys the protocol keeps exact floors for. A key that loses its
// floor leaves the table, so by default every key the table can hold may have one, and
// those being fetched as well. A key costs about 70 bytes of heap (see coherence).
func (o *Options) maxKeys(w *shm.Writer) int {
	if o.MaxKeys > 0 {
		return o.MaxKeys
	}
	return w.Capacity() + maxFetching
}

// Ready is closed when the feed has proved for the first time that the table may be
// served.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// Lease returns the feed lease's length. A table whose lease ends at u was current at
// u − Lease.
func (a *Agent) Lease() time.Duration { return a.o.Lease }

// Table returns a reader of the table in this process, the same one until Rotate.
func (a *Agent) Table() *shm.Reader { return a.reader.Load() }

// maxFetching is above what may be fetched at a time; see coherence.Options.
const maxFetching = 2048

// tickEvery drives what the protocol does by time; see coherence.Tick.
const tickEvery = 20 * time.Millisecond

// Run follows the feed and serves until ctx ends, then retires the table, fails whoever
// waits and returns nil once everything it started has ended.
func (a *Agent) Run(ctx context.Context) error {
	a.mu.Lock()
	if a.runCtx != nil {
		a.mu.Unlock()
		return outrigger.Errorf(outrigger.Internal, "node: Run was called twice")
	}
	a.runCtx = ctx
	a.mu.Unlock()

	var loops sync.WaitGroup
	loops.Go(func() { a.follow(ctx) })
	loops.Go(func() { every(ctx, tickEvery, func() { a.step(coherence.Tick{}) }) })
	loops.Go(func() { every(ctx, touchEvery, func() { a.reportTouches(ctx) }) })
	loops.Wait()

	a.mu.Lock()
	a.stopped()
	a.mu.Unlock()
	a.work.Wait()
	a.readers.closeAll()
	a.metrics.close()
	w := a.table.Load()
	w.SetLease(0) // nobody keeps it current from here on
	return w.Close()
}

// every calls do each d until ctx ends.
func every(ctx context.Context, d time.Duration, do func()) {
	t := time.NewTicker(d)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			do()
		}
	}
}

// Rotate replaces the table by a new, empty one, for example a larger one. Attached
// readers see the end of their attachment and attach to the new table. Errors are those
// of shm.Create; the old table then stays.
func (a *Agent) Rotate(o shm.Options) error {
	w, err := shm.Create(o)
	if err != nil {
		return err
	}
	a.mu.Lock()
	old := a.table.Swap(w)
	a.reader.Store(w.Reader())
	old.SetLease(0)
	a.state.Resize(a.o.maxKeys(w))
	for _, key := range keysOf(old) {
		a.run(coherence.Evicted{Key: key})
	}
	if _, incarnation, applied := a.state.Position(); incarnation != 0 {
		w.SetHead(applied, incarnation)
	}
	// The next heartbeat's answer, at most one interval away, extends the new table's
	// lease.
	a.mu.Unlock()
	a.readers.closeAll()
	return old.Close()
}

func keysOf(w *shm.Writer) []outrigger.Key {
	var out []outrigger.Key
	w.Range(func(id string, _ shm.Entry, _ []byte) bool {
		if k, err := outrigger.ParseKey(id); err == nil {
			out = append(out, k)
		}
		return true
	})
	return out
}
