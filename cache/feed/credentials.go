package feed

import (
	"errors"
	"net"
	"syscall"

	"google.golang.org/grpc/credentials"
)

// Credentials are those of a gRPC server that serves feeds on the same port: inner's, and
// after inner's handshake a connection that does not begin as HTTP/2 does is handed to
// serve, which owns it from there on and must not block. So whoever inner refuses is refused, whatever it speaks.
// admit is asked before serve is given a connection, which is closed if it errs: a client then
// asks by gRPC and is told why there. nil admits everybody.
func Credentials(inner credentials.TransportCredentials, admit func(credentials.AuthInfo) error, serve func(net.Conn)) credentials.TransportCredentials {
	return &switched{inner, admit, serve}
}

type switched struct {
	credentials.TransportCredentials
	admit func(credentials.AuthInfo) error
	serve func(net.Conn)
}

// ServerHandshake implements credentials.TransportCredentials. It is called in a goroutine
// of the connection's own, under gRPC's deadline for handshakes.
func (s *switched) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := s.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	conn, first, err := peek(conn)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	if first == 'P' { // PRI * HTTP/2.0; no other method begins like this that is served here
		return conn, info, nil
	}
	if s.admit != nil {
		if err := s.admit(info); err != nil {
			conn.Close()
			return nil, nil, err
		}
	}
	s.serve(conn)
	return nil, nil, credentials.ErrConnDispatched
}

// Clone implements credentials.TransportCredentials.
func (s *switched) Clone() credentials.TransportCredentials {
	return &switched{s.TransportCredentials.Clone(), s.admit, s.serve}
}

// peek returns the first byte that comes and a connection it is still to be read from.
func peek(conn net.Conn) (net.Conn, byte, error) {
	if b, ok, err := peekSocket(conn); ok {
		return conn, b, err
	}
	p := &peeked{Conn: conn}
	if _, err := conn.Read(p.first[:]); err != nil {
		return conn, 0, err
	}
	p.full = true
	return p, p.first[0], nil
}

// peekSocket is peek for sockets, which stay what they are: gRPC reads them in its own way.
func peekSocket(conn net.Conn) (first byte, ok bool, err error) {
	s := SocketOf(conn)
	if s == nil {
		return 0, false, nil
	}
	var b [1]byte
	var n int
	var failed error
	err = s.raw.Read(func(fd uintptr) (done bool) {
		for {
			n, _, failed = syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK)
			if !errors.Is(failed, syscall.EINTR) {
				return !errors.Is(failed, syscall.EAGAIN)
			}
		}
	})
	if err == nil {
		err = failed
	}
	if err == nil && n == 0 {
		err = net.ErrClosed
	}
	return b[0], true, err
}

// peeked is a connection whose first byte was read.
type peeked struct {
	net.Conn
	first [1]byte
	full  bool
}

// Read implements net.Conn.
func (p *peeked) Read(b []byte) (int, error) {
	if !p.full {
		return p.Conn.Read(b)
	}
	n := copy(b, p.first[:])
	p.full = n == 0
	return n, nil
}
