package outrigger

import (
	"bytes"
	"encoding/json"
	"math"
	"strconv"
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

// ParseValue checks that raw is one JSON document of type t, normalises it (5.0 to 5
// for integer, 1 to true for boolean, integers to floats stay as written) and
// enforces MaxValueBytes. With a non-empty binary part raw is only required to be
// JSON, because it describes the payload. Errors have kind Invalid (or Exhausted for
// size).
func ParseValue(t Type, raw, binary []byte) (Value, error) {
	if n := len(raw) + len(binary); n > MaxValueBytes {
		return Value{}, Errorf(Exhausted, "value is %d bytes, the limit is %d; store a reference instead", n, MaxValueBytes)
	}
	norm, ok := normalisers[t]
	if !ok {
		return Value{}, Errorf(Invalid, "unknown type: %q; one of float, integer, string, boolean, choice, module, embedding, tensor, map, list", string(t))
	}
	raw = bytes.TrimSpace(raw)
	if !json.Valid(raw) {
		return Value{}, Errorf(Invalid, "value of type %s is not valid JSON: %s", t, clip(raw))
	}
	if len(binary) > 0 {
		return Value{Type: t, JSON: raw, Binary: binary}, nil
	}
	out, err := norm(raw)
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

var normalisers = map[Type]func([]byte) ([]byte, error){
	Float: func(b []byte) ([]byte, error) {
		_, err := parseFloat(b)
		return b, err
	},
	Integer:   normaliseInteger,
	String:    normaliseText(String),
	Choice:    normaliseText(Choice),
	Module:    normaliseText(Module),
	Boolean:   normaliseBoolean,
	Embedding: normaliseEmbedding,
	Tensor:    normaliseTensor,
	Map:       normaliseDelim(Map, '{'),
	List:      normaliseDelim(List, '['),
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

func isNumber(b []byte) bool {
	return len(b) > 0 && (b[0] == '-' || b[0] >= '0' && b[0] <= '9')
}

func normaliseInteger(b []byte) ([]byte, error) {
	if !isNumber(b) {
		return nil, Errorf(Invalid, "expected an integer, got %s", clip(b))
	}
	if n, err := strconv.ParseInt(string(b), 10, 64); err == nil {
		return strconv.AppendInt(nil, n, 10), nil
	}
	f, err := strconv.ParseFloat(string(b), 64)
	if err != nil || f != math.Trunc(f) || math.Abs(f) >= 1<<63 {
		return nil, Errorf(Invalid, "expected a whole number within 64 bits, got %s", clip(b))
	}
	return strconv.AppendInt(nil, int64(f), 10), nil
}

func parseString(t Type, b []byte) (string, error) {
	var s string
	if len(b) == 0 || b[0] != '"' || json.Unmarshal(b, &s) != nil {
		return "", Errorf(Invalid, "expected a %s, got %s", t, clip(b))
	}
	return s, nil
}

func normaliseText(t Type) func([]byte) ([]byte, error) {
	return func(b []byte) ([]byte, error) {
		_, err := parseString(t, b)
		return b, err
	}
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

func normaliseEmbedding(b []byte) ([]byte, error) {
	var xs []float64
	if json.Unmarshal(b, &xs) != nil || b[0] != '[' {
		return nil, Errorf(Invalid, "expected a list of numbers, got %s", clip(b))
	}
	return b, nil
}

func normaliseTensor(b []byte) ([]byte, error) {
	shape, n, err := tensorShape(b)
	if err != nil {
		return nil, err
	}
	want := 1
	for _, d := range shape {
		if d < 0 {
			return nil, Errorf(Invalid, "tensor dimension %d is negative", d)
		}
		if d != 0 && want > MaxValueBytes/d {
			return nil, Errorf(Invalid, "tensor shape %v has more elements than a value of %d bytes can hold", shape, MaxValueBytes)
		}
		want *= d
	}
	if want != n {
		return nil, Errorf(Invalid, "tensor shape %v needs %d elements, data has %d", shape, want, n)
	}
	return b, nil
}

// tensorShape returns the declared shape and the number of scalar elements in data.
func tensorShape(b []byte) (shape []int, elements int, err error) {
	var t struct {
		Shape []int `json:"shape"`
		Data  []any `json:"data"`
	}
	if uerr := json.Unmarshal(b, &t); uerr != nil || t.Shape == nil || t.Data == nil {
		return nil, 0, Errorf(Invalid, `expected a tensor {"shape":[…],"data":[…]}, got %s`, clip(b))
	}
	n, err := countNumbers(t.Data)
	return t.Shape, n, err
}

func countNumbers(xs []any) (int, error) {
	n := 0
	for _, x := range xs {
		switch v := x.(type) {
		case float64:
			n++
		case []any:
			m, err := countNumbers(v)
			if err != nil {
				return 0, err
			}
			n += m
		default:
			return 0, Errorf(Invalid, "tensor data holds %v, which is not a number", v)
		}
	}
	return n, nil
}

func normaliseDelim(t Type, delim byte) func([]byte) ([]byte, error) {
	return func(b []byte) ([]byte, error) {
		if len(b) == 0 || b[0] != delim {
			return nil, Errorf(Invalid, "expected a JSON %s, got %s", t, clip(b))
		}
		return b, nil
	}
}

// clip shortens a value for an error message.
func clip(b []byte) string {
	const limit = 64
	if len(b) > limit {
		return string(b[:limit]) + "…"
	}
	return string(b)
}
