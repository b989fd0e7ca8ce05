package tier

import (
	"fmt"
	"math/bits"
	"strings"
	"testing"
)

// Every byte of a key of any length matters, every seed matters, and the bits that choose
// shards and slots are spread evenly over keys that differ in little.
func TestHash(t *testing.T) {
	s := newHasher()
	seen := map[uint64]string{}
	see := func(key string) {
		h := s.hash(key)
		if other, ok := seen[h]; ok && other != key {
			t.Errorf("%q and %q have the hash %#x", key, other, h)
		}
		if h < first || h != s.hash(strings.Clone(key)) {
			t.Errorf("%q has the hash %#x, then %#x", key, h, s.hash(key))
		}
		seen[h] = key
	}
	for n := range 70 {
		see(strings.Repeat("\x00", n))
		for i := range n {
			b := []byte(strings.Repeat("a", n))
			b[i]++
			see(string(b))
		}
	}
	if other := newHasher(); other.hash("key") == s.hash("key") {
		t.Error("two hashers agree on a key")
	}

	const keys, cells = 1 << 16, 256
	var high, low [cells]int
	flips := 0
	for i := range keys {
		h := s.hash(fmt.Sprintf("tenant/session/name-%06d", i))
		high[h>>56]++
		low[h>>2%cells]++
		flips += bits.OnesCount64(h ^ s.hash(fmt.Sprintf("tenant/session/nbme-%06d", i)))
	}
	for name, counts := range map[string]*[cells]int{"high": &high, "low": &low} {
		square := 0.0
		for _, n := range counts {
			d := float64(n) - keys/cells
			square += d * d / (keys / cells)
		}
		if square > 400 { // 255 degrees of freedom: mean 255, standard deviation 22.6
			t.Errorf("%s bits: chi-square %.0f", name, square)
		}
	}
	if mean := float64(flips) / keys; mean < 30 || mean > 33 {
		t.Errorf("one changed byte changes %.1f bits of 63", mean)
	}
}
