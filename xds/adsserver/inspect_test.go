package adsserver_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// deliveries prints how a push went, one "node outcome" each; laggards have a '!'.
func (w *world) deliveries(push string) string {
	w.t.Helper()
	for _, p := range w.srv.Pushes("") {
		if p.ID != push {
			continue
		}
		var out []string
		for _, d := range p.Nodes {
			mark := ""
			if d.Lagging {
				mark = "!"
			}
			out = append(out, d.Node+" "+d.Outcome+mark)
		}
		return strings.Join(out, ", ")
	}
	w.t.Fatalf("push %s is not remembered", push)
	return ""
}

// verdict is what Explain says of the one type that has the resource.
func (w *world) explain(node, typeURL, name string) adsserver.Explanation {
	w.t.Helper()
	out, err := w.srv.Explain(node, typeURL, name)
	if err != nil || len(out) != 1 {
		w.t.Fatalf("Explain %s: %d answers, %v", name, len(out), err)
	}
	return out[0]
}

func (w *world) node(id string) adsserver.NodeDelivery {
	w.t.Helper()
	for _, n := range w.srv.Nodes() {
		if n.Node.ID == id {
			return n
		}
	}
	w.t.Fatalf("node %s is not known", id)
	return adsserver.NodeDelivery{}
}

// One node accepts, one rejects the routes of the second push:
//
//	push 1   both accept
//	push 2   good: ACK; bad: NACK of model/chat, so its routes stay as of push 1
//	push 3   bad accepts
func TestDeliveryIsKnownPerResource(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1"))
		good, bad := w.delta(w.conn, "good"), w.delta(w.conn, "bad")
		for _, c := range []*deltaClient{good, bad} {
			c.follow()
			c.read()
			c.ackAll()
		}
		if got := w.deliveries("default/1"); got != "bad acked, good acked" {
			t.Fatalf("push 1: %s", got)
		}
		first := w.explain("bad", xds.TypeRoute, "model/chat")
		if first.Verdict != adsserver.VerdictLive || !first.AtLatest || first.Since.IsZero() || first.Body == nil {
			t.Fatalf("before: %+v", first)
		}

		time.Sleep(time.Minute)
		w.publish(chat(2, "v1", "v2"))
		for _, c := range []*deltaClient{good, bad} {
			c.read()
		}
		if got := w.explain("good", xds.TypeModelPolicy, "chat"); got.Verdict != adsserver.VerdictPending || got.Version == got.Wanted {
			t.Fatalf("unanswered: %+v", got)
		}
		if got := w.deliveries("default/2"); got != "bad sent!, good sent!" {
			t.Fatalf("push 2, unanswered: %s", got)
		}
		time.Sleep(20 * time.Millisecond)
		good.ackAll()
		for _, typeURL := range xds.Types() {
			if typeURL == xds.TypeModelPolicy {
				bad.nack(typeURL, "chat: no such thing")
			} else {
				bad.ack(typeURL)
			}
		}
		if got := w.deliveries("default/2"); got != "bad nacked!, good acked" {
			t.Fatalf("push 2: %s", got)
		}
		p := w.srv.Pushes("default")[0]
		if d := p.Nodes[1]; p.ID != "default/2" || d.Latency != 20*time.Millisecond {
			t.Fatalf("push %s took %v at %s, want 20ms", p.ID, d.Latency, d.Node)
		}
		held := w.explain("bad", xds.TypeModelPolicy, "chat")
		if held.Verdict != adsserver.VerdictRejected || held.Push != "default/2" || held.Version == held.Wanted || held.Version == "" ||
			!strings.Contains(held.Why, "no such thing") || held.Body == nil {
			t.Fatalf("rejected: %+v", held)
		}
		if got := w.explain("bad", xds.TypeCluster, "model/chat/v2"); got.Verdict != adsserver.VerdictLive {
			t.Fatalf("what was accepted beside it: %+v", got)
		}
		live := w.explain("good", xds.TypeModelPolicy, "chat")
		if live.Verdict != adsserver.VerdictLive || live.Push != "default/2" || live.AtLatest || time.Since(live.Since) > time.Second {
			t.Fatalf("accepted: %+v", live)
		}

		time.Sleep(time.Minute)
		if n := w.node("bad"); n.Behind < time.Minute || n.AckedPush != "default/1" || n.SentPush != "default/2" {
			t.Fatalf("behind: %+v", n)
		}
		if n := w.node("good"); n.Behind != 0 || n.AckedPush != "default/2" {
			t.Fatalf("not behind: %+v", n)
		}
		w.publish(chat(3, "v1"))
		bad.read()
		bad.ackAll()
		if got := w.deliveries("default/2"); got != "bad nacked, good acked" {
			t.Fatalf("push 2, after 3: %s", got)
		}
		if got := w.explain("bad", xds.TypeModelPolicy, "chat"); got.Verdict != adsserver.VerdictLive || got.Nack != nil {
			t.Fatalf("after the repair: %+v", got)
		}
	})
}

// What a group served at any remembered push can be had again, byte for byte.
func TestSetsOfOlderPushesAreRemembered(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1"))
		c := w.delta(w.conn, "n")
		c.follow()
		c.read()
		c.ackAll()
		_, before, err := w.srv.SetAt("n", "")
		if err != nil || len(before) == 0 {
			t.Fatalf("%d resources, %v", len(before), err)
		}
		for p := uint64(2); p < adsserver.MaxPushes+2; p++ {
			w.publish(chat(p, "v1", "v2"))
			c.read()
			c.ackAll()
			if p != 10 {
				continue
			}
			id, again, err := w.srv.SetAt("n", "1")
			if err != nil || id != "default/1" || len(again) != len(before) {
				t.Fatalf("push 1 as of push 10: %s, %d resources, %v", id, len(again), err)
			}
			for i := range again {
				if again[i] != before[i] {
					t.Fatalf("%+v was %+v", again[i], before[i])
				}
			}
		}
		if _, _, err := w.srv.SetAt("n", "1"); !outrigger.IsKind(err, outrigger.NotFound) || !strings.Contains(err.Error(), "default/2 to") {
			t.Fatalf("forgotten push: %v", err)
		}
		if n := len(w.srv.Pushes("")); n != adsserver.MaxPushes {
			t.Fatalf("%d pushes are remembered, want %d", n, adsserver.MaxPushes)
		}
		if _, _, err := w.srv.SetAt("stranger", ""); !outrigger.IsKind(err, outrigger.NotFound) {
			t.Fatalf("unknown node: %v", err)
		}
	})
}

// Explain has a word for everything that can be the matter.
func TestExplainVerdicts(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publish(chat(1, "v1", "v2"))
		c := w.delta(w.conn, "n")
		c.subscribe(xds.TypeCluster, xds.Wildcard)
		c.subscribe(xds.TypeMeshPolicy, xds.Wildcard)
		answer := func() {
			c.read()
			c.ack(xds.TypeCluster)
			c.ack(xds.TypeMeshPolicy)
		}
		answer()
		verdict := func(want, typeURL, name string) {
			t.Helper()
			if got := w.explain("n", typeURL, name); got.Verdict != want || got.Why == "" {
				t.Errorf("%s: %s (%s), want %s", name, got.Verdict, got.Why, want)
			}
		}
		verdict(adsserver.VerdictLive, xds.TypeCluster, "model/chat/v1")
		verdict(adsserver.VerdictUnsubscribed, xds.TypeRoute, "model/chat")
		verdict(adsserver.VerdictAbsent, xds.TypeCluster, "model/chat/v9")
		w.publish(chat(2, "v1", "v2", "v3"))
		verdict(adsserver.VerdictPending, xds.TypeCluster, "model/chat/v3")
		w.publish(chat(3, "v1", "v2", "v3", "v4"))
		verdict(adsserver.VerdictWaiting, xds.TypeCluster, "model/chat/v4")
		answer()
		answer()
		verdict(adsserver.VerdictLive, xds.TypeCluster, "model/chat/v4")
		w.publish(chat(4, "v1"))
		answer() // removed clusters go with the second step
		verdict(adsserver.VerdictRemoving, xds.TypeCluster, "model/chat/v4")
		answer()
		verdict(adsserver.VerdictAbsent, xds.TypeCluster, "model/chat/v4")
		c.hangUp()
		synctest.Wait()
		verdict(adsserver.VerdictDisconnected, xds.TypeCluster, "model/chat/v1")
		if _, err := w.srv.Explain("stranger", "", "model/chat"); !outrigger.IsKind(err, outrigger.NotFound) {
			t.Errorf("unknown node: %v", err)
		}
	})
}
