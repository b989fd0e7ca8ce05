package variables

import (
	"cmp"
	"context"
	"slices"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Get implements pb.VariablesServer.
func (s *Service) Get(ctx context.Context, req *pb.GetRequest) (*pb.Variable, error) {
	v, err := s.get(req)
	if err != nil {
		return reply[pb.Variable](ctx, nil, err)
	}
	return v.pb, nil
}

func (s *Service) get(req *pb.GetRequest) (*variable, error) {
	id, err := s.enter(req.GetTenant(), req.GetSession())
	if err != nil {
		return nil, err
	}
	if err := checkIdentifier(req.GetIdentifier()); err != nil {
		return nil, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	sess := s.state.sessions[id]
	if sess == nil {
		return nil, missing(id, req.GetIdentifier(), req.GetOptions())
	}
	if v := sess.lookup(req.GetIdentifier()); v != nil {
		return v, nil
	}
	return nil, outrigger.ErrVariableNotFound(req.GetIdentifier())
}

// missing is the error for an absent session. A caller that lets sessions be created on
// the fly is told that the variable is missing: it will register it, which creates both.
func missing(id sessionID, identifier string, o *pb.WriteOptions) error {
	if o.GetAutoCreateSession() {
		return outrigger.ErrVariableNotFound(identifier)
	}
	return outrigger.ErrSessionNotFound(id.name)
}

// BatchGet implements pb.VariablesServer.
func (s *Service) BatchGet(ctx context.Context, req *pb.BatchGetRequest) (*pb.BatchGetResponse, error) {
	out, err := s.batchGet(req)
	return reply(ctx, out, err)
}

func (s *Service) batchGet(req *pb.BatchGetRequest) (*pb.BatchGetResponse, error) {
	id, err := s.enter(req.GetTenant(), req.GetSession())
	if err != nil {
		return nil, err
	}
	if n := len(req.GetIdentifiers()); n > outrigger.MaxBatch {
		return nil, errBatch("identifiers", n)
	}
	for _, x := range req.GetIdentifiers() {
		if err := checkIdentifier(x); err != nil {
			return nil, err
		}
	}
	_, vars, err := s.see(id, req.GetIdentifiers()...)
	if err != nil {
		return nil, err
	}
	out := &pb.BatchGetResponse{Variables: make(map[string]*pb.Variable, len(vars))}
	for i, v := range vars {
		if v == nil {
			out.Missing = append(out.Missing, req.GetIdentifiers()[i])
			continue
		}
		out.Variables[req.GetIdentifiers()[i]] = v.pb
	}
	return out, nil
}

// List implements pb.VariablesServer; the answer is sorted by name.
func (s *Service) List(ctx context.Context, req *pb.ListRequest) (*pb.ListResponse, error) {
	out, err := s.list(req)
	return reply(ctx, out, err)
}

func (s *Service) list(req *pb.ListRequest) (*pb.ListResponse, error) {
	id, err := s.enter(req.GetTenant(), req.GetSession())
	if err != nil {
		return nil, err
	}
	if n := len(req.GetPattern()); n > outrigger.MaxNameBytes {
		return nil, outrigger.Errorf(outrigger.Invalid, "pattern is %d bytes long, the limit is %d; shorten it", n, outrigger.MaxNameBytes)
	}
	out := &pb.ListResponse{}
	s.mu.RLock()
	sess := s.state.sessions[id]
	if sess == nil {
		s.mu.RUnlock()
		return nil, outrigger.ErrSessionNotFound(id.name)
	}
	for name, v := range sess.vars {
		if !v.deleted && matchGlob(req.GetPattern(), name) {
			out.Variables = append(out.Variables, v.pb)
		}
	}
	s.mu.RUnlock()
	slices.SortFunc(out.Variables, func(a, b *pb.Variable) int { return cmp.Compare(a.GetKey().GetName(), b.GetKey().GetName()) })
	return out, nil
}

// Register implements pb.VariablesServer.
func (s *Service) Register(ctx context.Context, req *pb.RegisterRequest) (*pb.Variable, error) {
	start := s.opt.Now()
	out, err := s.register(ctx, req)
	s.done(ctx, "register", start, err)
	return reply(ctx, out, err)
}

func (s *Service) register(ctx context.Context, req *pb.RegisterRequest) (*pb.Variable, error) {
	id, err := s.enter(req.GetKey().GetTenant(), req.GetKey().GetSession())
	if err != nil {
		return nil, err
	}
	key := wire.Key(req.GetKey())
	if err := key.Validate(); err != nil {
		return nil, err
	}
	a, err := newAuthor(req.GetOptions(), s.opt.Now())
	if err != nil {
		return nil, err
	}
	leave, err := s.gates.enter(ctx, varAggregate(key))
	if err != nil {
		return nil, err
	}
	defer leave()
	r := registration{s: s, id: id, key: key, req: req, author: a}
	app, err := s.commit(ctx, scoped(id, a.requestID), r.decide)
	if err != nil {
		return nil, err
	}
	e := app.Events[len(app.Events)-1]
	if e.GetVariableRegistered() == nil || e.GetAggregate() != varAggregate(key) {
		return nil, errReused(a.requestID)
	}
	v, err := s.after(ctx, r.before, e, app.Duplicate)
	if err != nil {
		return nil, err
	}
	return v.pb, nil
}

// registration is one Register call on its way.
type registration struct {
	s      *Service
	id     sessionID
	key    outrigger.Key
	req    *pb.RegisterRequest
	author author

	before   *variable // tombstone of the last decision, or nil
	varID    string
	reserved uint64 // life of the session varID was reserved in
}

func (r *registration) decide(f floors) ([]eventlog.Write, error) {
	first, err := r.look(f)
	if err != nil {
		return nil, err
	}
	aggregate := varAggregate(r.key)
	var seq uint64
	version := f[aggregate].version
	if r.before != nil {
		seq = r.before.seq
		if f[aggregate].seq <= seq {
			version = r.before.pb.GetVersion()
		}
	}
	e, err := decideRegister(r.s.origin, version, r.varID, r.req, r.author)
	if err != nil {
		return nil, err
	}
	return []eventlog.Write{first, {Aggregate: aggregate, Expect: f.expect(aggregate, seq), Events: []*pb.Event{e}}}, nil
}

// look reads the projection and returns the session's part of the append: a guard, or
// its creation.
func (r *registration) look(f floors) (eventlog.Write, error) {
	s := r.s
	s.mu.RLock()
	sess := s.state.sessions[r.id]
	if sess == nil {
		s.mu.RUnlock()
		r.before, r.varID, r.reserved = nil, variableID(r.key.Name, 1), 0
		if !r.req.GetOptions().GetAutoCreateSession() {
			return eventlog.Write{}, outrigger.ErrSessionNotFound(r.id.name)
		}
		return s.newSession(r.id, f, &pb.CreateSessionRequest{}, r.author)
	}
	defer s.mu.RUnlock()
	r.before = sess.vars[r.key.Name]
	if r.before != nil && !r.before.deleted {
		return eventlog.Write{}, outrigger.Errorf(outrigger.Exists, "Variable already exists: %s", r.key.Name)
	}
	if _, taken := sess.ids[r.key.Name]; taken {
		return eventlog.Write{}, outrigger.Errorf(outrigger.Exists, "name %s is the id of another variable of the session; choose another", r.key.Name)
	}
	if sess.live >= s.opt.VariableLimit {
		return eventlog.Write{}, outrigger.Errorf(outrigger.Exhausted, "session %s has %d variables, the limit is %d; delete some or raise the limit", r.id.name, sess.live, s.opt.VariableLimit)
	}
	if r.reserved != sess.createdPos {
		r.varID, r.reserved = sess.reserveID(r.key.Name), sess.createdPos
	}
	return eventlog.Write{Aggregate: sessionAggregate(r.id), Expect: int64(sess.seq)}, nil
}

// Set implements pb.VariablesServer.
func (s *Service) Set(ctx context.Context, req *pb.SetRequest) (*pb.Variable, error) {
	start := s.opt.Now()
	out, err := s.set(ctx, req)
	s.done(ctx, "set", start, err)
	return reply(ctx, out, err)
}

func (s *Service) set(ctx context.Context, req *pb.SetRequest) (*pb.Variable, error) {
	if req.ExpectedVersion != nil && *req.ExpectedVersion < 0 {
		return nil, errExpected(*req.ExpectedVersion)
	}
	in := setInput{value: req.GetValue(), expected: req.ExpectedVersion, metadata: req.GetMetadata()}
	c := change{s: s, tenant: req.GetTenant(), session: req.GetSession(), identifier: req.GetIdentifier(), options: req.GetOptions()}
	c.mine = func(e *pb.Event) bool { return e.GetVariableSet() != nil && e.GetVariableSet().RolledBackTo == nil }
	v, err := c.run(ctx, func(v *variable, _ view, a author) (*pb.Event, error) { return decideSet(s.origin, v, in, a) })
	if err != nil {
		return nil, err
	}
	return v.pb, nil
}

func errExpected(n int32) error {
	return outrigger.Errorf(outrigger.Invalid, "expected_version is %d; versions start at 0, leave it unset for no check", n)
}

// Delete implements pb.VariablesServer.
func (s *Service) Delete(ctx context.Context, req *pb.GetRequest) (*pb.DeleteResponse, error) {
	start := s.opt.Now()
	out, err := s.remove(ctx, req)
	s.done(ctx, "delete", start, err)
	return reply(ctx, out, err)
}

func (s *Service) remove(ctx context.Context, req *pb.GetRequest) (*pb.DeleteResponse, error) {
	c := change{s: s, tenant: req.GetTenant(), session: req.GetSession(), identifier: req.GetIdentifier(), options: req.GetOptions()}
	c.mine = func(e *pb.Event) bool { return e.GetVariableDeleted() != nil }
	v, err := c.run(ctx, func(v *variable, _ view, a author) (*pb.Event, error) { return decideDelete(s.origin, v, a) })
	if err != nil {
		return nil, err
	}
	return &pb.DeleteResponse{Version: v.pb.GetVersion()}, nil
}

// change is one call that changes one existing variable.
type change struct {
	s                           *Service
	tenant, session, identifier string
	options                     *pb.WriteOptions
	mine                        func(*pb.Event) bool // whether this kind of call writes such an event
}

// run carries a decision about the variable out and returns the variable after it.
func (c change) run(ctx context.Context, decide func(*variable, view, author) (*pb.Event, error)) (*variable, error) {
	s := c.s
	id, err := s.enter(c.tenant, c.session)
	if err != nil {
		return nil, err
	}
	if err := checkIdentifier(c.identifier); err != nil {
		return nil, err
	}
	a, err := newAuthor(c.options, s.opt.Now())
	if err != nil {
		return nil, err
	}
	leave, err := s.gates.enter(ctx, varAggregate(s.resolve(id, c.identifier)))
	if err != nil {
		return nil, err
	}
	defer leave()
	var before *variable
	app, err := s.commit(ctx, scoped(id, a.requestID), func(f floors) ([]eventlog.Write, error) {
		w, vars, err := s.see(id, c.identifier)
		if err != nil {
			return nil, missing(id, c.identifier, c.options)
		}
		if before = vars[0]; before == nil {
			return nil, outrigger.ErrVariableNotFound(c.identifier)
		}
		e, err := decide(before, w, a)
		if err != nil {
			return nil, err
		}
		return []eventlog.Write{w.guard(id), {Aggregate: varAggregate(keyOf(before)), Expect: int64(before.seq), Events: []*pb.Event{e}}}, nil
	})
	if err != nil {
		return nil, err
	}
	if app.Duplicate && (len(app.Events) != 1 || !c.mine(app.Events[0])) {
		return nil, errReused(a.requestID)
	}
	v, err := s.after(ctx, before, app.Events[0], app.Duplicate)
	if err != nil {
		return nil, err
	}
	if app.Duplicate && c.identifier != v.pb.GetId() && c.identifier != v.pb.GetKey().GetName() {
		return nil, errReused(a.requestID)
	}
	return v, nil
}

// resolve returns the key an identifier means now; an unknown one is taken as a name.
func (s *Service) resolve(id sessionID, identifier string) outrigger.Key {
	if _, vars, err := s.see(id, identifier); err == nil && vars[0] != nil {
		return keyOf(vars[0])
	}
	return id.key(identifier)
}
