package loop

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"testing"
	"testing/synctest"
	"time"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/outrigger-mesh/outrigger/internal/memnet"
)

// TestReverseProxyAsSlow: the standard library's proxy runs as the handler: streams,
// websocket upgrades, trailers and a client that gives up all pass through.
func TestReverseProxyAsSlow(t *testing.T) {
	gone := make(chan struct{}, 1)
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ws":
			c, brw, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			io.Copy(c, brw)
		case "/sse":
			w.Header().Set("Content-Type", "text/event-stream")
			for i := 0; ; i++ {
				if _, err := fmt.Fprintf(w, "data: %d\n\n", i); err != nil || http.NewResponseController(w).Flush() != nil || r.Context().Err() != nil {
					gone <- struct{}{}
					return
				}
			}
		case "/cut":
			io.WriteString(w, "part")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		default:
			io.Copy(w, r.Body)
			w.Header().Set(http.TrailerPrefix+"X-Sum", r.Trailer.Get("X-Sum"))
		}
	}))
	defer backend.Close()
	base, err := url.Parse(backend.URL)
	if err != nil {
		t.Fatal(err)
	}
	rp := httputil.NewSingleHostReverseProxy(base)
	rp.FlushInterval = -1
	rp.ErrorLog = log.New(io.Discard, "", 0)
	each(t, func() Options { return Options{Slow: rp} }, func(t *testing.T, s *server) {
		ws := s.dial(t)
		ws.send("GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		if resp, err := http.ReadResponse(ws.r, nil); err != nil || resp.StatusCode != 101 {
			t.Fatal(resp, err)
		}
		for range 3 {
			ws.send("frame\n")
			if l, err := ws.r.ReadString('\n'); err != nil || l != "frame\n" {
				t.Fatalf("%q, %v", l, err)
			}
		}
		ws.Close()

		sse := s.dial(t)
		sse.send(get("/sse"))
		resp, err := http.ReadResponse(sse.r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if l, err := bufio.NewReader(resp.Body).ReadString('\n'); err != nil || l != "data: 0\n" {
			t.Fatalf("%q, %v", l, err)
		}
		sse.Close()
		select {
		case <-gone:
		case <-time.NewTimer(time.Minute).C:
			t.Fatal("the backend does not learn that the client left")
		}

		// An answer the backend breaks off must not look complete.
		cut := s.dial(t)
		cut.send(get("/cut"))
		if resp, err = http.ReadResponse(cut.r, nil); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(resp.Body); string(b) != "part" || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("a broken answer reads as %q, %v", b, err)
		}

		c := s.dial(t)
		c.send("POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 9\r\n\r\n" + get("/fast/next"))
		c.want("POST", 200, "abc")
		c.want("GET", 200, "/fast/next")
	})
}

// TestConnectTunnel: CONNECT reaches the handler with the authority and can be hijacked.
func TestConnectTunnel(t *testing.T) {
	each(t, func() Options {
		return Options{Slow: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method != "CONNECT" || r.Host != "db:5432" || r.URL.Host != "db:5432" || r.RequestURI != "db:5432" {
				t.Errorf("%s %s %v %s", r.Method, r.Host, r.URL, r.RequestURI)
			}
			c, brw, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n")
			io.Copy(c, brw)
		})}
	}, func(t *testing.T, s *server) {
		c := s.dial(t)
		c.send("CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\n\r\nearly bytes")
		resp, err := http.ReadResponse(c.r, &http.Request{Method: "CONNECT"})
		if err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		b := make([]byte, len("early bytes"))
		if _, err := io.ReadFull(c.r, b); err != nil || string(b) != "early bytes" {
			t.Fatalf("%q, %v", b, err)
		}
	})
}

// TestRequestAsNetHTTP: the handler gets the request net/http would have given it.
func TestRequestAsNetHTTP(t *testing.T) {
	describe := func(r *http.Request) string {
		_, local := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
		return fmt.Sprintf("%s %s %q %q %v %q %d %q %v %s %v", r.Method, r.Host, r.URL, r.RequestURI, r.Header, r.TransferEncoding, r.ContentLength,
			r.Trailer, r.Close, r.Proto, local)
	}
	seen := make(chan string, 1)
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got := describe(r)
		if host, _, err := net.SplitHostPort(r.RemoteAddr); err != nil || host != "127.0.0.1" {
			got += " from " + r.RemoteAddr
		}
		seen <- got
	})
	std := httptest.NewServer(h)
	defer std.Close()
	ours := start(t, "tcp", Options{Slow: h})
	theirs := &server{network: "tcp", addr: std.Listener.Addr().String()}
	for _, req := range []string{
		"GET /a/b%20c?x=%zz&y HTTP/1.1\r\nHost: Example.com:80\r\nAccept: a\r\naccept: b\r\nx-lower-case: 1\r\nCookie: a=b\r\n\r\n",
		"POST //double HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X-B, X-A\r\n\r\n0\r\n\r\n",
		"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc",
		"GET http://a/p?q HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET /old HTTP/1.0\r\n\r\n",
		"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
	} {
		c := theirs.dial(t)
		c.send(req)
		c.want("GET", 200, "*")
		want := <-seen
		c = ours.dial(t)
		c.send(req)
		c.want("GET", 200, "*")
		if got := <-seen; got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

// TestInABubble: over an in-memory network and fake time, the idle limit is exact.
func TestInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(Options{Slow: echoSlow, Fast: echoFast, IdleTimeout: 90 * time.Second, HeaderTimeout: 7 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		network := memnet.New()
		l, err := network.Listen("sidecar", "sidecar:1")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx, l) }()
		for sent, want := range map[string]time.Duration{"": 90 * time.Second, "GET / HT": 7 * time.Second} {
			c, err := network.Dialer("app")(ctx, "sidecar:1")
			if err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			io.WriteString(c, sent)
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("something came")
			}
			if d := time.Since(begin); d != want {
				t.Errorf("%q: closed after %v, want %v", sent, d, want)
			}
			c.Close()
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestMetrics(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	meter := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)).Meter("test")
	s := start(t, "tcp", Options{Meter: meter})
	c := s.dial(t)
	c.send(get("/fast/a") + get("/fast/b") + get("/slow") + "bad\r\n")
	for range 4 {
		c.reply("GET")
	}
	var rm metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &rm); err != nil {
		t.Fatal(err)
	}
	got := map[string]int64{}
	for _, m := range rm.ScopeMetrics[0].Metrics {
		if sum, ok := m.Data.(metricdata.Sum[int64]); ok {
			for _, p := range sum.DataPoints {
				path, _ := p.Attributes.Value("path")
				got[m.Name+" "+path.AsString()] = p.Value
			}
		}
	}
	for name, want := range map[string]int64{"outrigger.http1.requests fast": 2, "outrigger.http1.requests slow": 1, "outrigger.http1.requests refused": 1} {
		if got[name] != want {
			t.Errorf("%s is %d, want %d (all: %v)", name, got[name], want, got)
		}
	}
}
