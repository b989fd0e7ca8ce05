package tier

import "sync/atomic"

// node is one entry. Key and hash never change; the value is nil once the entry is gone.
type node[V any] struct {
	key     string
	hash    uint64
	value   atomic.Pointer[V]
	touched atomic.Bool

	// Guarded by the shard's mutex.
	charge   int64
	frequent bool
}

// index finds nodes by open addressing with linear probing. Readers load pointers;
// whoever holds the shard's mutex stores them. A slot on the way to another node is not
// emptied but given the grave, a node without value that matches nothing.
type index[V any] struct {
	slots []atomic.Pointer[node[V]]
	mask  uint64
	grave *node[V]
	used  int // slots that are not nil; guarded by the shard's mutex
}

const minIndex = 16

func newIndex[V any](slots int) *index[V] {
	return &index[V]{slots: make([]atomic.Pointer[node[V]], slots), mask: uint64(slots - 1), grave: new(node[V])}
}

// find returns the node of key and its value, or nils. There is always a nil slot to stop at.
func (x *index[V]) find(h uint64, key string) (*node[V], *V) {
	for i := h; ; i++ {
		n := x.slots[i&x.mask].Load()
		if n == nil {
			return nil, nil
		}
		if n.hash == h && n.key == key {
			if p := n.value.Load(); p != nil {
				return n, p
			}
		}
	}
}

// full reports whether one more node could leave too few nil slots.
func (x *index[V]) full() bool { return (x.used+1)*4 > len(x.slots)*3 }

// grown returns a fresh index without graves and with room for as many nodes again.
func (x *index[V]) grown(live int) *index[V] {
	size := minIndex
	for size < 2*(live+1) {
		size *= 2
	}
	y := newIndex[V](size)
	for i := range x.slots {
		if n := x.slots[i].Load(); n != nil && n != x.grave {
			y.add(n)
		}
	}
	return y
}

func (x *index[V]) add(n *node[V]) {
	for i := n.hash; ; i++ {
		slot := &x.slots[i&x.mask]
		switch slot.Load() {
		case nil:
			x.used++
			slot.Store(n)
			return
		case x.grave:
			slot.Store(n)
			return
		}
	}
}

// remove takes n out. A grave nothing is reached across is freed, and so are those before.
func (x *index[V]) remove(n *node[V]) {
	i := n.hash
	for x.slots[i&x.mask].Load() != n {
		i++
	}
	x.slots[i&x.mask].Store(x.grave)
	if x.slots[(i+1)&x.mask].Load() != nil {
		return
	}
	for x.slots[i&x.mask].Load() == x.grave {
		x.slots[i&x.mask].Store(nil)
		x.used--
		i--
	}
}
