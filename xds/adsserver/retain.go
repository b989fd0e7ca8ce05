package adsserver

import (
	"time"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Clusters a push removes are taken away in two steps, because gRPC clients and Envoy
// apply clusters before routes and would fail every request between the two: the push
// itself still serves them, and when all streams connected at that moment have accepted
// it (their routes lead elsewhere now) or gone, a second generation of the same position
// drops them. A stream that rejects the push keeps them alive: its routes still need them.

// maxRetained bounds how many removed resources are carried; beyond it the oldest
// behaviour, immediate removal, is the lesser evil.
const maxRetained = 1024

// retain returns res plus the clusters and load assignments served now that res lacks,
// and whether there are any.
func retain(served, res *translate.Resources) (*translate.Resources, bool) {
	if served == nil {
		return res, false
	}
	union, n := res.Clone(), 0
	for _, typeURL := range []string{xds.TypeCluster, xds.TypeEndpoint} {
		for _, name := range served.Names(typeURL) {
			if res.Get(typeURL, name) == nil {
				union.Put(typeURL, name, served.Get(typeURL, name))
				n++
			}
		}
	}
	if n == 0 || n > maxRetained {
		return res, false
	}
	return union, true
}

// payRetention is called with mu held when the stream has accepted its target or ends.
func (s *session) payRetention() {
	gen := s.owes
	switch {
	case gen == nil:
	case gen != s.group.current.Load():
		s.owes = nil // superseded; the newer push carries on what is still needed
	case s.closed || s.target == gen:
		s.owes = nil
		if gen.waiting.Add(-1) == 0 {
			s.drop = gen
		}
	}
}

// dropRetained runs the second step if this stream was the last to owe it. Called
// without locks.
func (s *session) dropRetained() {
	s.mu.Lock()
	gen := s.drop
	s.drop = nil
	s.mu.Unlock()
	if gen == nil {
		return
	}
	s.group.publishing.Lock()
	defer s.group.publishing.Unlock()
	s.group.finish(gen)
}

// finish replaces gen, if it is still served, by the same position without what it
// retained. Called with publishing held.
func (g *group) finish(gen *generation) {
	if g.current.Load() != gen {
		return
	}
	next, err := newGeneration(&g.srv.ids, gen, g.wanted, gen.position, time.Now())
	if err != nil {
		g.srv.log.Error("removed clusters stay served", "group", g.name, "error", err)
		return
	}
	g.served = g.wanted
	g.serve(next, false)
}
