package redirect

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger"
)

func supported() error { return nil }

// ip6OriginalDst is IP6T_SO_ORIGINAL_DST (linux/netfilter_ipv6/ip6_tables.h).
const ip6OriginalDst = 80

// originalDestination asks connection tracking where c was going before its destination
// was rewritten. A dual-stack listener has IPv4 peers with mapped addresses, so the
// unmapped local address says which family to ask.
func originalDestination(c *net.TCPConn) (to netip.AddrPort, err error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return to, err
	}
	v4 := address(c.LocalAddr()).Addr().Is4()
	cerr := rc.Control(func(fd uintptr) {
		if v4 {
			var a unix.RawSockaddrInet4
			if err = getsockopt(fd, unix.SOL_IP, unix.SO_ORIGINAL_DST, unsafe.Pointer(&a), unsafe.Sizeof(a)); err == nil {
				to = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), ntohs(&a.Port))
			}
			return
		}
		var a unix.RawSockaddrInet6
		if err = getsockopt(fd, unix.SOL_IPV6, ip6OriginalDst, unsafe.Pointer(&a), unsafe.Sizeof(a)); err == nil {
			to = netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), ntohs(&a.Port))
		}
	})
	if cerr != nil {
		err = cerr
	}
	return to, os.NewSyscallError("getsockopt SO_ORIGINAL_DST", err)
}

func getsockopt(fd uintptr, level, name int, p unsafe.Pointer, size uintptr) error {
	length := uint32(size)
	if _, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, uintptr(level), uintptr(name), uintptr(p), uintptr(unsafe.Pointer(&length)), 0); e != 0 {
		return e
	}
	return nil
}

// ntohs reads a port as the kernel stores it, in network order.
func ntohs(p *uint16) uint16 { return binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(p))[:]) }

// Transparent is a net.ListenConfig's Control for listeners of mode TProxy: they accept
// connections to any address. Without CAP_NET_ADMIN the error has kind Denied.
func Transparent(network, _ string, rc syscall.RawConn) error {
	var err error
	cerr := rc.Control(func(fd uintptr) {
		// The IPv4 option covers mapped addresses of dual-stack sockets.
		if err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1); err == nil && network != "tcp4" {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
		}
	})
	if cerr != nil {
		return cerr
	}
	return outrigger.Wrap(outrigger.Denied, err, "make a listener transparent: CAP_NET_ADMIN is missing; mode tproxy needs it in the sidecar")
}
