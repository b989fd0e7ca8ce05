package admission

// Sketch estimates how often keys were asked for lately: a count-min sketch (Cormode and
// Muthukrishnan, "An Improved Data Stream Summary", J. Algorithms 2005) of four rows of
// 4-bit counters, whose counts are halved from time to time, as in TinyLFU (Einziger,
// Friedman and Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", ACM ToS 2017).
// An estimate is never too low, short of halving, and too high only by collisions. Build it
// with NewSketch.
type Sketch struct {
	words []uint64 // a power of two of them, 16 counters each
	added int      // since the last halving, halved with the counts
}

const (
	sketchRows = 4
	maxCount   = 15
	// remembered is how many uses are counted between two halvings, per entry.
	remembered = 20

	minSketch = 8
)

// NewSketch returns an empty one, for a few entries.
func NewSketch() Sketch { return Sketch{words: make([]uint64, minSketch)} }

// rowSeeds are odd constants without a pattern: the fractional digits of pi.
var rowSeeds = [sketchRows]uint64{0x243f6a8885a308d3, 0x13198a2e03707345, 0xa4093822299f31d1, 0x082efa98ec4e6c89}

// at returns the word and shift of a hash's counter in a row. It uses the hash's low bits
// for the word, so that Grow keeps what was counted.
func (s *Sketch) at(h uint64, row int) (word, shift uint64) {
	x := fold(h, rowSeeds[row])
	return x & uint64(len(s.words)-1), x >> 60 * 4
}

// Add counts n uses of a hash among that many live entries.
func (s *Sketch) Add(h uint64, n, live int) {
	for ; n > 0; n-- {
		for row := range sketchRows {
			if i, shift := s.at(h, row); s.words[i]>>shift&maxCount < maxCount {
				s.words[i] += 1 << shift
			}
		}
		if s.added++; s.added >= remembered*max(live, minSketch) {
			for i := range s.words {
				s.words[i] = s.words[i] >> 1 & 0x7777777777777777
			}
			s.added /= 2
		}
	}
}

// Estimate returns how often h was added lately, up to 15.
func (s *Sketch) Estimate(h uint64) uint64 {
	least := uint64(maxCount)
	for row := range sketchRows {
		i, shift := s.at(h, row)
		least = min(least, s.words[i]>>shift&maxCount)
	}
	return least
}

// Forget starts over.
func (s *Sketch) Forget() {
	clear(s.words)
	s.added = 0
}

// Grow makes it as large as there are entries, rounded up to a power of two. Each half of
// what is doubled starts with the counts of the whole, so that no estimate gets lower.
func (s *Sketch) Grow(entries int) {
	for len(s.words) < entries {
		s.words = append(s.words, s.words...)
	}
}

// Bytes is the heap it takes.
func (s *Sketch) Bytes() int { return 8 * len(s.words) }
