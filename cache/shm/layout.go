package shm

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"
	"unsafe"

	"github.com/cespare/xxhash/v2"

	"github.com/outrigger-mesh/outrigger"
)

// Limits of one entry.
const (
	MaxKeyBytes   = 4095
	MaxValueBytes = 1<<20 - 1 // what the record header has bits for
)

// State says what the table knows about a key.
type State uint8

// The states; the zero value is Absent.
const (
	Absent   State = iota // not in the table: ask the agent
	Present               // the value is current
	Negative              // known not to exist; the payload is opaque to this package
	Invalid               // known to be stale: its floor was raised and it must be refilled
)

// String returns the lower-case word used in dumps and metrics.
func (s State) String() string {
	return [...]string{"absent", "present", "negative", "invalid"}[s&stateMask]
}

const (
	magic         = 0x314d485352545550 // "PUTRSHM1" in memory order
	layoutVersion = 2

	pageBytes   = 4096
	headerWords = pageBytes / 8

	hdrMagic      = 0
	hdrLayout     = 1
	hdrTotal      = 2 // bytes of the whole file
	hdrSlots      = 3
	hdrArena      = 4 // bytes
	hdrSum        = 5 // xxhash of the five words above
	hdrGeneration = 8
	hdrLease      = 9
	hdrClosed     = 10
	hdrHeads      = 11 // number of SetHead calls; its low bit selects the pair
	hdrHead       = 12 // two pairs {position, incarnation}
	hdrIntent     = 16 // on its own cache line: it changes with every Put

	slotWords    = 3
	slotStamp    = 0
	slotHash     = 1
	slotLocation = 2

	recordHeader = 3 // words before the key
	recMeta      = 0
	recStamp     = 1
	recSum       = 2

	stateBits = 2
	stateMask = 1<<stateBits - 1

	lengthBits = 20
	lengthMask = 1<<lengthBits - 1
	keyMask    = 1<<12 - 1
	padSlot    = 1<<32 - 1 // marks the skipped rest of the arena

	window   = 128 // slots a key may lie from its home
	maxTries = 64

	minSlots   = 2 * window // the writer looks one window to either side of a slot
	maxSlots   = 1 << 31
	minArena   = pageBytes
	maxArena   = 1 << 40
	defArena   = 64 << 20
	maxName    = 249 // what memfd_create takes
	meanRecord = 288 // bytes assumed when slots are derived from the arena size: a value of about 200
)

// geometry is the part of the header that never changes. Readers take it once, after
// checking it, and never trust the shared copy again.
type geometry struct {
	slots      uint64
	arenaWords uint64
}

// indexWords is rounded up to pages.
func (g geometry) indexWords() uint64 {
	return (g.slots*slotWords + pageBytes/8 - 1) / (pageBytes / 8) * (pageBytes / 8)
}

// home is the slot a search for a hash begins at: the hash as a fraction of the index, so
// that there may be any number of slots (Lemire, "Fast random integer generation in an
// interval", ACM TOMACS 2019).
func (g geometry) home(hash uint64) uint64 {
	i, _ := bits.Mul64(hash, g.slots)
	return i
}

// after is the slot that follows, around the end.
func (g geometry) after(i uint64) uint64 {
	if i++; i == g.slots {
		return 0
	}
	return i
}

// plus is i moved on by d, at most one round.
func (g geometry) plus(i, d uint64) uint64 {
	if i += d; i >= g.slots {
		i -= g.slots
	}
	return i
}

// above is how far i lies beyond the slot from.
func (g geometry) above(i, from uint64) uint64 {
	if i < from {
		i += g.slots
	}
	return i - from
}

func (g geometry) totalWords() uint64 { return headerWords + g.indexWords() + g.arenaWords }

// maxRecordWords keeps any one record to a quarter of the arena, so that room for it can
// always be made.
func (g geometry) maxRecordWords() uint64 { return g.arenaWords / 4 }

// plan checks options and derives the geometry.
func plan(o Options) (geometry, error) {
	if o.Bytes == 0 {
		o.Bytes = defArena
	}
	if o.Bytes < minArena || o.Bytes > maxArena {
		return geometry{}, outrigger.Errorf(outrigger.Invalid, "Options.Bytes is %d; give %d to %d, or 0 for %d", o.Bytes, minArena, int64(maxArena), defArena)
	}
	if len(o.Name) > maxName {
		return geometry{}, outrigger.Errorf(outrigger.Invalid, "Options.Name is %d bytes, the limit is %d", len(o.Name), maxName)
	}
	arena := (uint64(o.Bytes) + pageBytes - 1) / pageBytes * pageBytes
	slots := uint64(o.Slots)
	if o.Slots == 0 {
		slots = max(minSlots, arena/meanRecord*5/4)
	}
	if o.Slots < 0 || slots < minSlots || slots > maxSlots {
		return geometry{}, outrigger.Errorf(outrigger.Invalid, "Options.Slots is %d; give %d to %d, or 0 to derive it", o.Slots, minSlots, maxSlots)
	}
	return geometry{slots: slots, arenaWords: arena / 8}, nil
}

// writeIdentity fills header line 0.
func writeIdentity(hdr []uint64, g geometry) {
	line := identity(g)
	for i, w := range line {
		atomic.StoreUint64(&hdr[i], w)
	}
	atomic.StoreUint64(&hdr[hdrSum], identitySum(line))
}

func identity(g geometry) [hdrSum]uint64 {
	return [hdrSum]uint64{hdrMagic: magic, hdrLayout: layoutVersion, hdrTotal: g.totalWords() * 8, hdrSlots: g.slots, hdrArena: g.arenaWords * 8}
}

func identitySum(line [hdrSum]uint64) uint64 {
	var b [hdrSum * 8]byte
	for i, w := range line {
		binary.LittleEndian.PutUint64(b[8*i:], w)
	}
	return xxhash.Sum64(b[:])
}

// readIdentity checks header line 0 against the size of the memory. Errors have kind Invalid.
func readIdentity(words []uint64) (geometry, error) {
	if len(words) < headerWords {
		return geometry{}, outrigger.Errorf(outrigger.Invalid, "shared table is %d bytes, a header alone has %d", len(words)*8, pageBytes)
	}
	var line [hdrSum]uint64
	for i := range line {
		line[i] = atomic.LoadUint64(&words[i])
	}
	if line[hdrMagic] != magic {
		return geometry{}, outrigger.Errorf(outrigger.Invalid, "not a shared table: magic is %#x, want %#x", line[hdrMagic], uint64(magic))
	}
	if line[hdrLayout] != layoutVersion {
		return geometry{}, outrigger.Errorf(outrigger.Invalid, "shared table has layout version %d, this program reads %d; run the same release on the whole node", line[hdrLayout], layoutVersion)
	}
	if sum := atomic.LoadUint64(&words[hdrSum]); sum != identitySum(line) {
		return geometry{}, outrigger.Errorf(outrigger.Invalid, "shared table header is damaged: checksum %#x, want %#x", sum, identitySum(line))
	}
	g := geometry{slots: line[hdrSlots], arenaWords: line[hdrArena] / 8}
	switch {
	case g.slots < minSlots || g.slots > maxSlots,
		line[hdrArena] < minArena || line[hdrArena] > maxArena || line[hdrArena]%pageBytes != 0:
		return geometry{}, outrigger.Errorf(outrigger.Invalid, "shared table header is damaged: %d slots, %d arena bytes", line[hdrSlots], line[hdrArena])
	case line[hdrTotal] != g.totalWords()*8, g.totalWords() != uint64(len(words)):
		return geometry{}, outrigger.Errorf(outrigger.Invalid, "shared table is %d bytes, its header says %d and its geometry %d", len(words)*8, line[hdrTotal], g.totalWords()*8)
	}
	return g, nil
}

// Hash is the hash under which a key is indexed; it is what readers report to the
// writer's Touch. It is never 0, which marks a free slot. The hash is not keyed:
// colliding keys cost their own tenant probes, bounded by the window.
func Hash(key string) uint64 {
	h := xxhash.Sum64String(key)
	if h == 0 {
		return 1
	}
	return h
}

// words returns how many words n bytes occupy.
func words(n int) uint64 { return uint64(n+7) / 8 }

func recordWords(klen, vlen int) uint64 { return recordHeader + words(klen) + words(vlen) }

func packMeta(slot uint64, klen, vlen int) uint64 {
	return slot<<32 | uint64(klen)<<lengthBits | uint64(vlen)
}

func unpackMeta(w uint64) (slot uint64, klen, vlen int) {
	return w >> 32, int(w >> lengthBits & keyMask), int(w & lengthMask)
}

// bytesOf views a string as bytes that must not be modified.
func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }
