//go:build unix

package upstream

import "syscall"

// quiet looks into the socket's queue without taking from it; it never waits.
func (l *link) quiet(fd uintptr) bool {
	_, _, err := syscall.Recvfrom(int(fd), l.one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	l.ok = err == syscall.EAGAIN
	return true
}
