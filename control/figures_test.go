package control_test

import (
	"context"
	"encoding/json"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
)

// TestFiguresOfAnExperiment: what sidecars report of a running experiment is on its page,
// in the published groups as JSON, and among the metrics, the same everywhere.
func TestFiguresOfAnExperiment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reader := metric.NewManualReader()
		p := start(t, memory.New(), func(o *control.Options) {
			o.Meter = metric.NewMeterProvider(metric.WithReader(reader)).Meter("control")
		})
		defer p.stop()
		epoch := p.experiment()
		p.report(epoch, 400, 10)
		time.Sleep(time.Second)
		get := func(path string) string {
			w := httptest.NewRecorder()
			r := httptest.NewRequest("GET", path, nil)
			r.RemoteAddr, r.Host = "127.0.0.1:1", "localhost"
			p.srv.Handler().ServeHTTP(w, r)
			if w.Code != 200 {
				t.Fatalf("%s: %d %s", path, w.Code, w.Body)
			}
			return w.Body.String()
		}
		page := get("/experiments")
		if strings.Count(page, `class="interval"`) != 2 || !strings.Contains(page, "<td class=\"n\">200</td>") {
			t.Errorf("the page has no intervals of two arms with 200 units: %s", page)
		}
		var g struct {
			Overview struct {
				Total uint64  `json:"total_executions"`
				Dspy  uint64  `json:"dspy_executions"`
				Rate  float64 `json:"success_rate"`
			}
			Experiments []struct {
				Participants uint64
				Significance struct{ P float64 } `json:"statistical_significance"`
			}
		}
		if err := json.Unmarshal([]byte(get("/data")), &g); err != nil {
			t.Fatal(err)
		}
		if g.Overview.Total != 800 || g.Overview.Dspy != 400 || g.Overview.Rate != 0.9 || len(g.Experiments) != 1 || g.Experiments[0].Participants != 400 || g.Experiments[0].Significance.P == 0 {
			t.Errorf("%+v", g)
		}
		var all metricdata.ResourceMetrics
		if err := reader.Collect(context.Background(), &all); err != nil {
			t.Fatal(err)
		}
		points := map[string]int{}
		for _, s := range all.ScopeMetrics {
			for _, m := range s.Metrics {
				switch d := m.Data.(type) {
				case metricdata.Gauge[float64]:
					points[m.Name] = len(d.DataPoints)
				case metricdata.Gauge[int64]:
					points[m.Name] = len(d.DataPoints)
				case metricdata.Sum[int64]:
					points[m.Name] = len(d.DataPoints)
				}
			}
		}
		for name, want := range map[string]int{"outrigger.experiment.units": 2, "outrigger.experiment.value": 6, "outrigger.version.requests": 2, "outrigger.alerts.standing": 4, "outrigger.nodes": 4} {
			if points[name] < want {
				t.Errorf("%s has %d series, want %d: %v", name, points[name], want, points)
			}
		}
	})
}
