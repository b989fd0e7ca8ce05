package shm

import (
	"encoding/binary"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

// Options configure a table.
type Options struct {
	Bytes      int64  // arena bytes, 4 KiB to 1 TiB, rounded up to pages; 0 means 64 MiB
	Slots      int    // index slots, from 256; 0 derives it from Bytes
	Name       string // shown in /proc/<pid>/maps; 0 to 249 bytes
	Heap       bool   // private heap memory instead of a shared file: same code, no Descriptor
	Generation uint64 // first generation reported to readers; 0 takes the wall clock in nanoseconds
}

// Writer owns a table. There is exactly one per table.
type Writer struct {
	mem *memory
	geo geometry

	hdr   []uint64
	index []uint64
	arena []uint64

	mu         sync.Mutex // guards everything below and all stores but the lease
	meta       []uint8    // per slot: occupied, tombstone, second chances left
	stamp      uint64     // last one issued, without state bits
	generation uint64
	heads      uint64
	next       uint64 // logical end of the arena's records
	tail       uint64 // logical start of the oldest record not yet reclaimed
	liveWords  uint64
	live       uint64
	evictions  uint64
	policy     policy // what leaves when there is no room
	relocated  uint64
	closed     bool
	scratch    []byte
	observe    func() // called after every store; nil outside tests
}

const (
	metaLive  = 1 << 7
	metaTomb  = 1 << 6
	metaNew   = 1 << 5 // a newcomer, see policy
	metaRefs  = 3      // second chances, saturating
	metaFresh = metaLive
)

// Create makes an empty table. Errors have kind Invalid for bad options, Exhausted or
// Unavailable when the system refuses the memory.
func Create(o Options) (*Writer, error) {
	return create(o, uint64(time.Now().UnixNano()))
}

// create is Create with the clock passed in.
func create(o Options, now uint64) (*Writer, error) {
	g, err := plan(o)
	if err != nil {
		return nil, err
	}
	if o.Name == "" {
		o.Name = "outrigger-table"
	}
	mem := (*memory)(nil)
	if o.Heap {
		mem = heapMemory(g.totalWords())
	} else if mem, err = createMemory(o.Name, g.totalWords()); err != nil {
		return nil, err
	}
	w := &Writer{mem: mem, geo: g, meta: make([]uint8, g.slots), generation: o.Generation}
	w.stamp = now & (1<<(64-stateBits) - 1)
	if w.generation == 0 {
		w.generation = now
	}
	w.hdr, w.index, w.arena = split(mem.words, g)
	atomic.StoreUint64(&w.hdr[hdrGeneration], w.generation)
	writeIdentity(w.hdr, g)
	return w, nil
}

// Descriptor returns a fresh read-only descriptor of the table, for a reader process to
// pass to Open. The caller closes it. It fails with kind Invalid for a heap table and
// Unavailable after Close.
func (w *Writer) Descriptor() (*os.File, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.closed:
		return nil, errClosed()
	case w.mem.file == nil:
		return nil, outrigger.Errorf(outrigger.Invalid, "a heap table has no descriptor; use Reader, or create it without Options.Heap")
	}
	return w.mem.readOnly()
}

// Reader returns a reader of the same memory within this process.
func (w *Writer) Reader() *Reader {
	r := &Reader{mem: w.mem, geo: w.geo}
	r.hdr, r.index, r.arena = split(w.mem.words, w.geo)
	return r
}

// Put stores value under key with state Present, Negative or Invalid and returns the slot
// and stamp a reader of it will see. The bytes are copied. Errors: Invalid for a key or
// state out of bounds, Exhausted for a value that is too large (the key is then removed,
// so that no older value survives), Unavailable after Close.
func (w *Writer) Put(key string, st State, value []byte) (slot uint32, stamp uint64, err error) {
	if len(key) == 0 || len(key) > MaxKeyBytes {
		return 0, 0, outrigger.Errorf(outrigger.Invalid, "key is %d bytes, give 1 to %d", len(key), MaxKeyBytes)
	}
	if st != Present && st != Negative && st != Invalid {
		return 0, 0, outrigger.Errorf(outrigger.Invalid, "state %d cannot be put; use Remove for absent", st)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return 0, 0, errClosed()
	}
	hash := Hash(key)
	if n := recordWords(len(key), len(value)); len(value) > MaxValueBytes || n > w.geo.maxRecordWords() {
		if i, ok := w.find(key, hash); ok {
			w.drop(i)
		}
		return 0, 0, outrigger.Errorf(outrigger.Exhausted, "value of %d bytes does not fit the shared table (limit %d, and a record of %d bytes in this arena); read it from the origin",
			len(value), MaxValueBytes, w.geo.maxRecordWords()*8)
	}
	i, s := w.put(key, hash, st, value)
	return uint32(i), s, nil
}

// Invalidate marks key as stale with a new stamp, in one atomic store: from then on no
// reader takes the value for current and no copy of it compares as current. It returns
// ok=false and does nothing for a key the table does not hold.
func (w *Writer) Invalidate(key string) (slot uint32, stamp uint64, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	i, ok := w.find(key, Hash(key))
	if !ok {
		return 0, 0, false
	}
	return uint32(i), w.publish(i, Invalid), true
}

// Remove forgets key and reports whether the table held it.
func (w *Writer) Remove(key string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	i, ok := w.find(key, Hash(key))
	if ok {
		w.drop(i)
	}
	return ok
}

// Flush forgets everything and begins the next generation. When it returns every stamp
// handed out before is dead. Keys die one after the other; a caller that needs them to
// die together lets the lease lapse first.
func (w *Writer) Flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, m := range w.meta {
		if m == 0 {
			continue
		}
		if m&metaLive != 0 {
			w.publish(uint64(i), Absent)
		}
		w.store(w.word(uint64(i), slotHash), 0)
		w.meta[i] = 0
	}
	w.tail, w.liveWords, w.live = w.next, 0, 0
	w.policy.flushed()
	w.generation++
	w.store(&w.hdr[hdrGeneration], w.generation)
}

// Touch tells the eviction policy that a key with this Hash was read lately, as sampled
// by the readers, whose hits the writer cannot see. It reports whether the table holds it.
func (w *Writer) Touch(hash uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.touch(hash, 1)
}

// touchBatch is how many touches are made before others get the mutex: some 20 µs of work.
const touchBatch = 256

// TouchAll is Touch for many hashes, of which each stands for that many reads (1 to
// MaxWeight, others count as the nearest of these), and returns how many the table holds.
func (w *Writer) TouchAll(hashes []uint64, weight int) (held int) {
	weight = min(max(1, weight), MaxWeight)
	for len(hashes) > 0 {
		n := min(len(hashes), touchBatch)
		held += w.touchSome(hashes[:n], weight)
		hashes = hashes[n:]
	}
	return held
}

func (w *Writer) touchSome(hashes []uint64, weight int) (held int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, h := range hashes {
		if w.touch(h, weight) {
			held++
		}
	}
	return held
}

func (w *Writer) touch(hash uint64, weight int) bool {
	w.asked(hash, weight)
	i := w.geo.home(hash)
	for range window {
		switch h := atomic.LoadUint64(w.word(i, slotHash)); {
		case h == 0:
			return false
		case h == hash && w.meta[i]&metaLive != 0:
			if w.meta[i]&metaRefs < metaRefs {
				w.meta[i]++
			}
			return true
		}
		i = w.geo.after(i)
	}
	return false
}

// SetLease publishes the instant, in nanoseconds of CLOCK_MONOTONIC, until which readers
// may take the table for fresh; 0 withdraws it. It never waits for another method.
func (w *Writer) SetLease(untilMonoNano int64) {
	atomic.StoreUint64(&w.hdr[hdrLease], uint64(untilMonoNano))
}

// SetHead publishes the feed position, and the incarnation of its log, that the table
// includes.
func (w *Writer) SetHead(position, incarnation uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := w.heads + 1
	pair := hdrHead + n%2*2
	w.store(&w.hdr[pair], position)
	w.store(&w.hdr[pair+1], incarnation)
	w.store(&w.hdr[hdrHeads], n)
	w.heads = n
}

// Close retires the table: readers see Closed and keep reading what is there until they
// have a new one. The lease is withdrawn. Close is idempotent.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	w.closed = true
	w.SetLease(0)
	atomic.StoreUint64(&w.hdr[hdrClosed], 1)
	if w.mem.file == nil {
		return nil
	}
	return outrigger.Wrap(outrigger.Internal, w.mem.file.Close(), "closing the shared table")
}

func errClosed() error {
	return outrigger.Errorf(outrigger.Unavailable, "the shared table is closed; open the new one")
}

// word returns the address of a slot's word.
func (w *Writer) word(slot, field uint64) *uint64 { return &w.index[slot*slotWords+field] }

// store is how the writer changes shared memory. Tests observe the table after each one,
// since that is where a crash may leave it.
func (w *Writer) store(p *uint64, v uint64) {
	atomic.StoreUint64(p, v)
	if w.observe != nil {
		w.observe()
	}
}

// storeBytes stores b into words(len(b)) words; the last one is padded with zeros.
func (w *Writer) storeBytes(dst []uint64, b []byte) {
	for i := range dst {
		if len(b) < 8 {
			w.store(&dst[i], tail(b))
			return
		}
		w.store(&dst[i], binary.LittleEndian.Uint64(b))
		b = b[8:]
	}
}

// publish gives a slot a new stamp with state st: the one store that makes every copy of
// what the slot held before obsolete.
func (w *Writer) publish(slot uint64, st State) uint64 {
	w.stamp++
	s := w.stamp<<stateBits | uint64(st)
	w.store(w.word(slot, slotStamp), s)
	return s
}
