package rest_test

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/rest"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// messages are the calls that a route passes on as a message: what is sent, the method
// that must be reached, and the request it must get.
var messages = []struct {
	method, target, body string
	headers              []string
	status               int
	reached              string
	want                 proto.Message
}{
	{"GET", "/v1/models", "", nil, 200, "ListModels", &pb.ListRequestAll{}},
	{"GET", "/v1/models?limit=5", "", nil, 200, "ListModels", &pb.ListRequestAll{Limit: 5}},
	{"HEAD", "/v1/models?limit=5", "", nil, 200, "ListModels", &pb.ListRequestAll{Limit: 5}},
	{"POST", "/v1/models", `{"model":"m","version":"v","endpoints":[{"address":"a:1","weight":2}]}`,
		[]string{"x-outrigger-actor: ann", "idempotency-key: k"}, 201, "RegisterModelVersion",
		&pb.RegisterModelVersionRequest{Model: "m", Version: "v", Endpoints: []*pb.Endpoint{{Address: "a:1", Weight: 2}}, Actor: "ann", RequestId: "k"}},
	{"GET", "/v1/models/m", "", nil, 200, "GetModel", &pb.NameRequest{Name: "m"}},
	{"GET", "/v1/models/org%2Fm%20x", "", nil, 200, "GetModel", &pb.NameRequest{Name: "org/m x"}},
	{"GET", "/v1/models/m/served-at?at=1970-01-01T00:00:05Z", "", nil, 200, "ServedAt", &pb.ServedAtRequest{Model: "m", At: &timestamppb.Timestamp{Seconds: 5}}},
	{"POST", "/v1/models/m", `{"unit":"user","max_attempts":2,"timeout_ms":5}`, nil, 200, "ConfigureModel",
		&pb.ConfigureModelRequest{Model: "m", Unit: "user", MaxAttempts: 2, TimeoutMs: 5}},
	{"POST", "/v1/models/m/versions", `{"model":"m","version":"v","request_id":"mine","actor":"bob"}`,
		[]string{"x-outrigger-actor: ann", "idempotency-key: k"}, 201, "RegisterModelVersion",
		&pb.RegisterModelVersionRequest{Model: "m", Version: "v", Actor: "bob", RequestId: "mine"}},
	{"POST", "/v1/models/m/versions/v", `{"state":"retired"}`, nil, 200, "SetModelVersionState",
		&pb.SetModelVersionStateRequest{Model: "m", Version: "v", State: "retired"}},
	{"GET", "/v1/models/m/metrics", "", nil, 200, "ModelMetrics", &pb.NameRequest{Name: "m"}},
	{"PUT", "/v1/models/m", `{"description":"d","tags":{"k":"v"}}`, []string{"x-outrigger-actor: ann"}, 201, "CreateModel",
		&pb.CreateModelRequest{Model: "m", Description: "d", Tags: map[string]string{"k": "v"}, Actor: "ann"}},
	{"POST", "/v1/models/m/annotate", `{"version":"v","delete_tags":["k"]}`, nil, 200, "AnnotateModel",
		&pb.AnnotateModelRequest{Model: "m", Version: "v", DeleteTags: []string{"k"}}},
	{"DELETE", "/v1/models/m/aliases/challenger", `{"expected":"v"}`, nil, 200, "DeleteAlias",
		&pb.DeleteAliasRequest{Model: "m", Alias: "challenger", Expected: proto.String("v")}},
	{"POST", "/v1/models/m/aliases/champion", `{"to":"v","expected":""}`, nil, 200, "MoveAlias",
		&pb.MoveAliasRequest{Model: "m", Alias: "champion", To: "v", Expected: proto.String("")}},
	{"GET", "/v1/experiments", "", nil, 200, "ListExperiments", &pb.ListRequestAll{}},
	{"POST", "/v1/experiments", `{"name":"e","start":true}`, nil, 201, "CreateExperiment", &pb.CreateExperimentRequest{Name: "e", Start: true}},
	{"POST", "/v1/experiments/e/plan", `{"plan":{"mde":0.5}}`, nil, 200, "PlanExperiment", &pb.PlanExperimentRequest{Name: "e", Plan: &pb.ExperimentPlan{Mde: .5}}},
	{"GET", "/v1/experiments/e/results", "", nil, 200, "ExperimentResults", &pb.NameRequest{Name: "e"}},
	{"POST", "/v1/experiments/e", `{"state":"stopped"}`, nil, 200, "SetExperimentState", &pb.SetExperimentStateRequest{Name: "e", State: "stopped"}},
	{"GET", "/v1/rollouts", "", nil, 200, "ListRollouts", &pb.ListRequestAll{}},
	{"POST", "/v1/rollouts", `{"model":"m","alpha":0.05,"phases":[{"weight":100,"min_requests":"9"}]}`, nil, 201, "StartRollout",
		&pb.StartRolloutRequest{Model: "m", Alpha: 0.05, Phases: []*pb.RolloutPhase{{Weight: 100, MinRequests: 9}}}},
	{"GET", "/v1/rollouts/r", "", nil, 200, "GetRollout", &pb.NameRequest{Name: "r"}},
	{"POST", "/v1/rollouts/r/advance", "", []string{"x-outrigger-actor: ann"}, 200, "AdvanceRollout", &pb.RolloutActionRequest{Id: "r", Actor: "ann"}},
	{"POST", "/v1/rollouts/r/abort", `{"id":"r","reason":"x"}`, nil, 200, "AbortRollout", &pb.RolloutActionRequest{Id: "r", Reason: "x"}},
	{"POST", "/v1/rollouts/plan", `{"model":"m","requests_per_second":5}`, nil, 200, "PlanRollout", &pb.StartRolloutRequest{Model: "m", RequestsPerSecond: 5}},
	{"POST", "/v1/rollouts/r/hold", `{"expected_sequence":"3"}`, nil, 200, "HoldRollout", &pb.RolloutActionRequest{Id: "r", ExpectedSequence: 3}},
	{"POST", "/v1/rollouts/r/resume", "", nil, 200, "ResumeRollout", &pb.RolloutActionRequest{Id: "r"}},
	{"POST", "/v1/rollouts/r/retry", `{"force":true}`, nil, 200, "RetryRollout", &pb.RolloutActionRequest{Id: "r", Force: true}},
	{"POST", "/v1/rollouts/r/approve", `{"gate":"g"}`, []string{"x-outrigger-actor: ann"}, 200, "ApproveRollout", &pb.ApproveRolloutRequest{Id: "r", Gate: "g", Actor: "ann"}},
	{"POST", "/v1/rollouts/r/rollback", `{"mode":"graceful"}`, nil, 200, "RollbackRollout", &pb.RollbackRolloutRequest{Id: "r", Mode: "graceful"}},
	{"POST", "/v1/models/m/break-glass", `{"version":"v","reason":"x"}`, nil, 200, "BreakGlass", &pb.BreakGlassRequest{Model: "m", Version: "v", Reason: "x"}},
	{"POST", "/v1/deployment", `{"name":"f","text":"eA=="}`, nil, 200, "ConfigureDeployment", &pb.ConfigureDeploymentRequest{Name: "f", Text: []byte("x")}},
	{"GET", "/v1/deployment", "", nil, 200, "GetDeployment", &pb.NameRequest{}},
	{"GET", "/v1/regions", "", nil, 200, "ListRegions", &pb.ListRequestAll{}},
	{"POST", "/v1/alerts/a/silence", `{"for":"60s","reason":"known"}`, nil, 200, "SilenceAlert", &pb.SilenceAlertRequest{Id: "a", For: durationpb.New(time.Minute), Reason: "known"}},
	{"GET", "/v1/alerts", "", nil, 200, "ListAlerts", &pb.ListRequestAll{}},
	{"GET", "/v1/audit?actor=ann&from=18446744073709551615&limit=-1&newest_first=true&since=2024-05-01T12:00:00.5%2B02:00", "",
		[]string{"x-outrigger-actor: who-asks"}, 200, "Audit",
		&pb.AuditRequest{Actor: "ann", From: 1<<64 - 1, Limit: -1, NewestFirst: true, Since: &timestamppb.Timestamp{Seconds: 1714557600, Nanos: 5e8}}},
	{"GET", "/v1/audit", "", []string{"x-outrigger-actor: who-asks"}, 200, "Audit", &pb.AuditRequest{}},
	{"GET", "/v1/optimizers", "", nil, 200, "ListOptimizers", &pb.ListRequestAll{}},
	{"POST", "/v1/optimizers", `{"address":"unix:p"}`, []string{"x-outrigger-actor: ann"}, 201, "RegisterOptimizer", &pb.RegisterOptimizerRequest{Address: "unix:p", Actor: "ann"}},
	{"DELETE", "/v1/optimizers/mine", `{"reason":"old"}`, nil, 200, "RemoveOptimizer", &pb.RemoveOptimizerRequest{Name: "mine", Reason: "old"}},
	{"POST", "/v1/optimizers/select", `{"strategy":"adaptive","task_type":"t","budget":5}`, nil, 200, "SelectOptimizer",
		&pb.SelectOptimizerRequest{Strategy: "adaptive", TaskType: "t", Budget: 5}},
	{"POST", "/v1/optimizations", `{"task_type":"t","optimizer":"random","reached":0.5}`, nil, 201, "RecordOptimization",
		&pb.RecordOptimizationRequest{TaskType: "t", Optimizer: "random", Reached: .5}},
	{"GET", "/v1/status", "", nil, 200, "Status", &pb.ListRequestAll{}},

	{"GET", "/v1/sessions", "", nil, 200, "ListSessions", &pb.ListSessionsRequest{Tenant: "default"}},
	{"GET", "/v1/sessions?tenant=t&limit=3", "", []string{"x-outrigger-tenant: t"}, 200, "ListSessions", &pb.ListSessionsRequest{Tenant: "t", Limit: 3}},
	{"POST", "/v1/sessions", `{"id":"s","if_absent":true}`, []string{"x-outrigger-tenant: t"}, 201, "CreateSession",
		&pb.CreateSessionRequest{Tenant: "t", Id: "s", IfAbsent: true}},
	{"POST", "/v1/sessions?tenant=t", `{"id":"s","tenant":"t"}`, nil, 201, "CreateSession", &pb.CreateSessionRequest{Tenant: "t", Id: "s"}},
	{"POST", "/v1/sessions", `{"id":"s","tenant":"u"}`, nil, 201, "CreateSession", &pb.CreateSessionRequest{Tenant: "u", Id: "s"}},
	{"GET", "/v1/sessions/s", "", nil, 200, "GetSession", &pb.GetSessionRequest{Tenant: "default", Id: "s"}},
	{"DELETE", "/v1/sessions/s?tenant=t", "", nil, 200, "DeleteSession", &pb.GetSessionRequest{Tenant: "t", Id: "s"}},

	{"GET", "/v1/variables/s?pattern=te*&tenant=t", "", nil, 200, "List", &pb.ListRequest{Tenant: "t", Session: "s", Pattern: "te*"}},
	{"GET", "/v1/variables/s/x", "", nil, 200, "Get", &pb.GetRequest{Tenant: "default", Session: "s", Identifier: "x"}},
	{"PUT", "/v1/variables/s/x", `{"value":{"a":[1, 2]},"binary":"AQI=","metadata":{"k":"v"},"expected_version":0,"actor":"bob"}`,
		[]string{"x-outrigger-actor: ann", "idempotency-key: k"}, 200, "Set",
		&pb.SetRequest{Tenant: "default", Session: "s", Identifier: "x", Value: &pb.Value{Json: []byte(`{"a":[1, 2]}`), Binary: []byte{1, 2}},
			ExpectedVersion: proto.Int32(0), Metadata: map[string]string{"k": "v"}, Options: &pb.WriteOptions{Actor: "bob", Source: "REST", RequestId: "k"}}},
	{"PUT", "/v1/variables/s/new", `{"value":1,"type":"float","constraints":{"max":2},"create_session":true}`, nil, 201, "Register",
		&pb.RegisterRequest{Key: &pb.Key{Tenant: "default", Session: "s", Name: "new"}, Value: &pb.Value{Type: "float", Json: []byte("1")},
			ConstraintsJson: `{"max":2}`, Options: &pb.WriteOptions{Source: "REST", AutoCreateSession: true}}},
	{"PUT", "/v1/variables/s/new", `{"value":1,"type":"float","constraints":null}`, []string{"if-none-match: *"}, 201, "Register",
		&pb.RegisterRequest{Key: &pb.Key{Tenant: "default", Session: "s", Name: "new"}, Value: &pb.Value{Type: "float", Json: []byte("1")},
			Options: &pb.WriteOptions{Source: "REST"}}},
	{"DELETE", "/v1/variables/s/x", "", []string{"x-outrigger-actor: ann", "x-outrigger-tenant: t"}, 200, "Delete",
		&pb.GetRequest{Tenant: "t", Session: "s", Identifier: "x", Options: &pb.WriteOptions{Actor: "ann", Source: "REST"}}},
	{"GET", "/v1/variables/s/x/history?limit=3", "", nil, 200, "History",
		&pb.HistoryRequest{Tenant: "default", Session: "s", Identifier: "x", Limit: 3}},
	{"POST", "/v1/variables/s/x/rollback", `{"target_version":0,"actor":"ann"}`, nil, 200, "Rollback",
		&pb.RollbackRequest{Tenant: "default", Session: "s", Identifier: "x", Options: &pb.WriteOptions{Actor: "ann", Source: "REST"}}},
	{"POST", "/v1/variables/s/x/optimization", `{"optimizer":"o","config":{"priority":"2"}}`, []string{"x-outrigger-actor: ann"}, 201, "StartOptimization",
		&pb.StartOptimizationRequest{Tenant: "default", Session: "s", Identifier: "x", Optimizer: "o", Config: map[string]string{"priority": "2"}, Options: &pb.WriteOptions{Actor: "ann", Source: "REST"}}},
	{"DELETE", "/v1/variables/s/x/optimization", "", []string{"x-outrigger-optimization: opt_1_1, opt_2_9"}, 200, "StopOptimization",
		&pb.StopOptimizationRequest{Tenant: "default", Session: "s", Identifier: "x", Options: &pb.WriteOptions{Source: "REST", OptimizationIds: []string{"opt_1_1", "opt_2_9"}}}},
	{"DELETE", "/v1/variables/s/x/optimization?force=true", "", nil, 200, "StopOptimization",
		&pb.StopOptimizationRequest{Tenant: "default", Session: "s", Identifier: "x", Force: true, Options: &pb.WriteOptions{Source: "REST"}}},
	{"PUT", "/v1/variables/s/x", `{"value":2}`, []string{"x-outrigger-optimization: opt_1_1"}, 200, "Set",
		&pb.SetRequest{Tenant: "default", Session: "s", Identifier: "x", Value: &pb.Value{Json: []byte("2")}, Options: &pb.WriteOptions{Source: "REST", OptimizationIds: []string{"opt_1_1"}}}},
	{"POST", "/v1/sessions/s/dependencies", `{"dependency":{"from":"a","to":"b"}}`, []string{"x-outrigger-actor: ann"}, 201, "AddDependency",
		&pb.AddDependencyRequest{Tenant: "default", Session: "s", Dependency: &pb.Dependency{From: "a", To: "b"}, Options: &pb.WriteOptions{Actor: "ann", Source: "REST"}}},
	{"GET", "/v1/sessions/s/dependencies?from=a", "", nil, 200, "ListDependencies", &pb.ListDependenciesRequest{Tenant: "default", Session: "s", From: "a"}},
}

// TestRoutes: every route reaches its method with what the path, the query, the body and
// the headers said, and every method of the admin API has a route.
func TestRoutes(t *testing.T) {
	patterns, methods := map[string]bool{}, map[string]bool{}
	for _, c := range messages {
		w := newWorld()
		w.put(t, "1", "float")
		w.vars.seen = seen{}
		r := request(c.method, c.target, c.body, c.headers...)
		_, pattern := w.mux.Handler(r)
		patterns[pattern] = true
		rec := httptest.NewRecorder()
		w.mux.ServeHTTP(rec, r)
		got := w.vars.seen
		if got.method == "" {
			got = w.admin.seen
		}
		methods[got.method] = true
		if rec.Code != c.status || got.method != c.reached {
			t.Errorf("%s %s: %d, reached %q: %s", c.method, c.target, rec.Code, got.method, rec.Body)
			continue
		}
		if !proto.Equal(got.req, c.want) {
			t.Errorf("%s %s: the method got\n%s\nwant\n%s", c.method, c.target, prototext.Format(got.req), prototext.Format(c.want))
		}
		if got.peer != "192.0.2.7:4000" {
			t.Errorf("%s %s: the method sees the peer %q", c.method, c.target, got.peer)
		}
		if !json.Valid(rec.Body.Bytes()) || rec.Header().Get("content-type") != "application/json" || rec.Header().Get("cache-control") != "no-store" {
			t.Errorf("%s %s: %v %s", c.method, c.target, rec.Header(), rec.Body)
		}
	}
	for _, route := range append(rest.AdminRoutes(new(operator)), rest.VariableRoutes(newAuthority())...) {
		if !patterns[route.Pattern] {
			t.Errorf("no test calls %s", route.Pattern)
		}
	}
	for _, m := range pb.Admin_ServiceDesc.Methods {
		if !methods[m.MethodName] {
			t.Errorf("no route reaches Admin.%s", m.MethodName)
		}
	}
}

// TestRefusals: what is refused before any method is reached.
func TestRefusals(t *testing.T) {
	const put = "/v1/variables/s/x"
	big := `{"version":"` + strings.Repeat("x", rest.MaxBodyBytes) + `"}`
	cases := []struct {
		method, target, body string
		headers              []string
		status               int
		want                 string
	}{
		{"POST", "/v1/models", `{"modell":"m"}`, nil, 400, `unknown field \"modell\"`},
		{"POST", "/v1/models", `{"model":"m","model":"n"}`, nil, 400, `duplicate field \"model\"`},
		{"POST", "/v1/models", `{"model":1}`, nil, 400, "invalid value for string field model"},
		{"POST", "/v1/models", `{"model":"m"`, nil, 400, "body: "},
		{"POST", "/v1/models", `{"model":"m"} {}`, nil, 400, "body: "},
		{"POST", "/v1/models", "{\"model\":\"\xff\"}", nil, 400, "body: "},
		{"POST", "/v1/models", big, nil, 413, "body is larger than the limit of 8388608 bytes; send it in parts"},
		{"POST", "/v1/models", `{}`, []string{"content-type: text/plain"}, 400, `content-type is \"text/plain\"; send application/json`},
		{"POST", "/v1/models", `{}`, []string{"content-type: "}, 400, `content-type is \"\"`},
		{"POST", "/v1/models", `{}`, []string{"content-type: application/x-www-form-urlencoded"}, 400, "send application/json"},
		{"POST", "/v1/models?model=m", `{}`, nil, 400, `query parameter \"model\" is unknown; this call takes: nothing else`},
		{"POST", "/v1/sessions?id=s", `{}`, nil, 400, `query parameter \"id\" is unknown; this call takes: tenant, nothing else`},

		{"GET", "/v1/audit?kinds=x", "", nil, 400, `query parameter \"kinds\" is unknown`},
		{"GET", "/v1/audit?kind=a&kind=b", "", nil, 400, `query parameter \"kind\" is given 2 times; give it once`},
		{"GET", "/v1/audit?limit=ten", "", nil, 400, `query parameter limit=\"ten\": `},
		{"GET", "/v1/audit?limit=2147483648", "", nil, 400, "value out of range"},
		{"GET", "/v1/audit?from=-1", "", nil, 400, `query parameter from=\"-1\"`},
		{"GET", "/v1/audit?newest_first=maybe", "", nil, 400, `newest_first=\"maybe\"`},
		{"GET", "/v1/audit?since=yesterday", "", nil, 400, `since=\"yesterday\"`},
		{"GET", "/v1/audit?since=0000-01-01T00:00:00Z", "", nil, 400, "before 0001-01-01"},
		{"GET", "/v1/audit?actor=%ff", "", nil, 400, `query parameter \"actor\" is not valid UTF-8`},
		{"GET", "/v1/audit?actor=%zz", "", nil, 400, "query string: "},
		{"GET", "/v1/audit?actor=a;b", "", nil, 400, "query string: "},
		{"GET", "/v1/variables/s?patern=x", "", nil, 400, `query parameter \"patern\" is unknown; this call takes: pattern, tenant, nothing else`},
		{"GET", "/v1/variables/s/x?version=3", "", nil, 400, `query parameter \"version\" is unknown`},
		{"GET", "/v1/variables/s/x/history?limit=x", "", nil, 400, `query parameter limit=\"x\" is not a number`},
		{"DELETE", "/v1/variables/s/x?if=1", "", nil, 400, `query parameter \"if\" is unknown`},

		{"GET", "/v1/models/%ff", "", nil, 400, "is not valid UTF-8"},
		{"POST", "/v1/rollouts/r/abort", "", []string{"x-outrigger-actor: \xe9va"}, 400, "header x-outrigger-actor"},
		{"PUT", put, `{"value":1}`, []string{"idempotency-key: \xff"}, 400, "header idempotency-key"},

		{"GET", "/v1/models/m?name=n", "", nil, 400, `name is \"n\" in the request and \"m\" in the path; leave it out of the request`},
		{"POST", "/v1/models/m", `{"model":"n"}`, nil, 400, `model is \"n\" in the request and \"m\" in the path`},
		{"POST", "/v1/models/m/versions/v", `{"version":"w"}`, nil, 400, `version is \"w\" in the request`},
		{"POST", "/v1/rollouts/r/abort", `{"id":"q"}`, nil, 400, `id is \"q\" in the request`},
		{"DELETE", "/v1/sessions/s", `{"id":"t"}`, nil, 400, `id is \"t\" in the request`},
		{"GET", "/v1/sessions/s?tenant=a", "", []string{"x-outrigger-tenant: b"}, 400, `tenant is \"a\" in the query and \"b\" in the header`},
		{"POST", "/v1/sessions", `{"id":"s","tenant":"a"}`, []string{"x-outrigger-tenant: b"}, 400, `tenant is \"a\" in the body and \"b\" beside it`},
		{"POST", "/v1/sessions?tenant=b", `{"id":"s","tenant":"a"}`, nil, 400, `tenant is \"a\" in the body`},

		{"PUT", put, ``, nil, 400, `body has no \"value\"`},
		{"PUT", put, `{}`, nil, 400, `body has no \"value\"`},
		{"PUT", put, `[]`, nil, 400, "body: "},
		{"PUT", put, `{"value":1,"vlaue":2}`, nil, 400, `unknown field \"vlaue\"`},
		{"PUT", put, `{"value":1,"value":2}`, nil, 400, `body has the field \"value\" twice`},
		{"PUT", put, `{"value":1,"VALUE":2}`, nil, 400, `body has the field \"VALUE\" twice`},
		{"PUT", put, `{"value":1} {}`, nil, 400, "more than one JSON document"},
		{"PUT", put, `{"value":1}}`, nil, 400, "more than one JSON document"},
		{"PUT", put, "{\"value\":\"\xff\"}", nil, 400, "body is not valid UTF-8"},
		{"PUT", put, `{"value":1,"binary":"*"}`, nil, 400, "body: "},
		{"PUT", put, `{"value":1,"expected_version":2147483648}`, nil, 400, "expected_version"},
		{"PUT", put, `{"value":1}`, []string{"content-type: text/plain"}, 400, "application/json"},
		{"POST", put + "/rollback", `{}`, nil, 400, `body has no \"target_version\"`},
		{"POST", put + "/rollback", `{"target_version":"1"}`, nil, 400, "target_version"},
		{"DELETE", put, "", []string{`if-match: "1"`}, 400, "if-match is not supported for DELETE; leave it out"},
	}
	for _, c := range cases {
		w := newWorld()
		rec := w.call(c.method, c.target, c.body, c.headers...)
		if rec.Code != c.status || !strings.Contains(rec.Body.String(), c.want) {
			t.Errorf("%s %s %.60s: %d %s; want %d with %s", c.method, c.target, c.body, rec.Code, rec.Body, c.status, c.want)
		}
		if w.vars.method != "" || w.admin.method != "" {
			t.Errorf("%s %s %.60s: refused, but %s%s was called", c.method, c.target, c.body, w.vars.method, w.admin.method)
		}
		var answer struct {
			Error struct{ Kind, Message string }
		}
		if err := json.Unmarshal(rec.Body.Bytes(), &answer); err != nil || answer.Error.Kind == "" || answer.Error.Message == "" {
			t.Errorf("%s %s: %s is not the documented form of an error", c.method, c.target, rec.Body)
		}
	}
}

// The declared type may carry parameters, and no body needs no type.
func TestContentType(t *testing.T) {
	w := newWorld()
	for _, typ := range []string{"application/json", "application/json; charset=utf-8", "Application/JSON"} {
		if rec := w.call("POST", "/v1/rollouts/r/abort", `{"reason":"x"}`, "content-type: "+typ); rec.Code != 200 {
			t.Errorf("%s: %d %s", typ, rec.Code, rec.Body)
		}
	}
}

// A body of exactly the limit is read; one byte more is not.
func TestBodyLimit(t *testing.T) {
	w := newWorld()
	body := `{"reason":"` + strings.Repeat("x", rest.MaxBodyBytes-len(`{"reason":""}`)) + `"}`
	if rec := w.call("POST", "/v1/rollouts/r/abort", body); rec.Code != 200 {
		t.Errorf("%d bytes: %d %.200s", len(body), rec.Code, rec.Body)
	}
	if rec := w.call("POST", "/v1/rollouts/r/abort", body+" "); rec.Code != 413 {
		t.Errorf("%d bytes: %d %.200s", len(body)+1, rec.Code, rec.Body)
	}
}

// Every kind of error keeps its status and its word, and what a conflict needs.
func TestErrors(t *testing.T) {
	for _, k := range outrigger.Kinds() {
		mux := http.NewServeMux()
		rest.Register(mux, []rest.Route{{Pattern: "GET /", Created: true, Handler: func(*http.Request) (rest.Reply, error) {
			return rest.Reply{Body: "never sent"}, outrigger.Errorf(k, "because")
		}}}, nil)
		rec := httptest.NewRecorder()
		mux.ServeHTTP(rec, request("GET", "/", ""))
		if rec.Code != status.HTTP(k) || !strings.Contains(rec.Body.String(), `"kind":"`+k.String()+`"`) {
			t.Errorf("%s: %d %s", k, rec.Code, rec.Body)
		}
	}
	w := newWorld()
	w.put(t, "1", "float")
	w.call("PUT", "/v1/variables/s/x", `{"value":2}`)
	rec := w.call("PUT", "/v1/variables/s/x", `{"value":3}`, `if-match: "0"`)
	if rec.Code != 412 || !strings.Contains(rec.Body.String(), `"current_version":1`) || !strings.Contains(rec.Body.String(), "version_mismatch: current=1") {
		t.Errorf("%d %s", rec.Code, rec.Body)
	}
	// An answer that cannot be encoded is our fault and says nothing of its content.
	w.vars.vars[at("default", "s", "x")].Value.Json = []byte("{secret")
	if rec := w.call("GET", "/v1/variables/s/x", ""); rec.Code != 500 || strings.Contains(rec.Body.String(), "secret") {
		t.Errorf("%d %s", rec.Code, rec.Body)
	}
}

// TestHeadersBothWays: consistency, token and tenant reach the method as they do over
// gRPC, and what the method says with grpc.SetHeader reaches the caller, errors included.
func TestHeadersBothWays(t *testing.T) {
	for _, exists := range []bool{true, false} {
		w := newWorld()
		if exists {
			w.vars.write(context.Background(), "id", "t", "s", "x", &pb.Value{Type: "float", Json: []byte("1")}, "")
		}
		rec := w.call("GET", "/v1/variables/s/x", "", "X-Outrigger-Consistency: bounded(1s)", "X-Outrigger-Token: abc",
			"X-Outrigger-Tenant: t", "Authorization: Bearer secret", "Cookie: a=b")
		want := map[string]string{outrigger.HeaderConsistency: "bounded(1s)", outrigger.HeaderToken: "abc", outrigger.HeaderTenant: "t"}
		for name, value := range want {
			if got := w.vars.md.Get(name); !slices.Equal(got, []string{value}) {
				t.Errorf("%s arrives as %q", name, got)
			}
		}
		if len(w.vars.md) != len(want) {
			t.Errorf("the method got %v", w.vars.md) // credentials are for whoever admits callers
		}
		if (rec.Code == 200) != exists {
			t.Fatalf("%d %s", rec.Code, rec.Body)
		}
		h := rec.Header()
		if h.Get("X-Outrigger-Tier") != "origin" || h.Get("X-Outrigger-Token") != "t1" {
			t.Errorf("exists=%v: headers %v", exists, h)
		}
		if h.Get("Grpc-Internal") != "" || h.Get("Blob-Bin") != "" {
			t.Errorf("headers that are gRPC's own went out: %v", h)
		}
	}
}

// TestConditions: If-Match and If-None-Match by RFC 9110, section 13, on a variable at
// version 1.
func TestConditions(t *testing.T) {
	cases := []struct {
		name, method string
		headers      []string
		body         string
		status       int
	}{
		{"get", "GET", nil, "", 200},
		{"get, same", "GET", []string{`if-none-match: "1"`}, "", 304},
		{"get, same, weak", "GET", []string{`if-none-match: W/"1"`}, "", 304},
		{"get, any", "GET", []string{`if-none-match: *`}, "", 304},
		{"get, in a list", "GET", []string{`if-none-match: "0", "1"`}, "", 304},
		{"get, on a second line", "GET", []string{`if-none-match: "0"`, `if-none-match: W/"1"`}, "", 304},
		{"get, other", "GET", []string{`if-none-match: "0"`}, "", 200},
		{"get, without quotes", "GET", []string{`if-none-match: 1`}, "", 200},
		{"head, same", "HEAD", []string{`if-none-match: "1"`}, "", 304},

		{"put", "PUT", nil, `{"value":2}`, 200},
		{"put, same", "PUT", []string{`if-match: "1"`}, `{"value":2}`, 200},
		{"put, same, without quotes", "PUT", []string{`if-match: 1`}, `{"value":2}`, 200},
		{"put, same, said twice", "PUT", []string{`if-match: "1"`}, `{"value":2,"expected_version":1}`, 200},
		{"put, same, in the body", "PUT", nil, `{"value":2,"expected_version":1}`, 200},
		{"put, any", "PUT", []string{`if-match: *`}, `{"value":2}`, 200},
		{"put, any, and a version", "PUT", []string{`if-match: *`}, `{"value":2,"expected_version":0}`, 412},
		{"put, other", "PUT", []string{`if-match: "0"`}, `{"value":2}`, 412},
		{"put, other, in the body", "PUT", nil, `{"value":2,"expected_version":0}`, 412},
		{"put, contradiction", "PUT", []string{`if-match: "1"`}, `{"value":2,"expected_version":0}`, 400},
		{"put, weak", "PUT", []string{`if-match: W/"1"`}, `{"value":2}`, 400}, // never matches, by the strong comparison
		{"put, list", "PUT", []string{`if-match: "0", "1"`}, `{"value":2}`, 400},
		{"put, two lines", "PUT", []string{`if-match: "1"`, `if-match: "1"`}, `{"value":2}`, 400},
		{"put, half a tag", "PUT", []string{`if-match: "1`}, `{"value":2}`, 400},
		{"put, doubled quotes", "PUT", []string{`if-match: ""1""`}, `{"value":2}`, 400},
		{"put, signed", "PUT", []string{`if-match: "+1"`}, `{"value":2}`, 400},
		{"put, negative", "PUT", []string{`if-match: "-1"`}, `{"value":2}`, 400},
		{"put, too large", "PUT", []string{`if-match: "2147483648"`}, `{"value":2}`, 400},
		{"put, only new", "PUT", []string{`if-none-match: *`}, `{"value":2,"type":"float"}`, 409},
		{"put, only new, no type", "PUT", []string{`if-none-match: *`}, `{"value":2}`, 400},
		{"put, only new, and a version", "PUT", []string{`if-none-match: *`, `if-match: "1"`}, `{"value":2,"type":"float"}`, 400},
		{"put, unless same", "PUT", []string{`if-none-match: "1"`}, `{"value":2}`, 400},
		{"delete, any", "DELETE", []string{`if-match: *`}, "", 400},
	}
	for _, c := range cases {
		w := newWorld()
		w.put(t, "0", "float")
		w.put(t, "1", "float")
		rec := w.call(c.method, "/v1/variables/s/x", c.body, c.headers...)
		if rec.Code != c.status {
			t.Errorf("%s: %d, want %d: %s", c.name, rec.Code, c.status, rec.Body)
			continue
		}
		now := w.vars.vars[at("default", "s", "x")].Version.Counter
		if wrote := now != 1; wrote != (c.method == "PUT" && c.status == 200) {
			t.Errorf("%s: %d, but the version is %d", c.name, rec.Code, now)
		}
		if c.status < 400 && rec.Header().Get("etag") != strconv.Quote(strconv.Itoa(int(now))) {
			t.Errorf("%s: etag %s at version %d", c.name, rec.Header().Get("etag"), now)
		}
		if c.status == 304 && rec.Body.Len() != 0 {
			t.Errorf("%s: a body with 304: %s", c.name, rec.Body)
		}
	}
}

// A missing variable is registered only when the caller says of which type and expects
// no version.
func TestPutMissing(t *testing.T) {
	cases := []struct {
		body, header string
		status       int
	}{
		{`{"value":1,"type":"float"}`, "", 201},
		{`{"value":1,"type":"float"}`, "if-none-match: *", 201},
		{`{"value":1}`, "", 404},
		{`{"value":1,"type":"float","expected_version":0}`, "", 404},
		{`{"value":1,"type":"float"}`, `if-match: "0"`, 404},
		{`{"value":1,"type":"float"}`, "if-match: *", 404},
	}
	for _, c := range cases {
		w := newWorld()
		var headers []string
		if c.header != "" {
			headers = append(headers, c.header)
		}
		rec := w.call("PUT", "/v1/variables/s/x", c.body, headers...)
		if rec.Code != c.status || (len(w.vars.vars) == 1) != (c.status == 201) {
			t.Errorf("%s %s: %d %s", c.body, c.header, rec.Code, rec.Body)
		}
	}
}

// TestVariableForm is the exact JSON of a variable and of its history.
func TestVariableForm(t *testing.T) {
	w := newWorld()
	w.call("PUT", "/v1/variables/s/x", `{"value":{"b":1,"a":[]},"binary":"AQI=","type":"map","constraints":{}}`)
	for target, want := range map[string]string{
		"/v1/variables/s/x": `{"id":"var_x_1","tenant":"default","session":"s","name":"x","type":"map","value":{"b":1,"a":[]},"binary":"AQI=","version":0,` +
			`"dot":"eu@1:7","constraints":{},"source":"REST","created_at":"2023-11-14T22:13:20Z"}`,
		"/v1/variables/s/x/history": `{"entries":[{"version":1,"dot":"@0:0","deleted":true},{"version":0,"dot":"@0:0","type":"float","value":0.5,"actor":"ann"}]}`,
		"/v1/models/m":              `{"name":"m","versions":[],"aliases":{"a":"1","b":"2"},"unit":"","weight_epoch":"7","max_attempts":0,"arms":[],"description":"","tags":{},"cost":""}`,
	} {
		if got := w.call("GET", target, "").Body.String(); got != want+"\n" {
			t.Errorf("%s\n%swant\n%s", target, got, want)
		}
	}
	if got := w.call("DELETE", "/v1/variables/s/x", "").Body.String(); got != `{"deleted":true,"dot":"eu@1:9","version":3}`+"\n" {
		t.Errorf("delete: %s", got)
	}
}

// Equal answers are equal bytes, errors included: protojson varies both on purpose, per
// build of the program, so this test sees it in some builds only.
func TestEqualAnswersAreEqualBytes(t *testing.T) {
	w := newWorld()
	for _, body := range []string{`{"version":"v","metadata":{"a":"1","b":"2"}}`, `{"unknown":1}`} {
		first := w.call("POST", "/v1/models/m/versions", body).Body.Bytes()
		if bytes.Contains(first, []byte("\u00a0")) || bytes.Contains(first, []byte("proto:")) || bytes.Contains(first, []byte(", ")) {
			t.Errorf("the library's spacing shows: %s", first)
		}
		for range 20 {
			if got := w.call("POST", "/v1/models/m/versions", body).Body.Bytes(); !bytes.Equal(got, first) {
				t.Fatalf("%s\n%s", first, got)
			}
		}
	}
}

// A caller that went away is seen by the method.
func TestCancellationReachesTheMethod(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	mux := http.NewServeMux()
	rest.Register(mux, rest.AdminRoutes(waiting{}), nil)
	rec := httptest.NewRecorder()
	mux.ServeHTTP(rec, request("GET", "/v1/status", "").WithContext(ctx))
	if rec.Code != status.HTTP(outrigger.Cancelled) {
		t.Errorf("%d %s", rec.Code, rec.Body)
	}
}

type waiting struct{ pb.UnimplementedAdminServer }

func (waiting) Status(ctx context.Context, _ *pb.ListRequestAll) (*pb.StatusResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// FuzzQuery: a query is refused or understood completely: written out again from the
// message the method got, it gives the same message.
func FuzzQuery(f *testing.F) {
	for _, c := range messages {
		if _, q, ok := strings.Cut(c.target, "?"); ok && c.method == "GET" {
			f.Add(q)
		}
	}
	f.Add("actor=%ff")
	f.Add("since=0000-01-01T00:00:00Z&until=9999-12-31T23:59:59.999999999-23:59")
	f.Fuzz(func(t *testing.T, query string) {
		w := newWorld()
		ask := func(q string) (*pb.AuditRequest, int) {
			w.admin.seen = seen{}
			r := request("GET", "/v1/audit", "")
			r.URL.RawQuery = q
			rec := httptest.NewRecorder()
			w.mux.ServeHTTP(rec, r)
			req, _ := w.admin.req.(*pb.AuditRequest)
			return req, rec.Code
		}
		req, code := ask(query)
		if req == nil {
			if code != 400 {
				t.Fatalf("%q: %d", query, code)
			}
			return
		}
		if _, err := proto.Marshal(req); err != nil {
			t.Fatalf("%q made a message that cannot be sent: %v", query, err)
		}
		again, code := ask(queryOf(t, req).Encode())
		if code != 200 || !proto.Equal(again, req) {
			t.Fatalf("%q: %d\n%s\n%s", query, code, prototext.Format(req), prototext.Format(again))
		}
	})
}

// queryOf writes a request as the query string that asks for it.
func queryOf(t *testing.T, req *pb.AuditRequest) url.Values {
	t.Helper()
	q := url.Values{}
	for name, v := range map[string]string{"aggregate_prefix": req.AggregatePrefix, "actor": req.Actor, "kind": req.Kind} {
		if v != "" {
			q.Set(name, v)
		}
	}
	for name, at := range map[string]*timestamppb.Timestamp{"since": req.Since, "until": req.Until} {
		if at != nil {
			q.Set(name, at.AsTime().Format(time.RFC3339Nano))
		}
	}
	q.Set("from", strconv.FormatUint(req.From, 10))
	q.Set("limit", strconv.Itoa(int(req.Limit)))
	q.Set("newest_first", strconv.FormatBool(req.NewestFirst))
	return q
}

// FuzzPut: whatever the body and the condition, the answer is JSON, no fault of ours, and
// a write happened if and only if it says so.
func FuzzPut(f *testing.F) {
	for _, c := range messages {
		if c.method == "PUT" {
			f.Add([]byte(c.body), "")
		}
	}
	f.Add([]byte(`{"value":1,"value":2}`), `"0"`)
	f.Add([]byte(`{"value":nul}`), `*`)
	f.Fuzz(func(t *testing.T, body []byte, match string) {
		w := newWorld()
		w.put(t, "0", "float")
		r := request("PUT", "/v1/variables/s/x", "")
		r.Body, r.Header = http.NoBody, http.Header{"If-Match": {match}, "Content-Type": {"application/json"}}
		if len(body) > 0 {
			r = httptest.NewRequest("PUT", "/v1/variables/s/x", bytes.NewReader(body))
			r.Header = http.Header{"If-Match": {match}, "Content-Type": {"application/json"}}
		}
		rec := httptest.NewRecorder()
		w.mux.ServeHTTP(rec, r)
		if rec.Code >= 500 || !json.Valid(rec.Body.Bytes()) {
			t.Fatalf("%q: %d %s", body, rec.Code, rec.Body)
		}
		if wrote := w.vars.vars[at("default", "s", "x")].Version.Counter == 1; wrote != (rec.Code == 200) {
			t.Fatalf("%q: %d, but written is %v", body, rec.Code, wrote)
		}
	})
}

// FuzzBody: a message body is refused or understood as protojson understands it.
func FuzzBody(f *testing.F) {
	for _, c := range messages {
		if c.method == "POST" {
			f.Add([]byte(c.body))
		}
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		w := newWorld()
		rec := w.call("POST", "/v1/rollouts", string(body))
		var want pb.StartRolloutRequest
		err := error(nil)
		if len(body) > 0 {
			err = protojson.Unmarshal(body, &want)
		}
		if (rec.Code == 201) != (err == nil) || rec.Code >= 500 || !json.Valid(rec.Body.Bytes()) {
			t.Fatalf("%q: %d %s, %v", body, rec.Code, rec.Body, err)
		}
		if err == nil && !proto.Equal(w.admin.req, &want) {
			t.Fatalf("%q: %s", body, prototext.Format(w.admin.req))
		}
	})
}

// TestGetAllocations guards the read path, which sidecars serve for every REST hit. About
// half of the allowance belongs to the recorder and the store of this test.
func TestGetAllocations(t *testing.T) {
	const limit = 50
	w := newWorld()
	w.put(t, "0.7", "float")
	r := request("GET", "/v1/variables/s/x", "")
	if got := testing.AllocsPerRun(100, func() { w.mux.ServeHTTP(httptest.NewRecorder(), r) }); got > limit {
		t.Errorf("%.0f allocations for one GET, the limit is %d", got, limit)
	}
}

// BenchmarkGet is the part of a sidecar's REST hit that is ours.
func BenchmarkGet(b *testing.B) {
	w := newWorld()
	w.call("PUT", "/v1/variables/s/x", `{"value":0.7,"type":"float"}`)
	r := request("GET", "/v1/variables/s/x", "")
	b.ReportAllocs()
	for b.Loop() {
		rec := httptest.NewRecorder()
		w.mux.ServeHTTP(rec, r)
		if rec.Code != 200 {
			b.Fatal(rec.Code)
		}
	}
}

// A lock is part of a variable's form, and of no ETag.
func TestOptimizationForm(t *testing.T) {
	w := newWorld()
	w.put(t, "1", "float")
	for _, c := range []struct {
		method, target, body string
		code                 int
		want                 string
	}{
		{"POST", "/v1/variables/s/x/optimization", `{"optimiser":"ann"}`, 400, "optimiser"},
		{"POST", "/v1/variables/s/x/optimization", `{"optimizer":"ann"}`, 201, `"optimization":{"id":"opt_1_1","optimizer":"ann","started_at":"2023-11-14T22:13:20Z","renewed_at":"2023-11-14T22:13:20Z"}`},
		{"GET", "/v1/variables/s/x", "", 200, `"optimizer":"ann"`},
		{"DELETE", "/v1/variables/s/x/optimization?force=yes", "", 400, "force"},
	} {
		rec := httptest.NewRecorder()
		w.mux.ServeHTTP(rec, request(c.method, c.target, c.body))
		if rec.Code != c.code || !strings.Contains(rec.Body.String(), c.want) || c.code < 300 && rec.Header().Get("ETag") != `"0"` {
			t.Errorf("%s %s: %d %v %s", c.method, c.target, rec.Code, rec.Header(), rec.Body)
		}
	}
}
