package adsserver_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// memory is what the source of a server has ever had: "chat/v1" for each version.
type memory []string

func (m memory) knows(model, version string) bool {
	for _, one := range m {
		if model == "" || one == model+"/"+version || version == "" && strings.HasPrefix(one, model+"/") {
			return true
		}
	}
	return false
}

// remember publishes p to everybody, made by a source that ever had those versions.
func (w *world) remember(p *policy.Policy, ever ...string) {
	w.t.Helper()
	w.srv.Know(memory(ever).knows)
	publishAll(w.t, w.srv, p)
}

func (w *world) held(want string) {
	w.t.Helper()
	got := ""
	for _, n := range w.srv.Held() {
		got = n.Held
	}
	if got != want {
		w.t.Fatalf("held back for %q, want %q", got, want)
	}
}

// back sends the first requests of a stream of a client that comes back with versions of
// resources of each type.
func (c *deltaClient) back(types []string, holds map[string]map[string]string) {
	c.w.t.Helper()
	for _, typeURL := range types {
		c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{xds.Wildcard}, InitialResourceVersions: holds[typeURL]})
	}
}

// chats is a set that a sidecar holds of model chat, under versions nobody has now.
func chats(versions ...string) map[string]map[string]string {
	out := map[string]map[string]string{xds.TypeListener: {"model/chat": "x"}, xds.TypeRoute: {"model/chat": "x"}, xds.TypeModelPolicy: {"chat": "x"},
		xds.TypeMeshPolicy: {xds.MeshName: "x"}, xds.TypeCluster: {}, xds.TypeEndpoint: {}}
	for _, v := range versions {
		out[xds.TypeCluster][translate.ClusterName("chat", v)] = "x"
		out[xds.TypeEndpoint][translate.ClusterName("chat", v)] = "x"
	}
	return out
}

func empty(position uint64) *policy.Policy { return &policy.Policy{Position: position} }

// The control plane lost its disk. A sidecar that comes back with a model keeps it, however
// long that takes and whatever else is published; it is told the rest once every version
// it holds has been registered again. One that never had anything is answered at once.
func TestLostDiskTakesNothingAway(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		c := w.delta(w.conn, "n")
		c.back(xds.Types(), chats("v1", "v2"))
		c.want() // nothing is published yet
		w.remember(empty(1))
		c.want()
		w.held("Cluster " + v1)
		fresh := w.delta(w.conn, "new")
		fresh.follow()
		fresh.want("Cluster", "ClusterLoadAssignment", "Listener", "RouteConfiguration", "ModelPolicy", "MeshPolicy +mesh")

		w.remember(empty(2))
		c.want()
		w.remember(chat(3, "v1"), "chat/v1")
		c.want()
		w.held("Cluster " + v2)
		w.remember(chat(4, "v1"), "chat/v1", "chat/v2") // v2 came back, and was taken out again
		c.want("Cluster +"+v1+" -"+v2, "ClusterLoadAssignment +"+v1+" -"+v2, "Listener +model/chat", "RouteConfiguration +model/chat",
			"ModelPolicy +chat", "MeshPolicy +mesh")
		w.held("")
		c.ackAll()
		for _, n := range w.srv.Ledger() {
			if n.Node.ID == "n" && (n.Acked != 4 || n.Held != "") {
				t.Errorf("%+v", n)
			}
		}
	})
}

// What the source did have is removed, as it says, from clients that come back.
func TestRemovedStaysRemoved(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.remember(empty(9), "chat/v1")
		c := w.delta(w.conn, "n")
		c.back([]string{xds.TypeCluster}, chats("v1"))
		c.want("Cluster -" + v1)
		w.held("")
	})
}

// An operator who says that the source is right is obeyed: by the next push.
func TestForgettingOnPurpose(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.remember(empty(1))
		c := w.delta(w.conn, "n")
		c.back([]string{xds.TypeCluster}, chats("v1"))
		c.want()
		w.held("Cluster " + v1)
		w.srv.Know(nil)
		publishAll(t, w.srv, empty(2))
		c.want("Cluster -" + v1)
		w.held("")
	})
}

// A client comes back with the very bytes that are published, although the source has no
// record of them: nothing can be lost by going on.
func TestSameContentIsNoStranger(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.remember(chat(1, "v1"))
		first := w.delta(w.conn, "a")
		first.subscribe(xds.TypeCluster, xds.Wildcard)
		first.want("Cluster +" + v1)
		c := w.delta(w.conn, "b")
		c.back([]string{xds.TypeCluster}, map[string]map[string]string{xds.TypeCluster: {v1: first.vers[xds.TypeCluster+" "+v1]}})
		c.want("Cluster") // in sync, and told so
		w.held("")
	})
}

// An Envoy asks for its runtime first. It holds what every Envoy does, which a log without
// a single model cannot have given it.
func TestLostDiskBeforeAnEnvoy(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.remember(empty(1))
		c := w.delta(w.conn, "e")
		c.node = &core.Node{Id: "e", UserAgentName: "envoy"}
		c.back([]string{xds.TypeRuntime}, map[string]map[string]string{xds.TypeRuntime: {xds.RuntimeName: "x"}})
		c.want()
		w.held("Runtime " + xds.RuntimeName)
		c.back([]string{xds.TypeCluster}, map[string]map[string]string{xds.TypeCluster: {"envoy/original-dst": "x", "failover/chat/v1": "x", v1: "x"}})
		c.want()

		// Another model is not it; and neither is an acquaintance of the first type.
		other := chat(2, "v1")
		other.Models[0].Name = "other"
		w.remember(other, "other/v1")
		c.want()
		w.held("Cluster failover/chat/v1")
		both := chat(3, "v1")
		both.Models = append(both.Models, other.Models...)
		w.remember(both, "other/v1", "chat/v1")
		c.want("Runtime +"+xds.RuntimeName+" +"+xds.LeaseName, "Cluster +envoy/original-dst +model/chat/v1 +model/other/v1")
		w.held("")
		c.ack(xds.TypeRuntime)
		c.ack(xds.TypeCluster)
		time.Sleep(3 * time.Second) // it asks for no routes
		synctest.Wait()
		c.want("Cluster -failover/chat/v1")
	})
}

// A gRPC client comes back: to the version of a type it had, and the names it follows.
func TestLostDiskBeforeGRPC(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.remember(empty(1))
		c := w.sotw("g")
		c.node.UserAgentName = "gRPC Go"
		for _, typeURL := range []string{xds.TypeListener, xds.TypeRoute, xds.TypeCluster, xds.TypeEndpoint} {
			c.version[typeURL] = "x"
		}
		c.request(xds.TypeListener, nil, "model/chat") // an answer would say that there is none
		c.request(xds.TypeRoute, nil, "model/chat")
		c.request(xds.TypeCluster, nil, v1)
		c.request(xds.TypeEndpoint, nil, v1)
		c.want()
		w.held("Cluster " + v1)
		w.remember(chat(2, "v1"), "chat/v1")
		c.want("Cluster +"+v1, "ClusterLoadAssignment +"+v1, "Listener +model/chat", "RouteConfiguration +model/chat")
		w.held("")
	})
}

// A listener is what an application names, perhaps wrongly. That one is unknown here holds
// nobody's configuration back: the client's other clusters are what it shows by.
func TestUnknownListenerIsNoStranger(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.remember(chat(1, "v1"), "chat/v1")
		c := w.sotw("g")
		c.node.UserAgentName = "gRPC Go"
		c.version[xds.TypeListener], c.version[xds.TypeCluster] = "x", "x"
		c.request(xds.TypeListener, nil, "model/chat", "model/chta")
		c.want() // whether the second one was ever there shows by the clusters
		c.request(xds.TypeCluster, nil, v1)
		c.want("Cluster +"+v1, "Listener +model/chat")
		w.held("")

		// Started anew it holds nothing.
		c = w.sotw("h")
		c.node.UserAgentName = "gRPC Go"
		c.request(xds.TypeListener, nil, "model/chta")
		c.want("Listener")
	})
}

// The chosen nodes of a canary of configuration are no exception.
func TestStagedSetsTakeNothingAway(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.remember(chat(1, "v1"), "chat/v1")
		if err := w.srv.Stage(adsserver.DefaultGroup, resources(t, chat(2, "v1")), 2, func(outrigger.Node) bool { return true }); err != nil {
			t.Fatal(err)
		}
		c := w.delta(w.conn, "n")
		c.back([]string{xds.TypeCluster}, chats("v1", "v9"))
		c.want()
		w.held("Cluster model/chat/v9")
	})
}
