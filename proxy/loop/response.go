package loop

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy/http1"
)

// response is the http.ResponseWriter of one exchange. It is used by the handler's
// goroutine; mu makes late calls by others safe, which fail.
type response struct {
	x         *exchange
	body      *body // nil if the request has none
	method    string
	minor     int
	mustClose bool

	mu       sync.Mutex
	header   http.Header
	status   int    // 0 until WriteHeader
	head     []byte // fields of the answer as they were at WriteHeader
	out      []byte // bytes for the connection
	buf      []byte // content not framed yet
	written  int64  // content
	declared int64  // Content-Length the handler set, -1 for none
	hasType, hasDate, hasEncoding,
	hasTrailers bool // announced
	committed bool // framing decided
	continued bool // the client was told to send its body
	chunked   bool
	done      bool
	hijack    bool
	err       error // of the connection
}

// contentBuffer holds an answer until it is known to be small, which then gets a
// Content-Length and one write.
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
		panic("loop: invalid WriteHeader code")
	}
	switch {
	case w.done || w.hijack:
	case w.status != 0:
		w.x.s.o.Logger.Warn("superfluous WriteHeader", "code", code, "first", w.status)
	case code < 200 && code != http.StatusSwitchingProtocols:
		w.informational(code)
	default:
		w.writeHeader(code)
	}
}

// informational sends a 1xx answer, which HTTP/1.0 does not have.
func (w *response) informational(code int) {
	if w.minor == 0 || w.err != nil || code == http.StatusContinue && w.continued {
		return
	}
	w.continued = w.continued || code == http.StatusContinue
	b := http1.AppendStatus(nil, code)
	for _, k := range w.keys() {
		if k != "Content-Length" && k != "Transfer-Encoding" && k != "Connection" {
			for _, v := range w.header[k] {
				b = http1.AppendField(b, k, v)
			}
		}
	}
	w.send(append(b, "\r\n"...))
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

// writeHeader renders the fields as they are now; what frames the content is decided by
// commit.
func (w *response) writeHeader(code int) {
	w.status = code
	w.head = http1.AppendStatus(w.buffer(), code)
	for _, k := range w.keys() {
		vs := w.header[k]
		switch k {
		case "Content-Length":
			if n, ok := parseLength(vs); ok && bodyAllowed(code) {
				w.declared = n
			} else if bodyAllowed(code) {
				w.x.s.o.Logger.Warn("invalid Content-Length from a handler ignored", "value", vs)
			}
			continue
		case "Transfer-Encoding":
			continue // ours to decide
		case "Connection":
			if len(vs) > 0 && strings.EqualFold(vs[0], "close") {
				w.mustClose = true
				continue
			}
		case "Content-Type":
			w.hasType = true // even when nil: the handler wants none
		case "Content-Encoding":
			w.hasEncoding = len(vs) > 0 && vs[0] != ""
		case "Date":
			w.hasDate = true // even when nil: the handler wants none
		case "Trailer":
			w.hasTrailers = true
		}
		for _, v := range vs {
			w.head = http1.AppendField(w.head, k, v)
		}
	}
}

func parseLength(vs []string) (n int64, ok bool) {
	if len(vs) != 1 || len(vs[0]) == 0 || len(vs[0]) > 18 {
		return 0, false
	}
	for _, c := range []byte(vs[0]) {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int64(c-'0')
	}
	return n, true
}

func bodyAllowed(code int) bool {
	return code >= 200 && code != http.StatusNoContent && code != http.StatusNotModified
}

// Write implements io.Writer.
func (w *response) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.hijack:
		return 0, http.ErrHijacked
	case w.done:
		return 0, errFinished
	}
	if w.status == 0 {
		w.writeHeader(http.StatusOK)
	}
	if !bodyAllowed(w.status) {
		return 0, http.ErrBodyNotAllowed
	}
	if w.declared >= 0 && w.written+int64(len(p)) > w.declared {
		return 0, http.ErrContentLength
	}
	if w.err != nil {
		return 0, w.err
	}
	w.written += int64(len(p))
	if w.method == http.MethodHead {
		return len(p), nil
	}
	if w.buf == nil {
		w.buf = w.buffer()
	}
	if len(w.buf)+len(p) <= contentBuffer {
		w.buf = append(w.buf, p...)
		return len(p), nil
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
	switch {
	case w.hijack:
		return http.ErrHijacked
	case w.done:
		return errFinished
	}
	if w.status == 0 {
		w.writeHeader(http.StatusOK)
	}
	w.flush(nil, false)
	return w.err
}

// flush frames buffered content and p and sends it; final is set by finish.
func (w *response) flush(p []byte, final bool) {
	if w.err != nil {
		return
	}
	if w.out == nil {
		w.out = w.buffer()
	}
	if !w.committed {
		w.commit(final, p)
	}
	if n := len(w.buf) + len(p); n > 0 {
		if w.chunked {
			w.out = http1.AppendChunkSize(w.out, n)
		}
		w.out = append(w.out, w.buf...)
		w.buf = w.buf[:0]
		if len(p) <= 4*contentBuffer {
			w.out = append(w.out, p...)
		} else { // not worth copying
			w.sendOut()
			w.send(p)
		}
		if w.chunked {
			w.out = append(w.out, "\r\n"...)
		}
	}
	if final && w.chunked {
		w.out = append(w.out, "0\r\n"...)
		w.appendTrailers()
		w.out = append(w.out, "\r\n"...)
	}
	w.sendOut()
}

// commit decides how the content is framed (RFC 9112 §6.3) and puts the head into out. p
// is content that follows what is buffered.
func (w *response) commit(final bool, p []byte) {
	w.committed = true
	out := append(w.out, w.head...)
	content := len(w.buf) + len(p)
	if !w.hasType && !w.hasEncoding && content > 0 && bodyAllowed(w.status) {
		sample := w.buf
		if len(sample) == 0 {
			sample = p
		}
		out = http1.AppendField(out, "Content-Type", http.DetectContentType(sample))
	}
	trailers := w.hasTrailers || w.hasPrefixed()
	switch {
	case !bodyAllowed(w.status):
	case w.declared >= 0:
		out = http1.AppendLength(out, w.declared)
	case w.method == http.MethodHead:
		if final && w.written > 0 {
			out = http1.AppendLength(out, w.written)
		}
	case final && !trailers:
		out = http1.AppendLength(out, int64(content))
	case w.minor == 1:
		w.chunked = true
		out = append(out, "Transfer-Encoding: chunked\r\n"...)
	default:
		w.mustClose = true
	}
	if w.body != nil && w.body.leaves() {
		w.mustClose = true
	}
	if w.x.s.draining.Load() {
		w.mustClose = true
	}
	if w.mustClose && w.status != http.StatusSwitchingProtocols {
		out = append(out, "Connection: close\r\n"...)
	} else if w.minor == 0 {
		out = append(out, "Connection: keep-alive\r\n"...)
	}
	if !w.hasDate {
		var d http1.DateCache
		out = http1.AppendDate(out, d.At(time.Now()))
	}
	w.out = append(out, "\r\n"...)
}

// begun makes w go on with an answer in chunks whose head is out; unsent is not.
func (w *response) begun(unsent []byte, closes bool) {
	w.status, w.committed, w.chunked = http.StatusOK, true, true
	w.mustClose, w.out = closes, unsent
}

func (w *response) hasPrefixed() bool {
	for k := range w.header {
		if strings.HasPrefix(k, http.TrailerPrefix) {
			return true
		}
	}
	return false
}

// appendTrailers sends what Trailer announced and what has the prefix.
func (w *response) appendTrailers() {
	for _, v := range w.header["Trailer"] {
		for name := range strings.SplitSeq(v, ",") {
			k := http.CanonicalHeaderKey(strings.TrimSpace(name))
			for _, value := range w.header[k] {
				w.out = http1.AppendField(w.out, k, value)
			}
		}
	}
	for k, vs := range w.header {
		if name, ok := strings.CutPrefix(k, http.TrailerPrefix); ok {
			for _, v := range vs {
				w.out = http1.AppendField(w.out, name, v)
			}
		}
	}
}

func (w *response) sendOut() {
	w.send(w.out)
	w.out = w.out[:0]
}

func (w *response) send(b []byte) {
	if w.err == nil && len(b) > 0 {
		_, w.err = w.x.t.Write(b)
	}
}

// sendContinue asks the client for its body, unless the answer is already on its way.
func (w *response) sendContinue() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.committed && !w.done && !w.hijack && !w.continued {
		w.continued = true
		w.send([]byte("HTTP/1.1 100 Continue\r\n\r\n"))
	}
	return w.err
}

// refuse replaces an answer that was not begun by a refusal; false if it was begun.
func (w *response) refuse(r *http1.Refusal) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mustClose = true
	if w.status != 0 || w.done {
		return false
	}
	w.status, w.committed, w.done = r.Status, true, true
	w.send(http1.AppendRefusal(nil, r, nil))
	return true
}

// finish sends the rest and reports whether the connection may be used again.
func (w *response) finish() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		return false
	}
	if w.status == 0 {
		w.writeHeader(http.StatusOK)
	}
	w.flush(nil, true)
	w.release()
	short := w.declared >= 0 && w.written < w.declared && w.method != http.MethodHead && bodyAllowed(w.status)
	return w.err == nil && !w.mustClose && !short
}

// abandon makes every later call fail and sends nothing.
func (w *response) abandon() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.done {
		w.release()
	}
}

func (w *response) isHijacked() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.hijack
}

// buffer gets an empty buffer from the pool.
func (w *response) buffer() []byte {
	if p, ok := w.x.s.buffers.Get().(*[]byte); ok {
		return (*p)[:0]
	}
	return make([]byte, 0, contentBuffer+1024) // a full content buffer and its head fit
}

// release ends the response and gives its buffers back.
func (w *response) release() {
	w.done = true
	for _, b := range [...][]byte{w.head, w.out, w.buf} {
		if cap(b) > 0 && cap(b) <= 8*contentBuffer {
			w.x.s.buffers.Put(&b)
		}
	}
	w.head, w.out, w.buf = nil, nil, nil
}

// Hijack implements http.Hijacker. The connection has no deadlines; its reader holds
// what came after the request's head and was not read.
func (w *response) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.hijack:
		return nil, nil, http.ErrHijacked
	case w.done:
		return nil, nil, errFinished
	}
	if w.status != 0 {
		w.flush(nil, false)
	}
	x := w.x
	if w.body != nil && !w.body.mu.TryLock() {
		return nil, nil, outrigger.Errorf(outrigger.Conflict, "loop: Hijack while another goroutine reads the body")
	} else if w.body != nil {
		defer w.body.mu.Unlock()
		w.body.done = true
	}
	early := append(x.unwatch(), x.rest...)
	c, err := x.t.detach()
	if err != nil {
		w.mustClose = true
		return nil, nil, err
	}
	w.hijack = true
	x.rest = nil
	w.release()
	var src io.Reader = c
	if len(early) > 0 {
		src = io.MultiReader(bytes.NewReader(early), c)
	}
	br := bufio.NewReaderSize(src, max(4096, len(early)))
	_, _ = br.Peek(len(early)) // cannot fail: they are in memory. Buffered() now counts them
	return c, bufio.NewReadWriter(br, bufio.NewWriter(c)), nil
}

// SetReadDeadline is for http.ResponseController; it replaces BodyTimeout. The zero time
// brings BodyTimeout back.
func (w *response) SetReadDeadline(t time.Time) error {
	return w.deadline(func() error { return w.x.t.SetReadDeadline(t) })
}

// SetWriteDeadline is for http.ResponseController; it replaces WriteTimeout.
func (w *response) SetWriteDeadline(t time.Time) error {
	return w.deadline(func() error { return w.x.t.SetWriteDeadline(t) })
}

func (w *response) deadline(set func() error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done || w.hijack {
		return errFinished
	}
	return set()
}

// EnableFullDuplex is for http.ResponseController: it is always so.
func (w *response) EnableFullDuplex() error { return nil }
