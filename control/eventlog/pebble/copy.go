package pebble

import (
	"context"
	"encoding/binary"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// copyMark ends the identity of a store that holds a copy of another log.
const copyMark = 'c'

// Copy is a log whose events come from another log, position by position. It is read as
// any log is; it takes no Append of its own, only Ingest, and refuses what would leave a
// gap. Its Incarnation is that of the log it copies.
//
// What was ingested is as durable as what is appended to a log. The request ids of the
// other log are not copied.
type Copy struct{ *Log }

// OpenCopy opens the copy in dir, or creates one there of the log with that incarnation. An
// incarnation of 0 opens an existing copy only: kind NotFound if dir holds nothing yet. Kind
// Conflict if dir holds a copy of another log, Invalid if it holds a log of its own.
func OpenCopy(dir string, incarnation uint64, opts Options) (*Copy, error) {
	l, err := open(dir, opts, func(l *Log) error { return l.identifyCopy(dir, incarnation) })
	if err != nil {
		return nil, err
	}
	return &Copy{l}, nil
}

// Promote makes the copy in dir a log of its own, with a new incarnation: what its leader had
// acknowledged and not yet shipped is not in it, so nobody may take it for the same log. The
// store must not be open.
func Promote(dir string, opts Options) (err error) {
	opts = opts.withDefaults()
	st, err := openStore(dir, opts)
	if err != nil {
		return err
	}
	defer func() { err = closeAfter(st, err) }()
	v, err := st.get(metaKey)
	if err != nil {
		return err
	}
	if len(v) != 10 || v[9] != copyMark {
		return outrigger.Errorf(outrigger.Invalid, "%s holds no copy of another log; there is nothing to promote", dir)
	}
	return st.set(metaKey, append([]byte{layoutVersion}, newIncarnation()...))
}

// identifyCopy loads the identity of a copy, or gives an empty store one.
func (l *Log) identifyCopy(dir string, incarnation uint64) error {
	v, err := l.store.get(metaKey)
	if err != nil {
		return err
	}
	if v == nil {
		empty, err := l.store.empty()
		switch {
		case err != nil:
			return err
		case !empty:
			return errForeign()
		case incarnation == 0:
			return outrigger.Errorf(outrigger.NotFound, "copy of a log not found in %s", dir)
		}
		v = append(binary.BigEndian.AppendUint64([]byte{layoutVersion}, incarnation), copyMark)
		if err := l.store.set(metaKey, v); err != nil {
			return err
		}
	}
	switch {
	case len(v) == 9 && v[0] == layoutVersion:
		return outrigger.Errorf(outrigger.Invalid, "%s holds a log of its own, not a copy; give a follower a directory of its own", dir)
	case len(v) != 10 || v[0] != layoutVersion || v[9] != copyMark:
		return errLayout(v)
	}
	l.incarnation = binary.BigEndian.Uint64(v[1:9])
	if incarnation != 0 && l.incarnation != incarnation {
		return outrigger.Errorf(outrigger.Conflict, "%s holds a copy of log %x, the leader's log is %x; remove the directory to copy that one", dir, l.incarnation, incarnation)
	}
	return nil
}

// Append refuses: a copy is written by Ingest alone.
func (c *Copy) Append(context.Context, string, ...eventlog.Write) (eventlog.Appended, error) {
	return eventlog.Appended{}, outrigger.Errorf(outrigger.Invalid, "this log is a copy; append to the log it copies")
}

// Ingest stores events as they are, all or nothing, durable when it returns nil. They must
// continue the copy: positions from Head()+1 on, sequences without gaps; else kind Conflict
// and nothing is stored. At most eventlog.MaxBatchEvents at a time. The other errors are
// those of an append. The events are not modified and may be reused after it returns.
func (c *Copy) Ingest(ctx context.Context, events []*outriggerv1.Event) error {
	if len(events) == 0 || len(events) > eventlog.MaxBatchEvents {
		return outrigger.Errorf(outrigger.Invalid, "%d events to ingest; give 1 to %d", len(events), eventlog.MaxBatchEvents)
	}
	r := &request{verbatim: true, done: make(chan result, 1)}
	for _, e := range events {
		own := proto.CloneOf(e)
		body := proto.CloneOf(e)
		body.Sequence, body.Position, body.Hlc, body.At = 0, 0, 0, nil
		b, err := encodeBody(body)
		switch {
		case err != nil:
			return outrigger.Errorf(outrigger.Invalid, "event %d cannot be encoded: %v", e.GetPosition(), err)
		case eventlog.CheckAggregate("aggregate", e.GetAggregate()) != nil || !e.GetAt().IsValid():
			return outrigger.Errorf(outrigger.Invalid, "event %d has no usable aggregate or time", e.GetPosition())
		}
		r.events, r.records, r.bytes = append(r.events, own), append(r.records, b), r.bytes+len(b)+recordOverhead
	}
	_, err := c.commit(ctx, r)
	return err
}

// placeVerbatim decides one request of Ingest.
func (c *committer) placeVerbatim(g *group, r *request) result {
	sequences := make(map[string]uint64)
	for i, e := range r.events {
		last, seen := sequences[e.Aggregate]
		if !seen {
			var err error
			if last, err = c.sequence(e.Aggregate); err != nil {
				return result{err: err}
			}
		}
		if e.Position != c.next+uint64(i) || e.Sequence != last+1 {
			return result{err: outrigger.Errorf(outrigger.Conflict, "event at position %d, sequence %d of %q does not continue the copy, which is at %d and %d",
				e.Position, e.Sequence, e.Aggregate, c.next+uint64(i)-1, last)}
		}
		sequences[e.Aggregate] = e.Sequence
	}
	o := eventlog.Outcome{First: c.next, Last: c.next + uint64(len(r.events)) - 1}
	for i, e := range r.events {
		g.fail(g.batch.Set(eventKey(e.Position), appendStamp(slices.Clip(r.records[i]), e.Sequence, e.Position, e.Hlc, e.At.AsTime()), nil))
		g.fail(g.batch.Set(indexKey(e.Aggregate, e.Sequence), number(e.Position), nil))
		c.sequences.put(e.Aggregate, e.Sequence)
		g.touched[e.Aggregate] = e.Sequence
		c.clock.Resume(e)
		c.next++
		g.events++
	}
	return result{outcome: o}
}
