// Package experiments holds the pure rules of experiments: who is assigned to what, and
// what the outcomes prove.
//
// Assignment: Bucket, Allocate and Reallocate, UnitOf.
//
// Statistics: reporters send UnitRow, a Ledger puts them together per unit, Sums, Joint
// and Quantiles summarise units per arm and Stratum, and Analyse turns a frozen Plan and
// those summaries into a Result with its Decision. The tests it is made of are exported
// one by one (Sequence, TwoByTwo, Boundaries, WelchT, PooledZ, Fisher, …), as are the
// planner (Goal, GateUnits) and the checks that come before any result can be believed
// (CheckSampleRatio, Exposure).
//
// Lifecycle: a Lifecycle folds Transitions from draft to archived and refuses the others;
// Step judges a running one and says what to record next. It concludes once, by rule.
//
// Promises: the unit of analysis is the unit of randomisation; strata are compared with
// themselves, never pooled; a test may be looked at as often as one likes unless its
// name or comment says fixed. Alpha, power and p-values are probabilities, not percent.
// Input that cannot be (NaN, infinities, negative counts or variances, proportions that
// are not whole) is an error of kind Invalid; missing data is no evidence.
//
// Nothing here does I/O, reads a clock or starts a goroutine; every function is
// deterministic and safe for concurrent use. Summaries and ledgers have one writer.
package experiments

import (
	"encoding/binary"

	"github.com/twmb/murmur3"
)

// Buckets is the resolution of every split: 0.01 %.
const Buckets = 10_000

// Range is a half-open run of buckets [Start, End), 0 ≤ Start < End ≤ Buckets.
type Range struct{ Start, End uint32 }

// Unit is what is randomised.
type Unit string

// The units, from most to least stable.
const (
	UnitUser    Unit = "user"
	UnitSession Unit = "session"
	UnitRequest Unit = "request"
)

// UnitHash is murmur3_32 over the length-prefixed salt followed by the unit. The
// prefix (4 bytes, little endian) makes ("1","23") and ("12","3") different.
func UnitHash(salt, unit string) uint32 {
	var stack [128]byte
	buf := binary.LittleEndian.AppendUint32(stack[:0], uint32(len(salt)))
	buf = append(buf, salt...)
	buf = append(buf, unit...)
	return murmur3.Sum32(buf)
}

// Bucket maps a unit to 0..Buckets-1 by the one bucket rule of the mesh:
// (murmur3_32(length-prefixed salt, unit) · 10 000) >> 32.
func Bucket(salt, unit string) uint32 {
	return uint32(uint64(UnitHash(salt, unit)) * Buckets >> 32)
}
