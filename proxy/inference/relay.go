package inference

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"sync"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
)

// maxBuffered is how much of an answer is read before its head is passed on. A whole
// answer below it can be retried when it is cut, and its usage can be read; a client
// that waits for JSON cannot use a part of it anyway.
const maxBuffered = 1 << 20

// buffers keeps answer buffers between requests; large ones are left to the collector.
type buffers struct{ pool sync.Pool }

const keepBuffer = 64 << 10

func (b *buffers) get() *[]byte {
	if p, ok := b.pool.Get().(*[]byte); ok {
		return p
	}
	p := make([]byte, 0, 8<<10)
	return &p
}

func (b *buffers) put(p *[]byte) {
	if cap(*p) <= keepBuffer {
		*p = (*p)[:0]
		b.pool.Put(p)
	}
}

// readUpTo appends from r to buf until the end (done) or until limit bytes are there. Before
// buf grows, grow is asked for the bytes; errNoRoom means that it refused.
func readUpTo(r io.Reader, buf []byte, limit int, grow func(int) bool) (out []byte, done bool, err error) {
	for len(buf) < limit {
		if n := len(buf); n == cap(buf) {
			more := min(max(n, 4<<10), limit-n)
			if !grow(more) {
				return buf, false, errNoRoom
			}
			buf = append(make([]byte, 0, n+more), buf...)
		}
		n, err := r.Read(buf[len(buf):min(cap(buf), limit)])
		buf = buf[:len(buf)+n]
		if err == io.EOF {
			return buf, true, nil
		}
		if err != nil {
			return buf, false, err
		}
	}
	return buf, false, nil
}

// relayBody passes on an answer that is not a stream.
func (c *call) relayBody(ctx context.Context, t *target, resp *http.Response, report func(error)) ending {
	p := c.h.buffers.get()
	defer func() { c.h.buffers.put(p) }()
	limit := maxBuffered
	if c.streams && (!isJSON(resp) || c.api.Family == shape.Gemini) {
		limit = 0 // a stream in a form we do not cut into events: pass on what there is
	}
	if c.api.Played && resp.StatusCode < 300 {
		limit = 0
	}
	buf, whole, err := readUpTo(resp.Body, (*p)[:0], limit, c.grow)
	*p = buf
	crowded := errors.Is(err, errNoRoom)
	if err != nil && !crowded { // without room it is passed on as far as it is there
		return c.lost(ctx, t, report, "transport")
	}
	if whole {
		c.api.Family.Usage(buf, &c.usage)
		resp.Header["Content-Length"] = []string{strconv.Itoa(len(buf))}
	}
	failed := resp.StatusCode >= 500
	end := ending{failed: failed}
	if resp.StatusCode >= 400 {
		end.tag = strconv.Itoa(resp.StatusCode)
	}
	c.relayHead(resp.StatusCode, resp.Header)
	n, werr := c.w.Write(buf)
	c.sent += int64(n)
	if !whole && werr == nil {
		var rerr error
		if rerr, werr = c.copyRest(resp.Body, buf[:cap(buf)]); rerr != nil && !c.gone() {
			c.penalise(t)
			report(errEndpoint)
			return ending{verdict: brokenOff, failed: true, tag: "truncated"}
		} else if rerr != nil {
			werr = rerr
		}
	}
	switch {
	case werr != nil:
		report(errExcluded)
		return ending{cancelled: true, tag: "cancelled"}
	case failed:
		report(errEndpoint)
	default:
		report(nil)
		c.complete = resp.StatusCode == http.StatusOK && !crowded && (!whole || wholeJSON(resp, buf)) // what nobody saw whole is not kept
	}
	return end
}

// copyRest streams what did not fit the buffer, flushing per read, and says which side
// failed.
func (c *call) copyRest(body io.Reader, buf []byte) (readErr, writeErr error) {
	flush := http.NewResponseController(c.w)
	if err := flush.Flush(); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return nil, err
	}
	for {
		n, err := body.Read(buf)
		if n > 0 {
			if c.streams && c.ttft == 0 {
				c.ttft = max(c.h.now().Sub(c.start), 1)
			}
			m, werr := c.w.Write(buf[:n])
			c.sent += int64(m)
			if werr == nil {
				werr = flush.Flush()
			}
			if werr != nil && !errors.Is(werr, http.ErrNotSupported) {
				return nil, werr
			}
		}
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return err, nil
		}
	}
}

// Limits on what is held back before the first content. Held bytes delay nobody: they
// contain nothing to show. But a server that sends keep-alives is slow, not broken, and
// its client needs them too, so the second one commits.
const (
	maxHeldBytes    = 64 << 10
	maxHeldComments = 1
)

// stream relays one server-sent event stream.
type stream struct {
	c        *call
	events   *shape.EventReader
	flush    *http.ResponseController
	held     []byte
	comments int
	open     bool // the head is out
	finished bool // the protocol's mark of the end was seen
}

// relayStream passes on a stream event by event. Until the first content everything is
// held back, so that a failure up to there can still be retried (the commit point).
func (c *call) relayStream(ctx context.Context, t *target, resp *http.Response, report func(error)) ending {
	p := c.h.buffers.get()
	s := &stream{c: c, events: c.newEvents(resp.Body, *p), flush: http.NewResponseController(c.w)}
	defer func() {
		*p = s.events.Buffer()
		c.h.buffers.put(p)
	}()
	if o := c.opened; o != nil {
		s.open, s.finished, s.comments = true, o.finished, o.comments
		if s.flushNow() != nil {
			report(errExcluded)
			return ending{cancelled: true, tag: "cancelled"}
		}
	}
	for {
		ev, err := s.events.Next()
		if err != nil {
			return s.end(ctx, t, resp, report, err)
		}
		kind := s.look(ev)
		switch {
		case s.open:
			if kind >= shape.Failure {
				c.failFlight()
			}
			err = s.send(ev.Raw)
		case kind == shape.Failure:
			// The whole answer as it would have been, should no endpoint do better.
			body := append(s.held, ev.Raw...)
			c.held = &heldAnswer{status: resp.StatusCode, header: resp.Header, body: body}
			c.penalise(t)
			report(errEndpoint)
			return ending{verdict: tryNext, failed: true, tag: "stream_error"}
		case s.hold(kind, ev.Raw):
			continue
		default:
			s.open = true
			if kind >= shape.Failure {
				c.failFlight()
			}
			c.relayHead(resp.StatusCode, resp.Header)
			if err = s.send(s.held); err == nil {
				err = s.send(ev.Raw)
			}
			s.held = nil
		}
		if err == nil && !s.events.Whole() {
			err = s.flushNow()
		}
		if err != nil {
			report(errExcluded)
			return ending{cancelled: true, tag: "cancelled"}
		}
		if kind == shape.Failure || kind == shape.Refused {
			// Nothing may follow an error, a [DONE] least of all: end it here.
			if ferr := s.flushNow(); ferr != nil {
				c.h.log.Debug("flush after stream error", "error", ferr)
			}
			if kind == shape.Refused {
				report(nil)
				return ending{tag: "refused"}
			}
			report(errEndpoint)
			return ending{failed: true, tag: "stream_error"}
		}
	}
}

// look classifies an event and takes measurements from it.
func (s *stream) look(ev shape.Event) shape.Kind {
	c := s.c
	var kind shape.Kind
	if c.ttft == 0 {
		kind = c.api.Classify(ev)
	} else {
		kind = c.api.Committed(ev)
	}
	if kind == shape.Comment {
		return kind
	}
	counted := c.api.Family.Usage(ev.Data, &c.usage)
	switch kind {
	case shape.Content:
		if c.ttft == 0 {
			c.ttft = max(c.h.now().Sub(c.start), 1)
		}
		if !counted {
			c.deltas++
		}
	case shape.Done:
		s.finished = true
	}
	return kind
}

func (c *call) newEvents(body io.Reader, buf []byte) *shape.EventReader {
	if c.api.Lines() {
		return shape.NewLineReader(body, buf)
	}
	return shape.NewEventReader(body, buf)
}

// hold keeps an event back if the stream may still be retried after it.
func (s *stream) hold(kind shape.Kind, raw []byte) bool {
	if kind == shape.Comment {
		s.comments++
	}
	if kind > shape.Preamble || s.comments > maxHeldComments || len(s.held)+len(raw) > maxHeldBytes {
		return false
	}
	s.held = append(s.held, raw...)
	return true
}

func (s *stream) send(raw []byte) error {
	n, err := s.c.w.Write(raw)
	s.c.sent += int64(n)
	return err
}

func (s *stream) flushNow() error {
	if err := s.flush.Flush(); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return err
	}
	return nil
}

// end handles the end of the upstream's bytes.
func (s *stream) end(ctx context.Context, t *target, resp *http.Response, report func(error), err error) ending {
	c := s.c
	// Without length or chunks the end of a connection is the end of the body, also
	// when the server died; then only the protocol's own mark tells.
	unframed := resp.ContentLength < 0 && len(resp.TransferEncoding) == 0
	if err == io.EOF && (s.finished || !c.api.HasEnd || !unframed) {
		if !s.open { // an empty stream, or preamble only: pass on what there is
			c.relayHead(resp.StatusCode, resp.Header)
			if serr := s.send(s.held); serr != nil {
				report(errExcluded)
				return ending{cancelled: true, tag: "cancelled"}
			}
		}
		report(nil)
		c.complete = s.finished || !c.api.HasEnd
		return ending{}
	}
	if !s.open || c.gone() {
		return c.lost(ctx, t, report, "stream_lost")
	}
	c.penalise(t)
	report(errEndpoint)
	e := apiError{status: http.StatusBadGateway, code: "upstream_lost", message: "the connection to the model was lost in the middle of the answer"}
	tag := "stream_lost"
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		e.status, e.code, e.message, tag = http.StatusGatewayTimeout, "timeout", "the answer did not end within the policy's time limit", "timeout"
	case outrigger.IsKind(err, outrigger.Exhausted):
		c.h.log.Warn("stream event refused", "endpoint", t.key.address, "error", err)
		e.code, e.message = "event_too_large", err.Error()
	}
	c.failFlight()
	if serr := s.send(c.api.Event(e.words())); serr == nil {
		serr = s.flushNow()
		if serr != nil {
			c.h.log.Debug("flush of stream error", "error", serr)
		}
	}
	return ending{failed: true, tag: tag}
}
