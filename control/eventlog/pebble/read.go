package pebble

import (
	"context"
	"iter"

	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// Bounds of one read from the store. A sequence holds at most this much, and no
// iterator, while its consumer works on what it was given.
const (
	chunkEvents = 256
	chunkBytes  = 1 << 20
)

// Read implements eventlog.Reader.
func (l *Log) Read(ctx context.Context, aggregate string, from uint64) iter.Seq2[*outriggerv1.Event, error] {
	head := l.Head()
	return func(yield func(*outriggerv1.Event, error) bool) {
		if eventlog.CheckAggregate("aggregate", aggregate) != nil {
			return // no such aggregate can exist
		}
		next := max(from, 1)
		for {
			events, err := l.aggregateChunk(ctx, aggregate, next, head)
			if !emit(ctx, events, err, yield) || len(events) == 0 {
				return
			}
			next = events[len(events)-1].Sequence + 1
		}
	}
}

// ReadAll implements eventlog.Reader.
func (l *Log) ReadAll(ctx context.Context, from uint64) iter.Seq2[*outriggerv1.Event, error] {
	head := l.Head()
	return func(yield func(*outriggerv1.Event, error) bool) {
		next := max(from, 1)
		for {
			events, err := l.chunk(ctx, next, head)
			if !emit(ctx, events, err, yield) || len(events) == 0 {
				return
			}
			next += uint64(len(events))
		}
	}
}

// Subscribe implements eventlog.Subscriber. It reads what is stored and then waits for
// the next publish; the channel is loaded before the head, so no commit can slip between.
func (l *Log) Subscribe(ctx context.Context, from uint64) iter.Seq2[*outriggerv1.Event, error] {
	return func(yield func(*outriggerv1.Event, error) bool) {
		next := max(from, 1)
		for {
			changed, head := *l.changed.Load(), l.Head()
			for next <= head {
				events, err := l.chunk(ctx, next, head)
				if ctx.Err() != nil || !emit(ctx, events, err, yield) {
					return
				}
				next += uint64(len(events))
			}
			select {
			case <-ctx.Done():
				return
			case <-l.stopping:
				yield(nil, eventlog.ErrClosed())
				return
			case <-changed:
			}
		}
	}
}

// emit yields a chunk, or its error, and reports whether to go on.
func emit(ctx context.Context, events []*outriggerv1.Event, err error, yield func(*outriggerv1.Event, error) bool) bool {
	if err != nil {
		yield(nil, err)
		return false
	}
	for i, e := range events {
		if i > 0 && ctx.Err() != nil {
			yield(nil, eventlog.ErrRead(ctx))
			return false
		}
		if !yield(e, nil) {
			return false
		}
	}
	return true
}

// chunk reads events from position next on, up to head and the bounds of a chunk. It
// returns at least one event unless next is beyond head, and never skips a position.
func (l *Log) chunk(ctx context.Context, next, head uint64) ([]*outriggerv1.Event, error) {
	if err := l.enter(ctx); err != nil {
		return nil, err
	}
	defer l.calls.leave()
	if next > head {
		return nil, nil
	}
	var out []*outriggerv1.Event
	size := 0
	expected := next
	err := scan(l.store.db, eventKey(next), eventKey(head+1), func(key, value []byte) (bool, error) {
		position, err := parseNumber("event key", key[1:])
		if err != nil {
			return false, err
		}
		if position != expected {
			return false, damaged(expected, "record is missing")
		}
		e, err := decodeRecord(position, value)
		if err != nil {
			return false, err
		}
		out, size, expected = append(out, e), size+len(value), expected+1
		return len(out) < chunkEvents && size < chunkBytes, nil
	})
	if err == nil && len(out) == 0 {
		err = damaged(next, "record is missing")
	}
	return out, err
}

// aggregateChunk is chunk for one aggregate, from sequence next on.
func (l *Log) aggregateChunk(ctx context.Context, aggregate string, next, head uint64) ([]*outriggerv1.Event, error) {
	if err := l.enter(ctx); err != nil {
		return nil, err
	}
	defer l.calls.leave()
	var out []*outriggerv1.Event
	size := 0
	// The successor of the separator ends the aggregate's range.
	upper := append(append([]byte{prefixIndex}, aggregate...), 1)
	err := scan(l.store.db, indexKey(aggregate, next), upper, func(_, value []byte) (bool, error) {
		position, err := parseNumber("index entry of "+aggregate, value)
		if err != nil || position > head {
			return false, err
		}
		record, err := l.store.get(eventKey(position))
		if err != nil {
			return false, err
		}
		e, err := decodeRecord(position, record)
		if err != nil {
			return false, err
		}
		if want := next + uint64(len(out)); e.Aggregate != aggregate || e.Sequence != want {
			return false, damaged(position, "index and record disagree")
		}
		out, size = append(out, e), size+len(record)
		return len(out) < chunkEvents && size < chunkBytes, nil
	})
	return out, err
}

// between reads the events of an outcome that is known to be durable.
func (l *Log) between(ctx context.Context, o eventlog.Outcome) ([]*outriggerv1.Event, error) {
	var out []*outriggerv1.Event
	for next := o.First; next <= o.Last; {
		events, err := l.chunk(ctx, next, o.Last)
		if err != nil {
			return nil, err
		}
		out = append(out, events...)
		next += uint64(len(events))
	}
	return out, nil
}
