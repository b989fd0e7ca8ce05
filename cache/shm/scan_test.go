package shm

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// all walks to the end in small steps and returns how often each key was found.
func (s *Scan) all() map[string]int {
	out := map[string]int{}
	for s.Next(7, func(key string) { out[key]++ }) {
	}
	return out
}

// A scan finds every key that is present or negative once, and no other, whatever the
// steps; bands by distance divide them from the newest to the oldest. An index larger than
// what was written is walked by records, another by slots.
func TestScan(t *testing.T) {
	for _, c := range []struct {
		name    string
		slots   int
		records bool
	}{{"slots", 0, false}, {"records", 1 << 14, true}} {
		t.Run(c.name, func(t *testing.T) {
			w := mustCreate(t, Options{Heap: true, Bytes: 1 << 16, Slots: c.slots})
			testScan(t, w)
			if s := w.Reader().Scan(0, 0); s.records != c.records {
				t.Errorf("walks by records: %v", s.records)
			}
		})
	}
}

func testScan(t *testing.T, w *Writer) {
	const keys = 200
	want := map[string]int{}
	for i := range keys {
		k := fmt.Sprintf("key-%03d%s", i, strings.Repeat("x", i%9)) // all lengths of a last word
		mustPut(t, w, k, State(1+i%2), strings.Repeat("v", i))
		want[k] = 1
	}
	mustPut(t, w, "key-199x", Present, "anew") // leaves a record behind
	w.Remove("key-000")
	delete(want, "key-000")
	if _, _, ok := w.Invalidate("key-001x"); !ok {
		t.Fatal("not invalidated")
	}
	delete(want, "key-001x")
	r := w.Reader()
	if got := r.Scan(0, 0).all(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("found %v, want %v", got, want)
	}
	near, far := r.Scan(0, 8192).all(), r.Scan(8192, r.ArenaBytes()).all()
	if len(near) == 0 || len(far) == 0 || len(near)+len(far) != len(want) {
		t.Fatalf("%d near and %d far keys, together not %d", len(near), len(far), len(want))
	}
	for n := range near {
		for f := range far {
			if n <= f {
				t.Errorf("%s is near and %s, written later, is far", n, f)
			}
		}
	}
	s := r.Scan(0, 0)
	s.all()
	if s.Next(1000, func(key string) { t.Errorf("%s after the end", key) }) {
		t.Error("a scan that has ended goes on")
	}
}

// While the writer laps the arena again and again, a scan finds only whole keys that were
// put at some time, and gives nothing up that stays.
func TestScanOfALappedArena(t *testing.T) {
	w := mustCreate(t, Options{Heap: true, Bytes: 4096, Slots: 256})
	name := func(i int) string { return fmt.Sprintf("%06d-%s-%06d", i, strings.Repeat("x", i%40), i) }
	const puts = 20_000
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		defer close(stop)
		for i := range puts {
			mustPut(t, w, name(i), Present, "value")
		}
	})
	r := w.Reader()
	found := 0
	for done := false; !done; {
		select {
		case <-stop:
			done = true
		default:
		}
		s := r.Scan(0, 0)
		for s.Next(16, func(key string) {
			found++
			var i int
			if _, err := fmt.Sscanf(key, "%06d", &i); err != nil || key != name(i) {
				t.Errorf("found %q", key)
			}
		}) {
		}
	}
	wg.Wait()
	got := r.Scan(0, 0).all()
	if found == 0 || len(got) != w.Len() || got[name(puts-1)] != 1 {
		t.Errorf("%d found on the way; at the end %d of %d keys", found, len(got), w.Len())
	}
}

// A record that cannot be one does not end a scan: the slots know all keys.
func TestScanOfDamagedRecords(t *testing.T) {
	for name, meta := range map[string]uint64{
		"longer than what was written": packMeta(1, 3, MaxValueBytes),
		"an empty pad":                 padSlot << 32,
		"a slot beyond the index":      packMeta(1<<20, 3, 8),
	} {
		w := mustCreate(t, Options{Heap: true, Bytes: 1 << 16, Slots: 1 << 14})
		for i := range 20 {
			mustPut(t, w, fmt.Sprintf("key-%d", i), Present, "value")
		}
		w.Remove("key-3")
		r := w.Reader()
		at := uint64(0)
		for range 3 {
			at += w.wordsAt(at)
		}
		atomic.StoreUint64(&w.record(at)[recMeta], meta)
		got := r.Scan(0, 0).all()
		for i := range 20 {
			if n := got[fmt.Sprintf("key-%d", i)]; (n == 0) != (i == 3) {
				t.Errorf("%s: key-%d was found %d times", name, i, n)
			}
		}
	}
}
