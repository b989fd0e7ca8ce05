package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"time"

	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

func experimentRows() []row {
	return []row{{
		id: "experiments.assign", unit: "ns/op", better: "lower", run: runAssign,
		what: "one of 1024 users to one of three arms (80/10/10 %), one goroutine; peers are called the way their manual says for a server",
	}}
}

func runAssign(ctx context.Context, e *env, r row) ([]result, error) {
	slice := e.slice(2*e.rounds, time.Second).String()
	path, err := e.peer(ctx, "assign")
	cs := []contender{
		{name: us, sample: func(ctx context.Context) (map[string]float64, error) {
			return e.values(ctx, e.ours("assign", "-slice", slice)...)
		}},
		{name: "GrowthBook Go SDK", missing: err, sample: func(ctx context.Context) (map[string]float64, error) {
			return e.values(ctx, path, "-slice", slice)
		}},
	}
	c, err := e.compare(ctx, r.id, e.rounds, cs)
	if err != nil {
		return nil, err
	}
	if err := e.keep(r.id, c); err != nil {
		return nil, err
	}
	return c.rows(r, "ns", peerNames(cs), func(string) string { return r.what })
}

// childAssign measures the assignment a sidecar makes for every inference call.
func childAssign(_ context.Context, args []string, _ io.Reader) (any, error) {
	f := flag.NewFlagSet("assign", flag.ContinueOnError)
	slice := f.Duration("slice", time.Second, "how long to measure")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	m, err := benchModel()
	if err != nil {
		return nil, err
	}
	users := make([]string, 1024)
	for i := range users {
		users[i] = fmt.Sprintf("user-%08d@example.org", i*7919)
	}
	seen := map[string]int{}
	for _, u := range users {
		a, err := inference.Assign(m, u, inference.PolicyStatus{Live: true})
		if err != nil {
			return nil, err
		}
		seen[a.Arm]++
	}
	if len(seen) != len(m.Arms) {
		return nil, fmt.Errorf("%d of %d arms were assigned", len(seen), len(m.Arms))
	}
	n, start := 0, time.Now()
	for time.Since(start) < *slice {
		for range 256 {
			a, err := inference.Assign(m, users[n%len(users)], inference.PolicyStatus{Live: true})
			if err != nil || a.Version == nil {
				return nil, fmt.Errorf("user %d has no version: %w", n, err)
			}
			n++
		}
	}
	return map[string]float64{"ns": float64(time.Since(start)) / float64(n)}, nil
}

// benchModel is a model whose traffic is split between three versions.
func benchModel() (*policy.Model, error) {
	arms, err := experiments.Allocate([]experiments.Weighted{{Name: "stable", Weight: 8000}, {Name: "candidate", Weight: 1000}, {Name: "challenger", Weight: 1000}})
	if err != nil {
		return nil, err
	}
	m := &policy.Model{Name: "bench", Salt: "summariser", Unit: experiments.UnitUser, LastGood: "stable-v"}
	for _, a := range arms {
		m.Arms = append(m.Arms, policy.Arm{Name: a.Name, Version: a.Name + "-v", Ranges: a.Ranges})
		m.Versions = append(m.Versions, policy.Version{Name: a.Name + "-v", Upstream: a.Name})
	}
	return m, nil
}
