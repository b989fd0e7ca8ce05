// Command assign measures GrowthBook's Go SDK assigning a user to one of three
// variations of one experiment. It prints {"ns":…}, wall time per assignment.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"time"

	growthbook "github.com/growthbook/growthbook-golang"
)

func main() {
	slice := flag.Duration("slice", 300*time.Millisecond, "how long to measure")
	flag.Parse()
	if err := run(*slice); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(slice time.Duration) error {
	ctx := context.Background()
	base, err := growthbook.NewClient(ctx)
	if err != nil {
		return err
	}
	// The SDK binds attributes to a child client; a server does this once per request.
	users := make([]growthbook.Attributes, 1024)
	for i := range users {
		users[i] = growthbook.Attributes{"id": fmt.Sprintf("user-%08d@example.org", i*7919)}
	}
	exp := growthbook.NewExperiment("summariser")
	exp.HashAttribute = "id"
	exp.Variations = []growthbook.FeatureValue{"stable", "candidate", "challenger"}
	exp.Weights = []float64{0.8, 0.1, 0.1}
	seen := map[int]int{}
	one := func(i int) error {
		c, err := base.WithAttributes(users[i%len(users)])
		if err != nil {
			return err
		}
		r := c.RunExperiment(ctx, exp)
		if !r.InExperiment {
			return fmt.Errorf("user %d is not in the experiment", i)
		}
		seen[r.VariationId]++
		return nil
	}
	n, start := 0, time.Now()
	for time.Since(start) < slice {
		for range 256 {
			if err := one(n); err != nil {
				return err
			}
			n++
		}
	}
	wall := time.Since(start)
	if len(seen) != 3 {
		return fmt.Errorf("%d of 3 variations were assigned", len(seen))
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]float64{"ns": float64(wall) / float64(n)})
}
