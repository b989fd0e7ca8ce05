package shape

import (
	"bytes"
	"encoding/json"
	"strconv"
)

// BytesPerToken is the usual rule of thumb for English text under byte-pair encodings;
// it is applied only where the model reports nothing, and metrics say so.
const BytesPerToken = 4

// Usage counts LLM tokens of one request. Reported says that the model said so.
type Usage struct {
	In, Out  uint64
	Reported bool
}

// usageMark is a byte sequence without which a body of the family reports no usage: most
// events do not, and looking for it is cheaper than reading JSON.
func (f Family) usageMark() string {
	switch f {
	case Gemini:
		return `"usageMetadata"`
	case Ollama:
		return `eval_count"`
	case TGI:
		return `"generated_tokens"`
	}
	return `"usage"`
}

// Usage adds to u what a whole answer, or one event of a stream, says about LLM tokens,
// and reports whether it said anything. Counts of later events replace those of earlier
// ones: protocols that report several times report totals.
func (f Family) Usage(body []byte, u *Usage) bool {
	var ok bool
	switch f {
	case OIP:
		return false
	case Anthropic, Gemini, Ollama, TGI:
		if !bytes.Contains(body, []byte(f.usageMark())) {
			return false
		}
	}
	switch f {
	case Gemini:
		ok = usageGemini(body, u)
	case Ollama:
		ok = usageOllama(body, u)
	case TGI:
		ok = usageTGI(body, u)
	case Anthropic:
		ok = usageAnthropic(body, u)
	default:
		var got Usage
		if got, ok = ReadUsage(body); ok {
			*u = got
		}
	}
	u.Reported = u.Reported || ok
	return ok
}

// usageGemini reads usageMetadata, which every chunk has; in the array form of a stream,
// the last element's.
func usageGemini(body []byte, u *Usage) bool {
	type chunk struct {
		Usage *struct {
			Prompt    uint64 `json:"promptTokenCount"`
			Candidate uint64 `json:"candidatesTokenCount"`
			Thoughts  uint64 `json:"thoughtsTokenCount"`
		} `json:"usageMetadata"`
	}
	var all []chunk
	if t := bytes.TrimSpace(body); len(t) > 0 && t[0] == '[' {
		if json.Unmarshal(t, &all) != nil {
			return false
		}
	} else {
		all = make([]chunk, 1)
		if json.Unmarshal(t, &all[0]) != nil {
			return false
		}
	}
	ok := false
	for _, c := range all {
		if c.Usage != nil {
			u.In, u.Out, ok = c.Usage.Prompt, c.Usage.Candidate+c.Usage.Thoughts, true
		}
	}
	return ok
}

func usageOllama(body []byte, u *Usage) bool {
	var e struct {
		In  *uint64 `json:"prompt_eval_count"`
		Out *uint64 `json:"eval_count"`
	}
	if json.Unmarshal(body, &e) != nil || e.In == nil && e.Out == nil {
		return false
	}
	if e.In != nil { // absent when the prompt was cached
		u.In = *e.In
	}
	if e.Out != nil {
		u.Out = *e.Out
	}
	return true
}

// usageTGI reads details, which clients have to ask for; the prompt is listed token by
// token.
func usageTGI(body []byte, u *Usage) bool {
	type answer struct {
		Details *struct {
			Generated uint64            `json:"generated_tokens"`
			Input     uint64            `json:"input_length"`
			Prefill   []json.RawMessage `json:"prefill"`
		} `json:"details"`
	}
	var e answer
	if t := bytes.TrimSpace(body); len(t) > 0 && t[0] == '[' {
		var list []answer
		if json.Unmarshal(t, &list) != nil || len(list) == 0 {
			return false
		}
		e = list[0]
	} else if json.Unmarshal(t, &e) != nil {
		return false
	}
	if e.Details == nil {
		return false
	}
	u.In, u.Out = max(e.Details.Input, uint64(len(e.Details.Prefill))), e.Details.Generated
	return true
}

// usageAnthropic reads "usage" at the top (answers, message_delta) or in "message"
// (message_start). What was read from or written to the prompt cache is input too.
func usageAnthropic(body []byte, u *Usage) bool {
	raw, ok := Value(body, "usage")
	if !ok {
		if inner, found := Value(body, "message"); found {
			raw, ok = Value(inner, "usage")
		}
	}
	if !ok {
		return false
	}
	var e struct {
		In    *uint64 `json:"input_tokens"`
		Made  uint64  `json:"cache_creation_input_tokens"`
		Found uint64  `json:"cache_read_input_tokens"`
		Out   *uint64 `json:"output_tokens"`
	}
	if json.Unmarshal(raw, &e) != nil || e.In == nil && e.Out == nil {
		return false
	}
	if e.In != nil {
		u.In = *e.In + e.Made + e.Found
	}
	if e.Out != nil {
		u.Out = *e.Out
	}
	return true
}

// ReadUsage finds the usage object of an answer or event of OpenAI's: at the top level
// (chat, completions, embeddings, responses) or inside "response" (response.completed). Of
// invalid JSON it may report what the end says.
func ReadUsage(body []byte) (Usage, bool) {
	raw, ok := endValue(body, `"usage"`)
	if !ok {
		if !bytes.Contains(body, []byte(`"usage"`)) {
			return Usage{}, false
		}
		raw, ok = Value(body, "usage")
	}
	if !ok {
		if inner, found := Value(body, "response"); found {
			raw, ok = Value(inner, "usage")
		}
	}
	if !ok || raw[0] != '{' { // null, in all but the last chunk
		return Usage{}, false
	}
	if u, ok := plainUsage(raw); ok {
		return u, true
	}
	var u struct {
		Prompt     *uint64 `json:"prompt_tokens"`
		Completion uint64  `json:"completion_tokens"`
		Input      *uint64 `json:"input_tokens"`
		Output     uint64  `json:"output_tokens"`
	}
	if json.Unmarshal(raw, &u) != nil {
		return Usage{}, false
	}
	switch {
	case u.Prompt != nil:
		return Usage{*u.Prompt, u.Completion, true}, true
	case u.Input != nil:
		return Usage{*u.Input, u.Output, true}, true
	}
	return Usage{}, false
}

// plainUsage reads a valid usage object whose counts are plain numbers under plain keys, as
// every server writes it; ok is false for all that encoding/json has to look at.
func plainUsage(raw []byte) (u Usage, ok bool) {
	s := scanner{b: raw}
	if s.peek() != '{' {
		return u, false
	}
	s.i++
	prompt, input, plain := false, false, true
	var old, in, oldOut, out uint64
	err := s.members(1, func(key []byte, escaped bool) (bool, error) {
		var into *uint64
		switch string(key) {
		case "prompt_tokens":
			into, prompt = &old, true
		case "completion_tokens":
			into = &oldOut
		case "input_tokens":
			into, input = &in, true
		case "output_tokens":
			into = &out
		default:
			plain = plain && !escaped && !looksLikeCount(key)
			return false, nil
		}
		s.space()
		start := s.i
		for s.i < len(s.b) && s.i-start < 18 && s.b[s.i]-'0' <= 9 {
			s.i++
		}
		n, err := strconv.ParseUint(string(s.b[start:s.i]), 10, 64)
		if c := s.peek(); err != nil || c != ',' && c != '}' && c != ' ' && c != '\t' && c != '\n' && c != '\r' {
			plain = false
			s.i = start
			return false, nil
		}
		*into = n
		return true, nil
	})
	switch {
	case err != nil || !plain:
		return Usage{}, false
	case prompt:
		return Usage{old, oldOut, true}, true
	}
	return Usage{in, out, true}, input
}

// looksLikeCount: encoding/json ignores the case of names.
func looksLikeCount(key []byte) bool {
	for _, name := range [...]string{"prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"} {
		if len(key) == len(name) && bytes.EqualFold(key, []byte(name)) {
			return true
		}
	}
	return false
}
