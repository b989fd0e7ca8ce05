//go:build linux

package redirect

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/intercept/hello"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/proxyproto"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
)

// rig is a server on a real socket. Where a connection was going is set by the test, and
// so is what is found there; the kernel's side of both is tested with real rules in
// cmd/outrigger.
type rig struct {
	t       *testing.T
	s       *Server
	address string
	dialled chan string   // destinations, in order
	there   chan net.Conn // the far ends of what was dialled
	dead    atomic.Bool   // nothing can be dialled
}

func newRig(t *testing.T, d Direction, to string, o Options) *rig {
	t.Helper()
	r := &rig{t: t, dialled: make(chan string, 8), there: make(chan net.Conn, 8)}
	front, back := listen(t), listen(t)
	r.address = front.Addr().String()
	o.Own = []netip.AddrPort{address(front.Addr())}
	if o.Serve == nil {
		o.Serve = func(c *net.TCPConn) { c.Close() }
	}
	life, cut := context.WithCancel(context.Background())
	o.Life = life
	var err error
	if r.s, err = New(o); err != nil {
		t.Fatal(err)
	}
	r.s.original = func(*net.TCPConn) (netip.AddrPort, error) { return netip.MustParseAddrPort(to), nil }
	r.s.dial = func(ctx context.Context, _, address string) (net.Conn, error) {
		if r.dead.Load() {
			return nil, errors.New("unreachable")
		}
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", back.Addr().String())
		if err != nil {
			return nil, err
		}
		far, err := back.Accept()
		if err != nil {
			return nil, err
		}
		r.dialled <- address
		r.there <- far
		return c, nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.s.Run(ctx, front, d) }()
	t.Cleanup(func() {
		cancel()
		cut()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
		r.s.Close()
		if c := r.s.Counts(); c.Open != 0 {
			t.Errorf("%d connections are left", c.Open)
		}
	})
	return r
}

func listen(t *testing.T) *net.TCPListener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

func (r *rig) client() *net.TCPConn {
	r.t.Helper()
	c, err := net.Dial("tcp", r.address)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		r.t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

func (r *rig) send(c net.Conn, text string) {
	r.t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) want(c net.Conn, text string) {
	r.t.Helper()
	got := make([]byte, len(text))
	if n, err := io.ReadFull(c, got); err != nil || string(got) != text {
		r.t.Fatalf("got %q, %v; want %q", got[:n], err, text)
	}
}

var routes = []upstream.Rule{{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Port: 8000}}

const routed = "10.2.3.4:8000"

// A destination that is not looked into is dialled before the client has said a word.
func TestPassedOnAtOnce(t *testing.T) {
	r := newRig(t, Outbound, "10.2.3.4:25", Options{Routes: routes})
	c := r.client()
	far := <-r.there
	r.send(far, "220 ready\r\n")
	r.want(c, "220 ready\r\n")
	r.send(c, "QUIT\r\n")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(far); string(got) != "QUIT\r\n" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
	r.send(far, "221 bye\r\n") // after the other direction has ended
	far.Close()
	if got, err := io.ReadAll(c); string(got) != "221 bye\r\n" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
}

// Where it is looked into a server that speaks first is heard, and the connection goes
// on as a tunnel, with what the client had said by then.
func TestServerFirst(t *testing.T) {
	r := newRig(t, Outbound, routed, Options{Routes: routes})
	c := r.client()
	r.send(c, "GE") // might become HTTP
	far := <-r.there
	r.send(far, "220 ready\r\n")
	r.want(c, "220 ready\r\n")
	r.want(far, "GE")
	r.send(c, "T on\r\n")
	r.want(far, "T on\r\n")
}

// A client that takes its time is still recognised: its bytes arrive once, and the
// connection that was opened for it meanwhile sees none.
func TestSlowHTTP(t *testing.T) {
	r := newRig(t, Outbound, routed, Options{Routes: routes})
	c := r.client()
	r.send(c, "GE")
	far := <-r.there // now the server might speak
	r.send(c, "T / HTTP/1.1\r\n\r\n")
	got, err := r.s.HTTP().Accept()
	if err != nil {
		t.Fatal(err)
	}
	r.want(got, "GET / HTTP/1.1\r\n\r\n")
	if d := got.(*Conn).Destination(); d.String() != routed {
		t.Errorf("destination %s", d)
	}
	if all, err := io.ReadAll(far); len(all) > 0 || err != nil {
		t.Errorf("the destination saw %q, %v", all, err)
	}
	r.send(got, "answer")
	r.want(c, "answer")
	got.Close()
}

// A quick client is not dialled for.
func TestHTTP(t *testing.T) {
	r := newRig(t, Outbound, routed, Options{Routes: routes, Patience: time.Minute})
	c := r.client()
	r.send(c, "GET / HTTP/1.1\r\n\r\n")
	got, err := r.s.HTTP().Accept()
	if err != nil {
		t.Fatal(err)
	}
	r.want(got, "GET / HTTP/1.1\r\n\r\n")
	got.Close()
	if len(r.dialled) > 0 {
		t.Error("the destination was dialled")
	}
}

// A client that ends without a word is passed on: the server may have something to say.
func TestSilentEnd(t *testing.T) {
	r := newRig(t, Outbound, routed, Options{Routes: routes})
	c := r.client()
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	far := <-r.there
	r.send(far, "time\n")
	far.Close()
	r.want(c, "time\n")
}

// TLS goes by server name where one is configured, else where it was going; not a byte
// is changed.
func TestServerNames(t *testing.T) {
	names := []Name{{"*.example.com", netip.MustParseAddrPort("10.9.0.1:443")}, {"api.example.com", netip.MustParseAddrPort("10.9.0.2:443")}}
	f := func(name, want string) {
		t.Helper()
		r := newRig(t, Outbound, routed, Options{Routes: routes, Names: names, Patience: time.Minute})
		c := r.client()
		go func() { _ = tls.Client(c, &tls.Config{ServerName: name}).Handshake() }() // ends with c
		if got := <-r.dialled; got != want {
			t.Errorf("%s went to %s, want %s", name, got, want)
		}
		far := <-r.there
		var b []byte
		for buf := make([]byte, 512); ; {
			n, err := far.Read(buf)
			b = append(b, buf[:n]...)
			got, herr := hello.ServerName(b)
			if herr == nil && got == name {
				break
			}
			if err != nil || herr != nil && !errors.Is(herr, hello.ErrShort) {
				t.Fatalf("%s: %v, %v", name, err, herr)
			}
		}
		c.Close()
		far.Close()
	}
	f("api.example.com", "10.9.0.2:443")
	f("x.example.com", "10.9.0.1:443")
	f("example.com", routed)
	f("elsewhere.test", routed)
}

// PROXY headers are taken off connections of those who must send them, and put before
// those to the program, with the client's address; one that is missing is a reset.
func TestProxyProtocol(t *testing.T) {
	client, dst := netip.MustParseAddrPort("192.0.2.1:5000"), netip.MustParseAddrPort("10.0.0.9:9000")
	o := Options{ProxyFrom: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, ProxyOut: proxyproto.V2}
	for _, v := range []proxyproto.Version{proxyproto.V1, proxyproto.V2} {
		r := newRig(t, Inbound, "10.0.0.9:9000", o)
		c := r.client()
		r.send(c, string(proxyproto.Append(nil, v, client, netip.MustParseAddrPort("192.0.2.9:80")))+"early")
		far := <-r.there
		r.want(far, string(proxyproto.Append(nil, proxyproto.V2, client, dst))+"early")
		r.send(c, "late")
		r.want(far, "late")
	}
	r := newRig(t, Inbound, "10.0.0.9:9000", o)
	c := r.client()
	r.send(c, "GET / HTTP/1.1\r\n\r\n")
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%d, %v; want a reset", n, err)
	}
	if len(r.dialled) > 0 {
		t.Error("a connection without a header was passed on")
	}
}

// A destination that cannot be reached is a reset, not a silent close.
func TestUnreachable(t *testing.T) {
	r := newRig(t, Outbound, "10.2.3.4:25", Options{})
	r.dead.Store(true)
	c, err := net.Dial("tcp", r.address) // which may learn of the reset already
	if err == nil {
		defer c.Close()
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v; want a reset", err)
	}
	if c := r.s.Counts(); c.Failed != 1 {
		t.Errorf("%+v", c)
	}
}

// No more than MaxConns connections are open; the next is taken when one ends.
func TestBound(t *testing.T) {
	r := newRig(t, Outbound, "10.2.3.4:25", Options{MaxConns: 1})
	first := r.client()
	far := <-r.there
	second := r.client() // waits in the kernel
	if err := second.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := second.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the second connection was not left waiting: %v", err)
	}
	if c := r.s.Counts(); c.Accepted != 1 {
		t.Fatalf("%d accepted, the bound is 1", c.Accepted)
	}
	first.Close()
	far.Close()
	r.send(<-r.there, "hi")
	if err := second.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if got, err := bufio.NewReader(second).Peek(2); !bytes.Equal(got, []byte("hi")) {
		t.Fatalf("%q, %v", got, err)
	}
}

func TestOptions(t *testing.T) {
	if _, err := New(Options{}); err == nil || !strings.Contains(err.Error(), "required") {
		t.Errorf("got %v", err)
	}
}
