package variable

import (
	"context"
	"io"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// frame is one gRPC message that is not looked into.
type frame struct{ data mem.BufferSlice }

// rawCodec passes frames through and marshals everything else as protobuf.
type rawCodec struct{ encoding.CodecV2 }

// Codec returns the codec a server needs (grpc.ForceServerCodecV2) so that Forward can
// pass unknown calls through byte for byte.
func Codec() encoding.CodecV2 { return rawCodec{encoding.GetCodecV2(proto.Name)} }

// Marshal returns a frame's own bytes.
func (c rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if f, ok := v.(*frame); ok {
		return f.data, nil
	}
	return c.CodecV2.Marshal(v)
}

// Unmarshal keeps the bytes of a frame.
func (c rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	if f, ok := v.(*frame); ok {
		data.Ref()
		f.data = data
		return nil
	}
	return c.CodecV2.Unmarshal(data, v)
}

// Forward returns the handler of calls no registered service knows (grpc.
// UnknownServiceHandler): they go to upstream byte for byte, with metadata, status
// details and trailers, for all four kinds of call. Without an upstream the tool
// listings answer empty, because clients ask for them when they start, and everything
// else is UNAVAILABLE.
func Forward(upstream grpc.ClientConnInterface) grpc.StreamHandler {
	return func(_ any, in grpc.ServerStream) error {
		method, ok := grpc.MethodFromServerStream(in)
		if !ok {
			return status.ToGRPC(outrigger.Errorf(outrigger.Internal, "call without a method"))
		}
		if upstream == nil {
			return withoutUpstream(method, in)
		}
		return relay(method, in, upstream)
	}
}

// withoutUpstream answers when no tool server is configured.
func withoutUpstream(method string, in grpc.ServerStream) error {
	if strings.HasSuffix(method, "/GetExposedElixirTools") || strings.HasSuffix(method, "/GetExposedTools") {
		var f frame
		if err := in.RecvMsg(&f); err != nil {
			return err
		}
		f.data.Free()
		return in.SendMsg(&frame{}) // an empty message: no tools
	}
	return status.ToGRPC(outrigger.Errorf(outrigger.Unavailable, "no server is configured for %s; set the sidecar's --upstream-grpc", method))
}

// relay copies both directions until the upstream ends the call.
func relay(method string, in grpc.ServerStream, upstream grpc.ClientConnInterface) error {
	ctx, cancel := context.WithCancel(in.Context())
	defer cancel()
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		ctx = metadata.NewOutgoingContext(ctx, md.Copy())
	}
	out, err := upstream.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method, grpc.ForceCodecV2(Codec()))
	if err != nil {
		return err
	}
	// A caller may keep its direction open after the upstream has ended the call; receiving
	// from it returns only when this handler does, so nobody waits for this goroutine.
	go func() {
		if copyUp(in, out) != nil {
			cancel() // the caller broke off: end the upstream call
		}
	}()
	err = copyDown(out, in)
	in.SetTrailer(out.Trailer())
	return err
}

// copyUp moves messages from the caller to the upstream.
func copyUp(in grpc.ServerStream, out grpc.ClientStream) error {
	for {
		var f frame
		if err := in.RecvMsg(&f); err == io.EOF {
			return out.CloseSend()
		} else if err != nil {
			return err
		}
		// io.EOF means the upstream has ended the call; copyDown has its status.
		if err := out.SendMsg(&f); err != nil {
			return nil
		}
	}
}

// copyDown moves messages from the upstream to the caller; nil means status OK.
func copyDown(out grpc.ClientStream, in grpc.ServerStream) error {
	head, err := out.Header()
	if err != nil {
		return err
	}
	if err := in.SendHeader(head); err != nil {
		return err
	}
	for {
		var f frame
		if err := out.RecvMsg(&f); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if err := in.SendMsg(&f); err != nil {
			return err
		}
	}
}
