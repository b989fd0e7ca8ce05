package coherence

import "slices"

// current reports whether e may be shown at now. The feed lease proves it, and so does an
// answer of the origin by itself, for as long as the lease would have from the moment it
// was asked for: what was asked at t was true at t or later, and changes that were heard
// of since are applied to the entry. So a node that was held up past its lease answers
// the rest of a stampede with the one answer it has.
func (s *State) current(e *entry, now int64) bool {
	if e.held() == nothing {
		return false
	}
	if s.Fresh(now) {
		return true
	}
	asked := s.asked.of(e)
	return asked > 0 && asked <= now && now-asked < s.opt.Lease
}

// provedBy is when the answer was asked for that proves e current, 0 = the feed does.
func (s *State) provedBy(e *entry, now int64) int64 {
	if s.Fresh(now) {
		return 0
	}
	return s.asked.of(e)
}

// mayRenew reports whether the feed can be expected to prove the table current again any
// moment: it is open and lacks nothing, so a heartbeat's answer is on its way or late.
func (s *State) mayRenew() bool {
	return s.stream != 0 && s.streamOf != 0 && s.streamOf == s.incarnation && len(s.spans) == 0
}

// park makes readers of a held value wait for the feed instead of the origin: a lapse of
// the lease is no reason to read again what the next heartbeat's answer proves current.
// They wait for one lease at most, and no longer than the feed stays open.
func (s *State) park(e *entry, readers []reader, now int64) {
	s.flights[e] = &flight{issued: now, late: readers, until: now + s.opt.Lease}
	s.parked = append(s.parked, e)
}

// unpark serves parked readers as soon as their entry is proved current, and asks the
// origin for them when that cannot be waited for.
func (s *State) unpark(now int64) {
	s.parked = slices.DeleteFunc(s.parked, func(e *entry) bool {
		f := s.flights[e]
		if f == nil || f.until == 0 {
			return true // a write of this node sent it to the origin
		}
		if !s.current(e, now) && e.held() != nothing && now < f.until && s.mayRenew() {
			return false
		}
		if s.serve(e, now) {
			return true
		}
		s.launch(e, f.late, now)
		return true
	})
}

// serve answers those of e's late readers whom the entry satisfies now. It ends the
// flight, and returns true, when nobody is left.
func (s *State) serve(e *entry, now int64) bool {
	f := s.flights[e]
	if s.current(e, now) {
		asOf := max(e.at, s.applied)
		var served []reader
		if served, f.late = split(f.late, asOf); len(served) > 0 {
			s.wait -= len(served)
			s.stats.Hits += uint64(len(served))
			s.emit(Hit{Key: s.key(e), Waiters: names(served), AsOf: asOf, Issued: s.provedBy(e, now)})
		}
	}
	if len(f.late) > 0 {
		return false
	}
	delete(s.flights, e)
	return true
}

// answers are when the latest answers were asked for that entries are at least as new as,
// for as long as that matters: one lease. What was put in two generations ago has expired.
type answers struct {
	young, old map[*entry]int64
	since      int64 // when young began
}

// maxAnswers bounds one generation; an answer beyond it proves nothing by itself.
const maxAnswers = 65536

func (a *answers) put(e *entry, asked, now, lease int64) {
	if a.young == nil || now-a.since >= lease {
		a.young, a.old, a.since = map[*entry]int64{}, a.young, now
	}
	if asked = max(asked, a.of(e)); len(a.young) < maxAnswers {
		a.young[e] = asked
	}
}

// of returns 0 when nothing is known.
func (a *answers) of(e *entry) int64 { return max(a.young[e], a.old[e]) }

func (a *answers) drop(e *entry) {
	delete(a.young, e)
	delete(a.old, e)
}

// expire lets go of what was put in long ago.
func (a *answers) expire(now, lease int64) {
	if now-a.since >= 2*lease {
		*a = answers{}
	}
}
