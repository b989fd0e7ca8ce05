package adsserver_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// leasedArms is arms with a candidate live under a dead-man lease.
func leasedArms(lease time.Duration, v1, v2 *upstream) *policy.Policy {
	p := arms(at(v1), at(v2))
	p.Models[0].DeadMan = lease
	return p
}

// servedBy waits until a user of the canary arm is served by a version.
func (e *envoy) servedBy(user []string, version string) {
	e.t.Helper()
	eventually(e.t, func() (string, bool) {
		a := e.ask(user...)
		return "the canary's user is served by " + a.served, a.served == version
	}, nil)
}

// A real Envoy gives a candidate up when the server is silent on an open stream, keeps it
// while it is heard, and takes it back when the server speaks again.
func TestRealEnvoyLease(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	const lease = time.Second
	var silent atomic.Bool
	srv := adsserver.New(adsserver.Options{Lease: func() time.Duration {
		if silent.Load() {
			return 0
		}
		return time.Hour
	}})
	control := listen(t, srv.Register)
	v1, v2 := startUpstream(t, "v1"), startUpstream(t, "v2")
	start := leasedArms(lease, v1, v2)
	start.Position = 1
	e := startEnvoy(t, srv, control, start)
	u := canaryUser(t, &start.Models[0])
	e.servedBy(u, "v2")
	for end := time.Now().Add(3 * lease); time.Now().Before(end); {
		if a := e.ask(u...); a.served != "v2" {
			t.Fatalf("while the server is heard: %+v", a)
		}
	}
	silent.Store(true)
	began := time.Now()
	e.servedBy(u, "v1")
	t.Logf("given up %v after the last heartbeat at most, the lease is %v", time.Since(began).Round(time.Millisecond), lease)
	if got := e.runtimeValue("outrigger.serve.chat/v2"); got != "0" {
		t.Errorf("the kill switch is %q in Envoy's runtime without the lease, want 0", got)
	}
	silent.Store(false)
	e.servedBy(u, "v2")
	if n := srv.Ledger()[0]; n.Nack != nil || n.Acked != 1 || len(srv.Pushes(adsserver.KindGroup(translate.KindEnvoy))) != 1 {
		t.Errorf("heartbeats count as pushes: %+v", n)
	}
}
