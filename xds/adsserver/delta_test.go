package adsserver_test

import (
	"testing"
	"testing/synctest"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// change gives version v another endpoint weight: its load assignment changes, nothing else.
func change(p *policy.Policy, version string, weight uint32) *policy.Policy {
	p.Models[0].Version(version).Endpoints[0].Weight = weight
	return p
}

// breaker changes the cluster of a version and nothing else.
func breaker(p *policy.Policy, version string, max uint32) *policy.Policy {
	p.Models[0].Version(version).MaxRequests = max
	return p
}

const (
	v1 = "model/chat/v1"
	v2 = "model/chat/v2"
)

// A sidecar's life: everything at first, then only what changed, in push order with
// MeshPolicy last, then nothing for a publish that changes nothing.
func TestDeltaSendsDifferencesInOrder(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1", "v2"))
		c := w.delta(w.conn, "a")
		c.follow()
		c.want("Cluster +"+v1+" +"+v2, "ClusterLoadAssignment +"+v1+" +"+v2, "Listener +model/chat",
			"RouteConfiguration +model/chat", "ModelPolicy +chat", "MeshPolicy +mesh")
		c.ackAll()
		c.want()

		w.publish(change(breaker(chat(2, "v1", "v2"), "v2", 9), "v1", 5))
		c.want("Cluster +"+v2, "ClusterLoadAssignment +"+v1, "MeshPolicy +mesh")
		c.ack(xds.TypeCluster)
		c.ack(xds.TypeEndpoint)
		c.ack(xds.TypeMeshPolicy)

		w.publish(change(breaker(chat(2, "v1", "v2"), "v2", 9), "v1", 5))
		c.want()
	})
}

// One push at a time, the newest next: three positions published while the first is
// unanswered become one push.
func TestDeltaLatestWins(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1"))
		c := w.delta(w.conn, "a")
		c.follow()
		c.read()
		for p := uint64(2); p <= 4; p++ {
			w.publish(change(chat(p, "v1"), "v1", uint32(p)))
		}
		c.want() // the first push is not acknowledged yet
		c.ackAll()
		c.want("ClusterLoadAssignment +"+v1, "MeshPolicy +mesh")
		c.ack(xds.TypeEndpoint)
		c.want() // half an answer starts nothing
		c.ack(xds.TypeMeshPolicy)
		c.want()
		if got := w.srv.Ledger()[0]; got.Acked != 4 || got.Sent != 4 {
			t.Errorf("ledger says sent %d acked %d, want 4 and 4", got.Sent, got.Acked)
		}
	})
}

func TestDeltaWaitsForTheFirstPublish(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		c := w.delta(w.conn, "a")
		c.subscribe(xds.TypeCluster, xds.Wildcard)
		c.subscribe(xds.TypeEndpoint, v1, "nowhere")
		c.want() // never an empty configuration
		w.publish(chat(1, "v1"))
		c.want("Cluster +"+v1, "ClusterLoadAssignment +"+v1+" -nowhere")
	})
}

// The subscription rules of the protocol, one table row each: what is subscribed and
// acknowledged first, what is then sent, what must come back.
func TestDeltaSubscriptions(t *testing.T) {
	const cds = xds.TypeCluster
	cases := []struct {
		name   string
		before []string // subscribed and acknowledged
		then   func(c *deltaClient)
		want   []string
	}{
		{"nonexistent name is removed at once", nil, func(c *deltaClient) { c.subscribe(cds, "gone") }, []string{"Cluster -gone"}},
		{"held name subscribed again is sent again", []string{v1}, func(c *deltaClient) { c.subscribe(cds, v1) }, []string{"Cluster +" + v1}},
		{"held name under a wildcard is sent again", []string{"*"}, func(c *deltaClient) { c.subscribe(cds, v2) }, []string{"Cluster +" + v2}},
		{"another name sends only that", []string{v1}, func(c *deltaClient) { c.subscribe(cds, v2) }, []string{"Cluster +" + v2}},
		{"unsubscribe is silent", []string{v1, v2}, func(c *deltaClient) { c.unsubscribe(cds, v2) }, nil},
		{"subscribe after unsubscribe is sent", []string{v1}, func(c *deltaClient) {
			c.unsubscribe(cds, v1)
			c.subscribe(cds, v1)
		}, []string{"Cluster +" + v1}},
		{"unsubscribe under a wildcard says what the name is now", []string{"*", v1}, func(c *deltaClient) { c.unsubscribe(cds, v1) }, []string{"Cluster +" + v1}},
		{"wildcard later sends the rest", []string{v1}, func(c *deltaClient) { c.subscribe(cds, "*") }, []string{"Cluster +" + v2}},
		{"empty first request of CDS means everything", nil, func(c *deltaClient) { c.subscribe(cds) }, []string{"Cluster +" + v1 + " +" + v2}},
		{"empty first request of EDS means nothing", nil, func(c *deltaClient) { c.subscribe(xds.TypeEndpoint) }, nil},
		{"a type nobody publishes", nil, func(c *deltaClient) { c.subscribe("type.googleapis.com/envoy.service.runtime.v3.Runtime", "layer") }, []string{"Runtime -layer"}},
		{"a stale nonce still changes the subscription", []string{v1}, func(c *deltaClient) {
			c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: cds, ResponseNonce: "stale", ResourceNamesSubscribe: []string{v2}})
		}, []string{"Cluster +" + v2}},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, adsserver.Options{}, func(w *world) {
				w.publish(chat(1, "v1", "v2"))
				c := w.delta(w.conn, "a")
				if tc.before != nil {
					c.subscribe(cds, tc.before...)
					c.read()
					c.ack(cds)
				}
				tc.then(c)
				c.want(tc.want...)
			})
		})
	}
}

// After unsubscribing, changes of the name are silent; those of the others are not.
func TestDeltaUnsubscribedNameStaysSilent(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1", "v2"))
		c := w.delta(w.conn, "a")
		c.subscribe(xds.TypeCluster, v1, v2)
		c.want("Cluster +" + v1 + " +" + v2)
		c.ack(xds.TypeCluster)
		c.unsubscribe(xds.TypeCluster, v2)
		w.publish(breaker(chat(2, "v1", "v2"), "v2", 7))
		c.want()
		w.publish(breaker(breaker(chat(3, "v1", "v2"), "v2", 8), "v1", 7))
		c.want("Cluster +" + v1)
	})
}

// A client that reconnects reports what it holds: only the difference is sent, and what
// has gone meanwhile is removed.
func TestDeltaReconnectSendsTheDifference(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1", "v2"))
		c := w.delta(w.conn, "a")
		c.subscribe(xds.TypeCluster, xds.Wildcard)
		c.read()
		c.ack(xds.TypeCluster)
		held := map[string]string{v1: c.vers[xds.TypeCluster+" "+v1], v2: "stale", "gone": "x"}
		c.hangUp()
		synctest.Wait()

		again := w.delta(w.conn, "a")
		again.send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeCluster, ResourceNamesSubscribe: []string{"*"}, InitialResourceVersions: held})
		again.want("Cluster +" + v2 + " -gone")

		named := w.delta(w.conn, "b")
		named.send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeCluster, ResourceNamesSubscribe: []string{v1, v2}, InitialResourceVersions: held})
		named.want("Cluster +" + v2)
	})
}

// Another process with the same content has the same versions: a reconnecting client is
// sent empty answers (so that it knows it is current) and no resource.
func TestDeltaRestartWithSameContentSendsNothing(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1", "v2"))
		c := w.delta(w.conn, "a")
		c.follow()
		c.read()

		second := adsserver.New(adsserver.Options{})
		if err := second.Publish(adsserver.DefaultGroup, resources(t, chat(1, "v1", "v2")), 1); err != nil {
			t.Fatal(err)
		}
		d := w.delta(w.serve(second), "a")
		for _, typeURL := range xds.Types() {
			held := map[string]string{}
			for key, version := range c.vers {
				if name, ok := cutType(key, typeURL); ok {
					held[name] = version
				}
			}
			d.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{"*"}, InitialResourceVersions: held})
		}
		d.want("Cluster", "ClusterLoadAssignment", "Listener", "RouteConfiguration", "ModelPolicy", "MeshPolicy")
		d.ackAll()
		if acked, _, done := second.Acked(1); !done || len(acked) != 1 {
			t.Errorf("position not accepted: %v %v", acked, done)
		}
	})
}

func cutType(key, typeURL string) (string, bool) {
	if len(key) > len(typeURL) && key[:len(typeURL)+1] == typeURL+" " {
		return key[len(typeURL)+1:], true
	}
	return "", false
}

// NACK transcript. A rejected response is not repeated; an unrelated change is sent
// alone; when one resource of the rejected response changes, all of it is sent again,
// and accepting it clears the rejection.
func TestDeltaNack(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1", "v2", "v3"))
		c := w.delta(w.conn, "a")
		c.follow()
		c.read()
		c.ackAll()

		// Position 2 changes v1 and v2; the client dislikes v2.
		w.publish(breaker(breaker(chat(2, "v1", "v2", "v3"), "v1", 7), "v2", 7))
		c.want("Cluster +"+v1+" +"+v2, "MeshPolicy +mesh")
		c.nack(xds.TypeCluster, "Cluster model/chat/v2: too narrow")
		c.ack(xds.TypeMeshPolicy)
		c.want() // exactly one rejection, no resend
		n := w.srv.Ledger()[0]
		if n.Acked != 1 || n.Nack == nil || n.Nack.Resource != v2 || n.Nack.Type != xds.TypeCluster {
			t.Fatalf("ledger %+v, nack %+v", n, n.Nack)
		}
		if _, laggards, done := w.srv.Acked(2); done || len(laggards) != 1 {
			t.Fatal("a rejected position must not be done")
		}

		// Position 3 changes v3 only: v3 is sent alone and accepted, the rejection stands.
		w.publish(breaker(breaker(breaker(chat(3, "v1", "v2", "v3"), "v1", 7), "v2", 7), "v3", 7))
		c.want("Cluster +model/chat/v3", "MeshPolicy +mesh")
		c.ack(xds.TypeCluster)
		c.ack(xds.TypeMeshPolicy)
		c.want()
		if n := w.srv.Ledger()[0]; n.Acked != 1 || n.Sent != 3 || n.Nack == nil {
			t.Fatalf("ledger %+v, nack %+v", n, n.Nack)
		}

		// Position 4 repairs v2: the whole rejected response comes again and is accepted.
		w.publish(breaker(breaker(breaker(chat(4, "v1", "v2", "v3"), "v1", 7), "v2", 8), "v3", 7))
		c.want("Cluster +"+v1+" +"+v2, "MeshPolicy +mesh")
		c.ack(xds.TypeCluster)
		c.ack(xds.TypeMeshPolicy)
		c.want()
		if n := w.srv.Ledger()[0]; n.Acked != 4 || n.Nack != nil {
			t.Fatalf("ledger %+v, nack %+v", n, n.Nack)
		}
	})
}

// The siblings of a rejected resource come again with its repair, for clients that
// threw the whole response away.
func TestDeltaNackResendsSiblingsWithTheRepair(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1", "v2"))
		c := w.delta(w.conn, "a")
		c.subscribe(xds.TypeCluster, xds.Wildcard)
		c.read()
		c.ack(xds.TypeCluster)
		w.publish(breaker(breaker(chat(2, "v1", "v2"), "v1", 7), "v2", 7))
		c.want("Cluster +" + v1 + " +" + v2)
		c.nack(xds.TypeCluster, "v2 is bad")
		w.publish(breaker(breaker(chat(3, "v1", "v2"), "v1", 7), "v2", 8))
		c.want("Cluster +" + v1 + " +" + v2)
		c.ack(xds.TypeCluster)
		w.publish(breaker(breaker(chat(4, "v1", "v2"), "v1", 7), "v2", 9))
		c.want("Cluster +" + v2)
	})
}

// A rejected first response does not loop either, and an explicit subscription gets the
// rejected resource again without clearing the rejection.
func TestDeltaNackOfTheFirstResponse(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1"))
		c := w.delta(w.conn, "a")
		c.subscribe(xds.TypeCluster, xds.Wildcard)
		c.want("Cluster +" + v1)
		c.nack(xds.TypeCluster, "no")
		c.want()
		c.subscribe(xds.TypeCluster, v1)
		c.want("Cluster +" + v1)
		c.ack(xds.TypeCluster)
		if n := w.srv.Ledger()[0]; n.Nack == nil || n.Nack.Resource != v1 {
			t.Errorf("an ACK of the same content cleared the rejection: %+v", n.Nack)
		}
	})
}

// Removed clusters stay until the routes without them are accepted, then go.
func TestDeltaRemovalWaitsForRoutes(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1", "v2"))
		a, b := w.delta(w.conn, "a"), w.delta(w.conn, "b")
		for _, c := range []*deltaClient{a, b} {
			c.follow()
			c.read()
			c.ackAll()
		}
		w.publish(chat(2, "v2"))
		for _, c := range []*deltaClient{a, b} {
			c.want("ClusterLoadAssignment +"+v2, "RouteConfiguration +model/chat", "ModelPolicy +chat", "MeshPolicy +mesh")
		}
		a.ackAll()
		a.want() // b's routes may still lead to v1
		b.ackAll()
		for _, c := range []*deltaClient{a, b} {
			c.want("Cluster -"+v1, "ClusterLoadAssignment -"+v1, "MeshPolicy +mesh")
			c.ackAll()
			c.want()
		}
		if _, _, done := w.srv.Acked(2); !done {
			t.Error("position 2 not done")
		}
	})
}

// A stream that ends owes nothing any more, even if it never got as far as the push.
func TestDeltaRemovalDoesNotWaitForTheDead(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1", "v2"))
		a, b := w.delta(w.conn, "a"), w.delta(w.conn, "b")
		for _, c := range []*deltaClient{a, b} {
			c.follow()
			c.read()
		}
		a.ackAll() // b never answers anything
		w.publish(chat(2, "v2"))
		a.read()
		a.ackAll()
		a.want()
		b.hangUp()
		a.want("Cluster -"+v1, "ClusterLoadAssignment -"+v1, "MeshPolicy +mesh")
	})
}
