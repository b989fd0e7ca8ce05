package inference

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Every refusal: status, code, OpenAI form, and the mesh's headers.
func TestRefusals(t *testing.T) {
	withPolicy := newSource(newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil))
	quarantined := newPolicy(0, nil, nil)
	quarantined.Models[0].Versions[0].Quarantined = true
	tests := []struct {
		name, method, path, body string
		header                   []string
		source                   *source
		status                   int
		code                     string
	}{
		{"malformed", "POST", chatPath, `{"model":`, nil, withPolicy, 400, "invalid_body"},
		{"empty", "POST", chatPath, ``, nil, withPolicy, 400, "invalid_body"},
		{"duplicate model", "POST", chatPath, `{"model":"gpt","model":"gpt"}`, nil, withPolicy, 400, "invalid_body"},
		{"deep", "POST", chatPath, `{"model":"gpt","x":` + strings.Repeat("[", 600) + strings.Repeat("]", 600) + `}`, nil, withPolicy, 400, "invalid_body"},
		{"no model", "POST", chatPath, `{}`, nil, withPolicy, 400, "missing_required_parameter"},
		{"unknown model", "POST", chatPath, `{"model":"nope"}`, nil, withPolicy, 404, "model_not_found"},
		{"unprintable model", "POST", chatPath, `{"model":"\u0007"}`, nil, withPolicy, 404, "model_not_found"},
		{"huge", "POST", chatPath, `{"model":"gpt","x":"` + strings.Repeat("x", 2000) + `"}`, nil, withPolicy, 413, "request_too_large"},
		{"encoded", "POST", chatPath, `{"model":"gpt"}`, []string{"Content-Encoding", "br"}, withPolicy, 415, "unsupported_encoding"},
		{"connection names identity", "POST", chatPath, `{"model":"gpt"}`, []string{"Connection", "x-user-id"}, withPolicy, 400, "invalid_body"},
		{"GET", "GET", chatPath, ``, nil, withPolicy, 405, "method_not_allowed"},
		{"POST to models", "POST", "/v1/models", ``, nil, withPolicy, 405, "method_not_allowed"},
		{"unknown path", "POST", "/v1/nope", ``, nil, withPolicy, 404, "unknown_url"},
		{"unknown model object", "GET", "/v1/models/org/nope", ``, nil, withPolicy, 404, "model_not_found"},
		{"no policy yet", "POST", chatPath, `{"model":"gpt"}`, nil, newSource(nil), 503, "no_policy"},
		{"no policy yet, models", "GET", "/v1/models", ``, nil, newSource(nil), 503, "no_policy"},
		{"all quarantined", "POST", chatPath, `{"model":"gpt"}`, nil, newSource(quarantined), 503, "no_version"},
		{"no endpoint", "POST", chatPath, `{"model":"gpt"}`, nil, newSource(newPolicy(0, nil, nil)), 503, "no_endpoint"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := mustNew(t, Options{Policy: tt.source.get, MaxBody: 1600, Transport: roundTripper(func(*http.Request) (*http.Response, error) {
				t.Error("a refused request went upstream")
				return nil, errCut
			})})
			for _, chunked := range []bool{false, true} {
				r := httptest.NewRequest(tt.method, tt.path, strings.NewReader(tt.body))
				if chunked {
					r.ContentLength = -1
				}
				for i := 0; i < len(tt.header); i += 2 {
					r.Header.Set(tt.header[i], tt.header[i+1])
				}
				w := httptest.NewRecorder()
				h.ServeHTTP(w, r)
				if code := errorCode(t, w.Body.Bytes()); w.Code != tt.status || code != tt.code {
					t.Errorf("chunked %v: %d %s, want %d %s", chunked, w.Code, code, tt.status, tt.code)
				}
				want := "live"
				if tt.source.p.Load() == nil {
					want = "none"
				}
				if w.Header().Get("x-outrigger-policy") != want || w.Header().Get("x-outrigger-attempts") != "0" || w.Header().Get("content-type") != "application/json" {
					t.Errorf("header %v", w.Header())
				}
			}
		})
	}
}

func TestPassthrough(t *testing.T) {
	var got string
	pass := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got = fmt.Sprint(r.URL.Path, " ", string(b), " ", r.Header["X-Outrigger-Bucket"], r.Header.Get("Authorization"))
	})
	src := newSource(newPolicy(0, nil, nil))
	for _, tt := range []struct {
		name, path, body string
		policy           func() (*policy.Policy, PolicyStatus)
	}{
		{"model not in the policy", chatPath, `{"model":"other" , "x":1.0}`, src.get},
		{"no model", "/v1/responses", `{"previous_response_id":"r"}`, src.get},
		{"no policy function", chatPath, `{"model":"gpt"}`, nil},
		{"other path", "/v1/files", `raw`, src.get},
	} {
		h := mustNew(t, Options{Policy: tt.policy, Passthrough: pass, Transport: roundTripper(nil)})
		got = ""
		post(h, tt.path, tt.body, "X-Outrigger-Bucket", "1", "Authorization", "Bearer k")
		if want := tt.path + " " + tt.body + " []Bearer k"; got != want {
			t.Errorf("%s: %q, want %q", tt.name, got, want)
		}
		// Browsers ask with OPTIONS; GET lists what OpenAI has stored.
		for _, method := range []string{http.MethodOptions, http.MethodGet} {
			got = ""
			h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(method, tt.path+"?limit=2", nil))
			if got != tt.path+"  []" {
				t.Errorf("%s, %s: %q", tt.name, method, got)
			}
		}
	}
}

// A model that does not say what its answer is has nothing said in its name.
func TestNoTypeIsGuessed(t *testing.T) {
	h := mustNew(t, Options{Policy: newSource(newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil)).get,
		Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: 200, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("plain words")), ContentLength: 11, Request: r}, nil
		})})
	front := httptest.NewServer(h)
	defer front.Close()
	resp, err := http.Post(front.URL+chatPath, "application/json", strings.NewReader(`{"model":"gpt"}`))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "plain words" || resp.Header["Content-Type"] != nil {
		t.Errorf("%q, %v, %v", body, err, resp.Header)
	}
}

func TestLimits(t *testing.T) {
	release := make(chan struct{})
	entered := make(chan struct{})
	tr := roundTripper(func(*http.Request) (*http.Response, error) {
		entered <- struct{}{}
		<-release
		return (&scripted{steps: map[string][]step{"a:1": {{status: 200, body: "{}"}}}}).answer("a:1")
	})
	p := newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil)
	p.Models[0].Versions[0].MaxRequests = 1
	for name, o := range map[string]Options{
		"version": {Policy: newSource(p).get, Transport: tr}, "sidecar": {Policy: newSource(newPolicy(0, p.Models[0].Versions[0].Endpoints, nil)).get, Transport: tr, MaxInFlight: 1},
	} {
		h := mustNew(t, o)
		done := make(chan int)
		go func() { done <- post(h, chatPath, chatBody("u", false)).Code }()
		<-entered
		w := post(h, chatPath, chatBody("u", false))
		if errorCode(t, w.Body.Bytes()) != "overloaded" || w.Code != 503 || w.Header().Get("retry-after-ms") != "500" {
			t.Errorf("%s: %d %v", name, w.Code, w.Header())
		}
		release <- struct{}{}
		if code := <-done; code != 200 {
			t.Errorf("%s: first request %d", name, code)
		}
		go func() { done <- post(h, chatPath, chatBody("u", false)).Code }()
		<-entered
		release <- struct{}{}
		if code := <-done; code != 200 {
			t.Errorf("%s: the place was not given back: %d", name, code)
		}
	}
}

// The client leaves: the upstream request ends at once and counts as cancelled, before
// the answer begins and in the middle of it.
func TestCancellation(t *testing.T) {
	for _, began := range []bool{false, true} {
		arrived, gone := make(chan struct{}), make(chan struct{})
		backend := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			if began {
				w.Header().Set("Content-Type", "text/event-stream")
				fmt.Fprint(w, chunkOf("gpt-v1", `{"content":"x"}`))
				w.(http.Flusher).Flush()
			}
			close(arrived)
			<-r.Context().Done()
			close(gone)
		})
		p := newPolicy(0, []policy.Endpoint{at(serve(t, backend), "eu")}, nil)
		p.Models[0].Versions[0].ConsecutiveFailures = 1 // one failure would open the breaker
		m := newMesh(t, p, Options{})
		ctx, cancel := context.WithCancel(t.Context())
		req, err := http.NewRequestWithContext(ctx, "POST", m.front.URL+chatPath, strings.NewReader(chatBody("u", began)))
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			if resp, err := http.DefaultClient.Do(req); err == nil {
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
		}()
		<-arrived
		cancel()
		<-gone // the upstream noticed; a test that hangs here has failed
		<-ended
		m.front.Close()
		if d := only(t, m.handler); d.Cancelled != 1 || d.Requests != 1 || d.Failures != 0 || len(d.LatencySketch) != 0 {
			t.Errorf("began %v: outcome %v", began, d)
		}
		if s := m.handler.LocalStats(); s.Endpoints[0].Breaker != "closed" || s.InFlight != 0 {
			t.Errorf("began %v: stats %+v", began, s)
		}
	}
}

// The kill switch is a policy swap: the next request obeys it, a stream in flight
// finishes on its version.
func TestKillSwitch(t *testing.T) {
	next := make(chan struct{})
	slow := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 3 {
			fmt.Fprint(w, chunkOf("gpt-v2", fmt.Sprintf(`{"content":"v2-%d "}`, i)))
			w.(http.Flusher).Flush()
			<-next
		}
		fmt.Fprint(w, streamDone)
	})
	stable := []policy.Endpoint{at(serve(t, &modelServer{name: "gpt-v1"}), "eu")}
	candidate := []policy.Endpoint{at(serve(t, slow), "eu")}
	m := newMesh(t, newPolicy(10_000, stable, candidate), Options{})
	resp, err := http.Post(m.front.URL+chatPath, "application/json", strings.NewReader(chatBody("u", true)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.Header.Get("x-outrigger-version") != "v2" {
		t.Fatalf("header %v", resp.Header)
	}
	br := bufio.NewReader(resp.Body)
	if line, err := br.ReadString('\n'); err != nil || !strings.Contains(line, "v2-0") {
		t.Fatal(line, err)
	}

	killed := newPolicy(0, stable, candidate)
	killed.Models[0].Versions[1].Quarantined = true
	m.source.p.Store(killed)
	after, err := http.Post(m.front.URL+chatPath, "application/json", strings.NewReader(chatBody("u", false)))
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(after.Body)
	after.Body.Close()
	if after.Header.Get("x-outrigger-version") != "v1" || !strings.Contains(string(body), "gpt-v1") {
		t.Errorf("after the kill switch: %v %s", after.Header, body)
	}
	for range 3 {
		next <- struct{}{}
	}
	rest, err := io.ReadAll(br)
	if err != nil || !strings.Contains(string(rest), "v2-2") || !strings.HasSuffix(string(rest), streamDone) {
		t.Errorf("stream in flight: %q, %v", rest, err)
	}
}

// Events are passed on as they come: the server waits for the client's receipt of each.
func TestStreamIsFlushedPerEvent(t *testing.T) {
	// Events, and a stream in another form, which passes as bytes.
	for _, ctype := range []string{"text/event-stream", "application/x-ndjson"} {
		t.Run(ctype, func(t *testing.T) { flushedPerEvent(t, ctype) })
	}
}

func flushedPerEvent(t *testing.T, ctype string) {
	ack := make(chan struct{})
	backend := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", ctype)
		for i := range 5 {
			fmt.Fprint(w, chunkOf("gpt-v1", fmt.Sprintf(`{"content":"%d"}`, i)))
			w.(http.Flusher).Flush()
			<-ack
		}
		fmt.Fprint(w, streamDone)
	})
	m := newMesh(t, newPolicy(0, []policy.Endpoint{at(serve(t, backend), "eu")}, nil), Options{})
	resp, err := http.Post(m.front.URL+chatPath, "application/json", strings.NewReader(chatBody("u", true)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	br := bufio.NewReader(resp.Body)
	for i := range 5 {
		line, err := br.ReadString('\n')
		if err != nil || !strings.Contains(line, fmt.Sprintf(`"content":"%d"`, i)) {
			t.Fatalf("event %d: %q, %v", i, line, err)
		}
		br.ReadString('\n')
		ack <- struct{}{}
	}
}

// The policy header says how far the policy can be trusted, and the dead-man lease
// moves traffic off the candidate.
func TestPolicyStatus(t *testing.T) {
	ep := []policy.Endpoint{at("a:1", "eu")}
	src := newSource(newPolicy(10_000, ep, ep))
	h := mustNew(t, Options{Policy: src.get, Transport: &scripted{steps: map[string][]step{"a:1": {{status: 200, body: "{}"}}}}})
	for _, tt := range []struct {
		status               PolicyStatus
		policy, version, arm string
	}{
		{PolicyStatus{Live: true}, "live", "v2", "candidate"},
		{PolicyStatus{}, "last-good", "v2", "candidate"},
		{PolicyStatus{DeadManExpired: true}, "last-good", "v1", "last-good"},
	} {
		src.s.Store(&tt.status)
		w := post(h, chatPath, chatBody("u", false))
		if w.Header().Get("x-outrigger-policy") != tt.policy || w.Header().Get("x-outrigger-version") != tt.version || w.Header().Get("x-outrigger-arm") != tt.arm {
			t.Errorf("%+v: %v", tt.status, w.Header())
		}
	}
	w := post(h, chatPath, `{"model":"gpt"}`)
	if w.Header().Get("x-outrigger-arm") != "unassigned" || w.Header().Get("x-outrigger-bucket") != "" {
		t.Errorf("no unit: %v", w.Header())
	}
	for _, d := range h.Recorder().Drain(time.Now()) {
		if d.Arm == "unassigned" && (len(d.Units) != 0 || d.Requests != 1) {
			t.Errorf("unassigned: %v", d)
		}
	}
}

// Metrics under the names and attributes of OpenTelemetry's GenAI conventions.
func TestMetrics(t *testing.T) {
	tel, err := telemetry.New(t.Context(), telemetry.Options{Service: "sidecar", LogTo: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	defer tel.Shutdown(context.WithoutCancel(t.Context()))
	tr := &scripted{steps: map[string][]step{"a:1": {
		{status: 200, ctype: "text/event-stream", body: streamOf("gpt-v1", "a b c")}, {status: 200, body: `{"choices":[]}`}, {status: 500, body: "{}"},
	}}}
	h := mustNew(t, Options{Policy: newSource(newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil)).get, Transport: tr, Meter: tel.Meter("proxy/inference")})
	for range 3 {
		post(h, chatPath, chatBody("u", false))
	}
	post(h, chatPath, "{")
	w := httptest.NewRecorder()
	tel.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	var lines []string
	for _, l := range strings.Split(w.Body.String(), "\n") {
		if !strings.HasPrefix(l, "#") && (strings.Contains(l, "gen_ai") || strings.Contains(l, "outrigger_inference")) && !strings.Contains(l, "_bucket") {
			lines = append(lines, l)
		}
	}
	got := strings.Join(lines, "\n")
	for _, want := range [][]string{
		{"gen_ai_server_request_duration_seconds_count", `error_type="500"`, `gen_ai_request_model="gpt"`, `gen_ai_response_model="gpt-v1"`, `gen_ai_operation_name="chat"`, `outrigger_arm="stable"`, `outrigger_region="eu"`},
		{"gen_ai_server_time_to_first_token_seconds_count", " 1"},
		{"gen_ai_client_token_usage_sum", `gen_ai_token_type="output"`, `outrigger_token_estimated="false"`, "} 3"},
		{"gen_ai_client_token_usage_count", `gen_ai_token_type="input"`, `outrigger_token_estimated="true"`, "} 1"},
		{"outrigger_inference_refused_total", `error_type="invalid_body"`, "} 1"},
	} {
		found := false
		for _, l := range lines {
			all := true
			for _, w := range want {
				all = all && strings.Contains(l, w)
			}
			found = found || all
		}
		if !found {
			t.Errorf("no line with %v in\n%s", want, got)
		}
	}
}

func TestNewChecksOptions(t *testing.T) {
	for _, o := range []Options{{}, {Transport: roundTripper(nil), MaxBody: -1}, {Transport: roundTripper(nil), MaxInFlight: -1}} {
		if h, err := New(o); err == nil {
			t.Errorf("%+v accepted: %v", o, h)
		}
	}
}

// The responses API names its error events; the others do not.
func TestErrorEvent(t *testing.T) {
	e := apiError{code: "upstream_lost", message: "x"}
	for _, tt := range []struct {
		api  *shape.API
		want string
	}{
		{apiOf(chatPath), `data: {"error":{"message":"x","type":"server_error","param":null,"code":"upstream_lost"}}` + "\n\n"},
		{apiOf("/v1/responses"), "event: error\n" + `data: {"type":"error","code":"upstream_lost","message":"x","param":null,"error":{"message":"x","type":"server_error","param":null,"code":"upstream_lost"}}` + "\n\n"},
	} {
		got := string(tt.api.Event(e.words()))
		if got != tt.want {
			t.Errorf("%s: %q, want %q", tt.api.Operation, got, tt.want)
		}
		if ev := shape.ParseEvent([]byte(got)); tt.api.Classify(ev) != shape.Failure || tt.api.Committed(ev) != shape.Failure {
			t.Errorf("%s: another sidecar would not see an error in %q", tt.api.Operation, got)
		}
	}
}
