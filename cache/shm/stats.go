package shm

import "sync/atomic"

// Stats describes a table as its writer sees it.
type Stats struct {
	Entries     int    // keys held, in any state
	LiveBytes   int64  // arena bytes of their records
	ArenaBytes  int64  // arena size
	TotalBytes  int64  // size of the mapping: header, index and arena
	Slots       int    // index size
	Evictions   uint64 // keys forgotten for lack of space
	Relocations uint64 // records moved to survive the arena's next lap
	Generation  uint64
	WriteSealed bool // the kernel refuses any further writable mapping of the memory
}

// Stats returns a consistent snapshot.
func (w *Writer) Stats() Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return Stats{
		Entries: int(w.live), LiveBytes: int64(w.liveWords) * 8, ArenaBytes: int64(w.geo.arenaWords) * 8,
		TotalBytes: int64(w.geo.totalWords()) * 8, Slots: int(w.geo.slots), Evictions: w.evictions,
		Relocations: w.relocated, Generation: w.generation, WriteSealed: w.mem.sealed,
	}
}

// Len returns the number of keys held, in any state.
func (w *Writer) Len() int { return w.Stats().Entries }

// Capacity returns how many keys the index has room for; the arena may hold fewer.
func (w *Writer) Capacity() int { return int(w.geo.maxLive()) }

// Capacity is what Writer.Capacity would say of a table made with these options. Errors
// have kind Invalid, as those of Create.
func (o Options) Capacity() (int, error) {
	g, err := plan(o)
	return int(g.maxLive()), err
}

// Bytes returns the arena bytes of the records of these keys.
func (w *Writer) Bytes() int64 { return w.Stats().LiveBytes }

// Evictions returns how many keys were forgotten for lack of space.
func (w *Writer) Evictions() uint64 { return w.Stats().Evictions }

// Range calls fn for every key until it returns false, in index order. It holds the
// writer's mutex: fn must not call the writer and must not keep value.
func (w *Writer) Range(fn func(key string, e Entry, value []byte) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var buf []byte
	for i, m := range w.meta {
		if m&metaLive == 0 {
			continue
		}
		slot := uint64(i)
		stamp := atomic.LoadUint64(w.word(slot, slotStamp))
		rec := w.record(atomic.LoadUint64(w.word(slot, slotLocation)))
		_, klen, vlen := unpackMeta(atomic.LoadUint64(&rec[recMeta]))
		key := make([]byte, klen)
		kw := words(klen)
		copySum(key, rec[recordHeader:recordHeader+kw])
		buf = append(buf[:0], make([]byte, vlen)...)
		copySum(buf, rec[recordHeader+kw:recordHeader+kw+words(vlen)])
		if !fn(string(key), Entry{State: State(stamp & stateMask), Slot: uint32(i), Stamp: stamp}, buf) {
			return
		}
	}
}
