package upstream

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// rawServer answers every request of a connection with the next of its scripts, byte for
// byte, and counts connections. A script that ends in "<close>" closes after it.
type rawServer struct {
	address string
	conns   atomic.Int32
	heads   chan string
}

func newRawServer(t testing.TB, answer func(conn, request int) string) *rawServer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &rawServer{address: l.Addr().String(), heads: make(chan string, 64)}
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go s.serve(c, int(s.conns.Add(1)), answer)
		}
	}()
	return s
}

func (s *rawServer) serve(c net.Conn, conn int, answer func(conn, request int) string) {
	defer c.Close()
	br := bufio.NewReader(c)
	for i := 1; ; i++ {
		r, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		select {
		case s.heads <- r.Method + " " + r.RequestURI + " " + r.Host + " " + r.Header.Get("X-A") + " " + string(body):
		default:
		}
		text, closes := strings.CutSuffix(answer(conn, i), "<close>")
		if _, err := io.WriteString(c, text); err != nil || closes {
			return
		}
	}
}

func newDirect(t testing.TB, o TransportOptions) *Direct {
	d := NewDirect(o, refuses{})
	t.Cleanup(d.CloseIdleConnections)
	return d
}

// refuses is a transport for requests that a Direct must have sent itself.
type refuses struct{}

func (refuses) RoundTrip(*http.Request) (*http.Response, error) {
	return nil, errors.New("left to the other transport")
}

// ask posts one request and reads the answer to its end.
func ask(t testing.TB, d http.RoundTripper, address, method string) (*http.Response, string, error) {
	t.Helper()
	var body io.Reader
	if method == "POST" {
		body = strings.NewReader(`{"a":1}`)
	}
	r, err := http.NewRequest(method, "http://"+address+"/v1/x?y=1", body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header["X-A"] = []string{"b"}
	r.Header["Idempotency-Key"] = nil
	resp, err := d.RoundTrip(r)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, string(b), err
}

// What an upstream may send, and whether the connection is used for a second request.
func TestDirectFraming(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n"
	for _, tt := range []struct {
		name, method, answer, body string
		status                     int
		length                     int64
		fails, kept                bool
	}{
		{"length", "POST", ok + "Content-Length: 3\r\n\r\nabc", "abc", 200, 3, false, true},
		{"chunked", "POST", ok + "Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n2;x=y\r\nbc\r\n0\r\nX-Sum: 1\r\n\r\n", "abc", 200, -1, false, true},
		{"no reason", "POST", "HTTP/1.1 200\r\nContent-Length: 1\r\n\r\na", "a", 200, 1, false, true},
		{"interim", "POST", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + ok + "Content-Length: 1\r\n\r\na", "a", 200, 1, false, true},
		{"same length twice", "POST", ok + "Content-Length: 1\r\nContent-Length: 1\r\n\r\na", "a", 200, 1, false, true},
		{"HEAD", "HEAD", ok + "Content-Length: 30\r\n\r\n", "", 200, 30, false, true},
		{"204", "POST", "HTTP/1.1 204 No Content\r\n\r\n", "", 204, 0, false, true},
		{"304", "GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", "", 304, 0, false, true},
		{"HTTP/1.0 keep-alive", "POST", "HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 1\r\n\r\na", "a", 200, 1, false, true},

		{"204 with content", "POST", "HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\n", "", 204, 0, false, false},
		{"says close", "POST", ok + "Connection: x, close\r\nContent-Length: 1\r\n\r\na", "a", 200, 1, false, false},
		{"HTTP/1.0", "POST", "HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na", "a", 200, 1, false, false},
		{"until close", "POST", ok + "\r\nabc<close>", "abc", 200, -1, false, false},
		{"bytes after it", "POST", ok + "Content-Length: 1\r\n\r\naHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", "a", 200, 1, false, false},
		{"bytes after chunks", "POST", ok + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nx", "", 200, -1, false, false},

		{"length and chunks", "POST", ok + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "", 0, 0, true, false},
		{"two lengths", "POST", ok + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", "", 0, 0, true, false},
		{"length list", "POST", ok + "Content-Length: 1, 1\r\n\r\na", "", 0, 0, true, false},
		{"length with sign", "POST", ok + "Content-Length: +1\r\n\r\na", "", 0, 0, true, false},
		{"other coding", "POST", ok + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "", 0, 0, true, false},
		{"chunks in HTTP/1.0", "POST", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "", 0, 0, true, false},
		{"folded line", "POST", ok + "A: b\r\n c\r\nContent-Length: 0\r\n\r\n", "", 0, 0, true, false},
		{"space before colon", "POST", ok + "Content-Length : 0\r\n\r\n", "", 0, 0, true, false},
		{"bare LF", "POST", "HTTP/1.1 200 OK\nContent-Length: 0\n\n", "", 0, 0, true, false},
		{"NUL", "POST", ok + "A: \x00\r\nContent-Length: 0\r\n\r\n", "", 0, 0, true, false},
		{"switches", "POST", "HTTP/1.1 101 Switching Protocols\r\n\r\n", "", 0, 0, true, false},
		{"endless interim", "POST", strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 9), "", 0, 0, true, false},
		{"no HTTP", "POST", "SSH-2.0-OpenSSH_9.9\r\n", "", 0, 0, true, false},
		{"cut head", "POST", ok + "Content-Le<close>", "", 0, 0, true, false},
		{"cut body", "POST", ok + "Content-Length: 3\r\n\r\nab<close>", "ab", 200, 3, true, false},
		{"cut chunk", "POST", ok + "Transfer-Encoding: chunked\r\n\r\n5\r\nab<close>", "ab", 200, -1, true, false},
		{"bad chunk", "POST", ok + "Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", "a", 200, -1, true, false},
		{"huge head", "POST", ok + "A: " + strings.Repeat("x", maxAnswerHead) + "\r\n\r\n", "", 0, 0, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newRawServer(t, func(conn, request int) string {
				if conn == 1 && request == 1 {
					return tt.answer
				}
				return ok + "Content-Length: 6\r\n\r\nsecond"
			})
			d := newDirect(t, TransportOptions{})
			resp, body, err := ask(t, d, s.address, tt.method)
			if (err != nil) != tt.fails || body != tt.body {
				t.Fatalf("body %q, error %v; want %q, failure %v", body, err, tt.body, tt.fails)
			}
			if resp != nil && (resp.StatusCode != tt.status || resp.ContentLength != tt.length) {
				t.Errorf("status %d, length %d; want %d, %d", resp.StatusCode, resp.ContentLength, tt.status, tt.length)
			}
			if _, body, err := ask(t, d, s.address, "POST"); err != nil || body != "second" {
				t.Fatalf("second: %q, %v", body, err)
			}
			if kept := s.conns.Load() == 1; kept != tt.kept {
				t.Errorf("%d connections, kept should be %v", s.conns.Load(), tt.kept)
			}
			want := tt.method + " /v1/x?y=1 " + s.address + " b "
			if tt.method == "POST" {
				want += `{"a":1}`
			}
			if got := <-s.heads; got != want {
				t.Errorf("sent %q, want %q", got, want)
			}
		})
	}
}

// A server that closes a kept connection costs nobody an error, and is asked twice only
// where that does no harm.
func TestDirectStaleConnection(t *testing.T) {
	const answer = "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na"
	for _, repeatable := range []bool{true, false} {
		s := newRawServer(t, func(conn, request int) string {
			if conn == 1 && request == 2 {
				return "<close>" // took the request and closed without a byte
			}
			return answer
		})
		d := newDirect(t, TransportOptions{})
		if _, _, err := ask(t, d, s.address, "POST"); err != nil {
			t.Fatal(err)
		}
		r, _ := http.NewRequest("POST", "http://"+s.address+"/", strings.NewReader("x"))
		if repeatable {
			r.Header["Idempotency-Key"] = nil
		}
		resp, err := d.RoundTrip(r)
		if (err == nil) != repeatable {
			t.Fatalf("repeatable %v: %v", repeatable, err)
		}
		if err == nil {
			resp.Body.Close()
		}
		if want := map[bool]int32{true: 2, false: 1}[repeatable]; s.conns.Load() != want {
			t.Errorf("repeatable %v: %d connections", repeatable, s.conns.Load())
		}
	}
}

// The end of the context closes the upstream's connection while it thinks and while it
// streams, and the cause is what is told.
func TestDirectCancel(t *testing.T) {
	for _, streaming := range []bool{false, true} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		asked, closed := make(chan struct{}), make(chan struct{})
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			br := bufio.NewReader(c)
			if _, err := http.ReadRequest(br); err != nil {
				return
			}
			if streaming {
				fmt.Fprint(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
			}
			close(asked)
			_, _ = io.Copy(io.Discard, br) // ends with the connection, in order or not
			close(closed)
		}()
		d := newDirect(t, TransportOptions{})
		why := errors.New("why")
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		r, _ := http.NewRequestWithContext(ctx, "GET", "http://"+l.Addr().String()+"/", nil)
		if !streaming {
			go func() { <-asked; cancel(why) }()
		}
		resp, err := d.RoundTrip(r)
		if streaming {
			if err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 8)
			if n, err := resp.Body.Read(buf); n != 3 || err != nil {
				t.Fatalf("%d, %v: the stream must pass as it comes", n, err)
			}
			cancel(why)
			_, err = resp.Body.Read(buf)
			if !errors.Is(err, why) {
				t.Errorf("read: %v", err)
			}
			resp.Body.Close()
		} else if !errors.Is(err, why) {
			t.Errorf("%v", err)
		}
		<-closed
	}
}

// Requests beyond MaxPerHost wait, in order, and leave when their context ends.
func TestDirectLimit(t *testing.T) {
	s := newRawServer(t, func(int, int) string { return "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na" })
	d := newDirect(t, TransportOptions{MaxPerHost: 1})
	r, _ := http.NewRequest("GET", "http://"+s.address+"/", nil)
	first, err := d.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := d.RoundTrip(r.WithContext(ctx)); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("second beside the first: %v", err)
	}
	third := make(chan error, 1)
	go func() {
		_, _, err := ask(t, d, s.address, "POST")
		third <- err
	}()
	first.Body.Close() // not read: its connection goes
	if err := <-third; err != nil {
		t.Fatal(err)
	}
	if n := s.conns.Load(); n != 2 {
		t.Errorf("%d connections", n)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if h := d.hosts[s.address]; h == nil || h.inUse != 0 || len(h.idle) != 1 || len(h.waiting) != 0 || d.idle != 1 {
		t.Errorf("left behind: %+v, idle %d", h, d.idle)
	}
}

// Idle connections are closed by the second sweep and their address is forgotten.
func TestDirectSweep(t *testing.T) {
	s := newRawServer(t, func(int, int) string { return "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na" })
	d := newDirect(t, TransportOptions{IdleTimeout: time.Hour})
	if _, _, err := ask(t, d, s.address, "POST"); err != nil {
		t.Fatal(err)
	}
	d.sweep()
	if len(d.hosts) != 1 || d.idle != 1 {
		t.Fatalf("after one sweep: %d addresses, %d idle", len(d.hosts), d.idle)
	}
	d.sweep()
	if len(d.hosts) != 0 || d.idle != 0 || d.timer != nil {
		t.Fatalf("after two: %d addresses, %d idle, timer %v", len(d.hosts), d.idle, d.timer)
	}
}

// What a Direct does not send goes to the other transport untouched.
func TestDirectLeaves(t *testing.T) {
	d := newDirect(t, TransportOptions{})
	for name, change := range map[string]func(r *http.Request){
		"tls":      func(r *http.Request) { r.URL.Scheme = "https" },
		"upgrade":  func(r *http.Request) { r.Header.Set("Upgrade", "websocket") },
		"trailers": func(r *http.Request) { r.Header.Set("Te", "trailers") },
		"expect":   func(r *http.Request) { r.Header.Set("Expect", "100-continue") },
		"unknown":  func(r *http.Request) { r.ContentLength = -1 },
		"large":    func(r *http.Request) { r.ContentLength = maxDirect + 1 },
		"zone":     func(r *http.Request) { r.URL.Host = "[fe80::1%25eth0]:80" },
	} {
		r, _ := http.NewRequest("POST", "http://127.0.0.1:1/", strings.NewReader("x"))
		change(r)
		if _, err := d.RoundTrip(r); err == nil || err.Error() != "left to the other transport" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A body that is not as long as it says must not be followed by another request.
func TestDirectBodyLength(t *testing.T) {
	s := newRawServer(t, func(int, int) string { return "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na" })
	d := newDirect(t, TransportOptions{})
	for _, n := range []int64{2, 4} {
		r, _ := http.NewRequest("POST", "http://"+s.address+"/", io.NopCloser(strings.NewReader("abc")))
		r.ContentLength = n
		if _, err := d.RoundTrip(r); err == nil {
			t.Errorf("3 bytes as %d were sent", n)
		}
	}
	if len(d.hosts) != 0 {
		t.Errorf("left behind: %v", d.hosts)
	}
}

// The price of a call: the response with its fields, and what the context takes.
func TestDirectAllocations(t *testing.T) {
	s := newRawServer(t, func(int, int) string {
		return "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
	})
	c, err := net.Dial("tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	l := newLink(c)
	if n := testing.AllocsPerRun(100, func() {
		if !l.usable() {
			t.Fatal("not usable")
		}
	}); n > 0 {
		t.Errorf("looking at a connection: %v allocations", n)
	}
	r, _ := http.NewRequest("GET", "http://"+s.address+"/", nil)
	buf := make([]byte, 0, exchangeBuffer)
	if n := testing.AllocsPerRun(100, func() { buf = appendRequest(buf[:0], r) }); n > 0 || len(buf) == 0 {
		t.Errorf("rendering a head of %d bytes: %v allocations", len(buf), n)
	}
	d := newDirect(t, TransportOptions{})
	body := make([]byte, 64)
	// The response with its header, the text its fields are cut from and their list, and the
	// hold of the context.
	const most = 12
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r = r.WithContext(ctx)
	fixed := &fixedConn{answer: "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"}
	d.dial = func(context.Context, string, string) (net.Conn, error) { return fixed, nil }
	if n := testing.AllocsPerRun(100, func() {
		resp, err := d.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := resp.Body.Read(body); n != 2 || err != io.EOF {
			t.Fatal(n, err)
		}
	}); n > most {
		t.Errorf("a call: %v allocations, want at most %d", n, most)
	}
}

// fixedConn answers every write with the same bytes.
type fixedConn struct {
	net.Conn // of which nothing else is used
	answer   string
	rest     string
	past     bool
}

func (c *fixedConn) Write(p []byte) (int, error) { c.rest = c.answer; return len(p), nil }
func (c *fixedConn) Close() error                { return nil }

func (c *fixedConn) Read(p []byte) (int, error) {
	if c.past {
		return 0, os.ErrDeadlineExceeded
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *fixedConn) SetReadDeadline(t time.Time) error { c.past = !t.IsZero(); return nil }

// What a loop borrows: connections that are quiet, places under the limit, and the end of a
// call it has begun.
func TestDirectLends(t *testing.T) {
	s := newRawServer(t, func(_, request int) string {
		if request == 2 {
			return "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole"
		}
		return "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	})
	d := newDirect(t, TransportOptions{MaxPerHost: 2})
	ask := func() {
		t.Helper()
		r, err := http.NewRequest("GET", "http://"+s.address, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := d.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Fatal(err)
		}
	}
	if d.Take(s.address) != nil {
		t.Fatal("a connection nobody has made")
	}
	ask()
	c := d.Take(s.address)
	if c == nil || d.Take(s.address) != nil {
		t.Fatal("want one idle connection, once")
	}
	for i := range 3 {
		if d.Reserve(s.address) != (i < 2) {
			t.Fatal("want two places")
		}
	}
	d.Release(s.address)

	// The loop sends on c, reads a part, and gives the call back.
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	head := make([]byte, 20)
	if _, err := io.ReadFull(c, head); err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequest("GET", "http://"+s.address, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := d.Resume(r, s.address, c, head, true)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "whole" {
		t.Fatalf("%q, %v", body, err)
	}
	ask() // the connection is kept
	if n := s.conns.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}

	// A connection that was closed meanwhile is not lent, and one whose call is lost gives
	// its place back.
	if c = d.Take(s.address); c == nil || !d.Reserve(s.address) {
		t.Fatal("no connection or no place")
	}
	c.Close()
	if _, err := d.Resume(r, s.address, c, nil, true); err == nil {
		t.Fatal("an answer on a closed connection")
	}
	for range 2 {
		if !d.Reserve(s.address) {
			t.Error("the place is not given back")
		}
	}
	for range 2 {
		d.Release(s.address)
	}
	if len(d.hosts) != 0 {
		t.Errorf("%d addresses are remembered", len(d.hosts))
	}
}
