package loop

import (
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

const (
	interest = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLET
	gone     = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR

	readSize = 64 << 10  // the read buffer of a loop
	flushAt  = 256 << 10 // pipelined answers are sent when they reach this
	maxReads = 16        // per readiness, so that one busy client does not starve the rest
	maxOwed  = 8         // rounds without a yield, a millisecond or two
)

// Marks in epoll events that are no connection.
const (
	markWake   = -1
	markListen = -2
)

type command uint8

const (
	commandReturn command = iota // a connection comes back from a handler
	commandAdopt                 // a connection accepted by another loop
	commandAccept                // accept again
	commandLinger                // the listener is another's now
	commandDrain
	commandKill
)

// message is how other goroutines talk to a loop.
type message struct {
	command command
	conn    *conn
	outcome outcome
}

// loop is one event loop. Fields without a comment belong to its goroutine.
type loop struct {
	g     *group
	s     *Server
	st    *stats
	epfd  int
	evfd  int
	conns []*conn // by descriptor
	open  int
	gen   int32

	events   [256]unix.EpollEvent
	buf      []byte
	out      []byte
	req      http1.Request
	dates    http1.DateCache
	links    []*link             // to servers, by descriptor
	idle     map[string]*[]*link // of them, by address, oldest first
	up       []byte              // a request to a server
	kept     [][]byte            // buffers of calls that have ended
	answer   http1.Answer
	date     []byte
	wheel    wheel
	now      int64 // since g.start, as of the last wake-up
	again    []*conn
	more     bool // the socket being handled may hold more than was read
	handed   bool // a goroutine was given work since the last yield
	owed     int  // rounds since then
	draining bool
	patient  bool // while draining: connections between requests stay
	killed   bool

	listen    bool // is the acceptor
	accepting bool // the listener is in the epoll set
	delay     time.Duration
	retryAt   int64 // when to accept again after a failure; 0 = no failure
	turn      int   // round robin over loops

	sleeping atomic.Bool
	mu       sync.Mutex
	inbox    []message // guarded by mu
	ended    bool      // guarded by mu
	spare    []message
}

func newLoop(g *group, st *stats) (*loop, error) {
	l := &loop{g: g, s: g.s, st: st, epfd: -1, evfd: -1, buf: make([]byte, readSize), out: make([]byte, 0, readSize), idle: map[string]*[]*link{}}
	o := &g.s.o
	shortest := min(o.HeaderTimeout, o.IdleTimeout, o.WriteTimeout, lingerTime)
	l.wheel.tick = int64(max(shortest/8, time.Millisecond))
	var err error
	if l.epfd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, outrigger.Wrap(outrigger.Unavailable, err, "loop: create an epoll instance")
	}
	if l.evfd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err == nil {
		err = unix.EpollCtl(l.epfd, unix.EPOLL_CTL_ADD, l.evfd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: markWake})
	}
	if err != nil {
		l.close()
		return nil, outrigger.Wrap(outrigger.Unavailable, err, "loop: create a wake-up descriptor")
	}
	return l, nil
}

func (l *loop) close() {
	l.cutLinks()
	unix.Close(l.epfd)
	if l.evfd >= 0 {
		unix.Close(l.evfd)
	}
}

// post queues m and wakes the loop if it sleeps. The queue is bounded by the number of
// connections: each is in it at most once.
func (l *loop) post(m message) bool {
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return false
	}
	l.inbox = append(l.inbox, m)
	l.mu.Unlock()
	if l.sleeping.Load() {
		one := [8]byte{1}
		_, _ = unix.Write(l.evfd, one[:]) // fails only when the counter is full: it is awake then
	}
	return true
}

// run is the loop.
func (l *loop) run() {
	if l.listen {
		l.acceptOn()
	}
	for {
		l.tick()
		l.messages()
		if l.draining && !l.patient && l.open == 0 {
			if l.quiet() {
				return
			}
			continue
		}
		n, err := l.wait()
		if err != nil {
			l.fail(err)
			return
		}
		if n > 0 {
			l.clock()
		}
		for i := range n {
			l.event(&l.events[i])
		}
		l.repeat()
	}
}

// quiet reports whether no message is left once there are no connections; from then on
// none is taken.
func (l *loop) quiet() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = len(l.inbox) == 0
	return l.ended
}

// fail ends a loop whose epoll does not work, which no input can cause.
func (l *loop) fail(err error) {
	l.g.mu.Lock()
	l.g.err = outrigger.Wrap(outrigger.Internal, err, "loop: epoll_wait")
	l.g.mu.Unlock()
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	for _, c := range l.conns {
		if c != nil && !c.kill() {
			l.drop(c)
		}
	}
	l.g.failed()
}

// wait returns ready events: first without the scheduler knowing, then, with nothing to
// do, by blocking.
func (l *loop) wait() (int, error) {
	n, err := l.poll()
	if l.handed && (n == 0 || l.owed == maxOwed) {
		// Let the goroutines run that were given work: on this processor, without
		// waking another, which costs more than most handlers. Under load, other
		// processors take them; should there be none, they still get their turns.
		l.handed, l.owed = false, 0
		runtime.Gosched()
		if n == 0 && err == nil {
			n, err = l.poll()
		}
	} else if l.handed {
		l.owed++
	}
	if n != 0 || err != nil || len(l.again) > 0 {
		return n, err
	}
	l.sleeping.Store(true)
	l.mu.Lock()
	waiting := len(l.inbox) > 0
	l.mu.Unlock()
	if !waiting {
		n, err = unix.EpollWait(l.epfd, l.events[:], l.timeout())
	}
	l.sleeping.Store(false)
	if err == unix.EINTR { // time has passed all the same
		n, err = 0, nil
	}
	if n == 0 {
		l.clock()
	}
	return n, err
}

// poll is epoll_wait without blocking and without leaving the scheduler's books.
func (l *loop) poll() (int, error) {
	n, _, e := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epfd), uintptr(unsafe.Pointer(&l.events[0])), uintptr(len(l.events)), 0, 0, 0)
	switch e {
	case 0:
		return int(n), nil
	case unix.EINTR:
		return 0, nil
	}
	return 0, e
}

// timeout is how long to block, in ms: until the next timer or accept.
func (l *loop) timeout() int {
	next := l.wheel.next()
	if l.retryAt > 0 && (next < 0 || l.retryAt < next) {
		next = l.retryAt
	}
	if next < 0 {
		return -1
	}
	return int(max(0, (next-l.now+int64(time.Millisecond)-1)/int64(time.Millisecond)))
}

// clock reads the time, once per wake-up.
func (l *loop) clock() {
	now := time.Now()
	l.now = int64(now.Sub(l.g.start))
	l.date = l.dates.At(now)
}

// tick handles what time brings.
func (l *loop) tick() {
	if l.date == nil {
		l.clock()
	}
	l.wheel.advance(l.now, l.due)
	if l.retryAt > 0 && l.now >= l.retryAt {
		l.retryAt = 0
		l.acceptOn()
	}
}

// messages handles the inbox.
func (l *loop) messages() {
	l.mu.Lock()
	if len(l.inbox) == 0 {
		l.mu.Unlock()
		return
	}
	l.inbox, l.spare = l.spare[:0], l.inbox
	l.mu.Unlock()
	l.clock()
	for _, m := range l.spare {
		switch m.command {
		case commandReturn:
			l.returned(m.conn, m.outcome)
		case commandAdopt:
			l.adopt(m.conn)
		case commandAccept:
			l.acceptOn()
		case commandLinger:
			l.yield()
		case commandDrain:
			l.drain()
		case commandKill:
			l.kill()
		}
	}
	clear(l.spare)
}

// event dispatches one readiness.
func (l *loop) event(ev *unix.EpollEvent) {
	switch ev.Fd {
	case markWake:
		var b [8]byte
		_, _ = unix.Read(l.evfd, b[:])
		return
	case markListen:
		l.accept()
		return
	}
	if int(ev.Fd) < len(l.links) {
		if k := l.links[ev.Fd]; k != nil && k.gen == ev.Pad {
			l.linkReady(k, ev.Events)
			return
		}
	}
	if int(ev.Fd) >= len(l.conns) {
		return
	}
	c := l.conns[ev.Fd]
	if c == nil || c.gen != ev.Pad { // closed earlier in this batch
		return
	}
	if c.state.Load() == inHandler && c.notify(ev.Events) {
		l.handed = true
		return
	}
	l.ready(c, ev.Events, false)
}

// repeat goes on with connections that used up their share.
func (l *loop) repeat() {
	if len(l.again) == 0 {
		return
	}
	list := l.again
	l.again = nil
	for _, c := range list {
		if c.queued && c.state.Load() == inLoop { // it may have been dropped or handed off
			c.queued = false
			l.ready(c, unix.EPOLLIN, true)
		}
	}
}

// adopt makes c one of l's.
func (l *loop) adopt(c *conn) {
	l.gen++
	c.l, c.gen, c.timer.conn = l, l.gen, c
	for len(l.conns) <= c.fd {
		l.conns = append(l.conns, make([]*conn, max(64, len(l.conns)))...)
	}
	l.conns[c.fd] = c
	l.open++
	if err := unix.EpollCtl(l.epfd, unix.EPOLL_CTL_ADD, c.fd, &unix.EpollEvent{Events: interest, Fd: int32(c.fd), Pad: c.gen}); err != nil {
		l.s.o.Logger.Warn("connection dropped", "error", err)
		l.drop(c)
		return
	}
	l.arm(c, l.s.o.IdleTimeout)
	if l.draining { // accepted just before: it may have sent a request
		l.ready(c, unix.EPOLLIN, true)
		l.dropIdle(c)
	}
}

// yield stops accepting, without what is queued, and nothing else: see HandOver. Answers
// announce the close from now on, as the server is draining.
func (l *loop) yield() {
	l.draining, l.patient = true, true
	l.forsake()
}

// forsake gives up the listener.
func (l *loop) forsake() {
	l.acceptOff()
	l.retryAt = 0
	if l.listen && l.g.listener >= 0 {
		unix.Close(l.g.listener)
		l.g.listener = -1
	}
}

// drain stops accepting and closes what has nothing to do.
func (l *loop) drain() {
	if l.accepting {
		l.accept() // who is connected already is not turned away with a reset
	}
	l.draining, l.patient = true, false
	l.forsake()
	for _, c := range l.conns {
		if c == nil || c.finishSoon() {
			continue
		}
		l.ready(c, unix.EPOLLIN, true) // a request may have arrived just now
		l.dropIdle(c)
	}
}

// dropIdle closes c if it is the loop's and between requests.
func (l *loop) dropIdle(c *conn) {
	if !l.patient && l.conns[c.fd] == c && c.state.Load() == inLoop && len(c.in) == 0 && len(c.out) == 0 && !c.lingering && c.call == nil {
		l.drop(c)
	}
}

// kill ends everything that is left at the end of the grace.
func (l *loop) kill() {
	l.killed = true
	for _, c := range l.conns {
		if c != nil && !c.kill() {
			l.drop(c)
		}
	}
}

var errKilled = errors.New("loop: the server is shutting down")
