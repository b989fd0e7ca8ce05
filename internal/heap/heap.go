// Package heap keeps small processes from collecting garbage too often. With the
// collector's default a process that keeps 10 MiB collects whenever it has made another
// 10 MiB, twice a second under load, and each time the collector takes a quarter of the
// machine for a while, which is what the slowest requests then wait for.
//
//	go heap.Keep(ctx, 64<<20)
//
// Promise: the heap grows by at least Spare bytes between two collections, and by as much
// as is live (the collector's default) where that is more. So memory is bounded by twice
// what is live, or what is live and Spare. An operator who sets GOGC or GOMEMLIMIT has
// decided; then nothing is changed.
package heap

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// look is how often the live heap is read; it costs microseconds.
const look = 2 * time.Second

// percent is the collector's target for a live heap: how much it may grow.
func percent(live, spare uint64) int {
	return int(max(100, min(100*spare/max(live, 1<<20), 10_000)))
}

// Keep adapts the collector's target to the live heap until ctx ends, and then sets it
// back. spare is in bytes.
func Keep(ctx context.Context, spare uint64) {
	if os.Getenv("GOGC") != "" || os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	was := debug.SetGCPercent(percent(0, spare))
	defer debug.SetGCPercent(was)
	t := time.NewTicker(look)
	defer t.Stop()
	for set := percent(0, spare); ; {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		// Small moves are not worth stopping the world for.
		if p := percent(live(), spare); p > set+set/8 || p < set-set/8 {
			debug.SetGCPercent(p)
			set = p
		}
	}
}

// live returns the bytes the last collection left.
func live() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
