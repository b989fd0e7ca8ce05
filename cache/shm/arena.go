package shm

import "sync/atomic"

// The arena is a ring of records in order of writing, addressed by logical word offsets.
// [tail, next) holds live records, dead ones and skipped ends. When there are too many live
// ones policy says which leave, from wherever they lie. Making room then means taking the
// oldest records away: a dead one costs nothing, a live one is moved to the front.

// record returns the words from the physical place of loc to the arena's end.
func (w *Writer) record(loc uint64) []uint64 { return w.arena[loc%w.geo.arenaWords:] }

// wordsAt returns the size of the record, or skipped end, at loc.
func (w *Writer) wordsAt(loc uint64) uint64 {
	m := atomic.LoadUint64(&w.record(loc)[recMeta])
	slot, klen, vlen := unpackMeta(m)
	if slot == padSlot {
		return m & padSlot
	}
	return recordWords(klen, vlen)
}

// pad returns how much of the arena's end must be skipped so that n words do not wrap.
func (w *Writer) pad(n uint64) uint64 {
	if left := w.geo.arenaWords - w.next%w.geo.arenaWords; left < n {
		return left
	}
	return 0
}

func (w *Writer) space() uint64 { return w.geo.arenaWords - (w.next - w.tail) }

// slack is the free space the writer keeps ahead of itself. Together with the work limit
// of 16 it covers the longest possible run of live records: while Puts use up the slack,
// the same Puts move 16 times as much, a whole arena.
func (w *Writer) slack() uint64 { return w.geo.arenaWords / 16 }

// highWater is the amount of live data above which keys have to leave. The rest, slack
// apart, is room for garbage; at 7/8 random overwriting moves about four records for every
// one put.
func (w *Writer) highWater() uint64 { return w.geo.arenaWords / 8 * 7 }

func (g geometry) maxLive() uint64 { return g.slots / 5 * 4 }

// makeRoom frees space for a record of n words that replaces one of old words, 0 for that
// of a new key, which needs a slot as well.
func (w *Writer) makeRoom(n, old uint64) {
	for w.live > 0 && (w.liveWords+n > w.highWater()+old || old == 0 && w.live >= w.geo.maxLive()) {
		w.evict()
	}
	for work := int64(16*n + 64); work > 0 && w.tail < w.next; {
		if w.space() >= n+w.pad(n)+w.slack() {
			return
		}
		work -= int64(w.reclaim(false))
	}
	for w.space() < n+w.pad(n) {
		w.reclaim(true)
	}
}

// reclaim takes the oldest record away and returns its size in words; force evicts
// whatever is live.
func (w *Writer) reclaim(force bool) uint64 {
	loc := w.tail
	size := w.wordsAt(loc)
	if slot, live := w.liveAt(loc); live && !w.keep(slot, size, force) {
		w.evictions++
		w.drop(slot)
	}
	w.tail += size
	return size
}

// liveAt returns the slot whose record is at loc; false when that is a skipped end, or what
// a key left behind.
func (w *Writer) liveAt(loc uint64) (slot uint64, live bool) {
	slot, _, _ = unpackMeta(atomic.LoadUint64(&w.record(loc)[recMeta]))
	return slot, slot != padSlot && w.meta[slot]&metaLive != 0 && atomic.LoadUint64(w.word(slot, slotLocation)) == loc
}

func (w *Writer) stale(slot uint64) bool {
	return State(atomic.LoadUint64(w.word(slot, slotStamp))&stateMask) == Invalid
}

// keep moves a live record from the tail to the front, if there is room in front without
// touching its old place, which readers may be copying. What is known to be stale is not
// worth moving.
func (w *Writer) keep(slot, size uint64, force bool) bool {
	if force || w.stale(slot) || w.space() < size+w.pad(size) {
		return false
	}
	from := w.record(w.tail)[:size]
	loc := w.reserve(size)
	to := w.record(loc)
	for i := range from {
		w.store(&to[i], atomic.LoadUint64(&from[i]))
	}
	w.store(w.word(slot, slotLocation), loc)
	w.relocated++
	return true
}

// reserve claims n contiguous words in front. Intent is published before anything is
// written there, so that a reader still copying what lay there last lap notices.
func (w *Writer) reserve(n uint64) (loc uint64) {
	skip := w.pad(n)
	w.store(&w.hdr[hdrIntent], w.next+skip+n)
	if skip > 0 {
		w.store(&w.record(w.next)[recMeta], padSlot<<32|skip)
	}
	loc = w.next + skip
	w.next = loc + n
	return loc
}
