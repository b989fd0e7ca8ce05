package inference

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/internal/memnet"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// The breaker of one endpoint, end to end over an in-memory network on fake time:
//
//	0 s   eu fails: every request is retried on us and succeeds
//	      after 3 failures eu's breaker is open: one attempt, straight to us
//	      us fails too: its breaker opens; then 503 with the time to wait, no attempt
//	10 s  half open: one probe each; eu is still bad, us has recovered
//	20 s  eu recovers: its probe closes the breaker and local traffic returns
func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := memnet.New()
		var euBad, usBad atomic.Bool
		var euCalls, usCalls atomic.Int64
		backend := func(host string, bad *atomic.Bool, calls *atomic.Int64) {
			l, err := network.Listen(host, host+":80")
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				calls.Add(1)
				io.Copy(io.Discard, r.Body)
				if bad.Load() {
					w.WriteHeader(http.StatusServiceUnavailable)
					return
				}
				io.WriteString(w, answerOf("gpt-v1", "hi"))
			})}
			go srv.Serve(l)
			t.Cleanup(func() { srv.Close() })
		}
		backend("eu", &euBad, &euCalls)
		backend("us", &usBad, &usCalls)
		dial := network.Dialer("sidecar")
		to := upstream.TransportOptions{Dial: func(ctx context.Context, _, address string) (net.Conn, error) { return dial(ctx, address) }}
		tr := upstream.NewDirect(to, upstream.NewTransport(to))
		t.Cleanup(tr.CloseIdleConnections)
		p := newPolicy(0, []policy.Endpoint{at("us:80", "us"), at("eu:80", "eu")}, nil)
		p.Models[0].Versions[0].ConsecutiveFailures = 3
		p.Models[0].Versions[0].OpenFor = 10 * time.Second
		h := mustNew(t, Options{Policy: newSource(p).get, Transport: tr})

		expect := func(what string, status int, attempts, region string, eu, us int64) {
			t.Helper()
			euCalls.Store(0)
			usCalls.Store(0)
			w := post(h, chatPath, chatBody("u", false))
			if w.Code != status || w.Header().Get("x-outrigger-attempts") != attempts || w.Header().Get("x-outrigger-region") != region || euCalls.Load() != eu || usCalls.Load() != us {
				t.Fatalf("%s: status %d after %s attempts in %s (eu %d, us %d calls), want %d after %s in %s (%d, %d)", what,
					w.Code, w.Header().Get("x-outrigger-attempts"), w.Header().Get("x-outrigger-region"), euCalls.Load(), usCalls.Load(), status, attempts, region, eu, us)
			}
		}
		expect("healthy", 200, "1", "eu", 1, 0)
		euBad.Store(true)
		for range 3 {
			expect("eu failing", 200, "2", "us", 1, 1)
		}
		expect("eu open", 200, "1", "us", 0, 1)
		usBad.Store(true)
		for range 3 {
			expect("us failing too", 503, "1", "us", 0, 1)
		}
		time.Sleep(4 * time.Second)
		w := post(h, chatPath, chatBody("u", false))
		if errorCode(t, w.Body.Bytes()) != "no_healthy_endpoint" || w.Header().Get("retry-after-ms") != "6000" || w.Header().Get("x-should-retry") != "true" || w.Header().Get("x-outrigger-attempts") != "0" {
			t.Fatalf("all open: %d %v %s", w.Code, w.Header(), w.Body)
		}
		usBad.Store(false)
		time.Sleep(6*time.Second + time.Millisecond)
		expect("half open: eu's probe fails, us's succeeds", 200, "2", "us", 1, 1)
		expect("eu open again", 200, "1", "us", 0, 1)
		euBad.Store(false)
		time.Sleep(10*time.Second + time.Millisecond)
		expect("eu's probe succeeds", 200, "1", "eu", 1, 0)
		expect("closed", 200, "1", "eu", 1, 0)

		// A new policy that keeps the endpoint keeps its state; changed settings reset it.
		euBad.Store(true)
		for range 3 {
			post(h, chatPath, chatBody("u", false))
		}
		next := *p
		h.o.Policy = newSource(&next).get
		expect("after a policy push", 200, "1", "us", 0, 1)
	})
}

// The region is cut off: dials fail, the other region serves, and the policy's time
// limit ends a request whose model never answers.
func TestCutAndTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := memnet.New()
		for host, h := range map[string]http.HandlerFunc{
			"eu": func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, answerOf("gpt-v1", "eu")) },
			"us": func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body); <-r.Context().Done() },
		} {
			l, err := network.Listen(host, host+":80")
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{Handler: h}
			go srv.Serve(l)
			t.Cleanup(func() { srv.Close() })
		}
		dial := network.Dialer("sidecar")
		to := upstream.TransportOptions{Dial: func(ctx context.Context, _, address string) (net.Conn, error) { return dial(ctx, address) }}
		tr := upstream.NewDirect(to, upstream.NewTransport(to))
		t.Cleanup(tr.CloseIdleConnections)
		p := newPolicy(0, []policy.Endpoint{at("us:80", "us"), at("eu:80", "eu")}, nil)
		p.Models[0].Timeout = 30 * time.Second
		h := mustNew(t, Options{Policy: newSource(p).get, Transport: tr})
		if w := post(h, chatPath, chatBody("u", false)); w.Code != 200 {
			t.Fatalf("whole: %d", w.Code)
		}
		network.Cut("sidecar", "eu")
		begin := time.Now()
		w := post(h, chatPath, chatBody("u", false))
		if w.Code != http.StatusGatewayTimeout || errorCode(t, w.Body.Bytes()) != "timeout" || time.Since(begin) != 30*time.Second || w.Header().Get("x-outrigger-attempts") != "2" {
			t.Errorf("%d after %v: %s", w.Code, time.Since(begin), w.Body)
		}
		network.Heal("sidecar", "eu")
		if w := post(h, chatPath, chatBody("u", false)); w.Code != 200 || !strings.Contains(w.Body.String(), "eu") {
			t.Errorf("healed: %d %s", w.Code, w.Body)
		}
		synctest.Wait()
	})
}
