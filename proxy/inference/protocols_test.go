package inference

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
)

// speaker is one honest model server per protocol: it reads requests with encoding/json,
// refuses models it does not have in its protocol's words, and counts words as tokens.
type speaker struct{ model string }

func (s speaker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := r.URL.EscapedPath()
	if path == "/" { // TGI's other name for it
		path = "/generate"
	}
	route, ok := shape.Match(path)
	if !ok {
		http.NotFound(w, r)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	var req struct {
		Model  string
		Stream *bool
	}
	text := body
	if n := r.Header.Get("Inference-Header-Content-Length"); n != "" {
		var size int
		fmt.Sscan(n, &size)
		text = body[:size]
	}
	if len(text) > 0 {
		if err := json.Unmarshal(text, &req); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
	}
	named := req.Model
	if route.Model != "" {
		named = route.Model
	}
	f := route.API.Family
	if named != s.model && f != shape.TGI {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		w.Write(f.Body(shape.Error{Status: 404, Message: "I serve " + s.model + ", not " + named}))
		return
	}
	stream := route.API.Streams(&shape.Envelope{Stream: req.Stream != nil && *req.Stream, StreamSet: req.Stream != nil})
	if strings.HasSuffix(r.URL.Path, "/infer") && len(text) < len(body) { // binary tensors come back as they went
		w.Header().Set("Inference-Header-Content-Length", "2")
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Write(append([]byte("{}"), body[len(text):]...))
		return
	}
	ctype, answer := spoken(f, stream, r.URL.RawQuery == "alt=sse", route.API.Operation)
	w.Header().Set("Content-Type", ctype)
	io.WriteString(w, answer)
}

// spoken are answers as the protocols' documentation shows them: five tokens in, three out.
func spoken(f shape.Family, stream, alt bool, operation string) (ctype, body string) {
	const j, sse = "application/json", "text/event-stream"
	switch f {
	case shape.Anthropic:
		if !stream {
			return j, `{"id":"m1","type":"message","role":"assistant","content":[{"type":"text","text":"a b c"}],"stop_reason":"end_turn","usage":{"input_tokens":5,"output_tokens":3}}`
		}
		return sse, "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"m1\",\"type\":\"message\",\"role\":\"assistant\",\"content\":[],\"usage\":{\"input_tokens\":5,\"output_tokens\":1}}}\n\n" +
			"event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n" +
			"event: ping\ndata: {\"type\":\"ping\"}\n\n" +
			"event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"a b c\"}}\n\n" +
			"event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n" +
			"event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":3}}\n\n" +
			"event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"
	case shape.Gemini:
		one := `{"candidates":[{"content":{"parts":[{"text":"a b c"}],"role":"model"}}],"usageMetadata":{"promptTokenCount":5,"candidatesTokenCount":3}}`
		switch {
		case !stream:
			return j, one
		case alt:
			return sse, "data: " + one + "\r\n\r\n"
		}
		return j, "[" + one + "\n,\n" + one + "]"
	case shape.Ollama:
		if !stream {
			return j, `{"model":"m","message":{"role":"assistant","content":"a b c"},"done":true,"prompt_eval_count":5,"eval_count":3}`
		}
		return "application/x-ndjson", `{"message":{"role":"assistant","content":""},"done":false}` + "\n" + `{"message":{"role":"assistant","content":"a b c"},"done":false}` + "\n" +
			`{"message":{"role":"assistant","content":""},"done":true,"prompt_eval_count":5,"eval_count":3}` + "\n"
	case shape.TGI:
		if !stream {
			return j, `{"generated_text":"a b c","details":{"generated_tokens":3,"prefill":[{},{},{},{},{}]}}`
		}
		return sse, `data:{"index":1,"token":{"id":1,"text":"a b"},"generated_text":null,"details":null}` + "\n\n" +
			`data:{"index":2,"token":{"id":2,"text":" c"},"generated_text":"a b c","details":{"generated_tokens":3,"input_length":5}}` + "\n\n"
	case shape.OIP:
		if stream {
			return sse, "data: {\"model_name\":\"m\",\"text_output\":\"a\"}\n\ndata: {\"model_name\":\"m\",\"text_output\":\"b\"}\n\ndata: {\"model_name\":\"m\",\"text_output\":\"c\"}\n\n"
		}
		return j, `{"model_name":"m","outputs":[{"name":"y","shape":[1],"datatype":"FP32","data":[1.50]}]}`
	case shape.VLLM:
		return j, `{"data":[{"score":0.5}],"usage":{"prompt_tokens":5,"completion_tokens":3}}`
	}
	if stream {
		return sse, streamOf("gpt-v1", "a b c")
	}
	return j, `{"object":"` + operation + `","usage":{"prompt_tokens":5,"completion_tokens":3}}`
}

// Every protocol: routed by policy, the name rewritten and nothing else, relayed as it
// came, measured.
func TestProtocols(t *testing.T) {
	backend := serve(t, speaker{model: "gpt-v1"})
	m := newMesh(t, newPolicy(0, eps(backend), nil), Options{DefaultModel: "gpt"})
	tests := []struct {
		path, body string
		stream     bool
		in, out    uint64 // 0, 0 = estimated
	}{
		{"/v1/messages", `{"model":"gpt","max_tokens":9,"messages":[]}`, false, 5, 3},
		{"/v1/messages", `{"model":"gpt","stream":true,"messages":[]}`, true, 5, 3},
		{"/v1beta/models/gpt:generateContent?key=k", `{"contents":[]}`, false, 5, 3},
		{"/v1beta/models/gpt:streamGenerateContent?alt=sse", `{"contents":[]}`, true, 5, 3},
		{"/v1beta/models/gpt:streamGenerateContent", `{"contents":[]}`, true, 0, 0},
		{"/openai/deployments/gpt/chat/completions?api-version=2024-10-21", `{"messages":[]}`, false, 5, 3},
		{"/openai/deployments/gpt/chat/completions?api-version=2024-10-21", `{"stream":true,"model":"gpt"}`, true, 3, 3},
		{"/api/chat", `{"model":"gpt","stream":false}`, false, 5, 3},
		{"/api/chat", `{"model":"gpt"}`, true, 5, 3},
		{"/generate", `{"inputs":"x"}`, false, 5, 3},
		{"/", `{"inputs":"x"}`, false, 5, 3},
		{"/generate_stream", `{"inputs":"x"}`, true, 5, 3},
		{"/v1/rerank", `{"model":"gpt","query":"q"}`, false, 5, 3},
		{"/v2/models/gpt/infer", `{"inputs":[]}`, false, 0, 0},
		{"/v2/models/gpt/versions/4/infer", `{"inputs":[]}`, false, 0, 0},
		{"/v2/models/gpt/generate_stream", `{"text_input":"x"}`, true, 0, 3},
	}
	for _, tt := range tests {
		t.Run(tt.path, func(t *testing.T) {
			w := post(m.handler, tt.path, tt.body)
			if w.Code != 200 {
				t.Fatalf("%d %s", w.Code, w.Body)
			}
			path, _, _ := strings.Cut(tt.path, "?")
			if path == "/" {
				path = "/generate"
			}
			route, _ := shape.Match(path)
			ctype, want := spoken(route.API.Family, tt.stream, strings.HasSuffix(tt.path, "alt=sse"), route.API.Operation)
			if w.Body.String() != want || w.Header().Get("Content-Type") != ctype {
				t.Errorf("relayed %s %q, want %s %q", w.Header().Get("Content-Type"), w.Body, ctype, want)
			}
			if v, m := w.Header().Get(outrigger.HeaderVersion), w.Header().Get(outrigger.HeaderModel); v != "v1" || m != "gpt" {
				t.Errorf("version %q of model %q", v, m)
			}
			d := only(t, m.handler)
			if d.Requests != 1 || d.Failures != 0 || d.Attempts != 1 {
				t.Errorf("recorded %v", d)
			}
			if tt.in+tt.out > 0 && (tt.in > 0 && d.TokensIn != tt.in || d.TokensOut != tt.out) {
				t.Errorf("%d tokens in, %d out, want %d and %d", d.TokensIn, d.TokensOut, tt.in, tt.out)
			}
			if tt.stream != (len(d.TtftSketch) > 0) {
				t.Errorf("stream %v, time to first token measured: %v", tt.stream, len(d.TtftSketch) > 0)
			}
		})
	}
}

// Binary tensors follow the JSON: only that is read, and no byte of either changes.
func TestBinaryTensors(t *testing.T) {
	backend := serve(t, speaker{model: "gpt-v1"})
	m := newMesh(t, newPolicy(0, eps(backend), nil), Options{})
	prefix := `{"inputs":[{"name":"x","shape":[4],"datatype":"UINT8","parameters":{"binary_data_size":4}}]}`
	send := func(length string) (*http.Response, string) {
		req, err := http.NewRequest("POST", m.front.URL+"/v2/models/gpt/infer", strings.NewReader(prefix+"\x00\xff{\""))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Inference-Header-Content-Length", length)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp, string(b)
	}
	resp, body := send(fmt.Sprint(len(prefix)))
	if resp.StatusCode != 200 || body != "{}\x00\xff{\"" || resp.Header.Get("Inference-Header-Content-Length") != "2" {
		t.Errorf("%d %q %v", resp.StatusCode, body, resp.Header)
	}
	for _, bad := range []string{"-1", "x", "100000", "18446744073709551616"} {
		if resp, body := send(bad); resp.StatusCode != 400 || !strings.HasPrefix(body, `{"error":"Inference-Header-Content-Length`) {
			t.Errorf("length %s: %d %s", bad, resp.StatusCode, body)
		}
	}
}

// Refusals use the words of the protocol; asking about a model counts nowhere.
func TestProtocolRefusalsAndMetadata(t *testing.T) {
	rt := &scripted{steps: map[string][]step{"a:1": {{status: 200, body: `{"name":"gpt-v1","ready":true}`}}}}
	src := newSource(newPolicy(0, eps("a:1"), nil))
	h := mustNew(t, Options{Policy: src.get, Transport: rt})
	for path, want := range map[string]string{
		"/v1/messages":                        `"type":"not_found_error"`,
		"/v1beta/models/none:generateContent": `"status":"NOT_FOUND"`,
		"/v2/models/none/infer":               `{"error":"the model`,
		"/api/chat":                           `{"error":"the model`,
		"/openai/deployments/none/embeddings": `"code":"model_not_found"`,
	} {
		if w := post(h, path, `{"model":"none"}`); w.Code != 404 || !strings.Contains(w.Body.String(), want) {
			t.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
	}
	if w := post(h, "/generate", `{"inputs":"x"}`); w.Code != 400 || !strings.Contains(w.Body.String(), `"error_type":"validation"`) {
		t.Errorf("no model: %d %s", w.Code, w.Body)
	}
	if w := post(h, "/generate", `{"inputs":"x"}`, "x-outrigger-model", "gpt"); w.Code != 200 || rt.last.URL.Path != "/generate" || rt.last.Header.Get("x-outrigger-model") != "" {
		t.Errorf("model by header: %d, %v", w.Code, rt.last)
	}
	h.Recorder().Drain(h.now())
	w := get(h, "/v2/models/gpt/versions/3/ready")
	if w.Code != 200 || rt.last.URL.Path != "/v2/models/gpt-v1/ready" || rt.last.Method != "GET" || rt.body != "" {
		t.Errorf("ready: %d, %s %s", w.Code, rt.last.Method, rt.last.URL.Path)
	}
	if d := h.Recorder().Drain(h.now()); len(d) != 0 {
		t.Errorf("metadata was counted: %v", d)
	}
	for path, want := range map[string]string{"/v2/health/live": `{"live":true}`, "/v2/health/ready": `{"ready":true}`} {
		if w := get(h, path); w.Code != 200 || w.Body.String() != want {
			t.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
	}
	src.p.Store(nil)
	if w := get(h, "/v2/health/ready"); w.Code != 400 || !strings.HasPrefix(w.Body.String(), `{"error":"`) {
		t.Errorf("ready without policy: %d %s", w.Code, w.Body)
	}
}

// One sequence stays on one endpoint, whatever the load, and moves when it is lost.
func TestSequencesStick(t *testing.T) {
	ok := []step{{status: 200, body: `{}`}}
	rt := &scripted{steps: map[string][]step{"a:1": ok, "b:1": ok, "c:1": ok}}
	h := mustNew(t, Options{Policy: newSource(newPolicy(0, eps("a:1", "b:1", "c:1"), nil)).get, Transport: rt})
	seen := map[string]bool{}
	for i := range 30 {
		rt.log = nil
		for range 4 {
			post(h, "/v2/models/gpt/infer", fmt.Sprintf(`{"parameters":{"sequence_id":%d}}`, i))
		}
		for _, a := range rt.log {
			if a != rt.log[0] {
				t.Fatalf("sequence %d went to %v", i, rt.log)
			}
		}
		seen[rt.log[0]] = true
	}
	if len(seen) != 3 {
		t.Errorf("30 sequences used %v only", seen)
	}
}

// A failure before the first content is retried in every protocol that streams, and one
// after it ends the stream in the protocol's own error.
func TestCommitPointPerProtocol(t *testing.T) {
	const sse = "text/event-stream"
	tests := []struct{ path, body, ctype, early, good, late string }{
		{"/v1/messages", `{"model":"gpt","stream":true}`, sse, "event: message_start\ndata: {\"type\":\"message_start\"}\n\nevent: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\"}}\n\n",
			"event: content_block_delta\ndata: {\"type\":\"content_block_delta\"}\n\n", `event: error` + "\n" + `data: {"type":"error"`},
		{"/generate_stream", `{}`, sse, "data:{\"error\":\"x\",\"error_type\":\"generation\"}\n\n", "data:{\"token\":{\"id\":1}}\n\n", `data: {"error":"the connection to the model was lost in the middle of the answer","error_type":"generation"}` + "\n\n"},
		{"/v1beta/models/gpt:streamGenerateContent", `{}`, sse, "data: {\"error\":{\"code\":503,\"message\":\"x\",\"status\":\"UNAVAILABLE\"}}\n\n", "data: {\"candidates\":[{}]}\n\n",
			`data: {"error":{"code":502,"message":"the connection to the model was lost in the middle of the answer","status":"UNAVAILABLE"}}` + "\n\n"},
		{"/api/chat", `{"model":"gpt"}`, "application/x-ndjson", "{\"message\":{\"content\":\"\"},\"done\":false}\n{\"error\":\"x\"}\n", "{\"message\":{\"content\":\"a\"},\"done\":false}\n", `{"error":"the connection`},
	}
	for _, tt := range tests {
		rt := &scripted{steps: map[string][]step{
			"a:1": {{status: 200, ctype: tt.ctype, body: tt.early}},
			"b:1": {{status: 200, ctype: tt.ctype, body: tt.good, cut: true}},
		}}
		p := newPolicy(0, eps("a:1", "b:1"), nil)
		p.Models[0].Versions[0].Endpoints[1].Priority = 1
		h := mustNew(t, Options{Policy: newSource(p).get, Transport: rt, DefaultModel: "gpt"})
		w := post(h, tt.path, tt.body)
		rest, ok := strings.CutPrefix(w.Body.String(), tt.good)
		if !ok || !strings.HasPrefix(rest, tt.late) || len(rt.log) != 2 {
			t.Errorf("%s: attempts %v, answered %q", tt.path, rt.log, w.Body)
		}
		if d := only(t, h); d.Requests != 1 || d.Failures != 1 || d.Attempts != 2 {
			t.Errorf("%s: recorded %v", tt.path, d)
		}
	}
}
