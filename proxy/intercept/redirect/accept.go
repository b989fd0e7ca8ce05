package redirect

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
	"time"
)

// Limits of the pause after a failing accept.
const (
	minPause = 5 * time.Millisecond
	maxPause = time.Second
)

// acceptor accepts and survives the lack of descriptors. It keeps one in reserve: with
// none left at all it could neither accept nor turn away, and the connection at the head
// of the queue would stay there, waiting.
type acceptor struct {
	l     *net.TCPListener
	s     *Server
	spare *os.File
	pause time.Duration
}

// accept returns a connection, or nil and no error after a failure that was survived.
func (a *acceptor) accept(ctx context.Context) (*net.TCPConn, error) {
	if a.spare == nil {
		a.spare, _ = os.Open(os.DevNull) // tried again next time
	}
	c, err := a.l.AcceptTCP()
	if err == nil {
		a.pause = 0
		return c, nil
	}
	if errors.Is(err, net.ErrClosed) {
		return nil, err
	}
	a.pause = min(max(2*a.pause, minPause), maxPause)
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		a.turnAway()
	}
	a.s.o.Logger.Warn("accept failed; backing off", "error", err, "pause", a.pause)
	t := time.NewTimer(a.pause)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	return nil, nil
}

// turnAway resets the connection that has waited longest, on the spare descriptor.
func (a *acceptor) turnAway() {
	if a.spare == nil {
		return
	}
	a.spare.Close()
	a.spare = nil
	// Somebody else may take the descriptor, and nobody may be waiting any more.
	_ = a.l.SetDeadline(time.Now().Add(minPause))
	defer a.l.SetDeadline(time.Time{})
	if c, err := a.l.AcceptTCP(); err == nil {
		a.s.shed.Add(1)
		reset(c)
	}
}

func (a *acceptor) close() {
	if a.spare != nil {
		a.spare.Close()
	}
}
