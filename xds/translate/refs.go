package translate

import (
	"cmp"
	"slices"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	aggregate "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/aggregate/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/xds"
)

// Ref is a resource one needs and the resource that needs it.
type Ref struct {
	TypeURL, Name string // what is needed
	ByType, By    string // who needs it
}

// String returns `Cluster model/chat/v2 needed by RouteConfiguration model/chat`.
func (r Ref) String() string {
	return xds.ShortType(r.TypeURL) + " " + r.Name + " needed by " + xds.ShortType(r.ByType) + " " + r.By
}

// Missing lists, sorted, the references that do not resolve within the set: listener
// to routes, scoped routes to routes, routes (single and weighted clusters) to clusters,
// aggregate clusters to clusters, clusters to load assignments, ModelPolicy to its listener and clusters. An empty answer means a client
// holding exactly this set has nothing left to wait for. Unlike the stock consistency
// check it follows api_listener and weighted clusters.
func (r *Resources) Missing() []Ref {
	var out []Ref
	for typeURL, set := range r.byType {
		for name, i := range set {
			out = r.unresolved(out, Key{typeURL, name}, i)
		}
	}
	return sortRefs(out)
}

// MissingSince is Missing for a fork of a set that misses nothing: it looks at what was
// put since, and at the whole only if something was taken away. If r is no fork of prev
// it is Missing.
func (r *Resources) MissingSince(prev *Resources) []Ref {
	touched, ok := r.Since(prev)
	if !ok {
		return r.Missing()
	}
	var out []Ref
	for _, k := range touched {
		i := r.byType[k.TypeURL][k.Name]
		if i == nil {
			return r.Missing()
		}
		out = r.unresolved(out, k, i)
	}
	return sortRefs(out)
}

func (r *Resources) unresolved(out []Ref, by Key, i *item) []Ref {
	for _, need := range i.needs() {
		if r.byType[need.TypeURL][need.Name] == nil {
			need.ByType, need.By = by.TypeURL, by.Name
			out = append(out, need)
		}
	}
	return out
}

func sortRefs(out []Ref) []Ref {
	slices.SortFunc(out, func(a, b Ref) int {
		return cmp.Or(cmp.Compare(a.TypeURL, b.TypeURL), cmp.Compare(a.Name, b.Name), cmp.Compare(a.ByType, b.ByType), cmp.Compare(a.By, b.By))
	})
	return out
}

// needs returns the references one resource makes.
func needs(m proto.Message) []Ref {
	switch m := m.(type) {
	case *listener.Listener:
		if name := routeConfigOf(m); name != "" {
			return []Ref{{TypeURL: xds.TypeRoute, Name: name}}
		}
	case *route.RouteConfiguration:
		return clusterRefs(m)
	case *route.ScopedRouteConfiguration:
		return []Ref{{TypeURL: xds.TypeRoute, Name: m.GetRouteConfigurationName()}}
	case *cluster.Cluster:
		var agg aggregate.ClusterConfig
		if m.GetClusterType().GetTypedConfig().UnmarshalTo(&agg) == nil {
			var out []Ref
			for _, name := range agg.GetClusters() {
				out = append(out, Ref{TypeURL: xds.TypeCluster, Name: name})
			}
			return out
		}
		if m.GetType() == cluster.Cluster_EDS {
			return []Ref{{TypeURL: xds.TypeEndpoint, Name: cmp.Or(m.GetEdsClusterConfig().GetServiceName(), m.GetName())}}
		}
	case *pb.ModelPolicy:
		out := []Ref{{TypeURL: xds.TypeListener, Name: modelPrefix + m.GetName()}}
		for _, v := range m.GetVersions() {
			out = append(out, Ref{TypeURL: xds.TypeCluster, Name: v.GetCluster()})
		}
		return out
	}
	return nil
}

func clusterRefs(rc *route.RouteConfiguration) []Ref {
	var out []Ref
	for _, vh := range rc.GetVirtualHosts() {
		for _, rt := range vh.GetRoutes() {
			if c := rt.GetRoute().GetCluster(); c != "" {
				out = append(out, Ref{TypeURL: xds.TypeCluster, Name: c})
			}
			for _, w := range rt.GetRoute().GetWeightedClusters().GetClusters() {
				out = append(out, Ref{TypeURL: xds.TypeCluster, Name: w.GetName()})
			}
		}
	}
	return out
}

// routeConfigOf returns the RDS name a listener's api_listener asks for, or "".
func routeConfigOf(l *listener.Listener) string {
	var m hcm.HttpConnectionManager
	if l.GetApiListener().GetApiListener().UnmarshalTo(&m) != nil {
		return ""
	}
	return m.GetRds().GetRouteConfigName()
}
