package cache

import (
	"context"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/internal/unary"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Variables returns the authority as this process should call it: writes and other calls
// go to the node agent, and to the origin when the agent certainly did not get them.
// Reads through this Store see a write made here once it has answered. Errors are gRPC
// status errors; UNAVAILABLE means that nothing was changed, UNKNOWN that it is unknown.
func (s *Store) Variables() pb.VariablesClient { return s.vars }

// router is the connection behind Variables.
type router struct{ s *Store }

// Invoke tries each peer until one may have got the request.
func (r router) Invoke(ctx context.Context, method string, in, out any, opts ...grpc.CallOption) error {
	err := error(gstatus.Error(codes.Unavailable, "no node agent and no control plane are configured"))
	var trailer metadata.MD
	for _, p := range r.s.peers() {
		trailer = nil
		started := r.s.clock()
		err = p.cc.Invoke(ctx, method, in, out, append(opts[:len(opts):len(opts)], grpc.Trailer(&trailer))...)
		outcome := unary.Judge(err, trailer)
		if outcome == unary.Nothing && ctx.Err() == nil {
			continue
		}
		r.s.settle(p, outcome, method, in, out, started)
		break
	}
	return unary.Clarify(err, trailer)
}

// NewStream opens a stream at the first peer that takes it.
func (r router) NewStream(ctx context.Context, d *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	err := error(gstatus.Error(codes.Unavailable, "no node agent and no control plane are configured"))
	for _, p := range r.s.peers() {
		var stream grpc.ClientStream
		if stream, err = p.cc.NewStream(ctx, d, method, opts...); err == nil {
			return stream, nil
		}
	}
	return nil, err
}

// settle keeps what this process knows in step with a call it made, before the caller
// hears of it. The table is its agent's business; an answer its agent does not know of
// fences it.
func (s *Store) settle(p *peer, outcome unary.Outcome, method string, in, out any, started int64) {
	if outcome != unary.Done && outcome != unary.Unsure {
		return
	}
	switch method {
	case pb.Variables_GetSession_FullMethodName, pb.Variables_ListSessions_FullMethodName,
		pb.Variables_TouchSessions_FullMethodName, pb.Variables_History_FullMethodName,
		pb.Variables_AddDependency_FullMethodName, pb.Variables_ListDependencies_FullMethodName:
		return // nothing about present values
	}
	s.epoch.Add(1)
	if !s.keeps(p) {
		s.raiseFence()
	}
	if outcome == unary.Unsure {
		s.doubt(method, in)
		return
	}
	switch out := out.(type) {
	case *pb.Variable:
		s.wrote(out, started)
	case *pb.BatchSetResponse:
		for _, v := range out.GetVariables() {
			s.wrote(v, started)
		}
		b := in.(*pb.BatchSetRequest)
		for id := range out.GetErrors() {
			s.forget(b.GetTenant(), b.GetSession(), id)
		}
	case *pb.ListResponse:
		for _, v := range out.GetVariables() {
			s.wrote(v, started)
		}
	case *pb.BatchGetResponse:
		for _, v := range out.GetVariables() {
			s.wrote(v, started)
		}
	default: // deletions and session calls: what they leave is asked for
		s.doubt(method, in)
	}
}

// wrote remembers a value the authority showed as the last known one. An answer may be
// slow, and the value long replaced when it comes: it was current after the call started,
// and nothing is known of later.
func (s *Store) wrote(v *pb.Variable, started int64) {
	s.learn(wire.Key(v.GetKey()).String(), &pb.ReadResult{Variable: v, SessionExists: true}, started, dotIn{})
}

// doubt forgets what a write may have changed.
func (s *Store) doubt(method string, in any) {
	switch method {
	case pb.Variables_Get_FullMethodName, pb.Variables_BatchGet_FullMethodName, pb.Variables_List_FullMethodName:
		return
	case pb.Variables_CreateSession_FullMethodName, pb.Variables_DeleteSession_FullMethodName:
		tenant, session := sessionOf(in)
		s.changed.note(tenant+"/"+session, s.clock())
		return
	}
	switch r := in.(type) {
	case *pb.RegisterRequest:
		s.forget(r.GetKey().GetTenant(), r.GetKey().GetSession(), r.GetKey().GetName())
	case *pb.SetRequest:
		s.forget(r.GetTenant(), r.GetSession(), r.GetIdentifier())
	case *pb.StartOptimizationRequest:
		s.forget(r.GetTenant(), r.GetSession(), r.GetIdentifier())
	case *pb.StopOptimizationRequest:
		s.forget(r.GetTenant(), r.GetSession(), r.GetIdentifier())
	case *pb.GetRequest:
		s.forget(r.GetTenant(), r.GetSession(), r.GetIdentifier())
	case *pb.RollbackRequest:
		s.forget(r.GetTenant(), r.GetSession(), r.GetIdentifier())
	case *pb.BatchSetRequest:
		for _, item := range r.GetItems() {
			s.forget(r.GetTenant(), r.GetSession(), item.GetIdentifier())
		}
	}
}

func sessionOf(in any) (tenant, session string) {
	switch r := in.(type) {
	case *pb.CreateSessionRequest:
		return wire.Tenant(r.GetTenant()), r.GetId()
	case *pb.GetSessionRequest:
		return wire.Tenant(r.GetTenant()), r.GetId()
	}
	return "", ""
}

// forget notes that what is known under an identifier, a name or an id, is outdated.
func (s *Store) forget(tenant, session, identifier string) {
	prefix := wire.Tenant(tenant) + "/" + session + "/"
	s.outdate(prefix + identifier)
	if name, ok := node.NameOfID(identifier); ok {
		s.outdate(prefix + name)
	}
}

func (s *Store) outdate(id string) {
	now := s.clock()
	e := &entry{doubt: true, known: now, heard: now}
	s.update(id, func(*entry) *entry { return e })
}

// changedSessions remembers when sessions were created or deleted through this process,
// because their keys are not listed anywhere here. It matters for last known values
// only: tables invalidate key by key.
type changedSessions struct {
	mu   sync.Mutex
	at   map[string]int64
	rest int64 // for sessions that had no room
}

const maxChanged = 4096

func (c *changedSessions) note(session string, now int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.at == nil || len(c.at) >= maxChanged {
		c.at = map[string]int64{}
		c.rest = now // the forgotten ones changed before now
	}
	c.at[session] = now
}

// since returns a time before which nothing known of a session counts.
func (c *changedSessions) since(session string) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return max(c.at[session], c.rest)
}
