package eventlog

import (
	"context"
	"errors"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
)

// Check applies every rule an append must satisfy before an engine looks at the log:
//
//   - one to MaxBatchEvents events in all, none nil, each at most MaxEventBytes and
//     together at most MaxBatchBytes;
//   - aggregates as CheckAggregate wants them;
//   - Expect is Any or ≥ 0, and a write without events has one to check;
//   - the request id has at most MaxRequestIDBytes of UTF-8.
//
// Errors have kind Invalid, or Exhausted where a size or count is over its limit.
// Check reads the messages and keeps nothing.
func Check(requestID string, writes []Write) error {
	if len(requestID) > MaxRequestIDBytes {
		return outrigger.Errorf(outrigger.Exhausted, "request id is %d bytes long, the limit is %d; use a hash of it", len(requestID), MaxRequestIDBytes)
	}
	if !utf8.ValidString(requestID) {
		return outrigger.Errorf(outrigger.Invalid, "request id %q is not valid UTF-8", requestID)
	}
	events, size := 0, 0
	for _, w := range writes {
		n, err := checkWrite(w)
		if err != nil {
			return err
		}
		events += len(w.Events)
		size += n
	}
	switch {
	case events == 0:
		return outrigger.Errorf(outrigger.Invalid, "append has no events; give 1 to %d", MaxBatchEvents)
	case events > MaxBatchEvents:
		return outrigger.Errorf(outrigger.Exhausted, "append has %d events, the limit is %d; split it", events, MaxBatchEvents)
	case size > MaxBatchBytes:
		return outrigger.Errorf(outrigger.Exhausted, "append has %d bytes of events, the limit is %d; split it", size, MaxBatchBytes)
	}
	return nil
}

// checkWrite applies the rules of one write and returns the size of its events.
func checkWrite(w Write) (int, error) {
	if err := CheckAggregate("aggregate", w.Aggregate); err != nil {
		return 0, err
	}
	if w.Expect < Any {
		return 0, outrigger.Errorf(outrigger.Invalid, "expect of %q is %d; give a sequence ≥ 0 or Any (%d)", w.Aggregate, w.Expect, Any)
	}
	if len(w.Events) == 0 && w.Expect == Any {
		return 0, outrigger.Errorf(outrigger.Invalid, "write to %q has neither events nor an expected sequence", w.Aggregate)
	}
	size := 0
	for i, e := range w.Events {
		if e == nil {
			return 0, outrigger.Errorf(outrigger.Invalid, "event %d of %q is nil", i, w.Aggregate)
		}
		n := proto.Size(e)
		if n > MaxEventBytes {
			return 0, outrigger.Errorf(outrigger.Exhausted, "event %d of %q is %d bytes, the limit is %d; store a reference instead", i, w.Aggregate, n, MaxEventBytes)
		}
		size += n
	}
	return size, nil
}

// CheckAggregate applies the rules of aggregate and snapshot names: 1 to
// MaxAggregateBytes of UTF-8 without control characters (engines use them as
// separators). field names the value in the error.
func CheckAggregate(field, name string) error {
	switch {
	case name == "":
		return outrigger.Errorf(outrigger.Invalid, "%s is empty; give 1 to %d bytes", field, MaxAggregateBytes)
	case len(name) > MaxAggregateBytes:
		return outrigger.Errorf(outrigger.Invalid, "%s is %d bytes long, the limit is %d; shorten it", field, len(name), MaxAggregateBytes)
	case !utf8.ValidString(name):
		return outrigger.Errorf(outrigger.Invalid, "%s %q is not valid UTF-8", field, name)
	}
	for _, r := range name {
		if r < 0x20 || r == 0x7f {
			return outrigger.Errorf(outrigger.Invalid, "%s %q contains %q; control characters are not allowed", field, name, r)
		}
	}
	return nil
}

// CheckSnapshot applies the rules of SaveSnapshot given the log's head.
func CheckSnapshot(name string, position, head uint64, state []byte) error {
	if err := CheckAggregate("snapshot name", name); err != nil {
		return err
	}
	if position == 0 || position > head {
		return outrigger.Errorf(outrigger.Invalid, "snapshot %q is at position %d; the log has 1 to %d", name, position, head)
	}
	if len(state) > MaxSnapshotBytes {
		return outrigger.Errorf(outrigger.Exhausted, "snapshot %q is %d bytes, the limit is %d", name, len(state), MaxSnapshotBytes)
	}
	return nil
}

// ErrConflict builds the error of a failed Expect; the text names both sequences.
func ErrConflict(aggregate string, expect int64, current uint64) *outrigger.Error {
	return outrigger.Errorf(outrigger.Conflict, "aggregate %q is at sequence %d, expected %d; read it and retry", aggregate, current, expect)
}

// ErrClosed builds the error of every call after Close.
func ErrClosed() *outrigger.Error {
	return outrigger.Errorf(outrigger.Unavailable, "event log is closed; nothing was changed")
}

// ErrNotQueued builds the error of an append whose ctx ended before its commit began.
func ErrNotQueued(ctx context.Context) error {
	return outrigger.Wrap(outrigger.Unavailable, context.Cause(ctx), "append gave up before its commit began; nothing was written")
}

// ErrRead builds the error of a read whose ctx ended: Timeout for a deadline, else Cancelled.
func ErrRead(ctx context.Context) error {
	kind := outrigger.Cancelled
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		kind = outrigger.Timeout
	}
	return outrigger.Wrap(kind, context.Cause(ctx), "event log read stopped")
}
