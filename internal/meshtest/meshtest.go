// Package meshtest runs a whole mesh (control plane, node agents, sidecars, model
// servers) in one process over an in-memory network, for tests inside testing/synctest
// bubbles: time is fake, links can be cut and delayed, and everything but the sockets
// is the real code.
//
//	w := meshtest.New(t, meshtest.Options{Nodes: 2, PodsPerNode: 2})
//	defer w.Stop()
//	pod := w.Pods[0]
//
// Hosts are named "control", "node-0", "model-v1", …; a pod lives on its node's host,
// so cutting node-0 from control cuts its agent and its sidecars.
package meshtest

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/variables"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/internal/memnet"
	"github.com/outrigger-mesh/outrigger/proxy"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/proxy/variable"
	"github.com/outrigger-mesh/outrigger/xds/adsclient"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Region every part of a World is in.
const Region = "local"

// controlAddress is where the control plane listens.
const controlAddress = "control:7400"

// Options size a World.
type Options struct {
	Nodes       int           // default 1
	PodsPerNode int           // default 2
	Delay       time.Duration // one way, between hosts; default 500 µs
	StateDir    string        // where sidecars keep their last good policy; "" = nowhere
	Logger      *slog.Logger
}

// World is a running mesh. Its methods may be called from the bubble's goroutines.
type World struct {
	t     testing.TB
	o     Options
	epoch time.Time

	Keys    *identity.Keys // of session tokens
	Net     *memnet.Network
	Log     eventlog.Log
	Control *Control
	Agents  []*Agent
	Pods    []*Pod
	Models  map[string]*ModelServer
}

// part is something that runs until stopped.
type part struct {
	cancel context.CancelFunc
	group  sync.WaitGroup
	stops  []func()
}

func (p *part) run(t testing.TB, name string, ctx context.Context, f func(context.Context) error) {
	p.group.Go(func() {
		if err := f(ctx); err != nil && ctx.Err() == nil {
			t.Errorf("%s: %v", name, err)
		}
	})
}

func (p *part) stop() {
	p.cancel()
	for _, f := range p.stops {
		f()
	}
	p.group.Wait()
}

// New starts a mesh and waits until every part is ready.
func New(t testing.TB, o Options) *World {
	t.Helper()
	if o.Nodes == 0 {
		o.Nodes = 1
	}
	if o.PodsPerNode == 0 {
		o.PodsPerNode = 2
	}
	if o.Delay == 0 {
		o.Delay = 500 * time.Microsecond
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	w := &World{t: t, o: o, epoch: time.Now(), Keys: identity.NewKeys(), Net: memnet.New(), Log: memory.New(), Models: map[string]*ModelServer{}}
	w.StartControl()
	for i := range o.Nodes {
		host := fmt.Sprintf("node-%d", i)
		w.Net.SetDelay(host, "control", o.Delay)
		w.Net.SetDelay("control", host, o.Delay)
		w.Agents = append(w.Agents, w.startAgent(host))
		for j := range o.PodsPerNode {
			w.Pods = append(w.Pods, w.startPod(host, fmt.Sprintf("%s/pod-%d", host, j), w.Agents[i]))
		}
	}
	for _, a := range w.Agents {
		<-a.Ready()
	}
	for _, p := range w.Pods {
		<-p.Policy.Ready()
	}
	return w
}

// Stop ends every part, in reverse order of dependence, and the log.
func (w *World) Stop() {
	for _, p := range w.Pods {
		p.Stop()
	}
	for _, a := range w.Agents {
		a.stop()
	}
	w.StopControl()
	for _, m := range w.Models {
		m.stop()
	}
	if err := w.Log.Close(); err != nil {
		w.t.Errorf("close the log: %v", err)
	}
	synctest.Wait()
}

// clock is the monotonic clock all processes of all nodes share.
func (w *World) clock() int64 { return int64(time.Since(w.epoch)) + int64(time.Hour) }

// Dial opens a gRPC connection from a host to an address of the network.
func (w *World) Dial(host, address string) *grpc.ClientConn {
	w.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: quick, MinConnectTimeout: time.Second}),
		grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) { return w.Net.Dialer(host)(ctx, a) }))
	if err != nil {
		w.t.Fatal(err)
	}
	return conn
}

func (w *World) listen(host, address string) net.Listener {
	w.t.Helper()
	l, err := w.Net.Listen(host, address)
	if err != nil {
		w.t.Fatal(err)
	}
	return l
}

func (w *World) serveGRPC(p *part, ctx context.Context, l net.Listener, s *grpc.Server) {
	p.run(w.t, "grpc "+l.Addr().String(), ctx, func(context.Context) error { return s.Serve(l) })
	p.stops = append(p.stops, s.Stop)
}

// Control is the running control plane.
type Control struct {
	part
	*control.Server
	Admin pb.AdminServer
	Vars  pb.VariablesClient
}

// StartControl starts a control plane over the world's log; a stopped one may be
// started again.
func (w *World) StartControl() {
	w.t.Helper()
	s, err := control.New(control.Options{Log: w.Log, Variables: variables.Options{SessionKeys: func() *identity.Keys { return w.Keys }}, Logger: w.o.Logger, Region: &pb.Region{Name: Region, Gateway: controlAddress}})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &Control{Server: s}
	c.cancel = cancel
	gs := grpc.NewServer(grpc.Creds(s.Credentials(insecure.NewCredentials())))
	s.RegisterGRPC(gs)
	w.serveGRPC(&c.part, ctx, w.listen("control", controlAddress), gs)
	c.run(w.t, "control", ctx, s.Run)
	<-s.Ready()
	c.Admin = s.Admin() // over the network it serves only its own machine
	conn := w.Dial("control", controlAddress)
	c.stops = append(c.stops, func() { conn.Close() })
	c.Vars = pb.NewVariablesClient(conn)
	w.Control = c
}

// StopControl ends the control plane, as a crash of its process would: nothing is
// handed over, connections break.
func (w *World) StopControl() {
	if w.Control != nil {
		w.Control.stop()
		w.Control = nil
	}
}

// Agent is one node's agent.
type Agent struct {
	part
	*node.Agent
	address string
}

// feedDialer lets every other node have its feed over gRPC.
func (w *World) feedDialer(host string) func(context.Context) (net.Conn, error) {
	if len(w.Agents)%2 == 1 {
		return nil
	}
	return func(ctx context.Context) (net.Conn, error) { return w.Net.Dialer(host)(ctx, controlAddress) }
}

func (w *World) startAgent(host string) *Agent {
	w.t.Helper()
	origin := w.Dial(host, controlAddress)
	self := outrigger.Node{ID: host, Kind: "agent", Region: Region}
	a, err := node.New(node.Options{Node: self, Origin: origin, DialFeed: w.feedDialer(host), Clock: w.clock, Logger: w.o.Logger,
		Table: shm.Options{Heap: true, Bytes: 4 << 20, Slots: 4096}})
	if err != nil {
		w.t.Fatal(err)
	}
	out := &Agent{Agent: a, address: host + ":agent"}
	ctx, cancel := context.WithCancel(context.Background())
	out.cancel = cancel
	gs := grpc.NewServer()
	pb.RegisterVariablesServer(gs, a)
	pb.RegisterCoherenceServer(gs, a)
	pb.RegisterNodeAdminServer(gs, a.Admin())
	w.serveGRPC(&out.part, ctx, w.listen(host, out.address), gs)
	out.run(w.t, host, ctx, a.Run)
	out.stops = append(out.stops, func() { origin.Close() })
	return out
}

// Pod is one sidecar with clients as its application has them.
type Pod struct {
	part
	Name    string
	Host    string
	Store   *cache.Store
	Policy  *adsclient.Client
	Sidecar *proxy.Sidecar
	Bridge  snakepit.BridgeServiceClient
	HTTP    *http.Client // dials the sidecar whatever the URL's host is
	stopped bool
}

// Stop ends the sidecar and its clients.
func (p *Pod) Stop() {
	if !p.stopped {
		p.stopped = true
		p.HTTP.CloseIdleConnections()
		p.stop()
	}
}

func (w *World) startPod(host, name string, a *Agent) *Pod {
	w.t.Helper()
	control, agent := w.Dial(host, controlAddress), w.Dial(host, a.address)
	store, err := cache.New(cache.Options{Table: a.Table, Agent: agent, Origin: control, Clock: w.clock, Logger: w.o.Logger})
	if err != nil {
		w.t.Fatal(err)
	}
	self := outrigger.Node{ID: name, Kind: "sidecar", Region: Region}
	ads, err := adsclient.New(adsclient.Options{Node: self, Dir: w.stateDir(name), Logger: w.o.Logger, Dial: []adsclient.Dialer{
		func(context.Context) (grpc.ClientConnInterface, io.Closer, error) {
			c := w.Dial(host, controlAddress)
			return c, c, nil
		}}})
	if err != nil {
		w.t.Fatal(err)
	}
	tokens := variable.NewTokens(variable.TokenOptions{Era: store.Era, Logger: w.o.Logger})
	p := &Pod{Name: name, Host: host, Store: store, Policy: ads}
	p.Sidecar, err = proxy.New(proxy.Options{Node: self, Reader: store, Authority: store.Variables(), Reports: control, Tokens: tokens,
		AutoCreateSessions: true, Start: time.Now(), Logger: w.o.Logger, Models: inference.Options{Shadows: inference.DefaultShadows},
		Policy: func() (*policy.Policy, inference.PolicyStatus) {
			return ads.Policy(), inference.PolicyStatus{Live: ads.Status().Live, DeadManExpired: ads.DeadManExpired(time.Now())}
		},
		Dial: func(ctx context.Context, _, address string) (net.Conn, error) {
			return w.Net.Dialer(host)(ctx, address)
		}})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	address := name + ":app"
	l := w.listen(host, address)
	p.run(w.t, name+" cache", ctx, store.Run)
	p.run(w.t, name+" session keys", ctx, func(ctx context.Context) error {
		return tokens.Follow(ctx, pb.NewCoherenceClient(agent), pb.NewCoherenceClient(control))
	})
	p.run(w.t, name+" policy", ctx, ads.Run)
	p.run(w.t, name+" proxy", ctx, func(ctx context.Context) error { return p.Sidecar.Run(ctx, l) })
	app := w.Dial(host, address)
	p.Bridge = snakepit.NewBridgeServiceClient(app)
	p.HTTP = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return w.Net.Dialer(host)(ctx, address)
	}}}
	p.stops = append(p.stops, func() { app.Close(); control.Close(); agent.Close() })
	return p
}

func (w *World) stateDir(name string) string {
	if w.o.StateDir == "" {
		return ""
	}
	return w.o.StateDir + "/" + name
}

// RestartPod stops a pod's sidecar and starts it again, as a new process would.
func (w *World) RestartPod(i int) *Pod {
	w.t.Helper()
	old := w.Pods[i]
	old.Stop()
	for _, a := range w.Agents {
		if a.address == old.Host+":agent" {
			w.Pods[i] = w.startPod(old.Host, old.Name, a)
		}
	}
	return w.Pods[i]
}
