package upstream

import (
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger"
)

// SetMark puts a mark (SO_MARK) on a socket; packet filters and routing rules see it.
// Without CAP_NET_ADMIN the error has kind Denied.
func SetMark(rc syscall.RawConn, mark uint32) error {
	var err error
	if cerr := rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark)) }); cerr != nil {
		return cerr
	}
	return outrigger.Wrap(outrigger.Denied, err, "mark a socket: CAP_NET_ADMIN is missing; exclude the sidecar by user instead")
}

// localOf is the address a socket has now; the zero value for a closed one.
func localOf(rc syscall.RawConn) (a netip.AddrPort) {
	_ = rc.Control(func(fd uintptr) { // fails for a closed socket
		sa, err := unix.Getsockname(int(fd))
		if err != nil {
			return
		}
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			a = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
		case *unix.SockaddrInet6:
			a = plainAddr(netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)))
		}
	})
	return a
}
