package variables

import (
	"errors"
	"net"
	"syscall"
)

// tryWriter writes to a connection what it takes without waiting. One goroutine at a time
// may use it, and nobody may be in a Write of the connection meanwhile.
type tryWriter struct {
	raw syscall.RawConn // nil = the connection cannot say; nothing is written
	do  func(fd uintptr) bool

	b   []byte // to be written
	n   int    // of b that was
	err error
}

func newTryWriter(conn net.Conn) *tryWriter {
	w := &tryWriter{}
	if sc := socketOf(conn); sc != nil {
		if raw, err := sc.SyscallConn(); err == nil {
			w.raw = raw
		}
	}
	w.do = w.attempt
	return w
}

// write returns how many bytes of b were taken.
func (w *tryWriter) write(b []byte) (int, error) {
	if w.raw == nil {
		return 0, nil
	}
	w.b, w.n, w.err = b, 0, nil
	err := w.raw.Write(w.do)
	w.b = nil
	if err == nil {
		err = w.err
	}
	return w.n, err
}

// attempt returns true always: it must not be waited for.
func (w *tryWriter) attempt(fd uintptr) bool {
	for w.n < len(w.b) {
		n, err := syscall.Write(int(fd), w.b[w.n:])
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case errors.Is(err, syscall.EAGAIN):
			return true
		case err != nil:
			w.err = err
			return true
		}
		w.n += n
	}
	return true
}

// socketOf returns conn if it is a socket itself. Other connections that have a SyscallConn
// must be written through their Write: that of gRPC's TLS credentials, for one, gives the
// socket below the encryption.
func socketOf(conn net.Conn) syscall.Conn {
	switch c := conn.(type) {
	case *net.TCPConn:
		return c
	case *net.UnixConn:
		return c
	}
	return nil
}
