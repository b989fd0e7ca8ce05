package variables

import (
	"container/heap"
	"context"
	"sync"
	"sync/atomic"

	"github.com/outrigger-mesh/outrigger"
)

// progress is how far the projection has come, and who waits for it to come further.
type progress struct {
	at atomic.Uint64 // last applied position

	mu      sync.Mutex
	waiters waitHeap
	stopped error // set once, when nothing will be applied any more
}

type waiter struct {
	position uint64
	done     chan struct{} // closed when the position is applied or progress stopped
}

// wait returns when position is applied. Its errors have kind Unavailable (the
// projection stopped) or are ctx's. The heap holds one entry per waiting call, so it is
// bounded by the calls in progress.
func (p *progress) wait(ctx context.Context, position uint64) error {
	if p.at.Load() >= position {
		return nil
	}
	p.mu.Lock()
	if p.at.Load() >= position {
		p.mu.Unlock()
		return nil
	}
	if p.stopped != nil {
		err := p.stopped
		p.mu.Unlock()
		return err
	}
	w := &waiter{position: position, done: make(chan struct{})}
	heap.Push(&p.waiters, w)
	p.mu.Unlock()
	select {
	case <-w.done:
	case <-ctx.Done():
		p.forget(w)
		return ctx.Err()
	}
	if p.at.Load() >= position {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stopped
}

// forget removes a waiter whose caller has gone.
func (p *progress) forget(w *waiter) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, x := range p.waiters {
		if x == w {
			heap.Remove(&p.waiters, i)
			return
		}
	}
}

// advance publishes a new position and wakes those who waited for it.
func (p *progress) advance(position uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at.Store(position)
	for len(p.waiters) > 0 && p.waiters[0].position <= position {
		close(heap.Pop(&p.waiters).(*waiter).done)
	}
}

// stop fails everybody who waits and will wait.
func (p *progress) stop(cause error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped = &outrigger.Error{Kind: outrigger.Unavailable, Message: "the variable authority has stopped; retry elsewhere", Cause: cause}
	for _, w := range p.waiters {
		close(w.done)
	}
	p.waiters = nil
}

// waitHeap is a min-heap by position (container/heap).
type waitHeap []*waiter

func (h waitHeap) Len() int           { return len(h) }
func (h waitHeap) Less(i, j int) bool { return h[i].position < h[j].position }
func (h waitHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *waitHeap) Push(x any)        { *h = append(*h, x.(*waiter)) }
func (h *waitHeap) Pop() any {
	old := *h
	x := old[len(old)-1]
	*h = old[:len(old)-1]
	return x
}
