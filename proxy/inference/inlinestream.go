package inference

import (
	"net/http"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/proxy/loop"
)

// Streams that a loop passes on: what relayStream does with a stream that goes well.

// Streams implements loop.Call, as isStream decides it.
func (c *inlineCall) Streams(a *http1.Answer) (limit time.Duration, ok bool) {
	if c.api.Lines() || a.Status() < 200 || a.Status() >= 300 || a.Status() == http.StatusNoContent {
		return 0, false
	}
	typed := false
	for i := range a.Len() {
		name, value := a.Field(i)
		switch fieldOf(name) {
		case fieldType:
			if typed || !isMedia(value, "text/event-stream") {
				return 0, false
			}
			typed = true
		case fieldConnection:
			if !plainConnection(value) {
				return 0, false
			}
		case fieldSpecial:
			if same(name, "content-encoding") {
				return 0, false
			}
		}
	}
	if typed && !c.heard {
		c.heard = true
		now := c.h.now()
		c.t.silent.Add(-1)
		c.t.observe(now.Sub(c.began), now)
		c.t.judge(true)
	}
	return c.limit(), typed
}

// Pass implements loop.Call.
func (c *inlineCall) Pass(a *http1.Answer, content []byte, ended bool, dst, date []byte, closing bool) (out []byte, used int, v loop.Verdict) {
	s, opens := &c.flow, false
	s.c = &c.call
	from := 0 // of content, what goes out
	for n := shape.EventEnd(content); n > 0; n = shape.EventEnd(content[used:]) {
		ev := shape.ParseEvent(content[used : used+n])
		kind := s.look(ev)
		if kind >= shape.Failure {
			v = loop.StreamResumes
			break
		}
		if !s.open {
			if s.hold(kind, ev.Raw) {
				used += n
				from = used
				continue
			}
			s.open, opens = true, true
		}
		used += n
	}
	if ended && v == loop.StreamGoesOn {
		if v = loop.StreamResumes; s.open && used == len(content) {
			v = loop.StreamEnds
		}
	}
	if !s.open {
		return dst, used, v
	}
	if opens {
		dst = c.appendAnswer(dst, a, -1, date, closing)
	}
	if n := len(s.held) + used - from; n > 0 {
		dst = http1.AppendChunkSize(dst, n)
		dst = append(append(append(dst, s.held...), content[from:used]...), "\r\n"...)
		c.sent += int64(n)
	}
	s.held = nil
	if v == loop.StreamEnds {
		dst = append(dst, "0\r\n\r\n"...)
		c.end(ending{}, nil, c.h.now())
	}
	return dst, used, v
}
