package coherence

import (
	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// retryStep spaces the fetches that follow a refused fill.
const retryStep = 5_000_000

func (s *State) read(in Read, now int64) {
	s.want(in.Key, now)
	e := s.find(in.Key)
	if e != nil && s.current(e, now) {
		if asOf := max(e.at, s.applied); asOf >= in.Min {
			s.stats.Hits++
			s.emit(Hit{Key: in.Key, Waiters: []Waiter{in.Waiter}, AsOf: asOf, Issued: s.provedBy(e, now)})
			return
		}
	}
	if e != nil && s.answerEarly(e, in, now) {
		return
	}
	if s.wait >= s.opt.MaxWaiters {
		s.refuse(in, "%d reads wait for the origin already, the limit is MaxWaiters; retry later", s.wait)
		return
	}
	if e == nil || s.flights[e] == nil {
		if len(s.flights) >= s.opt.MaxFlights {
			s.refuse(in, "%d keys are being fetched already, the limit is MaxFlights; retry later", len(s.flights))
			return
		}
		e = s.track(in.Key, now)
		s.wait++
		r := []reader{{in.Waiter, in.Min}}
		if e.held() != nothing && !s.Fresh(now) && s.mayRenew() {
			s.park(e, r, now)
			return
		}
		s.launch(e, r, now)
		return
	}
	s.stats.Joined++
	s.wait++
	f, r := s.flights[e], reader{in.Waiter, in.Min}
	if f.until > 0 || now-f.issued > s.opt.Lease && !(s.Fresh(now) && s.heardOf(e)) {
		f.late = append(f.late, r)
		return
	}
	f.waiters = append(f.waiters, r)
}

func (s *State) refuse(in Read, format string, args ...any) {
	s.emit(Failed{Key: in.Key, Waiters: []Waiter{in.Waiter}, Err: outrigger.Errorf(outrigger.Exhausted, format, args...)})
}

// launch starts a fetch for e's waiters.
func (s *State) launch(e *entry, waiters []reader, now int64) {
	s.flights[e] = &flight{waiters: waiters}
	s.fly(e, 0, now)
}

// fly sends the fetch of e's flight, again or for the first time.
func (s *State) fly(e *entry, after, now int64) {
	f := s.flights[e]
	s.stats.Fetches++
	f.number, f.issued, f.until = s.next(), now, 0
	minimum := e.floor
	for _, r := range f.waiters {
		minimum = max(minimum, r.min)
	}
	s.emit(Fetch{Key: s.key(e), Flight: f.number, MinPosition: minimum, After: after})
}

// land ends e's flight. Readers that came too late for it wait for the feed to prove its
// answer current, or get the next one.
func (s *State) land(e *entry, now int64) {
	f := s.flights[e]
	s.wait -= len(f.waiters)
	f.waiters = nil
	if s.serve(e, now) {
		return
	}
	if e.held() != nothing && !s.Fresh(now) && s.mayRenew() {
		s.park(e, f.late, now)
		return
	}
	s.launch(e, f.late, now)
}

func names(rs []reader) []Waiter {
	out := make([]Waiter, len(rs))
	for i, r := range rs {
		out[i] = r.waiter
	}
	return out
}

func (s *State) filled(in Filled, now int64) {
	e := s.find(in.Key)
	if e == nil || s.flights[e] == nil || s.flights[e].number != in.Flight {
		return // voided since by a write of this node, or never ours
	}
	f := s.flights[e]
	if !s.adopt(in.Region, in.Incarnation, in.AsOf, in.Flight > s.adopted) {
		s.retry(e, now, outrigger.Errorf(outrigger.Unavailable,
			"%s was answered from log incarnation %x, but %x is followed; retry", in.Key, in.Incarnation, s.incarnation))
		return
	}
	s.note(in.AsOf)
	s.raiseToShard(e)
	if in.AsOf < e.floor || !s.coversForeign(in.Key, in.Result.GetVariable().GetVersion()) {
		s.stats.Refused++
		s.retry(e, now, tooOld(in, e.floor))
		return
	}
	kept := s.keep(e, in.Result, in.AsOf, now)
	s.asked.put(e, f.issued, now, s.opt.Lease)
	if e.held() == nothing {
		s.putAside(e, in, f.issued)
	}
	served, demanding := split(f.waiters, max(in.AsOf, e.at))
	switch {
	case len(served) == 0:
	case kept:
		s.emit(Answer{Key: s.key(e), Waiters: names(served), Result: in.Result, AsOf: in.AsOf, Incarnation: in.Incarnation, Issued: f.issued})
	default: // the table holds something newer
		s.emit(Hit{Key: s.key(e), Waiters: names(served), AsOf: e.at, Issued: f.issued})
	}
	if len(demanding) > 0 {
		f.waiters = demanding
		s.wait -= len(served)
		s.retry(e, now, tooOld(in, demanding[0].min))
		return
	}
	s.land(e, now)
}

func tooOld(in Filled, floor uint64) error {
	return outrigger.Errorf(outrigger.Unavailable, "the origin answered %s as of position %d, position %d is needed; retry", in.Key, in.AsOf, floor)
}

// split separates the readers an answer as of position satisfies from those who asked
// for a later one.
func split(readers []reader, asOf uint64) (served, demanding []reader) {
	for _, r := range readers {
		if r.min <= asOf {
			served = append(served, r)
		} else {
			demanding = append(demanding, r)
		}
	}
	return served, demanding
}

// keep stores an answer unless the entry holds a newer one. An answer that differs from
// an entry that should have been current is a repair.
func (s *State) keep(e *entry, r *pb.ReadResult, asOf uint64, now int64) bool {
	if e.held() != nothing && e.at > asOf {
		return false
	}
	v := r.GetVariable()
	s.compare(e, v, asOf)
	s.install(e, v, r.GetSessionExists(), asOf, now)
	return true
}

func (s *State) retry(e *entry, now int64, why error) {
	f := s.flights[e]
	f.attempts++
	if f.attempts < s.opt.MaxAttempts {
		s.fly(e, now+retryStep*int64(f.attempts), now)
		return
	}
	s.fail(e, why, now)
}

func (s *State) fail(e *entry, why error, now int64) {
	if w := names(s.flights[e].waiters); len(w) > 0 {
		s.emit(Failed{Key: s.key(e), Waiters: w, Err: why})
	}
	s.land(e, now)
}

// fillFailed fails everybody who waits, the late ones too: asking an origin that just
// failed again for each group would make an outage slower to report.
func (s *State) fillFailed(in FillFailed) {
	e := s.find(in.Key)
	if e == nil || s.flights[e] == nil || s.flights[e].number != in.Flight {
		return
	}
	f := s.flights[e]
	f.waiters, f.late = append(f.waiters, f.late...), nil
	s.fail(e, in.Err, 0)
}

// offered takes an answer read outside of a fetch. It always moves the floor up to what
// was seen, so nobody on this node sees anything older afterwards; it is stored unless
// a write of this node may be newer. The owner asks State.Current before it
// answers anybody.
func (s *State) offered(in Offered, now int64) {
	if !s.adopt(in.Region, in.Incarnation, in.AsOf, in.Began > s.adopted) {
		return
	}
	s.note(in.AsOf)
	e := s.track(in.Key, now)
	if e.held() != nothing && e.at >= in.AsOf || in.AsOf < e.floor {
		return
	}
	e.floor = in.AsOf
	if s.missed(in.Began, e) {
		return
	}
	if !s.coversForeign(in.Key, in.Result.GetVariable().GetVersion()) {
		s.invalidate(e)
		return
	}
	s.keep(e, in.Result, in.AsOf, now)
}

func (s *State) evicted(key outrigger.Key) {
	e := s.find(key)
	if e == nil || e.held() == nothing {
		return
	}
	e.floor = max(e.floor, e.at)
	e.hold(nothing)
}

// tick lets time act: late gaps, last-resort ages, sampled comparisons.
func (s *State) tick(now int64) {
	s.renew(now)
	s.closeGap(now)
	s.tickShards(now)
	s.expire(&s.order, s.opt.TTL, now)
	s.expire(&s.brief, s.opt.NegativeTTL, now)
	s.asked.expire(now, s.opt.Lease)
	s.sample(now)
}
