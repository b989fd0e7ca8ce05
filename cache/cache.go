// Package cache answers variable reads from the nearest tier that can prove its copy is
// current, and sends writes where they become visible: what a sidecar uses.
//
//	process tier   this process's memory: decoded variables and ready-to-send bytes
//	node tier      the node agent's table in shared memory
//	origin         the control plane, asked through the node agent, or directly
//
// # Use
//
//	store, err := cache.New(cache.Options{TablePath: "/run/outrigger/table", Agent: agent, Origin: control})
//	go store.Run(ctx)
//	if h, ok := store.Hit("default/s/x", 0); ok { … }       // no allocation
//	answer, err := store.Get(ctx, cache.Request{Key: key})  // always an answer or an error
//	v, err := store.Variables().Set(ctx, req)               // writes
//
// # What makes a copy current
//
// A process entry remembers the slot and stamp of the table entry it was made from. It
// is current if the stamp is still there, one atomic load, and the table's feed lease
// has not passed: the lease ending at u proves the table was current at u − Lease, so
// every answer states an age bound of at most the lease.
//
// # Consistency
//
//   - session, the default: answers from a current copy, else asks. Reads through one
//     Store never go back in time and see the writes made through it; across processes of
//     a node the shared table gives the same for writes made through the agent.
//   - strong: the origin is asked, always.
//   - bounded(d): a copy whose age bound is at most d, else the origin is asked; kind
//     Stale if even that took longer than d, or cannot be had.
//   - eventual: as session, and takes a copy known to be outdated when nobody answers.
//
// # When something is away
//
// Node agent away: the origin is asked directly. Such answers prove nothing later, so
// each read asks, unless Options.Private is set: then an agent of this process's own,
// with a table on the heap, takes over after a second and yields when the node's is
// back. Changing between tables is fenced: a table is used only once its lease was
// renewed after the last answer that came from elsewhere.
//
// Origin away too: session and eventual reads get the last value known, marked Stale,
// FeedLive false, with its age, unless it is known to have changed (eventual gets that
// as well); strong reads and unknown variables fail with kind Unavailable, bounded ones
// with Stale. Writes fail with kind Unavailable when certainly nothing was changed, and
// Unknown otherwise; a write is sent to a second place only in the first case.
//
// # The start
//
// A new process takes over what others on the node use: Run fills its process tier from
// the node's table, once, in the background, within the bounds of Options.WarmUp and only
// while there is room. Each entry is read and proved as a read would; nothing waits for it.
//
// # What the node's table keeps
//
// Once a second the agent is told which keys were hits here, in either tier: hashes of all
// of them up to 4,096 a second, of a sample beyond (shm.Samples). The agent's table keeps
// what is asked for most by that. A report that does not arrive is not made again.
//
// # Bounds and concurrency
//
// The process tier is bounded by ProcessBytes; Run owns at most five goroutines besides
// those of the private agent. Direct reads of one key are made once at a time. All
// methods may be called concurrently; messages and byte slices in answers are shared
// and must not be modified.
//
// Session tokens, which carry these guarantees across nodes and regions, enter at
// Request and Answer.
package cache

import (
	"hash/maphash"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/internal/unary"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/cache/tier"
)

// Encoder renders a variable into ready-to-send bytes. It must be deterministic and
// must not keep or change its argument; nil means "cannot be sent in this form".
type Encoder func(*pb.Variable) []byte

// Options configures a Store. Zero values mean the defaults in brackets. At least one of
// Agent and Origin is required.
type Options struct {
	Table     func() *shm.Reader       // the node's table in this process; may return nil
	TablePath string                   // or the agent's table socket: Run attaches and re-attaches
	Agent     grpc.ClientConnInterface // the node agent
	Origin    grpc.ClientConnInterface // the control plane

	// Private makes the Store run an agent of its own when the node has none; it needs
	// Origin. Node names it to the control plane.
	Private bool
	Node    outrigger.Node // [ID "sidecar"]

	Lease        time.Duration // feed lease of Table's agent, and of the private one [300 ms]
	Timeout      time.Duration // for one attempt to read elsewhere [1 s]
	ProcessBytes int64         // bound of the process tier [64 MiB]
	PrivateBytes int64         // arena of the private agent's table [16 MiB]
	WarmUp       WarmUp        // filling of the process tier at the start
	Encoders     []Encoder     // at most two

	Clock func() int64 // the clock leases are set by [node.Clock()]
	// Coarse is what Hit compares leases with: never before Clock, and at most a few
	// milliseconds ahead of it, so that a hit may end early but never outlives its lease.
	// coarse.New(Clock) is a cheap one, where Clock is not faked [Clock].
	Coarse func() int64
	Logger *slog.Logger // [discarded]
	Meter  metric.Meter // [none]
}

// Request is one read.
type Request struct {
	Key         outrigger.Key
	Consistency outrigger.Consistency
	Encoding    int // index into Options.Encoders, or -1 for none

	// Declared lets the consistency a variable declares in its metadata replace
	// Consistency, which then is the one for variables that declare none.
	Declared bool
	// After are positions the reader has seen, at most one per log: a session or bounded
	// read is answered from nothing older. Kept says that they are this process's own
	// memory of the session: they are not insisted on when nobody can be asked, because
	// what this process itself saw and wrote is kept track of anyway.
	After []outrigger.Dot
	Kept  bool
	// SeenAll, of a strong read, makes Answer.Seen cover everything that was committed
	// before the request, whatever it was, instead of the value alone.
	SeenAll bool
	// Explain fills Answer.Why and Answer.Explain, which costs a call to the agent.
	Explain bool
}

// Answer is what a read found, and how far it can be trusted.
type Answer struct {
	Found         bool
	SessionExists bool           // meaningful when not Found
	Variable      *pb.Variable   // shared, read-only; nil when not Found
	Encoded       []byte         // shared, read-only; nil when not asked for or not Found
	Tier          outrigger.Tier // who answered
	Age           time.Duration  // the answer was current at most this long ago
	FeedLive      bool           // the node's table is being kept current
	Stale         bool           // served beyond the asked guarantee
	Reason        string         // why it is stale, for people

	Consistency outrigger.Consistency // what the read was held to
	ByVariable  bool                  // the variable declared it
	// Seen is the position the answer shows the world at, at least; zero = not known. Of a
	// value it is the write behind it.
	Seen    outrigger.Dot
	Why     string   // why this tier answered, when asked to explain
	Explain *Explain // likewise

	declares declaration
}

// Store is the assembled cache. Build it with New.
type Store struct {
	o      Options
	clock  func() int64
	coarse func() int64 // an upper bound of clock
	tier   *tier.Cache[entry]
	agent  *peer // nil when there is none
	origin *peer
	direct singleflight.Group
	vars   pb.VariablesClient
	region atomic.Pointer[string] // of the log, as the last answer named it

	view     atomic.Pointer[view]    // the table in use
	attached atomic.Pointer[view]    // the last one the agent handed over
	socketUp atomic.Bool             // the hand-over connection is open
	private  atomic.Pointer[private] // the agent of this process, while it runs
	fence    atomic.Int64            // tables whose proof is older than this time are not used
	era      atomic.Uint64           // changes of view
	epoch    atomic.Uint64           // separates direct reads that must not share a call

	switching sync.Mutex     // serialises changes of view
	stripes   [64]sync.Mutex // serialise updates of one key in the process tier
	seed      maphash.Seed   // of stripes

	changed changedSessions

	samples shm.Samples // of hits, see sample

	nodeHits, originReads, stale, failures, warmed atomic.Uint64
}

// view is one table and how long its leases are. Views are compared by pointer.
type view struct {
	reader *shm.Reader
	lease  int64        // ns
	proved atomic.Int64 // a time at which the table was seen to be proved current
}

// base is the latest time the table is known to have been current. It outlives a lease
// that the agent took back.
func (v *view) base() int64 { return max(v.reader.Lease()-v.lease, v.proved.Load()) }

// New checks the options and starts nothing. Errors have kind Invalid.
func New(o Options) (*Store, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	s := &Store{o: o, clock: o.Clock, coarse: o.Coarse, seed: maphash.MakeSeed()}
	var err error
	if s.tier, err = tier.New(tier.Options[entry]{Bytes: o.ProcessBytes, Size: (*entry).size}); err != nil {
		return nil, err
	}
	if o.Agent != nil {
		s.agent = newPeer("node agent", o.Agent)
	}
	if o.Origin != nil {
		s.origin = newPeer("control plane", o.Origin)
	}
	s.vars = pb.NewVariablesClient(router{s})
	s.fence.Store(o.Clock() - 1)
	return s, s.register(o.Meter)
}

func (o *Options) complete() error {
	switch {
	case o.Agent == nil && o.Origin == nil:
		return outrigger.Errorf(outrigger.Invalid, "Options.Agent and Options.Origin are both nil; give at least one")
	case o.Private && o.Origin == nil:
		return outrigger.Errorf(outrigger.Invalid, "Options.Private needs Options.Origin, which is nil")
	case o.Table != nil && o.TablePath != "":
		return outrigger.Errorf(outrigger.Invalid, "Options.Table and Options.TablePath %q are both given; give one", o.TablePath)
	case o.Lease < 0 || o.Timeout < 0 || o.ProcessBytes < 0 || o.PrivateBytes < 0:
		return outrigger.Errorf(outrigger.Invalid, "a duration or size in Options is negative")
	case o.WarmUp.Bytes < 0 || o.WarmUp.Entries < 0 || o.WarmUp.Time < 0:
		return outrigger.Errorf(outrigger.Invalid, "a bound in Options.WarmUp is negative: %+v; use Off to have none", o.WarmUp)
	case len(o.Encoders) > maxEncoders:
		return outrigger.Errorf(outrigger.Invalid, "Options.Encoders has %d, the limit is %d", len(o.Encoders), maxEncoders)
	}
	if o.Lease == 0 {
		o.Lease = 300 * time.Millisecond
	}
	if o.Timeout == 0 {
		o.Timeout = time.Second
	}
	if o.PrivateBytes == 0 {
		o.PrivateBytes = 16 << 20
	}
	o.WarmUp.complete(o.ProcessBytes)
	if o.Node.ID == "" {
		o.Node.ID = "sidecar"
	}
	if o.Clock == nil {
		o.Clock = node.Clock()
	}
	if o.Coarse == nil {
		o.Coarse = o.Clock
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Meter == nil {
		o.Meter = noop.Meter{}
	}
	return nil
}

// peer is somebody to ask.
type peer struct {
	name string
	cc   grpc.ClientConnInterface // unary calls report unary.Unsent
	coh  pb.CoherenceClient
	// downUntil is when it is worth waiting for again while there is another answer.
	downUntil atomic.Int64
}

func newPeer(name string, cc grpc.ClientConnInterface) *peer {
	cc = unary.Conn(cc)
	return &peer{name: name, cc: cc, coh: pb.NewCoherenceClient(cc)}
}

// Stats counts answers since New, beside the process tier's own.
type Stats struct {
	Process     tier.Stats // look-ups, before the proof
	Node        uint64     // answered from the node's table
	Origin      uint64     // answered by the origin, through the agent or directly
	Stale       uint64     // served beyond the asked guarantee
	Failed      uint64     // not answered
	Warmed      uint64     // entries brought by the warm-up
	ProcessSize int64      // bytes charged to the process tier
	Attached    bool       // a table is in use and kept current
	Private     bool       // by an agent of this process's own
}

// Stats returns a snapshot.
func (s *Store) Stats() Stats {
	st := Stats{Process: s.tier.Stats(), Node: s.nodeHits.Load(), Origin: s.originReads.Load(), Stale: s.stale.Load(),
		Failed: s.failures.Load(), Warmed: s.warmed.Load(), ProcessSize: s.tier.Bytes(), Private: s.private.Load() != nil}
	_, st.Attached = s.live(s.current(), s.clock())
	return st
}

// maxEncoders bounds Options.Encoders: each takes room in every entry. A sidecar has three
// forms: HTTP, the bridge and our own service.
const maxEncoders = 3

// entry is one variable, or the knowledge that there is none, in the process tier. It is
// immutable. What Hit reads comes first, so that it lies on as few cache lines as can be.
type entry struct {
	// Proof: the table entry it was made from. view nil = an answer that proves nothing
	// later.
	view  *view
	stamp uint64
	slot  uint32

	sessionExists bool
	variable      *pb.Variable // nil: there is none
	declares      declaration
	encoded       [maxEncoders][]byte // by encoder; nil = not rendered

	known int64 // it was current at this time
	asOf  dotIn // and as of this position
	heard int64 // known here since: a table proved current later is at least as new
	doubt bool  // nothing is known, except that what was before this time is outdated
}

// dotIn is a position of a log.
type dotIn struct{ incarnation, position uint64 }

// declaration is the consistency a variable declares, if any.
type declaration struct {
	ok          bool
	consistency outrigger.Consistency
}

func declarationOf(v *pb.Variable) (d declaration) {
	d.consistency, d.ok = outrigger.DeclaredConsistency(v.GetMetadata())
	return d
}

func (e *entry) size() int {
	n := 64
	if e.variable != nil {
		n += 2 * proto.Size(e.variable) // decoded, with its headers
	}
	for _, b := range e.encoded {
		n += len(b)
	}
	return n
}
