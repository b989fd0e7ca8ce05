package inference

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/inference/balance"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// slow answers after its address's time, unless the request ends first.
type slow struct {
	mu    sync.Mutex
	after map[string]time.Duration
	code  map[string]int // 0 = 200
	log   []string
	cut   []string // requests that were cancelled
	seen  http.Header
}

func (s *slow) RoundTrip(r *http.Request) (*http.Response, error) {
	s.mu.Lock()
	host := r.URL.Host
	s.log, s.seen = append(s.log, host), r.Header
	d, code := s.after[host], s.code[host]
	s.mu.Unlock()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-r.Context().Done():
		s.mu.Lock()
		s.cut = append(s.cut, host)
		s.mu.Unlock()
		return nil, r.Context().Err()
	}
	if code == 0 {
		code = 200
	}
	return &http.Response{StatusCode: code, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(fmt.Sprintf("{%q:1}", host))), ContentLength: -1}, nil
}

// inOrder is policy with endpoints that are tried in the order given.
func inOrder(addresses ...string) *policy.Policy {
	e := eps(addresses...)
	for i := range e {
		e[i].Priority = uint32(i)
	}
	return newPolicy(0, e, nil)
}

const embedPath, embedBody = "/v1/embeddings", `{"model":"gpt","input":"x"}`

func TestTimeLimits(t *testing.T) {
	tests := []struct {
		name   string
		header []string
		try    time.Duration
		policy time.Duration
		a, b   time.Duration // what the endpoints take
		code   int
		took   time.Duration
		asked  string
	}{
		{"attempt", nil, time.Second, time.Minute, time.Hour, 0, 200, time.Second, "a:1 b:1"},
		{"both attempts", nil, time.Second, time.Minute, time.Hour, time.Hour, 503, 2 * time.Second, "a:1 b:1"},
		{"policy", nil, 0, 3 * time.Second, time.Hour, 0, 504, 3 * time.Second, "a:1"},
		{"the caller's, in seconds", []string{"x-request-timeout", "0.5"}, 0, time.Minute, time.Hour, 0, 504, 500 * time.Millisecond, "a:1"},
		{"the caller's, with a unit", []string{"x-request-timeout", "20ms"}, 0, time.Minute, time.Hour, 0, 504, 20 * time.Millisecond, "a:1"},
		{"gRPC's", []string{"grpc-timeout", "2S"}, 0, time.Minute, time.Hour, 0, 504, 2 * time.Second, "a:1"},
		{"a longer one than policy's", []string{"x-request-timeout", "99999"}, 0, time.Second, time.Hour, 0, 504, time.Second, "a:1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rt := &slow{after: map[string]time.Duration{"a:1": tt.a, "b:1": tt.b}}
				p := inOrder("a:1", "b:1")
				p.Models[0].Timeout, p.Models[0].MaxAttempts = tt.policy, 2
				h := mustNew(t, Options{Policy: newSource(p).get, Transport: rt, TryTimeout: tt.try})
				began := time.Now()
				w := post(h, embedPath, embedBody, tt.header...)
				if w.Code != tt.code || time.Since(began) != tt.took || strings.Join(rt.log, " ") != tt.asked {
					t.Errorf("%d after %v, asked %v: %s", w.Code, time.Since(began), rt.log, w.Body)
				}
			})
		})
	}
}

func TestDeadlinePropagation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rt := &slow{after: map[string]time.Duration{"a:1": 600 * time.Millisecond}, code: map[string]int{"a:1": 503}}
		p := inOrder("a:1", "b:1")
		p.Models[0].MaxAttempts = 2
		h := mustNew(t, Options{Policy: newSource(p).get, Transport: rt})
		post(h, embedPath, embedBody, "x-request-timeout", "2", "grpc-timeout", "3S")
		if got, grpc := rt.seen.Get("x-request-timeout"), rt.seen.Get("grpc-timeout"); got != "1.400" || grpc != "1400m" {
			t.Errorf("after 0.6 s of 2 s the second attempt was told %q and %q", got, grpc)
		}
		post(h, embedPath, embedBody)
		if got := rt.seen["X-Request-Timeout"]; got != nil {
			t.Errorf("a limit nobody gave was passed on: %v", got)
		}
	})
	h := mustNew(t, Options{Policy: newSource(inOrder("a:1")).get, Transport: &slow{}})
	for _, bad := range []string{"0", "-1", "x", "NaN", "Inf", "-5s", "1e300"} {
		if w := post(h, embedPath, embedBody, "x-request-timeout", bad); w.Code != 400 || !strings.Contains(w.Body.String(), "X-Request-Timeout") {
			t.Errorf("%s: %d %s", bad, w.Code, w.Body)
		}
	}
	for _, bad := range []string{"S", "1", "1x", "123456789S", "-1S", "0m"} {
		if w := post(h, embedPath, embedBody, "grpc-timeout", bad); w.Code != 400 {
			t.Errorf("grpc-timeout %s: %d", bad, w.Code)
		}
	}
}

func TestHedging(t *testing.T) {
	const after = 100 * time.Millisecond
	tests := []struct {
		name, path, body string
		a, b             time.Duration
		codeA, codeB     int
		want             string // whose answer
		took             time.Duration
		asked, cut       string
	}{
		{"the first is fast", embedPath, embedBody, 50 * time.Millisecond, 0, 0, 0, "a:1", 50 * time.Millisecond, "a:1", ""},
		{"the second wins", embedPath, embedBody, time.Hour, 10 * time.Millisecond, 0, 0, "b:1", 110 * time.Millisecond, "a:1 b:1", "a:1"},
		{"the first wins late", embedPath, embedBody, 150 * time.Millisecond, time.Hour, 0, 0, "a:1", 150 * time.Millisecond, "a:1 b:1", "b:1"},
		{"the second fails", embedPath, embedBody, 150 * time.Millisecond, 0, 0, 500, "a:1", 150 * time.Millisecond, "a:1 b:1", ""},
		{"the first fails late", embedPath, embedBody, 150 * time.Millisecond, 200 * time.Millisecond, 500, 0, "b:1", 300 * time.Millisecond, "a:1 b:1", ""},
		{"generation never", chatPath, `{"model":"gpt"}`, time.Second, 0, 0, 0, "a:1", time.Second, "a:1", ""},
		{"a sequence never", "/v2/models/gpt/infer", `{"parameters":{"sequence_id":7}}`, time.Second, time.Second, 0, 0, "", time.Second, "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rt := &slow{after: map[string]time.Duration{"a:1": tt.a, "b:1": tt.b}, code: map[string]int{"a:1": tt.codeA, "b:1": tt.codeB}}
				h := mustNew(t, Options{Policy: newSource(inOrder("a:1", "b:1")).get, Transport: rt, HedgeAfter: after})
				began := time.Now()
				w := post(h, tt.path, tt.body)
				if w.Code != 200 || time.Since(began) != tt.took || tt.want != "" && w.Body.String() != fmt.Sprintf("{%q:1}", tt.want) {
					t.Errorf("%d %s after %v", w.Code, w.Body, time.Since(began))
				}
				if tt.asked != "" && strings.Join(rt.log, " ") != tt.asked || strings.Join(rt.cut, " ") != tt.cut || tt.asked == "" && len(rt.log) != 1 {
					t.Errorf("asked %v, cut off %v", rt.log, rt.cut)
				}
				for _, e := range h.LocalStats().Endpoints {
					if e.InFlight != 0 {
						t.Errorf("%s still has %d in flight", e.Address, e.InFlight)
					}
				}
				if d := only(t, h); d.Requests != 1 || d.Failures != 0 || d.Attempts != uint64(len(rt.log)) {
					t.Errorf("recorded %v", d)
				}
			})
		})
	}
}

// Hedges are retries: the budget bounds them too.
func TestHedgesHaveABudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rt := &slow{after: map[string]time.Duration{"a:1": time.Second, "b:1": time.Second}}
		h := mustNew(t, Options{Policy: newSource(inOrder("a:1", "b:1")).get, Transport: rt, HedgeAfter: time.Millisecond})
		for range 100 {
			post(h, embedPath, embedBody)
		}
		if n := len(rt.log) - 100; n < 20 || n > 31 {
			t.Errorf("%d hedges for 100 requests, the budget is 10 + 20 %%", n)
		}
	})
}

// An endpoint that fails a third of its requests never trips the breaker, and is found
// out by comparison with its peers.
func TestOutlierIsEjected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		rt := roundTripper(func(r *http.Request) (*http.Response, error) {
			code := 200
			if r.URL.Host == "c:1" {
				if n++; n%3 == 0 {
					code = 500
				}
			}
			return &http.Response{StatusCode: code, Header: http.Header{"X-From": {r.URL.Host}}, Body: io.NopCloser(strings.NewReader("{}")), ContentLength: 2}, nil
		})
		p := newPolicy(0, eps("a:1", "b:1", "c:1"), nil)
		p.Models[0].MaxAttempts = 1
		// Every endpoint in turn, so that each is judged; ejected ones are known by Open.
		turn := 0
		var open map[string]bool
		h := mustNew(t, Options{Policy: newSource(p).get, Transport: rt, Order: func(e []policy.Endpoint, i OrderInfo) []policy.Endpoint {
			turn++
			open = map[string]bool{}
			for k := range e {
				open[e[k].Address] = i.Load(k).Open
			}
			return []policy.Endpoint{e[turn%3]}
		}})
		ask := func(times int) {
			for range times {
				post(h, embedPath, embedBody)
			}
		}
		ask(200)
		if open["c:1"] {
			t.Error("ejected within the first window")
		}
		time.Sleep(balance.OutlierInterval)
		ask(1)
		if !open["c:1"] || open["a:1"] || open["b:1"] {
			t.Errorf("ejected: %v", open)
		}
		for _, e := range h.LocalStats().Endpoints {
			if e.Breaker != "closed" {
				t.Errorf("breaker of %s is %s", e.Address, e.Breaker)
			}
			want := int64(0)
			if e.Address == "c:1" {
				want = balance.OutlierEject.Milliseconds()
			}
			if e.EjectedMS != want {
				t.Errorf("%s is ejected for %d ms, want %d", e.Address, e.EjectedMS, want)
			}
		}
		time.Sleep(balance.OutlierEject)
		ask(1)
		if open["c:1"] {
			t.Error("still ejected after its time")
		}
	})
}

// Beyond what the version was seen to take, requests are refused at once in the
// protocol's words; a model that says it is overloaded is given less.
func TestAdaptiveConcurrency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rt := &slow{after: map[string]time.Duration{"a:1": time.Second}}
		h := mustNew(t, Options{Policy: newSource(inOrder("a:1")).get, Transport: rt, Adaptive: true})
		load := func(n int) (served, refused int) {
			answers := make(chan *httptest.ResponseRecorder, n)
			for range n {
				go func() { answers <- post(h, "/v1/messages", `{"model":"gpt"}`) }()
			}
			for range n {
				switch w := <-answers; {
				case w.Header().Get("x-outrigger-attempts") != "0": // also the model's own 429
					served++
				case w.Code == 429 && strings.Contains(w.Body.String(), `"rate_limit_error"`) && w.Header().Get("retry-after") == "1":
					refused++
				default:
					t.Fatalf("%d %v %s", w.Code, w.Header(), w.Body)
				}
			}
			return served, refused
		}
		if served, refused := load(50); served != balance.InitialLimit || refused != 50-balance.InitialLimit {
			t.Errorf("first: served %d, refused %d", served, refused)
		}
		rt.code = map[string]int{"a:1": 429}
		for range 10 {
			load(3)
		}
		rt.code = nil
		if served, _ := load(50); served > balance.InitialLimit/2 {
			t.Errorf("after overload %d were let through", served)
		}
	})
}

// One model cannot take the whole sidecar.
func TestBulkhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rt := &slow{after: map[string]time.Duration{"a:1": time.Hour}}
		p := inOrder("a:1")
		second := inOrder("b:1").Models[0]
		second.Name = "other"
		p.Models = append(p.Models, second)
		h := mustNew(t, Options{Policy: newSource(p).get, Transport: rt, MaxInFlight: 8})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 6 {
			wg.Go(func() {
				r := httptest.NewRequest("POST", embedPath, strings.NewReader(embedBody)).WithContext(ctx)
				h.ServeHTTP(httptest.NewRecorder(), r)
			})
		}
		synctest.Wait()
		if w := post(h, embedPath, embedBody); w.Code != 503 || errorCode(t, w.Body.Bytes()) != "overloaded" {
			t.Errorf("the seventh of 8: %d %s", w.Code, w.Body)
		}
		if w := post(h, embedPath, strings.Replace(embedBody, "gpt", "other", 1)); w.Code != 200 {
			t.Errorf("the other model: %d %s", w.Code, w.Body)
		}
		cancel()
		wg.Wait()
	})
}
