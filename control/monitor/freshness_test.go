package monitor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// freshnessAlerts lists the alerts about outdated entries in the log, in order.
func (w *world) freshnessAlerts() (out []string) {
	for ev, err := range w.log.ReadAll(context.Background(), 1) {
		if err != nil {
			w.t.Error(err)
		}
		if a := ev.GetAlertRaised(); a != nil && strings.HasPrefix(ev.GetAggregate(), "alert/freshness-") {
			out = append(out, fmt.Sprintf("%s %s %s %s", strings.TrimPrefix(ev.GetAggregate(), "alert/freshness-"), a.Severity, a.Numbers["entries"], a.Numbers["key"]))
		}
	}
	return out
}

// A node that served something outdated is named at once; what it finds within the next
// minute is one more alert, however much it is. While the log takes nothing, nothing is
// forgotten.
func TestFreshnessAlerts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		m := w.monitor()
		defer run(t, m)()
		seq := uint64(0)
		report := func(node string, names ...string) {
			seq++
			c := &pb.CacheDelta{}
			for _, n := range names {
				c.Violations = append(c.Violations, &pb.FreshnessViolation{Key: &pb.Key{Session: "s", Name: n}, Age: "1s", FoundUnixNano: uint64(time.Now().UnixNano())})
			}
			if err := m.Ingest(t.Context(), &pb.Delta{Reporter: node + "@1", Sequence: seq, Node: &pb.Node{Id: node}, Cache: c}); err != nil {
				t.Error(err)
			}
		}
		want := func(lines ...string) {
			t.Helper()
			synctest.Wait()
			if got := w.freshnessAlerts(); !slices.Equal(got, lines) {
				t.Fatalf("alerts %q, want %q", got, lines)
			}
		}
		report("rack/node-a") // a report without violations
		time.Sleep(2 * time.Second)
		want()
		report("rack/node-a", "x", "y")
		time.Sleep(time.Second)
		first := "rack-node-a high 2 default/s/x"
		want(first)
		for range 5 {
			report("rack/node-a", "z")
			time.Sleep(time.Second)
		}
		report("node-b", "x") // another node does not wait
		time.Sleep(time.Second)
		want(first, "node-b high 1 default/s/x")

		w.set(func() { w.failed = errors.New("disk full") })
		time.Sleep(time.Minute)
		want(first, "node-b high 1 default/s/x")
		w.set(func() { w.failed = nil })
		time.Sleep(2 * time.Second)
		want(first, "node-b high 1 default/s/x", "rack-node-a high 5 default/s/z")
		time.Sleep(5 * time.Minute)
		want(first, "node-b high 1 default/s/x", "rack-node-a high 5 default/s/z")
	})
}
