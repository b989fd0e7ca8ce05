package origintest

import (
	"context"

	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// find resolves an id or name.
func (o *Origin) find(tenant, session, identifier string) (outrigger.Key, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.fail != nil {
		return outrigger.Key{}, status.ToGRPC(o.fail)
	}
	if !o.sessions[wire.Tenant(tenant)+"/"+session] {
		return outrigger.Key{}, status.ToGRPC(outrigger.ErrSessionNotFound(session))
	}
	for k, v := range o.vars {
		if k.Session == session && v.GetId() == identifier {
			return k, nil
		}
	}
	k := outrigger.Key{Tenant: wire.Tenant(tenant), Session: session, Name: identifier}
	if o.vars[k] == nil {
		return k, status.ToGRPC(outrigger.ErrVariableNotFound(identifier))
	}
	return k, nil
}

// CreateSession implements pb.VariablesServer.
func (o *Origin) CreateSession(_ context.Context, r *pb.CreateSessionRequest) (*pb.Session, error) {
	if err := o.failing(); err != nil {
		return nil, status.ToGRPC(err)
	}
	o.mu.Lock()
	o.sessions[wire.Tenant(r.GetTenant())+"/"+r.GetId()] = true
	o.append(&pb.Change{Scope: pb.Change_SESSION, Key: &pb.Key{Tenant: wire.Tenant(r.GetTenant()), Session: r.GetId()}})
	o.mu.Unlock()
	o.answered()
	return &pb.Session{Tenant: r.GetTenant(), Id: r.GetId()}, nil
}

// DeleteSession implements pb.VariablesServer.
func (o *Origin) DeleteSession(_ context.Context, r *pb.GetSessionRequest) (*pb.DeleteSessionResponse, error) {
	if err := o.failing(); err != nil {
		return nil, status.ToGRPC(err)
	}
	o.mu.Lock()
	n := int32(0)
	for k := range o.vars {
		if k.Session == r.GetId() && k.Tenant == wire.Tenant(r.GetTenant()) {
			delete(o.vars, k)
			n++
		}
	}
	delete(o.sessions, wire.Tenant(r.GetTenant())+"/"+r.GetId())
	change := &pb.Change{Scope: pb.Change_SESSION, Deleted: true, Key: &pb.Key{Tenant: wire.Tenant(r.GetTenant()), Session: r.GetId()}}
	o.append(change)
	gone := &pb.Dot{Region: Region, Incarnation: o.incarnation, Position: change.Position}
	o.mu.Unlock()
	o.answered()
	return &pb.DeleteSessionResponse{VariablesRemoved: n, Gone: gone}, nil
}

// TouchSessions implements pb.VariablesServer.
func (o *Origin) TouchSessions(_ context.Context, r *pb.TouchSessionsRequest) (*pb.TouchSessionsResponse, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, id := range r.GetIds() {
		o.touched = append(o.touched, wire.Tenant(r.GetTenant())+"/"+id)
	}
	return &pb.TouchSessionsResponse{}, nil
}

// Register implements pb.VariablesServer.
func (o *Origin) Register(_ context.Context, r *pb.RegisterRequest) (*pb.Variable, error) {
	if err := o.failing(); err != nil {
		return nil, status.ToGRPC(err)
	}
	v := o.write(wire.Key(r.GetKey()), r.GetValue().GetJson(), nil)
	o.answered()
	return v, nil
}

// Set implements pb.VariablesServer.
func (o *Origin) Set(ctx context.Context, r *pb.SetRequest) (*pb.Variable, error) {
	k, err := o.find(r.GetTenant(), r.GetSession(), r.GetIdentifier())
	if err != nil {
		return nil, err
	}
	o.mu.Lock()
	current := o.vars[k].GetVersion().GetCounter()
	o.mu.Unlock()
	if r.ExpectedVersion != nil && r.GetExpectedVersion() != current {
		conflict := outrigger.ErrVersionMismatch(current)
		if err := grpc.SetTrailer(ctx, status.Trailer(conflict)); err != nil {
			return nil, err
		}
		return nil, status.ToGRPC(conflict)
	}
	v := o.write(k, r.GetValue().GetJson(), nil)
	o.answered()
	return v, nil
}

// BatchSet implements pb.VariablesServer, item by item.
func (o *Origin) BatchSet(_ context.Context, r *pb.BatchSetRequest) (*pb.BatchSetResponse, error) {
	out := &pb.BatchSetResponse{Variables: map[string]*pb.Variable{}, Errors: map[string]*pb.ItemError{}}
	for _, item := range r.GetItems() {
		k, err := o.find(r.GetTenant(), r.GetSession(), item.GetIdentifier())
		if err != nil {
			out.Errors[item.GetIdentifier()] = &pb.ItemError{Kind: outrigger.NotFound.String(), Message: err.Error()}
			continue
		}
		out.Variables[item.GetIdentifier()] = o.write(k, item.GetValue().GetJson(), nil)
	}
	o.answered()
	return out, nil
}

// Delete implements pb.VariablesServer.
func (o *Origin) Delete(_ context.Context, r *pb.GetRequest) (*pb.DeleteResponse, error) {
	k, err := o.find(r.GetTenant(), r.GetSession(), r.GetIdentifier())
	if err != nil {
		return nil, err
	}
	o.mu.Lock()
	delete(o.vars, k)
	o.counters[k]++
	version := &pb.Version{Counter: o.counters[k], Dot: &pb.Dot{Region: Region, Incarnation: o.incarnation, Position: o.head() + 1}}
	o.append(&pb.Change{Key: wire.KeyPB(k), Deleted: true, Version: version})
	o.mu.Unlock()
	o.answered()
	return &pb.DeleteResponse{Version: version}, nil
}

// List implements pb.VariablesServer for the pattern "".
func (o *Origin) List(_ context.Context, r *pb.ListRequest) (*pb.ListResponse, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := &pb.ListResponse{}
	for k, v := range o.vars {
		if k.Tenant == wire.Tenant(r.GetTenant()) && k.Session == r.GetSession() {
			out.Variables = append(out.Variables, v)
		}
	}
	return out, nil
}

// Watch implements pb.VariablesServer: changes of one session from now on.
func (o *Origin) Watch(r *pb.WatchRequest, out grpc.ServerStreamingServer[pb.WatchEvent]) error {
	o.mu.Lock()
	at := o.head()
	for {
		for ; at < o.head(); at++ {
			at = max(at, o.base)
			c := o.log[at-o.base]
			if c.GetScope() != pb.Change_KEY || c.GetKey().GetSession() != r.GetSession() {
				continue
			}
			e := &pb.WatchEvent{Type: pb.WatchEvent_CHANGED, Variable: c.GetVariable()}
			if c.GetDeleted() {
				e = &pb.WatchEvent{Type: pb.WatchEvent_DELETED, Variable: &pb.Variable{Key: c.GetKey(), Version: c.GetVersion()}}
			}
			o.mu.Unlock()
			if err := out.Send(e); err != nil {
				return err
			}
			o.mu.Lock()
		}
		grown := o.grown
		o.mu.Unlock()
		select {
		case <-grown:
		case <-out.Context().Done():
			return out.Context().Err()
		}
		o.mu.Lock()
	}
}
