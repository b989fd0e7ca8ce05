package adsserver

import (
	"cmp"
	"errors"
	"io"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	lrs "github.com/envoyproxy/go-control-plane/envoy/service/load_stats/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Load reports (LRS, envoy.service.load_stats.v3) are how Envoys and gRPC clients, which
// have no sidecar, say how their requests went: per cluster, so per version of a model,
// and per region, once a second, with the sums of the named metrics that endpoints attach
// to their answers (ORCA). They count requests, not units: they are for display and for
// pods without a sidecar, and no rollout is decided on them.

// Bounds of what load reports can make the server hold.
const (
	maxLoads       = 20_000 // (group, cluster, region) rows; reports of more are counted as dropped
	maxLoadMetrics = 64     // named metrics per row
	maxLoadRegions = 256    // localities in one report of a cluster
	maxMetricName  = 200
	loadInterval   = time.Second
	// sendAllClusters is the client feature of reporting every cluster unasked.
	sendAllClusters = "envoy.lrs.supports_send_all_clusters"
	// orcaPrefix is how clients that follow gRFC A85 qualify named metrics.
	orcaPrefix = "named_metrics."
)

// Load is what clients reported about one version of a model since the server started,
// or, handed to a LoadSink, in one report.
type Load struct {
	Group, Cluster string
	Model, Version string
	Region         string // of the endpoints; "" where the client cannot tell, as for drops
	// Requests: begun, answered well, failed at the endpoint, refused by policy before
	// they were sent.
	Issued, Succeeded, Failed, Dropped uint64
	Metrics                            map[string]LoadMetric // ORCA, by name
	At                                 time.Time             // of the last report
}

// LoadMetric is the sum of one named metric over requests that carried it.
type LoadMetric struct {
	Requests uint64
	Total    float64
}

// LoadSink is handed what each report says of each cluster and region, after it was
// counted. It is called without locks held, from the reporting stream's goroutine, must
// not block, and must not modify the Metrics.
type LoadSink interface {
	Load(node outrigger.Node, l Load)
}

type loadKey struct{ group, cluster, region string }

// loads sums the reports.
type loads struct {
	mu      sync.Mutex
	rows    map[loadKey]*Load
	refused uint64
}

// Loads returns what was reported since the server started, by group, cluster and region,
// and how many rows of reports were refused: about clusters nobody serves, or for want of
// room.
func (s *Server) Loads() (out []Load, refused uint64) {
	s.loads.mu.Lock()
	defer s.loads.mu.Unlock()
	for _, l := range s.loads.rows {
		c := *l
		c.Metrics = cloneMap(l.Metrics)
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b Load) int {
		return cmp.Or(cmp.Compare(a.Group, b.Group), cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Region, b.Region))
	})
	return out, s.loads.refused
}

// add counts one row of a report.
func (l *loads) add(d *Load) {
	l.mu.Lock()
	defer l.mu.Unlock()
	key := loadKey{d.Group, d.Cluster, d.Region}
	row := l.rows[key]
	if row == nil {
		if len(l.rows) >= maxLoads {
			l.refused++
			return
		}
		row = &Load{Group: d.Group, Cluster: d.Cluster, Model: d.Model, Version: d.Version, Region: d.Region}
		l.rows[key] = row
	}
	row.Issued += d.Issued
	row.Succeeded += d.Succeeded
	row.Failed += d.Failed
	row.Dropped += d.Dropped
	row.At = d.At
	for name, m := range d.Metrics {
		sum, known := row.Metrics[name]
		if !known && len(row.Metrics) >= maxLoadMetrics {
			continue
		}
		if row.Metrics == nil {
			row.Metrics = make(map[string]LoadMetric)
		}
		row.Metrics[name] = LoadMetric{sum.Requests + m.Requests, sum.Total + m.Total}
	}
}

func (l *loads) refuse(n int) {
	l.mu.Lock()
	l.refused += uint64(n)
	l.mu.Unlock()
}

type loadReports struct {
	lrs.UnimplementedLoadReportingServiceServer
	srv *Server
}

// StreamLoadStats tells a client what to report and counts what it does. The first
// request names the node; one without an id, or not authorised, ends the stream.
func (r *loadReports) StreamLoadStats(st lrs.LoadReportingService_StreamLoadStatsServer) error {
	s := r.srv
	defer s.loadStreams.Add(-1)
	if n := s.loadStreams.Add(1); n > int64(s.opt.MaxStreams) {
		return status.ToGRPC(outrigger.Errorf(outrigger.Exhausted, "%d load report streams are open, the limit is %d; use another replica", n-1, s.opt.MaxStreams))
	}
	first, err := st.Recv()
	if err != nil {
		return err
	}
	if first.GetNode().GetId() == "" {
		return status.ToGRPC(outrigger.Errorf(outrigger.Invalid, "node.id is empty; set it in the client's bootstrap"))
	}
	if s.opt.Authorise != nil {
		if err := s.opt.Authorise(st.Context(), first.GetNode()); err != nil {
			return status.ToGRPC(err)
		}
	}
	node := translate.NodeOf(first.GetNode())
	g := s.group(s.opt.Group(node))
	ask := &lrs.LoadStatsResponse{LoadReportingInterval: durationpb.New(loadInterval)}
	if slices.Contains(first.GetNode().GetClientFeatures(), sendAllClusters) {
		ask.SendAllClusters = true
	} else if st := g.current.Load().typeOf(xds.TypeCluster); st != nil {
		ask.Clusters = st.names
	}
	if err := st.Send(ask); err != nil {
		return err
	}
	for req := first; ; {
		served := g.current.Load().typeOf(xds.TypeCluster)
		s.countLoads(node, g.name, served, req.GetClusterStats())
		if node.Kind == string(translate.KindEnvoy) && req != first && unreported(served, req.GetClusterStats()) {
			if err := st.Send(ask); err != nil {
				return err
			}
		}
		if req, err = st.Recv(); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

// unreported: a report lacks a model's cluster. An Envoy reports the clusters, idle ones
// included, that it had when it was last asked, so it is asked again once it has more.
// gRPC clients report what they have and read the first answer only.
func unreported(served *typeState, stats []*endpoint.ClusterStats) bool {
	if served == nil {
		return false
	}
	has := make(map[string]bool, len(stats))
	for _, c := range stats {
		has[c.GetClusterName()] = true
	}
	return slices.ContainsFunc(served.names, func(name string) bool {
		_, ours := translate.ModelOf(xds.TypeCluster, name)
		return ours && !has[name]
	})
}

// countLoads adds one report: rows of the models' clusters that the node's group is served.
// An Envoy has others, which say nothing about models.
func (s *Server) countLoads(node outrigger.Node, group string, served *typeState, stats []*endpoint.ClusterStats) {
	now := time.Now()
	for _, c := range stats {
		name := cmp.Or(c.GetClusterServiceName(), c.GetClusterName())
		model, ok := translate.ModelOf(xds.TypeCluster, name)
		if !ok {
			continue
		}
		if served.entry(name) == nil {
			s.loads.refuse(1)
			continue
		}
		base := Load{Group: group, Cluster: name, Model: model, Version: name[strings.LastIndexByte(name, '/')+1:], At: now}
		if n := c.GetTotalDroppedRequests(); n > 0 {
			d := base
			d.Dropped = n
			s.countLoad(node, &d)
		}
		regions := c.GetUpstreamLocalityStats()
		if n := len(regions) - maxLoadRegions; n > 0 {
			s.loads.refuse(n)
			regions = regions[:maxLoadRegions]
		}
		for _, u := range regions {
			d := base
			d.Region = u.GetLocality().GetRegion()
			d.Issued, d.Succeeded, d.Failed = u.GetTotalIssuedRequests(), u.GetTotalSuccessfulRequests(), u.GetTotalErrorRequests()
			d.Metrics = metricsOf(u.GetLoadMetricStats())
			if len(d.Region) <= maxMetricName {
				s.countLoad(node, &d)
			}
		}
	}
}

func (s *Server) countLoad(node outrigger.Node, d *Load) {
	s.loads.add(d)
	if s.opt.Loads != nil {
		s.opt.Loads.Load(node, *d)
	}
}

// metricsOf leaves out what is not a number or has no usable name.
func metricsOf(stats []*endpoint.EndpointLoadMetricStats) map[string]LoadMetric {
	var out map[string]LoadMetric
	for _, m := range stats {
		name, v := strings.TrimPrefix(m.GetMetricName(), orcaPrefix), m.GetTotalMetricValue()
		if name == "" || len(name) > maxMetricName || math.IsNaN(v) || math.IsInf(v, 0) || len(out) >= maxLoadMetrics {
			continue
		}
		if out == nil {
			out = make(map[string]LoadMetric, len(stats))
		}
		out[name] = LoadMetric{out[name].Requests + m.GetNumRequestsFinishedWithMetric(), out[name].Total + v}
	}
	return out
}
