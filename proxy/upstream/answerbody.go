package upstream

import (
	"io"
	"net/http"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// Read implements io.Reader of the answer's body. It returns what one read of the
// connection brought, so that streams pass as they come, and the end with the last bytes.
func (x *exchange) Read(p []byte) (n int, err error) {
	if x.s == nil {
		return 0, x.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if x.left == -1 {
		n, err = x.readChunked(p)
	} else {
		n, err = x.readPlain(p)
	}
	if err != nil {
		x.finish(err)
		err = x.err
	}
	return n, err
}

// readPlain reads content of known length, or up to the end of the connection.
func (x *exchange) readPlain(p []byte) (n int, err error) {
	if x.left > 0 && int64(len(p)) > x.left {
		p = p[:x.left]
	}
	if len(x.rest) > 0 {
		n = copy(p, x.rest)
		x.rest = x.rest[n:]
	} else if n, err = x.l.nc.Read(p); n > 0 {
		x.got += n
		if err == io.EOF && x.left != http1.Unframed {
			err = nil // the next read says so, if more was to come
		}
	}
	if x.left == http1.Unframed {
		return n, err
	}
	if x.left -= int64(n); x.left == 0 {
		return n, io.EOF
	}
	if err != nil {
		err = unexpected(err)
	}
	return n, err
}

// readChunked decodes until p is full or nothing more is there.
func (x *exchange) readChunked(p []byte) (n int, err error) {
	s := x.s
	for {
		if len(x.ready) > 0 {
			m := copy(p[n:], x.ready)
			x.ready, n = x.ready[m:], n+m
			if n == len(p) {
				return n, nil
			}
			continue
		}
		if len(x.rest) > 0 {
			used := 0
			if x.ready, used, err = s.chunked.Next(x.rest); err != nil {
				return n, err
			}
			x.rest = x.rest[used:]
			if s.chunked.Done() {
				return n, io.EOF
			}
			continue
		}
		if s.chunked.Done() { // before this body was resumed
			return n, io.EOF
		}
		if n > 0 {
			return n, nil
		}
		m, err := x.l.nc.Read(s.buf[:cap(s.buf)])
		x.rest = s.buf[:m]
		if m == 0 && err != nil {
			return 0, unexpected(err)
		}
	}
}

// Close implements io.Closer. An answer that was not read to its end ends its connection.
func (x *exchange) Close() error {
	if x.s != nil {
		x.keep = false
		x.finish(http.ErrBodyReadAfterClose)
	}
	return nil
}

// finish ends the exchange: the connection is kept if the answer was whole and nothing
// follows it.
func (x *exchange) finish(err error) {
	keep := x.keep && err == io.EOF && len(x.rest) == 0
	if err != io.EOF && x.ctx.Err() != nil {
		err = endOf(x.ctx, err)
	}
	x.err = err
	l, held := x.l, x.stop() // not held: the context has ended and closes the connection
	x.l = nil
	x.free()
	if !keep || !held {
		l.nc.Close()
		l = nil
	}
	x.d.leave(x.address, l)
}
