//go:build !dataplane

package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Both live forms of the view show where reads were answered and how long changes take to
// reach the node's table.
func TestViewShowsHitsAndLag(t *testing.T) {
	p := picture{Elapsed: 3 * time.Second, Calls: 10, Reads: 200, Split: map[string]int{"v1": 10}, Hits: map[string]int{"process": 150, "node": 40, "origin": 10},
		Mesh: &pb.StatusResponse{Cache: &pb.CacheStatus{InvalidationLagP50Ms: 1.25, InvalidationLagP99Ms: 9.5}}}
	var plain bytes.Buffer
	v := &view{u: &upFlags{duration: 10 * time.Second}, err: &plain}
	v.update(p)
	for form, c := range map[string]struct {
		text string
		want []string
	}{
		"terminal": {model{v: v, p: p}.View(), []string{"process", " 75.0 %", "node", " 20.0 %", "origin", "  5.0 %", "invalidation   p50 1.25 ms   p99 9.50 ms"}},
		"plain":    {plain.String(), []string{"reads 200", "node 20", "origin 5", "process 75", "lag p50 1.25 ms p99 9.50 ms"}},
	} {
		for _, want := range c.want {
			if !strings.Contains(c.text, want) {
				t.Errorf("%s: no %q in\n%s", form, want, c.text)
			}
		}
	}
}
