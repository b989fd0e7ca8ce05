package translate_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	yaml "go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/policy/policytest"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

var update = flag.Bool("update", false, "rewrite golden files")

func load(t testing.TB, file string) *policy.Policy {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", "in", file))
	if err != nil {
		t.Fatal(err)
	}
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	dec.KnownFields(true)
	var p policy.Policy
	if err := dec.Decode(&p); err != nil {
		t.Fatal(err)
	}
	return &p
}

func encode(t testing.TB, p *policy.Policy) *translate.Resources {
	t.Helper()
	res, err := translate.Encode(p, translate.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// One small policy in, all resources out, per feature and kind of client.
func TestGolden(t *testing.T) {
	ins, err := filepath.Glob("testdata/in/*.yaml")
	if err != nil || len(ins) == 0 {
		t.Fatalf("no inputs: %v", err)
	}
	for _, in := range ins {
		name := strings.TrimSuffix(filepath.Base(in), ".yaml")
		t.Run(name, func(t *testing.T) {
			for _, kind := range translate.Kinds() {
				res, err := translate.EncodeFor(kind, load(t, name+".yaml"), translate.Options{Envoy: translate.EnvoyOptions{AccessLog: true}})
				if err != nil {
					t.Fatal(err)
				}
				golden(t, name+"."+string(kind)+".json", render(t, res))
				if missing := res.Missing(); len(missing) != 0 {
					t.Errorf("%s: dangling references: %v", kind, missing)
				}
			}
		})
	}
}

// The candidate's layer lives as long as the shortest lease of all models; without a candidate
// it is there for good, and a change of the lease alone is a change.
func TestLeaseOfTheRuntimeLayer(t *testing.T) {
	e := translate.NewEncoder(translate.KindEnvoy, translate.Options{})
	for _, c := range []struct {
		lease time.Duration
		other time.Duration
		want  time.Duration
	}{{0, 0, 0}, {10 * time.Second, 0, 10 * time.Second}, {10 * time.Second, 4 * time.Second, 4 * time.Second}, {3 * time.Second, 4 * time.Second, 3 * time.Second}, {0, 0, 0}} {
		p := load(t, "candidate.yaml").Normalise()
		other := p.Models[0]
		other.Name = "other"
		p.Models[0].DeadMan, other.DeadMan = c.lease, c.other
		res, err := e.Encode(translate.Change{Position: 1, Models: []translate.ModelChange{{Model: &p.Models[0]}, {Model: &other}}})
		if err != nil {
			t.Fatal(err)
		}
		if got, want := res.TTL(xds.TypeRuntime, xds.LeaseName), c.want*19/20; got != want {
			t.Errorf("leases of %v and %v: the layer lives %v, want %v", c.lease, c.other, got, want)
		}
		if got := res.TTL(xds.TypeRuntime, xds.RuntimeName); got != 0 {
			t.Errorf("the kill switches live %v, want for ever", got)
		}
	}
}

// A withdrawn version has no route to a gRPC client: grpc-go gives a route of fraction 0 one
// request in a million.
func TestWithdrawnVersionHasNoRoute(t *testing.T) {
	for _, withdrawn := range []bool{false, true} {
		p := load(t, "candidate.yaml").Normalise()
		p.Models[0].Version("v2").Quarantined = withdrawn
		res, err := translate.EncodeFor(translate.KindGRPC, p, translate.Options{})
		if err != nil {
			t.Fatal(err)
		}
		leads := 0
		for _, r := range res.Get(xds.TypeRoute, "model/chat").(*route.RouteConfiguration).VirtualHosts[0].Routes {
			if r.Match.RuntimeFraction != nil {
				t.Errorf("withdrawn %v: %q is left to a fraction, %v", withdrawn, r.Name, r.Match.RuntimeFraction)
			}
			if strings.HasSuffix(r.GetRoute().GetCluster(), "/v2") {
				leads++
			}
		}
		if want := map[bool]int{false: 1, true: 0}[withdrawn]; leads != want {
			t.Errorf("withdrawn %v: %d ranges lead to it, want %d", withdrawn, leads, want)
		}
	}
}

// golden compares with a file under testdata/out.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", "out", name)
	if *update {
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, got, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; run with -update and read the diff\n%s", file, got)
	}
}

// render prints resources as one JSON object with sorted keys; protojson's own spacing
// is random on purpose, so it is re-encoded.
func render(t *testing.T, res *translate.Resources) []byte {
	out := map[string]map[string]any{}
	for _, typeURL := range xds.Pushed() {
		if len(res.Names(typeURL)) == 0 {
			continue
		}
		set := map[string]any{}
		for _, name := range res.Names(typeURL) {
			raw, err := protojson.Marshal(res.Get(typeURL, name))
			if err != nil {
				t.Fatal(err)
			}
			var v any
			if err := json.Unmarshal(raw, &v); err != nil {
				t.Fatal(err)
			}
			set[name] = v
		}
		out[typeURL] = set
	}
	raw, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return append(raw, '\n')
}

func TestDecodeUndoesEncode(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p := policytest.Policy().Draw(rt, "policy")
		res, err := translate.Encode(p, translate.Options{})
		if err != nil {
			rt.Fatal(err)
		}
		got, err := translate.Decode(res)
		if err != nil {
			rt.Fatal(err)
		}
		if want := p.Normalise(); !reflect.DeepEqual(got, want) {
			rt.Fatalf("got  %+v\nwant %+v", got, want)
		}
		if missing := res.Missing(); len(missing) != 0 {
			rt.Fatalf("dangling references: %v", missing)
		}
	})
}

// The wire form, too: every resource through bytes and back, and the same bytes from a
// differently ordered policy.
func TestBytesAreDeterministicAndComplete(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p := policytest.Policy().Draw(rt, "policy")
		a, b := encode(t, p), encode(t, p.Normalise())
		back := &translate.Resources{}
		for _, typeURL := range xds.Types() {
			for _, name := range a.Names(typeURL) {
				raw, err := translate.Marshal(a.Get(typeURL, name))
				if err != nil {
					rt.Fatal(err)
				}
				other, err := translate.Marshal(b.Get(typeURL, name))
				if err != nil || !bytes.Equal(raw, other) {
					rt.Fatalf("%s %s: bytes depend on input order (%v)", typeURL, name, err)
				}
				m, err := translate.Unmarshal(typeURL, name, raw)
				if err != nil {
					rt.Fatal(err)
				}
				back.Put(typeURL, name, m)
			}
		}
		got, err := translate.Decode(back)
		if err != nil || !policy.Equal(got, p) {
			rt.Fatalf("through bytes: %v, %+v", err, got)
		}
	})
}

func TestEncodeRefusesInvalid(t *testing.T) {
	p := load(t, "split.yaml")
	p.Models[0].Arms = nil
	if _, err := translate.Encode(p, translate.Options{}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Fatalf("got %v, want Invalid", err)
	}
}

// What is wrong, and which resource the error must name.
func TestDecodeNamesTheResource(t *testing.T) {
	const v2 = "model/chat/v2"
	rc := func(r *translate.Resources) []*route.Route {
		return r.Get(xds.TypeRoute, "model/chat").(*route.RouteConfiguration).VirtualHosts[0].Routes
	}
	mp := func(r *translate.Resources) *pb.ModelPolicy {
		return r.Get(xds.TypeModelPolicy, "chat").(*pb.ModelPolicy)
	}
	cases := []struct {
		name, typeURL, resource, reason string
		breakIt                         func(*translate.Resources)
	}{
		{"no mesh", xds.TypeMeshPolicy, "mesh", "missing", func(r *translate.Resources) { r.Delete(xds.TypeMeshPolicy, "mesh") }},
		{"no listener", xds.TypeListener, "model/chat", "missing", func(r *translate.Resources) { r.Delete(xds.TypeListener, "model/chat") }},
		{"no api_listener", xds.TypeListener, "model/chat", "api_listener", func(r *translate.Resources) {
			r.Get(xds.TypeListener, "model/chat").(*listener.Listener).ApiListener = nil
		}},
		{"no routes", xds.TypeRoute, "model/chat", "missing", func(r *translate.Resources) { r.Delete(xds.TypeRoute, "model/chat") }},
		{"no cluster", xds.TypeCluster, v2, "missing", func(r *translate.Resources) { r.Delete(xds.TypeCluster, v2) }},
		{"no endpoints", xds.TypeEndpoint, v2, "missing", func(r *translate.Resources) { r.Delete(xds.TypeEndpoint, v2) }},
		{"gap", xds.TypeRoute, "model/chat", "bucket 999", func(r *translate.Resources) {
			rc(r)[0].Match.Headers[0].GetRangeMatch().End = 999
		}},
		{"negative range", xds.TypeRoute, "model/chat", "[-1,", func(r *translate.Resources) {
			rc(r)[0].Match.Headers[0].GetRangeMatch().Start = -1
		}},
		{"mixed generations", xds.TypeRoute, "model/chat", "leads to cluster", func(r *translate.Resources) {
			mp(r).LastGood, mp(r).Versions[1].Quarantined = "v1", true
		}},
		{"unlisted arm", xds.TypeRoute, "model/chat", "lists 0 arms", func(r *translate.Resources) { rc(r)[2].Metadata = nil }},
		{"retries", xds.TypeRoute, "model/chat", "num_retries", func(r *translate.Resources) {
			vh := r.Get(xds.TypeRoute, "model/chat").(*route.RouteConfiguration).VirtualHosts[0]
			vh.RetryPolicy = &route.RetryPolicy{NumRetries: rc(r)[2].GetRoute().GetWeightedClusters().Clusters[1].Weight}
		}},
		{"endpoint weight", xds.TypeEndpoint, v2, "weight 0", func(r *translate.Resources) {
			r.Get(xds.TypeEndpoint, v2).(*endpoint.ClusterLoadAssignment).Endpoints[0].LbEndpoints[0].LoadBalancingWeight = nil
		}},
		{"endpoint address", xds.TypeEndpoint, v2, "host", func(r *translate.Resources) {
			r.Get(xds.TypeEndpoint, v2).(*endpoint.ClusterLoadAssignment).Endpoints[0].LbEndpoints[0].HostIdentifier = nil
		}},
		{"unit", xds.TypeModelPolicy, "chat", `unit "pet"`, func(r *translate.Resources) { mp(r).Unit = "pet" }},
		{"foreign cluster", xds.TypeModelPolicy, "chat", "names cluster", func(r *translate.Resources) { mp(r).Versions[0].Cluster = v2 }},
		{"region", xds.TypeMeshPolicy, "mesh", "latitude", func(r *translate.Resources) {
			r.Get(xds.TypeMeshPolicy, "mesh").(*pb.MeshPolicy).Regions = []*pb.Region{{Name: "x", Latitude: 200}}
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			res := encode(t, load(t, "split.yaml"))
			c.breakIt(res)
			_, err := translate.Decode(res)
			var re *translate.ResourceError
			if !errors.As(err, &re) || !outrigger.IsKind(err, outrigger.Invalid) {
				t.Fatalf("got %v, want an Invalid error around a ResourceError", err)
			}
			if re.TypeURL != c.typeURL || re.Name != c.resource || !strings.Contains(re.Reason, c.reason) {
				t.Errorf("got %+v", re)
			}
		})
	}
}

func TestMissingFollowsEveryReference(t *testing.T) {
	res := encode(t, load(t, "split.yaml"))
	res.Delete(xds.TypeCluster, "model/chat/v2")
	res.Delete(xds.TypeEndpoint, "model/chat/v1")
	res.Delete(xds.TypeRoute, "model/chat")
	var got []string
	for _, r := range res.Missing() {
		got = append(got, r.String())
	}
	want := []string{
		"Cluster model/chat/v2 needed by ModelPolicy chat",
		"ClusterLoadAssignment model/chat/v1 needed by Cluster model/chat/v1",
		"RouteConfiguration model/chat needed by Listener model/chat",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q", got)
	}
	res = encode(t, load(t, "split.yaml"))
	res.Delete(xds.TypeModelPolicy, "chat")
	res.Delete(xds.TypeCluster, "model/chat/v2")
	if refs := res.Missing(); len(refs) != 2 || refs[0].ByType != xds.TypeRoute {
		t.Errorf("single and weighted routes must both count: %v", refs)
	}
}

func TestUnmarshalRefuses(t *testing.T) {
	good, err := translate.Marshal(&cluster.Cluster{Name: "model/a/b"})
	if err != nil {
		t.Fatal(err)
	}
	negative, err := translate.Marshal(&route.RouteConfiguration{Name: "r", VirtualHosts: []*route.VirtualHost{{}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, typeURL, resource, want string
		raw                           []byte
	}{
		{"unknown type", "type.googleapis.com/x.Y", "n", "unknown type", nil},
		{"broken bytes", xds.TypeCluster, "n", "not decodable", []byte{0xff}},
		{"other name", xds.TypeCluster, "n", `calls itself "model/a/b"`, good},
		{"generated rules", xds.TypeRoute, "r", "VirtualHost", negative},
	} {
		if _, err := translate.Unmarshal(c.typeURL, c.resource, c.raw); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v", c.name, err)
		}
	}
	if _, err := translate.Unmarshal(xds.TypeCluster, "model/a/b", good); err != nil {
		t.Errorf("good resource: %v", err)
	}
}

func TestModelOf(t *testing.T) {
	for _, c := range []struct{ typeURL, name, want string }{
		{xds.TypeModelPolicy, "org/m", "org/m"}, {xds.TypeListener, "model/org/m", "org/m"},
		{xds.TypeCluster, "model/org/m/v1", "org/m"}, {xds.TypeEndpoint, "model/m/v1", "m"},
		{xds.TypeCluster, "other", ""}, {xds.TypeCluster, "model/v1", ""}, {xds.TypeMeshPolicy, "mesh", ""}, {xds.TypeRoute, "x", ""},
	} {
		got, ok := translate.ModelOf(c.typeURL, c.name)
		if ok != (c.want != "") || ok && got != c.want {
			t.Errorf("ModelOf(%s, %s) = %q, %v", c.typeURL, c.name, got, ok)
		}
	}
}

// Arbitrary bytes in every resource of a set: Decode returns or refuses, never panics,
// and what it accepts can be encoded and decoded again to the same policy.
func FuzzDecode(f *testing.F) {
	for _, file := range []string{"split.yaml", "rollback.yaml", "failover.yaml", "limits.yaml"} {
		res := encode(f, load(f, file))
		raw := make([][]byte, 0, 6)
		for _, typeURL := range xds.Types() {
			b, err := translate.Marshal(res.Get(typeURL, res.Names(typeURL)[0]))
			if err != nil {
				f.Fatal(err)
			}
			raw = append(raw, b)
		}
		f.Add(raw[0], raw[1], raw[2], raw[3], raw[4], raw[5])
	}
	f.Fuzz(func(t *testing.T, c, e, l, r, mp, mesh []byte) {
		msgs := []proto.Message{&cluster.Cluster{}, &endpoint.ClusterLoadAssignment{}, &listener.Listener{}, &route.RouteConfiguration{}, &pb.ModelPolicy{}, &pb.MeshPolicy{}}
		res := &translate.Resources{}
		for i, raw := range [][]byte{c, e, l, r, mp, mesh} {
			// Unlike the client, no validation in between: Decode must stand alone.
			if proto.Unmarshal(raw, msgs[i]) == nil {
				name, _ := translate.NameOf(msgs[i])
				res.Put(xds.Types()[i], name, msgs[i])
			}
			_, _ = translate.Unmarshal(xds.Types()[i], "n", raw)
		}
		res.Missing()
		p, err := translate.Decode(res)
		if err != nil {
			return
		}
		again, err := translate.Encode(p, translate.Options{})
		if err != nil {
			t.Fatalf("accepted a policy Encode refuses: %v", err)
		}
		if back, err := translate.Decode(again); err != nil || !policy.Equal(back, p) {
			t.Fatalf("second round differs: %v", err)
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	p := load(b, "failover.yaml")
	res := encode(b, p)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := translate.Decode(res); err != nil {
			b.Fatal(err)
		}
	}
}

// To delta xDS "*" is no resource but all of them: a client that holds one of that name does
// not say so when it comes back.
func TestNothingIsNamedLikeTheWildcard(t *testing.T) {
	for _, kind := range translate.Kinds() {
		res, err := translate.EncodeFor(kind, load(t, "split.yaml"), translate.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, typeURL := range xds.Pushed() {
			if slices.Contains(res.Names(typeURL), xds.Wildcard) {
				t.Errorf("%s for %s has a resource named %q", typeURL, kind, xds.Wildcard)
			}
		}
	}
}

func TestSubjectOf(t *testing.T) {
	for _, c := range []struct{ typeURL, name, model, version string }{
		{xds.TypeModelPolicy, "org/m", "org/m", ""}, {xds.TypeListener, "model/org/m", "org/m", ""}, {xds.TypeScopedRoute, "model/org/m", "org/m", ""},
		{xds.TypeCluster, "model/org/m/v1", "org/m", "v1"}, {xds.TypeEndpoint, "model/m/v1", "m", "v1"}, {xds.TypeCluster, "failover/org/m/v1", "org/m", "v1"},
		{xds.TypeCluster, "envoy/original-dst", "", ""}, {xds.TypeListener, "envoy/egress", "", ""}, {xds.TypeScopedRoute, "envoy/passthrough", "", ""},
		{xds.TypeRuntime, xds.RuntimeName, "", ""}, {xds.TypeMeshPolicy, "mesh", "", ""},
	} {
		model, version, ok := translate.SubjectOf(c.typeURL, c.name)
		if ok != (c.model != "") || ok && (model != c.model || version != c.version) {
			t.Errorf("SubjectOf(%s, %s) = %q, %q, %v", c.typeURL, c.name, model, version, ok)
		}
	}
}
