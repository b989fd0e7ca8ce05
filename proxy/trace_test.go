package proxy

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/outrigger-mesh/outrigger"
)

// A call continues the application's trace, hands its own span on to the model, and is
// recorded with where the answer came from and without the name of the variable.
func TestTracing(t *testing.T) {
	spans := tracetest.NewInMemoryExporter()
	tp := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
	var forwarded string
	h := (&Tracing{Tracer: tp.Tracer("t"), Propagator: propagation.TraceContext{}}).wrap(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		forwarded = r.Header.Get("traceparent")
		w.Header().Set(outrigger.HeaderTier, "node")
	}))
	req := httptest.NewRequestWithContext(context.Background(), "GET", "/v1/variables/secret/name", nil)
	req.Header.Set("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	h.ServeHTTP(httptest.NewRecorder(), req)
	got := spans.GetSpans()
	if len(got) != 1 || got[0].SpanContext.TraceID().String() != "0af7651916cd43dd8448eb211c80319c" || got[0].Parent.SpanID().String() != "b7ad6b7169203331" {
		t.Fatalf("spans %+v", got)
	}
	if !strings.Contains(forwarded, got[0].SpanContext.SpanID().String()) {
		t.Errorf("the model is told %q, the span is %s", forwarded, got[0].SpanContext.SpanID())
	}
	if strings.Contains(got[0].Name, "secret") {
		t.Errorf("the span's name is %q", got[0].Name)
	}
	var tier string
	for _, a := range got[0].Attributes {
		if a.Key == "outrigger.tier" {
			tier = a.Value.AsString()
		}
	}
	if tier != "node" {
		t.Errorf("attributes %v", got[0].Attributes)
	}
	var none *Tracing
	rec := httptest.NewRecorder()
	none.wrap(http.NotFoundHandler()).ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
	if rec.Code != 404 {
		t.Errorf("without tracing: %d", rec.Code)
	}
}
