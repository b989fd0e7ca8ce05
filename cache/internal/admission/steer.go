package admission

// Steer decides how much of its room recent entries may take, and when the sketch is out of
// date, from keys that are asked for again soon after they had to leave: if one left the
// recent entries, a larger share would have kept it; if one left the frequent ones, a smaller
// share. That is how ARC (Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement
// Cache", FAST 2003) divides its room. When those who left the recent entries come back and
// hardly any who had been frequent, then other keys than those the sketch remembers are
// popular now. The excess of the ones over the others is added up (the CUSUM test of Page,
// "Continuous Inspection Schemes", Biometrika 1954).
//
// It knows no time and draws no numbers: the same calls give the same answers. Build
// it with NewSteer.
type Steer struct {
	Share    float64 // of the bounds that recent entries may take
	recent   ghost   // keys that left the recent entries
	frequent ghost   // keys that left the frequent ones
	excess   int     // of the former that came back over the latter
}

// The share lies between these.
const (
	LeastShare = 0.005
	MostShare  = 0.8
)

const (
	// soon is how many departures from its list a key may come back after to count, per
	// entry. It must be small: a loop over more keys than there is room for
	// comes back too, but late, and no share of recent entries would have kept it.
	soon = 0.15
	// A key that had been frequent moves the share by two entries, the other by one: to keep
	// an entry with a past is the better bet.
	growBy, shrinkBy = 1, 2
	// A shift is an excess of so many keys per entry, but no fewer than leastShift. A key that
	// had been frequent takes shiftLeak away.
	shiftAt, shiftLeak, leastShift = 0.05, 4, 4
)

// NewSteer returns one with the least share.
func NewSteer() Steer { return Steer{Share: LeastShare, recent: newGhost(), frequent: newGhost()} }

// Missed is told of a key that was asked for and not there, and that there are live
// entries. It reports whether other keys than before are popular now.
func (s *Steer) Missed(h uint64, live int) (shifted bool) {
	depth := uint32(soon * float64(live))
	if s.recent.take(h, depth) {
		s.Share = min(MostShare, s.Share+growBy/float64(live))
		s.excess++
	}
	if s.frequent.take(h, depth) {
		s.Share = max(LeastShare, s.Share-shrinkBy/float64(live))
		s.excess = max(0, s.excess-shiftLeak)
	}
	if s.excess < max(leastShift, int(shiftAt*float64(live))) {
		return false
	}
	s.excess = 0
	return true
}

// Left is told of an entry that had to leave.
func (s *Steer) Left(h uint64, frequent bool) {
	if frequent {
		s.frequent.add(h)
	} else {
		s.recent.add(h)
	}
}

// Grow makes room to remember the departures of so many entries.
func (s *Steer) Grow(entries int) {
	s.recent.grow(entries)
	s.frequent.grow(entries)
}

// ghost remembers when which keys left, by a part of their hashes: a table in which each key
// has one place, which it loses to the next one that has it too.
type ghost struct {
	slots []uint64 // a power of two: half a hash, then the departure's number
	last  uint32   // departures
}

const minGhost = 8

func newGhost() ghost { return ghost{slots: make([]uint64, minGhost)} }

// at is the place of a hash. Its low 32 bits tell keys apart, others choose the place: all
// keys of a shard have the same high bits.
func (g *ghost) at(h uint64) *uint64 { return &g.slots[h>>32&uint64(len(g.slots)-1)] }

func (g *ghost) add(h uint64) {
	g.last++
	*g.at(h) = h<<32 | uint64(g.last)
}

// take reports whether a key is one of the last that left, and forgets it.
func (g *ghost) take(h uint64, depth uint32) bool {
	p := g.at(h)
	if uint32(*p>>32) != uint32(h) || g.last-uint32(*p) > depth {
		return false
	}
	*p = 0
	return true
}

// grow keeps half as many slots as there are entries, rounded up to a power of two: at least
// three for each departure that counts. Both halves of what is doubled have what was
// remembered, as only the key itself knows which of the two it will be looked for in; the
// other copy is found by nobody.
func (g *ghost) grow(entries int) {
	for 2*len(g.slots) < entries {
		g.slots = append(g.slots, g.slots...)
	}
}

// Bytes is the heap it takes.
func (s *Steer) Bytes() int { return 8 * (len(s.recent.slots) + len(s.frequent.slots)) }
