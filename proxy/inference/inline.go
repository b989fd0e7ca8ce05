package inference

import (
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/proxy/loop"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Relay returns what lets event loops carry the simple calls of h themselves: a JSON
// request of at most 64 KiB to a model of the policy, answered at the first attempt with
// content of known length or in chunks, of 256 KiB at most, or with a stream of server-sent
// events in chunks whose client keeps up. Everything that makes a call more than that is
// decided by the same code as ever: what Route declines is served by h as a handler, and a
// call under way whose answer is an error worth another attempt, unframed, malformed, too
// long, lost or too late, or a stream that reports a failure, breaks off or has a slow
// reader, goes on there with the attempt it has begun (Resume). Left to the handler
// from the start are: streams of lines, calls with a caller's time limit, hedged calls, calls of endpoints over TLS, every call
// where answers are cached, calls of an endpoint whose breaker is not closed or whose last
// answer did not fit, and all refusals. d holds the connections and their limits, and is
// to be h's Transport too.
func (h *Handler) Relay(d *upstream.Direct) loop.Relay { return &relay{h: h, d: d} }

// relay implements loop.Relay.
type relay struct {
	h    *Handler
	d    *upstream.Direct
	pool sync.Pool // *inlineCall that have ended on a loop
}

// inlineCall is a call with its first attempt, as loop.Call has it. All counters that a
// handler enters by defer are entered in Start and left by release, or by the handler's
// own code once Resume runs.
type inlineCall struct {
	call
	relay   *relay
	t       *target
	targets []*target
	report  func(error)
	began   time.Time // of the attempt
	flow    stream    // if the answer is one that Pass passes on
	heard   bool      // its head is there, and accounted for
}

// resumption is what the handler takes over.
type resumption struct {
	from *inlineCall
	loop.Progress
}

// misfitPause is how long calls of an endpoint go to the handler at once after an answer
// that a loop could not finish: giving a call back costs more than a goroutine.
const misfitPause = time.Second

// Wants implements loop.Relay.
func (y *relay) Wants(q *http1.Request) bool {
	if y.h.o.Policy == nil || y.h.o.Answers != nil {
		return false
	}
	path := q.Path()
	if !plainPath(path) {
		return false
	}
	route, ok := shape.Match(textOf(path))
	return ok && !route.API.Get && !route.API.Meta
}

// plainPath: escapes and dots are left to net/url.
func plainPath(p []byte) bool {
	for _, c := range p {
		switch {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', 'A' <= c && c <= 'Z', c == '/', c == '-', c == '_', c == '.', c == ':':
		default:
			return false
		}
	}
	return true
}

// Take implements loop.Relay.
func (y *relay) Take(address string) *net.TCPConn { return y.d.Take(address) }

// Route implements loop.Relay: routing as in serveInference, without an answer for what
// is refused, which the handler gives.
func (y *relay) Route(q *http1.Request, body []byte) loop.Call {
	h := y.h
	route, _ := shape.Match(textOf(q.Path()))
	if route.Model != "" { // it keeps parts of the path
		route, _ = shape.Match(string(q.Path()))
	}
	env, err := shape.Scan(body)
	if err != nil {
		return nil
	}
	c, _ := y.pool.Get().(*inlineCall)
	if c == nil {
		c = &inlineCall{}
	}
	*c = inlineCall{relay: y}
	c.h, c.start, c.path, c.api, c.env, c.asked = h, h.now(), route, route.API, env, len(body)
	c.dropForeign()
	c.streams = c.api.Streams(&c.env)
	f := requestFields{q: q}
	if c.streams && c.api.Lines() || !c.fields(q) {
		return nil
	}
	if c.policy, c.status = h.o.Policy(); c.policy == nil {
		return nil
	}
	name := c.path.Model
	if name == "" {
		if name = c.env.Model; c.env.ModelEnd == 0 {
			return nil
		}
	}
	m := c.policy.Model(name)
	if m == nil {
		return nil
	}
	c.plan = h.planFor(c.policy)
	c.model = c.plan.models[m]
	if c.assign, err = assignTo(h, c.model, m, unitOf(m.Unit, f, &c.env), f, c.status, c.start); err != nil || c.assign.Version.TLS != nil || c.hedgeable() || c.shadowed() {
		return nil
	}
	c.targets = h.order(c.policy, c.model.versions[c.assign.Version], c.env.Sequence)
	if len(c.targets) == 0 {
		return nil
	}
	c.t = c.targets[0]
	if gobreaker.State(c.t.state.Load()) != gobreaker.StateClosed || c.t.misfit.Load() > c.start.UnixNano() {
		return nil
	}
	return c
}

// Address implements loop.Call.
func (c *inlineCall) Address() string { return c.t.dial }

// Start implements loop.Call: every limit is entered, or none.
func (c *inlineCall) Start(q *http1.Request, body, dst []byte) (out []byte, limit time.Duration, ok bool) {
	h, g := c.h, c.model.versions[c.assign.Version].gate
	left := 0
	defer func() {
		if !ok {
			c.leave(left)
		}
	}()
	if left++; h.inflight.Add(1) > int64(h.o.MaxInFlight) {
		return nil, 0, false
	}
	if !c.model.inflight.enter(h.bulkhead(c.policy)) {
		return nil, 0, false
	}
	if left++; h.o.Adaptive && g.full() || !g.enter(orDefault(c.assign.Version.MaxRequests, policy.DefaultMaxRequests)) {
		return nil, 0, false
	}
	if left++; !g.conns.try(limitOf(c.assign.Version).connections) {
		return nil, 0, false
	}
	if left++; !c.relay.d.Reserve(c.t.dial) {
		return nil, 0, false
	}
	left++
	report, err := c.t.breaker.Allow()
	if err != nil {
		return nil, 0, false
	}
	c.bound = &c.t.bound
	c.report, c.began, c.attempts, c.region = report, c.start, 1, c.t.endpoint.Region
	c.t.inflight.Add(1)
	c.t.silent.Add(1)
	c.model.budget.deposit()
	limit = c.limit()
	if try := h.o.TryTimeout; try > 0 {
		limit = min(limit, try)
	}
	return c.appendRequest(dst, q, body), limit, true
}

// leave gives back the first n of what Start takes.
func (c *inlineCall) leave(n int) {
	if n > 4 {
		c.relay.d.Release(c.t.dial)
	}
	if n > 3 {
		c.gate().conns.leave()
	}
	if n > 2 {
		c.model.versions[c.assign.Version].gate.leave()
	}
	if n > 1 {
		c.model.inflight.leave()
	}
	if n > 0 {
		c.h.inflight.Add(-1)
	}
}

// end is the end of a call on the loop.
func (c *inlineCall) end(e ending, verdict error, now time.Time) {
	if !c.heard {
		c.t.silent.Add(-1)
	}
	c.report(verdict)
	if c.h.o.Adaptive {
		c.learn(c.model.versions[c.assign.Version].gate, c.start, e)
	}
	c.accountAt(e, now)
	c.t.inflight.Add(-1)
	c.leave(5)
	*c = inlineCall{relay: c.relay}
	c.relay.pool.Put(c)
}

// Gone implements loop.Call.
func (c *inlineCall) Gone() { c.end(ending{cancelled: true, tag: "cancelled"}, errExcluded, c.h.now()) }

// Fits implements loop.Call: answers that are passed on as they are, see attempt and
// relayBody.
func (c *inlineCall) Fits(a *http1.Answer) bool {
	if s := a.Status(); s >= 500 || s == http.StatusTooManyRequests || s == http.StatusNoContent || s == http.StatusNotModified {
		return false
	}
	typed := false
	for i := range a.Len() {
		name, value := a.Field(i)
		switch fieldOf(name) {
		case fieldType:
			if typed || isStreamType(value) || c.streams && (c.api.Family == shape.Gemini || !isMedia(value, "application/json")) {
				return false
			}
			typed = true
		case fieldConnection:
			if !plainConnection(value) {
				return false
			}
		}
	}
	return typed // an answer that does not say what it is is the handler's
}

// Finish implements loop.Call.
func (c *inlineCall) Finish(a *http1.Answer, content, dst, date []byte, closing bool) []byte {
	now := c.h.now()
	c.t.observe(now.Sub(c.began), now)
	c.t.judge(true)
	c.api.Family.Usage(content, &c.usage)
	c.sent = int64(len(content))
	e := ending{}
	if a.Status() >= 400 {
		e.tag = strconv.Itoa(a.Status())
	}
	dst = c.appendAnswer(dst, a, len(content), date, closing)
	dst = append(dst, content...)
	c.end(e, nil, now)
	return dst
}

// Resume implements loop.Call.
func (c *inlineCall) Resume(w http.ResponseWriter, r *http.Request, p loop.Progress) {
	defer c.h.inflight.Add(-1)
	defer c.release()
	c.w, c.r, c.bound, c.resumed = w, r, nil, &resumption{from: c, Progress: p}
	if p.Passed {
		c.begun, c.opened = true, &c.flow
	} else { // from the first byte on
		c.ttft, c.usage, c.deltas, c.sent, c.flow = 0, shape.Usage{}, 0, 0, stream{}
	}
	if !c.readBody() { // the loop has read it: cannot happen
		if p.Conn != nil {
			p.Conn.Close()
		}
		c.report(errExcluded)
		if !c.heard {
			c.t.silent.Add(-1)
		}
		c.t.inflight.Add(-1)
		c.h.inflight.Add(1)
		c.leave(5)
		return
	}
	c.forward()
}

// takeOver returns the answer of the request a loop has sent, or sends it again if the
// connection brought nothing.
func (y *try) takeOver(req *http.Request, s *resumption) (*http.Response, error) {
	d, t := s.from.relay.d, y.t
	if s.Conn == nil {
		d.Release(t.dial)
		return y.c.transport().RoundTrip(req)
	}
	if s.Passed {
		return d.ResumeStream(req, t.dial, s.Conn, s.Read, s.Sent, &s.Chunks, s.Content)
	}
	resp, err := d.Resume(req, t.dial, s.Conn, s.Read, s.Sent)
	if err == nil && !s.from.heard && !retryableStatus(resp.StatusCode) {
		t.misfit.Store(y.c.h.now().Add(misfitPause).UnixNano())
	}
	return resp, err
}
