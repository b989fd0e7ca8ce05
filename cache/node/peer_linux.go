package node

import (
	"net"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger"
)

// peerUser asks the kernel who connected. The error has kind Denied.
func peerUser(c net.Conn) (user, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return user{}, outrigger.Errorf(outrigger.Denied, "the user behind a connection is known on a Unix socket only, not on %s", c.LocalAddr().Network())
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return user{}, outrigger.Wrap(outrigger.Denied, err, "ask who connected")
	}
	var cred *unix.Ucred
	var failed error
	err = raw.Control(func(fd uintptr) { cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	switch {
	case err != nil:
		return user{}, outrigger.Wrap(outrigger.Denied, err, "ask who connected")
	case failed != nil:
		return user{}, outrigger.Wrap(outrigger.Denied, failed, "ask who connected")
	}
	return user{uid: cred.Uid, gid: cred.Gid}, nil
}
