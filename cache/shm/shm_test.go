//go:build linux

package shm

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

func mustCreate(t testing.TB, o Options) *Writer {
	t.Helper()
	w, err := Create(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

func mustPut(t testing.TB, w *Writer, key string, st State, value string) (uint32, uint64) {
	t.Helper()
	slot, stamp, err := w.Put(key, st, []byte(value))
	if err != nil {
		t.Fatal(err)
	}
	return slot, stamp
}

// The life of one key, as a reader and the holder of a copy see it.
func TestLifeOfAKey(t *testing.T) {
	w := mustCreate(t, Options{Heap: true, Bytes: 1 << 16})
	r := w.Reader()
	expect := func(st State, value string) Entry {
		t.Helper()
		e, got := r.Get("k", []byte("prefix-"))
		if e.State != st || string(got) != "prefix-"+value {
			t.Fatalf("read %+v %q, want %v %q", e, got, st, value)
		}
		return e
	}
	expect(Absent, "")
	slot, first := mustPut(t, w, "k", Present, "one")
	if e := expect(Present, "one"); e.Slot != slot || e.Stamp != first || r.Stamp(slot) != first {
		t.Fatalf("%+v, put said %d %#x", e, slot, first)
	}
	_, second, ok := w.Invalidate("k")
	if !ok || r.Stamp(slot) != second || second == first {
		t.Fatalf("after Invalidate: ok=%v stamp %#x, was %#x", ok, r.Stamp(slot), first)
	}
	expect(Invalid, "one") // the last value stays readable, marked
	mustPut(t, w, "k", Negative, "")
	expect(Negative, "")
	mustPut(t, w, "k", Present, "two")
	if !w.Remove("k") || w.Remove("k") {
		t.Fatal("Remove must report what it did")
	}
	expect(Absent, "")
	if _, _, ok := w.Invalidate("k"); ok {
		t.Fatal("Invalidate of an absent key reports ok")
	}
	if r.Stamp(1<<32-1) != 0 {
		t.Fatal("a slot out of range has a stamp")
	}
}

func TestHeaderWords(t *testing.T) {
	w := mustCreate(t, Options{Bytes: 4096, Generation: 41})
	f, err := w.Descriptor()
	if err != nil {
		t.Fatal(err)
	}
	r, err := Open(f)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if p, i := r.Head(); p != 0 || i != 0 || r.Lease() != 0 || r.Closed() || r.Generation() != 41 {
		t.Fatalf("fresh table: head %d %d lease %d closed %v generation %d", p, i, r.Lease(), r.Closed(), r.Generation())
	}
	w.SetLease(-5)
	for n := range uint64(3) {
		w.SetHead(100+n, 7+n)
		if p, i := r.Head(); p != 100+n || i != 7+n {
			t.Fatalf("head %d %d", p, i)
		}
	}
	w.Flush()
	if r.Lease() != -5 || r.Generation() != 42 {
		t.Fatalf("lease %d generation %d", r.Lease(), r.Generation())
	}
	mustPut(t, w, "k", Present, "v")
	if err := errors.Join(w.Close(), w.Close()); err != nil {
		t.Fatal(err)
	}
	if !r.Closed() || r.Lease() != 0 {
		t.Fatalf("after Close: closed %v lease %d", r.Closed(), r.Lease())
	}
	if e, _ := r.Get("k", nil); e.State != Present {
		t.Fatalf("a closed table must stay readable: %+v", e)
	}
	if _, _, err := w.Put("k", Present, nil); !outrigger.IsKind(err, outrigger.Unavailable) {
		t.Fatalf("Put after Close: %v", err)
	}
	if _, err := w.Descriptor(); !outrigger.IsKind(err, outrigger.Unavailable) {
		t.Fatalf("Descriptor after Close: %v", err)
	}
}

func TestLimits(t *testing.T) {
	for _, o := range []Options{{Bytes: 1}, {Bytes: -1}, {Slots: 100}, {Slots: 64}, {Slots: -128}, {Bytes: 1 << 50}, {Name: strings.Repeat("n", 250)}} {
		if _, err := Create(o); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%+v: %v, want kind invalid", o, err)
		}
	}
	w := mustCreate(t, Options{Heap: true, Bytes: 8 << 20})
	r := w.Reader()
	for _, c := range []struct {
		key   string
		st    State
		value int
		want  outrigger.Kind
	}{
		{"", Present, 1, outrigger.Invalid},
		{strings.Repeat("k", MaxKeyBytes+1), Present, 1, outrigger.Invalid},
		{"k", Absent, 1, outrigger.Invalid},
		{"k", 4, 1, outrigger.Invalid},
		{"k", Present, MaxValueBytes + 1, outrigger.Exhausted},
	} {
		mustPut(t, w, "k", Present, "old")
		if _, _, err := w.Put(c.key, c.st, make([]byte, c.value)); !outrigger.IsKind(err, c.want) {
			t.Errorf("key of %d bytes, state %d, %d bytes: %v, want kind %v", len(c.key), c.st, c.value, err, c.want)
		}
	}
	if e, _ := r.Get("k", nil); e.State != Absent {
		t.Errorf("a refused large value left the old one in place: %+v", e)
	}
	key := strings.Repeat("k", MaxKeyBytes)
	mustPut(t, w, key, Present, strings.Repeat("v", MaxValueBytes))
	if e, got := r.Get(key, nil); e.State != Present || len(got) != MaxValueBytes {
		t.Errorf("largest entry: %+v, %d bytes", e, len(got))
	}
	small := mustCreate(t, Options{Heap: true, Bytes: 4096})
	if _, _, err := small.Put("k", Present, make([]byte, 1100)); !outrigger.IsKind(err, outrigger.Exhausted) {
		t.Errorf("more than a quarter of the arena: %v", err)
	}
	if _, err := small.Descriptor(); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("descriptor of a heap table: %v", err)
	}
}

// A record whose place the writer has laid claim to is not read, however whole it looks:
// the next word of it may be written at any moment.
func TestClaimedPlaceIsNotRead(t *testing.T) {
	w := mustCreate(t, Options{Heap: true, Bytes: 4096, Slots: 256})
	r := w.Reader()
	slot, _ := mustPut(t, w, "key", Present, "value")
	loc, arena := w.index[slot*slotWords+slotLocation], w.geo.arenaWords
	for _, c := range []struct {
		intent uint64
		want   State
	}{{loc, Absent}, {loc + 1, Present}, {loc + arena, Present}, {loc + arena + 1, Absent}, {loc + 5*arena, Absent}} {
		w.store(&w.hdr[hdrIntent], c.intent)
		if e, _ := r.Get("key", nil); e.State != c.want || e.GaveUp != (c.want == Absent) {
			t.Errorf("intent %d, record at %d of %d: read %+v, want %v", c.intent, loc, arena, e, c.want)
		}
	}
	if r.GaveUp() != 3 {
		t.Errorf("counted %d reads given up, want 3", r.GaveUp())
	}
}

// Keys reported as read survive the pressure of keys that are asked for once.
func TestTouchedKeysSurvive(t *testing.T) {
	run := func(touch bool) (ratio float64) {
		w := mustCreate(t, Options{Heap: true, Bytes: 64 << 10, Slots: 512})
		r := w.Reader()
		rnd := rand.New(rand.NewPCG(9, 9))
		hits, value := 0, make([]byte, 200)
		const reads = 40_000
		for i := range reads {
			hot := rnd.IntN(10) < 7
			key := fmt.Sprint("cold-", i)
			if hot {
				key = fmt.Sprint("hot-", rnd.IntN(100))
			}
			e, _ := r.Get(key, nil)
			if e.State == Present {
				hits++
				if touch && i%4 == 0 { // hits are sampled
					w.Touch(Hash(key))
				}
				continue
			}
			if _, _, err := w.Put(key, Present, value); err != nil {
				t.Fatal(err)
			}
		}
		if w.Evictions() == 0 {
			t.Fatal("no pressure")
		}
		return float64(hits) / reads
	}
	without, second := run(false), run(true)
	t.Logf("hit ratio %.3f, %.3f with touches; 0.7 is the most possible", without, second)
	if second < 0.69 || second < without+0.01 {
		t.Errorf("hit ratio %.3f with touches, %.3f without", second, without)
	}
}

// Overwriting one key for ever makes garbage, not pressure: nothing may be evicted.
func TestGarbageDoesNotEvict(t *testing.T) {
	w := mustCreate(t, Options{Heap: true, Bytes: 256 << 10})
	for i := range 700 {
		mustPut(t, w, fmt.Sprint("cold-", i), Present, strings.Repeat("c", 200))
	}
	for range 20_000 {
		mustPut(t, w, "busy", Present, strings.Repeat("b", 200))
	}
	if s := w.Stats(); s.Evictions != 0 || s.Entries != 701 || s.Relocations == 0 {
		t.Errorf("%+v", s)
	}
}

func TestGetDoesNotAllocate(t *testing.T) {
	w := mustCreate(t, Options{Bytes: 1 << 20})
	_, _ = mustPut(t, w, "key", Present, strings.Repeat("v", 201))
	r, buf := w.Reader(), make([]byte, 0, 256)
	for name, f := range map[string]func(){
		"hit": func() { r.Get("key", buf) }, "miss": func() { r.Get("none", buf) },
		"stamp": func() { r.Stamp(3) }, "invalidate": func() { w.Invalidate("key") },
		"put": func() { w.Put("key", Present, buf[:201]) },
	} {
		if n := testing.AllocsPerRun(200, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// A million 200-byte values take less than 400 MiB, index included.
func TestMillionEntriesMemory(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("half a second and 340 MiB")
	}
	const n = 1_000_000
	w := mustCreate(t, Options{Bytes: 280 << 20, Slots: n * 3 / 2})
	value, key := make([]byte, 200), []byte("default/session/v-0000000")
	for i := range n {
		if _, _, err := w.Put(string(fmt.Appendf(key[:18], "%07d", i)), Present, value); err != nil {
			t.Fatal(err)
		}
	}
	s := w.Stats()
	t.Logf("%+v", s)
	if s.Entries != n || s.Evictions != 0 || s.TotalBytes+int64(len(w.meta)) > 400<<20 {
		t.Errorf("%d entries in %d MiB, %d evicted", s.Entries, s.TotalBytes>>20, s.Evictions)
	}
}

func TestRange(t *testing.T) {
	w := mustCreate(t, Options{Heap: true, Bytes: 1 << 16})
	want := map[string]string{}
	for i := range 50 {
		k, v := fmt.Sprint("key-", i), strings.Repeat("v", i)
		mustPut(t, w, k, Negative, v)
		want[k] = v
	}
	w.Remove("key-7")
	delete(want, "key-7")
	r := w.Reader()
	w.Range(func(key string, e Entry, value []byte) bool {
		if got, _ := r.Get(key, nil); got != e || want[key] != string(value) {
			t.Errorf("%s: %+v %q, the reader says %+v, put was %q", key, e, value, got, want[key])
		}
		delete(want, key)
		return true
	})
	if len(want) != 0 {
		t.Errorf("missing %v", want)
	}
	n := 0
	w.Range(func(string, Entry, []byte) bool { n++; return n < 3 })
	if n != 3 {
		t.Errorf("stopped after %d", n)
	}
}

// copySum must be XXH64, which the library computes for the writer, at every length.
func TestCopySum(t *testing.T) {
	src, scratch := make([]byte, 200), []byte(nil)
	for i := range src {
		src[i] = byte(i*37 + 1)
	}
	for n := range len(src) {
		ws := make([]uint64, words(n))
		(&Writer{}).storeBytes(ws, src[:n])
		got := make([]byte, n)
		if sum := copySum(got, ws); sum != sumBytes(src[:n], &scratch) || !bytes.Equal(got, src[:n]) {
			t.Fatalf("%d bytes: sum %#x, want %#x", n, sum, sumBytes(src[:n], &scratch))
		}
		if !equalBytes(ws, src[:n]) || n > 0 && equalBytes(ws, append(bytes.Clone(src[:n-1]), src[n-1]+1)) {
			t.Fatalf("equalBytes is wrong at %d bytes", n)
		}
	}
}
