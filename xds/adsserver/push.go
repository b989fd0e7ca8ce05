package adsserver

import (
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
)

// When a stream is sent something: what waits is answered, the newest push follows the one that
// was answered, and a push that is fully answered is recorded. Which names of a type these are is
// build.go's, what came back is answer.go's.

// arm ends the handling of a request: answer at once if something is due, else wait
// for the next push. Called with mu held.
func (s *session) arm(t *typeSub, fire func(), due bool) (cancel func(), err error) {
	t.fire, t.armed = fire, true
	waited := s.waits
	if s.target == nil {
		// nil before the first Publish: wait.
		if want := s.group.wantedBy(s.node); want != nil && !s.withholds(want) {
			s.target = want
			s.recordSent()
		}
	}
	switch {
	case t.fired:
		t.armed = false // the waiting handle will be built from the new subscription
	case s.target == nil || s.withholds(s.target):
	case waited:
		s.launchAll(s.target) // this request showed that there is no reason to wait
		if due && t.armed {
			s.launch(t)
		}
	case due || s.lacks(t, s.target) && !s.holdsBack(t):
		if len(t.pending) >= maxPending {
			return nil, outrigger.Errorf(outrigger.Exhausted, "%d responses of type %s are unanswered; acknowledge them", len(t.pending), t.typeURL)
		}
		s.launch(t)
	}
	s.advance()
	return func() {
		s.mu.Lock()
		t.armed = false
		s.mu.Unlock()
	}, nil
}

// launch puts a handle for t into the stream's channel. Called with mu held.
func (s *session) launch(t *typeSub) {
	t.armed, t.fired = false, true
	s.open++
	t.fire()
}

// advance starts the newest push if the previous one is answered, or has been waited for long
// enough. Called with mu held.
func (s *session) advance() {
	if s.closed || s.open > s.late {
		s.hurry()
		return
	}
	for _, t := range s.types {
		if !t.armed && !t.overdue() {
			return // its request is being handled and will call advance; order is kept
		}
	}
	if !s.warmed() {
		return
	}
	latest := s.group.wantedBy(s.node)
	if latest != nil && latest != s.target && !s.withholds(latest) {
		s.pushed = s.target != nil // not the first sync, whose delay says nothing
		s.target = latest
		s.recordSent()
		s.rewarm(latest)
		s.warm(latest)
		s.launchAll(latest)
		s.closePush()
	}
	if s.part(); s.open == 0 && !s.waits && !s.warming.holds && s.parting.names == nil {
		s.settle()
	}
}

// launchAll answers what waits for g, in push order. Called with mu held.
func (s *session) launchAll(g *generation) {
	for _, typeURL := range xds.Pushed() {
		if t := s.types[typeURL]; t != nil && t.armed && s.lacks(t, g) && !s.holdsBack(t) {
			s.launch(t)
		}
	}
}

// answerPatience is how long a newer push waits for the answers to an older one. Waiting lets a
// rejection of clusters stop what would refer to them; it must not let one response that a
// client never answers keep all types from it for ever. The order of the stream still is the
// order in which the client sees things.
const answerPatience = 2 * time.Second

// hurry makes sure that a newer push does not wait for ever. Called with mu held.
func (s *session) hurry() {
	if s.closed || s.timer != nil || s.target == nil {
		return
	}
	if latest := s.group.wantedBy(s.node); latest == nil || latest == s.target {
		return // nothing waits; the next push asks again
	}
	s.timer = time.AfterFunc(answerPatience, s.writeOff)
}

// overdue: the client has not answered what was sent last, and is not waited for; it asks
// again when it does.
func (t *typeSub) overdue() bool {
	return len(t.pending) > 0 && t.pending[len(t.pending)-1].late
}

// writeOff stops waiting for answers that are overdue, and goes on.
func (s *session) writeOff() {
	s.mu.Lock()
	s.timer = nil
	if now := time.Now(); !s.closed {
		for _, t := range s.types {
			for i := range t.pending {
				if r := &t.pending[i]; !r.late && now.Sub(r.at) >= answerPatience {
					r.late = true
					s.late++
				}
			}
		}
		s.advance()
	}
	s.mu.Unlock()
	s.dropRetained()
}

// closePush makes MeshPolicy the last response of every push on streams that follow
// it, even of one that left it unchanged: it is the mark that the set is complete.
func (s *session) closePush() {
	t := s.types[xds.TypeMeshPolicy]
	if s.open > s.late && s.delta && t != nil && t.armed && t.answered {
		t.demand(xds.MeshName)
		s.launch(t)
	}
}

// demand forces an answer for a name.
func (t *typeSub) demand(name string) {
	if t.force == nil {
		t.force = make(map[string]struct{})
	}
	t.force[name] = struct{}{}
}

// settle records the position of a push that is fully answered, if nothing in it
// stands rejected. Called with mu held.
func (s *session) settle() {
	if s.target == nil {
		return
	}
	if s.node.Kind == "sidecar" || s.node.Kind == xds.KindRelay {
		if mesh := s.types[xds.TypeMeshPolicy]; mesh == nil || !mesh.answered {
			return // it has not asked for everything yet
		}
	}
	for _, t := range s.types {
		if t.nack != nil {
			s.answerAll()
			return
		}
	}
	s.payRetention()
	if s.acked == s.target.serial {
		return
	}
	s.acked = s.target.serial
	if s.pushed {
		s.srv.metrics.settled(s.ctx, time.Since(s.target.at))
	}
	gen := s.target
	s.srv.ledger.record(s, func(e *nodeEntry) {
		e.Acked, e.Answered = gen.position, gen.position
		e.settled(gen.serial, time.Now())
		s.srv.ledger.carry(s, gen, time.Now())
	})
}

// answerAll records that the target is answered, rejections included. Called with mu held.
func (s *session) answerAll() {
	if s.answered == s.target.serial {
		return
	}
	s.answered = s.target.serial
	position := s.target.position
	s.srv.ledger.record(s, func(e *nodeEntry) { e.Answered = position })
}

func (s *session) recordSent() {
	gen := s.target
	s.relay.aim(gen)
	s.srv.ledger.record(s, func(e *nodeEntry) {
		e.Sent = gen.position
		e.started(gen.serial, time.Now(), !s.pushed)
		s.srv.ledger.passedOn(s, gen, time.Now())
	})
}
