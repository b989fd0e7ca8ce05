package shm

import (
	"bytes"
	"fmt"
	"testing"
)

// A writer may die, and a reader may run, between any two of its stores. This test stops
// after every single store of a long script on a tiny table (so that evictions,
// relocations, skipped ends and index pressure all occur) and reads every key: each must
// be as before the operation, as after it, or unknown. Nothing else, ever.
func TestEveryStoreIsASafePlaceToCrash(t *testing.T) {
	w, err := Create(Options{Bytes: 4096, Slots: 256, Heap: true})
	if err != nil {
		t.Fatal(err)
	}
	r := w.Reader()
	const keys = 24
	name := func(i int) string { return fmt.Sprintf("key-%02d", i) }
	before := make([]modelEntry, keys) // what each key was when the operation began
	var target int                     // the key it works on; -1 for all of them
	var after modelEntry
	stores := 0
	var buf []byte
	w.observe = func() {
		stores++
		for i := range keys {
			var e Entry
			e, buf = r.Get(name(i), buf[:0])
			same := func(m modelEntry) bool {
				return e.State == m.st && bytes.Equal(buf, m.value)
			}
			if e.State == Absent || same(before[i]) && e.Stamp == before[i].stamp {
				continue
			}
			if i != target || !same(after) || e.Stamp == before[i].stamp {
				t.Fatalf("store %d, working on %d: %s reads %+v %q; before %+v, after %+v", stores, target, name(i), e, buf, before[i], after)
			}
			// Once the new state shows, no copy of the old one may be current.
			if before[i].st != Absent && r.Stamp(before[i].slot) == before[i].stamp {
				t.Fatalf("store %d: %s shows its new state while stamp %#x is current", stores, name(i), before[i].stamp)
			}
		}
	}
	ops := 3000
	if raceEnabled {
		ops = 600 // one goroutine: the detector has nothing to find, only time to take
	}
	for op := range ops {
		target = (op * 7) % keys
		if op%3 == 0 {
			target %= 5 // a hot subset, so that dead records arise
		}
		after = modelEntry{}
		switch {
		case op%500 == 499:
			target = -1
			w.Flush()
		case op%11 == 3:
			after = modelEntry{st: Invalid, value: before[target].value}
			w.Invalidate(name(target))
		case op%11 == 5:
			w.Remove(name(target))
		case op%11 == 7:
			w.Touch(Hash(name(target)))
		default:
			after = modelEntry{st: State(1 + op%3), value: bytes.Repeat([]byte{byte(op)}, op%400)}
			if _, _, err := w.Put(name(target), after.st, after.value); err != nil {
				t.Fatal(err)
			}
		}
		for i := range keys {
			e, v := r.Get(name(i), nil)
			if e.GaveUp {
				t.Fatalf("op %d: reading %s gave up between operations", op, name(i))
			}
			before[i] = modelEntry{e.State, v, e.Slot, e.Stamp}
		}
	}
	s := w.Stats()
	if s.Evictions == 0 || s.Relocations == 0 || stores < 10*ops || r.Corrupt() != 0 {
		t.Fatalf("the script was too tame: %d stores, %+v", stores, s)
	}
}
