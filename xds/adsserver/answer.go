package adsserver

import (
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/status"

	"github.com/outrigger-mesh/outrigger/xds"
)

// What became of a response: built and sent under a nonce, then accepted or rejected.

// built finishes the making of a response; sent adds the nonce the stock server chose, and
// says whether it was heartbeats only.
func (s *session) built(t *typeSub, r response) {
	t.base, t.over, t.force = r.state, nil, nil
	t.fired, t.answered = false, true
	if t.building = r; s.target != nil {
		t.building.of = s.target.position
	}
}

func (s *session) sent(typeURL, nonce string) (beat bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.types[typeURL]
	if t == nil {
		return false // cannot be: a response is built from its typeSub
	}
	now := time.Now()
	t.building.nonce, t.building.at = nonce, now
	if !t.building.beat {
		t.sentAt = now
	}
	if len(t.building.state.leased()) > 0 {
		t.heardAt = now
		s.keepAlive(t)
	}
	beat = t.building.beat
	if typeURL == xds.TypeMeshPolicy {
		s.relay.mark(nonce)
	}
	t.pending = append(t.pending, t.building)
	t.building = response{}
	return beat
}

// answer processes the nonce of a request: an ACK, or with detail a NACK, of that
// response and, by order of the stream, an ACK of the older ones. Called with mu held.
func (s *session) answer(t *typeSub, nonce string, detail *status.Status) {
	for i, r := range t.pending {
		if r.nonce != nonce {
			continue
		}
		s.open -= i + 1
		for _, answered := range t.pending[:i+1] {
			if answered.late {
				s.late--
			}
		}
		t.pending = slices.Delete(t.pending, 0, i+1) // which clears what it frees
		t.lastSeen = nonce
		if r.beat {
			s.beaten(t, detail != nil)
			return
		}
		if detail != nil {
			s.reject(t, r, detail.GetMessage())
			return
		}
		t.acked, t.ackedAt = r.state, time.Now()
		if t.nack != nil && len(t.rejected) == 0 {
			t.nack, t.kept = nil, nil // what was rejected went out again, changed, and is accepted
			s.recordNack()
		}
		return
	}
}

func (s *session) reject(t *typeSub, r response, message string) {
	message = clipNack(message)
	if t.rejected == nil {
		t.rejected = make(map[string]struct{})
	}
	if t.kept == nil {
		t.kept = make(map[string]*entry)
	}
	for name := range r.each {
		t.rejected[name] = struct{}{}
		if _, before := t.kept[name]; !before {
			t.kept[name] = t.acked.entry(name)
		}
	}
	t.nack = &Nack{Type: t.typeURL, Resource: blamed(slices.Collect(r.each), message), Message: message, At: time.Now(), Position: r.of}
	s.recordNack()
	s.srv.metrics.nacked(s.ctx, t.typeURL)
	s.srv.log.Warn("client rejected resources", "node", s.node.ID, "type", t.typeURL,
		"resource", t.nack.Resource, "position", s.target.position, "reason", message)
}

// recordNack shows the first standing rejection in push order.
func (s *session) recordNack() {
	var standing *Nack
	for _, typeURL := range xds.Pushed() {
		if t := s.types[typeURL]; t != nil && t.nack != nil {
			standing = t.nack
			break
		}
	}
	serial := uint64(0)
	if s.target != nil {
		serial = s.target.serial
	}
	s.srv.ledger.record(s, func(e *nodeEntry) { e.Nack = standing; e.rejected(serial, standing) })
}

// blamed guesses the resource a free-text rejection is about: the only one sent, or the
// longest name the text holds.
func blamed(names []string, message string) string {
	if len(names) == 1 {
		return names[0]
	}
	best := ""
	for _, name := range names {
		if len(name) > len(best) && strings.Contains(message, name) {
			best = name
		}
	}
	return best
}
