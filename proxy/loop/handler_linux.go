package loop

import (
	"context"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger"
)

// handlerSide is what loop and worker share while a handler has the connection; conn.mu
// guards it, except the channels' contents.
type handlerSide struct {
	readable bool // readiness came that no read has used up
	hup      bool // the client half-closed
	reset    bool // the connection failed or is to end
	killed   bool // by the end of the grace
	last     bool // close after this answer: the server drains
	cancel   func()
	watching bool // a half-close cancels
	rd, wd   time.Time
	local    net.Addr
	rwake    chan struct{} // capacity 1: readiness happened, or a deadline changed
	wwake    chan struct{}
}

// lend makes c a worker's. more: the socket may hold bytes nobody was told of; hup: the
// client is known to have half-closed.
func (c *conn) lend(more, hup bool) {
	c.mu.Lock()
	c.readable, c.hup, c.reset, c.cancel, c.watching = more, hup, false, nil, false
	if c.rwake == nil {
		c.rwake, c.wwake = make(chan struct{}, 1), make(chan struct{}, 1)
	}
	c.mu.Unlock()
	c.state.Store(inHandler)
}

func nudge(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// notify is called by the loop with readiness. It returns false if the connection came
// back meanwhile.
func (c *conn) notify(ev uint32) bool {
	var cancel func()
	c.mu.Lock()
	if c.state.Load() != inHandler {
		c.mu.Unlock()
		return false
	}
	if ev&(unix.EPOLLIN|gone) != 0 {
		c.readable = true
		nudge(c.rwake)
	}
	if ev&(unix.EPOLLOUT|gone) != 0 {
		nudge(c.wwake)
	}
	c.hup = c.hup || ev&gone != 0
	c.reset = c.reset || ev&(unix.EPOLLHUP|unix.EPOLLERR) != 0
	if c.reset || c.hup && c.watching {
		cancel = c.cancel
	}
	c.mu.Unlock()
	if cancel != nil {
		cancel()
	}
	return true
}

// finishSoon marks a connection a worker has to be closed after its answer; false if it
// is the loop's.
func (c *conn) finishSoon() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Load() != inHandler {
		return false
	}
	c.last = true
	return true
}

// kill ends the I/O of a connection a worker has; false if it is the loop's.
func (c *conn) kill() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Load() != inHandler {
		return false
	}
	c.killed, c.last = true, true
	nudge(c.rwake)
	nudge(c.wwake)
	return true
}

// serve is a worker's job.
func (c *conn) serve(x *exchange) {
	o, returned := closeNow, false
	defer func() {
		c.giveBack(o, x.rest)
		if returned { // and did not end its goroutine: then a body may still point to x
			x.free()
		}
	}()
	o = x.run(c.l.g.base, func(cancel context.CancelFunc) {
		c.mu.Lock()
		c.cancel = cancel
		reset := c.reset
		c.mu.Unlock()
		if reset {
			cancel()
		}
	})
	returned = true
}

// giveBack returns c to its loop. If there is nothing for the loop to do it learns by
// the state alone, with the next readiness.
func (c *conn) giveBack(o outcome, rest []byte) {
	if o == hijacked {
		c.l.g.away.Delete(c)
	}
	if len(rest) > 0 {
		c.in = append([]byte(nil), rest...)
	}
	if c.armed && o != hijacked {
		c.setOut(false)
	}
	now := int64(time.Since(c.l.g.start))
	c.mu.Lock()
	c.cancel, c.watching = nil, false
	c.rd, c.wd = time.Time{}, time.Time{}
	if o == keepOpen && len(rest) == 0 && !c.readable && !c.hup && !c.last {
		c.deadline = now + int64(c.l.s.o.IdleTimeout)
		c.state.Store(inLoop)
		c.mu.Unlock()
		return
	}
	c.mu.Unlock()
	c.l.post(message{command: commandReturn, conn: c, outcome: o})
}

// Read implements transport.
func (c *conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	var stall time.Time
	for {
		c.mu.Lock()
		deadline, killed := c.rd, c.killed
		c.readable = false
		c.mu.Unlock()
		if err := expired(deadline, killed); err != nil {
			c.mu.Lock()
			c.readable = true // not known any more
			c.mu.Unlock()
			return 0, err
		}
		n, e := rawRead(c.fd, p)
		switch {
		case e == unix.EINTR:
			continue
		case e == unix.EAGAIN:
			if err := wait(c.rwake, deadline, &stall, c.l.s.o.BodyTimeout); err != nil {
				return 0, err
			}
			continue
		case e != 0:
			return 0, os.NewSyscallError("read", e)
		case n == 0:
			c.mu.Lock()
			c.hup = true
			c.mu.Unlock()
			return 0, io.EOF
		}
		if n == len(p) {
			c.mu.Lock()
			c.readable = true
			c.mu.Unlock()
		}
		return n, nil
	}
}

// Write implements transport.
func (c *conn) Write(p []byte) (int, error) {
	total := 0
	var stall time.Time
	for total < len(p) {
		c.mu.Lock()
		deadline, killed := c.wd, c.killed
		c.mu.Unlock()
		if err := expired(deadline, killed); err != nil {
			return total, err
		}
		n, e := rawWrite(c.fd, p[total:])
		switch e {
		case 0:
			total += n
			stall = time.Time{}
		case unix.EINTR:
		case unix.EAGAIN:
			c.setOut(true)
			if err := wait(c.wwake, deadline, &stall, c.l.s.o.WriteTimeout); err != nil {
				return total, err
			}
		default:
			return total, os.NewSyscallError("write", e)
		}
	}
	return total, nil
}

func expired(deadline time.Time, killed bool) error {
	if killed {
		return errKilled
	}
	if !deadline.IsZero() && !time.Now().Before(deadline) {
		return os.ErrDeadlineExceeded
	}
	return nil
}

// wait blocks until ch has something, or until deadline, or, without one, until limit
// after the wait began, which *stall remembers.
func wait(ch chan struct{}, deadline time.Time, stall *time.Time, limit time.Duration) error {
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

// SetReadDeadline implements transport; a Read that waits sees the change.
func (c *conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	changed := c.rd != t
	c.rd = t
	c.mu.Unlock()
	if changed {
		nudge(c.rwake)
	}
	return nil
}

// SetWriteDeadline implements transport.
func (c *conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	changed := c.wd != t
	c.wd = t
	c.mu.Unlock()
	if changed {
		nudge(c.wwake)
	}
	return nil
}

// addresses implements transport. The local address is asked for once; under TPROXY it
// is the original destination.
func (c *conn) addresses() (local, remote net.Addr) {
	c.mu.Lock()
	local = c.local
	c.mu.Unlock()
	if local == nil {
		if sa, err := unix.Getsockname(c.fd); err == nil {
			local = address(sa)
		}
		if local == nil {
			local = c.l.g.laddr
		}
		c.mu.Lock()
		c.local = local
		c.mu.Unlock()
	}
	return local, c.remote
}

// watch implements transport: the loop sees the client go.
func (c *conn) watch(gone func()) {
	c.mu.Lock()
	c.watching, c.cancel = true, gone
	now := c.hup
	c.mu.Unlock()
	if now {
		gone()
	}
}

func (c *conn) unwatch() []byte {
	c.mu.Lock()
	c.watching = false
	c.mu.Unlock()
	return nil
}

// detach makes a connection of the runtime's poller from the descriptor.
func (c *conn) detach() (net.Conn, error) {
	if err := unix.EpollCtl(c.l.epfd, unix.EPOLL_CTL_DEL, c.fd, nil); err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, "loop: detach a connection")
	}
	// The original stays open until the new connection exists, so that a failure for lack
	// of descriptors leaves the loop something to close.
	dup, err := unix.FcntlInt(uintptr(c.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Exhausted, err, "loop: detach a connection")
	}
	f := os.NewFile(uintptr(dup), "")
	nc, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Exhausted, err, "loop: detach a connection")
	}
	unix.Close(c.fd)
	if t, ok := nc.(*net.TCPConn); ok {
		_ = t.SetKeepAlivePeriod(15 * time.Second) // as net.Listener does
	}
	c.l.g.away.Store(c, nc)
	if c.l.g.killed.Load() {
		nc.Close() // kill may have looked before it was there
	}
	return nc, nil
}
