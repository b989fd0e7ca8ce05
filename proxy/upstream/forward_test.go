package upstream

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
)

// rig is a client connection to a forwarder whose requests go to one backend.
type rig struct {
	t     *testing.T
	front *httptest.Server
}

func newRig(t *testing.T, backend http.HandlerFunc, o ForwarderOptions) *rig {
	t.Helper()
	b := httptest.NewServer(backend)
	t.Cleanup(b.Close)
	tr := NewTransport(TransportOptions{})
	t.Cleanup(tr.CloseIdleConnections)
	if o.Transport == nil {
		o.Transport = tr
	}
	f := NewForwarder(o)
	to := netip.MustParseAddrPort(b.Listener.Addr().String())
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.ServeHTTP(w, r.WithContext(WithDestination(r.Context(), to)))
	}))
	t.Cleanup(front.Close)
	return &rig{t, front}
}

// raw sends bytes and returns the connection's reader.
func (r *rig) raw(request string) (net.Conn, *bufio.Reader) {
	r.t.Helper()
	c, err := net.Dial("tcp", r.front.Listener.Addr().String())
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	if _, err := io.WriteString(c, strings.ReplaceAll(request, "\n", "\r\n")); err != nil {
		r.t.Fatal(err)
	}
	return c, bufio.NewReader(c)
}

func (r *rig) answer(request string) *http.Response {
	r.t.Helper()
	_, br := r.raw(request)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp
}

// What the backend sees is what the client sent, minus the hop.
func TestForwardTransparent(t *testing.T) {
	var seen *http.Request
	r := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		seen = r
		w.Header().Set("Keep-Alive", "x")
		io.WriteString(w, "ok")
	}, ForwarderOptions{})
	resp := r.answer("GET /a%2Fb//c?x=1;y=%zz HTTP/1.1\nHost: app.example\nAuthorization: Bearer k\nConnection: close, X-Hop\nX-Hop: 1\nKeep-Alive: 1\nTE: trailers\nX-Forwarded-For: 1.2.3.4\nForwarded: for=x\nProxy-Authorization: p\n\n")
	if resp.StatusCode != 200 || resp.Header.Get("Keep-Alive") != "" {
		t.Fatalf("answer %v %v", resp.Status, resp.Header)
	}
	if seen.RequestURI != "/a%2Fb//c?x=1;y=%zz" || seen.Host != "app.example" {
		t.Errorf("uri %q host %q", seen.RequestURI, seen.Host)
	}
	want := http.Header{"Authorization": {"Bearer k"}, "X-Forwarded-For": {"1.2.3.4"}, "Forwarded": {"for=x"}, "Te": {"trailers"}, HeaderHops: {"1"}}
	if fmt.Sprint(seen.Header) != fmt.Sprint(want) {
		t.Errorf("header %v, want %v", seen.Header, want)
	}
}

func TestForwardRefusals(t *testing.T) {
	reached := false
	r := newRig(t, func(http.ResponseWriter, *http.Request) { reached = true }, ForwarderOptions{})
	for _, tt := range []struct {
		name, request string
		status        int
	}{
		{"Connection names identity", "GET / HTTP/1.1\nHost: a\nConnection: close, X-Session-Id\nX-Session-Id: s\n\n", 400},
		{"Connection names our header", "GET / HTTP/1.1\nHost: a\nConnection: x-outrigger-bucket\n\n", 400},
		{"Connection names Authorization", "GET / HTTP/1.1\nHost: a\nConnection: AUTHORIZATION\n\n", 400},
		{"Connection names framing", "POST / HTTP/1.1\nHost: a\nConnection: Content-Length\nContent-Length: 0\n\n", 400},
		{"loop", "GET / HTTP/1.1\nHost: a\nX-Outrigger-Hops: 8\n\n", 508},
		{"forged hop counter", "GET / HTTP/1.1\nHost: a\nX-Outrigger-Hops: -1\n\n", 508},
	} {
		if resp := r.answer(tt.request); resp.StatusCode != tt.status {
			t.Errorf("%s: %s, want %d", tt.name, resp.Status, tt.status)
		}
	}
	if reached {
		t.Error("a refused request reached the backend")
	}

	guarded := newRig(t, func(http.ResponseWriter, *http.Request) { reached = true }, ForwarderOptions{Guard: NewGuard(GuardOptions{})})
	if resp := guarded.answer("GET / HTTP/1.1\nHost: a\n\n"); resp.StatusCode != 403 || reached {
		t.Errorf("guarded destination: %s, reached %v", resp.Status, reached)
	}
	dead := NewForwarder(ForwarderOptions{Transport: NewTransport(TransportOptions{Dial: func(context.Context, string, string) (net.Conn, error) { return nil, io.ErrClosedPipe }})})
	for want, ctx := range map[int]context.Context{502: WithDestination(t.Context(), netip.MustParseAddrPort("192.0.2.1:80")), 503: t.Context()} {
		w := httptest.NewRecorder()
		dead.ServeHTTP(w, httptest.NewRequest("GET", "/", nil).WithContext(ctx))
		if w.Code != want || !strings.Contains(w.Body.String(), `"kind":"unavailable"`) {
			t.Errorf("got %d %s, want %d", w.Code, w.Body, want)
		}
	}
}

// An h2c upgrade must not reach the backend: it would open a connection on which
// requests pass unseen.
func TestForwardDropsH2C(t *testing.T) {
	var seen http.Header
	r := newRig(t, func(w http.ResponseWriter, r *http.Request) { seen = r.Header }, ForwarderOptions{})
	resp := r.answer("GET / HTTP/1.1\nHost: a\nConnection: Upgrade, HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\n\n")
	if resp.StatusCode != 200 || seen["Upgrade"] != nil || seen["Http2-Settings"] != nil || seen["Connection"] != nil {
		t.Errorf("%s, backend saw %v", resp.Status, seen)
	}
}

func TestForwardWebSocket(t *testing.T) {
	r := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		if !isWebSocket(r) {
			t.Errorf("backend saw %v", r.Header)
		}
		c, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		fmt.Fprint(rw, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
		rw.Flush()
		line, _ := rw.ReadString('\n')
		fmt.Fprintf(rw, "echo %s", line)
		rw.Flush()
	}, ForwarderOptions{})
	c, br := r.raw("GET /ws HTTP/1.1\nHost: a\nConnection: keep-alive, Upgrade\nUpgrade: WebSocket\nSec-WebSocket-Version: 13\n\n")
	resp, err := http.ReadResponse(br, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatal(resp, err)
	}
	fmt.Fprint(c, "hi\n")
	if line, err := br.ReadString('\n'); line != "echo hi\n" {
		t.Errorf("got %q, %v", line, err)
	}
}

// Each part of a stream arrives before the next is sent: the backend waits for the
// client's word that it has it.
func TestForwardFlushesStreams(t *testing.T) {
	got := make(chan string)
	r := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		for i := range 3 {
			fmt.Fprintf(w, "data: %d\n\n", i)
			w.(http.Flusher).Flush()
			if v := <-got; v != fmt.Sprintf("data: %d\n\n", i) {
				t.Errorf("client has %q at %d", v, i)
			}
		}
	}, ForwarderOptions{})
	resp, err := http.Get(r.front.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	buf := make([]byte, 100)
	for range 3 {
		n, err := resp.Body.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		got <- string(buf[:n])
	}
}

func TestForwardTrailers(t *testing.T) {
	r := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Sum", string(body)+r.Trailer.Get("X-Check"))
		w.Write([]byte("ok"))
	}, ForwarderOptions{})
	resp := r.answer("POST / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\nTrailer: X-Check\n\n3\nabc\n0\nX-Check: 42\n\n")
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "ok" || resp.Trailer.Get("X-Sum") != "abc42" {
		t.Errorf("%q %v, trailer %v", body, err, resp.Trailer)
	}
}

// An answer that is cut must not look whole.
func TestForwardTruncation(t *testing.T) {
	r := newRig(t, func(w http.ResponseWriter, r *http.Request) {
		w.Write([]byte("half"))
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}, ForwarderOptions{})
	resp, err := http.Get(r.front.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("read %q as a whole answer", b)
	}
}

func TestForwardBase(t *testing.T) {
	var seen string
	b := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { seen = r.Host + r.RequestURI }))
	defer b.Close()
	base, _ := url.Parse(b.URL + "/api")
	tr := NewTransport(TransportOptions{})
	defer tr.CloseIdleConnections()
	f := NewForwarder(ForwarderOptions{Transport: tr, Base: base})
	w := httptest.NewRecorder()
	f.ServeHTTP(w, httptest.NewRequest("GET", "http://client.example/v1/x?a=1", nil))
	if want := strings.TrimPrefix(b.URL, "http://") + "/api/v1/x?a=1"; w.Code != 200 || seen != want {
		t.Errorf("%d, backend saw %q, want %q", w.Code, seen, want)
	}
}

// What is asked about the server as a whole stays that (RFC 9110 §9.3.7).
func TestForwardAsterisk(t *testing.T) {
	var seen string
	b := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { seen = r.Method + " " + r.RequestURI }))
	b.Config.DisableGeneralOptionsHandler = true // net/http would answer by itself
	b.Start()
	defer b.Close()
	tr := NewTransport(TransportOptions{})
	defer tr.CloseIdleConnections()
	for _, path := range []string{"", "/", "/api"} {
		base, err := url.Parse(b.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		w := httptest.NewRecorder()
		NewForwarder(ForwarderOptions{Transport: tr, Base: base}).ServeHTTP(w, httptest.NewRequest("OPTIONS", "*", nil))
		if w.Code != 200 || seen != "OPTIONS *" {
			t.Errorf("base %q: %d, backend saw %q", path, w.Code, seen)
		}
		seen = ""
	}
}

func TestStripHopByHop(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   http.Header
		want []string
	}{
		{"nothing", http.Header{"Accept": {"a"}}, []string{"Accept"}},
		{"all hop-by-hop", http.Header{"Connection": {"close"}, "Keep-Alive": {"1"}, "Proxy-Connection": {"x"}, "Te": {"gzip"}, "Transfer-Encoding": {"chunked"}, "Upgrade": {"h2c"}, "Trailer": {"x"}}, nil},
		{"named go", http.Header{"Connection": {"x-a, ,X-B", "x-c"}, "X-A": {"1"}, "X-B": {"1"}, "X-C": {"1"}, "X-D": {"1"}}, []string{"X-D"}},
		{"identity stays whatever is named", http.Header{"Connection": {"authorization, x-user-id, x-outrigger-token"}, "Authorization": {"k"}, "X-User-Id": {"u"}, "X-Outrigger-Token": {"t"}}, []string{"Authorization", "X-Outrigger-Token", "X-User-Id"}},
		{"trailers stay acceptable", http.Header{"Te": {"gzip;q=0.5, trailers"}}, []string{"Te"}},
	} {
		StripHopByHop(tt.in)
		var got []string
		for k := range tt.in {
			got = append(got, k)
		}
		slices.Sort(got)
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v left, want %v", tt.name, got, tt.want)
		}
	}
}
