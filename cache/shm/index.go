package shm

import "sync/atomic"

// The index is open addressing with linear probing. A key lies within window slots of its
// home, and no slot between is free, so a reader may stop at a free one (hash 0). A slot
// whose key was dropped keeps its hash, as a tombstone, for as long as some chain crosses it.

// find returns the slot that holds key. The writer reads its own memory: a live record
// is always intact for it.
func (w *Writer) find(key string, hash uint64) (uint64, bool) {
	i := w.geo.home(hash)
	for range window {
		switch h := atomic.LoadUint64(w.word(i, slotHash)); {
		case h == 0:
			return 0, false
		case h == hash && w.meta[i]&metaLive != 0 && w.holds(i, key):
			return i, true
		}
		i = w.geo.after(i)
	}
	return 0, false
}

func (w *Writer) holds(slot uint64, key string) bool {
	rec := w.record(atomic.LoadUint64(w.word(slot, slotLocation)))
	_, klen, _ := unpackMeta(atomic.LoadUint64(&rec[recMeta]))
	return klen == len(key) && equalBytes(rec[recordHeader:recordHeader+words(klen)], bytesOf(key))
}

// free returns the slot a new key with this hash goes to, evicting the oldest key of the
// window when all of it is taken.
func (w *Writer) free(hash uint64) uint64 {
	i := w.geo.home(hash)
	victim, oldest := i, ^uint64(0)
	for range window {
		if w.meta[i]&metaLive == 0 {
			return i
		}
		age := atomic.LoadUint64(w.word(i, slotLocation)) >> 1
		if w.meta[i]&metaRefs > 0 {
			age |= 1 << 63 // touched keys only when there is no other
		}
		if age < oldest {
			victim, oldest = i, age
		}
		i = w.geo.after(i)
	}
	w.evictions++
	w.forget(victim)
	return victim
}

// put appends the record and publishes it. Room is made first, because that may evict
// keys, this one included, and so change where the key goes.
func (w *Writer) put(key string, hash uint64, st State, value []byte) (slot, stamp uint64) {
	n := recordWords(len(key), len(value))
	slot, ok := w.find(key, hash)
	old := uint64(0)
	if ok {
		old = w.wordsAt(atomic.LoadUint64(w.word(slot, slotLocation)))
	}
	w.makeRoom(n, old)
	if ok && w.meta[slot]&metaLive != 0 { // else it had to leave itself
		w.liveWords -= old
	} else {
		slot = w.free(hash)
		w.live++
		w.meta[slot] = metaFresh
		w.arrived(slot, hash)
	}
	next := (w.stamp+1)<<stateBits | uint64(st) // what publish will issue
	loc := w.reserve(n)
	rec := w.record(loc)
	meta := packMeta(slot, len(key), len(value))
	kw := words(len(key))
	w.store(&rec[recMeta], meta)
	w.store(&rec[recStamp], next)
	w.store(&rec[recSum], checksum(meta, next, hash, sumBytes(value, &w.scratch)))
	w.storeBytes(rec[recordHeader:recordHeader+kw], bytesOf(key))
	w.storeBytes(rec[recordHeader+kw:n], value)
	w.liveWords += n

	w.store(w.word(slot, slotLocation), loc)
	w.store(w.word(slot, slotHash), hash)
	return slot, w.publish(slot, st)
}

// forget makes a slot Absent and leaves a tombstone.
func (w *Writer) forget(slot uint64) {
	w.publish(slot, Absent)
	w.liveWords -= w.wordsAt(atomic.LoadUint64(w.word(slot, slotLocation)))
	w.live--
	if w.meta[slot]&metaNew != 0 {
		w.policy.newcomers--
	}
	w.meta[slot] = metaTomb
}

// drop forgets a slot and frees every tombstone that was needed only by its key: those
// from its home to itself which no later key of the run has to be probed across.
func (w *Writer) drop(slot uint64) {
	w.forget(slot)
	home := w.geo.home(atomic.LoadUint64(w.word(slot, slotHash)))
	end := uint64(1) // first offset from slot that no chain through slot can reach
	for end < window && w.meta[w.geo.plus(slot, end)] != 0 {
		end++
	}
	// Walk back over slots numbered by their distance above home; reach is the lowest
	// home, on that scale, of the keys seen so far.
	up := w.geo.above(slot, home)
	reach := int64(1) << 40
	for d := int64(up+end) - 1; d >= 0; d-- {
		i := w.geo.plus(home, uint64(d))
		switch m := w.meta[i]; {
		case m&metaLive != 0:
			h := w.geo.home(atomic.LoadUint64(w.word(i, slotHash)))
			reach = min(reach, d-int64(w.geo.above(i, h)))
		case m == metaTomb && d <= int64(up) && reach > d:
			w.store(w.word(i, slotHash), 0)
			w.meta[i] = 0
		}
	}
}
