package heap

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"sync/atomic"
	"time"
)

// sampled is how often a Room looks at the heap, collected how often at most it has it
// collected because there seems to be no room.
const (
	sampled   = 100 * time.Millisecond
	collected = 100 * time.Millisecond
)

// Room is the memory a process may have, given out to what keeps bytes for callers, so that
// those there is no room for can be told so before the kernel ends everybody. Safe for
// concurrent use; a nil Room has room for everything.
//
//	r := heap.NewRoom(512 << 20)
//	go r.Run(ctx)
//	if r.Take(n) { defer r.Give(n); … }
//
// Promise: what was taken and what the heap holds besides are together at most seven eighths
// of the limit; the last eighth is the program's text, the kernel's pages for it and what
// comes between two looks, 100 ms apart. Nobody is refused for garbage: before that the
// heap is collected, ten times a second at most.
type Room struct {
	limit int64
	held  atomic.Int64 // taken
	most  atomic.Int64 // that may be taken

	mu   sync.Mutex
	last time.Time // the heap was collected for want of room
}

// NewRoom returns the room of a process that may have limit bytes. It starts nothing.
func NewRoom(limit int64) *Room {
	r := &Room{limit: limit}
	r.sample()
	return r
}

// share is how much may be taken of limit bytes when used are in use, held of them taken.
func share(limit, used, held int64) int64 {
	return max(0, limit-limit/8-max(0, used-held))
}

// Run keeps the share current until ctx ends, and the garbage collector below three
// quarters of the limit unless GOMEMLIMIT says otherwise. Call it once.
func (r *Room) Run(ctx context.Context) {
	if os.Getenv("GOMEMLIMIT") == "" {
		was := debug.SetMemoryLimit(r.limit - r.limit/4)
		defer debug.SetMemoryLimit(was)
	}
	t := time.NewTicker(sampled)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			r.sample()
		}
	}
}

// sample sets the share anew. What is free in the heap is as good as not in use.
func (r *Room) sample() {
	s := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}, {Name: "/memory/classes/heap/free:bytes"}}
	held := r.held.Load() // before: what is taken meanwhile counts as if it were other use
	metrics.Read(s)
	used := s[0].Value.Uint64() - s[1].Value.Uint64() - s[2].Value.Uint64()
	r.most.Store(share(r.limit, int64(used), held))
}

// Take reserves n bytes, for Give to give back; false means that there is no room.
func (r *Room) Take(n int64) bool {
	if r == nil || n == 0 || r.held.Add(n) <= r.most.Load() {
		return true
	}
	r.held.Add(-n)
	r.collect()
	if r.held.Add(n) <= r.most.Load() {
		return true
	}
	r.held.Add(-n)
	return false
}

// Give gives back what was taken.
func (r *Room) Give(n int64) {
	if r != nil {
		r.held.Add(-n)
	}
}

// collect has the heap collected and looks again, if that was not done just now.
func (r *Room) collect() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.last) < collected {
		return
	}
	runtime.GC()
	r.sample()
	r.last = time.Now()
}

// Full reports whether nothing more can be taken; it collects nothing.
func (r *Room) Full() bool { return r != nil && r.held.Load() >= r.most.Load() }

// Held is what was taken and not given back, in bytes.
func (r *Room) Held() int64 {
	if r == nil {
		return 0
	}
	return r.held.Load()
}

// Empty reports whether all that was taken was given back.
func (r *Room) Empty() bool { return r.Held() == 0 }
