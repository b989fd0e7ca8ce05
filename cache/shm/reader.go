package shm

import (
	"os"
	"runtime"
	"slices"
	"sync/atomic"
)

// Entry is what a read found.
type Entry struct {
	State State
	// GaveUp is set with Absent when the slot kept changing or was damaged: the key may
	// well be in the table. Ask the agent as for any Absent.
	GaveUp bool
	Slot   uint32 // meaningful unless Absent
	Stamp  uint64 // meaningful unless Absent; see Reader.Stamp
}

// Reader reads a table. It holds no descriptor, only the mapping; drop it to release that.
type Reader struct {
	mem   *memory
	geo   geometry
	hdr   []uint64
	index []uint64
	arena []uint64

	gaveUp  atomic.Uint64
	corrupt atomic.Uint64
}

// Open maps the table behind f read-only and checks that it is one (see the package
// comment). The caller still owns f and may close it at once. Errors have kind Invalid
// for a foreign or damaged file, Exhausted when it cannot be mapped.
func Open(f *os.File) (*Reader, error) {
	mem, err := openMemory(f)
	if err != nil {
		return nil, err
	}
	return newReader(mem)
}

func newReader(mem *memory) (*Reader, error) {
	g, err := readIdentity(mem.words)
	if err != nil {
		return nil, err
	}
	r := &Reader{mem: mem, geo: g}
	r.hdr, r.index, r.arena = split(mem.words, g)
	return r, nil
}

func split(w []uint64, g geometry) (hdr, index, arena []uint64) {
	a := headerWords + g.indexWords()
	return w[:headerWords:headerWords], w[headerWords:a:a], w[a:g.totalWords()]
}

// Get looks key up and appends its value to dst, without allocating when dst has room.
// When nothing is found it returns dst unchanged.
func (r *Reader) Get(key string, dst []byte) (Entry, []byte) {
	h := Hash(key)
	i := r.geo.home(h)
	for range window {
		switch atomic.LoadUint64(&r.index[i*slotWords+slotHash]) {
		case h:
			e, out, done := r.read(i, key, h, dst)
			if done {
				runtime.KeepAlive(r)
				return e, out
			}
		case 0:
			runtime.KeepAlive(r)
			return Entry{}, dst
		}
		i = r.geo.after(i)
	}
	runtime.KeepAlive(r)
	return Entry{}, dst
}

// read takes one consistent copy out of slot i. done is false when the slot does not
// hold key, so that probing goes on.
func (r *Reader) read(i uint64, key string, hash uint64, dst []byte) (e Entry, out []byte, done bool) {
	ix := r.index[i*slotWords : i*slotWords+slotWords]
	for range maxTries {
		stamp := atomic.LoadUint64(&ix[slotStamp])
		st := State(stamp & stateMask)
		if st == Absent {
			return Entry{}, dst, false
		}
		loc := atomic.LoadUint64(&ix[slotLocation])
		value, sum, match := r.copyRecord(loc, stamp, key, hash, dst)
		// The copy is sound if its place was left alone meanwhile. That the stamp is still
		// the same is asked as well, so that a reader descheduled half-way does not come
		// back with a value invalidated long since.
		if match == retry || !r.intact(loc) || atomic.LoadUint64(&ix[slotStamp]) != stamp {
			continue
		}
		if match == other {
			return Entry{}, dst, false
		}
		if !sum {
			r.corrupt.Add(1)
			return Entry{GaveUp: true}, dst, true
		}
		return Entry{State: st, Slot: uint32(i), Stamp: stamp}, value, true
	}
	r.gaveUp.Add(1)
	return Entry{GaveUp: true}, dst, true
}

type match uint8

const (
	same  match = iota // the record holds the key
	other              // the record holds another key, or is damaged
	retry              // the record does not belong to the stamp: a Put is in between
)

// copyRecord copies what is at loc. Nothing it returns may be trusted before the caller
// has checked that the record was intact throughout.
func (r *Reader) copyRecord(loc, stamp uint64, key string, hash uint64, dst []byte) (out []byte, sum bool, m match) {
	pos := loc % r.geo.arenaWords
	if pos+recordHeader > r.geo.arenaWords {
		return dst, false, other
	}
	rec := r.arena[pos:]
	meta := atomic.LoadUint64(&rec[recMeta])
	_, klen, vlen := unpackMeta(meta)
	if klen != len(key) || vlen > MaxValueBytes || recordWords(klen, vlen) > uint64(len(rec)) {
		return dst, false, other
	}
	kw := words(klen)
	if !equalBytes(rec[recordHeader:recordHeader+kw], bytesOf(key)) {
		return dst, false, other
	}
	rs := atomic.LoadUint64(&rec[recStamp])
	if rs > stamp || rs != stamp && State(stamp&stateMask) != Invalid {
		return dst, false, retry
	}
	out = slices.Grow(dst, vlen)[:len(dst)+vlen]
	value := out[len(dst):]
	s := copySum(value, rec[recordHeader+kw:recordHeader+kw+words(vlen)])
	return out, checksum(meta, rs, hash, s) == atomic.LoadUint64(&rec[recSum]), same
}

// intact reports whether the writer has not begun to overwrite what lies at loc.
func (r *Reader) intact(loc uint64) bool {
	return atomic.LoadUint64(&r.hdr[hdrIntent])-loc-1 < r.geo.arenaWords
}

// Stamp returns the present stamp of a slot; 0 for a slot the table does not have. It is
// one atomic load. A copy taken at stamp s is current if and only if Stamp(slot) == s.
func (r *Reader) Stamp(slot uint32) uint64 {
	if uint64(slot) >= r.geo.slots {
		return 0
	}
	s := atomic.LoadUint64(&r.index[uint64(slot)*slotWords])
	runtime.KeepAlive(r)
	return s
}

// Lease returns the instant, in nanoseconds of CLOCK_MONOTONIC, until which the writer
// vouches for the table; 0 when it never did.
func (r *Reader) Lease() int64 {
	v := int64(atomic.LoadUint64(&r.hdr[hdrLease]))
	runtime.KeepAlive(r)
	return v
}

// Head returns the feed position and log incarnation the table is known to include, both
// from the same SetHead; zeros before the first.
func (r *Reader) Head() (position, incarnation uint64) {
	defer runtime.KeepAlive(r)
	for range maxTries {
		n := atomic.LoadUint64(&r.hdr[hdrHeads])
		pair := hdrHead + n%2*2
		position = atomic.LoadUint64(&r.hdr[pair])
		incarnation = atomic.LoadUint64(&r.hdr[pair+1])
		// The writer fills the other pair before it moves on, so an unchanged count
		// proves this one was left alone.
		if atomic.LoadUint64(&r.hdr[hdrHeads]) == n {
			return position, incarnation
		}
	}
	return 0, 0
}

// Generation returns the table's generation; it changes with every Flush, after the last
// entry of the generation before has died.
func (r *Reader) Generation() uint64 {
	v := atomic.LoadUint64(&r.hdr[hdrGeneration])
	runtime.KeepAlive(r)
	return v
}

// Closed reports whether the writer has retired the table: fetch a new descriptor. A
// writer that was killed cannot say so; its lease lapses instead.
func (r *Reader) Closed() bool {
	v := atomic.LoadUint64(&r.hdr[hdrClosed])
	runtime.KeepAlive(r)
	return v != 0
}

// GaveUp counts reads that found a slot changing maxTries times in a row.
func (r *Reader) GaveUp() uint64 { return r.gaveUp.Load() }

// Corrupt counts reads whose record failed its checksum although nothing wrote to it.
func (r *Reader) Corrupt() uint64 { return r.corrupt.Load() }
