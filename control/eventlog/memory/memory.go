// Package memory is the event log kept in memory: the model the durable engines are
// compared with, and the log of tests and demonstrations. It passes the same
// conformance suite (eventlogtest) as every engine, except that nothing survives the
// process.
//
// It does no I/O, starts no goroutine and never blocks while holding its lock; waiting
// subscribers wait on a channel, so it can be used inside a testing/synctest bubble,
// where it follows the bubble's clock. An append is visible to readers when it returns.
// Memory grows with every event; there is no bound but the machine's.
//
// Request ids are remembered for the last Window appends that carried one.
package memory

import (
	"bytes"
	"context"
	"iter"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// Window is the number of request ids remembered for idempotency.
const Window = 100_000

// Option changes what New builds.
type Option func(*Log)

// WithIncarnation sets the log's incarnation; the default is 1. It panics on 0, which
// means "no log".
func WithIncarnation(n uint64) Option {
	if n == 0 {
		panic("memory: incarnation 0 means no log")
	}
	return func(l *Log) { l.incarnation = n }
}

// WithNow sets the clock that dates events; the default is time.Now.
func WithNow(now func() time.Time) Option { return func(l *Log) { l.now = now } }

// Log implements eventlog.Log. Build it with New.
type Log struct {
	incarnation uint64
	now         func() time.Time
	done        chan struct{} // closed by Close

	mu        sync.Mutex
	events    []*outriggerv1.Event // events[i] has position i+1; only ever appended to
	positions map[string][]uint64  // per aggregate, in sequence order; only ever appended to
	window    *eventlog.Window
	clock     eventlog.Clock
	snapshots map[string]snapshot
	changed   chan struct{} // closed and replaced by every append
	closed    bool
}

type snapshot struct {
	position uint64
	state    []byte
}

var _ eventlog.Log = (*Log)(nil)

// New returns an empty log.
func New(opts ...Option) *Log {
	l := &Log{
		incarnation: 1,
		now:         time.Now,
		done:        make(chan struct{}),
		positions:   make(map[string][]uint64),
		window:      eventlog.NewWindow(Window),
		snapshots:   make(map[string]snapshot),
		changed:     make(chan struct{}),
	}
	for _, o := range opts {
		o(l)
	}
	return l
}

// Append implements eventlog.Appender. It never waits.
func (l *Log) Append(ctx context.Context, requestID string, writes ...eventlog.Write) (eventlog.Appended, error) {
	if err := eventlog.Check(requestID, writes); err != nil {
		return eventlog.Appended{}, err
	}
	batch, err := copies(writes)
	if err != nil {
		return eventlog.Appended{}, err
	}
	if ctx.Err() != nil {
		return eventlog.Appended{}, eventlog.ErrNotQueued(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return eventlog.Appended{}, eventlog.ErrClosed()
	}
	if o, ok := l.window.Get(requestID); ok && requestID != "" {
		return eventlog.Appended{First: o.First, Last: o.Last, Events: l.slice(o.First, o.Last), Duplicate: true}, nil
	}
	if err := l.checkExpect(writes); err != nil {
		return eventlog.Appended{}, err
	}
	return l.commit(requestID, batch), nil
}

// copies clones the events and sets their aggregate. Encoding is tried because an event
// that cannot be encoded must be refused here as by any other engine.
func copies(writes []eventlog.Write) ([]*outriggerv1.Event, error) {
	var out []*outriggerv1.Event
	for _, w := range writes {
		for i, e := range w.Events {
			if _, err := proto.Marshal(e); err != nil {
				return nil, outrigger.Errorf(outrigger.Invalid, "event %d of %q cannot be encoded: %v", i, w.Aggregate, err)
			}
			c := proto.CloneOf(e)
			c.Aggregate = w.Aggregate
			out = append(out, c)
		}
	}
	return out, nil
}

// checkExpect compares each write with the sequence its aggregate will have by then.
func (l *Log) checkExpect(writes []eventlog.Write) error {
	added := make(map[string]uint64)
	for _, w := range writes {
		current := uint64(len(l.positions[w.Aggregate])) + added[w.Aggregate]
		if w.Expect != eventlog.Any && uint64(w.Expect) != current {
			return eventlog.ErrConflict(w.Aggregate, w.Expect, current)
		}
		added[w.Aggregate] += uint64(len(w.Events))
	}
	return nil
}

// commit numbers, dates and stores a checked batch and wakes the subscribers.
func (l *Log) commit(requestID string, batch []*outriggerv1.Event) eventlog.Appended {
	first := uint64(len(l.events)) + 1
	at := timestamppb.New(l.clock.Advance(l.now()))
	for _, e := range batch {
		e.Position = uint64(len(l.events)) + 1
		e.Sequence = uint64(len(l.positions[e.Aggregate])) + 1
		e.At = proto.CloneOf(at)
		e.Hlc = l.clock.Next()
		l.events = append(l.events, e)
		l.positions[e.Aggregate] = append(l.positions[e.Aggregate], e.Position)
	}
	last := uint64(len(l.events))
	if requestID != "" {
		l.window.Add(requestID, eventlog.Outcome{First: first, Last: last})
	}
	close(l.changed)
	l.changed = make(chan struct{})
	return eventlog.Appended{First: first, Last: last, Events: l.slice(first, last)}
}

// slice returns the events at positions first..last with no room to append, so that
// nobody can write into the log's own array. l.mu is held.
func (l *Log) slice(first, last uint64) []*outriggerv1.Event {
	return l.events[first-1 : last : last]
}

// Read implements eventlog.Reader.
func (l *Log) Read(ctx context.Context, aggregate string, from uint64) iter.Seq2[*outriggerv1.Event, error] {
	l.mu.Lock()
	events, positions := l.events, l.positions[aggregate]
	l.mu.Unlock()
	return l.walk(ctx, from, len(positions), func(i uint64) *outriggerv1.Event { return events[positions[i-1]-1] })
}

// ReadAll implements eventlog.Reader.
func (l *Log) ReadAll(ctx context.Context, from uint64) iter.Seq2[*outriggerv1.Event, error] {
	l.mu.Lock()
	events := l.events
	l.mu.Unlock()
	return l.walk(ctx, from, len(events), func(i uint64) *outriggerv1.Event { return events[i-1] })
}

// walk yields at(from) … at(n); slices captured by at never change below n.
func (l *Log) walk(ctx context.Context, from uint64, n int, at func(uint64) *outriggerv1.Event) iter.Seq2[*outriggerv1.Event, error] {
	return func(yield func(*outriggerv1.Event, error) bool) {
		if err := l.readable(ctx); err != nil {
			yield(nil, err)
			return
		}
		for i := max(from, 1); i <= uint64(n); i++ {
			if err := l.readable(ctx); err != nil {
				yield(nil, err)
				return
			}
			if !yield(at(i), nil) {
				return
			}
		}
	}
}

// readable says why a read must stop, if it must.
func (l *Log) readable(ctx context.Context) error {
	if ctx.Err() != nil {
		return eventlog.ErrRead(ctx)
	}
	select {
	case <-l.done:
		return eventlog.ErrClosed()
	default:
		return nil
	}
}

// Subscribe implements eventlog.Subscriber.
func (l *Log) Subscribe(ctx context.Context, from uint64) iter.Seq2[*outriggerv1.Event, error] {
	return func(yield func(*outriggerv1.Event, error) bool) {
		next := max(from, 1)
		for {
			l.mu.Lock()
			events, changed := l.events, l.changed
			l.mu.Unlock()
			for ; next <= uint64(len(events)); next++ {
				if ctx.Err() != nil {
					return
				}
				if !yield(events[next-1], nil) {
					return
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-l.done:
				yield(nil, eventlog.ErrClosed())
				return
			case <-changed:
			}
		}
	}
}

// Head implements eventlog.Reader.
func (l *Log) Head() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return uint64(len(l.events))
}

// Incarnation implements eventlog.Reader.
func (l *Log) Incarnation() uint64 { return l.incarnation }

// SaveSnapshot implements eventlog.Snapshots; it keeps a copy of state.
func (l *Log) SaveSnapshot(ctx context.Context, name string, position uint64, state []byte) error {
	if ctx.Err() != nil {
		return eventlog.ErrNotQueued(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return eventlog.ErrClosed()
	}
	if err := eventlog.CheckSnapshot(name, position, uint64(len(l.events)), state); err != nil {
		return err
	}
	l.snapshots[name] = snapshot{position, bytes.Clone(state)}
	return nil
}

// LoadSnapshot implements eventlog.Snapshots; the caller owns the state it gets.
func (l *Log) LoadSnapshot(ctx context.Context, name string) (uint64, []byte, error) {
	if err := l.readable(ctx); err != nil {
		return 0, nil, err
	}
	if err := eventlog.CheckAggregate("snapshot name", name); err != nil {
		return 0, nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.snapshots[name]
	return s.position, bytes.Clone(s.state), nil
}

// Close implements eventlog.Log. The events are gone when the log is garbage.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.closed = true
		close(l.done)
	}
	return nil
}
