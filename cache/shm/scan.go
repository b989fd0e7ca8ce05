package shm

import (
	"runtime"
	"sync/atomic"
)

// Scan walks the keys of a table, so that a process that has just attached can fetch what
// others on the node use. It belongs to one goroutine; Reader.Scan begins one.
//
// A scan takes no lock and stops nobody: the writer goes on meanwhile, keys it adds or
// drops may or may not be seen, and a key that changes its slot may be seen twice or not
// at all. A key that is seen was in the table, whole, at some moment of the scan. What it
// holds now only Get can say.
type Scan struct {
	r         *Reader
	front     uint64 // intent when the scan began: positions count back from here
	near, far uint64 // distances from front, in words, of the records that are wanted
	records   bool   // walk the records up to front, not the slots
	at        uint64 // the next record then, in words from the arena's start
	slot      uint64 // the next slot else
	buf       []byte
}

// Scan begins a walk over the keys whose records were written among the last far bytes of
// the arena, but not among the last near bytes; a far of 0 means all of it. The arena is
// written in order: near records are the newest ones or, once the arena is full, those that
// were moved lately to make room.
//
// While the records written so far take less room than the index, a walk goes along them and
// reads only memory that was written: a page nobody wrote that is read becomes a real one, of
// whoever read it, and the index of a table for many variables is megabytes. Else it reads
// the index, 24 bytes for each slot.
func (r *Reader) Scan(near, far int64) *Scan {
	s := &Scan{r: r, front: atomic.LoadUint64(&r.hdr[hdrIntent]), near: uint64(max(0, near)) / 8, far: uint64(max(0, far)) / 8}
	if s.far == 0 || s.far > r.geo.arenaWords {
		s.far = r.geo.arenaWords
	}
	if s.records = s.front <= min(r.geo.arenaWords, r.geo.slots*slotWords); s.records && s.near >= s.front {
		s.at = s.front // nothing lies that far back
	}
	runtime.KeepAlive(r)
	return s
}

// ArenaBytes returns the size of the arena: no record lies further back than that.
func (r *Reader) ArenaBytes() int64 { return int64(r.geo.arenaWords) * 8 }

// Next looks at up to that many slots, or records, from where the call before ended, and
// passes each key it finds in state Present or Negative to found. It returns false once all
// were looked at; found is not called any more then. It allocates only the keys.
func (s *Scan) Next(slots int, found func(key string)) bool {
	for ; s.records && slots > 0; slots-- {
		if s.at >= s.front {
			return false
		}
		if key, ok := s.record(); ok {
			found(key)
		}
	}
	if s.records {
		runtime.KeepAlive(s.r)
		return s.at < s.front
	}
	end := min(s.slot+uint64(max(0, slots)), s.r.geo.slots)
	for ; s.slot < end; s.slot++ {
		if key, ok := s.key(s.slot); ok {
			found(key)
		}
	}
	runtime.KeepAlive(s.r)
	return s.slot < s.r.geo.slots
}

// record reads the key of the record at s.at, if its slot still points there and it is
// wanted, and moves on. What cannot be a record, after the writer has lapped the scan or of
// a damaged table, makes the scan begin anew with the slots; keys may be found twice then.
func (s *Scan) record() (string, bool) {
	r, loc := s.r, s.at
	m := atomic.LoadUint64(&r.arena[loc+recMeta])
	if m == 0 { // being written: it is the last
		s.at = s.front
		return "", false
	}
	slot, klen, vlen := unpackMeta(m)
	size := recordWords(klen, vlen)
	if slot == padSlot {
		size = m & padSlot
	}
	if size == 0 || size > s.front-loc || slot != padSlot && slot >= r.geo.slots || !r.intact(loc) {
		s.records = false
		return "", false
	}
	s.at += size
	if slot == padSlot || atomic.LoadUint64(&r.index[slot*slotWords+slotLocation]) != loc {
		return "", false // what a key left behind
	}
	return s.key(slot)
}

// key reads the key in slot i, if its record is wanted.
func (s *Scan) key(i uint64) (string, bool) {
	r := s.r
	ix := r.index[i*slotWords : i*slotWords+slotWords]
	stamp := atomic.LoadUint64(&ix[slotStamp])
	if st := State(stamp & stateMask); st != Present && st != Negative {
		return "", false
	}
	hash, loc := atomic.LoadUint64(&ix[slotHash]), atomic.LoadUint64(&ix[slotLocation])
	// A record written since the scan began is nearest; the subtraction wraps for it.
	back := s.front - loc
	if int64(back) < 0 {
		back = 0
	}
	if back < s.near || back >= s.far {
		return "", false
	}
	pos := loc % r.geo.arenaWords
	if pos+recordHeader > r.geo.arenaWords {
		return "", false
	}
	rec := r.arena[pos:]
	_, klen, _ := unpackMeta(atomic.LoadUint64(&rec[recMeta]))
	if kw := words(klen); klen == 0 || recordHeader+kw > uint64(len(rec)) {
		return "", false
	}
	s.buf = append(s.buf[:0], make([]byte, klen)...)
	copySum(s.buf, rec[recordHeader:recordHeader+words(klen)])
	// As in Get: the copy is whole if its place was left alone. The hash, which is stored
	// elsewhere, speaks for the bytes, as the checksum does for a value.
	if !r.intact(loc) || atomic.LoadUint64(&ix[slotStamp]) != stamp {
		return "", false
	}
	key := string(s.buf)
	return key, Hash(key) == hash
}
