package http2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// serve runs a server on a real socket until the test ends.
func serve(t *testing.T, o Options) (s *Server, address string, end func()) {
	t.Helper()
	if o.Handler == nil {
		o.Handler = http.HandlerFunc(echo)
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- s.Run(ctx, l) }()
	ended := false
	end = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("Run: %v", err)
		}
		if c := s.Counts(); c.Open != 0 {
			t.Errorf("%d connections are counted as open after the end", c.Open)
		}
	}
	t.Cleanup(end)
	return s, l.Addr().String(), end
}

// client is net/http's HTTP/2 client in the clear.
func client(t *testing.T) *http.Client {
	t.Helper()
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: &p}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 2 * time.Minute}
}

func echo(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("x-method", r.Method)
	w.Header().Set("x-host", r.Host)
	w.Header().Set("x-query", r.URL.RawQuery)
	for k, v := range r.Trailer {
		w.Header().Set(http.TrailerPrefix+"got-"+k, strings.Join(v, ","))
	}
	_, _ = w.Write(body)
}

// What a handler sees and what a client gets, through an unmodified client, for bodies
// from nothing to many windows.
func TestEcho(t *testing.T) {
	_, address, _ := serve(t, Options{})
	c := client(t)
	for _, n := range []int{0, 1, 8 << 10, 100 << 10, 3 << 20, 9 << 20} {
		body := bytes.Repeat([]byte("0123456789abcdef"), n/16+1)[:n]
		req, err := http.NewRequest(http.MethodPost, "http://"+address+"/a?b=c", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Equal(got, body) {
			t.Fatalf("%d bytes: got %d, %v", n, len(got), err)
		}
		if resp.ProtoMajor != 2 || resp.Header.Get("X-Method") != "POST" || resp.Header.Get("X-Query") != "b=c" || resp.Header.Get("X-Host") != address {
			t.Errorf("%d bytes: %+v", n, resp.Header)
		}
		if n <= contentBuffer && resp.ContentLength != int64(n) {
			t.Errorf("%d bytes: content-length %d", n, resp.ContentLength)
		}
	}
}

// Trailers travel in both directions, announced ones and others.
func TestTrailers(t *testing.T) {
	_, address, _ := serve(t, Options{})
	req, err := http.NewRequest(http.MethodPost, "http://"+address+"/", io.NopCloser(strings.NewReader("body")))
	if err != nil {
		t.Fatal(err)
	}
	req.Trailer = http.Header{"Sum": {"42"}}
	resp, err := client(t).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "body" {
		t.Fatalf("%q, %v", b, err)
	}
	if got := resp.Trailer.Get("got-Sum"); got != "42" {
		t.Errorf("trailer %q, all %v", got, resp.Trailer)
	}
}

// Many streams of one connection at once, each larger than its window.
func TestConcurrent(t *testing.T) {
	s, address, _ := serve(t, Options{})
	c := client(t)
	const n = 64
	errs := make(chan error, n)
	for i := range n {
		go func() {
			body := bytes.Repeat([]byte{byte(i)}, 600<<10)
			resp, err := c.Post("http://"+address+"/", "text/plain", bytes.NewReader(body))
			if err != nil {
				errs <- err
				return
			}
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			if err == nil && !bytes.Equal(got, body) {
				err = fmt.Errorf("stream %d came back with %d bytes", i, len(got))
			}
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if got := s.Counts().Handled; got != n {
		t.Errorf("%d handled", got)
	}
}

// A handler that panics loses its stream and nothing else.
func TestPanic(t *testing.T) {
	s, address, _ := serve(t, Options{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/bad" {
			panic("on purpose")
		}
		echo(w, r)
	})})
	c := client(t)
	if resp, err := c.Get("http://" + address + "/bad"); err == nil {
		resp.Body.Close()
		t.Errorf("status %d from a panic", resp.StatusCode)
	}
	resp, err := c.Get("http://" + address + "/good")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if n := s.Counts().Panics; n != 1 || s.Counts().Accepted != 1 {
		t.Errorf("%d panics, %d connections", n, s.Counts().Accepted)
	}
}

// A client that leaves cancels its request.
func TestCancel(t *testing.T) {
	seen := make(chan error, 1)
	_, address, _ := serve(t, Options{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		_, err := w.Write(make([]byte, 100<<10))
		seen <- err
	})})
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client(t).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	resp.Body.Close()
	if err := <-seen; err == nil {
		t.Error("writing to a cancelled stream succeeded")
	}
}

// The end of the server: a stream in flight finishes, then the connection ends.
func TestDrain(t *testing.T) {
	begun, finish := make(chan struct{}), make(chan struct{})
	_, address, end := serve(t, Options{Grace: time.Hour, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(begun)
		<-finish
		_, _ = io.WriteString(w, "all of it")
	})})
	got := make(chan error, 1)
	c := client(t)
	go func() {
		resp, err := c.Get("http://" + address + "/")
		if err == nil {
			var b []byte
			if b, err = io.ReadAll(resp.Body); err == nil && string(b) != "all of it" {
				err = errors.New(string(b))
			}
			resp.Body.Close()
		}
		got <- err
	}()
	<-begun
	ended := make(chan struct{})
	go func() { end(); close(ended) }()
	for { // until the listener is closed, which is how the end begins
		nc, err := net.Dial("tcp", address)
		if err != nil {
			break
		}
		nc.Close()
	}
	close(finish)
	if err := <-got; err != nil {
		t.Error(err)
	}
	<-ended
}

// What is left at the end of the grace is cut.
func TestDrainCuts(t *testing.T) {
	begun := make(chan struct{})
	_, address, end := serve(t, Options{Grace: time.Millisecond, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(begun)
		<-r.Context().Done()
	})})
	got := make(chan error, 1)
	go func() {
		resp, err := client(t).Get("http://" + address + "/")
		if err == nil {
			resp.Body.Close()
		}
		got <- err
	}()
	<-begun
	end()
	if err := <-got; err == nil {
		t.Error("the request succeeded")
	}
}
