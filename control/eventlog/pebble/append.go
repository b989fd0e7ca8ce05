package pebble

import (
	"context"
	"slices"
	"sync/atomic"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// States of a request. Exactly one of caller and committer moves it out of waiting, so
// an append whose caller gave up is either not written at all or reported as unknown.
const (
	waiting int32 = iota
	taken
	withdrawn
)

// request is one append on its way through the committer.
type request struct {
	id      string
	writes  []eventlog.Write
	events  []*outriggerv1.Event // own copies in order; the committer stamps them
	records [][]byte             // their encodings, without the stamp
	bytes   int
	// verbatim: the events keep the stamps they have; see Copy.Ingest.
	verbatim bool
	state    atomic.Int32
	done     chan result // buffered: the committer never waits for a caller
}

type result struct {
	outcome   eventlog.Outcome
	duplicate bool
	err       error
}

// Append implements eventlog.Appender.
func (l *Log) Append(ctx context.Context, requestID string, writes ...eventlog.Write) (eventlog.Appended, error) {
	if err := eventlog.Check(requestID, writes); err != nil {
		return eventlog.Appended{}, err
	}
	req, err := newRequest(requestID, writes)
	if err != nil {
		return eventlog.Appended{}, err
	}
	return l.commit(ctx, req)
}

// commit takes a request through the committer.
func (l *Log) commit(ctx context.Context, req *request) (eventlog.Appended, error) {
	if ctx.Err() != nil {
		return eventlog.Appended{}, eventlog.ErrNotQueued(ctx)
	}
	if err := l.enter(context.WithoutCancel(ctx)); err != nil {
		return eventlog.Appended{}, err
	}
	defer l.calls.leave()
	select {
	case l.queue <- req:
	case <-ctx.Done():
		return eventlog.Appended{}, eventlog.ErrNotQueued(ctx)
	}
	res := req.wait(ctx)
	if res.err != nil {
		l.metrics.refuse(res.err)
		return eventlog.Appended{}, res.err
	}
	out := eventlog.Appended{First: res.outcome.First, Last: res.outcome.Last, Events: req.events, Duplicate: res.duplicate}
	if res.duplicate {
		events, err := l.between(ctx, res.outcome)
		if err != nil {
			return eventlog.Appended{}, err
		}
		out.Events = events
	}
	return out, nil
}

// newRequest copies and encodes the events, in the caller's goroutine so that the
// committer has little to do per event.
func newRequest(id string, writes []eventlog.Write) (*request, error) {
	// A caller that gave up may reuse its slice while the committer looks at the request.
	r := &request{id: id, writes: slices.Clone(writes), done: make(chan result, 1)}
	for _, w := range writes {
		for i, e := range w.Events {
			c := proto.CloneOf(e)
			c.Aggregate, c.Sequence, c.Position, c.Hlc, c.At = w.Aggregate, 0, 0, 0, nil
			b, err := encodeBody(c)
			if err != nil {
				return nil, outrigger.Errorf(outrigger.Invalid, "event %d of %q cannot be encoded: %v", i, w.Aggregate, err)
			}
			r.events = append(r.events, c)
			r.records = append(r.records, b)
			r.bytes += len(b) + recordOverhead
		}
	}
	return r, nil
}

// wait returns the result, or an error as soon as ctx ends: Unavailable if the request
// could be withdrawn, Unknown if its commit had begun.
func (r *request) wait(ctx context.Context) result {
	select {
	case res := <-r.done:
		return res
	case <-ctx.Done():
	}
	if r.state.CompareAndSwap(waiting, withdrawn) {
		return result{err: eventlog.ErrNotQueued(ctx)}
	}
	select {
	case res := <-r.done:
		return res
	default:
		return result{err: outrigger.Wrap(outrigger.Unknown, context.Cause(ctx), "append was being committed when the caller gave up; repeat it with the same request id to learn the outcome")}
	}
}
