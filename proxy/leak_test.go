package proxy_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy"
)

// A thousand connections of each kind, opened, used and left in the way such clients
// leave, leave nothing behind: neither goroutines nor descriptors.
func TestNothingLeaks(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/stream" {
			fmt.Fprint(w, "pong")
			return
		}
		w.Header().Set("content-type", "text/event-stream")
		fmt.Fprint(w, "data: one\n\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done() // the client leaves first
	}))
	defer web.Close()
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
				io.Copy(c, c)
			}()
		}
	}()
	address, _, _, _ := onSockets(t, time.Second, func(o *proxy.Options) {
		o.UpstreamTCP, o.UpstreamHTTP = echo.Addr().String(), mustURL(web.URL)
	})
	raw := func(send, want string) func() error {
		return func() error {
			c, err := net.Dial("tcp", address)
			if err != nil {
				return err
			}
			defer c.Close()
			if _, err := io.WriteString(c, send); err != nil || want == "" {
				return err
			}
			r := bufio.NewReader(c)
			for line := ""; line != want; {
				if line, err = r.ReadString('\n'); err != nil {
					return fmt.Errorf("after %q: %w", line, err)
				}
			}
			return nil
		}
	}
	for kind, cycle := range map[string]func() error{
		"silent":         raw("", ""),
		"half a request": raw("GET /pi", ""),
		"http1":          raw("GET /ping HTTP/1.1\r\nHost: x\r\n\r\n", "\r\n"),
		"malformed":      raw("GET /ping HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "\r\n"),
		"stream":         raw("GET /stream HTTP/1.1\r\nHost: x\r\n\r\n", "data: one\n"),
		"tunnel":         raw("\x16\x03\x01hello\n", "\x16\x03\x01hello\n"),
		"half a preface": raw("PRI * HTTP/2.0\r\n", ""),
		"http2":          func() error { return throughHTTP2("http://" + address + "/ping") },
	} {
		t.Run(kind, func(t *testing.T) {
			for range 50 { // what is kept for reuse is there then
				must(t, cycle())
			}
			goroutines, descriptors := settle(t, 1<<30, 1<<30)
			for i := range 1000 {
				if err := cycle(); err != nil {
					t.Fatalf("cycle %d: %v", i, err)
				}
			}
			settle(t, goroutines+20, descriptors+20)
		})
	}
}

// throughHTTP2 makes one request on a connection of its own, in the clear.
func throughHTTP2(url string) error {
	tr := &http.Transport{Protocols: new(http.Protocols)}
	tr.Protocols.SetUnencryptedHTTP2(true)
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "pong" || resp.ProtoMajor != 2 {
		return fmt.Errorf("%s %q, %w", resp.Proto, b, err)
	}
	return nil
}

// settle waits until the process has no more goroutines and descriptors than that, and
// both counts have stood still for a while; it returns them.
func settle(t *testing.T, maxGoroutines, maxDescriptors int) (goroutines, descriptors int) {
	t.Helper()
	limit := time.NewTimer(time.Minute)
	defer limit.Stop()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for still := 0; still < 5; {
		g := runtime.NumGoroutine()
		list, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		if d := len(list); g == goroutines && d == descriptors && g <= maxGoroutines && d <= maxDescriptors {
			still++
		} else {
			goroutines, descriptors, still = g, d, 0
		}
		select {
		case <-look.C:
		case <-limit.C:
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines and %d descriptors, want at most %d and %d\n%.20000s", goroutines, descriptors, maxGoroutines, maxDescriptors, buf[:runtime.Stack(buf, true)])
		}
	}
	return goroutines, descriptors
}
