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

func TestIdle(t *testing.T) {
	const mib = 1 << 20
	i := idle{spare: 32 * mib, since: time.Unix(0, 0), made: 100 * mib}
	for _, c := range []struct {
		what       string
		at         int64 // seconds
		made, free uint64
		want       bool
	}{
		{"too early", 9, 100 * mib, 64 * mib, false},
		{"quiet", 10, 101 * mib, 64 * mib, true},
		{"quiet, and nothing to give", 20, 101 * mib, 1 * mib, false},
		{"busy: 2 MiB in its time", 30, 103 * mib, 64 * mib, false},
		{"too early after that", 35, 103 * mib, 64 * mib, false},
		{"quiet again", 41, 103 * mib, 2 * mib, true},
	} {
		if got := i.due(time.Unix(c.at, 0), c.made, c.free); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
}

// TestGivesBack: a burst of 96 MiB does not stay resident.
func TestGivesBack(t *testing.T) {
	t.Setenv("GOGC", "")
	t.Setenv("GOMEMLIMIT", "")
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { Keep(ctx, 32<<20); close(done) }()
		synctest.Wait()
		for range 96 {
			burst = make([]byte, 1<<20)
		}
		burst = nil
		time.Sleep(3 * quiet)
		if _, free := use(); free >= 8<<20 {
			t.Errorf("%d MiB are kept", free>>20)
		}
		cancel()
		<-done
	})
}

var burst []byte

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
