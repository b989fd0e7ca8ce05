package variables

import (
	"cmp"
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// maxSessionsListed bounds one ListSessions answer.
const maxSessionsListed = 1000

// enter is the beginning of every call: the service is ready and the session's name is
// valid. The session need not exist; if it does, it has been used now.
func (s *Service) enter(tenant, session string) (sessionID, error) {
	id := sessionID{wire.Tenant(tenant), session}
	if err := s.isReady(); err != nil {
		return id, err
	}
	if err := id.check(); err != nil {
		return id, err
	}
	s.touch(id, s.opt.Now())
	return id, nil
}

// done is the end of every write call.
func (s *Service) done(ctx context.Context, op string, start time.Time, err error) {
	s.metrics.wrote(ctx, op, s.opt.Now().Sub(start), err)
}

// CreateSession implements pb.VariablesServer. Creating a session that exists fails
// with Exists unless if_absent is set, which returns the present one unchanged.
func (s *Service) CreateSession(ctx context.Context, req *pb.CreateSessionRequest) (*pb.Session, error) {
	start := s.opt.Now()
	out, err := s.createSession(ctx, req)
	s.done(ctx, "create_session", start, err)
	return reply(ctx, out, err)
}

func (s *Service) createSession(ctx context.Context, req *pb.CreateSessionRequest) (*pb.Session, error) {
	id, err := s.enter(req.GetTenant(), req.GetId())
	if err != nil {
		return nil, err
	}
	if err := checkTTL(req.GetTtl()); err != nil {
		return nil, err
	}
	if err := checkMetadata("metadata", req.GetMetadata()); err != nil {
		return nil, err
	}
	leave, err := s.gates.enter(ctx, sessionAggregate(id))
	if err != nil {
		return nil, err
	}
	defer leave()
	_, err = s.commit(ctx, "", func(f floors) ([]eventlog.Write, error) {
		if _, _, err := s.see(id); err == nil {
			if req.GetIfAbsent() {
				return nil, nil
			}
			return nil, outrigger.Errorf(outrigger.Exists, "Session already exists: %s", id.name)
		}
		w, err := s.newSession(id, f, req, author{actor: "API", source: "API"})
		return []eventlog.Write{w}, err
	})
	if err != nil {
		return nil, err
	}
	return s.sessionPB(id)
}

func checkTTL(d *durationpb.Duration) error {
	if d == nil {
		return nil
	}
	if err := d.CheckValid(); err != nil {
		return outrigger.Errorf(outrigger.Invalid, "ttl is not a valid duration: %v", err)
	}
	if ttl := d.AsDuration(); ttl < 0 {
		return outrigger.Errorf(outrigger.Invalid, "ttl is %v; give a positive duration, or none for %v", ttl, outrigger.DefaultSessionTTL)
	}
	return nil
}

// newSession returns the write that creates a session.
func (s *Service) newSession(id sessionID, f floors, req *pb.CreateSessionRequest, a author) (eventlog.Write, error) {
	s.mu.RLock()
	n := len(s.state.sessions)
	s.mu.RUnlock()
	if n >= s.opt.SessionLimit {
		return eventlog.Write{}, outrigger.Errorf(outrigger.Exhausted, "there are %d sessions, the limit is %d; delete some or raise the limit", n, s.opt.SessionLimit)
	}
	e := a.event()
	e.Payload = &pb.Event_SessionCreated{SessionCreated: &pb.SessionCreated{Ttl: req.GetTtl(), Metadata: req.GetMetadata()}}
	aggregate := sessionAggregate(id)
	return eventlog.Write{Aggregate: aggregate, Expect: f.expect(aggregate, 0), Events: []*pb.Event{e}}, nil
}

// GetSession implements pb.VariablesServer; it counts as a use.
func (s *Service) GetSession(ctx context.Context, req *pb.GetSessionRequest) (*pb.Session, error) {
	id, err := s.enter(req.GetTenant(), req.GetId())
	if err != nil {
		return reply[pb.Session](ctx, nil, err)
	}
	out, err := s.sessionPB(id)
	return reply(ctx, out, err)
}

func (s *Service) sessionPB(id sessionID) (*pb.Session, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	sess := s.state.sessions[id]
	if sess == nil {
		return nil, outrigger.ErrSessionNotFound(id.name)
	}
	return sess.message(), nil
}

// message is the session as clients see it; Service.mu is held for reading.
func (s *session) message() *pb.Session {
	out := &pb.Session{
		Tenant: s.id.tenant, Id: s.id.name, Metadata: s.metadata, VariableCount: int32(s.live),
		CreatedAt: timestamppb.New(s.createdAt), LastUsedAt: timestamppb.New(time.Unix(0, s.lastUsed())),
	}
	if s.ttl != 0 {
		out.Ttl = durationpb.New(s.ttl)
	}
	return out
}

// TouchSessions implements pb.VariablesServer: all named sessions have been used now.
func (s *Service) TouchSessions(ctx context.Context, req *pb.TouchSessionsRequest) (*pb.TouchSessionsResponse, error) {
	if err := s.isReady(); err != nil {
		return reply[pb.TouchSessionsResponse](ctx, nil, err)
	}
	if n := len(req.GetIds()); n > outrigger.MaxBatch {
		return reply[pb.TouchSessionsResponse](ctx, nil, errBatch("ids", n))
	}
	out, now := &pb.TouchSessionsResponse{}, s.opt.Now()
	for _, name := range req.GetIds() {
		if !s.touch(sessionID{wire.Tenant(req.GetTenant()), name}, now) {
			out.Unknown = append(out.Unknown, name)
		}
	}
	return out, nil
}

func errBatch(field string, n int) error {
	return outrigger.Errorf(outrigger.Exhausted, "%s has %d entries, the limit is %d; split the call", field, n, outrigger.MaxBatch)
}

// DeleteSession implements pb.VariablesServer. The count is what the session held when
// the deletion was decided.
func (s *Service) DeleteSession(ctx context.Context, req *pb.GetSessionRequest) (*pb.DeleteSessionResponse, error) {
	start := s.opt.Now()
	out, err := s.deleteSession(ctx, req)
	s.done(ctx, "delete_session", start, err)
	return reply(ctx, out, err)
}

func (s *Service) deleteSession(ctx context.Context, req *pb.GetSessionRequest) (*pb.DeleteSessionResponse, error) {
	id, err := s.enter(req.GetTenant(), req.GetId())
	if err != nil {
		return nil, err
	}
	leave, err := s.gates.enter(ctx, sessionAggregate(id))
	if err != nil {
		return nil, err
	}
	defer leave()
	out := &pb.DeleteSessionResponse{}
	app, err := s.commit(ctx, "", func(floors) ([]eventlog.Write, error) {
		v, _, err := s.see(id)
		if err != nil {
			out.VariablesRemoved = 0
			out.Gone = s.dotAt(s.Applied()) // at or after the instant see was about
			return nil, nil                 // nothing to delete is success
		}
		out.VariablesRemoved = int32(v.live)
		e := author{actor: "API", source: "API"}.event()
		e.Payload = &pb.Event_SessionDeleted{SessionDeleted: &pb.SessionDeleted{Reason: reasonCleanup}}
		w := v.guard(id)
		w.Events = []*pb.Event{e}
		return []eventlog.Write{w}, nil
	})
	if app.Last > 0 {
		out.Gone = s.dotAt(app.Last)
	}
	return out, err
}

// dotAt is a position of this log; nil for none.
func (s *Service) dotAt(position uint64) *pb.Dot {
	if position == 0 {
		return nil
	}
	return &pb.Dot{Region: s.origin.region, Incarnation: s.origin.incarnation, Position: position}
}

// ListSessions implements pb.VariablesServer: the first sessions of the tenant by id.
// Listing is not a use.
func (s *Service) ListSessions(ctx context.Context, req *pb.ListSessionsRequest) (*pb.ListSessionsResponse, error) {
	out, err := s.listSessions(req)
	return reply(ctx, out, err)
}

func (s *Service) listSessions(req *pb.ListSessionsRequest) (*pb.ListSessionsResponse, error) {
	if err := s.isReady(); err != nil {
		return nil, err
	}
	limit, err := checkLimit(req.GetLimit(), maxSessionsListed, maxSessionsListed)
	if err != nil {
		return nil, err
	}
	tenant := wire.Tenant(req.GetTenant())
	s.mu.RLock()
	var found []*session
	for id, sess := range s.state.sessions {
		if id.tenant == tenant {
			found = append(found, sess)
		}
	}
	s.mu.RUnlock()
	// Sorting needs the fixed fields only; the rest is read under the lock again.
	slices.SortFunc(found, func(a, b *session) int { return cmp.Compare(a.id.name, b.id.name) })
	found = found[:min(limit, len(found))]
	out := &pb.ListSessionsResponse{}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, sess := range found {
		out.Sessions = append(out.Sessions, sess.message())
	}
	return out, nil
}

// checkLimit applies a default and a maximum to a limit field.
func checkLimit(n int32, initial, highest int) (int, error) {
	switch {
	case n == 0:
		return initial, nil
	case n < 0 || int(n) > highest:
		return 0, outrigger.Errorf(outrigger.Invalid, "limit is %d; give 1 to %d, or 0 for %d", n, highest, initial)
	}
	return int(n), nil
}
