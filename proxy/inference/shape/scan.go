package shape

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"math/bits"
	"strings"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger"
)

// MaxDepth is how deep a request body may nest. encoding/json stops at 10 000; no
// model API needs more than a few dozen, and the scanner recurses.
const MaxDepth = 512

// Envelope is what routing needs from a JSON request body. Offsets index the body; the
// strings are decoded copies.
type Envelope struct {
	// body[ModelStart:ModelEnd] is the model's string token, quotes included. Both are
	// 0 when the key is absent.
	ModelStart, ModelEnd int
	Model                string
	// Stream is the value of "stream"; StreamSet says that the key is there.
	Stream, StreamSet bool
	// Empty when absent, null, or not a string.
	User, SafetyIdentifier, PromptCacheKey string
	// SubUser and Sequence are "user_id" and "sequence_id" inside "parameters" or
	// "metadata": strings as they are, numbers as they are written, anything else "".
	SubUser, Sequence string
}

// Scan reads the top level of a JSON object without building it. It accepts
// exactly what encoding/json accepts, up to MaxDepth, and agrees with it on the values
// of the keys it knows, with two exceptions that are refused instead: a known key that
// occurs twice (readers differ on which one counts, so the mesh and the model could
// disagree), and a key that equals "model" only when case is ignored (encoding/json
// itself would match it). Errors have kind Invalid and are safe to show.
func Scan(body []byte) (Envelope, error) {
	var e Envelope
	s := scanner{b: body}
	s.space()
	if s.peek() != '{' {
		return e, outrigger.Errorf(outrigger.Invalid, "request body is not a JSON object")
	}
	s.i++
	var seen uint
	err := s.members(1, func(key []byte, escaped bool) (bool, error) {
		name := key
		if escaped {
			name = []byte(decodeString(key, true))
		}
		id := keyID(name)
		if id == 0 {
			if len(name) == len("model") && strings.EqualFold(string(name), "model") {
				return false, outrigger.Errorf(outrigger.Invalid, "key %q differs from \"model\" only in case; send \"model\" once", name)
			}
			return false, nil
		}
		if id == keyNested {
			return true, s.nested(&seen, &e)
		}
		if seen&id != 0 {
			return false, outrigger.Errorf(outrigger.Invalid, "key %q occurs twice; send it once", name)
		}
		seen |= id
		return true, s.known(id, &e)
	})
	if err != nil {
		return Envelope{}, err
	}
	s.space()
	if s.i != len(body) {
		return Envelope{}, s.bad("something follows the JSON object")
	}
	return e, nil
}

const (
	keyModel uint = 1 << iota
	keyStream
	keyUser
	keySafety
	keyCache
	keyNested   // "parameters" or "metadata"
	keySubUser  // inside one of them
	keySequence // inside one of them
)

func keyID(name []byte) uint {
	switch string(name) { // no allocation: the compiler compares in place
	case "model":
		return keyModel
	case "stream":
		return keyStream
	case "user":
		return keyUser
	case "safety_identifier":
		return keySafety
	case "prompt_cache_key":
		return keyCache
	case "parameters", "metadata":
		return keyNested
	}
	return 0
}

// nested reads the value of "parameters" or "metadata" for who asks. seen is shared by
// both, so that two answers to that question are refused.
func (s *scanner) nested(seen *uint, e *Envelope) error {
	s.space()
	if s.peek() != '{' {
		return s.value(1)
	}
	s.i++
	return s.members(2, func(key []byte, escaped bool) (bool, error) {
		if escaped {
			key = []byte(decodeString(key, true))
		}
		var id uint
		var into *string
		switch string(key) {
		case "user_id":
			id, into = keySubUser, &e.SubUser
		case "sequence_id":
			id, into = keySequence, &e.Sequence
		default:
			return false, nil
		}
		if *seen&id != 0 {
			return false, outrigger.Errorf(outrigger.Invalid, "key %q occurs twice; send it once", key)
		}
		*seen |= id
		s.space()
		start := s.i
		if s.peek() == '"' {
			raw, escaped, err := s.str()
			*into = decodeString(raw, escaped)
			return true, err
		}
		if err := s.value(2); err != nil {
			return false, err
		}
		if c := s.b[start]; c == '-' || c >= '0' && c <= '9' {
			*into = string(s.b[start:s.i])
		}
		return true, nil
	})
}

// known reads the value of one of our keys.
func (s *scanner) known(id uint, e *Envelope) error {
	s.space()
	start := s.i
	if s.peek() != '"' {
		if id == keyModel {
			return outrigger.Errorf(outrigger.Invalid, "\"model\" is not a string")
		}
		if id == keyStream {
			e.Stream, e.StreamSet = s.peek() == 't', true
		}
		return s.value(1)
	}
	raw, escaped, err := s.str()
	if err != nil {
		return err
	}
	switch id {
	case keyModel:
		e.ModelStart, e.ModelEnd, e.Model = start, s.i, decodeString(raw, escaped)
	case keyUser:
		e.User = decodeString(raw, escaped)
	case keySafety:
		e.SafetyIdentifier = decodeString(raw, escaped)
	case keyCache:
		e.PromptCacheKey = decodeString(raw, escaped)
	}
	return nil
}

// decodeString returns the value of a valid string token's inside, as encoding/json
// would: escapes resolved, invalid UTF-8 replaced.
func decodeString(raw []byte, escaped bool) string {
	if !escaped && utf8.Valid(raw) {
		return string(raw)
	}
	quoted := make([]byte, 0, len(raw)+2)
	quoted = append(append(append(quoted, '"'), raw...), '"')
	var out string
	if err := json.Unmarshal(quoted, &out); err != nil {
		return "" // not reachable: the scanner has validated the token
	}
	return out
}

// scanner walks JSON text (RFC 8259) and validates it.
type scanner struct {
	b []byte
	i int
}

func (s *scanner) bad(what string) error {
	return outrigger.Errorf(outrigger.Invalid, "request body is not valid JSON: %s at byte %d", what, s.i)
}

// peek returns the byte at the cursor, or 0 at the end (no JSON token starts with 0).
func (s *scanner) peek() byte {
	if s.i < len(s.b) {
		return s.b[s.i]
	}
	return 0
}

func (s *scanner) space() {
	for s.i < len(s.b) {
		switch s.b[s.i] {
		case ' ', '\t', '\n', '\r':
			s.i++
		default:
			return
		}
	}
}

// members walks an object whose '{' has been read. For each key visit says whether it
// consumed the value.
func (s *scanner) members(depth int, visit func(key []byte, escaped bool) (bool, error)) error {
	s.space()
	if s.peek() == '}' {
		s.i++
		return nil
	}
	for {
		s.space()
		if s.peek() != '"' {
			return s.bad("expected a key")
		}
		key, escaped, err := s.str()
		if err != nil {
			return err
		}
		s.space()
		if s.peek() != ':' {
			return s.bad("expected ':'")
		}
		s.i++
		consumed := false
		if visit != nil {
			if consumed, err = visit(key, escaped); err != nil {
				return err
			}
		}
		if !consumed {
			if err := s.value(depth); err != nil {
				return err
			}
		}
		s.space()
		switch s.peek() {
		case ',':
			s.i++
		case '}':
			s.i++
			return nil
		default:
			return s.bad("expected ',' or '}'")
		}
	}
}

// elements walks an array whose '[' has been read; visit reads each element, nil skips them.
func (s *scanner) elements(depth int, visit func() error) error {
	s.space()
	if s.peek() == ']' {
		s.i++
		return nil
	}
	for {
		var err error
		if visit != nil {
			err = visit()
		} else {
			err = s.value(depth)
		}
		if err != nil {
			return err
		}
		s.space()
		switch s.peek() {
		case ',':
			s.i++
		case ']':
			s.i++
			return nil
		default:
			return s.bad("expected ',' or ']'")
		}
	}
}

// value skips one value; depth is the number of containers around it.
func (s *scanner) value(depth int) error {
	s.space()
	switch c := s.peek(); c {
	case '{', '[':
		if depth >= MaxDepth {
			return outrigger.Errorf(outrigger.Invalid, "request body nests deeper than %d levels", MaxDepth)
		}
		s.i++
		if c == '{' {
			return s.members(depth+1, nil)
		}
		return s.elements(depth+1, nil)
	case '"':
		_, _, err := s.str()
		return err
	case 't':
		return s.literal("true")
	case 'f':
		return s.literal("false")
	case 'n':
		return s.literal("null")
	}
	return s.number()
}

// take is value, and returns its bytes.
func (s *scanner) take(depth int) ([]byte, error) {
	s.space()
	start := s.i
	err := s.value(depth)
	return s.b[start:s.i], err
}

func (s *scanner) literal(word string) error {
	if !bytes.HasPrefix(s.b[s.i:], []byte(word)) {
		return s.bad("expected " + word)
	}
	s.i += len(word)
	return nil
}

// str reads the string token at the cursor and returns its inside.
func (s *scanner) str() (raw []byte, escaped bool, err error) {
	s.i++ // the opening quote
	start := s.i
	for s.i < len(s.b) {
		s.i += plainRun(s.b[s.i:])
		if s.i == len(s.b) {
			break
		}
		switch c := s.b[s.i]; {
		case c == '"':
			raw = s.b[start:s.i]
			s.i++
			return raw, escaped, nil
		case c == '\\':
			escaped = true
			if err := s.escape(); err != nil {
				return nil, false, err
			}
		case c < 0x20:
			return nil, false, s.bad("control character in a string")
		default:
			s.i++
		}
	}
	return nil, false, s.bad("string does not end")
}

// plainRun returns how many bytes at the start of b need no look inside a string: no quote,
// backslash or control character among them. It tells eight bytes at a time (Mycroft's
// test for a zero byte: exact for the lowest one it finds), and may stop early at the end.
func plainRun(b []byte) int {
	const ones, tops = 0x0101010101010101, 0x8080808080808080
	n := 0
	for ; n+8 <= len(b); n += 8 {
		v := binary.LittleEndian.Uint64(b[n:])
		quote, slash := v^ones*'"', v^ones*'\\'
		if hit := ((quote-ones)&^quote | (slash-ones)&^slash | (v-ones*0x20)&^v) & tops; hit != 0 {
			return n + bits.TrailingZeros64(hit)/8
		}
	}
	return n
}

func (s *scanner) escape() error {
	s.i++
	switch s.peek() {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		s.i++
		return nil
	case 'u':
		s.i++
		for range 4 {
			c := s.peek() | 0x20
			if (c < '0' || c > '9' || s.peek() < '0') && (c < 'a' || c > 'f') {
				return s.bad("bad \\u escape")
			}
			s.i++
		}
		return nil
	}
	return s.bad("bad escape")
}

func (s *scanner) digits() bool {
	start := s.i
	for s.peek() >= '0' && s.peek() <= '9' {
		s.i++
	}
	return s.i > start
}

func (s *scanner) number() error {
	if s.peek() == '-' {
		s.i++
	}
	if s.peek() == '0' {
		s.i++
	} else if !s.digits() {
		return s.bad("expected a value")
	}
	if s.peek() == '.' {
		s.i++
		if !s.digits() {
			return s.bad("bad number")
		}
	}
	if s.peek()|0x20 == 'e' {
		s.i++
		if s.peek() == '+' || s.peek() == '-' {
			s.i++
		}
		if !s.digits() {
			return s.bad("bad number")
		}
	}
	return nil
}
