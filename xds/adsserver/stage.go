package adsserver

import (
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// A staged set goes to some nodes of a group while the others keep what was published. It
// is beside the group's history, not in it: what the group serves is what was published.

// staged is a set for chosen nodes. Immutable.
type staged struct {
	gen    *generation
	chosen func(outrigger.Node) bool
}

// stagedSerials is where the serials of staged sets begin: above those of published ones,
// so that a node which has accepted one counts as having got a newer push.
const stagedSerials = 1 << 63

// Stage pushes res, compiled from position, to the nodes of a group that chosen picks, in
// place of what is published; until Unstage, a later Publish changes only what the others
// get. It refuses what Publish refuses, and needs something published. Clusters that res
// lacks stay served to the chosen nodes, because their routes may be back at any time.
// chosen must give the same answer for equal nodes, and may be called concurrently.
func (s *Server) Stage(name string, res *translate.Resources, position uint64, chosen func(outrigger.Node) bool) error {
	g := s.group(name)
	g.publishing.Lock()
	defer g.publishing.Unlock()
	prev := g.current.Load()
	if prev == nil {
		return outrigger.Errorf(outrigger.Invalid, "nothing is published to group %q; publish what the nodes that are not chosen are to have, then stage", name)
	}
	if err := g.check(prev, res, position); err != nil {
		return err
	}
	union, _ := g.retain(res, nil, false)
	next, err := newGeneration(&s.ids, prev, g.served, union, nil, false, position, time.Now())
	if err != nil {
		return err
	}
	if old := g.staged.Load(); old != nil && old.gen.position == position && old.gen.same(next) {
		return nil
	}
	next.known = s.known()
	g.stages++
	next.serial = stagedSerials + g.stages
	g.staged.Store(&staged{next, chosen})
	g.retell(false)
	return nil
}

// Unstage gives the chosen nodes of a group what is published. Without a staged set it
// does nothing. Where the published set has the same content nothing is sent.
func (s *Server) Unstage(name string) {
	g := s.group(name)
	g.publishing.Lock()
	defer g.publishing.Unlock()
	if g.staged.Swap(nil) != nil {
		g.retell(false)
	}
}

// wantedBy is what a node is to have now; nil before the first Publish.
func (g *group) wantedBy(n outrigger.Node) *generation {
	if st := g.staged.Load(); st != nil && st.chosen(n) {
		return st.gen
	}
	return g.current.Load()
}
