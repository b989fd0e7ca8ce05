package meshtest

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// bg is a context with a limit no honest step comes near.
func bg(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func mustGet(t *testing.T, p *Pod, name string) Read {
	t.Helper()
	r, err := p.Get(bg(t), "s", name)
	if err != nil {
		t.Fatalf("%s reads %s: %v", p.Name, name, err)
	}
	return r
}

// A set on one pod is seen by the other pod of the node as soon as the set returns, and
// by a pod of another node within a few network delays; no TTL (1 s, 60 s) is waited
// for. Reads before and after come from the tiers they should.
func TestSetIsSeenEverywhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(t, Options{Nodes: 2, PodsPerNode: 2})
		defer w.Stop()
		a, b, c := w.Pods[0], w.Pods[1], w.Pods[2]
		if err := a.Register(bg(t), "s", "x", "0.5"); err != nil {
			t.Fatal(err)
		}
		for _, p := range []*Pod{b, c} { // warm every tier
			for range 3 {
				mustGet(t, p, "x")
			}
			if r := mustGet(t, p, "x"); r.Tier != "process" || r.Feed != "live" {
				t.Errorf("%s: a repeated read came from %s, feed %s", p.Name, r.Tier, r.Feed)
			}
		}
		if _, err := a.Set(bg(t), "s", "x", "0.75"); err != nil {
			t.Fatal(err)
		}
		acked := time.Now()
		if r := mustGet(t, b, "x"); r.Value != "0.75" || r.Version != 1 {
			t.Errorf("the neighbour reads %+v right after the set", r)
		}
		for mustGet(t, c, "x").Value != "0.75" {
			if time.Since(acked) > 50*time.Millisecond {
				t.Fatal("the other node does not see the set after 50 ms")
			}
			time.Sleep(time.Millisecond)
		}
		t.Logf("seen on the other node %v after the acknowledgement", time.Since(acked))
		// A deletion is seen the same way.
		if _, err := w.Control.Vars.Delete(bg(t), &pb.GetRequest{Session: "s", Identifier: "x"}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
		for _, p := range w.Pods {
			if _, err := p.Get(bg(t), "s", "x"); gstatus.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "not found") {
				t.Errorf("%s reads a deleted variable: %v", p.Name, err)
			}
		}
	})
}

// With the control plane gone, known variables and routes are served and say so;
// unknown variables and writes fail at once; when it is back everything is live again.
func TestControlPlaneAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(t, Options{})
		defer w.Stop()
		w.StartModel("v1")
		p := w.Pods[0]
		if err := p.Register(bg(t), "s", "x", "0.5"); err != nil {
			t.Fatal(err)
		}
		mustGet(t, p, "x")
		time.Sleep(100 * time.Millisecond) // policy arrives
		if code, h, _, err := p.Chat(bg(t), "ada", false); err != nil || code != 200 || h.Get(outrigger.HeaderPolicy) != "live" {
			t.Fatalf("before: %d %v %v", code, h, err)
		}

		w.StopControl()
		time.Sleep(2 * time.Second)
		if r := mustGet(t, p, "x"); r.Value != "0.5" || r.Feed != "down" || !r.Stale {
			t.Errorf("a known variable is read as %+v", r)
		}
		code, h, _, err := p.Chat(bg(t), "ada", false)
		if err != nil || code != 200 || h.Get(outrigger.HeaderPolicy) != "last-good" || h.Get(outrigger.HeaderVersion) != "v1" {
			t.Errorf("a known route: %d %v %v", code, h, err)
		}
		start := time.Now()
		if _, err := p.Get(bg(t), "s", "never-read"); gstatus.Code(err) != codes.Unavailable {
			t.Errorf("an unknown variable: %v", err)
		}
		if _, err := p.Set(bg(t), "s", "x", "0.6"); err == nil {
			t.Error("a write succeeded")
		}
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("failing took %v", d)
		}

		w.StartControl()
		time.Sleep(5 * time.Second)
		if r := mustGet(t, p, "x"); r.Feed != "live" || r.Stale {
			t.Errorf("after the return: %+v", r)
		}
		if _, err := p.Set(bg(t), "s", "x", "0.7"); err != nil {
			t.Errorf("a write after the return: %v", err)
		}
	})
}

// The same user gets the same arm through every sidecar, and a 90/10 split is 90/10.
func TestSameUserSameArm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(t, Options{Nodes: 2, PodsPerNode: 1})
		defer w.Stop()
		w.StartModel("v1")
		w.StartModel("v2")
		if _, err := w.Control.Admin.CreateExperiment(bg(t), &pb.CreateExperimentRequest{Name: "ab", Model: ModelName, Actor: "test", Start: true,
			Arms: []*pb.ExperimentArm{{Name: "a", Version: "v1", Weight: 9000}, {Name: "b", Version: "v2", Weight: 1000}}}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
		const users = 2000
		inB := 0
		for i := range users {
			var arms [2]string
			for k, p := range w.Pods {
				code, h, _, err := p.Chat(bg(t), fmt.Sprintf("user-%d", i), i%50 == 0)
				if err != nil || code != 200 {
					t.Fatalf("user %d: %d %v", i, code, err)
				}
				arms[k] = h.Get(outrigger.HeaderArm) + "/" + h.Get(outrigger.HeaderVersion)
			}
			if arms[0] != arms[1] {
				t.Fatalf("user %d is in %s on one sidecar and %s on the other", i, arms[0], arms[1])
			}
			if arms[0] == "b/v2" {
				inB++
			}
		}
		// ±3 standard deviations of 2,000 users at 10 %; proxy/inference tests 20,000.
		if share := float64(inB) / users; share < 0.08 || share > 0.12 {
			t.Errorf("%.1f %% of the users are in arm b, want 10", 100*share)
		}
		for v, m := range w.Models {
			for name := range m.Models() {
				if name != ModelName+"-"+v {
					t.Errorf("the server of %s was asked for model %q", v, name)
				}
			}
		}
	})
}

// A candidate that turns bad is rolled back everywhere: decided by the numbers, pushed,
// acknowledged by every sidecar, and not one request reaches it afterwards.
func TestRollback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(t, Options{Nodes: 2, PodsPerNode: 2})
		defer w.Stop()
		w.StartModel("v1")
		bad := w.StartModel("v2")
		if _, err := w.Control.Admin.StartRollout(bg(t), &pb.StartRolloutRequest{Id: "r", Model: ModelName, Candidate: "v2", Actor: "test",
			Phases: []*pb.RolloutPhase{{Name: "canary", Weight: 2000, MinDuration: durationpb.New(time.Hour)}, {Name: "full", Weight: 9900}}}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
		user, servedBad := 0, 0
		traffic := func(n int) {
			for range n {
				user++
				code, h, _, err := w.Pods[user%len(w.Pods)].Chat(bg(t), fmt.Sprintf("u%d", user), false)
				if err != nil {
					t.Fatal(err)
				}
				if h.Get(outrigger.HeaderVersion) == "v2" {
					servedBad++
					if (code != http.StatusOK) != bad.Failing.Load() {
						t.Fatalf("version 2 answered %d", code)
					}
				} else if code != http.StatusOK {
					t.Fatalf("version 1 answered %d", code)
				}
			}
		}
		traffic(100)
		if servedBad < 5 {
			t.Fatalf("the canary served only %d of 100", servedBad)
		}
		bad.Failing.Store(true)
		turned := time.Now()
		state := func() *pb.Rollout {
			r, err := w.Control.Admin.GetRollout(bg(t), &pb.NameRequest{Name: "r"})
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		for state().State == "running" {
			traffic(5)
			if time.Since(turned) > 30*time.Second {
				t.Fatalf("not rolled back after %v: %v", time.Since(turned), state())
			}
		}
		decided := time.Since(turned)
		for state().State != "rolled_back" {
			time.Sleep(time.Millisecond)
			if time.Since(turned) > 60*time.Second {
				t.Fatalf("rollback not completed: %v", state())
			}
		}
		r := state()
		if r.RollbackCompleted.Acked != 4 || len(r.RollbackCompleted.Laggards) != 0 {
			t.Errorf("completed with %v", r.RollbackCompleted)
		}
		if len(r.Rollback.Evidence) == 0 || r.Rollback.ToVersion != "v1" {
			t.Errorf("decided without numbers: %v", r.Rollback)
		}
		before := bad.Served.Load()
		traffic(200)
		if got := bad.Served.Load() - before; got != 0 {
			t.Errorf("%d requests reached the bad version after every sidecar had acknowledged", got)
		}
		t.Logf("decided %v after turning bad, %d requests went to the candidate in all", decided, servedBad)
	})
}

// A sidecar that restarts while the control plane is gone serves from its last good
// policy and says so.
func TestSidecarRestartsAlone(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := New(t, Options{PodsPerNode: 1, StateDir: dir})
		defer w.Stop()
		w.StartModel("v1")
		time.Sleep(time.Second)
		if code, _, _, err := w.Pods[0].Chat(bg(t), "ada", false); err != nil || code != 200 {
			t.Fatalf("%d %v", code, err)
		}
		w.StopControl()
		p := w.RestartPod(0)
		<-p.Policy.Ready()
		code, h, _, err := p.Chat(bg(t), "ada", true)
		if err != nil || code != 200 || h.Get(outrigger.HeaderPolicy) != "last-good" {
			t.Errorf("%d %v %v", code, h, err)
		}
	})
}
