package tier

import (
	"sync"
	"sync/atomic"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/outrigger-mesh/outrigger/cache/internal/admission"
)

const (
	// maxUses is as far as an entry's uses are counted: it is how many rounds a frequent
	// entry passes unquestioned after its last use.
	maxUses = 2
	// maxRounds bounds how many used entries one eviction lets pass.
	maxRounds = 64
)

type list[V any] = *simplelru.LRU[*node[V], struct{}]

// shard is one independent part of the cache. Its totals are written with the mutex held
// and may be read without.
type shard[V any] struct {
	index     atomic.Pointer[index[V]]
	bytes     atomic.Int64
	count     atomic.Int64
	evictions atomic.Uint64

	maxBytes   int64 // read-only after init, as is the next
	maxEntries int

	mu          sync.Mutex // guards the rest, and all changes to the index
	recent      list[V]
	frequent    list[V]
	sketch      admission.Sketch
	steer       admission.Steer
	recentBytes int64

	_ [64]byte // neighbours' mutexes must not share a cache line
}

func (s *shard[V]) init(maxBytes int64, maxEntries int) {
	s.maxBytes, s.maxEntries = maxBytes, maxEntries
	s.reset()
}

func (s *shard[V]) reset() {
	s.index.Store(newIndex[V](minIndex))
	// The bounds are kept here, before anything is added, so the lists never evict by
	// themselves; sizes are positive, which is all NewLRU can object to.
	s.recent, _ = simplelru.NewLRU[*node[V], struct{}](s.maxEntries+1, nil)
	s.frequent, _ = simplelru.NewLRU[*node[V], struct{}](s.maxEntries+1, nil)
	s.sketch, s.steer = admission.NewSketch(), admission.NewSteer()
	s.recentBytes = 0
	s.bytes.Store(0)
	s.count.Store(0)
}

func (s *shard[V]) put(h uint64, key string, v *V, charge int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, _ := s.index.Load().find(h, key)
	if old != nil && s.bytes.Load()-old.charge+charge <= s.maxBytes {
		s.replace(old, v, charge)
		return true
	}
	frequent := false
	if old != nil { // it needs more room than there is, or than there can be
		frequent = true
		s.unlink(old)
	}
	if charge > s.maxBytes {
		return false
	}
	if old == nil && s.steer.Missed(h, max(1, int(s.count.Load()))) {
		s.sketch.Forget()
	}
	s.sketch.Add(h, 1, int(s.count.Load()))
	for s.bytes.Load()+charge > s.maxBytes || int(s.count.Load()) >= s.maxEntries {
		s.evict()
	}
	n := &node[V]{key: key, hash: h, charge: charge, frequent: frequent}
	n.value.Store(v)
	s.link(n)
	return true
}

func (s *shard[V]) offer(h uint64, key string, v *V, charge int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bytes.Load()+charge > s.maxBytes || int(s.count.Load()) >= s.maxEntries {
		return false
	}
	if old, _ := s.index.Load().find(h, key); old != nil {
		return false
	}
	n := &node[V]{key: key, hash: h, charge: charge}
	n.value.Store(v)
	s.link(n)
	return true
}

// replace is no use: what is asked for is counted when it is got, and one look-up may be
// followed by several replacements, of which the reader knows nothing.
func (s *shard[V]) replace(n *node[V], v *V, charge int64) {
	s.bytes.Add(charge - n.charge)
	if !n.frequent {
		s.recentBytes += charge - n.charge
	}
	n.charge = charge
	n.value.Store(v)
}

// link adds n. Recent entries beyond their share move over: there is room, or else the
// oldest of them would have had to leave, or it is their share that became smaller.
func (s *shard[V]) link(n *node[V]) {
	if n.frequent {
		s.frequent.Add(n, struct{}{})
	} else {
		s.recent.Add(n, struct{}{})
		s.recentBytes += n.charge
		for s.recent.Len() > 1 && (s.recent.Len() > s.recentEntries() || s.recentBytes > s.recentRoom()) {
			oldest, _, _ := s.recent.GetOldest()
			s.promote(oldest)
		}
	}
	x := s.index.Load()
	if x.full() {
		x = x.grown(int(s.count.Load()))
		s.index.Store(x)
	}
	s.bytes.Add(n.charge)
	live := int(s.count.Add(1))
	s.sketch.Grow(live)
	s.steer.Grow(live)
	x.add(n)
}

// unlink takes n out of everything. The value goes first, for readers on an older index.
func (s *shard[V]) unlink(n *node[V]) {
	n.value.Store(nil)
	s.index.Load().remove(n)
	if n.frequent {
		s.frequent.Remove(n)
	} else {
		s.recent.Remove(n)
		s.recentBytes -= n.charge
	}
	s.bytes.Add(-n.charge)
	s.count.Add(-1)
}

// evict removes one entry. While recent entries have their share it is the oldest of
// them, unless that was asked for more often than the oldest frequent one, which then
// leaves in its place. A recent entry that was used meanwhile becomes frequent unasked.
func (s *shard[V]) evict() {
	loser := s.evicted()
	s.steer.Left(loser.hash, loser.frequent)
	s.unlink(loser)
	s.evictions.Add(1)
}

func (s *shard[V]) evicted() *node[V] {
	for round := 0; s.recentFirst(); round++ {
		n, _, _ := s.recent.GetOldest()
		if uses := n.uses.Load(); round < maxRounds && uses > 0 {
			s.sketch.Add(n.hash, int(uses), int(s.count.Load()))
			n.uses.Store(0)
			s.promote(n)
			continue
		}
		if s.frequent.Len() == 0 {
			return n
		}
		v := s.victim()
		// One more does not count: the newcomer's last request is in its count, the next one
		// of v is still to come. In a loop they would change places for nothing.
		if s.sketch.Estimate(n.hash) <= s.sketch.Estimate(v.hash)+1 {
			return n
		}
		s.promote(n)
		return v
	}
	return s.victim()
}

// victim returns the oldest frequent entry. One that was used passes, and has one use
// fewer afterwards.
func (s *shard[V]) victim() *node[V] {
	for round := 0; ; round++ {
		n, _, _ := s.frequent.GetOldest()
		uses := n.uses.Load()
		if round >= maxRounds || uses == 0 {
			return n
		}
		s.sketch.Add(n.hash, 1, int(s.count.Load()))
		n.uses.Store(uses - 1)
		s.frequent.Add(n, struct{}{})
	}
}

func (s *shard[V]) recentEntries() int {
	return max(1, int(s.steer.Share*float64(s.maxEntries)))
}

func (s *shard[V]) recentRoom() int64 { return int64(s.steer.Share * float64(s.maxBytes)) }

func (s *shard[V]) recentFirst() bool {
	if s.recent.Len() == 0 || s.frequent.Len() == 0 {
		return s.recent.Len() > 0
	}
	return s.recentBytes >= s.recentRoom() || s.recent.Len() >= s.recentEntries()
}

// promote makes n the newest of the frequent entries.
func (s *shard[V]) promote(n *node[V]) {
	if !n.frequent {
		n.frequent = true
		s.recent.Remove(n)
		s.recentBytes -= n.charge
	}
	s.frequent.Add(n, struct{}{})
}

func (s *shard[V]) remove(h uint64, key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, _ := s.index.Load().find(h, key)
	if n != nil {
		s.unlink(n)
	}
	return n != nil
}

func (s *shard[V]) purge() {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.index.Load()
	for i := range x.slots {
		if n := x.slots[i].node.Load(); n != nil {
			n.value.Store(nil)
		}
	}
	s.reset()
}
