package translate_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds/policy/policytest"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Every valid policy has a complete set for every kind of client.
func TestEveryKindIsComplete(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p := policytest.Policy().Draw(rt, "policy")
		for _, kind := range translate.Kinds() {
			res, err := translate.EncodeFor(kind, p, translate.Options{})
			if err != nil {
				rt.Fatalf("%s: %v", kind, err)
			}
			if missing := res.Missing(); len(missing) != 0 {
				rt.Fatalf("%s: dangling references: %v", kind, missing)
			}
		}
	})
}

// Every feature of the table says something about every kind of client, and a note says
// how a client that does not fully obey differs.
func TestCapabilityTableIsComplete(t *testing.T) {
	for _, f := range translate.Features() {
		for _, kind := range translate.Kinds() {
			c, ok := f.By[kind]
			if !ok || (c.Support == translate.Full) != (c.Note == "") {
				t.Errorf("%s of %s clients: %+v", f.Name, kind, c)
			}
		}
	}
}

func TestLint(t *testing.T) {
	for _, c := range []struct {
		file string
		kind translate.Kind
		want []string
	}{
		{"chaos.yaml", translate.KindSidecar, []string{"shedding", "fault injection", "access rules"}},
		{"chaos.yaml", translate.KindEnvoy, []string{"assignment by unit"}},
		{"chaos.yaml", translate.KindGRPC, []string{"assignment by unit", "concurrent requests", "ejection after consecutive failures", "retries", "fault injection", "access rules"}},
		{"rollback.yaml", translate.KindEnvoy, []string{"assignment by unit", "upstream model name"}},
		{"failover.yaml", translate.KindGRPC, []string{"upstream model name", "endpoint weights", "priorities"}},
	} {
		var got []string
		for _, p := range translate.Lint(load(t, c.file), c.kind) {
			got = append(got, p.Feature)
			if len(p.Where) == 0 || !strings.Contains(p.String(), p.Where[0]) || !strings.Contains(p.String(), p.Note) {
				t.Errorf("%q names neither where nor what", p)
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s for %s: %q, want %q", c.file, c.kind, got, c.want)
		}
	}
}

func TestBootstrap(t *testing.T) {
	o := translate.BootstrapOptions{Control: "control.example:7400", Admin: "127.0.0.1:9901",
		Node: outrigger.Node{ID: "node-a/pod-1", Region: "eu", Zone: "a", Labels: map[string]string{"team": "search"}}}
	for _, kind := range []translate.Kind{translate.KindEnvoy, translate.KindGRPC} {
		raw, err := translate.Bootstrap(kind, o)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "bootstrap/"+string(kind)+".json", raw)
		several := o
		several.Control = "control-0.example:7400, control-1.example:7400,control-2.example:7400"
		if raw, err = translate.Bootstrap(kind, several); err != nil {
			t.Fatal(err)
		}
		golden(t, "bootstrap/"+string(kind)+"-several.json", raw)
		several.TLS = &translate.ControlTLS{CA: "/certs/ca.crt"}
		if raw, err = translate.Bootstrap(kind, several); err != nil {
			t.Fatal(err)
		}
		golden(t, "bootstrap/"+string(kind)+"-several-tls.json", raw)
		mutual := o
		mutual.TLS = &translate.ControlTLS{CA: "/certs/ca.crt", Cert: "/certs/pod.crt", Key: "/certs/pod.key"}
		if kind == translate.KindEnvoy {
			mutual.TLS.ServerName = "spiffe://mesh.example/ns/*/control.v1"
		}
		if raw, err = translate.Bootstrap(kind, mutual); err != nil {
			t.Fatal(err)
		}
		golden(t, "bootstrap/"+string(kind)+"-mutual.json", raw)
	}
	for name, breakIt := range map[string]func(*translate.BootstrapOptions){
		"no id":            func(o *translate.BootstrapOptions) { o.Node.ID = "" },
		"no control plane": func(o *translate.BootstrapOptions) { o.Control = " , " },
		"one without port": func(o *translate.BootstrapOptions) { o.Control = "a:1,b" },
		"named admin":      func(o *translate.BootstrapOptions) { o.Admin = "localhost:9901" },
		"no CA":            func(o *translate.BootstrapOptions) { o.TLS = &translate.ControlTLS{Cert: "c", Key: "k"} },
		"no key":           func(o *translate.BootstrapOptions) { o.TLS = &translate.ControlTLS{CA: "ca", Cert: "c"} },
		"no certificate":   func(o *translate.BootstrapOptions) { o.TLS = &translate.ControlTLS{CA: "ca", Key: "k"} },
		"no name":          func(o *translate.BootstrapOptions) { o.TLS = &translate.ControlTLS{CA: "ca", ServerName: "spiffe://"} },
	} {
		bad := o
		breakIt(&bad)
		if _, err := translate.Bootstrap(translate.KindEnvoy, bad); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: %v, want Invalid", name, err)
		}
	}
	named := o
	named.TLS = &translate.ControlTLS{CA: "ca", ServerName: "control"}
	if _, err := translate.Bootstrap(translate.KindGRPC, named); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("gRPC with a server name: %v, want Invalid", err)
	}
	if _, err := translate.Bootstrap(translate.KindSidecar, o); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("sidecar: %v, want Invalid", err)
	}
}

// Every replica is the first of its share of the nodes, and when it goes away each of the
// others has its share of these; a node's order does not depend on how it was written.
func TestServersSpread(t *testing.T) {
	const nodes = 3000
	first, second := map[string]int{}, map[string]int{}
	for i := range nodes {
		id := fmt.Sprintf("node-%d/pod", i)
		got := translate.Servers("a:1,b:1,c:1", id)
		if again := translate.Servers(" c:1, a:1,,b:1", id); !slices.Equal(got, again) {
			t.Fatalf("%s: %q and %q", id, got, again)
		}
		first[got[0]]++
		if got[0] == "a:1" {
			second[got[1]]++
		}
	}
	for _, address := range []string{"a:1", "b:1", "c:1"} {
		if n := first[address]; n < nodes/3-150 || n > nodes/3+150 {
			t.Errorf("%s is the first of %d of %d nodes", address, n, nodes)
		}
	}
	if b, c := second["b:1"], second["c:1"]; b < 400 || c < 400 || len(second) != 2 {
		t.Errorf("with a gone, its nodes go to %v", second)
	}
}

func TestEncodeForRefuses(t *testing.T) {
	p := load(t, "split.yaml")
	if _, err := translate.EncodeFor("browser", p, translate.Options{}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("unknown kind: %v", err)
	}
	if _, err := translate.EncodeFor(translate.KindEnvoy, p, translate.Options{Envoy: translate.EnvoyOptions{Egress: "here:1"}}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("named listener: %v", err)
	}
}

// What foreign clients call themselves.
func TestNodeOfKnowsForeignClients(t *testing.T) {
	for agent, want := range map[string]string{"envoy": "envoy", "gRPC Go": "grpc", "gRPC C-core linux 45.0.0": "grpc",
		"gRPC Node Pure JS": "grpc", "grpc-java": "grpc", "other": "", "": ""} {
		if got := translate.NodeOf(&core.Node{Id: "n", UserAgentName: agent}).Kind; got != want {
			t.Errorf("%q is kind %q, want %q", agent, got, want)
		}
	}
	if got := translate.NodeOf(translate.Node(outrigger.Node{ID: "n", Kind: "sidecar"})).Kind; got != "sidecar" {
		t.Errorf("a sidecar is kind %q", got)
	}
}
