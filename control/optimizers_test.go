package control_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// Strategies choose by what was recorded, also after a restart, and what is wrong with a
// question or a record names the field and writes nothing.
func TestOptimizerHistorySurvivesARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		log := memory.New()
		p := start(t, log, nil)
		record := func(p *plane, id int, optimizer string, reached float64) float64 {
			r, err := p.admin.RecordOptimization(ctx, &pb.RecordOptimizationRequest{TaskType: "prompt", Task: "x", Optimizer: optimizer,
				Baseline: 10, Reached: reached, Evaluations: 30, RequestId: fmt.Sprint("run-", id), Actor: "ann"})
			if err != nil {
				t.Fatal(err)
			}
			return r.GetScore()
		}
		for i := range 20 {
			record(p, 10*i, "cma_es", 1)
			record(p, 10*i+1, "genetic_algorithm", 9)
			record(p, 10*i+2, "bayesian_optimization", 8)
			record(p, 10*i+3, "simulated_annealing", 9.5)
			record(p, 10*i+4, "nelder_mead", 11)
			record(p, 10*i+5, "sgd_basic", 9)
			record(p, 10*i+6, "adam_optimizer", 9)
		}
		head := log.Head()
		if s := record(p, 0, "cma_es", 1); s != 1 || log.Head() != head {
			t.Errorf("the same run again: score %v, head %d, was %d", s, log.Head(), head)
		}
		mean := func(p *plane) map[string]string {
			r, err := p.admin.ListOptimizers(ctx, &pb.ListRequestAll{})
			if err != nil {
				t.Fatal(err)
			}
			out := map[string]string{}
			for _, h := range r.GetHistory() {
				out[h.GetOptimizer()] = fmt.Sprintf("%d %.3f", h.GetRuns(), h.GetMeanScore())
			}
			return out
		}
		ask := func(p *plane, strategy, task string) *pb.SelectOptimizerResponse {
			s, err := p.admin.SelectOptimizer(ctx, &pb.SelectOptimizerRequest{Strategy: strategy, TaskType: "prompt", Task: task, Budget: 50, Noisy: true})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		choices := func(p *plane) string {
			var b strings.Builder
			for _, s := range []string{"performance_weighted", "feature_matching", "adaptive", "experimental"} {
				for i := range 10 {
					c := ask(p, s, fmt.Sprint("task-", i))
					if c.GetReason() == "" {
						t.Errorf("%s gives no reason", s)
					}
					fmt.Fprintf(&b, "%s %s\n", s, c.GetOptimizer().GetInfo().GetId())
				}
			}
			return b.String()
		}
		if m := mean(p); m["cma_es"] != "20 1.000" || m["bayesian_optimization"] != "20 0.222" || m["nelder_mead"] != "20 0.000" {
			t.Errorf("scores %v", m)
		}
		was, scores := choices(p), fmt.Sprint(mean(p))
		if n := strings.Count(was, "adaptive cma_es"); n < 9 {
			t.Errorf("adaptive chose the best in %d of 10 tasks:\n%s", n, was)
		}
		if seen := map[string]bool{}; true {
			for i := range 40 {
				seen[ask(p, "experimental", fmt.Sprint("unit-", i)).GetOptimizer().GetInfo().GetId()] = true
			}
			if len(seen) < 5 {
				t.Errorf("an experiment over optimisers has only the arms %v", seen)
			}
		}
		refused(t, log, p)
		p.stop()
		again := start(t, log, nil)
		if now := choices(again); now != was {
			t.Errorf("after a restart:\n%s\nbefore:\n%s", now, was)
		}
		if now := fmt.Sprint(mean(again)); now != scores {
			t.Errorf("after a restart %s, before %s", now, scores)
		}
	})
}

func refused(t *testing.T, log *memory.Log, p *plane) {
	t.Helper()
	ctx, head := context.Background(), log.Head()
	for want, err := range map[string]error{
		`strategy "best"`:       second(p.admin.SelectOptimizer(ctx, &pb.SelectOptimizerRequest{Strategy: "best", TaskType: "t"})),
		"task_type":             second(p.admin.SelectOptimizer(ctx, &pb.SelectOptimizerRequest{})),
		"budget is -1":          second(p.admin.SelectOptimizer(ctx, &pb.SelectOptimizerRequest{TaskType: "t", Budget: -1})),
		`"magic" not found`:     second(p.admin.RecordOptimization(ctx, &pb.RecordOptimizationRequest{TaskType: "t", Task: "x", Optimizer: "magic", Evaluations: 1})),
		"there is at least one": second(p.admin.RecordOptimization(ctx, &pb.RecordOptimizationRequest{TaskType: "t", Task: "x", Optimizer: "random"})),
		`address is "nowhere"`:  second(p.admin.RegisterOptimizer(ctx, &pb.RegisterOptimizerRequest{Address: "nowhere"})),
		`"random" not found`:    second(p.admin.RemoveOptimizer(ctx, &pb.RemoveOptimizerRequest{Name: "random"})),
	} {
		if k := outrigger.KindOf(status.FromGRPC(err, nil)); err == nil || !strings.Contains(err.Error(), want) || k != outrigger.Invalid && k != outrigger.NotFound {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if log.Head() != head {
		t.Errorf("something refused was written: head %d, was %d", log.Head(), head)
	}
}

func second[T any](_ T, err error) error { return err }
