package inference

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy/inference/answers"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// call is one logical request: read, route, attempt, relay, account, in that order, on
// one goroutine.
type call struct {
	h     *Handler
	w     http.ResponseWriter
	r     *http.Request
	api   *shape.API // nil for paths that are no API
	path  shape.Route
	rpc   *rpc // nil over HTTP
	start time.Time

	policy *policy.Policy
	status PolicyStatus
	dry    *dryRun // of a call that is only explained; nil = it is served

	body    []byte
	encoded []byte // the body as it came, if it was encoded
	large   int64  // what the body has of the room for large ones
	taken   int64  // what the call has of Options.Room
	env     shape.Envelope

	streams  bool            // the request asks for a stream
	timeout  time.Duration   // the caller's own limit; 0 = none
	tryTimer *time.Timer     // of the attempt running; nil = none
	refusal  apiError        // why a version takes no more requests
	flight   *answers.Flight // that this request leads; nil = none
	begun    bool            // the answer's head is out
	complete bool            // the answer is out, and was whole

	asked   int                    // bytes of the request's body
	again   bool                   // the client's own retry of a request that was counted
	hops    int                    // forwarders before this one; of calls on a loop
	resumed *resumption            // the attempt a loop has begun; nil = none
	opened  *stream                // the stream of which a loop has passed on the beginning; nil = none
	bound   *atomic.Pointer[bound] // of the endpoint; nil unless a loop carries the call

	plan   *plan
	model  *modelPlan
	assign Assignment
	region string // of the endpoint last tried, this sidecar's before that

	attempts int
	charged  int         // of them, accounted for with the assigned version before the fallback
	settled  bool        // the outcome is accounted for
	reached  bool        // an endpoint of the assigned version has answered something
	fault    string      // of TLS, why the last attempt failed; "" = it did not by that
	held     *heldAnswer // the last answer that was not passed on
	ttft     time.Duration
	usage    shape.Usage
	deltas   uint64 // content events, the estimate of LLM tokens of a stream
	sent     int64  // bytes of the answer passed on
}

// heldAnswer is a whole failed answer, kept in case nothing better comes.
type heldAnswer struct {
	status int
	header http.Header
	body   []byte
}

// refuse answers without counting an outcome: no version had anything to do with it.
func (c *call) refuse(e apiError) {
	if c.dry != nil {
		c.dry.refused = &e
		return
	}
	c.region = orDefault(c.region, c.h.o.Region)
	c.setHeaders()
	e.write(c.w, c.family())
	c.h.metrics.refused(c, e.code)
	if open := c.h.taps.open.Load(); open != nil {
		c.tell(*open, OutcomeRefused, e.code, "", c.h.now())
	}
}

func (c *call) serveInference() {
	if c.accept() {
		c.serve()
	}
}

// accept checks a request of an API, reads it and routes it; it has answered if it returns
// false.
func (c *call) accept() bool {
	if want := c.api.Method(); c.r.Method != want {
		if c.passes() { // lists of stored answers, questions of browsers (OPTIONS): not inference
			c.passThrough(nil)
			return false
		}
		c.w.Header()["Allow"] = []string{want}
		c.refuse(apiError{status: http.StatusMethodNotAllowed, kind: invalidRequest, code: "method_not_allowed", message: c.r.URL.Path + " takes " + want})
		return false
	}
	if err := upstream.CheckConnection(c.r.Header); err != nil {
		c.refuse(badRequest(err))
		return false
	}
	if upstream.Hops(c.r.Header) >= upstream.MaxHops {
		c.refuse(apiError{status: http.StatusLoopDetected, code: "loop", retry: retryNo,
			message: "the request passed " + strconv.Itoa(upstream.MaxHops) + " sidecars; an endpoint of the policy leads back here"})
		return false
	}
	if c.h.o.Policy == nil && c.passes() {
		c.passThrough(nil)
		return false
	}
	var err error
	if c.timeout, err = timeoutOf(c.r.Header); err != nil {
		c.refuse(badRequest(err))
		return false
	}
	if !c.readBody() {
		return false
	}
	if err = c.scan(); err != nil {
		c.refuse(badRequest(err))
		return false
	}
	return c.route()
}

// family is the protocol in whose words errors are sent.
func (c *call) family() shape.Family {
	switch {
	case c.api != nil:
		return c.api.Family
	case isServerPath(c.r.URL.Path):
		return shape.OIP
	}
	return shape.OpenAI
}

// hdrBinary is how many bytes of a body are JSON when tensors follow it (binary tensor
// data extension of the Open Inference Protocol).
const hdrBinary = "Inference-Header-Content-Length"

// scan reads what routing needs from the body. Errors have kind Invalid.
func (c *call) scan() (err error) {
	if c.api.Get {
		return nil
	}
	text := c.body
	if n := first(c.r.Header, hdrBinary); n != "" && c.api.Family == shape.OIP {
		size, err := strconv.ParseUint(n, 10, 63)
		if err != nil || size > uint64(len(text)) {
			return outrigger.Errorf(outrigger.Invalid, "%s is %q, the body has %d bytes", hdrBinary, n, len(text))
		}
		text = text[:size]
	}
	if c.env, err = shape.Scan(text); err != nil {
		return err
	}
	c.dropForeign()
	c.streams = c.api.Streams(&c.env)
	return nil
}

// dropForeign forgets "metadata" of protocols where it is the application's own.
func (c *call) dropForeign() {
	switch c.api.Family {
	case shape.OIP, shape.Anthropic:
	default:
		c.env.SubUser, c.env.Sequence = "", ""
	}
}

// Request fields that name a model where the protocol does not: ours, and the one that
// body-based routing of gateways uses.
const hdrGatewayModel = "X-Gateway-Model-Name"

// modelName returns the logical model of the request; ok is false if nothing names one.
func (c *call) modelName() (name string, ok bool) {
	if c.path.Model != "" {
		return c.path.Model, true
	}
	if c.env.ModelEnd > 0 {
		return c.env.Model, true
	}
	name = orDefault(first(c.r.Header, hdrModel), first(c.r.Header, hdrGatewayModel))
	name = orDefault(name, c.h.o.DefaultModel)
	return name, name != ""
}

func badRequest(err error) apiError {
	var e *outrigger.Error
	msg := "bad request"
	if errors.As(err, &e) {
		msg = e.Message
	}
	return apiError{status: http.StatusBadRequest, kind: invalidRequest, code: "invalid_body", message: msg, retry: retryNo}
}

// route finds the model, version and arm; it has answered if it returns false.
func (c *call) route() bool {
	if c.policy == nil {
		c.refuse(apiError{status: http.StatusServiceUnavailable, code: "no_policy", retryAfter: time.Second, retry: retryYes,
			message: "the sidecar has no routing policy yet; it is waiting for the control plane"})
		return false
	}
	name, ok := c.modelName()
	if !ok {
		if c.passes() {
			c.passThrough(c.body)
			return false
		}
		c.refuse(apiError{status: http.StatusBadRequest, kind: invalidRequest, code: "missing_required_parameter", param: "model", retry: retryNo,
			message: "you must provide a model parameter"})
		return false
	}
	m := c.policy.Model(name)
	if m == nil {
		if c.passes() {
			c.passThrough(c.body)
			return false
		}
		c.refuse(modelNotFound(name))
		return false
	}
	c.plan = c.h.planFor(c.policy)
	c.model = c.plan.models[m]
	var err error
	f := headerFields(c.r.Header)
	if c.assign, err = assignTo(c.h, c.model, m, unitOf(m.Unit, f, &c.env), f, c.status, c.start); err != nil {
		if outrigger.IsKind(err, outrigger.Unauthorised) {
			c.refuse(apiError{status: http.StatusUnauthorized, kind: invalidRequest, code: "invalid_grant", message: err.Error(), retry: retryNo})
			return false
		}
		c.refuse(apiError{status: http.StatusServiceUnavailable, code: "no_version", message: err.Error(), retry: retryNo})
		return false
	}
	return true
}

// modelNotFound names the model only if it is short and plain, since it is echoed.
func modelNotFound(name string) apiError {
	if outrigger.CheckName("model", strings.ReplaceAll(name, "/", "-")) != nil {
		name = "(unprintable)"
	}
	return apiError{status: http.StatusNotFound, kind: invalidRequest, code: "model_not_found", param: "model", retry: retryNo,
		message: "the model `" + name + "` does not exist in the routing policy"}
}

// passes reports whether the request may be handed on.
func (c *call) passes() bool {
	return c.rpc == nil && c.h.o.Passthrough != nil && (c.h.o.Passes == nil || c.h.o.Passes(c.r))
}

// passThrough hands the request on as it came; body is what was read of it, nil if
// nothing was.
func (c *call) passThrough(body []byte) {
	if c.dry != nil {
		c.dry.passed = true
		return
	}
	r := c.r.WithContext(c.r.Context())
	r.Header = c.r.Header.Clone()
	stripOurs(r.Header)
	if c.encoded != nil {
		body = c.encoded
	}
	if body != nil {
		r.Body = io.NopCloser(bytes.NewReader(body))
	}
	c.setHeaders()
	c.h.o.Passthrough.ServeHTTP(c.w, r)
}

// stripOurs removes the mesh's own fields, which a client or a model could only forge;
// the hop counter stays, as its loss would hide a loop.
func stripOurs(h http.Header) {
	for key := range h {
		if strings.HasPrefix(key, hdrOurs) && key != upstream.HeaderHops {
			delete(h, key)
		}
	}
}

// forward runs the attempts and accounts for the logical request.
func (c *call) forward() {
	timeout := c.limit()
	if c.resumed != nil {
		timeout -= c.h.now().Sub(c.start)
	}
	base, release := c.base()
	defer release()
	ctx, cancel := context.WithTimeout(base, timeout)
	defer cancel()
	if c.resumed == nil && !c.model.inflight.enter(c.h.bulkhead(c.policy)) {
		c.refuse(apiError{status: http.StatusServiceUnavailable, code: "overloaded", retryAfter: overloadDelay, retry: retryYes,
			message: "model " + c.assign.Model.Name + " has reached its share of the sidecar's requests in flight; try again"})
		return
	}
	defer c.model.inflight.leave()
	c.region = c.h.o.Region
	limit := max(c.assign.Model.MaxAttempts, 1)
	if c.resumed == nil {
		c.copyToShadows()
	}
	end, entered := c.serveBy(ctx, limit)
	if !entered {
		c.refuse(c.refusal)
		return
	}
	if end.verdict == tryNext {
		end = c.fallBack(ctx, end, limit)
	}
	if end.verdict == tryNext {
		end = c.giveUp(ctx, end)
	}
	if !c.settled {
		c.account(end)
	}
	if end.cancelled && !c.begun && c.rpc == nil {
		// Not nothing: who has only stopped sending reads on, and would read 200.
		e := apiError{status: statusCancelled, code: "cancelled", message: "the request was given up before there was an answer"}
		e.write(c.w, c.api.Family)
	}
	if end.verdict == brokenOff {
		// The head is out and says more bytes follow: the only honest end is none.
		panic(http.ErrAbortHandler)
	}
}

// limit is how long the whole call may take.
func (c *call) limit() time.Duration {
	timeout := orDefault(c.assign.Model.Timeout, DefaultTimeout)
	if c.timeout > 0 {
		timeout = min(timeout, c.timeout)
	}
	return timeout
}

// serveBy tries the endpoints of the assigned version until limit attempts were made in
// all; entered is false, and nothing was tried, when the version has too many requests
// in flight.
func (c *call) serveBy(ctx context.Context, limit uint32) (end ending, entered bool) {
	vp := c.model.versions[c.assign.Version]
	began := c.start
	if c.resumed != nil {
		defer vp.gate.leave()
		defer vp.gate.conns.leave()
		if c.h.o.Adaptive {
			defer func() { c.learn(vp.gate, began, end) }()
		}
		return c.attemptAll(ctx, c.resumed.from.targets, int(limit)), true
	}
	c.refusal = apiError{status: http.StatusServiceUnavailable, code: "overloaded", retryAfter: overloadDelay, retry: retryYes,
		message: "version " + c.assign.Version.Name + " has reached its limit of requests in flight; try again"}
	if c.h.o.Adaptive && vp.gate.full() {
		c.refusal.status = http.StatusTooManyRequests
		c.refusal.message = "version " + c.assign.Version.Name + " is given no more requests than it was seen to take; try again"
		return ending{}, false
	}
	if !vp.gate.enter(orDefault(c.assign.Version.MaxRequests, policy.DefaultMaxRequests)) {
		return ending{}, false
	}
	defer vp.gate.leave()
	if c.rpc == nil { // calls of gRPC share a connection
		if end, ok := c.connect(ctx, vp.gate); !ok {
			return end, end.cancelled
		}
		defer vp.gate.conns.leave()
	}
	if c.h.o.Adaptive {
		began = c.h.now()
		defer func() { c.learn(vp.gate, began, end) }()
	}
	if !c.settled {
		c.model.budget.deposit() // once per logical request
	}
	return c.attemptAll(ctx, c.h.order(c.policy, vp, c.env.Sequence), int(limit)), true
}

// learn adapts a version's limit to how long it took to begin its answer.
func (c *call) learn(g *gate, began time.Time, end ending) {
	dropped := end.tag == "429" || end.tag == "503" || end.tag == "timeout"
	if end.cancelled || end.failed && !dropped {
		return // says nothing about load
	}
	d := c.h.now().Sub(began)
	if c.ttft > 0 {
		d = c.start.Add(c.ttft).Sub(began)
	}
	g.learn(d, dropped)
}

// bulkhead is how many requests one model may have in flight.
func (h *Handler) bulkhead(p *policy.Policy) uint32 {
	if len(p.Models) < 2 {
		return uint32(h.o.MaxInFlight)
	}
	return uint32(max(h.o.MaxInFlight*3/4, 1))
}

// fallBack serves by the last good version when no endpoint of the assigned one could be
// reached: nothing was sent, and the user need not suffer from a version that is down.
// The assigned version is charged with the failure at once; what becomes of the request
// now is the last good version's, outside of every arm that is compared.
func (c *call) fallBack(ctx context.Context, end ending, limit uint32) ending {
	good := usable(c.assign.Model, c.assign.Model.LastGood)
	if good == nil || good == c.assign.Version || c.reached || ctx.Err() != nil {
		return end
	}
	c.account(end)
	c.settled, c.charged = true, c.attempts
	assigned, region := c.assign, c.region
	c.assign.Version, c.assign.Arm, c.region = good, ArmLastGood, c.h.o.Region
	next, _ := c.serveBy(ctx, max(limit, uint32(c.charged)+1))
	if c.attempts == c.charged {
		// No attempt was possible: the answer is about the assigned version.
		c.assign, c.region = assigned, region
		return end
	}
	c.settled = false
	return next
}

// account reports the logical request, whatever became of it: once for the version that
// answered, and before that once for one that was down.
func (c *call) account(end ending) { c.accountAt(end, c.h.now()) }

// accountAt is account of a call that ended at now.
func (c *call) accountAt(end ending, now time.Time) {
	if c.api.Meta {
		return // asking about a model is no evidence of how well it serves
	}
	if !c.usage.Reported && !end.failed && !end.cancelled && !c.api.Tensors {
		c.usage.In = uint64(c.asked) / shape.BytesPerToken
		c.usage.Out = c.deltas
		if c.deltas == 0 && !c.api.Idempotent {
			c.usage.Out = uint64(c.sent) / shape.BytesPerToken
		}
	}
	a := &c.assign
	c.h.recorder.Record(Outcome{
		Model: a.Model.Name, Version: a.Version.Name, Arm: a.Arm, Region: c.region, WeightEpoch: a.Model.WeightEpoch,
		HasUnit: a.HasUnit, Unit: a.Unit, Sample: !c.again && a.Arm != policy.ArmForced,
		Failed: end.failed, Cancelled: end.cancelled, Attempts: c.attempts - c.charged,
		Latency: now.Sub(c.start), TTFT: c.ttft, TokensIn: c.usage.In, TokensOut: c.usage.Out, At: now,
	})
	c.h.metrics.finished(c, end, now.Sub(c.start))
	if open := c.h.taps.open.Load(); open != nil {
		c.tellEnd(*open, end, now)
	}
}

// statusCancelled is what a client is told that has half-closed (nginx's code for the log
// of such requests).
const statusCancelled = 499

// isClientRetry: OpenAI's clients number their own retries of one logical request.
func isClientRetry(h http.Header) bool {
	v := first(h, "X-Stainless-Retry-Count")
	return v != "" && v != "0"
}
