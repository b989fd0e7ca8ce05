package inference

import (
	"context"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	oip "github.com/outrigger-mesh/outrigger/api/inference"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
)

// tensorServer is an honest server of the protocol with one model: it answers with the
// tensors it was given.
type tensorServer struct {
	oip.UnimplementedGRPCInferenceServiceServer
	model, version string

	mu   sync.Mutex
	seen *oip.ModelInferRequest
	md   metadata.MD
	fail []error // of the next calls
}

func (s *tensorServer) answer(ctx context.Context, r *oip.ModelInferRequest) (*oip.ModelInferResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = r
	s.md, _ = metadata.FromIncomingContext(ctx)
	if len(s.fail) > 0 {
		err := s.fail[0]
		s.fail = s.fail[1:]
		return nil, err
	}
	if r.ModelName != s.model || r.ModelVersion != s.version {
		return nil, status.Errorf(codes.NotFound, "unknown model %s version %q", r.ModelName, r.ModelVersion)
	}
	return &oip.ModelInferResponse{ModelName: s.model, ModelVersion: "7", Id: r.Id, RawOutputContents: r.RawInputContents}, nil
}

func (s *tensorServer) ModelInfer(ctx context.Context, r *oip.ModelInferRequest) (*oip.ModelInferResponse, error) {
	grpc.SetHeader(ctx, metadata.Pairs("x-served-by", s.model))
	grpc.SetTrailer(ctx, metadata.Pairs("x-took-bin", "\x00\xff"))
	return s.answer(ctx, r)
}

func (s *tensorServer) ModelStreamInfer(stream grpc.BidiStreamingServer[oip.ModelInferRequest, oip.ModelStreamInferResponse]) error {
	for {
		r, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		a, err := s.answer(stream.Context(), r)
		out := &oip.ModelStreamInferResponse{InferResponse: a}
		if err != nil {
			out = &oip.ModelStreamInferResponse{ErrorMessage: err.Error()}
		}
		if err := stream.Send(out); err != nil {
			return err
		}
	}
}

func (s *tensorServer) ModelReady(_ context.Context, r *oip.ModelReadyRequest) (*oip.ModelReadyResponse, error) {
	return &oip.ModelReadyResponse{Ready: r.Name == s.model && r.Version == s.version}, nil
}

func listen(t *testing.T, register func(*grpc.Server), o ...grpc.ServerOption) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(o...)
	register(g)
	over := make(chan error, 1)
	go func() { over <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Stop()
		if err := <-over; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// rpcMesh is a handler in front of servers a and b of version 1, and a client of it.
func rpcMesh(t *testing.T, addresses ...string) (*Handler, oip.GRPCInferenceServiceClient) {
	t.Helper()
	p := inOrder(addresses...)
	p.Models[0].Versions[0].Upstream = "resnet/versions/2"
	h := mustNew(t, Options{Policy: newSource(p).get, Transport: &scripted{}})
	pool := upstream.NewGRPCPool(upstream.GRPCPoolOptions{})
	t.Cleanup(pool.Close)
	front := listen(t, func(*grpc.Server) {}, grpc.UnknownServiceHandler(h.GRPC(pool, func(any, grpc.ServerStream) error {
		return status.Error(codes.Unimplemented, "next")
	})))
	conn, err := grpc.NewClient(front, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return h, oip.NewGRPCInferenceServiceClient(conn)
}

func tensors() *oip.ModelInferRequest {
	r := &oip.ModelInferRequest{ModelName: "gpt", ModelVersion: "1", Id: "i", RawInputContents: [][]byte{{0, 1, 0xff}},
		Inputs: []*oip.ModelInferRequest_InferInputTensor{{Name: "x", Datatype: "UINT8", Shape: []int64{3}}}}
	r.ProtoReflect().SetUnknown([]byte("\x9a\x06\x01u")) // field 99: a later version of the protocol
	return r
}

func TestGRPCInfer(t *testing.T) {
	s := &tensorServer{model: "resnet", version: "2"}
	h, c := rpcMesh(t, listen(t, func(g *grpc.Server) { oip.RegisterGRPCInferenceServiceServer(g, s) }))
	var head, trailer metadata.MD
	ctx := metadata.AppendToOutgoingContext(t.Context(), "x-user-id", "u1", "traceparent", "00-1", "x-outrigger-arm", "forged")
	got, err := c.ModelInfer(ctx, tensors(), grpc.Header(&head), grpc.Trailer(&trailer))
	if err != nil || string(got.RawOutputContents[0]) != "\x00\x01\xff" || got.ModelVersion != "7" || got.Id != "i" {
		t.Fatalf("%v, %v", got, err)
	}
	want := tensors()
	want.ModelName, want.ModelVersion = "resnet", "2"
	if !proto.Equal(s.seen, want) {
		t.Errorf("the model got %v, want %v", s.seen, want)
	}
	if !slices.Equal(s.md["traceparent"], []string{"00-1"}) || s.md["x-outrigger-arm"] != nil || s.md["x-outrigger-bucket"] == nil {
		t.Errorf("the model got metadata %v", s.md)
	}
	for k, v := range map[string]string{"x-served-by": "resnet", "x-outrigger-version": "v1", "x-outrigger-model": "gpt", "x-outrigger-arm": "stable", "x-outrigger-attempts": "1"} {
		if !slices.Equal(head[k], []string{v}) {
			t.Errorf("%s is %v, want %s", k, head[k], v)
		}
	}
	if !slices.Equal(trailer["x-took-bin"], []string{"\x00\xff"}) {
		t.Errorf("trailer %v", trailer)
	}
	if d := only(t, h); d.Requests != 1 || d.Failures != 0 || d.TokensIn+d.TokensOut != 0 {
		t.Errorf("recorded %v", d)
	}
	ready, err := c.ModelReady(ctx, &oip.ModelReadyRequest{Name: "gpt"})
	if err != nil || !ready.Ready {
		t.Errorf("ready: %v, %v", ready, err)
	}
	if live, err := c.ServerReady(ctx, &oip.ServerReadyRequest{}); err != nil || !live.Ready {
		t.Errorf("server: %v, %v", live, err)
	}
	if meta, err := c.ServerMetadata(ctx, &oip.ServerMetadataRequest{}); err != nil || meta.Name != "outrigger" {
		t.Errorf("server: %v, %v", meta, err)
	}
	if d := h.Recorder().Drain(h.now()); len(d) != 0 {
		t.Errorf("questions about the model were counted: %v", d)
	}
}

// One retry loop: a status that blames the server is retried elsewhere, one that blames
// the request is passed on as it is, details included; nobody there is UNAVAILABLE.
func TestGRPCFailures(t *testing.T) {
	busy, err := status.New(codes.InvalidArgument, "shape").WithDetails(durationpb.New(7))
	if err != nil {
		t.Fatal(err)
	}
	a, b := &tensorServer{model: "resnet", version: "2"}, &tensorServer{model: "resnet", version: "2"}
	serveOn := func(s *tensorServer) string {
		return listen(t, func(g *grpc.Server) { oip.RegisterGRPCInferenceServiceServer(g, s) })
	}
	h, c := rpcMesh(t, serveOn(a), serveOn(b))
	a.fail = []error{status.Error(codes.Internal, "out of memory"), busy.Err(), status.Error(codes.Unavailable, "loading"), status.Error(codes.Internal, "1")}
	var head metadata.MD
	if _, err := c.ModelInfer(t.Context(), tensors(), grpc.Header(&head)); err != nil || head["x-outrigger-attempts"][0] != "2" {
		t.Errorf("not retried: %v, %v", err, head)
	}
	_, err = c.ModelInfer(t.Context(), tensors())
	if s := status.Convert(err); s.Code() != codes.InvalidArgument || s.Message() != "shape" || len(s.Details()) != 1 {
		t.Errorf("passed on %v", err)
	}
	if _, err := c.ModelInfer(t.Context(), tensors()); err != nil {
		t.Errorf("UNAVAILABLE was not retried: %v", err)
	}
	b.fail = []error{status.Error(codes.Unknown, "2"), status.Error(codes.Unknown, "2")}
	if _, err := c.ModelInfer(t.Context(), tensors()); status.Convert(err).Message() != "2" {
		t.Errorf("the last answer was not passed on: %v", err)
	}
	unknown := tensors()
	unknown.ModelName = "nobody"
	if _, err := c.ModelInfer(t.Context(), unknown); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "nobody") {
		t.Errorf("unknown model: %v", err)
	}
	if d := only(t, h); d.Requests != 4 || d.Failures != 1 || d.Attempts != 7 {
		t.Errorf("recorded %v", d)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close() // nobody listens there now
	h, c = rpcMesh(t, l.Addr().String())
	if _, err := c.ModelInfer(t.Context(), tensors()); status.Code(err) != codes.Unavailable {
		t.Errorf("nobody there: %v", err)
	}
	if d := only(t, h); d.Requests != 1 || d.Failures != 1 {
		t.Errorf("recorded %v", d)
	}
}

// A stream: every request is for the version, answers and in-band errors come back, and
// it ends when the caller is done. The first endpoint is not there.
func TestGRPCStream(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	s := &tensorServer{model: "resnet", version: "2"}
	h, c := rpcMesh(t, l.Addr().String(), listen(t, func(g *grpc.Server) { oip.RegisterGRPCInferenceServiceServer(g, s) }))
	stream, err := c.ModelStreamInfer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if i == 1 {
			s.mu.Lock()
			s.fail = []error{status.Error(codes.Internal, "in-band")}
			s.mu.Unlock()
		}
		if err := stream.Send(tensors()); err != nil {
			t.Fatal(err)
		}
		got, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if failed := got.ErrorMessage != ""; failed != (i == 1) || !failed && string(got.InferResponse.RawOutputContents[0]) != "\x00\x01\xff" {
			t.Errorf("answer %d: %v", i, got)
		}
	}
	if head, err := stream.Header(); err != nil || head["x-outrigger-version"][0] != "v1" || head["x-outrigger-attempts"][0] != "2" {
		t.Errorf("%v, %v", head, err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != io.EOF {
		t.Errorf("the end: %v", err)
	}
	if d := only(t, h); d.Requests != 1 || d.Failures != 0 || d.Attempts != 2 || len(d.TtftSketch) == 0 {
		t.Errorf("recorded %v", d)
	}

	if stream, err = c.ModelStreamInfer(t.Context()); err != nil {
		t.Fatal(err)
	}
	other := tensors()
	other.ModelName = "other"
	for _, r := range []*oip.ModelInferRequest{tensors(), other} {
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "one model") {
		t.Errorf("a second model: %v", err)
	}
}

// goneStream is a call of one request whose context is over.
type goneStream struct {
	grpc.ServerStream
	ctx     context.Context
	request []byte
}

func (s *goneStream) Context() context.Context    { return s.ctx }
func (s *goneStream) SetHeader(metadata.MD) error { return nil }
func (s *goneStream) SetTrailer(metadata.MD)      {}
func (s *goneStream) SendMsg(any) error           { return io.ErrClosedPipe }
func (s *goneStream) RecvMsg(m any) error         { return proto.Unmarshal(s.request, m.(proto.Message)) }

type methodStream struct{ method string }

func (m methodStream) Method() string               { return m.method }
func (m methodStream) SetHeader(metadata.MD) error  { return nil }
func (m methodStream) SendHeader(metadata.MD) error { return nil }
func (m methodStream) SetTrailer(metadata.MD) error { return nil }

// A caller whose time is over is told so, one who left is not told of a deadline, and
// neither speaks against the endpoint.
func TestGRPCCallerIsGone(t *testing.T) {
	p := inOrder(listen(t, func(g *grpc.Server) { oip.RegisterGRPCInferenceServiceServer(g, &tensorServer{model: "gpt"}) }))
	h := mustNew(t, Options{Policy: newSource(p).get, Transport: &scripted{}})
	pool := upstream.NewGRPCPool(upstream.GRPCPoolOptions{})
	t.Cleanup(pool.Close)
	serve := h.GRPC(pool, nil)
	request, err := proto.Marshal(tensors())
	if err != nil {
		t.Fatal(err)
	}
	for _, method := range []string{oip.GRPCInferenceService_ModelInfer_FullMethodName, oip.GRPCInferenceService_ModelStreamInfer_FullMethodName} {
		for _, want := range []codes.Code{codes.DeadlineExceeded, codes.Canceled} {
			ctx, cancel := context.WithDeadline(t.Context(), time.Unix(1, 0))
			if want == codes.Canceled {
				cancel()
				ctx, cancel = context.WithCancel(t.Context())
			}
			cancel()
			err := serve(nil, &goneStream{ctx: grpc.NewContextWithServerTransportStream(ctx, methodStream{method}), request: request})
			if status.Code(err) != want {
				t.Errorf("%s: %v, want %v", method, err, want)
			}
		}
	}
	for _, e := range h.LocalStats().Arms {
		if e.Failures != 0 {
			t.Errorf("the version was blamed: %+v", e)
		}
	}
}
