package upstream

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// maxDirect is the largest request body a Direct sends itself. The whole of it is written
// before the answer is looked at, so it must fit what the kernels of both ends buffer:
// otherwise a server that answers without reading would be waited for in vain.
const maxDirect = 64 << 10

// Direct is an http.RoundTripper for calls of models: the caller's goroutine writes the
// request with one system call and reads the answer, where http.Transport hands both to
// goroutines of the connection. It serves plain HTTP/1.1 without upgrade, trailers and
// expectations, with a body of known length up to 64 KiB; everything else goes to the
// transport it was made with.
//
// Promises. An answer that two readers could frame differently (see http1.Answer), is cut,
// or is followed by bytes nobody asked for ends its connection, and is an error if it was
// not complete. A kept connection is looked at before it is used: one that was closed, or
// has anything to read, is dropped. If it is lost nevertheless before any byte of an answer
// came, and the request may be repeated (its method is idempotent, or it has an
// Idempotency-Key entry, even an empty one, as with http.Transport), one fresh connection is
// tried. Connections per address are limited by MaxPerHost, requests beyond wait in the
// order they came, until their context ends. Idle ones are used last in first out and
// closed after IdleTimeout/2 to IdleTimeout. A context that ends closes the connection, at
// any time until the body's end.
//
// A response's body is for one goroutine at a time, Close included; its trailers are
// checked and dropped. All methods are safe for concurrent use.
type Direct struct {
	rest        http.RoundTripper
	dial        DialFunc
	headTimeout time.Duration
	idleTimeout time.Duration
	maxIdle     int
	maxIdleHost int
	maxHost     int
	scratch     sync.Pool // *scratch

	mu    sync.Mutex // held for bookkeeping only, never during I/O
	hosts map[string]*host
	idle  int
	tick  uint64 // counts sweeps
	timer *time.Timer
}

// host is what is open to one address. It is guarded by Direct.mu and exists as long as
// anything is.
type host struct {
	address string
	inUse   int
	idle    []*link // oldest first
	waiting []chan struct{}
}

// NewDirect returns a Direct with o's dialer and limits; rest sends what it does not. It
// starts nothing; a timer runs while connections are idle.
func NewDirect(o TransportOptions, rest http.RoundTripper) *Direct {
	return &Direct{
		rest: rest, hosts: map[string]*host{},
		dial:        GuardedDial(o.Dial, o.Guard, orDefault(o.DialTimeout, 5*time.Second)),
		headTimeout: o.HeadTimeout,
		idleTimeout: orDefault(o.IdleTimeout, 90*time.Second),
		maxIdle:     orDefault(o.MaxIdle, 2048),
		maxIdleHost: orDefault(o.MaxIdlePerHost, 256),
		maxHost:     orDefault(o.MaxPerHost, 1024),
	}
}

// takes reports whether d can send r itself.
func takes(r *http.Request) bool {
	if r.URL == nil || r.URL.Scheme != "http" || r.URL.Opaque != "" || r.URL.User != nil || !plainHost(r.URL.Host) || !plainHost(r.Host) ||
		r.ContentLength < 0 || r.ContentLength > maxDirect || r.ContentLength == 0 && r.Body != nil && r.Body != http.NoBody ||
		r.Method == "" || r.Method == http.MethodConnect || r.Close || len(r.Trailer) > 0 || len(r.TransferEncoding) > 0 {
		return false
	}
	for _, name := range [...]string{"Upgrade", "Te", "Trailer", "Expect", "Connection", "Transfer-Encoding"} {
		if _, ok := r.Header[name]; ok {
			return false
		}
	}
	return true
}

// plainHost: names in other scripts, zones and user info are left to net/http.
func plainHost(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z':
		case strings.IndexByte(".-_:[]", c) >= 0:
		default:
			return false
		}
	}
	return true
}

// AddressOf is where to dial: an address without a port means 80.
func AddressOf(hostport string) string {
	if i := strings.LastIndexByte(hostport, ':'); i > strings.LastIndexByte(hostport, ']') {
		return hostport
	}
	return hostport + ":80"
}

// RoundTrip implements http.RoundTripper.
func (d *Direct) RoundTrip(r *http.Request) (*http.Response, error) {
	if !takes(r) {
		return d.rest.RoundTrip(r)
	}
	if r.Body != nil {
		defer r.Body.Close()
	}
	ctx := r.Context()
	address := AddressOf(r.URL.Host)
	l, err := d.enter(ctx, address)
	if err != nil {
		return nil, err
	}
	kept := l != nil && l.usable()
	if l != nil && !kept {
		l.nc.Close()
	}
	for body := r.Body; ; {
		if !kept {
			nc, err := d.dial(ctx, "tcp", address)
			if err != nil {
				d.leave(address, nil)
				return nil, err
			}
			l = newLink(nc)
		}
		x := d.begin(ctx, l, address)
		resp, err := x.exchange(r, body)
		if err == nil {
			return resp, nil
		}
		silent := x.got == 0
		l.nc.Close()
		x.free()
		if !kept || !silent || ctx.Err() != nil || !replayable(r) {
			d.leave(address, nil)
			return nil, endOf(ctx, err)
		}
		kept = false
		if r.GetBody != nil {
			again, gerr := r.GetBody()
			if gerr != nil {
				d.leave(address, nil)
				return nil, gerr
			}
			body = again
		}
	}
}

// replayable follows http.Transport: a kept connection may have been closed by the server
// while the request was under way to it, and asking again does no harm.
func replayable(r *http.Request) bool {
	if r.Body != nil && r.Body != http.NoBody && r.GetBody == nil {
		return false
	}
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		return true
	}
	_, ok := r.Header["Idempotency-Key"]
	if !ok {
		_, ok = r.Header["X-Idempotency-Key"]
	}
	return ok
}

// endOf prefers the reason a context ended to what its end did to the connection.
func endOf(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// enter takes a place for a connection to address, and an idle connection if there is one.
func (d *Direct) enter(ctx context.Context, address string) (*link, error) {
	d.mu.Lock()
	h := d.hosts[address]
	if h == nil {
		h = &host{address: address}
		d.hosts[address] = h
	}
	if h.inUse < d.maxHost {
		h.inUse++
		l := d.pop(h)
		d.mu.Unlock()
		return l, nil
	}
	turn := make(chan struct{})
	h.waiting = append(h.waiting, turn)
	d.mu.Unlock()
	select {
	case <-turn: // the place is ours
		d.mu.Lock()
		l := d.pop(h)
		d.mu.Unlock()
		return l, nil
	case <-ctx.Done():
	}
	d.mu.Lock()
	i := slices.Index(h.waiting, turn)
	if i >= 0 {
		h.waiting = slices.Delete(h.waiting, i, i+1)
	}
	d.mu.Unlock()
	if i < 0 { // given a place just now
		d.leave(address, nil)
	}
	return nil, context.Cause(ctx)
}

// pop runs with the lock held.
func (d *Direct) pop(h *host) *link {
	n := len(h.idle)
	if n == 0 {
		return nil
	}
	l := h.idle[n-1]
	h.idle[n-1] = nil
	h.idle = h.idle[:n-1]
	d.idle--
	return l
}

// leave gives a place back, and the connection that held it unless that is nil.
func (d *Direct) leave(address string, l *link) {
	d.mu.Lock()
	h := d.hosts[address] // exists: it has a place in use
	if l != nil && len(h.idle) < d.maxIdleHost && d.idle < d.maxIdle {
		l.tick = d.tick
		h.idle = append(h.idle, l)
		d.idle++
		l = nil
		if d.timer == nil {
			d.timer = time.AfterFunc(d.idleTimeout/2, d.sweep)
		}
	}
	if len(h.waiting) > 0 {
		close(h.waiting[0])
		h.waiting = slices.Delete(h.waiting, 0, 1)
	} else {
		h.inUse--
		d.drop(h)
	}
	d.mu.Unlock()
	if l != nil {
		l.nc.Close()
	}
}

// drop forgets an address nothing is open to; it runs with the lock held.
func (d *Direct) drop(h *host) {
	if h.inUse == 0 && len(h.idle) == 0 {
		delete(d.hosts, h.address)
	}
}

// sweep closes what was idle at the last sweep and still is.
func (d *Direct) sweep() {
	d.mu.Lock()
	d.tick++
	var old []*link
	for _, h := range d.hosts {
		n := 0
		for n < len(h.idle) && h.idle[n].tick+1 < d.tick {
			n++
		}
		old = append(old, h.idle[:n]...)
		h.idle = slices.Delete(h.idle, 0, n)
		d.idle -= n
		d.drop(h)
	}
	d.timer = nil
	if d.idle > 0 {
		d.timer = time.AfterFunc(d.idleTimeout/2, d.sweep)
	}
	d.mu.Unlock()
	for _, l := range old {
		l.nc.Close()
	}
}

// CloseIdleConnections closes every connection that carries no request.
func (d *Direct) CloseIdleConnections() {
	d.mu.Lock()
	var all []*link
	for _, h := range d.hosts {
		all = append(all, h.idle...)
		h.idle = nil
		d.drop(h)
	}
	d.idle = 0
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.mu.Unlock()
	for _, l := range all {
		l.nc.Close()
	}
	if c, ok := d.rest.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}
