//go:build !linux

package redirect

import (
	"net"
	"net/netip"
	"syscall"

	"github.com/outrigger-mesh/outrigger"
)

func supported() error {
	return outrigger.Errorf(outrigger.Unavailable, "connections are intercepted on Linux only")
}

func originalDestination(*net.TCPConn) (netip.AddrPort, error) {
	return netip.AddrPort{}, supported()
}

// Transparent is not possible on this system.
func Transparent(string, string, syscall.RawConn) error { return supported() }
