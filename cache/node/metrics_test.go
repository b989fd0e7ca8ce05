package node_test

import (
	"fmt"
	"io"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/internal/telemetry"
)

// What operators are shown is what has happened: a fetch, a change, a gap, a correct entry
// compared, a wrong one repaired and counted by its age.
func TestMetrics(t *testing.T) {
	tel, err := telemetry.New(t.Context(), telemetry.Options{Service: "node", LogTo: io.Discard})
	must(t, err)
	runs := 0 // each adds to the same instruments
	bubble(t, node.Options{RepairEvery: time.Second, Meter: tel.Meter("cache/node")}, func(t *testing.T, w *world) {
		shown := func(name string) string {
			r := httptest.NewRecorder()
			tel.Handler().ServeHTTP(r, httptest.NewRequest("GET", "/metrics", nil))
			var lines []string
			for line := range strings.Lines(r.Body.String()) {
				if strings.HasPrefix(line, name) {
					lines = append(lines, strings.TrimSpace(line))
				}
			}
			return strings.Join(lines, "\n")
		}
		runs++
		w.origin.Put("x", "1")
		w.read("x", "1")
		w.origin.LoseFrame()
		w.origin.Put("x", "2")
		synctest.Wait()
		w.origin.Put("x", "3") // shows the gap
		time.Sleep(3 * time.Second)
		w.origin.Tamper("x", "7")
		time.Sleep(3 * time.Second)
		synctest.Wait()
		w.shows("x", "7")
		for _, name := range []string{"fills", "changes", "gaps", "checked", "repairs"} {
			line := shown("outrigger_cache_" + name)
			if line == "" || strings.HasSuffix(line, " 0") {
				t.Errorf("%s is shown as %q", name, line)
			}
		}
		if line := shown("outrigger_cache_stale_total"); !strings.Contains(line, `age="`) || !strings.HasSuffix(line, fmt.Sprint(" ", runs)) {
			t.Errorf("%d stale entries are shown as %q", runs, line)
		}
		if line := shown("outrigger_cache_invalidation_lag_seconds_count"); line == "" || strings.HasSuffix(line, " 0") {
			t.Errorf("the lag of invalidations is shown as %q", line)
		}
	})
}
