// Package translate turns a policy.Policy into xDS resources and back.
//
//	res, err := translate.Encode(p, translate.Options{})   // control plane
//	p, err := translate.Decode(res)                        // sidecar
//
// What standard xDS can say travels in standard resources, so Envoy and proxyless gRPC
// clients obey the same split, endpoints, breaker and deadlines as our sidecars; the
// rest travels in ModelPolicy and MeshPolicy (see package xds for names):
//
//	arms and ranges        RouteConfiguration: one route per range on the header
//	                       x-outrigger-bucket; the last route, for requests without the
//	                       header, splits by weighted_clusters (not sticky per unit)
//	arm and version names  route metadata "outrigger"; and as request and response headers
//	quarantine             the routes of the arm lead to the last good version's cluster
//	timeout                max_stream_duration and timeout of every route
//	attempts               retry_policy.num_retries = attempts − 1
//	breaker                circuit_breakers.max_requests, outlier_detection
//	endpoints              one locality per (priority, region)
//	everything else        ModelPolicy, MeshPolicy
//
// Promises: for every valid policy Decode(Encode(p)) equals p (policy.Equal; the decoded
// form is normalised); the output passes the generated validation of every proto; the
// same policy gives the same bytes under Marshal on every replica. Decode accepts
// hostile input: it never panics and returns an Invalid error around a *ResourceError
// that names the resource and the reason. Functions are pure and safe for concurrent use.
//
// Endpoints whose host is a name rather than an IP address are understood by sidecars
// and gRPC; Envoy accepts only IP addresses over EDS.
package translate

import (
	"strings"
	"time"

	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

const modelPrefix = "model/"

// ListenerName is the resource name of a model's Listener and RouteConfiguration.
func ListenerName(model string) string { return modelPrefix + model }

// ClusterName is the resource name of a version's Cluster and ClusterLoadAssignment.
func ClusterName(model, version string) string { return modelPrefix + model + "/" + version }

// Options tune Encode. The zero value is usable.
type Options struct {
	// ChangedAt is the log position each model last changed at, shown in
	// ModelPolicy.position for display. A model that is absent shows 0. Never pass the
	// policy's own position for unchanged models: it would make them change.
	ChangedAt map[string]uint64
	// ConnectTimeout bounds one connection attempt of Envoy; 0 = 5 s.
	ConnectTimeout time.Duration
}

// Encode validates p and returns its resources. p is not modified and not retained.
// Errors have kind Invalid.
func Encode(p *policy.Policy, opt Options) (*Resources, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	if opt.ConnectTimeout <= 0 {
		opt.ConnectTimeout = 5 * time.Second
	}
	n := p.Normalise()
	res := &Resources{}
	for i := range n.Models {
		if err := encodeModel(res, &n.Models[i], opt); err != nil {
			return nil, err
		}
	}
	res.Put(xds.TypeMeshPolicy, xds.MeshName, encodeMesh(n))
	return res, res.ValidateAll()
}

func encodeModel(res *Resources, m *policy.Model, opt Options) error {
	l, err := encodeListener(m)
	if err != nil {
		return err
	}
	rc, err := encodeRoutes(m)
	if err != nil {
		return err
	}
	res.Put(xds.TypeListener, l.GetName(), l)
	res.Put(xds.TypeRoute, rc.GetName(), rc)
	for i := range m.Versions {
		name := ClusterName(m.Name, m.Versions[i].Name)
		res.Put(xds.TypeCluster, name, encodeCluster(name, &m.Versions[i], opt))
		res.Put(xds.TypeEndpoint, name, encodeEndpoints(name, &m.Versions[i]))
	}
	res.Put(xds.TypeModelPolicy, m.Name, encodeModelPolicy(m, opt.ChangedAt[m.Name]))
	return nil
}

func encodeModelPolicy(m *policy.Model, changedAt uint64) *pb.ModelPolicy {
	out := &pb.ModelPolicy{
		Name: m.Name, Salt: m.Salt, Unit: string(m.Unit), WeightEpoch: m.WeightEpoch,
		LastGood: m.LastGood, Position: changedAt,
	}
	if m.DeadMan > 0 {
		out.DeadManLease = durationpb.New(m.DeadMan)
	}
	for _, v := range m.Versions {
		out.Versions = append(out.Versions, &pb.VersionPolicy{
			Version: v.Name, Cluster: ClusterName(m.Name, v.Name), UpstreamModel: v.Upstream, Quarantined: v.Quarantined,
		})
	}
	return out
}

// Words of Region.health that matter here; anything else reads as not healthy.
const (
	healthPassing  = "passing"
	healthCritical = "critical"
)

func encodeMesh(p *policy.Policy) *pb.MeshPolicy {
	out := &pb.MeshPolicy{Position: p.Position}
	for _, r := range p.Regions {
		health := healthCritical
		if r.Healthy {
			health = healthPassing
		}
		out.Regions = append(out.Regions, &pb.Region{
			Name: r.Name, Gateway: r.Gateway, Latitude: r.Latitude, Longitude: r.Longitude, Health: health,
		})
	}
	return out
}

// escapeHeader doubles '%', which starts a command in Envoy's header values.
func escapeHeader(s string) string { return strings.ReplaceAll(s, "%", "%%") }

// armHeaders says which version and arm served, to the endpoint and to the caller.
func setArmHeaders(r *route.Route, arm, version string) {
	r.RequestHeadersToAdd = headerOptions(arm, version)
	r.ResponseHeadersToAdd = headerOptions(arm, version)
}

// errEncode marks what only a bug can cause: marshalling our own messages failed.
func errEncode(model string, err error) error {
	return outrigger.Wrap(outrigger.Internal, err, "encode model "+model)
}
