package redirect

import (
	"context"
	"net"
	"net/netip"
	"sync"
)

// Conn is a connection whose first bytes were looked at; it delivers them again.
type Conn struct {
	*net.TCPConn
	head []byte // owned by the reader
	to   netip.AddrPort

	once   sync.Once
	closed chan struct{}
}

// Close closes the connection; it may be called more than once.
func (c *Conn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.TCPConn.Close()
}

// Destination is where the client was going.
func (c *Conn) Destination() netip.AddrPort { return c.to }

// Read returns what was looked at first, then reads on.
func (c *Conn) Read(b []byte) (int, error) {
	if len(c.head) > 0 {
		n := copy(b, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	return c.TCPConn.Read(b)
}

// queue is a listener fed by connections accepted elsewhere.
type queue struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newQueue() *queue { return &queue{conns: make(chan net.Conn), done: make(chan struct{})} }

func (q *queue) deliver(ctx context.Context, c net.Conn) {
	select {
	case q.conns <- c:
	case <-q.done:
		c.Close()
	case <-ctx.Done():
		c.Close()
	}
}

// Accept waits for the next connection.
func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept; it may be called more than once.
func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

// Addr names no socket: connections come from several.
func (q *queue) Addr() net.Addr { return &net.TCPAddr{} }
