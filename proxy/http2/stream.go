package http2

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"runtime/debug"
	"time"

	"golang.org/x/net/http2/hpack"
)

// stream is one call. conn.mu guards it.
type stream struct {
	c    *conn
	id   uint32
	head *Head

	pending      bool // Inline may still answer it; nobody else has seen it
	remoteClosed bool // the request is complete, or was reset
	localClosed  bool // the answer is
	err          error

	recvWindow int
	sendWindow int
	body       []byte // received and not read: body[at:]
	at         int
	credit     int   // read and not given back yet
	got        int64 // of the body
	trailer    []hpack.HeaderField

	cancel       context.CancelFunc
	rwake, wwake chan struct{} // capacity 1; of streams with a handler
	rd, wd       time.Time     // deadlines the handler set
}

// open begins a stream.
func (c *conn) open(id uint32, h *Head, end bool) {
	var st *stream
	if n := len(c.free); n > 0 {
		st, c.free = c.free[n-1], c.free[:n-1]
	} else {
		st = new(stream)
	}
	st.c, st.id, st.head, st.remoteClosed = c, id, h, end
	st.recvWindow, st.sendWindow = streamWindow, c.peerWindow
	c.streams[id] = st
	if st.pending = h.class != 0 && !end; !st.pending {
		c.handle(st)
	}
}

// maxFree bounds the streams kept for reuse.
const maxFree = 64

// recycle ends a stream nobody but the reader has seen.
func (c *conn) recycle(st *stream) {
	delete(c.streams, st.id)
	if body := st.body[:0]; len(c.free) < maxFree {
		*st = stream{body: body}
		c.free = append(c.free, st)
	}
	if c.going {
		c.endIfIdle()
	}
}

// inline lets Inline answer a complete call. It declines also when the answer does not fit
// into the windows at once: waiting is for goroutines.
func (c *conn) inline(st *stream, body []byte) bool {
	a := &c.answer
	a.Block, a.Body, a.Trailer = c.acknowledgeTable(a.Block[:0]), nil, nil
	if !c.s.o.Inline.Answer(st.head.class, body, a) || len(a.Body) > min(c.sendWindow, st.sendWindow) {
		return false
	}
	c.shrunk = false
	last := uint8(flagEndStream)
	if a.Trailer != nil {
		last = 0
	}
	head := last
	if len(a.Body) > 0 {
		head = 0
	}
	c.out = appendFields(c.out, st.id, head, a.Block, c.peerFrame)
	c.sendWindow -= len(a.Body)
	for b := a.Body; len(b) > 0; {
		n, flags := min(len(b), c.peerFrame), uint8(0)
		if n == len(b) {
			flags = last
		}
		c.out = append(appendHead(c.out, n, frameData, flags, st.id), b[:n]...)
		b = b[n:]
	}
	if a.Trailer != nil {
		c.out = appendFields(c.out, st.id, flagEndStream, a.Trailer, c.peerFrame)
	}
	a.Body, a.Trailer = nil, nil
	c.s.stats.inline.Add(1)
	c.budget.earn(2)
	return true
}

// acknowledgeTable begins a block with what a peer that shrank the dynamic table may
// insist on (RFC 7541 section 4.2): its new size, of which 0 is always allowed.
func (c *conn) acknowledgeTable(block []byte) []byte {
	if c.shrunk {
		return append(block, 0x20)
	}
	return block
}

// giveCredit returns what was taken off the connection's window, in large pieces.
func (c *conn) giveCredit(n int) {
	if c.credit += n; c.credit >= connWindow/4 {
		c.out = appendWindow(c.out, 0, c.credit)
		c.recvWindow += c.credit
		c.credit = 0
	}
}

// consumed returns credit to a stream and to the connection.
func (c *conn) consumed(st *stream, n int) {
	c.giveCredit(n)
	if st.credit += n; st.credit >= streamWindow/4 && !st.remoteClosed {
		c.out = appendWindow(c.out, st.id, st.credit)
		st.recvWindow += st.credit
		st.credit = 0
	}
}

// close takes a stream off the books.
func (c *conn) close(st *stream) {
	delete(c.streams, st.id)
	if c.going {
		c.endIfIdle()
	}
}

// fail ends a stream that is off the books: whoever waits for it gives up.
func (st *stream) fail(err error) {
	if st.err != nil {
		return
	}
	st.err = err
	st.c.giveCredit(len(st.body) - st.at)
	st.body, st.at = nil, 0
	if st.cancel != nil {
		st.cancel()
	}
	if st.rwake != nil {
		nudge(st.rwake)
		nudge(st.wwake)
	}
}

// handle gives a stream to Handler, on a goroutine.
func (c *conn) handle(st *stream) {
	st.pending = false
	st.rwake, st.wwake = make(chan struct{}, 1), make(chan struct{}, 1)
	var ctx context.Context
	ctx, st.cancel = context.WithCancel(c.ctx)
	c.running++
	c.s.stats.handled.Add(1)
	c.r.wg.Go(func() { st.serve(ctx) })
}

// serve is the life of a stream with a handler.
func (st *stream) serve(ctx context.Context) {
	c := st.c
	defer st.cancel()
	w := &response{st: st, declared: -1}
	ok := false
	defer func() {
		if p := recover(); p != nil && p != http.ErrAbortHandler {
			c.s.stats.panics.Add(1)
			c.s.o.Logger.Error("handler panicked", "panic", p, "method", st.head.Method, "path", st.head.Path, "stack", string(debug.Stack()))
		}
		w.end(ok)
		st.end(ok)
	}()
	r, err := st.head.request()
	if err != nil {
		w.method = st.head.Method
		w.WriteHeader(http.StatusBadRequest)
		ok = true
		return
	}
	r.RemoteAddr = c.nc.RemoteAddr().String()
	r = r.WithContext(ctx)
	b := &body{st: st, w: w, r: r}
	r.Body = b
	c.mu.Lock()
	if st.remoteClosed && len(st.body) == 0 && st.trailer == nil {
		r.Body, r.ContentLength = http.NoBody, 0
	}
	c.mu.Unlock()
	w.method = r.Method
	w.expects = st.head.Get("expect") != "" && r.Header.Get("Expect") == "100-continue"
	c.s.o.Handler.ServeHTTP(w, r)
	ok = true
}

// end closes the books of a stream whose handler has returned; if it did not complete its
// answer the stream is reset.
func (st *stream) end(complete bool) {
	c := st.c
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running--
	if c.streams[st.id] == st {
		switch {
		case !complete || !st.localClosed:
			c.out = appendReset(c.out, st.id, codeInternal)
			c.noteReset(st.id)
		case !st.remoteClosed: // nobody will read the rest
			c.out = appendReset(c.out, st.id, codeNone)
			c.noteReset(st.id)
		}
		c.budget.earn(2)
		c.close(st)
		st.fail(errFinished)
	} else if c.going {
		c.endIfIdle()
	}
	c.kick()
}

var errFinished = errors.New("http2: the request was finished when its handler returned")

// wait blocks until ch has something, or until deadline, or, without one, until limit
// (0 = for ever) after the wait began, which *stall remembers.
func wait(ch chan struct{}, deadline time.Time, stall *time.Time, limit time.Duration) error {
	if deadline.IsZero() && limit == 0 {
		<-ch
		return nil
	}
	now := time.Now()
	if deadline.IsZero() {
		if stall.IsZero() {
			*stall = now.Add(limit)
		}
		deadline = *stall
	}
	t := time.NewTimer(deadline.Sub(now))
	defer t.Stop()
	select {
	case <-ch:
		return nil
	case <-t.C:
		return os.ErrDeadlineExceeded
	}
}

// limit is how long a stream may stall; 0 = for ever.
func (st *stream) limit(d time.Duration) time.Duration {
	if st.head.grpc {
		return 0
	}
	return d
}

// read is what a body's Read does.
func (st *stream) read(p []byte, b *body) (int, error) {
	c := st.c
	var stall time.Time
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case b.shut:
			return 0, http.ErrBodyReadAfterClose
		case st.err != nil:
			return 0, st.err
		case !st.rd.IsZero() && !time.Now().Before(st.rd):
			return 0, os.ErrDeadlineExceeded
		case st.at < len(st.body):
			n := copy(p, st.body[st.at:])
			if st.at += n; st.at == len(st.body) {
				if st.at = 0; cap(st.body) > maxFrame {
					st.body = nil
				} else {
					st.body = st.body[:0]
				}
			}
			c.consumed(st, n)
			c.kick()
			return n, nil
		case st.remoteClosed:
			b.trailers()
			return 0, io.EOF
		}
		rd := st.rd
		c.mu.Unlock()
		err := wait(st.rwake, rd, &stall, st.limit(c.s.o.BodyTimeout))
		c.mu.Lock()
		if err != nil && st.rd == rd {
			return 0, err
		}
	}
}

// send sends a header block, content and, at the end, a trailer; each may be nil. It
// returns when the content is in the connection's buffer, with an error when the stream
// is over or stalls too long.
func (st *stream) send(block, p, trailer []byte, end bool) error {
	c := st.c
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.kick()
	if st.err != nil {
		return st.err
	}
	if block != nil {
		flags := uint8(0)
		if end && len(p) == 0 && trailer == nil {
			flags, st.localClosed = flagEndStream, true
		}
		c.fields(st, flags, block)
	}
	var stall time.Time
	for len(p) > 0 {
		n, err := st.window(&stall)
		if err != nil {
			return err
		}
		n = min(n, len(p))
		flags := uint8(0)
		if end && n == len(p) && trailer == nil {
			flags, st.localClosed = flagEndStream, true
		}
		c.out = append(appendHead(c.out, n, frameData, flags, st.id), p[:n]...)
		c.sendWindow, st.sendWindow = c.sendWindow-n, st.sendWindow-n
		c.budget.earn(1)
		p, stall = p[n:], time.Time{}
	}
	switch {
	case !end || st.localClosed:
	case trailer != nil:
		st.localClosed = true
		c.fields(st, flagEndStream, trailer)
	default:
		st.localClosed = true
		c.out = appendHead(c.out, 0, frameData, flagEndStream, st.id)
	}
	return nil
}

func (c *conn) fields(st *stream, flags uint8, block []byte) {
	if c.shrunk {
		block = append(c.acknowledgeTable(nil), block...)
		c.shrunk = false
	}
	c.out = appendFields(c.out, st.id, flags, block, c.peerFrame)
}

// window waits until something may be sent and returns how much. The lock is held, but
// not while waiting.
func (st *stream) window(stall *time.Time) (int, error) {
	c := st.c
	for {
		if st.err != nil {
			return 0, st.err
		}
		if !st.wd.IsZero() && !time.Now().Before(st.wd) {
			return 0, os.ErrDeadlineExceeded
		}
		if n := min(c.sendWindow, st.sendWindow, c.peerFrame); n > 0 && len(c.out) <= maxOut {
			return n, nil
		}
		c.blocked[st] = struct{}{}
		if len(c.out) > 0 && !c.writing {
			c.flush() // and look again
		} else {
			wd := st.wd
			c.mu.Unlock()
			err := wait(st.wwake, wd, stall, st.limit(c.s.o.WriteTimeout))
			c.mu.Lock()
			if err != nil && st.wd == wd {
				delete(c.blocked, st)
				return 0, err
			}
		}
		delete(c.blocked, st)
	}
}
