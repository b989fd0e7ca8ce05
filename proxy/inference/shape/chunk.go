package shape

import (
	"bytes"
	"unicode/utf8"
)

// plainKind is classify for events as nearly every server writes them: one JSON object whose
// keys are spelt as documented and occur once, of the documented types, and which reports no
// error. It reads them in place, as encoding/json with its maps would be the greatest part of
// what the first event of a stream waits for. Everything else is left to classify: ok is
// false.
func plainKind(data []byte) (kind Kind, ok bool) {
	s := scanner{b: data}
	if s.peek() != '{' {
		return Content, false
	}
	s.i++
	c := chunk{plain: true}
	err := s.members(1, func(key []byte, escaped bool) (bool, error) { return c.member(&s, key, escaped) })
	if s.space(); err != nil || !c.plain || s.i != len(data) {
		return Content, false
	}
	if c.choices && !c.usage && !c.content {
		return Preamble, true
	}
	return Content, true
}

// chunk is what plainKind has seen.
type chunk struct {
	plain   bool // so far
	seen    uint8
	choices bool // an array of them is there
	usage   bool // and says something
	content bool // in one of the choices
}

// Keys of an event, in chunk.seen.
const (
	seenError uint8 = 1 << iota
	seenType
	seenChoices
	seenUsage
	// In a choice:
	seenDelta
	seenText
	seenFinish
)

// once notes a key; the second of a kind is not plain.
func (c *chunk) once(seen *uint8, key uint8) {
	c.plain = c.plain && *seen&key == 0
	*seen |= key
}

// member reads the value of one of our keys at the top level.
func (c *chunk) member(s *scanner, key []byte, escaped bool) (consumed bool, err error) {
	switch string(key) {
	case "error":
		c.once(&c.seen, seenError)
		v, err := s.take(1)
		c.plain = c.plain && !present(v)
		return true, err
	case "type":
		c.once(&c.seen, seenType)
		v, err := s.take(1)
		c.plain = c.plain && plainType(v)
		return true, err
	case "choices":
		c.once(&c.seen, seenChoices)
		return true, c.list(s)
	case "usage":
		c.once(&c.seen, seenUsage)
		v, err := s.take(1)
		c.usage = present(v)
		return true, err
	}
	c.plain = c.plain && !escaped && !foldsTo(key, "error", "type", "choices", "usage", "response")
	return false, nil
}

// plainType: strings that classify gives no meaning to.
func plainType(v []byte) bool {
	if len(v) < 2 || v[0] != '"' || bytes.IndexByte(v, '\\') >= 0 {
		return false
	}
	switch string(v[1 : len(v)-1]) {
	case "error", "response.failed", "response.created", "response.in_progress", "response.queued":
		return false
	}
	return true
}

// list reads the array of choices.
func (c *chunk) list(s *scanner) error {
	s.space()
	if s.peek() != '[' {
		c.plain = false
		return s.value(1)
	}
	s.i++
	c.choices = true
	return s.elements(2, func() error {
		if s.space(); s.peek() != '{' {
			c.plain = false
			return s.value(2)
		}
		s.i++
		var seen uint8
		return s.members(3, func(key []byte, escaped bool) (bool, error) { return c.choice(s, &seen, key, escaped) })
	})
}

// choice reads the value of one of our keys in a choice.
func (c *chunk) choice(s *scanner, seen *uint8, key []byte, escaped bool) (consumed bool, err error) {
	switch string(key) {
	case "delta":
		c.once(seen, seenDelta)
		return true, c.delta(s)
	case "text":
		c.once(seen, seenText)
		return true, c.words(s, false)
	case "finish_reason":
		c.once(seen, seenFinish)
		return true, c.words(s, true)
	}
	c.plain = c.plain && !escaped && !foldsTo(key, "delta", "text", "finish_reason")
	return false, nil
}

// words reads a string or null; an empty string is content if empty says so.
func (c *chunk) words(s *scanner, empty bool) error {
	v, err := s.take(3)
	switch {
	case err != nil:
	case v[0] == '"':
		c.content = c.content || empty || len(v) > 2
	case v[0] != 'n':
		c.plain = false
	}
	return err
}

// delta reads an object of which every field but the role is content if it says anything.
func (c *chunk) delta(s *scanner) error {
	s.space()
	if s.peek() != '{' {
		v, err := s.take(3)
		c.plain = c.plain && err == nil && v[0] == 'n'
		return err
	}
	s.i++
	var said []byte // the first field that says something: a second of that name would replace it
	return s.members(4, func(key []byte, escaped bool) (bool, error) {
		v, err := s.take(4)
		switch {
		case escaped || !utf8.Valid(key) || said != nil && bytes.Equal(key, said):
			c.plain = false
		case string(key) == "role" || !present(v):
		default:
			c.content = true
			if said == nil {
				said = key
			}
		}
		return true, err
	})
}

// foldsTo: encoding/json ignores the case of names, so that such keys are not plain.
func foldsTo(key []byte, names ...string) bool {
	for _, name := range names {
		if len(key) >= len(name) && bytes.EqualFold(key, []byte(name)) {
			return true
		}
	}
	return false
}
