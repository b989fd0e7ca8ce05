package inference

import (
	"bytes"
	"encoding/json"
)

// bytesPerToken is the usual rule of thumb for English text under byte-pair encodings;
// it is applied only where the model reports nothing, and the metric says so.
const bytesPerToken = 4

// usage counts LLM tokens of one request.
type usage struct {
	in, out  uint64
	reported bool
}

// readUsage finds the usage object of an answer or of a stream event: at the top level
// (chat, completions, embeddings, responses) or inside "response" (response.completed).
func readUsage(body []byte) (usage, bool) {
	if !bytes.Contains(body, []byte(`"usage"`)) {
		return usage{}, false
	}
	raw, ok := topValue(body, "usage")
	if !ok {
		if inner, found := topValue(body, "response"); found {
			raw, ok = topValue(inner, "usage")
		}
	}
	if !ok {
		return usage{}, false
	}
	var u struct {
		Prompt     *uint64 `json:"prompt_tokens"`
		Completion uint64  `json:"completion_tokens"`
		Input      *uint64 `json:"input_tokens"`
		Output     uint64  `json:"output_tokens"`
	}
	if json.Unmarshal(raw, &u) != nil {
		return usage{}, false
	}
	switch {
	case u.Prompt != nil:
		return usage{*u.Prompt, u.Completion, true}, true
	case u.Input != nil:
		return usage{*u.Input, u.Output, true}, true
	}
	return usage{}, false
}
