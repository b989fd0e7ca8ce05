// Package node is the core of the node agent: it keeps one table of variables per node, or
// per node and tenant, coherent with the origin, lets every process of the node read it from shared memory,
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
// With Options.DialFeed the feed has a connection of its own (package cache/feed); an origin
// that refuses it is followed over gRPC, and asked again with the next connection. The lease
// counts from when a heartbeat was sent either way.
//
// The rules are in cache/coherence; this package carries them out. That they hold is
// watched while it runs: once per Options.RepairEvery the entry stored longest ago is read
// at the origin. One that differs although nothing was missing is a violation of the
// staleness bound: it is replaced, logged, counted by age and reported with CacheDelta,
// and the control plane raises an alert.
//
// Admin is the service behind "outrigger cache": statistics, one entry, a dump, a flush.
//
// # What leaves a full table
//
// Reads of the table are invisible to the agent, so processes report samples of the keys
// they had hits for, in both their tiers, once a second (NodeAdmin.ReportReads; shm.Samples
// says which), and the table keeps what is asked for most (shm.Writer.TouchAll). A process
// that reports nothing gets what its misses alone tell; without any reports the hit ratio
// is up to six points lower on skewed loads. A report touches the table its sender is given and no other, counts
// for at most 65,536 keys a second of one table, and is dropped beyond that: processes that
// share a table can spoil each other's hit ratio, nothing else.
//
// # Tenants
//
// Without more said an agent has one table. Whoever may connect to its table socket can
// read all of it, and whoever may connect to its gRPC socket can ask for any tenant's
// keys; the permissions of the sockets' directory decide who that is, and nothing else
// does.
//
// With Options.Access ("outrigger node --tenant-users") there is a table per tenant, made
// when one of its processes first attaches or reads, of an equal part of Options.Table's
// bytes, and closed when nobody has used it for TableIdle; a process that comes back gets
// a new one. Who is behind a connection the kernel says, by user and group, and a process
// gets its tenant's table and its tenant's keys, or a refusal. A table is an anonymous
// file of mode 0400 that is passed as an open read-only descriptor: a name with
// permissions would have to be made, found and cleaned up after a crash, and be right for
// every user of a tenant, while a descriptor goes to the one process that was judged and
// to those it starts. One feed serves all tables. What is shared, and so not a tenant's
// own, is load: fetches under way, the keys with exact floors, the feed's shards and the
// node's counters; attached sidecars are bounded for each tenant by its equal part.
//
// An agent may also be bound to one tenant as a whole by BindTenant ("--tenant"): it
// refuses every other tenant's keys, so that none get into its table. In each case what
// the control plane lets a process ask directly is the control plane's business.
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
//	outrigger.cache.denied            {call}   refused by Access, attachments included
//
// # Concurrency
//
// All methods may be called concurrently; Run may be called once. One mutex orders the
// protocol's steps together with the table's stores; no I/O happens under it. A crash
// leaves the table to its readers with a lease that lapses; a new agent starts empty.
package node

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/coherence"
	"github.com/outrigger-mesh/outrigger/cache/feed"
	"github.com/outrigger-mesh/outrigger/cache/internal/unary"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/identity"
)

// Options configures an Agent. Zero values mean the defaults in brackets.
type Options struct {
	Node   outrigger.Node           // who this is; ID is required, an empty Region is learned from the origin
	Origin grpc.ClientConnInterface // the control plane; required
	// DialFeed opens a connection for the feed alone to the port of Origin; see package
	// cache/feed. It must end with its context, and the connection must be as
	// trustworthy as Origin's. nil = the feed is a stream of Origin.
	DialFeed func(context.Context) (net.Conn, error)
	FeedHost string      // name of the origin in the request for a feed; "localhost" if empty
	Table    shm.Options // size and kind of the table, or of all the tenants' together

	Lease        time.Duration // feed lease, counted from the sending of a heartbeat [300 ms]
	Heartbeat    time.Duration // between heartbeats, up to an eighth less if a change comes then [100 ms]; at most a third of Lease
	FetchTimeout time.Duration // for one fetch, range or touch report [2 s]
	TTL          time.Duration // last resort: an entry is forgotten after this [60 s]
	RepairEvery  time.Duration // the freshness monitor compares one entry with the origin per this time [1 s]; < 0 = none
	MaxKeys      int           // keys the protocol keeps exact floors for [those the table has room for]
	MaxSidecars  int           // processes attached to tables [1024]; of a tenant its equal part with Access
	TableIdle    time.Duration // a tenant's table is retired when nobody used it for this long [10 min]

	// Access makes a table per tenant, and says whose each user of this machine may reach;
	// nil means one table, for whoever may connect.
	Access *Access

	// SessionKeys returns what is handed to the node's processes, asked at every hand-out
	// [those of the origin].
	SessionKeys func() *identity.Keys

	// Applied, if set, is told of each frame of the feed when the table shows what is in
	// it, by the goroutine that reads the feed. The frame is valid during the call. For
	// measuring.
	Applied func(*pb.FeedFrame)

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

	tables    atomic.Pointer[tableSet] // stored to with mu held
	feedUp    atomic.Bool
	streams   atomic.Uint64 // feed streams opened
	swallowed bool          // the last request for a feed was not answered; of the goroutine that follows
	touched   touches
	readers   attachments
	evicted   atomic.Uint64 // from tables that are no more
	ticks     *time.Timer   // the next tick
	ready     chan struct{} // closed when the table may be served for the first time
	first     sync.Once     // closes ready

	mu         sync.Mutex // guards everything below, and all stores to the table
	state      *coherence.State
	share      shm.Options // of each table
	ended      bool        // Run has; no table is made any more
	waiters    map[coherence.Waiter]waiting
	lastWaiter coherence.Waiter
	batch      effects            // of the step in progress
	pressed    bool               // the next tick comes soon
	feed       *feed.Client       // whose frame the step in progress is about; nil = none
	endStream  context.CancelFunc // of the present feed stream
	conversing *feed.Client       // the present feed; nil = a gRPC stream, or none yet
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
	part, n := share(o.Table, o.Access.count()), o.Access.count()
	room, err := part.Capacity()
	if err != nil {
		return nil, err
	}
	cc := unary.Conn(o.Origin)
	a := &Agent{
		o: o, vars: pb.NewVariablesClient(cc), coh: pb.NewCoherenceClient(cc), share: part,
		state: coherence.New(coherence.Options{
			Region: o.Node.Region, Lease: int64(o.Lease), Patience: int64(o.Heartbeat) / 2,
			MaxKeys: o.maxKeys(n * room), TTL: int64(o.TTL), RepairEvery: int64(o.RepairEvery),
		}),
		touched: touches{some: make(chan struct{}, 1)}, waiters: map[coherence.Waiter]waiting{}, ticks: stoppedTimer(), ready: make(chan struct{}),
	}
	a.tables.Store(&tableSet{tenants: map[string]*table{}})
	if o.Access == nil {
		one, err := a.newTable("", part)
		if err != nil {
			return nil, err
		}
		a.tables.Store(&tableSet{list: []*table{one}})
	}
	if a.lag, err = newLagSketch(); err != nil {
		return nil, err
	}
	if a.metrics, err = newMetrics(o.Meter, a); err != nil {
		return nil, err
	}
	return a, nil
}

func stoppedTimer() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
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
	def(&o.TableIdle, 10*time.Minute)
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
	case o.Heartbeat < 0 || o.Lease < 0 || o.FetchTimeout < 0 || o.TTL < 0 || o.TableIdle < 0 || o.MaxSidecars < 0 || o.MaxKeys < 0:
		return outrigger.Errorf(outrigger.Invalid, "a duration or limit in Options is negative")
	case o.Lease < 3*o.Heartbeat:
		// Two lost heartbeats in a row must not end the lease.
		return outrigger.Errorf(outrigger.Invalid, "Options.Lease is %v and Options.Heartbeat %v; the lease must be at least three heartbeats", o.Lease, o.Heartbeat)
	}
	return nil
}

// maxKeys is how many keys the protocol keeps exact floors for, given how many the tables
// have room for. A key that loses its
// floor leaves the table, so by default every key a table can hold may have one, and
// those being fetched as well. A key costs about 70 bytes of heap (see coherence).
func (o *Options) maxKeys(room int) int {
	if o.MaxKeys > 0 {
		return o.MaxKeys
	}
	return room + maxFetching
}

// Ready is closed when the feed has proved for the first time that the table may be
// served.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// Lease returns the feed lease's length. A table whose lease ends at u was current at
// u − Lease.
func (a *Agent) Lease() time.Duration { return a.o.Lease }

// Table returns a reader of the table in this process, the same one until Rotate; nil with
// Options.Access, because then there is none that anybody may read.
func (a *Agent) Table() *shm.Reader {
	if set := a.tables.Load(); set.tenants == nil {
		return set.list[0].r
	}
	return nil
}

// maxFetching is above what may be fetched at a time; see coherence.Options.
const maxFetching = 2048

// These drive what the protocol does by time; see coherence.Tick.
const (
	tickEvery    = 20 * time.Millisecond // while something presses
	restingEvery = 100 * time.Millisecond
)

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
	a.ticks.Reset(restingEvery)
	defer a.ticks.Stop()
	loops.Go(func() { a.tick(ctx) })
	loops.Go(func() { a.report(ctx) })
	if a.o.Access != nil {
		loops.Go(func() { every(ctx, retireEvery, a.retireIdle) })
	}
	loops.Wait()

	a.mu.Lock()
	a.stopped()
	a.ended = true
	a.mu.Unlock()
	a.work.Wait()
	a.readers.end(nil)
	a.metrics.close()
	var err error
	for _, t := range a.tables.Load().list {
		err = errors.Join(err, t.w.Close()) // and its lease: nobody keeps it current from here on
	}
	return err
}

// tick lets the protocol act by time until ctx ends. A node at rest is woken seldom, because
// a machine may have many: while the feed is open its heartbeats are enough.
func (a *Agent) tick(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.ticks.C:
			a.ticked(0)
		}
	}
}

// ticked makes a tick. The next comes after restingEvery and another, for ticks that have a
// wake-up of their own, or soon.
func (a *Agent) ticked(another time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.run(coherence.Tick{})
	if a.pressed = a.state.Pressing(); a.pressed {
		a.ticks.Reset(tickEvery)
	} else {
		a.ticks.Reset(restingEvery + another)
	}
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
