package http2

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"time"
)

// Bounds of a connection; see the package comment.
const (
	streamWindow = 256 << 10
	connWindow   = 16 << 20 // for 64 streams that nobody reads
	maxOut       = 256 << 10
	writeChunk   = 64 << 10 // each has WriteTimeout
	minBuffer    = 4 << 10
	maxBuffer    = 64 << 10
	lingerTime   = time.Second
)

var (
	errGone   = errors.New("http2: the client has gone")
	errKilled = errors.New("http2: the server is shutting down")
)

// conn is one connection. One goroutine reads and handles frames; handlers and drain use
// it from theirs.
type conn struct {
	r   *run
	s   *Server
	nc  net.Conn
	ctx context.Context // of its requests

	// The reader's.
	buf        []byte // what was read and not handled is buf[start:end]
	start, end int
	deadline   time.Time // set on nc
	partial    time.Time // when the wait for the rest of something began; zero = none
	small      int       // reads in a row that would have fitted a smaller buffer

	mu sync.Mutex // guards the rest
	state
}

// state is what frames and streams change.
type state struct {
	now      time.Time // of the last read
	began    bool      // the preface came
	settled  bool      // the first SETTINGS came
	in       *blocks
	block    []byte // of the header block that is arriving
	blockID  uint32 // its stream; 0 = none is
	blockEnd bool   // with END_STREAM
	pieces   int

	streams  map[uint32]*stream
	maxID    uint32     // highest stream the peer has opened
	running  int        // handlers, also of streams that are over
	free     []*stream  // for calls answered inline
	recent   [64]uint32 // streams we reset, whose frames may still come
	recentAt int
	budget   budget

	recvWindow int // what the peer may send
	credit     int // taken off it and not given back yet
	sendWindow int // what we may send
	peerWindow int // initial window of streams
	peerFrame  int
	shrunk     bool // the peer shrank the HPACK table, which the next block must acknowledge

	out       []byte
	spare     []byte
	answer    Answer // scratch
	writing   bool
	scheduled bool                 // somebody will write
	blocked   map[*stream]struct{} // waiting for window or room
	room      chan struct{}        // the reader waits for room
	waiting   bool

	going   bool          // GOAWAY was sent and counts: higher streams than maxID are not taken
	closing bool          // nothing is handled any more; once out is sent the connection ends
	acked   chan struct{} // closed with the answer to drainPing
	pinged  bool
	err     error // the connection has failed
	done    chan struct{}
}

func newConn(r *run, nc net.Conn) *conn {
	c := &conn{r: r, s: r.s, nc: nc, buf: make([]byte, minBuffer)}
	c.ctx = context.WithValue(r.base, http.LocalAddrContextKey, nc.LocalAddr())
	c.state = state{in: newBlocks(), streams: map[uint32]*stream{}, blocked: map[*stream]struct{}{}, room: make(chan struct{}, 1),
		recvWindow: connWindow, sendWindow: defaultWindow, peerWindow: defaultWindow, peerFrame: maxFrame,
		budget: budget{left: budgetMax}, acked: make(chan struct{}), done: make(chan struct{})}
	c.out = appendHead(c.out, 18, frameSettings, 0, 0)
	c.out = appendSetting(c.out, settingMaxStreams, uint32(r.s.o.MaxStreams))
	c.out = appendSetting(c.out, settingInitialWindow, streamWindow)
	c.out = appendSetting(c.out, settingMaxHeaderList, maxFields)
	c.out = appendWindow(c.out, 0, connWindow-defaultWindow)
	return c
}

// serve is the life of a connection.
func (c *conn) serve() {
	defer c.finish()
	defer func() {
		if p := recover(); p != nil {
			c.s.stats.panics.Add(1)
			c.s.o.Logger.Error("Inline panicked", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	for c.await() {
		n, err := c.nc.Read(c.buf[c.end:])
		c.end += n
		if n == 0 && err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				return
			}
			if !c.late() {
				c.linger()
				return
			}
			continue
		}
		if !c.work() {
			c.linger()
			return
		}
		c.fit(n)
	}
}

// finish ends what is left when the connection does.
func (c *conn) finish() {
	c.mu.Lock()
	c.fail(errGone)
	c.mu.Unlock()
	c.nc.Close()
	close(c.done)
}

// await sets the read deadline. It is moved rarely: it may come early, and is then set
// again by late.
func (c *conn) await() bool {
	now := time.Now()
	want := now.Add(c.s.o.IdleTimeout)
	if !c.partial.IsZero() {
		want = c.partial.Add(c.s.o.HeaderTimeout)
	}
	if d := want.Sub(c.deadline); d < 0 || d > c.s.o.IdleTimeout/4 {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.closing { // else the deadline is endIfIdle's, and means the end
			c.deadline = want
			return c.nc.SetReadDeadline(want) == nil
		}
	}
	return true
}

// late reports whether to read on after a deadline has passed.
func (c *conn) late() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = time.Time{}
	switch {
	case c.closing:
		return false
	case !c.partial.IsZero():
		if time.Since(c.partial) < c.s.o.HeaderTimeout {
			return true
		}
		c.shut(codeNone, "the rest of a frame did not come in time")
	case len(c.streams) > 0 || c.running > 0 || time.Since(c.now) < c.s.o.IdleTimeout:
		return true
	default:
		c.shut(codeNone, "idle")
	}
	c.flush()
	return false
}

// work handles what has been read and sends what that brings about. It reports whether
// to read on.
func (c *conn) work() bool {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = now
	for {
		n, err := c.input(c.buf[c.start:c.end])
		c.start += n
		if err != nil {
			c.abort(err)
		}
		// What input left because of this is in the buffer, and nothing need ever come after it.
		full := len(c.out) > maxOut
		c.flush()
		if !c.drained() {
			return false
		}
		if n == 0 && !full {
			break
		}
	}
	c.arrange(now)
	return true
}

// drained waits until the output is small enough to handle more. It reports whether the
// connection goes on.
func (c *conn) drained() bool {
	for len(c.out) > maxOut && c.err == nil {
		c.waiting = true
		c.mu.Unlock()
		<-c.room
		c.mu.Lock()
		c.waiting = false
	}
	return c.err == nil && !c.closing
}

// arrange moves the rest of the input to the front and notes since when it waits.
func (c *conn) arrange(now time.Time) {
	rest := c.buf[c.start:c.end]
	switch {
	case len(rest) == 0 && c.blockID == 0 && c.settled:
		c.partial = time.Time{}
	case c.partial.IsZero(), c.blockID == 0 && len(rest) >= headLength && parseHead(rest).kind == frameData:
		c.partial = now
	}
	if c.start > 0 {
		c.start, c.end = 0, copy(c.buf, rest)
	}
}

// fit adapts the buffer: a frame must fit, and a peer that sends much gets a larger one.
// n is what the last read brought.
func (c *conn) fit(n int) {
	need := c.end + 1
	if c.end >= headLength {
		need = min(headLength+parseHead(c.buf).length, headLength+maxFrame)
	}
	size := len(c.buf)
	switch {
	case need > size || c.end == size:
		size = max(2*size, need)
	case n == size && size < maxBuffer:
		size *= 2
	case n > size/4 || size == minBuffer:
		c.small = 0
		return
	default:
		if c.small++; c.small < 256 || size/2 < need {
			return
		}
		size /= 2
	}
	c.small = 0
	b := make([]byte, size)
	c.end = copy(b, c.buf[:c.end])
	c.buf = b
}

// abort ends the connection because of what the peer did.
func (c *conn) abort(err error) {
	e, ok := err.(connError)
	if !ok {
		e = connError{codeInternal, err.Error()}
	}
	if e.code == codeCalm {
		c.s.stats.abused.Add(1)
	}
	c.s.o.Logger.Debug("HTTP/2 connection ended", "reason", e.text, "from", c.nc.RemoteAddr())
	c.shut(e.code, e.text)
	c.reset(errGone)
}

// shut says goodbye; once that is sent the connection ends.
func (c *conn) shut(code code, text string) {
	if c.closing || c.err != nil {
		return
	}
	c.closing, c.going = true, true
	c.out = appendGoAway(c.out, c.maxID, code, text)
}

// reset ends every stream.
func (c *conn) reset(err error) {
	for id, st := range c.streams {
		delete(c.streams, id)
		st.fail(err)
	}
}

// fail ends the connection at once.
func (c *conn) fail(err error) {
	if c.err != nil {
		return
	}
	c.err = err
	c.reset(err)
	c.wake()
}

// wake tells all who wait for window or room to look again.
func (c *conn) wake() {
	for st := range c.blocked {
		nudge(st.wwake)
	}
	if c.waiting {
		nudge(c.room)
	}
}

func nudge(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// flush sends what is in out, unless somebody does already, who will then send that too.
// The lock is not held meanwhile.
func (c *conn) flush() {
	if c.writing {
		return
	}
	c.writing = true
	for len(c.out) > 0 && c.err == nil {
		b := c.out
		c.out, c.spare = c.spare[:0], nil
		c.mu.Unlock()
		err := c.write(b)
		c.mu.Lock()
		if cap(b) <= maxOut {
			c.spare = b[:0]
		}
		if err != nil {
			c.fail(err)
			c.nc.Close() // ends the reader
		}
		if len(c.blocked) > 0 || c.waiting {
			c.wake()
		}
	}
	c.writing = false
}

// kick has what is in out sent soon: after the goroutines that are ready to run have had
// their turn, whose output then leaves in the same write. The lock is held.
func (c *conn) kick() {
	if c.writing || c.scheduled || len(c.out) == 0 || c.err != nil {
		return
	}
	c.scheduled = true
	c.r.wg.Go(func() {
		runtime.Gosched()
		c.mu.Lock()
		defer c.mu.Unlock()
		c.scheduled = false
		c.flush()
	})
}

func (c *conn) write(b []byte) error {
	for len(b) > 0 {
		n := min(len(b), writeChunk)
		if err := c.nc.SetWriteDeadline(time.Now().Add(c.s.o.WriteTimeout)); err != nil {
			return err
		}
		if _, err := c.nc.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// linger half-closes and reads on for a moment, so that the goodbye arrives: closing with
// bytes unread would reset the connection.
func (c *conn) linger() {
	c.mu.Lock()
	c.flush()
	for c.writing && c.err == nil {
		c.waiting = true
		c.mu.Unlock()
		<-c.room
		c.mu.Lock()
	}
	c.waiting = false
	failed := c.err != nil
	c.mu.Unlock()
	h, ok := c.nc.(interface{ CloseWrite() error })
	if failed || !ok || h.CloseWrite() != nil || c.nc.SetReadDeadline(time.Now().Add(lingerTime)) != nil {
		return
	}
	for left := 1 << 20; left > 0; {
		n, err := c.nc.Read(c.buf)
		if left -= n; err != nil {
			return
		}
	}
}

// drain lets the connection end: no stream is taken that the peer did not open before it
// could know.
func (c *conn) drain() {
	c.mu.Lock()
	if c.closing || c.err != nil {
		c.mu.Unlock()
		return
	}
	c.out = appendGoAway(c.out, maxStreamID, codeNone, "")
	c.out = append(appendHead(c.out, 8, framePing, 0, 0), drainPing...)
	c.flush()
	c.mu.Unlock()
	t := time.NewTimer(time.Second)
	defer t.Stop()
	select {
	case <-c.acked:
	case <-t.C:
	case <-c.done:
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.going {
		c.going = true
		c.out = appendGoAway(c.out, c.maxID, codeNone, "")
		c.endIfIdle()
		c.flush()
	}
}

// drainPing marks the PING whose answer shows that the peer knows of the end.
const drainPing = "outdrain"

// endIfIdle ends a connection that is going and has no stream left.
func (c *conn) endIfIdle() {
	if c.going && !c.closing && len(c.streams) == 0 && c.running == 0 && c.err == nil {
		c.closing = true
		// The reader may be waiting for input; a deadline that has passed wakes it.
		_ = c.nc.SetReadDeadline(time.Unix(1, 0))
	}
}

// kill ends the connection at the end of the grace.
func (c *conn) kill() {
	c.mu.Lock()
	c.fail(errKilled)
	c.mu.Unlock()
	c.nc.Close()
}
