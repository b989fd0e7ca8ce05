package variable_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/gzip"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger/proxy/variable"
)

// tools is a real gRPC server of a service the sidecar does not know, with all four
// kinds of call. What a call does is told by its metadata.
type tools struct {
	testpb.UnimplementedTestServiceServer
	seen     metadata.MD   // of the last call
	deadline time.Duration // left when it arrived; 0 = none
	ended    chan error    // what ended the last full-duplex call on this side
	received atomic.Int64  // messages of streams
}

func (s *tools) note(ctx context.Context, set, trailer func(metadata.MD) error) error {
	s.seen, _ = metadata.FromIncomingContext(ctx)
	s.deadline = 0
	if d, ok := ctx.Deadline(); ok {
		s.deadline = time.Until(d)
	}
	if err := trailer(metadata.Pairs("x-trailer", "t", "bytes-bin", "\x00\xff")); err != nil {
		return err
	}
	if s.asked("no-header") {
		return nil
	}
	return set(metadata.Pairs("x-answer", "1", "x-answer", "2", "more-bin", "\x01\xfe"))
}

func (s *tools) asked(what string) bool { return len(s.seen.Get(what)) > 0 }

// refusal is a status with details.
func refusal() error {
	st, err := gstatus.New(codes.FailedPrecondition, "the tool is not ready: 50 % µ").WithDetails(&testpb.SimpleRequest{ResponseSize: 42})
	if err != nil {
		return err
	}
	return st.Err()
}

func (s *tools) UnaryCall(ctx context.Context, r *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
	if err := s.note(ctx, func(md metadata.MD) error { return grpc.SetHeader(ctx, md) }, func(md metadata.MD) error { return grpc.SetTrailer(ctx, md) }); err != nil {
		return nil, err
	}
	switch {
	case s.asked("refuse"):
		return nil, refusal()
	case s.asked("hang"):
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &testpb.SimpleResponse{Payload: &testpb.Payload{Body: bytes.Repeat([]byte("x"), int(r.ResponseSize))}, Username: string(r.GetPayload().GetBody())}, nil
}

func (s *tools) note2(stream grpc.ServerStream) error {
	return s.note(stream.Context(), stream.SetHeader, func(md metadata.MD) error { stream.SetTrailer(md); return nil })
}

func (s *tools) StreamingOutputCall(r *testpb.StreamingOutputCallRequest, stream grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse]) error {
	if err := s.note2(stream); err != nil {
		return err
	}
	for i, p := range r.ResponseParameters {
		if err := stream.Send(&testpb.StreamingOutputCallResponse{Payload: &testpb.Payload{Body: fmt.Appendf(nil, "%d:%d", i, p.Size)}}); err != nil {
			return err
		}
	}
	if s.asked("refuse") {
		return refusal()
	}
	return nil
}

func (s *tools) StreamingInputCall(stream grpc.ClientStreamingServer[testpb.StreamingInputCallRequest, testpb.StreamingInputCallResponse]) error {
	if err := s.note2(stream); err != nil {
		return err
	}
	total := 0
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&testpb.StreamingInputCallResponse{AggregatedPayloadSize: int32(total)})
		}
		if err != nil {
			return err
		}
		if total += len(r.GetPayload().GetBody()); s.asked("enough") {
			return refusal()
		}
	}
}

func (s *tools) FullDuplexCall(stream grpc.BidiStreamingServer[testpb.StreamingOutputCallRequest, testpb.StreamingOutputCallResponse]) (err error) {
	defer func() {
		if s.ended != nil {
			s.ended <- err
		}
	}()
	if err := s.note2(stream); err != nil {
		return err
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		s.received.Add(1)
		if err := stream.Send(&testpb.StreamingOutputCallResponse{Payload: r.Payload}); err != nil {
			return err
		}
		if s.asked("first") {
			return refusal() // with the caller's direction still open
		}
	}
}

// inRelay runs do with a client whose calls go through Forward to a tools server. The
// bubble ends only when every goroutine of every call has ended.
func inRelay(t *testing.T, do func(t *testing.T, s *tools, c testpb.TestServiceClient)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &tools{}
		up, stopUp := serve(t, func(g *grpc.Server) { testpb.RegisterTestServiceServer(g, s) }, grpc.MaxRecvMsgSize(variable.MaxMessage))
		defer stopUp()
		front, stopFront := serve(t, func(*grpc.Server) {}, grpc.ForceServerCodecV2(variable.Codec()),
			grpc.UnknownServiceHandler(variable.Forward(up)), grpc.MaxRecvMsgSize(variable.MaxMessage))
		defer stopFront()
		do(t, s, testpb.NewTestServiceClient(front))
	})
}

func sized(n int) *testpb.Payload { return &testpb.Payload{Body: bytes.Repeat([]byte("y"), n)} }

func answered(t *testing.T, head, trailer metadata.MD) {
	t.Helper()
	if got := head.Get("x-answer"); strings.Join(got, ",") != "1,2" || first(head, "more-bin") != "\x01\xfe" {
		t.Errorf("header %v", head)
	}
	if first(trailer, "x-trailer") != "t" || first(trailer, "bytes-bin") != "\x00\xff" {
		t.Errorf("trailer %v", trailer)
	}
}

func isRefusal(t *testing.T, err error) {
	t.Helper()
	st := gstatus.Convert(err)
	if st.Code() != codes.FailedPrecondition || st.Message() != "the tool is not ready: 50 % µ" || len(st.Details()) != 1 {
		t.Fatalf("status %v", err)
	}
	if info, ok := st.Details()[0].(*testpb.SimpleRequest); !ok || info.ResponseSize != 42 {
		t.Errorf("details %v", st.Details())
	}
}

func TestForwardUnary(t *testing.T) {
	inRelay(t, func(t *testing.T, s *tools, c testpb.TestServiceClient) {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "x-snakepit-correlation-id", "c1", "authorization", "Bearer z", "traceparent", "00-1", "key-bin", "\x00\x80", "twice", "a", "twice", "b")
		var head, trailer metadata.MD
		r, err := c.UnaryCall(ctx, &testpb.SimpleRequest{Payload: &testpb.Payload{Body: []byte("me")}, ResponseSize: 3}, grpc.Header(&head), grpc.Trailer(&trailer))
		if err != nil || r.Username != "me" || string(r.Payload.Body) != "xxx" {
			t.Fatalf("%v, %v", r, err)
		}
		answered(t, head, trailer)
		for key, want := range map[string]string{"x-snakepit-correlation-id": "c1", "authorization": "Bearer z", "traceparent": "00-1", "key-bin": "\x00\x80", "twice": "a,b"} {
			if got := strings.Join(s.seen.Get(key), ","); got != want {
				t.Errorf("metadata %s arrived as %q, want %q", key, got, want)
			}
		}
		if s.deadline != 0 {
			t.Errorf("a deadline of %v was invented", s.deadline)
		}

		// Errors come with header, trailer and details, or with no header at all.
		_, err = c.UnaryCall(metadata.AppendToOutgoingContext(t.Context(), "refuse", "1"), &testpb.SimpleRequest{}, grpc.Header(&head), grpc.Trailer(&trailer))
		isRefusal(t, err)
		answered(t, head, trailer)
		_, err = c.UnaryCall(metadata.AppendToOutgoingContext(t.Context(), "refuse", "1", "no-header", "1"), &testpb.SimpleRequest{}, grpc.Header(&head), grpc.Trailer(&trailer))
		isRefusal(t, err)
		if len(head) != 0 || first(trailer, "x-trailer") != "t" {
			t.Errorf("header %v, trailer %v", head, trailer)
		}
		if _, err := c.CacheableUnaryCall(t.Context(), &testpb.SimpleRequest{}); gstatus.Code(err) != codes.Unimplemented {
			t.Errorf("a call the upstream does not have: %v", err)
		}

		// Large messages in both directions, compressed ones too.
		const large = 5 << 20 // more than gRPC takes by default
		for _, o := range [][]grpc.CallOption{nil, {grpc.UseCompressor(gzip.Name)}} {
			r, err = c.UnaryCall(t.Context(), &testpb.SimpleRequest{Payload: sized(large), ResponseSize: large}, append(o, grpc.MaxCallRecvMsgSize(variable.MaxMessage))...)
			if err != nil || len(r.Username) != large || len(r.Payload.Body) != large {
				t.Errorf("large: %d and %d bytes, %v", len(r.GetUsername()), len(r.GetPayload().GetBody()), err)
			}
		}
	})
}

func TestForwardDeadlineAndCancellation(t *testing.T) {
	inRelay(t, func(t *testing.T, s *tools, c testpb.TestServiceClient) {
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "hang", "1"), 7*time.Second)
		defer cancel()
		start := time.Now()
		if _, err := c.UnaryCall(ctx, &testpb.SimpleRequest{}); gstatus.Code(err) != codes.DeadlineExceeded || time.Since(start) != 7*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		synctest.Wait() // the upstream's side has ended, too
		if s.deadline <= 6*time.Second || s.deadline > 7*time.Second {
			t.Errorf("the upstream had %v", s.deadline)
		}
		s.ended = make(chan error, 1)
		ctx, cancel = context.WithCancel(t.Context())
		stream, err := c.FullDuplexCall(ctx)
		must(t, err)
		must(t, stream.Send(&testpb.StreamingOutputCallRequest{Payload: sized(1)}))
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		cancel() // the client leaves first
		if err := <-s.ended; gstatus.Code(err) != codes.Canceled {
			t.Errorf("the upstream was told %v", err)
		}
	})
}

func TestForwardServerStream(t *testing.T) {
	inRelay(t, func(t *testing.T, s *tools, c testpb.TestServiceClient) {
		for _, refuse := range []bool{false, true} {
			ctx := t.Context()
			if refuse {
				ctx = metadata.AppendToOutgoingContext(ctx, "refuse", "1")
			}
			req := &testpb.StreamingOutputCallRequest{}
			for i := range 200 {
				req.ResponseParameters = append(req.ResponseParameters, &testpb.ResponseParameters{Size: int32(i)})
			}
			stream, err := c.StreamingOutputCall(ctx, req)
			must(t, err)
			for i := range 200 {
				if m, err := stream.Recv(); err != nil || string(m.Payload.Body) != fmt.Sprintf("%d:%d", i, i) {
					t.Fatalf("message %d: %v, %v", i, m, err)
				}
			}
			_, err = stream.Recv()
			if refuse {
				isRefusal(t, err)
			} else if err != io.EOF {
				t.Errorf("end: %v", err)
			}
			head, herr := stream.Header()
			must(t, herr)
			answered(t, head, stream.Trailer())
		}
	})
}

func TestForwardClientStream(t *testing.T) {
	inRelay(t, func(t *testing.T, s *tools, c testpb.TestServiceClient) {
		stream, err := c.StreamingInputCall(t.Context())
		must(t, err)
		for range 100 {
			must(t, stream.Send(&testpb.StreamingInputCallRequest{Payload: sized(1000)}))
		}
		r, err := stream.CloseAndRecv()
		if err != nil || r.AggregatedPayloadSize != 100_000 {
			t.Errorf("%v, %v", r, err)
		}
		answered(t, must2(stream.Header()), stream.Trailer())
		// The upstream has had enough while the client is still sending.
		stream, err = c.StreamingInputCall(metadata.AppendToOutgoingContext(t.Context(), "enough", "1"))
		must(t, err)
		sent := 0
		for ; sent < 10_000; sent++ {
			if err = stream.Send(&testpb.StreamingInputCallRequest{Payload: sized(10_000)}); err != nil {
				break
			}
		}
		if !errors.Is(err, io.EOF) {
			t.Errorf("after %d messages: %v", sent, err)
		}
		_, err = stream.CloseAndRecv()
		isRefusal(t, err)
	})
}

func must2[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestForwardBidi(t *testing.T) {
	inRelay(t, func(t *testing.T, s *tools, c testpb.TestServiceClient) {
		s.ended = make(chan error, 1)
		stream, err := c.FullDuplexCall(t.Context())
		must(t, err)
		for i := range 100 { // in lockstep: nothing is held back
			body := fmt.Appendf(nil, "message %d", i)
			must(t, stream.Send(&testpb.StreamingOutputCallRequest{Payload: &testpb.Payload{Body: body}}))
			if m, err := stream.Recv(); err != nil || !bytes.Equal(m.Payload.Body, body) {
				t.Fatalf("echo %d: %v, %v", i, m, err)
			}
		}
		must(t, stream.CloseSend())
		if _, err := stream.Recv(); err != io.EOF {
			t.Errorf("end: %v", err)
		}
		must(t, <-s.ended)
		answered(t, must2(stream.Header()), stream.Trailer())

		// The upstream ends first, the client never closes its direction.
		stream, err = c.FullDuplexCall(metadata.AppendToOutgoingContext(t.Context(), "first", "1"))
		must(t, err)
		must(t, stream.Send(&testpb.StreamingOutputCallRequest{Payload: sized(1)}))
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		<-s.ended
		_, err = stream.Recv()
		isRefusal(t, err)
		if first(stream.Trailer(), "x-trailer") != "t" {
			t.Errorf("trailer %v", stream.Trailer())
		}
	})
}

// Flow control reaches from the slow reader at one end to the writer at the other: what
// is under way between them is bounded.
func TestForwardKeepsBackPressure(t *testing.T) {
	inRelay(t, func(t *testing.T, s *tools, c testpb.TestServiceClient) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		stream, err := c.FullDuplexCall(ctx) // and nobody receives its echoes
		must(t, err)
		sent := make(chan int)
		go func() {
			n := 0
			for n < 10_000 && stream.Send(&testpb.StreamingOutputCallRequest{Payload: sized(16 << 10)}) == nil {
				n++
			}
			sent <- n
		}()
		synctest.Wait()
		// 160 MB would be sent; a few windows (64 KiB each) and buffers are.
		if got := s.received.Load(); got > 400 {
			t.Errorf("the upstream echoed %d messages that nobody read", got)
		}
		cancel()
		if n := <-sent; n > 1000 {
			t.Errorf("the client could send %d messages that nobody took", n)
		}
	})
}

// raw passes bytes as they are, whatever the codec would make of them.
type raw struct{}

func (raw) Name() string { return "proto" }
func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}
func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

var _ encoding.CodecV2 = raw{}

// Bytes that are no message of anybody's pass unharmed: unknown fields, fields out of
// order, an over-long varint, and what is not protobuf at all.
func TestForwardIsByteForByte(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var seen []byte
		var path string
		up, stopUp := serve(t, func(*grpc.Server) {}, grpc.ForceServerCodecV2(raw{}), grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
			path, _ = grpc.MethodFromServerStream(s)
			var b []byte
			if err := s.RecvMsg(&b); err != nil {
				return err
			}
			seen = b
			return s.SendMsg(&b)
		}))
		defer stopUp()
		front, stopFront := serve(t, func(*grpc.Server) {}, grpc.ForceServerCodecV2(variable.Codec()), grpc.UnknownServiceHandler(variable.Forward(up)))
		defer stopFront()
		for _, method := range []string{"ExecuteTool", "ExecuteStreamingTool", "RegisterTools", "GetExposedElixirTools", "ExecuteElixirTool", "StreamTelemetry"} {
			method = "/snakepit.bridge.BridgeService/" + method
			for _, in := range [][]byte{nil, {0x92, 0x80, 0x00, 0x01, 'x', 0x08, 0x81, 0x80, 0x00}, []byte("not protobuf \xff"), bytes.Repeat([]byte{0}, 70_000)} {
				var out []byte
				if err := front.Invoke(t.Context(), method, &in, &out, grpc.ForceCodecV2(raw{})); err != nil {
					t.Fatal(err)
				}
				if path != method || !bytes.Equal(seen, in) || !bytes.Equal(out, in) {
					t.Errorf("%s: %d bytes in, %d seen by %s, %d out", method, len(in), len(seen), path, len(out))
				}
			}
		}
	})
}

// Without a tool server the list of tools is empty, so that clients start, and nothing
// else pretends to work.
func TestForwardWithoutUpstream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		front, stop := serve(t, func(*grpc.Server) {}, grpc.ForceServerCodecV2(variable.Codec()), grpc.UnknownServiceHandler(variable.Forward(nil)))
		defer stop()
		call := func(method string) ([]byte, error) {
			in, out := []byte{0x0a, 1, 's'}, []byte("unset")
			err := front.Invoke(t.Context(), method, &in, &out, grpc.ForceCodecV2(raw{}))
			return out, err
		}
		if out, err := call("/snakepit.bridge.BridgeService/GetExposedElixirTools"); err != nil || len(out) != 0 {
			t.Errorf("%q, %v", out, err)
		}
		for _, method := range []string{"/snakepit.bridge.BridgeService/ExecuteTool", "/snakepit.bridge.BridgeService/RegisterTools", "/other.Service/GetExposedElixirTools", "/a.B/C"} {
			if _, err := call(method); gstatus.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "--upstream-grpc") || !strings.Contains(err.Error(), method) {
				t.Errorf("%s: %v", method, err)
			}
		}
		stream, err := front.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/snakepit.bridge.BridgeService/StreamTelemetry", grpc.ForceCodecV2(raw{}))
		must(t, err)
		var out []byte
		if err := stream.RecvMsg(&out); gstatus.Code(err) != codes.Unavailable {
			t.Errorf("stream: %v", err)
		}
	})
}

// A message the sidecar does not take ends the call at both ends, with the reason.
func TestForwardTooLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &tools{ended: make(chan error, 1)}
		up, stopUp := serve(t, func(g *grpc.Server) { testpb.RegisterTestServiceServer(g, s) })
		defer stopUp()
		front, stopFront := serve(t, func(*grpc.Server) {}, grpc.ForceServerCodecV2(variable.Codec()), grpc.UnknownServiceHandler(variable.Forward(up)), grpc.MaxRecvMsgSize(1000))
		defer stopFront()
		stream, err := testpb.NewTestServiceClient(front).FullDuplexCall(t.Context())
		must(t, err)
		must(t, stream.Send(&testpb.StreamingOutputCallRequest{Payload: sized(10)}))
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		must(t, stream.Send(&testpb.StreamingOutputCallRequest{Payload: sized(2000)}))
		if _, err := stream.Recv(); gstatus.Code(err) != codes.ResourceExhausted {
			t.Errorf("the caller got %v", err)
		}
		if err := <-s.ended; gstatus.Code(err) != codes.Canceled {
			t.Errorf("the upstream got %v", err)
		}
	})
}

// An upstream that is not there is UNAVAILABLE at once.
func TestForwardToNobody(t *testing.T) {
	inRelay(t, func(t *testing.T, s *tools, c testpb.TestServiceClient) {
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		up, stop := serve(t, func(*grpc.Server) {})
		synctest.Wait() // it serves
		stop()
		front, stopFront := serve(t, func(*grpc.Server) {}, grpc.ForceServerCodecV2(variable.Codec()), grpc.UnknownServiceHandler(variable.Forward(up)))
		defer stopFront()
		if _, err := testpb.NewTestServiceClient(front).UnaryCall(ctx, &testpb.SimpleRequest{}); gstatus.Code(err) != codes.Unavailable || time.Since(start) > time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}
