package control_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/internal/rest"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// call is one HTTP exchange as an operator on the same machine makes it; header lines
// are "name: value".
func call(h http.Handler, method, target, body string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "http://localhost:7000"+target, strings.NewReader(body))
	r.RemoteAddr = "127.0.0.1:40000"
	if body != "" {
		r.Header.Set("content-type", "application/json")
	}
	for _, line := range headers {
		name, value, _ := strings.Cut(line, ": ")
		switch strings.ToLower(name) {
		case "host":
			r.Host = value
		case "remote":
			r.RemoteAddr = value
		default:
			r.Header.Set(name, value)
		}
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// TestREST is one operator's session. Each line is a call, the expected status, and
// texts the answer must contain; the world goes on from line to line.
func TestREST(t *testing.T) {
	p := newPlane(t)
	h := p.srv.Handler()
	big := `{"version":"` + strings.Repeat("x", rest.MaxBodyBytes) + `"}`
	lines := []struct {
		method, target, body string
		headers              []string
		status               int
		want                 []string
	}{
		{"GET", "/v1/models", "", nil, 200, []string{`"models":[]`}},
		{"POST", "/v1/models", `{"model":"chat","version":"v1","endpoints":[{"address":"10.0.0.1:80","region":"eu"}]}`, []string{"X-Outrigger-Actor: ann"}, 201, []string{`"champion":"v1"`, `"state":"production"`}},
		{"POST", "/v1/models/chat/versions", `{"version":"v2","endpoints":[{"address":"10.0.0.2:80"}],"actor":"bob"}`, nil, 201, []string{`"state":"registered"`}},
		{"POST", "/v1/models/chat/versions", `{"model":"other","version":"v3","endpoints":[{"address":"10.0.0.2:80"}]}`, nil, 400, []string{`"kind":"invalid"`, "in the path"}},
		{"POST", "/v1/models/chat/versions", `{"version":"v3","endpoint":[]}`, nil, 400, []string{"unknown field", "endpoint"}},
		{"POST", "/v1/models/chat/versions", `{"version":"v3"`, nil, 400, []string{"body"}},
		{"POST", "/v1/models/chat/versions", `{"version":"v3"}`, []string{"content-type: text/plain"}, 400, []string{"application/json"}},
		{"POST", "/v1/models/chat/versions", big, nil, 413, []string{`"kind":"exhausted"`, "8388608"}},
		{"GET", "/v1/models/chat", "", nil, 200, []string{`"name":"chat"`, `"upstream_model":"chat"`, `"weight":10000`}},
		{"GET", "/v1/models/nope", "", nil, 404, []string{`"kind":"not_found"`, "nope"}},
		{"POST", "/v1/models/chat", `{"unit":"session","max_attempts":3}`, nil, 200, []string{`"unit":"session"`, `"max_attempts":3`}},
		{"POST", "/v1/models/chat/aliases/champion", `{"to":"v2","expected":"v9"}`, nil, 412, []string{`"kind":"conflict"`}},
		{"POST", "/v1/models/chat/aliases/champion", `{"to":"v2","expected":"v1"}`, nil, 200, []string{`"champion":"v2"`}},
		{"POST", "/v1/models/chat/versions/v1", `{"state":"quarantined","reason":"leaks"}`, nil, 200, []string{`"state":"quarantined"`}},
		{"POST", "/v1/models/chat/versions/v1", `{"state":"registered"}`, nil, 200, nil},

		{"POST", "/v1/experiments", `{"name":"e","model":"chat","start":true,"arms":[{"name":"a","version":"v1","weight":5000},{"name":"b","version":"v2","weight":5000}]}`, nil, 201, []string{`"state":"running"`}},
		{"POST", "/v1/rollouts", `{"model":"chat","candidate":"v1"}`, nil, 423, []string{`"kind":"locked"`, "experiment e"}},
		{"POST", "/v1/experiments/e", `{"state":"concluded","reason":"b is better"}`, nil, 200, []string{`"state":"concluded"`}},
		{"GET", "/v1/experiments", "", nil, 200, []string{`"name":"e"`}},
		{"POST", "/v1/rollouts", `{"id":"r","model":"chat","candidate":"v1","phases":[{"name":"canary","weight":100,"min_duration":"600s"}]}`, nil, 201, []string{`"state":"running"`, `"last_good":"v2"`, `"alpha"`}[:2]},
		{"GET", "/v1/rollouts/r", "", nil, 200, []string{`"candidate":"v1"`}},
		{"GET", "/v1/rollouts", "", nil, 200, []string{`"id":"r"`}},
		{"POST", "/v1/rollouts/r/abort", "", nil, 200, []string{`"state":"rolling_back"`, `manual`}},
		{"POST", "/v1/rollouts/r/advance", `{}`, nil, 423, []string{"rolling_back"}},
		{"POST", "/v1/rollouts/zz/abort", `{"reason":"x"}`, nil, 404, []string{"zz"}},

		{"GET", "/v1/regions", "", nil, 200, []string{`"name":"eu"`, `"local":true`, `"source":"self"`}},
		{"GET", "/v1/alerts", "", nil, 200, []string{`"alerts":[]`}},
		{"GET", "/v1/audit?kind=model_version_registered&actor=ann", "", nil, 200, []string{`"actor":"ann"`, `"peer":"127.0.0.1"`}},
		{"GET", "/v1/audit?aggregate_prefix=model/chat&limit=1&newest_first=true&until=2100-01-01T00:00:00Z", "", nil, 200, []string{`"next":"`}},
		{"GET", "/v1/audit?limit=ten", "", nil, 400, []string{`limit`}},
		{"GET", "/v1/audit?kinds=x", "", nil, 400, []string{`kinds`}},
		{"GET", "/v1/audit?kind=a&kind=b", "", nil, 400, []string{`2 times`}},
		{"GET", "/v1/status", "", nil, 200, []string{`"region":"eu"`, `"policy_position":"`}},

		{"POST", "/v1/sessions", `{"id":"s1","ttl":"600s"}`, nil, 201, []string{`"id":"s1"`, `"ttl":"600s"`}},
		{"POST", "/v1/sessions", `{"id":"s1"}`, nil, 409, []string{`"kind":"exists"`}},
		{"GET", "/v1/sessions/s1", "", nil, 200, []string{`"tenant":"default"`}},
		{"GET", "/v1/sessions", "", nil, 200, []string{`"id":"s1"`}},
		{"GET", "/v1/sessions/nope", "", nil, 404, []string{"Session not found"}},
		{"PUT", "/v1/variables/s1/temperature", `{"value":0.7}`, nil, 404, []string{"Variable not found"}},
		{"PUT", "/v1/variables/s1/temperature", `{"value":0.7,"type":"float","constraints":{"min":0,"max":1},"metadata":{"unit":"none"}}`, nil, 201, []string{`"version":0`, `"value":0.7`, `"max":1`}},
		{"PUT", "/v1/variables/s1/temperature", `{"value":0.7,"type":"float"}`, []string{"If-None-Match: *"}, 409, []string{`"kind":"exists"`}},
		{"PUT", "/v1/variables/s1/temperature", `{"value":0.8}`, []string{`If-Match: "0"`, "X-Outrigger-Actor: ann"}, 200, []string{`"version":1`, `"source":"REST"`}},
		{"PUT", "/v1/variables/s1/temperature", `{"value":0.9}`, []string{`If-Match: "0"`}, 412, []string{`"current_version":1`}},
		{"PUT", "/v1/variables/s1/temperature", `{"value":0.9,"expected_version":0}`, nil, 412, []string{`"current_version":1`}},
		{"PUT", "/v1/variables/s1/temperature", `{"value":0.9,"expected_version":0}`, []string{`If-Match: "1"`}, 400, []string{"if-match is 1"}},
		{"PUT", "/v1/variables/s1/temperature", `{"value":0.9}`, []string{`If-Match: W/"x"`}, 400, []string{"if-match"}},
		{"PUT", "/v1/variables/s1/temperature", `{"value":7}`, nil, 400, []string{"above maximum"}},
		{"PUT", "/v1/variables/s1/temperature", `{"valeu":7}`, nil, 400, []string{"valeu"}},
		{"PUT", "/v1/variables/s1/temperature", `{"value":1} {}`, nil, 400, []string{"more than one"}},
		{"PUT", "/v1/variables/s1/temperature", `{}`, nil, 400, []string{`no \"value\"`}},
		{"GET", "/v1/variables/s1/temperature", "", nil, 200, []string{`"value":0.8`, `"dot":"eu@`}},
		{"GET", "/v1/variables/s1/temperature", "", []string{`If-None-Match: "1"`}, 304, nil},
		{"GET", "/v1/variables/s1/temperature?tenant=other", "", nil, 404, nil},
		{"GET", "/v1/variables/s1/temperature?tenant=other", "", []string{"x-outrigger-tenant: third"}, 400, []string{"tenant"}},
		{"GET", "/v1/variables/s1?pattern=temp*", "", nil, 200, []string{`"name":"temperature"`}},
		{"GET", "/v1/variables/s1?pattern=x*", "", nil, 200, []string{`"variables":[]`}},
		{"GET", "/v1/variables/s1/temperature/history?limit=5", "", nil, 200, []string{`"value":0.8`, `"value":0.7`, `"actor":"ann"`}},
		{"GET", "/v1/variables/s1/temperature/history?limit=x", "", nil, 400, []string{"limit"}},
		{"POST", "/v1/variables/s1/temperature/rollback", `{"target_version":0}`, nil, 200, []string{`"version":2`, `"value":0.7`}},
		{"POST", "/v1/variables/s1/temperature/rollback", `{}`, nil, 400, []string{"target_version"}},
		{"DELETE", "/v1/variables/s1/temperature", "", []string{`If-Match: "2"`}, 400, []string{"not supported"}},
		{"DELETE", "/v1/variables/s1/temperature", "", nil, 200, []string{`"deleted":true`}},
		{"GET", "/v1/variables/s1/temperature", "", nil, 404, []string{"Variable not found: temperature"}},
		{"PUT", "/v1/variables/s2/note", `{"value":"hi","type":"string","create_session":true}`, nil, 201, []string{`"session":"s2"`}},
		{"DELETE", "/v1/sessions/s2", "", nil, 200, []string{`"variables_removed":1`}},

		{"GET", "/v1/nothing", "", nil, 404, []string{`"kind":"not_found"`}},
		{"PATCH", "/v1/models/chat", "", nil, 404, []string{"PATCH"}},
	}
	for _, l := range lines {
		w := call(h, l.method, l.target, l.body, l.headers...)
		answer := w.Body.String()
		if w.Code != l.status {
			t.Fatalf("%s %s %.200s: %d, want %d: %s", l.method, l.target, l.body, w.Code, l.status, answer)
		}
		for _, text := range l.want {
			if !strings.Contains(answer, text) {
				t.Errorf("%s %s: the answer lacks %s: %s", l.method, l.target, text, answer)
			}
		}
		if w.Code != 304 && !json.Valid(w.Body.Bytes()) {
			t.Errorf("%s %s: not JSON: %s", l.method, l.target, answer)
		}
	}
}

// TestETag: what GET says is what If-Match takes.
func TestETag(t *testing.T) {
	h := newPlane(t).srv.Handler()
	call(h, "PUT", "/v1/variables/s/x", `{"value":1,"type":"integer","create_session":true}`)
	for range 3 {
		tag := call(h, "GET", "/v1/variables/s/x", "").Header().Get("etag")
		if w := call(h, "PUT", "/v1/variables/s/x", `{"value":2}`, "If-Match: "+tag); w.Code != 200 || w.Header().Get("etag") == tag {
			t.Fatalf("%s: %d %s", tag, w.Code, w.Body)
		}
	}
}

// TestIdempotencyKey: a retried set writes once.
func TestIdempotencyKey(t *testing.T) {
	h := newPlane(t).srv.Handler()
	call(h, "PUT", "/v1/variables/s/x", `{"value":1,"type":"integer","create_session":true}`)
	for range 2 {
		w := call(h, "PUT", "/v1/variables/s/x", `{"value":2}`, "Idempotency-Key: k1")
		if w.Code != 200 || !strings.Contains(w.Body.String(), `"version":1`) {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
	}
}

// TestEqualAnswersAreEqualBytes: protojson varies its spacing, we do not.
func TestEqualAnswersAreEqualBytes(t *testing.T) {
	p := newPlane(t)
	p.register("chat", "v1", "v2")
	h := p.srv.Handler()
	first := call(h, "GET", "/v1/models", "").Body.Bytes()
	for range 20 {
		if got := call(h, "GET", "/v1/models", "").Body.Bytes(); !bytes.Equal(got, first) {
			t.Fatalf("%s\n%s", first, got)
		}
	}
}

const token = "0123456789abcdef0123"

// TestHTTPAccess: who gets in. Mutating calls go to an unknown rollout, so 404 means
// that the caller was let through.
func TestHTTPAccess(t *testing.T) {
	open := start(t, memory.New(), func(o *control.Options) { o.Hosts = []string{"mesh.example"} }).srv.Handler()
	locked := start(t, memory.New(), func(o *control.Options) { o.AdminToken = token }).srv.Handler()
	const remote = "remote: 192.0.2.7:5"
	bearer := "Authorization: Bearer " + token
	cases := []struct {
		name           string
		h              http.Handler
		method, target string
		headers        []string
		status         int
	}{
		{"read, local", open, "GET", "/v1/models", nil, 200},
		{"write, local", open, "POST", "/v1/rollouts/x/abort", nil, 404},
		{"read, remote", open, "GET", "/v1/models", []string{remote}, 403},
		{"delivery, local", open, "GET", "/v1/xds/status", nil, 200},
		{"delivery, remote", open, "GET", "/v1/xds/status", []string{remote}, 403},
		{"write, remote", open, "POST", "/v1/rollouts/x/abort", []string{remote}, 403},
		{"write, remote with any token", open, "POST", "/v1/rollouts/x/abort", []string{remote, bearer}, 403},
		{"read through a local proxy", open, "GET", "/v1/models", []string{"X-Forwarded-For: 192.0.2.7"}, 403},
		{"page, remote", open, "GET", "/", []string{remote}, 403},
		{"configured host", open, "GET", "/v1/models", []string{"host: mesh.example:7000"}, 200},
		{"rebound host", open, "GET", "/v1/models", []string{"host: evil.example:7000"}, 403},
		{"rebound host, page", open, "GET", "/", []string{"host: evil.example"}, 403},
		{"rebound host, stream", open, "GET", "/events", []string{"host: evil.example"}, 403},
		{"write from a page of another origin", open, "POST", "/v1/rollouts/x/abort", []string{"Sec-Fetch-Site: cross-site"}, 403},
		{"write from a page of another origin, old browser", open, "POST", "/v1/rollouts/x/abort", []string{"Origin: http://evil.example"}, 403},
		{"write from our own origin", open, "POST", "/v1/rollouts/x/abort", []string{"Sec-Fetch-Site: same-origin"}, 404},
		{"health, remote", open, "GET", "/healthz", []string{remote, "host: 10.1.2.3:7000"}, 200},
		{"readiness, remote", open, "GET", "/readyz", []string{remote, "host: 10.1.2.3:7000"}, 200},

		{"token: read, local without", locked, "GET", "/v1/models", nil, 200},
		{"token: write, local without", locked, "POST", "/v1/rollouts/x/abort", nil, 401},
		{"token: write, local with", locked, "POST", "/v1/rollouts/x/abort", []string{bearer}, 404},
		{"token: variable, local without", locked, "PUT", "/v1/variables/s/x", nil, 401},
		{"token: session, local without", locked, "DELETE", "/v1/sessions/s", nil, 401},
		{"token: read, remote without", locked, "GET", "/v1/models", []string{remote}, 401},
		{"token: read, remote with", locked, "GET", "/v1/models", []string{remote, bearer}, 200},
		{"token: write, remote wrong", locked, "POST", "/v1/rollouts/x/abort", []string{remote, bearer + "x"}, 401},
		{"token: page asks for a password", locked, "GET", "/", []string{remote}, 401},
		{"metrics that are not configured", open, "GET", "/metrics", nil, 404},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := call(c.h, c.method, c.target, "", c.headers...)
			if w.Code != c.status {
				t.Fatalf("%d, want %d: %s", w.Code, c.status, w.Body)
			}
			if ask := w.Header().Get("www-authenticate") != ""; ask != (c.status == 401 && c.target == "/") {
				t.Fatalf("asks for a password: %v", ask)
			}
			if strings.Contains(w.Body.String(), token) {
				t.Fatalf("the answer shows the token: %s", w.Body)
			}
		})
	}
}

// recorder is a gRPC server that remembers the services registered with it.
type recorder map[string]*grpc.ServiceDesc

func (r recorder) RegisterService(d *grpc.ServiceDesc, _ any) { r[d.ServiceName] = d }

// TestGRPCAccess: the same rules over gRPC, for every method there is. A new method is
// mutating until somebody says otherwise.
func TestGRPCAccess(t *testing.T) {
	p := start(t, memory.New(), func(o *control.Options) { o.AdminToken = token })
	services := recorder{}
	p.srv.RegisterGRPC(services)
	for _, want := range []string{"outrigger.v1.Variables", "outrigger.v1.Coherence", "outrigger.v1.Reports", "outrigger.v1.Admin",
		"outrigger.v1.Delivery", "envoy.service.discovery.v3.AggregatedDiscoveryService"} {
		if services[want] == nil {
			t.Errorf("%s is not registered", want)
		}
	}
	refused := func(method grpc.MethodDesc, ctx context.Context) bool {
		var srv any = p.srv.Admin()
		if strings.HasPrefix(method.MethodName, "Xds") {
			srv = p.srv.Delivery()
		}
		_, err := method.Handler(srv, ctx, func(any) error { return nil }, nil)
		return outrigger.IsKind(status.FromGRPC(err, nil), outrigger.Unauthorised)
	}
	local := peer.NewContext(t.Context(), &peer.Peer{Addr: &netAddr{"tcp", "127.0.0.1:1"}})
	remote := peer.NewContext(t.Context(), &peer.Peer{Addr: &netAddr{"tcp", "192.0.2.1:1"}})
	with := func(ctx context.Context) context.Context {
		return metadata.NewIncomingContext(ctx, metadata.Pairs("authorization", "Bearer "+token))
	}
	reads := 0
	for _, m := range slices.Concat(services["outrigger.v1.Admin"].Methods, services["outrigger.v1.Delivery"].Methods) {
		read := slices.Contains([]string{"XdsStatus", "XdsConfig", "XdsDiff", "XdsPushLog", "XdsExplain", "XdsLoad", "XdsCanary"}, m.MethodName) ||
			strings.HasPrefix(m.MethodName, "Get") || strings.HasPrefix(m.MethodName, "List") || slices.Contains([]string{"Audit", "Status", "ExperimentResults", "PlanRollout", "ServedAt", "ModelMetrics", "SelectOptimizer"}, m.MethodName)
		if read {
			reads++
		}
		if got := refused(m, local); got == read {
			t.Errorf("%s from this machine without a token: refused %v", m.MethodName, got)
		}
		if !refused(m, remote) || !refused(m, t.Context()) {
			t.Errorf("%s from elsewhere without a token was let in", m.MethodName)
		}
		if refused(m, with(remote)) || refused(m, with(local)) {
			t.Errorf("%s with the token was refused", m.MethodName)
		}
	}
	if reads != 16+7 || len(services["outrigger.v1.Admin"].Methods) != 40 {
		t.Fatalf("%d of %d methods read", reads, len(services["outrigger.v1.Admin"].Methods))
	}
	csds := services["envoy.service.status.v3.ClientStatusDiscoveryService"]
	if csds == nil || len(csds.Streams) != 1 || len(csds.Methods) != 1 || !refused(csds.Methods[0], remote) {
		t.Fatalf("client status is not guarded: %+v", csds)
	}
	if err := csds.Streams[0].Handler(nil, serverStream{ctx: remote}); !outrigger.IsKind(status.FromGRPC(err, nil), outrigger.Unauthorised) {
		t.Errorf("a stream of client status from elsewhere without a token: %v", err)
	}
}

// serverStream is a stream that has only a context.
type serverStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s serverStream) Context() context.Context { return s.ctx }

type netAddr struct{ network, text string }

func (a *netAddr) Network() string { return a.network }
func (a *netAddr) String() string  { return a.text }

// TestNotReady: before the log is applied everything but health says so.
func TestNotReady(t *testing.T) {
	srv, err := control.New(control.Options{Log: memory.New(), Region: &pb.Region{Name: "eu"}})
	if err != nil {
		t.Fatal(err)
	}
	h := srv.Handler()
	for target, want := range map[string]int{"/healthz": 200, "/readyz": 503, "/v1/models": 503, "/v1/status": 503} {
		if w := call(h, "GET", target, ""); w.Code != want {
			t.Errorf("%s: %d, want %d", target, w.Code, want)
		}
	}
}

// TestMetricsAreGuarded: the injected handler is behind the same door.
func TestMetricsAreGuarded(t *testing.T) {
	h := start(t, memory.New(), func(o *control.Options) {
		o.Metrics = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "up 1\n") })
	}).srv.Handler()
	if w := call(h, "GET", "/metrics", ""); w.Code != 200 || w.Body.String() != "up 1\n" {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	if w := call(h, "GET", "/metrics", "", "remote: 192.0.2.7:5"); w.Code != 403 {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
}
