package loop

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger"
)

// Run accepts from l and serves until ctx ends; see the package comment. It closes l. It
// returns nil after an orderly end, or the error that kept it from listening. A Server
// runs one listener at a time.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	switch l.(type) {
	case *net.TCPListener, *net.UnixListener:
	default:
		return s.runGeneric(ctx, l)
	}
	defer l.Close()
	fd, err := listenerFD(l.(syscall.Conn))
	if err != nil {
		return err
	}
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	_, tcp := l.(*net.TCPListener)
	ctx, failed := context.WithCancel(ctx)
	defer failed()
	g := &group{s: s, base: base, failed: failed, tcp: tcp, laddr: l.Addr(), start: time.Now(), listener: fd}
	defer g.close()
	for i := range s.o.Loops {
		lp, err := newLoop(g, s.stats[i])
		if err != nil {
			return err
		}
		g.loops = append(g.loops, lp)
	}
	g.loops[0].listen = true

	var wg sync.WaitGroup
	for _, lp := range g.loops {
		wg.Go(lp.run)
	}
	adopt := g.adopt
	s.adopter.Store(&adopt)
	defer s.adopter.Store(nil)
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	<-ctx.Done()
	s.draining.Store(true)
	defer s.draining.Store(false)
	l.Close() // our duplicate keeps the socket open until the acceptor has drained
	grace := time.NewTimer(s.o.Grace)
	defer grace.Stop()
	if linger := s.linger.Load(); linger > 0 {
		g.all(commandLinger)
		over := time.NewTimer(time.Duration(linger))
		select {
		case <-over.C:
		case <-ended: // the loops have failed
		}
		over.Stop()
	}
	g.all(commandDrain)
	select {
	case <-ended:
	case <-grace.C:
		s.o.Logger.Warn("requests were cut at the end of the grace", "grace", s.o.Grace, "connections", s.Counts().Open)
		cancel()
		g.kill()
		<-ended
	}
	s.workers.stop()
	return g.err
}

// group is what the loops of one Run share.
type group struct {
	s        *Server
	base     context.Context    // of requests; ends with the grace
	failed   context.CancelFunc // ends Run
	loops    []*loop
	tcp      bool
	laddr    net.Addr
	start    time.Time
	listener int // our own descriptor of the listening socket

	away   sync.Map // *conn → net.Conn: detached, their handler still running
	killed atomic.Bool

	adopted atomic.Uint32 // for turns

	mu   sync.Mutex
	open int // connections, accepted and not closed
	err  error
}

func (g *group) all(c command) {
	for _, lp := range g.loops {
		lp.post(message{command: c})
	}
}

// kill ends what is left at the end of the grace.
func (g *group) kill() {
	g.killed.Store(true)
	g.all(commandKill)
	g.away.Range(func(_, c any) bool { c.(net.Conn).Close(); return true })
}

func (g *group) close() {
	for _, lp := range g.loops {
		lp.close()
	}
	if g.listener >= 0 {
		unix.Close(g.listener)
	}
}

// take counts one more connection; false at the limit.
func (g *group) take() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open >= g.s.o.MaxConns {
		return false
	}
	g.open++
	return true
}

// adopt is Server.Adopt: the descriptor moves from the runtime's poller to a loop.
func (g *group) adopt(c *net.TCPConn) error {
	defer c.Close()
	if !g.take() {
		return outrigger.Errorf(outrigger.Exhausted, "loop: %d connections are open, the limit", g.s.o.MaxConns)
	}
	fd, err := listenerFD(c)
	if err != nil {
		g.give()
		return err
	}
	lp := g.loops[g.adopted.Add(1)%uint32(len(g.loops))]
	lp.st.accepted.Add(1)
	if !lp.post(message{command: commandAdopt, conn: &conn{fd: fd, remote: c.RemoteAddr()}}) {
		unix.Close(fd)
		lp.st.closed.Add(1)
		g.give()
		return outrigger.Errorf(outrigger.Unavailable, "loop: the server is shutting down")
	}
	return nil
}

// give counts one less, and tells the acceptor if it was waiting for that.
func (g *group) give() {
	g.mu.Lock()
	g.open--
	full := g.open == g.s.o.MaxConns-1
	g.mu.Unlock()
	if full {
		g.loops[0].post(message{command: commandAccept})
	}
}

// listenerFD duplicates the descriptor of a listener or connection, so that it can be in
// our epoll set; the original stays in the runtime's poller, unused.
func listenerFD(l syscall.Conn) (int, error) {
	rc, err := l.SyscallConn()
	if err != nil {
		return -1, outrigger.Wrap(outrigger.Internal, err, "loop: descriptor")
	}
	fd := -1
	cerr := rc.Control(func(p uintptr) { fd, err = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0) })
	if cerr != nil {
		err = cerr
	}
	return fd, outrigger.Wrap(outrigger.Unavailable, err, "loop: duplicate a descriptor")
}
