package node

import (
	"time"

	"golang.org/x/sys/unix"
)

// Clock returns a function that reads CLOCK_MONOTONIC in nanoseconds, the clock all
// processes of one machine share. It costs what time.Now costs (no system call): Go's
// monotonic time is the same clock with another origin, and the difference is taken
// once here, to clockError: a process that loses its processor while it looks at both looks
// again, since what it takes for the difference makes all its leases longer or shorter.
//
// CLOCK_MONOTONIC stands still while a machine is suspended, so a lease may outlive a
// suspension by its remaining milliseconds.
func Clock() func() int64 {
	var base time.Time
	var origin int64
	best := time.Duration(-1)
	for range clockLooks {
		began := time.Now()
		var ts unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil || ts.Nano() <= 0 {
			// No such clock: processes cannot share leases, this one still can with itself.
			return func() int64 { return int64(time.Since(began)) + 1 }
		}
		if off := time.Since(began); best < 0 || off < best {
			base, origin, best = began, ts.Nano(), off
		}
		if best <= clockError {
			break
		}
	}
	return func() int64 { return origin + int64(time.Since(base)) }
}

// clockError is how exact the difference is, unless clockLooks looks were all interrupted.
const (
	clockError = 50 * time.Microsecond
	clockLooks = 1000
)
