package loop

import (
	"fmt"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
	"github.com/outrigger-mesh/outrigger/proxy/intercept"
)

// Who a connection belongs to.
const (
	inLoop uint32 = iota
	inHandler
)

// conn is one connection. Its descriptor is closed by the loop only, or by detach.
type conn struct {
	// Set when accepted.
	fd     int
	gen    int32 // tells events of an earlier connection with the same descriptor
	l      *loop
	remote net.Addr

	// The owner's: the loop while state is inLoop, the worker while it is inHandler.
	in       []byte // bytes that are no complete head yet; nil when idle
	seen     int    // how much of in was looked at
	deadline int64  // on the loop's clock
	armed    bool   // EPOLLOUT is in the interest set

	// The loop's.
	timer     timer
	out       []byte // answers the client has not taken yet; then nothing is read
	known     bool   // HTTP/1 was recognised
	heading   bool   // the deadline is that of a head
	closing   bool   // once out is sent
	linger    bool   // ... by half-closing first
	lingering bool   // half-closed; the number of bytes dropped is in seen
	queued    bool   // in loop.again
	call      *link  // carries its request; then in[:used] is the request
	used      int
	pending   bool // readable meanwhile
	ends      bool // closed after the answer
	left      bool // the client has half-closed; an edge tells it once, and it stays so
	waiting   bool // for the rest of a body, which the loop would relay
	impatient bool // it has waited long enough

	state atomic.Uint32

	mu sync.Mutex // guards the rest, of use while state is inHandler
	handlerSide
}

// rawRead reads from a socket without telling the scheduler: the descriptor does not block.
// recvfrom and sendto, because read and write go through the file system's layer first, a
// twentieth of what a request costs.
func rawRead(fd int, b []byte) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), 0, 0, 0)
	return int(n), e
}

// rawWrite writes likewise.
func rawWrite(fd int, b []byte) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
	return int(n), e
}

// arm sets the deadline of c and makes the wheel look no later.
func (l *loop) arm(c *conn, d time.Duration) {
	c.deadline = l.now + int64(d)
	l.wheel.set(&c.timer, c.deadline)
}

// due is called by the wheel.
func (l *loop) due(t *timer) {
	if t.link != nil {
		l.linkDue(t.link)
		return
	}
	c := t.conn
	switch {
	case c.state.Load() == inHandler, c.call != nil:
		// Its own waits have limits. Look again soon: a deadline may be set meanwhile.
		l.wheel.set(t, l.now+int64(time.Second))
	case c.deadline > l.now:
		l.wheel.set(t, c.deadline)
	case c.waiting:
		l.impatience(c)
	default:
		l.drop(c)
	}
}

// drop closes c, which belongs to the loop.
func (l *loop) drop(c *conn) {
	if l.conns[c.fd] != c {
		return
	}
	if c.call != nil {
		l.abandon(c)
	}
	l.conns[c.fd] = nil
	l.unlink(c)
	unix.Close(c.fd) // takes it out of the epoll set: there is no duplicate
}

// unlink removes c from the loop's books.
func (l *loop) unlink(c *conn) {
	l.wheel.remove(&c.timer)
	c.queued = false
	c.in, c.out = nil, nil
	l.open--
	l.st.closed.Add(1)
	l.g.give()
}

// ready handles readiness of a connection that belongs to the loop. exhaust says to read
// until nothing comes, because an earlier report may have been lost.
func (l *loop) ready(c *conn, ev uint32, exhaust bool) {
	c.left = c.left || ev&gone != 0
	if c.call != nil {
		if c.pending = true; c.left {
			l.drop(c) // nobody waits for the answer
		}
		return
	}
	if len(c.out) > 0 {
		if ev&(unix.EPOLLHUP|unix.EPOLLERR) != 0 {
			l.drop(c)
		} else if ev&unix.EPOLLOUT != 0 {
			l.writable(c)
		}
		return // nothing is read while answers wait
	}
	if c.lingering {
		l.discard(c)
		return
	}
	for range maxReads {
		data, n, e := l.read(c)
		switch {
		case e == unix.EAGAIN:
			return
		case e == unix.EINTR:
			continue
		case (e != 0 || n == 0) && c.waiting:
			c.left = true
			l.impatience(c)
			return
		case e != 0, n == 0:
			l.drop(c) // also with half a head, to which there is no answer
			return
		}
		l.more = exhaust || c.left || len(data) == cap(data)
		if !l.process(c, data) || !l.more {
			return
		}
	}
	if !c.queued {
		c.queued = true
		l.again = append(l.again, c)
	}
}

// read reads into the loop's buffer, or after the piece of a head that c holds. data is
// all that is to be looked at, n what was read.
func (l *loop) read(c *conn) (data []byte, n int, e syscall.Errno) {
	if len(c.in) == 0 {
		n, e = rawRead(c.fd, l.buf)
		return l.buf[:max(0, n)], n, e
	}
	if cap(c.in)-len(c.in) < 512 {
		c.in = append(make([]byte, 0, max(2048, 2*cap(c.in))), c.in...)
	}
	if n, e = rawRead(c.fd, c.in[len(c.in):cap(c.in)]); n > 0 && e == 0 {
		c.in = c.in[:len(c.in)+n]
	}
	return c.in, n, e
}

// process serves the requests in data, which is in l.buf or c.in. It reports whether c
// is the loop's, open, and may be read from.
func (l *loop) process(c *conn, data []byte) bool {
	out := l.out[:0]
	for len(data) > 0 {
		if !c.known {
			p, ok := intercept.Sniff(data)
			if !ok {
				break
			}
			if p != intercept.HTTP1 && l.s.o.Other != nil {
				l.other(c, data)
				return false
			}
			c.known = true
		}
		n, err := l.req.Parse(data, &c.seen, l.s.o.Limits)
		if err == http1.ErrShort {
			break
		}
		if skip := http1.EmptyLine(data); err != nil && skip > 0 {
			c.seen, data = 0, data[skip:]
			continue
		}
		if err != nil {
			l.st.refused.Add(1)
			out = http1.AppendRefusal(out, err, l.date)
			c.closing, c.linger, data = true, true, nil
			break
		}
		c.seen = 0
		if l.s.o.Fast != nil && !l.draining && l.req.Simple() {
			l.req.Date = l.date
			if answer, ok, panicked := l.fast(out); panicked {
				l.drop(c)
				return false
			} else if ok {
				l.st.fast.Add(1)
				out, data = answer, data[n:]
				if !l.req.KeepAlive() {
					c.closing, c.linger, data = true, len(data) > 0 || l.more, nil
				}
				if len(out) >= flushAt && len(data) > 0 {
					if !l.send(c, out) {
						return l.keep(c, data)
					}
					out = out[:0]
				}
				continue
			}
		}
		// Earlier answers first: the handler writes on its own.
		if len(out) > 0 && !l.send(c, out) {
			return l.keep(c, data)
		}
		if l.s.o.Relay != nil {
			switch l.relay(c, data, n) {
			case relayTaken:
				return false
			case relayWaits:
				l.waitBody(c, data)
				return true
			}
			c.waiting = false
		}
		l.handOff(c, data)
		return false
	}
	l.keep(c, data)
	if len(out) > 0 && !l.send(c, out) {
		return false
	}
	if cap(out) <= 2*flushAt {
		l.out = out[:0]
	}
	if c.closing {
		l.finish(c)
		return false
	}
	l.rest(c)
	return true
}

// fast calls Fast; a panic in it costs the connection.
func (l *loop) fast(out []byte) (answer []byte, ok, panicked bool) {
	defer func() {
		if p := recover(); p != nil {
			panicked = true
			l.st.panics.Add(1)
			l.s.o.Logger.Error("Fast panicked", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	answer, ok = l.s.o.Fast(&l.req, out)
	return answer, ok, false
}

// keep stores bytes that cannot be served now; it returns false, for process.
func (l *loop) keep(c *conn, data []byte) bool {
	if len(data) == 0 {
		c.in = nil
	} else {
		c.in = append(c.in[:0], data...) // data may be within c.in: the copy moves down
	}
	return false
}

// rest sets the deadline of a connection that waits for its client.
func (l *loop) rest(c *conn) {
	switch {
	case len(c.in) == 0:
		c.heading = false
		c.deadline = l.now + int64(l.s.o.IdleTimeout)
		if !c.timer.linked {
			l.wheel.set(&c.timer, c.deadline)
		}
	case !c.heading: // the time of a head runs from its first byte
		c.heading = true
		l.arm(c, l.s.o.HeaderTimeout)
	}
}

// send writes b; what the client does not take now is kept in c.out, and false returned.
// A failing connection is dropped, and false returned.
func (l *loop) send(c *conn, b []byte) bool {
	for len(b) > 0 {
		n, e := rawWrite(c.fd, b)
		switch {
		case e == 0:
			b = b[n:]
		case e == unix.EINTR:
		case e == unix.EAGAIN:
			c.out = append(c.out[:0], b...)
			c.setOut(true)
			l.arm(c, l.s.o.WriteTimeout)
			return false
		default:
			l.drop(c)
			return false
		}
	}
	return true
}

// writable goes on sending c.out, then with what was kept meanwhile.
func (l *loop) writable(c *conn) {
	b := c.out
	c.out = nil
	if !l.send(c, b) {
		return
	}
	c.setOut(false) // reports readable data again, if there is any
	if c.closing {
		l.finish(c)
		return
	}
	c.heading = false
	l.more = true
	if len(c.in) > 0 {
		l.process(c, c.in)
		return
	}
	l.rest(c)
}

// setOut adds or removes EPOLLOUT. It is not there all the time because a Unix socket
// would then report every answer that is taken.
func (c *conn) setOut(on bool) {
	if c.armed == on {
		return
	}
	c.armed = on
	ev := unix.EpollEvent{Events: interest, Fd: int32(c.fd), Pad: c.gen}
	if on {
		ev.Events |= unix.EPOLLOUT
	}
	_ = unix.EpollCtl(c.l.epfd, unix.EPOLL_CTL_MOD, c.fd, &ev) // cannot fail for a registered descriptor
}

// finish closes a connection whose last answer is sent.
func (l *loop) finish(c *conn) {
	if !c.linger || unix.Shutdown(c.fd, unix.SHUT_WR) != nil {
		l.drop(c)
		return
	}
	c.lingering, c.in, c.seen = true, nil, 0
	l.arm(c, lingerTime)
	l.discard(c)
}

// discard reads what a refused client still sends.
func (l *loop) discard(c *conn) {
	for {
		n, e := rawRead(c.fd, l.buf)
		switch {
		case e == unix.EAGAIN:
			return
		case e == unix.EINTR:
			continue
		case e != 0, n == 0:
			l.drop(c)
			return
		}
		if c.seen += n; c.seen > lingerBytes {
			l.drop(c)
			return
		}
	}
}

// handOff gives c with data, which starts with the head in l.req, to a worker.
func (l *loop) handOff(c *conn, data []byte) {
	l.st.slow.Add(1)
	l.handed = true
	x := l.s.newExchange(c, l.st, &l.req, data)
	c.in, c.seen, c.heading = nil, 0, false
	c.lend(l.more, c.left)
	l.s.workers.run(func() { c.serve(x) })
}

// other gives c, whose first bytes are data, away.
func (l *loop) other(c *conn, data []byte) {
	l.st.other.Add(1)
	l.handed = true
	first := append([]byte(nil), data...)
	c.lend(l.more, c.left)
	l.s.workers.run(func() {
		nc, err := c.detach()
		if err != nil {
			l.s.o.Logger.Warn("connection dropped", "error", err)
			c.giveBack(closeNow, nil)
			return
		}
		defer c.giveBack(hijacked, nil)
		l.s.o.Other(nc, first)
	})
}

// returned handles a connection that comes back by message.
func (l *loop) returned(c *conn, o outcome) {
	if o == hijacked {
		if l.conns[c.fd] == c { // or its descriptor is in use again already
			l.conns[c.fd] = nil
		}
		l.unlink(c)
		return
	}
	c.state.Store(inLoop)
	switch {
	case o == closeLinger && !l.killed:
		c.linger = true
		l.finish(c)
		return
	case o != keepOpen || l.killed:
		l.drop(c)
		return
	}
	c.heading = false
	l.more, c.left = true, c.left || c.hup // the worker was told in the loop's place
	if len(c.in) > 0 && !l.process(c, c.in) {
		return
	}
	l.rest(c)
	l.ready(c, unix.EPOLLIN, true)
	if l.draining {
		l.dropIdle(c)
	}
}

// String names the connection in logs.
func (c *conn) String() string { return fmt.Sprintf("%v (descriptor %d)", c.remote, c.fd) }
