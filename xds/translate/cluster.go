package translate

import (
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// encodeCluster writes one EDS cluster per version, never subsets: load reports have
// cluster granularity, so this gives per-version counts for free.
func encodeCluster(name string, v *policy.Version, opt Options) *cluster.Cluster {
	return &cluster.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_EDS},
		EdsClusterConfig:     &cluster.Cluster_EdsClusterConfig{EdsConfig: adsSource()},
		ConnectTimeout:       durationpb.New(opt.ConnectTimeout),
		LbPolicy:             cluster.Cluster_ROUND_ROBIN,
		// Without this Envoy ignores the weights of localities.
		CommonLbConfig: &cluster.Cluster_CommonLbConfig{
			LocalityConfigSpecifier: &cluster.Cluster_CommonLbConfig_LocalityWeightedLbConfig_{
				LocalityWeightedLbConfig: &cluster.Cluster_CommonLbConfig_LocalityWeightedLbConfig{},
			},
		},
		// Connections and pending requests follow max_requests, or their own default of
		// 1024 would be the real limit.
		CircuitBreakers: &cluster.CircuitBreakers{Thresholds: []*cluster.CircuitBreakers_Thresholds{{
			Priority: core.RoutingPriority_DEFAULT, MaxRequests: wrapperspb.UInt32(v.MaxRequests),
			MaxConnections: wrapperspb.UInt32(v.MaxRequests), MaxPendingRequests: wrapperspb.UInt32(v.MaxRequests),
		}}},
		// Only consecutive failures eject: success-rate ejection, on by default, is not
		// in the policy. Any share of hosts may go, because routing has a fallback.
		OutlierDetection: &cluster.OutlierDetection{
			Consecutive_5Xx: wrapperspb.UInt32(v.ConsecutiveFailures), BaseEjectionTime: durationpb.New(v.OpenFor),
			EnforcingSuccessRate: wrapperspb.UInt32(0), MaxEjectionPercent: wrapperspb.UInt32(100),
		},
	}
}

// encodeEndpoints groups the normalised endpoints by priority and region; a locality
// weighs as much as its endpoints together (at least 1, or gRPC drops it).
func encodeEndpoints(name string, v *policy.Version) *endpoint.ClusterLoadAssignment {
	out := &endpoint.ClusterLoadAssignment{ClusterName: name}
	var group *endpoint.LocalityLbEndpoints
	for i, e := range v.Endpoints {
		if i == 0 || e.Priority != v.Endpoints[i-1].Priority || e.Region != v.Endpoints[i-1].Region {
			group = &endpoint.LocalityLbEndpoints{
				Locality: &core.Locality{Region: e.Region}, Priority: e.Priority, LoadBalancingWeight: wrapperspb.UInt32(0),
			}
			out.Endpoints = append(out.Endpoints, group)
		}
		group.LoadBalancingWeight.Value += e.Weight
		group.LbEndpoints = append(group.LbEndpoints, encodeEndpoint(e))
	}
	return out
}

func encodeEndpoint(e policy.Endpoint) *endpoint.LbEndpoint {
	host, port, _ := policy.SplitAddress(e.Address) // Validate has accepted it
	return &endpoint.LbEndpoint{
		HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{
			Address: &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
				Address: host, PortSpecifier: &core.SocketAddress_PortValue{PortValue: port},
			}}},
		}},
		LoadBalancingWeight: wrapperspb.UInt32(e.Weight),
	}
}
