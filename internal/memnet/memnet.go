// Package memnet is an in-memory network for tests: named listeners, and links
// between named hosts that can be cut, delayed and healed.
//
// It works inside testing/synctest bubbles: all waiting is on channels, timers and
// net.Pipe, so fake time advances through it. Delay applies to each write of a
// connection in the direction from its writer; order within a connection is kept
// (a link is TCP-like: no loss or reordering inside a connection, only delay, cuts
// and refused dials). A cut breaks existing connections between the two hosts and
// refuses new ones.
//
// A Network may be used by any number of goroutines.
package memnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// ErrRefused is returned by Dial when nobody listens or the link is cut.
var ErrRefused = errors.New("memnet: connection refused")

// Network connects hosts.
type Network struct {
	mu        sync.Mutex
	listeners map[string]*listener // by address
	cut       map[link]bool
	delay     map[link]time.Duration
	conns     map[*conn]struct{}
}

type link struct{ from, to string }

// New returns a network without hosts.
func New() *Network {
	return &Network{
		listeners: map[string]*listener{}, cut: map[link]bool{},
		delay: map[link]time.Duration{}, conns: map[*conn]struct{}{},
	}
}

// Listen opens "host:port" on the given host; the address is any unused text.
func (n *Network) Listen(host, address string) (net.Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, taken := n.listeners[address]; taken {
		return nil, fmt.Errorf("memnet: address %s is in use", address)
	}
	l := &listener{net: n, host: host, addr: addr(address), queue: make(chan net.Conn, 128), done: make(chan struct{})}
	n.listeners[address] = l
	return l, nil
}

// Dialer returns a dial function for connections that start at host.
func (n *Network) Dialer(host string) func(ctx context.Context, address string) (net.Conn, error) {
	return func(ctx context.Context, address string) (net.Conn, error) { return n.dial(ctx, host, address) }
}

func (n *Network) dial(ctx context.Context, from, address string) (net.Conn, error) {
	n.mu.Lock()
	l := n.listeners[address]
	if l == nil || n.cut[link{from, l.host}] || n.cut[link{l.host, from}] {
		n.mu.Unlock()
		return nil, fmt.Errorf("dial %s from %s: %w", address, from, ErrRefused)
	}
	near, far := net.Pipe()
	a := newConn(n, near, link{from, l.host}, addr(from), l.addr)
	b := newConn(n, far, link{l.host, from}, l.addr, addr(from))
	a.peer, b.peer = b, a
	n.conns[a], n.conns[b] = struct{}{}, struct{}{}
	n.mu.Unlock()
	go a.pump()
	go b.pump()

	select {
	case l.queue <- b:
		select {
		case <-l.done:
			// The listener may have closed before it saw b.
			b.Close()
		default:
		}
		return a, nil
	case <-l.done:
	case <-ctx.Done():
	}
	a.Close()
	b.Close()
	return nil, fmt.Errorf("dial %s from %s: %w", address, from, ErrRefused)
}

// Cut breaks every connection between two hosts and refuses new ones until Heal.
func (n *Network) Cut(a, b string) {
	n.mu.Lock()
	n.cut[link{a, b}] = true
	var broken []*conn
	for c := range n.conns {
		if c.link == (link{a, b}) || c.link == (link{b, a}) {
			broken = append(broken, c)
		}
	}
	n.mu.Unlock()
	for _, c := range broken {
		c.Close()
	}
}

// Heal undoes Cut.
func (n *Network) Heal(a, b string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.cut, link{a, b})
	delete(n.cut, link{b, a})
}

// SetDelay makes writes from a to b arrive d later; 0 removes it.
func (n *Network) SetDelay(a, b string, d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.delay[link{a, b}] = d
}

func (n *Network) delayOf(l link) time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.delay[l]
}

func (n *Network) forget(c *conn) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.conns, c)
}

type addr string

func (addr) Network() string  { return "mem" }
func (a addr) String() string { return string(a) }

type listener struct {
	net   *Network
	host  string
	addr  addr
	queue chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.done)
		l.net.mu.Lock()
		delete(l.net.listeners, string(l.addr))
		l.net.mu.Unlock()
		for { // connections nobody accepted end with the listener
			select {
			case c := <-l.queue:
				c.Close()
			default:
				return
			}
		}
	})
	return nil
}

func (l *listener) Addr() net.Addr { return l.addr }

// conn is one end; writes are queued with their due time and pumped into the pipe.
type conn struct {
	net.Conn
	net           *Network
	link          link
	local, remote addr
	peer          *conn // set before use

	out  chan packet
	done chan struct{}
	once sync.Once
}

type packet struct {
	due  time.Time
	data []byte
}

// window bounds unread writes per connection, as a socket buffer does.
const window = 256

func newConn(n *Network, c net.Conn, l link, local, remote addr) *conn {
	return &conn{Conn: c, net: n, link: l, local: local, remote: remote,
		out: make(chan packet, window), done: make(chan struct{})}
}

func (c *conn) pump() {
	for {
		select {
		case p := <-c.out:
			if wait := time.Until(p.due); wait > 0 {
				t := time.NewTimer(wait)
				select {
				case <-t.C:
				case <-c.done:
					t.Stop() // what is under way is delivered early, then the end of it
				}
			}
			if _, err := c.Conn.Write(p.data); err != nil {
				c.Conn.Close()
				return
			}
		case <-c.done:
			c.drain()
			return
		}
	}
}

// drain delivers what was written before Close, then closes the pipe. The peer may be
// gone, so it gives up with the pipe.
func (c *conn) drain() {
	for {
		select {
		case p := <-c.out:
			if _, err := c.Conn.Write(p.data); err != nil {
				c.Conn.Close()
				return
			}
		default:
			c.Conn.Close()
			return
		}
	}
}

// Write queues a copy of b; it blocks while the window is full. What is written to a
// closed peer is lost without an error.
func (c *conn) Write(b []byte) (int, error) {
	p := packet{due: time.Now().Add(c.net.delayOf(c.link)), data: append([]byte(nil), b...)}
	select {
	case <-c.done:
		return 0, net.ErrClosed
	default:
	}
	select {
	case <-c.peer.done:
		return len(b), nil
	default:
	}
	select {
	case c.out <- p:
		return len(b), nil
	case <-c.done:
		return 0, net.ErrClosed
	case <-c.peer.done:
		// As with TCP the write itself succeeds and the bytes are lost: what tells this end
		// is the EOF on its way. Failing here, ahead of it, would be a state no network has.
		return len(b), nil
	}
}

// Close ends both directions; queued writes are still delivered if the peer reads.
func (c *conn) Close() error {
	c.once.Do(func() {
		close(c.done)
		c.net.forget(c)
		// Reads on this end must end now; writes of this end drain in pump.
		c.Conn.SetReadDeadline(time.Now())
		select {
		case <-c.peer.done:
			c.Conn.Close()
		default:
		}
	})
	return nil
}

// LocalAddr is the host or address of this end.
func (c *conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr is the host or address of the other end.
func (c *conn) RemoteAddr() net.Addr { return c.remote }

// SetWriteDeadline is accepted and ignored: writes never block longer than the window.
func (c *conn) SetWriteDeadline(time.Time) error { return nil }

// SetDeadline sets the read deadline.
func (c *conn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetReadDeadline behaves like a socket's: it still works after the peer has closed.
func (c *conn) SetReadDeadline(t time.Time) error {
	select {
	case <-c.done:
		return net.ErrClosed
	default:
	}
	if err := c.Conn.SetReadDeadline(t); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		return err
	}
	return nil
}
