package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os/exec"
	"strconv"
)

// A round of the rollback row.
const (
	rollbackSidecars = 100
	rollbackRuns     = 6 // in one round
)

func deployRows() []row {
	return []row{{id: "deploy.rollback", unit: "ms, slowest of a round", better: "lower", run: runRollback,
		what: fmt.Sprintf("from the moment a version with 10 %% of the users begins to fail half of its calls until its weight is 0 in force at the last of %d sidecars: the slowest of %d rollbacks by `outrigger drill rollback`, real processes on loopback, 500 requests/s over all sidecars", rollbackSidecars, rollbackRuns),
		bars: []bar{{what: "ms from the first bad answer to the decision, slowest", metric: "decided_ms", of: absolute, must: 1000, aim: math.NaN()},
			{what: fmt.Sprintf("ms from the push to the last of %d acknowledgements, slowest", rollbackSidecars), metric: "push_ack_ms", of: absolute, must: 250, aim: math.NaN()}}}}
}

// runRollback has no peer: how long others take is set by their intervals, not by their code.
func runRollback(ctx context.Context, e *env, r row) ([]result, error) {
	binary, err := e.mesh()
	if err != nil {
		return nil, err
	}
	c, err := e.compare(ctx, r.id, min(e.rounds, 3), []contender{{name: us, sample: func(ctx context.Context) (map[string]float64, error) {
		return drillRollback(ctx, binary)
	}}})
	if err != nil {
		return nil, err
	}
	if err := e.keep(r.id, c); err != nil {
		return nil, err
	}
	return c.rows(r, "total_ms", []string{""}, func(string) string {
		text := r.what
		for _, m := range []struct{ key, label string }{{"decided_ms", "first bad answer to decision"}, {"zero_ms", "decision to weight 0 everywhere"}, {"median_ms", "median rollback, all stages"}} {
			if s, ok := summarise(c.Rounds, us, "", m.key); ok {
				text += fmt.Sprintf("; %s %.3g", m.label, s.Ours)
			}
		}
		return text
	})
}

// drillRollback is one round. The command fails if a request was wrong, and so does the row.
func drillRollback(ctx context.Context, binary string) (map[string]float64, error) {
	raw, err := exec.CommandContext(ctx, binary, "drill", "rollback", "--sidecars", strconv.Itoa(rollbackSidecars), "--runs", strconv.Itoa(rollbackRuns), "--kills", "0", "--output", "json").Output()
	if err != nil {
		return nil, fmt.Errorf("outrigger drill rollback: %w", err)
	}
	return drillFigures(raw)
}

// drillFigures are the slowest of each stage, and the median of the whole.
func drillFigures(raw []byte) (map[string]float64, error) {
	var report struct {
		Stages map[string]struct{ Median, Worst float64 }
	}
	if err := json.Unmarshal(raw, &report); err != nil {
		return nil, fmt.Errorf("outrigger drill rollback: %w", err)
	}
	out := map[string]float64{}
	for _, stage := range []string{"decided_ms", "zero_ms", "push_ack_ms", "total_ms"} {
		s, ok := report.Stages[stage]
		if !ok {
			return nil, fmt.Errorf("outrigger drill rollback: its report has no stage %s", stage)
		}
		out[stage] = s.Worst
	}
	out["median_ms"] = report.Stages["total_ms"].Median
	return out, nil
}
