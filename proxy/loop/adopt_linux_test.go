package loop

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
)

// A connection accepted elsewhere is served like the server's own, also when its request
// came before; the limit counts it; outside Run it is closed.
func TestAdopt(t *testing.T) {
	s, err := New(Options{MaxConns: 1, Slow: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, r.URL.Path)
	})})
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, own := local(t), local(t)
	pair := func() (client net.Conn, server *net.TCPConn) {
		t.Helper()
		client, err := net.Dial("tcp", elsewhere.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		if err := client.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		c, err := elsewhere.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return client, c.(*net.TCPConn)
	}
	closed := func(c net.Conn) {
		t.Helper()
		if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("not closed: %d, %v", n, err)
		}
	}
	client, c := pair()
	if err := s.Adopt(c); !outrigger.IsKind(err, outrigger.Unavailable) {
		t.Errorf("outside Run: %v", err)
	}
	closed(client)

	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, own) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if n := s.Counts(); n.Open != 0 || n.Accepted != 2 || n.Slow != 3 {
			t.Errorf("at the end %+v", n)
		}
	}()
	// Run is up when it answers.
	first, err := net.Dial("tcp", own.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	exchangeOn(t, first, "/own")
	client, c = pair()
	if err := s.Adopt(c); !outrigger.IsKind(err, outrigger.Exhausted) {
		t.Errorf("at the limit: %v", err)
	}
	closed(client)
	first.Close()
	for {
		client, c = pair()
		if _, err := io.WriteString(client, "GET /early HTTP/1.1\r\nhost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if err := s.Adopt(c); err == nil {
			break
		} else if !outrigger.IsKind(err, outrigger.Exhausted) { // until the first is seen to end
			t.Fatal(err)
		}
	}
	res, err := http.ReadResponse(bufio.NewReader(client), nil)
	if err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(res.Body); string(body) != "/early" || err != nil {
		t.Fatalf("%q, %v", body, err)
	}
	exchangeOn(t, client, "/later")
}

func local(t *testing.T) *net.TCPListener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

func exchangeOn(t *testing.T, c net.Conn, path string) {
	t.Helper()
	if _, err := io.WriteString(c, "GET "+path+" HTTP/1.1\r\nhost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, err := io.ReadAll(res.Body); string(body) != path || err != nil {
		t.Fatalf("%q, %v; want %q", body, err, path)
	}
}
