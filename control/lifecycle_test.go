package control_test

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
)

// outcomes is one report of a sidecar about one version in one weight epoch.
func outcomes(version string, epoch, requests, failures uint64, at time.Time) *pb.OutcomeDelta {
	d := &pb.OutcomeDelta{Model: "chat", Version: version, Arm: version, Region: "eu", WeightEpoch: epoch,
		Requests: requests, Failures: failures, Attempts: requests}
	for i := range failures {
		d.FailedUnits = append(d.FailedUnits, uint32(epoch*1_000_003+uint64(at.UnixMilli())*31+i))
	}
	if failures > 0 {
		d.FirstFailureUnixNano = uint64(at.UnixNano())
	}
	return d
}

// TestBadCanaryIsRolledBack is the third walk of the design, end to end over real parts:
//
//  1. v1 and v2 of "chat" are registered; a sidecar obeys v1 alone.
//  2. A rollout starts; the sidecar gives v2 its 1 % and knows the dead-man lease.
//  3. The sidecar reports that v2 fails half its requests.
//  4. The monitor rolls back by itself: the sidecar is told weight 0 at once.
//  5. The sidecar's acknowledgement completes the rollback; the version is quarantined.
//  6. An operator clears the version, which resolves the alert.
func TestBadCanaryIsRolledBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), nil)
		defer p.stop()
		ctx := t.Context()
		p.register("chat", "v1", "v2")
		car := p.join("node-1/pod-1")
		defer car.leave()
		if got := shares(car.policy().Model("chat")); !maps.Equal(got, map[string]uint32{"v1": 10_000}) {
			t.Fatalf("before the rollout: %v", got)
		}

		r, err := p.admin.StartRollout(ctx, &pb.StartRolloutRequest{Model: "chat", Candidate: "v2", Actor: "ann", Reason: "faster"})
		if err != nil {
			t.Fatal(err)
		}
		if r.GetId() != "chat-v2-1" || r.GetLastGood() != "v1" || r.GetState() != "running" || len(r.GetPhases()) != 3 {
			t.Fatalf("rollout %v", r)
		}
		canary := car.policy().Model("chat")
		if got := shares(canary); !maps.Equal(got, map[string]uint32{"v1": 9_900, "v2": 100}) {
			t.Fatalf("canary: %v", got)
		}
		if canary.DeadMan != 10*time.Second || canary.LastGood != "v1" || canary.WeightEpoch != r.GetWeightEpoch() {
			t.Fatalf("canary %+v, rollout epoch %d", canary, r.GetWeightEpoch())
		}

		reports, err := pb.NewReportsClient(p.conn).Push(ctx)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		sequence := uint64(0)
		for p.rollout("chat-v2-1").GetRollback() == nil && sequence < 60 {
			sequence++
			now := time.Now()
			d := &pb.Delta{Reporter: "pod-1", Sequence: sequence, Node: &pb.Node{Id: "node-1/pod-1", Kind: "sidecar", Region: "eu"},
				Outcomes: []*pb.OutcomeDelta{outcomes("v1", canary.WeightEpoch, 990, 10, now), outcomes("v2", canary.WeightEpoch, 10, 5, now)}}
			if err := reports.Send(d); err != nil {
				t.Fatal(err)
			}
			if _, err := reports.Recv(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		rolled := p.rollout("chat-v2-1")
		if rolled.GetRollback() == nil {
			t.Fatalf("not rolled back after %v: %v", time.Since(began), rolled)
		}
		t.Logf("rolled back after %v of reports: %s", time.Since(began), rolled.GetRollback().GetReason())

		after := car.policy()
		if got := shares(after.Model("chat")); !maps.Equal(got, map[string]uint32{"v1": 10_000}) || after.Model("chat").DeadMan != 0 {
			t.Fatalf("after the rollback: %v, lease %v", got, after.Model("chat").DeadMan)
		}
		if e := p.events("rollout/chat-v2-1")[1]; after.Position < e.GetPosition() {
			t.Fatalf("the sidecar is at %d, the rollback at %d", after.Position, e.GetPosition())
		}
		time.Sleep(2 * time.Second)
		got := kinds(p.events("rollout/chat-v2-1"))
		if want := []string{"rollout_started", "rollback_started", "rollback_completed", "rollout_ended"}; !slices.Equal(got, want) {
			t.Fatalf("events %v, want %v", got, want)
		}
		if c := p.rollout("chat-v2-1").GetRollbackCompleted(); c.GetAcked() != 1 || len(c.GetLaggards()) != 0 {
			t.Fatalf("completed %v", c)
		}
		if v := p.version("chat", "v2"); v.GetState() != "quarantined" || v.GetStats().GetFailures() != 5*sequence {
			t.Fatalf("v2 is %v after %d reports", v, sequence)
		}
		if _, err := p.admin.StartRollout(ctx, &pb.StartRolloutRequest{Model: "chat", Candidate: "v2"}); err == nil || !strings.Contains(err.Error(), "quarantined") {
			t.Fatalf("a quarantined version was rolled out: %v", err)
		}
		if a := p.alert("chat-v2-1"); a.GetSeverity() != "critical" || a.GetResolvedAt() != nil {
			t.Fatalf("alert %v", a)
		}
		if _, err := p.admin.SetModelVersionState(ctx, &pb.SetModelVersionStateRequest{Model: "chat", Version: "v2", State: "registered", Actor: "ann", Reason: "fixed"}); err != nil {
			t.Fatal(err)
		}
		if a := p.alert("chat-v2-1"); a.GetResolvedAt() == nil {
			t.Fatalf("alert still stands: %v", a)
		}
		settle()
		if s := p.status(); len(s.GetNodes()) != 1 || s.GetNodes()[0].GetAckedPosition() != s.GetPolicyPosition() {
			t.Fatalf("nodes %v, policy at %d", s.GetNodes(), s.GetPolicyPosition())
		}
	})
}

// TestAbortAndAdvance: the same machine driven by hand.
func TestAbortAndAdvance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), nil)
		defer p.stop()
		ctx := t.Context()
		p.register("chat", "v1", "v2")
		car := p.join("n")
		defer car.leave()
		if _, err := p.admin.StartRollout(ctx, &pb.StartRolloutRequest{Id: "one", Model: "chat", Candidate: "v2"}); err != nil {
			t.Fatal(err)
		}
		r, err := p.admin.AbortRollout(ctx, &pb.RolloutActionRequest{Id: "one", Actor: "bob", Reason: "too slow"})
		if err != nil || r.GetState() != "rolling_back" || r.GetRollback().GetReason() != "manual: too slow" {
			t.Fatalf("%v, %v", r, err)
		}
		if got := shares(car.policy().Model("chat")); got["v2"] != 0 {
			t.Fatalf("after the abort: %v", got)
		}
		time.Sleep(2 * time.Second)
		if r := p.rollout("one"); r.GetState() != "rolled_back" || r.GetRollbackCompleted().GetAcked() != 1 {
			t.Fatalf("%v", r)
		}
		if v := p.version("chat", "v2"); v.GetState() != "registered" {
			t.Fatalf("an abort is no verdict, but v2 is %s", v.GetState())
		}

		if _, err := p.admin.StartRollout(ctx, &pb.StartRolloutRequest{Id: "two", Model: "chat", Candidate: "v2"}); err != nil {
			t.Fatal(err)
		}
		for _, want := range []map[string]uint32{{"v1": 9_000, "v2": 1_000}, {"v2": 10_000}, {"v2": 10_000}} {
			if _, err := p.admin.AdvanceRollout(ctx, &pb.RolloutActionRequest{Id: "two", Actor: "bob"}); err != nil {
				t.Fatal(err)
			}
			if got := shares(car.policy().Model("chat")); !maps.Equal(got, want) {
				t.Fatalf("%v, want %v", got, want)
			}
		}
		if r := p.rollout("two"); r.GetState() != "completed" {
			t.Fatalf("%v", r)
		}
		m := p.model("chat")
		if m.GetAliases()["champion"] != "v2" || m.GetAliases()["last_good"] != "v1" || p.version("chat", "v2").GetState() != "production" {
			t.Fatalf("%v", m)
		}
		_, err = p.admin.AbortRollout(ctx, &pb.RolloutActionRequest{Id: "two"})
		if err == nil || !strings.Contains(err.Error(), "completed") {
			t.Fatalf("a completed rollout was aborted: %v", err)
		}
	})
}

// TestPushIsRecorded: the log says when every sidecar had a policy.
func TestPushIsRecorded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), nil)
		defer p.stop()
		car := p.join("n")
		defer car.leave()
		p.register("chat", "v1")
		settle()
		position := car.policy().Position
		pushes := p.events("push/policy")
		if len(pushes) == 0 {
			t.Fatal("no push was recorded")
		}
		last := pushes[len(pushes)-1].GetPushRecorded()
		if last.GetPush() != position || last.GetAcked() != 1 || len(last.GetNacked()) != 0 {
			t.Fatalf("recorded %v, the sidecar is at %d", last, position)
		}
		// A recorded push is an event, but none that policy depends on: it causes no push.
		if s := p.status(); s.GetPolicyPosition() != position || s.GetHead() <= position {
			t.Fatalf("policy at %d, head %d, sidecar at %d", s.GetPolicyPosition(), s.GetHead(), position)
		}
	})
}

// TestRestartContinues: a new process over the same log serves the same policy and the
// same model, and does not register its region again.
func TestRestartContinues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := memory.New()
		first := start(t, log, nil)
		first.register("chat", "v1", "v2")
		if _, err := first.admin.StartRollout(t.Context(), &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "v2"}); err != nil {
			t.Fatal(err)
		}
		settle()
		before := first.status()
		first.stop()
		second := start(t, log, nil)
		defer second.stop()
		car := second.join("n")
		defer car.leave()
		if got := shares(car.policy().Model("chat")); got["v2"] != 100 {
			t.Fatalf("after the restart: %v", got)
		}
		if after := second.status(); after.GetPolicyPosition() != before.GetPolicyPosition() {
			t.Fatalf("policy at %d, before the restart %d", after.GetPolicyPosition(), before.GetPolicyPosition())
		}
		if n := len(second.events("region/eu")); n != 1 {
			t.Fatalf("the region was registered %d times", n)
		}
	})
}

func (p *plane) rollout(id string) *pb.Rollout {
	p.t.Helper()
	r, err := p.admin.GetRollout(context.Background(), &pb.NameRequest{Name: id})
	if err != nil {
		p.t.Fatal(err)
	}
	return r
}

func (p *plane) model(name string) *pb.Model {
	p.t.Helper()
	m, err := p.admin.GetModel(context.Background(), &pb.NameRequest{Name: name})
	if err != nil {
		p.t.Fatal(err)
	}
	return m
}

func (p *plane) version(model, version string) *pb.ModelVersion {
	p.t.Helper()
	for _, v := range p.model(model).GetVersions() {
		if v.GetVersion() == version {
			return v
		}
	}
	p.t.Fatalf("model %s has no version %s", model, version)
	return nil
}

func (p *plane) status() *pb.StatusResponse {
	p.t.Helper()
	s, err := p.admin.Status(context.Background(), &pb.ListRequestAll{})
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

func (p *plane) alert(id string) *pb.Alert {
	p.t.Helper()
	for _, a := range p.status().GetAlerts() {
		if a.GetId() == id {
			return a
		}
	}
	return nil
}
