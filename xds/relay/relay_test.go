package relay_test

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsclient"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// Three pods, one stream; each thing is sent once; the ledger knows each pod.
func TestOneStreamServesAllPods(t *testing.T) {
	bubble(t, func(w *world) {
		w.publish(7, model("a", 100, 0))
		var pods []*pod
		for _, id := range []string{"pod-1", "pod-2", "pod-3"} {
			pods = append(pods, w.pod(id))
		}
		time.Sleep(time.Second)
		sent, streams := w.lines.take()
		if n := len(with(sent, "> Cluster +")); n != 1 || streams != 1 {
			t.Fatalf("%d streams, clusters sent %d times; want one of each:\n%s", streams, n, strings.Join(sent, "\n"))
		}
		w.wantAcked(7, []string{"pod-1", "pod-2", "pod-3"}, nil)

		w.publish(8, model("a", 200, 0))
		time.Sleep(time.Second)
		w.wantAcked(8, []string{"pod-1", "pod-2", "pod-3"}, nil)
		if sent, streams = w.lines.take(); len(with(sent, "> RouteConfiguration +")) != 1 || streams != 0 {
			t.Fatalf("the change was not sent exactly once on the same stream:\n%s", strings.Join(sent, "\n"))
		}
		for _, p := range pods {
			s := p.Status()
			if p.position() != 8 || !s.Live || !s.Relayed || s.Source != adsclient.SourceADS {
				t.Fatalf("position %d, status %+v", p.position(), s)
			}
		}
		n := w.line("pod-2")
		if n.Via == nil || n.Via.ID != "node-1" || n.Group != adsserver.DefaultGroup {
			t.Fatalf("line of a pod: %+v", n)
		}
		pushes := w.control.Pushes("")
		if d := pushes[0].Nodes; len(d) != 4 || d[1].Node != "pod-1" || d[1].Outcome != adsserver.OutcomeAcked || d[1].Lagging {
			t.Fatalf("deliveries of the newest push: %+v", d)
		}
		held, err := w.control.Config("pod-3")
		if err != nil || len(held) == 0 || slices.ContainsFunc(held, func(h adsserver.Held) bool { return h.Verdict != adsserver.VerdictLive }) {
			t.Fatalf("what a pod has in force: %+v, %v", held, err)
		}
	})
}

// A pod that joins is served from memory.
func TestLateJoinerCostsTheControlPlaneNothing(t *testing.T) {
	bubble(t, func(w *world) {
		w.publish(7, model("a", 100, 0))
		w.pod("pod-1")
		time.Sleep(time.Second)
		w.lines.take()
		late := w.pod("pod-2")
		time.Sleep(time.Second)
		if late.position() != 7 {
			t.Fatalf("position %d", late.position())
		}
		sent, streams := w.lines.take()
		if n := len(with(sent, "> ")); streams != 0 || n > 1 || len(with(sent, "> MeshPolicy")) != n {
			t.Fatalf("a pod that joined cost more than the answer to one probe:\n%s", strings.Join(sent, "\n"))
		}
		w.wantAcked(7, []string{"pod-1", "pod-2"}, nil)
		late.stop()
		time.Sleep(time.Second)
		if n := w.line("pod-2"); n.Connected {
			t.Fatalf("a pod that left still counts as connected: %+v", n)
		}
	})
}

// A pod that hangs is named, and holds up neither the others nor what follows.
func TestStuckPodIsALaggard(t *testing.T) {
	bubble(t, func(w *world) {
		w.publish(7, model("a", 100, 0))
		good, bad := w.pod("pod-1"), w.pod("pod-2")
		time.Sleep(time.Second)
		bad.hold()
		w.publish(8, model("a", 200, 0))
		time.Sleep(50 * time.Millisecond)
		w.wantAcked(8, []string{"pod-1"}, []string{"node-1", "pod-2"})
		time.Sleep(1100 * time.Millisecond)
		w.wantAcked(8, []string{"pod-1"}, []string{"pod-2"})
		for position := uint64(9); position < 9+100; position++ { // more than a stream may leave unanswered
			w.publish(position, model("a", uint32(position), 0))
			if good.position() != position {
				t.Fatalf("the other pod has %d, published is %d", good.position(), position)
			}
		}
		time.Sleep(time.Second)
		w.wantAcked(108, []string{"pod-1"}, []string{"pod-2"})
		if _, streams := w.lines.take(); streams != 1 {
			t.Fatalf("%d streams", streams)
		}
		bad.free()
		time.Sleep(3 * time.Second)
		w.wantAcked(108, []string{"pod-1", "pod-2"}, nil)
	})
}

// What one pod rejects is passed on at once, with its name; the others go on.
func TestRejectionNamesThePod(t *testing.T) {
	bubble(t, func(w *world) {
		w.publish(7, model("a", 100, 0), model("b", 100, 0))
		w.pod("pod-1")
		w.pod("pod-2")
		time.Sleep(time.Second)
		w.lines.take()
		res := encode(t, 8, model("a", 200, 0), model("b", 200, 0))
		bad := res.Fork()
		bad.Put(xds.TypeRoute, translate.ListenerName("a"), broken(t, res))
		w.publishSet(8, bad)
		got, _ := w.lines.take()
		nacks := with(got, "< NACK")
		if len(nacks) != 1 || !strings.Contains(nacks[0], "RouteConfiguration: pod-") {
			t.Fatalf("rejections %q; want one that names the pod", nacks)
		}
		for _, id := range []string{"pod-1", "pod-2"} {
			if n := w.line(id); n.Nack == nil || n.Nack.Type != xds.TypeRoute || n.Acked == 8 {
				t.Fatalf("line of %s: %+v", id, n)
			}
		}
		// What repairs it comes before the pods have said all they have to say.
		w.publish(9, model("a", 300, 0), model("b", 200, 0))
		time.Sleep(time.Second)
		w.wantAcked(9, []string{"pod-1", "pod-2"}, nil)
		if n := w.line("pod-1"); n.Nack != nil {
			t.Fatalf("the rejection still stands: %+v", n.Nack)
		}
	})
}

func broken(t *testing.T, res *translate.Resources) *routev3.RouteConfiguration {
	t.Helper()
	r, ok := res.Get(xds.TypeRoute, translate.ListenerName("a")).(*routev3.RouteConfiguration)
	if !ok {
		t.Fatal("no routes")
	}
	out := proto.CloneOf(r)
	out.VirtualHosts[0].Routes[0].GetMatch().GetHeaders()[0].GetRangeMatch().End--
	return out
}

// The control plane is away and comes back: nothing is sent anew, and nobody is forgotten.
func TestReconnectTransfersNothing(t *testing.T) {
	bubble(t, func(w *world) {
		w.publish(7, model("a", 100, 0))
		p := w.pod("pod-1")
		time.Sleep(time.Second)
		w.lines.take()
		w.net.Cut("node", "control")
		time.Sleep(100 * time.Millisecond)
		if n := w.line("pod-1"); n.Connected {
			t.Fatalf("the relay is gone and its pod is not: %+v", n)
		}
		w.net.Heal("node", "control")
		time.Sleep(20 * time.Second)
		got, _ := w.lines.take()
		if n := len(with(got, "> Cluster +")) + len(with(got, "> RouteConfiguration +")); n != 0 {
			t.Fatalf("resources were sent again:\n%s", strings.Join(got, "\n"))
		}
		w.wantAcked(7, []string{"pod-1"}, nil)
		if s := p.Status(); !s.Live || !s.Relayed {
			t.Fatalf("status %+v", s)
		}
	})
}

// The agent dies: the pod follows the control plane, and comes back when there is a relay.
func TestAgentDiesAndComesBack(t *testing.T) {
	bubble(t, func(w *world) {
		w.publish(7, model("a", 100, 0))
		p := w.pod("pod-1")
		time.Sleep(time.Second)
		w.lines.take()
		w.relay.kill()
		time.Sleep(time.Second)
		if s := p.Status(); !s.Live || s.Relayed || s.Server != 0 {
			t.Fatalf("without a relay: %+v", s)
		}
		w.publish(8, model("a", 200, 0))
		w.wantAcked(8, []string{"pod-1"}, nil)
		w.startRelay()
		time.Sleep(30 * time.Second)
		if s := p.Status(); !s.Live || !s.Relayed {
			t.Fatalf("with a relay again: %+v", s)
		}
		w.wantAcked(8, []string{"pod-1"}, nil)
		if n := w.line("pod-1"); n.Via == nil {
			t.Fatalf("line %+v", n)
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if !slices.Equal(p.seen, []uint64{7, 8}) {
			t.Fatalf("policies put in force: %v; a move is none", p.seen)
		}
	})
}

// A relay that is cut off holds up no lease.
func TestCutRelayLetsLeasesLapse(t *testing.T) {
	bubble(t, func(w *world) {
		const lease = 4 * time.Second
		w.publish(7, model("a", 100, lease))
		p := w.pod("pod-1")
		m := p.Policy().Model("a")
		for range 40 {
			time.Sleep(500 * time.Millisecond)
			if p.LeaseExpired(m, time.Now()) {
				t.Fatal("the lease lapsed while the control plane answered")
			}
		}
		cut := time.Now()
		w.net.Cut("pod-1", "control")
		w.net.Cut("node", "control")
		time.Sleep(lease + time.Millisecond)
		if !p.LeaseExpired(m, time.Now()) {
			t.Fatalf("%v after the cut the lease stands, last contact %v before", time.Since(cut), cut.Sub(p.Status().LastContact))
		}
		late := w.pod("pod-2", func(o *adsclient.Options) { o.Dial = []adsclient.Dialer{w.dial("pod-1", "control:1")} })
		time.Sleep(5 * time.Second)
		if late.position() != 7 || late.Status().Live || late.Status().Source != adsclient.SourceRelay || !late.LeaseExpired(m, time.Now()) {
			t.Fatalf("a pod that starts behind a cut relay: position %d, %+v", late.position(), late.Status())
		}
		w.net.Heal("pod-1", "control")
		w.net.Heal("node", "control")
		time.Sleep(30 * time.Second)
		for _, x := range []*pod{p, late} {
			if s := x.Status(); !s.Live || !s.Relayed || x.LeaseExpired(m, time.Now()) {
				t.Fatalf("after the cut: %+v", s)
			}
		}
	})
}

// A pod that has a newer policy than the relay it joins does not go back.
func TestNobodyGoesBack(t *testing.T) {
	bubble(t, func(w *world) {
		w.publish(7, model("a", 100, 0))
		first := w.pod("pod-1")
		direct := w.pod("pod-2", func(o *adsclient.Options) { o.Relay = nil })
		w.net.Cut("node", "control")
		time.Sleep(time.Second)
		w.publish(8, model("a", 50, 0))
		if direct.position() != 8 {
			t.Fatalf("position %d", direct.position())
		}
		// The same sidecar with its file, now behind the relay that has not heard of 8.
		first.stop()
		dir := t.TempDir()
		saved := w.pod("pod-3", func(o *adsclient.Options) { o.Relay, o.Dir = nil, dir })
		saved.stop()
		w.stop()
		again := w.pod("pod-3", func(o *adsclient.Options) { o.Dir = dir })
		for range 60 {
			time.Sleep(time.Second)
			if again.position() != 8 {
				t.Fatalf("went back to position %d", again.position())
			}
		}
	})
}

// A sidecar that holds what the relay never had is judged by the control plane.
func TestStrangersAreSentToTheControlPlane(t *testing.T) {
	bubble(t, func(w *world) {
		w.publish(7, model("a", 100, 0))
		dir := t.TempDir()
		p := w.pod("pod-1", func(o *adsclient.Options) { o.Dir = dir })
		p.stop()
		w.relay.kill()
		w.stop()
		// A new control plane and a new relay, neither of which ever had the model.
		empty := adsserver.New(adsserver.Options{})
		empty.Know(func(model, _ string) bool { return model == "" || model == "b" })
		w.startControl(empty)
		w.publish(3, model("b", 100, 0))
		w.startRelay()
		w.pod("pod-2")
		p = w.pod("pod-1", func(o *adsclient.Options) { o.Dir = dir })
		time.Sleep(5 * time.Second)
		if p.Policy().Model("a") == nil {
			t.Fatal("the model is gone")
		}
		if n := w.line("pod-1"); n.Held == "" || n.Via != nil {
			t.Fatalf("line %+v; want it held by the control plane itself", n)
		}
		synctest.Wait()
	})
}
