package inference

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// shadowWorld is a handler in front of v1, which serves, and v3, which gets copies of the
// last 2 000 buckets. It lives in a bubble.
type shadowWorld struct {
	h  *Handler
	mu sync.Mutex
	// got are the requests of each address: bodies, and the field that says it is a copy.
	got map[string][]string
	// hang keeps v3 from answering until it is closed; nil = it answers at once.
	hang chan struct{}
	code int // of v3's answers
	stop func()
}

func newShadowWorld(t *testing.T, limit int) *shadowWorld {
	p := newPolicy(100, eps("v1:80"), eps("v2:80"))
	m := &p.Models[0]
	m.Versions = append(m.Versions, policy.Version{Name: "v3", Upstream: "gpt-v3", Endpoints: eps("v3:80")})
	m.Shadows = []policy.Shadow{{Version: "v3", Share: 2000}}
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	w := &shadowWorld{got: map[string][]string{}, code: 200}
	w.h = mustNew(t, Options{Policy: newSource(p).get, Transport: w, Shadows: limit})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.h.RunShadows(ctx) }()
	w.stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	return w
}

// RoundTrip implements http.RoundTripper.
func (w *shadowWorld) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.got[r.URL.Host] = append(w.got[r.URL.Host], r.Header.Get(HeaderShadow)+string(body))
	hang, code := w.hang, 200
	w.mu.Unlock()
	if hang != nil && r.URL.Host == "v3:80" {
		select {
		case <-hang:
		case <-r.Context().Done():
			return nil, r.Context().Err()
		}
	}
	if r.URL.Host == "v3:80" {
		w.mu.Lock()
		code = w.code
		w.mu.Unlock()
	}
	return &http.Response{StatusCode: code, Header: http.Header{"Content-Type": {"application/json"}}, ContentLength: -1, Request: r,
		Body: io.NopCloser(strings.NewReader(answerOf(r.URL.Host, "one two")))}, nil
}

func (w *shadowWorld) requests(address string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.got[address])
}

// ask makes one call and wants version v1's answer at once.
func (w *shadowWorld) ask(t *testing.T, body string, header ...string) {
	t.Helper()
	began := time.Now()
	a := post(w.h, chatPath, body, header...)
	if took := time.Since(began); a.Code != 200 || a.Header().Get("X-Outrigger-Version") != "v1" || took != 0 {
		t.Fatalf("%d %v after %v: %s", a.Code, a.Header(), took, a.Body)
	}
}

func cellsByArm(ds []*pb.OutcomeDelta) map[string]*pb.OutcomeDelta {
	out := map[string]*pb.OutcomeDelta{}
	for _, d := range ds {
		out[d.GetVersion()+" "+d.GetArm()] = d
	}
	return out
}

func TestShadowGetsCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newShadowWorld(t, 4)
		defer w.stop()
		in, out := unitIn("salt-1", 8000, experiments.Buckets), unitIn("salt-1", 100, 8000)
		w.ask(t, chatBody(in, false))
		w.ask(t, chatBody(out, false))
		w.ask(t, chatBody(in, false), "X-Outrigger-Shadow", "off")
		w.ask(t, strings.Replace(chatBody(in, false), "one", strings.Repeat("x", MaxShadowBody), 1))
		w.ask(t, `{"model":"gpt","messages":[]}`) // nobody's: no unit, no bucket
		synctest.Wait()
		if got := w.got["v3:80"]; len(got) != 1 || got[0] != "copy"+strings.Replace(chatBody(in, false), `"gpt"`, `"gpt-v3"`, 1) {
			t.Errorf("the shadow got %.300q", got)
		}
		for _, body := range w.got["v1:80"] {
			if !strings.HasPrefix(body, "{") {
				t.Errorf("the version that serves got %.50q", body)
			}
		}
		if s := w.h.LocalStats().Shadows; *s != (ShadowStats{Sent: 1, Skipped: 2}) {
			t.Errorf("%+v", s)
		}
		cells := cellsByArm(w.h.Recorder().Drain(time.Now()))
		if d := cells["v3 "+policy.ArmShadow]; d.GetRequests() != 1 || d.GetFailures() != 0 || d.GetTokensOut() != 2 || len(d.GetUnits()) != 0 {
			t.Errorf("reported of the shadow: %v", d)
		}
		if d := cells["v1 stable"]; d.GetRequests() != 4 || d.GetAttempts() != 4 {
			t.Errorf("reported of the version that serves: %v", d)
		}
		if w.h.shadows.bytes.Load() != 0 {
			t.Errorf("%d bytes are still counted", w.h.shadows.bytes.Load())
		}
	})
}

// TestShadowCannotBeNoticed: a shadow that hangs, and one that fails, cost callers nothing;
// what there is no room for is dropped and counted.
func TestShadowCannotBeNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newShadowWorld(t, 4)
		in := unitIn("salt-1", 8000, experiments.Buckets)
		w.hang = make(chan struct{})
		const calls = 4 + 1 + shadowQueue + 10
		for range calls {
			w.ask(t, chatBody(in, false))
			synctest.Wait()
		}
		s := w.h.LocalStats().Shadows
		if s.InFlight != 4 || s.Sent != 0 || s.Dropped == 0 || int(s.Dropped)+s.Waiting+4 != calls || s.Waiting > shadowQueue {
			t.Errorf("%d calls: %+v", calls, s)
		}
		if n := w.requests("v3:80"); n != 4 {
			t.Errorf("the shadow has %d requests at once", n)
		}
		// It answers, and badly: its own failures, nobody else's. Its endpoint's breaker opens.
		w.mu.Lock()
		w.code = 500
		w.mu.Unlock()
		close(w.hang)
		synctest.Wait()
		w.ask(t, chatBody(in, false))
		synctest.Wait()
		cells := cellsByArm(w.h.Recorder().Drain(time.Now()))
		if d := cells["v3 "+policy.ArmShadow]; d.GetRequests() == 0 || d.GetFailures() != d.GetRequests() {
			t.Errorf("reported of the shadow: %v", d)
		}
		if d := cells["v1 stable"]; d.GetRequests() != calls+1 || d.GetFailures() != 0 {
			t.Errorf("reported of the version that serves: %v", d)
		}
		if w.h.shadows.bytes.Load() != 0 || w.h.LocalStats().Shadows.InFlight != 0 {
			t.Errorf("%d bytes and %d copies are still counted", w.h.shadows.bytes.Load(), w.h.LocalStats().Shadows.InFlight)
		}
		w.stop()
		// Without anybody to send them, copies wait, and then there is no room.
		for range shadowQueue + 5 {
			w.ask(t, chatBody(in, false))
		}
		if s := w.h.LocalStats().Shadows; s.Waiting != shadowQueue {
			t.Errorf("%+v", s)
		}
	})
}

// TestShadowsEndWithRun: copies under way end when RunShadows is to.
func TestShadowsEndWithRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newShadowWorld(t, 2)
		w.hang = make(chan struct{})
		w.ask(t, chatBody(unitIn("salt-1", 8000, experiments.Buckets), false))
		synctest.Wait()
		w.stop()
		if d := cellsByArm(w.h.Recorder().Drain(time.Now()))["v3 "+policy.ArmShadow]; d.GetCancelled() != 1 || d.GetFailures() != 0 {
			t.Errorf("reported of a copy that was cut: %v", d)
		}
	})
}

// TestShadowOnLoop: calls that event loops carry are handed over when there is a copy to
// make, and only then.
func TestShadowOnLoop(t *testing.T) {
	var mu sync.Mutex
	copies := make(chan string, 8)
	served := 0
	p := newPolicy(0, eps(serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		served++
		mu.Unlock()
		(&modelServer{name: "gpt-v1"}).ServeHTTP(w, r)
	}))), eps("127.0.0.1:1"))
	m := &p.Models[0]
	m.Versions = append(m.Versions, policy.Version{Name: "v3", Upstream: "gpt-v3", Endpoints: eps(serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		copies <- fmt.Sprint(string(body), err)
		fmt.Fprint(w, "{}")
	})))})
	m.Shadows = []policy.Shadow{{Version: "v3", Share: 2000}}
	w := newMesh(t, p, Options{Shadows: 2})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.handler.RunShadows(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	in := unitIn("salt-1", 8000, experiments.Buckets)
	for _, user := range []string{unitIn("salt-1", 0, 8000), in, unitIn("salt-1", 0, 8000)} {
		resp, err := http.Post(w.front.URL+chatPath, "application/json", strings.NewReader(chatBody(user, false)))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != 200 || !strings.Contains(string(body), "gpt-v1") {
			t.Fatalf("%d %s %v", resp.StatusCode, body, err)
		}
		resp.Body.Close()
	}
	select {
	case got := <-copies:
		if want := strings.Replace(chatBody(in, false), `"gpt"`, `"gpt-v3"`, 1) + "<nil>"; got != want {
			t.Errorf("the shadow got %s, want %s", got, want)
		}
	case <-time.After(time.Minute):
		t.Fatal("the shadow got nothing")
	}
	mu.Lock()
	defer mu.Unlock()
	if served != 3 || len(copies) != 0 {
		t.Errorf("%d calls were served, %d more copies made", served, len(copies))
	}
}
