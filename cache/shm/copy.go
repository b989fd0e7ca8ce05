package shm

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"

	"github.com/cespare/xxhash/v2"
)

// The primes of XXH64.
const (
	prime1 uint64 = 11400714785074694791
	prime2 uint64 = 14029467366897019727
	prime3 uint64 = 1609587929392839161
	prime4 uint64 = 9650029242287828579
	prime5 uint64 = 2870177450012600261
)

// checksum covers the value and, through their words, everything else of a record. sum
// is the XXH64 of the value padded with zeros to whole words.
func checksum(meta, stamp, hash, sum uint64) uint64 {
	return sum ^ hash ^ bits.RotateLeft64(stamp, 32) ^ meta*prime1
}

// sumBytes returns what copySum will return for b stored as words, computed by the
// library. scratch is reused.
func sumBytes(b []byte, scratch *[]byte) uint64 {
	if len(b)%8 == 0 {
		return xxhash.Sum64(b)
	}
	var zeros [8]byte
	*scratch = append(append((*scratch)[:0], b...), zeros[len(b)%8:]...)
	return xxhash.Sum64(*scratch)
}

// copySum fills b from src, word by word, and returns the XXH64 of these words. Hashing
// on the way saves the second pass over the value. len(src) must be words(len(b)).
func copySum(b []byte, src []uint64) uint64 {
	n, h := uint64(len(src))*8, prime5
	if len(src) >= 4 {
		v1, v2, v3, v4 := prime2, prime2, uint64(0), uint64(0)
		v1 += prime1
		v4 -= prime1
		for len(src) >= 4 {
			s := (*[4]uint64)(src)
			w1, w2 := atomic.LoadUint64(&s[0]), atomic.LoadUint64(&s[1])
			w3, w4 := atomic.LoadUint64(&s[2]), atomic.LoadUint64(&s[3])
			v1, v2, v3, v4 = round(v1, w1), round(v2, w2), round(v3, w3), round(v4, w4)
			src = src[4:]
			if len(b) < 32 { // the last word is a partial one
				putWords(b[:24:24], w1, w2, w3)
				putTail(b[24:], w4)
				b = nil
				break
			}
			d := (*[32]byte)(b)
			putWords(d[:24], w1, w2, w3)
			binary.LittleEndian.PutUint64(d[24:], w4)
			b = b[32:]
		}
		h = bits.RotateLeft64(v1, 1) + bits.RotateLeft64(v2, 7) + bits.RotateLeft64(v3, 12) + bits.RotateLeft64(v4, 18)
		h = merge(merge(merge(merge(h, v1), v2), v3), v4)
	}
	h += n
	for i := range src {
		w := atomic.LoadUint64(&src[i])
		if len(b) >= 8 {
			binary.LittleEndian.PutUint64(b, w)
			b = b[8:]
		} else {
			putTail(b, w)
		}
		h = bits.RotateLeft64(h^round(0, w), 27)*prime1 + prime4
	}
	h ^= h >> 33
	h *= prime2
	h ^= h >> 29
	h *= prime3
	return h ^ h>>32
}

func round(v, w uint64) uint64 { return bits.RotateLeft64(v+w*prime2, 31) * prime1 }

func merge(h, v uint64) uint64 { return (h^round(0, v))*prime1 + prime4 }

func putWords(b []byte, w1, w2, w3 uint64) {
	d := (*[24]byte)(b)
	binary.LittleEndian.PutUint64(d[:], w1)
	binary.LittleEndian.PutUint64(d[8:], w2)
	binary.LittleEndian.PutUint64(d[16:], w3)
}

func putTail(b []byte, w uint64) {
	for i := range b {
		b[i] = byte(w >> (8 * i))
	}
}

// equalBytes compares b with the words that hold a byte string of the same length.
func equalBytes(src []uint64, b []byte) bool {
	for len(b) >= 8 && len(src) > 0 {
		if binary.LittleEndian.Uint64(b) != atomic.LoadUint64(&src[0]) {
			return false
		}
		b, src = b[8:], src[1:]
	}
	return len(b) == 0 || len(src) > 0 && atomic.LoadUint64(&src[0]) == tail(b)
}

// tail packs fewer than eight bytes into a word.
func tail(b []byte) uint64 {
	var w uint64
	for i, c := range b {
		w |= uint64(c) << (8 * i)
	}
	return w
}
