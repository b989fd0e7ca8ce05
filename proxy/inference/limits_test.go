package inference

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/upstream"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// held is a transport whose answers wait to be let go, in the order of their requests.
type held struct {
	mu      sync.Mutex
	waiting []chan int // status
}

func (s *held) RoundTrip(r *http.Request) (*http.Response, error) {
	answer := make(chan int, 1)
	s.mu.Lock()
	s.waiting = append(s.waiting, answer)
	s.mu.Unlock()
	select {
	case status := <-answer:
		return &http.Response{StatusCode: status, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader("{}")), ContentLength: 2}, nil
	case <-r.Context().Done():
		return nil, context.Cause(r.Context())
	}
}

// under counts the requests that were sent and not answered.
func (s *held) under() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.waiting)
}

func (s *held) answer(status int) {
	s.mu.Lock()
	next := s.waiting[0]
	s.waiting = s.waiting[1:]
	s.mu.Unlock()
	next <- status
	synctest.Wait()
}

// One connection, one request that may wait for it: the first request is sent, the second
// waits, the third is told when to come back. The second goes when the first is done.
func TestConnectionLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPolicy(0, []policy.Endpoint{at("a:1", "eu"), at("b:1", "eu")}, nil)
		v := &p.Models[0].Versions[0]
		v.MaxRequests, v.MaxConnections, v.MaxPending = 3, 1, 1
		tr := &held{}
		h := mustNew(t, Options{Policy: newSource(p).get, Transport: tr})
		ask := func(path, body string, header ...string) chan *httptest.ResponseRecorder {
			out := make(chan *httptest.ResponseRecorder, 1)
			go func() { out <- post(h, path, body, header...) }()
			synctest.Wait()
			return out
		}
		first := ask(chatPath, chatBody("u", false))
		second := ask(chatPath, chatBody("u", false))
		if tr.under() != 1 {
			t.Fatalf("%d requests were sent over one connection", tr.under())
		}
		for path, want := range map[string]string{chatPath: `"code":"overloaded"`, "/v2/models/gpt/infer": `{"error":"`} {
			body := chatBody("u", false)
			if path == "/v2/models/gpt/infer" {
				body = `{"inputs":[]}`
			}
			w := <-ask(path, body, "X-User-Id", "u")
			if w.Code != 503 || w.Header().Get("retry-after-ms") != "500" || !strings.Contains(w.Body.String(), want) || !strings.Contains(w.Body.String(), "connections in use") {
				t.Errorf("%s beyond the limit: %d %v %s", path, w.Code, w.Header(), w.Body)
			}
		}
		tr.answer(200)
		if w := <-first; w.Code != 200 {
			t.Errorf("the first: %d %s", w.Code, w.Body)
		}
		if tr.under() != 1 {
			t.Fatalf("the second was not sent when the first was done")
		}
		tr.answer(200)
		if w := <-second; w.Code != 200 {
			t.Errorf("the second: %d %s", w.Code, w.Body)
		}

		// Who waits does so as long as the request may take, and leaves with its client.
		third := ask(chatPath, chatBody("u", false))
		fourth := ask(chatPath, chatBody("u", false), "X-Request-Timeout", "2")
		time.Sleep(2 * time.Second)
		if w := <-fourth; w.Code != 504 || !strings.Contains(w.Body.String(), "no connection") {
			t.Errorf("waited in vain: %d %s", w.Code, w.Body)
		}
		gone, leave := context.WithCancel(t.Context())
		left := make(chan struct{})
		go func() {
			defer close(left)
			r := httptest.NewRequestWithContext(gone, "POST", chatPath, strings.NewReader(chatBody("u", false)))
			h.ServeHTTP(httptest.NewRecorder(), r)
		}()
		synctest.Wait()
		leave()
		<-left
		tr.answer(200)
		<-third
		if n := h.plan.Load().load(); n != 0 {
			t.Errorf("%d places are still taken", n)
		}
	})
}

// A loop keeps the limit, too: it does not begin what has no connection.
func TestConnectionLimitOnLoop(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("event loops exist on Linux")
	}
	a := newScript(t, says("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"))
	p := newPolicy(0, []policy.Endpoint{at(a.address(), "eu")}, nil)
	v := &p.Models[0].Versions[0]
	v.MaxConnections, v.MaxPending = 1, 1
	d := upstream.NewDirect(upstream.TransportOptions{}, upstream.NewTransport(upstream.TransportOptions{}))
	defer d.CloseIdleConnections()
	h := mustNew(t, Options{Transport: d, Policy: newSource(p).get})
	address, s, _ := serveOnLoop(t, h, d)
	chat := chatRequestOf(chatPath, chatBody("user-1", false))
	for range 2 {
		if got := talk(t, address, 0, chat); !strings.HasPrefix(got, "200 ") {
			t.Fatal(got)
		}
	}
	if s.Counts().Relayed == 0 {
		t.Fatal("the loop carries nothing, so this says nothing about it")
	}
	places := &h.plan.Load().gates[gateKey{"gpt", "v1"}].conns
	if !places.try(1) {
		t.Fatal("a place is still taken")
	}
	ctx, cancel := context.WithCancel(t.Context())
	waited := make(chan error, 1)
	go func() { waited <- places.enter(ctx, limits{connections: 1, pending: 1}) }()
	for n := 0; n == 0; runtime.Gosched() {
		places.mu.Lock()
		n = len(places.waiting)
		places.mu.Unlock()
	}
	if got := talk(t, address, 0, chat); !strings.HasPrefix(got, "503 ") || !strings.Contains(got, "overloaded") || !strings.Contains(got, "Retry-After") {
		t.Errorf("without a connection: %s", got)
	}
	cancel()
	<-waited
	places.leave()
	if got := talk(t, address, 0, chat); !strings.HasPrefix(got, "200 ") {
		t.Error(got)
	}
}

// Two requests fail on their first endpoint at the same time; one of them may be tried
// again.
func TestRetryLimit(t *testing.T) {
	for _, most := range []uint32{0, 1} {
		synctest.Test(t, func(t *testing.T) {
			p := newPolicy(0, []policy.Endpoint{at("a:1", "eu"), at("b:1", "eu")}, nil)
			p.Models[0].Versions[0].MaxRetries = most
			tr := &held{}
			h := mustNew(t, Options{Policy: newSource(p).get, Transport: tr})
			answers := make(chan int, 2)
			for range 2 {
				go func() { answers <- post(h, chatPath, chatBody("u", false)).Code }()
			}
			synctest.Wait()
			tr.answer(500)
			tr.answer(500)
			want := 2
			if most == 1 {
				want = 1
				if code := <-answers; code != 500 {
					t.Errorf("the one without a retry: %d", code)
				}
			}
			if n := tr.under(); n != want {
				t.Fatalf("max_retries %d: %d retries, want %d", most, n, want)
			}
			for range want {
				tr.answer(200)
				if code := <-answers; code != 200 {
					t.Errorf("after a retry: %d", code)
				}
			}
			if n := h.plan.Load().load(); n != 0 {
				t.Errorf("%d places are still taken", n)
			}
		})
	}
}

// Places in all the orders that matter.
func TestPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p places
		var mu sync.Mutex
		var got []string
		enter := func(name string, l limits) context.CancelFunc {
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				err := p.enter(ctx, l)
				switch {
				case errors.Is(err, errPending):
					name += " refused"
				case err != nil:
					name += " left"
				}
				mu.Lock()
				got = append(got, name)
				mu.Unlock()
			}()
			synctest.Wait()
			return cancel
		}
		step := func(what string, do func(), want string) {
			t.Helper()
			got = nil
			do()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			slices.Sort(got) // goroutines woken at once may write in any order
			if g := strings.Join(got, ", "); g != want || p.used > 4 {
				t.Fatalf("%s: %q, want %q (%d used)", what, g, want, p.used)
			}
		}
		two := limits{connections: 2, pending: 3}
		var leaveD context.CancelFunc
		step("two places", func() { enter("a", two); enter("b", two) }, "a, b")
		step("none is left", func() { enter("c", two); leaveD = enter("d", two); enter("e", two) }, "")
		step("nor room to wait", func() { enter("f", two) }, "f refused")
		step("nobody overtakes", func() {
			if p.try(2) {
				t.Error("took a place that there is none of")
			}
		}, "")
		step("who has waited longest", func() { p.leave() }, "c")
		step("gives up", func() { leaveD() }, "d left")
		step("fewer places: nobody is let in before enough have left", func() { enter("g", limits{connections: 1, pending: 3}); p.leave() }, "")
		step("now", func() { p.leave() }, "e")
		step("more places: who waits gets one, too", func() { enter("h", limits{connections: 4, pending: 3}) }, "g, h")
		step("all leave", func() { p.leave(); p.leave(); p.leave() }, "")
		if p.used != 0 || len(p.waiting) != 0 {
			t.Errorf("left over: %d used, %d waiting", p.used, len(p.waiting))
		}
	})
	if l := limitOf(&policy.Version{}); fmt.Sprint(l) != "{1024 1024 0}" {
		t.Errorf("defaults %v", l)
	}
	if l := limitOf(&policy.Version{MaxRequests: 3, MaxPending: 2}); fmt.Sprint(l) != "{3 2 0}" {
		t.Errorf("following max_requests: %v", l)
	}
}
