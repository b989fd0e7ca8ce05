package version

import "math"

// Hybrid logical clock stamps, after Kulkarni, Demirbas, Madappa, Avva and Leone,
// "Logical Physical Clocks and Consistent Snapshots in Globally Distributed
// Databases" (2014), packed as outrigger.Version.HLC says: 48 bits of milliseconds
// since the Unix epoch, then 16 bits of logical counter. Stamps compare as integers.
const (
	logicalBits = 16
	logicalMask = 1<<logicalBits - 1
	maxMillis   = 1<<48 - 1
)

// MaxDrift is how far, in milliseconds, an observed stamp may run ahead of the local
// clock and still be followed. A peer with a broken clock would otherwise pull every
// clock of the mesh into the future for good (CockroachDB refuses at the same 500 ms).
const MaxDrift = 500

// Millis returns the wall part of a stamp, in milliseconds since the Unix epoch.
func Millis(hlc uint64) int64 { return int64(hlc >> logicalBits) }

// Logical returns the counter part of a stamp.
func Logical(hlc uint64) uint16 { return uint16(hlc & logicalMask) }

// Next returns the stamp of a new event: greater than prev, the caller's last stamp,
// and than observed, the stamp of whatever the event depends on (0 for nothing). now
// is the local wall clock in milliseconds since the Unix epoch; when it stands still
// or runs backwards the logical counter carries on, and overflows into the
// millisecond.
//
// ok is false when observed is more than MaxDrift ahead of now. The stamp then
// ignores observed, so causality with it rests on the context vector alone.
func Next(now int64, prev, observed uint64) (stamp uint64, ok bool) {
	now = min(max(now, 0), maxMillis)
	ok = true
	if Millis(observed) > now+MaxDrift {
		observed, ok = 0, false
	}
	last := max(prev, observed)
	wall := uint64(now) << logicalBits
	switch {
	case wall > last:
		return wall, ok
	case last == math.MaxUint64:
		return last, ok // the year 10889; the clock stays rather than wrap to 1970
	}
	return last + 1, ok
}
