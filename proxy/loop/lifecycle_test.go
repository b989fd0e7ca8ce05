package loop

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

func TestNewWantsSlow(t *testing.T) {
	if _, err := New(Options{}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("got %v", err)
	}
}

// TestDrain: at the end of the context idle connections close, a request in flight is
// answered with Connection: close, and nothing runs afterwards.
func TestDrain(t *testing.T) {
	for _, k := range kinds {
		t.Run(k, func(t *testing.T) {
			before := runtime.NumGoroutine()
			entered, release := make(chan struct{}, 1), make(chan struct{})
			s := start(t, k, Options{Slow: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				entered <- struct{}{}
				<-release
				if r.Context().Err() != nil {
					t.Error("the context ended before the grace did")
				}
				io.WriteString(w, "late")
			})})
			idle, used, busy := s.dial(t), s.dial(t), s.dial(t)
			used.send(get("/fast/a"))
			used.want("GET", 200, "/fast/a")
			busy.send(get("/slow"))
			<-entered
			s.stop()
			idle.ends()
			used.ends()
			if c, err := net.Dial(s.network, s.addr); err == nil {
				c.Close()
				t.Error("the listener is open during the drain")
			}
			close(release)
			if r := busy.want("GET", 200, "late"); !r.Close {
				t.Error("the last answer does not announce the close")
			}
			busy.ends()
			s.wait(t)
			if c := s.Counts(); c.Open != 0 || c.Accepted != 3 {
				t.Errorf("counts %+v", c)
			}
			eventually(t, "every goroutine ends", func() bool { return runtime.NumGoroutine() <= before })
		})
	}
}

// TestGraceEnds: what does not finish within the grace is cut: a handler that waits for
// its context, one that reads, one that writes, a hijacked one, a half-sent head.
func TestGraceEnds(t *testing.T) {
	for _, k := range kinds {
		t.Run(k, func(t *testing.T) {
			before := runtime.NumGoroutine()
			var entered sync.WaitGroup
			entered.Add(4)
			s := start(t, k, Options{Grace: 50 * time.Millisecond, Slow: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				entered.Done()
				switch r.URL.Path {
				case "/wait":
					<-r.Context().Done()
				case "/read":
					io.Copy(io.Discard, r.Body)
				case "/write":
					for p := make([]byte, 1<<20); ; {
						if _, err := w.Write(p); err != nil {
							return
						}
					}
				case "/hijack":
					c, _, err := http.NewResponseController(w).Hijack()
					if err != nil {
						t.Error(err)
						return
					}
					defer c.Close()
					io.Copy(io.Discard, c)
				}
			})})
			half := s.dial(t)
			half.send("GET / HTTP/1.1\r\n")
			for _, p := range []string{"/wait", "/read", "/write", "/hijack"} {
				c := s.dial(t)
				c.send("POST " + p + " HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
			}
			entered.Wait()
			begin := time.Now()
			s.wait(t)
			if d := time.Since(begin); d < 40*time.Millisecond || d > time.Minute {
				t.Errorf("Run ended %v after its context, the grace is 50 ms", d)
			}
			eventually(t, "every goroutine ends", func() bool { return runtime.NumGoroutine() <= before })
		})
	}
}

// TestOther: what is no HTTP/1 goes away with every byte it sent.
func TestOther(t *testing.T) {
	const hello = "\x16\x03\x01\x02\x00hello"
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	o := func() Options {
		return Options{Other: func(c net.Conn, first []byte) { // echoes everything
			go func() { // the connection outlives the call
				defer c.Close()
				c.Write(first)
				io.Copy(c, c)
			}()
		}}
	}
	each(t, o, func(t *testing.T, s *server) {
		for _, first := range []string{hello, preface, "\x00\x01binary"} {
			for _, cut := range []int{1, 2, len(first)} {
				c := s.dial(t)
				c.send(first[:cut])
				c.send(first[cut:])
				c.send("and more")
				got := make([]byte, len(first)+8)
				if _, err := io.ReadFull(c.r, got); err != nil || string(got) != first+"and more" {
					t.Errorf("%q cut at %d: %q, %v", first, cut, got, err)
				}
				c.Close()
			}
		}
		if n := s.Counts().Other; n != 9 {
			t.Errorf("%d connections given away, want 9", n)
		}
		eventually(t, "all connections are accounted for", func() bool { return s.Counts().Open == 0 })
	})
}

// TestMaxConns: above the limit connections wait and are served when others close.
func TestMaxConns(t *testing.T) {
	each(t, func() Options { return Options{MaxConns: 2} }, func(t *testing.T, s *server) {
		a, b, c := s.dial(t), s.dial(t), s.dial(t)
		for _, x := range []*raw{a, b} {
			x.send(get("/fast/x"))
			x.want("GET", 200, "/fast/x")
		}
		c.send(get("/fast/c"))
		if n := s.Counts().Open; n != 2 {
			t.Errorf("%d connections open, the limit is 2", n)
		}
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if _, err := c.r.Peek(1); err == nil {
			t.Error("served above the limit")
		}
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		a.Close()
		c.want("GET", 200, "/fast/c")
	})
}

// TestFastPanics: one connection pays.
func TestFastPanics(t *testing.T) {
	s := start(t, "tcp", Options{Fast: func(req *http1.Request, dst []byte) ([]byte, bool) {
		if string(req.Path()) == "/panic" {
			panic("boom")
		}
		return echoFast(req, dst)
	}})
	other, c := s.dial(t), s.dial(t)
	c.send(get("/fast/a") + get("/slow/b")) // the worker's return path calls Fast too
	c.want("GET", 200, "/fast/a")
	c.want("GET", 200, "/slow/b\n")
	c.send(get("/slow/b") + get("/panic"))
	c.want("GET", 200, "/slow/b\n")
	c.ends()
	other.send(get("/fast/a"))
	other.want("GET", 200, "/fast/a")
	if n := s.Counts().Panics; n != 1 {
		t.Errorf("%d panics counted", n)
	}
}

// TestAlternation: many connections with requests of both kinds, some pipelined, sizes
// and pieces varied; each answer names its request, so a lost or swapped one shows.
func TestAlternation(t *testing.T) {
	for _, k := range kinds {
		t.Run(k, func(t *testing.T) {
			s := start(t, k, Options{Loops: 2})
			var wg sync.WaitGroup
			for w := range 12 {
				c := s.dial(t)
				wg.Go(func() { alternate(t, c, w) })
			}
			wg.Wait()
			if c := s.Counts(); c.Fast == 0 || c.Slow == 0 || c.Fast+c.Slow != 12*perWorker || c.Refused != 0 {
				t.Errorf("counts %+v", c)
			}
		})
	}
}

// perWorker is how many requests each connection of TestAlternation makes.
const perWorker = 120

func alternate(t *testing.T, c *raw, worker int) {
	state := uint32(worker)*2654435761 + 1
	random := func(n uint32) int { // xorshift: the same sequence in every run
		state ^= state << 13
		state ^= state >> 17
		state ^= state << 5
		return int(state % n)
	}
	var want []string
	for sent := 0; sent < perWorker; {
		var batch strings.Builder
		want = want[:0]
		for range min(1+random(6), perWorker-sent) {
			target := fmt.Sprintf("/fast/%d/%d", worker, sent)
			switch random(3) {
			case 0:
				batch.WriteString(get(target))
				want = append(want, target)
			case 1:
				target = "/slow" + target
				batch.WriteString(get(target))
				want = append(want, target+"\n")
			case 2:
				target = "/slow" + target
				body := strings.Repeat("b", random(30000))
				batch.WriteString(post(target, body))
				want = append(want, target+"\n"+body)
			}
			sent++
		}
		all := batch.String()
		cut := random(uint32(len(all)))
		for _, piece := range []string{all[:cut], all[cut:]} {
			if _, err := io.WriteString(c, piece); err != nil {
				t.Error(err)
				return
			}
		}
		for _, w := range want {
			resp, err := http.ReadResponse(c.r, nil)
			if err != nil {
				t.Errorf("worker %d: %v", worker, err)
				return
			}
			body, err := io.ReadAll(resp.Body)
			if err != nil || string(body) != w {
				t.Errorf("worker %d: got %.60q, %v, want %.60q", worker, body, err, w)
				return
			}
		}
	}
}

// TestLateUseIsHarmless: a handler's leftover goroutine that writes and reads after the
// handler returned gets errors and touches nobody else's request.
func TestLateUseIsHarmless(t *testing.T) {
	each(t, func() Options {
		var late sync.WaitGroup
		t.Cleanup(late.Wait)
		return Options{Slow: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			reading := make(chan struct{})
			late.Go(func() {
				close(reading)
				io.Copy(io.Discard, r.Body)
				if _, err := r.Body.Read(make([]byte, 1)); err == nil {
					t.Error("a late read succeeds")
				}
			})
			<-reading
			returned := r.Context().Done()
			late.Go(func() {
				<-returned
				var err error
				for range 100 {
					_, err = io.WriteString(w, "stray")
				}
				_ = err // it may be one of the last accepted writes, or fail
			})
			io.WriteString(w, "ok")
		})}
	}, func(t *testing.T, s *server) {
		for range 20 {
			c := s.dial(t)
			c.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc") // never complete
			c.want("POST", 200, "ok")
			c.Close()
			d := s.dial(t)
			for range 5 {
				d.send(get("/fast/mine"))
				d.want("GET", 200, "/fast/mine")
			}
			d.Close()
		}
	})
}

// TestWatchedClientPipelines: bytes that come while a handler runs are the next request.
func TestWatchedClientPipelines(t *testing.T) {
	release := make(chan struct{})
	var cancelled atomic.Int64
	each(t, func() Options {
		return Options{Slow: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/held" {
				<-release
			}
			if r.Context().Err() != nil {
				cancelled.Add(1)
			}
			io.WriteString(w, r.URL.Path)
		})}
	}, func(t *testing.T, s *server) {
		c := s.dial(t)
		c.send(get("/held"))
		eventually(t, "the handler runs", func() bool { return s.Counts().Slow == 1 })
		c.send(get("/fast/next") + get("/slow"))
		release <- struct{}{}
		c.want("GET", 200, "/held")
		c.want("GET", 200, "/fast/next")
		c.want("GET", 200, "/slow")
		if cancelled.Load() != 0 {
			t.Error("a request was cancelled though its client is there")
		}
	})
}

// TestListenerFails: somebody else closing the listener of the goroutine server is an error.
func TestListenerFails(t *testing.T) {
	s, err := New(Options{Slow: echoSlow})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := s.Run(t.Context(), struct{ net.Listener }{l}); err == nil {
		t.Error("no error")
	}
	if err := s.Run(t.Context(), l); err == nil {
		t.Error("no error from the event loop")
	}
}

// TestRunAgain: a Server may serve another listener after Run has ended.
func TestRunAgain(t *testing.T) {
	s, err := New(Options{Slow: echoSlow, Fast: echoFast})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		srv := &server{Server: s, network: "tcp", addr: l.Addr().String(), stop: cancel, done: make(chan error, 1)}
		go func() { srv.done <- s.Run(ctx, l) }()
		c := srv.dial(t)
		c.send(get("/slow/x"))
		c.want("GET", 200, "/slow/x\n")
		srv.wait(t)
	}
}
