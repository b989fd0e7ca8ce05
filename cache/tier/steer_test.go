package tier

import (
	"math/rand/v2"
	"testing"
)

// What comes back soon moves the share, by how much its shard holds; what comes back late,
// twice, or never left does not. It stays between its bounds.
func TestShare(t *testing.T) {
	const live = 100
	key := func(i int) uint64 { return uint64(i)<<32 | uint64(i)<<1 | first }
	for _, c := range []struct {
		name string
		do   func(s *steer)
		want float64
	}{
		{"nothing happened", func(*steer) {}, leastShare},
		{"one left and stays away", func(s *steer) { s.left(key(1), false); s.missed(key(2), live) }, leastShare},
		{"a recent one comes back", func(s *steer) { s.left(key(1), false); s.missed(key(1), live) }, leastShare + 0.01},
		{"twice for one departure", func(s *steer) { s.left(key(1), false); s.missed(key(1), live); s.missed(key(1), live) }, leastShare + 0.01},
		{"after fifteen others", func(s *steer) {
			for i := range 16 {
				s.left(key(i), false)
			}
			s.missed(key(0), live)
		}, leastShare + 0.01},
		{"after sixteen others", func(s *steer) {
			for i := range 17 {
				s.left(key(i), false)
			}
			s.missed(key(0), live)
		}, leastShare},
		{"a frequent one comes back", func(s *steer) { s.share = 0.5; s.left(key(1), true); s.missed(key(1), live) }, 0.48},
		{"a frequent one at the least share", func(s *steer) { s.left(key(1), true); s.missed(key(1), live) }, leastShare},
		{"always recent ones", func(s *steer) {
			for i := range live {
				s.left(key(i), false)
				s.missed(key(i), live)
			}
		}, mostShare},
		{"in a shard of one", func(s *steer) { s.left(key(1), false); s.missed(key(1), 1) }, mostShare},
	} {
		s := newSteer()
		s.grow(live)
		c.do(&s)
		if d := s.share - c.want; d < -1e-9 || d > 1e-9 {
			t.Errorf("%s: the share is %.3f, want %.3f", c.name, s.share, c.want)
		}
	}
}

// A shift is an excess of recent ones; frequent ones that come back weigh against it, four
// times.
func TestShift(t *testing.T) {
	const live = 200 // ten of them
	for _, c := range []struct {
		name  string
		every int // a frequent one after that many recent ones
		want  int // recent ones before a shift is seen; 0 for never
	}{{"recent ones alone", 0, 10}, {"seven to one", 7, 14}, {"four to one", 4, 0}, {"one to one", 1, 0}} {
		s := newSteer()
		s.grow(live)
		h, seen := uint64(first), 0
		back := func(frequent bool) bool {
			h = fold(h, rowSeeds[0]) | first
			s.left(h, frequent)
			return s.missed(h, live)
		}
		for n := 1; n <= 1000 && seen == 0; n++ {
			if back(false) {
				seen = n
			}
			if c.every > 0 && n%c.every == 0 && back(true) {
				t.Errorf("%s: a frequent one is no sign of a shift", c.name)
			}
		}
		if seen != c.want {
			t.Errorf("%s: a shift after %d, want %d", c.name, seen, c.want)
		}
	}
}

// A law: whatever happens the share is within its bounds, and a ghost remembers no key that
// it was not told, none twice and none beyond its depth.
func TestGhost(t *testing.T) {
	rnd := rand.New(rand.NewPCG(8, 9))
	h := hasher{rnd.Uint64(), rnd.Uint64()}
	g := newGhost()
	at := map[uint64]int{} // departure of a key, not yet taken
	remembered, due := 0, 0
	for n := 1; n < 20_000; n++ {
		g.grow(min(n, 1000))
		k := h.hash(string(rune(rnd.IntN(3000))))
		if rnd.IntN(2) == 0 {
			g.add(k)
			at[k] = int(g.last)
			continue
		}
		when, known := at[k]
		fits := known && int(g.last)-when <= 150
		if fits {
			due++
		}
		if g.take(k, 150) {
			remembered++
			if !fits {
				t.Fatalf("%#x is remembered; left at %d of %d", k, when, g.last)
			}
			delete(at, k)
			if g.take(k, 150) {
				t.Fatalf("%#x came back twice", k)
			}
		}
	}
	if remembered < due*3/4 || remembered < 200 {
		t.Errorf("%d of %d remembered", remembered, due)
	}
}
