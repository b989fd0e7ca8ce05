package inference

import (
	"bytes"
	"encoding/json"
	"io"

	"github.com/outrigger-mesh/outrigger"
)

// maxEvent bounds one server-sent event. Partial images of the responses API, a few
// megabytes of base64, are the largest seen.
const maxEvent = 8 << 20

// event is one server-sent event (WHATWG HTML §9.2). Its slices are valid until the
// next call of next.
type event struct {
	raw     []byte // every byte up to and including the blank line; relayed as is
	name    []byte // of the last event field
	data    []byte // data fields joined by '\n'
	hasData bool
}

// eventReader cuts a byte stream into events without changing a byte: the raw parts
// joined are the stream. Lines may end in LF, CR or CRLF.
type eventReader struct {
	r          io.Reader
	buf        []byte
	start, end int   // unread bytes are buf[start:end]
	scan       int   // looked at so far
	ready      int   // end of the next whole event, 0 if not known
	line       int   // bytes in the current line
	skipLF     bool  // the last line ended in CR: a LF now belongs to it
	err        error // from r, returned once the buffer is used up
}

func newEventReader(r io.Reader, buf []byte) *eventReader {
	return &eventReader{r: r, buf: buf[:cap(buf)]}
}

// next returns the next event. At the end of the stream it returns io.EOF, after a
// last event without its blank line if there are bytes left; with any other error the
// bytes left are dropped, because the event they belong to was cut.
func (e *eventReader) next() (event, error) {
	for {
		if e.whole() {
			ev := parseEvent(e.buf[e.start:e.ready])
			e.start, e.ready = e.ready, 0
			return ev, nil
		}
		if e.err != nil {
			if e.err == io.EOF && e.start < e.end {
				ev := parseEvent(e.buf[e.start:e.end])
				e.start = e.end
				return ev, nil
			}
			return event{}, e.err
		}
		if err := e.fill(); err != nil {
			return event{}, err
		}
	}
}

// whole reports whether next would return an event without reading.
func (e *eventReader) whole() bool {
	if e.ready > 0 {
		return true
	}
	for e.scan < e.end {
		c := e.buf[e.scan]
		e.scan++
		if e.skipLF {
			e.skipLF = false
			if c == '\n' {
				continue
			}
		}
		if c != '\n' && c != '\r' {
			e.line++
			continue
		}
		e.skipLF = c == '\r'
		if e.line > 0 {
			e.line = 0
			continue
		}
		if e.skipLF && e.scan < e.end && e.buf[e.scan] == '\n' {
			e.scan, e.skipLF = e.scan+1, false
		}
		e.ready = e.scan
		return true
	}
	return false
}

// fill reads once, making room first.
func (e *eventReader) fill() error {
	if e.start > 0 && (e.start == e.end || e.end == len(e.buf)) {
		copy(e.buf, e.buf[e.start:e.end])
		e.end, e.scan, e.start = e.end-e.start, e.scan-e.start, 0
	}
	if e.end == len(e.buf) {
		if len(e.buf) >= maxEvent {
			return outrigger.Errorf(outrigger.Exhausted, "server-sent event exceeds %d bytes", maxEvent)
		}
		e.buf = append(e.buf, make([]byte, max(len(e.buf), 4096))...)
	}
	n, err := e.r.Read(e.buf[e.end:])
	e.end += n
	e.err = err
	return nil
}

var bom = []byte("\xef\xbb\xbf")

func parseEvent(raw []byte) event {
	ev := event{raw: raw}
	rest := bytes.TrimPrefix(raw, bom)
	for len(rest) > 0 {
		var line []byte
		if i := bytes.IndexAny(rest, "\r\n"); i >= 0 {
			line, rest = rest[:i], rest[i+1:] // CRLF leaves an empty line: no field, no harm
		} else {
			line, rest = rest, nil
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimPrefix(value, []byte(" "))
		switch string(name) {
		case "event":
			ev.name = value
		case "data":
			if ev.hasData {
				ev.data = append(append(ev.data[:len(ev.data):len(ev.data)], '\n'), value...)
			} else {
				ev.data, ev.hasData = value, true
			}
		}
	}
	return ev
}

// eventKind is what an event means to the relay.
type eventKind uint8

const (
	eventComment  eventKind = iota // no data: keep-alive
	eventPreamble                  // announces an answer but holds none of it yet
	eventContent                   // part of the answer
	eventDone                      // data: [DONE]
	eventError                     // the model server reports a failure
	eventRefused                   // it reports that the request is at fault
)

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
func classify(ev event) eventKind {
	if !ev.hasData {
		return eventComment
	}
	data := bytes.TrimSpace(ev.data)
	if bytes.Equal(data, done) {
		return eventDone
	}
	var s streamEvent
	if json.Unmarshal(data, &s) != nil {
		if string(ev.name) == "error" {
			return eventError
		}
		return eventContent
	}
	if present(s.Error) {
		return blame(s.Error)
	}
	switch {
	case s.Type == "error" || string(ev.name) == "error":
		return blame(data)
	case s.Type == "response.failed":
		if s.Response != nil && present(s.Response.Error) {
			return blame(s.Response.Error)
		}
		return eventError
	case s.Type == "response.created", s.Type == "response.in_progress", s.Type == "response.queued":
		return eventPreamble
	}
	if s.Choices == nil || present(s.Usage) {
		return eventContent
	}
	for _, c := range *s.Choices {
		if c.Text != "" || c.FinishReason != nil {
			return eventContent
		}
		for key, v := range c.Delta {
			if key != "role" && present(v) {
				return eventContent
			}
		}
	}
	return eventPreamble
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
func blame(v json.RawMessage) eventKind {
	var e struct {
		Type string `json:"type"`
		Code any    `json:"code"`
	}
	if json.Unmarshal(v, &e) != nil {
		return eventError
	}
	if e.Type == "invalid_request_error" || e.Type == "authentication_error" || e.Type == "permission_error" {
		return eventRefused
	}
	if n, ok := e.Code.(float64); ok && n >= 400 && n < 500 && n != 429 && n != 408 {
		return eventRefused
	}
	return eventError
}

// committed is the cheap form of classify for events after the commit point, where only
// errors and the end matter.
func committed(ev event) eventKind {
	switch {
	case !ev.hasData:
		return eventComment
	case bytes.Contains(ev.data, []byte(`"error"`)), string(ev.name) == "error", bytes.Contains(ev.data, []byte(`"response.failed"`)):
		return classify(ev)
	case len(ev.data) < 16 && bytes.Equal(bytes.TrimSpace(ev.data), done):
		return eventDone
	}
	return eventContent
}
