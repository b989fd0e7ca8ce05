package inference

import (
	"bytes"
	"encoding/json"
	"io"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestScanEnvelope(t *testing.T) {
	nest := func(n int) string { return `{"x":` + strings.Repeat("[", n) + strings.Repeat("]", n) + `,"model":"m"}` }
	tests := []struct {
		name, body string
		want       envelope // offsets not compared
		err        string   // part of the error; "" = none
	}{
		{"minimal", `{"model":"m"}`, envelope{model: "m"}, ""},
		{"all keys", ` {"user":"u","safety_identifier":"s","prompt_cache_key":"p","stream":true,"model":"m"} `, envelope{model: "m", stream: true, user: "u", safetyIdentifier: "s", promptCacheKey: "p"}, ""},
		{"no model", `{"messages":[]}`, envelope{}, ""},
		{"model nested only", `{"a":{"model":"x"},"b":[{"model":"y"}]}`, envelope{}, ""},
		{"model after a large nested value", `{"messages":[{"role":"user","content":"say \"model\":\"x\" }"}],"model":"m"}`, envelope{model: "m"}, ""},
		{"escaped value", `{"model":"caf\u00e9 \ud83d\ude00 \/"}`, envelope{model: "café 😀 /"}, ""},
		{"escaped key", `{"mod\u0065l":"m"}`, envelope{model: "m"}, ""},
		{"invalid UTF-8 is replaced as encoding/json does", "{\"model\":\"a\xffb\"}", envelope{model: "a\ufffdb"}, ""},
		{"null user", `{"model":"m","user":null}`, envelope{model: "m"}, ""},
		{"numeric user", `{"model":"m","user":17}`, envelope{model: "m"}, ""},
		{"stream false", `{"model":"m","stream":false}`, envelope{model: "m"}, ""},
		{"numbers", `{"a":-0.5e+10,"b":0,"c":1E-2,"model":"m"}`, envelope{model: "m"}, ""},
		{"deepest allowed", nest(maxDepth - 1), envelope{model: "m"}, ""},

		{"too deep", nest(maxDepth), envelope{}, "nests deeper than 512"},
		{"very deep", nest(1 << 20), envelope{}, "nests deeper than 512"},
		{"duplicate model", `{"model":"a","model":"b"}`, envelope{}, `"model" occurs twice`},
		{"duplicate by escape", `{"model":"a","m\u006fdel":"b"}`, envelope{}, `"model" occurs twice`},
		{"duplicate user", `{"model":"a","user":"x","user":"y"}`, envelope{}, `"user" occurs twice`},
		{"other case", `{"model":"a","Model":"b"}`, envelope{}, "differs from"},
		{"model null", `{"model":null}`, envelope{}, "not a string"},
		{"model object", `{"model":{"id":"m"}}`, envelope{}, "not a string"},
		{"empty", ``, envelope{}, "not a JSON object"},
		{"array", `[]`, envelope{}, "not a JSON object"},
		{"cut", `{"model":"m"`, envelope{}, "expected ',' or '}'"},
		{"cut string", `{"model":"m`, envelope{}, "does not end"},
		{"trailing", `{"model":"m"} x`, envelope{}, "follows"},
		{"two objects", `{"model":"m"}{"model":"n"}`, envelope{}, "follows"},
		{"trailing comma", `{"model":"m",}`, envelope{}, "expected a key"},
		{"single quotes", `{'model':'m'}`, envelope{}, "expected a key"},
		{"leading zero", `{"a":01,"model":"m"}`, envelope{}, "expected ','"},
		{"bare minus", `{"a":-,"model":"m"}`, envelope{}, "expected a value"},
		{"NaN", `{"a":NaN,"model":"m"}`, envelope{}, "expected a value"},
		{"raw newline in string", "{\"model\":\"a\nb\"}", envelope{}, "control character"},
		{"bad escape", `{"model":"\x41"}`, envelope{}, "bad escape"},
		{"bad hex", `{"model":"\u00g0"}`, envelope{}, `bad \u escape`},
		{"NUL", "{\"model\":\"m\"\x00}", envelope{}, "expected ','"},
		{"byte order mark", "\xef\xbb\xbf{\"model\":\"m\"}", envelope{}, "not a JSON object"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := scanEnvelope([]byte(tt.body))
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.modelEnd > 0 {
				var token string
				if err := json.Unmarshal([]byte(tt.body[got.modelStart:got.modelEnd]), &token); err != nil || token != got.model {
					t.Errorf("offsets hold %q (%v), want the token of %q", tt.body[got.modelStart:got.modelEnd], err, got.model)
				}
			}
			got.modelStart, got.modelEnd = 0, 0
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
		e, err := scanEnvelope(body)
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
		if e.model != text("model") || e.user != text("user") || e.safetyIdentifier != text("safety_identifier") || e.promptCacheKey != text("prompt_cache_key") {
			t.Fatalf("%q: got %+v", body, e)
		}
		if e.stream != (string(all["stream"]) == "true") {
			t.Fatalf("%q: stream %v", body, e.stream)
		}
		if e.modelEnd == 0 {
			return
		}
		out, err := io.ReadAll(rewrite(body, &e, name).open())
		if err != nil {
			t.Fatal(err)
		}
		tail := body[e.modelEnd:]
		if !bytes.HasPrefix(out, body[:e.modelStart]) || !bytes.HasSuffix(out, tail) {
			t.Fatalf("%q became %q: more than the model changed", body, out)
		}
		want := name
		if name == "" {
			want = e.model
		}
		var token string
		if err := json.Unmarshal(out[e.modelStart:len(out)-len(tail)], &token); err != nil {
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
		want       usage
		ok         bool
	}{
		{"chat", `{"id":"x","usage":{"prompt_tokens":12,"completion_tokens":3,"total_tokens":15}}`, usage{12, 3, true}, true},
		{"embeddings", `{"data":[],"usage":{"prompt_tokens":8,"total_tokens":8}}`, usage{8, 0, true}, true},
		{"responses", `{"usage":{"input_tokens":5,"output_tokens":7}}`, usage{5, 7, true}, true},
		{"response event", `{"type":"response.completed","response":{"id":"r","usage":{"input_tokens":5,"output_tokens":7}}}`, usage{5, 7, true}, true},
		{"null in a chunk", `{"choices":[],"usage":null}`, usage{}, false},
		{"only in text", `{"choices":[{"text":"\"usage\":{\"prompt_tokens\":9}"}]}`, usage{}, false},
		{"negative", `{"usage":{"prompt_tokens":-1}}`, usage{}, false},
		{"cut", `{"usage":{"prompt_tokens":1`, usage{}, false},
	}
	for _, tt := range tests {
		if got, ok := readUsage([]byte(tt.body)); got != tt.want || ok != tt.ok {
			t.Errorf("%s: %+v %v, want %+v %v", tt.name, got, ok, tt.want, tt.ok)
		}
	}
}
