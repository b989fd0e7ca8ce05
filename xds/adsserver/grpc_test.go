package adsserver_test

import (
	"context"
	"fmt"
	"math"
	"net"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/xds" // also registers the "xds" resolver

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// backend counts the calls one endpoint gets. The health service is used because gRPC
// ships it; only who answers matters.
type backend struct {
	grpc_health_v1.UnimplementedHealthServer
	calls atomic.Int64
	addr  string
	fail  atomic.Bool
	// block, if set, holds calls until it is closed; most is how many were there at once.
	block     atomic.Pointer[chan struct{}]
	now, most atomic.Int64
}

func (b *backend) Check(context.Context, *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	b.calls.Add(1)
	if hold := b.block.Load(); hold != nil {
		for n := b.now.Add(1); ; {
			if most := b.most.Load(); n <= most || b.most.CompareAndSwap(most, n) {
				break
			}
		}
		<-*hold
		b.now.Add(-1)
	}
	if b.fail.Load() {
		return nil, status.Error(codes.Unavailable, "told to fail")
	}
	return &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING}, nil
}

// listen serves register on a loopback port; real sockets, because gRPC's xDS client
// dials its control plane itself.
func listen(t *testing.T, register func(grpc.ServiceRegistrar)) string {
	t.Helper()
	return listenWith(t, register)
}

func listenWith(t *testing.T, register func(grpc.ServiceRegistrar), opts ...grpc.ServerOption) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gs := grpc.NewServer(opts...)
	register(gs)
	done := make(chan struct{})
	go func() { defer close(done); _ = gs.Serve(lis) }() // ends with Stop
	t.Cleanup(func() { gs.Stop(); <-done })
	return lis.Addr().String()
}

func startBackend(t *testing.T) *backend {
	b := &backend{}
	b.addr = listen(t, func(r grpc.ServiceRegistrar) { grpc_health_v1.RegisterHealthServer(r, b) })
	return b
}

// proxyless is a proxyless gRPC client of model "chat", bootstrapped to one control plane.
func proxyless(t *testing.T, srv *adsserver.Server) grpc_health_v1.HealthClient {
	t.Helper()
	ads := listen(t, srv.Register)
	bootstrap := fmt.Sprintf(`{"xds_servers":[{"server_uri":%q,"channel_creds":[{"type":"insecure"}],"server_features":["xds_v3"]}],
		"node":{"id":"grpc-client","locality":{"region":"eu"}}}`, ads)
	res, err := xds.NewXDSResolverWithConfigForTesting([]byte(bootstrap))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("xds:///model/chat", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithResolvers(res))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return grpc_health_v1.NewHealthClient(conn)
}

func twoVersions(position uint64, canary uint32, v1, v2 *backend) *policy.Policy {
	p := chat(position, "v1", "v2")
	m := &p.Models[0]
	m.Arms = []policy.Arm{
		{Name: "canary", Version: "v2", Ranges: []experiments.Range{{Start: 0, End: canary}}},
		{Name: "stable", Version: "v1", Ranges: []experiments.Range{{Start: canary, End: experiments.Buckets}}},
	}
	m.Versions[0].Endpoints[0].Address = v1.addr
	m.Versions[1].Endpoints[0].Address = v2.addr
	return p
}

// call makes one RPC; bucket < 0 sends no bucket header.
func call(t *testing.T, c grpc_health_v1.HealthClient, bucket int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if bucket >= 0 {
		ctx = metadata.AppendToOutgoingContext(ctx, outrigger.HeaderBucket, strconv.Itoa(bucket))
	}
	if _, err := c.Check(ctx, &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Fatalf("bucket %d: %v", bucket, err)
	}
}

// A real grpc-go xDS client obeys the published resources:
//
//  1. 90/10 by bucket header, exactly and stickily
//  2. 90/10 by weight without the header, within five standard deviations
//  3. a quarantine moves the canary's buckets to the last good version
//  4. removing the canary's cluster afterwards fails no call
func TestRealGrpcClient(t *testing.T) {
	srv := adsserver.New(adsserver.Options{})
	v1, v2 := startBackend(t), startBackend(t)
	publish := func(p *policy.Policy) {
		t.Helper()
		publishAll(t, srv, p)
	}
	publish(twoVersions(1, 1000, v1, v2))
	client := proxyless(t, srv)

	for bucket := 0; bucket < experiments.Buckets; bucket += 10 {
		call(t, client, bucket)
	}
	if a, b := v1.calls.Swap(0), v2.calls.Swap(0); a != 900 || b != 100 {
		t.Fatalf("by bucket: %d to v1 and %d to v2, want exactly 900 and 100", a, b)
	}

	const n = 2000
	for range n {
		call(t, client, -1)
	}
	share, sigma := float64(v2.calls.Swap(0))/n, math.Sqrt(0.1*0.9/n)
	if math.Abs(share-0.1) > 5*sigma {
		t.Fatalf("by weight: %.4f to v2, want 0.1 ± %.4f", share, 5*sigma)
	}
	v1.calls.Store(0)

	rollback := twoVersions(2, 1000, v1, v2)
	rollback.Models[0].LastGood, rollback.Models[0].Versions[1].Quarantined = "v1", true
	publish(rollback)
	accepted(t, srv, 2)
	// gRPC acknowledges before its balancer has swapped (our sidecar does after): call
	// until the first answer by v1, which proves the swap.
	for v1.calls.Load() == 0 {
		call(t, client, 5)
	}
	v1.calls.Store(0)
	v2.calls.Store(0)
	for bucket := 0; bucket < experiments.Buckets; bucket += 100 {
		call(t, client, bucket)
	}
	if a, b := v1.calls.Swap(0), v2.calls.Swap(0); a != 100 || b != 0 {
		t.Fatalf("after the rollback: %d to v1 and %d to v2, want 100 and 0", a, b)
	}

	gone := chat(3, "v1")
	gone.Models[0].Versions[0].Endpoints[0].Address = v1.addr
	publish(gone)
	for range 300 { // some of these run while the push is under way
		call(t, client, 5)
	}
	accepted(t, srv, 3)
	for _, s := range srv.Ledger() {
		if s.Nack != nil {
			t.Errorf("grpc-go rejected %+v", s.Nack)
		}
	}
}

// accepted waits until every node in the ledger has accepted a position.
func accepted(t *testing.T, srv *adsserver.Server, position uint64) {
	t.Helper()
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	for {
		changed := srv.Changed()
		behind := ""
		for _, n := range srv.Ledger() {
			if n.Connected && n.Acked < position {
				behind = n.Node.ID
			}
		}
		if behind == "" {
			return
		}
		select {
		case <-changed:
		case <-deadline.C:
			for _, n := range srv.Ledger() {
				t.Logf("%+v rejected %+v", n, n.Nack)
			}
			t.Fatalf("%s has not accepted position %d", behind, position)
		}
	}
}
