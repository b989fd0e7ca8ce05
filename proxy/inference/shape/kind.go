package shape

import (
	"bytes"
	"encoding/json"
)

// Kind is what an event of a stream means to a relay.
type Kind uint8

// The kinds of events, in an order that relays use: up to Preamble nothing of the answer
// is there, so nothing is lost by starting again.
const (
	Comment  Kind = iota // keep-alive
	Preamble             // announces an answer but holds none of it yet
	Content              // part of the answer
	Done                 // the mark of a whole stream; it may hold the last part of the answer
	Failure              // the model server reports a failure
	Refused              // it reports that the request is at fault
)

// Classify decides what ev is. What it does not know is Content, so that unknown formats
// are relayed at once.
func (a *API) Classify(ev Event) Kind {
	if !ev.HasData {
		return Comment
	}
	switch a.Family {
	case Anthropic:
		return classifyAnthropic(ev)
	case TGI, OIP:
		return classifyGenerate(ev)
	case Ollama:
		return classifyOllama(ev)
	}
	return classify(ev)
}

// Committed is the cheap form of Classify for events after the first content, where only
// errors and the end matter: it may call a Preamble or Comment Content.
func (a *API) Committed(ev Event) Kind {
	switch a.Family {
	case Anthropic:
		if len(ev.Name) > 0 && string(ev.Name) != "error" && string(ev.Name) != "message_stop" {
			return Content
		}
		return a.Classify(ev)
	case TGI, OIP, Ollama:
		if ev.HasData && !bytes.Contains(ev.Data, []byte(`"error"`)) && !bytes.Contains(ev.Data, []byte(`"generated_text"`)) && !bytes.Contains(ev.Data, []byte(`"done"`)) {
			return Content
		}
		return a.Classify(ev)
	}
	return committed(ev)
}

func classifyAnthropic(ev Event) Kind {
	kind := string(ev.Name)
	if kind == "" || kind == "error" {
		var e struct {
			Type  string          `json:"type"`
			Error json.RawMessage `json:"error"`
		}
		if json.Unmarshal(ev.Data, &e) != nil {
			if kind == "error" {
				return Failure
			}
			return Content
		}
		if kind == "error" || e.Type == "error" {
			return blame(e.Error)
		}
		kind = e.Type
	}
	switch kind {
	case "ping":
		return Comment
	case "message_start", "content_block_start":
		return Preamble
	case "message_stop":
		return Done
	}
	return Content
}

// classifyGenerate reads the streams of TGI, {"token":…,"generated_text":…}, and of
// Triton's generate_stream, which has outputs at the top level and no end.
func classifyGenerate(ev Event) Kind {
	var e struct {
		Error     json.RawMessage `json:"error"`
		ErrorType string          `json:"error_type"`
		Token     json.RawMessage `json:"token"`
		Text      *string         `json:"generated_text"`
	}
	switch {
	case json.Unmarshal(ev.Data, &e) != nil:
		return Content
	case present(e.Error) && e.ErrorType == "validation":
		return Refused
	case present(e.Error):
		return Failure
	case e.Text != nil && present(e.Token):
		return Done
	}
	return Content
}

func classifyOllama(ev Event) Kind {
	var e struct {
		Error    json.RawMessage `json:"error"`
		Done     bool            `json:"done"`
		Response string          `json:"response"`
		Message  *struct {
			Content   string          `json:"content"`
			Thinking  string          `json:"thinking"`
			ToolCalls json.RawMessage `json:"tool_calls"`
		} `json:"message"`
	}
	switch {
	case json.Unmarshal(ev.Data, &e) != nil:
		return Content
	case present(e.Error):
		return Failure
	case e.Done:
		return Done
	case e.Message != nil && e.Response == "" && e.Message.Content == "" && e.Message.Thinking == "" && !present(e.Message.ToolCalls):
		return Preamble
	}
	return Content
}

var done = []byte("[DONE]")

// streamEvent are the fields of chat, completion and response events that tell them
// apart.
type streamEvent struct {
	Error   json.RawMessage `json:"error"`
	Type    string          `json:"type"`
	Choices *[]struct {
		Delta        map[string]json.RawMessage `json:"delta"`
		Text         string                     `json:"text"`
		FinishReason *string                    `json:"finish_reason"`
	} `json:"choices"`
	Usage    json.RawMessage `json:"usage"`
	Response *struct {
		Error json.RawMessage `json:"error"`
	} `json:"response"`
}

// classify decides what ev is. What it does not know is content, so unknown formats are
// relayed at once.
func classify(ev Event) Kind {
	if !ev.HasData {
		return Comment
	}
	data := bytes.TrimSpace(ev.Data)
	if bytes.Equal(data, done) {
		return Done
	}
	if string(ev.Name) != "error" {
		if kind, ok := plainKind(data); ok {
			return kind
		}
	}
	return classifySlow(ev, data)
}

// classifySlow is classify of any JSON, or none.
func classifySlow(ev Event, data []byte) Kind {
	var s streamEvent
	if json.Unmarshal(data, &s) != nil {
		if string(ev.Name) == "error" {
			return Failure
		}
		return Content
	}
	if present(s.Error) {
		return blame(s.Error)
	}
	switch {
	case s.Type == "error" || string(ev.Name) == "error":
		return blame(data)
	case s.Type == "response.failed":
		if s.Response != nil && present(s.Response.Error) {
			return blame(s.Response.Error)
		}
		return Failure
	case s.Type == "response.created", s.Type == "response.in_progress", s.Type == "response.queued":
		return Preamble
	}
	if s.Choices == nil || present(s.Usage) {
		return Content
	}
	for _, c := range *s.Choices {
		if c.Text != "" || c.FinishReason != nil {
			return Content
		}
		for key, v := range c.Delta {
			if key != "role" && present(v) {
				return Content
			}
		}
	}
	return Preamble
}

// present reports whether a JSON value says anything.
func present(v json.RawMessage) bool {
	switch string(bytes.TrimSpace(v)) {
	case "", "null", `""`, "[]", "{}":
		return false
	}
	return true
}

// blame tells an error the request caused from one the server has: only the latter is
// worth another endpoint, and counts against this one.
func blame(v json.RawMessage) Kind {
	var e struct {
		Type string `json:"type"`
		Code any    `json:"code"`
	}
	if json.Unmarshal(v, &e) != nil {
		return Failure
	}
	switch e.Type {
	case "invalid_request_error", "authentication_error", "permission_error", "not_found_error", "request_too_large", "billing_error":
		return Refused
	}
	if n, ok := e.Code.(float64); ok && n >= 400 && n < 500 && n != 429 && n != 408 {
		return Refused
	}
	return Failure
}

// committed is the cheap form of classify for events after the commit point, where only
// errors and the end matter.
func committed(ev Event) Kind {
	switch {
	case !ev.HasData:
		return Comment
	case bytes.Contains(ev.Data, []byte(`"error"`)), string(ev.Name) == "error", bytes.Contains(ev.Data, []byte(`"response.failed"`)):
		return classify(ev)
	case len(ev.Data) < 16 && bytes.Equal(bytes.TrimSpace(ev.Data), done):
		return Done
	}
	return Content
}
