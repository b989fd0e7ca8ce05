package adsserver

import (
	"time"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// An Envoy that was away while clusters were removed comes back with routes that lead to them,
// and asks for clusters first. Told at once that these are gone, it would answer 503 to whatever
// its old routes send there until it has the new ones. retain.go keeps the clusters for those who
// are connected; for one that comes back, the first response of a type leaves the removals out,
// and they follow when it has acknowledged its routes, or was given answerPatience to. Our
// sidecars put a push in force as a whole, and gRPC clients keep clusters for as long as their
// routes name them.

// parting is what of a first response is left for later. Guarded by session.mu.
type parting struct {
	names map[string]map[string]struct{} // by type: removed, and not said
	timer *time.Timer
}

// postpones reports whether t's removals are to wait. Called with mu held, for a first response.
func (s *session) postpones(t *typeSub) bool {
	return s.delta && s.node.Kind == string(translate.KindEnvoy) && !t.answered &&
		(t.typeURL == xds.TypeCluster || t.typeURL == xds.TypeEndpoint)
}

// postpone notes what was not said. Called with mu held.
func (s *session) postpone(t *typeSub, removed []string) {
	if len(removed) == 0 {
		return
	}
	p := &s.parting
	if p.names == nil {
		p.names = make(map[string]map[string]struct{})
		p.timer = time.AfterFunc(answerPatience, s.giveUpParting)
	}
	names := make(map[string]struct{}, len(removed))
	for _, name := range removed {
		names[name] = struct{}{}
	}
	p.names[t.typeURL] = names
}

// part says it when the routes that the client has are those of now. Called with mu held.
func (s *session) part() {
	if s.parting.names == nil {
		return
	}
	if routes := s.types[xds.TypeRoute]; routes == nil || !routes.answered || s.open > 0 {
		return
	}
	s.partNow()
}

func (s *session) partNow() {
	p := &s.parting
	for _, typeURL := range []string{xds.TypeCluster, xds.TypeEndpoint} {
		t := s.types[typeURL]
		if len(p.names[typeURL]) == 0 || t == nil || !t.armed {
			continue // an unanswered response: the timer, or the answer, comes back to it
		}
		for name := range p.names[typeURL] {
			t.demand(name) // what is back by now is sent, the rest is named as removed
		}
		delete(p.names, typeURL)
		s.launch(t)
	}
	if len(p.names) == 0 {
		p.names = nil
		p.timer.Stop()
	}
}

// giveUpParting says it to an Envoy that does not ask for routes, or does not answer.
func (s *session) giveUpParting() {
	s.mu.Lock()
	if !s.closed && s.parting.names != nil {
		s.parting.timer.Reset(answerPatience) // until all of it was said
		s.partNow()
	}
	s.mu.Unlock()
	s.dropRetained()
}
