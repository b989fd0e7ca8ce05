package upstream

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Sockets knows which connections of this machine the sidecar has opened itself, so that
// one which interception sends back to it is recognised. That happens when the rules do
// not exclude the sidecar, and unrecognised it multiplies until descriptors run out: a
// connection that comes in is dialled on, comes in again, and so on.
//
// A connection is known from before its first packet leaves, and for as long as its
// socket is open: an entry is checked against the socket when it is asked for. Entries
// are therefore never stale; they cost some 100 bytes each until swept. Safe for
// concurrent use. The zero value is ready.
type Sockets struct {
	mu       sync.Mutex
	dialling map[netip.AddrPort][]syscall.RawConn // by destination
	made     map[netip.AddrPort]syscall.RawConn   // by local address
	sweepAt  int                                  // size of made at which closed ones are dropped
}

// minSweep is how many connections are remembered before any is looked at again.
const minSweep = 1024

// Has reports whether the connection from one address to another is the sidecar's own:
// from is the remote address of an accepted connection, to its original destination.
func (s *Sockets) Has(from, to netip.AddrPort) bool {
	if s == nil {
		return false
	}
	from, to = plainAddr(from), plainAddr(to)
	s.mu.Lock()
	defer s.mu.Unlock()
	if rc := s.made[from]; rc != nil {
		if localOf(rc) == from {
			return true
		}
		delete(s.made, from)
	}
	// The kernel gives a socket its address before its first packet, so one that is
	// still connecting can be told as well.
	return slices.ContainsFunc(s.dialling[to], func(rc syscall.RawConn) bool { return localOf(rc) == from })
}

// attempt is one dial, which may try several addresses at once.
type attempt struct {
	s    *Sockets
	open []pending // guarded by s.mu
}

type pending struct {
	to netip.AddrPort
	rc syscall.RawConn
}

func (a *attempt) starting(to netip.AddrPort, rc syscall.RawConn) {
	to = plainAddr(to)
	a.s.mu.Lock()
	defer a.s.mu.Unlock()
	if a.s.dialling == nil {
		a.s.dialling, a.s.made, a.s.sweepAt = map[netip.AddrPort][]syscall.RawConn{}, map[netip.AddrPort]syscall.RawConn{}, minSweep
	}
	a.s.dialling[to] = append(a.s.dialling[to], rc)
	a.open = append(a.open, pending{to, rc})
}

// ended moves the connection that was made, nil for none, to those that are open.
func (a *attempt) ended(c net.Conn) {
	s := a.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if t, ok := c.(*net.TCPConn); ok {
		if rc, err := t.SyscallConn(); err == nil {
			s.made[plainAddr(t.LocalAddr().(*net.TCPAddr).AddrPort())] = rc
		}
	}
	for _, p := range a.open {
		left := slices.DeleteFunc(s.dialling[p.to], func(rc syscall.RawConn) bool { return rc == p.rc })
		if len(left) == 0 {
			delete(s.dialling, p.to)
		} else {
			s.dialling[p.to] = left
		}
	}
	if len(s.made) >= s.sweepAt {
		for local, rc := range s.made {
			if localOf(rc) != local {
				delete(s.made, local)
			}
		}
		s.sweepAt = max(minSweep, 2*len(s.made))
	}
}

func plainAddr(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(canonical(a.Addr()), a.Port())
}

// dial is GuardedDial on the built-in network: the address is checked between its
// resolution and the first packet.
func (g *Guard) dial(timeout time.Duration) DialFunc {
	d := net.Dialer{Timeout: timeout, KeepAlive: 15 * time.Second}
	check := func(address string) (netip.AddrPort, error) {
		to, err := netip.ParseAddrPort(address)
		if err != nil {
			return to, err
		}
		return to, g.Check(to)
	}
	if g == nil || g.o.Sockets == nil && g.o.Mark == 0 {
		d.ControlContext = func(_ context.Context, _, address string, _ syscall.RawConn) error {
			_, err := check(address)
			return err
		}
		return d.DialContext
	}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		d := d
		var a *attempt
		if g.o.Sockets != nil {
			a = &attempt{s: g.o.Sockets}
		}
		d.ControlContext = func(_ context.Context, _, address string, rc syscall.RawConn) error {
			to, err := check(address)
			if err == nil && g.o.Mark != 0 {
				err = SetMark(rc, g.o.Mark)
			}
			if err == nil && a != nil {
				a.starting(to, rc)
			}
			return err
		}
		c, err := d.DialContext(ctx, network, address)
		if a != nil {
			a.ended(c)
		}
		return c, err
	}
}
