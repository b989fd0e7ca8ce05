//go:build !linux

package upstream

import (
	"net/netip"
	"syscall"

	"github.com/outrigger-mesh/outrigger"
)

// SetMark is not possible on this system.
func SetMark(syscall.RawConn, uint32) error {
	return outrigger.Errorf(outrigger.Unavailable, "sockets can be marked on Linux only")
}

// localOf knows nothing: connections are intercepted on Linux only.
func localOf(syscall.RawConn) netip.AddrPort { return netip.AddrPort{} }
