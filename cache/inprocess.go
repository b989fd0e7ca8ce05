package cache

import (
	"context"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// inProcess calls the private agent's services without a network between, so that it is
// a peer like the others. Streams (Watch) go to the origin, where the agent would send
// them.
type inProcess struct {
	variables pb.VariablesServer
	coherence pb.CoherenceServer
	admin     pb.NodeAdminServer
	streams   grpc.ClientConnInterface
}

// Invoke calls the handler gRPC would call. The answer is copied into out, because the
// agent's messages are shared.
func (c *inProcess) Invoke(ctx context.Context, method string, in, out any, opts ...grpc.CallOption) error {
	handler, srv := c.find(method)
	if handler == nil {
		return gstatus.Errorf(codes.Unimplemented, "unknown method %s", method)
	}
	md, _ := metadata.FromOutgoingContext(ctx)
	call := &callStream{method: method}
	ctx = metadata.NewIncomingContext(metadata.NewOutgoingContext(ctx, metadata.MD{}), md)
	ctx = grpc.NewContextWithServerTransportStream(ctx, call)
	answer, err := handler(srv, ctx, func(req any) error {
		proto.Merge(req.(proto.Message), in.(proto.Message))
		return nil
	}, nil)
	for _, o := range opts {
		if t, ok := o.(grpc.TrailerCallOption); ok {
			*t.TrailerAddr = call.trailer
		}
	}
	if err != nil {
		return err
	}
	proto.Merge(out.(proto.Message), answer.(proto.Message))
	return nil
}

func (c *inProcess) find(method string) (grpc.MethodHandler, any) {
	for _, s := range []struct {
		desc *grpc.ServiceDesc
		srv  any
	}{{&pb.Variables_ServiceDesc, c.variables}, {&pb.Coherence_ServiceDesc, c.coherence}, {&pb.NodeAdmin_ServiceDesc, c.admin}} {
		name, ok := strings.CutPrefix(method, "/"+s.desc.ServiceName+"/")
		if !ok {
			continue
		}
		for _, m := range s.desc.Methods {
			if m.MethodName == name {
				return m.Handler, s.srv
			}
		}
	}
	return nil, nil
}

// NewStream opens a stream at the origin.
func (c *inProcess) NewStream(ctx context.Context, d *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return c.streams.NewStream(ctx, d, method, opts...)
}

// callStream is what grpc.SetTrailer finds in a handler's context.
type callStream struct {
	method  string
	trailer metadata.MD
}

func (c *callStream) Method() string               { return c.method }
func (c *callStream) SetHeader(metadata.MD) error  { return nil }
func (c *callStream) SendHeader(metadata.MD) error { return nil }
func (c *callStream) SetTrailer(md metadata.MD) error {
	c.trailer = metadata.Join(c.trailer, md)
	return nil
}
