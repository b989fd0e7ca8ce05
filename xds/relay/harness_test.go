package relay_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/memnet"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsclient"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/relay"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// world is a control plane on host "control", the relay of one node on host "node", and pods
// on hosts of their own.
type world struct {
	t       *testing.T
	net     *memnet.Network
	control *adsserver.Server
	lines   *lines
	stop    func() // of the control plane's server
	relay   *agent
	closers []func()
}

// agent is a running relay.
type agent struct {
	*relay.Relay
	kill func()
}

func bubble(t *testing.T, f func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, net: memnet.New()}
		defer func() {
			for _, f := range slices.Backward(w.closers) {
				f()
			}
		}()
		w.startControl(adsserver.New(adsserver.Options{}))
		w.startRelay()
		f(w)
	})
}

// startControl serves ADS on control:1 and writes down what passes.
func (w *world) startControl(ads *adsserver.Server) {
	w.control, w.lines = ads, &lines{}
	w.stop = w.serve("control", "control:1", ads.Register, w.lines)
}

func (w *world) startRelay() {
	r, err := relay.New(relay.Options{Node: outrigger.Node{ID: "node-1", Region: "eu"}, Dial: []relay.Dialer{w.dial("node", "control:1")}})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	stop := w.serve("node", "node:1", r.Register, nil)
	w.relay = &agent{r, sync.OnceFunc(func() {
		stop()
		cancel()
		if err := <-ended; err != nil {
			w.t.Errorf("Run: %v", err)
		}
	})}
	w.closers = append(w.closers, w.relay.kill)
}

func (w *world) serve(host, address string, register func(grpc.ServiceRegistrar), tap *lines) (stop func()) {
	lis, err := w.net.Listen(host, address)
	if err != nil {
		w.t.Fatal(err)
	}
	gs := grpc.NewServer(append(adsserver.TransportOptions(), grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
		if tap != nil {
			tap.open()
			ss = tapped{ss, tap}
		}
		return h(srv, ss)
	}))...)
	register(gs)
	served := make(chan struct{})
	go func() { defer close(served); _ = gs.Serve(lis) }() // ends with Stop
	stop = sync.OnceFunc(func() { gs.Stop(); _ = lis.Close(); <-served })
	w.closers = append(w.closers, stop)
	return stop
}

// dial connects from a host.
func (w *world) dial(host, address string) func(context.Context) (grpc.ClientConnInterface, io.Closer, error) {
	dial := w.net.Dialer(host)
	return func(context.Context) (grpc.ClientConnInterface, io.Closer, error) {
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx, address) }))
		return conn, conn, err
	}
}

// pod is a running sidecar's client.
type pod struct {
	*adsclient.Client
	stop  func()
	mu    sync.Mutex
	seen  []uint64
	stuck chan struct{}
}

// pod starts a sidecar that prefers the relay and may also reach the control plane.
func (w *world) pod(id string, more ...func(*adsclient.Options)) *pod {
	w.t.Helper()
	p := &pod{}
	o := adsclient.Options{Node: outrigger.Node{ID: id, Kind: "sidecar", Region: "eu"}, Relay: w.dial(id, "node:1"),
		Dial: []adsclient.Dialer{w.dial(id, "control:1")}}
	o.OnPolicy = func(pol *policy.Policy) {
		p.mu.Lock()
		p.seen = append(p.seen, pol.Position)
		stuck := p.stuck
		p.mu.Unlock()
		if stuck != nil {
			<-stuck
		}
	}
	for _, f := range more {
		f(&o)
	}
	c, err := adsclient.New(o)
	if err != nil {
		w.t.Fatal(err)
	}
	p.Client = c
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	p.stop = sync.OnceFunc(func() {
		p.free()
		cancel()
		if err := <-ended; err != nil {
			w.t.Errorf("Run of %s: %v", id, err)
		}
	})
	w.closers = append(w.closers, p.stop)
	synctest.Wait()
	return p
}

// hold makes the pod hang in the middle of its next policy, free ends that.
func (p *pod) hold() { p.mu.Lock(); p.stuck = make(chan struct{}); p.mu.Unlock() }
func (p *pod) free() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stuck != nil {
		close(p.stuck)
		p.stuck = nil
	}
}

// position is that of the policy in force, 0 for none.
func (p *pod) position() uint64 {
	if pol := p.Policy(); pol != nil {
		return pol.Position
	}
	return 0
}

func (w *world) publish(position uint64, models ...policy.Model) {
	w.t.Helper()
	w.publishSet(position, encode(w.t, position, models...))
}

func (w *world) publishSet(position uint64, res *translate.Resources) {
	w.t.Helper()
	if err := w.control.Publish(adsserver.DefaultGroup, res, position); err != nil {
		w.t.Fatal(err)
	}
	synctest.Wait()
}

func encode(t testing.TB, position uint64, models ...policy.Model) *translate.Resources {
	t.Helper()
	res, err := translate.Encode(&policy.Policy{Position: position, Models: models}, translate.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// model has two versions; weight is the canary's buckets, and deadMan its lease.
func model(name string, weight uint32, deadMan time.Duration) policy.Model {
	m := policy.Model{Name: name, Salt: "s", Unit: experiments.UnitSession, MaxAttempts: 1, LastGood: "v1", DeadMan: deadMan,
		Arms: []policy.Arm{
			{Name: "canary", Version: "v2", Ranges: []experiments.Range{{Start: 0, End: weight}}},
			{Name: "stable", Version: "v1", Ranges: []experiments.Range{{Start: weight, End: experiments.Buckets}}},
		}}
	for i, v := range []string{"v1", "v2"} {
		m.Versions = append(m.Versions, policy.Version{Name: v, Upstream: v,
			Endpoints: []policy.Endpoint{{Address: fmt.Sprintf("10.0.0.%d:80", i+1), Region: "eu", Weight: 1}}})
	}
	return m
}

// line is the control plane's line of a node.
func (w *world) line(id string) adsserver.NodeState {
	w.t.Helper()
	for _, n := range w.control.Ledger() {
		if n.Node.ID == id {
			return n
		}
	}
	w.t.Fatalf("the ledger has no line of %s", id)
	return adsserver.NodeState{}
}

// wantAcked demands who has a position by the control plane's ledger.
func (w *world) wantAcked(position uint64, acked, laggards []string) {
	w.t.Helper()
	synctest.Wait()
	a, l, _ := w.control.Acked(position)
	if !slices.Equal(a, acked) || !slices.Equal(l, laggards) {
		w.t.Fatalf("position %d: accepted by %q, laggards %q; want %q and %q", position, a, l, acked, laggards)
	}
}

// lines is what passed on the streams of a server.
type lines struct {
	mu      sync.Mutex
	all     []string
	streams int
}

func (l *lines) open() { l.mu.Lock(); l.streams++; l.mu.Unlock() }

func (l *lines) note(format string, args ...any) {
	l.mu.Lock()
	l.all = append(l.all, fmt.Sprintf(format, args...))
	l.mu.Unlock()
}

// take returns what was written down since the last call, and how many streams were opened.
func (l *lines) take() (all []string, streams int) {
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	all, streams = l.all, l.streams
	l.all, l.streams = nil, 0
	return all, streams
}

type tapped struct {
	grpc.ServerStream
	l *lines
}

func (s tapped) SendMsg(m any) error {
	if d, ok := m.(interface {
		GetTypeUrl() string
		GetResources() []*discovery.Resource
		GetRemovedResources() []string
	}); ok {
		line := "> " + xds.ShortType(d.GetTypeUrl())
		for _, x := range d.GetResources() {
			line += " +" + x.GetName()
		}
		for _, name := range d.GetRemovedResources() {
			line += " -" + name
		}
		s.l.note("%s", line)
	}
	return s.ServerStream.SendMsg(m)
}

func (s tapped) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if d, ok := m.(*discovery.DeltaDiscoveryRequest); ok && err == nil {
		switch short := xds.ShortType(d.GetTypeUrl()); {
		case d.GetTypeUrl() == xds.TypeRelayStanding:
			s.l.note("< STAND")
		case d.GetErrorDetail() != nil:
			s.l.note("< NACK %s: %s", short, d.GetErrorDetail().GetMessage())
		case d.GetResponseNonce() != "":
			s.l.note("< ACK %s", short)
		default:
			s.l.note("< SUB %s %s", short, strings.Join(d.GetResourceNamesSubscribe(), ","))
		}
	}
	return err
}

// with keeps the lines that have a prefix.
func with(all []string, prefix string) (out []string) {
	for _, l := range all {
		if strings.HasPrefix(l, prefix) {
			out = append(out, l)
		}
	}
	return out
}
