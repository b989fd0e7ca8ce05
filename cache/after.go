package cache

import (
	"context"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// afterWait is how long a read waits for the table to have applied Request.After before
// the origin is asked: the feed is rarely more than a few milliseconds behind a write.
const afterWait = 50 * time.Millisecond

// reason is why the tiers of this machine did not answer; 0 = they did.
type reason uint8

const (
	noTable      reason = iota + 1 // there is no table
	lapsed                         // its lease has
	notYetProved                   // it may be older than an answer that came from elsewhere
	tooOld                         // for the bound asked for
	mustAsk                        // strong
	absent                         // the key is not in it
	outdated                       // the key is known to have changed
	behind                         // it has not applied a position asked for
	otherLog                       // a position asked for is of a log it does not follow
)

// miss is a reason with its measure.
type miss struct {
	why reason
	by  time.Duration // lapsed: ago; tooOld: the age
}

func (s *Store) whyNot(v *view, now int64, age time.Duration) miss {
	switch {
	case v == nil:
		return miss{why: noTable}
	case v.reader.Lease() <= 0:
		return miss{why: lapsed}
	case now >= v.reader.Lease():
		return miss{why: lapsed, by: time.Duration(now - v.reader.Lease())}
	case age >= 0 && now < v.reader.Lease() && v.reader.Lease()-v.lease <= s.fence.Load():
		return miss{why: notYetProved}
	}
	return miss{why: tooOld, by: age}
}

// headOf is what a table has applied.
func headOf(v *view) dotIn {
	position, incarnation := v.reader.Head()
	return dotIn{incarnation: incarnation, position: position}
}

// missing returns what keeps e, read from a table that had applied head, from showing
// everything up to the positions; 0 = nothing.
func (e *entry) missing(head dotIn, after []outrigger.Dot) (m reason) {
	for _, d := range after {
		switch {
		case e.shows(d):
		case d.Incarnation != head.incarnation:
			return otherLog
		case head.position < d.Position:
			m = behind
		}
	}
	return m
}

// shows reports whether e by itself is known to be at least as new as d.
func (e *entry) shows(d outrigger.Dot) bool {
	own := e.variable.GetVersion().GetDot()
	return e.asOf.incarnation == d.Incarnation && e.asOf.position >= d.Position ||
		own.GetIncarnation() == d.Incarnation && own.GetPosition() >= d.Position
}

func (e *entry) showsAll(after []outrigger.Dot) bool {
	for _, d := range after {
		if !e.shows(d) {
			return false
		}
	}
	return true
}

// seen is the position an answer from e shows the world at.
func (s *Store) seen(e *entry) outrigger.Dot {
	if e.variable != nil {
		return wire.Dot(e.variable.GetVersion().GetDot())
	}
	return s.dotOf(e.asOf)
}

// dotOf completes a position of the present region's log; zero when either is not known.
func (s *Store) dotOf(p dotIn) outrigger.Dot {
	region := s.o.Node.Region
	if r := s.region.Load(); r != nil {
		region = *r
	}
	if region == "" || p.position == 0 {
		return outrigger.Dot{}
	}
	return outrigger.Dot{Region: region, Incarnation: p.incarnation, Position: p.position}
}

// learnRegion takes the region's name from an answer or an entry of the table that has it.
func (s *Store) learnRegion(name string) {
	if known := s.region.Load(); name != "" && (known == nil || *known != name) {
		s.region.Store(&name)
	}
}

// allows reports whether a copy current age ago satisfies a declared consistency without
// asking anybody.
func (d declaration) allows(age time.Duration) bool {
	switch d.consistency.Level {
	case outrigger.Strong:
		return false
	case outrigger.Bounded:
		return age <= d.consistency.MaxAge
	}
	return true
}

// await is local again and again until the table has applied what is missing, for
// afterWait at most. The table is memory and cannot wake anybody, so it is looked at,
// often at first.
func (s *Store) await(ctx context.Context, id string, encoding int, maxAge time.Duration, after []outrigger.Dot) (Answer, miss, bool) {
	deadline := s.clock() + int64(afterWait)
	t := time.NewTimer(afterWait)
	defer t.Stop()
	for pause := 250 * time.Microsecond; ; pause = min(2*pause, 4*time.Millisecond) {
		left := time.Duration(deadline - s.clock())
		if left <= 0 {
			return Answer{}, miss{why: behind}, false
		}
		t.Reset(min(pause, left))
		select {
		case <-t.C:
		case <-ctx.Done():
			return Answer{}, miss{why: behind}, false
		}
		if a, m, ok := s.local(id, encoding, maxAge, after); ok || m.why != behind {
			return a, m, ok
		}
	}
}

// position is the part of after an origin can be asked for: its own log's.
func position(after []outrigger.Dot, incarnation uint64) uint64 {
	for _, d := range after {
		if d.Incarnation == incarnation {
			return d.Position
		}
	}
	return 0
}
