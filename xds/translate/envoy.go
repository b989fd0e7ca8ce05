package translate

import (
	_ "embed"
	"fmt"
	"iter"
	"slices"
	"strings"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	envoytype "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Names of what only Envoys get; see package xds.
const (
	EgressListener  = "envoy/egress"
	CaptureListener = "envoy/capture"
	passthrough     = "envoy/passthrough"
	originalDst     = "envoy/original-dst"
	assignFilter    = "outrigger/assign"
)

// protocolOptions is the key of a cluster's HTTP options.
const protocolOptions = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

// Headers between our Lua filter and Envoy's choice of a route table; they go no further.
const (
	headerScope   = "x-outrigger-scope"   // the model, if it is one of ours
	headerCapture = "x-outrigger-capture" // the model, or "*" for requests of no model
	noModel       = "*"
)

// EnvoyOptions are where Envoys listen. The zero value is usable.
type EnvoyOptions struct {
	// Egress is where the application sends its requests, host:port with an IP address;
	// empty = DefaultEgress.
	Egress string
	// Capture is where connections redirected by the kernel arrive; empty =
	// DefaultCapture. Requests of a known model are routed by policy, all else goes on
	// to where it was going.
	Capture string
	// AccessLog writes one JSON line per request to Envoy's standard output.
	AccessLog bool
	// TrustStore is the file on an Envoy's machine with the certificates it trusts, for
	// endpoints whose TLS names no trust bundle; empty = DefaultTrustStore.
	TrustStore string
}

// Where Envoys listen by default: egress where a sidecar would.
const (
	DefaultEgress  = "127.0.0.1:50051"
	DefaultCapture = "0.0.0.0:15001"
)

// envoyBase adds what every Envoy needs, whatever the models.
func (e *encoder) envoyBase() error {
	if err := e.listeners(); err != nil {
		return err
	}
	e.scope(passthrough, noModel, passthrough)
	e.res.Put(xds.TypeRoute, passthrough, passthroughRoutes())
	e.res.Put(xds.TypeCluster, originalDst, &cluster.Cluster{
		Name: originalDst, ConnectTimeout: durationpb.New(e.opt.ConnectTimeout), LbPolicy: cluster.Cluster_CLUSTER_PROVIDED,
		ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_ORIGINAL_DST},
	})
	return nil
}

// scope says which requests use which routes, so that a change of one model's routes
// is the push of one small table. The name must not be "*": to delta xDS that is no name, and
// an Envoy that comes back does not say that it has what is called so.
func (e *encoder) scope(name, key, routes string) {
	e.res.Put(xds.TypeScopedRoute, name, &route.ScopedRouteConfiguration{
		Name: name, RouteConfigurationName: routes,
		Key: &route.ScopedRouteConfiguration_Key{Fragments: []*route.ScopedRouteConfiguration_Key_Fragment{{
			Type: &route.ScopedRouteConfiguration_Key_Fragment_StringKey{StringKey: key},
		}}},
	})
}

func passthroughRoutes() *route.RouteConfiguration {
	return &route.RouteConfiguration{Name: passthrough, VirtualHosts: []*route.VirtualHost{{
		Name: passthrough, Domains: []string{"*"}, RequestHeadersToRemove: []string{headerScope, headerCapture},
		Routes: []*route.Route{{
			Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: ""}},
			Action: &route.Route_Route{Route: &route.RouteAction{
				ClusterSpecifier: &route.RouteAction_Cluster{Cluster: originalDst},
				Timeout:          durationpb.New(0), // not ours to limit
			}},
		}},
	}}}
}

// unassignedRoute leads requests without a unit where a sidecar would lead them: to the
// last good version, else to that of the widest arm. They take part in no experiment.
func (e *encoder) unassignedRoute(m *policy.Model) *route.Route {
	v := m.Version(m.LastGood)
	if v == nil {
		widest := slices.MaxFunc(m.Arms, func(a, b policy.Arm) int { return int(a.Weight()) - int(b.Weight()) })
		v = m.Version(widest.Version)
	}
	act := e.action(m)
	act.ClusterSpecifier = &route.RouteAction_Cluster{Cluster: ClusterName(m.Name, v.Name)}
	r := &route.Route{
		Name: policy.ArmUnassigned,
		Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: ""}, Headers: []*route.HeaderMatcher{{
			Name: outrigger.HeaderArm, HeaderMatchSpecifier: &route.HeaderMatcher_StringMatch{StringMatch: &matcher.StringMatcher{
				MatchPattern: &matcher.StringMatcher_Exact{Exact: policy.ArmUnassigned},
			}},
		}}},
		Action: &route.Route_Route{Route: act},
	}
	setArmHeaders(r, policy.ArmUnassigned, v.Name)
	return r
}

// envoyCluster adds to a cluster what only Envoy needs or understands.
func (e *encoder) envoyCluster(c *cluster.Cluster, m *policy.Model, v *policy.Version) error {
	c.OutlierDetection.Interval = durationpb.New(ejectionInterval)
	if v.MaxConnections == v.MaxRequests {
		// One connection more than requests: on it Envoy finds that a request is too many and
		// refuses it; without, it would wait for a connection instead.
		c.CircuitBreakers.Thresholds[0].MaxConnections.Value = max(v.MaxRequests, v.MaxRequests+1)
	}
	if v.Shed > 0 {
		// Envoy takes note of drop_overloads when endpoints change or the cluster is made,
		// so the cluster changes with them.
		md, err := metadata(map[string]any{"shed": v.Shed})
		if err != nil {
			return err
		}
		c.Metadata = md
	}
	if m.LastGood != "" {
		// With a fallback, requests never go to hosts known to be bad; without one Envoy's
		// default of using all of them when most are bad is the better bet.
		c.CommonLbConfig.HealthyPanicThreshold = &envoytype.Percent{Value: 0}
	}
	protocol, err := pack(httpOptions(v.TLS))
	if err != nil {
		return err
	}
	c.TypedExtensionProtocolOptions = map[string]*anypb.Any{protocolOptions: protocol}
	if slices.ContainsFunc(v.Endpoints, func(e policy.Endpoint) bool { return !isIP(e.Address) }) {
		// Envoy refuses host names over EDS, so the cluster brings and resolves its own.
		c.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_STRICT_DNS}
		c.EdsClusterConfig, c.LoadAssignment = nil, e.endpoints(c.GetName(), v)
	}
	return nil
}

// kills are the runtime keys of one model. The layer always writes every version's share
// out, because Envoys may keep the last value of a key that goes away.
func kills(m *policy.Model) []kill {
	out := make([]kill, len(m.Versions))
	for i := range m.Versions {
		v := &m.Versions[i]
		out[i] = kill{key: killKey(m.Name, v.Name), serves: serves(v), leased: leased(m, v)}
	}
	return out
}

type kill struct {
	key    string
	serves uint32 // percent
	leased bool   // it serves while the control plane is heard, and not otherwise
}

// leased: a version that Envoys serve for as long as they hear the control plane.
func leased(m *policy.Model, v *policy.Version) bool { return m.DeadMan > 0 && v.Name != m.LastGood }

//go:embed assign.lua
var assignSource string

// assignEntry is what the script knows of one model.
func assignEntry(m *policy.Model) string {
	return fmt.Sprintf("  [%s] = {%s, %s},\n", luaString(m.Name), luaString(m.Salt), luaString(string(m.Unit)))
}

// assignScript is the bucket rule with the models' salts and units, given as entries.
func assignScript(entries iter.Seq[string]) string {
	var b strings.Builder
	b.WriteString("local models = {\n")
	for entry := range entries {
		b.WriteString(entry)
	}
	b.WriteString("}\n")
	b.WriteString(assignSource)
	return b.String()
}

// luaString writes every byte that is not a plain letter or digit as an escape.
func luaString(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-_./:", c) >= 0 {
			b.WriteByte(c)
			continue
		}
		fmt.Fprintf(&b, "\\%03d", c)
	}
	b.WriteByte('"')
	return b.String()
}
