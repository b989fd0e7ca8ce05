package control

import (
	"context"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// withoutCertificate are the services a caller without a verified certificate may reach with
// Options.RequirePeer: operators', with their token, and health, which says nothing else.
// Default deny: what is not named here is for peers of the mesh.
func withoutCertificate(service string) (reachable, token bool) {
	switch service {
	case pb.Admin_ServiceDesc.ServiceName, pb.Delivery_ServiceDesc.ServiceName, "envoy.service.status.v3.ClientStatusDiscoveryService":
		return true, true
	case healthpb.Health_ServiceDesc.ServiceName:
		return true, false
	}
	return false, false
}

// ServerOptions belong to the gRPC server that RegisterGRPC adds services to: with
// Options.RequirePeer they refuse who shows no verified certificate.
func (s *Server) ServerOptions() []grpc.ServerOption {
	if !s.opts.RequirePeer {
		return nil
	}
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := s.guard.peer(ctx, info.FullMethod); err != nil {
				return nil, status.ToGRPC(err)
			}
			return next(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, st grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := s.guard.peer(st.Context(), info.FullMethod); err != nil {
				return status.ToGRPC(err)
			}
			return next(srv, st)
		}),
	}
}

// peer refuses a call of somebody without a verified certificate. A token is enough for
// operators' services; that there is one is seen here, that it is right is for the guard.
func (g *guard) peer(ctx context.Context, method string) error {
	if _, verified := identity.PeerFrom(ctx); verified {
		return nil
	}
	service, _, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	reachable, token := withoutCertificate(service)
	if !reachable {
		return noCertificate(service + " is")
	}
	md, _ := metadata.FromIncomingContext(ctx)
	if token && (len(md.Get("authorization")) == 0 || g.rules().Open()) {
		return noCertificate("without a token of the access file " + service + " is")
	}
	return nil
}

func noCertificate(what string) error {
	return unauthorised("%s for peers with a verified client certificate only (--tls-require-client); connect with --control-cert and --control-key, signed by a CA of this control plane's --tls-client-ca", what)
}

// feedPeer is peer for feeds that are not gRPC.
func (s *Server) feedPeer(info credentials.AuthInfo) error {
	if _, verified := identity.PeerOf(info); s.opts.RequirePeer && !verified {
		return noCertificate("the feed is")
	}
	return nil
}
