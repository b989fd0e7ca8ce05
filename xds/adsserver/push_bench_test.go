package adsserver_test

import (
	"context"
	"fmt"
	"net"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// BenchmarkPush is one push of one changed load assignment (plus MeshPolicy) to delta
// streams, from Publish to the last ACK; one operation is one push to all streams. The
// clients run in the same process, one connection each, so the time per stream is an
// upper bound of the server's share; encoding the change is within it.
func BenchmarkPush(b *testing.B) {
	for _, size := range []struct{ streams, models int }{{200, 25}, {200, 250}} {
		b.Run(fmt.Sprintf("streams=%d/clusters=%d", size.streams, 2*size.models), func(b *testing.B) {
			benchmarkPush(b, size.streams, size.models)
		})
	}
}

func benchmarkPush(b *testing.B, streams, models int) {
	enc := translate.NewEncoder(translate.KindSidecar, translate.Options{})
	change := translate.Change{}
	for i := range models {
		m := chat(1, "v1", "v2").Models[0]
		m.Name = fmt.Sprintf("m%03d", i)
		n := m.Normalise()
		change.Models = append(change.Models, translate.ModelChange{Model: &n})
	}
	encode := func(position uint64) *translate.Resources {
		change.Position = position
		m := change.Models[0].Model.Normalise()
		m.Versions[0].Endpoints[0].Weight = uint32(position%2 + 1)
		change.Models[0].Model = &m
		res, err := enc.Encode(change)
		if err != nil {
			b.Fatal(err)
		}
		change.Models = change.Models[:1]
		return res
	}
	srv := adsserver.New(adsserver.Options{})
	if err := srv.Publish(adsserver.DefaultGroup, encode(1), 1); err != nil {
		b.Fatal(err)
	}
	lis := bufconn.Listen(1 << 20)
	gs := grpc.NewServer(adsserver.TransportOptions()...)
	srv.Register(gs)
	go func() { _ = gs.Serve(lis) }()
	defer gs.Stop()
	for i := range streams {
		defer echo(b, lis, fmt.Sprint("n", i))()
	}
	wait(srv, 1, streams)
	b.ReportAllocs()
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		if err := srv.Publish(adsserver.DefaultGroup, encode(uint64(i+2)), uint64(i+2)); err != nil {
			b.Fatal(err)
		}
		wait(srv, uint64(i+2), streams)
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*streams), "µs/stream")
}

func wait(srv *adsserver.Server, position uint64, streams int) {
	for {
		changed := srv.Changed()
		if acked, _, done := srv.Acked(position); done && len(acked) == streams {
			return
		}
		<-changed
	}
}

// echo runs a sidecar that accepts everything at once.
func echo(b *testing.B, lis *bufconn.Listener, id string) (stop func()) {
	conn, err := grpc.NewClient("passthrough:///ads", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		b.Fatal(err)
	}
	st, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	node := translate.Node(outrigger.Node{ID: id, Kind: "sidecar"})
	for _, typeURL := range xds.Types() {
		if err := st.Send(&discovery.DeltaDiscoveryRequest{Node: node, TypeUrl: typeURL, ResourceNamesSubscribe: []string{"*"}}); err != nil {
			b.Fatal(err)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			r, err := st.Recv()
			if err != nil {
				return
			}
			if st.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()}) != nil {
				return
			}
		}
	}()
	return func() { _ = conn.Close(); <-done }
}
