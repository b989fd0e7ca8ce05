package translate

import (
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	aggregate "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/aggregate/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// What gRPC clients eject by, because they do not count consecutive failures.
const (
	grpcFailurePercent = 50
	ejectionInterval   = time.Second
)

// cluster writes one EDS cluster per version, never subsets: load reports have
// cluster granularity, so this gives per-version counts for free.
func (e *encoder) cluster(m *policy.Model, v *policy.Version) (*cluster.Cluster, error) {
	name := ClusterName(m.Name, v.Name)
	out := &cluster.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_EDS},
		EdsClusterConfig:     &cluster.Cluster_EdsClusterConfig{EdsConfig: adsSource()},
		ConnectTimeout:       durationpb.New(e.opt.ConnectTimeout),
		LbPolicy:             cluster.Cluster_ROUND_ROBIN,
		// Without this Envoy ignores the weights of localities.
		CommonLbConfig: &cluster.Cluster_CommonLbConfig{
			LocalityConfigSpecifier: &cluster.Cluster_CommonLbConfig_LocalityWeightedLbConfig_{
				LocalityWeightedLbConfig: &cluster.Cluster_CommonLbConfig_LocalityWeightedLbConfig{},
			},
		},
		CircuitBreakers: thresholds(v),
		// Only consecutive failures eject: success-rate ejection, on by default, is not
		// in the policy. Any share of hosts may go, because routing has a fallback.
		OutlierDetection: &cluster.OutlierDetection{
			Consecutive_5Xx: wrapperspb.UInt32(v.ConsecutiveFailures), BaseEjectionTime: durationpb.New(v.OpenFor),
			EnforcingSuccessRate: wrapperspb.UInt32(0), MaxEjectionPercent: wrapperspb.UInt32(100),
		},
	}
	if err := e.secure(out, v); err != nil {
		return nil, err
	}
	switch e.kind {
	case KindGRPC:
		ejectByShare(out.OutlierDetection, v)
		reportLoads(out)
		out.LrsServer = &core.ConfigSource{ResourceApiVersion: core.ApiVersion_V3,
			ConfigSourceSpecifier: &core.ConfigSource_Self{Self: &core.SelfConfigSource{TransportApiVersion: core.ApiVersion_V3}}}
	case KindEnvoy:
		reportLoads(out) // to where its bootstrap says
		return out, e.envoyCluster(out, m, v)
	}
	return out, nil
}

// thresholds are a version's limits. Connections and pending requests are always written,
// or their own default of 1024 would be the real limit; max_retries, whose default for Envoy
// is 3, only if the policy has one.
func thresholds(v *policy.Version) *cluster.CircuitBreakers {
	t := &cluster.CircuitBreakers_Thresholds{
		Priority: core.RoutingPriority_DEFAULT, MaxRequests: wrapperspb.UInt32(v.MaxRequests),
		MaxConnections: wrapperspb.UInt32(v.MaxConnections), MaxPendingRequests: wrapperspb.UInt32(v.MaxPending),
	}
	if v.MaxRetries > 0 {
		t.MaxRetries = wrapperspb.UInt32(v.MaxRetries)
	}
	return &cluster.CircuitBreakers{Thresholds: []*cluster.CircuitBreakers_Thresholds{t}}
}

// reportLoads asks for the named metrics of endpoints in load reports (gRFC A85).
func reportLoads(c *cluster.Cluster) { c.LrsReportEndpointMetrics = []string{"named_metrics.*"} }

// ejectByShare says the same in the words gRPC knows. success_rate stays off.
func ejectByShare(od *cluster.OutlierDetection, v *policy.Version) {
	od.Interval = durationpb.New(ejectionInterval)
	od.MaxEjectionTime = durationpb.New(max(v.OpenFor, policy.DefaultOpenFor))
	od.FailurePercentageThreshold = wrapperspb.UInt32(grpcFailurePercent)
	od.EnforcingFailurePercentage = wrapperspb.UInt32(100)
	od.FailurePercentageMinimumHosts = wrapperspb.UInt32(1)
	od.FailurePercentageRequestVolume = wrapperspb.UInt32(v.ConsecutiveFailures)
}

// aggregate leads to a version and, when that has no usable endpoint, to the last good
// one: what a sidecar does by itself.
func (e *encoder) aggregate(m *policy.Model, v *policy.Version) (*cluster.Cluster, error) {
	cfg, err := pack(&aggregate.ClusterConfig{Clusters: []string{ClusterName(m.Name, v.Name), ClusterName(m.Name, m.LastGood)}})
	if err != nil {
		return nil, err
	}
	lb := cluster.Cluster_CLUSTER_PROVIDED
	if e.kind == KindGRPC {
		lb = cluster.Cluster_ROUND_ROBIN // gRPC refuses the other word and ignores this one
	}
	return &cluster.Cluster{
		Name: FailoverName(m.Name, v.Name), ConnectTimeout: durationpb.New(e.opt.ConnectTimeout), LbPolicy: lb,
		ClusterDiscoveryType: &cluster.Cluster_ClusterType{ClusterType: &cluster.Cluster_CustomClusterType{
			Name: "envoy.clusters.aggregate", TypedConfig: cfg,
		}},
	}, nil
}

// shedCategory names what was refused on purpose in errors and load reports.
const shedCategory = "outrigger-shed"

// endpoints groups the normalised endpoints by priority and region; a locality
// weighs as much as its endpoints together (at least 1, or gRPC drops it).
func (e *encoder) endpoints(name string, v *policy.Version) *endpoint.ClusterLoadAssignment {
	out := &endpoint.ClusterLoadAssignment{ClusterName: name}
	if v.Shed > 0 {
		out.Policy = &endpoint.ClusterLoadAssignment_Policy{DropOverloads: []*endpoint.ClusterLoadAssignment_Policy_DropOverload{{
			Category: shedCategory, DropPercentage: shareOf(v.Shed),
		}}}
	}
	var group *endpoint.LocalityLbEndpoints
	for i, p := range v.Endpoints {
		if i == 0 || p.Priority != v.Endpoints[i-1].Priority || p.Region != v.Endpoints[i-1].Region {
			group = &endpoint.LocalityLbEndpoints{
				Locality: &core.Locality{Region: p.Region}, Priority: p.Priority, LoadBalancingWeight: wrapperspb.UInt32(0),
			}
			out.Endpoints = append(out.Endpoints, group)
		}
		group.LoadBalancingWeight.Value += p.Weight
		at := &endpoint.Endpoint{Address: socket(p.Address)}
		if e.kind == KindEnvoy {
			at.Hostname = hostnameOf(v, p.Address)
		}
		group.LbEndpoints = append(group.LbEndpoints, &endpoint.LbEndpoint{
			HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: at}, LoadBalancingWeight: wrapperspb.UInt32(p.Weight),
		})
	}
	return out
}
