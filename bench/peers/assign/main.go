// Command assign measures how other libraries assign one of 1,024 users to one of three
// variations (80, 10 and 10 %) in -experiments experiments, one after the other, as a
// server does for a request. It prints {"ns":…,"allocs":…} for one request: wall time
// and allocations. -peer is growthbook, openfeature or flagd.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"runtime"
	"time"
)

// assigner assigns user number i of users in experiment number e.
type assigner func(ctx context.Context, e, i int) (variation string, err error)

// users are known beforehand, with whatever the library wants made of them once for each
// request: making it is part of what is measured.
var users = makeUsers()

func makeUsers() []string {
	out := make([]string, 1024)
	for i := range out {
		out[i] = fmt.Sprintf("user-%08d@example.org", i*7919)
	}
	return out
}

// variations and their weights, the same for everybody.
var (
	variations = []string{"stable", "candidate", "challenger"}
	weights    = []int{80, 10, 10}
)

func experiment(e int) string { return fmt.Sprintf("summariser-%04d", e) }

func main() {
	slice := flag.Duration("slice", 300*time.Millisecond, "how long to measure")
	peer := flag.String("peer", "growthbook", "growthbook, openfeature or flagd")
	n := flag.Int("experiments", 1, "experiments evaluated for one request")
	flag.Parse()
	if err := run(*peer, *n, *slice); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(peer string, n int, slice time.Duration) error {
	ctx := context.Background()
	// request makes what one request needs and returns the assigner for it.
	var request func(ctx context.Context, i int) (assigner, error)
	var err error
	switch peer {
	case "growthbook":
		request, err = growthBook(ctx, n)
	case "openfeature":
		request, err = inMemory(ctx, n)
	case "flagd":
		request, err = flagd(n)
	default:
		err = fmt.Errorf("no peer %q", peer)
	}
	if err != nil {
		return err
	}
	seen := map[string]int{}
	one := func(i int, note bool) error {
		assign, err := request(ctx, i%len(users))
		if err != nil {
			return err
		}
		for e := range n {
			v, err := assign(ctx, e, i%len(users))
			if err != nil {
				return fmt.Errorf("user %d, experiment %d: %w", i%len(users), e, err)
			}
			if note {
				seen[v]++
			}
		}
		return nil
	}
	for i := range users {
		if err := one(i, true); err != nil {
			return err
		}
	}
	// Shares are checked, so that nobody is measured at something easier.
	total := len(users) * n
	for k, v := range variations {
		if share := float64(seen[v]) / float64(total); share < float64(weights[k])/100*0.7 || share > float64(weights[k])/100*1.3 {
			return fmt.Errorf("%s: variation %s got %.3f of the users, its weight is %d %%", peer, v, share, weights[k])
		}
	}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	requests, start := 0, time.Now()
	for time.Since(start) < slice {
		for range max(1, 256/n) {
			if err := one(requests, false); err != nil {
				return err
			}
			requests++
		}
	}
	wall := time.Since(start)
	runtime.ReadMemStats(&after)
	return json.NewEncoder(os.Stdout).Encode(map[string]float64{"ns": float64(wall) / float64(requests),
		"allocs": float64(after.Mallocs-before.Mallocs) / float64(requests)})
}
