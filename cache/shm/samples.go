package shm

import (
	"math"
	"math/bits"
	"sync/atomic"
)

// MaxSamples is how many hashes are kept between two calls of Samples.Take.
const MaxSamples = 4096

// Samples collects hashes of the keys that a reader's hits were for, for Writer.TouchAll.
// While there are few hits it takes all of them. Each time it has been given MaxSamples
// between two calls of Take it halves the part it takes, and after a call that found less
// than a quarter of that it doubles it again. Beyond MaxSamples the last ones stay.
//
// Which hits it takes follows from their numbers alone, by multiples of the golden ratio
// (Knuth, The Art of Computer Programming, vol. 3, 6.4), so that no part of a round that a
// program makes through its keys is left out for good, as it would be by every eighth.
//
// The zero value is ready. All methods may be called from any goroutine, Take from one at a
// time; neither waits, and Add allocates nothing. A hash that is added while Take runs may be
// lost or be returned by the next call.
type Samples struct {
	skip atomic.Uint32 // log2 of one in how many is taken; read for each hit
	_    [60]byte
	next atomic.Uint64
	_    [56]byte
	ring [MaxSamples]atomic.Uint64
}

// Wants reports whether a hit should be added, by its number among the reader's hits.
func (s *Samples) Wants(hit uint64) bool {
	return hit*0x9e3779b97f4a7c15 <= math.MaxUint64>>s.skip.Load()
}

// Add takes the Hash of a key whose hit is wanted.
func (s *Samples) Add(hash uint64) {
	n := s.next.Add(1) - 1
	s.ring[n%MaxSamples].Store(hash)
	if n%MaxSamples == MaxSamples-1 {
		s.skip.Add(1) // 2^52 additions before it is 40
	}
}

// Take appends what was collected since the last call to dst and says for how many hits
// each stands, roughly.
func (s *Samples) Take(dst []uint64) (hashes []uint64, weight int) {
	skip, n := int(s.skip.Load()), s.next.Swap(0)
	for i := range min(n, MaxSamples) {
		if h := s.ring[i].Swap(0); h != 0 {
			dst = append(dst, h)
		}
	}
	if n < MaxSamples/4 && skip > 0 {
		s.skip.Add(^uint32(0))
	}
	return dst, 1 << min(skip, bits.Len(MaxWeight))
}
