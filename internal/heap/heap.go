// Package heap keeps small processes from collecting garbage too often. With the
// collector's default a process that keeps 10 MiB collects whenever it has made another
// 10 MiB, twice a second under load, and each time the collector takes a quarter of the
// machine for a while, which is what the slowest requests then wait for.
//
//	go heap.Keep(ctx, 64<<20)
//
// Promise: the heap grows by at least Spare bytes between two collections, and by as much
// as is live (the collector's default) where that is more. So memory is bounded by twice
// what is live, or what is live and Spare. When the program has had little to do for ten
// seconds (it made less than a sixteenth of Spare), what is free is given back to the
// machine, so that a burst does not stay resident: the runtime alone keeps as much as its
// next collection may need. An operator who sets GOGC or GOMEMLIMIT has decided; then nothing is
// changed.
//
// A Room bounds what a process keeps for its callers by the memory that it may have.
package heap

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// look is how often the live heap is read; it costs microseconds.
const look = 2 * time.Second

// quiet is how long a program has little to do before it gives memory back.
const quiet = 10 * time.Second

// idle decides when to give memory back. One goroutine uses it.
type idle struct {
	spare uint64
	since time.Time // the present stretch began
	made  uint64    // bytes that had been allocated then
}

// due reports whether the last stretch had little to do and free bytes are worth a
// collection. made is what the program has allocated in its life.
func (i *idle) due(now time.Time, made, free uint64) bool {
	if now.Sub(i.since) < quiet {
		return false
	}
	little := made-i.made < i.spare/16
	i.since, i.made = now, made
	return little && free >= i.spare/16
}

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
	made, _ := use()
	rest := idle{spare: spare, since: time.Now(), made: made}
	for set := percent(0, spare); ; {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if made, free := use(); rest.due(time.Now(), made, free) {
			runtime.GC() // what pools keep (sync.Pool) outlives one collection
			debug.FreeOSMemory()
		}
		// Small moves are not worth stopping the world for.
		if p := percent(live(), spare); p > set+set/8 || p < set-set/8 {
			debug.SetGCPercent(p)
			set = p
		}
	}
}

// use returns how many bytes were allocated so far, and how many the heap holds that are
// neither in use nor given back.
func use() (made, free uint64) {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/memory/classes/heap/free:bytes"}, {Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/gc/heap/live:bytes"}}
	metrics.Read(s)
	free = s[1].Value.Uint64() + s[2].Value.Uint64()
	if objects, live := s[3].Value.Uint64(), s[4].Value.Uint64(); objects > live {
		free += objects - live // what the next collection finds, for the most part
	}
	return s[0].Value.Uint64(), free
}

// live returns the bytes the last collection left.
func live() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
