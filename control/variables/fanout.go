package variables

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
)

// fanouts send changes to the feeds without gRPC: a few goroutines for all feeds, because
// waking one for each would cost as much as the sending, and nobody waits in it.
type fanouts struct {
	all  []*fanout
	next atomic.Uint32
}

// maxFanouts bounds the goroutines that send.
const maxFanouts = 8

func newFanouts() *fanouts {
	out := &fanouts{all: make([]*fanout, max(1, min(maxFanouts, runtime.GOMAXPROCS(0)/2)))}
	for i := range out.all {
		out.all[i] = &fanout{wake: make(chan struct{}, 1)}
	}
	return out
}

// pick returns the one a new feed belongs to.
func (f *fanouts) pick() *fanout { return f.all[int(f.next.Add(1))%len(f.all)] }

// fanout is one of them.
type fanout struct {
	wake chan struct{} // one element: the queue is not empty

	mu    sync.Mutex
	queue []*lean // feeds there are changes for, each once
}

// push notes that there is something for a feed. It does not wait.
func (w *fanout) push(f *lean) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if f.queued {
		return
	}
	f.queued = true
	if w.queue = append(w.queue, f); len(w.queue) == 1 {
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

// run sends until ctx ends.
func (w *fanout) run(ctx context.Context) {
	var turn []*lean
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.wake:
		}
		w.mu.Lock()
		turn, w.queue = w.queue, turn[:0]
		for _, f := range turn {
			f.queued = false // what comes from here on is for another turn
		}
		w.mu.Unlock()
		for i, f := range turn {
			f.changed()
			turn[i] = nil
		}
	}
}
