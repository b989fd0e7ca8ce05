package tier

import (
	"math/bits"
	"math/rand/v2"
)

// hasher hashes keys. It is the multiply-and-fold of wyhash (Wang Yi, final version 4),
// which the Go runtime, too, uses where a processor has no AES instructions. The seeds are
// random and secret, so nobody outside can choose keys that collide. hash/maphash reaches
// the runtime's hash through four calls, which this saves on every hit.
type hasher struct{ a, b uint64 }

func newHasher() hasher { return hasher{rand.Uint64(), rand.Uint64()} }

// hash returns at least first, so that no key has the tag of an empty slot.
func (s *hasher) hash(key string) uint64 {
	h := s.a
	rest := key
	for len(rest) > 16 {
		h = fold(word(rest)^h, word(rest[8:])^s.b)
		rest = rest[16:]
	}
	var x, y uint64
	switch n := len(rest); {
	case n >= 8:
		x, y = word(rest), word(rest[n-8:])
	case n >= 4:
		x, y = half(rest), half(rest[n-4:])
	case n > 0:
		x = uint64(rest[0]) | uint64(rest[n/2])<<8 | uint64(rest[n-1])<<16
	}
	return fold(fold(x^h, y^s.b), s.a^uint64(len(key))) | first
}

// fold multiplies to 128 bits and folds them.
func fold(x, y uint64) uint64 {
	hi, lo := bits.Mul64(x, y)
	return hi ^ lo
}

// word reads eight bytes; the compiler makes it one load, as it does half.
func word(s string) uint64 {
	_ = s[7]
	return uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24 |
		uint64(s[4])<<32 | uint64(s[5])<<40 | uint64(s[6])<<48 | uint64(s[7])<<56
}

func half(s string) uint64 {
	_ = s[3]
	return uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24
}
