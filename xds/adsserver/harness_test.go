package adsserver_test

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"context"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// world is one server and its clients inside a bubble. Everything is torn down by
// close, in the bubble.
type world struct {
	t       *testing.T
	srv     *adsserver.Server
	closers []func()
	conn    *grpc.ClientConn
}

func bubble(t *testing.T, opt adsserver.Options, f func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, srv: adsserver.New(opt)}
		defer w.close()
		w.conn = w.serve(w.srv)
		f(w)
	})
}

// serve starts a gRPC server for srv on an in-memory listener and dials it.
func (w *world) serve(srv *adsserver.Server) *grpc.ClientConn {
	return w.serveOn(srv.Register, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

func (w *world) serveOn(register func(grpc.ServiceRegistrar), opts ...grpc.DialOption) *grpc.ClientConn {
	lis := bufconn.Listen(1 << 16)
	gs := grpc.NewServer(adsserver.TransportOptions()...)
	register(gs)
	go func() { _ = gs.Serve(lis) }() // ends with Stop
	conn, err := grpc.NewClient("passthrough:///ads", append(opts,
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))...)
	if err != nil {
		w.t.Fatal(err)
	}
	w.closers = append(w.closers, func() { _ = conn.Close(); gs.Stop(); _ = lis.Close() })
	return conn
}

func (w *world) close() {
	for _, f := range slices.Backward(w.closers) {
		f()
	}
}

// chat is the policy most tests publish: one model, the given versions, all buckets on
// the first; position p.
func chat(p uint64, versions ...string) *policy.Policy {
	m := policy.Model{Name: "chat", Salt: "s", Unit: experiments.UnitSession, MaxAttempts: 1,
		Arms: []policy.Arm{{Name: "only", Version: versions[0], Ranges: []experiments.Range{{Start: 0, End: experiments.Buckets}}}}}
	for i, v := range versions {
		m.Versions = append(m.Versions, policy.Version{Name: v, Upstream: v,
			Endpoints: []policy.Endpoint{{Address: fmt.Sprintf("10.0.0.%d:80", i+1), Region: "eu", Weight: 1}}})
	}
	return &policy.Policy{Position: p, Models: []policy.Model{m}}
}

func resources(t testing.TB, p *policy.Policy) *translate.Resources {
	t.Helper()
	res, err := translate.Encode(p, translate.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func (w *world) publish(p *policy.Policy) {
	w.t.Helper()
	if err := w.srv.Publish(adsserver.DefaultGroup, resources(w.t, p), p.Position); err != nil {
		w.t.Fatal(err)
	}
	synctest.Wait()
}

// deltaClient speaks raw delta ADS. Responses are printed into log lines like
// "Cluster +model/chat/v1 -model/chat/v2", which the tests compare.
type deltaClient struct {
	w      *world
	stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	got    chan *discovery.DeltaDiscoveryResponse
	ended  chan error
	nonce  map[string]string // newest per type
	vers   map[string]string // "type name" → version received
	hangUp context.CancelFunc
	node   *core.Node
}

func (w *world) delta(conn *grpc.ClientConn, id string) *deltaClient {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	st, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	c := &deltaClient{w: w, stream: st, got: make(chan *discovery.DeltaDiscoveryResponse, 1000), ended: make(chan error, 1),
		nonce: map[string]string{}, vers: map[string]string{}, hangUp: cancel,
		node: translate.Node(outrigger.Node{ID: id, Kind: "sidecar"})}
	w.closers = append(w.closers, cancel)
	go func() {
		for {
			r, err := st.Recv()
			if err != nil {
				c.ended <- err
				return
			}
			c.got <- r
		}
	}()
	return c
}

func (c *deltaClient) send(req *discovery.DeltaDiscoveryRequest) {
	c.w.t.Helper()
	req.Node, c.node = c.node, nil // only the first request of a stream carries the node
	if err := c.stream.Send(req); err != nil {
		c.w.t.Fatalf("send: %v", err)
	}
	synctest.Wait()
}

func (c *deltaClient) subscribe(typeURL string, names ...string) {
	c.w.t.Helper()
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: names})
}

func (c *deltaClient) unsubscribe(typeURL string, names ...string) {
	c.w.t.Helper()
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesUnsubscribe: names})
}

func (c *deltaClient) ack(typeURL string) {
	c.w.t.Helper()
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResponseNonce: c.nonce[typeURL]})
}

func (c *deltaClient) nack(typeURL, text string) {
	c.w.t.Helper()
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResponseNonce: c.nonce[typeURL], ErrorDetail: &rpc.Status{Message: text}})
}

// read returns what has arrived, one line per response.
func (c *deltaClient) read() []string {
	synctest.Wait()
	var out []string
	for {
		select {
		case r := <-c.got:
			c.nonce[r.GetTypeUrl()] = r.GetNonce()
			line := short(r.GetTypeUrl())
			for _, x := range r.GetResources() {
				line += " +" + x.GetName()
				c.vers[r.GetTypeUrl()+" "+x.GetName()] = x.GetVersion()
			}
			for _, name := range r.GetRemovedResources() {
				line += " -" + name
			}
			out = append(out, line)
		default:
			return out
		}
	}
}

// want compares what has arrived with the lines given; none means silence.
func (c *deltaClient) want(lines ...string) {
	c.w.t.Helper()
	if got := c.read(); !slices.Equal(got, lines) {
		c.w.t.Fatalf("got  %q\nwant %q", got, lines)
	}
}

func short(typeURL string) string { return typeURL[strings.LastIndexByte(typeURL, '.')+1:] }

// follow subscribes to everything as a sidecar does.
func (c *deltaClient) follow() {
	c.w.t.Helper()
	for _, typeURL := range xds.Types() {
		c.subscribe(typeURL, xds.Wildcard)
	}
}

func (c *deltaClient) ackAll() {
	c.w.t.Helper()
	for _, typeURL := range xds.Types() {
		c.ack(typeURL)
	}
}

// sotwClient speaks raw state-of-the-world ADS the way gRPC does.
type sotwClient struct {
	w       *world
	stream  discovery.AggregatedDiscoveryService_StreamAggregatedResourcesClient
	got     chan *discovery.DiscoveryResponse
	last    map[string]*discovery.DiscoveryResponse
	version map[string]string // last accepted
	node    *core.Node
	hangUp  context.CancelFunc
}

func (w *world) sotw(id string) *sotwClient {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	st, err := discovery.NewAggregatedDiscoveryServiceClient(w.conn).StreamAggregatedResources(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	c := &sotwClient{w: w, stream: st, got: make(chan *discovery.DiscoveryResponse, 1000),
		last: map[string]*discovery.DiscoveryResponse{}, version: map[string]string{}, node: &core.Node{Id: id}, hangUp: cancel}
	w.closers = append(w.closers, cancel)
	go func() {
		for {
			r, err := st.Recv()
			if err != nil {
				return
			}
			c.got <- r
		}
	}()
	return c
}

func (c *sotwClient) request(typeURL string, detail *rpc.Status, names ...string) {
	c.w.t.Helper()
	req := &discovery.DiscoveryRequest{TypeUrl: typeURL, ResourceNames: names, VersionInfo: c.version[typeURL], ErrorDetail: detail}
	if r := c.last[typeURL]; r != nil {
		req.ResponseNonce = r.GetNonce()
		if detail == nil {
			req.VersionInfo = r.GetVersionInfo()
			c.version[typeURL] = r.GetVersionInfo()
		}
	}
	req.Node, c.node = c.node, nil
	if err := c.stream.Send(req); err != nil {
		c.w.t.Fatalf("send: %v", err)
	}
	synctest.Wait()
}

func (c *sotwClient) want(lines ...string) {
	c.w.t.Helper()
	synctest.Wait()
	var got []string
	for done := false; !done; {
		select {
		case r := <-c.got:
			c.last[r.GetTypeUrl()] = r
			line := short(r.GetTypeUrl())
			for _, a := range r.GetResources() {
				line += " +" + nameOf(c.w.t, a)
			}
			got = append(got, line)
		default:
			done = true
		}
	}
	if !slices.Equal(got, lines) {
		c.w.t.Fatalf("got  %q\nwant %q", got, lines)
	}
}

func nameOf(t *testing.T, a *anypb.Any) string {
	m, err := a.UnmarshalNew()
	if err != nil {
		t.Fatal(err)
	}
	name, ok := translate.NameOf(m)
	if !ok {
		t.Fatalf("unnamed %T", m)
	}
	return name
}
