package adsserver

import (
	"hash/maphash"
	"sync"
	"sync/atomic"

	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// shardCount spreads the registry of streams, so that connects do not wait for a push.
const shardCount = 64

// group is the nodes that get the same configuration.
type group struct {
	srv     *Server
	name    string
	seed    maphash.Seed
	current atomic.Pointer[generation] // nil before the first Publish
	staged  atomic.Pointer[staged]     // nil when all nodes get current; see stage.go
	shards  [shardCount]shard

	publishing sync.Mutex
	// Guarded by publishing: what was last published, and what is served for it
	// (wanted plus retained clusters).
	wanted, served *translate.Resources
	carried        []translate.Key // what served has and wanted has not
	stages         uint64          // how many sets were staged
	sound          bool            // wanted passed the checks of Publish

	history history

	tellMu  sync.Mutex
	untold  *generation // the newest one streams have yet to be told of
	owing   bool        // and they hold back its second step
	telling bool        // a goroutine is at it
}

type shard struct {
	mu       sync.Mutex
	sessions map[*session]struct{}
}

func (g *group) shardOf(s *session) *shard {
	return &g.shards[maphash.String(g.seed, s.node.ID)%shardCount]
}

func (g *group) add(s *session) {
	sh := g.shardOf(s)
	sh.mu.Lock()
	sh.sessions[s] = struct{}{}
	sh.mu.Unlock()
}

func (g *group) remove(s *session) {
	sh := g.shardOf(s)
	sh.mu.Lock()
	delete(sh.sessions, s)
	sh.mu.Unlock()
}

// sessions copies the registry, so that nothing is locked while streams are told.
func (g *group) sessions() []*session {
	var out []*session
	for i := range g.shards {
		sh := &g.shards[i]
		sh.mu.Lock()
		for s := range sh.sessions {
			out = append(out, s)
		}
		sh.mu.Unlock()
	}
	return out
}

// tellNow is how many streams Publish tells by itself. It takes microseconds each, so
// with thousands the caller would wait for tens of milliseconds; then a goroutine does.
const tellNow = 128

// serve makes next current and has every stream told. With owing, each stream told holds
// back the second step of next (retain.go). Called with publishing held.
func (g *group) serve(next *generation, owing bool) {
	g.history.add(g.name, g.current.Load(), next)
	g.current.Store(next)
	g.retell(owing)
}

// retell has every stream look at what it is to have. With owing, as in serve; without, what
// is owed stays as it is. Called with publishing held.
func (g *group) retell(owing bool) {
	g.tellMu.Lock()
	if next := g.current.Load(); g.untold != next {
		g.untold, g.owing = next, false
	}
	g.owing = g.owing || owing
	busy := g.telling
	g.telling = true
	g.tellMu.Unlock()
	switch {
	case busy: // whoever it is will find next
	case len(g.sessions()) <= g.srv.tellNow:
		g.tell(true)
	default:
		go g.tell(false)
	}
}

// tell tells streams of the newest generation until there is no newer one. One goroutine
// at most does; it waits for nobody but holders of publishing. publishing says that the
// caller is one.
func (g *group) tell(publishing bool) {
	for {
		g.tellMu.Lock()
		next, owing := g.untold, g.owing
		g.untold, g.owing, g.telling = nil, false, next != nil
		g.tellMu.Unlock()
		if next == nil {
			return
		}
		switch free := g.tellAll(next, owing); {
		case free && publishing:
			g.finish(next)
		case free:
			g.publishing.Lock()
			g.finish(next)
			g.publishing.Unlock()
		}
	}
}

// tellAll reports whether none of the streams needs what next retains any more. next was
// stored before the registry is read: a stream that registers meanwhile loads current
// afterwards and cannot miss it.
func (g *group) tellAll(next *generation, owing bool) (free bool) {
	list := g.sessions()
	if owing {
		next.waiting.Store(int64(len(list)) + 1) // one is ours, until all have been told
	}
	for _, s := range list {
		s.mu.Lock()
		switch {
		case !owing:
		case s.closed:
			next.waiting.Add(-1)
		default:
			s.owes = next
		}
		s.advance()
		s.mu.Unlock()
	}
	return owing && next.waiting.Add(-1) == 0
}
