package inference

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/internal/identity"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Errors handed to the breaker; their identity is all it looks at.
var (
	errExcluded = errors.New("outcome says nothing about the endpoint")
	errEndpoint = errors.New("endpoint failed")
	errTry      = errors.New("the attempt took longer than the limit of one attempt")
)

type verdict uint8

const (
	relayed   verdict = iota // the answer is out, whole or ended in order
	tryNext                  // nothing is out; another endpoint may do better
	brokenOff                // part of the answer is out and the rest is lost
)

// ending is what became of an attempt, and in the end of the logical request.
type ending struct {
	verdict   verdict
	failed    bool
	cancelled bool
	tag       string // error.type of the metrics; "" = none
	exhausted bool   // no budget was left for another attempt
}

// attemptAll tries the targets in order until limit attempts were made for the logical
// request. With verdict tryNext nothing was sent.
func (c *call) attemptAll(ctx context.Context, targets []*target, limit int) ending {
	end := ending{verdict: tryNext, failed: true, tag: "no_endpoint"}
	tried := false
	for i, t := range targets {
		if s := c.resumed; s != nil {
			c.resumed, tried = nil, true
			end = c.attempt(ctx, &try{c: c, t: t, report: s.from.report, spare: targets[i+1:], limit: limit, resumed: s})
			if end.verdict != tryNext {
				break
			}
			continue
		}
		if c.attempts >= limit || ctx.Err() != nil {
			break
		}
		report, err := t.breaker.Allow()
		if err != nil {
			if !tried {
				end.tag = "breaker_open"
			}
			continue
		}
		again := c.attempts > 0
		if again && !c.mayRetry() {
			report(errExcluded)
			end.exhausted = true
			break
		}
		c.attempts++
		tried = true
		c.region = t.endpoint.Region
		end = c.attempt(ctx, &try{c: c, t: t, report: report, spare: targets[i+1:], limit: limit})
		if again {
			c.retried()
		}
		if end.verdict != tryNext {
			break
		}
	}
	return end
}

// attempt makes one request to one endpoint, or to a second one as well if the first is
// slow and hedging is allowed, and relays its answer if it is good. It calls report
// exactly once.
func (c *call) attempt(ctx context.Context, y *try) ending {
	probe := y.t.breaker.State() == gobreaker.StateHalfOpen
	c.held = nil
	defer y.leave()
	if d := c.h.o.TryTimeout; d > 0 || c.rpc != nil {
		// Leaving the attempt releases its stream; over HTTP, closing the body does.
		var cancel context.CancelCauseFunc
		ctx, cancel = context.WithCancelCause(ctx)
		defer cancel(nil)
		if d > 0 && c.opened == nil {
			if y.resumed != nil {
				d -= c.h.now().Sub(y.resumed.from.began)
			}
			c.tryTimer = time.AfterFunc(d, func() { cancel(errTry) })
			defer c.tryTimer.Stop()
		}
	}
	resp, err := y.send(ctx)
	t, report := y.t, y.report
	heard := y.resumed != nil && y.resumed.from.heard
	if !heard {
		t.silent.Add(-1)
	}
	if err != nil && c.opened != nil { // the head was parsed before: cannot happen
		report(errEndpoint)
		return ending{verdict: brokenOff, failed: true, tag: "transport"}
	}
	if err != nil {
		tag := "transport"
		if c.fault = faultOf(err, c.assign.Version); c.fault != "" {
			tag = "tls"
		}
		return c.lost(ctx, t, report, tag)
	}
	defer resp.Body.Close()
	c.reached = true
	if !heard {
		now := c.h.now()
		t.observe(now.Sub(y.began), now)
		t.judge(resp.StatusCode < 500)
	}

	if retryableStatus(resp.StatusCode) {
		return c.hold(ctx, t, resp, report)
	}
	if probe && resp.StatusCode < 500 {
		// The probe has answered its question; a long stream must not keep the
		// breaker half open until it ends.
		report(nil)
		report = func(error) {}
	}
	if c.isStream(resp) {
		return c.relayStream(ctx, t, resp, report)
	}
	return c.relayBody(ctx, t, resp, report)
}

// retryableStatus: worth another endpoint. 501 would be the same everywhere.
func retryableStatus(code int) bool {
	return code == http.StatusTooManyRequests || code >= 500 && code != http.StatusNotImplemented
}

// isStream: the answer decides, not the request's Accept, which clients leave at JSON.
func (c *call) isStream(resp *http.Response) bool {
	// An encoded stream cannot be cut into events; it is relayed as bytes.
	if resp.StatusCode >= 300 || resp.Header.Get("Content-Encoding") != "" {
		return false
	}
	media := mediaType(resp)
	return media == "text/event-stream" && !c.api.Lines() || media == "application/x-ndjson" && c.api.Lines()
}

func isJSON(resp *http.Response) bool { return mediaType(resp) == "application/json" }

func mediaType(resp *http.Response) string {
	ct, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return strings.ToLower(strings.TrimSpace(ct))
}

// lost ends an attempt whose connection failed before anything was passed on, telling
// the endpoint's failure from the client's departure and from our own time limit.
func (c *call) lost(ctx context.Context, t *target, report func(error), tag string) ending {
	if c.gone() {
		report(errExcluded)
		return ending{verdict: relayed, cancelled: true, tag: "cancelled"}
	}
	t.judge(false)
	c.penalise(t)
	report(errEndpoint)
	if cause := context.Cause(ctx); errors.Is(cause, context.DeadlineExceeded) || errors.Is(cause, errTry) {
		tag = "timeout"
	}
	return ending{verdict: tryNext, failed: true, tag: tag}
}

// hold reads a failed answer to the end, so it can be passed on if no other endpoint
// answers, and reports it to the breaker.
func (c *call) hold(ctx context.Context, t *target, resp *http.Response, report func(error)) ending {
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBuffered+1))
	if err != nil {
		return c.lost(ctx, t, report, "transport")
	}
	tag := strconv.Itoa(resp.StatusCode)
	if len(body) <= maxBuffered {
		c.held = &heldAnswer{status: resp.StatusCode, header: resp.Header, body: body}
	}
	if resp.StatusCode == http.StatusTooManyRequests {
		// Busy, not broken. Neither a failure of the version nor of the endpoint.
		report(nil)
		return ending{verdict: tryNext, tag: tag}
	}
	c.penalise(t)
	report(errEndpoint)
	return ending{verdict: tryNext, failed: true, tag: tag}
}

func (c *call) penalise(t *target) { t.observe(failurePenalty, c.h.now()) }

// outgoing builds the upstream request.
func (c *call) outgoing(ctx context.Context, t *target) *http.Request {
	h := c.r.Header.Clone()
	upstream.StripHopByHop(h)
	stripOurs(h)
	// The answer must stay readable for usage and events, and the whole body is here.
	delete(h, "Accept-Encoding")
	delete(h, "Expect")
	if c.encoded != nil {
		delete(h, hdrEncoding)
	}
	if _, ok := h["User-Agent"]; !ok {
		h["User-Agent"] = []string{""} // do not invent one
	}
	if c.assign.HasUnit {
		h[hdrBucket] = []string{strconv.FormatUint(uint64(c.assign.Bucket), 10)}
	}
	if c.assign.Arm == policy.ArmShadow {
		h[hdrShadow] = []string{"copy"}
	}
	if _, ok := h[hdrIdempotency]; !ok {
		// An empty entry is not sent. It tells the transport that it may try a fresh
		// connection when a kept one turns out closed before any answer.
		h[hdrIdempotency] = nil
	}
	c.setDeadline(ctx, h)
	h[upstream.HeaderHops] = []string{strconv.Itoa(upstream.Hops(h) + 1)}
	req := &http.Request{
		Method: c.api.Method(), URL: c.target(t), Host: t.endpoint.Address, Header: h, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	if tls := c.assign.Version.TLS; tls != nil {
		req.Host = tls.Authority(t.endpoint.Address) // a provider serves many hosts at one address
	}
	if c.rpc != nil {
		parts := c.rpc.names.Rewrite(c.assign.Version.Upstream)
		req.URL.Path, req.Body, req.ContentLength = c.rpc.method, openParts(parts), parts.Size()
	} else if !c.api.Get {
		parts := c.path.RewriteBody(c.body, &c.env, c.assign.Version.Upstream)
		req.Body, req.ContentLength = openParts(parts), parts.Size()
		req.GetBody = func() (io.ReadCloser, error) { return openParts(parts), nil }
	}
	return req.WithContext(ctx)
}

// transport sends the call's attempts.
func (c *call) transport() http.RoundTripper {
	tls := c.assign.Version.TLS
	switch {
	case c.rpc != nil:
		return rpcTo{c.rpc, tls}
	case tls == nil:
		return c.h.o.Transport
	}
	rt, err := c.h.o.Secure(tls)
	if err != nil {
		return refusing{err}
	}
	return rt
}

// refusing is a transport that cannot be had.
type refusing struct{ why error }

// RoundTrip implements http.RoundTripper.
func (r refusing) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil {
		req.Body.Close()
	}
	return nil, r.why
}

// noSecure is Options.Secure of a handler that was given none.
func noSecure(*policy.TLS) (http.RoundTripper, error) {
	return nil, outrigger.Errorf(outrigger.Unavailable, "endpoints over TLS cannot be reached from here")
}

// faultOf says what of TLS failed, for the caller to be told; "" if it is something else.
func faultOf(err error, v *policy.Version) string {
	switch {
	case v.TLS == nil:
		return ""
	case outrigger.IsKind(err, outrigger.Unavailable):
		return err.Error() // what has not been delivered
	}
	return identity.Fault(err)
}

// target is the URL of the request at an endpoint: its path with the model's name there
// replaced, if that is where the protocol has it.
func (c *call) target(t *target) *url.URL {
	scheme := "http"
	if c.assign.Version.TLS != nil {
		scheme = "https"
	}
	u := &url.URL{Scheme: scheme, Host: t.endpoint.Address, Path: c.r.URL.Path, RawPath: c.r.URL.RawPath, RawQuery: c.r.URL.RawQuery}
	if escaped := c.path.Rewrite(c.assign.Version.Upstream); escaped != "" {
		if path, err := url.PathUnescape(escaped); err == nil { // it was escaped just now
			u.Path, u.RawPath = path, escaped
		}
	}
	return u
}

// relayHead copies the upstream's head into ours and adds the mesh's fields.
func (c *call) relayHead(status int, header http.Header) {
	upstream.StripHopByHop(header)
	stripOurs(header)
	if c.tryTimer != nil {
		c.tryTimer.Stop() // it has begun to answer; how long that takes is not for the attempt's limit
	}
	h := c.w.Header()
	h["Content-Type"] = nil // no guess where the model says none
	for key, v := range header {
		h[key] = v
	}
	c.setHeaders()
	c.begun = true
	c.w.WriteHeader(status)
}

// giveUp answers when no endpoint did.
func (c *call) giveUp(ctx context.Context, end ending) ending {
	if c.gone() {
		return ending{verdict: relayed, cancelled: true, tag: "cancelled"}
	}
	if c.held != nil {
		c.held.header["Content-Length"] = []string{strconv.Itoa(len(c.held.body))}
		if end.exhausted {
			c.held.header["X-Should-Retry"] = []string{"false"}
		}
		c.relayHead(c.held.status, c.held.header)
		_, _ = c.w.Write(c.held.body)
		end.verdict = relayed
		return end
	}
	e := apiError{status: http.StatusServiceUnavailable, retry: retryYes}
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		e.status, e.code, e.retry = http.StatusGatewayTimeout, "timeout", retryNo
		e.message = "the model did not answer within the time limit of the request"
		end.tag = "timeout"
	case end.tag == "breaker_open":
		e.code, e.retryAfter = "no_healthy_endpoint", c.untilHalfOpen()
		e.message = "every endpoint of version " + c.assign.Version.Name + " is failing; its breakers are open"
	case end.tag == "no_endpoint":
		e.code, e.retry = "no_endpoint", retryNo
		e.message = "version " + c.assign.Version.Name + " has no endpoint"
	default:
		e.code, e.retryAfter = "upstream_unreachable", overloadDelay
		e.message = "no endpoint of version " + c.assign.Version.Name + " answered"
		if c.fault != "" {
			e.code, e.message = "upstream_tls", e.message+" over TLS: "+c.fault
		}
		if c.model.budget.empty() {
			// Retries are already at their limit: clients that add theirs make it worse.
			e.retry = retryNo
		}
	}
	c.setHeaders()
	e.write(c.w, c.api.Family)
	end.verdict, end.failed = relayed, true
	return end
}

// untilHalfOpen is when the first breaker of the version lets a probe through.
func (c *call) untilHalfOpen() time.Duration {
	now, soonest := c.h.now().UnixNano(), int64(0)
	for _, t := range c.model.versions[c.assign.Version].targets {
		if till := t.openTill.Load(); till > 0 && (soonest == 0 || till < soonest) {
			soonest = till
		}
	}
	// Half open with the probe still running: it will not be long.
	return max(time.Duration(soonest-now), 100*time.Millisecond)
}
