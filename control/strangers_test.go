package control_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// holding is what a sidecar reports that has model chat in force, of another log.
func holding(versions ...string) map[string]map[string]string {
	clusters := map[string]string{}
	for _, v := range versions {
		clusters[translate.ClusterName("chat", v)] = "of before"
	}
	return map[string]map[string]string{xds.TypeCluster: clusters, xds.TypeEndpoint: clusters,
		xds.TypeListener: {"model/chat": "of before"}, xds.TypeRoute: {"model/chat": "of before"}, xds.TypeModelPolicy: {"chat": "of before"}}
}

// unknownConfiguration is the alert's text while it stands.
func (p *plane) unknownConfiguration() string {
	p.t.Helper()
	out, err := p.srv.Admin().ListAlerts(context.Background(), &pb.ListRequestAll{})
	if err != nil {
		p.t.Fatal(err)
	}
	for _, a := range out.GetAlerts() {
		if a.GetId() == "unknown-configuration" && a.GetResolvedAt() == nil {
			return a.GetSummary()
		}
	}
	return ""
}

func (s *sidecar) gotAnything() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held.Len() > 0
}

// A control plane starts over an empty log:
//
//  1. a sidecar that comes back with a model is sent nothing, and is an alert after a while;
//     a new one is served
//  2. one of its two versions is registered again: still nothing
//  3. the other one, too: it is given both, and the alert is over
func TestLostDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), nil)
		defer p.stop()
		old := p.joinHolding("old", holding("v1", "v2"))
		defer old.leave()
		fresh := p.join("fresh")
		defer fresh.leave()
		if p.unknownConfiguration() != "" {
			t.Error("an alert at once")
		}
		time.Sleep(10 * time.Second)
		text := p.unknownConfiguration()
		for _, want := range []string{"1 clients", "Cluster model/chat/v1 at old", "--adopt-clients", "restore"} {
			if !strings.Contains(text, want) {
				t.Errorf("the alert does not say %q: %s", want, text)
			}
		}
		p.register("chat", "v1")
		time.Sleep(10 * time.Second)
		if old.gotAnything() || !fresh.gotAnything() || !strings.Contains(p.unknownConfiguration(), "Cluster model/chat") {
			t.Errorf("old was sent something: %v, fresh was: %v, alert %q", old.gotAnything(), fresh.gotAnything(), p.unknownConfiguration())
		}
		p.register("chat", "v2")
		settle()
		if m := old.policy().Model("chat"); m == nil || len(m.Versions) == 0 {
			t.Errorf("after both versions are back: %+v", m)
		}
		time.Sleep(10 * time.Second)
		if text := p.unknownConfiguration(); text != "" {
			t.Errorf("still standing: %s", text)
		}
	})
}

// The operator says that the log is right.
func TestAdoptClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), func(o *control.Options) { o.AdoptClients = true })
		defer p.stop()
		old := p.joinHolding("old", holding("v1"))
		defer old.leave()
		time.Sleep(10 * time.Second)
		if !old.gotAnything() || p.unknownConfiguration() != "" {
			t.Errorf("was sent something: %v, alert %q", old.gotAnything(), p.unknownConfiguration())
		}
	})
}

// A version that is retired was there: it is taken away as decided, and no alert.
func TestRetiredVersionIsTakenAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), nil)
		defer p.stop()
		p.register("chat", "v1", "v2")
		if _, err := p.admin.SetModelVersionState(t.Context(), &pb.SetModelVersionStateRequest{Model: "chat", Version: "v2", State: "retired", Actor: "ann", Reason: "old"}); err != nil {
			t.Fatal(err)
		}
		settle()
		old := p.joinHolding("old", holding("v1", "v2"))
		defer old.leave()
		time.Sleep(10 * time.Second)
		if m := old.policy().Model("chat"); m == nil || p.unknownConfiguration() != "" {
			t.Errorf("model %+v, alert %q", m, p.unknownConfiguration())
		}
	})
}
