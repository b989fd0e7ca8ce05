package upstream

import (
	"errors"
	"net"
	"os"
	"syscall"
	"time"
)

// link is a connection to an upstream.
type link struct {
	nc   net.Conn
	tick uint64 // sweep at which it became idle

	raw  syscall.RawConn // nil without a socket
	look func(fd uintptr) bool
	one  [1]byte
	ok   bool // what look found
}

func newLink(nc net.Conn) *link {
	l := &link{nc: nc}
	if s, ok := nc.(syscall.Conn); ok {
		if raw, err := s.SyscallConn(); err == nil {
			l.raw, l.look = raw, l.quiet
		}
	}
	return l
}

// usable reports whether an idle connection is open and has nothing to read: what comes
// without a request would be taken for the answer to the next.
func (l *link) usable() bool {
	if l.raw != nil {
		l.ok = false
		return l.raw.Read(l.look) == nil && l.ok
	}
	// A read whose time is over finds what is known already.
	if l.nc.SetReadDeadline(time.Unix(1, 0)) != nil {
		return false
	}
	n, err := l.nc.Read(l.one[:])
	return n == 0 && errors.Is(err, os.ErrDeadlineExceeded) && l.nc.SetReadDeadline(time.Time{}) == nil
}
