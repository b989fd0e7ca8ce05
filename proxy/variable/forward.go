package variable

import (
	"context"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/gzip" // callers may compress
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

// MaxMessage bounds one gRPC message in either direction, in bytes: what the published
// tool servers accept.
const MaxMessage = 100 << 20

// listTools is the one forwarded call that has an answer without an upstream: clients
// make it when they start.
const listTools = "/snakepit.bridge.BridgeService/GetExposedElixirTools"

// Forward returns the handler of calls no registered service knows (grpc.
// UnknownServiceHandler): they go to upstream byte for byte, with metadata, deadline,
// trailers and status details, for all four kinds of call; either side may end the call
// first. Only what belongs to a connection (user-agent, :authority, compression) is the
// sidecar's own. Without an upstream the list of tools is empty and everything else is
// UNAVAILABLE.
//
// A message is held at a time in each direction, of at most MaxMessage bytes; flow
// control reaches from one end to the other if the server's does (one behind an http.Handler
// has none of its own: package proxy makes it).
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
	if method != listTools {
		return status.ToGRPC(outrigger.Errorf(outrigger.Unavailable, "no server is configured for %s; set the sidecar's --upstream-grpc", method))
	}
	var f frame
	if err := in.RecvMsg(&f); err != nil {
		return err
	}
	f.data.Free()
	return in.SendMsg(&frame{}) // an empty message: no tools
}

// relay copies both directions until the upstream ends the call.
func relay(method string, in grpc.ServerStream, upstream grpc.ClientConnInterface) error {
	ctx, cancel := context.WithCancelCause(in.Context())
	defer cancel(nil)
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		ctx = metadata.NewOutgoingContext(ctx, md) // a copy of its own already
	}
	out, err := upstream.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method,
		grpc.ForceCodecV2(Codec()), grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage))
	if err != nil {
		return err
	}
	// A caller may keep its direction open after the upstream has ended the call; receiving
	// from it returns only when this handler does, so nobody waits for this goroutine.
	go func() {
		if err := copyUp(in, out); err != nil {
			cancel(err) // the caller broke off, or sent what cannot be taken: end the upstream call
		}
	}()
	err = copyDown(out, in)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause // not the echo of our own cancellation
	}
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
		if err := out.SendMsg(&f); err != nil {
			return nil // the upstream has ended the call; copyDown has its status
		}
	}
}

// copyDown moves messages from the upstream to the caller; nil means status OK. The
// trailer may be read only once the upstream has ended the call.
func copyDown(out grpc.ClientStream, in grpc.ServerStream) error {
	head, err := out.Header()
	if err != nil {
		in.SetTrailer(out.Trailer())
		return err
	}
	if head != nil { // else the call was refused without one
		if err := in.SendHeader(head); err != nil {
			return err
		}
	}
	for {
		var f frame
		if err := out.RecvMsg(&f); err != nil {
			in.SetTrailer(out.Trailer())
			if err == io.EOF {
				return nil
			}
			return err
		}
		if err := in.SendMsg(&f); err != nil {
			return err
		}
	}
}
