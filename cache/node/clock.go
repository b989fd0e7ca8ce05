package node

import (
	"time"

	"golang.org/x/sys/unix"
)

// Clock returns a function that reads CLOCK_MONOTONIC in nanoseconds, the clock all
// processes of one machine share. It costs what time.Now costs (no system call): Go's
// monotonic time is the same clock with another origin, and the difference is taken
// once here.
//
// CLOCK_MONOTONIC stands still while a machine is suspended, so a lease may outlive a
// suspension by its remaining milliseconds.
func Clock() func() int64 {
	base := time.Now()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil || ts.Nano() <= 0 {
		// No such clock: processes cannot share leases, this one still can with itself.
		return func() int64 { return int64(time.Since(base)) + 1 }
	}
	origin := ts.Nano()
	return func() int64 { return origin + int64(time.Since(base)) }
}
