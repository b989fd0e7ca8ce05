package translate

import (
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/types/known/structpb"
	"slices"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Decode is the inverse of Encode: it returns the normalised policy, or an Invalid
// error around the *ResourceError of the first resource that is missing or wrong.
// Resources no model refers to are ignored, as are fields it does not know.
func Decode(res *Resources) (*policy.Policy, error) {
	p, err := DecodeMesh(res)
	if err != nil {
		return nil, err
	}
	for _, name := range res.Names(xds.TypeModelPolicy) {
		m, err := DecodeModel(res, name)
		if err != nil {
			return nil, err
		}
		p.Models = append(p.Models, m)
	}
	if err := p.Validate(); err != nil {
		return nil, bad(xds.TypeMeshPolicy, xds.MeshName, "%v", err)
	}
	return p, nil
}

// DecodeMesh decodes what belongs to no model: position and regions. Models is empty.
func DecodeMesh(res *Resources) (*policy.Policy, error) {
	mesh, _ := res.Get(xds.TypeMeshPolicy, xds.MeshName).(*pb.MeshPolicy)
	if mesh == nil {
		return nil, bad(xds.TypeMeshPolicy, xds.MeshName, "missing")
	}
	p := &policy.Policy{Position: mesh.GetPosition()}
	for _, r := range mesh.GetRegions() {
		p.Regions = append(p.Regions, policy.Region{
			Name: r.GetName(), Gateway: r.GetGateway(), Latitude: r.GetLatitude(), Longitude: r.GetLongitude(),
			Healthy: r.GetHealth() == healthPassing,
		})
	}
	if err := p.Validate(); err != nil {
		return nil, bad(xds.TypeMeshPolicy, xds.MeshName, "%v", err)
	}
	return p.Normalise(), nil
}

// DecodeModel decodes one model from its resources; errors as for Decode.
func DecodeModel(res *Resources, name string) (policy.Model, error) {
	mp, _ := res.Get(xds.TypeModelPolicy, name).(*pb.ModelPolicy)
	if mp == nil || mp.GetName() != name {
		return policy.Model{}, bad(xds.TypeModelPolicy, name, "missing or under another name")
	}
	m := policy.Model{
		Name: name, Salt: mp.GetSalt(), Unit: experiments.Unit(mp.GetUnit()), WeightEpoch: mp.GetWeightEpoch(), Experiment: mp.GetExperiment(),
		LastGood: mp.GetLastGood(), DeadMan: mp.GetDeadManLease().AsDuration(), MaxAttempts: 1,
	}
	if e := mp.GetEnrolment(); e != nil {
		m.Enrolment = policy.Enrolment{Target: e.GetTarget(), Version: e.GetVersion()}
		for _, g := range e.GetGates() {
			m.Enrolment.Gates = append(m.Enrolment.Gates, policy.Gate{Salt: g.GetSalt(), Range: experiments.Range{Start: g.GetStart(), End: g.GetEnd()}})
		}
	}
	for _, vp := range mp.GetVersions() {
		v, err := decodeVersion(res, name, vp)
		if err != nil {
			return policy.Model{}, err
		}
		m.Versions = append(m.Versions, v)
	}
	if err := decodeSplit(res, &m); err != nil {
		return policy.Model{}, err
	}
	for _, ap := range mp.GetArms() {
		i := slices.IndexFunc(m.Arms, func(a policy.Arm) bool { return a.Name == ap.GetName() })
		if i < 0 {
			return policy.Model{}, bad(xds.TypeModelPolicy, name, "settings of arm %q, which no route names", ap.GetName())
		}
		for _, s := range ap.GetSettings() {
			m.Arms[i].Settings = append(m.Arms[i].Settings, policy.Setting{Name: s.GetName(), JSON: s.GetJson()})
		}
	}
	if err := m.Validate(); err != nil {
		return policy.Model{}, bad(xds.TypeModelPolicy, name, "%v", err)
	}
	return m.Normalise(), nil
}

func decodeVersion(res *Resources, model string, vp *pb.VersionPolicy) (policy.Version, error) {
	v := policy.Version{Name: vp.GetVersion(), Upstream: vp.GetUpstreamModel(), Quarantined: vp.GetQuarantined(), Pins: vp.GetPinnedVariables()}
	name := ClusterName(model, v.Name)
	if vp.GetCluster() != name {
		return v, bad(xds.TypeModelPolicy, model, "version %q names cluster %q, want %q", v.Name, vp.GetCluster(), name)
	}
	c, _ := res.Get(xds.TypeCluster, name).(*cluster.Cluster)
	if c == nil {
		return v, bad(xds.TypeCluster, name, "missing")
	}
	for _, th := range c.GetCircuitBreakers().GetThresholds() {
		v.MaxRequests, v.MaxConnections = th.GetMaxRequests().GetValue(), th.GetMaxConnections().GetValue()
		v.MaxPending, v.MaxRetries = th.GetMaxPendingRequests().GetValue(), th.GetMaxRetries().GetValue()
	}
	v.ConsecutiveFailures = c.GetOutlierDetection().GetConsecutive_5Xx().GetValue()
	v.OpenFor = c.GetOutlierDetection().GetBaseEjectionTime().AsDuration()
	var err error
	if v.TLS, err = decodeTLS(c); err != nil {
		return v, bad(xds.TypeCluster, name, "%v", err)
	}
	cla, _ := res.Get(xds.TypeEndpoint, name).(*endpoint.ClusterLoadAssignment)
	if cla == nil {
		return v, bad(xds.TypeEndpoint, name, "missing")
	}
	for _, d := range cla.GetPolicy().GetDropOverloads() {
		if v.Shed, err = decodeShare(d.GetDropPercentage()); err != nil {
			return v, bad(xds.TypeEndpoint, name, "%v", err)
		}
	}
	v.Endpoints, err = decodeEndpoints(name, cla)
	return v, err
}

func decodeEndpoints(name string, cla *endpoint.ClusterLoadAssignment) ([]policy.Endpoint, error) {
	var out []policy.Endpoint
	seen := make(map[string]bool)
	for _, loc := range cla.GetEndpoints() {
		for _, e := range loc.GetLbEndpoints() {
			sa := e.GetEndpoint().GetAddress().GetSocketAddress()
			addr := policy.JoinAddress(sa.GetAddress(), sa.GetPortValue())
			if _, _, err := policy.SplitAddress(addr); err != nil {
				return nil, bad(xds.TypeEndpoint, name, "%v", err)
			}
			weight := e.GetLoadBalancingWeight().GetValue()
			switch {
			case seen[addr]:
				return nil, bad(xds.TypeEndpoint, name, "endpoint %s appears twice", addr)
			case weight < 1 || weight > policy.MaxWeight:
				return nil, bad(xds.TypeEndpoint, name, "endpoint %s has weight %d, allowed is 1..%d", addr, weight, policy.MaxWeight)
			}
			seen[addr] = true
			out = append(out, policy.Endpoint{Address: addr, Region: loc.GetLocality().GetRegion(), Weight: weight, Priority: loc.GetPriority()})
		}
	}
	return out, nil
}

// decodeSplit reads arms, ranges, deadline and attempts from the model's routes.
func decodeSplit(res *Resources, m *policy.Model) error {
	l, _ := res.Get(xds.TypeListener, ListenerName(m.Name)).(*listener.Listener)
	if l == nil {
		return bad(xds.TypeListener, ListenerName(m.Name), "missing")
	}
	name := routeConfigOf(l)
	if name == "" {
		return bad(xds.TypeListener, ListenerName(m.Name), "has no api_listener that asks for a RouteConfiguration")
	}
	rc, _ := res.Get(xds.TypeRoute, name).(*route.RouteConfiguration)
	if rc == nil {
		return bad(xds.TypeRoute, name, "missing")
	}
	if err := readRoutes(rc, m); err != nil {
		return bad(xds.TypeRoute, name, "%v", err)
	}
	return nil
}

func readRoutes(rc *route.RouteConfiguration, m *policy.Model) error {
	if len(rc.GetVirtualHosts()) != 1 || len(rc.GetVirtualHosts()[0].GetRoutes()) == 0 {
		return outrigger.Errorf(outrigger.Invalid, "want one virtual host with at least one route")
	}
	vh := rc.GetVirtualHosts()[0]
	routes := vh.GetRoutes()
	last := routes[len(routes)-1]
	if err := readArms(last, m); err != nil {
		return err
	}
	for _, r := range routes[:len(routes)-1] {
		if err := readRange(r, m); err != nil {
			return err
		}
	}
	if err := readShadows(routes, m); err != nil {
		return err
	}
	if err := decodeHost(vh, m); err != nil {
		return err
	}
	m.Timeout = last.GetRoute().GetMaxStreamDuration().GetMaxStreamDuration().AsDuration()
	if n := vh.GetRetryPolicy().GetNumRetries().GetValue(); n < policy.MaxAttempts {
		m.MaxAttempts = n + 1
	} else {
		return outrigger.Errorf(outrigger.Invalid, "num_retries %d, the limit is %d", n, policy.MaxAttempts-1)
	}
	return m.ValidateSplit()
}

// readArms reads the list of arms from the metadata of the last route.
func readArms(last *route.Route, m *policy.Model) error {
	list := own(last).GetFields()["arms"].GetListValue().GetValues()
	for _, a := range list {
		f := a.GetStructValue().GetFields()
		m.Arms = append(m.Arms, policy.Arm{Name: f["name"].GetStringValue(), Version: f["version"].GetStringValue()})
	}
	if len(list) == 0 || len(list) > policy.MaxArms {
		return outrigger.Errorf(outrigger.Invalid, "the last route lists %d arms in its %q metadata, allowed is 1..%d", len(list), metadataKey, policy.MaxArms)
	}
	return nil
}

// readRange adds one route's range to its arm. A route that leads elsewhere than the
// policy says betrays a set mixed from two generations and is refused.
func readRange(r *route.Route, m *policy.Model) error {
	hs := r.GetMatch().GetHeaders()
	if len(hs) != 1 || hs[0].GetName() != outrigger.HeaderBucket || hs[0].GetRangeMatch() == nil {
		return outrigger.Errorf(outrigger.Invalid, "route %q does not match a range of %s", r.GetName(), outrigger.HeaderBucket)
	}
	start, end := hs[0].GetRangeMatch().GetStart(), hs[0].GetRangeMatch().GetEnd()
	if start < 0 || end > experiments.Buckets || start >= end {
		return outrigger.Errorf(outrigger.Invalid, "route %q has range [%d,%d)", r.GetName(), start, end)
	}
	name := own(r).GetFields()["arm"].GetStringValue()
	for i := range m.Arms {
		a := &m.Arms[i]
		if a.Name != name {
			continue
		}
		if v := m.Serving(a); v == nil || r.GetRoute().GetCluster() != ClusterName(m.Name, v.Name) {
			return outrigger.Errorf(outrigger.Invalid, "route of arm %q leads to cluster %q, which is not the one serving its version %q", name, r.GetRoute().GetCluster(), a.Version)
		}
		a.Ranges = append(a.Ranges, experiments.Range{Start: uint32(start), End: uint32(end)})
		return nil
	}
	return outrigger.Errorf(outrigger.Invalid, "route %q belongs to arm %q, which the last route does not list", r.GetName(), name)
}

// readShadows finds the versions that routes copy requests to. Their ranges must be the
// last buckets, without a gap: that is what a share means.
func readShadows(routes []*route.Route, m *policy.Model) error {
	type span struct{ first, sum int64 }
	found := map[string]*span{}
	for _, r := range routes {
		for _, mirror := range r.GetRoute().GetRequestMirrorPolicies() {
			hs := r.GetMatch().GetHeaders()
			if len(hs) != 1 || hs[0].GetRangeMatch() == nil {
				return outrigger.Errorf(outrigger.Invalid, "route %q copies requests that carry no bucket", r.GetName())
			}
			rg := hs[0].GetRangeMatch()
			s := found[mirror.GetCluster()]
			if s == nil {
				s = &span{first: rg.GetStart()}
				found[mirror.GetCluster()] = s
			}
			s.first, s.sum = min(s.first, rg.GetStart()), s.sum+rg.GetEnd()-rg.GetStart()
		}
	}
	for i := range m.Versions {
		name := ClusterName(m.Name, m.Versions[i].Name)
		if s := found[name]; s != nil {
			if s.first+s.sum != experiments.Buckets {
				return outrigger.Errorf(outrigger.Invalid, "cluster %q gets copies of %d buckets from %d on, which are not the last", name, s.sum, s.first)
			}
			m.Shadows = append(m.Shadows, policy.Shadow{Version: m.Versions[i].Name, Share: uint32(s.sum)})
			delete(found, name)
		}
	}
	for name := range found {
		return outrigger.Errorf(outrigger.Invalid, "requests are copied to cluster %q, which is no version's", name)
	}
	return nil
}

func own(r *route.Route) *structpb.Struct {
	return r.GetMetadata().GetFilterMetadata()[metadataKey]
}
