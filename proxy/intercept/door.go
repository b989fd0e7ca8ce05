package intercept

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"
)

// Options configure a Door.
type Options struct {
	SniffTimeout time.Duration // default 10 s
	MaxPending   int           // connections being looked at, default 1024
	Logger       *slog.Logger
	// Refused is called for a connection no server takes, with what it seemed to speak;
	// it owns the connection. nil closes it.
	Refused func(c net.Conn, p Protocol)
}

// Door splits one listener by protocol.
type Door struct {
	opts    Options
	pending chan struct{} // slots
	http1   *branch
	http2   *branch
}

// New returns a door; it accepts nothing before Run.
func New(o Options) *Door {
	if o.SniffTimeout == 0 {
		o.SniffTimeout = 10 * time.Second
	}
	if o.MaxPending == 0 {
		o.MaxPending = 1024
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Refused == nil {
		o.Refused = func(c net.Conn, _ Protocol) { c.Close() }
	}
	return &Door{opts: o, pending: make(chan struct{}, o.MaxPending), http1: newBranch(), http2: newBranch()}
}

// HTTP1 is the listener to serve HTTP/1 on; it ends when Run ends.
func (d *Door) HTTP1() net.Listener { return d.http1 }

// HTTP2 is the listener to serve HTTP/2 in the clear on; it ends when Run ends.
func (d *Door) HTTP2() net.Listener { return d.http2 }

// Run accepts from l until ctx ends (it then closes l) or l is closed by somebody else,
// which is an error. Connections already handed over live on.
func (d *Door) Run(ctx context.Context, l net.Listener) error {
	d.http1.setAddr(l.Addr())
	d.http2.setAddr(l.Addr())
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer func() {
		d.http1.Close()
		d.http2.Close()
		wg.Wait()
	}()
	delay := time.Duration(0)
	for {
		select {
		case d.pending <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, err := l.Accept()
		if err != nil {
			<-d.pending
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// Most likely out of descriptors: existing connections must free some first.
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			d.opts.Logger.Warn("accept failed; backing off", "error", err, "delay", delay)
			t := time.NewTimer(delay)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return nil
			}
			continue
		}
		delay = 0
		wg.Go(func() {
			defer func() { <-d.pending }()
			d.admit(ctx, c, nil)
		})
	}
}

// Admit takes a connection that somebody else accepted and read first from; it returns
// when the connection is handed on. With ctx over, or after Close, it closes c.
func (d *Door) Admit(ctx context.Context, c net.Conn, first []byte) {
	select {
	case d.pending <- struct{}{}:
	case <-ctx.Done():
		c.Close()
		return
	}
	defer func() { <-d.pending }()
	d.admit(ctx, c, first)
}

// Close ends the listeners of a door that is fed by Admit instead of Run.
func (d *Door) Close() {
	d.http1.Close()
	d.http2.Close()
}

// admit looks at the first bytes and hands the connection on.
func (d *Door) admit(ctx context.Context, c net.Conn, head []byte) {
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Now()) })
	head, p := d.look(c, head)
	if !stop() || c.SetReadDeadline(time.Time{}) != nil {
		c.Close() // shutting down, or already broken
		return
	}
	rc := &replayed{Conn: c, head: head}
	switch p {
	case HTTP1:
		d.http1.deliver(ctx, rc)
	case HTTP2:
		d.http2.deliver(ctx, rc)
	default:
		d.opts.Logger.Debug("connection refused", "from", c.RemoteAddr(), "protocol", p)
		d.opts.Refused(rc, p)
	}
}

// look reads until Sniff decides, the peer stops, or the time is up.
func (d *Door) look(c net.Conn, head []byte) ([]byte, Protocol) {
	if p, ok := Sniff(head); ok {
		return head, p
	}
	if err := c.SetReadDeadline(time.Now().Add(d.opts.SniffTimeout)); err != nil {
		return nil, Unknown
	}
	var buf [64]byte
	for {
		n, err := c.Read(buf[:])
		head = append(head, buf[:n]...)
		if p, ok := Sniff(head); ok || err != nil {
			return head, p
		}
	}
}

// replayed delivers the bytes that were looked at before the rest.
type replayed struct {
	net.Conn
	head []byte // owned by the reader
}

// Read returns what was looked at first, then reads on.
func (c *replayed) Read(b []byte) (int, error) {
	if len(c.head) > 0 {
		n := copy(b, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

// Unwrap returns the connection itself once nothing is left to replay, so that a copy
// between two bare connections can stay in the kernel; otherwise c.
func (c *replayed) Unwrap() net.Conn {
	if len(c.head) == 0 {
		return c.Conn
	}
	return c
}

// branch is a listener fed by the door.
type branch struct {
	queue chan net.Conn
	done  chan struct{}
	once  sync.Once

	mu   sync.Mutex
	addr net.Addr
}

func newBranch() *branch { return &branch{queue: make(chan net.Conn), done: make(chan struct{})} }

func (b *branch) setAddr(a net.Addr) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.addr = a
}

func (b *branch) deliver(ctx context.Context, c net.Conn) {
	select {
	case b.queue <- c:
	case <-b.done:
		c.Close()
	case <-ctx.Done():
		c.Close()
	}
}

// Accept waits for the next connection of this protocol.
func (b *branch) Accept() (net.Conn, error) {
	select {
	case c := <-b.queue:
		return c, nil
	case <-b.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept; it may be called more than once.
func (b *branch) Close() error {
	b.once.Do(func() { close(b.done) })
	return nil
}

// Addr is the address of the real listener.
func (b *branch) Addr() net.Addr {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.addr == nil {
		return pipeAddr{}
	}
	return b.addr
}

// pipeAddr stands for "not bound yet".
type pipeAddr struct{}

func (pipeAddr) Network() string { return "none" }
func (pipeAddr) String() string  { return "unbound" }
