package heap

import (
	"context"
	"runtime/debug"
	"testing"
	"testing/synctest"
	"time"
)

func TestPercent(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		live, spare uint64
		want        int
	}{
		{0, 64 * mib, 6400}, {mib, 64 * mib, 6400}, {16 * mib, 64 * mib, 400},
		{64 * mib, 64 * mib, 100}, {1 << 40, 64 * mib, 100}, {mib, 1 << 40, 10_000},
	} {
		if got := percent(c.live, c.spare); got != c.want {
			t.Errorf("live %d, spare %d: %d, want %d", c.live, c.spare, got, c.want)
		}
	}
}

func TestKeep(t *testing.T) {
	gogc := func() int {
		p := debug.SetGCPercent(100)
		debug.SetGCPercent(p)
		return p
	}
	before := gogc()
	t.Setenv("GOGC", "")
	t.Setenv("GOMEMLIMIT", "")
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		done := make(chan struct{})
		go func() { Keep(ctx, 1<<30); close(done) }()
		synctest.Wait()
		if got := gogc(); got != 10_000 {
			t.Errorf("at the start %d", got)
		}
		time.Sleep(4 * time.Second)
		if got, want := gogc(), percent(live(), 1<<30); got < want-want/4 || got > want+want/4 {
			t.Errorf("later %d, about %d is right", got, want)
		}
		<-done
	})
	if got := gogc(); got != before {
		t.Errorf("afterwards %d, it was %d", got, before)
	}
	t.Setenv("GOGC", "50")
	Keep(t.Context(), 1<<30) // returns at once
	if got := gogc(); got != before {
		t.Errorf("GOGC was set, and %d came of it", got)
	}
}
