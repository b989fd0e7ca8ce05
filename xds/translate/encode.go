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
//	shadows                request_mirror_policies of the routes of the last buckets
//	quarantine             the routes of the arm lead to the last good version's cluster
//	timeout                max_stream_duration and timeout of every route
//	attempts               retry_policy.num_retries = attempts − 1
//	limits                 circuit_breakers: max_requests, max_connections,
//	                       max_pending_requests, max_retries
//	breaker                outlier_detection
//	endpoints              one locality per (priority, region)
//	TLS                    transport_socket, with names of secrets that come by SDS
//	shedding               drop_overloads of the load assignment
//	faults, access rules   fault and RBAC configuration of the virtual host
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
	"slices"
	"strings"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

const (
	modelPrefix    = "model/"
	failoverPrefix = "failover/"
)

// ListenerName is the resource name of a model's Listener and RouteConfiguration.
func ListenerName(model string) string { return modelPrefix + model }

// ClusterName is the resource name of a version's Cluster and ClusterLoadAssignment.
func ClusterName(model, version string) string { return modelPrefix + model + "/" + version }

// FailoverName is the name of the cluster that leads to a version and, when that has no
// usable endpoint, to the last good one. Only sets for gRPC and Envoy have such clusters.
func FailoverName(model, version string) string { return failoverPrefix + model + "/" + version }

// Options tune Encode. The zero value is usable.
type Options struct {
	// ChangedAt is the log position each model last changed at, shown in
	// ModelPolicy.position for display. A model that is absent shows 0. Never pass the
	// policy's own position for unchanged models: it would make them change.
	ChangedAt map[string]uint64
	// ConnectTimeout bounds one connection attempt of Envoy; 0 = 5 s.
	ConnectTimeout time.Duration
	// Envoy is where Envoys listen.
	Envoy EnvoyOptions
	// Secrets are those of EncodeFor; Encoders are given them with each Change.
	Secrets Secrets
}

// Encode is EncodeFor sidecars.
func Encode(p *policy.Policy, opt Options) (*Resources, error) {
	return EncodeFor(KindSidecar, p, opt)
}

// EncodeFor validates p and returns the resources a kind of client obeys it by; Lint
// names what the kind cannot do. p is not modified and not retained. Errors have kind
// Invalid.
func EncodeFor(kind Kind, p *policy.Policy, opt Options) (*Resources, error) {
	if !slices.Contains(Kinds(), kind) {
		return nil, outrigger.Errorf(outrigger.Invalid, "client kind %q is not one of %v", string(kind), Kinds())
	}
	if err := p.Validate(); err != nil {
		return nil, err
	}
	n := p.Normalise()
	change := Change{Position: n.Position, Regions: n.Regions, Secrets: opt.Secrets}
	for i := range n.Models {
		change.Models = append(change.Models, ModelChange{Model: &n.Models[i], ChangedAt: opt.ChangedAt[n.Models[i].Name]})
	}
	return NewEncoder(kind, opt).Encode(change)
}

// encoder writes one set.
type encoder struct {
	kind Kind
	opt  Options
	res  *Resources
}

// model writes the resources of one model.
func (e *encoder) model(m *policy.Model, changedAt uint64) error {
	if e.kind != KindSidecar && m.Enrolment.Limited() {
		m = outside(m)
	}
	if e.kind != KindEnvoy { // an Envoy has no use for listeners without an address
		l, err := encodeListener(m)
		if err != nil {
			return err
		}
		e.res.Put(xds.TypeListener, l.GetName(), l)
	}
	rc, err := e.routes(m)
	if err != nil {
		return err
	}
	e.res.Put(xds.TypeRoute, rc.GetName(), rc)
	for i := range m.Versions {
		if err := e.version(m, &m.Versions[i]); err != nil {
			return err
		}
	}
	switch e.kind {
	case KindSidecar:
		e.res.Put(xds.TypeModelPolicy, m.Name, encodeModelPolicy(m, changedAt))
	case KindEnvoy:
		if m.Name != noModel { // that name is taken by requests of no model
			e.scope(ListenerName(m.Name), m.Name, ListenerName(m.Name))
		}
	}
	return nil
}

// outside is the model as those see it who take no part in its experiment: clients that
// cannot tell who does send everybody there.
func outside(m *policy.Model) *policy.Model {
	out := *m
	out.Arms = []policy.Arm{{Name: policy.ArmNotEnrolled, Version: m.Enrolment.Version, Ranges: []experiments.Range{{Start: 0, End: experiments.Buckets}}}}
	return &out
}

func (e *encoder) version(m *policy.Model, v *policy.Version) error {
	name := ClusterName(m.Name, v.Name)
	c, err := e.cluster(m, v)
	if err != nil {
		return errEncode(m.Name, err)
	}
	e.res.Put(xds.TypeCluster, name, c)
	if c.GetType() == cluster.Cluster_EDS {
		e.res.Put(xds.TypeEndpoint, name, e.endpoints(name, v))
	}
	if !e.failsOver(m, v) {
		return nil
	}
	a, err := e.aggregate(m, v)
	if err != nil {
		return errEncode(m.Name, err)
	}
	e.res.Put(xds.TypeCluster, a.GetName(), a)
	return nil
}

// failsOver: the last good version takes over when v has no usable endpoint. Sidecars do
// so by the policy itself.
func (e *encoder) failsOver(m *policy.Model, v *policy.Version) bool {
	return e.kind != KindSidecar && m.LastGood != "" && m.LastGood != v.Name
}

// target is the cluster requests for a version go to.
func (e *encoder) target(m *policy.Model, v *policy.Version) string {
	if e.failsOver(m, v) {
		return FailoverName(m.Name, v.Name)
	}
	return ClusterName(m.Name, v.Name)
}

func encodeModelPolicy(m *policy.Model, changedAt uint64) *pb.ModelPolicy {
	out := &pb.ModelPolicy{
		Name: m.Name, Salt: m.Salt, Unit: string(m.Unit), WeightEpoch: m.WeightEpoch,
		LastGood: m.LastGood, Position: changedAt, Experiment: m.Experiment,
	}
	for _, a := range m.Arms {
		if len(a.Settings) == 0 {
			continue
		}
		ap := &pb.ArmPolicy{Name: a.Name}
		for _, s := range a.Settings {
			ap.Settings = append(ap.Settings, &pb.ArmSetting{Name: s.Name, Json: s.JSON})
		}
		out.Arms = append(out.Arms, ap)
	}
	if e := &m.Enrolment; e.Limited() {
		out.Enrolment = &pb.EnrolmentPolicy{Target: e.Target, Version: e.Version}
		for _, g := range e.Gates {
			out.Enrolment.Gates = append(out.Enrolment.Gates, &pb.EnrolmentGate{Salt: g.Salt, Start: g.Start, End: g.End})
		}
	}
	if m.DeadMan > 0 {
		out.DeadManLease = durationpb.New(m.DeadMan)
	}
	for _, v := range m.Versions {
		out.Versions = append(out.Versions, &pb.VersionPolicy{
			Version: v.Name, Cluster: ClusterName(m.Name, v.Name), UpstreamModel: v.Upstream, Quarantined: v.Quarantined, PinnedVariables: v.Pins,
		})
	}
	return out
}

// Words of Region.health that matter here; anything else reads as not healthy.
const (
	healthPassing  = "passing"
	healthCritical = "critical"
)

func encodeMesh(position uint64, regions []policy.Region) *pb.MeshPolicy {
	out := &pb.MeshPolicy{Position: position}
	for _, r := range regions {
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
