//go:build !linux

package node

import (
	"net"
	"runtime"

	"github.com/outrigger-mesh/outrigger"
)

// peerUser needs Linux; elsewhere nobody is let in.
func peerUser(net.Conn) (user, error) {
	return user{}, outrigger.Errorf(outrigger.Denied, "who connected cannot be told on %s, only on Linux", runtime.GOOS)
}
