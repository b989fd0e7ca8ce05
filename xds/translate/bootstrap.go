package translate

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"slices"
	"strings"
	"time"

	bootstrap "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	upstreamhttp "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// BootstrapOptions say who the client is and where the control plane is.
type BootstrapOptions struct {
	// Control is the control plane's gRPC address, host:port; those of several replicas with
	// commas. Required.
	Control string
	// Node names the client; its Kind is not used. Its ID is required.
	Node outrigger.Node
	// Admin is where an Envoy's admin interface listens, host:port with an IP address;
	// empty = it has none. Whoever reaches it controls the Envoy.
	Admin string
	// TLS is how the control plane is connected to; nil = in plaintext.
	TLS *ControlTLS
}

const (
	connectTimeout    = 5 * time.Second
	keepaliveInterval = 10 * time.Second // the server refuses pings more often than every 5 s
	keepaliveTimeout  = 5 * time.Second
	ejection          = 2 * time.Second // of a replica that cannot be reached
)

// controlCluster is the one cluster an Envoy has before it has asked for any.
const controlCluster = "outrigger-control"

// Bootstrap returns the JSON a client of the given kind starts with: the file of envoy
// --config-path, or of GRPC_XDS_BOOTSTRAP. Sidecars have flags instead. The same
// options give the same bytes. Errors have kind Invalid.
func Bootstrap(kind Kind, o BootstrapOptions) ([]byte, error) {
	if o.Node.ID == "" {
		return nil, outrigger.Errorf(outrigger.Invalid, "the node has no id; give one that is unique and stays the same over restarts")
	}
	servers := Servers(o.Control, o.Node.ID)
	if len(servers) == 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "no control plane is named; give host:port")
	}
	for _, address := range servers {
		if _, _, err := policy.SplitAddress(address); err != nil {
			return nil, outrigger.Wrap(outrigger.Invalid, err, "control plane")
		}
	}
	if o.TLS != nil {
		if err := o.TLS.check(kind); err != nil {
			return nil, err
		}
	}
	switch kind {
	case KindEnvoy:
		return envoyBootstrap(o, servers)
	case KindGRPC:
		return grpcBootstrap(o, servers)
	}
	return nil, outrigger.Errorf(outrigger.Invalid, "client kind %q has no bootstrap; one of %s, %s", string(kind), KindEnvoy, KindGRPC)
}

// Servers are the addresses of control, which has several with commas between them, in the
// order in which a node is to try them: the same over its restarts, and another one for every
// node, so that the replicas have equal shares of the nodes, and each of the others an equal
// share of one that goes away (rendezvous hashing: Thaler and Ravishankar, "A name-based mapping
// scheme for rendezvous", 1996).
func Servers(control, node string) []string {
	var out []string
	for address := range strings.SplitSeq(control, ",") {
		if address = strings.TrimSpace(address); address != "" {
			out = append(out, address)
		}
	}
	slices.SortStableFunc(out, func(a, b string) int { return bytes.Compare(weight(a, node), weight(b, node)) })
	return out
}

func weight(address, node string) []byte {
	sum := sha256.Sum256([]byte(node + "\x00" + address))
	return sum[:]
}

// grpcBootstrap is the JSON of gRFC A27. A resource that vanishes from the control
// plane is kept (A53), because the alternative is that every call fails. Of several
// servers a client uses the first that it reaches, as far as it lacks anything (A71); gRPC for
// Node knows the first only, and is better given one address behind which are all.
func grpcBootstrap(o BootstrapOptions, servers []string) ([]byte, error) {
	type object = map[string]any
	var list []object
	for _, address := range servers {
		list = append(list, object{
			"server_uri": address, "channel_creds": []object{o.TLS.channelCredentials()},
			"server_features": []string{"xds_v3", "ignore_resource_deletion"},
		})
	}
	return indented(object{
		"xds_servers": list,
		"node":        object{"id": o.Node.ID, "cluster": "outrigger", "locality": object{"region": o.Node.Region, "zone": o.Node.Zone}},
	})
}

func envoyBootstrap(o BootstrapOptions, servers []string) ([]byte, error) {
	node := Node(o.Node)
	node.UserAgentName, node.Cluster = "", "outrigger" // Envoy says itself what it is
	delete(node.Metadata.Fields, nodeKind)
	control, err := controlPlane(servers, o.TLS)
	if err != nil {
		return nil, err
	}
	b := &bootstrap.Bootstrap{
		Node:            node,
		StaticResources: &bootstrap.Bootstrap_StaticResources{Clusters: []*cluster.Cluster{control}},
		DynamicResources: &bootstrap.Bootstrap_DynamicResources{
			LdsConfig: adsSource(), CdsConfig: adsSource(),
			AdsConfig: &core.ApiConfigSource{
				ApiType: core.ApiConfigSource_DELTA_GRPC, TransportApiVersion: core.ApiVersion_V3, SetNodeOnFirstMessageOnly: true,
				GrpcServices: controlService(),
			},
		},
		ClusterManager: &bootstrap.ClusterManager{LoadStatsConfig: &core.ApiConfigSource{
			ApiType: core.ApiConfigSource_GRPC, TransportApiVersion: core.ApiVersion_V3, GrpcServices: controlService(),
		}},
		LayeredRuntime: &bootstrap.LayeredRuntime{Layers: []*bootstrap.RuntimeLayer{
			runtimeLayer(xds.RuntimeName),
			runtimeLayer(xds.LeaseName),
			// Last wins: what an operator sets at the admin interface.
			{Name: "admin", LayerSpecifier: &bootstrap.RuntimeLayer_AdminLayer_{AdminLayer: &bootstrap.RuntimeLayer_AdminLayer{}}},
		}},
	}
	if o.Admin != "" {
		if !isIP(o.Admin) {
			return nil, outrigger.Errorf(outrigger.Invalid, "admin address %q is not an IP address with a port", o.Admin)
		}
		b.Admin = &bootstrap.Admin{Address: socket(o.Admin)}
	}
	if err := b.ValidateAll(); err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, "bootstrap")
	}
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(b)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "bootstrap")
	}
	var v any // protojson's spacing is random on purpose
	if err := json.Unmarshal(raw, &v); err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "bootstrap")
	}
	return indented(v)
}

func runtimeLayer(name string) *bootstrap.RuntimeLayer {
	return &bootstrap.RuntimeLayer{Name: name, LayerSpecifier: &bootstrap.RuntimeLayer_RtdsLayer_{
		RtdsLayer: &bootstrap.RuntimeLayer_RtdsLayer{Name: name, RtdsConfig: adsSource()},
	}}
}

func controlService() []*core.GrpcService {
	return []*core.GrpcService{{TargetSpecifier: &core.GrpcService_EnvoyGrpc_{
		EnvoyGrpc: &core.GrpcService_EnvoyGrpc{ClusterName: controlCluster},
	}}}
}

// controlPlane has a stream to one of the replicas, and goes on with another when it ends; one
// that cannot be reached is left out for some seconds, if there are others.
func controlPlane(servers []string, secured *ControlTLS) (*cluster.Cluster, error) {
	http2, err := pack(&upstreamhttp.HttpProtocolOptions{UpstreamProtocolOptions: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_{
		ExplicitHttpConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &upstreamhttp.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
				// A control plane that vanished without a word is noticed.
				Http2ProtocolOptions: &core.Http2ProtocolOptions{ConnectionKeepalive: &core.KeepaliveSettings{
					Interval: durationpb.New(keepaliveInterval), Timeout: durationpb.New(keepaliveTimeout),
				}},
			},
		},
	}})
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "bootstrap")
	}
	var hosts []*endpoint.LbEndpoint
	for _, address := range servers {
		hosts = append(hosts, &endpoint.LbEndpoint{HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: socket(address)}}})
	}
	var outliers *cluster.OutlierDetection
	if len(hosts) > 1 {
		outliers = &cluster.OutlierDetection{Consecutive_5Xx: wrapperspb.UInt32(1), Interval: durationpb.New(time.Second),
			BaseEjectionTime: durationpb.New(ejection), MaxEjectionTime: durationpb.New(2 * ejection), MaxEjectionPercent: wrapperspb.UInt32(50)}
	}
	var socket *core.TransportSocket // nil = plaintext
	if secured != nil {
		if socket, err = secured.transportSocket(servers); err != nil {
			return nil, outrigger.Wrap(outrigger.Internal, err, "bootstrap")
		}
	}
	return &cluster.Cluster{
		TransportSocket: socket,
		Name:            controlCluster, OutlierDetection: outliers, ConnectTimeout: durationpb.New(connectTimeout),
		ClusterDiscoveryType:          &cluster.Cluster_Type{Type: cluster.Cluster_STRICT_DNS},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{protocolOptions: http2},
		LoadAssignment:                &endpoint.ClusterLoadAssignment{ClusterName: controlCluster, Endpoints: []*endpoint.LocalityLbEndpoints{{LbEndpoints: hosts}}},
	}, nil
}

// socket is the xDS form of an address SplitAddress accepts.
func socket(address string) *core.Address {
	host, port, _ := policy.SplitAddress(address) // the caller has checked it
	return &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
		Address: host, PortSpecifier: &core.SocketAddress_PortValue{PortValue: port},
	}}}
}

func indented(v any) ([]byte, error) {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "bootstrap")
	}
	return append(raw, '\n'), nil
}
