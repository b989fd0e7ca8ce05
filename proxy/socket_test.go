package proxy_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy"
	"github.com/outrigger-mesh/outrigger/proxy/inference"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// onSockets runs a sidecar on a real socket, where other code accepts and serves than in
// memory, in front of a model that sends a word whenever it is told to.
func onSockets(t *testing.T, grace time.Duration, edit func(*proxy.Options)) (address string, word chan<- string, end func(), ended <-chan error) {
	t.Helper()
	words := make(chan string)
	back := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("content-type", "text/event-stream")
		for {
			select {
			case text := <-words:
				if text == "" {
					fmt.Fprint(w, "data: [DONE]\n\n")
					return
				}
				fmt.Fprintf(w, "data: {\"choices\":[{\"delta\":{\"content\":%q}}]}\n\n", text)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	}))
	t.Cleanup(back.Close)
	p := newPolicy()
	for i := range p.Models[0].Versions {
		p.Models[0].Versions[i].Endpoints[0].Address = back.Listener.Addr().String()
	}
	o := proxy.Options{Node: outrigger.Node{ID: "pod", Region: "eu"}, Reader: stub{}, Authority: nobody{}, Grace: grace,
		Policy: func() (*policy.Policy, inference.PolicyStatus) { return p, inference.PolicyStatus{Live: true} }}
	if edit != nil {
		edit(&o)
	}
	s, err := proxy.New(o)
	must(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx, l) }()
	return l.Addr().String(), words, cancel, ran
}

// within fails the test rather than wait for ever.
func within(t *testing.T, d time.Duration, what string, c <-chan error) {
	t.Helper()
	limit := time.NewTimer(d)
	defer limit.Stop()
	select {
	case err := <-c:
		must(t, err)
	case <-limit.C:
		t.Fatalf("%s: not after %v", what, d)
	}
}

func openStream(t *testing.T, address string, word chan<- string) (*http.Response, *bufio.Reader) {
	t.Helper()
	go func() { word <- "one" }()
	resp, err := http.Post("http://"+address+"/v1/chat/completions", "application/json", strings.NewReader(`{"model":"chat","stream":true,"user":"u"}`))
	must(t, err)
	t.Cleanup(func() { resp.Body.Close() })
	r := bufio.NewReader(resp.Body)
	if line, err := r.ReadString('\n'); err != nil || !strings.Contains(line, "one") {
		t.Fatalf("%q, %v", line, err)
	}
	return resp, r
}

// A stream in flight at the end gets all it is owed, new connections are refused, and
// Run returns with the stream, long before the grace is over.
func TestDrainOnSockets(t *testing.T) {
	address, word, end, ended := onSockets(t, time.Hour, nil)
	_, r := openStream(t, address, word)
	end()
	for { // the listener closes at once, but not before this goroutine looks
		c, err := net.Dial("tcp", address)
		if err != nil {
			break
		}
		c.Close()
	}
	word <- "two"
	word <- ""
	rest, err := io.ReadAll(r)
	if err != nil || !strings.Contains(string(rest), "two") || !strings.HasSuffix(string(rest), "data: [DONE]\n\n") {
		t.Errorf("%q, %v", rest, err)
	}
	within(t, time.Minute, "the end", ended)
}

// What is still in flight at the end of the grace is cut: a stream, a tunnel and an
// upgraded connection. None of them keeps Run.
func TestDrainCutsOnSockets(t *testing.T) {
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer echo.Close()
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				r := bufio.NewReader(c)
				if line, _ := r.Peek(3); string(line) == "GET" {
					if _, err := http.ReadRequest(r); err != nil {
						return
					}
					fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
				}
				io.Copy(c, r)
			}()
		}
	}()
	address, word, end, ended := onSockets(t, 200*time.Millisecond, func(o *proxy.Options) {
		o.UpstreamTCP, o.UpstreamHTTP = echo.Addr().String(), mustURL("http://"+echo.Addr().String())
	})
	_, stream := openStream(t, address, word)
	open := map[string]*bufio.Reader{"stream": stream}
	for what, hello := range map[string]string{"tunnel": "\x16\x03\x01hello\n", "websocket": "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"} {
		c, err := net.Dial("tcp", address)
		must(t, err)
		defer c.Close()
		fmt.Fprint(c, hello)
		r := bufio.NewReader(c)
		if what == "websocket" {
			resp, err := http.ReadResponse(r, nil)
			if err != nil || resp.StatusCode != 101 {
				t.Fatalf("upgrade: %v, %v", resp, err)
			}
			fmt.Fprint(c, "hello\n")
		}
		if line, err := r.ReadString('\n'); err != nil || !strings.HasSuffix(line, "hello\n") {
			t.Fatalf("%s: %q, %v", what, line, err)
		}
		open[what] = r
	}
	end()
	within(t, time.Minute, "the end", ended)
	for what, r := range open {
		if rest, err := io.ReadAll(r); err == nil && what == "stream" && strings.Contains(string(rest), "[DONE]") {
			t.Errorf("%s was not cut: %q", what, rest)
		}
	}
}
