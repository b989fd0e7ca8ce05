package http2

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"
)

// response is the http.ResponseWriter of one stream. It is used by the handler's
// goroutine; mu makes late calls by others safe, which fail.
type response struct {
	st      *stream
	method  string
	expects bool // 100-continue, not sent yet

	mu        sync.Mutex
	header    http.Header
	status    int      // 0 until WriteHeader
	block     []byte   // fields as they were at WriteHeader
	announced []string // trailers, canonical
	buf       []byte   // content not sent yet
	written   int64
	declared  int64 // Content-Length the handler set, -1 for none
	hasType, hasDate, hasEncoding,
	committed, // the head was sent
	done bool
	err error // of the stream
}

// contentBuffer holds an answer until it is known to be small, which then gets a
// content-length and leaves together.
const contentBuffer = 8 << 10

// Header implements http.ResponseWriter.
func (w *response) Header() http.Header {
	if w.header == nil {
		w.header = make(http.Header)
	}
	return w.header
}

// WriteHeader implements http.ResponseWriter. Informational codes are sent at once.
func (w *response) WriteHeader(code int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if code < 100 || code > 999 {
		panic(fmt.Sprintf("http2: invalid WriteHeader code %d", code))
	}
	switch {
	case w.done:
	case w.status != 0:
		w.st.c.s.o.Logger.Warn("superfluous WriteHeader", "code", code, "first", w.status)
	case code < 200:
		w.informational(code)
	default:
		w.writeHeader(code)
	}
}

// informational sends a 1xx answer; 101 does not exist in HTTP/2.
func (w *response) informational(code int) {
	if code == http.StatusSwitchingProtocols || w.err != nil {
		return
	}
	w.expects = w.expects && code != http.StatusContinue
	b := AppendStatus(nil, code)
	for _, k := range w.keys() {
		if k != "Content-Length" {
			b = appendValues(b, k, w.header[k])
		}
	}
	w.err = w.st.send(b, nil, nil, false)
}

// keys returns the names of the header, sorted, without those meant as trailers.
func (w *response) keys() []string {
	keys := make([]string, 0, len(w.header))
	for k := range w.header {
		if !strings.HasPrefix(k, http.TrailerPrefix) {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return keys
}

// appendValues appends a field unless HTTP/2 forbids it. Bytes no field may hold become
// spaces, as with net/http.
func appendValues(dst []byte, canonical string, values []string) []byte {
	name := strings.ToLower(canonical)
	switch name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return dst
	}
	if !isToken(name) {
		return dst
	}
	for _, v := range values {
		if !validValue(v) {
			v = strings.TrimSpace(strings.Map(func(r rune) rune {
				if r < 0x20 && r != '\t' || r == 0x7f {
					return ' '
				}
				return r
			}, v))
		}
		dst = AppendField(dst, name, v)
	}
	return dst
}

// writeHeader renders the fields as they are now.
func (w *response) writeHeader(code int) {
	w.status = code
	w.block = AppendStatus(make([]byte, 0, 256), code)
	for _, k := range w.keys() {
		vs := w.header[k]
		switch k {
		case "Content-Length":
			if n, err := strconv.ParseUint(w.header.Get(k), 10, 62); err == nil && len(vs) == 1 && bodyAllowed(code) {
				w.declared = int64(n)
			} else if bodyAllowed(code) {
				w.st.c.s.o.Logger.Warn("invalid Content-Length from a handler ignored", "value", vs)
				continue
			}
			if !bodyAllowed(code) && code != http.StatusNotModified {
				continue
			}
		case "Content-Type":
			w.hasType = len(vs) > 0
		case "Content-Encoding":
			w.hasEncoding = len(vs) > 0 && vs[0] != ""
		case "Date":
			w.hasDate = true // even when nil: the handler wants none
		case "Trailer":
			w.announce(vs)
			if w.st.head.grpc {
				continue // every gRPC answer has one, and metadata is the application's
			}
		}
		w.block = appendValues(w.block, k, vs)
	}
}

func (w *response) announce(vs []string) {
	for _, v := range vs {
		for name := range strings.SplitSeq(v, ",") {
			if name = http.CanonicalHeaderKey(strings.TrimSpace(name)); name != "" && !forbiddenTrailer(name) && !slices.Contains(w.announced, name) {
				w.announced = append(w.announced, name)
			}
		}
	}
}

func bodyAllowed(code int) bool {
	return code >= 200 && code != http.StatusNoContent && code != http.StatusNotModified
}

// Write implements io.Writer.
func (w *response) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		return 0, errFinished
	}
	if w.status == 0 {
		w.writeHeader(http.StatusOK)
	}
	switch {
	case !bodyAllowed(w.status):
		return 0, http.ErrBodyNotAllowed
	case w.declared >= 0 && w.written+int64(len(p)) > w.declared:
		return 0, http.ErrContentLength
	case w.err != nil:
		return 0, w.err
	}
	w.written += int64(len(p))
	if w.method == http.MethodHead {
		return len(p), nil
	}
	if len(w.buf)+len(p) <= contentBuffer {
		w.buf = append(w.buf, p...)
		return len(p), nil
	}
	if len(w.buf) > 0 {
		w.flush(nil, false)
		w.buf = nil // content is large: what follows is not gathered in it for long
	}
	w.flush(p, false)
	if w.err != nil {
		return 0, w.err
	}
	return len(p), nil
}

// WriteString implements io.StringWriter.
func (w *response) WriteString(s string) (int, error) {
	return w.Write(unsafe.Slice(unsafe.StringData(s), len(s))) // Write does not change or keep it
}

// Flush implements http.Flusher.
func (w *response) Flush() { _ = w.FlushError() }

// FlushError sends everything written so far, for http.ResponseController.
func (w *response) FlushError() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		return errFinished
	}
	if w.status == 0 {
		w.writeHeader(http.StatusOK)
	}
	w.flush(nil, false)
	return w.err
}

// flush sends the head, if it was not yet, then p or, without one, what is buffered.
func (w *response) flush(p []byte, final bool) {
	if w.err != nil {
		return
	}
	var block, trailer []byte
	if p == nil {
		p = w.buf
	}
	if !w.committed {
		w.committed = true
		block = w.head(p, final)
	}
	if final {
		trailer = w.trailers()
	}
	if block == nil && len(p) == 0 && !final {
		return
	}
	w.err = w.st.send(block, p, trailer, final)
	w.buf = w.buf[:0]
}

// head completes the header block.
func (w *response) head(p []byte, final bool) []byte {
	if !w.hasType && !w.hasEncoding && len(p) > 0 && bodyAllowed(w.status) {
		w.block = AppendField(w.block, "content-type", http.DetectContentType(p))
	}
	if w.declared < 0 && final && bodyAllowed(w.status) && !w.st.head.grpc && (w.method != http.MethodHead || w.written > 0) {
		w.block = AppendField(w.block, "content-length", strconv.FormatInt(w.written, 10))
	}
	if !w.hasDate {
		w.block = AppendField(w.block, "date", time.Now().UTC().Format(http.TimeFormat))
	}
	return w.block
}

// trailers renders the announced fields and those with http.TrailerPrefix; nil if there
// are none.
func (w *response) trailers() (block []byte) {
	for _, k := range w.announced {
		block = appendValues(block, k, w.header[k])
	}
	var more []string
	for k := range w.header {
		if name, ok := strings.CutPrefix(k, http.TrailerPrefix); ok && !forbiddenTrailer(http.CanonicalHeaderKey(name)) {
			more = append(more, k)
		}
	}
	slices.Sort(more)
	for _, k := range more {
		block = appendValues(block, strings.TrimPrefix(k, http.TrailerPrefix), w.header[k])
	}
	return block
}

// end completes the answer, if the handler returned normally and sent what it announced.
func (w *response) end(ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done = true
	if !ok || w.err != nil {
		return
	}
	if w.status == 0 {
		w.writeHeader(http.StatusOK)
	}
	if w.declared >= 0 && w.written != w.declared && w.method != http.MethodHead {
		return // the stream is reset: the client must not take it for complete
	}
	w.flush(nil, true)
}

// proceed sends 100 when the handler asks for a body the client holds back.
func (w *response) proceed() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.expects && w.status == 0 && !w.done && w.err == nil {
		w.expects = false
		w.err = w.st.send(AppendStatus(nil, http.StatusContinue), nil, nil, false)
	}
}

// EnableFullDuplex is for http.ResponseController: it always is.
func (w *response) EnableFullDuplex() error { return nil }

// SetReadDeadline is for http.ResponseController; a read that waits sees the change.
func (w *response) SetReadDeadline(t time.Time) error {
	w.st.c.mu.Lock()
	defer w.st.c.mu.Unlock()
	w.st.rd = t
	nudge(w.st.rwake)
	return nil
}

// SetWriteDeadline is for http.ResponseController.
func (w *response) SetWriteDeadline(t time.Time) error {
	w.st.c.mu.Lock()
	defer w.st.c.mu.Unlock()
	w.st.wd = t
	nudge(w.st.wwake)
	return nil
}

// body is a request's body.
type body struct {
	st   *stream
	w    *response
	r    *http.Request
	once sync.Once
	shut bool // guarded by st.c.mu
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	b.once.Do(b.w.proceed)
	if len(p) == 0 {
		return 0, nil
	}
	return b.st.read(p, b)
}

// Close implements io.Closer: later reads fail. What still comes is taken and counted
// against the window, so no more than that.
func (b *body) Close() error {
	b.st.c.mu.Lock()
	defer b.st.c.mu.Unlock()
	b.shut = true
	nudge(b.st.rwake)
	return nil
}

// trailers gives the request what came after the body; the lock is held.
func (b *body) trailers() {
	for _, f := range b.st.trailer {
		if k := http.CanonicalHeaderKey(f.Name); !forbiddenTrailer(k) {
			if b.r.Trailer == nil {
				b.r.Trailer = http.Header{}
			}
			b.r.Trailer[k] = append(b.r.Trailer[k], f.Value)
		}
	}
	b.st.trailer = nil
}
