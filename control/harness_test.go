package control_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// plane is one running control plane with a gRPC connection to it.
type plane struct {
	t     testing.TB
	log   eventlog.Log
	srv   *control.Server
	conn  *grpc.ClientConn
	admin pb.AdminClient
	stop  func() // stops everything and waits; safe to call twice
}

// start runs a control plane over log, which may be shared. edit changes the options.
func start(t testing.TB, log eventlog.Log, edit func(*control.Options)) *plane {
	t.Helper()
	o := control.Options{Log: log, Region: &pb.Region{Name: "eu", Gateway: "eu.example:7000", Latitude: 50, Longitude: 8}}
	o.Variables.SweepEvery = -1
	if edit != nil {
		edit(&o)
	}
	srv, err := control.New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- srv.Run(ctx) }()
	lis := bufconn.Listen(1 << 20)
	gs := grpc.NewServer()
	srv.RegisterGRPC(gs)
	go func() { _ = gs.Serve(lis) }() // ends with Stop
	conn, err := grpc.NewClient("passthrough:///control", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	stopped := false
	p := &plane{t: t, log: log, srv: srv, conn: conn, admin: pb.NewAdminClient(conn)}
	p.stop = func() {
		if stopped {
			return
		}
		stopped = true
		_ = conn.Close()
		gs.Stop()
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(p.stop)
	select {
	case <-srv.Ready():
	case err := <-ran:
		t.Fatalf("Run ended before it was ready: %v", err)
	}
	return p
}

func newPlane(t testing.TB) *plane { return start(t, memory.New(), nil) }

func (p *plane) register(model string, versions ...string) {
	p.t.Helper()
	for i, v := range versions {
		_, err := p.srv.Admin().RegisterModelVersion(context.Background(), &pb.RegisterModelVersionRequest{Model: model, Version: v, Actor: "ann",
			Endpoints: []*pb.Endpoint{{Address: fmt.Sprintf("10.0.0.%d:80", i+1), Region: "eu"}}})
		if err != nil {
			p.t.Fatal(err)
		}
	}
}

// events returns the kinds of the events of one aggregate, in order.
func (p *plane) events(aggregate string) []*pb.Event {
	p.t.Helper()
	var out []*pb.Event
	for e, err := range p.log.Read(context.Background(), aggregate, 1) {
		if err != nil {
			p.t.Fatal(err)
		}
		out = append(out, e)
	}
	return out
}

func kinds(events []*pb.Event) []string {
	var out []string
	for _, e := range events {
		out = append(out, eventlog.EventKind(e))
	}
	return out
}

func wantKind(t testing.TB, err error, kind outrigger.Kind) {
	t.Helper()
	if !outrigger.IsKind(err, kind) {
		t.Fatalf("got %v (kind %v), want kind %v", err, outrigger.KindOf(err), kind)
	}
}

// sidecar follows policy as a real one does: delta ADS, every type, an ACK per response.
type sidecar struct {
	t      testing.TB
	stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	ended  chan struct{}
	hangUp context.CancelFunc

	mu   sync.Mutex // a push that is under way may still arrive while a test looks
	held *translate.Resources
	// deny is the model whose policy is rejected, with the reason; "" accepts everything.
	deny, reason string
}

// refuse makes the sidecar reject the policy of a model from now on.
func (s *sidecar) refuse(model, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deny, s.reason = model, reason
}

// objection is why a response is rejected, nil if it is not.
func (s *sidecar) objection(r *discovery.DeltaDiscoveryResponse) *rpc.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, res := range r.GetResources() {
		if r.GetTypeUrl() == xds.TypeModelPolicy && s.deny != "" && res.GetName() == s.deny {
			return &rpc.Status{Message: s.reason}
		}
	}
	return nil
}

// join connects a sidecar; use inside a bubble.
func (p *plane) join(id string) *sidecar { return p.joinHolding(id, nil) }

// joinHolding is join for a sidecar that comes back with versions of resources, by type.
func (p *plane) joinHolding(id string, holds map[string]map[string]string) *sidecar {
	p.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(p.conn).DeltaAggregatedResources(ctx)
	if err != nil {
		p.t.Fatal(err)
	}
	s := &sidecar{t: p.t, stream: stream, held: new(translate.Resources), ended: make(chan struct{}), hangUp: cancel}
	node := translate.Node(outrigger.Node{ID: id, Kind: "sidecar", Region: "eu"})
	for _, typeURL := range xds.Types() {
		if err := stream.Send(&discovery.DeltaDiscoveryRequest{Node: node, TypeUrl: typeURL, ResourceNamesSubscribe: []string{xds.Wildcard}, InitialResourceVersions: holds[typeURL]}); err != nil {
			p.t.Fatal(err)
		}
	}
	go s.follow()
	p.t.Cleanup(s.leave)
	synctest.Wait()
	return s
}

func (s *sidecar) leave() {
	s.hangUp()
	<-s.ended
}

func (s *sidecar) follow() {
	defer close(s.ended)
	for {
		r, err := s.stream.Recv()
		if err != nil {
			return
		}
		answer := &discovery.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce(), ErrorDetail: s.objection(r)}
		if answer.ErrorDetail == nil {
			if err := s.take(r); err != nil {
				s.t.Error(err)
				return
			}
		}
		if err := s.stream.Send(answer); err != nil {
			return
		}
	}
}

func (s *sidecar) take(r *discovery.DeltaDiscoveryResponse) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, res := range r.GetResources() {
		m, err := translate.Unmarshal(r.GetTypeUrl(), res.GetName(), res.GetResource().GetValue())
		if err != nil {
			return fmt.Errorf("%s %s: %w", r.GetTypeUrl(), res.GetName(), err)
		}
		s.held.Put(r.GetTypeUrl(), res.GetName(), m)
	}
	for _, name := range r.GetRemovedResources() {
		s.held.Delete(r.GetTypeUrl(), name)
	}
	return nil
}

// policy is what the sidecar obeys once nothing is under way.
func (s *sidecar) policy() *policy.Policy {
	s.t.Helper()
	settle()
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := translate.Decode(s.held)
	if err != nil {
		s.t.Fatal(err)
	}
	return p
}

// settle lets the publisher's longest pause pass and everything come to rest.
func settle() {
	time.Sleep(2 * control.DefaultDebounce)
	synctest.Wait()
}

// shares tells who gets how many of the 10 000 buckets of a model.
func shares(m *policy.Model) map[string]uint32 {
	out := map[string]uint32{}
	for i := range m.Arms {
		out[m.Serving(&m.Arms[i]).Name] += m.Arms[i].Weight()
	}
	return out
}

// failingLog is a log whose appends can be made to fail.
type failingLog struct {
	eventlog.Log
	fail func(writes []eventlog.Write) error
}

func (l *failingLog) Append(ctx context.Context, id string, writes ...eventlog.Write) (eventlog.Appended, error) {
	if l.fail != nil {
		if err := l.fail(writes); err != nil {
			return eventlog.Appended{}, err
		}
	}
	return l.Log.Append(ctx, id, writes...)
}

var errDisk = errors.New("disk is gone")

func clone[T proto.Message](m T) T { return proto.Clone(m).(T) }
