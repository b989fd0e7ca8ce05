package variable_test

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/variables"
	"github.com/outrigger-mesh/outrigger/proxy/variable"
)

// world is an application's connection to a front end over a real cache over a real
// authority, all in this process. It lives in a synctest bubble.
type world struct {
	t      *testing.T
	log    *memory.Log
	reader variable.Reader
	direct pb.VariablesClient // the authority, past the cache
	bridge snakepit.BridgeServiceClient
	native pb.VariablesClient
	conn   *grpc.ClientConn // the application's
	counts *variable.Counters

	mu      sync.Mutex
	touched map[string]int // reads by session

	stopAuthority func()
	draining      chan struct{}
}

type worldOptions struct {
	autoCreate bool
	upstream   grpc.ClientConnInterface
	reader     func(variable.Reader) variable.Reader // wraps the cache
	authority  func(pb.VariablesClient) pb.VariablesClient
}

// inWorld runs do in a bubble with a world; the cache has reached its steady state.
func inWorld(t *testing.T, o worldOptions, do func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, log: memory.New(), counts: new(variable.Counters), touched: map[string]int{}, draining: make(chan struct{})}
		defer w.log.Close()
		origin, stop := w.startAuthority()
		w.stopAuthority = stop
		defer func() { w.stopAuthority() }()
		w.direct = pb.NewVariablesClient(origin)

		start := time.Now()
		clock := func() int64 { return int64(time.Since(start)) + int64(time.Hour) } // the bubble's
		store, err := cache.New(cache.Options{Origin: origin, Private: true, Node: outrigger.Node{ID: "pod", Region: "eu"}, Clock: clock})
		must(t, err)
		ctx, cancel := context.WithCancel(context.Background())
		ran := make(chan error)
		go func() { ran <- store.Run(ctx) }()
		defer func() {
			cancel()
			must(t, <-ran)
		}()
		w.reader = store
		if o.reader != nil {
			w.reader = o.reader(store)
		}
		authority := store.Variables()
		if o.authority != nil {
			authority = o.authority(authority)
		}
		vo := variable.Options{Reader: w.reader, Authority: authority, AutoCreateSessions: o.autoCreate, Counters: w.counts, Draining: w.draining,
			Touched: func(tenant, session string) {
				w.mu.Lock()
				defer w.mu.Unlock()
				w.touched[tenant+"/"+session]++
			}}
		conn, stopFront := serve(t, func(s *grpc.Server) {
			snakepit.RegisterBridgeServiceServer(s, variable.NewBridge(vo))
			pb.RegisterVariablesServer(s, variable.NewNative(vo))
		}, grpc.ForceServerCodecV2(variable.Codec()), grpc.UnknownServiceHandler(variable.Forward(o.upstream)), grpc.MaxRecvMsgSize(variable.MaxMessage))
		defer stopFront()
		w.conn, w.bridge, w.native = conn, snakepit.NewBridgeServiceClient(conn), pb.NewVariablesClient(conn)
		// The cache's private agent comes up, is taken into use by the first read, and has
		// proved itself current since.
		time.Sleep(time.Second)
		_, err = store.Get(ctx, cache.Request{Key: outrigger.Key{Tenant: "t", Session: "warm", Name: "up"}, Encoding: -1})
		must(t, err)
		time.Sleep(time.Second)
		do(t, w)
	})
}

func (w *world) startAuthority() (*grpc.ClientConn, func()) {
	svc, err := variables.New(w.log, variables.Options{Region: "eu"})
	must(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- svc.Run(ctx) }()
	<-svc.Ready()
	conn, stop := serve(w.t, func(s *grpc.Server) {
		pb.RegisterVariablesServer(s, svc)
		pb.RegisterCoherenceServer(s, svc)
	})
	stopped := false
	return conn, func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		must(w.t, <-ran)
		stop()
	}
}

// serve runs a gRPC server over an in-memory connection, which the test's end closes.
func serve(t *testing.T, register func(*grpc.Server), o ...grpc.ServerOption) (*grpc.ClientConn, func()) {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	s := grpc.NewServer(o...)
	register(s)
	served := make(chan error)
	go func() { served <- s.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///"+t.Name(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn, func() {
		s.Stop()
		must(t, <-served)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// got is the outcome of a unary call: the answer, its headers, or the error.
type got[T any] struct {
	value T
	head  metadata.MD
	err   error
}

// call makes a unary call with request metadata kv.
func call[Q, A any](w *world, f func(context.Context, Q, ...grpc.CallOption) (A, error), req Q, kv ...string) got[A] {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var g got[A]
	g.value, g.err = f(metadata.AppendToOutgoingContext(ctx, kv...), req, grpc.Header(&g.head))
	// What the call caused elsewhere is over: the agent has told the authority which sessions
	// it follows, so that the next answer does not depend on who was faster.
	synctest.Wait()
	return g
}

// ok is call for what must succeed.
func ok[Q, A any](w *world, f func(context.Context, Q, ...grpc.CallOption) (A, error), req Q, kv ...string) A {
	w.t.Helper()
	g := call(w, f, req, kv...)
	if g.err != nil {
		w.t.Fatalf("%T %v: %v", req, req, g.err)
	}
	return g.value
}

// refused checks a call's code and text.
func refused[Q, A any](w *world, f func(context.Context, Q, ...grpc.CallOption) (A, error), req Q, code codes.Code, text string, kv ...string) metadata.MD {
	w.t.Helper()
	g := call(w, f, req, kv...)
	if s := gstatus.Convert(g.err); s.Code() != code || !strings.Contains(s.Message(), text) {
		w.t.Errorf("%T %v: %v, want %v with %q", req, req, g.err, code, text)
	}
	return g.head
}

func first(md metadata.MD, key string) string {
	if v := md.Get(key); len(v) > 0 {
		return v[0]
	}
	return ""
}

// has checks response headers; "-" means absent, "*" anything.
func has(t *testing.T, md metadata.MD, kv ...string) {
	t.Helper()
	for i := 0; i < len(kv); i += 2 {
		value := first(md, kv[i])
		switch want := kv[i+1]; {
		case want == "-" && value != "", want == "*" && value == "", want != "-" && want != "*" && value != want:
			t.Errorf("header %s is %q, want %q", kv[i], value, want)
		}
	}
}

func value(kind, json string) *anypb.Any {
	return &anypb.Any{TypeUrl: "type.googleapis.com/snakepit." + kind, Value: []byte(json)}
}

func (w *world) session(id string) {
	w.t.Helper()
	ok(w, w.bridge.InitializeSession, &snakepit.InitializeSessionRequest{SessionId: id})
}

// register declares a variable in session s and returns its id.
func (w *world) register(name, kind, json string) string {
	w.t.Helper()
	r := ok(w, w.bridge.RegisterVariable, &snakepit.RegisterVariableRequest{SessionId: "s", Name: name, Type: kind, InitialValue: value(kind, json)})
	if !r.Success || r.VariableId == "" {
		w.t.Fatalf("register %s: %v", name, r)
	}
	return r.VariableId
}

func getReq(id string) *snakepit.GetVariableRequest {
	return &snakepit.GetVariableRequest{SessionId: "s", VariableIdentifier: id}
}

func setReq(id, json string) *snakepit.SetVariableRequest {
	return &snakepit.SetVariableRequest{SessionId: "s", VariableIdentifier: id, Value: value("float", json)}
}

func (w *world) get(id string) *snakepit.Variable {
	w.t.Helper()
	return ok(w, w.bridge.GetVariable, getReq(id)).Variable
}

// holds checks a variable's value and version as the application reads them.
func (w *world) holds(id, json string, version int32) {
	w.t.Helper()
	if v := w.get(id); string(v.Value.Value) != json || v.Version != version {
		w.t.Errorf("%s = %s at %d, want %s at %d", id, v.Value.Value, v.Version, json, version)
	}
}
