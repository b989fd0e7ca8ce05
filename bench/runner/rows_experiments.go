package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math"
	"runtime"
	"strconv"
	"time"

	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// manyExperiments are evaluated for one request in the row experiments.thousand.
const manyExperiments = 1000

// assigners are the peers of both rows: names, and what bench/peers/assign calls them.
var assigners = [][2]string{{"OpenFeature Go SDK, in-memory provider", "openfeature"}, {"flagd-style evaluation", "flagd"}, {"GrowthBook Go SDK", "growthbook"}}

func experimentRows() []row {
	const how = "; one goroutine, allocations beside the time; peers are called the way their manual says for a server. flagd-style is its specification on the JSONLogic library it uses, without its store, log and gRPC"
	none := math.NaN()
	return []row{{
		id: "experiments.assign", unit: "ns/op", better: "lower", run: runAssign(1),
		what: "one of 1024 users to one of three arms (80/10/10 %)" + how,
		bars: []bar{{what: "ns for one assignment", metric: "ns", of: absolute, must: 100, aim: none},
			{what: "allocations for one assignment", metric: "allocs", of: absolute, must: 0, aim: none}},
	}, {
		id: "experiments.thousand", unit: "ns/request", better: "lower", run: runAssign(manyExperiments),
		what: fmt.Sprintf("one of 1024 users in each of %d running experiments of three arms, one after the other, as for one request", manyExperiments) + how,
		bars: []bar{{what: fmt.Sprintf("ns for %d assignments", manyExperiments), metric: "ns", of: absolute, must: 100 * manyExperiments, aim: none},
			{what: fmt.Sprintf("allocations for %d assignments", manyExperiments), metric: "allocs", of: absolute, must: 0, aim: none}},
	}, ingestRow()}
}

// runAssign measures how long it takes to assign one user in n experiments.
func runAssign(n int) func(context.Context, *env, row) ([]result, error) {
	return func(ctx context.Context, e *env, r row) ([]result, error) {
		slice := e.slice((1+len(assigners))*e.rounds, time.Second).String()
		path, err := e.peer(ctx, "assign")
		cs := []contender{{name: us, sample: func(ctx context.Context) (map[string]float64, error) {
			return e.values(ctx, e.ours("assign", "-slice", slice, "-experiments", strconv.Itoa(n))...)
		}}}
		for _, p := range assigners {
			cs = append(cs, contender{name: p[0], missing: err, sample: func(ctx context.Context) (map[string]float64, error) {
				return e.values(ctx, path, "-slice", slice, "-peer", p[1], "-experiments", strconv.Itoa(n))
			}})
		}
		c, err := e.compare(ctx, r.id, e.rounds, cs)
		if err != nil {
			return nil, err
		}
		if err := e.keep(r.id, c); err != nil {
			return nil, err
		}
		return c.rows(r, "ns", peerNames(cs), func(peer string) string {
			if s, ok := summarise(c.Rounds, us, peer, "allocs"); ok && peer != "" {
				return fmt.Sprintf("%s; allocations %.4g against %.4g", r.what, s.Ours, s.Peer)
			}
			return r.what
		})
	}
}

// childAssign measures the assignment a sidecar makes for every inference call.
func childAssign(_ context.Context, args []string, _ io.Reader) (any, error) {
	f := flag.NewFlagSet("assign", flag.ContinueOnError)
	slice := f.Duration("slice", time.Second, "how long to measure")
	n := f.Int("experiments", 1, "experiments evaluated for one request")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	models := make([]*policy.Model, *n)
	for i := range models {
		var err error
		if models[i], err = benchModel(i); err != nil {
			return nil, err
		}
	}
	users := make([]string, 1024)
	for i := range users {
		users[i] = fmt.Sprintf("user-%08d@example.org", i*7919)
	}
	if err := divided(models, users); err != nil {
		return nil, err
	}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	requests, start := 0, time.Now()
	for time.Since(start) < *slice {
		for range max(1, 256/len(models)) {
			u := users[requests%len(users)]
			for _, m := range models {
				a, err := inference.Assign(m, u, inference.PolicyStatus{Live: true})
				if err != nil || a.Version == nil {
					return nil, fmt.Errorf("user %s has no version: %w", u, err)
				}
			}
			requests++
		}
	}
	wall := time.Since(start)
	runtime.ReadMemStats(&after)
	// The clock and the runtime may allocate a handful of times in the whole run; a
	// thousandth of an allocation for a request is none of ours.
	allocs := math.Floor(1000*float64(after.Mallocs-before.Mallocs)/float64(requests)) / 1000
	return map[string]float64{"ns": float64(wall) / float64(requests), "allocs": allocs}, nil
}

// divided fails unless every arm gets about its share of the users: nobody is measured at
// something easier.
func divided(models []*policy.Model, users []string) error {
	seen := map[string]int{}
	for _, m := range models {
		for _, u := range users {
			a, err := inference.Assign(m, u, inference.PolicyStatus{Live: true})
			if err != nil {
				return err
			}
			seen[a.Arm]++
		}
	}
	total := float64(len(models) * len(users))
	for arm, weight := range benchArms() {
		if share := float64(seen[arm]) / total; share < 0.7*weight || share > 1.3*weight {
			return fmt.Errorf("arm %s got %.3f of the users, its weight is %.2f", arm, share, weight)
		}
	}
	return nil
}

func benchArms() map[string]float64 {
	return map[string]float64{"stable": 0.8, "candidate": 0.1, "challenger": 0.1}
}

// benchModel is model number i, whose traffic is split between three versions by an
// experiment with a salt of its own.
func benchModel(i int) (*policy.Model, error) {
	arms, err := experiments.Allocate([]experiments.Weighted{{Name: "stable", Weight: 8000}, {Name: "candidate", Weight: 1000}, {Name: "challenger", Weight: 1000}})
	if err != nil {
		return nil, err
	}
	m := &policy.Model{Name: fmt.Sprintf("bench-%04d", i), Salt: fmt.Sprintf("summariser-%04d", i), Unit: experiments.UnitUser, LastGood: "stable-v"}
	for _, a := range arms {
		m.Arms = append(m.Arms, policy.Arm{Name: a.Name, Version: a.Name + "-v", Ranges: a.Ranges})
		m.Versions = append(m.Versions, policy.Version{Name: a.Name + "-v", Upstream: a.Name})
	}
	return m, nil
}
