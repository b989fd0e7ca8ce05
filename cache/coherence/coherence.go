// Package coherence is the protocol that keeps one node's cache right, as a pure state
// machine: inputs are what happened (a feed frame came, a reader asks, a fill
// answered, a write was acknowledged, time passed), outputs are what to do (store a
// value, invalidate a slot, ask the origin, answer readers, extend the feed lease).
// It holds no values, does no I/O, starts no goroutine and reads no clock, so every
// race can be written down as a transcript and every fault can be simulated by seed.
//
// # Use
//
//	s := coherence.New(coherence.Options{Region: "eu"})
//	for in := range inputs {
//		for _, out := range s.Step(in, now()) {
//			carry out
//		}
//	}
//
// Outputs must be carried out in order, and those that touch the table before the next
// Step. The slice Step returns is valid until the next Step. A State is not safe for
// concurrent use; its owner serialises Step.
//
// # The rules
//
// Every key has a floor: a log position below which nothing may be served for it, plus
// positions of other regions for writes this node acknowledged there. A change never
// just deletes: it raises the floor. A fill says as of which position it holds and is
// kept only if that reaches the floor, so a value read before a change can never be
// stored after it, whatever the network does; a refused fill is asked for again with
// the floor as its minimum (read-repair). The same rule covers negative entries and
// deletions: a tombstone is a floor with a negative entry on it.
//
// A write whose position is not known (an unknown outcome, a deleted session) leaves a
// doubt: what the feed or a slow acknowledgement brings next may be older than it. Until
// an answer was asked for after the doubt arose, a key that it concerns holds nothing.
//
// Changes are applied contiguously. A frame that starts above the applied position
// shows a gap: what it says is applied at once, the missing range is fetched, and the
// feed lease is not renewed before the gap is closed. Duplicate and reordered frames
// change nothing twice, because floors only rise and the applied position only grows.
//
// The feed lease bounds staleness without trusting any other clock. The node sends a
// heartbeat at its own monotonic time `sent`; the answer says the log's head then or
// later. Once everything up to that head is applied, what the table holds was current
// at `sent`, so it may be served until sent + Lease. Beyond that every read asks the
// origin. This assumes one thing of the origin: a server that answers a heartbeat knew
// the authoritative head after the heartbeat reached it. A follower must not answer
// from a log it cannot prove current.
//
// An incarnation is one life of a log. Positions of different incarnations are never
// compared. There is one authority at a time, so evidence of another incarnation (a
// frame, a fill, an acknowledged write) is of a newer one if it was asked for after the
// present one was adopted: then everything is flushed and the lease ends. Otherwise it
// may be a late answer of an older log and is asked for again; a write so acknowledged
// cannot be asked again, so then nothing is trusted until something newer tells.
//
// The feed is divided by session into Shards. A node selects the shards of the sessions
// it uses, with Subscribe and later with Select, and the origin answers from which
// position on their changes are in the stream. Of a shard that is not selected nothing
// is held, and of one that is only what was current at that position or later: an
// answer that comes before is given to its readers and waits to be stored. Every frame
// covers its whole range of positions for the selected shards, so gaps and leases are
// what they are without shards. A stream that does not say that it is selective carries
// everything, and what is wanted of it counts as selected where it began.
//
// Refill leases are the memcached leases of Nishtala et al., "Scaling Memcache at
// Facebook" (NSDI 2013): one fetch per key, its readers wait for it. Floors replace
// their tokens, since a position says more than "something was deleted".
//
// A lapse of the feed lease alone does not repeat a fetch. What the origin answered to a
// question asked less than a Lease ago is served without the feed's word. What is older
// waits for that word, one Lease at most and only while the feed is open and lacks
// nothing: a node that was held up hears it in a moment, and until then its readers
// would all be asking for what they have.
//
// # Bounds
//
// Exact floors are kept for MaxKeys keys. Beyond that the oldest is forgotten and its
// floor moves to a bucket shared by hash, where it is only ever too high: the cost is
// a fetch with a needless minimum, never a stale answer. A key takes 64 bytes and about 3
// of index, 16 more for each 12 bytes of name above 8, and a session with its name about
// 140; none of it is looked at by the garbage collector. A Step's work does not grow with
// the number of keys, except for what concerns them all (a flush, a change of scope ALL)
// or all of a session; age takes at most 8,192 normal and as many short-lived keys out in
// one Tick. Fetches in flight, waiting
// readers, remembered spans and pending acknowledgements are bounded by Options and by
// constants; refused readers get kind Exhausted.
package coherence

import (
	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Options configures a State. The zero value of each field means its default. Times
// are nanoseconds of the owner's monotonic clock.
type Options struct {
	Region string // region of the feed; "" = learn it from the first answer

	Lease    int64 // how long one heartbeat keeps the table fresh, from its sending; 300 ms
	Patience int64 // how long the applied position may trail an acknowledged head before the range is fetched; 50 ms

	MaxKeys     int    // keys with an exact floor; 65536, at least 2·MaxFlights
	MaxFlights  int    // keys being fetched; 1024
	MaxWaiters  int    // readers waiting for fetches; 16384
	MaxAttempts int    // fetches for one key before its readers fail; 4
	MaxGap      uint64 // a longer gap is flushed instead of fetched; 65536 positions

	TTL         int64 // last resort: forget what was stored longer ago; 60 s, at most 24 days
	NegativeTTL int64 // the same for "no such session", whose creation need not be a change; 1 s
	RepairEvery int64 // one sampled comparison with the origin per this time; 0 = none
	ShardIdle   int64 // a shard nobody asked for this long is dropped from the feed, with what is held of it; 600 s
}

const (
	maxPending = 16   // acknowledgements that wait for the applied position
	maxSpans   = 64   // applied spans above a gap
	maxForeign = 8192 // keys with an acknowledged write in another region that the feed has not shown yet
	buckets    = 4096 // shared floors, for keys and for sessions (by shard) each
	maxEvicted = 16   // keys forgotten for room for one
	maxExpired = 8192 // keys forgotten by age in one Tick, of each kind
)

func (o Options) withDefaults() Options {
	def := func(p *int64, v int64) {
		if *p <= 0 {
			*p = v
		}
	}
	defInt := func(p *int, v int) {
		if *p <= 0 {
			*p = v
		}
	}
	def(&o.Lease, 300*ms)
	def(&o.Patience, 50*ms)
	def(&o.TTL, 60_000*ms)
	def(&o.NegativeTTL, 1000*ms)
	def(&o.ShardIdle, 600_000*ms)
	defInt(&o.MaxKeys, 65536)
	defInt(&o.MaxFlights, 1024)
	defInt(&o.MaxWaiters, 16384)
	defInt(&o.MaxAttempts, 4)
	if o.MaxGap == 0 {
		o.MaxGap = 65536
	}
	o.MaxKeys = max(o.MaxKeys, 2*o.MaxFlights)
	o.TTL, o.NegativeTTL = min(o.TTL, maxTTL), min(o.NegativeTTL, maxTTL)
	return o
}

// Waiter names one reader to the owner; State only hands it back.
type Waiter uint64

// Input is one thing that happened.
type Input interface{ input() }

// The inputs.
type (
	// Connected: a feed stream was opened. Streams are numbered by the owner, rising
	// from 1; frames of any but the latest are ignored. Answered with Subscribe.
	Connected struct{ Stream uint64 }
	// Lost: the stream ended.
	Lost struct{ Stream uint64 }
	// Frame: the stream delivered a frame.
	Frame struct {
		Stream uint64
		Frame  *pb.FeedFrame
	}
	// Read: a reader wants a key no older than position Min (0 = any that the rules
	// allow). Answered, now or later, with exactly one of Hit, Answer, Failed.
	Read struct {
		Key    outrigger.Key
		Waiter Waiter
		Min    uint64
	}
	// Filled: the fetch with this number answered.
	Filled struct {
		Key         outrigger.Key
		Flight      uint64
		Result      *pb.ReadResult
		AsOf        uint64
		Incarnation uint64
		Region      string
	}
	// FillFailed: the fetch with this number did not answer.
	FillFailed struct {
		Key    outrigger.Key
		Flight uint64
		Err    error
	}
	// Offered: somebody read the key at the origin outside a fetch (a strong read).
	// Began is what State.Begin returned before that read started.
	Offered struct {
		Key         outrigger.Key
		Began       uint64
		Result      *pb.ReadResult
		AsOf        uint64
		Incarnation uint64
		Region      string
	}
	// Wrote: a write of this node was acknowledged. Variable is nil for a deletion; Began
	// is what State.Begin returned before the write was sent.
	Wrote struct {
		Key      outrigger.Key
		Began    uint64
		Variable *pb.Variable
		Version  *pb.Version
	}
	// Observed: a value of the key was seen in an answer that names no position to hold
	// as of (a list, a watch). It only ever makes the cache newer. Of a deleted variable
	// the key and version count. Began is what State.Begin returned before the list or
	// the watch was asked for.
	Observed struct {
		Began    uint64
		Variable *pb.Variable
		Deleted  bool
	}
	// WriteUnknown: a write of this node may or may not have happened.
	WriteUnknown struct{ Key outrigger.Key }
	// SessionChanged: a session was created or deleted through this node: by Version, or
	// with Version nil at a position the answer does not tell, or with an unknown outcome.
	SessionChanged struct {
		Tenant, Session string
		Version         *pb.Version
	}
	// RangeArrived: the range fetch with this number answered.
	RangeArrived struct {
		Range    uint64
		Response *pb.ChangesResponse
	}
	// RangeFailed: it did not. Gone means that the changes are no longer kept.
	RangeFailed struct {
		Range uint64
		Gone  bool
	}
	// Evicted: the table no longer holds the key (no room, or the value did not fit).
	Evicted struct{ Key outrigger.Key }
	// Tick: time passed. Send one every 100 ms, and every 10 to 25 ms while State.Pressing.
	Tick struct{}
)

func (Connected) input()      {}
func (Lost) input()           {}
func (Frame) input()          {}
func (Read) input()           {}
func (Filled) input()         {}
func (FillFailed) input()     {}
func (Offered) input()        {}
func (Wrote) input()          {}
func (Observed) input()       {}
func (WriteUnknown) input()   {}
func (SessionChanged) input() {}
func (RangeArrived) input()   {}
func (RangeFailed) input()    {}
func (Evicted) input()        {}
func (Tick) input()           {}

// Output is one thing to do.
type Output interface{ output() }

// The outputs.
type (
	// Subscribe on the stream just connected.
	Subscribe struct {
		Stream      uint64
		Incarnation uint64
		From        uint64
		// Number and Shards are the select that goes with it.
		Number uint64
		Shards []uint32
	}
	// Resubscribe: give the stream up, it shows a log that was left; connect again.
	Resubscribe struct{ Stream uint64 }
	// Install stores a value, or a negative entry when Variable is nil. It was current as
	// of AsOf, which may be above the last Head: a negative entry must carry it, because
	// nothing else in it tells what its readers have been shown.
	Install struct {
		Key           outrigger.Key
		Variable      *pb.Variable
		SessionExists bool
		AsOf          outrigger.Dot
	}
	// Invalidate marks the key's slot: known, and changed since.
	Invalidate struct{ Key outrigger.Key }
	// Remove takes the key out of the table.
	Remove struct{ Key outrigger.Key }
	// Flush empties the table.
	Flush struct{}
	// Fetch asks the origin for one key, not before time After (0 = now), and reports
	// Filled or FillFailed with the same Flight. Fetches of one Step may share a call.
	Fetch struct {
		Key         outrigger.Key
		Flight      uint64
		MinPosition uint64
		After       int64
	}
	// FetchRange asks for the changes in (From, To].
	FetchRange struct {
		Range       uint64
		Incarnation uint64
		From, To    uint64
	}
	// Lease: the table is fresh while the clock is below Until (0 = it is not).
	Lease struct{ Until int64 }
	// Head: everything up to Position is applied.
	Head struct {
		Position    uint64
		Incarnation uint64
	}
	// Hit: answer from the table, which holds the key. AsOf is the position the entry
	// is at least as new as. If the table lost it, send Evicted and Read again. It was
	// true at some time after Issued; 0 = since the heartbeat behind the feed lease.
	Hit struct {
		Key     outrigger.Key
		Waiters []Waiter
		AsOf    uint64
		Issued  int64
	}
	// Answer with what the origin said. It was true at the origin at some time after
	// Issued.
	Answer struct {
		Key         outrigger.Key
		Waiters     []Waiter
		Result      *pb.ReadResult
		AsOf        uint64
		Incarnation uint64
		Issued      int64
	}
	// Failed: no answer can be had.
	Failed struct {
		Key     outrigger.Key
		Waiters []Waiter
		Err     error
	}
)

func (Subscribe) output()   {}
func (Resubscribe) output() {}
func (Install) output()     {}
func (Invalidate) output()  {}
func (Remove) output()      {}
func (Flush) output()       {}
func (Fetch) output()       {}
func (FetchRange) output()  {}
func (Lease) output()       {}
func (Head) output()        {}
func (Hit) output()         {}
func (Answer) output()      {}
func (Failed) output()      {}

// Stats counts what a State did since New.
type Stats struct {
	Hits        uint64 // reads answered from the table
	Fetches     uint64 // fetches started, retries included
	Joined      uint64 // reads that waited for somebody else's fetch: stampedes avoided
	Refused     uint64 // fills below the floor, asked for again
	Changes     uint64 // changes applied
	Invalidated uint64 // entries a change made unusable
	Refreshed   uint64 // entries a change brought the new value for
	Gaps        uint64 // gaps seen
	Flushes     uint64 // everything dropped: reset, new incarnation, gap too long
	Checked     uint64 // sampled comparisons with the origin that answered
	Repaired    uint64 // entries that differed from the origin although nothing was missing
	Evicted     uint64 // keys forgotten for room or age
	Keys        int    // keys with an exact floor now
	Flights     int    // fetches in flight now
	Waiting     int    // readers waiting now
	Shards      int    // shards of the feed that are selected now
}
