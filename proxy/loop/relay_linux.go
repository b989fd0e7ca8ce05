package loop

import (
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// link is a connection to a server. It belongs to its loop's goroutine.
type link struct {
	fd       int
	gen      int32
	armed    bool // EPOLLOUT is in the interest set
	address  string
	deadline int64
	timer    timer

	// While it carries a call:
	c      *conn
	call   Call
	in     []byte // of the answer, when it came in pieces
	out    []byte // of the request, what the server has not taken yet
	chunks chunkedContent
	began  int64 // on the loop's clock
	flow   stage // of a stream
}

type relayed uint8

const (
	relayNot   relayed = iota // the request is Slow's
	relayWaits                // for the rest of the body
	relayTaken
)

// relay looks whether the loop can carry the request in l.req, whose head is data[:n],
// itself, and begins.
func (l *loop) relay(c *conn, data []byte, n int) (r relayed) {
	defer l.relayPanic(c, &r)
	q := &l.req
	size := q.ContentLength()
	if size <= 0 || size > maxRelayBody || q.Minor() != 1 || q.Form() != http1.Origin || q.ExpectContinue() || q.Upgrade() != http1.UpgradeNone ||
		l.draining || c.left || c.impatient || string(q.Method()) != http.MethodPost || !l.s.o.Relay.Wants(q) {
		return relayNot
	}
	total := n + int(size)
	if len(data) < total {
		return relayWaits
	}
	body := data[n:total:total]
	call := l.s.o.Relay.Route(q, body)
	if call == nil {
		return relayNot
	}
	k := l.linkTo(call.Address())
	if k == nil {
		return relayNot
	}
	out, limit, ok := call.Start(q, body, l.up[:0])
	if !ok {
		l.park(k)
		return relayNot
	}
	c.ends, c.used, c.pending, c.heading = !q.KeepAlive(), total, l.more, false
	c.in = l.hold(c.in, data) // a worker may need them yet
	c.call, k.c, k.call, c.waiting = k, c, call, false
	k.began, k.flow = l.now, noStream
	k.deadline = l.now + int64(limit)
	l.wheel.set(&k.timer, k.deadline)
	l.push(k, out)
	if cap(out) <= 4*maxRelayBody {
		l.up = out[:0]
	}
	return relayTaken
}

// hold returns a copy of data in buf's memory or in that of a buffer kept for this; data
// may be part of buf.
func (l *loop) hold(buf, data []byte) []byte {
	if cap(buf) >= len(data) {
		return append(buf[:0], data...) // moves down if it is part of buf
	}
	if n := len(l.kept); n > 0 && cap(l.kept[n-1]) >= len(data) {
		buf, l.kept = l.kept[n-1][:0], l.kept[:n-1]
		return append(buf, data...)
	}
	return append(make([]byte, 0, max(len(data), keptSize)), data...)
}

// Buffers of calls are kept by the loop, so that connections between requests own none.
const (
	keptSize = 4 << 10
	maxKept  = 256
)

// release takes the memory of a buffer back.
func (l *loop) release(buf []byte) {
	if cap(buf) >= keptSize && cap(buf) <= 4*keptSize && len(l.kept) < maxKept {
		l.kept = append(l.kept, buf[:0])
	}
}

// linkTo takes an idle connection to address, last in first out.
func (l *loop) linkTo(address string) *link {
	if p := l.idle[address]; p != nil && len(*p) > 0 {
		k := (*p)[len(*p)-1]
		*p = (*p)[:len(*p)-1]
		return k
	}
	t := l.s.o.Relay.Take(address)
	if t == nil {
		return nil
	}
	fd, err := listenerFD(t)
	t.Close() // leaves the runtime's poller; our duplicate keeps it open
	if err != nil {
		return nil
	}
	l.gen++
	k := &link{fd: fd, gen: l.gen, address: address}
	k.timer.link = k
	for len(l.links) <= fd {
		l.links = append(l.links, make([]*link, max(64, len(l.links)))...)
	}
	if err := unix.EpollCtl(l.epfd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: interest, Fd: int32(fd), Pad: k.gen}); err != nil {
		unix.Close(fd)
		return nil
	}
	l.links[fd] = k
	return k
}

// park makes k idle. From then on whatever comes on it closes it: nobody asked for that,
// and it would be taken for the answer to the next request.
func (l *loop) park(k *link) {
	p := l.idle[k.address]
	if p == nil {
		p = new([]*link)
		l.idle[k.address] = p
	}
	if len(*p) >= maxRelayIdle {
		l.cut(k)
		return
	}
	*p = append(*p, k)
	k.deadline = l.now + int64(relayIdle)
	if !k.timer.linked {
		l.wheel.set(&k.timer, k.deadline)
	}
}

// cut closes k, which carries no call.
func (l *loop) cut(k *link) {
	l.forget(k)
	unix.Close(k.fd)
}

// forget takes k out of the loop's books.
func (l *loop) forget(k *link) {
	if p := l.idle[k.address]; p != nil {
		if i := slices.Index(*p, k); i >= 0 {
			*p = slices.Delete(*p, i, i+1)
		}
		if len(*p) == 0 {
			delete(l.idle, k.address)
		}
	}
	l.links[k.fd] = nil
	l.wheel.remove(&k.timer)
	l.release(k.in)
	k.chunks.end(l)
	k.c, k.call, k.in, k.out = nil, nil, nil, nil
}

// cutLinks closes every connection to a server at the loop's end.
func (l *loop) cutLinks() {
	for _, k := range l.links {
		if k != nil {
			l.cut(k)
		}
	}
}

// push writes b to the server; what it does not take now is kept.
func (l *loop) push(k *link, b []byte) {
	for len(b) > 0 {
		n, e := rawWrite(k.fd, b)
		switch e {
		case 0:
			b = b[n:]
		case unix.EINTR:
		case unix.EAGAIN:
			k.out = append(k.out[:0], b...)
			l.armLink(k, true)
			return
		default:
			l.surrender(k, nil, true)
			return
		}
	}
	k.out = nil
	l.armLink(k, false)
}

func (l *loop) armLink(k *link, on bool) {
	if k.armed == on {
		return
	}
	k.armed = on
	ev := unix.EpollEvent{Events: interest, Fd: int32(k.fd), Pad: k.gen}
	if on {
		ev.Events |= unix.EPOLLOUT
	}
	_ = unix.EpollCtl(l.epfd, unix.EPOLL_CTL_MOD, k.fd, &ev) // cannot fail for a registered descriptor
}

// linkReady handles readiness of a connection to a server.
func (l *loop) linkReady(k *link, ev uint32) {
	if k.call == nil {
		l.cut(k)
		return
	}
	defer l.relayPanic(k.c, nil)
	if ev&unix.EPOLLOUT != 0 && len(k.out) > 0 && ev&gone == 0 {
		rest := k.out
		k.out = nil
		if l.push(k, rest); k.call == nil {
			return
		}
	}
	if ev&(unix.EPOLLIN|gone) == 0 {
		return
	}
	for {
		data, n, e := l.readLink(k)
		switch {
		case e == unix.EAGAIN:
			return
		case e == unix.EINTR:
			continue
		case e != 0, n == 0:
			l.surrender(k, k.in, len(k.in) == 0)
			return
		}
		full := len(data) == cap(data)
		if k.flow == streamPassed {
			if l.streamed(k, data) {
				return
			}
		} else if l.answered(k, data) {
			return
		}
		if !full && ev&gone == 0 {
			return
		}
	}
}

// readLink is read for a connection to a server.
func (l *loop) readLink(k *link) (data []byte, n int, e syscall.Errno) {
	if len(k.in) == 0 || k.flow == streamPassed {
		n, e = rawRead(k.fd, l.buf)
		return l.buf[:max(0, n)], n, e
	}
	if cap(k.in)-len(k.in) < 2048 {
		k.in = append(make([]byte, 0, 2*cap(k.in)), k.in...)
	}
	if n, e = rawRead(k.fd, k.in[len(k.in):cap(k.in)]); n > 0 && e == 0 {
		k.in = k.in[:len(k.in)+n]
	}
	return k.in, n, e
}

// answered handles what has come of an answer; it returns false if more is to be read.
func (l *loop) answered(k *link, data []byte) bool {
	seen := 0
	n, err := l.answer.Parse(data, &seen, http.MethodPost, http1.Limits{})
	size := l.answer.Length()
	switch {
	case err == http1.ErrShort:
	case err != nil, l.answer.Status() < 200, size < -1, int64(n)+size > maxRelayAnswer:
		l.surrender(k, data, false)
		return true
	case size == -1 && l.streams(k):
		if ended, begun := l.streamBegins(k, data, n); ended || begun {
			return ended
		}
	case !k.call.Fits(&l.answer):
		l.surrender(k, data, false)
		return true
	case size == -1:
		done, err := k.chunks.take(l, data, n)
		if err != nil || k.chunks.at > maxRelayAnswer {
			l.surrender(k, data, false)
			return true
		}
		if done {
			l.relayEnd(k, k.chunks.content, len(data) > k.chunks.at)
			return true
		}
	case int64(len(data)-n) >= size:
		l.relayEnd(k, data[n:n+int(size)], len(data) > n+int(size))
		return true
	}
	if len(data) > maxRelayAnswer {
		l.surrender(k, data, false)
		return true
	}
	if len(k.in) == 0 {
		k.in = l.hold(nil, data)
	}
	return false
}

// relayEnd passes on the answer in l.answer with its content. excess: bytes follow that
// nobody asked for.
func (l *loop) relayEnd(k *link, content []byte, excess bool) {
	k.c.ends = k.c.ends || l.draining
	out := k.call.Finish(&l.answer, content, l.out[:0], l.date, k.c.ends)
	l.settle(k, out, !excess && len(k.out) == 0 && l.answer.KeepAlive())
}

// settle ends a call with the last bytes for its client; keep says that the connection to
// the server can be used again.
func (l *loop) settle(k *link, out []byte, keep bool) {
	c := k.c
	k.c, k.call, c.call = nil, nil, nil
	k.chunks.end(l)
	if keep {
		l.release(k.in)
		k.in = nil
		l.park(k)
	} else {
		l.cut(k)
	}
	l.st.relayed.Add(1)
	more := c.pending
	c.pending = false
	if c.ends {
		c.closing, c.linger = true, more || len(c.in) > c.used
		c.used = len(c.in)
	}
	if c.in = append(c.in[:0], c.in[c.used:]...); len(c.in) == 0 {
		l.release(c.in)
		c.in = nil
	}
	if !l.send(c, out) {
		return // writable goes on
	}
	if cap(out) <= 2*flushAt {
		l.out = out[:0]
	}
	if c.closing {
		l.finish(c)
		return
	}
	l.more = more
	if len(c.in) == 0 {
		l.rest(c)
	} else if !l.process(c, c.in) {
		return
	}
	if more {
		l.ready(c, unix.EPOLLIN, true)
	}
	if l.draining {
		l.dropIdle(c)
	}
}

// relayPanic is deferred where the Relay's code runs: a panic in it costs both connections.
func (l *loop) relayPanic(c *conn, r *relayed) {
	p := recover()
	if p == nil {
		return
	}
	l.st.panics.Add(1)
	l.s.o.Logger.Error("Relay panicked", "panic", p, "stack", string(debug.Stack()))
	if k := c.call; k != nil {
		c.call = nil
		l.cut(k)
	}
	if r != nil {
		*r = relayTaken
	}
	l.drop(c)
}

// abandon ends the call of a client that has left.
func (l *loop) abandon(c *conn) {
	k, call := c.call, c.call.call
	c.call = nil
	l.cut(k)
	l.st.relayed.Add(1)
	call.Gone()
}

// surrender has a worker serve the rest of a call: read is what came of its answer. stale:
// the connection is lost and brought nothing.
func (l *loop) surrender(k *link, read []byte, stale bool) { l.surrenderWith(k, read, stale, nil) }

// surrenderWith is surrender of a call that has unsent bytes for its client, if it has
// begun to pass a stream on.
func (l *loop) surrenderWith(k *link, read []byte, stale bool, unsent []byte) {
	c, call := k.c, k.call
	p := Progress{Read: append([]byte(nil), read...), Sent: len(k.out) == 0}
	if k.flow == streamPassed {
		p.Passed, p.Chunks, p.Content = true, k.chunks.decoder, append([]byte(nil), k.chunks.content...)
	}
	fd := -1
	if _ = unix.EpollCtl(l.epfd, unix.EPOLL_CTL_DEL, k.fd, nil); stale { // it is registered: DEL cannot fail
		unix.Close(k.fd)
	} else {
		fd = k.fd
	}
	l.forget(k)
	c.call = nil
	seen := 0
	if _, err := l.req.Parse(c.in, &seen, l.s.o.Limits); err != nil {
		panic("loop: a head that was parsed is malformed: " + err.Error()) // the bytes are the same
	}
	l.st.slow.Add(1)
	l.handed = true
	x := l.s.newExchange(c, l.st, &l.req, c.in)
	x.passed, x.closes, x.unsent = p.Passed, c.ends, append([]byte(nil), unsent...)
	x.resume = func(w http.ResponseWriter, r *http.Request) {
		if fd >= 0 {
			p.Conn = connOf(fd)
		}
		call.Resume(w, r, p)
	}
	l.release(c.in)
	c.in, c.seen, c.heading = nil, 0, false
	more := c.pending
	c.pending = false
	c.lend(more, c.left)
	l.s.workers.run(func() { c.serve(x) })
}

// connOf makes a connection of the runtime's poller from fd, which it takes over. Should
// descriptors be exhausted the result is a broken connection: the request was sent, and
// must not be sent again as if it had not been.
func connOf(fd int) net.Conn {
	f := os.NewFile(uintptr(fd), "")
	nc, err := net.FileConn(f)
	f.Close()
	if err != nil {
		here, there := net.Pipe()
		there.Close()
		return here
	}
	return nc
}

// linkDue is called by the wheel.
func (l *loop) linkDue(k *link) {
	switch {
	case k.deadline > l.now:
		l.wheel.set(&k.timer, k.deadline)
	case k.call != nil:
		l.surrender(k, k.in, false) // the time is over, as the worker will see
	default:
		l.cut(k)
	}
}

// impatience gives a request whose body is not coming to a worker, with what there is.
func (l *loop) impatience(c *conn) {
	c.impatient = true
	l.more = true
	if l.process(c, c.in) {
		l.rest(c)
	}
	c.impatient = false
}

// waitBody sets the deadline of a connection whose request's body is not there yet.
func (l *loop) waitBody(c *conn, data []byte) {
	if !c.waiting {
		c.waiting, c.heading = true, false
		l.arm(c, min(l.s.o.BodyPatience, l.s.o.BodyTimeout))
	}
	c.in = l.hold(c.in, data)
}
