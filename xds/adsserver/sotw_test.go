package adsserver_test

import (
	"testing"
	"testing/synctest"
	"time"

	rpc "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// A gRPC client's walk: listener, routes, clusters, endpoints, each by name, each
// acknowledged; then a change of one thing sends only its type.
func TestSotwWalk(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		c := w.sotw("g")
		c.request(xds.TypeListener, nil, "model/chat")
		c.want() // nothing before the first Publish
		w.publish(chat(1, "v1", "v2"))
		c.want("Listener +model/chat")
		c.request(xds.TypeListener, nil, "model/chat")
		c.request(xds.TypeRoute, nil, "model/chat")
		c.want("RouteConfiguration +model/chat")
		c.request(xds.TypeRoute, nil, "model/chat")
		c.request(xds.TypeCluster, nil, v1)
		c.want("Cluster +" + v1)
		c.request(xds.TypeCluster, nil, v1, v2) // acknowledges and adds a name
		c.want("Cluster +" + v1 + " +" + v2)    // CDS is always the full state
		c.request(xds.TypeCluster, nil, v1, v2)
		c.request(xds.TypeEndpoint, nil, v1)
		c.want("ClusterLoadAssignment +" + v1)
		c.request(xds.TypeEndpoint, nil, v1, v2)
		c.want("ClusterLoadAssignment +" + v2) // EDS may be partial
		c.request(xds.TypeEndpoint, nil, v1, v2)
		c.want()

		w.publish(change(chat(2, "v1", "v2"), "v1", 5))
		c.want("ClusterLoadAssignment +" + v1)
		c.request(xds.TypeEndpoint, nil, v1, v2)
		w.publish(change(chat(3, "v1", "v2"), "v1", 5)) // only MeshPolicy changed
		c.want()
		if got := w.srv.Ledger()[0]; got.Acked != 3 || got.Node.ID != "g" {
			t.Errorf("ledger %+v", got)
		}
		if acked, laggards, done := w.srv.Acked(3); len(acked)+len(laggards) != 0 || !done {
			t.Error("a gRPC client must not count as a sidecar")
		}
	})
}

// A rejected response is parked until the content changes; the stock cache would resend
// it thousands of times a second.
func TestSotwNackParks(t *testing.T) {
	for _, names := range [][]string{{"*"}, {v1}} {
		bubble(t, adsserver.Options{}, func(w *world) {
			w.publish(chat(1, "v1"))
			c := w.sotw("g")
			c.request(xds.TypeCluster, nil, names...)
			c.want("Cluster +" + v1)
			// Also the very first version may be rejected.
			c.request(xds.TypeCluster, &rpc.Status{Message: "bad cluster"}, names...)
			c.want()
			if n := w.srv.Ledger()[0]; n.Nack == nil || n.Nack.Resource != v1 || n.Acked != 0 {
				t.Fatalf("ledger %+v", n)
			}
			w.publish(chat(2, "v1")) // other types change
			c.want()
			w.publish(breaker(chat(3, "v1"), "v1", 9))
			c.want("Cluster +" + v1)
			c.request(xds.TypeCluster, nil, names...)
			c.want()
			if n := w.srv.Ledger()[0]; n.Nack != nil || n.Acked != 3 {
				t.Fatalf("ledger %+v", n)
			}
		})
	}
}

// Adding a name after a rejection sends the new name, not the rejected resource.
func TestSotwNackDoesNotBlockOthers(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1", "v2"))
		c := w.sotw("g")
		c.request(xds.TypeEndpoint, nil, v1)
		c.want("ClusterLoadAssignment +" + v1)
		c.request(xds.TypeEndpoint, &rpc.Status{Message: "bad"}, v1)
		c.request(xds.TypeEndpoint, nil, v1, v2)
		c.want("ClusterLoadAssignment +" + v2)
	})
}

func TestSotwSubscriptions(t *testing.T) {
	cases := []struct {
		name    string
		typeURL string
		before  []string
		then    func(c *sotwClient)
		want    []string
	}{
		{"nonexistent cluster is answered by absence", xds.TypeCluster, nil, func(c *sotwClient) { c.request(xds.TypeCluster, nil, "gone") }, []string{"Cluster"}},
		{"nonexistent endpoints cannot be said", xds.TypeEndpoint, nil, func(c *sotwClient) { c.request(xds.TypeEndpoint, nil, "gone") }, nil},
		{"empty first request of LDS is everything", xds.TypeListener, nil, func(c *sotwClient) { c.request(xds.TypeListener, nil) }, []string{"Listener +model/chat"}},
		{"empty first request of RDS is nothing", xds.TypeRoute, nil, func(c *sotwClient) { c.request(xds.TypeRoute, nil) }, nil},
		{"explicit wildcard of a custom type", xds.TypeModelPolicy, nil, func(c *sotwClient) { c.request(xds.TypeModelPolicy, nil, "*") }, []string{"ModelPolicy +chat"}},
		{"acknowledgement is silent", xds.TypeCluster, []string{v1}, func(*sotwClient) {}, nil},
		{"the same request again is answered (Envoy re-warming)", xds.TypeEndpoint, []string{v1}, func(c *sotwClient) { c.request(xds.TypeEndpoint, nil, v1) }, []string{"ClusterLoadAssignment +" + v1}},
		{"fewer names are silent", xds.TypeCluster, []string{v1, v2}, func(c *sotwClient) { c.request(xds.TypeCluster, nil, v1) }, nil},
		{"a dropped name asked for again is sent", xds.TypeEndpoint, []string{v1, v2}, func(c *sotwClient) {
			c.request(xds.TypeEndpoint, nil, v1)
			c.request(xds.TypeEndpoint, nil, v1, v2)
		}, []string{"ClusterLoadAssignment +" + v2}},
		{"a type nobody publishes is silent", xds.TypeCluster, nil, func(c *sotwClient) {
			c.request("type.googleapis.com/envoy.service.runtime.v3.Runtime", nil, "layer")
		}, nil},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, adsserver.Options{}, func(w *world) {
				w.publish(chat(1, "v1", "v2"))
				c := w.sotw("g")
				if tc.before != nil {
					c.request(tc.typeURL, nil, tc.before...)
					c.want(short(tc.typeURL) + plus(tc.before))
					c.request(tc.typeURL, nil, tc.before...)
				}
				tc.then(c)
				c.want(tc.want...)
			})
		})
	}
}

func plus(names []string) (out string) {
	for _, n := range names {
		out += " +" + n
	}
	return out
}

// On a new stream everything subscribed is sent, even at the version the client reports:
// it may have subscribed to more since.
func TestSotwReconnectIsAnswered(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1"))
		c := w.sotw("g")
		c.request(xds.TypeCluster, nil, v1)
		c.want("Cluster +" + v1)
		again := w.sotw("g")
		again.version[xds.TypeCluster] = c.last[xds.TypeCluster].GetVersionInfo()
		again.request(xds.TypeCluster, nil, v1)
		again.want("Cluster +" + v1)
	})
}

// gRPC moves its routes before it loses the cluster: the removed cluster is still in the
// CDS answer of the push and goes with the second step.
func TestSotwRemovalWaitsForRoutes(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1", "v2"))
		c := w.sotw("g")
		c.request(xds.TypeRoute, nil, "model/chat")
		c.request(xds.TypeCluster, nil, v1, v2)
		c.want("RouteConfiguration +model/chat", "Cluster +"+v1+" +"+v2)
		c.request(xds.TypeRoute, nil, "model/chat")
		c.request(xds.TypeCluster, nil, v1, v2)

		w.publish(breaker(chat(2, "v2"), "v2", 9))
		c.want("Cluster +"+v1+" +"+v2, "RouteConfiguration +model/chat")
		c.request(xds.TypeCluster, nil, v1, v2)
		c.want()
		c.request(xds.TypeRoute, nil, "model/chat")
		c.want("Cluster +" + v2)
	})
}

// A response that a client never answers holds a newer push up for two seconds, and not for
// ever; the push counts as accepted when everything is answered after all.
func TestAnswersAreNotWaitedForForEver(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1"))
		c := w.sotw("g")
		c.request(xds.TypeListener, nil, "model/chat")
		c.want("Listener +model/chat") // and no answer to it
		listener := c.last[xds.TypeListener]
		c.request(xds.TypeEndpoint, nil, v1)
		c.want("ClusterLoadAssignment +" + v1)
		c.request(xds.TypeEndpoint, nil, v1)
		w.publish(change(chat(2, "v1"), "v1", 5))
		c.want()
		time.Sleep(1900 * time.Millisecond)
		synctest.Wait()
		c.want()
		time.Sleep(200 * time.Millisecond)
		synctest.Wait()
		c.want("ClusterLoadAssignment +" + v1)
		c.request(xds.TypeEndpoint, nil, v1)
		if got := w.srv.Ledger()[0]; got.Acked != 0 || got.Sent != 2 {
			t.Errorf("with a response unanswered: %+v", got)
		}
		// What is late is answered, and the next push is a push like any other.
		c.last[xds.TypeListener] = listener
		c.request(xds.TypeListener, nil, "model/chat")
		if got := w.srv.Ledger()[0]; got.Acked != 2 {
			t.Errorf("with everything answered: %+v", got)
		}
		w.publish(change(chat(3, "v1"), "v1", 6))
		c.want("ClusterLoadAssignment +" + v1)
		w.publish(change(chat(4, "v1"), "v1", 7))
		c.want() // waits again
		c.request(xds.TypeEndpoint, nil, v1)
		c.want("ClusterLoadAssignment +" + v1)
	})
}
