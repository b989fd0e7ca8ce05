package admission

import "testing"

// Estimates are never below the true count, seldom above it, are halved in time, and grow
// with the sketch without getting lower.
func TestSketch(t *testing.T) {
	s := NewSketch()
	const keys, live = 1000, 1 << 20 // so many live entries that nothing is halved
	hash := func(i int) uint64 { return fold(uint64(i)+0x9e3779b97f4a7c15, 0xd1b54a32d192ed03) }
	hashes := make([]uint64, keys)
	for i := range hashes {
		hashes[i] = hash(i + 1)
	}
	s.Grow(keys)
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
			got := s.Estimate(k)
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
		s.Add(k, i%20, live)
	}
	check("counted", false)
	s.Grow(4 * keys)
	check("grown", false)
	before := s.added
	s.Add(hash(keys+1), 1, s.added/remembered)
	if s.added != (before+1)/2 {
		t.Fatalf("%d counted, then %d: not halved", before, s.added)
	}
	check("halved", true)
}
