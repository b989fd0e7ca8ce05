package variables

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// WithTokens returns the service with session tokens, for those who call the control plane
// itself: what is written here and read through a sidecar with the answer's
// x-outrigger-token is seen there, and the other way round.
//
// A read that brings a token is answered from nothing older than the token's position in
// this region's log: it waits up to 50 ms for the projection and then fails with kind
// Unavailable. Positions of other regions are passed on and not waited for: this is the
// authority of one region. A token that does not verify, or is of another log (it was
// replaced), says nothing about what its caller has seen: such a read waits for all that
// is in the log now and gets a token of this mesh. Writes wait for nothing, because they
// are decided against the log.
//
// Every answer, and every read that finds nothing, carries a token; writes that fail carry
// none, and Watch neither heeds nor gives one. Without Options.SessionKeys the service is
// returned as it is.
func (s *Service) WithTokens() pb.VariablesServer {
	if s.opt.SessionKeys == nil {
		return s
	}
	return &tokened{Service: s}
}

type tokened struct{ *Service }

// incoming returns the value of one metadata key; "" when there is none.
func incoming(ctx context.Context, key string) string {
	if v := metadata.ValueFromIncomingContext(ctx, key); len(v) > 0 {
		return v[0]
	}
	return ""
}

// seen reads the token a call brings; ok is false when it cannot be relied on to hold all
// that its caller has seen in this region.
func (t *tokened) seen(ctx context.Context, keys *identity.Keys) (token identity.Token, position uint64, ok bool) {
	text := incoming(ctx, outrigger.HeaderToken)
	if text == "" {
		return nil, 0, true
	}
	token, err := keys.Verify(text)
	if err != nil {
		return nil, 0, false
	}
	for _, d := range token {
		if d.Region == t.origin.region {
			return token, d.Position, d.Incarnation == t.origin.incarnation
		}
	}
	return token, 0, true
}

// read makes a call that changes nothing, as late as its caller's token demands.
func read[Q, A any](t *tokened, ctx context.Context, req Q, call func(context.Context, Q) (A, error)) (A, error) {
	keys := t.opt.SessionKeys()
	if keys == nil {
		return call(ctx, req)
	}
	token, position, ok := t.seen(ctx, keys)
	if !ok {
		position = t.log.Head()
	}
	if c, err := outrigger.ParseConsistency(incoming(ctx, outrigger.HeaderConsistency)); err == nil && c.Level == outrigger.Eventual {
		if !ok {
			return call(ctx, req) // no token: it could not cover what the caller has seen
		}
		position = 0
	}
	if err := t.reach(ctx, position); err != nil {
		var none A
		return none, status.ToGRPC(outrigger.Wrap(outrigger.KindOf(err), err, "the session token's position is not applied here yet"))
	}
	out, err := call(ctx, req)
	dots := wire.Seen(out)
	if !ok || absent(out, err) {
		// What was not there was missing at some position up to this one, and whatever the
		// caller of a token nobody can read has seen here lies before it.
		dots = append(dots, wire.Dot(t.dotAt(t.Applied())))
	}
	t.give(ctx, keys, token, dots)
	return out, err
}

// absent reports whether an answer says that something is not there.
func absent(out any, err error) bool {
	switch r := out.(type) {
	case *pb.Variable:
		return err != nil
	case *pb.BatchGetResponse:
		return err != nil || len(r.GetMissing()) > 0
	}
	return true
}

// write makes a call that changes something.
func write[Q, A any](t *tokened, ctx context.Context, req Q, call func(context.Context, Q) (A, error)) (A, error) {
	out, err := call(ctx, req)
	keys := t.opt.SessionKeys()
	if err != nil || keys == nil {
		return out, err
	}
	token, _, _ := t.seen(ctx, keys)
	dots := wire.Seen(out)
	if len(dots) == 0 {
		dots = append(dots, wire.Dot(t.dotAt(t.Applied()))) // its events were applied before it answered
	}
	if token == nil && incoming(ctx, outrigger.HeaderToken) != "" {
		return out, nil // the caller's own, which nobody here can read, must not be lost
	}
	t.give(ctx, keys, token, dots)
	return out, nil
}

// give sends the token of having seen the dots as well.
func (t *tokened) give(ctx context.Context, keys *identity.Keys, token identity.Token, dots []outrigger.Dot) {
	if text := keys.Sign(token.With(dots...)); text != "" {
		// It fails when the call was not made over gRPC or REST: nobody is there to tell.
		_ = grpc.SetHeader(ctx, metadata.Pairs(outrigger.HeaderToken, text))
	}
}

// Get implements pb.VariablesServer.
func (t *tokened) Get(ctx context.Context, r *pb.GetRequest) (*pb.Variable, error) {
	return read(t, ctx, r, t.Service.Get)
}

// BatchGet implements pb.VariablesServer.
func (t *tokened) BatchGet(ctx context.Context, r *pb.BatchGetRequest) (*pb.BatchGetResponse, error) {
	return read(t, ctx, r, t.Service.BatchGet)
}

// List implements pb.VariablesServer.
func (t *tokened) List(ctx context.Context, r *pb.ListRequest) (*pb.ListResponse, error) {
	return read(t, ctx, r, t.Service.List)
}

// GetSession implements pb.VariablesServer.
func (t *tokened) GetSession(ctx context.Context, r *pb.GetSessionRequest) (*pb.Session, error) {
	return read(t, ctx, r, t.Service.GetSession)
}

// ListSessions implements pb.VariablesServer.
func (t *tokened) ListSessions(ctx context.Context, r *pb.ListSessionsRequest) (*pb.ListSessionsResponse, error) {
	return read(t, ctx, r, t.Service.ListSessions)
}

// History implements pb.VariablesServer.
func (t *tokened) History(ctx context.Context, r *pb.HistoryRequest) (*pb.HistoryResponse, error) {
	return read(t, ctx, r, t.Service.History)
}

// Register implements pb.VariablesServer.
func (t *tokened) Register(ctx context.Context, r *pb.RegisterRequest) (*pb.Variable, error) {
	return write(t, ctx, r, t.Service.Register)
}

// Set implements pb.VariablesServer.
func (t *tokened) Set(ctx context.Context, r *pb.SetRequest) (*pb.Variable, error) {
	return write(t, ctx, r, t.Service.Set)
}

// BatchSet implements pb.VariablesServer.
func (t *tokened) BatchSet(ctx context.Context, r *pb.BatchSetRequest) (*pb.BatchSetResponse, error) {
	return write(t, ctx, r, t.Service.BatchSet)
}

// Rollback implements pb.VariablesServer.
func (t *tokened) Rollback(ctx context.Context, r *pb.RollbackRequest) (*pb.Variable, error) {
	return write(t, ctx, r, t.Service.Rollback)
}

// Delete implements pb.VariablesServer.
func (t *tokened) Delete(ctx context.Context, r *pb.GetRequest) (*pb.DeleteResponse, error) {
	return write(t, ctx, r, t.Service.Delete)
}

// CreateSession implements pb.VariablesServer.
func (t *tokened) CreateSession(ctx context.Context, r *pb.CreateSessionRequest) (*pb.Session, error) {
	return write(t, ctx, r, t.Service.CreateSession)
}

// DeleteSession implements pb.VariablesServer.
func (t *tokened) DeleteSession(ctx context.Context, r *pb.GetSessionRequest) (*pb.DeleteSessionResponse, error) {
	return write(t, ctx, r, t.Service.DeleteSession)
}

// StartOptimization implements pb.VariablesServer.
func (t *tokened) StartOptimization(ctx context.Context, r *pb.StartOptimizationRequest) (*pb.Variable, error) {
	return write(t, ctx, r, t.Service.StartOptimization)
}

// StopOptimization implements pb.VariablesServer.
func (t *tokened) StopOptimization(ctx context.Context, r *pb.StopOptimizationRequest) (*pb.Variable, error) {
	return write(t, ctx, r, t.Service.StopOptimization)
}

// AddDependency implements pb.VariablesServer.
func (t *tokened) AddDependency(ctx context.Context, r *pb.AddDependencyRequest) (*pb.Dependencies, error) {
	return write(t, ctx, r, t.Service.AddDependency)
}

// ListDependencies implements pb.VariablesServer.
func (t *tokened) ListDependencies(ctx context.Context, r *pb.ListDependenciesRequest) (*pb.Dependencies, error) {
	return read(t, ctx, r, t.Service.ListDependencies)
}
