package shm

import (
	"sync/atomic"

	"github.com/outrigger-mesh/outrigger/cache/internal/admission"
)

// policy decides which keys leave when there are more than room. It is the process tier's
// (see package tier) with what a table has: there are no lists, the order of the arena takes
// their place, and of hits only samples are known.
//
// A new key is a newcomer. Newcomers have a share of the room; the oldest beyond that is
// settled if it was touched meanwhile or was asked for at least twice more often than the
// settled key that would have to leave for it; else it leaves itself. The settled key that
// leaves is the one of a few that was asked for least. A hand that goes round the arena
// picks these few, passing a touched key over once for each touch.
//
// Until the first key has to leave nothing is counted, so a table with room pays nothing.
// Then it takes at most 32 bytes of heap for each key. Guarded by the writer's mutex.
type policy struct {
	sketch    admission.Sketch
	steer     admission.Steer
	queue     []newcomer // in order of arrival; some have gone, or settled
	newcomers int        // live slots marked as such
	hand      uint64     // logical word offset
	judging   bool
}

// newcomer is a slot and, so that its next key is not taken for it, a part of the hash.
type newcomer struct{ slot, tag uint32 }

const (
	// MaxWeight is the most reads one touch may stand for: what the policy counts to.
	MaxWeight = 15

	handKeys   = 8   // settled keys compared
	handSteps  = 128 // records looked at to find them
	maxSettled = 16  // touched newcomers settled, for one key that leaves
)

// asked counts n reads of a key.
func (w *Writer) asked(hash uint64, n int) {
	if w.policy.judging {
		w.policy.sketch.Add(hash, n, int(w.live))
	}
}

// arrived is told of a key that is new in the table: somebody asked for it and missed.
func (w *Writer) arrived(slot, hash uint64) {
	p, live := &w.policy, int(w.live)
	if !p.judging {
		return
	}
	p.sketch.Grow(live)
	p.steer.Grow(live)
	if p.steer.Missed(hash, live) {
		p.sketch.Forget()
	}
	w.asked(hash, 1)
	w.meta[slot] |= metaNew
	p.newcomers++
	if len(p.queue) >= 2*p.newcomers+handKeys {
		w.compact()
	}
	p.queue = append(p.queue, newcomer{uint32(slot), uint32(hash)})
	for p.newcomers > w.share() {
		n, ok := w.oldest()
		if !ok {
			return
		}
		w.settle(n)
	}
}

// share is how many newcomers there may be.
func (w *Writer) share() int { return max(1, int(w.policy.steer.Share*float64(w.live))) }

// is reports whether a newcomer is still there and one.
func (w *Writer) is(n newcomer) bool {
	return w.meta[n.slot]&metaNew != 0 && uint32(atomic.LoadUint64(w.word(uint64(n.slot), slotHash))) == n.tag
}

// oldest returns the newcomer that has been there longest.
func (w *Writer) oldest() (slot uint64, ok bool) {
	p := &w.policy
	for len(p.queue) > 0 {
		if n := p.queue[0]; w.is(n) {
			return uint64(n.slot), true
		}
		p.queue = p.queue[1:]
	}
	return 0, false
}

// compact takes those out of the queue that are no newcomers any more.
func (w *Writer) compact() {
	kept := make([]newcomer, 0, 2*w.policy.newcomers+2*handKeys)
	for _, n := range w.policy.queue {
		if w.is(n) {
			kept = append(kept, n)
		}
	}
	w.policy.queue = kept
}

// settle makes a newcomer one of the others.
func (w *Writer) settle(slot uint64) {
	w.meta[slot] &^= metaNew | metaRefs
	w.policy.newcomers--
}

// evict makes one key leave; there must be one.
func (w *Writer) evict() {
	p := &w.policy
	if !p.judging {
		p.judging, p.sketch, p.steer = true, admission.NewSketch(), admission.NewSteer()
		p.sketch.Grow(int(w.live))
		p.steer.Grow(int(w.live))
	}
	for range maxSettled {
		if p.newcomers < w.share() && p.newcomers < int(w.live) {
			break
		}
		n, ok := w.oldest()
		if !ok {
			break
		}
		if w.meta[n]&metaRefs > 0 && !w.stale(n) {
			w.settle(n)
			continue
		}
		v, ok := w.victim()
		// One more does not count; see package tier.
		if !ok || !w.stale(v) && (w.stale(n) || w.estimate(n) <= w.estimate(v)+1) {
			w.leave(n)
			return
		}
		w.settle(n)
		w.leave(v)
		return
	}
	if v, ok := w.victim(); ok {
		w.leave(v)
	} else if n, ok := w.oldest(); ok {
		w.leave(n)
	} else {
		w.reclaim(true) // the hand met garbage only: so much less of it
	}
}

func (w *Writer) estimate(slot uint64) uint64 {
	return w.policy.sketch.Estimate(atomic.LoadUint64(w.word(slot, slotHash)))
}

func (w *Writer) leave(slot uint64) {
	w.policy.steer.Left(atomic.LoadUint64(w.word(slot, slotHash)), w.meta[slot]&metaNew == 0)
	w.evictions++
	w.drop(slot)
}

// victim returns the settled key that should leave first, as far as the hand looks: one
// that is stale, else the one asked for least of those that were not touched since the hand
// came by, else of those that were.
func (w *Writer) victim() (slot uint64, ok bool) {
	least, seen := ^uint64(0), 0
	for step := 0; step < handSteps && seen < handKeys && w.tail < w.next; step++ {
		p := &w.policy
		if p.hand < w.tail || p.hand >= w.next {
			p.hand = w.tail
		}
		i, live := w.liveAt(p.hand)
		p.hand += w.wordsAt(p.hand)
		if !live || w.meta[i]&metaNew != 0 {
			continue
		}
		if w.stale(i) {
			return i, true
		}
		e := w.estimate(i)
		if w.meta[i]&metaRefs > 0 {
			w.meta[i]--
			e += MaxWeight + 1
		} else {
			seen++
		}
		if e < least {
			slot, least, ok = i, e, true
		}
	}
	return slot, ok
}

// flushed forgets who is there; how often keys were asked for stays known.
func (p *policy) flushed() { p.queue, p.newcomers, p.hand = nil, 0, 0 }
