package variables

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"math"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

const (
	// maxAttempts bounds the decisions of one call. In this process the gates leave
	// hardly any races; the bound is for other writers of the same log.
	maxAttempts = 32
	// maxBackoff is the longest pause between two attempts that saw no progress.
	maxBackoff = 50 * time.Millisecond
)

// floor is what only the log knows about an aggregate the projection has forgotten: a
// name whose session was deleted, or whose tombstone was dropped.
type floor struct {
	seq     uint64
	version *pb.Version // nil for sessions
}

type floors map[string]floor

// expect returns the sequence to write against: the projection's, or a later one.
func (f floors) expect(aggregate string, known uint64) int64 {
	return int64(max(known, f[aggregate].seq))
}

// view is what a decision sees of a session: one instant of the projection.
type view struct {
	session *session // for its immutable fields and reserveID; nil: there is none
	seq     uint64
	life    uint64 // position of its creation
	live    int
	deps    dependencies
}

// see looks up a session and identifiers in it under one lock. vars[i] is nil when
// identifiers[i] names no live variable. With the session absent the error has kind
// NotFound.
func (s *Service) see(id sessionID, identifiers ...string) (view, []*variable, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	sess := s.state.sessions[id]
	if sess == nil {
		return view{}, nil, outrigger.ErrSessionNotFound(id.name)
	}
	vars := make([]*variable, len(identifiers))
	for i, x := range identifiers {
		vars[i] = sess.lookup(x)
	}
	return view{session: sess, seq: sess.seq, life: sess.createdPos, live: sess.live, deps: sess.deps}, vars, nil
}

// guard is the write that makes an append fail if the session has changed.
func (v view) guard(id sessionID) eventlog.Write {
	return eventlog.Write{Aggregate: sessionAggregate(id), Expect: int64(v.seq)}
}

// decision returns the writes that carry a request out on the present projection; an
// error is the answer of the call. No writes and no error means nothing to do.
type decision func(f floors) ([]eventlog.Write, error)

// commit decides, appends and waits until the projection has applied the append. The
// request id was seen before: Duplicate is set and Events are the first ones, also when
// the decision would now fail (the name exists, the version has moved on).
func (s *Service) commit(ctx context.Context, requestID string, decide decision) (eventlog.Appended, error) {
	known := make(floors)
	tried := make(map[string]int64)
	for attempt := range maxAttempts {
		writes, err := decide(known)
		if err != nil {
			if app, seen := s.probe(ctx, requestID); seen {
				return s.applied(ctx, app)
			}
			return eventlog.Appended{}, err
		}
		if len(writes) == 0 {
			return eventlog.Appended{}, nil
		}
		app, err := s.log.Append(ctx, requestID, writes...)
		if err == nil {
			return s.applied(ctx, app)
		}
		if !outrigger.IsKind(err, outrigger.Conflict) {
			return eventlog.Appended{}, err
		}
		s.metrics.conflicts.Add(ctx, 1)
		if err := s.settle(ctx, attempt, writes, tried, known); err != nil {
			return eventlog.Appended{}, err
		}
	}
	return eventlog.Appended{}, outrigger.Errorf(outrigger.Unavailable, "gave up after losing %d races for the same variables; nothing was changed, retry", maxAttempts)
}

// applied waits for the projection. The append is durable by now, so a failure to wait
// must not read as "nothing was changed".
func (s *Service) applied(ctx context.Context, app eventlog.Appended) (eventlog.Appended, error) {
	err := s.progress.wait(ctx, app.Last)
	return app, outrigger.Wrap(outrigger.Unknown, err, "the write is durable, but the answer was not ready in time; read to see it")
}

// settle prepares the next attempt after a conflict: the projection catches up with the
// log, and what it can never know about an aggregate is read from the log.
func (s *Service) settle(ctx context.Context, attempt int, writes []eventlog.Write, tried map[string]int64, known floors) error {
	if err := s.progress.wait(ctx, s.log.Head()); err != nil {
		return err
	}
	for _, w := range writes {
		before, again := tried[w.Aggregate]
		if w.Expect == 0 || again && before == w.Expect {
			if err := s.readFloor(ctx, w.Aggregate, uint64(w.Expect), known); err != nil {
				return err
			}
		}
		tried[w.Aggregate] = w.Expect
	}
	if attempt < 2 {
		return nil
	}
	// A competitor's commit may be in flight: give it the time of one.
	t := time.NewTimer(min(time.Millisecond<<attempt, maxBackoff))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// readFloor reads an aggregate's events after a sequence.
func (s *Service) readFloor(ctx context.Context, aggregate string, after uint64, known floors) error {
	f := known[aggregate]
	for e, err := range s.log.Read(ctx, aggregate, max(after, f.seq)+1) {
		if err != nil {
			return err
		}
		f.seq = e.GetSequence()
		if v := eventVersion(e); v != nil {
			f.version = fillVersion(s.origin, e, v, f.version)
		}
	}
	known[aggregate] = f
	return nil
}

func eventVersion(e *pb.Event) *pb.Version {
	switch p := e.GetPayload().(type) {
	case *pb.Event_VariableRegistered:
		return p.VariableRegistered.GetVersion()
	case *pb.Event_VariableSet:
		return p.VariableSet.GetVersion()
	case *pb.Event_VariableDeleted:
		return p.VariableDeleted.GetVersion()
	}
	return nil
}

// probeAggregate is never written: probe's append expects a sequence no aggregate has.
const probeAggregate = "probe/variables"

// probe asks the log whether it knows a request id. The log looks at the id before it
// looks at Expect, so an append that cannot succeed answers the question.
func (s *Service) probe(ctx context.Context, requestID string) (eventlog.Appended, bool) {
	if requestID == "" {
		return eventlog.Appended{}, false
	}
	app, err := s.log.Append(ctx, requestID, eventlog.Write{
		Aggregate: probeAggregate, Expect: math.MaxInt64, Events: []*pb.Event{{Schema: 1}},
	})
	return app, err == nil && app.Duplicate
}

// scoped is the idempotency key for the log: request ids of different sessions and
// tenants never meet.
func scoped(id sessionID, requestID string) string {
	if requestID == "" {
		return ""
	}
	var raw []byte
	for _, part := range []string{id.tenant, id.name, requestID} {
		raw = binary.AppendUvarint(raw, uint64(len(part)))
		raw = append(raw, part...)
	}
	sum := sha256.Sum256(raw)
	return "variables/" + hex.EncodeToString(sum[:])
}

// errReused answers a request id that stands for a different write.
func errReused(requestID string) error {
	return outrigger.Errorf(outrigger.Invalid, "options.request_id %q was used for another write of this session; use a new one", requestID)
}

// after returns the variable as it was right after event e. before is what the write was
// decided on (nil at a first registration); for a duplicate it is not used, because
// other writes may lie between, and the variable is folded from the log instead.
func (s *Service) after(ctx context.Context, before *variable, e *pb.Event, duplicate bool) (*variable, error) {
	key, ok := parseVar(e.GetAggregate())
	if !ok {
		return nil, outrigger.Errorf(outrigger.Internal, "event at %d is of aggregate %q, not of a variable", e.GetPosition(), e.GetAggregate())
	}
	if v := s.current(key); v != nil && v.seq == e.GetSequence() && v.position == e.GetPosition() {
		return v, nil // nobody has written since
	}
	if !duplicate {
		if v := fold(s.origin, key, before, e); v != nil {
			return v, nil
		}
		return nil, outrigger.Errorf(outrigger.Internal, "event at %d does not follow from what it was decided on", e.GetPosition())
	}
	var v *variable
	for x, err := range s.log.Read(ctx, e.GetAggregate(), 1) {
		if err != nil {
			return nil, err
		}
		if next := fold(s.origin, key, revived(v, x), x); next != nil {
			v = next
		}
		if x.GetSequence() == e.GetSequence() {
			break
		}
	}
	if v == nil || v.seq != e.GetSequence() {
		return nil, outrigger.Errorf(outrigger.NotFound, "the first answer of this request is no longer known; read the variable")
	}
	return v, nil
}

// current returns the variable or tombstone of a key, or nil.
func (s *Service) current(key outrigger.Key) *variable {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if sess := s.state.sessions[sessionID{key.Tenant, key.Session}]; sess != nil {
		return sess.vars[key.Name]
	}
	return nil
}

// revived lets a registration follow a live variable: its session was deleted in
// between, which the variable's own events do not show.
func revived(v *variable, next *pb.Event) *variable {
	if v == nil || next.GetVariableRegistered() == nil || v.deleted {
		return v
	}
	dead := *v
	dead.deleted = true
	return &dead
}
