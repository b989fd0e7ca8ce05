package coherence

// ref numbers a piece of a slab from 1; 0 = none.
type ref = uint32

const (
	chunkBits = 8
	chunkSize = 1 << chunkBits
)

// slab hands out pieces of T by number. They stay where they are, so nothing is ever
// copied to grow, and a T without pointers is nothing for the collector to look at.
type slab[T any] struct {
	chunks []*[chunkSize]T
	used   uint32 // pieces handed out at least once
	free   []ref
}

func (s *slab[T]) at(r ref) *T { return &s.chunks[(r-1)>>chunkBits][(r-1)%chunkSize] }

// take returns a piece in its zero value.
func (s *slab[T]) take() (ref, *T) {
	if n := len(s.free); n > 0 {
		r := s.free[n-1]
		s.free = s.free[:n-1]
		return r, s.at(r)
	}
	if int(s.used>>chunkBits) == len(s.chunks) {
		s.chunks = append(s.chunks, new([chunkSize]T))
	}
	s.used++
	return s.used, s.at(s.used)
}

func (s *slab[T]) give(r ref) {
	var zero T
	*s.at(r) = zero
	s.free = append(s.free, r)
}

// entry is one key with an exact floor, in 64 bytes without pointers.
type entry struct {
	floor uint64
	at    uint64 // the held value was current as of this position
	dot   uint64 // position of the write behind the held value, in the log numbered log

	name    [8]byte // the name, or its first 4 bytes and the ref of the piece that goes on
	session ref
	since   uint32 // when it was stored, in ms of the owner's clock; wraps

	inIndex       ref // next key of the bucket
	prev, next    ref // by time of storing
	before, after ref // in the session, as they came
	log           uint16
	nameBytes     uint8 // longName = the name is in keys.long
	flags         uint8 // held and the bits below
}

const (
	heldMask = 3
	// isUnasked says that nothing is stored before the origin was asked, because a write
	// of this node may be newer than what comes by itself.
	isUnasked = 1 << 2
	isBrief   = 1 << 3 // it is in the list brief, not in order

	longName = 255
)

type held uint8

const (
	nothing held = iota
	value
	negative
)

func (e *entry) held() held { return held(e.flags & heldMask) }

func (e *entry) hold(h held) { e.flags = e.flags&^heldMask | uint8(h) }

func (e *entry) unasked() bool { return e.flags&isUnasked != 0 }

func (e *entry) setUnasked(to bool) { e.set(isUnasked, to) }

func (e *entry) set(bit uint8, to bool) {
	if e.flags &^= bit; to {
		e.flags |= bit
	}
}

const (
	ms = 1_000_000
	// maxTTL keeps ages far from where a stamp wraps.
	maxTTL = 24 * 24 * 3600 * 1000 * ms
)

// stamp is a time of storing as entries have it.
func stamp(now int64) uint32 { return uint32(now / ms) }

// age returns how long ago e was stored, in steps of a millisecond.
func (e *entry) age(now int64) int64 { return int64(stamp(now)-e.since) * ms }

// piece goes on with a name of more than 8 bytes.
type piece struct {
	next ref
	b    [12]byte
}

// session is one that has keys here.
type session struct {
	sessionName
	first, last ref
}

type sessionName struct{ tenant, id string }

// list is an order of keys by time of storing.
type list struct{ first, last ref }

// logName is what a Dot says besides the position.
type logName struct {
	region      string
	incarnation uint64
}
