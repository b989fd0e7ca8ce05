package node

import (
	"context"

	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// BindTenant makes a gRPC server that carries an agent's services one of a single tenant:
// calls that name another tenant's keys or sessions, or that would show everybody's, fail
// with PERMISSION_DENIED before the agent sees them, and so does every message this
// package does not know to be harmless. The agent's table then holds that tenant's keys
// only, because a key enters it when somebody asks for it. tenant must not be empty.
func BindTenant(tenant string) []grpc.ServerOption {
	allow := func(req any) error { return status.ToGRPC(withinTenant(tenant, req)) }
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := allow(req); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return next(srv, tenantStream{s, allow})
		}),
	}
}

// tenantStream looks at every message that comes in.
type tenantStream struct {
	grpc.ServerStream
	allow func(any) error
}

func (s tenantStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return s.allow(m)
}

// withinTenant judges one request; the error has kind Denied.
func withinTenant(tenant string, req any) error {
	var asked []string
	switch r := req.(type) {
	case *pb.SessionKeysRequest, *pb.NodeStatRequest, *pb.ReadCounts:
		return nil // about the node, not about anybody's variables
	case *pb.GetAnswerRequest, *pb.FlightSend, *pb.PutAnswerRequest, *pb.EndStretchRequest:
		return nil // kept for each caller's own tenant (package shelf)
	case interface{ GetResourceNamesSubscribe() []string }:
		return nil // an xDS request: policy is the mesh's, not anybody's (package xds/relay)
	case *pb.ReadRequest:
		for _, k := range r.GetKeys() {
			asked = append(asked, wire.Tenant(k.GetTenant()))
		}
	case *pb.RegisterRequest:
		asked = append(asked, wire.Tenant(r.GetKey().GetTenant()))
	case *pb.GetEntryRequest:
		asked = append(asked, wire.Tenant(r.GetKey().GetTenant()))
	case *pb.DumpRequest:
		asked = append(asked, r.GetTenant()) // "" = everybody's
	case *pb.FlushRequest:
		if asked = append(asked, r.GetTenant()); r.GetSession() != "" {
			asked[0] = wire.Tenant(r.GetTenant())
		}
	case *pb.CreateSessionRequest, *pb.GetSessionRequest, *pb.TouchSessionsRequest, *pb.ListSessionsRequest, *pb.GetRequest, *pb.BatchGetRequest,
		*pb.SetRequest, *pb.BatchSetRequest, *pb.ListRequest, *pb.HistoryRequest, *pb.RollbackRequest, *pb.WatchRequest,
		*pb.StartOptimizationRequest, *pb.StopOptimizationRequest, *pb.AddDependencyRequest, *pb.ListDependenciesRequest:
		asked = append(asked, wire.Tenant(r.(interface{ GetTenant() string }).GetTenant()))
	default: // Changes and Feed show every tenant's keys; what is new here is refused until it is known
		return outrigger.Errorf(outrigger.Denied, "%T is not served by a node agent that is bound to tenant %s; ask the control plane", req, tenant)
	}
	for _, t := range asked {
		if t != tenant {
			return outrigger.Errorf(outrigger.Denied, "tenant is %q, this node agent serves tenant %s only; use the agent of that tenant", t, tenant)
		}
	}
	return nil
}
