package variables_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/variables"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// world is a service over a log, and real gRPC clients of it over an in-memory
// connection. It works inside synctest bubbles.
type world struct {
	t    testing.TB
	ctx  context.Context
	log  eventlog.Log
	svc  *variables.Service
	vars pb.VariablesClient
	coh  pb.CoherenceClient
	dial func(context.Context) (net.Conn, error)
	stop func() // ends the service and the connection; may be called twice
}

func newWorld(t testing.TB) *world { return startWorld(t, memory.New(), variables.Options{}) }

func startWorld(t testing.TB, log eventlog.Log, opt variables.Options) *world {
	t.Helper()
	if opt.Region == "" {
		opt.Region = "us"
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	svc, err := variables.New(log, opt)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- svc.Run(ctx) }()
	<-svc.Ready()

	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer(grpc.Creds(svc.Credentials(insecure.NewCredentials())))
	pb.RegisterVariablesServer(server, svc)
	pb.RegisterCoherenceServer(server, svc)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:///variables", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, log: log, svc: svc, vars: pb.NewVariablesClient(conn), coh: pb.NewCoherenceClient(conn), dial: listener.DialContext}
	w.ctx, w.stop = ctx, func() {
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("Run: %v", err)
		}
		ran <- nil
		conn.Close()
		server.Stop()
		<-served
		served <- nil
	}
	t.Cleanup(w.stop)
	return w
}

// call makes a unary call and turns its error back into an outrigger.Error.
func call[Q, A any](ctx context.Context, f func(context.Context, Q, ...grpc.CallOption) (A, error), req Q) (A, error) {
	var trailer metadata.MD
	out, err := f(ctx, req, grpc.Trailer(&trailer))
	return out, status.FromGRPC(err, trailer)
}

func must[Q, A any](w *world, f func(context.Context, Q, ...grpc.CallOption) (A, error), req Q) A {
	w.t.Helper()
	out, err := call(w.ctx, f, req)
	if err != nil {
		w.t.Fatalf("%T %v: %v", req, req, err)
	}
	return out
}

// refused checks that a call fails with a kind and a text.
func refused[Q, A any](w *world, f func(context.Context, Q, ...grpc.CallOption) (A, error), req Q, kind outrigger.Kind, text string) *outrigger.Error {
	w.t.Helper()
	_, err := call(w.ctx, f, req)
	if !outrigger.IsKind(err, kind) || err.Error() != text {
		w.t.Fatalf("%T %v: got %v (%v), want %v %q", req, req, err, outrigger.KindOf(err), kind, text)
	}
	return err.(*outrigger.Error)
}

func value(t outrigger.Type, json string) *pb.Value {
	return &pb.Value{Type: string(t), Json: []byte(json)}
}

func (w *world) session(id string) {
	w.t.Helper()
	must(w, w.vars.CreateSession, &pb.CreateSessionRequest{Id: id})
}

func (w *world) register(session, name string, v *pb.Value) *pb.Variable {
	w.t.Helper()
	return must(w, w.vars.Register, &pb.RegisterRequest{Key: &pb.Key{Session: session, Name: name}, Value: v})
}

func setReq(session, identifier, json string) *pb.SetRequest {
	return &pb.SetRequest{Session: session, Identifier: identifier, Value: &pb.Value{Json: []byte(json)}}
}

func (w *world) set(session, identifier, json string) *pb.Variable {
	w.t.Helper()
	return must(w, w.vars.Set, setReq(session, identifier, json))
}

func getReq(session, identifier string) *pb.GetRequest {
	return &pb.GetRequest{Session: session, Identifier: identifier}
}

func (w *world) get(session, identifier string) *pb.Variable {
	w.t.Helper()
	return must(w, w.vars.Get, getReq(session, identifier))
}

// holds checks the present value and counter of a variable.
func (w *world) holds(session, name, json string, counter int32) {
	w.t.Helper()
	v := w.get(session, name)
	if got := string(v.GetValue().GetJson()); got != json || v.GetVersion().GetCounter() != counter {
		w.t.Fatalf("%s/%s = %s at version %d, want %s at %d", session, name, got, v.GetVersion().GetCounter(), json, counter)
	}
}

func ptr[T any](v T) *T { return &v }

// within fails the test when f does not return in time; for tests outside a bubble.
func within(t testing.TB, d time.Duration, what string, done <-chan struct{}) {
	t.Helper()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		t.Fatalf("%s: not done after %v", what, d)
	}
}
