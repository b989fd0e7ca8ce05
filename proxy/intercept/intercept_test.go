package intercept

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/internal/memnet"
)

// The decision table, and that every prefix of a decided input is either undecided or
// decided the same way.
func TestSniff(t *testing.T) {
	f := func(in string, want Protocol, decided bool) {
		t.Helper()
		p, ok := Sniff([]byte(in))
		if p != want || ok != decided {
			t.Errorf("%q: %s %v, want %s %v", in, p, ok, want, decided)
		}
		for i := range in {
			if q, ok := Sniff([]byte(in[:i])); ok && decided && q != want {
				t.Errorf("%q: prefix %q already says %s", in, in[:i], q)
			}
		}
	}
	f("", Unknown, false)
	f("GET / HTTP/1.1\r\n", HTTP1, true)
	f("GET", Unknown, false)
	f("M-SEARCH * HTTP/1.1\r\n", HTTP1, true)
	f("\r\nPOST /x HTTP/1.1\r\n", HTTP1, true)
	f(preface, HTTP2, true)
	f(preface+"\x00\x00", HTTP2, true)
	f(preface[:20], Unknown, false)
	f("PRI /not-http2 HTTP/1.1\r\n", HTTP1, true)
	f("\x16\x03\x01\x02\x00", TLS, true)
	f("\x16\x09", Unknown, true)
	f(" GET / HTTP/1.1", Unknown, true)
	f("\x00\x01binary", Unknown, true)
	f(strings.Repeat("A", 64), Unknown, true)
	f(strings.Repeat("\r\n", 40), Unknown, true)
	f(strings.Repeat("\r\n", 40)+"GET / HTTP/1.1\r\n", Unknown, true)
}

// FuzzSniff: a decision never changes when more bytes arrive, and is always reached.
func FuzzSniff(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\n"), []byte("x"))
	f.Add([]byte(preface), []byte("\x00"))
	f.Add([]byte("\x16\x03"), []byte("\x01"))
	f.Add([]byte(strings.Repeat("\r", maxMethod+1)), []byte("0"))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		p, ok := Sniff(a)
		if !ok && len(a) > 2*maxMethod {
			t.Fatalf("undecided after %d bytes", len(a))
		}
		if q, ok2 := Sniff(append(append([]byte(nil), a...), b...)); ok && (!ok2 || p != q) {
			t.Fatalf("%q said %s, with %q more it says %s", a, p, b, q)
		}
	})
}

// harness runs a door on an in-memory listener inside a bubble.
func harness(t *testing.T, o Options) (d *Door, dial func() net.Conn, stop func()) {
	t.Helper()
	n := memnet.New()
	l, err := n.Listen("pod", "pod:1")
	if err != nil {
		t.Fatal(err)
	}
	d = New(o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx, l) }()
	dial = func() net.Conn {
		c, err := n.Dialer("app")(context.Background(), "pod:1")
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	return d, dial, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("door ended with %v", err)
		}
	}
}

// Each protocol reaches its own listener, with the bytes that were looked at delivered
// once; a protocol nobody serves is given to Refused.
func TestDoorSplits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var refused atomic.Int32
		d, dial, stop := harness(t, Options{Refused: func(c net.Conn, p Protocol) {
			if p == TLS {
				refused.Add(1)
			}
			c.Close()
		}})
		send := func(text string) {
			c := dial()
			if _, err := c.Write([]byte(text)); err != nil {
				t.Fatal(err)
			}
			c.Close()
		}
		for _, c := range []struct {
			l    net.Listener
			text string
		}{{d.HTTP1(), "GET / HTTP/1.1\r\nhost: x\r\n\r\n"}, {d.HTTP2(), preface + "rest"}} {
			send(c.text)
			got, err := c.l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			all, err := io.ReadAll(got)
			if err != nil || string(all) != c.text {
				t.Errorf("got %q, %v; want %q", all, err, c.text)
			}
			got.Close()
		}
		send("\x16\x03\x01")
		synctest.Wait()
		if refused.Load() != 1 {
			t.Error("TLS was not refused")
		}
		stop()
		if _, err := d.HTTP1().Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("accept after the end: %v", err)
		}
	})
}

// A silent connection is closed after exactly the sniff time-out.
func TestSilentConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, dial, stop := harness(t, Options{SniffTimeout: 3 * time.Second})
		c := dial()
		start := time.Now()
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Fatal("got bytes from nowhere")
		}
		if d := time.Since(start); d != 3*time.Second {
			t.Errorf("closed after %v", d)
		}
		c.Close()
		stop()
	})
}

// flaky fails the first accepts as a process out of descriptors would.
type flaky struct {
	net.Listener
	fails atomic.Int32
}

func (f *flaky) Accept() (net.Conn, error) {
	if f.fails.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: errors.New("too many open files")}
	}
	return f.Listener.Accept()
}

// Failing accepts are survived with back-off; the next connection is served.
func TestAcceptFailuresAreSurvived(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := memnet.New()
		l, err := n.Listen("pod", "pod:1")
		if err != nil {
			t.Fatal(err)
		}
		fl := &flaky{Listener: l}
		fl.fails.Store(4)
		d := New(Options{})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		start := time.Now()
		go func() { done <- d.Run(ctx, fl) }()
		c, err := n.Dialer("app")(ctx, "pod:1")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
			t.Fatal(err)
		}
		got, err := d.HTTP1().Accept()
		if err != nil {
			t.Fatal(err)
		}
		if w := time.Since(start); w != (5+10+20+40)*time.Millisecond {
			t.Errorf("served after %v of back-off, want 75ms", w)
		}
		got.Close()
		c.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// No more than MaxPending connections are looked at together.
func TestPendingIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, dial, stop := harness(t, Options{MaxPending: 2, SniffTimeout: time.Second})
		var conns []net.Conn
		for range 5 {
			conns = append(conns, dial())
		}
		synctest.Wait()
		if n := len(d.pending); n != 2 {
			t.Errorf("%d connections are being looked at, the bound is 2", n)
		}
		for _, c := range conns {
			c.Close()
		}
		stop()
	})
}

// A connection accepted elsewhere is handed on with what was read from it; after Close
// it is closed.
func TestAdmit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := New(Options{})
		near, far := net.Pipe()
		go d.Admit(context.Background(), far, []byte(preface[:10]))
		if _, err := near.Write([]byte(preface[10:] + "x")); err != nil {
			t.Fatal(err)
		}
		c, err := d.HTTP2().Accept()
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(preface)+1)
		if _, err := io.ReadFull(c, got); err != nil || string(got) != preface+"x" {
			t.Fatalf("got %q, %v", got, err)
		}
		near.Close()
		c.Close()
		d.Close()
		near, far = net.Pipe()
		d.Admit(context.Background(), far, []byte(preface))
		if _, err := near.Read(make([]byte, 1)); err == nil {
			t.Fatal("a closed door kept the connection")
		}
		near.Close()
	})
}
