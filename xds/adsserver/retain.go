package adsserver

import (
	"cmp"
	"slices"
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

// retain returns res plus the clusters, their secrets and load assignments served now that res lacks,
// and which these are. With known, touched lists all that res changed. Called with
// publishing held.
func (g *group) retain(res *translate.Resources, touched []translate.Key, known bool) (*translate.Resources, []translate.Key) {
	if g.served == nil {
		return res, nil
	}
	var carried []translate.Key
	consider := func(k translate.Key) {
		if res.Get(k.TypeURL, k.Name) == nil && g.served.Get(k.TypeURL, k.Name) != nil {
			carried = append(carried, k)
		}
	}
	if known {
		for _, k := range mergeKeys(touched, g.carried) {
			if k.TypeURL == xds.TypeCluster || k.TypeURL == xds.TypeEndpoint || k.TypeURL == xds.TypeSecret {
				consider(k)
			}
		}
	} else {
		for _, typeURL := range []string{xds.TypeSecret, xds.TypeCluster, xds.TypeEndpoint} {
			for _, name := range g.served.Names(typeURL) {
				consider(translate.Key{TypeURL: typeURL, Name: name})
			}
		}
	}
	if n := len(carried); n == 0 || n > maxRetained {
		return res, nil
	}
	union := res.Fork()
	for _, k := range carried {
		union.Put(k.TypeURL, k.Name, g.served.Get(k.TypeURL, k.Name))
	}
	return union, carried
}

// mergeKeys joins lists of keys, each in push order and by name, into one such list
// without repetitions.
func mergeKeys(lists ...[]translate.Key) []translate.Key {
	var out []translate.Key
	filled := 0
	for _, l := range lists {
		if len(l) > 0 {
			filled++
			out = append(out[:len(out):len(out)], l...)
		}
	}
	if filled < 2 {
		return out
	}
	order := make(map[string]int)
	for i, t := range xds.Pushed() {
		order[t] = i
	}
	slices.SortFunc(out, func(a, b translate.Key) int {
		return cmp.Or(cmp.Compare(order[a.TypeURL], order[b.TypeURL]), cmp.Compare(a.Name, b.Name))
	})
	return slices.Compact(out)
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
	next, err := newGeneration(&g.srv.ids, gen, g.served, g.wanted, g.carried, true, gen.position, time.Now())
	if err != nil {
		g.srv.log.Error("removed clusters stay served", "group", g.name, "error", err)
		return
	}
	next.known = gen.known
	g.served, g.carried = g.wanted, nil
	g.serve(next, false)
}
