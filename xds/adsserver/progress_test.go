package adsserver_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// What is kept up to date change by change says what reading the whole ledger would.
func TestProgressFollowsTheLedger(t *testing.T) {
	bubble(t, adsserver.Options{Isolation: 15 * time.Second}, func(w *world) {
		w.publish(chat(1, "v1"))
		none := w.srv.Follow(1)
		defer none.Close()
		check := func(p *adsserver.Progress, position uint64, done bool) {
			t.Helper()
			synctest.Wait()
			acked, laggards, all := w.srv.Acked(position)
			if p.Acked() != len(acked) {
				t.Fatalf("%d accepted, the ledger says %v", p.Acked(), acked)
			}
			select {
			case <-p.Done():
				if !done {
					t.Fatalf("done, the ledger has laggards %v", laggards)
				}
			default:
				if done {
					t.Fatalf("not done, the ledger says %v %v %v", acked, laggards, all)
				}
			}
		}
		check(none, 1, false) // nobody has it

		a, b := w.delta(w.conn, "a"), w.delta(w.conn, "b")
		for _, c := range []*deltaClient{a, b} {
			c.follow()
			c.read()
		}
		check(none, 1, false)
		a.ackAll()
		check(none, 1, false)
		if got := w.srv.Connected(); len(got) != 1 || got[translate.KindSidecar] != 2 {
			t.Fatalf("connected %v, want two sidecars", got)
		}
		b.nack(xds.TypeCluster, "no")
		check(none, 1, false)
		if got := w.srv.Rejecting(); len(got) != 1 || got[0].Node.ID != "b" || got[0].Nack.Message != "no" {
			t.Fatalf("rejecting %+v, want b", got)
		}

		w.publish(breaker(chat(2, "v1"), "v1", 2)) // changes the cluster
		second := w.srv.Follow(2)
		defer second.Close()
		b.ackAll() // the first push, but for its clusters
		for _, c := range []*deltaClient{a, b} {
			c.read()
			c.ackAll()
		}
		check(second, 2, true)
		check(none, 1, true)
		if got := w.srv.Rejecting(); len(got) != 0 {
			t.Fatalf("rejecting %+v, want nobody", got)
		}

		b.hangUp()
		w.publish(breaker(chat(3, "v1"), "v1", 3))
		a.read()
		third := w.srv.Follow(3)
		defer third.Close()
		a.ackAll()
		check(third, 3, false) // b left without it, a moment ago
		time.Sleep(15 * time.Second)
		fourth := w.srv.Follow(3)
		defer fourth.Close()
		check(fourth, 3, true) // isolated: b no longer counts
		if got := w.srv.Connected(); got[translate.KindSidecar] != 1 {
			t.Fatalf("connected %v, want one sidecar", got)
		}
	})
}

// The ledger remembers nodes that are gone for an hour, and no more of them than its limit.
func TestGoneNodesAreBounded(t *testing.T) {
	bubble(t, adsserver.Options{MaxStreams: 5}, func(w *world) {
		w.publish(chat(1, "v1"))
		visit := func(id string) *deltaClient {
			c := w.delta(w.conn, id)
			c.follow()
			c.read()
			c.nack(xds.TypeCluster, "no")
			return c
		}
		for i := range 20 {
			visit(fmt.Sprint("gone-", i)).hangUp()
			synctest.Wait()
		}
		visit("here")
		ledger := w.srv.Ledger()
		if len(ledger) != 6 || len(w.srv.Rejecting()) != 6 {
			t.Fatalf("%d nodes in the ledger, %d rejecting; want 5 that are gone and one that is not", len(ledger), len(w.srv.Rejecting()))
		}
		for _, n := range ledger[:5] {
			if n.Node.ID < "gone-15" {
				t.Errorf("%s is remembered, newer ones are not", n.Node.ID)
			}
		}
		time.Sleep(2 * time.Hour)
		visit("later")
		if got := w.srv.Ledger(); len(got) != 2 {
			t.Fatalf("after two hours %d nodes are in the ledger, want the connected two", len(got))
		}
	})
}

// Pushes are forgotten after a week, but for the newest.
func TestPushesAgeOut(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		for p := uint64(1); p <= 3; p++ {
			w.publish(change(chat(p, "v1"), "v1", uint32(p)))
			time.Sleep(adsserver.MaxPushAge / 2)
		}
		if got := w.srv.Pushes(""); len(got) != 2 || got[0].Position != 3 || got[1].Position != 2 {
			t.Fatalf("remembered %+v, want the pushes of the last week", got)
		}
		time.Sleep(2 * adsserver.MaxPushAge)
		if got := w.srv.Pushes(""); len(got) != 1 || got[0].Position != 3 {
			t.Fatalf("remembered %+v, want the newest", got)
		}
	})
}
