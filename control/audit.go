package control

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// Bounds of one audit call. Reading an event takes a few microseconds, so a call ends
// within about a second; what it did not look at is behind AuditResponse.next.
const (
	auditScan  = 100_000
	auditChunk = 1_000 // read at once when going backwards
)

// auditFilter is a checked AuditRequest.
type auditFilter struct {
	prefix, actor, kind string
	since, until        time.Time // zero = open
}

func (q auditFilter) matches(e *pb.Event) bool {
	if !strings.HasPrefix(e.GetAggregate(), q.prefix) || q.actor != "" && e.GetActor() != q.actor {
		return false
	}
	return (q.kind == "" || eventlog.EventKind(e) == q.kind) && !q.before(e) && !q.after(e)
}

func (q auditFilter) before(e *pb.Event) bool {
	return !q.since.IsZero() && e.GetAt().AsTime().Before(q.since)
}

// after reports whether e is at or past until: the interval is [since, until).
func (q auditFilter) after(e *pb.Event) bool {
	return !q.until.IsZero() && !e.GetAt().AsTime().Before(q.until)
}

// Audit returns the events of the log that pass every given filter, oldest first from
// position `from`, or with newest_first the newest first from `from` (0 = the head) down.
// A page may hold fewer than limit events, even none, and still name the next one: the
// scan of one call is bounded. next is 0 only when the log has been searched to its end.
func (a *admin) Audit(ctx context.Context, r *pb.AuditRequest) (*pb.AuditResponse, error) {
	q, limit, err := auditQuery(r)
	if err != nil {
		return nil, err
	}
	first, last, err := a.auditSpan(ctx, q)
	if err != nil {
		return nil, err
	}
	if r.GetNewestFirst() {
		if from := r.GetFrom(); from != 0 {
			last = min(last, from)
		}
		return a.auditDown(ctx, q, first, last, limit)
	}
	return a.auditUp(ctx, q, max(first, r.GetFrom()), last, limit)
}

func auditQuery(r *pb.AuditRequest) (auditFilter, int, error) {
	q := auditFilter{prefix: r.GetAggregatePrefix(), actor: r.GetActor(), kind: r.GetKind()}
	if q.kind != "" && !slices.Contains(eventKinds(), q.kind) {
		return q, 0, invalid("kind %q is not one of %s", q.kind, strings.Join(eventKinds(), ", "))
	}
	for _, t := range []struct {
		field string
		give  interface{ CheckValid() error }
		set   bool
	}{{"since", r.GetSince(), r.GetSince() != nil}, {"until", r.GetUntil(), r.GetUntil() != nil}} {
		if t.set && t.give.CheckValid() != nil {
			return q, 0, invalid("%s is not a valid time", t.field)
		}
	}
	if r.GetSince() != nil {
		q.since = r.GetSince().AsTime()
	}
	if r.GetUntil() != nil {
		q.until = r.GetUntil().AsTime()
	}
	limit := int(r.GetLimit())
	switch {
	case limit == 0:
		limit = defaultLimit
	case limit < 0 || limit > maxLimit:
		return q, 0, invalid("limit is %d, allowed is 1..%d, or 0 for %d", limit, maxLimit, defaultLimit)
	}
	return q, limit, nil
}

// eventKinds lists the words Audit knows, from the schema itself.
func eventKinds() []string {
	fields := new(pb.Event).ProtoReflect().Descriptor().Oneofs().ByName("payload").Fields()
	out := make([]string, fields.Len())
	for i := range out {
		out[i] = string(fields.Get(i).Name())
	}
	return out
}

// auditSpan narrows the search by time with O(log n) reads: event times never run
// backwards. The span first..last is empty when first > last.
func (a *admin) auditSpan(ctx context.Context, q auditFilter) (first, last uint64, err error) {
	first, last = 1, a.log.Head()
	if !q.since.IsZero() {
		if first, err = a.searchLog(ctx, last, func(e *pb.Event) bool { return !q.before(e) }); err != nil {
			return 0, 0, err
		}
	}
	if !q.until.IsZero() {
		end, err := a.searchLog(ctx, last, q.after)
		if err != nil {
			return 0, 0, err
		}
		last = end - 1
	}
	return first, last, nil
}

// searchLog returns the lowest position in 1..head whose event satisfies reached, which
// must be monotone, or head+1.
func (a *admin) searchLog(ctx context.Context, head uint64, reached func(*pb.Event) bool) (uint64, error) {
	lo, hi := uint64(1), head+1
	for lo < hi {
		mid := lo + (hi-lo)/2
		var at *pb.Event
		for e, err := range a.log.ReadAll(ctx, mid) {
			if err != nil {
				return 0, err
			}
			at = e
			break
		}
		if at == nil {
			return 0, outrigger.Errorf(outrigger.Internal, "the log has no event at position %d below its head %d", mid, head)
		}
		// A trimmed log answers with its oldest event, whose position is above mid.
		if reached(at) {
			hi = mid
		} else {
			lo = max(mid, at.GetPosition()) + 1
		}
	}
	return lo, nil
}

func (a *admin) auditUp(ctx context.Context, q auditFilter, first, last uint64, limit int) (*pb.AuditResponse, error) {
	out := new(pb.AuditResponse)
	if first > last {
		return out, nil
	}
	scanned := 0
	for e, err := range a.log.ReadAll(ctx, first) {
		switch {
		case err != nil:
			return nil, err
		case e.GetPosition() > last:
			return out, nil
		case len(out.Events) == limit || scanned == auditScan:
			out.Next = e.GetPosition()
			return out, nil
		}
		scanned++
		if q.matches(e) {
			out.Events = append(out.Events, e)
		}
	}
	return out, nil
}

// auditDown reads chunks that each end where the one before began.
func (a *admin) auditDown(ctx context.Context, q auditFilter, first, last uint64, limit int) (*pb.AuditResponse, error) {
	out := new(pb.AuditResponse)
	for scanned := 0; last >= first && last > 0; scanned += auditChunk {
		if scanned >= auditScan {
			out.Next = last
			return out, nil
		}
		start := first
		if last-first >= auditChunk {
			start = last - auditChunk + 1
		}
		chunk, err := a.readChunk(ctx, start, last)
		if err != nil {
			return nil, err
		}
		for _, e := range slices.Backward(chunk) {
			if len(out.Events) == limit {
				out.Next = e.GetPosition()
				return out, nil
			}
			if q.matches(e) {
				out.Events = append(out.Events, e)
			}
		}
		last = start - 1
	}
	return out, nil
}

func (a *admin) readChunk(ctx context.Context, first, last uint64) ([]*pb.Event, error) {
	chunk := make([]*pb.Event, 0, last-first+1)
	for e, err := range a.log.ReadAll(ctx, first) {
		if err != nil {
			return nil, err
		}
		if e.GetPosition() > last {
			break
		}
		chunk = append(chunk, e)
	}
	return chunk, nil
}
