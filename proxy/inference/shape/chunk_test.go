package shape

import (
	"bytes"
	"testing"
)

// plainEvents are what servers send, and what looks like it.
var plainEvents = []struct {
	data  string
	kind  Kind
	plain bool
}{
	{`{"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}`, Preamble, true},
	{`{"choices":[{"index":0,"delta":{"role":"assistant","content":null,"tool_calls":[]},"logprobs":null,"finish_reason":null}],"usage":null,"error":null}`, Preamble, true},
	{`{"choices":[{"delta":{"content":"a"}}]}`, Content, true},
	{` { "choices" : [ { "delta" : { "reasoning" : "a" } } , { "delta" : null } ] } `, Content, true},
	{`{"choices":[{"delta":{},"finish_reason":"stop"}]}`, Content, true},
	{`{"choices":[{"delta":{},"finish_reason":""}]}`, Content, true},
	{`{"choices":[{"text":"a"}]}`, Content, true},
	{`{"choices":[{"text":"","finish_reason":null}]}`, Preamble, true},
	{`{"choices":[]}`, Preamble, true},
	{`{"choices":[],"usage":{"prompt_tokens":1}}`, Content, true},
	{`{"type":"response.output_text.delta","delta":"a"}`, Content, true},
	{`{"object":"ping"}`, Content, true},
	// Left to encoding/json:
	{`{"error":{"message":"no"}}`, Failure, false},
	{`{"error":{"type":"invalid_request_error"}}`, Refused, false},
	{`{"type":"error","message":"no"}`, Failure, false},
	{`{"type":"response.created","response":{"id":"r"}}`, Preamble, false},
	{`{"type":"response.failed","response":{"error":{"code":"server_error"}}}`, Failure, false},
	{`{"Error":{"message":"no"}}`, Failure, false},
	{`{"\u0065rror":{"message":"no"}}`, Failure, false},
	{`{"error":null,"error":{"message":"no"}}`, Failure, false},
	{`{"choices":null}`, Content, false},
	{`{"choices":[null]}`, Preamble, false},
	{`{"choices":[{"text":1}]}`, Content, false},
	{`{"choices":[{"delta":{"content":"a","content":""}}]}`, Preamble, false},
	{`{"choices":[{"delta":{"cont\u0065nt":"a"}}]}`, Content, false},
	{`{"choices":[{"delta":[]}]}`, Content, false},
	{`{"choices":[{"DELTA":{"content":"a"}}]}`, Content, false},
	{`{"choices":[{"delta":{}}]`, Content, false},
	{`{"choices":[{"delta":{}}]} x`, Content, false},
	{`[]`, Content, false},
	{``, Content, false},
}

func TestPlainKind(t *testing.T) {
	for _, tt := range plainEvents {
		data := bytes.TrimSpace([]byte(tt.data))
		if kind, ok := plainKind(data); ok != tt.plain || ok && kind != tt.kind {
			t.Errorf("%s: %v, %v; want %v, %v", tt.data, kind, ok, tt.kind, tt.plain)
		}
		if kind := classify(Event{Data: data, HasData: true}); kind != tt.kind {
			t.Errorf("%s is %v, want %v", tt.data, kind, tt.kind)
		}
	}
	if kind := classify(Event{Name: []byte("error"), Data: []byte(`{"message":"no"}`), HasData: true}); kind != Failure {
		t.Errorf("an event named error is %v", kind)
	}
	chunk := []byte(plainEvents[0].data)
	if n := testing.AllocsPerRun(100, func() { plainKind(chunk) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzPlainKind holds the plain reading against that by encoding/json.
func FuzzPlainKind(f *testing.F) {
	for _, tt := range plainEvents {
		f.Add([]byte(tt.data))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		data = bytes.TrimSpace(data)
		kind, ok := plainKind(data)
		if !ok {
			return
		}
		if want := classifySlow(Event{Data: data, HasData: true}, data); kind != want {
			t.Fatalf("%q is %v, want %v", data, kind, want)
		}
	})
}
