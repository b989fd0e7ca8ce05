package feed

import (
	"errors"
	"io"
	"net"
	"syscall"
)

// Socket reads and writes the socket of a connection by system calls that the scheduler
// is not told of. They return at once, so there is nothing for it to do, and being told
// costs it: a process at rest is woken by every frame, and each time the scheduler's
// monitor would be woken, too, to watch over a call of a few microseconds.
//
// One goroutine at a time may use Read and one TryWrite; the connection's own methods may
// be used meanwhile, but for Read beside Read and Write beside TryWrite.
type Socket struct {
	raw     syscall.RawConn
	in, out transfer
}

// transfer is one direction: what is moved, how far, and the method that moves it.
type transfer struct {
	b   []byte
	n   int
	err error
	do  func(fd uintptr) bool
}

// SocketOf returns nil if conn is not a socket itself. Other connections that have a
// SyscallConn must be used through their methods: that of gRPC's TLS credentials, for
// one, gives the socket below the encryption.
func SocketOf(conn net.Conn) *Socket {
	var sc syscall.Conn
	switch c := conn.(type) {
	case *net.TCPConn:
		sc = c
	case *net.UnixConn:
		sc = c
	default:
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	s := &Socket{raw: raw}
	s.in.do, s.out.do = s.in.read, s.out.write
	return s
}

// Read implements io.Reader; it waits for at least one byte.
func (s *Socket) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	t := &s.in
	t.b, t.n, t.err = b, 0, nil
	err := s.raw.Read(t.do)
	t.b = nil
	if err == nil {
		err = t.err
	}
	if err == nil && t.n == 0 {
		err = io.EOF
	}
	return t.n, err
}

// TryWrite writes what the socket takes without waiting, and returns how many bytes of b
// those were; fewer than all is no error.
func (s *Socket) TryWrite(b []byte) (int, error) {
	t := &s.out
	t.b, t.n, t.err = b, 0, nil
	err := s.raw.Write(t.do)
	t.b = nil
	if err == nil {
		err = t.err
	}
	return t.n, err
}

// read returns false to be called again when there is something to read.
func (t *transfer) read(fd uintptr) bool {
	for {
		n, err := readNow(int(fd), t.b)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case errors.Is(err, syscall.EAGAIN):
			return false
		case err != nil:
			t.err = err
		default:
			t.n = n
		}
		return true
	}
}

// write returns true always: it must not be waited for.
func (t *transfer) write(fd uintptr) bool {
	for t.n < len(t.b) {
		n, err := writeNow(int(fd), t.b[t.n:])
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case errors.Is(err, syscall.EAGAIN):
			return true
		case err != nil:
			t.err = err
			return true
		}
		t.n += n
	}
	return true
}

// source is where frames of conn are read from.
func source(conn net.Conn) (io.Reader, *Socket) {
	if s := SocketOf(conn); s != nil {
		return s, s
	}
	return conn, nil
}
