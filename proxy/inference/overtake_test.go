package inference

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// script of a transport: what a request's X-Do asks for.
func doAsTold(r *http.Request) (*http.Response, error) {
	answer := func(status int, body string) (*http.Response, error) {
		return &http.Response{StatusCode: status, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(body)), ContentLength: int64(len(body))}, nil
	}
	switch r.Header.Get("X-Do") {
	case "slow":
		<-time.NewTimer(2 * time.Second).C
	case "hang":
		<-r.Context().Done()
		return nil, r.Context().Err()
	case "fail":
		return answer(503, "{}")
	case "refuse":
		return nil, errors.New("connection refused")
	}
	return answer(200, answerOf("gpt-v1", "hi"))
}

// Fast failures overtake slow successes, on one endpoint whose breaker takes five failures:
//
//	0 s  ten requests begin that will be answered at 2 s
//	1 s  nine fail at once: fewer than what is under way, so the breaker stays closed
//	2 s  the ten are answered, which starts the row anew
//	     five fail with nothing under way: open at the fifth, as ever
//
// and when what is under way never answers:
//
//	0 s  eight requests begin that hang
//	     seven fail: closed. The eighth failure: open
func TestFailuresOvertakeSuccesses(t *testing.T) {
	for _, how := range []string{"fail", "refuse"} {
		synctest.Test(t, func(t *testing.T) {
			p := newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil)
			p.Models[0].MaxAttempts = 1
			p.Models[0].Versions[0].ConsecutiveFailures = 5
			h := mustNew(t, Options{Policy: newSource(p).get, Transport: roundTripper(doAsTold)})
			var ended sync.WaitGroup
			begin := func(n, want int, do string, more ...string) {
				for range n {
					ended.Go(func() {
						if w := post(h, chatPath, chatBody("u", false), append(more, "X-Do", do)...); w.Code != want {
							t.Errorf("%s: %d", do, w.Code)
						}
					})
				}
				synctest.Wait()
			}
			fail := func(n int, after string) {
				t.Helper()
				for i := range n {
					post(h, chatPath, chatBody("u", false), "X-Do", how)
					want := "closed"
					if i == n-1 {
						want = after
					}
					if got := h.LocalStats().Endpoints[0].Breaker; got != want {
						t.Fatalf("after failure %d of %d: %s, want %s", i+1, n, got, want)
					}
				}
			}
			begin(10, 200, "slow")
			time.Sleep(time.Second)
			fail(9, "closed")
			ended.Wait()
			fail(5, "open")

			time.Sleep(policy.DefaultOpenFor + time.Millisecond)
			begin(1, 200, "now")
			begin(8, 504, "hang", "X-Request-Timeout", "30")
			fail(8, "open")
			ended.Wait()
			if n := h.plan.Load().load(); n != 0 {
				t.Errorf("%d places are still taken", n)
			}
			for _, target := range h.plan.Load().targets {
				if n := target.silent.Load(); n != 0 {
					t.Errorf("%d attempts are still waited for", n)
				}
			}
		})
	}
}
