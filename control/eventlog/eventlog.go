// Package eventlog defines the durable, totally ordered log every change of a region
// goes through, and what an engine must promise to carry it.
//
// The log is the system: current values, history, audit, the change feed, compiled
// policy and replication are all derived from it. Engines live in subpackages and
// pass the one conformance suite in eventlogtest.
//
// # Contract
//
// Append is all or nothing, durable when it returns nil (synced to stable storage:
// it survives kill -9 and power loss), gapless per aggregate (sequence from 1) and
// totally ordered per log (position from 1, gapless). A reader never sees an event
// before it is durable. Incarnation identifies one life of one log: it is kept across
// clean and unclean restarts of the same files, because nothing acknowledged is ever
// lost, and is new for a new or restored log.
//
// Bad input (empty aggregate, more than MaxBatchEvents events, an event over
// MaxEventBytes; the whole list is at Check) fails with kind Invalid or Exhausted and
// changes nothing. Overload is back-pressure: Append waits for room in a bounded commit
// queue until ctx ends, and then reports Unavailable with nothing written. If ctx ends
// or the process is told to stop while the commit is already in flight, the error has
// kind Unknown; a caller that gave a request id learns the outcome by appending again
// with the same id. A commit the storage refused also reports Unknown, and from then on
// the log refuses every append with kind Unavailable until it is reopened: after a
// failed sync nobody can say what is on the disk. Reads of what was committed before go on.
//
// Event times never run backwards: At is the later of the engine's clock and the
// previous event's At, and Hlc grows by at least one from event to event.
//
// After Close every method fails with kind Unavailable, open subscriptions included.
//
// All methods may be called concurrently.
package eventlog

import (
	"context"
	"iter"

	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Limits of one append, enforced by Check, and of one snapshot.
const (
	MaxBatchEvents    = 1000
	MaxEventBytes     = 8 << 20  // one event in protobuf encoding, as given by the caller
	MaxBatchBytes     = 32 << 20 // all events of one append together
	MaxAggregateBytes = 1024
	MaxRequestIDBytes = 512
	MaxSnapshotBytes  = 1 << 30
)

// Any as Write.Expect means "whatever the present sequence is".
const Any int64 = -1

// Write is the events to append to one aggregate. Engines fill in Aggregate, Sequence,
// Position, At and Hlc of each event on their own copy, whatever the caller had put
// there; the caller's messages are not modified and may be reused after Append returns.
//
// The writes of one append apply in order: a second write to the same aggregate sees
// the events of the first. A write without events is a pure check of Expect.
type Write struct {
	// Aggregate is 1 to MaxAggregateBytes of UTF-8 without control characters.
	Aggregate string
	// Expect is the aggregate's last sequence the writer has seen: 0 = the aggregate
	// must not exist yet, Any = no check. On mismatch the append fails with kind Conflict.
	Expect int64
	Events []*outriggerv1.Event
}

// Appended says where a batch landed: positions First..Last, contiguous, in the order
// the writes and events were given.
type Appended struct {
	First, Last uint64
	// Events are the stored events with sequence, position and time filled in.
	Events []*outriggerv1.Event
	// Duplicate is true when the request id was seen before: nothing was written and
	// Events are those of the first time.
	Duplicate bool
}

// Appender writes. requestID, when not empty, makes the append idempotent: the same
// id returns the first result for at least the engine's documented window, whatever the
// writes are and before any Expect is looked at. A refused append is not remembered.
type Appender interface {
	Append(ctx context.Context, requestID string, writes ...Write) (Appended, error)
}

// Reader reads committed events. The sequences yield (nil, err) once and stop on
// failure; ctx ending is a failure of kind Cancelled or Timeout. Yielded events must not
// be modified. A from of 0 means 1. No sequence holds a storage resource while the
// consumer's loop body runs.
type Reader interface {
	// Read yields the events of one aggregate with sequence ≥ from, in order, up to the
	// head at call time. An aggregate that does not exist has no events.
	Read(ctx context.Context, aggregate string, from uint64) iter.Seq2[*outriggerv1.Event, error]
	// ReadAll yields events with from ≤ position in log order up to the head at call time.
	ReadAll(ctx context.Context, from uint64) iter.Seq2[*outriggerv1.Event, error]
	// Head is the position of the last committed event, 0 for an empty log.
	Head() uint64
	// Incarnation identifies this log; never 0.
	Incarnation() uint64
}

// Subscriber follows the log.
type Subscriber interface {
	// Subscribe yields every event with position ≥ from, first stored ones, then new
	// ones as they commit, in order and without gaps, until ctx ends (then the sequence
	// stops without an error). A slow consumer costs no memory: it is fed from storage.
	Subscribe(ctx context.Context, from uint64) iter.Seq2[*outriggerv1.Event, error]
}

// Snapshots keeps the latest snapshot of a projection so that it need not replay the
// whole log. name is a projection name such as "variables".
type Snapshots interface {
	// SaveSnapshot durably replaces the snapshot of name; the last save wins. position
	// is the last event folded into state, 1 to Head. The name obeys the aggregate rules.
	SaveSnapshot(ctx context.Context, name string, position uint64, state []byte) error
	// LoadSnapshot returns position 0 and nil state when there is none.
	LoadSnapshot(ctx context.Context, name string) (position uint64, state []byte, err error)
}

// Log is what an engine implements.
type Log interface {
	Appender
	Reader
	Subscriber
	Snapshots
	// Close stops the log; in-flight appends finish or fail with kind Unknown. It may
	// be called once all other calls have been cancelled. A second Close does nothing.
	Close() error
}
