package cache

import (
	"hash/maphash"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
)

// Hit is a current copy in the process tier.
type Hit struct {
	Variable      *pb.Variable  // shared, read-only; nil when there is no such variable
	SessionExists bool          // meaningful when Variable is nil
	Encoded       []byte        // shared, read-only; nil when encoding was -1 or there is no variable
	Age           time.Duration // current at most this long ago
}

// Hit looks a key (outrigger.Key.String) up in the process tier alone: a map look-up,
// one atomic load that proves the copy current, and the lease check. It allocates
// nothing. ok is false when there is no copy, it is not proved current, encoding was
// not rendered yet, or the variable declares a consistency that wants more; call Get
// then. It answers what session consistency allows.
func (s *Store) Hit(key string, encoding int) (h Hit, ok bool) {
	e, n := s.tier.Count(key)
	if e == nil || e.view == nil {
		return Hit{}, false
	}
	now := s.coarse() // not before the clock: a lease it still holds by holds
	base, ok := s.proof(e, s.view.Load(), now)
	if !ok {
		return Hit{}, false
	}
	if e.declares.ok && !e.declares.allows(time.Duration(now-base)) {
		return Hit{}, false
	}
	h = Hit{Variable: e.variable, SessionExists: e.sessionExists, Age: time.Duration(now - base)}
	if encoding >= 0 && e.variable != nil {
		if encoding >= len(e.encoded) || e.encoded[encoding] == nil {
			return Hit{}, false
		}
		h.Encoded = e.encoded[encoding]
	}
	s.sample(n, key)
	return h, true
}

// sample keeps a key that was a hit for the report to the agent, which cannot see hits: a
// key that lives in process tiers would leave the node's table, and with it its proof.
func (s *Store) sample(hit uint64, key string) {
	if s.samples.Wants(hit) {
		s.samples.Add(shm.Hash(key))
	}
}

// proof returns the time at which e is proved to have been current. The lease is read
// before the stamp: the stamp then vouches for a moment at which the lease held.
func (s *Store) proof(e *entry, v *view, now int64) (base int64, ok bool) {
	if e.view != v {
		return 0, false
	}
	base, ok = s.live(v, now)
	if !ok || v.reader.Stamp(e.slot) != e.stamp {
		return 0, false
	}
	return base, true
}

// live returns the time at which the table is proved to have been current, and whether
// it may be served now.
func (s *Store) live(v *view, now int64) (base int64, ok bool) {
	if v == nil {
		return 0, false
	}
	until := v.reader.Lease()
	base = until - v.lease
	return base, now < until && base > s.fence.Load()
}

// local answers from this machine: the process tier, else the node tier. If it cannot, the
// miss says why. after is what the answer must show.
func (s *Store) local(id string, encoding int, maxAge time.Duration, after []outrigger.Dot) (Answer, miss, bool) {
	now, v := s.clock(), s.current()
	base, live := s.live(v, now)
	if age := time.Duration(now - base); !live || age > maxAge {
		return Answer{}, s.whyNot(v, now, age), false
	}
	v.proved.Store(base)
	// The head is read first: what is read afterwards is at least as new.
	head := headOf(v)
	if e, n := s.tier.Count(id); e != nil {
		if base, ok := s.proof(e, v, now); ok {
			if m := e.missing(head, after); m != 0 {
				return Answer{}, miss{why: m}, false
			}
			s.sample(n, id)
			return s.answer(id, e, encoding, outrigger.TierProcess, base), miss{}, true
		}
	}
	e, state := s.fromTable(id, v, base, head)
	switch {
	case state == shm.Invalid:
		return Answer{}, miss{why: outdated}, false
	case state != shm.Present && state != shm.Negative:
		return Answer{}, miss{why: absent}, false
	}
	if m := e.missing(head, after); m != 0 {
		return Answer{}, miss{why: m}, false
	}
	s.sample(s.nodeHits.Add(1), id)
	s.put(id, e)
	return s.answer(id, e, encoding, outrigger.TierNode, base), miss{}, true
}

// answer renders what is asked for, once per entry and encoding.
func (s *Store) answer(id string, e *entry, encoding int, from outrigger.Tier, base int64) Answer {
	now := s.clock()
	_, live := s.live(s.view.Load(), now)
	a := Answer{Found: e.variable != nil, SessionExists: e.sessionExists, Variable: e.variable,
		Tier: from, Age: time.Duration(max(0, now-base)), FeedLive: live, Seen: s.seen(e), declares: e.declares}
	if encoding < 0 || e.variable == nil || encoding >= len(s.o.Encoders) {
		return a
	}
	if e.encoded[encoding] != nil {
		a.Encoded = e.encoded[encoding]
		return a
	}
	rendered := *e
	rendered.encoded[encoding] = s.o.Encoders[encoding](e.variable)
	a.Encoded = rendered.encoded[encoding]
	s.update(id, func(present *entry) *entry {
		if present != e {
			return nil // somebody was faster, and what they put may be newer
		}
		return &rendered
	})
	return a
}

// update replaces the entry of a key by what next makes of the present one (nil = none);
// nil from next leaves it. Updates of one key exclude each other.
func (s *Store) update(id string, next func(present *entry) *entry) {
	mu := &s.stripes[maphash.String(s.seed, id)%uint64(len(s.stripes))]
	mu.Lock()
	defer mu.Unlock()
	present := s.tier.Peek(id)
	if e := next(present); e != nil {
		s.tier.Put(id, e)
	}
}

// put stores e unless the present entry was made from something later: a reader may have
// been held up between reading e and now.
func (s *Store) put(id string, e *entry) {
	s.update(id, func(present *entry) *entry {
		if present != nil && present.overtakes(e) {
			return nil
		}
		return e
	})
}

// overtakes reports whether p is certainly from later than e: by the stamps of one table,
// which rise, by the positions of one log, or because it casts doubt on e.
func (p *entry) overtakes(e *entry) bool {
	if p.view != nil && p.view == e.view {
		return p.stamp > e.stamp
	}
	x, y := p.position(), e.position()
	return p.doubt && p.known > e.known || x.incarnation == y.incarnation && x.position > y.position
}

// position is one that e is known to be as new as. Of a deletion, or of the absence of
// anything, only the answer tells it.
func (e *entry) position() dotIn {
	own := dotIn{e.variable.GetVersion().GetDot().GetIncarnation(), e.variable.GetVersion().GetDot().GetPosition()}
	if e.asOf.incarnation == own.incarnation && e.asOf.position > own.position || own.position == 0 {
		return e.asOf
	}
	return own
}

// laterOf returns what a negative entry shows: everything up to the table's head, and up to
// where it comes from, which may be further along, or of a log that head, read before,
// does not know yet: entries of a log that was left are gone before its successor's head.
func laterOf(head, own dotIn) dotIn {
	if own.incarnation == head.incarnation && own.position <= head.position || own.incarnation == 0 {
		return head
	}
	return own
}

// scratch holds buffers for values on their way out of the table.
var scratch = sync.Pool{New: func() any { return new([]byte) }}

// fromTable reads the node tier; known is when the table was current, head what it had
// applied before this call.
func (s *Store) fromTable(id string, v *view, known int64, head dotIn) (*entry, shm.State) {
	buf := scratch.Get().(*[]byte)
	defer scratch.Put(buf)
	found, b := v.reader.Get(id, (*buf)[:0])
	*buf = b
	e := &entry{view: v, slot: found.Slot, stamp: found.Stamp, known: known, heard: known}
	if found.State != shm.Invalid {
		e.asOf = head
	}
	switch found.State {
	case shm.Absent:
		return nil, shm.Absent
	case shm.Negative:
		a, ok := node.ParseAbsence(b)
		if !ok {
			return nil, shm.Absent // the agent will say
		}
		e.sessionExists = a.SessionExists
		s.learnRegion(a.AsOf.Region)
		e.asOf = laterOf(head, dotIn{a.AsOf.Incarnation, a.AsOf.Position})
	case shm.Present, shm.Invalid:
		var err error
		if e.variable, err = node.ParseVariable(id, b); err != nil && found.State == shm.Present {
			return nil, shm.Absent // not a variable; the agent will say
		} else if err != nil || len(b) == 0 {
			return nil, shm.Invalid // what changed was a negative entry
		}
		e.sessionExists = true
		e.declares = declarationOf(e.variable)
	}
	return e, found.State
}
