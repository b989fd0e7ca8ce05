package adsserver_test

import (
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// back is the Envoy c after it was away: it says what it has and asks for clusters first.
func back(w *world, c *deltaClient) *deltaClient {
	c.hangUp()
	synctest.Wait()
	w.publish(chat(2, "v2")) // v1 is gone, and nobody who is connected needs it
	d := w.delta(w.conn, "e")
	d.node = translate.Node(outrigger.Node{ID: "e", Kind: string(translate.KindEnvoy)})
	d.vers = c.vers
	d.resume(xds.TypeCluster, xds.Wildcard, v1)
	d.want("Cluster +" + v2)
	d.ack(xds.TypeCluster)
	d.resume(xds.TypeEndpoint, v1, v1)
	d.want("ClusterLoadAssignment")
	d.ack(xds.TypeEndpoint)
	return d
}

// resume subscribes to a name and reports one that is held.
func (c *deltaClient) resume(typeURL, name, held string) {
	c.w.t.Helper()
	c.send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{name},
		InitialResourceVersions: map[string]string{held: c.vers[typeURL+" "+held]}})
}

// An Envoy that comes back hears of the removal of clusters when it has acknowledged the routes
// that do without them.
func TestEnvoyComesBackAndKeepsClustersForItsRoutes(t *testing.T) {
	bubble(t, together, func(w *world) {
		w.publish(chat(1, "v1"))
		d := back(w, asEnvoy(w))
		d.resume(xds.TypeListener, xds.Wildcard, "model/chat")
		d.want("Listener")
		d.ack(xds.TypeListener)
		d.want()
		d.resume(xds.TypeRoute, "model/chat", "model/chat")
		d.want("RouteConfiguration +model/chat")
		if n := w.srv.Ledger()[0].Acked; n == 2 {
			t.Error("the position is acknowledged without the routes")
		}
		d.ack(xds.TypeRoute)
		d.want("Cluster -"+v1, "ClusterLoadAssignment -"+v1)
		d.ack(xds.TypeCluster)
		d.ack(xds.TypeEndpoint)
		d.want()
		if n := w.srv.Ledger()[0].Acked; n != 2 {
			t.Errorf("position %d is acknowledged at the end, want 2", n)
		}
	})
}

// One that does not ask for routes hears of it two seconds later, and what is back by then is
// sent instead.
func TestEnvoyWithoutRoutesHearsOfRemovalsInTime(t *testing.T) {
	for _, returned := range []bool{false, true} {
		bubble(t, together, func(w *world) {
			w.publish(chat(1, "v1"))
			d := back(w, asEnvoy(w))
			time.Sleep(1900 * time.Millisecond)
			d.want()
			if returned {
				w.publish(chat(3, "v2", "v1"))
				d.read() // it is new to this stream, and so comes with the push
				d.ack(xds.TypeCluster)
				d.ack(xds.TypeEndpoint)
			}
			time.Sleep(200 * time.Millisecond)
			if got := d.read(); !returned && len(got) != 2 {
				t.Errorf("got %q, want the removals", got)
			} else if returned && len(got) != 2 {
				t.Errorf("got %q, want both again", got)
			}
			d.ack(xds.TypeCluster)
			d.ack(xds.TypeEndpoint)
			time.Sleep(time.Minute)
			d.want()
		})
	}
	bubble(t, together, func(w *world) { // and one that goes leaves nothing
		w.publish(chat(1, "v1"))
		back(w, asEnvoy(w)).hangUp()
	})
}
