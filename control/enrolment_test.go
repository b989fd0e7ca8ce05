package control_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
)

// Who takes part is in the policy that sidecars obey, and leaves it with the experiment;
// experiments of one namespace, of whatever model, claim buckets that do not overlap, and
// release them when they end.
func TestEnrolmentReachesSidecars(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		p.register("chat", "v1", "v2")
		p.register("embed", "v1", "v2")
		ctx, admin := context.Background(), p.srv.Admin()
		create := func(name, model string, e *pb.ExperimentEnrolment) error {
			_, err := admin.CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: name, Model: model, Arms: arms(5000, 5000), Start: true, Enrolment: e})
			return err
		}
		if err := create("ab", "chat", &pb.ExperimentEnrolment{Target: `attributes.plan == "pro"`, Coverage: 2000, Namespace: "prompts", NamespaceEnd: 6000}); err != nil {
			t.Fatal(err)
		}
		if err := create("cd", "embed", &pb.ExperimentEnrolment{Namespace: "prompts", NamespaceStart: 6000}); err != nil {
			t.Fatal(err)
		}
		s := p.join("s1")
		chat, embed := s.policy().Model("chat"), s.policy().Model("embed")
		e := chat.Enrolment
		if e.Target == "" || e.Version != "v1" || len(e.Gates) != 2 || e.Gates[0].Salt != "coverage:ab" || e.Gates[0].End != 2000 || e.Gates[1].Salt != "namespace:prompts" || e.Gates[1].End != 6000 {
			t.Fatalf("enrolment of chat: %+v", e)
		}
		if g := embed.Enrolment.Gates; len(g) != 1 || g[0].Salt != e.Gates[1].Salt || g[0].Start != 6000 || g[0].End != 10_000 {
			t.Fatalf("enrolment of embed: %+v", g)
		}
		for _, c := range []struct {
			name string
			e    *pb.ExperimentEnrolment
			want string
		}{
			{"overlap", &pb.ExperimentEnrolment{Namespace: "prompts", NamespaceStart: 5999, NamespaceEnd: 6000}, `[5999,6000) overlap with [0,6000) of experiment "ab"`},
			{"all of it", &pb.ExperimentEnrolment{Namespace: "prompts"}, "[0,10000) overlap"},
			{"empty range", &pb.ExperimentEnrolment{Namespace: "n", NamespaceStart: 7, NamespaceEnd: 7}, "[7,7)"},
			{"past the end", &pb.ExperimentEnrolment{Namespace: "n", NamespaceEnd: 10_001}, "10001"},
			{"buckets of nothing", &pb.ExperimentEnrolment{NamespaceEnd: 5}, "namespace is empty"},
			{"coverage", &pb.ExperimentEnrolment{Coverage: 10_001}, "coverage is 10001, allowed is 1..10000"},
			{"target", &pb.ExperimentEnrolment{Target: "plan == 'pro'"}, "column 1: undeclared reference to 'plan'"},
			{"name", &pb.ExperimentEnrolment{Namespace: "a/b"}, `"a/b"`},
		} {
			head := p.log.Head()
			_, err := admin.CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: "x", Model: "chat", Arms: arms(5000, 5000), Enrolment: c.e})
			if !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), c.want) || p.log.Head() != head {
				t.Errorf("%s: %v, want %q", c.name, err, c.want)
			}
		}
		if _, err := admin.SetExperimentState(ctx, &pb.SetExperimentStateRequest{Name: "ab", State: "stopped"}); err != nil {
			t.Fatal(err)
		}
		if e := s.policy().Model("chat").Enrolment; e.Limited() || e.Version != "" {
			t.Errorf("after the end: %+v", e)
		}
		if err := create("ef", "chat", &pb.ExperimentEnrolment{Namespace: "prompts", NamespaceEnd: 6000}); err != nil {
			t.Errorf("the buckets of an ended experiment: %v", err)
		}
	})
}

// Two replicas that let overlapping claims pass at the same moment: the log's order decides.
func TestNamespaceRace(t *testing.T) {
	log := memory.New()
	one := start(t, log, nil)
	one.register("chat", "v1", "v2")
	one.register("embed", "v1", "v2")
	claim := func(p *plane, name, model string) error {
		_, err := p.srv.Admin().CreateExperiment(context.Background(), &pb.CreateExperimentRequest{Name: name, Model: model, Arms: arms(5000, 5000),
			Enrolment: &pb.ExperimentEnrolment{Namespace: "n"}})
		return err
	}
	raced := false
	racing := &failingLog{Log: log}
	two := start(t, racing, nil)
	racing.fail = func(writes []eventlog.Write) error {
		if raced || !strings.HasPrefix(writes[0].Aggregate, "experiment/") {
			return nil
		}
		raced = true
		return claim(one, "first", "embed")
	}
	err := claim(two, "second", "chat")
	if !raced || !outrigger.IsKind(err, outrigger.NotFound) {
		t.Fatalf("raced %v: %v", raced, err)
	}
	list, err := two.srv.Admin().ListExperiments(t.Context(), &pb.ListRequestAll{})
	if err != nil || len(list.Experiments) != 1 || list.Experiments[0].Name != "first" {
		t.Fatalf("%v, %v", list, err)
	}
}
