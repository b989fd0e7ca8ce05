package inference

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// What lists and shows models, in the words of the protocol of who asks; all else that
// happens to models is the upstream's, if there is one.
func TestModelObjects(t *testing.T) {
	src := newSource(newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil))
	const openaiOne, anthropicOne = `{"id":"gpt","object":"model","created":0,"owned_by":"outrigger"}`,
		`{"type":"model","id":"gpt","display_name":"gpt","created_at":"1970-01-01T00:00:00Z"}`
	pass := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "passed") })
	for _, tt := range []struct {
		method, path string
		anthropic    bool // the client says which version of Anthropic's API it speaks
		pass         http.Handler
		status       int
		body         string
	}{
		{"GET", "/api/v1/models", false, nil, 200, `{"object":"list","data":[` + openaiOne + `]}`},
		{"GET", "/openai/v1/models/gpt", false, nil, 200, openaiOne},
		{"GET", "/v1/models", true, nil, 200, `{"data":[` + anthropicOne + `],"has_more":false,"first_id":"gpt","last_id":"gpt"}`},
		{"GET", "/v1/models/gpt", true, pass, 200, anthropicOne},
		{"GET", "/anthropic/v1/models/gpt", false, nil, 200, anthropicOne},
		{"GET", "/anthropic/v1/models/no", false, nil, 404, `{"type":"error","error":{"type":"not_found_error","message":"the model ` + "`no`" + ` does not exist in the routing policy"}}`},
		{"GET", "/openai/v1/models/ft:x/y", false, pass, 200, "passed"},
		{"DELETE", "/v1/models/gpt", false, pass, 200, "passed"},
		{"OPTIONS", "/v1/models", false, pass, 200, "passed"},
		{"POST", "/api/v1/models", false, pass, 200, "passed"},
	} {
		h := mustNew(t, Options{Policy: src.get, Passthrough: tt.pass, Transport: roundTripper(nil)})
		r, w := httptest.NewRequest(tt.method, tt.path, nil), httptest.NewRecorder()
		if tt.anthropic {
			r.Header.Set("Anthropic-Version", "2023-06-01")
		}
		if !h.Match(r) {
			t.Errorf("%s: not matched", tt.path)
		}
		if h.ServeHTTP(w, r); w.Code != tt.status || w.Body.String() != tt.body {
			t.Errorf("%s %s: %d %s, want %d %s", tt.method, tt.path, w.Code, w.Body, tt.status, tt.body)
		}
	}
}
