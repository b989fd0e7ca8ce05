package node

import (
	"encoding/binary"

	"github.com/outrigger-mesh/outrigger"
)

// Absence is what the agent stores with a negative entry of the table: that a variable
// does not exist, and since when that is known. Readers put the position into session
// tokens. It may be above the head of the table, because an answer or a frame is visible
// before all that precedes it was applied.
//
// The payload is 1 when the session exists, else 0; position and incarnation, 8 bytes
// each, little endian; the region's name, up to outrigger.MaxNameBytes.
type Absence struct {
	SessionExists bool
	AsOf          outrigger.Dot
}

const absenceBytes = 17 // without the region

// Append appends the payload to b.
func (a Absence) Append(b []byte) []byte {
	exists := byte(0)
	if a.SessionExists {
		exists = 1
	}
	b = append(b, exists)
	b = binary.LittleEndian.AppendUint64(b, a.AsOf.Position)
	b = binary.LittleEndian.AppendUint64(b, a.AsOf.Incarnation)
	return append(b, a.AsOf.Region...)
}

// ParseAbsence reads a payload. One that Append did not make says nothing: ok is false.
func ParseAbsence(b []byte) (a Absence, ok bool) {
	if len(b) < absenceBytes || len(b) > absenceBytes+outrigger.MaxNameBytes || b[0] > 1 {
		return Absence{}, false
	}
	a.SessionExists = b[0] == 1
	a.AsOf.Position = binary.LittleEndian.Uint64(b[1:])
	a.AsOf.Incarnation = binary.LittleEndian.Uint64(b[9:])
	a.AsOf.Region = string(b[absenceBytes:])
	return a, true
}
