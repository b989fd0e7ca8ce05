package adsclient_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/adsclient"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// replica is one control plane: an ADS server on an in-memory network whose streams
// are written down. It can be killed, and frozen so that bytes go nowhere.
type replica struct {
	ads *adsserver.Server
	gs  *grpc.Server
	lis *bufconn.Listener

	mu     sync.Mutex
	lines  []string // "> Cluster +a -b" sent, "< ACK Cluster" received
	frozen bool
}

func start(t *testing.T) *replica {
	r := &replica{ads: adsserver.New(adsserver.Options{})}
	r.serve(t, r.ads.Register)
	return r
}

func (r *replica) serve(t *testing.T, register func(grpc.ServiceRegistrar)) {
	r.lis = bufconn.Listen(1 << 16)
	r.gs = grpc.NewServer(grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
		return h(srv, &tap{ss, r})
	}))
	register(r.gs)
	go func() { _ = r.gs.Serve(r.lis) }() // ends with Stop
	t.Cleanup(r.kill)
}

func (r *replica) kill() { r.gs.Stop(); _ = r.lis.Close() }

// tap writes down what passes on a stream.
type tap struct {
	grpc.ServerStream
	r *replica
}

func (s *tap) SendMsg(m any) error {
	// By what it says, not by its type: the server wraps what it has marshalled already.
	if d, ok := m.(interface {
		GetTypeUrl() string
		GetResources() []*discovery.Resource
		GetRemovedResources() []string
	}); ok {
		line := "> " + short(d.GetTypeUrl())
		for _, x := range d.GetResources() {
			line += " +" + x.GetName()
		}
		for _, name := range d.GetRemovedResources() {
			line += " -" + name
		}
		s.r.note(line)
	}
	return s.ServerStream.SendMsg(m)
}

func (s *tap) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if d, ok := m.(*discovery.DeltaDiscoveryRequest); ok && err == nil {
		switch {
		case d.GetErrorDetail() != nil:
			s.r.note("< NACK " + short(d.GetTypeUrl()) + ": " + d.GetErrorDetail().GetMessage())
		case d.GetResponseNonce() != "":
			s.r.note("< ACK " + short(d.GetTypeUrl()))
		default:
			s.r.note("< SUB " + short(d.GetTypeUrl()) + " " + strings.Join(d.GetResourceNamesSubscribe(), ","))
		}
	}
	return err
}

func (r *replica) note(line string) {
	r.mu.Lock()
	r.lines = append(r.lines, line)
	r.mu.Unlock()
}

// transcript returns what was written down since the last call.
func (r *replica) transcript() []string {
	synctest.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.lines
	r.lines = nil
	return out
}

func (r *replica) publish(t *testing.T, res *translate.Resources, position uint64) {
	t.Helper()
	if err := r.ads.Publish(adsserver.DefaultGroup, res, position); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
}

// dial is the replica's adsclient.Dialer.
func (r *replica) dial(context.Context) (grpc.ClientConnInterface, io.Closer, error) {
	conn, err := grpc.NewClient("passthrough:///ads", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c, err := r.lis.DialContext(ctx)
			if err != nil {
				return nil, err
			}
			return &freezable{Conn: c, r: r}, nil
		}))
	return conn, conn, err
}

// freeze makes everything the client writes vanish for good, as a partition does to a
// connection that is never reset.
func (r *replica) freeze() { r.mu.Lock(); r.frozen = true; r.mu.Unlock() }

type freezable struct {
	net.Conn
	r *replica
}

func (f *freezable) Write(b []byte) (int, error) {
	f.r.mu.Lock()
	frozen := f.r.frozen
	f.r.mu.Unlock()
	if frozen {
		return len(b), nil
	}
	return f.Conn.Write(b)
}

// client is a running adsclient and what it reported.
type client struct {
	*adsclient.Client
	mu   sync.Mutex
	seen []uint64 // positions given to OnPolicy
	stop func()
}

func run(t *testing.T, opt adsclient.Options) *client {
	t.Helper()
	c := &client{}
	if opt.Node.ID == "" {
		opt.Node = outrigger.Node{ID: "pod", Kind: "sidecar", Region: "eu"}
	}
	opt.OnPolicy = func(p *policy.Policy) {
		c.mu.Lock()
		c.seen = append(c.seen, p.Position)
		c.mu.Unlock()
	}
	var err error
	if c.Client, err = adsclient.New(opt); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	c.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(c.stop)
	synctest.Wait()
	return c
}

func (c *client) positions() []uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.seen)
}

// model makes one valid model with two versions; weight is the canary's buckets.
func model(name string, weight uint32) policy.Model {
	m := policy.Model{Name: name, Salt: "s", Unit: experiments.UnitSession, MaxAttempts: 1, LastGood: "v1",
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

func mesh(position uint64, models ...policy.Model) *policy.Policy {
	return &policy.Policy{Position: position, Models: models}
}

func resources(t testing.TB, p *policy.Policy) *translate.Resources {
	t.Helper()
	res, err := translate.Encode(p, translate.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func short(typeURL string) string { return typeURL[strings.LastIndexByte(typeURL, '.')+1:] }

// fullSync is the transcript of a first sync of one model "a" with two versions.
func fullSync() []string {
	return []string{
		"> Cluster +model/a/v1 +model/a/v2", "> Secret", "> ClusterLoadAssignment +model/a/v1 +model/a/v2", "> Listener +model/a",
		"> RouteConfiguration +model/a", "> ModelPolicy +a", "> MeshPolicy +mesh",
	}
}

// only keeps the lines with a prefix.
func only(lines []string, prefix string) (out []string) {
	for _, l := range lines {
		if strings.HasPrefix(l, prefix) {
			out = append(out, l)
		}
	}
	return out
}

func wantLines(t *testing.T, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("got\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

// breakRoutes breaks the routes of a model: a gap in the split.
func breakRoutes(res *translate.Resources, name string) *translate.Resources {
	return editRoutes(res, name, func(r *routeConfig) {
		r.VirtualHosts[0].Routes[0].GetMatch().GetHeaders()[0].GetRangeMatch().End--
	})
}

func failing(context.Context) (grpc.ClientConnInterface, io.Closer, error) {
	return nil, nil, errors.New("no route to host")
}
