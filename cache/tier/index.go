package tier

import "sync/atomic"

// node is one entry. Key and hash never change; the value is nil once the entry is gone.
// What a hit reads lies together.
type node[V any] struct {
	key   string
	value atomic.Pointer[V]
	uses  atomic.Uint32 // hits since it was last looked at for eviction, up to maxUses

	frequent bool // guarded by the shard's mutex, as is charge
	hash     uint64
	charge   int64
}

// slot is one place of the index. A reader loads the tag and, if that is the hash it
// looks for, the node, whose key then decides: the tag is only a hint, but it saves
// touching the memory of other keys' nodes.
type slot[V any] struct {
	tag  atomic.Uint64 // hash of the node; free and grave are never hashes
	node atomic.Pointer[node[V]]
}

const (
	free  = 0 // no node has been here since a search could last pass over
	grave = 1 // the node that was here is gone, but others are reached across
	first = 2 // hashes begin here

	minIndex = 16
)

// index finds nodes by open addressing with linear probing. Readers load; whoever holds
// the shard's mutex stores.
type index[V any] struct {
	slots []slot[V]
	used  int // slots that are not free; guarded by the shard's mutex
}

// newIndex returns an index of that many slots, a power of two.
func newIndex[V any](slots int) *index[V] { return &index[V]{slots: make([]slot[V], slots)} }

// find returns the node of key and its value, or nils. There is always a free slot to
// stop at.
func (x *index[V]) find(h uint64, key string) (*node[V], *V) {
	slots := x.slots
	for i := h; ; i++ {
		s := &slots[i&uint64(len(slots)-1)]
		switch s.tag.Load() {
		case h:
			// By now the node may be gone, or another one.
			if n := s.node.Load(); n != nil && n.key == key {
				if p := n.value.Load(); p != nil {
					return n, p
				}
			}
		case free:
			return nil, nil
		}
	}
}

// full reports whether one more node could leave too few free slots.
func (x *index[V]) full() bool { return (x.used+1)*4 > len(x.slots)*3 }

// grown returns a fresh index without graves and with room for as many nodes again.
func (x *index[V]) grown(live int) *index[V] {
	size := minIndex
	for size < 2*(live+1) {
		size *= 2
	}
	y := newIndex[V](size)
	for i := range x.slots {
		if s := &x.slots[i]; s.tag.Load() >= first {
			y.add(s.node.Load())
		}
	}
	return y
}

func (x *index[V]) at(i uint64) *slot[V] { return &x.slots[i&uint64(len(x.slots)-1)] }

func (x *index[V]) add(n *node[V]) {
	i := n.hash
	for x.at(i).tag.Load() >= first {
		i++
	}
	s := x.at(i)
	if s.tag.Load() == free {
		x.used++
	}
	s.node.Store(n)
	s.tag.Store(n.hash)
}

// remove takes n out. A grave nothing is reached across is freed, and so are those before.
func (x *index[V]) remove(n *node[V]) {
	i := n.hash
	for s := x.at(i); s.tag.Load() != n.hash || s.node.Load() != n; s = x.at(i) {
		i++
	}
	x.at(i).tag.Store(grave)
	x.at(i).node.Store(nil) // not kept alive
	if x.at(i+1).tag.Load() != free {
		return
	}
	for ; x.at(i).tag.Load() == grave; i-- {
		x.at(i).tag.Store(free)
		x.used--
	}
}
