package shape

import (
	"bytes"
	"io"

	"github.com/outrigger-mesh/outrigger"
)

// MaxEvent bounds one server-sent event. Partial images of the responses API, a few
// megabytes of base64, are the largest seen.
const MaxEvent = 8 << 20

// Event is one server-sent event (WHATWG HTML §9.2), or one line of newline-delimited
// JSON. Its slices are valid until the next call of Next.
type Event struct {
	Raw     []byte // every byte up to and including the blank line; relayed as is
	Name    []byte // of the last event field
	Data    []byte // data fields joined by '\n'
	HasData bool
}

// EventReader cuts a byte stream into events without changing a byte: the raw parts
// joined are the stream. Lines may end in LF, CR or CRLF.
type EventReader struct {
	r          io.Reader
	buf        []byte
	start, end int   // unread bytes are buf[start:end]
	scan       int   // looked at so far
	ready      int   // end of the next whole event, 0 if not known
	line       int   // bytes in the current line
	lines      bool  // every line is an event
	skipLF     bool  // the last line ended in CR: a LF now belongs to it
	err        error // from r, returned once the buffer is used up
}

// NewEventReader returns a reader of the server-sent events of r. It reads into buf up to
// its capacity and grows it as events need, to MaxEvent.
func NewEventReader(r io.Reader, buf []byte) *EventReader {
	return &EventReader{r: r, buf: buf[:cap(buf)]}
}

// NewLineReader is NewEventReader for newline-delimited JSON: each line is an event
// whose data is the line without its end, and an empty line is a comment.
func NewLineReader(r io.Reader, buf []byte) *EventReader {
	return &EventReader{r: r, buf: buf[:cap(buf)], lines: true}
}

// Buffer returns the buffer in use, for reuse after the last event.
func (e *EventReader) Buffer() []byte { return e.buf }

func (e *EventReader) parse(raw []byte) Event {
	if !e.lines {
		return ParseEvent(raw)
	}
	data := bytes.TrimSpace(raw)
	return Event{Raw: raw, Data: data, HasData: len(data) > 0}
}

// Next returns the next event. At the end of the stream it returns io.EOF, after a
// last event without its blank line if there are bytes left; with any other error the
// bytes left are dropped, because the event they belong to was cut.
func (e *EventReader) Next() (Event, error) {
	for {
		if e.Whole() {
			ev := e.parse(e.buf[e.start:e.ready])
			e.start, e.ready = e.ready, 0
			return ev, nil
		}
		if e.err != nil {
			if e.err == io.EOF && e.start < e.end {
				ev := e.parse(e.buf[e.start:e.end])
				e.start = e.end
				return ev, nil
			}
			return Event{}, e.err
		}
		if err := e.fill(); err != nil {
			return Event{}, err
		}
	}
}

// Whole reports whether Next would return an event without reading.
func (e *EventReader) Whole() bool {
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
		if e.lines {
			if c == '\r' {
				continue
			}
			e.ready = e.scan
			return true
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
func (e *EventReader) fill() error {
	if e.start > 0 && (e.start == e.end || e.end == len(e.buf)) {
		copy(e.buf, e.buf[e.start:e.end])
		e.end, e.scan, e.start = e.end-e.start, e.scan-e.start, 0
	}
	if e.end == len(e.buf) {
		if len(e.buf) >= MaxEvent {
			return outrigger.Errorf(outrigger.Exhausted, "server-sent event exceeds %d bytes", MaxEvent)
		}
		e.buf = append(e.buf, make([]byte, max(len(e.buf), 4096))...)
	}
	n, err := e.r.Read(e.buf[e.end:])
	e.end += n
	e.err = err
	return nil
}

// EventEnd returns where the first whole event of b ends, 0 if there is none. Of a CRLF cut
// in the middle the LF counts as an event of its own, a comment.
func EventEnd(b []byte) int {
	empty, skipLF := true, false // the line so far; the last line ended in CR
	for i, c := range b {
		skip := skipLF && c == '\n'
		if skipLF = false; skip {
			continue
		}
		if c != '\n' && c != '\r' {
			empty = false
			continue
		}
		if !empty {
			empty, skipLF = true, c == '\r'
			continue
		}
		if c == '\r' && i+1 < len(b) && b[i+1] == '\n' {
			i++
		}
		return i + 1
	}
	return 0
}

var bom = []byte("\xef\xbb\xbf")

// ParseEvent reads one server-sent event from its bytes.
func ParseEvent(raw []byte) Event {
	ev := Event{Raw: raw}
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
			ev.Name = value
		case "data":
			if ev.HasData {
				ev.Data = append(append(ev.Data[:len(ev.Data):len(ev.Data)], '\n'), value...)
			} else {
				ev.Data, ev.HasData = value, true
			}
		}
	}
	return ev
}
