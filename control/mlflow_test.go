package control_test

import (
	"encoding/json"
	"strings"
	"testing"
)

// TestMLflow is a session over MLflow's REST interface, as any HTTP client has it; the
// tests of cmd/outrigger have it with MLflow's own client.
func TestMLflow(t *testing.T) {
	h := newPlane(t).srv.Handler()
	const p = "/api/2.0/mlflow/"
	for _, l := range []struct {
		method, target, body string
		status               int
		want                 string
	}{
		{"GET", "registered-models/search", "", 200, `{}`},
		{"POST", "registered-models/create", `{"name":"chat","tags":[{"key":"k","value":"v"}],"unknown":1}`, 200, `{"registered_model":{"name":"chat","creation_timestamp":`},
		{"POST", "registered-models/create", `{"name":"chat"}`, 400, `{"error_code":"RESOURCE_ALREADY_EXISTS","message":`},
		{"POST", "registered-models/create", `{"name":"a/b"}`, 400, `{"error_code":"INVALID_PARAMETER_VALUE","message":`},
		{"POST", "registered-models/create", `{"name":`, 400, `"INVALID_PARAMETER_VALUE"`},
		{"GET", "registered-models/get?name=nope", "", 404, `{"error_code":"RESOURCE_DOES_NOT_EXIST","message":`},
		{"GET", "registered-models/get", "", 400, `name is missing`},
		{"POST", "model-versions/create", `{"name":"chat","source":"s3://b/1"}`, 200, `"version":"1"`},
		{"POST", "model-versions/create", `{"name":"chat"}`, 400, `source is missing`},
		{"GET", "model-versions/get?name=chat&version=1", "", 200, `"current_stage":"None","source":"s3://b/1","status":"READY"`},
		{"POST", "model-versions/transition-stage", `{"name":"chat","version":1,"stage":"Archived"}`, 200, `"current_stage":"Archived"`},
		{"POST", "model-versions/transition-stage", `{"name":"chat","version":"1","stage":"Production"}`, 409, `{"error_code":"INVALID_STATE","message":"version \"1\" of model \"chat\" is retired`},
		{"GET", "model-versions/search?filter=name+%3D+%27chat%27", "", 200, `"model_versions":[{"name":"chat","version":"1"`},
		{"GET", "model-versions/search?max_results=0", "", 400, `1..200000`},
		{"GET", "registered-models/search?page_token=x", "", 400, `page_token`},
		{"DELETE", "model-versions/delete", `{"name":"chat","version":"1"}`, 501, `"NOT_IMPLEMENTED"`},
		{"GET", "experiments/list", "", 404, `{"error_code":"RESOURCE_DOES_NOT_EXIST"`},
	} {
		w := call(h, l.method, p+l.target, l.body)
		if w.Code != l.status || !strings.Contains(w.Body.String(), l.want) || !json.Valid(w.Body.Bytes()) {
			t.Errorf("%s %s %s: %d %s; want %d with %s", l.method, l.target, l.body, w.Code, w.Body, l.status, l.want)
		}
	}
	if w := call(h, "POST", p+"registered-models/create", `{"name":"x"}`, "remote: 192.0.2.1:5"); w.Code < 400 || !strings.Contains(w.Body.String(), `"error_code"`) {
		t.Errorf("a stranger: %d %s; want a refusal in MLflow's form", w.Code, w.Body)
	}
}
