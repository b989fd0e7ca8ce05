//go:build linux

package loop

import (
	"testing"

	"pgregory.net/rapid"
)

// TestWheelLaw: whatever is set, moved and removed, an entry comes up when its slot has
// passed: never before its deadline's tick, and at the latest one tick after it, or a turn
// of the wheel after it was set if that is sooner (it is then set again). next never
// promises later than the earliest entry.
func TestWheelLaw(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const tick, n = 10, 20
		w := wheel{tick: tick}
		var timers [n]timer
		want := map[*timer]int64{} // deadline of what is set
		now := int64(0)
		advance := func(to int64) {
			now = to
			w.advance(now, func(e *timer) {
				deadline, ok := want[e]
				switch {
				case !ok:
					t.Fatal("an entry that is not set came up")
				case deadline <= now:
					delete(want, e)
				default:
					w.set(e, deadline) // came early: look again, as the loop does
				}
			})
			for _, d := range want {
				if d+tick <= now {
					t.Fatalf("at %d an entry due %d has not come up", now, d)
				}
			}
		}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			e := &timers[rapid.IntRange(0, n-1).Draw(t, "which")]
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0, 1:
				d := now + rapid.Int64Range(0, 3*wheelSlots*tick).Draw(t, "in")
				w.set(e, d)
				want[e] = d
			case 2:
				w.remove(e)
				delete(want, e)
			case 3:
				advance(now + rapid.Int64Range(0, 2*wheelSlots*tick).Draw(t, "pass"))
			}
			if w.n != len(want) {
				t.Fatalf("%d entries, want %d", w.n, len(want))
			}
			next := w.next()
			if (next < 0) != (len(want) == 0) {
				t.Fatalf("next %d with %d entries", next, len(want))
			}
			for _, d := range want {
				if next > d+tick {
					t.Fatalf("next is %d, an entry is due %d", next, d)
				}
			}
		}
		// By following next alone everything comes up.
		for range 10 * n {
			if next := w.next(); next >= 0 {
				advance(max(next, now))
			}
		}
		if len(want) > 0 || w.n > 0 {
			t.Fatalf("%d entries never came up", len(want))
		}
	})
}
