package proxy

import (
	"net/http"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
)

// Tracing makes a span of every call that leaves the event loop's fast path.
type Tracing struct {
	Tracer     trace.Tracer
	Propagator propagation.TextMapPropagator
}

// wrap continues the application's trace, or starts one, and passes it on upstream. The
// span says where the answer came from, in the words of the answer's own headers.
func (t *Tracing) wrap(h http.Handler) http.Handler {
	if t == nil {
		return h
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		carrier := propagation.HeaderCarrier(r.Header)
		ctx := t.Propagator.Extract(r.Context(), carrier)
		ctx, span := t.Tracer.Start(ctx, r.Method+" "+route(r.URL.EscapedPath()), trace.WithSpanKind(trace.SpanKindServer),
			trace.WithAttributes(attribute.String("http.request.method", r.Method), attribute.String("url.path", r.URL.Path)))
		defer span.End()
		r = r.WithContext(ctx)
		t.Propagator.Inject(ctx, carrier)
		h.ServeHTTP(w, r)
		if !span.IsRecording() {
			return // not sampled: nobody reads what follows
		}
		for _, name := range []string{outrigger.HeaderTier, outrigger.HeaderModel, outrigger.HeaderVersion, outrigger.HeaderArm,
			outrigger.HeaderRegion, outrigger.HeaderAttempts, outrigger.HeaderPolicy} {
			if v := w.Header().Get(name); v != "" {
				span.SetAttributes(attribute.String(strings.ReplaceAll(strings.TrimPrefix(name, "x-"), "-", "."), v))
			}
		}
		if r.Context().Err() != nil {
			span.SetStatus(codes.Error, "cancelled")
		}
	})
}

// route keeps names of sessions and variables out of span names.
func route(path string) string {
	switch {
	case strings.HasPrefix(path, "/v1/variables/"):
		return "/v1/variables/{session}/{name}"
	case strings.HasPrefix(path, "/v1/sessions"):
		return "/v1/sessions"
	}
	if r, ok := shape.Match(path); ok {
		return r.Template(path)
	}
	if id, _, ok := shape.Models(path); ok && id != "" {
		return strings.TrimSuffix(path, id) + "{id}"
	}
	return path
}
