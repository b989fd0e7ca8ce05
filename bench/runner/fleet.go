package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/eventlog/pebble"
	"github.com/outrigger-mesh/outrigger/control/variables"
)

// fleet is one authority and any number of node agents in this process, each with a TCP
// connection of its own to it, so that each feed is a real gRPC stream.
type fleet struct {
	svc    *variables.Service
	nodes  []*node.Agent
	reads  atomic.Int64 // reads of a variable "x" that reached the authority
	origin *grpc.ClientConn
	ends   []func() error
}

// committed is where an append notes when it became durable; it travels in a context.
type committed struct{ at atomic.Int64 }

type committedKey struct{}

// stampedLog notes for each append whose context asks for it when it was durable.
type stampedLog struct{ eventlog.Log }

func (l stampedLog) Append(ctx context.Context, id string, writes ...eventlog.Write) (eventlog.Appended, error) {
	a, err := l.Log.Append(ctx, id, writes...)
	if c, ok := ctx.Value(committedKey{}).(*committed); ok {
		c.at.Store(time.Now().UnixNano())
	}
	return a, err
}

// newFleet starts an authority on a durable log in dir, or on one in memory for "".
func newFleet(ctx context.Context, dir string) (f *fleet, err error) {
	f = &fleet{}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close())
		}
	}()
	var log eventlog.Log = memory.New()
	if dir != "" {
		if log, err = pebble.Open(dir, pebble.Options{}); err != nil {
			return f, err
		}
	}
	f.ends = append(f.ends, log.Close)
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	if f.svc, err = variables.New(stampedLog{log}, variables.Options{Region: "bench", Logger: quiet}); err != nil {
		return f, err
	}
	f.run(ctx, f.svc.Run)
	select {
	case <-f.svc.Ready():
	case <-ctx.Done():
		return f, ctx.Err()
	}
	server := grpc.NewServer(append(variables.TransportOptions(), grpc.Creds(f.svc.Credentials(insecure.NewCredentials())), grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		if r, ok := req.(*pb.ReadRequest); ok {
			for _, k := range r.GetKeys() {
				if k.GetName() == "x" { // not what an agent compares with the authority by itself
					f.reads.Add(1)
				}
			}
		}
		return next(ctx, req)
	}))...)
	pb.RegisterVariablesServer(server, f.svc)
	pb.RegisterCoherenceServer(server, f.svc)
	return f, f.serve(server)
}

// serve starts server on the loopback interface and connects to it as origin.
func (f *fleet) serve(server *grpc.Server) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	f.ends = append(f.ends, func() error { server.Stop(); return <-served })
	f.origin, err = f.dial(listener.Addr().String())
	return err
}

func (f *fleet) dial(address string, o ...grpc.DialOption) (*grpc.ClientConn, error) {
	o = append(append(o, grpc.WithTransportCredentials(insecure.NewCredentials())), node.TransportOptions()...)
	conn, err := grpc.NewClient(address, o...)
	if err == nil {
		f.ends = append(f.ends, conn.Close)
	}
	return conn, err
}

// dialFeed opens connections for feeds.
func dialFeed(address string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) { return (&net.Dialer{}).DialContext(ctx, "tcp", address) }
}

// run starts do and makes close wait for it.
func (f *fleet) run(ctx context.Context, do func(context.Context) error) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- do(ctx) }()
	f.ends = append(f.ends, func() error { cancel(); return <-ended })
}

// addNodes starts n agents and waits until their feeds have proved their tables fresh.
func (f *fleet) addNodes(ctx context.Context, n int) error {
	for range n {
		conn, err := f.dial(f.origin.Target())
		if err != nil {
			return err
		}
		a, err := node.New(node.Options{Node: outrigger.Node{ID: fmt.Sprintf("node-%03d", len(f.nodes)), Region: "bench"}, Origin: conn,
			DialFeed: dialFeed(f.origin.Target()), Table: shm.Options{Heap: true, Bytes: 1 << 20}})
		if err != nil {
			return err
		}
		f.run(ctx, a.Run)
		f.nodes = append(f.nodes, a)
	}
	for _, a := range f.nodes {
		if err := live(ctx, a); err != nil {
			return err
		}
	}
	return nil
}

// live waits for a node's feed.
func live(ctx context.Context, a *node.Agent) error {
	limit := time.NewTimer(30 * time.Second)
	defer limit.Stop()
	select {
	case <-a.Ready():
		return nil
	case <-limit.C:
		return fmt.Errorf("a node's feed was not live within 30 s")
	case <-ctx.Done():
		return ctx.Err()
	}
}

// session registers a variable "x" in a new session.
func (f *fleet) session(ctx context.Context, id, json string) error {
	if _, err := f.svc.CreateSession(ctx, &pb.CreateSessionRequest{Id: id}); err != nil {
		return err
	}
	_, err := f.svc.Register(ctx, &pb.RegisterRequest{Key: &pb.Key{Session: id, Name: "x"}, Value: &pb.Value{Type: "string", Json: []byte(json)}})
	return err
}

func (f *fleet) close() error {
	var errs []error
	for i := len(f.ends) - 1; i >= 0; i-- {
		if err := f.ends[i](); err != nil && !errors.Is(err, context.Canceled) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
