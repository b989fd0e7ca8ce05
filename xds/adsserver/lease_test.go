package adsserver_test

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// candidate is model chat with a candidate under a lease, or, with 0, without one.
func candidate(position uint64, lease time.Duration) *policy.Policy {
	p := arms([]policy.Endpoint{{Address: "10.0.0.1:80", Weight: 1}}, []policy.Endpoint{{Address: "10.0.0.2:80", Weight: 1}})
	p.Position, p.Models[0].DeadMan = position, lease
	return p
}

// publishEnvoy publishes to the group of Envoys.
func (w *world) publishEnvoy(p *policy.Policy) {
	w.t.Helper()
	res, err := translate.EncodeFor(translate.KindEnvoy, p, translate.Options{})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.srv.Publish(adsserver.KindGroup(translate.KindEnvoy), res, p.Position); err != nil {
		w.t.Fatal(err)
	}
	synctest.Wait()
}

// layers is a client that follows what an Envoy does of the type Runtime.
func (w *world) layers(id string) *deltaClient {
	c := w.delta(w.conn, id)
	c.node = &core.Node{Id: id, UserAgentName: "envoy"}
	return c
}

// renewal reads one response and says what it does to each layer: "whole 7.6s", "beat 7.6s", "".
func (c *deltaClient) renewal() map[string]string {
	c.w.t.Helper()
	synctest.Wait()
	out := map[string]string{}
	select {
	case r := <-c.got:
		c.nonce[r.GetTypeUrl()] = r.GetNonce()
		for _, x := range r.GetResources() {
			c.vers[r.GetTypeUrl()+" "+x.GetName()] = x.GetVersion()
			what := "whole"
			if x.GetResource() == nil {
				what = "beat"
			}
			if x.GetTtl() != nil {
				what += " " + x.GetTtl().AsDuration().String()
			}
			out[x.GetName()] = what
		}
		for _, name := range r.GetRemovedResources() {
			out[name] = "removed"
		}
	default:
	}
	return out
}

func (c *deltaClient) wantRenewal(lease, base string) {
	c.w.t.Helper()
	if got := c.renewal(); got[xds.LeaseName] != lease || got[xds.RuntimeName] != base {
		c.w.t.Fatalf("%v, want the lease %q, the rest %q", got, lease, base)
	}
}

// later lets virtual time pass.
func later(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// What is leased is sent with its time to live and renewed without its body, four times per
// lease, one heartbeat at a time; no heartbeat is a push, and none is sent when the candidate
// is gone.
func TestHeartbeats(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publishEnvoy(candidate(1, 8*time.Second))
		c := w.layers("e")
		c.subscribe(xds.TypeRuntime, xds.RuntimeName, xds.LeaseName)
		c.wantRenewal("whole 7.6s", "whole")
		c.ack(xds.TypeRuntime)
		before, pushes := w.srv.Ledger()[0], len(w.srv.Pushes("envoy"))
		for range 8 {
			later(1900*time.Millisecond - 1)
			c.wantRenewal("", "")
			later(1)
			c.wantRenewal("beat 7.6s", "")
			c.ack(xds.TypeRuntime)
		}
		if after := w.srv.Ledger()[0]; after.Sent != before.Sent || after.Acked != before.Acked || after.Nack != nil || len(w.srv.Pushes("envoy")) != pushes {
			t.Errorf("heartbeats count as pushes: %+v, %+v", before, after)
		}
		later(1900 * time.Millisecond)
		c.wantRenewal("beat 7.6s", "")
		later(time.Minute)
		c.wantRenewal("", "") // it has not answered
		c.ack(xds.TypeRuntime)
		later(1900 * time.Millisecond)
		c.wantRenewal("whole 7.6s", "") // after a pause it may hold nothing a heartbeat renews
		c.ack(xds.TypeRuntime)

		w.publishEnvoy(candidate(2, 0))
		c.wantRenewal("whole", "whole")
		c.ack(xds.TypeRuntime)
		later(time.Minute)
		c.wantRenewal("", "")
	})
}

// A heartbeat for what the client has dropped is refused; the client is given the whole, once,
// and nothing is rejected by it.
func TestRefusedHeartbeat(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publishEnvoy(candidate(1, 8*time.Second))
		c := w.layers("e")
		c.subscribe(xds.TypeRuntime, xds.LeaseName)
		c.wantRenewal("whole 7.6s", "")
		c.ack(xds.TypeRuntime)
		later(1900 * time.Millisecond)
		c.wantRenewal("beat 7.6s", "")
		c.nack(xds.TypeRuntime, "no body")
		c.wantRenewal("whole 7.6s", "")
		if n := w.srv.Ledger()[0]; n.Nack != nil {
			t.Errorf("a refused heartbeat stands as a rejection: %+v", n.Nack)
		}
		// A whole one that is refused is a rejection, and is not renewed.
		c.nack(xds.TypeRuntime, "bad")
		later(time.Minute)
		c.wantRenewal("", "")
		if n := w.srv.Ledger()[0]; n.Nack == nil {
			t.Error("the rejection is not known")
		}
	})
}

// A client that comes back with what is leased is given it whole: only it knows how much of
// the lease is left.
func TestLeaseAfterReconnect(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publishEnvoy(candidate(1, 8*time.Second))
		c := w.layers("e")
		c.subscribe(xds.TypeRuntime, xds.RuntimeName, xds.LeaseName)
		c.wantRenewal("whole 7.6s", "whole")
		again := w.layers("e")
		again.send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeRuntime, ResourceNamesSubscribe: []string{xds.RuntimeName, xds.LeaseName},
			InitialResourceVersions: map[string]string{
				xds.RuntimeName: c.vers[xds.TypeRuntime+" "+xds.RuntimeName], xds.LeaseName: c.vers[xds.TypeRuntime+" "+xds.LeaseName]}})
		again.wantRenewal("whole 7.6s", "")
	})
}

// A replica that may not speak for candidates for long promises no more, and then nothing;
// when it may again, the whole is sent.
func TestLeaseOfAFollower(t *testing.T) {
	var left atomic.Int64
	left.Store(int64(time.Hour))
	bubble(t, adsserver.Options{Lease: func() time.Duration { return time.Duration(left.Load()) }}, func(w *world) {
		w.publishEnvoy(candidate(1, 8*time.Second))
		c := w.layers("e")
		c.subscribe(xds.TypeRuntime, xds.LeaseName)
		c.wantRenewal("whole 7.6s", "")
		c.ack(xds.TypeRuntime)
		left.Store(int64(3 * time.Second))
		later(1900 * time.Millisecond)
		c.wantRenewal("beat 3s", "")
		c.ack(xds.TypeRuntime)
		left.Store(0)
		later(time.Minute)
		c.wantRenewal("", "")
		left.Store(int64(time.Hour))
		later(1900 * time.Millisecond)
		c.wantRenewal("whole 7.6s", "")
	})
}

// The other protocol has a wrapper for times to live that few understand: its clients are not
// given what is leased, and are told of the rest as ever.
func TestNoLeaseForStateOfTheWorld(t *testing.T) {
	bubble(t, adsserver.Options{Group: func(outrigger.Node) string { return "envoy" }}, func(w *world) {
		w.publishEnvoy(candidate(1, 8*time.Second))
		for _, names := range [][]string{{xds.RuntimeName, xds.LeaseName}, {xds.Wildcard}} {
			c := w.sotw("old")
			c.request(xds.TypeRuntime, nil, names...)
			c.want("Runtime +" + xds.RuntimeName)
			later(time.Minute)
			c.want()
		}
	})
}

// The cost of a heartbeat on the wire, as the contract states it: at most 200 bytes with its
// answer.
func TestHeartbeatBytes(t *testing.T) {
	bubble(t, adsserver.Options{}, func(w *world) {
		w.publishEnvoy(candidate(1, 8*time.Second))
		c := w.layers("e")
		c.subscribe(xds.TypeRuntime, xds.LeaseName)
		c.wantRenewal("whole 7.6s", "")
		c.ack(xds.TypeRuntime)
		later(1900 * time.Millisecond)
		r := <-c.got
		ack := &discovery.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()}
		if n, a := proto.Size(r), proto.Size(ack); n+a > 200 {
			t.Errorf("a heartbeat is %d bytes, its answer %d", n, a)
		} else {
			t.Logf("a heartbeat is %d bytes, its answer %d", n, a)
		}
	})
}
