package coherence

import (
	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Stale is an output: an entry differed from the origin although every change up to the
// origin's was applied. The rules say that this cannot happen; it means that a change was
// lost on the way or that the origin showed two histories. The entry has been replaced
// (read-repair) by the outputs of the same step.
type Stale struct {
	Key     outrigger.Key
	Shown   outrigger.Dot // of the value that was held; zero = a negative entry
	Current *pb.Variable  // nil: the origin has none
	AsOf    uint64
}

func (Stale) output() {}

// proves reports whether an answer as of a position can be compared with an entry: the
// change behind it, or everything up to it, has been applied here.
func (s *State) proves(v *pb.Variable, asOf uint64) bool {
	if asOf <= s.applied {
		return true
	}
	d := dotOf(v.GetVersion())
	return d.Position > 0 && d.Region == s.region && d.Incarnation == s.incarnation && d.Position <= s.applied
}

// compare counts what the comparison of e with the origin's answer says, before e is
// replaced by it.
func (s *State) compare(e *entry, v *pb.Variable, asOf uint64) {
	if e.held() == nothing || e.log == noLog || !s.proves(v, asOf) {
		return
	}
	s.stats.Checked++
	if (v != nil) == (e.held() == value) && (v == nil || dotOf(v.GetVersion()) == s.shown(e)) {
		return
	}
	s.stats.Repaired++
	s.emit(Stale{Key: s.key(e), Shown: s.shown(e), Current: v, AsOf: asOf})
}

// Feed is how far a State has followed the log.
type Feed struct {
	Region      string
	Incarnation uint64 // 0 = none yet
	Applied     uint64
	Head        uint64 // highest position heard of
	Lease       int64  // the table is fresh before this time; 0 = it is not
}

// Feed returns it.
func (s *State) Feed() Feed {
	return Feed{Region: s.region, Incarnation: s.incarnation, Applied: s.applied, Head: max(s.seen, s.applied), Lease: s.lease}
}

// Known is what a State knows of one key.
type Known struct {
	Held     bool   // the table holds a value or a negative entry
	AsOf     uint64 // position it is at least as new as; 0 = nothing held
	Floor    uint64 // nothing older is accepted
	Fetching bool
}

// Known returns it without changing anything.
func (s *State) Known(key outrigger.Key) Known {
	e := s.find(key)
	if e == nil {
		return Known{Floor: s.base(key)}
	}
	k := Known{Held: e.held() != nothing, Floor: e.floor, Fetching: s.flights[e] != nil}
	if k.Held {
		k.AsOf = max(e.at, s.applied)
	}
	return k
}

// Drop forgets what is held for a session, for a tenant (session "") or altogether (both
// ""), and raises the floors to the highest position heard of, so that nothing read
// before can be stored again: fetches under way are repeated. It returns what to do, as
// Step does, and how many entries were held.
func (s *State) Drop(tenant, session string, now int64) (out []Output, dropped int) {
	s.out = s.out[:0]
	s.selection.early = nil
	switch {
	case tenant == "" && session == "":
		s.global = max(s.global, s.seen)
	case session != "":
		b := &s.bySession[sessionBucket(tenant, session)]
		*b = max(*b, s.seen)
	}
	// Entries in the order they were stored, so that equal histories have equal outputs.
	for e := range s.all() {
		of := s.sessions.at(e.session)
		if tenant != "" && of.tenant != tenant || session != "" && of.id != session {
			continue
		}
		e.floor = max(e.floor, e.at, s.seen)
		if e.held() != nothing {
			dropped++
			e.hold(nothing)
			s.emit(Remove{Key: s.key(e)})
		}
		s.void(e, now)
	}
	s.report()
	return s.out, dropped
}
