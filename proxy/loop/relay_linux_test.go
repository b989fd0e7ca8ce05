package loop

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// testRelay passes every POST of /relay to one server as it is.
type testRelay struct {
	server       string
	small        bool // socket buffers that hold little
	panics       string
	takes, gone  atomic.Int64
	resumed      atomic.Int64
	sentPartly   atomic.Bool
	mu           sync.Mutex
	resumedReads []string
}

type testCall struct{ r *testRelay }

func (r *testRelay) panicAt(place string) {
	if r.panics == place {
		panic("test: " + place)
	}
}

func (r *testRelay) Wants(q *http1.Request) bool { return string(q.Path()) == "/relay" }

func (r *testRelay) Route(*http1.Request, []byte) Call {
	r.panicAt("Route")
	return &testCall{r}
}

func (r *testRelay) Take(address string) *net.TCPConn {
	r.takes.Add(1)
	c, err := net.Dial("tcp", address)
	if err != nil {
		return nil
	}
	if r.small {
		_ = c.(*net.TCPConn).SetWriteBuffer(4 << 10)
	}
	return c.(*net.TCPConn)
}

func (c *testCall) Address() string { return c.r.server }

func (c *testCall) Start(_ *http1.Request, body, dst []byte) ([]byte, time.Duration, bool) {
	c.r.panicAt("Start")
	dst = append(dst, "POST / HTTP/1.1\r\nHost: s\r\n"...)
	dst = http1.AppendLength(dst, int64(len(body)))
	return append(append(dst, "\r\n"...), body...), time.Minute, true
}

func (c *testCall) Fits(a *http1.Answer) bool {
	c.r.panicAt("Fits")
	return a.Status() == 200
}

func (c *testCall) Finish(_ *http1.Answer, content, dst, date []byte, closing bool) []byte {
	c.r.panicAt("Finish")
	dst = http1.AppendStatus(dst, 200)
	if closing {
		dst = append(dst, "Connection: close\r\n"...)
	}
	dst = http1.AppendDate(http1.AppendLength(dst, int64(len(content))), date)
	return append(append(dst, "\r\n"...), content...)
}

// Streams: answers that say so are passed on line by line.
func (c *testCall) Streams(a *http1.Answer) (time.Duration, bool) {
	c.r.panicAt("Streams")
	for i := range a.Len() {
		if name, value := a.Field(i); string(name) == "X-Stream" {
			return time.Minute, string(value) == "yes"
		}
	}
	return 0, false
}

func (c *testCall) Pass(a *http1.Answer, content []byte, ended bool, dst, _ []byte, closing bool) ([]byte, int, Verdict) {
	c.r.panicAt("Pass")
	used, v := bytes.LastIndexByte(content, '\n')+1, StreamGoesOn
	if i := bytes.Index(content, []byte("give up\n")); i >= 0 {
		used, v = i, StreamResumes
	}
	switch {
	case ended && v == StreamGoesOn && used == len(content):
		v = StreamEnds
	case ended:
		v = StreamResumes
	}
	if used == 0 && v != StreamEnds || bytes.HasPrefix(content, []byte("hold")) && v != StreamEnds {
		return dst, 0, v
	}
	if a != nil {
		dst = append(http1.AppendStatus(dst, 200), "Transfer-Encoding: chunked\r\n"...)
		if closing {
			dst = append(dst, "Connection: close\r\n"...)
		}
		dst = append(dst, "\r\n"...)
	}
	if used > 0 {
		dst = append(append(http1.AppendChunkSize(dst, used), content[:used]...), "\r\n"...)
	}
	if v == StreamEnds {
		dst = append(dst, "0\r\n\r\n"...)
	}
	return dst, used, v
}

func (c *testCall) Gone() { c.r.gone.Add(1) }

func (c *testCall) Resume(w http.ResponseWriter, r *http.Request, p Progress) {
	c.r.resumed.Add(1)
	c.r.mu.Lock()
	c.r.resumedReads = append(c.r.resumedReads, string(p.Read))
	c.r.mu.Unlock()
	if !p.Sent {
		c.r.sentPartly.Store(true)
	}
	if p.Conn != nil {
		defer p.Conn.Close()
	}
	body, _ := io.ReadAll(r.Body)
	if p.Passed {
		http.NewResponseController(w).Flush()
		fmt.Fprintf(w, "resumed %d after %q", len(body), p.Content)
		return
	}
	fmt.Fprintf(w, "resumed %d conn=%v", len(body), p.Conn != nil)
}

// relayServer serves r's calls until the end of the test, or until cancel.
func relayServer(t *testing.T, r *testRelay, grace time.Duration) (s *Server, address string, cancel context.CancelFunc, ended chan error) {
	t.Helper()
	s, err := New(Options{Relay: r, Loops: 1, Grace: grace, Slow: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "slow %s %s", r.URL.Path, body)
	})})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended = make(chan error, 1)
	go func() { ended <- s.Run(ctx, l); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	return s, l.Addr().String(), cancel, ended
}

// answerer serves connections one after the other.
func answerer(t *testing.T, serve func(n int, c net.Conn, br *bufio.Reader)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { defer c.Close(); serve(n, c, bufio.NewReader(c)) })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

// echo answers requests with their bodies until the connection ends.
func echo(_ int, c net.Conn, br *bufio.Reader) {
	for {
		r, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
}

func relayRequest(body string) string {
	return fmt.Sprintf("POST /relay HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

// dialRelay connects a client that fails the test rather than wait for ever.
func dialRelay(t *testing.T, address string) (net.Conn, *bufio.Reader) {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	return c, bufio.NewReader(c)
}

func readBody(t *testing.T, br *bufio.Reader) string {
	t.Helper()
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// Requests sent at once are answered in their order, whoever serves them, and a connection
// to the server carries one after the other.
func TestRelayPipelined(t *testing.T) {
	r := &testRelay{server: answerer(t, echo)}
	s, address, _, _ := relayServer(t, r, time.Second)
	c, br := dialRelay(t, address)
	io.WriteString(c, relayRequest("one")+relayRequest("two")+"GET /other HTTP/1.1\r\nHost: h\r\n\r\n"+relayRequest("three")+strings.Replace(relayRequest("four"), "/relay", "/slow", 1)+relayRequest("five"))
	for _, want := range []string{"one", "two", "slow /other ", "three", "slow /slow four", "five"} {
		if got := readBody(t, br); got != want {
			t.Fatalf("%q, want %q", got, want)
		}
	}
	if n := s.Counts(); n.Relayed != 4 || n.Slow != 2 || r.takes.Load() != 1 {
		t.Errorf("%+v, %d connections", n, r.takes.Load())
	}
}

// What a server sends without being asked never becomes the answer to the next request.
func TestRelayUnaskedAnswer(t *testing.T) {
	unasked := make(chan struct{})
	r := &testRelay{server: answerer(t, func(n int, c net.Conn, br *bufio.Reader) {
		if n > 0 {
			echo(n, c, br)
			return
		}
		if _, err := http.ReadRequest(br); err != nil {
			return
		}
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		<-unasked
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstolen")
		_, _ = io.Copy(io.Discard, br) // until the loop closes it
		unasked <- struct{}{}
	})}
	_, address, _, _ := relayServer(t, r, time.Second)
	c, br := dialRelay(t, address)
	io.WriteString(c, relayRequest("x"))
	if got := readBody(t, br); got != "ok" {
		t.Fatal(got)
	}
	unasked <- struct{}{}
	<-unasked
	io.WriteString(c, relayRequest("mine"))
	if got := readBody(t, br); got != "mine" {
		t.Fatalf("%q", got)
	}
}

// A request larger than the server's socket takes at once goes out in pieces; an answer
// that comes before its end is passed on, and the connection not used again.
func TestRelayLargeRequest(t *testing.T) {
	body := strings.Repeat("b", maxRelayBody)
	early := make(chan struct{}, 1)
	r := &testRelay{small: true, server: answerer(t, func(n int, c net.Conn, br *bufio.Reader) {
		_ = c.(*net.TCPConn).SetReadBuffer(4 << 10)
		if n == 0 {
			req, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			got, _ := io.ReadAll(req.Body)
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(got), got)
			return
		}
		if _, err := http.ReadRequest(br); err != nil { // the head only
			return
		}
		io.WriteString(c, "HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n")
		<-early
	})}
	_, address, _, _ := relayServer(t, r, time.Second)
	c, br := dialRelay(t, address)
	io.WriteString(c, relayRequest(body))
	if got := readBody(t, br); got != body {
		t.Fatalf("%d bytes", len(got))
	}
	io.WriteString(c, relayRequest(body))
	if got := readBody(t, br); got != fmt.Sprintf("resumed %d conn=true", len(body)) {
		t.Fatalf("%.100q", got)
	}
	early <- struct{}{}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !strings.HasPrefix(r.resumedReads[0], "HTTP/1.1 413") {
		t.Errorf("%q was read", r.resumedReads[0])
	}
}

// A panic in the relay's code costs the connection, not the process.
func TestRelayPanics(t *testing.T) {
	for _, place := range []string{"Route", "Start", "Fits", "Finish"} {
		r := &testRelay{server: answerer(t, echo), panics: place}
		s, address, _, _ := relayServer(t, r, time.Second)
		c, br := dialRelay(t, address)
		io.WriteString(c, relayRequest("x"))
		if _, err := br.ReadByte(); err != io.EOF {
			t.Errorf("%s: %v, want the end of the connection", place, err)
		}
		if n := s.Counts().Panics; n != 1 {
			t.Errorf("%s: %d panics counted", place, n)
		}
		c, br = dialRelay(t, address)
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		if got := readBody(t, br); got != "slow / " {
			t.Errorf("%s: %q", place, got)
		}
	}
}

// A call in flight when the server is told to end is answered, with the announcement that
// the connection closes; one that lasts longer than the grace is ended.
func TestRelayDrains(t *testing.T) {
	for _, finishes := range []bool{true, false} {
		arrived, release := make(chan struct{}), make(chan struct{})
		r := &testRelay{server: answerer(t, func(_ int, c net.Conn, br *bufio.Reader) {
			if _, err := http.ReadRequest(br); err != nil {
				return
			}
			close(arrived)
			if finishes {
				<-release
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate")
				return
			}
			_, _ = io.Copy(io.Discard, br) // the loop closes it
			close(release)
		})}
		grace := time.Minute
		if !finishes {
			grace = 50 * time.Millisecond
		}
		s, address, cancel, ended := relayServer(t, r, grace)
		c, br := dialRelay(t, address)
		io.WriteString(c, relayRequest(""))
		readBody(t, br) // without a body it is Slow's
		io.WriteString(c, relayRequest("x"))
		<-arrived
		cancel()
		if !finishes {
			<-release
			if err := <-ended; err != nil {
				t.Error(err)
			}
			if r.gone.Load() != 1 || s.Counts().Open != 0 {
				t.Errorf("%d calls were ended, %d connections are open", r.gone.Load(), s.Counts().Open)
			}
			continue
		}
		for !s.draining.Load() {
			<-time.NewTimer(time.Millisecond).C
		}
		close(release)
		resp, err := http.ReadResponse(br, nil)
		if err != nil || !resp.Close {
			t.Fatal(resp, err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// A server that closes a kept connection before it answers costs no request: the handler
// may send it again. A client that leaves ends its call.
func TestRelayLost(t *testing.T) {
	r := &testRelay{server: answerer(t, func(_ int, c net.Conn, br *bufio.Reader) {
		_, _ = http.ReadRequest(br)
	})}
	_, address, _, _ := relayServer(t, r, time.Second)
	c, br := dialRelay(t, address)
	io.WriteString(c, relayRequest("xyz"))
	if got := readBody(t, br); got != "resumed 3 conn=false" {
		t.Fatalf("%q", got)
	}
	arrived, closed := make(chan struct{}), make(chan struct{})
	r = &testRelay{server: answerer(t, func(_ int, c net.Conn, br *bufio.Reader) {
		_, _ = http.ReadRequest(br)
		close(arrived)
		_, _ = io.Copy(io.Discard, br)
		close(closed)
	})}
	_, address, _, _ = relayServer(t, r, time.Second)
	c, _ = dialRelay(t, address)
	io.WriteString(c, relayRequest("x"))
	<-arrived
	c.Close()
	<-closed
	for r.gone.Load() == 0 { // the connection is cut first
		<-time.NewTimer(time.Millisecond).C
	}
}

// A client that half-closes while a worker has its connection is told of once, by an edge
// that the worker sees. A call it had sent before that is not begun by the loop, which
// would never hear that nobody waits for it.
func TestRelayLeftMeanwhile(t *testing.T) {
	begun := make(chan struct{}, 1)
	r := &testRelay{server: answerer(t, func(_ int, c net.Conn, br *bufio.Reader) {
		_, _ = http.ReadRequest(br)
		begun <- struct{}{}
		_, _ = io.Copy(io.Discard, br)
	})}
	ended := make(chan struct{})
	s, err := New(Options{Relay: r, Loops: 1, Slow: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			w.Header().Set("Content-Length", "2")
			io.WriteString(w, "ok")
			http.NewResponseController(w).Flush()
			<-r.Context().Done() // the loop has seen the client half-close
			return
		}
		_, _ = io.ReadAll(r.Body)
		<-r.Context().Done()
		close(ended)
	})})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan error, 1)
	go func() { over <- s.Run(ctx, l) }()
	t.Cleanup(func() { cancel(); <-over })
	c, br := dialRelay(t, l.Addr().String())
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: h\r\n\r\n")
	if got := readBody(t, br); got != "ok" {
		t.Fatalf("%q", got)
	}
	io.WriteString(c, relayRequest("x"))
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-begun:
		t.Error("the loop began a call for a client that had left")
	case <-time.NewTimer(time.Minute).C:
		t.Error("the call did not end")
	}
}
