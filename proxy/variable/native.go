package variable

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Native is Outrigger's own Variables service as the sidecar offers it to applications:
// Get and BatchGet from the cache, everything else from the authority. The REST front
// end is this service seen as JSON.
type Native struct {
	pb.UnimplementedVariablesServer
	core
}

// NewNative returns the service.
func NewNative(o Options) *Native { return &Native{core: newCore(o)} }

// Get reads one variable from the nearest tier.
func (n *Native) Get(ctx context.Context, r *pb.GetRequest) (*pb.Variable, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	c.tenant = wire.Tenant(r.Tenant)
	want, token := n.o.Tokens.request(c, r.Session)
	a, err := n.read(ctx, c.tenant, r.Session, r.Identifier, want)
	setHeader(ctx, n.shown(answerHeaders(a), c, r.Session, a, token, a.Seen))
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	return a.Variable, nil
}

// BatchGet reads many; the headers describe the farthest tier and the worst bound.
func (n *Native) BatchGet(ctx context.Context, r *pb.BatchGetRequest) (*pb.BatchGetResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	c.tenant = wire.Tenant(r.Tenant)
	want, token := n.o.Tokens.request(c, r.Session)
	got, err := n.readMany(ctx, c.tenant, r.Session, "identifiers", r.Identifiers, want)
	setHeader(ctx, n.shown(answerHeaders(got.worst), c, r.Session, got.worst, token, got.seen...))
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	return &pb.BatchGetResponse{Variables: got.variables, Missing: got.missing}, nil
}

// forward passes a call on with its outcome, and the trailer that carries a conflict's
// current version.
func forward[Req, Resp any](ctx context.Context, n *Native, r Req, call func(context.Context, Req, ...grpc.CallOption) (Resp, error)) (Resp, error) {
	var trailer metadata.MD
	out, err := call(ctx, r, grpc.Trailer(&trailer))
	if len(trailer) > 0 {
		// It fails only when the call is over already.
		_ = grpc.SetTrailer(ctx, trailer)
	}
	if err == nil {
		var version *pb.Version
		if v, ok := any(out).(interface{ GetVersion() *pb.Version }); ok {
			version = v.GetVersion()
		}
		// What callerOf refuses is about reads, and this call has been made.
		c, _ := callerOf(ctx)
		var session string
		c.tenant, session = sessionOf(r)
		setHeader(ctx, n.wrote(c, session, out, version))
	}
	return out, status.ToGRPC(err)
}

// auto makes a write create its session as a read would.
func (n *Native) auto(o **pb.WriteOptions) {
	if !n.o.AutoCreateSessions {
		return
	}
	if *o == nil {
		*o = &pb.WriteOptions{}
	}
	(*o).AutoCreateSession = true
}

// CreateSession forwards to the authority.
func (n *Native) CreateSession(ctx context.Context, r *pb.CreateSessionRequest) (*pb.Session, error) {
	return forward(ctx, n, r, n.o.Authority.CreateSession)
}

// GetSession forwards to the authority.
func (n *Native) GetSession(ctx context.Context, r *pb.GetSessionRequest) (*pb.Session, error) {
	return forward(ctx, n, r, n.o.Authority.GetSession)
}

// TouchSessions forwards to the authority.
func (n *Native) TouchSessions(ctx context.Context, r *pb.TouchSessionsRequest) (*pb.TouchSessionsResponse, error) {
	return forward(ctx, n, r, n.o.Authority.TouchSessions)
}

// DeleteSession forwards to the authority.
func (n *Native) DeleteSession(ctx context.Context, r *pb.GetSessionRequest) (*pb.DeleteSessionResponse, error) {
	return forward(ctx, n, r, n.o.Authority.DeleteSession)
}

// ListSessions forwards to the authority.
func (n *Native) ListSessions(ctx context.Context, r *pb.ListSessionsRequest) (*pb.ListSessionsResponse, error) {
	return forward(ctx, n, r, n.o.Authority.ListSessions)
}

// Register forwards to the authority.
func (n *Native) Register(ctx context.Context, r *pb.RegisterRequest) (*pb.Variable, error) {
	n.auto(&r.Options)
	return forward(ctx, n, r, n.o.Authority.Register)
}

// Set forwards to the authority.
func (n *Native) Set(ctx context.Context, r *pb.SetRequest) (*pb.Variable, error) {
	n.auto(&r.Options)
	return forward(ctx, n, r, n.o.Authority.Set)
}

// BatchSet forwards to the authority.
func (n *Native) BatchSet(ctx context.Context, r *pb.BatchSetRequest) (*pb.BatchSetResponse, error) {
	n.auto(&r.Options)
	return forward(ctx, n, r, n.o.Authority.BatchSet)
}

// List forwards to the authority.
func (n *Native) List(ctx context.Context, r *pb.ListRequest) (*pb.ListResponse, error) {
	return forward(ctx, n, r, n.o.Authority.List)
}

// Delete forwards to the authority.
func (n *Native) Delete(ctx context.Context, r *pb.GetRequest) (*pb.DeleteResponse, error) {
	n.auto(&r.Options)
	return forward(ctx, n, r, n.o.Authority.Delete)
}

// History forwards to the authority.
func (n *Native) History(ctx context.Context, r *pb.HistoryRequest) (*pb.HistoryResponse, error) {
	return forward(ctx, n, r, n.o.Authority.History)
}

// Rollback forwards to the authority.
func (n *Native) Rollback(ctx context.Context, r *pb.RollbackRequest) (*pb.Variable, error) {
	n.auto(&r.Options)
	return forward(ctx, n, r, n.o.Authority.Rollback)
}

// StartOptimization forwards to the authority.
func (n *Native) StartOptimization(ctx context.Context, r *pb.StartOptimizationRequest) (*pb.Variable, error) {
	n.auto(&r.Options)
	return forward(ctx, n, r, n.o.Authority.StartOptimization)
}

// StopOptimization forwards to the authority.
func (n *Native) StopOptimization(ctx context.Context, r *pb.StopOptimizationRequest) (*pb.Variable, error) {
	n.auto(&r.Options)
	return forward(ctx, n, r, n.o.Authority.StopOptimization)
}

// AddDependency forwards to the authority.
func (n *Native) AddDependency(ctx context.Context, r *pb.AddDependencyRequest) (*pb.Dependencies, error) {
	n.auto(&r.Options)
	return forward(ctx, n, r, n.o.Authority.AddDependency)
}

// ListDependencies forwards to the authority.
func (n *Native) ListDependencies(ctx context.Context, r *pb.ListDependenciesRequest) (*pb.Dependencies, error) {
	return forward(ctx, n, r, n.o.Authority.ListDependencies)
}

// Watch forwards the authority's stream.
func (n *Native) Watch(r *pb.WatchRequest, stream grpc.ServerStreamingServer[pb.WatchEvent]) error {
	return n.watch(r, stream, stream.Send)
}
