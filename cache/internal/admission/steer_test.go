package admission

import (
	"math/rand/v2"
	"testing"
)

// What comes back soon moves the share, by how much its shard holds; what comes back late,
// twice, or never left does not. It stays between its bounds.
func TestShare(t *testing.T) {
	const live = 100
	key := func(i int) uint64 { return uint64(i)<<32 | uint64(i)<<1 | 2 }
	for _, c := range []struct {
		name string
		do   func(s *Steer)
		want float64
	}{
		{"nothing happened", func(*Steer) {}, LeastShare},
		{"one left and stays away", func(s *Steer) { s.Left(key(1), false); s.Missed(key(2), live) }, LeastShare},
		{"a recent one comes back", func(s *Steer) { s.Left(key(1), false); s.Missed(key(1), live) }, LeastShare + 0.01},
		{"twice for one departure", func(s *Steer) { s.Left(key(1), false); s.Missed(key(1), live); s.Missed(key(1), live) }, LeastShare + 0.01},
		{"after fifteen others", func(s *Steer) {
			for i := range 16 {
				s.Left(key(i), false)
			}
			s.Missed(key(0), live)
		}, LeastShare + 0.01},
		{"after sixteen others", func(s *Steer) {
			for i := range 17 {
				s.Left(key(i), false)
			}
			s.Missed(key(0), live)
		}, LeastShare},
		{"a frequent one comes back", func(s *Steer) { s.Share = 0.5; s.Left(key(1), true); s.Missed(key(1), live) }, 0.48},
		{"a frequent one at the least share", func(s *Steer) { s.Left(key(1), true); s.Missed(key(1), live) }, LeastShare},
		{"always recent ones", func(s *Steer) {
			for i := range live {
				s.Left(key(i), false)
				s.Missed(key(i), live)
			}
		}, MostShare},
		{"in a shard of one", func(s *Steer) { s.Left(key(1), false); s.Missed(key(1), 1) }, MostShare},
	} {
		s := NewSteer()
		s.Grow(live)
		c.do(&s)
		if d := s.Share - c.want; d < -1e-9 || d > 1e-9 {
			t.Errorf("%s: the share is %.3f, want %.3f", c.name, s.Share, c.want)
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
		s := NewSteer()
		s.Grow(live)
		h, seen := uint64(2), 0
		back := func(frequent bool) bool {
			h = fold(h, rowSeeds[0]) | 2
			s.Left(h, frequent)
			return s.Missed(h, live)
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
	g := newGhost()
	at := map[uint64]int{} // departure of a key, not yet taken
	remembered, due := 0, 0
	for n := 1; n < 20_000; n++ {
		g.grow(min(n, 1000))
		k := fold(uint64(rnd.IntN(3000))+0x9e3779b97f4a7c15, 0xd1b54a32d192ed03)
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
