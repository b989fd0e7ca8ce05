package loop

import (
	"context"
	"errors"
	"net"
	"net/http"
	"runtime/debug"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// transport is what an exchange needs of a connection. Reads and writes stall no longer
// than BodyTimeout and WriteTimeout unless a deadline was set.
type transport interface {
	Read([]byte) (int, error)
	Write([]byte) (int, error)
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
	addresses() (local, remote net.Addr)
	// watch calls gone, once, when the client goes away or has; until unwatch, nothing
	// else reads. unwatch returns bytes that were read by watching.
	watch(gone func())
	unwatch() []byte
	// detach takes the connection out of the server's hands. After it, the transport may
	// not be used. kill, called at the end of the grace, closes what detach returned.
	detach() (net.Conn, error)
}

// exchange is one request and its answer. It is reused; nothing a handler can keep
// points to it once its response and body are finished.
type exchange struct {
	s        *Server
	t        transport
	stats    *stats
	req      http1.Request
	buf      []byte // the head and what came with it; later scratch for reading
	rest     []byte // of buf: bytes after what was consumed
	watching bool
	cancel   context.CancelFunc
	resume   http.HandlerFunc // serves the request instead of Slow
	passed   bool             // a loop has begun the answer, in chunks
	closes   bool             // and announced that the connection closes after it
	unsent   []byte           // bytes of it that the client had no room for
}

// outcome is what becomes of the connection.
type outcome uint8

const (
	keepOpen outcome = iota
	closeNow
	closeLinger // the client may be sending still: half-close, so that it gets the answer
	hijacked
)

// bufferSize fits a head and a small body, the usual model call.
const bufferSize = 16 << 10

// newExchange copies head and rest; req is the parsed head.
func (s *Server) newExchange(t transport, st *stats, req *http1.Request, data []byte) *exchange {
	x, _ := s.xs.Get().(*exchange)
	if x == nil {
		x = &exchange{s: s, buf: make([]byte, 0, bufferSize)}
	}
	x.t, x.stats = t, st
	x.buf = append(x.buf[:0], data...)
	req.CopyTo(&x.req, x.buf)
	x.rest = x.buf[len(x.req.Head()):]
	return x
}

// free gives x back; rest must not be used any more.
func (x *exchange) free() {
	x.t, x.rest, x.cancel, x.watching, x.resume = nil, nil, nil, false, nil
	x.passed, x.closes, x.unsent = false, false, nil
	if cap(x.buf) <= 4*bufferSize {
		x.s.xs.Put(x)
	}
}

// run serves the request with Slow. base bounds the request's context. started gets the
// cancel function before the handler runs.
func (x *exchange) run(base context.Context, started func(context.CancelFunc)) (o outcome) {
	s := x.s
	w := &response{x: x, declared: -1}
	b := newBody(x, w)
	local, remote := x.t.addresses()
	ctx := context.WithValue(context.WithValue(base, http.ServerContextKey, s.identity), http.LocalAddrContextKey, local)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	x.cancel = cancel
	started(cancel)
	r, err := x.request(ctx, b, remote)
	if err != nil {
		x.stats.refused.Add(1)
		_, _ = x.t.Write(http1.AppendRefusal(nil, err, nil))
		return closeLinger
	}
	w.method, w.minor = r.Method, r.ProtoMinor
	w.mustClose = !x.req.KeepAlive() || s.draining.Load()
	if x.passed {
		w.begun(x.unsent, x.closes)
	}
	if b == nil {
		x.bodyRead()
	}
	if !x.call(w, r) {
		w.abandon()
		if b != nil {
			b.finish(0)
		}
		x.rest = append(x.unwatch(), x.rest...)
		if w.isHijacked() {
			return hijacked
		}
		return closeNow
	}
	return x.finish(w, b)
}

// call runs the handler and reports whether it returned normally.
func (x *exchange) call(w *response, r *http.Request) (ok bool) {
	defer func() {
		if ok {
			return
		}
		// A panic, or a Goexit, which recover cannot tell.
		if p := recover(); p != nil && p != http.ErrAbortHandler {
			x.stats.panics.Add(1)
			x.s.o.Logger.Error("handler panicked", "panic", p, "method", r.Method, "path", r.URL.Path, "stack", string(debug.Stack()))
		}
	}()
	if x.resume != nil {
		x.resume(w, r)
		return true
	}
	x.s.o.Slow.ServeHTTP(w, r)
	return true
}

// finish completes answer and body after the handler has returned.
func (x *exchange) finish(w *response, b *body) outcome {
	if w.isHijacked() {
		if b != nil {
			b.finish(0)
		}
		return hijacked
	}
	o := keepOpen
	if b != nil {
		if refused := b.refusal(); refused != nil && w.refuse(refused) {
			x.stats.refused.Add(1)
		}
	}
	if !w.finish() {
		o = closeNow
	}
	if b != nil && !b.finish(maxDrain) {
		o = closeLinger
	}
	if early := x.unwatch(); len(early) > 0 {
		x.rest = append(early, x.rest...) // x.rest is empty: watching begins when all is read
	}
	_ = x.t.SetReadDeadline(time.Time{})
	_ = x.t.SetWriteDeadline(time.Time{})
	if o == keepOpen && x.req.Upgrade() == http1.UpgradeWebSocket && w.status == http.StatusSwitchingProtocols {
		o = closeNow // said to switch and did not hijack
	}
	return o
}

// maxDrain is how much of a body the handler left is read to keep the connection, as in
// net/http.
const maxDrain = 256 << 10

// bodyRead begins to watch for the client going away: from now on the handler reads
// nothing that would show it.
func (x *exchange) bodyRead() {
	if !x.watching && len(x.rest) == 0 {
		x.watching = true
		x.t.watch(x.cancel)
	}
}

func (x *exchange) unwatch() []byte {
	if !x.watching {
		return nil
	}
	x.watching = false
	return x.t.unwatch()
}

// read reads from the connection; used by the body.
func (x *exchange) read(p []byte) (int, error) {
	if len(x.rest) > 0 {
		n := copy(p, x.rest)
		x.rest = x.rest[n:]
		return n, nil
	}
	return x.t.Read(p)
}

// refill reads into x's own buffer, which must have been consumed.
func (x *exchange) refill() error {
	n, err := x.t.Read(x.buf[:cap(x.buf)])
	x.rest = x.buf[:n]
	if n > 0 {
		return nil
	}
	return err
}

var errFinished = errors.New("loop: the request was finished when its handler returned")
