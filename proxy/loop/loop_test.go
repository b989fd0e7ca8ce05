package loop

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// echoFast answers GET and HEAD /fast/… with the target as body.
func echoFast(req *http1.Request, dst []byte) ([]byte, bool) {
	if !bytes.HasPrefix(req.Path(), []byte("/fast/")) {
		return append(dst, "dropped when declining"...), false
	}
	dst = http1.AppendHead(dst, 200, "text/plain", int64(len(req.Target())), req.Date)
	if string(req.Method()) != "HEAD" {
		dst = append(dst, req.Target()...)
	}
	return dst, true
}

// echoSlow answers with the target, a newline and the request body.
var echoSlow = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	w.Header().Set("Content-Type", "text/plain")
	fmt.Fprintf(w, "%s\n%s", r.RequestURI, body)
})

// server is a running Server and where it listens.
type server struct {
	*Server
	network, addr string
	stop          context.CancelFunc
	done          chan error
}

// kinds are the listeners every behaviour is tested over: the event loop on TCP and on
// Unix sockets, and goroutine-per-connection (a wrapped listener hides its descriptor).
var kinds = []string{"tcp", "unix", "goroutines"}

func start(t testing.TB, kind string, o Options) *server {
	t.Helper()
	if o.Slow == nil {
		o.Slow = echoSlow
	}
	if o.Fast == nil {
		o.Fast = echoFast
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	network, addr := "tcp", "127.0.0.1:0"
	if kind == "unix" {
		network, addr = "unix", filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	srv := &server{Server: s, network: network, addr: l.Addr().String(), done: make(chan error, 1)}
	if kind == "goroutines" {
		l = struct{ net.Listener }{l}
	}
	ctx, cancel := context.WithCancel(t.Context())
	srv.stop = cancel
	go func() { srv.done <- s.Run(ctx, l) }()
	t.Cleanup(func() { srv.wait(t) })
	return srv
}

// wait stops the server and waits for the end of Run.
func (s *server) wait(t testing.TB) {
	s.stop()
	select {
	case err := <-s.done:
		s.done <- err
		if err != nil {
			t.Errorf("Run: %v", err)
		}
	case <-time.NewTimer(time.Minute).C:
		buf := make([]byte, 1<<20)
		t.Fatalf("Run does not end:\n%s", buf[:runtime.Stack(buf, true)])
	}
}

// raw is a client that decides about every byte.
type raw struct {
	net.Conn
	t testing.TB
	r *bufio.Reader
}

func (s *server) dial(t testing.TB) *raw {
	t.Helper()
	c, err := net.Dial(s.network, s.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	return &raw{c, t, bufio.NewReader(c)}
}

func (c *raw) send(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		c.t.Fatal(err)
	}
}

// reply reads one answer to a request of the method.
func (c *raw) reply(method string) (*http.Response, string) {
	c.t.Helper()
	resp, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		c.t.Fatalf("read answer: %v", err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatalf("read body: %v", err)
	}
	return resp, string(body)
}

func (c *raw) want(method string, status int, body string) *http.Response {
	c.t.Helper()
	resp, got := c.reply(method)
	if resp.StatusCode != status || body != "*" && got != body {
		c.t.Fatalf("got %d %.200q, want %d %q", resp.StatusCode, got, status, body)
	}
	return resp
}

// ends demands that nothing more comes, and then the end.
func (c *raw) ends() {
	c.t.Helper()
	if b, err := io.ReadAll(c.r); len(b) > 0 || err != nil && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") {
		c.t.Fatalf("want the end, got %.100q, %v", b, err)
	}
}

func each(t *testing.T, o func() Options, f func(t *testing.T, s *server)) {
	for _, k := range kinds {
		t.Run(k, func(t *testing.T) { f(t, start(t, k, o())) })
	}
}

func plain() Options { return Options{} }

func get(target string) string { return "GET " + target + " HTTP/1.1\r\nHost: a\r\n\r\n" }

func post(target, body string) string {
	return "POST " + target + " HTTP/1.1\r\nHost: a\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n" + body
}

// TestRawExchanges is what single connections do, byte by byte.
func TestRawExchanges(t *testing.T) {
	each(t, plain, func(t *testing.T, s *server) {
		t.Run("one byte at a time", func(t *testing.T) {
			c := s.dial(t)
			for _, b := range get("/fast/a") + post("/slow/b", "hello") + get("/fast/c") {
				c.send(string(b))
			}
			c.want("GET", 200, "/fast/a")
			c.want("POST", 200, "/slow/b\nhello")
			c.want("GET", 200, "/fast/c")
		})
		t.Run("hundred pipelined", func(t *testing.T) {
			c := s.dial(t)
			var all strings.Builder
			for i := range 100 {
				all.WriteString(get(fmt.Sprintf("/fast/%d", i)))
			}
			c.send(all.String())
			for i := range 100 {
				c.want("GET", 200, fmt.Sprintf("/fast/%d", i))
			}
		})
		t.Run("pipelined, fast and slow in turn", func(t *testing.T) {
			c := s.dial(t)
			var all strings.Builder
			for i := range 60 {
				all.WriteString(get(fmt.Sprintf("/fast/%d", i)) + get(fmt.Sprintf("/slow/%d", i)) + post(fmt.Sprintf("/slow/p%d", i), "xyz"))
			}
			c.send(all.String())
			for i := range 60 {
				c.want("GET", 200, fmt.Sprintf("/fast/%d", i))
				c.want("GET", 200, fmt.Sprintf("/slow/%d\n", i))
				c.want("POST", 200, fmt.Sprintf("/slow/p%d\nxyz", i))
			}
		})
		t.Run("half-close after a hit", func(t *testing.T) {
			c := s.dial(t)
			c.send(get("/fast/a") + get("/fast/b"))
			_ = c.Conn.(interface{ CloseWrite() error }).CloseWrite()
			c.want("GET", 200, "/fast/a")
			c.want("GET", 200, "/fast/b")
			c.ends()
		})
		t.Run("half-close after a miss", func(t *testing.T) {
			c := s.dial(t)
			c.send(post("/slow/a", "b"))
			_ = c.Conn.(interface{ CloseWrite() error }).CloseWrite()
			c.want("POST", 200, "/slow/a\nb")
			c.ends()
		})
		t.Run("close within a head", func(t *testing.T) {
			c := s.dial(t)
			c.send("GET / HT")
			c.Close()
		})
		t.Run("close within a body", func(t *testing.T) {
			c := s.dial(t)
			c.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nabc")
			c.Close()
		})
		t.Run("Connection: close", func(t *testing.T) {
			for _, target := range []string{"/fast/a", "/slow/a"} {
				c := s.dial(t)
				c.send("GET " + target + " HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
				c.want("GET", 200, "*")
				c.ends()
			}
		})
		t.Run("HTTP/1.0", func(t *testing.T) {
			c := s.dial(t)
			c.send("GET /fast/a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
			if r := c.want("GET", 200, "/fast/a\n"); r.Header.Get("Connection") != "keep-alive" {
				t.Errorf("answer %v", r.Header)
			}
			c.send("GET /slow/b HTTP/1.0\r\n\r\n")
			c.want("GET", 200, "/slow/b\n")
			c.ends()
		})
		t.Run("HEAD", func(t *testing.T) {
			c := s.dial(t)
			c.send("HEAD /fast/a HTTP/1.1\r\nHost: a\r\n\r\nHEAD /slow/b HTTP/1.1\r\nHost: a\r\n\r\n")
			c.want("HEAD", 200, "")
			if r := c.want("HEAD", 200, ""); r.ContentLength != 8 {
				t.Errorf("length %d, want 8", r.ContentLength)
			}
		})
		t.Run("chunked body with trailer", func(t *testing.T) {
			c := s.dial(t)
			c.send("POST /slow/a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nX-Sum: 1\r\n\r\n" + get("/fast/b"))
			c.want("POST", 200, "/slow/a\nabcde")
			c.want("GET", 200, "/fast/b")
		})
		t.Run("chunk abuse", func(t *testing.T) {
			for _, bad := range []string{"3\nabc\r\n0\r\n\r\n", "0x3\r\nabc\r\n0\r\n\r\n", "3\r\nabcd\r\n0\r\n\r\n", "ffffffffffffffffff\r\n", "0\r\nContent-Length: 4\r\n\r\n", "1;" + strings.Repeat("a", 5000)} {
				c := s.dial(t)
				c.send("POST /slow/a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + bad + get("/fast/smuggled"))
				c.want("POST", 400, "*")
				c.ends()
			}
		})
		t.Run("empty lines before a request", func(t *testing.T) {
			c := s.dial(t)
			c.send("\r\n" + get("/fast/a") + "\r\n\r\n" + post("/slow/b", "c") + "\r\n" + get("/slow/d"))
			c.want("GET", 200, "/fast/a")
			c.want("POST", 200, "/slow/b\nc")
			c.want("GET", 200, "/slow/d\n")
			for _, piece := range []string{"\r", "\n", "\r\n\r", "\nGE", "T /fast/e HTTP/1.1\r\nHost: a\r\n\r\n"} {
				c.send(piece)
			}
			c.want("GET", 200, "/fast/e")
			c.send("\n" + get("/fast/smuggled")) // a line is CRLF
			c.want("GET", 400, "*")
			c.ends()
		})
		t.Run("refusals", func(t *testing.T) {
			for head, status := range map[string]int{
				"GET / HTTP/1.1\r\n\r\n":                         400,
				"GET / HTTP/1.1\nHost: a\n\n":                    400,
				"GET / HTTP/3.0\r\nHost: a\r\n\r\n":              505,
				"GET / HTTP/1.1\r\nHost: a\r\nExpect: x\r\n\r\n": 417,
				"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n": 400,
				"GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("y", 70000) + "\r\n\r\n":            431,
				"\x01\x02\x03": 400,
			} {
				c := s.dial(t)
				c.send(get("/fast/before") + head + get("/fast/smuggled") + strings.Repeat("z", 10000))
				c.want("GET", 200, "/fast/before")
				c.want("GET", status, "*")
				c.ends()
			}
		})
		t.Run("large answers", func(t *testing.T) {
			c := s.dial(t)
			big := strings.Repeat("0123456789abcdef", 1<<16)
			go io.WriteString(c, post("/slow/a", big)+get("/fast/b"))
			c.want("POST", 200, "/slow/a\n"+big)
			c.want("GET", 200, "/fast/b")
		})
		if c := s.Counts(); c.Panics != 0 || c.Fast == 0 || c.Slow == 0 || c.Refused == 0 {
			t.Errorf("counts %+v", c)
		}
	})
}

// TestSlowReader: a client that pipelines and does not read is not read from either, and
// gets everything once it reads.
func TestSlowReader(t *testing.T) {
	const size, n = 32 << 10, 400
	body := strings.Repeat("x", size)
	var served atomic.Int64
	o := func() Options {
		served.Store(0)
		return Options{Fast: func(req *http1.Request, dst []byte) ([]byte, bool) {
			served.Add(1)
			return append(http1.AppendHead(dst, 200, "", size, nil), body...), true
		}}
	}
	each(t, o, func(t *testing.T, s *server) {
		c := s.dial(t)
		sent := make(chan struct{})
		go func() { defer close(sent); io.WriteString(c, strings.Repeat(get("/"+strings.Repeat("y", 1000)), n)) }()
		c.want("GET", 200, body)
		// Sockets hold some megabytes; far from all can have been served by now.
		if got := served.Load(); got == n {
			t.Errorf("%d answers of %d bytes were made for a client that read one", got, size)
		}
		for range n - 1 {
			c.want("GET", 200, body)
		}
		<-sent
	})
}

// TestTimeouts: each kind of waiting ends.
func TestTimeouts(t *testing.T) {
	o := func() Options {
		// Long enough for a client on a busy machine to say what it wants to in time.
		return Options{HeaderTimeout: time.Second, IdleTimeout: 1500 * time.Millisecond,
			BodyTimeout: time.Second, WriteTimeout: 700 * time.Millisecond,
			Fast: func(req *http1.Request, dst []byte) ([]byte, bool) {
				if string(req.Path()) != "/huge" {
					return nil, false
				}
				return append(http1.AppendHead(dst, 200, "", 32<<20, nil), make([]byte, 32<<20)...), true
			},
			Slow: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/stream" {
					for p := make([]byte, 1<<20); ; {
						if _, err := w.Write(p); err != nil {
							return
						}
					}
				}
				if _, err := io.ReadAll(r.Body); err != nil {
					http.Error(w, err.Error(), http.StatusRequestTimeout)
				}
			})}
	}
	each(t, o, func(t *testing.T, s *server) {
		t.Parallel()
		t.Run("reader that stalls", func(t *testing.T) {
			for _, target := range []string{"/huge", "/stream"} {
				before := s.Counts().Open
				c := s.dial(t)
				c.send(get(target))
				eventually(t, "the connection is closed", func() bool { return s.Counts().Open <= before && s.Counts().Accepted > 0 })
				_ = c
			}
		})
		t.Run("slow header", func(t *testing.T) { // a byte now and then does not extend it
			t.Parallel()
			begin := time.Now()
			c := s.dial(t)
			c.send("GET / HTTP/1.1\r\n")
			for {
				if _, err := c.Write([]byte("x")); err != nil {
					break
				}
				_ = c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
				if _, err := c.r.ReadByte(); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
					break
				}
			}
			if d := time.Since(begin); d < 900*time.Millisecond || d > time.Minute {
				t.Errorf("closed after %v", d)
			}
		})
		t.Run("idle", func(t *testing.T) {
			t.Parallel()
			s.dial(t).ends()
			c := s.dial(t)
			c.send(post("/", "x"))
			c.want("POST", 200, "")
			c.ends()
		})
		t.Run("slow body", func(t *testing.T) {
			t.Parallel()
			c := s.dial(t)
			c.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab")
			c.want("POST", 408, "*")
			c.ends()
		})
	})
}

// eventually polls for something another goroutine or process does.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(time.Minute); !ok(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// TestNetHTTPClient: an unmodified client over many connections and requests.
func TestNetHTTPClient(t *testing.T) {
	each(t, plain, func(t *testing.T, s *server) {
		tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, s.network, s.addr)
		}, MaxIdleConnsPerHost: 8}
		defer tr.CloseIdleConnections()
		c := &http.Client{Transport: tr}
		var wg sync.WaitGroup
		var dials atomic.Int64
		for w := range 8 {
			wg.Go(func() {
				for i := range 100 {
					target, body := fmt.Sprintf("/fast/%d/%d", w, i), ""
					if i%3 == 1 {
						target, body = fmt.Sprintf("/slow/%d/%d", w, i), strings.Repeat("b", i*50)
					}
					ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(g httptrace.GotConnInfo) {
						if !g.Reused {
							dials.Add(1)
						}
					}})
					method, want := "GET", target
					var rd io.Reader
					if i%3 == 1 {
						method, want = "POST", target+"\n"+body
						rd = struct{ io.Reader }{strings.NewReader(body)} // unknown length: chunked
					}
					req, err := http.NewRequestWithContext(ctx, method, "http://sidecar"+target, rd)
					if err != nil {
						t.Error(err)
						return
					}
					resp, err := c.Do(req)
					if err != nil {
						t.Error(err)
						return
					}
					got, err := io.ReadAll(resp.Body)
					resp.Body.Close()
					if err != nil || string(got) != want {
						t.Errorf("%s: got %.100q, %v", target, got, err)
					}
				}
			})
		}
		wg.Wait()
		if n := dials.Load(); n > 16 {
			t.Errorf("%d connections for 8 workers: they are not kept", n)
		}
	})
}

func TestCurl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("curl is not installed")
	}
	s := start(t, "tcp", Options{})
	url := "http://" + s.addr
	big := strings.Repeat("data", 5000) // above 1024 bytes curl sends Expect: 100-continue
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{url + "/fast/a", url + "/slow/b", url + "/fast/c"}, "/fast/a/slow/b\n/fast/c"},
		{[]string{"-d", big, "-H", "Expect: 100-continue", url + "/slow/x"}, "/slow/x\n" + big},
		{[]string{"-T", "-", url + "/slow/y"}, "/slow/y\nfrom stdin"},
		{[]string{"--http1.0", url + "/fast/z"}, "/fast/z\n"},
		{[]string{"-x", url, "http://example.com/slow/proxied"}, "http://example.com/slow/proxied\n"},
	} {
		cmd := exec.Command(curl, append([]string{"-sS", "--max-time", "60", "--noproxy", ""}, c.args...)...)
		cmd.Stdin = strings.NewReader("from stdin")
		out, err := cmd.CombinedOutput()
		if err != nil || string(out) != c.want {
			t.Errorf("curl %.80q: %.200q, %v", c.args, out, err)
		}
	}
}

// TestHandlerFeatures: what handlers rely on.
func TestHandlerFeatures(t *testing.T) {
	gone := make(chan struct{}, 1)
	var logs bytes.Buffer
	mux := http.NewServeMux()
	mux.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		for i := range 3 {
			fmt.Fprintf(w, "event %d\n", i)
			if err := http.NewResponseController(w).Flush(); err != nil {
				t.Error(err)
			}
			<-r.Context().Value(stepKey{}).(chan struct{})
		}
	})
	mux.HandleFunc("/trailers", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		io.Copy(w, r.Body)
		w.Header().Set("X-Sum", "got "+r.Trailer.Get("X-Sum"))
		w.Header().Set(http.TrailerPrefix+"X-Late", "late")
	})
	mux.HandleFunc("/panic", func(http.ResponseWriter, *http.Request) { panic("boom") })
	mux.HandleFunc("/abort", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "begun")
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	mux.HandleFunc("/goexit", func(http.ResponseWriter, *http.Request) { runtime.Goexit() })
	mux.HandleFunc("/empty", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(204) })
	mux.HandleFunc("/hints", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</a>")
		w.WriteHeader(103)
		io.WriteString(w, "<html>")
	})
	mux.HandleFunc("/lengths", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "3")
		if _, err := io.WriteString(w, "toolong"); !errors.Is(err, http.ErrContentLength) {
			t.Errorf("too much content: %v", err)
		}
		io.WriteString(w, "ab") // and one byte too few: the connection must close
	})
	mux.HandleFunc("/wait", func(w http.ResponseWriter, r *http.Request) {
		<-r.Context().Done()
		gone <- struct{}{}
	})
	mux.HandleFunc("/deadline", func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		if err := errors.Join(rc.EnableFullDuplex(), rc.SetWriteDeadline(time.Now().Add(time.Minute)), rc.SetReadDeadline(time.Now().Add(30*time.Millisecond))); err != nil {
			t.Error(err)
		}
		_, err := io.ReadAll(r.Body)
		fmt.Fprint(w, errors.Is(err, os.ErrDeadlineExceeded))
	})
	mux.HandleFunc("/ignore", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ignored") })
	mux.HandleFunc("/upgrade", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%q %q %q", r.Header["Upgrade"], r.Header["Http2-Settings"], r.Header["Connection"])
	})
	mux.HandleFunc("/hijack", func(w http.ResponseWriter, r *http.Request) {
		c, brw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		if _, err := w.Write([]byte("x")); err != http.ErrHijacked {
			t.Errorf("write after hijack: %v", err)
		}
		line, _ := brw.ReadString('\n')
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"+line)
		for { // echo lines until the client closes
			line, err := brw.ReadString('\n')
			if err != nil {
				return
			}
			io.WriteString(c, "echo "+line)
		}
	})
	step := make(chan struct{})
	o := func() Options {
		logs.Reset()
		return Options{Logger: slog.New(slog.NewTextHandler(&logs, nil)), Slow: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mux.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), stepKey{}, step)))
		})}
	}
	each(t, o, func(t *testing.T, s *server) {
		t.Run("flush", func(t *testing.T) {
			c := s.dial(t)
			c.send(get("/stream"))
			resp, err := http.ReadResponse(c.r, nil)
			if err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewReader(resp.Body)
			for i := range 3 {
				if l, err := lines.ReadString('\n'); err != nil || l != fmt.Sprintf("event %d\n", i) {
					t.Fatalf("event %d: %q, %v", i, l, err)
				}
				step <- struct{}{} // the handler writes on only after this was read
			}
			if rest, err := io.ReadAll(lines); err != nil || len(rest) > 0 {
				t.Errorf("%q, %v", rest, err)
			}
			c.send(get("/fast/after"))
			c.want("GET", 200, "/fast/after")
		})
		t.Run("trailers both ways", func(t *testing.T) {
			c := s.dial(t)
			c.send("POST /trailers HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n1\r\nx\r\n0\r\nX-Sum: 7\r\n\r\n")
			if r := c.want("POST", 200, "x"); r.Trailer.Get("X-Sum") != "got 7" || r.Trailer.Get("X-Late") != "late" {
				t.Errorf("trailers %v", r.Trailer)
			}
		})
		t.Run("panic, abort and Goexit", func(t *testing.T) {
			for _, p := range []string{"/panic", "/goexit"} {
				c := s.dial(t)
				c.send(get(p))
				c.ends()
			}
			c := s.dial(t)
			c.send(get("/abort"))
			resp, err := http.ReadResponse(c.r, nil)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(resp.Body); string(b) != "begun" || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%q, %v", b, err)
			}
			if s.Counts().Panics != 1 {
				t.Errorf("%d panics counted", s.Counts().Panics)
			}
		})
		t.Run("no content and early hints", func(t *testing.T) {
			c := s.dial(t)
			c.send(get("/empty") + get("/hints"))
			if r := c.want("GET", 204, ""); len(r.Header["Content-Length"]) > 0 || r.Header.Get("Date") == "" {
				t.Errorf("header %v", r.Header)
			}
			if r := c.want("GET", 103, ""); r.Header.Get("Link") != "</a>" {
				t.Errorf("hints %v", r.Header)
			}
			if r := c.want("GET", 200, "<html>"); r.Header.Get("Content-Type") != "text/html; charset=utf-8" || r.ContentLength != 6 {
				t.Errorf("header %v", r.Header)
			}
		})
		t.Run("content length is kept to", func(t *testing.T) {
			c := s.dial(t)
			c.send(get("/lengths") + get("/fast/never"))
			resp, err := http.ReadResponse(c.r, nil)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(resp.Body); string(b) != "ab" || !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%q, %v", b, err)
			}
		})
		t.Run("client goes away", func(t *testing.T) {
			c := s.dial(t)
			c.send("POST /wait HTTP/1.1\r\nHost: a\r\n\r\n")
			eventually(t, "served", func() bool { return s.Counts().Open > 0 })
			c.Close()
			select {
			case <-gone:
			case <-time.NewTimer(time.Minute).C:
				t.Fatal("the request's context is not cancelled")
			}
		})
		t.Run("deadlines", func(t *testing.T) {
			c := s.dial(t)
			c.send("POST /deadline HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nab")
			c.want("POST", 200, "true")
			c.ends()
		})
		t.Run("unread body", func(t *testing.T) {
			c := s.dial(t)
			c.send(post("/ignore", strings.Repeat("x", 100_000)) + get("/fast/next"))
			c.want("POST", 200, "ignored")
			c.want("GET", 200, "/fast/next")
			c.send("POST /ignore HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
			if r := c.want("POST", 200, "ignored"); !r.Close {
				t.Error("the connection is kept though a megabyte is unread")
			}
		})
		t.Run("expect", func(t *testing.T) {
			c := s.dial(t)
			c.send("POST /trailers HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
			tp := textproto.NewReader(c.r)
			if l, err := tp.ReadLine(); err != nil || l != "HTTP/1.1 100 Continue" {
				t.Fatalf("%q, %v", l, err)
			}
			tp.ReadLine()
			c.send("ok")
			c.want("POST", 200, "ok")
			c.send("POST /ignore HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
			if r := c.want("POST", 200, "ignored"); !r.Close {
				t.Error("kept, though the client may or may not send its body")
			}
			c.ends()
		})
		t.Run("h2c upgrade is dropped", func(t *testing.T) {
			c := s.dial(t)
			c.send("GET /upgrade HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings, keep-alive\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n")
			c.want("GET", 200, `[] [] ["keep-alive"]`)
		})
		t.Run("hijack", func(t *testing.T) {
			c := s.dial(t)
			c.send("GET /hijack HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nearly\n")
			resp, err := http.ReadResponse(c.r, nil)
			if err != nil || resp.StatusCode != 101 {
				t.Fatal(resp, err)
			}
			for _, want := range []string{"early\n", "echo a\n", "echo b\n"} {
				if l, err := c.r.ReadString('\n'); err != nil || l != want {
					t.Fatalf("%q, %v; want %q", l, err, want)
				}
				switch want {
				case "early\n":
					c.send("a\n")
				case "echo a\n":
					c.send("b\n")
				}
			}
			c.Close()
		})
	})
}

type stepKey struct{}

func declineAll(_ *http1.Request, dst []byte) ([]byte, bool) { return dst, false }
