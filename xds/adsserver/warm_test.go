package adsserver_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// together is one group for clients of all kinds.
var together = adsserver.Options{Group: func(outrigger.Node) string { return adsserver.DefaultGroup }}

// asEnvoy follows as an Envoy does: clusters and listeners all, the rest by name.
func asEnvoy(w *world) *deltaClient {
	c := w.delta(w.conn, "e")
	c.node = translate.Node(outrigger.Node{ID: "e", Kind: string(translate.KindEnvoy)})
	c.subscribe(xds.TypeCluster, xds.Wildcard)
	c.want("Cluster +" + v1)
	c.ack(xds.TypeCluster)
	c.subscribe(xds.TypeEndpoint, v1)
	c.want("ClusterLoadAssignment +" + v1)
	c.ack(xds.TypeEndpoint)
	c.subscribe(xds.TypeListener, xds.Wildcard)
	c.want("Listener +model/chat")
	c.ack(xds.TypeListener)
	c.subscribe(xds.TypeRoute, "model/chat")
	c.want("RouteConfiguration +model/chat")
	c.ack(xds.TypeRoute)
	c.want()
	return c
}

// moved is chat with everything on v2, where it was on v1, which stays.
func moved(p uint64) *policy.Policy {
	out := chat(p, "v1", "v2")
	out.Models[0].Arms[0].Version = "v2"
	return out
}

// Routes to a cluster that is new to an Envoy follow its endpoints, however the Envoy mixes
// its subscription and its acknowledgements.
func TestEnvoyGetsRoutesAfterNewClustersAreWarm(t *testing.T) {
	for _, ackFirst := range []bool{true, false} {
		bubble(t, together, func(w *world) {
			w.publish(chat(1, "v1"))
			c := asEnvoy(w)
			w.publish(moved(2))
			c.want("Cluster +" + v2)
			if ackFirst {
				c.ack(xds.TypeCluster)
				c.want()
			}
			if n := w.srv.Ledger()[0].Acked; n != 1 {
				t.Errorf("position %d is acknowledged without the routes", n)
			}
			c.subscribe(xds.TypeEndpoint, v2)
			c.want("ClusterLoadAssignment +" + v2)
			if !ackFirst {
				c.ack(xds.TypeCluster)
				c.want()
			}
			c.ack(xds.TypeEndpoint)
			c.want("RouteConfiguration +model/chat")
			c.ack(xds.TypeRoute)
			c.want()
			if n := w.srv.Ledger()[0].Acked; n != 2 {
				t.Errorf("position %d is acknowledged at the end", n)
			}
			w.publish(change(moved(3), "v2", 7)) // nothing new: at once
			c.want("ClusterLoadAssignment +" + v2)
			c.ack(xds.TypeEndpoint)
			w.publish(chat(4, "v1", "v2"))
			c.want("ClusterLoadAssignment +"+v2, "RouteConfiguration +model/chat")
		})
	}
}

// An Envoy that does not ask for a new cluster's endpoints, or rejects the cluster, has the
// routes after two seconds all the same, and a stream that ends meanwhile leaves nothing.
func TestEnvoyIsNotWaitedForForEver(t *testing.T) {
	bubble(t, together, func(w *world) {
		w.publish(chat(1, "v1"))
		c := asEnvoy(w)
		w.publish(moved(2))
		c.want("Cluster +" + v2)
		c.ack(xds.TypeCluster)
		time.Sleep(1900 * time.Millisecond)
		synctest.Wait()
		c.want()
		time.Sleep(200 * time.Millisecond)
		synctest.Wait()
		c.want("RouteConfiguration +model/chat")
		c.ack(xds.TypeRoute)
		if n := w.srv.Ledger()[0].Acked; n != 2 {
			t.Errorf("position %d is acknowledged at the end", n)
		}
	})
	bubble(t, together, func(w *world) {
		w.publish(chat(1, "v1"))
		c := asEnvoy(w)
		w.publish(moved(2))
		c.want("Cluster +" + v2)
		c.hangUp()
	})
}

// Sidecars put a push in force as a whole: they get it in one breath.
func TestSidecarGetsAPushInOneBreath(t *testing.T) {
	bubble(t, together, func(w *world) {
		w.publish(chat(1, "v1"))
		c := w.delta(w.conn, "a")
		c.follow()
		c.read()
		c.ackAll()
		w.publish(moved(2))
		c.want("Cluster +"+v2, "ClusterLoadAssignment +"+v2, "RouteConfiguration +model/chat", "ModelPolicy +chat", "MeshPolicy +mesh")
	})
}
