package inference

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/inference/answers"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

const (
	// hdrCache asks for an answer from memory where the protocol's rules alone would not
	// allow one ("on"), and says in the answer where it came from: hit, joined (read along
	// with the same question of somebody else) or miss. Absent: the question has no place
	// in the cache.
	hdrCache = "X-Outrigger-Cache"
	// hdrTier says which tier an answer that was not asked for anew came from.
	hdrTier     = "X-Outrigger-Tier"
	tierProcess = "process"
	tierNode    = "node"
	tierOrigin  = "origin"
	// hdrPins are versions of variables the request was made with, opaque here: answers
	// are shared only between requests with the same pins.
	hdrPins = "X-Outrigger-Pins"
)

// keyHeaders are request fields an answer may depend on: who asks, and how.
var keyHeaders = [...]string{"Authorization", "Cookie", "Api-Key", "X-Api-Key", "X-Goog-Api-Key", "X-Outrigger-Tenant", "X-Tenant-Id",
	"Openai-Organization", "Openai-Project", "Openai-Beta", "Anthropic-Version", "Anthropic-Beta", "Accept", "Accept-Language"}

// serve answers a routed request, from memory if it may.
func (c *call) serve() {
	keys, control, ok := c.question()
	if !ok {
		c.forward()
		return
	}
	cache, now := c.h.o.Answers, c.h.now()
	if a := cache.Get(keys.Process, now, control.MaxAge); a != nil {
		c.replay(a, now, tierProcess)
		return
	}
	if control.OnlyCached {
		if a := c.fromNode(keys, control, now); a != nil {
			c.replay(a, now, tierNode)
			return
		}
		c.refuse(apiError{status: http.StatusGatewayTimeout, code: "not_cached", retry: retryNo, message: "the answer is not in memory, and the request wants no other (only-if-cached)"})
		return
	}
	f, leader := cache.Join(keys.Process)
	switch {
	case f == nil:
		c.forward()
	case leader:
		c.flight = f
		defer f.Fail() // unless it has ended well; what follows may panic
		a, seat := c.join(keys, control, now)
		if a != nil {
			f.Fill(a)
			c.replay(a, now, tierNode)
			return
		}
		c.lead(f, keys, seat)
	case !c.follow(f):
		c.forward()
	}
}

// fromNode asks what the node's other pods know.
func (c *call) fromNode(keys answers.Keys, control answers.Control, now time.Time) *answers.Answer {
	return c.h.o.NodeAnswers.Get(c.r.Context(), keys.Node, stretchOf(c.assign.Model, c.assign.Version), now, control.MaxAge)
}

func stretchOf(m *policy.Model, v *policy.Version) answers.Stretch {
	return answers.StretchOf(m.Name, v.Name, v.Upstream, m.WeightEpoch)
}

// question returns the cache's keys for the request; ok is false if it has none.
func (c *call) question() (keys answers.Keys, control answers.Control, ok bool) {
	if c.h.o.Answers == nil || c.api.Meta {
		return keys, control, false
	}
	if control = answers.ReadControl(c.r.Header); control.NoStore || control.NoCache {
		return keys, control, false
	}
	var tenant strings.Builder
	for _, name := range keyHeaders {
		for _, v := range c.r.Header[name] {
			tenant.WriteString(strconv.Quote(v))
		}
		tenant.WriteByte('\n')
	}
	a := &c.assign
	pinned, ok := c.pinned()
	if !ok {
		return keys, control, false
	}
	keys, deterministic, ok := answers.Question(answers.Asked{API: c.api, Path: c.r.URL.EscapedPath() + "?" + c.r.URL.RawQuery, Body: c.body,
		Model: a.Model.Name, Version: a.Version.Name, Generation: c.model.versions[a.Version].generation, Stretch: stretchOf(a.Model, a.Version), Arm: a.Arm,
		Tenant: tenant.String(), Pins: first(c.r.Header, hdrPins), Pinned: pinned})
	return keys, control, ok && (deterministic || c.h.o.AnswerAll || strings.EqualFold(first(c.r.Header, hdrCache), "on"))
}

// pinned is what the variables are that the version's answers depend on; false if that is
// not known of one of them.
func (c *call) pinned() (string, bool) {
	var b strings.Builder
	for _, pin := range c.assign.Version.Pins {
		session, name, _ := strings.Cut(pin, "/")
		if c.h.o.Pinned == nil {
			return "", false
		}
		version, current := c.h.o.Pinned(c.r.Context(), session, name)
		if !current {
			return "", false
		}
		b.WriteString(strconv.Quote(pin) + strconv.Quote(version))
	}
	return b.String(), true
}

// begin writes the head of an answer that came from elsewhere than an attempt of ours.
func (c *call) begin(header http.Header, how, tier string) {
	h := c.w.Header()
	for k, v := range header {
		h[k] = v
	}
	c.region = c.h.o.Region
	c.setHeaders()
	h[hdrCache] = []string{how}
	h[hdrTier] = []string{tier}
	c.h.metrics.cached(c, how, tier)
	if open := c.h.taps.open.Load(); open != nil {
		c.tell(*open, OutcomeOK, "", how, c.h.now())
	}
}

// replay sends an answer from memory. It is no evidence about the version and counts in
// none of its statistics.
func (c *call) replay(a *answers.Answer, now time.Time, tier string) {
	c.begin(a.Header, "hit", tier)
	h := c.w.Header()
	h["Age"] = []string{strconv.FormatInt(int64(now.Sub(a.Stored)/time.Second), 10)}
	h["Content-Length"] = []string{strconv.Itoa(len(a.Body))}
	c.w.WriteHeader(http.StatusOK)
	_, _ = c.w.Write(a.Body) // the status is out; a client that is gone needs no answer
}

// lead gets the answer, from the model or from another pod that asks it, and lets others
// read along: here, and in other pods if seat says so.
func (c *call) lead(f *answers.Flight, keys answers.Keys, seat *answers.Seat) {
	t := &tee{ResponseWriter: c.w, f: f, c: c, version: c.assign.Version.Name, arm: c.assign.Arm}
	c.w = t
	if seat.Follows() {
		if c.readAlong(f, seat) {
			return
		}
		seat = nil // the other pod is gone: this one asks for its own readers
	}
	defer seat.Close()
	seat.Publish(f)
	c.w.Header()[hdrCache] = []string{"miss"}
	c.h.metrics.cached(c, "miss", tierOrigin)
	c.forward()
	if t.open && c.complete {
		now := c.h.now()
		// The flight has begun, so the answer is of the version and arm the keys are for.
		a := f.Finish(now, answers.Keep(t.header, math.MaxInt64))
		c.h.offer(c, seat, keys.Node, a, now)
	}
}

// tee writes to the client and to the readers of a flight. When the client leaves, the
// readers still get their answer.
type tee struct {
	http.ResponseWriter
	f            *answers.Flight
	c            *call
	version, arm string // that the question was put to
	header       http.Header
	open         bool // the flight has begun
	gone         bool // the client takes no more
}

// perRequest are fields of an answer that are about one exchange only.
var perRequest = [...]string{"Date", "X-Request-Id", "Request-Id", "Openai-Processing-Ms", "Server-Timing", "Content-Length", "Retry-After", "Retry-After-Ms"}

// WriteHeader implements http.ResponseWriter. Only the answer of the version and arm that
// was asked is the others' too: not an error, nor what the last good version said instead.
func (t *tee) WriteHeader(status int) {
	if status == http.StatusOK && t.c.assign.Version.Name == t.version && t.c.assign.Arm == t.arm {
		t.header = t.Header().Clone()
		for k := range t.header {
			if strings.HasPrefix(k, hdrOurs) || strings.HasPrefix(k, "X-Ratelimit-") {
				delete(t.header, k)
			}
		}
		for _, k := range perRequest {
			delete(t.header, k)
		}
		t.open = true
		t.f.Begin(t.header, t.c.streams)
	} else {
		t.f.Fail()
	}
	t.ResponseWriter.WriteHeader(status)
}

// Write implements io.Writer.
func (t *tee) Write(b []byte) (int, error) {
	if t.open {
		t.f.Write(b)
	}
	if t.gone {
		return len(b), nil
	}
	n, err := t.ResponseWriter.Write(b)
	if err != nil && t.open && t.f.Followed() {
		t.gone = true
		return len(b), nil
	}
	return n, err
}

// FlushError is what http.ResponseController looks for.
func (t *tee) FlushError() error {
	if t.gone {
		return nil
	}
	err := http.NewResponseController(t.ResponseWriter).Flush()
	if err != nil && !errors.Is(err, http.ErrNotSupported) && t.open && t.f.Followed() {
		t.gone = true
		return nil
	}
	return err
}

// base is the context attempts descend from: the client's, unless others wait for the
// same answer, who must not lose it with the client.
func (c *call) base() (context.Context, context.CancelFunc) {
	f := c.flight
	if f == nil {
		return c.r.Context(), func() {}
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(c.r.Context()))
	look := func() {
		if c.gone() {
			cancel()
		}
	}
	f.OnIdle(look)
	stop := context.AfterFunc(c.r.Context(), look)
	return ctx, func() { stop(); cancel() }
}

// gone: nobody waits for the answer any more.
func (c *call) gone() bool {
	return c.r.Context().Err() != nil && (c.flight == nil || !c.flight.Followed())
}

// failFlight tells readers that the answer is lost, before the client is told in-band.
func (c *call) failFlight() {
	if c.flight != nil {
		c.flight.Fail()
	}
}

// patience is how long the request may wait for an answer that somebody else asked for.
func (c *call) patience() time.Duration {
	timeout := orDefault(c.assign.Model.Timeout, DefaultTimeout)
	if c.timeout > 0 {
		timeout = min(timeout, c.timeout)
	}
	return timeout
}

// tooLate answers a request whose patience was at its end before the answer began.
func (c *call) tooLate() {
	c.refuse(apiError{status: http.StatusGatewayTimeout, code: "timeout", retry: retryNo, message: "the model did not answer within the time limit of the request"})
}

// follow reads along with a flight. It returns false, and nothing was sent, if the flight
// failed before its answer began or, where it is no stream, before it was whole.
func (c *call) follow(f *answers.Flight) bool {
	defer f.Leave()
	ctx, cancel := context.WithTimeout(c.r.Context(), c.patience())
	defer cancel()
	if !c.streams {
		return c.await(ctx, f)
	}
	flush := http.NewResponseController(c.w)
	begun, seen := false, 0
	for {
		p, err := f.Read(ctx, begun, seen)
		switch {
		case err != nil && c.r.Context().Err() != nil:
			return true // the client has left
		case !begun && p.Lost:
			return false
		case !begun && err != nil:
			c.tooLate()
			return true
		case !begun:
			begun = true
			c.begin(p.Head, "joined", tierProcess)
			c.w.WriteHeader(http.StatusOK)
		}
		if seen += len(p.New); len(p.New) > 0 {
			if _, werr := c.w.Write(p.New); werr != nil {
				return true
			}
		}
		if p.Whole {
			return true
		}
		if p.Lost || err != nil {
			c.cutShort()
			return true
		}
		if ferr := flush.Flush(); ferr != nil && !errors.Is(ferr, http.ErrNotSupported) {
			return true
		}
	}
}

// await is follow where half an answer is worth nothing.
func (c *call) await(ctx context.Context, f *answers.Flight) bool {
	p, err := f.Await(ctx)
	switch {
	case err != nil && c.r.Context().Err() != nil:
	case err != nil:
		c.tooLate()
	case p.Lost:
		return false
	default:
		c.passWhole(p.Head, p.New, tierProcess)
	}
	return true
}

// passWhole sends an answer that was read along and is no stream.
func (c *call) passWhole(header http.Header, body []byte, tier string) {
	c.begin(header, "joined", tier)
	c.w.Header()["Content-Length"] = []string{strconv.Itoa(len(body))}
	c.w.WriteHeader(http.StatusOK)
	_, _ = c.w.Write(body) // the status is out; a client that is gone needs no answer
}

// cutShort ends a stream that was read along and is lost, as its leader's ends.
func (c *call) cutShort() {
	e := apiError{status: http.StatusBadGateway, code: "upstream_lost", message: "the connection to the model was lost in the middle of the answer"}
	_, _ = c.w.Write(c.api.Event(e.words()))
}

// wholeJSON: an answer read until its connection closed may have been cut.
func wholeJSON(resp *http.Response, body []byte) bool {
	return !isJSON(resp) || json.Valid(body)
}
