package shape

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestScanEnvelope(t *testing.T) {
	nest := func(n int) string { return `{"x":` + strings.Repeat("[", n) + strings.Repeat("]", n) + `,"model":"m"}` }
	tests := []struct {
		name, body string
		want       Envelope // offsets not compared
		err        string   // part of the error; "" = none
	}{
		{"minimal", `{"model":"m"}`, Envelope{Model: "m"}, ""},
		{"all keys", ` {"user":"u","safety_identifier":"s","prompt_cache_key":"p","stream":true,"model":"m"} `, Envelope{Model: "m", Stream: true, User: "u", SafetyIdentifier: "s", PromptCacheKey: "p"}, ""},
		{"no model", `{"messages":[]}`, Envelope{}, ""},
		{"model nested only", `{"a":{"model":"x"},"b":[{"model":"y"}]}`, Envelope{}, ""},
		{"model after a large nested value", `{"messages":[{"role":"user","content":"say \"model\":\"x\" }"}],"model":"m"}`, Envelope{Model: "m"}, ""},
		{"escaped value", `{"model":"caf\u00e9 \ud83d\ude00 \/"}`, Envelope{Model: "café 😀 /"}, ""},
		{"escaped key", `{"mod\u0065l":"m"}`, Envelope{Model: "m"}, ""},
		{"invalid UTF-8 is replaced as encoding/json does", "{\"model\":\"a\xffb\"}", Envelope{Model: "a\ufffdb"}, ""},
		{"null user", `{"model":"m","user":null}`, Envelope{Model: "m"}, ""},
		{"numeric user", `{"model":"m","user":17}`, Envelope{Model: "m"}, ""},
		{"stream false", `{"model":"m","stream":false}`, Envelope{Model: "m"}, ""},
		{"numbers", `{"a":-0.5e+10,"b":0,"c":1E-2,"model":"m"}`, Envelope{Model: "m"}, ""},
		{"deepest allowed", nest(MaxDepth - 1), Envelope{Model: "m"}, ""},

		{"too deep", nest(MaxDepth), Envelope{}, "nests deeper than 512"},
		{"very deep", nest(1 << 20), Envelope{}, "nests deeper than 512"},
		{"duplicate model", `{"model":"a","model":"b"}`, Envelope{}, `"model" occurs twice`},
		{"duplicate by escape", `{"model":"a","m\u006fdel":"b"}`, Envelope{}, `"model" occurs twice`},
		{"duplicate user", `{"model":"a","user":"x","user":"y"}`, Envelope{}, `"user" occurs twice`},
		{"other case", `{"model":"a","Model":"b"}`, Envelope{}, "differs from"},
		{"model null", `{"model":null}`, Envelope{}, "not a string"},
		{"model object", `{"model":{"id":"m"}}`, Envelope{}, "not a string"},
		{"empty", ``, Envelope{}, "not a JSON object"},
		{"array", `[]`, Envelope{}, "not a JSON object"},
		{"cut", `{"model":"m"`, Envelope{}, "expected ',' or '}'"},
		{"cut string", `{"model":"m`, Envelope{}, "does not end"},
		{"trailing", `{"model":"m"} x`, Envelope{}, "follows"},
		{"two objects", `{"model":"m"}{"model":"n"}`, Envelope{}, "follows"},
		{"trailing comma", `{"model":"m",}`, Envelope{}, "expected a key"},
		{"single quotes", `{'model':'m'}`, Envelope{}, "expected a key"},
		{"leading zero", `{"a":01,"model":"m"}`, Envelope{}, "expected ','"},
		{"bare minus", `{"a":-,"model":"m"}`, Envelope{}, "expected a value"},
		{"NaN", `{"a":NaN,"model":"m"}`, Envelope{}, "expected a value"},
		{"raw newline in string", "{\"model\":\"a\nb\"}", Envelope{}, "control character"},
		{"bad escape", `{"model":"\x41"}`, Envelope{}, "bad escape"},
		{"bad hex", `{"model":"\u00g0"}`, Envelope{}, `bad \u escape`},
		{"NUL", "{\"model\":\"m\"\x00}", Envelope{}, "expected ','"},
		{"byte order mark", "\xef\xbb\xbf{\"model\":\"m\"}", Envelope{}, "not a JSON object"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Scan([]byte(tt.body))
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.ModelEnd > 0 {
				var token string
				if err := json.Unmarshal([]byte(tt.body[got.ModelStart:got.ModelEnd]), &token); err != nil || token != got.Model {
					t.Errorf("offsets hold %q (%v), want the token of %q", tt.body[got.ModelStart:got.ModelEnd], err, got.Model)
				}
			}
			got.ModelStart, got.ModelEnd = 0, 0
			if got.StreamSet != strings.Contains(tt.body, `"stream"`) {
				t.Errorf("stream set: %v", got.StreamSet)
			}
			got.StreamSet = false
			if got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

// FuzzScanEnvelope holds the scanner against encoding/json: whatever the scanner
// accepts, encoding/json accepts with the same values; whatever it rejects is invalid
// JSON or one of the documented refusals; and rewriting changes the model token only.
func FuzzScanEnvelope(f *testing.F) {
	for _, s := range []string{
		`{"model":"m"}`, `{"model":"a\u0062","stream":true,"user":"\ud800","x":[1,{"model":2}]}`, `{"a":1e5,"model":"z" }`,
		`{"model":"a","model":"b"}`, `{"Model":"a"}`, "{\"model\":\"\xff\",\"safety_identifier\":null}", `{"prompt_cache_key":"\\"}`, `[1]`, `{"a":tru}`, `{"model":""}`,
	} {
		f.Add([]byte(s), "up/stream \"1\"")
	}
	f.Fuzz(func(t *testing.T, body []byte, name string) {
		e, err := Scan(body)
		var all map[string]json.RawMessage
		jerr := json.Unmarshal(body, &all)
		if err != nil {
			refusal := strings.Contains(err.Error(), "twice") || strings.Contains(err.Error(), "not a string") ||
				strings.Contains(err.Error(), "only in case") || strings.Contains(err.Error(), "nests deeper") || strings.Contains(err.Error(), "not a JSON object")
			if jerr == nil && !refusal {
				t.Fatalf("refused valid JSON %q: %v", body, err)
			}
			return
		}
		if jerr != nil {
			t.Fatalf("accepted %q, encoding/json says %v", body, jerr)
		}
		text := func(key string) string {
			var s string
			if json.Unmarshal(all[key], &s) != nil {
				return ""
			}
			return s
		}
		if e.Model != text("model") || e.User != text("user") || e.SafetyIdentifier != text("safety_identifier") || e.PromptCacheKey != text("prompt_cache_key") {
			t.Fatalf("%q: got %+v", body, e)
		}
		if e.Stream != (string(all["stream"]) == "true") {
			t.Fatalf("%q: stream %v", body, e.Stream)
		}
		if e.ModelEnd == 0 {
			return
		}
		parts := e.Rewrite(body, name)
		out := bytes.Join(parts[:], nil)
		if int64(len(out)) != parts.Size() {
			t.Fatalf("size %d of %d bytes", parts.Size(), len(out))
		}
		tail := body[e.ModelEnd:]
		if !bytes.HasPrefix(out, body[:e.ModelStart]) || !bytes.HasSuffix(out, tail) {
			t.Fatalf("%q became %q: more than the model changed", body, out)
		}
		want := name
		if name == "" {
			want = e.Model
		}
		var token string
		if err := json.Unmarshal(out[e.ModelStart:len(out)-len(tail)], &token); err != nil {
			t.Fatalf("token of %q: %v", out, err)
		}
		if utf8.ValidString(want) && token != want {
			t.Fatalf("token %q, want %q", token, want)
		}
	})
}

func TestReadUsage(t *testing.T) {
	tests := []struct {
		name, body string
		want       Usage
		ok         bool
	}{
		{"chat", `{"id":"x","usage":{"prompt_tokens":12,"completion_tokens":3,"total_tokens":15}}`, Usage{12, 3, true}, true},
		{"embeddings", `{"data":[],"usage":{"prompt_tokens":8,"total_tokens":8}}`, Usage{8, 0, true}, true},
		{"responses", `{"usage":{"input_tokens":5,"output_tokens":7}}`, Usage{5, 7, true}, true},
		{"response event", `{"type":"response.completed","response":{"id":"r","usage":{"input_tokens":5,"output_tokens":7}}}`, Usage{5, 7, true}, true},
		{"null in a chunk", `{"choices":[],"usage":null}`, Usage{}, false},
		{"only in text", `{"choices":[{"text":"\"usage\":{\"prompt_tokens\":9}"}]}`, Usage{}, false},
		{"negative", `{"usage":{"prompt_tokens":-1}}`, Usage{}, false},
		{"cut", `{"usage":{"prompt_tokens":1`, Usage{}, false},
	}
	for _, tt := range tests {
		if got, ok := ReadUsage([]byte(tt.body)); got != tt.want || ok != tt.ok {
			t.Errorf("%s: %+v %v, want %+v %v", tt.name, got, ok, tt.want, tt.ok)
		}
	}
}

// FuzzEndValue holds the reading from the end against the reading of everything: of valid
// JSON, what it says is what Value says.
func FuzzEndValue(f *testing.F) {
	for _, s := range []string{
		`{"id":"x","usage":{"prompt_tokens":12},"z":[1,{"usage":2}]}`, `{"usage":1,"a":{"usage":2}}`, `{"a":"x\"usage":1}`, `{"x\"usage":1}`, `{"a":[{"usage":1}]}`,
		`[{"usage":1}]`, `{"a":"usage","b":",\"usage\":3}"}`, "{ \"usage\" : 1 ,\n\"b\":2 }\n", `{"usage":1,"\u0075sage":2}`, `{"usage":1,"usage":{}}`, `{"usage":1,}`, `"usage":1}`,
		`{"pad":"` + strings.Repeat("x", endWindow) + `","usage":{}}`, `{"usage":{},"pad":"` + strings.Repeat("x", endWindow) + `"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		got, ok := endValue(body, `"usage"`)
		if !ok || !json.Valid(body) {
			return
		}
		if want, found := Value(body, "usage"); !found || !bytes.Equal(got, want) {
			t.Fatalf("%q: %q from the end, %q (%v) from the beginning", body, got, want, found)
		}
	})
}

// What stands at the end is found there, what stands elsewhere or deeper is not.
func TestEndValue(t *testing.T) {
	long := `"` + strings.Repeat("x", endWindow) + `"`
	for _, tt := range []struct {
		body, want string // "" = left to Value
	}{
		{`{"data":[1,2],"usage":{"prompt_tokens":1}}`, `{"prompt_tokens":1}`},
		{"{\"usage\" : null ,\r\n \"fingerprint\":\"f\" }\n", `null`},
		{`{"pad":` + long + `,"usage":{"a":[{}]},"b":{}}`, `{"a":[{}]}`},
		{`{"usage":{},"pad":` + long + `}`, ""},
		{`{"response":{"usage":{}}}`, ""},
		{`[{"usage":{}}]`, ""},
		{`{"a":"usage"}`, ""},
		{`{"x\"usage":1}`, ""},
		{`{"usage":1,}`, ""},
		{`{"usage":1]}`, ""},
		{`{"usage":{}} {}`, ""},
		{`{"usage"`, ""},
		{``, ""},
	} {
		got, ok := endValue([]byte(tt.body), `"usage"`)
		if !ok {
			got = nil
		}
		if string(got) != tt.want {
			t.Errorf("%.60s: %q, want %q", tt.body, got, tt.want)
		}
	}
}

// Usage objects that are read without encoding/json are read alike, and the others left to
// it; strings end where they end, wherever that is in a word.
func TestPlainUsage(t *testing.T) {
	for _, tt := range []struct {
		raw   string
		want  Usage
		plain bool
	}{
		{`{"prompt_tokens":12,"completion_tokens":180,"total_tokens":192}`, Usage{12, 180, true}, true},
		{`{ "input_tokens" : 3 , "output_tokens" : 4 , "x" : {"prompt_tokens":9} }`, Usage{3, 4, true}, true},
		{`{"prompt_tokens":1,"input_tokens":2,"prompt_tokens":5}`, Usage{5, 0, true}, true},
		{`{"completion_tokens":1}`, Usage{}, false},
		{`{"prompt_tokens":null,"input_tokens":7}`, Usage{7, 0, true}, false},
		{`{"prompt_tokens":1.5}`, Usage{}, false},
		{`{"prompt_tokens":1e2}`, Usage{}, false},
		{`{"prompt_tokens":-1}`, Usage{}, false},
		{`{"prompt_tokens":"1"}`, Usage{}, false},
		{`{"Prompt_Tokens":8}`, Usage{8, 0, true}, false},
		{`{"prompt\u005ftokens":8}`, Usage{8, 0, true}, false},
		{`{"prompt_tokens":99999999999999999999}`, Usage{}, false},
		{`{"prompt_tokens":18446744073709551615}`, Usage{1<<64 - 1, 0, true}, false},
		{`null`, Usage{}, false},
	} {
		if got, ok := plainUsage([]byte(tt.raw)); ok != tt.plain || ok && got != tt.want {
			t.Errorf("%s: %+v, %v", tt.raw, got, ok)
		}
		if got, ok := ReadUsage([]byte(`{"usage":` + tt.raw + `}`)); got != tt.want || ok != tt.want.Reported {
			t.Errorf("%s: %+v, %v from ReadUsage", tt.raw, got, ok)
		}
	}
	for n := range 40 {
		for _, tail := range []string{`"`, `\`, "\x1f", "\x00"} {
			if got := plainRun([]byte(strings.Repeat("é", n/2) + strings.Repeat("~", n%2) + tail + "abcdefgh")); got > n/2*2+n%2 {
				t.Errorf("%d plain bytes before %q at %d", got, tail, n)
			}
		}
	}
}
