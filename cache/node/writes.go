package node

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/coherence"
	"github.com/outrigger-mesh/outrigger/cache/internal/unary"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// forward passes one call on to the origin, with the trailer of its answer.
func forward[Q, A any](ctx context.Context, req Q, call func(context.Context, Q, ...grpc.CallOption) (A, error)) (A, unary.Outcome, error) {
	var trailer metadata.MD
	out, err := call(relay(ctx), req, grpc.Trailer(&trailer))
	outcome := unary.Judge(err, trailer)
	if outcome == unary.Nothing {
		trailer = metadata.Join(trailer, unary.NothingDone())
	}
	passTrailer(ctx, trailer)
	return out, outcome, unary.Clarify(err, trailer)
}

// passTrailer hands the authority's trailer on, without what gRPC adds on each hop.
func passTrailer(ctx context.Context, trailer metadata.MD) {
	md := trailer.Copy()
	md.Delete("content-type")
	if len(md) > 0 {
		// It fails only when the call is over, or was not made over gRPC.
		_ = grpc.SetTrailer(ctx, md)
	}
}

func keyOf(tenant, session, name string) outrigger.Key {
	return outrigger.Key{Tenant: wire.Tenant(tenant), Session: session, Name: name}
}

// settle brings the table up to the outcome of a write of one variable, before the
// caller hears of it. identifier is what the caller named; v and version are the
// answer's (v nil for a deletion).
func (a *Agent) settle(outcome unary.Outcome, began uint64, key outrigger.Key, v *pb.Variable, version *pb.Version) {
	switch outcome {
	case unary.Done:
		if k := v.GetKey(); k != nil {
			key = wire.Key(k) // the caller may have named it by id
		}
		a.step(coherence.Wrote{Key: key, Began: began, Variable: v, Version: version})
	case unary.Unsure:
		a.step(a.doubts(key)...)
	}
}

// doubts are the keys an identifier may stand for.
func (a *Agent) doubts(key outrigger.Key) []coherence.Input {
	ins := []coherence.Input{coherence.WriteUnknown{Key: key}}
	if name, ok := NameOfID(key.Name); ok {
		ins = append(ins, coherence.WriteUnknown{Key: outrigger.Key{Tenant: key.Tenant, Session: key.Session, Name: name}})
	}
	return ins
}

// Register forwards and makes the new variable visible on this node.
func (a *Agent) Register(ctx context.Context, r *pb.RegisterRequest) (*pb.Variable, error) {
	began := a.begin()
	out, outcome, err := forward(ctx, r, a.vars.Register)
	a.settle(outcome, began, wire.Key(r.GetKey()), out, out.GetVersion())
	if outcome == unary.Done && r.GetOptions().GetAutoCreateSession() {
		// The session may be new: what is known of its other names is not.
		a.step(coherence.SessionChanged{Tenant: wire.Tenant(r.GetKey().GetTenant()), Session: r.GetKey().GetSession(), Version: out.GetVersion()})
	}
	return out, err
}

// Set forwards and makes the new value visible on this node.
func (a *Agent) Set(ctx context.Context, r *pb.SetRequest) (*pb.Variable, error) {
	began := a.begin()
	out, outcome, err := forward(ctx, r, a.vars.Set)
	a.settle(outcome, began, keyOf(r.GetTenant(), r.GetSession(), r.GetIdentifier()), out, out.GetVersion())
	return out, err
}

// Rollback forwards and makes the restored value visible on this node.
func (a *Agent) Rollback(ctx context.Context, r *pb.RollbackRequest) (*pb.Variable, error) {
	began := a.begin()
	out, outcome, err := forward(ctx, r, a.vars.Rollback)
	a.settle(outcome, began, keyOf(r.GetTenant(), r.GetSession(), r.GetIdentifier()), out, out.GetVersion())
	return out, err
}

// Delete forwards and makes the deletion visible on this node. A variable deleted by id
// is deleted under its name.
func (a *Agent) Delete(ctx context.Context, r *pb.GetRequest) (*pb.DeleteResponse, error) {
	began := a.begin()
	out, outcome, err := forward(ctx, r, a.vars.Delete)
	key := keyOf(r.GetTenant(), r.GetSession(), r.GetIdentifier())
	if _, ambiguous := NameOfID(key.Name); ambiguous && outcome == unary.Done {
		// The answer does not say which of the two it was.
		outcome = unary.Unsure
	}
	a.settle(outcome, began, key, nil, out.GetVersion())
	return out, err
}

// BatchSet forwards and makes what was written visible on this node.
func (a *Agent) BatchSet(ctx context.Context, r *pb.BatchSetRequest) (*pb.BatchSetResponse, error) {
	began := a.begin()
	out, outcome, err := forward(ctx, r, a.vars.BatchSet)
	var ins []coherence.Input
	switch outcome {
	case unary.Done:
		for _, v := range out.GetVariables() {
			ins = append(ins, coherence.Wrote{Key: wire.Key(v.GetKey()), Began: began, Variable: v, Version: v.GetVersion()})
		}
		for id, e := range out.GetErrors() {
			if e.GetKind() == outrigger.Unknown.String() {
				ins = append(ins, a.doubts(keyOf(r.GetTenant(), r.GetSession(), id))...)
			}
		}
	case unary.Unsure:
		for _, item := range r.GetItems() {
			ins = append(ins, a.doubts(keyOf(r.GetTenant(), r.GetSession(), item.GetIdentifier()))...)
		}
	}
	a.step(ins...)
	return out, err
}

// StartOptimization forwards and shows the lock on this node.
func (a *Agent) StartOptimization(ctx context.Context, r *pb.StartOptimizationRequest) (*pb.Variable, error) {
	began := a.begin()
	out, outcome, err := forward(ctx, r, a.vars.StartOptimization)
	a.settle(outcome, began, keyOf(r.GetTenant(), r.GetSession(), r.GetIdentifier()), out, out.GetVersion())
	return out, err
}

// StopOptimization forwards and shows on this node that the lock is gone.
func (a *Agent) StopOptimization(ctx context.Context, r *pb.StopOptimizationRequest) (*pb.Variable, error) {
	began := a.begin()
	out, outcome, err := forward(ctx, r, a.vars.StopOptimization)
	a.settle(outcome, began, keyOf(r.GetTenant(), r.GetSession(), r.GetIdentifier()), out, out.GetVersion())
	return out, err
}

// AddDependency forwards.
func (a *Agent) AddDependency(ctx context.Context, r *pb.AddDependencyRequest) (*pb.Dependencies, error) {
	out, _, err := forward(ctx, r, a.vars.AddDependency)
	return out, err
}

// ListDependencies forwards.
func (a *Agent) ListDependencies(ctx context.Context, r *pb.ListDependenciesRequest) (*pb.Dependencies, error) {
	out, _, err := forward(ctx, r, a.vars.ListDependencies)
	return out, err
}

// CreateSession forwards; what this node knew of the session's variables is asked anew.
func (a *Agent) CreateSession(ctx context.Context, r *pb.CreateSessionRequest) (*pb.Session, error) {
	out, outcome, err := forward(ctx, r, a.vars.CreateSession)
	a.sessionSettled(outcome, r.GetTenant(), r.GetId())
	return out, err
}

// DeleteSession forwards; this node forgets the session's variables.
func (a *Agent) DeleteSession(ctx context.Context, r *pb.GetSessionRequest) (*pb.DeleteSessionResponse, error) {
	out, outcome, err := forward(ctx, r, a.vars.DeleteSession)
	a.sessionSettled(outcome, r.GetTenant(), r.GetId())
	return out, err
}

func (a *Agent) sessionSettled(outcome unary.Outcome, tenant, session string) {
	if outcome == unary.Done || outcome == unary.Unsure {
		a.step(coherence.SessionChanged{Tenant: wire.Tenant(tenant), Session: session})
	}
}

// GetSession forwards.
func (a *Agent) GetSession(ctx context.Context, r *pb.GetSessionRequest) (*pb.Session, error) {
	out, _, err := forward(ctx, r, a.vars.GetSession)
	return out, err
}

// ListSessions forwards.
func (a *Agent) ListSessions(ctx context.Context, r *pb.ListSessionsRequest) (*pb.ListSessionsResponse, error) {
	out, _, err := forward(ctx, r, a.vars.ListSessions)
	return out, err
}

// TouchSessions forwards.
func (a *Agent) TouchSessions(ctx context.Context, r *pb.TouchSessionsRequest) (*pb.TouchSessionsResponse, error) {
	out, _, err := forward(ctx, r, a.vars.TouchSessions)
	return out, err
}

// List forwards. Nobody on this node sees anything older afterwards than it showed.
func (a *Agent) List(ctx context.Context, r *pb.ListRequest) (*pb.ListResponse, error) {
	began := a.begin()
	out, _, err := forward(ctx, r, a.vars.List)
	ins := make([]coherence.Input, len(out.GetVariables()))
	for i, v := range out.GetVariables() {
		ins[i] = coherence.Observed{Began: began, Variable: v}
	}
	a.step(ins...)
	return out, err
}

// History forwards.
func (a *Agent) History(ctx context.Context, r *pb.HistoryRequest) (*pb.HistoryResponse, error) {
	out, _, err := forward(ctx, r, a.vars.History)
	return out, err
}

// Watch forwards; the table is at least as new as every event passed on.
func (a *Agent) Watch(r *pb.WatchRequest, out grpc.ServerStreamingServer[pb.WatchEvent]) error {
	began := a.begin()
	in, err := a.vars.Watch(relay(out.Context()), r)
	if err != nil {
		return err
	}
	for {
		e, err := in.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if v := e.GetVariable(); v != nil {
			a.step(coherence.Observed{Began: began, Variable: v, Deleted: e.GetType() == pb.WatchEvent_DELETED})
		}
		if err := out.Send(e); err != nil {
			return err
		}
	}
}
