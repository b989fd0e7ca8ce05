package shape

import (
	"encoding/json"
	"net/url"
	"strings"
	"testing"
)

func TestMatchAndRewrite(t *testing.T) {
	tests := []struct {
		path, model, operation string
		family                 Family
		rewritten              string // for upstream "org/m:2/versions/7"
	}{
		{"/v1/chat/completions", "", "chat", OpenAI, ""},
		{"/v1/responses", "", "responses", OpenAI, ""},
		{"/v1/messages", "", "chat", Anthropic, ""},
		{"/anthropic/v1/messages/count_tokens", "", "count_tokens", Anthropic, ""},
		{"/api/chat", "", "chat", Ollama, ""},
		{"/generate_stream", "", "generate", TGI, ""},
		{"/openai/v1/responses", "", "responses", OpenAI, ""},
		{"/api/v1/chat/completions", "", "chat", OpenAI, ""},
		{"/v1beta/openai/embeddings", "", "embeddings", OpenAI, ""},
		{"/chat/completions", "", "chat", OpenAI, ""},
		{"/v1/images/generations", "", "image_generation", OpenAI, ""},
		{"/inference/v1/audio/speech", "", "speech", OpenAI, ""},
		{"/v2/rerank", "", "rerank", VLLM, ""},
		{"/v2/models/resnet/infer", "resnet", "infer", OIP, "/v2/models/org%2Fm:2/versions/7/infer"},
		{"/v2/models/a%2Fb/versions/3/infer", "a/b", "infer", OIP, "/v2/models/org%2Fm:2/versions/7/infer"},
		{"/v2/models/m/generate_stream", "m", "generate", OIP, "/v2/models/org%2Fm:2/versions/7/generate_stream"},
		{"/v2/models/m", "m", "metadata", OIP, "/v2/models/org%2Fm:2/versions/7"},
		{"/v2/models/m/versions/1/ready", "m", "metadata", OIP, "/v2/models/org%2Fm:2/versions/7/ready"},
		{"/openai/deployments/gpt%20x/chat/completions", "gpt x", "chat", Azure, "/openai/deployments/org%2Fm:2%2Fversions%2F7/chat/completions"},
		{"/v1beta/models/g-1:streamGenerateContent", "g-1", "generate_content", Gemini, "/v1beta/models/org%2Fm:2%2Fversions%2F7:streamGenerateContent"},
		{"/v1/models/g-1:generateContent", "g-1", "generate_content", Gemini, "/v1/models/org%2Fm:2%2Fversions%2F7:generateContent"},
	}
	for _, tt := range tests {
		r, ok := Match(tt.path)
		if !ok {
			t.Errorf("%s: not matched", tt.path)
			continue
		}
		if r.Model != tt.model || r.API.Operation != tt.operation || r.API.Family != tt.family {
			t.Errorf("%s: model %q, %s of %s", tt.path, r.Model, r.API.Operation, r.API.Family.Provider())
		}
		if got := r.Rewrite("org/m:2/versions/7"); got != tt.rewritten {
			t.Errorf("%s became %q, want %q", tt.path, got, tt.rewritten)
		}
		if got := r.Rewrite(""); got != "" {
			t.Errorf("%s without an upstream name became %q", tt.path, got)
		}
	}
	for _, path := range []string{
		"/", "", "/v1/models", "/v1/models/gpt", "/v1/chat/completions/", "/v1/responses/r1", "/v2", "/v2/models", "/v2/models/", "/v2/models//infer",
		"/v2/models/m/versions/", "/v2/models/m/versions//infer", "/v2/models/m/unload", "/v2/models/%zz/infer", "/v2/repository/index",
		"/openai/deployments//chat/completions", "/openai/deployments/d/audio/speech", "/v1beta/models/a/b:generateContent", "/v1beta/models/:generateContent",
		"/v1beta/models/m:other", "/openai/v1/chat", "/openai/v1/chat/completions/x", "/responses", "/x/v1/chat/completions", "/api/tags", "/V1/chat/completions",
	} {
		if r, ok := Match(path); ok {
			t.Errorf("%q matched %s of %s", path, r.API.Operation, r.API.Family.Provider())
		}
	}
}

func TestModels(t *testing.T) {
	for path, want := range map[string]string{
		"/v1/models": "OpenAI ", "/v1/models/": "OpenAI ", "/v1/models/org/m": "OpenAI org/m", "/openai/v1/models": "OpenAI ", "/openai/v1/models/gpt": "OpenAI gpt",
		"/api/v1/models/a/b:free": "OpenAI a/b:free", "/inference/v1/models/accounts/x/models/y": "OpenAI accounts/x/models/y", "/compatible-mode/v1/models": "OpenAI ",
		"/v1beta/openai/models/g": "OpenAI g", "/anthropic/v1/models/claude": "Anthropic claude",
	} {
		id, family, ok := Models(path)
		if got := map[Family]string{OpenAI: "OpenAI ", Anthropic: "Anthropic "}[family] + id; !ok || got != want {
			t.Errorf("%s: %q %v, want %q", path, got, ok, want)
		}
	}
	for _, path := range []string{"", "/", "/models", "/models/m", "/v1/modelsx", "/v1/model", "/v2/models", "/v1beta/models", "/openai/v1", "/openai/models", "/x/v1/models"} {
		if id, family, ok := Models(path); ok {
			t.Errorf("%q shows %q of %v", path, id, family)
		}
	}
}

func TestTemplateHasNoNames(t *testing.T) {
	for path, want := range map[string]string{
		"/v1/chat/completions":               "/v1/chat/completions",
		"/v2/models/secret/versions/9/infer": "/v2/models/{model}/infer",
		"/v1beta/models/secret:countTokens":  "/v1beta/models/{model}:countTokens",
	} {
		r, _ := Match(path)
		if got := r.Template(path); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
}

// FuzzMatch: a matched path rewritten to a name is matched again, as the same API with
// that name, and asks for the same resource.
func FuzzMatch(f *testing.F) {
	for _, s := range []string{"/v2/models/m/versions/1/infer", "/v1beta/models/a%3Ab:generateContent", "/openai/deployments/d/embeddings", "/v1/completions"} {
		f.Add(s, "up stream/%:?#é")
	}
	f.Fuzz(func(t *testing.T, path, upstream string) {
		r, ok := Match(path)
		if !ok {
			return
		}
		out := r.Rewrite(upstream)
		if out == "" {
			if r.Model != "" && upstream != "" {
				t.Fatalf("%q with model %q was not rewritten", path, r.Model)
			}
			return
		}
		want := upstream
		if r.API.Family == OIP {
			want, _ = SplitUpstream(upstream)
		}
		again, ok := Match(out)
		if want == "" {
			return // "/versions/7" alone names nothing; policy does not say so
		}
		if !ok || again.API != r.API || again.Model != want {
			t.Fatalf("%q became %q: %v, model %q, want %q", path, out, ok, again.Model, want)
		}
		if u, err := url.ParseRequestURI(out); err != nil || u.RawQuery != "" || u.EscapedPath() != out {
			t.Fatalf("%q is not a path: %v", out, err)
		}
	})
}

func TestKindsPerProtocol(t *testing.T) {
	tests := []struct {
		path, name, event string
		want              Kind
	}{
		{"/v1/messages", "start", "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{}}", Preamble},
		{"/v1/messages", "block", "event: content_block_start\ndata: {\"type\":\"content_block_start\"}", Preamble},
		{"/v1/messages", "ping", "event: ping\ndata: {\"type\":\"ping\"}", Comment},
		{"/v1/messages", "delta", "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"text\":\"an \\\"error\\\"\"}}", Content},
		{"/v1/messages", "unnamed delta", "data: {\"type\":\"content_block_delta\"}", Content},
		{"/v1/messages", "stop", "event: message_stop\ndata: {\"type\":\"message_stop\"}", Done},
		{"/v1/messages", "overloaded", "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"x\"}}", Failure},
		{"/v1/messages", "at fault", "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"request_too_large\",\"message\":\"x\"}}", Refused},
		{"/v1beta/models/m:streamGenerateContent", "content", `data: {"candidates":[{"content":{"parts":[{"text":"a"}]}}],"usageMetadata":{}}`, Content},
		{"/v1beta/models/m:streamGenerateContent", "error", `data: {"error":{"code":503,"message":"x","status":"UNAVAILABLE"}}`, Failure},
		{"/v1beta/models/m:streamGenerateContent", "at fault", `data: {"error":{"code":400,"message":"x","status":"INVALID_ARGUMENT"}}`, Refused},
		{"/generate_stream", "token", `data:{"index":1,"token":{"id":7,"text":"a"},"generated_text":null,"details":null}`, Content},
		{"/generate_stream", "last", `data:{"index":2,"token":{"id":8,"text":"b"},"generated_text":"ab","details":null}`, Done},
		{"/generate_stream", "error", `data:{"error":"Request failed during generation","error_type":"generation"}`, Failure},
		{"/generate_stream", "at fault", `data:{"error":"inputs too long","error_type":"validation"}`, Refused},
		{"/v2/models/m/generate_stream", "output", `data: {"model_name":"m","text_output":"a"}`, Content},
		{"/v2/models/m/generate_stream", "error", `data: {"error":"stopped"}`, Failure},
		{"/api/chat", "empty", `{"message":{"role":"assistant","content":""},"done":false}`, Preamble},
		{"/api/chat", "text", `{"message":{"role":"assistant","content":"a \"done\""},"done":false}`, Content},
		{"/api/generate", "text", `{"response":"a","done":false}`, Content},
		{"/api/chat", "last", `{"message":{"content":""},"done":true,"eval_count":2}`, Done},
		{"/api/chat", "error", `{"error":"model crashed"}`, Failure},
		{"/api/chat", "blank line", ``, Comment},
	}
	for _, tt := range tests {
		r, _ := Match(tt.path)
		ev := ParseEvent([]byte(tt.event + "\n\n"))
		if r.API.Lines() {
			ev = Event{Data: []byte(tt.event), HasData: tt.event != ""}
		}
		if got := r.API.Classify(ev); got != tt.want {
			t.Errorf("%s, %s: %d, want %d", tt.path, tt.name, got, tt.want)
		}
		if got := r.API.Committed(ev); tt.want > Content && got != tt.want || tt.want <= Content && got > Content {
			t.Errorf("%s, %s, committed: %d, want %d", tt.path, tt.name, got, tt.want)
		}
	}
}

func TestUsagePerProtocol(t *testing.T) {
	tests := []struct {
		family Family
		events []string
		want   Usage
	}{
		{Anthropic, []string{`{"type":"message","usage":{"input_tokens":5,"cache_read_input_tokens":2,"output_tokens":9}}`}, Usage{7, 9, true}},
		{Anthropic, []string{`{"type":"message_start","message":{"usage":{"input_tokens":5,"output_tokens":1}}}`, `{"type":"content_block_delta"}`, `{"type":"message_delta","usage":{"output_tokens":9}}`}, Usage{5, 9, true}},
		{Gemini, []string{`{"usageMetadata":{"promptTokenCount":4,"candidatesTokenCount":1}}`, `{"usageMetadata":{"promptTokenCount":4,"candidatesTokenCount":6,"thoughtsTokenCount":2}}`}, Usage{4, 8, true}},
		{Gemini, []string{`[{"usageMetadata":{"promptTokenCount":4}},{"usageMetadata":{"promptTokenCount":4,"candidatesTokenCount":3}}]`}, Usage{4, 3, true}},
		{Ollama, []string{`{"done":false}`, `{"done":true,"prompt_eval_count":3,"eval_count":8}`}, Usage{3, 8, true}},
		{Ollama, []string{`{"done":true,"eval_count":8}`}, Usage{0, 8, true}},
		{TGI, []string{`{"generated_text":"x","details":{"generated_tokens":3,"prefill":[{"id":1},{"id":2}]}}`}, Usage{2, 3, true}},
		{TGI, []string{`[{"generated_text":"x","details":{"generated_tokens":3,"prefill":[]}}]`}, Usage{0, 3, true}},
		{TGI, []string{`{"details":null}`, `{"generated_tokens"`}, Usage{}},
		{OIP, []string{`{"usage":{"prompt_tokens":3}}`}, Usage{}},
		{VLLM, []string{`{"usage":{"prompt_tokens":3,"completion_tokens":1}}`}, Usage{3, 1, true}},
	}
	for _, tt := range tests {
		var u Usage
		for _, e := range tt.events {
			tt.family.Usage([]byte(e), &u)
		}
		if u != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.family.Provider(), u, tt.want)
		}
	}
}

func TestErrorsInTheProtocolsForm(t *testing.T) {
	e := Error{Status: 503, Code: "overloaded", Message: "busy"}
	for f, want := range map[Family]string{
		OpenAI:    `{"error":{"message":"busy","type":"server_error","param":null,"code":"overloaded"}}`,
		Azure:     `{"error":{"message":"busy","type":"server_error","param":null,"code":"overloaded"}}`,
		OIP:       `{"error":"busy"}`,
		TGI:       `{"error":"busy","error_type":"overloaded"}`,
		Anthropic: `{"type":"error","error":{"type":"overloaded_error","message":"busy"}}`,
		Gemini:    `{"error":{"code":503,"message":"busy","status":"UNAVAILABLE"}}`,
		Ollama:    `{"error":"busy"}`,
	} {
		if got := string(f.Body(e)); got != want {
			t.Errorf("%s: %s, want %s", f.Provider(), got, want)
		}
	}
}

// What one sidecar says at the end of a broken stream, another must take for an error.
func TestErrorEventsAreSeen(t *testing.T) {
	for _, path := range []string{"/v1/chat/completions", "/v1/responses", "/v1/messages", "/generate_stream", "/v2/models/m/generate_stream",
		"/v1beta/models/m:streamGenerateContent", "/api/chat", "/openai/deployments/d/chat/completions"} {
		r, _ := Match(path)
		raw := r.API.Event(Error{Status: 502, Code: "upstream_lost", Message: "x"})
		reader := NewEventReader(strings.NewReader(string(raw)), nil)
		if r.API.Lines() {
			reader = NewLineReader(strings.NewReader(string(raw)), nil)
		}
		ev, err := reader.Next()
		if err != nil || r.API.Committed(ev) != Failure || r.API.Classify(ev) != Failure || !json.Valid(ev.Data) {
			t.Errorf("%s: %q, %v", path, raw, err)
		}
	}
}

func TestRewriteBody(t *testing.T) {
	tests := []struct{ path, body, want string }{
		{"/v1/chat/completions", `{ "model" : "m", "x":1.0 }`, `{ "model" : "up", "x":1.0 }`},
		{"/openai/deployments/m/chat/completions", `{"model":"m"}`, `{"model":"up"}`},
		{"/openai/deployments/m/chat/completions", `{"model":"other"}`, `{"model":"other"}`},
		{"/openai/deployments/m/chat/completions", `{"a":1}`, `{"a":1}`},
		{"/v1beta/models/m:embedContent", `{"model":"models/m"}`, `{"model":"models/up"}`},
		{"/v2/models/m/generate", `{"model":"m"}`, `{"model":"m"}`},
		{"/generate", `{"inputs":"x"}`, `{"inputs":"x"}`},
	}
	for _, tt := range tests {
		r, _ := Match(tt.path)
		e, err := Scan([]byte(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		p := r.RewriteBody([]byte(tt.body), &e, "up")
		if got := string(p[0]) + string(p[1]) + string(p[2]); got != tt.want {
			t.Errorf("%s %s became %s, want %s", tt.path, tt.body, got, tt.want)
		}
	}
}

func TestScanNested(t *testing.T) {
	tests := []struct{ body, user, sequence, err string }{
		{`{"parameters":{"sequence_id":42,"sequence_start":true,"user_id":"u"}}`, "u", "42", ""},
		{`{"metadata":{"user_id":"\u0075"}}`, "u", "", ""},
		{`{"metadata":{"a":{"user_id":"x"}},"user_id":"y"}`, "", "", ""},
		{`{"parameters":null,"metadata":[{"user_id":"x"}]}`, "", "", ""},
		{`{"parameters":{"sequence_id":{"a":1}}}`, "", "", ""},
		{`{"parameters":{"user_id":"a","user_id":"b"}}`, "", "", "twice"},
		{`{"parameters":{"user_id":"a"},"metadata":{"user_id":"b"}}`, "", "", "twice"},
		{`{"parameters":{"sequence_id":}}`, "", "", "value"},
		{`{"parameters":{"sequence_id"`, "", "", "expected ':'"},
		{`{"parameters":{"sequence_id":`, "", "", "value"},
	}
	for _, tt := range tests {
		e, err := Scan([]byte(tt.body))
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: error %v, want one with %q", tt.body, err, tt.err)
			}
			continue
		}
		if err != nil || e.SubUser != tt.user || e.Sequence != tt.sequence {
			t.Errorf("%s: %q %q, %v", tt.body, e.SubUser, e.Sequence, err)
		}
	}
}

// Lines may be cut anywhere by the network and end in CRLF; nothing changes on the way.
func TestLineReader(t *testing.T) {
	const in = "{\"a\":1}\r\n\n{\"b\":2}\n{\"c\""
	e := NewLineReader(strings.NewReader(in), make([]byte, 0, 4))
	var raw, data string
	for {
		ev, err := e.Next()
		if err != nil {
			break
		}
		raw += string(ev.Raw)
		data += string(ev.Data) + "|"
	}
	if raw != in || data != `{"a":1}||{"b":2}|{"c"|` {
		t.Errorf("relayed %q, data %q", raw, data)
	}
}
