package adsserver_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// What Publish refuses, what the error says, and that force overrides it.
func TestPublishRefusals(t *testing.T) {
	cases := []struct {
		name, want string
		res        func() *translate.Resources
		position   uint64
	}{
		{"empty set", "no mesh resource", func() *translate.Resources { return &translate.Resources{} }, 9},
		{"referenced cluster removed", "Cluster model/chat/v1 needed by", func() *translate.Resources {
			res := resources(t, chat(9, "v1"))
			res.Delete(xds.TypeCluster, v1)
			return res
		}, 9},
		{"all models removed", "removes all 1 models", func() *translate.Resources {
			p := chat(9, "v1")
			p.Models = nil
			return resources(t, p)
		}, 9},
		{"position goes back", "below the published 5", func() *translate.Resources { return resources(t, chat(4, "v1")) }, 4},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			srv := adsserver.New(adsserver.Options{})
			if err := srv.Publish("g", resources(t, chat(5, "v1")), 5); err != nil {
				t.Fatal(err)
			}
			err := srv.Publish("g", tc.res(), tc.position)
			if !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want Invalid with %q", err, tc.want)
			}
			if err := srv.PublishForced("g", tc.res(), tc.position); err != nil {
				t.Fatalf("forced: %v", err)
			}
		})
	}
}

// An empty mesh is a valid start: no model yet, nothing to break.
func TestPublishWithoutModelsAtStart(t *testing.T) {
	p := chat(1, "v1")
	p.Models = nil
	if err := adsserver.New(adsserver.Options{}).Publish("g", resources(t, p), 1); err != nil {
		t.Fatal(err)
	}
}

// The overlay of an emergency changes content without a new position. MeshPolicy still
// closes the push, so sidecars know the set is complete.
func TestPublishSamePositionOtherContent(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1"))
		c := w.delta(w.conn, "a")
		c.follow()
		c.read()
		c.ackAll()
		w.publish(breaker(chat(1, "v1"), "v1", 3))
		c.want("Cluster +"+v1, "MeshPolicy +mesh")
	})
}

// Which streams are ended, and with which code.
func TestStreamsEndedWithReason(t *testing.T) {
	names := make([]string, 20_001)
	for i := range names {
		names[i] = fmt.Sprint(i)
	}
	cases := []struct {
		name, want string
		code       codes.Code
		opt        adsserver.Options
		send       func(c *deltaClient)
	}{
		{"no node id", "node.id", codes.InvalidArgument, adsserver.Options{}, func(c *deltaClient) {
			c.node = &core.Node{}
			c.subscribe(xds.TypeCluster, "*")
		}},
		{"not authorised", "not you", codes.PermissionDenied, adsserver.Options{Authorise: func(_ context.Context, n *core.Node) error {
			return outrigger.Errorf(outrigger.Denied, "not you, %s", n.GetId())
		}}, func(c *deltaClient) { c.subscribe(xds.TypeCluster, "*") }},
		{"no type", "type_url", codes.InvalidArgument, adsserver.Options{}, func(c *deltaClient) { c.subscribe("", "*") }},
		{"too many types", "64 resource types", codes.ResourceExhausted, adsserver.Options{}, func(c *deltaClient) {
			for i := range 65 {
				c.subscribe(fmt.Sprintf("type.googleapis.com/x.T%d", i), "a")
			}
		}},
		{"too many names", "20001 names", codes.ResourceExhausted, adsserver.Options{}, func(c *deltaClient) { c.subscribe(xds.TypeCluster, names...) }},
		{"never acknowledges", "unanswered", codes.ResourceExhausted, adsserver.Options{}, func(c *deltaClient) {
			for range 65 {
				c.subscribe(xds.TypeCluster, v1)
			}
		}},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, tc.opt, func(w *world) {
				w.publish(chat(1, "v1"))
				c := w.delta(w.conn, "a")
				tc.send(c)
				err := <-c.ended
				if status.Code(err) != tc.code || !strings.Contains(err.Error(), tc.want) {
					t.Fatalf("got %v, want %v with %q", err, tc.code, tc.want)
				}
			})
		})
	}
}

func TestMaxStreams(t *testing.T) {
	bubble(t, adsserver.Options{MaxStreams: 1}, func(w *world) {
		w.publish(chat(1, "v1"))
		a := w.delta(w.conn, "a")
		a.follow()
		b := w.delta(w.conn, "b")
		if err := <-b.ended; status.Code(err) != codes.ResourceExhausted {
			t.Fatalf("got %v", err)
		}
		a.hangUp()
		synctest.Wait()
		c := w.delta(w.conn, "c")
		c.follow()
		if got := c.read(); len(got) != 6 {
			t.Fatalf("the freed place was not given: %q", got)
		}
	})
}

// Groups get their own configuration.
func TestGroups(t *testing.T) {
	opt := adsserver.Options{Group: func(n outrigger.Node) string { return n.ID[:1] }}
	bubble(t, opt, func(w *world) {
		for group, version := range map[string]string{"a": "v1", "b": "v2"} {
			if err := w.srv.Publish(group, resources(t, chat(1, version)), 1); err != nil {
				t.Fatal(err)
			}
		}
		for id, version := range map[string]string{"a-1": "v1", "b-1": "v2"} {
			c := w.delta(w.conn, id)
			c.subscribe(xds.TypeCluster, "*")
			c.want("Cluster +model/chat/" + version)
		}
	})
}

// The ledger over a sidecar's life: connected and lagging, accepted, disconnected but
// counting, isolated and no longer counting, back and unproven.
func TestLedgerLife(t *testing.T) {
	bubble(t, adsserver.Options{Isolation: 15 * time.Second}, func(w *world) {
		w.publish(chat(1, "v1"))
		wantAcked := func(p uint64, acked, laggards int) {
			t.Helper()
			a, l, done := w.srv.Acked(p)
			if len(a) != acked || len(l) != laggards || done != (laggards == 0) {
				t.Fatalf("acked %v, laggards %v, done %v; want %d and %d", a, l, done, acked, laggards)
			}
		}
		wantAcked(1, 0, 0)
		c := w.delta(w.conn, "a")
		c.follow()
		wantAcked(1, 0, 1)
		c.read()
		changed := w.srv.Changed()
		for _, typeURL := range xds.Types()[:5] {
			c.ack(typeURL)
		}
		wantAcked(1, 0, 1) // all but MeshPolicy
		select {
		case <-changed:
			t.Fatal("nothing has changed yet")
		default:
		}
		c.ack(xds.TypeMeshPolicy)
		<-changed
		wantAcked(1, 1, 0)

		c.hangUp()
		synctest.Wait()
		w.publish(change(chat(2, "v1"), "v1", 2))
		wantAcked(2, 0, 1) // gone a moment ago: may still act on the old policy
		time.Sleep(15*time.Second - time.Nanosecond)
		wantAcked(2, 0, 1)
		time.Sleep(time.Nanosecond)
		wantAcked(2, 0, 0) // isolated: its own lease has run out
		if n := w.srv.Ledger(); len(n) != 1 || n[0].Connected || n[0].Acked != 1 {
			t.Fatalf("ledger %+v", n)
		}
		d := w.delta(w.conn, "a")
		d.follow()
		wantAcked(1, 0, 1) // back, and must prove even the old position
	})
}

// A newer stream of a node takes its line over; the end of the older one says nothing.
func TestLedgerNewestStreamOwnsTheLine(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1"))
		old := w.delta(w.conn, "a")
		old.follow()
		fresh := w.delta(w.conn, "a")
		fresh.follow()
		fresh.read()
		fresh.ackAll()
		old.hangUp()
		synctest.Wait()
		if n := w.srv.Ledger(); len(n) != 1 || !n[0].Connected || n[0].Acked != 1 {
			t.Fatalf("ledger %+v", n)
		}
	})
}

// A client's text is bounded before it is kept.
func TestNackTextIsBounded(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1"))
		c := w.delta(w.conn, "a")
		c.subscribe(xds.TypeCluster, "*")
		c.read()
		c.nack(xds.TypeCluster, strings.Repeat("ü", 100_000))
		if got := len(w.srv.Ledger()[0].Nack.Message); got == 0 || got > 4096 {
			t.Errorf("%d bytes kept", got)
		}
	})
}

// A reflex of the stock server: it panics if a watcher sends after the stream ended.
// Streams that come and go while positions are published must leave nothing behind.
func TestChurnWhilePublishing(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1"))
		for p := uint64(2); p < 60; p++ {
			c := w.delta(w.conn, fmt.Sprint("n", p%5))
			for _, typeURL := range xds.Types() {
				req := &discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{"*"}}
				req.Node, c.node = c.node, nil
				if err := c.stream.Send(req); err != nil {
					t.Fatal(err)
				}
			}
			go c.hangUp()
			res := resources(t, change(chat(p, "v1"), "v1", uint32(p)))
			if err := w.srv.Publish(adsserver.DefaultGroup, res, p); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		for _, n := range w.srv.Ledger() {
			if n.Connected {
				t.Errorf("%s still connected", n.Node.ID)
			}
		}
	})
}
