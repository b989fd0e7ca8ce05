package upstream

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

const (
	exchangeBuffer = 16 << 10 // the request's head and small body, then what is read
	maxAnswerHead  = 64 << 10
	maxInterim     = 5 // 1xx answers before the final one, as in net/http
)

// scratch is the memory of a request under way.
type scratch struct {
	buf     []byte
	vec     [2][]byte
	answer  http1.Answer
	chunked http1.Chunked
}

// exchange is one request on one connection: its answer's body, once the head is there.
type exchange struct {
	d       *Direct
	l       *link
	s       *scratch // nil when finished
	ctx     context.Context
	address string
	stop    func() bool // takes the context's hold off the connection

	written int64 // of the request's body
	werr    error

	got   int    // bytes of answers read
	rest  []byte // of s.buf: read and not used
	ready []byte // of s.buf: decoded and not delivered
	left  int64  // of the content; http1.Unframed or -1 as Answer.Length has it
	keep  bool   // the connection may be used again
	err   error  // what Read says from now on

	resp http.Response
}

func (d *Direct) begin(ctx context.Context, l *link, address string) *exchange {
	s, _ := d.scratch.Get().(*scratch)
	if s == nil {
		s = &scratch{buf: make([]byte, 0, exchangeBuffer)}
	}
	x := &exchange{d: d, l: l, s: s, ctx: ctx, address: address}
	x.stop = context.AfterFunc(ctx, func() { l.nc.Close() })
	return x
}

// free gives the memory back; the connection is the caller's.
func (x *exchange) free() {
	x.stop()
	s := x.s
	x.s, x.rest, x.ready = nil, nil, nil
	if cap(s.buf) == exchangeBuffer {
		s.buf, s.vec = s.buf[:0], [2][]byte{}
		x.d.scratch.Put(s)
	}
}

// exchange sends r and reads the head of its answer.
func (x *exchange) exchange(r *http.Request, body io.ReadCloser) (*http.Response, error) {
	werr := x.send(r, body)
	if werr != nil && x.werr == nil {
		return nil, werr // the request's own fault
	}
	if t := x.d.headTimeout; t > 0 {
		if err := x.l.nc.SetReadDeadline(time.Now().Add(t)); err != nil {
			return nil, err
		}
	}
	// A server may refuse without having read everything: its answer says why writing failed.
	resp, err := x.receive(r, werr == nil)
	if err != nil && werr != nil {
		err = werr
	}
	return resp, err
}

// receive reads the head of the answer; the connection is kept after it only if the whole
// request was sent.
func (x *exchange) receive(r *http.Request, sent bool) (*http.Response, error) {
	n, err := x.head(r.Method)
	if err != nil {
		return nil, err
	}
	if x.d.headTimeout > 0 {
		if err := x.l.nc.SetReadDeadline(time.Time{}); err != nil {
			return nil, err
		}
	}
	x.rest = x.s.buf[n:]
	x.left, x.keep = x.s.answer.Length(), x.s.answer.KeepAlive() && sent
	x.s.chunked.Reset()
	x.respond(r)
	if x.left == 0 {
		x.finish(io.EOF)
	}
	return &x.resp, nil
}

// send writes head and body, with one system call if they fit the buffer.
func (x *exchange) send(r *http.Request, body io.ReadCloser) error {
	x.s.buf = appendRequest(x.s.buf[:0], r)
	if body != nil && body != http.NoBody {
		var err error
		if to, ok := body.(io.WriterTo); ok {
			_, err = to.WriteTo((*requestWriter)(x))
		} else {
			_, err = io.Copy((*requestWriter)(x), io.LimitReader(body, r.ContentLength+1))
		}
		if err != nil {
			return err
		}
	}
	if x.written != r.ContentLength {
		return outrigger.Errorf(outrigger.Invalid, "upstream: the request body has %d bytes, its length says %d", x.written, r.ContentLength)
	}
	if len(x.s.buf) > 0 && x.werr == nil {
		_, x.werr = x.l.nc.Write(x.s.buf)
	}
	x.s.buf = x.s.buf[:0]
	return x.werr
}

// requestWriter is an exchange whose request is being written.
type requestWriter exchange

// Write implements io.Writer.
func (w *requestWriter) Write(p []byte) (int, error) {
	if w.werr != nil {
		return 0, w.werr
	}
	s := w.s
	w.written += int64(len(p))
	if len(s.buf)+len(p) <= cap(s.buf) {
		s.buf = append(s.buf, p...)
		return len(p), nil
	}
	s.vec = [2][]byte{s.buf, p}
	v := net.Buffers(s.vec[:])
	_, w.werr = v.WriteTo(w.l.nc) // writev
	s.buf = s.buf[:0]
	return len(p), w.werr
}

// appendRequest renders the head (RFC 9112 §3), as http.Transport would.
func appendRequest(b []byte, r *http.Request) []byte {
	b = append(append(b, r.Method...), ' ')
	b = append(append(b, r.URL.RequestURI()...), " HTTP/1.1\r\n"...)
	host := r.Host
	if host == "" {
		host = r.URL.Host
	}
	b = http1.AppendField(b, "Host", host)
	if _, ok := r.Header["User-Agent"]; !ok {
		b = append(b, "User-Agent: Go-http-client/1.1\r\n"...)
	}
	for name, values := range r.Header {
		switch name {
		case "Host", "Content-Length":
			continue
		case "User-Agent":
			if len(values) == 0 || values[0] == "" {
				continue
			}
		}
		for _, v := range values {
			b = http1.AppendField(b, name, v)
		}
	}
	if r.ContentLength > 0 || r.Method == http.MethodPost || r.Method == http.MethodPut || r.Method == http.MethodPatch {
		b = http1.AppendLength(b, r.ContentLength)
	}
	return append(b, "\r\n"...)
}

// head reads until the final head is complete and returns its length in s.buf.
func (x *exchange) head(method string) (int, error) {
	s, seen := x.s, 0
	for interim := 0; ; {
		n, err := 0, error(http1.ErrShort)
		if len(s.buf) > 0 {
			n, err = s.answer.Parse(s.buf, &seen, method, http1.Limits{Head: maxAnswerHead})
		}
		switch {
		case err == http1.ErrShort:
			if len(s.buf) == cap(s.buf) {
				s.buf = append(s.buf, make([]byte, cap(s.buf))...)[:len(s.buf)]
			}
			n, err = x.l.nc.Read(s.buf[len(s.buf):cap(s.buf)])
			s.buf, x.got = s.buf[:len(s.buf)+n], x.got+n
			if n == 0 && err != nil {
				return 0, unexpected(err)
			}
		case err != nil:
			return 0, err
		case s.answer.Status() == http.StatusSwitchingProtocols:
			return 0, outrigger.Errorf(outrigger.Unavailable, "upstream: the server switched protocols unasked")
		case s.answer.Status() < 200:
			if interim++; interim > maxInterim {
				return 0, outrigger.Errorf(outrigger.Unavailable, "upstream: more than %d interim answers", maxInterim)
			}
			s.buf, seen = s.buf[:copy(s.buf, s.buf[n:])], 0
		default:
			return n, nil
		}
	}
}

// unexpected: the end of a connection in the middle of something is an error.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// respond builds the response; all strings are cut from one copy of the head.
func (x *exchange) respond(r *http.Request) {
	a := &x.s.answer
	head := string(a.Head())
	h := make(http.Header, a.Len())
	values := make([]string, a.Len())
	for i := range a.Len() {
		name, value := a.FieldIn(head, i)
		key := textproto.CanonicalMIMEHeaderKey(name)
		if key == "Transfer-Encoding" { // has a place of its own
			continue
		}
		if old, ok := h[key]; ok {
			h[key] = append(old, value)
			continue
		}
		values[i] = value
		h[key] = values[i : i+1 : i+1]
	}
	line, _, _ := strings.Cut(head, "\r\n")
	x.resp = http.Response{Status: line[9:], StatusCode: a.Status(), Proto: line[:8], ProtoMajor: 1, ProtoMinor: a.Minor(),
		Header: h, Body: x, ContentLength: x.left, Close: !x.keep, Request: r}
	switch x.left {
	case -1:
		x.resp.TransferEncoding = []string{"chunked"}
	case http1.Unframed:
		x.resp.ContentLength = -1
	case 0:
		if v := h["Content-Length"]; r.Method == http.MethodHead && len(v) > 0 {
			if n, err := strconv.ParseInt(v[0], 10, 64); err == nil {
				x.resp.ContentLength = n
			}
		}
	}
}
