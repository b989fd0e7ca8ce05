package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net/http"
	"sync"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger/internal/heap"
)

// What an inflow lets in before the handler has taken the message that it is at.
const (
	aheadBytes    = 1 << 20
	aheadMessages = 128
)

// prefixBytes begin every gRPC message: whether it is compressed, and its length.
const prefixBytes = 5

// errNoMemory ends a call with UNAVAILABLE, which grpc-go makes of a refused stream.
var errNoMemory = errors.New("the sidecar holds as much of other calls as it may; try again")

// inflow is the body of a gRPC call, read no further than its handler needs. grpc-go's server
// behind an http.Handler reads a body as fast as it comes and queues what the handler
// has not asked for, 16 KiB for each read however short; a caller who sends to somebody who does
// not read would fill the memory. So the inflow reads the message that the handler is at, 1 MiB
// or 128 messages of what follows, and then waits, by which flow control stops the caller;
// and a read ends where its buffer or a message does.
//
// Read is one goroutine's; taken and Close are for any.
type inflow struct {
	body io.ReadCloser
	room *heap.Room

	prefix [prefixBytes]byte // of the present message, as far as it is there
	have   int
	left   uint64 // of the present message, after its prefix

	mu     sync.Mutex
	queue  []message // not taken; the first is the handler's
	ahead  int       // bytes of all but the first
	closed bool
	more   chan struct{} // tells Read to look again
}

// message is one the handler has not taken, as far as it was read.
type message struct {
	bytes int
	held  int64 // of the room: the buffers it was read into
}

type inflowKey struct{}

// withInflow has the body of a gRPC call read as its handler takes messages, which
// takeMessages tells. done must be called when the call is over.
func withInflow(r *http.Request, room *heap.Room) (_ *http.Request, done func()) {
	f := &inflow{body: r.Body, room: room, more: make(chan struct{}, 1)}
	r = r.WithContext(context.WithValue(r.Context(), inflowKey{}, f))
	r.Body = f
	return r, f.release
}

// takeMessages is a grpc.StreamServerInterceptor. Calls with one request need none: what
// follows it nobody takes.
func takeMessages(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if f, ok := s.Context().Value(inflowKey{}).(*inflow); ok {
		s = &takingStream{s, f}
	}
	return next(srv, s)
}

type takingStream struct {
	grpc.ServerStream
	f *inflow
}

func (t *takingStream) RecvMsg(m any) error {
	err := t.ServerStream.RecvMsg(m)
	if err == nil {
		t.f.taken()
	}
	return err
}

// Read reads on to the end of a message, or of p.
func (f *inflow) Read(p []byte) (n int, err error) {
	if err := f.wait(); err != nil || len(p) == 0 {
		return 0, err
	}
	begins := f.have == 0
	for last := false; n < len(p) && err == nil && !last; {
		want := uint64(prefixBytes - f.have)
		if f.have == prefixBytes {
			want = f.left
		}
		var m int
		m, err = f.body.Read(p[n : n+int(min(uint64(len(p)-n), want))])
		last = f.advance(p[n : n+m])
		n += m
	}
	if n > 0 && !f.note(begins, n, int64(len(p))) {
		return 0, http2.StreamError{Code: http2.ErrCodeRefusedStream, Cause: errNoMemory}
	}
	return n, err
}

// wait returns when more may be read.
func (f *inflow) wait() error {
	for {
		f.mu.Lock()
		closed, full := f.closed, f.ahead >= aheadBytes || len(f.queue) >= aheadMessages
		f.mu.Unlock()
		if closed {
			return http.ErrBodyReadAfterClose
		}
		if !full {
			return nil
		}
		<-f.more
	}
}

// advance follows the present message over its next bytes, and reports whether they are its
// last.
func (f *inflow) advance(b []byte) (last bool) {
	if f.have < prefixBytes {
		f.have += copy(f.prefix[f.have:], b)
		f.left = uint64(binary.BigEndian.Uint32(f.prefix[1:]))
	} else {
		f.left -= uint64(len(b))
	}
	if f.have < prefixBytes || f.left > 0 {
		return false
	}
	f.have = 0
	return true
}

// note puts n bytes of one message on the books, which were read into size bytes; false if
// there is no room for them. The first bytes of the message the handler is at need none, so
// that small calls are served whatever others hold.
func (f *inflow) note(begins bool, n int, size int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if begins && len(f.queue) == 0 {
		size = 0
	}
	if !f.room.Take(size) {
		return false
	}
	if begins || len(f.queue) == 0 { // taken before its end, which cannot be
		f.queue = append(f.queue, message{})
	}
	m := &f.queue[len(f.queue)-1]
	m.bytes, m.held = m.bytes+n, m.held+size
	if len(f.queue) > 1 {
		f.ahead += n
	}
	return true
}

// taken says that the handler has the message it was at.
func (f *inflow) taken() {
	f.mu.Lock()
	if len(f.queue) > 0 {
		f.room.Give(f.queue[0].held)
		f.queue = append(f.queue[:0], f.queue[1:]...)
		if len(f.queue) > 0 {
			f.ahead -= f.queue[0].bytes
		}
	}
	f.mu.Unlock()
	f.wake()
}

func (f *inflow) wake() {
	select {
	case f.more <- struct{}{}:
	default:
	}
}

// Close ends a Read that waits, and all after it.
func (f *inflow) Close() error {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.wake()
	return f.body.Close()
}

// release gives back what messages nobody took have of the room, after the call.
func (f *inflow) release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.queue {
		f.room.Give(m.held)
	}
	f.queue = nil
}
