package adsserver_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	bootstrap "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	runtime "github.com/envoyproxy/go-control-plane/envoy/service/runtime/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger/internal/identity/identitytest"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Envoy's own validation accepts every golden bootstrap and every golden resource, and
// refuses a broken one.
func TestEnvoyValidatesGoldenFiles(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	binary := envoyBinary(t)
	out := filepath.Join("..", "translate", "testdata", "out")
	start := filepath.Join(out, "bootstrap", "envoy.json")
	if said, err := validate(binary, start); err != nil {
		t.Errorf("%s: %v\n%s", start, err, said)
	}
	sets, err := filepath.Glob(filepath.Join(out, "*.envoy.json"))
	if err != nil || len(sets) < 5 {
		t.Fatalf("%d golden sets (%v)", len(sets), err)
	}
	for _, set := range sets {
		t.Run(filepath.Base(set), func(t *testing.T) {
			b := asStatic(t, read(t, start), set)
			if said, err := validate(binary, write(t, b)); err != nil {
				t.Errorf("%v\n%s", err, said)
			}
		})
	}
	t.Run("broken", func(t *testing.T) {
		b := asStatic(t, read(t, start), sets[0])
		for _, c := range b.StaticResources.Clusters {
			c.LbPolicy = cluster.Cluster_CLUSTER_PROVIDED // which static clusters do not
		}
		if said, err := validate(binary, write(t, b)); err == nil {
			t.Errorf("a cluster that cannot be passed:\n%s", said)
		}
	})
}

func validate(binary, file string) (string, error) {
	out, err := exec.Command(binary, "--mode", "validate", "--disable-hot-restart", "-l", "warning", "-c", file).CombinedOutput()
	return string(out), err
}

func read(t *testing.T, file string) *bootstrap.Bootstrap {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b := &bootstrap.Bootstrap{}
	if err := protojson.Unmarshal(raw, b); err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t *testing.T, b *bootstrap.Bootstrap) string {
	t.Helper()
	raw, err := protojson.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "bootstrap.json")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// asStatic puts a golden set into a bootstrap, because validation fetches nothing: load
// assignments into their clusters, every route table into a listener of its own, the
// extension configuration into the listeners that ask for it, the runtime as a layer.
func asStatic(t *testing.T, b *bootstrap.Bootstrap, file string) *bootstrap.Bootstrap {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var set map[string]map[string]json.RawMessage
	if err := json.Unmarshal(raw, &set); err != nil {
		t.Fatal(err)
	}
	into := func(typeURL, name string, m proto.Message) {
		t.Helper()
		if err := protojson.Unmarshal(set[typeURL][name], m); err != nil {
			t.Fatalf("%s %s: %v", typeURL, name, err)
		}
	}
	for name := range set[xds.TypeCluster] {
		c := &cluster.Cluster{}
		into(xds.TypeCluster, name, c)
		if c.GetType() == cluster.Cluster_EDS && c.GetClusterType() == nil {
			c.LoadAssignment = &endpoint.ClusterLoadAssignment{}
			into(xds.TypeEndpoint, name, c.LoadAssignment)
			c.EdsClusterConfig, c.ClusterDiscoveryType = nil, &cluster.Cluster_Type{Type: cluster.Cluster_STATIC}
			for _, l := range c.LoadAssignment.Endpoints {
				l.Locality = nil // validation of static clusters wants none without a local cluster
			}
		}
		secretsInline(t, b, c)
		b.StaticResources.Clusters = append([]*cluster.Cluster{c}, b.StaticResources.Clusters...)
	}
	extensions := map[string]*anypb.Any{}
	for name := range set[xds.TypeExtension] {
		x := &core.TypedExtensionConfig{}
		into(xds.TypeExtension, name, x)
		extensions[name] = x.TypedConfig
	}
	var egress *listener.Listener
	for name := range set[xds.TypeListener] {
		l := &listener.Listener{}
		into(xds.TypeListener, name, l)
		inlineExtensions(t, l, extensions)
		b.StaticResources.Listeners = append(b.StaticResources.Listeners, l)
		if strings.HasSuffix(name, "egress") {
			egress = l
		}
	}
	port := uint32(20_000)
	for name := range set[xds.TypeRoute] {
		rc := &route.RouteConfiguration{}
		into(xds.TypeRoute, name, rc)
		l := proto.Clone(egress).(*listener.Listener)
		l.Name = "routes " + name
		port++ // validation binds nothing, but wants addresses to differ
		l.Address.GetSocketAddress().PortSpecifier = &core.SocketAddress_PortValue{PortValue: port}
		withManager(t, l, func(m *hcm.HttpConnectionManager) {
			m.RouteSpecifier = &hcm.HttpConnectionManager_RouteConfig{RouteConfig: rc}
		})
		b.StaticResources.Listeners = append(b.StaticResources.Listeners, l)
	}
	b.LayeredRuntime.Layers = b.LayeredRuntime.Layers[:0]
	for _, name := range []string{xds.RuntimeName, xds.LeaseName} {
		layer := &runtime.Runtime{}
		into(xds.TypeRuntime, name, layer)
		b.LayeredRuntime.Layers = append(b.LayeredRuntime.Layers, &bootstrap.RuntimeLayer{Name: name,
			LayerSpecifier: &bootstrap.RuntimeLayer_StaticLayer{StaticLayer: layer.Layer}})
	}
	return b
}

// secretsInline puts what a cluster wants by SDS beside it: validation has no ADS stream, and
// falls over where one is asked for.
func secretsInline(t *testing.T, b *bootstrap.Bootstrap, c *cluster.Cluster) {
	t.Helper()
	if c.TransportSocket == nil {
		return
	}
	up := &tls.UpstreamTlsContext{}
	if err := c.TransportSocket.GetTypedConfig().UnmarshalTo(up); err != nil {
		t.Fatal(err)
	}
	ca := identitytest.NewCA("golden")
	add := func(s *tls.SdsSecretConfig) {
		if s == nil {
			return
		}
		s.SdsConfig = nil
		if name, ok := strings.CutPrefix(s.Name, xds.BundleName("")); ok {
			b.StaticResources.Secrets = append(b.StaticResources.Secrets, translate.BundleSecret(name, ca.PEM).(*tls.Secret))
		} else {
			pod := ca.Issue("pod.example")
			b.StaticResources.Secrets = append(b.StaticResources.Secrets, translate.CertificateSecret(strings.TrimPrefix(s.Name, xds.CertificateName("")), pod.Chain, pod.Key).(*tls.Secret))
		}
	}
	for _, s := range up.CommonTlsContext.TlsCertificateSdsSecretConfigs {
		add(s)
	}
	add(up.CommonTlsContext.GetCombinedValidationContext().GetValidationContextSdsSecretConfig())
	cfg, err := anypb.New(up)
	if err != nil {
		t.Fatal(err)
	}
	c.TransportSocket.ConfigType = &core.TransportSocket_TypedConfig{TypedConfig: cfg}
}

func withManager(t *testing.T, l *listener.Listener, change func(*hcm.HttpConnectionManager)) {
	t.Helper()
	f := l.FilterChains[0].Filters[0]
	m := &hcm.HttpConnectionManager{}
	if err := f.GetTypedConfig().UnmarshalTo(m); err != nil {
		t.Fatal(err)
	}
	change(m)
	cfg, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	f.ConfigType = &listener.Filter_TypedConfig{TypedConfig: cfg}
}

func inlineExtensions(t *testing.T, l *listener.Listener, extensions map[string]*anypb.Any) {
	t.Helper()
	withManager(t, l, func(m *hcm.HttpConnectionManager) {
		for _, f := range m.HttpFilters {
			if f.GetConfigDiscovery() != nil {
				f.ConfigType = &hcm.HttpFilter_TypedConfig{TypedConfig: extensions[f.Name]}
			}
		}
	})
}
