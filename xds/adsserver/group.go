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
	shards  [shardCount]shard

	publishing sync.Mutex
	// Guarded by publishing: what was last published, and what is served for it
	// (wanted plus retained clusters).
	wanted, served *translate.Resources
	carried        []translate.Key // what served has and wanted has not
	sound          bool            // wanted passed the checks of Publish

	history history
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

// serve makes next current and tells every stream. It is stored before the registry is
// read: a stream that registers meanwhile loads current afterwards and cannot miss it.
// With owing, each stream told holds back the second step of next (retain.go); serve
// then reports whether none of them needs it any more. Called with publishing held.
func (g *group) serve(next *generation, owing bool) (free bool) {
	g.history.add(g.name, g.current.Load(), next)
	g.current.Store(next)
	list := g.sessions()
	next.waiting.Store(int64(len(list)) + 1) // one is ours, until all have been told
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
