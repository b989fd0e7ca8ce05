package outrigger

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Type is the declared type of a variable. The words are those of the bridge
// protocol (snakepit v0.4.3), so Any.type_url is "type.googleapis.com/snakepit.<type>".
type Type string

// The types a variable may have.
const (
	Float     Type = "float"     // number, or the strings "NaN", "Infinity", "-Infinity"
	Integer   Type = "integer"   // whole number within ±2^63
	String    Type = "string"    //
	Boolean   Type = "boolean"   //
	Choice    Type = "choice"    // string out of Constraints.Choices (empty = any)
	Module    Type = "module"    // class name, e.g. "Predict" or "ChainOfThought"
	Embedding Type = "embedding" // list of numbers
	Tensor    Type = "tensor"    // {"shape":[…],"data":[…]}, product(shape) = len(flatten(data))
	Map       Type = "map"       // any JSON object
	List      Type = "list"      // any JSON array
)

// Types lists all types in documentation order.
func Types() []Type {
	return []Type{Float, Integer, String, Boolean, Choice, Module, Embedding, Tensor, Map, List}
}

// Value is one typed value. JSON holds its canonical JSON text. Binary is an
// optional opaque payload that travels beside it (bridge clients put pickled or ETF
// bytes there); it is carried, never decoded.
type Value struct {
	Type   Type
	JSON   []byte
	Binary []byte
}

// MaxNesting bounds how deep arrays and objects may nest in a value or in constraints.
// Every reader of a value parses it again, often recursively, and the readers' own
// limits differ (Python's is about 1000); a value the authority accepts must be
// readable everywhere.
const MaxNesting = 128

// ParseValue checks that raw is one JSON document of type t, normalises it (5.0 to 5
// for integer, 1 to true for boolean, integers to floats stay as written) and
// enforces MaxValueBytes. The document must be UTF-8, nest at most MaxNesting deep and
// name no key of an object twice, because readers disagree on which of the two counts.
// Parsing its own result changes nothing.
//
// With a non-empty binary part raw is only required to be such a document of any type,
// because it describes the payload. Errors have kind Invalid (or Exhausted for size);
// what they quote of the value is shortened to 64 bytes. The result shares memory with
// raw and binary.
func ParseValue(t Type, raw, binary []byte) (Value, error) {
	if n := len(raw) + len(binary); n > MaxValueBytes {
		return Value{}, Errorf(Exhausted, "value is %d bytes, the limit is %d; store a reference instead", n, MaxValueBytes)
	}
	if !slices.Contains(Types(), t) {
		return Value{}, Errorf(Invalid, "unknown type: %q; one of float, integer, string, boolean, choice, module, embedding, tensor, map, list", clip([]byte(t)))
	}
	raw = bytes.Trim(raw, jsonSpace)
	if err := checkJSON("value of type "+string(t), raw); err != nil {
		return Value{}, err
	}
	if len(binary) > 0 {
		return Value{Type: t, JSON: raw, Binary: binary}, nil
	}
	out, err := normalise(t, raw)
	if err != nil {
		return Value{}, err
	}
	return Value{Type: t, JSON: out}, nil
}

// Equal reports whether two values have the same type and the same bytes.
func (v Value) Equal(w Value) bool {
	return v.Type == w.Type && bytes.Equal(v.JSON, w.JSON) && bytes.Equal(v.Binary, w.Binary)
}

// Float64 reads a float or integer value, including NaN and the infinities.
func (v Value) Float64() (float64, error) { return parseFloat(v.JSON) }

// Text reads a string, choice or module value.
func (v Value) Text() (string, error) { return parseString(v.Type, v.JSON) }

// normalise returns the canonical text of a checked JSON document as a value of type t.
func normalise(t Type, b []byte) ([]byte, error) {
	var err error
	switch t {
	case Float:
		_, err = parseFloat(b)
	case Integer:
		return normaliseInteger(b)
	case String, Choice, Module:
		_, err = parseString(t, b)
	case Boolean:
		return normaliseBoolean(b)
	case Embedding:
		_, err = countNumbers(b, 1)
	case Tensor:
		err = checkTensorSize(b)
	case Map:
		err = expectDelim(t, b, '{')
	case List:
		err = expectDelim(t, b, '[')
	}
	return b, err
}

func parseFloat(b []byte) (float64, error) {
	switch string(b) {
	case `"NaN"`:
		return math.NaN(), nil
	case `"Infinity"`:
		return math.Inf(1), nil
	case `"-Infinity"`:
		return math.Inf(-1), nil
	}
	if !isNumber(b) {
		return 0, Errorf(Invalid, "expected a number or \"NaN\", \"Infinity\", \"-Infinity\", got %s", clip(b))
	}
	f, err := strconv.ParseFloat(string(b), 64)
	if err != nil {
		return 0, Errorf(Invalid, "number %s does not fit a 64-bit float", clip(b))
	}
	return f, nil
}

// isNumber reports whether b is a JSON number; strconv alone also reads 0x10 and -inf.
func isNumber(b []byte) bool { return startsNumber(b) && json.Valid(b) }

func normaliseInteger(b []byte) ([]byte, error) {
	if !isNumber(b) {
		return nil, Errorf(Invalid, "expected an integer, got %s", clip(b))
	}
	n, ok := wholeNumber(string(b))
	if !ok {
		return nil, Errorf(Invalid, "expected a whole number within 64 bits, got %s", clip(b))
	}
	return strconv.AppendInt(nil, n, 10), nil
}

// wholeNumber reads a JSON number that has an integer value, like 5.0 or 1.2e3, by
// moving its decimal point: going through a float would round above 2^53.
func wholeNumber(s string) (int64, bool) {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return n, true
	}
	abs, negative := strings.CutPrefix(s, "-")
	mantissa, exponent := abs, ""
	if i := strings.IndexAny(abs, "eE"); i >= 0 {
		mantissa, exponent = abs[:i], abs[i+1:]
	}
	whole, fraction, _ := strings.Cut(mantissa, ".")
	digits := strings.TrimLeft(whole+fraction, "0")
	if digits == "" {
		return 0, true // whatever the exponent
	}
	zeros := 0 // how many to append to digits
	if exponent != "" {
		e, err := strconv.ParseInt(exponent, 10, 32)
		if err != nil {
			return 0, false // the mantissa, at most MaxValueBytes long, cannot make up for it
		}
		zeros = int(e)
	}
	significant := strings.TrimRight(digits, "0")
	zeros += len(digits) - len(significant) - len(fraction)
	const most = 19 // digits of 2^63
	if zeros < 0 || len(significant)+zeros > most {
		return 0, false
	}
	if negative {
		significant = "-" + significant
	}
	n, err := strconv.ParseInt(significant+strings.Repeat("0", zeros), 10, 64)
	return n, err == nil
}

func parseString(t Type, b []byte) (string, error) {
	var s string
	if !startsWith(b, '"') || json.Unmarshal(b, &s) != nil {
		return "", Errorf(Invalid, "expected a %s, got %s", t, clip(b))
	}
	return s, nil
}

func normaliseBoolean(b []byte) ([]byte, error) {
	switch string(b) {
	case "true", `"true"`, "1":
		return []byte("true"), nil
	case "false", `"false"`, "0":
		return []byte("false"), nil
	}
	return nil, Errorf(Invalid, "expected a boolean, got %s", clip(b))
}

func expectDelim(t Type, b []byte, delim byte) error {
	if !startsWith(b, delim) {
		return Errorf(Invalid, "expected a JSON %s, got %s", t, clip(b))
	}
	return nil
}

// countNumbers returns how many numbers a checked JSON array holds, at most depth levels
// down; anything else in it, and a number beyond the floats, is an error. It allocates
// nothing per element, so a small text cannot become a large structure.
func countNumbers(b []byte, depth int) (int, error) {
	if !startsWith(b, '[') {
		return 0, Errorf(Invalid, "expected a list of numbers, got %s", clip(b))
	}
	count, level := 0, 0
	s := scanner{text: b}
	for tok := s.next(); tok != nil; tok = s.next() {
		switch {
		case tok[0] == '[' && level < depth:
			level++
		case tok[0] == ']':
			level--
		case startsNumber(tok):
			if _, err := strconv.ParseFloat(string(tok), 64); err != nil {
				return 0, Errorf(Invalid, "number %s does not fit a 64-bit float", clip(tok))
			}
			count++
		default:
			return 0, Errorf(Invalid, "expected a list of numbers, got one that holds %s", clip(tok))
		}
	}
	return count, nil
}

// checkTensorSize compares the declared shape with the number of scalars in data, which
// may be flat or nested. Other keys, like dtype, are carried.
func checkTensorSize(b []byte) error {
	shape, data, err := tensorParts(b)
	if err != nil {
		return err
	}
	want, err := elements(shape)
	if err != nil {
		return err
	}
	n, err := countNumbers(data, MaxNesting)
	if err != nil {
		return err
	}
	if want != n {
		return Errorf(Invalid, "tensor shape %s needs %d elements, data has %d", shapeText(shape), want, n)
	}
	return nil
}

// elements returns the product of the dimensions, which a value can always hold.
func elements(shape []int) (int, error) {
	n := 1
	if slices.Contains(shape, 0) {
		n = 0 // and stays it, however large the others are
	}
	for _, d := range shape {
		if d < 0 {
			return 0, Errorf(Invalid, "tensor dimension %d is negative", d)
		}
		if n > 0 && n > MaxValueBytes/d {
			return 0, Errorf(Invalid, "tensor shape %s has more elements than a value of %d bytes can hold", shapeText(shape), MaxValueBytes)
		}
		n *= d
	}
	return n, nil
}

// tensorParts returns the declared shape and the text of data, which is a JSON array.
func tensorParts(b []byte) (shape []int, data []byte, err error) {
	var parts map[string]json.RawMessage // not a struct: those match keys in any case
	if json.Unmarshal(b, &parts) != nil || !startsWith(parts["shape"], '[') || !startsWith(parts["data"], '[') {
		return nil, nil, Errorf(Invalid, `expected a tensor {"shape":[…],"data":[…]}, got %s`, clip(b))
	}
	var dims []*int // pointers tell null from 0
	if json.Unmarshal(parts["shape"], &dims) != nil || slices.Contains(dims, nil) {
		return nil, nil, Errorf(Invalid, "tensor shape %s is not a list of integers", clip(parts["shape"]))
	}
	shape = make([]int, len(dims))
	for i, d := range dims {
		shape[i] = *d
	}
	return shape, parts["data"], nil
}

func shapeText(shape []int) string {
	const most = 16
	if len(shape) > most {
		return fmt.Sprintf("of %d dimensions", len(shape))
	}
	return fmt.Sprint(shape)
}

// jsonSpace is the white space of RFC 8259; unicode.IsSpace knows more.
const jsonSpace = " \t\r\n"

// checkJSON reports why b is not one JSON document that every reader understands alike
// (RFC 8259 with the stricter rules of I-JSON, RFC 7493, on encoding and keys).
func checkJSON(what string, b []byte) error {
	if !utf8.Valid(b) {
		return Errorf(Invalid, "%s is not valid UTF-8: %s", what, clip(b))
	}
	if n := nesting(b); n > MaxNesting {
		return Errorf(Invalid, "%s nests %d levels deep, the limit is %d; flatten it", what, n, MaxNesting)
	}
	if !json.Valid(b) {
		return Errorf(Invalid, "%s is not valid JSON: %s", what, clip(b))
	}
	if key, twice := duplicateKey(b); twice {
		return Errorf(Invalid, "%s has the key %q twice in one object; readers would differ on which counts", what, clip([]byte(key)))
	}
	return nil
}

// nesting returns how deep the brackets of b go; b need not be valid.
func nesting(b []byte) int {
	level, deepest := 0, 0
	s := scanner{text: b}
	for tok := s.next(); tok != nil; tok = s.next() {
		switch tok[0] {
		case '[', '{':
			level++
			deepest = max(deepest, level)
		case ']', '}':
			level--
		}
	}
	return deepest
}

// duplicateKey finds a key that valid JSON repeats in one object. "a" and "\u0061" are
// the same key.
func duplicateKey(b []byte) (key string, twice bool) {
	type level struct {
		object, keyNext bool
		seen            map[string]struct{}
	}
	var stack []level
	top := new(level)
	s := scanner{text: b}
	for tok := s.next(); tok != nil; tok = s.next() {
		switch {
		case tok[0] == ']' || tok[0] == '}':
			*top, stack = stack[len(stack)-1], stack[:len(stack)-1]
			continue
		case top.keyNext:
			key = keyText(tok)
			if _, twice = top.seen[key]; twice {
				return key, true
			}
			if top.seen == nil {
				top.seen = make(map[string]struct{})
			}
			top.seen[key] = struct{}{}
			top.keyNext = false
			continue
		}
		top.keyNext = top.object // whatever follows this value in an object is a key
		if tok[0] == '[' || tok[0] == '{' {
			stack = append(stack, *top)
			*top = level{object: tok[0] == '{', keyNext: tok[0] == '{'}
		}
	}
	return "", false
}

// keyText returns the text of a quoted JSON string.
func keyText(tok []byte) string {
	var s string
	if bytes.IndexByte(tok, '\\') >= 0 && json.Unmarshal(tok, &s) == nil {
		return s
	}
	return string(tok[1 : len(tok)-1])
}

// scanner cuts JSON into brackets, strings with their quotes, numbers and literals;
// white space, commas and colons only separate. Whether the text is valid is for others
// to say: on anything else it still ends and never reads beyond it.
type scanner struct {
	text []byte
	pos  int
}

// next returns the next token, or nil at the end.
func (s *scanner) next() []byte {
	const separators, enders = jsonSpace + ",:", jsonSpace + `,:[]{}"`
	for s.pos < len(s.text) && strings.IndexByte(separators, s.text[s.pos]) >= 0 {
		s.pos++
	}
	if s.pos == len(s.text) {
		return nil
	}
	start := s.pos
	s.pos++
	switch s.text[start] {
	case '[', ']', '{', '}':
	case '"':
		for s.pos < len(s.text) && s.text[s.pos] != '"' {
			if s.text[s.pos] == '\\' {
				s.pos++
			}
			s.pos++
		}
		s.pos = min(s.pos+1, len(s.text))
	default:
		for s.pos < len(s.text) && strings.IndexByte(enders, s.text[s.pos]) < 0 {
			s.pos++
		}
	}
	return s.text[start:s.pos]
}

func startsWith(b []byte, c byte) bool { return len(b) > 0 && b[0] == c }

func startsNumber(b []byte) bool { return len(b) > 0 && (b[0] == '-' || b[0] >= '0' && b[0] <= '9') }

// clip shortens a value for an error message. The result is valid UTF-8, because the
// message may travel in a protobuf string.
func clip(b []byte) string {
	const limit = 64
	if len(b) <= limit {
		return strings.ToValidUTF8(string(b), "\uFFFD")
	}
	end := limit
	for end > limit-utf8.UTFMax && !utf8.RuneStart(b[end]) {
		end-- // not through the middle of a character
	}
	return strings.ToValidUTF8(string(b[:end]), "\uFFFD") + "…"
}
