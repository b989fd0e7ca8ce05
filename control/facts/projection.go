package facts

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// Source is what a Projection follows; eventlog.Log has it.
type Source interface {
	eventlog.Reader
	eventlog.Subscriber
	eventlog.Snapshots
}

// SnapshotName is the name facts are kept under in the log's snapshots.
const SnapshotName = "facts"

// snapshotEvery is how many events of other sorts a restart may have to pass over before
// it is worth saving where to continue. Passing one over is cheap
// (BenchmarkPassOver); reading it from disk is what takes the time.
const snapshotEvery = 200_000

// snapshotTimeout bounds how long saving may hold up the fold.
const snapshotTimeout = 10 * time.Second

// Projection keeps the latest Facts by following a log.
//
// Build it with NewProjection, start it with Run. Every other method may be called
// concurrently and before Run. If the log fails, Run returns the error; the facts stay
// as they were.
type Projection struct {
	log Source

	current atomic.Pointer[Facts]
	past    atomic.Pointer[kept] // what current was folded from, for ServedAt
	applied atomic.Uint64
	ready   chan struct{} // closed by Run's goroutine
	changes chan struct{} // capacity 1: a wake-up, never a queue

	mu      sync.Mutex
	waiters map[*waiter]struct{}

	// Only Run's goroutine: the head to catch up with, what the next snapshot will hold, and where the last one was.
	head     uint64
	caughtUp bool
	kept     kept
	saved    uint64
}

type waiter struct {
	position uint64
	reached  chan struct{} // closed once, by the one who removes it from waiters
}

// NewProjection starts nothing.
func NewProjection(log Source) *Projection {
	p := &Projection{log: log, ready: make(chan struct{}), changes: make(chan struct{}, 1), waiters: make(map[*waiter]struct{})}
	p.current.Store(new(Facts))
	p.past.Store(new(kept))
	return p
}

// Facts returns the latest facts; never nil.
func (p *Projection) Facts() *Facts { return p.current.Load() }

// Applied is the log position up to which every event has been seen.
func (p *Projection) Applied() uint64 { return p.applied.Load() }

// Ready is closed once the log that existed when Run began has been applied.
func (p *Projection) Ready() <-chan struct{} { return p.ready }

// Changes delivers a wake-up after facts changed; several changes may be one wake-up.
// It has one receiver.
func (p *Projection) Changes() <-chan struct{} { return p.changes }

// Wait returns the facts once the given position has been applied. It fails with kind
// Timeout or Cancelled when ctx ends first.
func (p *Projection) Wait(ctx context.Context, position uint64) (*Facts, error) {
	w := &waiter{position: position, reached: make(chan struct{})}
	p.mu.Lock()
	if p.applied.Load() >= position {
		p.mu.Unlock()
		return p.Facts(), nil
	}
	p.waiters[w] = struct{}{}
	p.mu.Unlock()
	select {
	case <-w.reached:
		return p.Facts(), nil
	case <-ctx.Done():
		p.mu.Lock()
		delete(p.waiters, w)
		p.mu.Unlock()
		kind := outrigger.Cancelled
		if ctx.Err() == context.DeadlineExceeded {
			kind = outrigger.Timeout
		}
		return nil, outrigger.Wrap(kind, ctx.Err(), fmt.Sprintf("waiting for position %d, applied is %d", position, p.applied.Load()))
	}
}

// Run follows the log until ctx ends (then it returns nil) or the log fails.
func (p *Projection) Run(ctx context.Context) error {
	from, err := p.load(ctx)
	if err != nil {
		return err
	}
	p.head = p.log.Head()
	p.reached(from)
	for e, err := range p.log.Subscribe(ctx, from+1) {
		if err != nil {
			return fmt.Errorf("follow the log from %d: %w", p.Applied()+1, err)
		}
		p.apply(e)
		if p.Applied()-p.saved >= snapshotEvery {
			p.save(ctx)
		}
	}
	return nil
}

func (p *Projection) apply(e *pb.Event) {
	old := p.Facts()
	next := Apply(old, e)
	if next != old {
		p.kept.add(e)
		p.remember()
		p.current.Store(next)
	}
	p.reached(e.GetPosition())
	if next != old {
		select {
		case p.changes <- struct{}{}:
		default: // a wake-up is pending already
		}
	}
}

// reached publishes the applied position and wakes whoever waits for it.
func (p *Projection) reached(position uint64) {
	p.mu.Lock()
	p.applied.Store(position)
	for w := range p.waiters {
		if w.position <= position {
			close(w.reached)
			delete(p.waiters, w)
		}
	}
	p.mu.Unlock()
	if !p.caughtUp && position >= p.head {
		p.caughtUp = true
		close(p.ready)
	}
}

// save stores a snapshot. A failure costs a longer replay after the next start, nothing
// else, so the next attempt is simply made later.
func (p *Projection) save(ctx context.Context) {
	p.saved = p.Applied()
	state, err := p.kept.encode(p.Facts())
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, snapshotTimeout)
	defer cancel()
	_ = p.log.SaveSnapshot(ctx, SnapshotName, p.saved, state) // see above
}

// load applies the latest snapshot and returns its position, 0 if there is none. A
// snapshot is a shortcut: when it cannot be read, the log itself still can.
func (p *Projection) load(ctx context.Context) (uint64, error) {
	position, state, err := p.log.LoadSnapshot(ctx, SnapshotName)
	if err != nil {
		return 0, fmt.Errorf("load snapshot %q: %w", SnapshotName, err)
	}
	f, k, err := decode(state)
	if err != nil {
		f, k, position = new(Facts), kept{}, 0
	}
	p.kept, p.saved = k, position
	p.remember()
	p.current.Store(f)
	return position, nil
}
