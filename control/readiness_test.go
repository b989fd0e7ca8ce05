package control_test

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// The production readiness tests of the published deployment strategy, each on a whole
// control plane. What they assert is quoted in the test's comment.

// phase is the name of the phase that a rollout is in.
func phase(r *pb.Rollout) string { return r.GetPhases()[r.GetPhase()].GetName() }

// slow is the standard plan with phases that do not end by themselves while a test looks.
func slow() []*pb.RolloutPhase {
	phases := deploy.PhasesPB(deploy.StandardPhases())
	for _, p := range phases {
		p.MinDuration = durationpb.New(time.Hour)
	}
	return phases
}

// "can advance through all deployment phases": it begins in development, and advancing goes
// to staging, canary, limited_production and full_production; then there is no further one,
// and the candidate serves everything.
func TestReadinessAdvancesThroughAllPhases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		defer p.stop()
		p.register("chat", "traditional", "dspy")
		car := p.join("n")
		defer car.leave()
		r, err := p.admin.StartRollout(t.Context(), &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "dspy", Phases: slow(), Actor: "ann"})
		if err != nil || phase(r) != "development" {
			t.Fatalf("%v, %v; want development", r, err)
		}
		for _, want := range []struct {
			phase string
			share uint32 // of 10 000 buckets, at the sidecar
		}{{"staging", 0}, {"canary", 100}, {"limited_production", 1_000}, {"full_production", 10_000}} {
			if r, err = p.admin.AdvanceRollout(t.Context(), &pb.RolloutActionRequest{Id: "r", Actor: "ann"}); err != nil || phase(r) != want.phase {
				t.Fatalf("%v, %v; want %s", r, err, want.phase)
			}
			if got := shares(car.policy().Model("chat"))["dspy"]; got != want.share {
				t.Errorf("in %s the candidate has %d, want %d", want.phase, got, want.share)
			}
		}
		if r, err = p.admin.AdvanceRollout(t.Context(), &pb.RolloutActionRequest{Id: "r", Actor: "ann"}); err == nil && r.GetState() == "running" {
			t.Errorf("after the last phase: %v", r)
		}
		time.Sleep(3 * time.Second)
		if got := shares(car.policy().Model("chat"))["dspy"]; got != 10_000 {
			t.Errorf("at the end the candidate has %d", got)
		}
	})
}

// "rollback works correctly": advanced twice to canary, a rollback goes to staging. Here the
// place to go back to is asked for by name, and the candidate has no traffic in it; without a
// name a rollback goes to the last good version and a retry begins in that same phase.
func TestReadinessRollbackGoesBack(t *testing.T) {
	for _, to := range []string{"staging", ""} {
		synctest.Test(t, func(t *testing.T) {
			p := newPlane(t)
			defer p.stop()
			p.register("chat", "traditional", "dspy")
			car := p.join("n")
			defer car.leave()
			if _, err := p.admin.StartRollout(t.Context(), &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "dspy", Phases: slow(), Actor: "ann"}); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if _, err := p.admin.AdvanceRollout(t.Context(), &pb.RolloutActionRequest{Id: "r", Actor: "ann"}); err != nil {
					t.Fatal(err)
				}
			}
			if r := p.rollout("r"); phase(r) != "canary" || shares(car.policy().Model("chat"))["dspy"] != 100 {
				t.Fatalf("%v", r)
			}
			if _, err := p.admin.RollbackRollout(t.Context(), &pb.RollbackRolloutRequest{Id: "r", ToPhase: to, Reason: "Test rollback", Actor: "ann"}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(3 * time.Second)
			if got := shares(car.policy().Model("chat")); got["dspy"] != 0 || got["traditional"] != 10_000 {
				t.Errorf("after the rollback %v", got)
			}
			r := p.rollout("r")
			if to != "" {
				if phase(r) != to || r.GetState() != "held" {
					t.Errorf("%s %s, want %s held", phase(r), r.GetState(), to)
				}
				return
			}
			if r.GetState() != "rolled_back" || r.GetPhases()[r.GetReturnPhase()].GetName() != "staging" {
				t.Errorf("%s, to be continued in %s", r.GetState(), r.GetPhases()[r.GetReturnPhase()].GetName())
			}
		})
	}
}

// "users are consistently assigned to groups": asked twice, test_user_123 is in one group.
// Here for a thousand users, at two sidecars, also after the canary has grown: whoever had
// the candidate keeps it.
func TestReadinessAssignmentIsConsistent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		defer p.stop()
		p.register("chat", "traditional", "dspy")
		one, two := p.join("one"), p.join("two")
		defer one.leave()
		defer two.leave()
		if _, err := p.admin.StartRollout(t.Context(), &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "dspy", Actor: "ann", Phases: []*pb.RolloutPhase{
			{Name: "tenth", Weight: 1_000, MinDuration: durationpb.New(time.Hour)}, {Name: "half", Weight: 5_000, MinDuration: durationpb.New(time.Hour)}}}); err != nil {
			t.Fatal(err)
		}
		group := func(m *policy.Model, user string) string {
			return m.Serving(m.ArmOf(experiments.Bucket(m.Salt, user))).Name
		}
		at1, at2 := one.policy().Model("chat"), two.policy().Model("chat")
		before := make(map[string]string)
		for i := range 1000 {
			user := fmt.Sprintf("test_user_%d", i)
			before[user] = group(at1, user)
			if again, other := group(at1, user), group(at2, user); again != before[user] || other != before[user] {
				t.Fatalf("%s is in %s, %s and elsewhere in %s", user, before[user], again, other)
			}
		}
		if _, err := p.admin.AdvanceRollout(t.Context(), &pb.RolloutActionRequest{Id: "r", Actor: "ann"}); err != nil {
			t.Fatal(err)
		}
		had, has, grown := 0, 0, two.policy().Model("chat")
		for user, was := range before {
			now := group(grown, user)
			if was == "dspy" {
				had++
			}
			if now == "dspy" {
				has++
			} else if was == "dspy" {
				t.Errorf("%s lost the candidate when its share grew", user)
			}
		}
		if had < 60 || had > 140 || has < 430 || has > 570 {
			t.Errorf("%d of 1000 had the candidate at 10 %%, %d at 50 %%", had, has)
		}
	})
}

// "alerts are triggered when thresholds are exceeded": an error rate of 0.05 raises an alert
// of the type error_rate. It names the plan's contacts and resolves when the errors end; the
// other published thresholds fire as well.
func TestReadinessErrorRateAlerts(t *testing.T) {
	plan, err := os.ReadFile("../internal/seedconfig/testdata/production_deployment.yaml")
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		defer p.stop()
		p.register("chat", "traditional", "dspy")
		if _, err := p.admin.ConfigureDeployment(t.Context(), &pb.ConfigureDeploymentRequest{Name: "plan.yaml", Text: plan, Actor: "ann"}); err != nil {
			t.Fatal(err)
		}
		reporter := uint64(0)
		report := func(seconds int, failed uint64) {
			for range seconds {
				reporter++
				p.push("pod", reporter, outcomes("traditional", 1, 100, failed, time.Now()))
				time.Sleep(time.Second)
			}
		}
		report(20, 0)
		if a := p.alert("rule-error_rate-chat-traditional"); a != nil {
			t.Fatalf("a healthy version raised %v", a)
		}
		report(60, 5)
		a := p.alert("rule-error_rate-chat-traditional")
		if a.GetState() != "firing" || a.GetNumbers()["rule"] != "error_rate" || a.GetSeverity() != "critical" || !slices.Equal(a.GetNotify(), []string{"engineering", "product"}) {
			t.Fatalf("%v", a)
		}
		if a, err = p.admin.SilenceAlert(t.Context(), &pb.SilenceAlertRequest{Id: a.GetId(), For: durationpb.New(time.Hour), Reason: "known", Actor: "ann"}); err != nil || a.GetState() != "silenced" {
			t.Errorf("%v, %v", a, err)
		}
		report(120, 0)
		if a := p.alert("rule-error_rate-chat-traditional"); a.GetState() != "resolved" {
			t.Errorf("%v", a)
		}
		_, err := p.srv.Admin().SilenceAlert(t.Context(), &pb.SilenceAlertRequest{Id: a.GetId(), For: durationpb.New(time.Hour), Actor: "ann"})
		wantKind(t, err, outrigger.Locked)
	})
}
