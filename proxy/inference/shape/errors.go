package shape

import (
	"encoding/json"
	"net/http"
)

// Error is an answer of the sidecar's own, before a protocol words it.
type Error struct {
	Status  int    // of HTTP
	Type    string // OpenAI's error type; "" = server_error
	Code    string // a word for programs, e.g. "overloaded"
	Param   string // the parameter at fault; "" = none
	Message string // for people
}

type openaiError struct {
	Message string  `json:"message"`
	Type    string  `json:"type"`
	Param   *string `json:"param"`
	Code    string  `json:"code"`
}

func (e *Error) openai() openaiError {
	o := openaiError{Message: e.Message, Type: e.Type, Code: e.Code}
	if o.Type == "" {
		o.Type = "server_error"
	}
	if e.Param != "" {
		o.Param = &e.Param
	}
	return o
}

// anthropicTypes are the types of Anthropic's errors by status.
func anthropicType(status int) string {
	switch status {
	case http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusUnsupportedMediaType:
		return "invalid_request_error"
	case http.StatusNotFound:
		return "not_found_error"
	case http.StatusRequestEntityTooLarge:
		return "request_too_large"
	case http.StatusTooManyRequests:
		return "rate_limit_error"
	case http.StatusServiceUnavailable:
		return "overloaded_error"
	case http.StatusGatewayTimeout:
		return "timeout_error"
	}
	return "api_error"
}

// geminiStatus is the google.rpc.Code that goes with an HTTP status.
func geminiStatus(status int) string {
	switch status {
	case http.StatusNotFound:
		return "NOT_FOUND"
	case http.StatusTooManyRequests:
		return "RESOURCE_EXHAUSTED"
	case http.StatusServiceUnavailable, http.StatusBadGateway:
		return "UNAVAILABLE"
	case http.StatusGatewayTimeout:
		return "DEADLINE_EXCEEDED"
	}
	if status < 500 {
		return "INVALID_ARGUMENT"
	}
	return "INTERNAL"
}

// tgiType is TGI's error_type that goes with an HTTP status.
func tgiType(status int) string {
	switch {
	case status == http.StatusTooManyRequests, status == http.StatusServiceUnavailable:
		return "overloaded"
	case status < 500:
		return "validation"
	}
	return "generation"
}

// Body words e as a whole answer of the protocol, application/json.
func (f Family) Body(e Error) []byte {
	var v any
	switch f {
	case OIP, Ollama:
		v = struct {
			Error string `json:"error"`
		}{e.Message}
	case TGI:
		v = struct {
			Error string `json:"error"`
			Type  string `json:"error_type"`
		}{e.Message, tgiType(e.Status)}
	case Anthropic:
		v = anthropicBody(e)
	case Gemini:
		type object struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
			Status  string `json:"status"`
		}
		v = struct {
			Error object `json:"error"`
		}{object{e.Status, e.Message, geminiStatus(e.Status)}}
	default:
		v = struct {
			Error openaiError `json:"error"`
		}{e.openai()}
	}
	b, err := json.Marshal(v)
	if err != nil { // strings, numbers and null only
		return []byte(`{"error":"internal error"}`)
	}
	return b
}

func anthropicBody(e Error) any {
	type object struct {
		Type    string `json:"type"`
		Message string `json:"message"`
	}
	return struct {
		Type  string `json:"type"`
		Error object `json:"error"`
	}{"error", object{anthropicType(e.Status), e.Message}}
}

// Event words e as the last event of a stream of the API: a client raises it as the error
// it would raise for an answer. OpenAI's responses name their error events and read the
// fields at the top; both forms carry "error", by which clients recognise it.
func (a *API) Event(e Error) []byte {
	body, name := a.Family.Body(e), ""
	switch {
	case a.Lines():
		return append(body, '\n')
	case a.Family == Anthropic:
		name = "event: error\n"
	case a.Named:
		name = "event: error\n"
		b, err := json.Marshal(struct {
			Type    string      `json:"type"`
			Code    string      `json:"code"`
			Message string      `json:"message"`
			Param   *string     `json:"param"`
			Error   openaiError `json:"error"`
		}{"error", e.Code, e.Message, nil, e.openai()})
		if err == nil {
			body = b
		}
	}
	return append(append(append([]byte(name), "data: "...), body...), "\n\n"...)
}
