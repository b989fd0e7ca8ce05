package eventlog

import (
	"time"

	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// hlcLogicalBits is the width of the logical counter below the milliseconds in a
// hybrid logical clock stamp (Kulkarni et al., "Logical Physical Clocks", 2014).
const hlcLogicalBits = 16

// Clock turns readings of a wall clock into event times that never run backwards. It
// is plain state for one writer at a time; the zero value starts at the first reading.
type Clock struct {
	at  time.Time
	hlc uint64
}

// Resume continues after the last stored event, so that a restart on a machine whose
// clock went back keeps both times monotone.
func (c *Clock) Resume(last *outriggerv1.Event) {
	if last == nil {
		return
	}
	c.at = last.GetAt().AsTime()
	c.hlc = last.GetHlc()
}

// Advance takes a wall clock reading and returns the time of the events that follow:
// now, or the last time if now is before it.
func (c *Clock) Advance(now time.Time) time.Time {
	if now = now.UTC().Round(0); now.After(c.at) {
		c.at = now
	}
	return c.at
}

// Next returns the stamp of one event: 48 bits of milliseconds of the last Advance and
// 16 bits of logical counter, always above the stamp before it. When more than 65,535
// events share a millisecond the counter carries into the milliseconds.
func (c *Clock) Next() uint64 {
	var wall uint64
	if ms := c.at.UnixMilli(); ms > 0 {
		wall = uint64(ms) << hlcLogicalBits
	}
	c.hlc = max(c.hlc+1, wall)
	return c.hlc
}
