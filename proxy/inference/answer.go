package inference

import (
	"net/http"
	"strconv"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
)

// invalidRequest is a type of OpenAI's error object; clients switch on it.
const invalidRequest = "invalid_request_error"

// overloadDelay is what a shed client is asked to wait.
const overloadDelay = 500 * time.Millisecond

// retryAdvice becomes x-should-retry, which OpenAI's clients obey before their own rules.
type retryAdvice uint8

const (
	retryUnsaid retryAdvice = iota
	retryYes
	retryNo
)

// apiError is an answer of our own; the protocol spoken words it.
type apiError struct {
	status     int
	kind       string // OpenAI's type; "" = server_error
	code       string
	param      string // "" = null
	message    string
	retryAfter time.Duration // 0 = not sent
	retry      retryAdvice
}

func (e *apiError) words() shape.Error {
	return shape.Error{Status: e.status, Type: e.kind, Code: e.code, Param: e.param, Message: e.message}
}

// write sends e as the whole answer. The mesh's own headers are in h already.
func (e *apiError) write(w http.ResponseWriter, f shape.Family) {
	h := w.Header()
	h["Content-Type"] = []string{"application/json"}
	if e.retryAfter > 0 {
		ms := max(e.retryAfter.Milliseconds(), 1)
		h["Retry-After-Ms"] = []string{strconv.FormatInt(ms, 10)}
		h["Retry-After"] = []string{strconv.FormatInt((ms+999)/1000, 10)}
	}
	switch e.retry {
	case retryYes:
		h["X-Should-Retry"] = []string{"true"}
	case retryNo:
		h["X-Should-Retry"] = []string{"false"}
	}
	b := f.Body(e.words())
	h["Content-Length"] = []string{strconv.Itoa(len(b))}
	w.WriteHeader(e.status)
	_, _ = w.Write(b) // the status is out; a client that is gone needs no answer
}

// Canonical keys of the answer headers documented in package outrigger.
const (
	hdrPolicy   = "X-Outrigger-Policy"
	hdrModel    = "X-Outrigger-Model"
	hdrVersion  = "X-Outrigger-Version"
	hdrArm      = "X-Outrigger-Arm"
	hdrRegion   = "X-Outrigger-Region"
	hdrAttempts = "X-Outrigger-Attempts"
	hdrBucket   = "X-Outrigger-Bucket"
	hdrOurs     = "X-Outrigger-"
)

// setHeaders writes what is known about the request into the answer's header.
func (c *call) setHeaders() {
	h := c.w.Header()
	values := make([]string, 0, 7) // behind all of them: one allocation
	c.eachHeader(func(key, value string) {
		values = append(values, value)
		h[key] = values[len(values)-1 : len(values) : len(values)]
	})
}

// trust is how far the policy in use can be trusted, in the word the answer says.
func (c *call) trust() string {
	switch {
	case c.policy == nil:
		return "none"
	case c.status.Live:
		return "live"
	}
	return "last-good"
}

// eachHeader calls set with every field that tells what became of the request.
func (c *call) eachHeader(to func(key, value string)) {
	set := func(key, value string) {
		if value != "" {
			to(key, value)
		}
	}
	set(hdrPolicy, c.trust())
	set(hdrAttempts, strconv.Itoa(c.attempts))
	if c.assign.Model == nil {
		return
	}
	set(hdrModel, c.assign.Model.Name)
	set(hdrArm, c.assign.Arm)
	set(hdrRegion, c.region)
	if c.assign.Version != nil {
		set(hdrVersion, c.assign.Version.Name)
	}
	if c.assign.HasUnit {
		set(hdrBucket, strconv.FormatUint(uint64(c.assign.Bucket), 10))
	}
}
