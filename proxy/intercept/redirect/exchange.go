package redirect

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy/intercept"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/hello"
	"github.com/outrigger-mesh/outrigger/proxy/intercept/proxyproto"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
)

// exchange is one intercepted connection; its goroutine owns it.
type exchange struct {
	s        *Server
	c        *net.TCPConn
	d        Direction
	from, to netip.AddrPort
	client   netip.AddrPort // from, or what a PROXY header says
	tail     []byte         // read behind a PROXY header
}

// refuse resets the connection: its program learns at once that there is nothing here.
func (x *exchange) refuse(why string) {
	x.s.refused.Add(1)
	now := time.Now().Unix()
	if last := x.s.loud.Load(); now > last && x.s.loud.CompareAndSwap(last, now) { // at most one line a second
		x.s.o.Logger.Warn("intercepted connection refused", "direction", x.d, "from", x.from, "to", x.to, "why", why)
	}
	reset(x.c)
}

// reset closes c with RST instead of FIN.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0) // fails only for a closed socket
	c.Close()
}

// pass dials the original destination and copies; head was read from the client.
func (x *exchange) pass(head []byte) {
	if out := x.reach(x.to); out != nil {
		x.tunnel(head, out)
	}
}

// reach dials to; nil after a failure, which resets the client.
func (x *exchange) reach(to netip.AddrPort) net.Conn {
	out, err := x.s.dial(x.s.o.Life, "tcp", to.String())
	if err != nil {
		x.s.failed.Add(1)
		x.s.o.Logger.Debug("intercepted connection: the destination cannot be reached", "to", to, "error", err)
		reset(x.c)
		return nil
	}
	return out
}

// tunnel copies until both ends have finished.
func (x *exchange) tunnel(head []byte, out net.Conn) {
	prefix := slices.Concat(x.tail, head)
	x.tail = nil
	if x.d == Inbound && x.s.o.ProxyOut != 0 {
		prefix = slices.Concat(proxyproto.Append(nil, x.s.o.ProxyOut, x.client, x.to), prefix)
	}
	if _, err := upstream.Tunnel(x.s.o.Life, x.c, out, upstream.TunnelOptions{Prefix: prefix, Idle: x.s.o.Idle}); err != nil {
		x.s.o.Logger.Debug("intercepted connection ended", "to", x.to, "error", err)
	}
}

// look finds out the protocol: for Patience alone, then with the destination dialled.
func (x *exchange) look() {
	head := x.tail
	x.tail = nil
	_ = x.c.SetReadDeadline(time.Now().Add(x.s.o.Patience)) // an error shows in the read
	head, p, decided, err := x.read(head)
	_ = x.c.SetReadDeadline(time.Time{})
	switch {
	case decided:
		x.route(head, p, nil)
		return
	case !waiting(err) && !errors.Is(err, io.EOF):
		x.c.Close()
		return
	}
	out := x.reach(x.to)
	switch {
	case out == nil:
	case waiting(err):
		x.race(head, out)
	default: // the client has ended; the server may still have something to say
		x.tunnel(head, out)
	}
}

// waiting reports whether a read ended because its time was up.
func waiting(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// race waits for the client or the server to speak, at most SniffTimeout.
func (x *exchange) race(head []byte, out net.Conn) {
	deadline := time.Now().Add(x.s.o.SniffTimeout)
	// Both before either reads: whoever is first moves the other's deadline.
	_ = out.SetReadDeadline(deadline)
	_ = x.c.SetReadDeadline(deadline)
	var first [4096]byte
	n, spoke := 0, make(chan error, 1)
	go func() {
		var err error
		if n, err = out.Read(first[:]); !waiting(err) {
			_ = x.c.SetReadDeadline(time.Unix(1, 0)) // whatever the server did, it was first
		}
		spoke <- err
	}()
	head, p, decided, err := x.read(head)
	_ = out.SetReadDeadline(time.Unix(1, 0))
	serr := <-spoke
	broken := err != nil && !waiting(err) && !errors.Is(err, io.EOF)
	if x.c.SetReadDeadline(time.Time{}) != nil || out.SetReadDeadline(time.Time{}) != nil || broken {
		x.c.Close()
		out.Close()
		return
	}
	if decided && n == 0 && waiting(serr) {
		x.route(head, p, out)
		return
	}
	if n > 0 {
		if _, err := x.c.Write(first[:n]); err != nil {
			x.c.Close()
			out.Close()
			return
		}
	}
	x.tunnel(head, out) // a server that has ended already is noticed there
}

// read goes on reading the client until the protocol is decided, or a read fails.
func (x *exchange) read(head []byte) (_ []byte, p intercept.Protocol, decided bool, err error) {
	var buf [2048]byte
	for {
		if p, decided = intercept.Sniff(head); decided {
			return head, p, true, nil
		}
		if err != nil {
			return head, p, false, err
		}
		var n int
		n, err = x.c.Read(buf[:])
		head = append(head, buf[:n]...)
	}
}

// route acts on a protocol. out is the destination, nil if it was not dialled.
func (x *exchange) route(head []byte, p intercept.Protocol, out net.Conn) {
	to := x.to
	switch p {
	case intercept.HTTP1:
		if out != nil {
			out.Close()
		}
		c := &Conn{TCPConn: x.c, head: head, to: x.to, closed: make(chan struct{})}
		x.s.http.deliver(x.s.o.Life, c)
		// Its place among MaxConns is taken until it is closed.
		select {
		case <-c.closed:
		case <-x.s.o.Life.Done():
			c.Close()
		}
		return
	case intercept.TLS:
		var sni string
		if head, sni = x.serverName(head); sni != "" {
			if named, ok := x.s.name(sni); ok {
				to = named
			}
		}
	}
	if out != nil && to != x.to {
		out.Close()
		out = nil
	}
	if out == nil {
		if out = x.reach(to); out == nil {
			return
		}
	}
	x.tunnel(head, out)
}

// serverName reads on until the client hello is whole. Without one that can be read the
// connection goes where it was going, as it is.
func (x *exchange) serverName(head []byte) ([]byte, string) {
	defer x.c.SetReadDeadline(time.Time{})
	if x.c.SetReadDeadline(time.Now().Add(x.s.o.SniffTimeout)) != nil {
		return head, ""
	}
	var buf [2048]byte
	for {
		name, err := hello.ServerName(head)
		if err == nil {
			return head, name
		}
		if !errors.Is(err, hello.ErrShort) {
			return head, ""
		}
		n, err := x.c.Read(buf[:])
		head = append(head, buf[:n]...)
		if err != nil {
			name, _ := hello.ServerName(head)
			return head, name
		}
	}
}

// readProxyHeader takes the PROXY header off an inbound connection of a peer that must
// send one.
func (x *exchange) readProxyHeader() error {
	if !slices.ContainsFunc(x.s.o.ProxyFrom, func(p netip.Prefix) bool { return p.Contains(x.from.Addr().WithZone("")) }) {
		return nil
	}
	defer x.c.SetReadDeadline(time.Time{})
	if err := x.c.SetReadDeadline(time.Now().Add(x.s.o.SniffTimeout)); err != nil {
		return err
	}
	var b []byte
	var buf [1024]byte
	for {
		h, n, err := proxyproto.Parse(b)
		if err == nil {
			if h.Source.IsValid() {
				x.client = h.Source
			}
			x.tail = b[n:]
			return nil
		}
		if !errors.Is(err, proxyproto.ErrShort) {
			return err
		}
		m, rerr := x.c.Read(buf[:])
		b = append(b, buf[:m]...)
		if rerr != nil && m == 0 {
			return outrigger.Wrap(outrigger.Invalid, rerr, "no whole PROXY header came")
		}
	}
}
