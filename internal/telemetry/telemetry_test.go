package telemetry

import (
	"bytes"
	"context"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
)

// A counter that was incremented is visible in the Prometheus text with its labels,
// next to the Go runtime's own metrics.
func TestMetricsAreServed(t *testing.T) {
	tel, err := New(context.Background(), Options{Service: "test", Node: "n1", LogTo: &bytes.Buffer{}})
	if err != nil {
		t.Fatal(err)
	}
	c, err := tel.Meter("unit").Int64Counter("outrigger_things")
	if err != nil {
		t.Fatal(err)
	}
	c.Add(context.Background(), 3)
	rec := httptest.NewRecorder()
	tel.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{"outrigger_things_total{", "} 3", "go_goroutines"} {
		if !strings.Contains(rec.Body.String(), want) {
			t.Errorf("metrics lack %q", want)
		}
	}
	if err := tel.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// Bad settings are refused by name; good ones select level and format.
func TestLogSettings(t *testing.T) {
	for _, o := range []Options{{LogLevel: "loud"}, {LogFormat: "xml"}, {TraceRatio: 2}} {
		o.LogTo = &bytes.Buffer{}
		if _, err := New(context.Background(), o); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%+v: got %v", o, err)
		}
	}
	var buf bytes.Buffer
	tel, err := New(context.Background(), Options{Service: "s", LogLevel: "warn", LogFormat: "json", LogTo: &buf})
	if err != nil {
		t.Fatal(err)
	}
	tel.Logger.Info("hidden")
	tel.Logger.Warn("shown")
	if got := buf.String(); strings.Contains(got, "hidden") || !strings.Contains(got, `"msg":"shown"`) {
		t.Fatalf("log is %s", got)
	}
}
