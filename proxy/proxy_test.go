package proxy_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/proxy"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

func TestNewRefusesIncompleteOptions(t *testing.T) {
	if _, err := proxy.New(proxy.Options{}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("got %v", err)
	}
}

// Everything an application speaks, on one port: variables over gRPC and REST, model
// calls, and a clear refusal of the rest.
func TestOneListener(t *testing.T) {
	inWorld(t, nil, func(t *testing.T, w *world) {
		put := w.do("PUT", "/v1/variables/s/x", `{"type":"float","value":0.5}`)
		if put.code != http.StatusCreated || put.head.Get(outrigger.HeaderTier) != "origin" || put.head.Get(outrigger.HeaderVersion) != "0" {
			t.Fatalf("put: %+v", put)
		}
		var head metadata.MD
		g, err := w.bridge.GetVariable(t.Context(), &snakepit.GetVariableRequest{SessionId: "s", VariableIdentifier: "x"}, grpc.Header(&head))
		if err != nil || string(g.Variable.Value.Value) != "0.5" || len(head.Get(outrigger.HeaderTier)) != 1 {
			t.Errorf("bridge: %v %v", g, err)
		}
		_, err = w.bridge.SetVariable(t.Context(), &snakepit.SetVariableRequest{SessionId: "s", VariableIdentifier: "x", Value: &anypb.Any{Value: []byte("0.75")}})
		must(t, err)
		for range 2 {
			time.Sleep(200 * time.Millisecond)
			get := w.do("GET", "/v1/variables/s/x", "")
			if get.code != 200 || !strings.Contains(get.body, `"value":0.75`) || get.head.Get("etag") != `"1"` || get.head.Get(outrigger.HeaderVersion) != "1" || get.head.Get(outrigger.HeaderFeed) != "live" || get.head.Get(outrigger.HeaderAge) == "" || get.head.Get(outrigger.HeaderDot) == "" {
				t.Errorf("get: %+v", get)
			}
			if again := w.do("GET", "/v1/variables/s/x", ""); again.head.Get(outrigger.HeaderTier) != "process" {
				t.Errorf("a repeated read came from %s", again.head.Get(outrigger.HeaderTier))
			}
		}
		if cas := w.do("PUT", "/v1/variables/s/x", `{"value":1}`, "if-match", `"0"`); cas.code != http.StatusPreconditionFailed || !strings.Contains(cas.body, `"current_version":1`) {
			t.Errorf("stale put: %+v", cas)
		}
		if none := w.do("GET", "/v1/variables/s/none", ""); none.code != 404 || none.head.Get(outrigger.HeaderTier) == "" || !strings.Contains(none.body, "Variable not found: none") {
			t.Errorf("missing: %+v", none)
		}
		if l := w.do("GET", "/v1/variables/s", ""); l.code != 200 || !strings.Contains(l.body, `"name":"x"`) {
			t.Errorf("list: %+v", l)
		}
		if l := w.do("GET", "/v1/sessions", ""); l.code != 200 || !strings.Contains(l.body, `"id":"s"`) {
			t.Errorf("sessions: %+v", l)
		}

		for _, arm := range []string{"stable", "candidate"} {
			version := map[string]string{"stable": "v1", "candidate": "v2"}[arm]
			for _, stream := range []bool{false, true} {
				r := w.chat(userOf(arm), stream)
				if r.code != 200 || r.head.Get(outrigger.HeaderArm) != arm || r.head.Get(outrigger.HeaderVersion) != version || r.head.Get(outrigger.HeaderPolicy) != "live" || !strings.Contains(r.body, "chat-"+version) || strings.Contains(r.body, "[DONE]") != stream {
					t.Errorf("%s, stream %v: %+v", arm, stream, r)
				}
			}
		}
		if m := w.do("GET", "/v1/models", ""); m.code != 200 || !strings.Contains(m.body, `"id":"chat"`) {
			t.Errorf("models: %+v", m)
		}

		other := w.do("GET", "/somewhere?x=1", "")
		if other.code != 404 || !strings.Contains(other.body, "GET /somewhere not found: the sidecar serves variables and model calls; set --upstream-http") {
			t.Errorf("elsewhere: %+v", other)
		}
		if err := w.dial(address).Invoke(t.Context(), "/other.Service/Call", &snakepit.PingRequest{}, &snakepit.PingResponse{}); gstatus.Code(err) != codes.Unavailable {
			t.Errorf("an unknown gRPC call: %v", err)
		}
		// Neither HTTP nor HTTP/2: refused without an upstream.
		c := w.raw()
		defer c.Close()
		fmt.Fprint(c, "\x16\x03\x01\x00\x05hello")
		if b, err := io.ReadAll(c); err == nil && len(b) > 0 {
			t.Errorf("TLS got an answer: %q", b)
		}
	})
}

func (w *world) raw() net.Conn {
	w.t.Helper()
	c, err := w.net.Dialer("pod")(context.Background(), address)
	must(w.t, err)
	return c
}

// Before any policy, and with the authority unreachable, the listener answers.
func TestAnswersBeforeEverything(t *testing.T) {
	inWorld(t, func(w *world, o *proxy.Options) {
		o.Policy = func() (*policy.Policy, inference.PolicyStatus) { return nil, inference.PolicyStatus{} }
	}, func(t *testing.T, w *world) {
		if r := w.chat("ada", false); r.code != 503 || !strings.Contains(r.body, "no_policy") || r.head.Get(outrigger.HeaderPolicy) != "none" {
			t.Errorf("%+v", r)
		}
		w.net.Cut("pod", "control")
		if r := w.do("GET", "/v1/variables/s/x", ""); r.code != 503 || r.head.Get(outrigger.HeaderTier) != "none" {
			t.Errorf("%+v", r)
		}
		w.net.Heal("pod", "control")
		time.Sleep(5 * time.Second)
		if r := w.do("GET", "/v1/variables/s/x", ""); r.code != 404 {
			t.Errorf("%+v", r)
		}
	})
}

// What the sidecar does not serve goes to the HTTP upstream: other paths, models the
// policy does not name, protocol upgrades; it comes back unchanged.
func TestUpstreamHTTP(t *testing.T) {
	inWorld(t, func(w *world, o *proxy.Options) {
		o.UpstreamHTTP = mustURL("http://up:80/base")
		w.serveHTTP("up:80", http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Upgrade") == "websocket" {
				c, buf, err := rw.(http.Hijacker).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
				io.Copy(c, buf)
				return
			}
			b, _ := io.ReadAll(r.Body)
			rw.Header().Set("x-up", "1")
			rw.WriteHeader(http.StatusTeapot)
			fmt.Fprintf(rw, "%s %s %s auth=%s", r.Method, r.URL, b, r.Header.Get("authorization"))
		}))
	}, func(t *testing.T, w *world) {
		for path, body := range map[string]string{"/other?q=1": "plain", "/v1/responses/r1": "", "/v1/variablesX": "", "/v1/chat/completions": `{"model":"unheard-of"}`} {
			r := w.do("POST", path, body, "authorization", "Bearer k")
			if r.code != http.StatusTeapot || r.head.Get("x-up") != "1" || r.body != "POST /base"+path+" "+body+" auth=Bearer k" {
				t.Errorf("%s: %+v", path, r)
			}
		}
		if r := w.chat(userOf("stable"), false); r.code != 200 {
			t.Errorf("a known model: %+v", r)
		}
		c := w.raw()
		defer c.Close()
		fmt.Fprint(c, "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		r := bufio.NewReader(c)
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != 101 {
			t.Fatalf("upgrade: %v %v", resp, err)
		}
		fmt.Fprint(c, "echo me\n")
		if line, err := r.ReadString('\n'); line != "echo me\n" {
			t.Errorf("upgraded connection: %q %v", line, err)
		}
		// It does not hold up the end beyond the grace.
		begun := time.Now()
		w.end()
		must(t, <-w.ended)
		w.ended <- nil
		if took := time.Since(begun); took < 10*time.Second || took > 11*time.Second {
			t.Errorf("the end took %v with an upgraded connection open", took)
		}
	})
}

// echo serves a protocol that is not HTTP.
func (w *world) echo(at string) {
	host, _, _ := strings.Cut(at, ":")
	l, err := w.net.Listen(host, at)
	must(w.t, err)
	w.stops = append(w.stops, func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
}

// Connections of other protocols are passed to the TCP upstream byte for byte, first
// bytes included. They take no place of connections that are still being looked at:
// more of them than there are such places leave the sidecar reachable.
func TestUpstreamTCP(t *testing.T) {
	inWorld(t, func(w *world, o *proxy.Options) {
		o.UpstreamTCP = "echo:1"
		w.echo("echo:1")
	}, func(t *testing.T, w *world) {
		var open []net.Conn
		for i := range 1100 {
			c := w.raw()
			defer c.Close()
			open = append(open, c)
			hello := fmt.Sprintf("\x16\x03\x01 hello %d\n", i)
			fmt.Fprint(c, hello)
			got := make([]byte, len(hello))
			if _, err := io.ReadFull(c, got); err != nil || string(got) != hello {
				t.Fatalf("connection %d: %q %v", i, got, err)
			}
		}
		big := strings.Repeat("0123456789abcdef", 16<<10)
		go fmt.Fprint(open[0], big)
		got := make([]byte, len(big))
		if _, err := io.ReadFull(open[0], got); err != nil || string(got) != big {
			t.Errorf("a large echo: %v", err)
		}
		if r := w.chat(userOf("stable"), false); r.code != 200 {
			t.Errorf("beside 1,100 tunnels: %+v", r)
		}
		for _, c := range open[1:] {
			c.Close()
		}
		// One tunnel is in use; the grace ends it.
		begun := time.Now()
		w.end()
		time.Sleep(9 * time.Second)
		fmt.Fprint(open[0], "still here")
		if _, err := io.ReadFull(open[0], got[:10]); err != nil || string(got[:10]) != "still here" {
			t.Errorf("within the grace: %q %v", got[:10], err)
		}
		must(t, <-w.ended)
		w.ended <- nil
		if took := time.Since(begun); took != 10*time.Second {
			t.Errorf("the end took %v", took)
		}
		if n, err := open[0].Read(got); err == nil {
			t.Errorf("after the grace: %q", got[:n])
		}
	})
}

// A TCP upstream that is away ends the connection instead of leaving it hanging.
func TestUpstreamTCPAway(t *testing.T) {
	inWorld(t, func(_ *world, o *proxy.Options) { o.UpstreamTCP = "nobody:1" }, func(t *testing.T, w *world) {
		c := w.raw()
		defer c.Close()
		fmt.Fprint(c, "\x16\x03\x01")
		if b, err := io.ReadAll(c); len(b) != 0 {
			t.Errorf("%q %v", b, err)
		}
	})
}

// The end: what is in flight finishes and is reported, watches are told, nothing new is
// taken, and Run returns as soon as the last is done, not at the end of the grace.
func TestDrain(t *testing.T) {
	inWorld(t, nil, func(t *testing.T, w *world) {
		w.v1.gap.Store(int64(time.Second)) // five words: five seconds
		watch, err := w.bridge.WatchVariables(context.Background(), &snakepit.WatchVariablesRequest{SessionId: "s"})
		must(t, err)
		done := make(chan response, 2)
		for _, stream := range []bool{true, false} {
			go func() { done <- w.chat(userOf("stable"), stream) }()
		}
		time.Sleep(1500 * time.Millisecond)
		begun := time.Now()
		w.end()
		synctest.Wait()
		if _, err := w.net.Dialer("pod")(context.Background(), address); err == nil {
			t.Error("a new connection was taken")
		}
		if _, err := watch.Recv(); gstatus.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "shutting down") {
			t.Errorf("watch: %v", err)
		}
		for range 2 {
			if r := <-done; r.code != 200 || r.err != nil || !strings.Contains(r.body, "w5 ") {
				t.Errorf("in flight: %+v", r)
			}
		}
		must(t, <-w.ended)
		w.ended <- nil
		if took := time.Since(begun); took < 3*time.Second || took > 5*time.Second {
			t.Errorf("the end took %v; the calls had 3.5 s to go", took)
		}
		synctest.Wait()
		if n := w.upstreams.Load(); n != 0 {
			t.Errorf("%d idle connections to models are left open", n)
		}
		if requests, failures, cancelled := w.reports.total("v1"); requests != 2 || failures+cancelled != 0 {
			t.Errorf("reported of the last calls: %d requests, %d failures, %d cancelled", requests, failures, cancelled)
		}
	})
}

// What outlasts the grace is cut, and Run returns; the client learns of it.
func TestDrainCuts(t *testing.T) {
	inWorld(t, func(_ *world, o *proxy.Options) { o.Grace = 2 * time.Second }, func(t *testing.T, w *world) {
		w.v1.gap.Store(int64(time.Minute))
		w.v2.gap.Store(int64(900 * time.Millisecond))
		long, short := make(chan response, 1), make(chan response, 1)
		go func() { long <- w.chat(userOf("stable"), true) }()
		go func() { short <- w.chat(userOf("candidate"), true) }()
		time.Sleep(3 * time.Second)
		begun := time.Now()
		w.end()
		must(t, <-w.ended)
		w.ended <- nil
		if took := time.Since(begun); took < 2*time.Second || took > 2500*time.Millisecond {
			t.Errorf("the end took %v, the grace is 2 s", took)
		}
		if r := <-short; r.code != 200 || !strings.Contains(r.body, "[DONE]") {
			t.Errorf("the short one: %+v", r)
		}
		if r := <-long; r.err == nil {
			t.Errorf("the long one: %+v", r)
		}
	})
}

// A listener that fails is an error of Run, not a sidecar that serves nobody.
func TestListenerFails(t *testing.T) {
	inWorld(t, nil, func(t *testing.T, w *world) {
		l := brokenListener{}
		s, err := proxy.New(proxy.Options{Reader: stub{}, Authority: nobody{}, Policy: func() (*policy.Policy, inference.PolicyStatus) { return nil, inference.PolicyStatus{} }})
		must(t, err)
		if err := s.Run(context.Background(), l); !errors.Is(err, net.ErrClosed) {
			t.Errorf("got %v", err)
		}
	})
}

// Both versions' calls arrive, good and bad, successes of the span with the failures:
// the bad news within 100 ms, the rest within a second; cache answers and the sessions
// they used, too. Nothing is counted twice.
func TestReports(t *testing.T) {
	inWorld(t, nil, func(t *testing.T, w *world) {
		_, err := w.bridge.RegisterVariable(t.Context(), &snakepit.RegisterVariableRequest{SessionId: "s", Name: "x", Type: "float", InitialValue: &anypb.Any{Value: []byte("1")}})
		must(t, err)
		read := func() {
			_, err := w.bridge.GetVariable(t.Context(), &snakepit.GetVariableRequest{SessionId: "s", VariableIdentifier: "x"})
			must(t, err)
		}
		read()
		time.Sleep(2 * time.Second)
		for range 10 {
			read()
		}
		for range 5 {
			w.chat(userOf("stable"), false)
			w.chat(userOf("candidate"), true)
		}
		time.Sleep(1100 * time.Millisecond)
		if n, f, c := w.reports.total("v1"); n != 5 || f+c != 0 {
			t.Errorf("version 1: %d, %d, %d", n, f, c)
		}
		if n, f, c := w.reports.total("v2"); n != 5 || f+c != 0 {
			t.Errorf("version 2: %d, %d, %d", n, f, c)
		}
		// Just after a regular report, so that it is not that one which brings the news.
		_, at := w.reports.all()
		time.Sleep(time.Until(at[len(at)-1].Add(1200 * time.Millisecond)))
		before, _ := w.reports.all()
		w.v2.failing.Store(true)
		w.chat(userOf("stable"), false)
		failed := time.Now()
		if r := w.chat(userOf("candidate"), false); r.code != 500 {
			t.Errorf("a failing version: %+v", r)
		}
		time.Sleep(100 * time.Millisecond)
		after, at := w.reports.all()
		if len(after) != len(before)+1 {
			t.Fatalf("%d reports within 100 ms of a failure", len(after)-len(before))
		}
		d := after[len(after)-1]
		if got := at[len(at)-1].Sub(failed); got > 100*time.Millisecond {
			t.Errorf("the failure was known after %v", got)
		}
		good, bad := false, false
		for _, o := range d.Outcomes {
			good = good || o.Version == "v1" && o.Requests == 1 && o.Failures == 0
			bad = bad || o.Version == "v2" && o.Requests == 1 && o.Failures == 1 && o.Arm == "candidate" && len(o.FailedUnits) == 1
		}
		if !good || !bad {
			t.Errorf("the urgent report has not both versions: %v", d.Outcomes)
		}
		time.Sleep(3 * time.Second)
		var hits, farther uint64
		touched := map[string]bool{}
		deltas, _ := w.reports.all()
		for i, d := range deltas {
			if d.Sequence != uint64(i+1) || d.Node.GetId() != "pod" {
				t.Errorf("delta %d: sequence %d of %v", i, d.Sequence, d.Node)
			}
			hits, farther = hits+d.GetCache().GetHitsProcess(), farther+d.GetCache().GetHitsNode()+d.GetCache().GetHitsOrigin()
			for _, s := range d.GetCache().GetTouchedSessions() {
				touched[s] = true
			}
		}
		if hits+farther != 11 || hits < 9 || !touched["default/s"] || len(touched) != 1 {
			t.Errorf("%d process hits and %d others of 11 reads, touched %v", hits, farther, touched)
		}
	})
}

func TestStats(t *testing.T) {
	inWorld(t, nil, func(t *testing.T, w *world) {
		w.chat(userOf("stable"), false)
		w.do("GET", "/v1/variables/s/x", "")
		rec := httptest.NewRecorder()
		w.sidecar.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/stats", nil))
		var got struct {
			Inference struct {
				Arms []struct {
					Model, Version, Arm string
					Requests            uint64
				}
				Endpoints []struct{ Address, Breaker string }
			}
			Variables map[string]uint64
		}
		if err := json.Unmarshal(rec.Body.Bytes(), &got); err != nil || rec.Header().Get("content-type") != "application/json" {
			t.Fatalf("%v: %s", err, rec.Body)
		}
		if a := got.Inference.Arms; len(a) != 1 || a[0].Arm != "stable" || a[0].Version != "v1" || a[0].Requests != 1 || len(got.Inference.Endpoints) != 2 || got.Inference.Endpoints[0].Breaker != "closed" {
			t.Errorf("inference %+v", got.Inference)
		}
		if v := got.Variables; v["process"]+v["node"]+v["origin"] != 1 || len(v) != 7 {
			t.Errorf("variables %v", v)
		}
	})
}

// On a real network the sidecar never dials itself, not even through a model's endpoint.
func TestNeverDialsItself(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	own := l.Addr().String()
	p := newPolicy()
	for i := range p.Models[0].Versions {
		p.Models[0].Versions[i].Endpoints[0].Address = own
	}
	s, err := proxy.New(proxy.Options{Node: outrigger.Node{ID: "pod", Region: "eu"}, Reader: stub{}, Authority: nobody{}, UpstreamTCP: own,
		Own:    []netip.AddrPort{netip.MustParseAddrPort(own)},
		Policy: func() (*policy.Policy, inference.PolicyStatus) { return p, inference.PolicyStatus{Live: true} }})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- s.Run(ctx, l) }()
	defer func() {
		cancel()
		must(t, <-ran)
	}()
	resp, err := http.Post("http://"+own+"/v1/chat/completions", "application/json", strings.NewReader(`{"model":"chat","user":"u"}`))
	must(t, err)
	defer resp.Body.Close()
	if b, _ := io.ReadAll(resp.Body); resp.StatusCode != 503 {
		t.Errorf("%d %s", resp.StatusCode, b)
	}
	c, err := net.Dial("tcp", own)
	must(t, err)
	defer c.Close()
	fmt.Fprint(c, "\x16\x03\x01")
	if b, _ := io.ReadAll(c); len(b) != 0 {
		t.Errorf("the sidecar answers itself: %q", b)
	}
}

// Half-closed connections stay half open through a tunnel over real sockets.
func TestTunnelHalfClose(t *testing.T) {
	up, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer up.Close()
	go func() {
		c, err := up.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b, _ := io.ReadAll(c) // to the end of the client's half
		fmt.Fprintf(c, "got %d", len(b))
	}()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	s, err := proxy.New(proxy.Options{Node: outrigger.Node{ID: "pod"}, Reader: stub{}, Authority: nobody{}, UpstreamTCP: up.Addr().String(),
		Policy: func() (*policy.Policy, inference.PolicyStatus) { return nil, inference.PolicyStatus{} }})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- s.Run(ctx, l) }()
	defer func() {
		cancel()
		must(t, <-ran)
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	defer c.Close()
	fmt.Fprint(c, "\x16\x03\x01", strings.Repeat("z", 100_000))
	must(t, c.(*net.TCPConn).CloseWrite())
	if b, err := io.ReadAll(c); string(b) != "got 100003" {
		t.Errorf("%q %v", b, err)
	}
}
