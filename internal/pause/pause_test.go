package pause_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/internal/pause"
)

func TestFor(t *testing.T) {
	for _, tt := range []struct {
		name    string
		pause   time.Duration
		ends    time.Duration // when the context does; 0 = before
		goes    bool
		elapsed time.Duration
	}{
		{"whole", time.Minute, time.Hour, true, time.Minute},
		{"cut short", time.Hour, time.Minute, false, time.Minute},
		{"over before", time.Hour, 0, false, 0},
		{"nothing to wait for", 0, time.Hour, true, 0},
		{"nothing, and over", -time.Second, 0, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), tt.ends)
				defer cancel()
				start := time.Now()
				goes := pause.For(ctx, tt.pause)
				if elapsed := time.Since(start); goes != tt.goes || elapsed != tt.elapsed {
					t.Errorf("%v after %v, want %v after %v", goes, elapsed, tt.goes, tt.elapsed)
				}
			})
		})
	}
}

func TestAbout(t *testing.T) {
	seen := make(map[time.Duration]bool)
	for range 1000 {
		d := pause.About(time.Second)
		if d < 800*time.Millisecond || d > 1200*time.Millisecond {
			t.Fatalf("%v is not about a second", d)
		}
		seen[d] = true
	}
	if len(seen) < 2 {
		t.Error("always the same")
	}
}

func TestStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		timer := pause.Stopped()
		time.Sleep(2 * time.Hour)
		select {
		case <-timer.C:
			t.Error("fired without Reset")
		default:
		}
		timer.Reset(time.Minute)
		start := time.Now()
		<-timer.C
		if elapsed := time.Since(start); elapsed != time.Minute {
			t.Errorf("fired after %v", elapsed)
		}
	})
}
