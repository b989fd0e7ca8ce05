package adsserver_test

import (
	"context"
	"fmt"
	"math"
	"strings"
	"testing"
	"testing/synctest"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	lrs "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// heard is a LoadSink that remembers.
type heard struct{ lines []string }

func (h *heard) Load(n outrigger.Node, l adsserver.Load) {
	h.lines = append(h.lines, fmt.Sprintf("%s %s %s %s %d", n.ID, l.Model, l.Version, l.Region, l.Issued))
}

func locality(region string, issued, ok, failed uint64, metrics ...*endpoint.EndpointLoadMetricStats) *endpoint.UpstreamLocalityStats {
	return &endpoint.UpstreamLocalityStats{Locality: &core.Locality{Region: region}, TotalIssuedRequests: issued,
		TotalSuccessfulRequests: ok, TotalErrorRequests: failed, LoadMetricStats: metrics}
}

func metric(name string, n uint64, total float64) *endpoint.EndpointLoadMetricStats {
	return &endpoint.EndpointLoadMetricStats{MetricName: name, NumRequestsFinishedWithMetric: n, TotalMetricValue: total}
}

// Reports are summed by cluster and region; what makes no sense is left out and counted.
func TestLoadReportsAreSummed(t *testing.T) {
	sink := &heard{}
	bubble(t, adsserver.Options{Loads: sink}, func(w *world) {
		w.publish(chat(1, "v1", "v2"))
		ctx, cancel := context.WithCancel(context.Background())
		w.closers = append(w.closers, cancel)
		client := lrs.NewLoadReportingServiceClient(w.conn)
		st, err := client.StreamLoadStats(ctx)
		if err != nil {
			t.Fatal(err)
		}
		report := func(stats ...*endpoint.ClusterStats) {
			t.Helper()
			if err := st.Send(&lrs.LoadStatsRequest{Node: &core.Node{Id: "n", ClientFeatures: []string{"envoy.lrs.supports_send_all_clusters"}}, ClusterStats: stats}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		report()
		ask, err := st.Recv()
		if err != nil || !ask.GetSendAllClusters() || ask.GetLoadReportingInterval().AsDuration() <= 0 {
			t.Fatalf("asked for %v, %v", ask, err)
		}
		report(&endpoint.ClusterStats{ClusterName: v1, TotalDroppedRequests: 3, UpstreamLocalityStats: []*endpoint.UpstreamLocalityStats{
			locality("eu", 10, 7, 2, metric("tokens", 7, 70), metric("broken", 1, math.NaN()), metric("", 1, 1), metric(strings.Repeat("x", 1000), 1, 1)),
			locality("us", 1, 1, 0)}})
		report(&endpoint.ClusterStats{ClusterName: v1, UpstreamLocalityStats: []*endpoint.UpstreamLocalityStats{
			locality("eu", 5, 5, 0, metric("named_metrics.tokens", 5, 30))}},
			&endpoint.ClusterStats{ClusterName: "somebody/elses", UpstreamLocalityStats: []*endpoint.UpstreamLocalityStats{locality("eu", 9, 9, 0)}},
			&endpoint.ClusterStats{ClusterName: "model/chat/v9", UpstreamLocalityStats: []*endpoint.UpstreamLocalityStats{locality("eu", 9, 9, 0)}})
		got, refused := w.srv.Loads()
		var lines []string
		for _, l := range got {
			lines = append(lines, fmt.Sprintf("%s %s %s %q: %d %d %d %d %v", l.Group, l.Model, l.Version, l.Region, l.Issued, l.Succeeded, l.Failed, l.Dropped, l.Metrics))
		}
		want := []string{
			`default chat v1 "": 0 0 0 3 map[]`,
			`default chat v1 "eu": 15 12 2 0 map[tokens:{12 100}]`,
			`default chat v1 "us": 1 1 0 0 map[]`,
		}
		if strings.Join(lines, "\n") != strings.Join(want, "\n") || refused != 1 {
			t.Fatalf("refused %d\n%s", refused, strings.Join(lines, "\n"))
		}
		if got := strings.Join(sink.lines, ", "); got != "n chat v1  0, n chat v1 eu 10, n chat v1 us 1, n chat v1 eu 5" {
			t.Errorf("the sink heard %s", got)
		}

		// One that cannot report everything is told what there is; one without an id is ended.
		named, err := client.StreamLoadStats(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := named.Send(&lrs.LoadStatsRequest{Node: &core.Node{Id: "old"}}); err != nil {
			t.Fatal(err)
		}
		if ask, err := named.Recv(); err != nil || strings.Join(ask.GetClusters(), " ") != v1+" "+v2 {
			t.Errorf("asked for %v, %v", ask, err)
		}
		nobody, err := client.StreamLoadStats(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := nobody.Send(&lrs.LoadStatsRequest{}); err != nil {
			t.Fatal(err)
		}
		if _, err := nobody.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("without a node: %v", err)
		}
	})
}

// loaded waits until the reports of a group's version add up to n requests.
func loaded(t *testing.T, srv *adsserver.Server, group, version string, n uint64) adsserver.Load {
	t.Helper()
	var found adsserver.Load
	eventually(t, func() (string, bool) {
		rows, refused := srv.Loads()
		for _, l := range rows {
			if l.Group == group && l.Version == version && l.Region != "" && l.Issued >= n {
				found = l
				return "", true
			}
		}
		return fmt.Sprintf("%d refused, rows %+v", refused, rows), false
	}, nil)
	return found
}

// measured is a backend that attaches a metric to every answer.
type measured struct {
	grpc_health_v1.UnimplementedHealthServer
}

func (measured) Check(ctx context.Context, _ *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	orca.CallMetricsRecorderFromContext(ctx).SetNamedMetric("tokens", 7)
	return &grpc_health_v1.HealthCheckResponse{}, nil
}

// A real grpc-go client reports its requests and the metrics of their answers.
func TestRealGrpcClientReportsLoad(t *testing.T) {
	srv := adsserver.New(adsserver.Options{})
	p := chat(1, "v1")
	p.Models[0].Versions[0].Endpoints[0].Address = listenWith(t, func(r grpc.ServiceRegistrar) {
		grpc_health_v1.RegisterHealthServer(r, measured{})
	}, orca.CallMetricsServerOption(nil))
	publishAll(t, srv, p)
	client := proxyless(t, srv)
	const n = 50
	for range n {
		call(t, client, -1)
	}
	l := loaded(t, srv, "grpc", "v1", n)
	if l.Issued != n || l.Succeeded != n || l.Failed != 0 || l.Region != "eu" || l.Model != "chat" {
		t.Errorf("reported %+v", l)
	}
	if m := l.Metrics["tokens"]; m.Requests != n || m.Total != 7*n {
		t.Errorf("metrics %+v", l.Metrics)
	}
}

// A real Envoy reports its requests.
func TestRealEnvoyReportsLoad(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	srv := adsserver.New(adsserver.Options{})
	p := chat(1, "v1")
	p.Models[0].Versions[0].Endpoints[0].Address = startUpstream(t, "v1").addr
	e := startEnvoy(t, srv, listen(t, srv.Register), p)
	// An Envoy counts from when it was asked, so calls are made until one is reported; all
	// of those after that are.
	asked := uint64(0)
	eventually(t, func() (string, bool) {
		if got := e.ask(); got.err != nil || got.status != 200 {
			t.Fatalf("%+v", got)
		}
		asked++
		rows, _ := srv.Loads()
		return "nothing is reported", len(rows) > 0
	}, nil)
	const n = 30
	for range n {
		if got := e.ask(); got.err != nil || got.status != 200 {
			t.Fatalf("%+v", got)
		}
	}
	l := loaded(t, srv, "envoy", "v1", n)
	if l.Issued > asked+n || l.Succeeded > asked+n || l.Succeeded < n-1 || l.Failed != 0 || l.Region != "eu" || l.Model != "chat" {
		t.Errorf("reported %+v of %d", l, asked+n)
	}
}
