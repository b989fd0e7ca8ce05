package coherence

import (
	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// State is the protocol state of one node. Build it with New.
type State struct {
	opt Options

	// The log this node follows.
	region      string
	incarnation uint64
	adopted     uint64 // ordinal when incarnation was adopted; later evidence is newer
	doubtful    Head   // evidence of a log that could not be placed when it came
	former      Head   // the log followed before, and the highest position heard of in it
	applied     uint64 // every change up to here was applied, or nothing it concerns is held
	seen        uint64 // highest position heard of in any way
	stream      uint64 // current feed stream, 0 = none
	streamOf    uint64 // incarnation of the stream, 0 = no frame yet
	streamOld   bool   // it was opened before incarnation was adopted from elsewhere
	spans       []span // applied above a gap: disjoint, ascending
	pending     []ack  // acknowledgements whose head is not reached, ascending by sent
	gap         rangeFetch
	lease       int64
	reported    Head // as last sent

	// Floors.
	global    uint64                   // for every key
	byKey     []uint64                 // by hash of the key, for keys without an entry
	bySession []uint64                 // by hash of tenant and session
	foreign   map[outrigger.Key]vector // acknowledged writes in other regions, by key
	barrier   map[uint64]vector        // the same by hash of the key, for what did not fit into foreign
	keys                               // those with an exact floor
	flights   map[*entry]*flight       // of those being fetched
	wait      int                      // readers that wait for them
	parked    []*entry                 // whose readers wait for the feed
	asked     answers
	repairAt  int64

	ordinal uint64 // numbers flights, ranges and Begin
	// What was begun before these (ordinal and time) may have missed a write of this node.
	voided   uint64
	voidedAt int64

	stored bool // something was installed since the last flush

	selection selection // of the feed's shards

	out   []Output
	stats Stats
}

type vector = map[string]uint64

// span is one contiguous run of applied positions (previous, through].
type span struct{ previous, through uint64 }

type ack struct {
	sent, received int64
	head           uint64
}

type rangeFetch struct {
	number  uint64 // of the fetch in flight, 0 = none
	from    uint64
	retryAt int64
}

// flight is one fetch of one key: the refill lease.
type flight struct {
	number   uint64
	issued   int64
	attempts int
	waiters  []reader
	late     []reader // came too late to count this fetch as fresh
	until    int64    // there is no fetch: its late readers wait for the feed, till then; see park
}

func (f *flight) clearMinimums() {
	for i := range f.waiters {
		f.waiters[i].min = 0
	}
	for i := range f.late {
		f.late[i].min = 0
	}
}

type reader struct {
	waiter Waiter
	min    uint64
}

// New returns a State that holds nothing.
func New(o Options) *State {
	return &State{
		opt: o.withDefaults(), region: o.Region,
		byKey: make([]uint64, buckets), bySession: make([]uint64, buckets),
		foreign: map[outrigger.Key]vector{}, barrier: map[uint64]vector{},
		keys: newKeys(), flights: map[*entry]*flight{},
	}
}

// Step takes one input at monotonic time now (ns) and returns what to do about it.
func (s *State) Step(in Input, now int64) []Output {
	s.out = s.out[:0]
	switch in := in.(type) {
	case Connected:
		s.connected(in, now)
	case Lost:
		if in.Stream == s.stream {
			s.stream, s.pending = 0, nil
		}
	case Frame:
		s.frame(in, now)
	case Read:
		s.read(in, now)
	case Filled:
		s.filled(in, now)
	case FillFailed:
		s.fillFailed(in)
	case Offered:
		s.offered(in, now)
	case Wrote:
		s.wrote(in, now)
	case Observed:
		s.observed(in, now)
	case WriteUnknown:
		s.writeUnknown(in.Key, now)
	case SessionChanged:
		s.sessionChanged(in, now)
	case RangeArrived:
		s.rangeArrived(in, now)
	case RangeFailed:
		s.rangeFailed(in, now)
	case Evicted:
		s.evicted(in.Key)
	case Tick:
		s.tick(now)
	}
	if len(s.parked) > 0 {
		s.unpark(now)
	}
	s.selectMore(now)
	s.report()
	return s.out
}

// Begin numbers a read that is about to be made at the origin outside of a fetch; see
// Offered.
func (s *State) Begin() uint64 { return s.next() }

// Fresh reports whether the table may be served at time now.
func (s *State) Fresh(now int64) bool { return now < s.lease }

// Position returns the log followed and the position applied; incarnation 0 = none yet.
func (s *State) Position() (region string, incarnation, applied uint64) {
	return s.region, s.incarnation, s.applied
}

// Pressing reports whether something waits for time to pass that is not to be done 100 ms
// late: a gap to be closed, an acknowledgement or readers that wait for what is missing.
func (s *State) Pressing() bool { return len(s.pending)+len(s.spans)+len(s.parked) > 0 }

// Stats returns the counters.
func (s *State) Stats() Stats {
	st := s.stats
	st.Keys, st.Flights, st.Waiting, st.Shards = s.count, len(s.flights), s.wait, s.selection.active
	return st
}

func (s *State) emit(o Output) { s.out = append(s.out, o) }

func (s *State) next() uint64 {
	s.ordinal++
	return s.ordinal
}

// report publishes the applied position after any input that moved it.
func (s *State) report() {
	if h := (Head{Position: s.applied, Incarnation: s.incarnation}); h != s.reported && h.Incarnation != 0 {
		s.reported = h
		s.emit(h)
	}
}

// adopt makes (incarnation, position) the log followed if it is not already. later
// says that the evidence was asked for after the present one was adopted: only then is
// it known to be the newer of the two, because there is one authority at a time. ok is
// false when it is not, or when that incarnation was left before.
func (s *State) adopt(region string, incarnation, position uint64, later bool) (ok bool) {
	if incarnation == s.incarnation {
		return true
	}
	if incarnation == 0 || !later {
		return false
	}
	if region != "" {
		s.region = region
	}
	s.follow(incarnation, position)
	return true
}

// distrust gives up what is known of the log because evidence came up that it was
// replaced, or replaced another; evidence too old to tell which. Whatever is asked from
// now on will tell. The evidence was shown to somebody: if its log proves to be the one,
// nothing older may follow.
func (s *State) distrust(dot outrigger.Dot) {
	if s.doubtful.Incarnation != dot.Incarnation {
		s.doubtful = Head{Incarnation: dot.Incarnation}
	}
	s.doubtful.Position = max(s.doubtful.Position, dot.Position)
	s.follow(0, 0)
	if s.stream != 0 {
		s.emit(Resubscribe{Stream: s.stream})
		s.stream = 0
	}
}

// follow starts over at a position of an incarnation, 0 = not known.
func (s *State) follow(incarnation, position uint64) {
	if s.lease != 0 {
		s.lease = 0
		s.emit(Lease{})
	}
	if s.incarnation != 0 {
		s.former = Head{Position: s.seen, Incarnation: s.incarnation}
	}
	s.incarnation, s.adopted, s.streamOld = incarnation, s.ordinal, s.stream != 0
	clear(s.byKey)
	clear(s.bySession)
	clear(s.foreign)
	clear(s.barrier)
	s.global, s.seen, s.applied = 0, 0, 0
	if incarnation == s.former.Incarnation {
		s.seen = s.former.Position // it was doubted and proved right: nothing older than was shown
	}
	if incarnation != 0 && incarnation == s.doubtful.Incarnation {
		s.seen = max(s.seen, s.doubtful.Position)
	}
	for _, f := range s.flights {
		f.clearMinimums() // they were positions of the other log
	}
	s.flush(position)
}

// Current reports whether an answer of an incarnation, asked for at began (see Begin),
// may be given to a caller: it is of the log followed, or known to be of a newer one.
// Otherwise ask again.
func (s *State) Current(incarnation, began uint64) bool {
	return incarnation == s.incarnation || began > s.adopted
}

// flush forgets every value and starts again at position: nothing is held, so nothing
// before it can have been missed, and fills older than anything heard of are refused.
func (s *State) flush(position uint64) {
	if s.stored {
		s.stored = false
		s.stats.Flushes++
		s.emit(Flush{})
	}
	s.applied = position
	s.note(position)
	s.global = max(s.global, s.seen)
	s.spans, s.pending, s.gap = nil, nil, rangeFetch{}
	s.asked = answers{}
	s.flushShards()
	if len(s.flights) == 0 {
		s.clear()
		return
	}
	for e := range s.all() {
		if s.flights[e] == nil {
			s.forget(e)
			continue
		}
		e.hold(nothing)
		e.at, e.floor = 0, s.global
	}
}

func (s *State) note(position uint64) { s.seen = max(s.seen, position) }

// base is the floor the shared tables give a key.
func (s *State) base(k outrigger.Key) uint64 {
	return max(s.global, s.byKey[bucketOf(k)], s.bySession[sessionBucket(k.Tenant, k.Session)])
}

// bucketOf is where the shared tables have a key: the 64-bit FNV-1a of its text form.
func bucketOf(k outrigger.Key) uint64 {
	return hash(hash(hash(hash(hash(fnvBasis, k.Tenant), "/"), k.Session), "/"), k.Name) % buckets
}

func sessionBucket(tenant, session string) uint64 {
	return hash(hash(hash(fnvBasis, tenant), "/"), session) % buckets
}

const fnvBasis = 14695981039346656037

// hash goes on with h, a 64-bit FNV-1a.
func hash(h uint64, part string) uint64 {
	for i := range len(part) {
		h = (h ^ uint64(part[i])) * 1099511628211
	}
	return h
}

// track returns the key's entry, making room for it if it is new.
func (s *State) track(key outrigger.Key, now int64) *entry {
	s.want(key, now)
	if e := s.find(key); e != nil {
		return e
	}
	s.makeRoom()
	e := s.add(key)
	e.since, e.floor = stamp(now), s.base(key)
	// A heartbeat sent after the last doubt, with all up to its head applied, ends it.
	e.setUnasked(s.voided != 0 && s.lease-s.opt.Lease <= s.voidedAt)
	return e
}

// Resize changes Options.MaxKeys, for a table of another size. Keys beyond it are
// forgotten as others come, a few at a time.
func (s *State) Resize(maxKeys int) { s.opt.MaxKeys = max(maxKeys, 2*s.opt.MaxFlights) }

// makeRoom forgets the longest-stored key that is not being fetched, and more if the
// limit was lowered.
func (s *State) makeRoom() {
	for range maxEvicted {
		if s.count < s.opt.MaxKeys {
			return
		}
		s.evict(s.victim())
	}
}

// victim is the longest-stored key that is not being fetched, of the normal ones if there
// is any. There is one, because fewer than half of the keys may be in flight.
func (s *State) victim() *entry {
	for range len(s.flights) {
		e := s.front(&s.order)
		if e == nil || s.flights[e] == nil {
			break
		}
		s.toBack(&s.order, e)
	}
	for e := range s.all() {
		if s.flights[e] == nil {
			return e
		}
	}
	return nil
}

// evict forgets e but not what it knew: its floor, and that the value it held is the
// oldest that may come back, move to its bucket.
func (s *State) evict(e *entry) {
	s.stats.Evicted++
	key := s.key(e)
	b := &s.byKey[bucketOf(key)]
	*b = max(*b, e.floor, e.at)
	if e.held() != nothing {
		s.emit(Remove{Key: key})
	}
	s.forget(e)
}

func (s *State) forget(e *entry) {
	s.asked.drop(e) // its place may become another key's
	s.remove(e)
}

// install stores a value (or, with v nil, a negative entry) that was current as of at.
func (s *State) install(e *entry, v *pb.Variable, sessionExists bool, at uint64, now int64) {
	if !s.mayHold(e, at) {
		e.floor = max(e.floor, at) // it was shown
		return
	}
	e.at, e.since = at, stamp(now)
	e.setUnasked(false)
	e.hold(negative)
	if v != nil {
		e.hold(value)
	}
	s.remember(e, v.GetVersion().GetDot())
	to := &s.order
	if v == nil && !sessionExists {
		to = &s.brief
	}
	s.toBack(to, e)
	s.stored = true
	s.emit(Install{Key: s.key(e), Variable: v, SessionExists: sessionExists,
		AsOf: outrigger.Dot{Region: s.region, Incarnation: s.incarnation, Position: at}})
}

func (s *State) invalidate(e *entry) {
	if e.held() == nothing {
		return
	}
	e.hold(nothing)
	s.stats.Invalidated++
	s.emit(Invalidate{Key: s.key(e)})
}

func dotOf(v *pb.Version) outrigger.Dot {
	d := v.GetDot()
	return outrigger.Dot{Region: d.GetRegion(), Incarnation: d.GetIncarnation(), Position: d.GetPosition()}
}

func keyOf(k *pb.Key) outrigger.Key {
	t := k.GetTenant()
	if t == "" {
		t = outrigger.DefaultTenant
	}
	return outrigger.Key{Tenant: t, Session: k.GetSession(), Name: k.GetName()}
}
