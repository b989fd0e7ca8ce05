package inference

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"
)

// Types of OpenAI's error object; clients switch on them.
const (
	invalidRequest = "invalid_request_error"
	serverError    = "server_error"
)

// overloadDelay is what a shed client is asked to wait.
const overloadDelay = 500 * time.Millisecond

// retryAdvice becomes x-should-retry, which OpenAI's clients obey before their own rules.
type retryAdvice uint8

const (
	retryUnsaid retryAdvice = iota
	retryYes
	retryNo
)

// apiError is an answer of our own in OpenAI's form.
type apiError struct {
	status     int
	kind       string // "" = server_error
	code       string
	param      string // "" = null
	message    string
	retryAfter time.Duration // 0 = not sent
	retry      retryAdvice
}

type errorObject struct {
	Message string  `json:"message"`
	Type    string  `json:"type"`
	Param   *string `json:"param"`
	Code    string  `json:"code"`
}

func (e *apiError) object() errorObject {
	o := errorObject{Message: e.message, Type: orDefault(e.kind, serverError), Code: e.code}
	if e.param != "" {
		o.Param = &e.param
	}
	return o
}

func (e *apiError) body() []byte {
	b, err := json.Marshal(struct {
		Error errorObject `json:"error"`
	}{e.object()})
	if err != nil { // strings and null only
		return []byte(`{"error":{"message":"internal error","type":"server_error","param":null,"code":"internal"}}`)
	}
	return b
}

// event returns the error as a server-sent event. The responses API names its error
// events and reads the fields at the top; both forms carry "error", by which clients
// recognise it.
func (e *apiError) event(op operation) []byte {
	if !op.typed {
		return append(append([]byte("data: "), e.body()...), "\n\n"...)
	}
	b, err := json.Marshal(struct {
		Type    string      `json:"type"`
		Code    string      `json:"code"`
		Message string      `json:"message"`
		Param   *string     `json:"param"`
		Error   errorObject `json:"error"`
	}{"error", e.code, e.message, nil, e.object()})
	if err != nil {
		b = e.body()
	}
	return append(append([]byte("event: error\ndata: "), b...), "\n\n"...)
}

// write sends e as the whole answer. The mesh's own headers are in h already.
func (e *apiError) write(w http.ResponseWriter) {
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
	b := e.body()
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
	set := func(key, value string) {
		if value != "" {
			h[key] = []string{value}
		}
	}
	switch {
	case c.policy == nil:
		set(hdrPolicy, "none")
	case c.status.Live:
		set(hdrPolicy, "live")
	default:
		set(hdrPolicy, "last-good")
	}
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
