package coherence

import (
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
		s.distrust(dot)
		s.writeUnknown(in.Key, now)
	default:
		s.note(dot.Position)
		e := s.track(in.Key, now)
		if dot.Position < e.floor || e.held() != nothing && e.at >= dot.Position {
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
	if s.foreign[in.Key][dot.Region] >= dot.Position {
		return
	}
	if s.foreign[in.Key] == nil && len(s.foreign) >= maxForeign {
		b := bucketOf(in.Key)
		s.barrier[b] = version.Merge(s.barrier[b], vector{dot.Region: dot.Position})
	} else {
		s.foreign[in.Key] = version.Merge(s.foreign[in.Key], vector{dot.Region: dot.Position})
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
	e.setUnasked(true)
	s.asked.drop(e)
	s.invalidate(e)
	return true
}

// missing returns what a version of the key must have seen besides the floor: the
// acknowledged writes of other regions that this region's log has not shown yet.
// exact is false when they may be another key's, of the same bucket.
func (s *State) missing(key outrigger.Key) (want vector, exact bool) {
	if w := s.foreign[key]; len(w) > 0 {
		return w, true
	}
	if len(s.barrier) == 0 {
		return nil, false
	}
	return s.barrier[bucketOf(key)], false
}

func (s *State) coversForeign(key outrigger.Key, v *pb.Version) bool {
	want, _ := s.missing(key)
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
	key := keyOf(c.GetKey())
	want := s.foreign[key]
	if want == nil {
		return
	}
	have := contextOf(c.GetVersion())
	maps.DeleteFunc(want, func(region string, p uint64) bool { return have[region] >= p })
	if len(want) == 0 {
		delete(s.foreign, key)
	}
}

// raiseBucket raises the floor of every key of a bucket that holds nothing.
func (s *State) raiseBucket(b, p uint64) {
	s.byKey[b] = max(s.byKey[b], p)
	for e := range s.all() {
		if e.held() == nothing && bucketOf(s.key(e)) == b {
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
		s.distrust(dot)
		return
	}
	s.note(dot.Position)
	e := s.find(key)
	if e == nil {
		b := &s.byKey[bucketOf(key)]
		*b = max(*b, dot.Position)
		return
	}
	if dot.Position < e.floor || e.held() != nothing && e.at >= dot.Position || !s.coversForeign(key, v.GetVersion()) {
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
	e.floor = max(e.floor, e.at, s.seen)
	e.setUnasked(true)
	s.asked.drop(e)
	s.invalidate(e)
	s.void(e, now)
}

// void repeats e's fetch if there is one.
func (s *State) void(e *entry, now int64) {
	if s.flights[e] != nil {
		s.fly(e, 0, now)
	}
}

// sessionChanged raises the floor of every key of a session to the position of the
// change, or does what writeUnknown does to each if that is not known here.
func (s *State) sessionChanged(in SessionChanged, now int64) {
	if d := dotOf(in.Version); !d.IsZero() && d.Region == s.region && d.Incarnation == s.incarnation {
		s.note(d.Position)
		s.raiseSession(in.Tenant, in.Session, d.Position)
		return
	}
	s.voided, s.voidedAt = s.next(), now
	b := &s.bySession[sessionBucket(in.Tenant, in.Session)]
	*b = max(*b, s.seen)
	for e := range s.of(in.Tenant, in.Session) {
		s.doubt(e, now)
	}
}

// expire forgets entries from the front of a list by age, not too many at a time.
func (s *State) expire(l *list, ttl, now int64) {
	for range maxExpired {
		e := s.front(l)
		if e == nil || e.age(now) < ttl {
			return
		}
		if s.flights[e] != nil {
			e.since = stamp(now) // its answer will renew it
			s.toBack(l, e)
			continue
		}
		s.evict(e)
	}
}

// sample compares one stored entry with the origin. Nothing should ever differ; if
// something does, Stats.Repaired says so, and the entry is right again.
func (s *State) sample(now int64) {
	if s.opt.RepairEvery <= 0 || now < s.repairAt || !s.Fresh(now) || len(s.flights) >= s.opt.MaxFlights {
		return
	}
	s.repairAt = now + s.opt.RepairEvery
	e := s.front(&s.order)
	if e == nil {
		return
	}
	switch {
	case s.flights[e] != nil:
		s.toBack(&s.order, e)
	case e.held() == nothing:
		s.evict(e) // nothing to compare, and nobody asked for it in a long time
	default:
		s.launch(e, nil, now)
	}
}
