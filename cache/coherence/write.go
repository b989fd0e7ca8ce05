package coherence

import (
	"container/list"
	"maps"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/version"
)

// wrote makes an acknowledged write visible: the floor becomes its position and the
// value is stored, before the owner answers the writer.
func (s *State) wrote(in Wrote, now int64) {
	dot := dotOf(in.Version)
	switch {
	case dot.IsZero() || s.region == "":
		s.writeUnknown(in.Key, now) // it cannot be placed
	case dot.Region != s.region:
		s.wroteElsewhere(in, dot, now)
	case !s.adopt(dot.Region, dot.Incarnation, dot.Position, in.Began > s.adopted):
		s.distrust()
		s.writeUnknown(in.Key, now)
	default:
		s.note(dot.Position)
		e := s.track(in.Key, now)
		if dot.Position < e.floor || e.held != nothing && e.at >= dot.Position {
			return // something newer is known already
		}
		e.floor = dot.Position
		if !s.missed(in.Began, e) {
			s.install(e, in.Variable, true, dot.Position, now)
		}
	}
}

// wroteElsewhere places a write the owner region acknowledged. This region's log will
// show it later at a position nobody knows yet, so until then only answers whose
// version has seen it are accepted.
func (s *State) wroteElsewhere(in Wrote, dot outrigger.Dot, now int64) {
	e := s.track(in.Key, now)
	if s.foreign[e.id][dot.Region] >= dot.Position {
		return
	}
	if s.foreign[e.id] == nil && len(s.foreign) >= maxForeign {
		b := hash(e.id) % buckets
		s.barrier[b] = version.Merge(s.barrier[b], vector{dot.Region: dot.Position})
	} else {
		s.foreign[e.id] = version.Merge(s.foreign[e.id], vector{dot.Region: dot.Position})
	}
	// A fetch under way began before the acknowledgement: its readers want this write.
	s.void(e, now)
	if !s.missed(in.Began, e) {
		s.install(e, in.Variable, true, max(e.at, e.floor), now)
	}
}

// missed reports whether something begun at an ordinal may have missed a write of this
// node whose position is not known; the key then holds nothing until it is asked for.
func (s *State) missed(began uint64, e *entry) bool {
	if began >= s.voided {
		return false
	}
	e.unasked, e.asked = true, 0
	s.invalidate(e)
	return true
}

// missing returns what a version of the key must have seen besides the floor: the
// acknowledged writes of other regions that this region's log has not shown yet.
// exact is false when they may be another key's, of the same bucket.
func (s *State) missing(id string) (want vector, exact bool) {
	if w := s.foreign[id]; len(w) > 0 {
		return w, true
	}
	return s.barrier[hash(id)%buckets], false
}

func (s *State) coversForeign(id string, v *pb.Version) bool {
	want, _ := s.missing(id)
	return len(want) == 0 || version.Covers(contextOf(v), want)
}

// contextOf includes the version's own dot, which its context should hold anyway.
func contextOf(v *pb.Version) vector {
	out := vector{}
	for _, e := range v.GetContext() {
		out[e.GetRegion()] = max(out[e.GetRegion()], e.GetPosition())
	}
	if d := v.GetDot(); d.GetPosition() > 0 {
		out[d.GetRegion()] = max(out[d.GetRegion()], d.GetPosition())
	}
	return out
}

// settle strikes the writes of other regions that a change shows to have arrived here.
func (s *State) settle(c *pb.Change) {
	d := c.GetVersion().GetDot()
	if d.GetPosition() == 0 || d.GetRegion() == s.region {
		return
	}
	for b, want := range s.barrier {
		if p := want[d.GetRegion()]; p > 0 && d.GetPosition() >= p {
			// Logs are replicated in order, so everything of that region up to p is here.
			delete(want, d.GetRegion())
			s.raiseBucket(b, c.GetPosition())
		}
		if len(want) == 0 {
			delete(s.barrier, b)
		}
	}
	id := keyOf(c.GetKey()).String()
	want := s.foreign[id]
	if want == nil {
		return
	}
	have := contextOf(c.GetVersion())
	maps.DeleteFunc(want, func(region string, p uint64) bool { return have[region] >= p })
	if len(want) == 0 {
		delete(s.foreign, id)
	}
}

// raiseBucket raises the floor of every key of a bucket that holds nothing.
func (s *State) raiseBucket(b, p uint64) {
	s.byKey[b] = max(s.byKey[b], p)
	for _, e := range s.entries {
		if e.held == nothing && hash(e.id)%buckets == b {
			e.floor = max(e.floor, p)
		}
	}
}

// observed makes a key at least as new as a value that somebody was shown.
func (s *State) observed(in Observed, now int64) {
	v := in.Variable
	key, dot := keyOf(v.GetKey()), dotOf(v.GetVersion())
	if dot.IsZero() || dot.Region != s.region {
		return
	}
	if !s.adopt(dot.Region, dot.Incarnation, dot.Position, in.Began > s.adopted) {
		// It was shown already, so it cannot be asked for again as a fetch is.
		s.distrust()
		return
	}
	s.note(dot.Position)
	e := s.entries[key.String()]
	if e == nil {
		b := &s.byKey[hash(key.String())%buckets]
		*b = max(*b, dot.Position)
		return
	}
	if dot.Position < e.floor || e.held != nothing && e.at >= dot.Position || !s.coversForeign(e.id, v.GetVersion()) {
		return
	}
	e.floor = dot.Position
	if s.missed(in.Began, e) {
		return
	}
	if in.Deleted {
		v = nil
	}
	s.install(e, v, true, dot.Position, now)
}

// writeUnknown raises the floor and nothing else: what was written, if anything, is
// not known. Fetches under way began before the outcome was reported and are repeated.
func (s *State) writeUnknown(key outrigger.Key, now int64) {
	s.voided, s.voidedAt = s.next(), now
	s.doubt(s.track(key, now), now)
}

func (s *State) doubt(e *entry, now int64) {
	e.floor, e.unasked, e.asked = max(e.floor, e.at, s.seen), true, 0
	s.invalidate(e)
	s.void(e, now)
}

// void repeats e's fetch if there is one.
func (s *State) void(e *entry, now int64) {
	if e.flight != nil {
		s.fly(e, 0, now)
	}
}

// sessionChanged raises the floor of every key of a session to the position of the
// change, or does what writeUnknown does to each if that is not known here.
func (s *State) sessionChanged(in SessionChanged, now int64) {
	sid := in.Tenant + "/" + in.Session
	b := &s.bySession[hash(sid)%buckets]
	if d := dotOf(in.Version); !d.IsZero() && d.Region == s.region && d.Incarnation == s.incarnation {
		s.note(d.Position)
		*b = max(*b, d.Position)
		s.raiseSession(sid, d.Position)
		return
	}
	s.voided, s.voidedAt = s.next(), now
	*b = max(*b, s.seen)
	if l := s.sessions[sid]; l != nil {
		for el := l.Front(); el != nil; el = el.Next() {
			s.doubt(el.Value.(*entry), now)
		}
	}
}

// expire forgets entries from the front of a list by age.
func (s *State) expire(front func() *list.Element, ttl, now int64) {
	for el := front(); el != nil; el = front() {
		e := el.Value.(*entry)
		if now-e.since < ttl {
			return
		}
		if e.flight != nil {
			e.since = now // its answer will renew it
			e.list.MoveToBack(e.inOrder)
			continue
		}
		s.evict(e)
	}
}

// sample compares one stored entry with the origin. Nothing should ever differ; if
// something does, Stats.Repaired says so, and the entry is right again.
func (s *State) sample(now int64) {
	if s.opt.RepairEvery <= 0 || now < s.repairAt || !s.Fresh(now) || s.flights >= s.opt.MaxFlights {
		return
	}
	s.repairAt = now + s.opt.RepairEvery
	el := s.order.Front()
	if el == nil {
		return
	}
	e := el.Value.(*entry)
	switch {
	case e.flight != nil:
		s.order.MoveToBack(el)
	case e.held == nothing:
		s.evict(e) // nothing to compare, and nobody asked for it in a long time
	default:
		s.launch(e, nil, now)
	}
}
