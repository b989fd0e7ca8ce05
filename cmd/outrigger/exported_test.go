//go:build !dataplane

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/metric"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog/pebble"
	"github.com/outrigger-mesh/outrigger/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/proxy"
	"github.com/outrigger-mesh/outrigger/xds/adsclient"
)

// touched makes every instrument that is created count once, since one that has counted
// nothing is not shown. What observes is asked when metrics are collected; observe gives
// those that have nothing to say yet one value.
type touched struct {
	metric.Meter
	observed map[string]func(metric.Observer)
}

func sure[T any](t T, err error) T {
	if err != nil {
		panic(err)
	}
	return t
}

func (m touched) Int64Counter(name string, o ...metric.Int64CounterOption) (metric.Int64Counter, error) {
	c, err := m.Meter.Int64Counter(name, o...)
	if err == nil {
		c.Add(context.Background(), 1)
	}
	return c, err
}

func (m touched) Float64Counter(name string, o ...metric.Float64CounterOption) (metric.Float64Counter, error) {
	c, err := m.Meter.Float64Counter(name, o...)
	if err == nil {
		c.Add(context.Background(), 1)
	}
	return c, err
}

func (m touched) Int64UpDownCounter(name string, o ...metric.Int64UpDownCounterOption) (metric.Int64UpDownCounter, error) {
	c, err := m.Meter.Int64UpDownCounter(name, o...)
	if err == nil {
		c.Add(context.Background(), 1)
	}
	return c, err
}

func (m touched) Int64Histogram(name string, o ...metric.Int64HistogramOption) (metric.Int64Histogram, error) {
	h, err := m.Meter.Int64Histogram(name, o...)
	if err == nil {
		h.Record(context.Background(), 1)
	}
	return h, err
}

func (m touched) Float64Histogram(name string, o ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	h, err := m.Meter.Float64Histogram(name, o...)
	if err == nil {
		h.Record(context.Background(), 1)
	}
	return h, err
}

func (m touched) Float64ObservableGauge(name string, o ...metric.Float64ObservableGaugeOption) (metric.Float64ObservableGauge, error) {
	g, err := m.Meter.Float64ObservableGauge(name, o...)
	m.observed[name] = func(x metric.Observer) { x.ObserveFloat64(g, 1) }
	return g, err
}

func (m touched) Float64ObservableCounter(name string, o ...metric.Float64ObservableCounterOption) (metric.Float64ObservableCounter, error) {
	g, err := m.Meter.Float64ObservableCounter(name, o...)
	m.observed[name] = func(x metric.Observer) { x.ObserveFloat64(g, 1) }
	return g, err
}

func (m touched) Int64ObservableGauge(name string, o ...metric.Int64ObservableGaugeOption) (metric.Int64ObservableGauge, error) {
	g, err := m.Meter.Int64ObservableGauge(name, o...)
	m.observed[name] = func(x metric.Observer) { x.ObserveInt64(g, 1) }
	return g, err
}

func (m touched) Int64ObservableCounter(name string, o ...metric.Int64ObservableCounterOption) (metric.Int64ObservableCounter, error) {
	g, err := m.Meter.Int64ObservableCounter(name, o...)
	m.observed[name] = func(x metric.Observer) { x.ObserveInt64(g, 1) }
	return g, err
}

// RegisterCallback adds one value to everything the callback is for.
func (m touched) RegisterCallback(f metric.Callback, of ...metric.Observable) (metric.Registration, error) {
	return m.Meter.RegisterCallback(func(ctx context.Context, o metric.Observer) error {
		for _, touch := range m.observed {
			touch(o)
		}
		return f(ctx, o)
	}, of...)
}

var typeLine = regexp.MustCompile(`(?m)^# TYPE (\S+) (\S+)$`)

// exported are the names that control plane, node agent and sidecar serve under /metrics.
func exported(t *testing.T) map[string]bool {
	t.Helper()
	tel, err := telemetry.New(t.Context(), telemetry.Options{Service: "test", LogTo: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tel.Shutdown(context.Background()) }()
	meter := func(name string) metric.Meter { return touched{tel.Meter(name), map[string]func(metric.Observer){}} }
	log, err := pebble.Open(t.TempDir(), pebble.Options{Meter: meter("control/eventlog/pebble")})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if _, err := control.New(control.Options{Log: log, Region: &pb.Region{Name: "eu"}, Meter: meter("control")}); err != nil {
		t.Fatal(err)
	}
	conn := sure(grpc.NewClient("passthrough:///nowhere", grpc.WithTransportCredentials(insecure.NewCredentials())))
	defer conn.Close()
	self := outrigger.Node{ID: "n", Kind: "agent", Region: "eu"}
	if _, err := node.New(node.Options{Node: self, Origin: conn, Table: shm.Options{Bytes: 16 << 20, Name: "test"}, Meter: meter("cache/node")}); err != nil {
		t.Fatal(err)
	}
	store, err := cache.New(cache.Options{Origin: conn, Node: self, Meter: meter("cache")})
	if err != nil {
		t.Fatal(err)
	}
	ads, err := adsclient.New(adsclient.Options{Node: self, Meter: meter("xds/adsclient"), Dial: []adsclient.Dialer{nil}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := proxy.New(proxy.Options{Node: self, Reader: store, Authority: store.Variables(), Policy: policySource(ads), Meter: meter("proxy")}); err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	tel.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	names := make(map[string]bool)
	for _, m := range typeLine.FindAllStringSubmatch(w.Body.String(), -1) {
		names[m[1]] = true
		if m[2] == "histogram" {
			for _, part := range []string{"_bucket", "_count", "_sum"} {
				names[m[1]+part] = true
			}
		}
	}
	return names
}

var metricName = regexp.MustCompile(`\b(?:outrigger|gen_ai)_[a-z0-9_]+\b`)

// labels that queries name and that look like metrics.
var labelNames = []string{"outrigger_arm", "outrigger_version", "outrigger_cache"}

// checkQuery looks for metrics that nothing exports. Names with a colon are recorded.
func checkQuery(t *testing.T, where, query string, names map[string]bool) {
	t.Helper()
	found := 0
	for _, n := range metricName.FindAllString(query, -1) {
		if slices.Contains(labelNames, n) {
			continue
		}
		if found++; !names[n] {
			t.Errorf("%s: nothing exports %s, of %s", where, n, query)
		}
	}
	if found == 0 && !strings.Contains(query, "outrigger:") {
		t.Errorf("%s asks for no metric: %s", where, query)
	}
}

// TestShippedDashboards: the dashboards and rules under deploy ask for nothing that the
// product does not export, and are what their readers load.
func TestShippedDashboards(t *testing.T) {
	names := exported(t)
	if len(names) < 60 {
		t.Fatalf("only %d names are exported: %v", len(names), names)
	}
	for _, name := range []string{"production_overview", "experiment_results", "performance_comparison", "alert_summary", "caches"} {
		text := sure(os.ReadFile(filepath.Join("..", "..", "deploy", "grafana", name+".json")))
		var d struct {
			UID, Title string
			Panels     []struct {
				ID      int
				Title   string
				GridPos struct{ X, Y, W, H int }
				Targets []struct{ Expr string }
			}
		}
		if err := json.Unmarshal(text, &d); err != nil || d.UID == "" || d.Title == "" || len(d.Panels) < 6 {
			t.Fatalf("%s: %v, %d panels", name, err, len(d.Panels))
		}
		ids := map[int]bool{}
		for _, p := range d.Panels {
			if ids[p.ID] || p.Title == "" || p.GridPos.X+p.GridPos.W > 24 || len(p.Targets) == 0 {
				t.Errorf("%s: panel %+v", name, p)
			}
			ids[p.ID] = true
			for _, q := range p.Targets {
				checkQuery(t, fmt.Sprintf("%s, %s", name, p.Title), q.Expr, names)
			}
		}
	}
	var rules struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Record, Expr string
				Labels, Annotations map[string]string
			}
		}
	}
	if err := yaml.Unmarshal(sure(os.ReadFile("../../deploy/prometheus/outrigger.rules.yaml")), &rules); err != nil {
		t.Fatal(err)
	}
	recorded, alerts := map[string]bool{}, map[string]bool{}
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			checkQuery(t, g.Name+", "+r.Alert+r.Record, r.Expr, names)
			recorded[r.Record] = true
			for _, n := range regexp.MustCompile(`outrigger:[a-z0-9:]+`).FindAllString(r.Expr, -1) {
				if !recorded[n] {
					t.Errorf("%s uses %s, which is not recorded before it", r.Alert, n)
				}
			}
			if r.Alert != "" && (alerts[r.Alert] || r.Labels["severity"] == "" || r.Annotations["summary"] == "") {
				t.Errorf("alert %+v", r)
			}
			alerts[r.Alert] = true
		}
	}
	if len(alerts) < 12 {
		t.Errorf("%d alerts", len(alerts))
	}
}
