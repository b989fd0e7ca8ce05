// Package pause waits without outliving what it waits for: a pause ends with its context, and
// its timer with it.
package pause

import (
	"context"
	"math/rand/v2"
	"time"
)

// For waits for d, or until ctx ends if that is sooner, and reports whether ctx goes on. With
// nothing to wait for (d ≤ 0) it answers at once.
func For(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// About returns d, longer or shorter by up to a fifth, so that many who began at the same
// moment do not come back at the same moment.
func About(d time.Duration) time.Duration {
	return d + time.Duration((rand.Float64()*0.4-0.2)*float64(d))
}

// Stopped returns a timer that fires only after Reset.
func Stopped() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}
