package shm

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
)

// oracle is what a table must agree with: it may forget, but never be wrong.
type oracle struct {
	t      *testing.T
	w      *Writer
	r      *Reader
	vals   map[string]modelEntry
	issued map[uint64]string // every stamp ever handed out
	dead   map[uint64]uint32 // stamps that must not be current any more
	buf    []byte
}

type modelEntry struct {
	st    State
	value []byte
	slot  uint32
	stamp uint64
}

func newOracle(t *testing.T, o Options) *oracle {
	w, err := Create(o)
	if err != nil {
		t.Fatal(err)
	}
	return &oracle{t: t, w: w, r: w.Reader(), vals: map[string]modelEntry{}, issued: map[uint64]string{}, dead: map[uint64]uint32{}}
}

func (o *oracle) kill(key string) {
	if e, ok := o.vals[key]; ok {
		o.dead[e.stamp] = e.slot
	}
	delete(o.vals, key)
}

func (o *oracle) issue(key string, stamp uint64) {
	o.t.Helper()
	if was, ok := o.issued[stamp]; ok {
		o.t.Fatalf("stamp %#x of %q was handed out before, for %q", stamp, key, was)
	}
	o.issued[stamp] = key
}

func (o *oracle) put(key string, st State, value []byte) {
	o.t.Helper()
	slot, stamp, err := o.w.Put(key, st, value)
	if err != nil {
		o.t.Fatal(err)
	}
	o.issue(key, stamp)
	o.kill(key)
	o.vals[key] = modelEntry{st, bytes.Clone(value), slot, stamp}
	if e, _ := o.r.Get(key, nil); e.State != st || e.Stamp != stamp || e.Slot != slot {
		o.t.Fatalf("just put %q as %v/%d/%#x, read %+v", key, st, slot, stamp, e)
	}
}

func (o *oracle) invalidate(key string) {
	o.t.Helper()
	before, _ := o.r.Get(key, nil)
	slot, stamp, ok := o.w.Invalidate(key)
	if ok != (before.State != Absent) {
		o.t.Fatalf("invalidate %q: ok=%v, but it was %v", key, ok, before.State)
	}
	if !ok {
		return
	}
	o.issue(key, stamp)
	e := o.vals[key]
	o.kill(key)
	o.vals[key] = modelEntry{Invalid, e.value, slot, stamp}
}

// check compares one key; a key the table forgot is forgotten by the model too.
func (o *oracle) check(key string) {
	o.t.Helper()
	var e Entry
	e, o.buf = o.r.Get(key, o.buf[:0])
	want, ok := o.vals[key]
	switch {
	case e.GaveUp:
		o.t.Fatalf("reading %q gave up with no writer running", key)
	case e.State == Absent && !ok:
	case e.State == Absent:
		if o.r.Stamp(want.slot) == want.stamp {
			o.t.Fatalf("%q is gone but stamp %#x of slot %d is still current", key, want.stamp, want.slot)
		}
		o.kill(key)
	case !ok:
		o.t.Fatalf("%q was never put or is removed, read %+v", key, e)
	case e.State != want.st || e.Stamp != want.stamp || e.Slot != want.slot || !bytes.Equal(o.buf, want.value):
		o.t.Fatalf("%q: read %+v %q, want %+v", key, e, o.buf, want)
	case o.r.Stamp(e.Slot) != e.Stamp:
		o.t.Fatalf("%q: stamp %#x is not current", key, e.Stamp)
	}
}

func (o *oracle) checkAll(keys int) {
	o.t.Helper()
	for i := range keys {
		o.check(fmt.Sprintf("key-%d", i))
	}
	for stamp, slot := range o.dead {
		if o.r.Stamp(slot) == stamp {
			o.t.Fatalf("dead stamp %#x is current in slot %d", stamp, slot)
		}
	}
	if st := o.w.Stats(); st.Entries != len(o.vals) {
		o.t.Fatalf("table counts %d entries, %d are readable", st.Entries, len(o.vals))
	}
	checkInvariants(o.t, o.w)
}

// checkInvariants recomputes from the shared words what the writer keeps privately.
func checkInvariants(t *testing.T, w *Writer) {
	t.Helper()
	var live, liveWords uint64
	for i := range w.geo.slots {
		h, stamp := w.index[i*slotWords+slotHash], w.index[i*slotWords+slotStamp]
		isLive := w.meta[i]&metaLive != 0
		if isLive != (stamp&stateMask != 0) || (w.meta[i] == 0) != (h == 0) {
			t.Fatalf("slot %d: meta %#x, hash %#x, stamp %#x disagree", i, w.meta[i], h, stamp)
		}
		if h == 0 {
			continue
		}
		// Every used slot is there for a live key: its own, or one probed across it.
		needed := isLive
		for d := uint64(1); d < window && !needed; d++ {
			j := w.geo.plus(i, d)
			if w.meta[j] == 0 {
				break
			}
			needed = w.meta[j]&metaLive != 0 && w.geo.above(j, w.geo.home(w.index[j*slotWords+slotHash])) >= d
		}
		if !needed {
			t.Fatalf("slot %d is a tombstone no chain crosses", i)
		}
		if !isLive {
			continue
		}
		live++
		loc := w.index[i*slotWords+slotLocation]
		if loc < w.tail || loc >= w.next {
			t.Fatalf("slot %d points to %d, outside [%d, %d)", i, loc, w.tail, w.next)
		}
		liveWords += w.wordsAt(loc)
		for j := w.geo.home(h); j != i; j = w.geo.after(j) {
			if w.meta[j] == 0 {
				t.Fatalf("slot %d: its chain from %d is broken at %d", i, w.geo.home(h), j)
			}
		}
	}
	if live != w.live || liveWords != w.liveWords {
		t.Fatalf("counted %d live, %d words; the writer says %d, %d", live, liveWords, w.live, w.liveWords)
	}
	if w.next-w.tail > w.geo.arenaWords || liveWords > w.next-w.tail {
		t.Fatalf("arena: tail %d, next %d, live %d of %d words", w.tail, w.next, liveWords, w.geo.arenaWords)
	}
}

func TestAgainstModel(t *testing.T) {
	sizes := []struct {
		name   string
		o      Options
		keys   int
		maxLen int
	}{
		{"roomy", Options{Bytes: 1 << 20, Slots: 4096, Heap: true}, 500, 300},
		{"arena pressure", Options{Bytes: 16 << 10, Slots: 1024, Heap: true}, 300, 200},
		{"index pressure", Options{Bytes: 1 << 20, Slots: 259, Heap: true}, 400, 40},
		{"large values", Options{Bytes: 1 << 20, Slots: 256, Heap: true}, 60, 64 << 10},
		{"largest values", Options{Bytes: 8 << 20, Slots: 256, Heap: true}, 12, MaxValueBytes},
		{"mapped", Options{Bytes: 64 << 10, Slots: 256}, 300, 300},
	}
	for _, c := range sizes {
		for seed := range uint64(4) {
			t.Run(fmt.Sprintf("%s/%d", c.name, seed), func(t *testing.T) {
				o := newOracle(t, c.o)
				defer o.w.Close()
				rnd := rand.New(rand.NewPCG(seed, 7))
				steps := 6000
				if raceEnabled {
					steps = 400 // one goroutine: nothing to race
				}
				if c.maxLen == MaxValueBytes {
					steps /= 10 // of half a megabyte each
				}
				for step := range steps {
					o.step(rnd, c.keys, c.maxLen)
					if step%1000 == 999 || step == steps-1 {
						o.checkAll(c.keys)
					}
				}
			})
		}
	}
}

func (o *oracle) step(rnd *rand.Rand, keys, maxLen int) {
	key := fmt.Sprintf("key-%d", min(rnd.IntN(keys), rnd.IntN(keys)))
	switch p := rnd.IntN(1000); {
	case p < 450:
		v := make([]byte, rnd.IntN(maxLen+1))
		for i := 0; i < len(v); i += 1 + len(v)/64 {
			v[i] = byte(rnd.Uint32())
		}
		o.put(key, State(1+rnd.IntN(3)), v)
	case p < 600:
		o.invalidate(key)
	case p < 700:
		e, _ := o.r.Get(key, nil)
		if o.w.Remove(key) != (e.State != Absent) {
			o.t.Fatalf("Remove(%q) and Get disagree; it was %v", key, e.State)
		}
		o.kill(key)
	case p < 800:
		o.w.Touch(Hash(key))
	case p < 801:
		gen := o.r.Generation()
		o.w.Flush()
		for k := range o.vals {
			o.kill(k)
		}
		if o.r.Generation() == gen {
			o.t.Fatal("Flush kept the generation")
		}
	default:
		o.check(key)
	}
}
