package loop

import (
	"net"

	"golang.org/x/sys/unix"
)

// acceptOn puts the listener into the epoll set.
func (l *loop) acceptOn() {
	if l.accepting || l.draining || l.retryAt > 0 {
		return
	}
	err := unix.EpollCtl(l.epfd, unix.EPOLL_CTL_ADD, l.g.listener, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: markListen})
	if err != nil {
		l.acceptFailed(err)
		return
	}
	l.accepting = true
}

func (l *loop) acceptOff() {
	if l.accepting {
		_ = unix.EpollCtl(l.epfd, unix.EPOLL_CTL_DEL, l.g.listener, nil)
		l.accepting = false
	}
}

// acceptFailed pauses: most likely existing connections must free descriptors first.
func (l *loop) acceptFailed(err error) {
	l.acceptOff()
	l.delay = backoff(l.delay)
	l.retryAt = l.now + int64(l.delay)
	l.s.o.Logger.Warn("accept failed; backing off", "error", err, "delay", l.delay)
}

// accept takes what waits, a batch at a time: the listener is level-triggered.
func (l *loop) accept() {
	for range 64 {
		if !l.accepting {
			return
		}
		if !l.g.take() {
			l.acceptOff() // until one closes; the rest waits in the kernel
			return
		}
		fd, sa, err := unix.Accept4(l.g.listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			l.g.give()
			switch {
			case err == unix.EAGAIN:
				return
			case err == unix.EINTR, err == unix.ECONNABORTED:
				continue
			}
			l.acceptFailed(err)
			return
		}
		l.delay = 0
		if l.g.tcp {
			_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		}
		l.st.accepted.Add(1)
		c := &conn{fd: fd, remote: address(sa)}
		to := l.g.loops[l.turn%len(l.g.loops)]
		if l.turn++; to == l || !to.post(message{command: commandAdopt, conn: c}) {
			l.adopt(c)
		}
	}
}

// address converts what accept4 gives.
func address(sa unix.Sockaddr) net.Addr {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return &net.TCPAddr{IP: sa.Addr[:], Port: sa.Port}
	case *unix.SockaddrInet6:
		a := &net.TCPAddr{IP: sa.Addr[:], Port: sa.Port}
		if sa.ZoneId != 0 {
			if i, err := net.InterfaceByIndex(int(sa.ZoneId)); err == nil {
				a.Zone = i.Name
			}
		}
		return a
	case *unix.SockaddrUnix:
		return &net.UnixAddr{Net: "unix", Name: sa.Name}
	}
	return nil
}
