package adsclient_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsclient"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

type routeConfig = route.RouteConfiguration

func editRoutes(res *translate.Resources, name string, edit func(*routeConfig)) *translate.Resources {
	rc := proto.Clone(res.Get(xds.TypeRoute, "model/"+name)).(*routeConfig)
	edit(rc)
	res.Put(xds.TypeRoute, "model/"+name, rc)
	return res
}

// Transcript of a first sync and one push: everything is in force before the first ACK,
// ACKs come in push order with MeshPolicy last, and the ledger knows.
func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t)
		want := mesh(1, model("a", 1000))
		r.publish(t, resources(t, want), 1)
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{r.dial}})
		<-c.Ready()
		lines := r.transcript()
		wantLines(t, only(lines, ">"), fullSync())
		wantLines(t, only(lines, "< ACK"), []string{"< ACK Cluster", "< ACK Secret", "< ACK ClusterLoadAssignment", "< ACK Listener", "< ACK RouteConfiguration", "< ACK ModelPolicy", "< ACK MeshPolicy"})
		if !policy.Equal(c.Policy(), want) {
			t.Fatalf("policy %+v", c.Policy())
		}
		if s := c.Status(); !s.Live || s.Source != adsclient.SourceADS || s.Position != 1 || s.Server != 0 || s.LastNack != "" {
			t.Fatalf("status %+v", s)
		}

		want = mesh(2, model("a", 2000))
		r.publish(t, resources(t, want), 2)
		wantLines(t, r.transcript(), []string{
			"> RouteConfiguration +model/a", "> MeshPolicy +mesh", "< ACK RouteConfiguration", "< ACK MeshPolicy",
		})
		if !policy.Equal(c.Policy(), want) || c.Status().Position != 2 {
			t.Fatalf("policy %+v", c.Policy())
		}
		if acked, _, done := r.ads.Acked(2); !done || len(acked) != 1 {
			t.Fatalf("ledger %+v", r.ads.Ledger())
		}
		if got := c.positions(); !slices.Equal(got, []uint64{1, 2}) {
			t.Fatalf("OnPolicy saw %v", got)
		}
	})
}

// Transcript of a bad push: exactly one NACK, naming the resource and the reason, no
// resend; the other model of the push takes effect, the bad one keeps its last good
// state; the next good push recovers.
func TestNack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t)
		r.publish(t, resources(t, mesh(1, model("a", 1000), model("b", 1000))), 1)
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{r.dial}})
		r.transcript()

		r.publish(t, breakRoutes(resources(t, mesh(2, model("a", 3000), model("b", 3000))), "a"), 2)
		const reason = "xds resource: RouteConfiguration model/a: bucket 2999 belongs to no arm; the arms must cover 0..9999"
		wantLines(t, r.transcript(), []string{
			"> RouteConfiguration +model/a +model/b", "> MeshPolicy +mesh",
			"< NACK RouteConfiguration: " + reason, "< ACK MeshPolicy",
		})
		if a, b := c.Policy().Model("a").Arms[0].Weight(), c.Policy().Model("b").Arms[0].Weight(); a != 1000 || b != 3000 {
			t.Fatalf("a has %d and b has %d canary buckets; want the old 1000 and the new 3000", a, b)
		}
		if s := c.Status(); s.LastNack != reason || !s.Live {
			t.Fatalf("status %+v", s)
		}
		n := r.ads.Ledger()[0]
		if n.Acked != 1 || n.Nack == nil || n.Nack.Resource != "model/a" || n.Nack.Message != reason {
			t.Fatalf("ledger %+v, nack %+v", n, n.Nack)
		}
		time.Sleep(time.Minute) // probes pass; nothing is resent or rejected again
		for _, l := range r.transcript() {
			if l != "< SUB MeshPolicy mesh" && l != "> MeshPolicy +mesh" && l != "< ACK MeshPolicy" {
				t.Fatalf("unexpected %q", l)
			}
		}
		if n := r.ads.Ledger()[0]; n.Acked != 1 || n.Nack == nil {
			t.Fatalf("probes cleared the rejection: %+v", n)
		}

		// A push of b only. a's routes come along unchanged, as part of the rejected
		// response; their fault is older than this push, so MeshPolicy carries it and
		// b's routes are acknowledged.
		r.publish(t, breakRoutes(resources(t, mesh(3, model("a", 3000), model("b", 3500))), "a"), 3)
		wantLines(t, r.transcript(), []string{
			"> RouteConfiguration +model/a +model/b", "> MeshPolicy +mesh", "< ACK RouteConfiguration", "< NACK MeshPolicy: " + reason,
		})
		if c.Policy().Model("b").Arms[0].Weight() != 3500 {
			t.Fatal("b must follow although a is broken")
		}

		r.publish(t, resources(t, mesh(4, model("a", 4000), model("b", 3500))), 4)
		wantLines(t, r.transcript(), []string{
			"> RouteConfiguration +model/a", "> MeshPolicy +mesh", "< ACK RouteConfiguration", "< ACK MeshPolicy",
		})
		if n := r.ads.Ledger()[0]; n.Acked != 4 || n.Nack != nil || c.Status().LastNack != "" {
			t.Fatalf("ledger %+v, status %+v", n, c.Status())
		}
		if c.Policy().Model("a").Arms[0].Weight() != 4000 {
			t.Fatal("a has not recovered")
		}
	})
}

// A resource that breaks its generated rules is rejected as well, also when it is the
// first of its model: then the model stays unknown and the others work.
func TestNackUndecodable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t)
		res := resources(t, mesh(1, model("a", 1000), model("b", 1000)))
		editRoutes(res, "a", func(rc *routeConfig) { rc.VirtualHosts[0].Name = "" })
		r.publish(t, res, 1)
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{r.dial}})
		if c.Policy().Model("a") != nil || c.Policy().Model("b") == nil {
			t.Fatalf("policy %+v", c.Policy())
		}
		n := r.ads.Ledger()[0]
		if n.Acked != 0 || n.Nack == nil || n.Nack.Type != xds.TypeRoute || n.Nack.Resource != "model/a" || !strings.Contains(n.Nack.Message, "VirtualHost") {
			t.Fatalf("ledger %+v, nack %+v", n, n.Nack)
		}
		r.publish(t, resources(t, mesh(2, model("a", 1000), model("b", 1000))), 2)
		if c.Policy().Model("a") == nil || r.ads.Ledger()[0].Acked != 2 {
			t.Fatal("no recovery")
		}
	})
}

// A lost stream and a restarted control plane with the same content: what the client
// holds is reported, and not one resource is sent again.
func TestReconnectTransfersNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := start(t), start(t)
		content := mesh(1, model("a", 1000))
		first.publish(t, resources(t, content), 1)
		second.publish(t, resources(t, content), 1)
		var current atomic.Pointer[replica]
		current.Store(first)
		dial := func(ctx context.Context) (grpc.ClientConnInterface, io.Closer, error) {
			return current.Load().dial(ctx)
		}
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{dial}})
		before := c.Policy()
		current.Store(second)
		first.kill()
		synctest.Wait()
		if s := c.Status(); s.Live || s.Source != adsclient.SourceADS || s.Server != -1 {
			t.Fatalf("status %+v", s)
		}
		time.Sleep(time.Second)
		wantLines(t, only(second.transcript(), ">"), []string{
			"> Cluster", "> Secret", "> ClusterLoadAssignment", "> Listener", "> RouteConfiguration", "> ModelPolicy", "> MeshPolicy",
		})
		if !c.Status().Live || c.Policy() != before || len(c.positions()) != 1 {
			t.Fatalf("status %+v, OnPolicy saw %v", c.Status(), c.positions())
		}
		if _, _, done := second.ads.Acked(1); !done {
			t.Fatal("position not accepted")
		}
	})
}

// What changed while the client was away arrives as a difference.
func TestReconnectTransfersTheDifference(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := start(t), start(t)
		first.publish(t, resources(t, mesh(1, model("a", 1000), model("b", 1))), 1)
		second.publish(t, resources(t, mesh(7, model("a", 2000))), 7)
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{first.dial, second.dial}})
		first.kill()
		time.Sleep(time.Second)
		wantLines(t, only(second.transcript(), ">"), []string{
			"> Cluster -model/b/v1 -model/b/v2", "> Secret", "> ClusterLoadAssignment -model/b/v1 -model/b/v2", "> Listener -model/b",
			"> RouteConfiguration +model/a -model/b", "> ModelPolicy -b", "> MeshPolicy +mesh",
		})
		if s := c.Status(); s.Server != 1 || s.Position != 7 || c.Policy().Model("b") != nil || c.Policy().Model("a").Arms[0].Weight() != 2000 {
			t.Fatalf("status %+v policy %+v", s, c.Policy())
		}
	})
}

// 100 sidecars get a push; the ledger says when it is done.
func TestHundredSidecars(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t)
		r.publish(t, resources(t, mesh(1, model("a", 1000))), 1)
		clients := make([]*client, 100)
		for i := range clients {
			clients[i] = run(t, adsclient.Options{Node: outrigger.Node{ID: fmt.Sprintf("pod-%03d", i), Kind: "sidecar"}, Dial: []adsclient.Dialer{r.dial}})
		}
		if err := r.ads.Publish("default", resources(t, mesh(2, model("a", 0x10))), 2); err != nil {
			t.Fatal(err)
		}
		rounds := 0
		for {
			changed := r.ads.Changed()
			acked, laggards, done := r.ads.Acked(2)
			if done {
				if len(acked) != 100 {
					t.Fatalf("done with %d acked, %d laggards", len(acked), len(laggards))
				}
				break
			}
			<-changed
			rounds++
		}
		for _, c := range clients {
			if c.Policy().Position != 2 {
				t.Fatal("ledger says done, a sidecar has an older policy")
			}
		}
		if rounds == 0 {
			t.Error("the ledger never said that it was not done")
		}
	})
}

// A sidecar survives the death of the control plane, restarts without it from disk, and
// goes live again when it is back, without receiving what it holds.
func TestDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "state")
		r := start(t)
		canary := model("a", 1000)
		canary.DeadMan = 10 * time.Second
		want := mesh(5, canary)
		r.publish(t, resources(t, want), 5)
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{r.dial}, Dir: dir})
		if c.DeadManExpired(time.Now()) {
			t.Fatal("lease lapsed although live")
		}
		r.kill()
		time.Sleep(time.Minute)
		if !policy.Equal(c.Policy(), want) || c.Status().Live {
			t.Fatalf("status %+v", c.Status())
		}
		c.stop()
		if _, err := os.Stat(filepath.Join(dir, "policy.lkg.tmp")); !os.IsNotExist(err) {
			t.Errorf("temporary file left: %v", err)
		}

		var up atomic.Pointer[replica]
		dial := func(ctx context.Context) (grpc.ClientConnInterface, io.Closer, error) {
			if r := up.Load(); r != nil {
				return r.dial(ctx)
			}
			return failing(ctx)
		}
		cold := run(t, adsclient.Options{Dial: []adsclient.Dialer{dial}, Dir: dir})
		<-cold.Ready()
		if s := cold.Status(); s.Live || s.Source != adsclient.SourceDisk || s.Position != 5 || !s.LastContact.IsZero() {
			t.Fatalf("status %+v", s)
		}
		if !reflect.DeepEqual(cold.Policy(), want.Normalise()) {
			t.Fatalf("policy %+v", cold.Policy())
		}
		if !cold.DeadManExpired(time.Now()) || !cold.LeaseExpired(&cold.Policy().Models[0], time.Now()) {
			t.Fatal("a cold start must count as lapsed")
		}

		back := start(t)
		back.publish(t, resources(t, want), 5)
		up.Store(back)
		time.Sleep(12 * time.Second) // at most one full pause
		for _, l := range only(back.transcript(), ">") {
			if strings.Contains(l, "+") && l != "> MeshPolicy +mesh" { // probes
				t.Errorf("resource sent again: %q", l)
			}
		}
		if s := cold.Status(); !s.Live || s.Source != adsclient.SourceADS || cold.DeadManExpired(time.Now()) {
			t.Fatalf("status %+v", s)
		}
	})
}

// A damaged file is logged and ignored; the client then waits for the control plane and
// replaces it.
func TestDiskDamaged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, "policy.lkg")
		r := start(t)
		r.publish(t, resources(t, mesh(1, model("a", 1000))), 1)
		run(t, adsclient.Options{Dial: []adsclient.Dialer{r.dial}, Dir: dir}).stop()
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for name, raw := range map[string][]byte{
			"empty": {}, "torn": good[:len(good)-1], "longer": append(slices.Clone(good), 0),
			"bit rot": flip(good, len(good)/2), "other format": flip(good, 7), "checksum": flip(good, 20),
		} {
			if err := os.WriteFile(path, raw, 0o600); err != nil {
				t.Fatal(err)
			}
			var logged bytes.Buffer
			c := run(t, adsclient.Options{Dial: []adsclient.Dialer{failing}, Dir: dir, Logger: slog.New(slog.NewTextHandler(&logged, nil))})
			c.stop()
			if c.Policy() != nil || !strings.Contains(logged.String(), "last-known-good policy ignored") {
				t.Errorf("%s: policy %+v, log %s", name, c.Policy(), logged.String())
			}
		}
		run(t, adsclient.Options{Dial: []adsclient.Dialer{r.dial}, Dir: dir}).stop()
		if again, err := os.ReadFile(path); err != nil || !bytes.Equal(again, good) {
			t.Errorf("file not replaced by the same bytes: %v", err)
		}
	})
}

func flip(b []byte, i int) []byte {
	b = slices.Clone(b)
	b[i] ^= 0x10
	return b
}

// Servers are tried in order; pauses grow by 1.6 from 100 ms to 10 s within a fifth.
func TestFallbackAndBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var tries []time.Time
		count := func(ctx context.Context) (grpc.ClientConnInterface, io.Closer, error) {
			tries = append(tries, time.Now())
			return failing(ctx)
		}
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{count}})
		time.Sleep(5 * time.Minute)
		c.stop()
		want := 100 * time.Millisecond
		for i := 1; i < len(tries); i++ {
			got := tries[i].Sub(tries[i-1])
			if got < want*8/10 || got > want*12/10 {
				t.Fatalf("pause %d is %v, want %v ± 20 %%", i, got, want)
			}
			want = min(want*8/5, 10*time.Second)
		}
		if want != 10*time.Second {
			t.Fatalf("only %d tries", len(tries))
		}

		r := start(t)
		r.publish(t, resources(t, mesh(1, model("a", 1000))), 1)
		d := run(t, adsclient.Options{Dial: []adsclient.Dialer{failing, r.dial}})
		if s := d.Status(); !s.Live || s.Server != 1 {
			t.Fatalf("no fallback: %+v", s)
		}
	})
}

// A server that accepts the stream and never answers is given up after 15 s.
func TestSilentServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		silent, r := start(t), start(t) // silent has nothing published
		r.publish(t, resources(t, mesh(1, model("a", 1000))), 1)
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{silent.dial, r.dial}})
		time.Sleep(15*time.Second - time.Millisecond)
		synctest.Wait()
		if c.Policy() != nil {
			t.Fatal("too early")
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if s := c.Status(); !s.Live || s.Server != 1 {
			t.Fatalf("status %+v", s)
		}
	})
}

// A partition that never resets the connection: probes go out four times per lease; the
// lease lapses exactly DeadMan after the last answered one was sent; the stream is given
// up after three silent intervals.
func TestPartition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t)
		canary := model("a", 1000)
		canary.DeadMan = 8 * time.Second
		r.publish(t, resources(t, mesh(1, canary)), 1)
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{r.dial}})
		time.Sleep(7 * time.Second) // probes at 2, 4 and 6 s
		synctest.Wait()
		if got := len(only(r.transcript(), "< SUB MeshPolicy mesh")); got != 3 {
			t.Fatalf("%d probes in 7 s of an 8 s lease, want 3", got)
		}
		asked := c.Status().LastContact
		if age := time.Since(asked); age != time.Second {
			t.Fatalf("last contact %v ago, want 1s", age)
		}
		m := &c.Policy().Models[0]
		if c.LeaseExpired(m, asked.Add(8*time.Second)) || !c.LeaseExpired(m, asked.Add(8*time.Second+1)) {
			t.Fatal("lease does not end with DeadMan")
		}
		r.freeze()
		time.Sleep(6 * time.Second) // asked at 8, silent at 10 and 12
		if !c.Status().Live {
			t.Fatal("given up too early")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if c.Status().Live || !c.DeadManExpired(time.Now()) || c.Policy() == nil {
			t.Fatalf("status %+v", c.Status())
		}
	})
}

// No candidate live: no lease, whatever the contact.
func TestNoLeaseWithoutCandidate(t *testing.T) {
	c, err := adsclient.New(adsclient.Options{Node: outrigger.Node{ID: "n"}, Dial: []adsclient.Dialer{failing}})
	if err != nil {
		t.Fatal(err)
	}
	if c.DeadManExpired(time.Now()) || c.LeaseExpired(&policy.Model{}, time.Now()) {
		t.Error("lapsed without a lease")
	}
	if !c.LeaseExpired(&policy.Model{DeadMan: time.Second}, time.Now()) {
		t.Error("a lease nobody renewed must be lapsed")
	}
	if n := testing.AllocsPerRun(100, func() { _ = c.Policy(); _ = c.Status(); _ = c.DeadManExpired(time.Time{}) }); n != 0 {
		t.Errorf("%v allocations on the request path, want 0", n)
	}
}

func TestNewAndRunRefuse(t *testing.T) {
	for _, opt := range []adsclient.Options{{}, {Node: outrigger.Node{ID: "n"}}, {Dial: []adsclient.Dialer{failing}}} {
		if _, err := adsclient.New(opt); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("got %v", err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		c := run(t, adsclient.Options{Dial: []adsclient.Dialer{failing}})
		if err := c.Run(context.Background()); !outrigger.IsKind(err, outrigger.Conflict) {
			t.Errorf("second Run: %v", err)
		}
	})
}
