package control_test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
)

// TestBadVersionAtEachPhase: in every phase with traffic a version that fails is taken out
// by itself, to the last good version, and a retry begins one phase before.
func TestBadVersionAtEachPhase(t *testing.T) {
	for _, c := range []struct{ phase, back string }{
		{"canary", "staging"}, {"limited_production", "canary"}, {"full_production", "limited_production"},
	} {
		t.Run(c.phase, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := start(t, memory.New(), nil)
				defer p.stop()
				p.register("chat", "v1", "v2")
				car := p.join("n")
				defer car.leave()
				if _, err := p.admin.StartRollout(t.Context(), &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "v2", Plan: "standard", Actor: "ann"}); err != nil {
					t.Fatal(err)
				}
				// Development and staging ask for nothing. Between two ticks of the monitor, because
				// the last phase asks for nothing either and would end before its first reports.
				time.Sleep(5*time.Second + 500*time.Millisecond)
				if c.phase != "canary" {
					if _, err := p.admin.AdvanceRollout(t.Context(), &pb.RolloutActionRequest{Id: "r", ToPhase: c.phase, Actor: "bob"}); err != nil {
						t.Fatal(err)
					}
				}
				r := p.rollout("r")
				if r.GetPhases()[r.GetPhase()].GetName() != c.phase {
					t.Fatalf("in %v", r)
				}
				weight := uint64(r.GetWeight())
				if got := shares(car.policy().Model("chat"))["v2"]; uint64(got) != weight {
					t.Fatalf("sidecar gives %d, rollout %d", got, weight)
				}
				reports, err := pb.NewReportsClient(p.conn).Push(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for i := uint64(1); i <= 120 && p.rollout("r").GetRollback() == nil; i++ {
					now, epoch := time.Now(), r.GetWeightEpoch()
					n := max(weight*1000/10_000, 10)
					out := []*pb.OutcomeDelta{outcomes("v2", epoch, n, n/2, now)}
					if weight < 10_000 {
						out = append(out, outcomes("v1", epoch, 1000-n, 10, now))
					}
					if err := reports.Send(&pb.Delta{Reporter: "pod", Sequence: i, Node: &pb.Node{Id: "n", Kind: "sidecar"}, Outcomes: out}); err != nil {
						t.Fatal(err)
					}
					if _, err := reports.Recv(); err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Second)
				}
				time.Sleep(2 * time.Second)
				r = p.rollout("r")
				if r.GetState() != "rolled_back" || r.GetRollback().GetMode() != "automatic" || r.GetPhases()[r.GetReturnPhase()].GetName() != c.back {
					t.Fatalf("%v", r)
				}
				if got := shares(car.policy().Model("chat")); !maps.Equal(got, map[string]uint32{"v1": 10_000}) {
					t.Errorf("serves %v", got)
				}
			})
		})
	}
}

// TestDeploymentIsConfigured: a plan is one event, the next rollout follows it, and a bad
// one changes nothing.
func TestDeploymentIsConfigured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := start(t, memory.New(), nil)
		defer p.stop()
		p.register("chat", "v1", "v2")
		text, err := os.ReadFile("../internal/seedconfig/testdata/production_deployment.yaml")
		if err != nil {
			t.Fatal(err)
		}
		configure := func(text string) (*pb.DeploymentConfiguration, error) {
			return p.srv.Admin().ConfigureDeployment(t.Context(), &pb.ConfigureDeploymentRequest{Name: "plan.yaml", Text: []byte(text), Actor: "ann"})
		}
		for range 2 { // the second time it is in force already
			if d, err := configure(string(text)); err != nil || len(d.GetNotes()) == 0 || d.GetSha256() == "" {
				t.Fatalf("%v, %v", d, err)
			}
		}
		_, err = configure("deployment: {phases: {x: {}}}")
		wantKind(t, err, outrigger.Invalid)
		_, err = configure("deployment: {phases: {full_production: {gates: {g: {kind: automated_test, command: [sh]}}}}}")
		wantKind(t, err, outrigger.Denied)
		if n := len(p.events("deployment/plan")); n != 1 {
			t.Errorf("%d events", n)
		}
		r, err := p.admin.StartRollout(t.Context(), &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "v2", Actor: "ann"})
		if err != nil || len(r.GetPhases()) != 3 || !slices.Equal(r.GetNotify(), []string{"engineering", "product"}) || r.GetPhases()[0].GetGates()[0].GetKind() != "metrics_threshold" {
			t.Fatalf("%v, %v", r, err)
		}
	})
}

// stuck is a log that can be made to take no writes.
type stuck struct {
	eventlog.Log
	closed atomic.Bool
}

func (s *stuck) Append(ctx context.Context, id string, writes ...eventlog.Write) (eventlog.Appended, error) {
	if s.closed.Load() {
		return eventlog.Appended{}, outrigger.Errorf(outrigger.Unavailable, "the disk is full")
	}
	return s.Log.Append(ctx, id, writes...)
}

// TestBreakGlass: with a log that takes no writes the version is out at every sidecar,
// stays out over a restart, and the log has it as soon as it takes writes.
func TestBreakGlass(t *testing.T) {
	file := filepath.Join(t.TempDir(), "emergency.json")
	synctest.Test(t, func(t *testing.T) {
		log := &stuck{Log: memory.New()}
		options := func(o *control.Options) { o.GlassFile = file }
		p := start(t, log, options)
		defer func() { p.stop() }()
		p.register("chat", "v1", "v2")
		car := p.join("n")
		if _, err := p.admin.StartRollout(t.Context(), &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "v2", Phases: []*pb.RolloutPhase{{Name: "half", Weight: 5000, MinDuration: durationpb.New(time.Hour)}}, Actor: "ann"}); err != nil {
			t.Fatal(err)
		}
		log.closed.Store(true)
		if _, err := p.admin.AbortRollout(t.Context(), &pb.RolloutActionRequest{Id: "r"}); err == nil {
			t.Fatal("the log takes writes after all; the test proves nothing")
		}
		for want, r := range map[string]*pb.BreakGlassRequest{
			"needs a reason": {Model: "chat", Actor: "bob"},
			"not found":      {Model: "chat", Version: "v9", Reason: "x"},
		} {
			if _, err := p.admin.BreakGlass(t.Context(), r); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v: %v, want %s", r, err, want)
			}
		}
		out, err := p.admin.BreakGlass(t.Context(), &pb.BreakGlassRequest{Model: "chat", Version: "v2", Actor: "bob", Reason: "leaks"})
		if err != nil || out.GetRecorded() || out.GetServes() != "v1" || out.GetPending() == "" {
			t.Fatalf("%v, %v", out, err)
		}
		all := map[string]uint32{"v1": 10_000}
		if got := shares(car.policy().Model("chat")); !maps.Equal(got, all) {
			t.Fatalf("with the glass broken: %v", got)
		}
		if r := p.rollout("r"); r.GetState() != "running" {
			t.Fatalf("the log has it: %v", r)
		}
		car.leave()
		p.stop()
		p = start(t, log, options)
		car = p.join("n")
		defer car.leave()
		if got := shares(car.policy().Model("chat")); !maps.Equal(got, all) {
			t.Fatalf("after a restart: %v", got)
		}
		log.closed.Store(false)
		time.Sleep(5 * time.Second)
		r := p.rollout("r")
		if r.GetState() != "rolled_back" || r.GetRollback().GetMode() != "emergency" || r.GetRollback().GetReason() != "emergency: leaks" {
			t.Fatalf("%v", r)
		}
		if e := p.events("rollout/r"); e[1].GetActor() != "bob" || e[1].GetMetadata()["break_glass_at"] == "" {
			t.Errorf("recorded %v", e[1])
		}
		if raw, err := os.ReadFile(file); err != nil || fmt.Sprint(string(raw)) != "[]" {
			t.Errorf("the overlay holds %s, %v", raw, err)
		}
		if got := shares(car.policy().Model("chat")); !maps.Equal(got, all) {
			t.Errorf("at the end: %v", got)
		}
	})
}
