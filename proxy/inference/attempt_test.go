package inference

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Retry before the first byte, never after it. Two endpoints, a in the local region and
// so tried first, b after it; b is healthy unless the case says otherwise.
func TestRetryTable(t *testing.T) {
	good := step{status: 200, body: answerOf("gpt-v1", "from b")}
	goodStream := step{status: 200, ctype: "text/event-stream", body: streamOf("gpt-v1", "from b")}
	sse := func(cut bool, parts ...string) step {
		return step{status: 200, ctype: "text/event-stream", body: strings.Join(parts, ""), cut: cut}
	}
	role, word := chunkOf("gpt-v1", roleDelta), chunkOf("gpt-v1", `{"content":"a1 "}`)
	serverError := `data: {"error":{"message":"boom","type":"server_error"}}` + "\n\n"
	big := `{"choices":[{"text":"` + strings.Repeat("x", maxBuffered+10)

	tests := []struct {
		name     string
		a, b     step
		attempts string
		status   int
		has, not string // in the body
		failures uint64
		broken   bool // the client's connection is broken off
	}{
		{"good", step{status: 200, body: answerOf("gpt-v1", "from a")}, good, "1", 200, "from a", "", 0, false},
		{"refused connection", step{err: errCut}, good, "2", 200, "from b", "", 0, false},
		{"503", step{status: 503, body: "{}"}, good, "2", 200, "from b", "", 0, false},
		{"500", step{status: 500, body: "{}"}, good, "2", 200, "from b", "", 0, false},
		{"429", step{status: 429, body: "{}"}, good, "2", 200, "from b", "", 0, false},
		{"400 is the client's", step{status: 400, body: `{"error":{"message":"bad"}}`}, good, "1", 400, "bad", "from b", 0, false},
		{"501 is the same everywhere", step{status: 501, body: `{"error":{"message":"no"}}`}, good, "1", 501, "no", "from b", 1, false},
		{"JSON cut before it was passed on", step{status: 200, body: `{"id":`, cut: true}, good, "2", 200, "from b", `{"id":{`, 0, false},
		{"JSON cut after it began", step{status: 200, body: big, cut: true}, good, "1", 200, "xxx", "from b", 1, true},
		{"both fail: the last answer is passed on", step{status: 500, body: "{}"}, step{status: 502, body: `{"error":{"message":"b is down"}}`}, "2", 502, "b is down", "", 1, false},
		{"both busy: not a failure of the version", step{status: 429, body: "{}"}, step{status: 429, body: `{"error":{"message":"busy"}}`}, "2", 429, "busy", "", 0, false},
		{"both unreachable", step{err: errCut}, step{err: errCut}, "2", 503, "upstream_unreachable", "", 1, false},

		{"stream", sse(false, streamOf("gpt-v1", "from a")), goodStream, "1", 200, "[DONE]", "", 0, false},
		{"stream: error first", sse(false, serverError), goodStream, "2", 200, "from", "boom", 0, false},
		{"stream: error as second event", sse(false, role, serverError), goodStream, "2", 200, "from", "boom", 0, false},
		{"stream: comment, role, error", sse(false, ": hi\n\n", role, serverError), goodStream, "2", 200, "from", "boom", 0, false},
		{"stream: lost before content", sse(true, role), goodStream, "2", 200, "from", "error", 0, false},
		{"stream: lost at once", sse(true), goodStream, "2", 200, "from", "error", 0, false},
		{"stream: request at fault", sse(false, role, `data: {"error":{"message":"too long","type":"invalid_request_error"}}`+"\n\n", streamDone), goodStream, "1", 200, "too long", "[DONE]", 0, false},
		{"stream: lost after content", sse(true, role, word, word), goodStream, "1", 200, "upstream_lost", "[DONE]", 1, false},
		{"stream: lost inside an event", sse(true, role, word, `data: {"choi`), goodStream, "1", 200, "upstream_lost", `{"choi` + "\n", 1, false},
		{"stream: error after content, then DONE", sse(false, role, word, serverError, streamDone), goodStream, "1", 200, "boom", "[DONE]", 1, false},
		{"stream: slow server commits at the second comment", sse(true, ": 1\n\n", ": 2\n\n"), goodStream, "1", 200, "upstream_lost", "from", 1, false},
		{"stream: both err", sse(false, role, serverError), sse(false, `data: {"error":{"message":"b too"}}`+"\n\n", streamDone), "2", 200, "b too", "[DONE]", 1, false},
		{"stream: preamble only", sse(false, role), goodStream, "1", 200, "assistant", "", 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tr := &scripted{steps: map[string][]step{"a:1": {tt.a}, "b:1": {tt.b}}}
			m := newMesh(t, newPolicy(0, []policy.Endpoint{at("b:1", "us"), at("a:1", "eu")}, nil), Options{Transport: tr})
			resp, err := http.Post(m.front.URL+chatPath, "application/json", strings.NewReader(chatBody("u", strings.HasPrefix(tt.name, "stream"))))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if (err != nil) != tt.broken {
				t.Errorf("read error %v, broken %v", err, tt.broken)
			}
			if resp.StatusCode != tt.status || resp.Header.Get("x-outrigger-attempts") != tt.attempts {
				t.Errorf("status %d after %s attempts, want %d after %s", resp.StatusCode, resp.Header.Get("x-outrigger-attempts"), tt.status, tt.attempts)
			}
			if !strings.Contains(string(body), tt.has) || tt.not != "" && strings.Contains(string(body), tt.not) {
				t.Errorf("body %.300q, want %q and not %q", body, tt.has, tt.not)
			}
			if want := []string{"a:1", "b:1"}[:len(tr.log)]; fmt.Sprint(tr.log) != fmt.Sprint(want) || fmt.Sprint(len(tr.log)) != tt.attempts {
				t.Errorf("tried %v", tr.log)
			}
			m.front.Close() // waits for the handler, so the outcome is recorded
			d := only(t, m.handler)
			if d.Requests != 1 || d.Failures != tt.failures || fmt.Sprint(d.Attempts) != tt.attempts || d.Version != "v1" {
				t.Errorf("outcome %v, want %d failures", d, tt.failures)
			}
			if len(d.FailedUnits) != int(tt.failures) || (d.FirstFailureUnixNano != 0) != (tt.failures > 0) {
				t.Errorf("failed units %v, first failure %d", d.FailedUnits, d.FirstFailureUnixNano)
			}
		})
	}
}

// Without chunks or length the end of the connection may be the server's death; a chat
// stream without [DONE] is then lost, not finished.
func TestUnframedStreamNeedsDone(t *testing.T) {
	for _, done := range []bool{true, false} {
		tr := roundTripper(func(r *http.Request) (*http.Response, error) {
			body := chunkOf("gpt-v1", `{"content":"hi"}`)
			if done {
				body += streamDone
			}
			return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"text/event-stream"}}, Body: io.NopCloser(strings.NewReader(body)), ContentLength: -1}, nil
		})
		h := mustNew(t, Options{Transport: tr, Policy: newSource(newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil)).get})
		w := post(h, chatPath, chatBody("u", true))
		if got := strings.Contains(w.Body.String(), "upstream_lost"); got == done {
			t.Errorf("done %v: %s", done, w.Body)
		}
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// MaxAttempts bounds the attempts of one request, the budget those of all together.
func TestRetryBounds(t *testing.T) {
	eps := []policy.Endpoint{at("a:1", "eu"), at("b:1", "eu"), at("c:1", "eu"), at("d:1", "eu")}
	p := newPolicy(0, eps, nil)
	p.Models[0].Versions[0].ConsecutiveFailures = 1 << 30 // breakers stay out of it
	tr := &scripted{steps: map[string][]step{}}
	for _, e := range eps {
		tr.steps[e.Address] = []step{{err: errCut}}
	}
	h := mustNew(t, Options{Transport: tr, Policy: newSource(p).get})
	w := post(h, chatPath, chatBody("u", false))
	if w.Header().Get("x-outrigger-attempts") != "3" || len(tr.log) != 3 {
		t.Errorf("%d attempts, want MaxAttempts 3", len(tr.log))
	}
	if w.Header().Get("x-should-retry") != "true" || w.Header().Get("retry-after-ms") == "" {
		t.Errorf("header %v", w.Header())
	}
	const n = 1000
	for range n - 1 {
		w = post(h, chatPath, chatBody("u", false))
	}
	retries := len(tr.log) - n
	if limit := n*budgetPerRequest/1000 + budgetReserve/1000; retries > limit || retries < limit-2 {
		t.Errorf("%d retries in %d requests, want %d", retries, n, limit)
	}
	if w.Header().Get("x-should-retry") != "false" {
		t.Errorf("with the budget spent x-should-retry is %q", w.Header().Get("x-should-retry"))
	}
}

// Regions: the local one, then healthy ones, then the others.
func TestOrder(t *testing.T) {
	p := newPolicy(0, []policy.Endpoint{at("ap:1", "ap"), at("us:1", "us"), {Address: "eu-backup:1", Region: "eu", Weight: 1, Priority: 1}, at("eu:1", "eu")}, nil)
	tr := &scripted{steps: map[string][]step{"ap:1": {{status: 200, body: "{}"}}}}
	p.Models[0].MaxAttempts = 9
	h := mustNew(t, Options{Transport: tr, Policy: newSource(p).get})
	w := post(h, chatPath, chatBody("u", false))
	if got := strings.Join(tr.log, " "); got != "eu:1 eu-backup:1 us:1 ap:1" || w.Header().Get("x-outrigger-region") != "ap" {
		t.Errorf("tried %s, region %s", got, w.Header().Get("x-outrigger-region"))
	}

	// A consumer's order is obeyed; endpoints it invents are ignored.
	var info OrderInfo
	tr.log = nil
	h = mustNew(t, Options{Transport: tr, Policy: newSource(p).get, Order: func(e []policy.Endpoint, i OrderInfo) []policy.Endpoint {
		info = i
		return []policy.Endpoint{at("invented:1", "eu"), e[1], e[0]}
	}})
	post(h, chatPath, chatBody("u", false))
	if got := strings.Join(tr.log, " "); got != "us:1 ap:1" || info.Region != "eu" || len(info.Regions) != 3 || info.Load(1).Latency != failurePenalty || info.Load(1).InFlight != 0 || info.Load(1).Open {
		t.Errorf("tried %s, info %+v", got, info)
	}
}

// Of equals, the endpoint with less latency × load gets most requests, by weight else.
func TestPowerOfTwoChoices(t *testing.T) {
	mk := func(lat float64, weight uint32) *target {
		tg := &target{endpoint: policy.Endpoint{Region: "eu", Weight: weight}}
		if lat > 0 {
			tg.observe(secs(lat), time.Unix(1, 0))
		}
		return tg
	}
	count := func(ts ...*target) (n []int) {
		n = make([]int, len(ts))
		for seed := range uint64(2000) {
			got := defaultOrder(ts, "eu", nil, seed, time.Unix(1, 0))
			if len(got) != len(ts) {
				t.Fatal("lost a target")
			}
			for i := range ts {
				if ts[i] == got[0] {
					n[i]++
				}
			}
		}
		return n
	}
	if n := count(mk(0.1, 1), mk(0.2, 1)); n[0] != 2000 {
		t.Errorf("fast of two first in %v", n)
	}
	if n := count(mk(0.1, 1), mk(0.2, 1), mk(0.3, 1)); n[0] < 1200 || n[2] != 0 {
		t.Errorf("first of three: %v; the slowest loses every pair", n)
	}
	if n := count(mk(0.1, 98), mk(0.1, 1), mk(0.1, 1)); n[0] < 1900 {
		t.Errorf("by weight: %v", n)
	}
	if n := count(mk(0.1, 1), mk(0, 1)); n[1] != 2000 {
		t.Errorf("unmeasured first in %v", n)
	}
	busy := mk(0.1, 1)
	busy.inflight.Store(9)
	if n := count(busy, mk(0.2, 1)); n[1] != 2000 {
		t.Errorf("busy: %v", n)
	}
}

// Headers upstream and back.
func TestHeaders(t *testing.T) {
	tr := &scripted{steps: map[string][]step{"a:1": {{status: 200, body: answerOf("gpt-v1", "x"), header: http.Header{"X-Request-Id": {"r1"}, "X-Outrigger-Arm": {"forged"}, "Connection": {"X-Hop"}, "X-Hop": {"1"}}}}}}
	h := mustNew(t, Options{Transport: tr, Policy: newSource(newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil)).get})
	w := post(h, chatPath+"?x=1", chatBody("u7", false), "Authorization", "Bearer k", "Traceparent", "00-1-2-01", "X-Outrigger-Bucket", "7", "X-Outrigger-Tenant", "t",
		"Accept-Encoding", "gzip", "Connection", "X-Mine", "X-Mine", "1", "X-Custom", "c")
	bucket := w.Header().Get("x-outrigger-bucket")
	for k, want := range map[string]string{"X-Outrigger-Model": "gpt", "X-Outrigger-Version": "v1", "X-Outrigger-Arm": "stable", "X-Outrigger-Region": "eu", "X-Outrigger-Attempts": "1", "X-Outrigger-Policy": "live", "X-Request-Id": "r1", "X-Hop": ""} {
		if got := w.Header().Get(k); got != want {
			t.Errorf("answer %s: %q, want %q", k, got, want)
		}
	}
	up := tr.last.Header
	for k, want := range map[string]string{"Authorization": "Bearer k", "Traceparent": "00-1-2-01", "X-Outrigger-Bucket": bucket, "X-Outrigger-Tenant": "", "Accept-Encoding": "", "X-Mine": "", "Connection": "", "X-Custom": "c", "X-Outrigger-Hops": "1"} {
		if got := up.Get(k); got != want {
			t.Errorf("upstream %s: %q, want %q", k, got, want)
		}
	}
	if bucket == "" || bucket == "7" || tr.last.URL.String() != "http://a:1/v1/chat/completions?x=1" {
		t.Errorf("bucket %q, url %s", bucket, tr.last.URL)
	}
	if want := strings.Replace(chatBody("u7", false), `"gpt"`, `"gpt-v1"`, 1); tr.body != want {
		t.Errorf("upstream body %s, want %s", tr.body, want)
	}
}

// A client that numbers its retries is one logical request.
func TestClientRetryIsNoSample(t *testing.T) {
	tr := &scripted{steps: map[string][]step{"a:1": {{status: 500, body: "{}"}, {status: 200, body: answerOf("gpt-v1", "a b")}}}}
	h := mustNew(t, Options{Transport: tr, Policy: newSource(newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil)).get})
	post(h, chatPath, chatBody("u", false), "X-Stainless-Retry-Count", "0")
	post(h, chatPath, chatBody("u", false), "X-Stainless-Retry-Count", "1")
	d := only(t, h)
	if d.Requests != 1 || d.Failures != 1 || d.Attempts != 2 || d.TokensOut != 2 || len(d.Units) != 1 || d.Units[0].N != 1 {
		t.Errorf("outcome %v", d)
	}
}

func TestLoopIsCut(t *testing.T) {
	var h *Handler
	depth := 0
	h = mustNew(t, Options{Policy: newSource(newPolicy(0, []policy.Endpoint{at("self:1", "eu")}, nil)).get, Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
		depth++
		body, _ := io.ReadAll(r.Body)
		in := httptest.NewRequest(r.Method, r.URL.Path, strings.NewReader(strings.Replace(string(body), "gpt-v1", "gpt", 1)))
		in.Header = r.Header
		w := httptest.NewRecorder()
		h.ServeHTTP(w, in)
		return w.Result(), nil
	})})
	w := post(h, chatPath, chatBody("u", false))
	if w.Code != http.StatusLoopDetected || depth != 8 {
		t.Errorf("status %d after %d hops", w.Code, depth)
	}
}
