package tier

import "testing"

// Estimates are never below the true count, seldom above it, are halved in time, and grow
// with the sketch without getting lower.
func TestSketch(t *testing.T) {
	s := newSketch()
	const keys, live = 1000, 1 << 20 // so many live entries that nothing is halved
	h := newHasher()
	hashes := make([]uint64, keys)
	for i := range hashes {
		hashes[i] = h.hash(string(rune(i + 1)))
	}
	s.grow(keys)
	if len(s.words) != 1024 {
		t.Fatalf("%d words for %d entries", len(s.words), keys)
	}
	check := func(when string, half bool) {
		t.Helper()
		over := 0
		for i, k := range hashes {
			want := uint64(i % 20)
			want = min(want, maxCount)
			if half {
				want /= 2
			}
			got := s.estimate(k)
			if got < want {
				t.Errorf("%s: key %d was counted %d times, the estimate is %d", when, i, want, got)
			}
			if got > want {
				over++
			}
		}
		if over > keys/20 {
			t.Errorf("%s: %d of %d estimates are too high", when, over, keys)
		}
	}
	for i, k := range hashes {
		s.add(k, i%20, live)
	}
	check("counted", false)
	s.grow(4 * keys)
	check("grown", false)
	before := s.added
	s.add(h.hash("one more"), 1, s.added/remembered)
	if s.added != (before+1)/2 {
		t.Fatalf("%d counted, then %d: not halved", before, s.added)
	}
	check("halved", true)
}
