package translate

import (
	"cmp"
	"net/netip"
	"time"

	accesslog "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	stream "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	fault "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	jsonmeta "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/json_to_metadata/v3"
	lua "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	rbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	httpinspector "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	originaldst "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	tlsinspector "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// maxBody bounds what an Envoy holds of a request while it reads which model it names.
const maxBody = 16 << 20

// inspectTimeout is how long a captured connection may stay silent before it is passed on.
const inspectTimeout = time.Second

func isIP(address string) bool {
	host, _, err := policy.SplitAddress(address)
	_, perr := netip.ParseAddr(host)
	return err == nil && perr == nil
}

// listeners writes where an Envoy takes requests: from an application that was pointed
// at it, and connections the kernel redirected.
func (e *encoder) listeners() error {
	for _, l := range []struct {
		name, address string
		capture       bool
	}{
		{EgressListener, cmp.Or(e.opt.Envoy.Egress, DefaultEgress), false},
		{CaptureListener, cmp.Or(e.opt.Envoy.Capture, DefaultCapture), true},
	} {
		if !isIP(l.address) {
			return outrigger.Errorf(outrigger.Invalid, "%s is to listen on %q; give an IP address and a port", l.name, l.address)
		}
		out, err := e.listener(l.name, l.address, l.capture)
		if err != nil {
			return errEncode(l.name, err)
		}
		e.res.Put(xds.TypeListener, l.name, out)
	}
	return nil
}

func (e *encoder) listener(name, address string, capture bool) (*listener.Listener, error) {
	out := &listener.Listener{
		Name: name, TrafficDirection: core.TrafficDirection_OUTBOUND, PerConnectionBufferLimitBytes: wrapperspb.UInt32(maxBody),
		Address: socket(address),
	}
	scope := headerScope
	if capture {
		scope = headerCapture
	}
	web, err := e.httpChain(name, scope)
	if err != nil {
		return nil, err
	}
	if !capture {
		out.FilterChains = []*listener.FilterChain{web}
		return out, nil
	}
	// TLS and whatever is not HTTP passes through untouched.
	web.FilterChainMatch = &listener.FilterChainMatch{TransportProtocol: "raw_buffer", ApplicationProtocols: []string{"http/1.0", "http/1.1", "h2c"}}
	out.FilterChains = []*listener.FilterChain{web}
	raw, err := networkFilter("envoy.filters.network.tcp_proxy", &tcpproxy.TcpProxy{
		StatPrefix: originalDst, ClusterSpecifier: &tcpproxy.TcpProxy_Cluster{Cluster: originalDst},
	})
	if err != nil {
		return nil, err
	}
	out.DefaultFilterChain = &listener.FilterChain{Name: "tcp", Filters: []*listener.Filter{raw}}
	for _, f := range []struct {
		name   string
		config proto.Message
	}{
		{"envoy.filters.listener.original_dst", &originaldst.OriginalDst{}},
		{"envoy.filters.listener.tls_inspector", &tlsinspector.TlsInspector{}},
		{"envoy.filters.listener.http_inspector", &httpinspector.HttpInspector{}},
	} {
		cfg, err := pack(f.config)
		if err != nil {
			return nil, err
		}
		out.ListenerFilters = append(out.ListenerFilters, &listener.ListenerFilter{Name: f.name, ConfigType: &listener.ListenerFilter_TypedConfig{TypedConfig: cfg}})
	}
	// Servers that speak first say nothing to inspect: do not wait for them long.
	out.ListenerFiltersTimeout, out.ContinueOnListenerFiltersTimeout = durationpb.New(inspectTimeout), true
	return out, nil
}

func networkFilter(name string, config proto.Message) (*listener.Filter, error) {
	cfg, err := pack(config)
	return &listener.Filter{Name: name, ConfigType: &listener.Filter_TypedConfig{TypedConfig: cfg}}, err
}

func (e *encoder) httpChain(name, scopeHeader string) (*listener.FilterChain, error) {
	filters, err := httpFilters()
	if err != nil {
		return nil, err
	}
	m := &hcm.HttpConnectionManager{
		StatPrefix: name, HttpFilters: filters,
		// Routes are chosen by headers that our filter sets, whatever the request's path.
		RouteSpecifier: &hcm.HttpConnectionManager_ScopedRoutes{ScopedRoutes: &hcm.ScopedRoutes{
			Name: name, RdsConfigSource: adsSource(),
			ScopeKeyBuilder: &hcm.ScopedRoutes_ScopeKeyBuilder{Fragments: []*hcm.ScopedRoutes_ScopeKeyBuilder_FragmentBuilder{{
				Type: &hcm.ScopedRoutes_ScopeKeyBuilder_FragmentBuilder_HeaderValueExtractor_{
					HeaderValueExtractor: &hcm.ScopedRoutes_ScopeKeyBuilder_FragmentBuilder_HeaderValueExtractor{
						Name: scopeHeader, ExtractType: &hcm.ScopedRoutes_ScopeKeyBuilder_FragmentBuilder_HeaderValueExtractor_Index{},
					},
				},
			}}},
			ConfigSpecifier: &hcm.ScopedRoutes_ScopedRds{ScopedRds: &hcm.ScopedRds{ScopedRdsConfigSource: adsSource()}},
		}},
		// An id of Envoy's own making would look like the application's, which is a unit.
		GenerateRequestId: wrapperspb.Bool(false),
		StreamIdleTimeout: durationpb.New(0), // the routes' deadlines bound requests
	}
	if e.opt.Envoy.AccessLog {
		if m.AccessLog, err = accessLogs(); err != nil {
			return nil, err
		}
	}
	f, err := networkFilter("envoy.filters.network.http_connection_manager", m)
	return &listener.FilterChain{Name: "http", Filters: []*listener.Filter{f}}, err
}

// httpFilters reads the model and unit, assigns the bucket, and leaves room for what
// virtual hosts configure: access rules and faults.
func httpFilters() ([]*hcm.HttpFilter, error) {
	out := make([]*hcm.HttpFilter, 0, 5)
	for _, f := range []struct {
		name   string
		config proto.Message
	}{
		{"envoy.filters.http.json_to_metadata", bodyFields()},
		{assignFilter, nil},
		{rbacFilter, &rbac.RBAC{}},
		{faultFilter, &fault.HTTPFault{}},
		{routerFilter, &router.Router{}},
	} {
		if f.config == nil {
			url := "type.googleapis.com/" + string((&lua.Lua{}).ProtoReflect().Descriptor().FullName())
			out = append(out, &hcm.HttpFilter{Name: f.name, ConfigType: &hcm.HttpFilter_ConfigDiscovery{
				ConfigDiscovery: &core.ExtensionConfigSource{ConfigSource: adsSource(), TypeUrls: []string{url}},
			}})
			continue
		}
		hf, err := filter(f.name, f.config)
		if err != nil {
			return nil, err
		}
		out = append(out, hf)
	}
	return out, nil
}

// bodyFields are the fields of a JSON request that name its model or its unit.
func bodyFields() *jsonmeta.JsonToMetadata {
	out := &jsonmeta.JsonToMetadata{RequestRules: &jsonmeta.JsonToMetadata_MatchRules{}}
	for _, path := range [][]string{
		{"model"}, {"safety_identifier"}, {"user"}, {"metadata", "user_id"}, {"parameters", "user_id"},
		{"prompt_cache_key"}, {"metadata", "sequence_id"}, {"parameters", "sequence_id"},
	} {
		rule := &jsonmeta.JsonToMetadata_Rule{OnPresent: &jsonmeta.JsonToMetadata_KeyValuePair{
			MetadataNamespace: metadataKey, Key: path[len(path)-1], Type: jsonmeta.JsonToMetadata_STRING,
		}}
		for _, key := range path {
			rule.Selectors = append(rule.Selectors, &jsonmeta.JsonToMetadata_Selector{Selector: &jsonmeta.JsonToMetadata_Selector_Key{Key: key}})
		}
		out.RequestRules.Rules = append(out.RequestRules.Rules, rule)
	}
	return out
}

func accessLogs() ([]*accesslog.AccessLog, error) {
	fields, err := structpb.NewStruct(map[string]any{
		"at": "%START_TIME%", "status": "%RESPONSE_CODE%", "flags": "%RESPONSE_FLAGS%", "ms": "%DURATION%",
		"model": "%REQ(" + outrigger.HeaderModel + ")%", "bucket": "%REQ(" + outrigger.HeaderBucket + ")%",
		"arm": "%RESP(" + outrigger.HeaderArm + ")%", "version": "%RESP(" + outrigger.HeaderVersion + ")%",
		"cluster": "%UPSTREAM_CLUSTER%", "host": "%UPSTREAM_HOST%",
	})
	if err != nil {
		return nil, err
	}
	var cfg *anypb.Any
	cfg, err = pack(&stream.StdoutAccessLog{AccessLogFormat: &stream.StdoutAccessLog_LogFormat{LogFormat: &core.SubstitutionFormatString{
		Format: &core.SubstitutionFormatString_JsonFormat{JsonFormat: fields},
	}}})
	return []*accesslog.AccessLog{{Name: "envoy.access_loggers.stdout", ConfigType: &accesslog.AccessLog_TypedConfig{TypedConfig: cfg}}}, err
}
