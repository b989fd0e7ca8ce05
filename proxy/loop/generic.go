package loop

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
	"github.com/outrigger-mesh/outrigger/proxy/intercept"
)

// generic serves listeners an event loop cannot take (in-memory networks, other systems)
// with a goroutine per connection.
type generic struct {
	s     *Server
	st    *stats
	base  context.Context // of requests; ends with the grace
	slots chan struct{}

	mu    sync.Mutex
	conns map[*gconn]struct{}
}

// runGeneric serves l until ctx ends and the drain is over.
func (s *Server) runGeneric(ctx context.Context, l net.Listener) error {
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	g := &generic{s: s, st: s.stats[len(s.stats)-1], base: base, slots: make(chan struct{}, s.o.MaxConns), conns: map[*gconn]struct{}{}}
	var wg sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { l.Close() })
	err := g.accept(ctx, l, &wg)
	stop()
	l.Close()
	s.draining.Store(true)
	defer s.draining.Store(false)
	g.each(func(c *gconn) { c.wakeIdle() })
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	grace := time.NewTimer(s.o.Grace)
	defer grace.Stop()
	select {
	case <-ended:
	case <-grace.C:
		s.o.Logger.Warn("requests were cut at the end of the grace", "grace", s.o.Grace)
		cancel()
		g.each(func(c *gconn) { c.kill() })
		<-ended
	}
	s.workers.stop()
	return err
}

func (g *generic) each(f func(*gconn)) {
	g.mu.Lock()
	all := make([]*gconn, 0, len(g.conns))
	for c := range g.conns {
		all = append(all, c)
	}
	g.mu.Unlock()
	for _, c := range all {
		f(c)
	}
}

func (g *generic) accept(ctx context.Context, l net.Listener, wg *sync.WaitGroup) error {
	delay := time.Duration(0)
	for {
		select {
		case g.slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		nc, err := l.Accept()
		if err == nil {
			delay = 0
			c := &gconn{g: g, Conn: nc}
			g.st.accepted.Add(1)
			g.mu.Lock()
			g.conns[c] = struct{}{}
			g.mu.Unlock()
			wg.Go(func() {
				defer func() { g.forget(c); <-g.slots }()
				c.serve()
			})
			continue
		}
		<-g.slots
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		delay = backoff(delay)
		g.s.o.Logger.Warn("accept failed; backing off", "error", err, "delay", delay)
		t := time.NewTimer(delay)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

// backoff is the pause after a failing accept: 5 ms, doubling to 1 s.
func backoff(d time.Duration) time.Duration { return min(max(2*d, 5*time.Millisecond), time.Second) }

func (g *generic) forget(c *gconn) {
	g.mu.Lock()
	delete(g.conns, c)
	g.mu.Unlock()
	g.st.closed.Add(1)
}

// gconn is a connection with its own goroutine; it implements transport.
type gconn struct {
	net.Conn
	g *generic

	mu       sync.Mutex
	idle     bool // between requests: the drain may end it
	rd, wd   bool // deadlines set by the handler
	watched  chan struct{}
	early    []byte
	detached bool
}

// serve is the life of a connection.
func (c *gconn) serve() {
	s := c.g.s
	defer func() {
		if !c.detached {
			c.Conn.Close()
		}
	}()
	var (
		req   http1.Request
		dates http1.DateCache
		buf   []byte
		out   []byte
		seen  int
		known bool
	)
	for {
		if !known && len(buf) > 0 {
			p, ok := intercept.Sniff(buf)
			if known = ok && p == intercept.HTTP1; ok && !known && s.o.Other != nil {
				c.g.st.other.Add(1)
				c.detached = true
				_ = c.Conn.SetDeadline(time.Time{})
				s.o.Other(c.Conn, buf)
				return
			} else if ok {
				known = true
			}
		}
		n, err := 0, error(http1.ErrShort)
		if known {
			n, err = req.Parse(buf, &seen, s.o.Limits)
		}
		if err == http1.ErrShort {
			if buf, err = c.more(buf); err != nil {
				return
			}
			continue
		}
		if skip := http1.EmptyLine(buf); err != nil && skip > 0 {
			seen, buf = 0, append(buf[:0], buf[skip:]...)
			continue
		}
		if err != nil {
			c.g.st.refused.Add(1)
			_, _ = c.Conn.Write(http1.AppendRefusal(out[:0], err, dates.At(time.Now())))
			c.linger()
			return
		}
		seen = 0
		c.mu.Lock()
		c.rd = false
		c.mu.Unlock()
		var o outcome
		if buf, out, o = c.answer(&req, n, buf, out, &dates); o != keepOpen {
			if o == closeLinger {
				c.linger()
			}
			return
		}
	}
}

// answer serves one request and returns the bytes after it.
func (c *gconn) answer(req *http1.Request, n int, buf, out []byte, dates *http1.DateCache) (rest, reuse []byte, o outcome) {
	s := c.g.s
	if s.o.Fast != nil && req.Simple() && !s.draining.Load() {
		req.Date = dates.At(time.Now())
		if b, ok := s.o.Fast(req, out[:0]); ok {
			c.g.st.fast.Add(1)
			if _, err := c.Write(b); err != nil || !req.KeepAlive() {
				o = closeNow
			}
			return append(buf[:0], buf[n:]...), b, o
		}
	}
	c.g.st.slow.Add(1)
	x := s.newExchange(c, c.g.st, req, buf)
	o = x.run(c.g.base, func(context.CancelFunc) {})
	rest = append(buf[:0], x.rest...)
	x.free()
	return rest, out, o
}

// more reads more of a head, or the first bytes of one.
func (c *gconn) more(buf []byte) ([]byte, error) {
	s := c.g.s
	c.mu.Lock()
	c.idle = len(buf) == 0
	wait := s.o.IdleTimeout
	if !c.idle {
		wait = s.o.HeaderTimeout
	}
	if c.idle && s.draining.Load() {
		c.mu.Unlock()
		return nil, net.ErrClosed
	}
	if c.idle || len(buf) > 0 && !c.rd { // the header's time runs from its first byte
		_ = c.Conn.SetReadDeadline(time.Now().Add(wait))
		c.rd = !c.idle
	}
	c.mu.Unlock()
	if cap(buf)-len(buf) < 1024 {
		buf = append(make([]byte, 0, max(4096, 2*cap(buf))), buf...)
	}
	n, err := c.Conn.Read(buf[len(buf):cap(buf)])
	c.mu.Lock()
	c.idle = false
	if len(buf) == 0 {
		c.rd = false
	}
	c.mu.Unlock()
	if n > 0 {
		err = nil
	}
	return buf[:len(buf)+n], err
}

// wakeIdle ends the wait for a next request.
func (c *gconn) wakeIdle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.idle {
		_ = c.Conn.SetReadDeadline(time.Unix(1, 0))
	}
}

// kill ends all I/O on the connection, also after it was hijacked.
func (c *gconn) kill() { c.Conn.Close() }

// lingerTime and lingerBytes bound how long a client that is being refused may go on
// sending: closing at once would reset the connection and lose the answer (RFC 9112 §9.6).
const (
	lingerTime  = 500 * time.Millisecond
	lingerBytes = 1 << 20
)

func (c *gconn) linger() {
	h, ok := c.Conn.(interface{ CloseWrite() error })
	if !ok || h.CloseWrite() != nil {
		return
	}
	_ = c.Conn.SetReadDeadline(time.Now().Add(lingerTime))
	b := make([]byte, 4096)
	for total := 0; total < lingerBytes; {
		n, err := c.Conn.Read(b)
		if err != nil {
			return
		}
		total += n
	}
}

// Read implements transport.
func (c *gconn) Read(p []byte) (int, error) {
	c.mu.Lock()
	if !c.rd {
		_ = c.Conn.SetReadDeadline(time.Now().Add(c.g.s.o.BodyTimeout))
	}
	c.mu.Unlock()
	return c.Conn.Read(p)
}

// Write implements transport.
func (c *gconn) Write(p []byte) (int, error) {
	c.mu.Lock()
	if !c.wd {
		_ = c.Conn.SetWriteDeadline(time.Now().Add(c.g.s.o.WriteTimeout))
	}
	c.mu.Unlock()
	return c.Conn.Write(p)
}

// SetReadDeadline implements transport.
func (c *gconn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rd = !t.IsZero()
	return c.Conn.SetReadDeadline(t)
}

// SetWriteDeadline implements transport.
func (c *gconn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wd = !t.IsZero()
	return c.Conn.SetWriteDeadline(t)
}

func (c *gconn) addresses() (local, remote net.Addr) { return c.LocalAddr(), c.RemoteAddr() }

// watch reads one byte ahead; that is how a goroutine learns that the client left.
func (c *gconn) watch(gone func()) {
	c.watched = make(chan struct{})
	_ = c.SetReadDeadline(time.Time{})
	go func() {
		defer close(c.watched)
		var b [1]byte
		n, err := c.Conn.Read(b[:])
		c.early = append(c.early[:0], b[:n]...)
		if n == 0 && err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			gone()
		}
	}()
}

func (c *gconn) unwatch() []byte {
	_ = c.Conn.SetReadDeadline(time.Unix(1, 0))
	<-c.watched
	_ = c.SetReadDeadline(time.Time{})
	return c.early
}

func (c *gconn) detach() (net.Conn, error) {
	c.detached = true
	return c.Conn, c.Conn.SetDeadline(time.Time{})
}
