package translate

import (
	"cmp"
	"slices"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	envoytype "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

const (
	// metadataKey is the filter_metadata namespace of our route metadata.
	metadataKey = "outrigger"
	// unstampedRoute is the name of the last route, for requests without a bucket.
	unstampedRoute = "unstamped"
	// retryOn lists failures where the endpoint surely did not start the work (a
	// repeated inference costs money): no connection, stream refused, "unavailable"
	// from gRPC, 503 from HTTP. gRPC ignores the words it does not know.
	retryOn = "connect-failure,refused-stream,unavailable,retriable-status-codes"
	// statusUnavailable is the HTTP status retriable-status-codes stands for.
	statusUnavailable = 503
)

// encodeListener builds the api_listener gRPC clients dial and sidecars follow.
func encodeListener(m *policy.Model) (*listener.Listener, error) {
	var filters []*hcm.HttpFilter
	if m.Fault != (policy.Fault{}) {
		// Here and in the virtual host: not every client looks at both.
		f, err := filter(faultFilter, encodeFault(m.Fault))
		if err != nil {
			return nil, errEncode(m.Name, err)
		}
		filters = append(filters, f)
	}
	last, err := filter(routerFilter, &router.Router{})
	if err != nil {
		return nil, errEncode(m.Name, err)
	}
	api, err := pack(&hcm.HttpConnectionManager{
		StatPrefix: ListenerName(m.Name),
		RouteSpecifier: &hcm.HttpConnectionManager_Rds{Rds: &hcm.Rds{
			RouteConfigName: ListenerName(m.Name), ConfigSource: adsSource(),
		}},
		HttpFilters: append(filters, last),
	})
	if err != nil {
		return nil, errEncode(m.Name, err)
	}
	return &listener.Listener{Name: ListenerName(m.Name), ApiListener: &listener.ApiListener{ApiListener: api}}, nil
}

func adsSource() *core.ConfigSource {
	return &core.ConfigSource{
		ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}},
		ResourceApiVersion:    core.ApiVersion_V3,
	}
}

// piece is one range with its owner.
type piece struct {
	experiments.Range
	arm *policy.Arm
}

// routes writes one route per range in bucket order, then the weighted split.
func (e *encoder) routes(m *policy.Model) (*route.RouteConfiguration, error) {
	var pieces []piece
	for i := range m.Arms {
		for _, r := range m.Arms[i].Ranges {
			pieces = append(pieces, piece{r, &m.Arms[i]})
		}
	}
	slices.SortFunc(pieces, func(a, b piece) int { return cmp.Compare(a.Start, b.Start) })
	pieces = e.cutAtShadows(m, pieces)
	vh := &route.VirtualHost{Name: ListenerName(m.Name), Domains: []string{"*"}, RetryPolicy: encodeRetry(m)}
	var err error
	if vh.TypedPerFilterConfig, err = e.hostFilters(m); err != nil {
		return nil, errEncode(m.Name, err)
	}
	for _, p := range pieces {
		rs, err := e.rangeRoutes(m, p)
		if err != nil {
			return nil, errEncode(m.Name, err)
		}
		vh.Routes = append(vh.Routes, rs...)
	}
	if e.kind == KindEnvoy {
		vh.RequestHeadersToRemove = []string{headerScope, headerCapture}
		vh.Routes = append(vh.Routes, e.unassignedRoute(m))
	}
	last, err := e.weightedRoute(m)
	if err != nil {
		return nil, errEncode(m.Name, err)
	}
	vh.Routes = append(vh.Routes, e.guarded(m, last)...)
	return &route.RouteConfiguration{Name: ListenerName(m.Name), VirtualHosts: []*route.VirtualHost{vh}}, nil
}

// cutAtShadows divides ranges where a shadow's share begins, so that a route copies all of
// its requests or none. gRPC has no word for copies.
func (e *encoder) cutAtShadows(m *policy.Model, pieces []piece) []piece {
	if e.kind == KindGRPC || len(m.Shadows) == 0 {
		return pieces
	}
	var out []piece
	for _, p := range pieces {
		cuts := []uint32{p.Start, p.End}
		for _, s := range m.Shadows {
			if at := experiments.Buckets - s.Share; at > p.Start && at < p.End {
				cuts = append(cuts, at)
			}
		}
		slices.Sort(cuts)
		cuts = slices.Compact(cuts)
		for i := range len(cuts) - 1 {
			out = append(out, piece{experiments.Range{Start: cuts[i], End: cuts[i+1]}, p.arm})
		}
	}
	return out
}

// mirrors are the copies of a route's requests, all of them: which units they are of is the
// route's range.
func (e *encoder) mirrors(m *policy.Model, p piece) (out []*route.RouteAction_RequestMirrorPolicy) {
	if e.kind == KindGRPC {
		return nil
	}
	for _, s := range m.Shadows {
		if s.Mirrors(p.Start) {
			out = append(out, &route.RouteAction_RequestMirrorPolicy{Cluster: ClusterName(m.Name, s.Version),
				// The endpoint is to see what it would see as the version in production.
				DisableShadowHostSuffixAppend: true,
				RuntimeFraction: &core.RuntimeFractionalPercent{
					DefaultValue: &envoytype.FractionalPercent{Numerator: 100, Denominator: envoytype.FractionalPercent_HUNDRED}}})
		}
	}
	return out
}

func encodeRetry(m *policy.Model) *route.RetryPolicy {
	if m.MaxAttempts <= 1 {
		return nil // gRPC refuses num_retries 0
	}
	return &route.RetryPolicy{
		RetryOn: retryOn, NumRetries: wrapperspb.UInt32(m.MaxAttempts - 1), RetriableStatusCodes: []uint32{statusUnavailable},
	}
}

// rangeRoutes writes the route of one range. To an Envoy a version other than the last good
// one comes with its kill switch, and behind it the route of the same range to the last good
// version. A gRPC client gets the one of the two that holds: it has no runtime whose keys could
// move requests without a new route, and grpc-go gives a route of fraction 0 one request in a
// million (its matcher draws from [0, 1000000) and takes what is not above the fraction).
func (e *encoder) rangeRoutes(m *policy.Model, p piece) ([]*route.Route, error) {
	assigned, serving := m.Version(p.arm.Version), m.Serving(p.arm)
	if e.kind == KindSidecar || m.LastGood == "" || m.LastGood == assigned.Name {
		r, err := e.rangeRoute(m, p, p.arm.Name, serving)
		return []*route.Route{r}, err
	}
	first, err := e.rangeRoute(m, p, p.arm.Name, assigned)
	if err != nil {
		return nil, err
	}
	second, err := e.rangeRoute(m, p, policy.ArmLastGood, m.Version(m.LastGood))
	if err != nil {
		return nil, err
	}
	switch {
	case e.kind == KindEnvoy:
		first.Match.RuntimeFraction = killSwitch(m, assigned)
		return []*route.Route{first, second}, nil
	case serves(assigned) == 0:
		return []*route.Route{second}, nil
	default:
		return []*route.Route{first}, nil
	}
}

// killSwitch is the share of its requests that an Envoy gives a version, by a runtime key. Its
// default is 0 for what the dead-man lease must be able to end: it holds when the layer that
// says otherwise has expired.
func killSwitch(m *policy.Model, v *policy.Version) *core.RuntimeFractionalPercent {
	share := serves(v)
	if leased(m, v) {
		share = 0
	}
	return &core.RuntimeFractionalPercent{
		DefaultValue: &envoytype.FractionalPercent{Numerator: share, Denominator: envoytype.FractionalPercent_HUNDRED},
		RuntimeKey:   killKey(m.Name, v.Name),
	}
}

func (e *encoder) rangeRoute(m *policy.Model, p piece, arm string, serving *policy.Version) (*route.Route, error) {
	md, err := metadata(map[string]any{"arm": p.arm.Name})
	if err != nil {
		return nil, err
	}
	act := e.action(m)
	act.ClusterSpecifier = &route.RouteAction_Cluster{Cluster: e.target(m, serving)}
	act.RequestMirrorPolicies = e.mirrors(m, p)
	r := &route.Route{
		Name: arm,
		Match: &route.RouteMatch{
			PathSpecifier: &route.RouteMatch_Prefix{Prefix: ""},
			Headers: []*route.HeaderMatcher{{
				Name: outrigger.HeaderBucket,
				HeaderMatchSpecifier: &route.HeaderMatcher_RangeMatch{
					RangeMatch: &envoytype.Int64Range{Start: int64(p.Start), End: int64(p.End)},
				},
			}},
		},
		Action: &route.Route_Route{Route: act}, Metadata: md,
	}
	setArmHeaders(r, arm, serving.Name)
	return r, nil
}

// weightedRoute splits what carries no bucket. Its metadata lists all arms with the
// version each was given, also those without buckets or with a quarantined version.
func (e *encoder) weightedRoute(m *policy.Model) (*route.Route, error) {
	wc := &route.WeightedCluster{}
	var arms []any
	for i := range m.Arms {
		a := &m.Arms[i]
		arms = append(arms, map[string]any{"name": a.Name, "version": a.Version})
		if a.Weight() == 0 {
			continue
		}
		v := m.Serving(a)
		serving := v.Name
		wc.Clusters = append(wc.Clusters, &route.WeightedCluster_ClusterWeight{
			Name: e.target(m, v), Weight: wrapperspb.UInt32(a.Weight()),
			RequestHeadersToAdd: headerOptions(a.Name, serving), ResponseHeadersToAdd: headerOptions(a.Name, serving),
		})
	}
	md, err := metadata(map[string]any{"arms": arms})
	if err != nil {
		return nil, err
	}
	act := e.action(m)
	act.ClusterSpecifier = &route.RouteAction_WeightedClusters{WeightedClusters: wc}
	return &route.Route{
		Name: unstampedRoute, Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: ""}},
		Action: &route.Route_Route{Route: act}, Metadata: md,
	}, nil
}

// guarded puts a route that leads to a candidate among others under its kill switch, and the
// last good version behind it. It is taken by requests that the bucket rule has not seen,
// which only a broken filter lets happen; the lease holds for them too.
func (e *encoder) guarded(m *policy.Model, r *route.Route) []*route.Route {
	i := slices.IndexFunc(m.Arms, func(a policy.Arm) bool { return a.Weight() > 0 && leased(m, m.Version(a.Version)) })
	if e.kind != KindEnvoy || i < 0 {
		return []*route.Route{r}
	}
	r.Match.RuntimeFraction = killSwitch(m, m.Version(m.Arms[i].Version))
	act := e.action(m)
	act.ClusterSpecifier = &route.RouteAction_Cluster{Cluster: ClusterName(m.Name, m.LastGood)}
	behind := &route.Route{
		Name: policy.ArmLastGood, Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: ""}},
		Action: &route.Route_Route{Route: act},
	}
	setArmHeaders(behind, policy.ArmLastGood, m.LastGood)
	return []*route.Route{r, behind}
}

// action carries the deadline twice: gRPC reads max_stream_duration and ignores
// timeout, Envoy would otherwise cut requests at its default of 15 s.
func (e *encoder) action(m *policy.Model) *route.RouteAction {
	out := &route.RouteAction{
		Timeout:           durationpb.New(m.Timeout),
		MaxStreamDuration: &route.RouteAction_MaxStreamDuration{MaxStreamDuration: durationpb.New(m.Timeout)},
	}
	if e.kind == KindEnvoy && usesTLS(m) {
		// Hosts without a name of their own keep what the application says.
		out.HostRewriteSpecifier = &route.RouteAction_AutoHostRewrite{AutoHostRewrite: wrapperspb.Bool(true)}
	}
	return out
}

func metadata(fields map[string]any) (*core.Metadata, error) {
	s, err := structpb.NewStruct(fields)
	if err != nil {
		return nil, err
	}
	return &core.Metadata{FilterMetadata: map[string]*structpb.Struct{metadataKey: s}}, nil
}

func headerOptions(arm, version string) []*core.HeaderValueOption {
	set := func(k, v string) *core.HeaderValueOption {
		return &core.HeaderValueOption{
			Header:       &core.HeaderValue{Key: k, Value: escapeHeader(v)},
			AppendAction: core.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
		}
	}
	return []*core.HeaderValueOption{set(outrigger.HeaderVersion, version), set(outrigger.HeaderArm, arm)}
}
