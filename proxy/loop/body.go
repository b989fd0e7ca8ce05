package loop

import (
	"errors"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// body is the content of a request. Handlers may keep it (a client transport reads from
// its own goroutine): everything is behind mu, and after finish it touches the exchange no
// more.
type body struct {
	mu      sync.Mutex
	x       *exchange
	w       *response
	req     *http.Request // gets the trailers
	left    int64         // of a body of known length
	chunks  *http1.Chunked
	expect  bool // the client waits for a 100
	err     error
	done    bool // finished by the server
	closed  bool // by the handler
	stalled bool // the last read ran into its deadline
}

// newBody returns nil if the request has no body.
func newBody(x *exchange, w *response) *body {
	n := x.req.ContentLength()
	if n == 0 {
		return nil
	}
	b := &body{x: x, w: w, left: n, expect: x.req.ExpectContinue()}
	if n < 0 {
		b.chunks = new(http1.Chunked)
	}
	w.body = b
	return b
}

// Read implements io.Reader. Errors: io.EOF; io.ErrUnexpectedEOF when the client stops
// early; a *http1.Refusal for bad chunks; os.ErrDeadlineExceeded when it stalls.
func (b *body) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.done || b.closed:
		return 0, http.ErrBodyReadAfterClose
	case b.err != nil:
		return 0, b.err
	case len(p) == 0:
		return 0, nil
	}
	return b.read(p)
}

func (b *body) read(p []byte) (n int, err error) {
	if b.expect {
		b.expect = false
		if err := b.w.sendContinue(); err != nil {
			b.err = err
			return 0, err
		}
	}
	if b.chunks != nil {
		n, err = b.readChunks(p)
	} else {
		n, err = b.x.read(p[:min(int64(len(p)), b.left)])
		if b.left -= int64(n); b.left == 0 {
			err = io.EOF
		} else if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
	}
	if err != nil {
		// A deadline may be moved and reading go on; everything else is final.
		if b.stalled = errors.Is(err, os.ErrDeadlineExceeded); !b.stalled {
			b.err = err
		}
		if err == io.EOF {
			b.x.bodyRead()
		}
		if n > 0 && err != io.EOF {
			err = nil // comes again
		}
	}
	return n, err
}

func (b *body) readChunks(p []byte) (int, error) {
	x := b.x
	for {
		if len(x.rest) == 0 {
			if err := x.refill(); err == io.EOF {
				return 0, io.ErrUnexpectedEOF
			} else if err != nil {
				return 0, err
			}
		}
		// No more than p holds goes in, so no more than p holds comes out.
		data, used, err := b.chunks.Next(x.rest[:min(len(x.rest), len(p))])
		n := copy(p, data)
		x.rest = x.rest[used:]
		switch {
		case err != nil:
			return n, err
		case b.chunks.Done():
			b.trailers()
			return n, io.EOF
		case n > 0:
			return n, nil
		}
	}
}

func (b *body) trailers() {
	if b.chunks.Trailers() == 0 || b.req == nil {
		return
	}
	if b.req.Trailer == nil {
		b.req.Trailer = http.Header{}
	}
	for i := range b.chunks.Trailers() {
		name, value := b.chunks.Trailer(i)
		b.req.Trailer.Add(string(name), string(value))
	}
}

// Close implements io.Closer; what is left is read or dropped when the handler returns.
func (b *body) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	return nil
}

// leaves reports whether a connection can certainly not be kept after this body: the
// client waits for a 100 it did not get, or much is unread. It is asked while the answer's
// head is written, possibly from within Read of another goroutine, which then means no.
func (b *body) leaves() bool {
	if !b.mu.TryLock() {
		return false
	}
	defer b.mu.Unlock()
	if b.done || b.err != nil {
		return b.err != nil && b.err != io.EOF
	}
	return b.expect || b.left > maxDrain+int64(len(b.x.rest))
}

// refusal returns the answer the body's own fault deserves, nil if there is none.
func (b *body) refusal() *http1.Refusal {
	if !b.mu.TryLock() {
		return nil
	}
	defer b.mu.Unlock()
	var r *http1.Refusal
	errors.As(b.err, &r)
	return r
}

// drainTime bounds how long finish waits for the rest of a body.
const drainTime = 5 * time.Second

// finish takes the body away from the handler, reads up to max bytes that it left, and
// reports whether the body was read to its end.
func (b *body) finish(max int64) bool {
	if !b.mu.TryLock() {
		// Some goroutine is inside Read: make it return. It cannot be waited out, the
		// client may be waiting for us.
		_ = b.x.t.SetReadDeadline(time.Unix(1, 0))
		b.mu.Lock()
	}
	defer b.mu.Unlock()
	b.done = true
	if b.err == nil && !b.expect && !b.stalled && max > 0 && b.left <= max+int64(len(b.x.rest)) {
		_ = b.x.t.SetReadDeadline(time.Now().Add(drainTime))
		scratch := make([]byte, 8<<10)
		for total := int64(0); total <= max && b.err == nil; {
			n, err := b.read(scratch)
			if total += int64(n); err != nil {
				b.err = err
			}
		}
	}
	return b.err == io.EOF
}
