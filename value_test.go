package outrigger_test

import (
	"bytes"
	"encoding/json"
	"math"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger"
)

func nested(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }

// TestParseValue: what each type accepts, and the canonical text it becomes.
func TestParseValue(t *testing.T) {
	const same = "\x00" // the canonical text is the text as given
	cases := []struct {
		typ       outrigger.Type
		raw, want string
	}{
		{outrigger.Float, "0.7", same},
		{outrigger.Float, "1", same},
		{outrigger.Float, " \t\r\n1.50 ", "1.50"},
		{outrigger.Float, "-0", same},
		{outrigger.Float, "1e-400", same}, // rounds to 0
		{outrigger.Float, "1.7976931348623157e308", same},
		{outrigger.Float, `"NaN"`, same},
		{outrigger.Float, `"Infinity"`, same},
		{outrigger.Float, `"-Infinity"`, same},

		{outrigger.Integer, "3", same},
		{outrigger.Integer, "-3", same},
		{outrigger.Integer, "-0", "0"},
		{outrigger.Integer, "5.0", "5"},
		{outrigger.Integer, "-5.000", "-5"},
		{outrigger.Integer, "1e3", "1000"},
		{outrigger.Integer, "1.5E+1", "15"},
		{outrigger.Integer, "1500e-2", "15"},
		{outrigger.Integer, "0.05e2", "5"},
		{outrigger.Integer, "0e99999999999999999999", "0"},
		{outrigger.Integer, "-0.0e-99999999999999999999", "0"},
		{outrigger.Integer, "9223372036854775807", same},
		{outrigger.Integer, "9223372036854775807.0", "9223372036854775807"},
		{outrigger.Integer, "922337203685477580.7e1", "9223372036854775807"},
		{outrigger.Integer, "-9223372036854775808", same},
		{outrigger.Integer, "-9223372036854775808.0", "-9223372036854775808"},
		{outrigger.Integer, "9007199254740993.0", "9007199254740993"}, // 2^53+1 is no float
		{outrigger.Integer, "1" + strings.Repeat("0", 1000) + "e-1000", "1"},
		{outrigger.Integer, "0." + strings.Repeat("0", 999) + "1e1000", "1"},

		{outrigger.String, `"hi"`, same},
		{outrigger.String, `""`, same},
		{outrigger.String, `"gr\u00fcn\n"`, same},
		{outrigger.Choice, `"gpt-4"`, same},
		{outrigger.Module, `"ChainOfThought"`, same},

		{outrigger.Boolean, "true", same},
		{outrigger.Boolean, `"true"`, "true"},
		{outrigger.Boolean, "1", "true"},
		{outrigger.Boolean, "false", same},
		{outrigger.Boolean, `"false"`, "false"},
		{outrigger.Boolean, "0", "false"},

		{outrigger.Embedding, "[]", same},
		{outrigger.Embedding, "[1, -2.5,\n3e-7]", same},

		{outrigger.Tensor, `{"shape":[2],"data":[1,2]}`, same},
		{outrigger.Tensor, `{"shape":[2,3],"data":[[1,2,3],[4,5,6]]}`, same},
		{outrigger.Tensor, `{"shape":[2,3],"data":[1,2,3,4,5,6],"dtype":"f32"}`, same},
		{outrigger.Tensor, `{"shape":[],"data":[7]}`, same},
		{outrigger.Tensor, `{"shape":[0],"data":[]}`, same},
		{outrigger.Tensor, `{"shape":[9223372036854775807,0],"data":[]}`, same},
		{outrigger.Tensor, `{"shape":[0,9223372036854775807],"data":[]}`, same},
		{outrigger.Tensor, `{"shape":[1],"data":` + strings.Repeat("[", 100) + "1" + strings.Repeat("]", 100) + `}`, same},

		{outrigger.Map, "{}", same},
		{outrigger.Map, `{"a":{"a":[{"a":null},{"a":1}]},"b":"\"}"}`, same},
		{outrigger.List, "[]", same},
		{outrigger.List, `[1,"a",null,{"b":[]}]`, same},
		{outrigger.List, nested(outrigger.MaxNesting), same},
	}
	for _, c := range cases {
		v, err := outrigger.ParseValue(c.typ, []byte(c.raw), nil)
		want := c.want
		if want == same {
			want = c.raw
		}
		if err != nil || v.Type != c.typ || string(v.JSON) != want || v.Binary != nil {
			t.Errorf("%s %.60s: %s %.60s, %v", c.typ, c.raw, v.Type, v.JSON, err)
		}
	}
}

func TestParseValueRefuses(t *testing.T) {
	tensor := `expected a tensor {"shape":[…],"data":[…]}, got `
	cases := []struct {
		typ       outrigger.Type
		raw, want string
	}{
		{"", "1", `unknown type: ""; one of float, integer, string, boolean, choice, module, embedding, tensor, map, list`},
		{"Float", "1", `unknown type: "Float"`},
		{outrigger.Type(strings.Repeat("x", 1000)), "1", `unknown type: "xxx`},

		{outrigger.Float, "", "value of type float is not valid JSON: "},
		{outrigger.Float, "1 2", "not valid JSON: 1 2"},
		{outrigger.Float, "\u00a01", "not valid JSON"}, // a space, but not to JSON
		{outrigger.Float, "NaN", "not valid JSON: NaN"},
		{outrigger.Float, "0x10", "not valid JSON"},
		{outrigger.Float, "-inf", "not valid JSON"},
		{outrigger.Float, "01", "not valid JSON"},
		{outrigger.String, "\"\xff\"", "value of type string is not valid UTF-8: \"\ufffd\""},
		{outrigger.Float, `"nan"`, `expected a number or "NaN", "Infinity", "-Infinity", got "nan"`},
		{outrigger.Float, "true", "got true"},
		{outrigger.Float, "null", "got null"},
		{outrigger.Float, "1e400", "number 1e400 does not fit a 64-bit float"},
		{outrigger.Float, "1" + strings.Repeat("0", 400), "does not fit"},

		{outrigger.Integer, `"3"`, `expected an integer, got "3"`},
		{outrigger.Integer, "null", "expected an integer, got null"},
		{outrigger.Integer, "1.5", "expected a whole number within 64 bits, got 1.5"},
		{outrigger.Integer, "15e-1", "got 15e-1"},
		{outrigger.Integer, "1.00000000000000000001", "whole number"}, // 1 to a float
		{outrigger.Integer, "9223372036854775808", "within 64 bits"},
		{outrigger.Integer, "9.223372036854775808e18", "within 64 bits"},
		{outrigger.Integer, "-9223372036854775809", "within 64 bits"},
		{outrigger.Integer, "1e19", "within 64 bits"},
		{outrigger.Integer, "1e99999999999999999999", "within 64 bits"},
		{outrigger.Integer, "1e-99999999999999999999", "within 64 bits"},
		{outrigger.Integer, "1e2147483647", "within 64 bits"},

		{outrigger.String, "1", "expected a string, got 1"},
		{outrigger.String, "null", "expected a string, got null"},
		{outrigger.Choice, "[]", "expected a choice, got []"},
		{outrigger.Module, "{}", "expected a module, got {}"},
		{outrigger.Boolean, "2", "expected a boolean, got 2"},
		{outrigger.Boolean, `"True"`, "expected a boolean"},
		{outrigger.Boolean, "null", "expected a boolean"},

		{outrigger.Embedding, "1", "expected a list of numbers, got 1"},
		{outrigger.Embedding, "null", "expected a list of numbers, got null"},
		{outrigger.Embedding, "[1,null]", "expected a list of numbers, got one that holds null"},
		{outrigger.Embedding, `[1,"2"]`, `holds "2"`},
		{outrigger.Embedding, "[[1]]", "holds ["},
		{outrigger.Embedding, "[{}]", "holds {"},
		{outrigger.Embedding, "[1e400]", "number 1e400 does not fit"},

		{outrigger.Tensor, "[]", tensor + "[]"},
		{outrigger.Tensor, "null", tensor},
		{outrigger.Tensor, `{"shape":[1]}`, tensor},
		{outrigger.Tensor, `{"data":[1]}`, tensor},
		{outrigger.Tensor, `{"shape":null,"data":[1]}`, tensor},
		{outrigger.Tensor, `{"shape":[1],"data":1}`, tensor},
		{outrigger.Tensor, `{"Shape":[1],"DATA":[1]}`, tensor}, // other readers tell the cases apart
		{outrigger.Tensor, `{"shape":[null],"data":[]}`, "tensor shape [null] is not a list of integers"},
		{outrigger.Tensor, `{"shape":[1.0],"data":[1]}`, "tensor shape [1.0] is not a list of integers"},
		{outrigger.Tensor, `{"shape":[[1]],"data":[1]}`, "is not a list of integers"},
		{outrigger.Tensor, `{"shape":[1e3],"data":[1]}`, "is not a list of integers"},
		{outrigger.Tensor, `{"shape":[9223372036854775808],"data":[1]}`, "is not a list of integers"},
		{outrigger.Tensor, `{"shape":[-1],"data":[1]}`, "tensor dimension -1 is negative"},
		{outrigger.Tensor, `{"shape":[0,-1],"data":[]}`, "tensor dimension -1 is negative"},
		{outrigger.Tensor, `{"shape":[2,2],"data":[1,2,3]}`, "tensor shape [2 2] needs 4 elements, data has 3"},
		{outrigger.Tensor, `{"shape":[],"data":[]}`, "tensor shape [] needs 1 elements, data has 0"},
		{outrigger.Tensor, `{"shape":[4294967296,4294967296],"data":[]}`, "tensor shape [4294967296 4294967296] has more elements than a value of 4194304 bytes can hold"},
		{outrigger.Tensor, `{"shape":[9223372036854775807,2],"data":[1]}`, "more elements"},
		{outrigger.Tensor, `{"shape":[` + strings.Repeat("1,", 999) + `1],"data":[]}`, "tensor shape of 1000 dimensions needs 1 elements, data has 0"},
		{outrigger.Tensor, `{"shape":[2],"data":[1,null]}`, "expected a list of numbers, got one that holds null"},
		{outrigger.Tensor, `{"shape":[2],"data":[1,{"a":1}]}`, "holds {"},
		{outrigger.Tensor, `{"shape":[2],"shape":[1],"data":[1]}`, `has the key "shape" twice in one object`},

		{outrigger.Map, "[]", "expected a JSON map, got []"},
		{outrigger.Map, "null", "expected a JSON map, got null"},
		{outrigger.Map, `{"a":1,"b":2,"a":3}`, `value of type map has the key "a" twice in one object; readers would differ on which counts`},
		{outrigger.Map, `{"a":[{"x":{},"x":[]}]}`, `the key "x" twice`},
		{outrigger.Map, `{"a":1,"\u0061":2}`, `the key "a" twice`},
		{outrigger.List, "{}", "expected a JSON list, got {}"},
		{outrigger.List, `[{"":0,"":0}]`, `the key "" twice`},
		{outrigger.List, nested(outrigger.MaxNesting + 1), "value of type list nests 129 levels deep, the limit is 128; flatten it"},
		{outrigger.List, nested(outrigger.MaxValueBytes / 2), "nests 2097152 levels deep"},
		{outrigger.List, strings.Repeat("[", outrigger.MaxValueBytes), "nests 4194304 levels deep"},
		{outrigger.Map, strings.Repeat(`{"a":`, 200) + "1" + strings.Repeat("}", 200), "nests 200 levels deep"},
	}
	for _, c := range cases {
		v, err := outrigger.ParseValue(c.typ, []byte(c.raw), nil)
		wantError(t, err, outrigger.Invalid, c.want)
		if v.JSON != nil || v.Type != "" {
			t.Errorf("%s %.60s: an error came with %v", c.typ, c.raw, v)
		}
		if err != nil && (len(err.Error()) > 400 || !utf8.ValidString(err.Error())) {
			t.Errorf("%s %.60s: the error is no short UTF-8 text: %.500q", c.typ, c.raw, err)
		}
	}
}

// Errors quote at most 64 bytes of a value and never half a character.
func TestErrorsQuoteWholeCharacters(t *testing.T) {
	for n := 60; n <= 66; n++ {
		text := strings.Repeat("x", n) + "日本日本"
		_, err := outrigger.ParseValue(outrigger.Integer, []byte(`"`+text+`"`), nil)
		wantError(t, err, outrigger.Invalid, "expected an integer, got \""+strings.Repeat("x", 60))
		quoted := strings.TrimPrefix(err.Error(), "expected an integer, got ")
		if !strings.HasSuffix(quoted, "…") || strings.Contains(quoted, "\ufffd") || len(quoted) > 64+len("…") {
			t.Errorf("%d: %q", n, quoted)
		}
	}
}

func TestParseValueSize(t *testing.T) {
	full := []byte(`"` + strings.Repeat("x", outrigger.MaxValueBytes-2) + `"`)
	if _, err := outrigger.ParseValue(outrigger.String, full, nil); err != nil {
		t.Errorf("a value of exactly the limit: %v", err)
	}
	_, err := outrigger.ParseValue(outrigger.String, append(full, ' '), nil)
	wantError(t, err, outrigger.Exhausted, "value is 4194305 bytes, the limit is 4194304; store a reference instead")
	_, err = outrigger.ParseValue(outrigger.Tensor, []byte("{}"), make([]byte, outrigger.MaxValueBytes))
	wantError(t, err, outrigger.Exhausted, "value is 4194306 bytes")
}

// A binary part is carried; the JSON beside it describes it and is of no declared form.
func TestParseValueBinary(t *testing.T) {
	payload := []byte{0x80, 0x04, 0xff}
	described := ` {"shape":[2],"dtype":"f4","binary_format":"pickle","type":"tensor"} `
	v, err := outrigger.ParseValue(outrigger.Tensor, []byte(described), payload)
	if err != nil || string(v.JSON) != strings.TrimSpace(described) || !bytes.Equal(v.Binary, payload) {
		t.Fatalf("%s %x: %v", v.JSON, v.Binary, err)
	}
	// Nothing in it can be checked, so no constraint applies.
	if err := (outrigger.Constraints{Shape: []int{9}}).Check(v); err != nil {
		t.Errorf("check: %v", err)
	}
	for raw, want := range map[string]string{
		"":              "not valid JSON",
		`{"a":1,"a":2}`: "twice",
		nested(1000):    "levels deep",
		"\"\xff\"":      "not valid UTF-8",
	} {
		_, err := outrigger.ParseValue(outrigger.Tensor, []byte(raw), payload)
		wantError(t, err, outrigger.Invalid, want)
	}
	// An empty binary part is none.
	if v, err := outrigger.ParseValue(outrigger.Float, []byte("1"), []byte{}); err != nil || v.Binary != nil {
		t.Errorf("%v, %v", v, err)
	}
}

func TestValueAccessors(t *testing.T) {
	value := func(typ outrigger.Type, raw string) outrigger.Value {
		return outrigger.Value{Type: typ, JSON: []byte(raw)}
	}
	floats := map[string]float64{"0.5": 0.5, "3": 3, `"Infinity"`: math.Inf(1), `"-Infinity"`: math.Inf(-1)}
	for raw, want := range floats {
		if got, err := value(outrigger.Float, raw).Float64(); err != nil || got != want {
			t.Errorf("%s: %v, %v", raw, got, err)
		}
	}
	if got, err := value(outrigger.Float, `"NaN"`).Float64(); err != nil || !math.IsNaN(got) {
		t.Errorf("NaN: %v, %v", got, err)
	}
	for _, raw := range []string{"", `"x"`, "true", "0x10", "-inf", "1_000"} {
		_, err := value(outrigger.Float, raw).Float64()
		wantError(t, err, outrigger.Invalid, "expected a number")
	}
	if got, err := value(outrigger.Choice, `"a\u00df\n"`).Text(); err != nil || got != "aß\n" {
		t.Errorf("%q, %v", got, err)
	}
	for _, raw := range []string{"", "1", "null", `"open`} {
		_, err := value(outrigger.Module, raw).Text()
		wantError(t, err, outrigger.Invalid, "expected a module")
	}
}

func TestValueEqual(t *testing.T) {
	a := outrigger.Value{Type: outrigger.Float, JSON: []byte("1"), Binary: []byte{1}}
	for name, b := range map[string]outrigger.Value{
		"type":   {Type: outrigger.Integer, JSON: []byte("1"), Binary: []byte{1}},
		"json":   {Type: outrigger.Float, JSON: []byte("1.0"), Binary: []byte{1}},
		"binary": {Type: outrigger.Float, JSON: []byte("1")},
	} {
		if a.Equal(b) || b.Equal(a) {
			t.Errorf("values that differ in %s are equal", name)
		}
	}
	if !a.Equal(outrigger.Value{Type: outrigger.Float, JSON: []byte("1"), Binary: []byte{1}}) {
		t.Error("equal values are not")
	}
}

// TestConstraints: declaration, value, and the exact text of the refusal ("" = accepted).
func TestConstraints(t *testing.T) {
	long := strings.Repeat("x", 1000)
	cases := []struct {
		typ              outrigger.Type
		constraints, raw string
		want             string
	}{
		{outrigger.Float, `{"min":0,"max":1}`, "0.5", ""},
		{outrigger.Float, `{"min":0,"max":1}`, "1", ""},
		{outrigger.Float, `{"min":0,"max":1}`, "0", ""},
		{outrigger.Float, `{"max":1.0}`, "1.5", "value 1.5 is above maximum 1.0"},
		{outrigger.Float, `{"min":0}`, "-0.1", "value -0.1 is below minimum 0.0"},
		{outrigger.Float, `{"max":2.5}`, "3", "value 3 is above maximum 2.5"},
		{outrigger.Float, `{"max":1000000}`, "1000001", "value 1000001 is above maximum 1000000.0"},
		{outrigger.Float, `{"min":1e-7}`, "0", "value 0 is below minimum 1e-07"},
		{outrigger.Float, `{"max":1e300}`, "1.1e300", "value 1.1e300 is above maximum 1e+300"},
		{outrigger.Float, `{"max":1}`, "1" + strings.Repeat("0", 100), "value 1" + strings.Repeat("0", 63) + "… is above maximum 1.0"},
		{outrigger.Float, `{"min":0,"max":1}`, `"NaN"`, ""},
		{outrigger.Float, `{"min":0,"max":1}`, `"Infinity"`, ""},
		{outrigger.Float, `{"min":0,"max":1}`, `"-Infinity"`, ""},
		{outrigger.Integer, `{"min":1,"max":10}`, "10.0", ""},
		{outrigger.Integer, `{"max":10}`, "11", "value 11 is above maximum 10"},
		{outrigger.Integer, `{"max":1000000}`, "1000001", "value 1000001 is above maximum 1000000"},
		{outrigger.Integer, `{"min":1}`, "0", "value 0 is below minimum 1"},
		{outrigger.Integer, `{"max":10.5}`, "10", ""},
		{outrigger.Integer, `{"max":10.5}`, "11", "value 11 is above maximum 10.5"},
		{outrigger.Integer, `{"min":-10.5}`, "-10", ""},
		{outrigger.Integer, `{"min":-10.5}`, "-11", "value -11 is below minimum -10.5"},
		{outrigger.Integer, `{"max":9007199254740992}`, "9007199254740992", ""},
		{outrigger.Integer, `{"max":9007199254740992}`, "9007199254740993", "value 9007199254740993 is above maximum 9007199254740992"},
		{outrigger.Integer, `{"min":-9007199254740992}`, "-9007199254740993", "value -9007199254740993 is below minimum -9007199254740992"},
		{outrigger.Integer, `{"min":-1e300,"max":1e300}`, "9223372036854775807", ""},
		{outrigger.Integer, `{"min":1e300}`, "9223372036854775807", "value 9223372036854775807 is below minimum 1e+300"},

		{outrigger.String, `{"min_length":2,"max_length":3}`, `"日本"`, ""},
		{outrigger.String, `{"min_length":2}`, `"日"`, "string length 1 is below minimum length 2"},
		{outrigger.String, `{"max_length":3}`, `"日本日本"`, "string length 4 is above maximum length 3"},
		{outrigger.String, `{"max_length":0}`, `""`, ""},
		{outrigger.String, `{"enum":["a","b"]}`, `"b"`, ""},
		{outrigger.String, `{"enum":["a","b"]}`, `"c"`, `value "c" is not one of ["a" "b"]`},
		{outrigger.String, `{"pattern":"^[a-z]+$"}`, `"abc"`, ""},
		{outrigger.String, `{"pattern":"^[a-z]+$"}`, `"ABC"`, `value "ABC" does not match pattern "^[a-z]+$"`},
		{outrigger.String, `{"pattern":"b"}`, `"abc"`, ""}, // unanchored
		{outrigger.String, `{"pattern":"a(b"}`, `"xa(by"`, ""},
		{outrigger.String, `{"pattern":"a(b"}`, `"ab"`, `value "ab" does not match pattern "a(b"`}, // no expression: literal
		{outrigger.String, `{"pattern":"y"}`, `"` + long + `"`, `value "` + long[:64] + `…" does not match pattern "y"`},
		{outrigger.String, `{}`, `"` + long + `"`, ""},

		{outrigger.Choice, `{"choices":["a","b"]}`, `"a"`, ""},
		{outrigger.Choice, `{"choices":["a","b"]}`, `"c"`, `value "c" is not one of the allowed choices ["a" "b"]`},
		{outrigger.Choice, `{"choices":[]}`, `"anything"`, ""},
		{outrigger.Choice, `{"choices":["0","1","2","3","4","5","6","7","8","9","a","b","c","d","e","f","g","h"]}`, `"x"`,
			`value "x" is not one of the allowed choices ["0" "1" "2" "3" "4" "5" "6" "7" "8" "9" "a" "b" "c" "d" "e" "f" and 2 more]`},
		{outrigger.Module, `{"choices":["Predict"],"allowed_modules":["ReAct"]}`, `"ReAct"`, ""},
		{outrigger.Module, `{"allowed_modules":["ReAct"]}`, `"os"`, `value "os" is not one of the allowed choices ["ReAct"]`},

		{outrigger.Embedding, `{"dimensions":2}`, "[1,2]", ""},
		{outrigger.Embedding, `{"dimensions":2}`, "[1]", "embedding has 1 dimensions, expected 2"},
		{outrigger.Embedding, `{"dimensions":0}`, "[]", ""},
		{outrigger.Tensor, `{"shape":[2,1]}`, `{"shape":[2,1],"data":[1,2]}`, ""},
		{outrigger.Tensor, `{"shape":[2,1]}`, `{"shape":[1,2],"data":[1,2]}`, "tensor has shape [1 2], expected [2 1]"},
		{outrigger.Boolean, ``, "true", ""},
		{outrigger.Map, ``, "{}", ""},
		{outrigger.List, ``, "[]", ""},
	}
	for _, c := range cases {
		limits, err := outrigger.ParseConstraints(c.constraints)
		if err != nil {
			t.Fatalf("%s: %v", c.constraints, err)
		}
		if err := limits.ValidateFor(c.typ); err != nil {
			t.Errorf("%s for %s: %v", c.constraints, c.typ, err)
		}
		v, err := outrigger.ParseValue(c.typ, []byte(c.raw), nil)
		if err != nil {
			t.Fatalf("%s %s: %v", c.typ, c.raw, err)
		}
		switch err := limits.Check(v); {
		case c.want == "" && err != nil:
			t.Errorf("%s %.80s under %s: %v", c.typ, c.raw, c.constraints, err)
		case c.want != "" && (err == nil || err.Error() != c.want || outrigger.KindOf(err) != outrigger.Invalid):
			t.Errorf("%s %.80s under %s: %v, want %s", c.typ, c.raw, c.constraints, err, c.want)
		}
	}
}

func TestParseConstraintsRefuses(t *testing.T) {
	cases := []struct{ raw, want string }{
		{`{`, "constraints_json is not valid JSON: {"},
		{`{"min":0} {"max":1}`, "not valid JSON"},
		{`[]`, "expected constraints_json to be an object, got []"},
		{`"min"`, "expected constraints_json to be an object"},
		{`{"minimum":0}`, `constraints_json has the unknown key "minimum"; use min, max, min_length, max_length, pattern, enum, choices, allowed_modules, dimensions, shape`},
		{`{"Min":0}`, `unknown key "Min"`},
		{`{"min":0,"min":5}`, `constraints_json has the key "min" twice in one object`},
		{`{"min":"0"}`, `constraints_json {"min":"0"}: `},
		{`{"min_length":1.5}`, "min_length"},
		{`{"choices":"a"}`, "choices"},
		{"{\"pattern\":\"\xff\"}", "not valid UTF-8"},
		{nested(200), "nests 200 levels deep"},
	}
	for _, c := range cases {
		_, err := outrigger.ParseConstraints(c.raw)
		wantError(t, err, outrigger.Invalid, c.want)
	}
	for _, raw := range []string{
		`{"pattern":"` + strings.Repeat("x", outrigger.MaxConstraintsBytes) + `"}`,
		`{"enum":["` + strings.Repeat("\u2028", 15000) + `"]}`, // 45 kB, but 90 kB when written with escapes
	} {
		_, err := outrigger.ParseConstraints(raw)
		wantError(t, err, outrigger.Exhausted, "the limit is 65536; list fewer choices")
	}
	for _, raw := range []string{"", "  \n", "{}", "null", `{"min":null,"enum":[]}`} {
		c, err := outrigger.ParseConstraints(raw)
		if err != nil || c.JSON() != "" {
			t.Errorf("%q: %q, %v", raw, c.JSON(), err)
		}
	}
}

func TestConstraintsValidateFor(t *testing.T) {
	nan, inf, one, two, minus := math.NaN(), math.Inf(1), 1.0, 2.0, -1
	three, four := 3, 4
	cases := []struct {
		typ  outrigger.Type
		c    outrigger.Constraints
		want string // "" = valid
	}{
		{outrigger.Float, outrigger.Constraints{Min: &one, Max: &two}, ""},
		{outrigger.Float, outrigger.Constraints{Min: &one, Max: &one}, ""},
		{outrigger.Float, outrigger.Constraints{Min: &two, Max: &one}, "constraint min 2 is above max 1"},
		{outrigger.Float, outrigger.Constraints{Min: &nan}, "constraint min is NaN; give a finite number or leave it out"},
		{outrigger.Integer, outrigger.Constraints{Max: &inf}, "constraint max is +Inf"},
		{outrigger.String, outrigger.Constraints{Min: &one}, "constraint min does not apply to type string (allowed: min_length, max_length, pattern, enum)"},
		{outrigger.Boolean, outrigger.Constraints{Choices: []string{"a"}}, "constraint choices does not apply to type boolean (allowed: )"},
		{outrigger.String, outrigger.Constraints{MinLength: &three, MaxLength: &four, Pattern: "x", Enum: []string{"xxx"}}, ""},
		{outrigger.String, outrigger.Constraints{MinLength: &four, MaxLength: &three}, "constraint min_length 4 is above max_length 3"},
		{outrigger.String, outrigger.Constraints{MaxLength: &minus}, "constraint max_length is -1; it counts something, so give 0 or more"},
		{outrigger.Embedding, outrigger.Constraints{Dimensions: &minus}, "constraint dimensions is -1"},
		{outrigger.Tensor, outrigger.Constraints{Shape: []int{2, -1}}, "constraint shape can never be met: tensor dimension -1 is negative"},
		{outrigger.Tensor, outrigger.Constraints{Shape: []int{1 << 40, 1 << 40}}, "constraint shape can never be met"},
		{outrigger.String, outrigger.Constraints{Pattern: "a(b"}, ""}, // matched literally
		{outrigger.String, outrigger.Constraints{Pattern: strings.Repeat("x", 1025)}, "constraint pattern is 1025 bytes long, the limit is 1024; shorten it"},
		{outrigger.String, outrigger.Constraints{Pattern: "(abcdefghij){1000}"}, "instructions, the limit is 5000; lower its repeat counts"},
		{outrigger.String, outrigger.Constraints{Pattern: "a{1001}"}, "is too large (invalid repeat count); lower its repeat counts"},
		{outrigger.String, outrigger.Constraints{Pattern: "((a{100}){100}){100}"}, "is too large"},
	}
	for _, c := range cases {
		err := c.c.ValidateFor(c.typ)
		if c.want != "" {
			wantError(t, err, outrigger.Invalid, c.want)
		} else if err != nil {
			t.Errorf("%+v for %s: %v", c.c, c.typ, err)
		}
	}
	every := outrigger.Constraints{Min: &one, Max: &two, MinLength: &three, MaxLength: &four, Pattern: "p",
		Enum: []string{"e"}, Choices: []string{"c"}, AllowedModules: []string{"m"}, Dimensions: &three, Shape: []int{1}}
	if err := every.ValidateFor(outrigger.Map); err == nil {
		t.Error("a map takes no constraints")
	}
	// A field that this list of types does not know would be accepted everywhere.
	fields := reflect.TypeFor[outrigger.Constraints]()
	for i := range fields.NumField() {
		only := outrigger.Constraints{}
		reflect.ValueOf(&only).Elem().Field(i).Set(reflect.ValueOf(every).Field(i))
		err := only.ValidateFor(outrigger.Map)
		name, _, _ := strings.Cut(fields.Field(i).Tag.Get("json"), ",")
		wantError(t, err, outrigger.Invalid, "constraint "+name+" does not apply to type map")
		if back, err := outrigger.ParseConstraints(only.JSON()); err != nil || !reflect.DeepEqual(back, only) {
			t.Errorf("%s: %s is read back as %+v, %v", name, only.JSON(), back, err)
		}
	}
}

// A pattern that is cheap on a short string may cost minutes on a long one: the product
// is bounded, not only the parts.
func TestPatternCostIsBounded(t *testing.T) {
	c := outrigger.Constraints{Pattern: "^([ab]{1,15}c?){40}$"}
	if err := c.ValidateFor(outrigger.String); err != nil {
		t.Fatal(err)
	}
	value := func(n int) outrigger.Value {
		return outrigger.Value{Type: outrigger.String, JSON: []byte(`"` + strings.Repeat("a", n) + `"`)}
	}
	if err := c.Check(value(40)); err != nil {
		t.Error(err)
	}
	wantError(t, c.Check(value(1<<20)), outrigger.Exhausted, "the limit is 67108864; shorten the value or the pattern")
	// Nobody is forced to validate first.
	wantError(t, outrigger.Constraints{Pattern: "(abcdefghij){1000}"}.Check(value(1)), outrigger.Invalid, "instructions")
}

// TestHostileValuesStayCheap: texts that are small for their structure cost no more
// memory than a few times their size. Decoding into []any took 60 bytes per element.
func TestHostileValuesStayCheap(t *testing.T) {
	raw := []byte(`{"shape":[0],"data":[` + strings.Repeat("[],", 1<<19) + `[]]}`)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := outrigger.ParseValue(outrigger.Tensor, raw, nil); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if spent := after.TotalAlloc - before.TotalAlloc; spent > 6*uint64(len(raw)) {
		t.Errorf("%d bytes allocated to check %d", spent, len(raw))
	}
}

// FuzzParseValue: an accepted value is JSON that reads back as itself, errors are short
// UTF-8 texts, and checking constraints never panics.
func FuzzParseValue(f *testing.F) {
	for _, raw := range []string{"1", "5.0", "1e3", `"NaN"`, "true", `"x"`, "[1,2]", `{"shape":[1],"data":[1]}`, `{"a":{"a":1}}`,
		"[[[]]]", `{"a":1,"\u0061":2}`, "\xff", "-9223372036854775808.0", `{"`, "]", `{"shape":[0,99999999999],"data":[[]]}`} {
		for i := range outrigger.Types() {
			f.Add(uint8(i), []byte(raw), []byte(nil), `{"min":0,"pattern":"a+","shape":[1],"dimensions":2}`)
		}
		f.Add(uint8(2), []byte(raw), []byte{1}, `{"enum":["x"],"pattern":"("}`)
	}
	types := outrigger.Types()
	f.Fuzz(func(t *testing.T, i uint8, raw, binary []byte, constraints string) {
		typ := types[int(i)%len(types)]
		c, err := outrigger.ParseConstraints(constraints)
		if err == nil {
			_ = c.Check(outrigger.Value{Type: typ, JSON: raw}) // garbage in, error or not, but no panic
		}
		v, err := outrigger.ParseValue(typ, raw, binary)
		if err != nil {
			if k := outrigger.KindOf(err); k != outrigger.Invalid && k != outrigger.Exhausted || len(err.Error()) > 500 || !utf8.ValidString(err.Error()) {
				t.Fatalf("%s %q: %s %q", typ, raw, k, err)
			}
			return
		}
		if !json.Valid(v.JSON) || !utf8.Valid(v.JSON) || v.Type != typ || !bytes.Equal(v.Binary, binary) {
			t.Fatalf("%s %q became %s %q", typ, raw, v.Type, v.JSON)
		}
		if again, err := outrigger.ParseValue(typ, v.JSON, v.Binary); err != nil || !again.Equal(v) {
			t.Fatalf("%s %q became %q and that %q, %v", typ, raw, v.JSON, again.JSON, err)
		}
		if err := c.Check(v); err != nil && !utf8.ValidString(err.Error()) {
			t.Fatalf("%q", err)
		}
		if len(v.Binary) > 0 {
			return
		}
		switch typ {
		case outrigger.Float, outrigger.Integer:
			_, err = v.Float64()
		case outrigger.String, outrigger.Choice, outrigger.Module:
			_, err = v.Text()
		}
		if err != nil {
			t.Fatalf("%s %q cannot be read: %v", typ, v.JSON, err)
		}
	})
}

// FuzzParseConstraints: accepted constraints survive being written and read again.
func FuzzParseConstraints(f *testing.F) {
	for _, raw := range []string{"", "{}", "null", `{"min":0,"max":1e20}`, `{"min_length":1,"max_length":2,"pattern":"(","enum":["a","<&>"]}`,
		`{"choices":["\u2028"],"allowed_modules":[null]}`, `{"dimensions":3}`, `{"shape":[1,0]}`, `{"MIN":1}`, `{"min":0,"min":1}`} {
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		c, err := outrigger.ParseConstraints(raw)
		if err != nil {
			if k := outrigger.KindOf(err); k != outrigger.Invalid && k != outrigger.Exhausted || !utf8.ValidString(err.Error()) {
				t.Fatalf("%q: %s %q", raw, k, err)
			}
			return
		}
		text := c.JSON()
		again, err := outrigger.ParseConstraints(text)
		if err != nil || again.JSON() != text {
			t.Fatalf("%q became %q and that %q, %v", raw, text, again.JSON(), err)
		}
		for _, typ := range outrigger.Types() {
			if err := c.ValidateFor(typ); err != nil && (!outrigger.IsKind(err, outrigger.Invalid) || !utf8.ValidString(err.Error())) {
				t.Fatalf("%q for %s: %v", raw, typ, err)
			}
		}
	})
}
