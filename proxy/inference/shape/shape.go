// Package shape knows the inference protocols that applications speak, and nothing else:
// for each API of each protocol, how its requests are recognised, where the name of the
// model is in their bytes, what the events of its streams mean, where its answers say how
// many LLM tokens they used, and how it words an error.
//
//	route, ok := shape.Match(r.URL.EscapedPath())
//	env, err := shape.Scan(body)
//	path := route.Rewrite("llama-3.1@v7")
//	kind := route.API.Classify(event)
//
// It covers OpenAI (chat, completions, embeddings, responses, images, speech, moderations;
// below /v1 and the bases of some providers) and Azure's deployments of the first three; Open Inference Protocol v2 over HTTP with Triton's generate endpoints and
// binary tensors, and over gRPC (see Names); TGI; vLLM's own paths; Anthropic messages;
// Gemini; Ollama. Protocols are never translated into each other.
//
// Everything here is a pure function of bytes: no clock, no I/O, no state, safe for any
// number of goroutines. Nothing is ever marshalled again: what is rewritten is cut out and
// replaced, and every other byte stays, unknown fields, key order and white space
// included. Input is bounded by its caller; nesting by MaxDepth, one event by MaxEvent.
// The tables are package variables for speed and must not be modified.
package shape

import (
	"net/http"
	"net/url"
	"strings"
)

// Family is a protocol.
type Family uint8

// The protocols.
const (
	OpenAI Family = iota
	Azure
	OIP // Open Inference Protocol v2 (KServe, Triton)
	TGI // Hugging Face text-generation-inference
	VLLM
	Anthropic
	Gemini
	Ollama
)

// Provider is the gen_ai.provider.name of the OpenTelemetry semantic conventions for the
// API spoken, or the protocol's own name where they have none.
func (f Family) Provider() string {
	return [...]string{"openai", "azure.ai.openai", "open_inference", "tgi", "vllm", "anthropic", "gcp.gemini", "ollama"}[f]
}

// Streaming is how a request asks for a stream.
type Streaming uint8

// The ways to ask for a stream.
const (
	Never    Streaming = iota
	ByBody             // "stream": true
	UnlessNo           // unless the body says "stream": false
	Always             // by its path
)

// API is one operation of a protocol.
type API struct {
	Family    Family
	Operation string // gen_ai.operation.name; "infer" and "generate" are not in the conventions
	Streaming Streaming
	// HasEnd: a whole stream ends in a mark of its own, so one without it was cut.
	HasEnd bool
	// Idempotent: asking twice costs time and changes nothing, and the answers are alike.
	Idempotent bool
	// Named: the error events of a stream have a name and their fields at the top
	// (OpenAI's responses).
	Named bool
	// Get: the request has no body and its method is GET.
	Get bool
	// Tensors: what goes in and out is not text, so its size says nothing about LLM tokens.
	Tensors bool
	// Played: the answer is bytes to be played while they come, so nothing may wait for their
	// end.
	Played bool
	// Meta: the request asks about a model, not for inference; it is routed but not counted.
	Meta bool
}

// Method is the request method the API takes.
func (a *API) Method() string {
	if a.Get {
		return http.MethodGet
	}
	return http.MethodPost
}

// Streams reports whether a request with this body asks for a stream.
func (a *API) Streams(e *Envelope) bool {
	switch a.Streaming {
	case ByBody:
		return e.Stream
	case UnlessNo:
		return e.Stream || !e.StreamSet
	}
	return a.Streaming == Always
}

// Lines reports whether streams of the API are newline-delimited JSON instead of
// server-sent events.
func (a *API) Lines() bool { return a.Family == Ollama }

var (
	openaiChat       = API{Operation: "chat", Streaming: ByBody, HasEnd: true}
	openaiCompletion = API{Operation: "text_completion", Streaming: ByBody, HasEnd: true}
	openaiEmbeddings = API{Operation: "embeddings", Idempotent: true}
	openaiResponses  = API{Operation: "responses", Streaming: ByBody, Named: true}
	openaiImages     = API{Operation: "image_generation", Streaming: ByBody, Named: true, Tensors: true}
	openaiSpeech     = API{Operation: "speech", Tensors: true, Played: true}
	openaiModeration = API{Operation: "moderation", Idempotent: true}

	azureChat       = API{Family: Azure, Operation: "chat", Streaming: ByBody, HasEnd: true}
	azureCompletion = API{Family: Azure, Operation: "text_completion", Streaming: ByBody, HasEnd: true}
	azureEmbeddings = API{Family: Azure, Operation: "embeddings", Idempotent: true}

	oipInfer    = API{Family: OIP, Operation: "infer", Idempotent: true, Tensors: true}
	oipGenerate = API{Family: OIP, Operation: "generate"}
	oipStream   = API{Family: OIP, Operation: "generate", Streaming: Always}
	oipMeta     = API{Family: OIP, Operation: "metadata", Idempotent: true, Get: true, Meta: true}

	tgiGenerate = API{Family: TGI, Operation: "generate", Streaming: ByBody, HasEnd: true}
	tgiStream   = API{Family: TGI, Operation: "generate", Streaming: Always, HasEnd: true}
	vllmScore   = API{Family: VLLM, Operation: "score", Idempotent: true}
	vllmRerank  = API{Family: VLLM, Operation: "rerank", Idempotent: true}
	vllmPooling = API{Family: VLLM, Operation: "pooling", Idempotent: true}
	vllmTokens  = API{Family: VLLM, Operation: "tokenize", Idempotent: true}
	vllmInvoke  = API{Family: VLLM, Operation: "invoke", Streaming: ByBody}

	anthropicMessages = API{Family: Anthropic, Operation: "chat", Streaming: ByBody, HasEnd: true}
	anthropicCount    = API{Family: Anthropic, Operation: "count_tokens", Idempotent: true}

	geminiGenerate = API{Family: Gemini, Operation: "generate_content"}
	geminiStream   = API{Family: Gemini, Operation: "generate_content", Streaming: Always}
	geminiEmbed    = API{Family: Gemini, Operation: "embeddings", Idempotent: true}
	geminiCount    = API{Family: Gemini, Operation: "count_tokens", Idempotent: true}

	ollamaChat     = API{Family: Ollama, Operation: "chat", Streaming: UnlessNo, HasEnd: true}
	ollamaGenerate = API{Family: Ollama, Operation: "text_completion", Streaming: UnlessNo, HasEnd: true}
	ollamaEmbed    = API{Family: Ollama, Operation: "embeddings", Idempotent: true}
)

// Route is a recognised path.
type Route struct {
	API *API
	// Model is the name in the path, decoded; "" when the body has it, or nothing.
	Model string
	// prefix and suffix are the escaped path around the name, and around the version where
	// the path names one: prefix + model [+ "/versions/" + version] + suffix.
	prefix, suffix string
}

// Match finds the API of an escaped URL path (url.URL.EscapedPath). It is exact: no
// cleaning of dots, slashes or case, because a model server would not do it either.
func Match(path string) (Route, bool) {
	if a := exact(path); a != nil {
		return Route{API: a}, true
	}
	for _, t := range [...]struct {
		prefix string
		match  func(rest string) (Route, bool)
	}{
		{"/v2/models/", matchOIP},
		{"/openai/deployments/", matchAzure},
		{"/v1beta/models/", matchGemini},
		{"/v1/models/", matchGemini},
		{"/v1alpha/models/", matchGemini},
	} {
		if rest, ok := strings.CutPrefix(path, t.prefix); ok {
			r, ok := t.match(rest)
			r.prefix = t.prefix
			return r, ok
		}
	}
	if a := elsewhere(path); a != nil {
		return Route{API: a}, true
	}
	return Route{}, false
}

// bases are where providers and servers have OpenAI's API other than below /v1: Azure's v1
// API and Groq, OpenRouter, Fireworks, DashScope, Gemini's compatible one.
var bases = [...]string{"/openai/v1/", "/api/v1/", "/inference/v1/", "/compatible-mode/v1/", "/v1beta/openai/"}

// Models reports whether a decoded path (url.URL.Path) is where a base of OpenAI's API
// lists its models, or, with an id, shows one; an id may hold slashes. Below /anthropic it
// is Anthropic's. Not recognised is /models without a base, which may be anybody's.
func Models(path string) (id string, f Family, ok bool) {
	f = OpenAI
	rest, ok := strings.CutPrefix(path, "/v1/models")
	if !ok {
		if rest, ok = strings.CutPrefix(path, "/anthropic/v1/models"); ok {
			f = Anthropic
		}
	}
	for i := 0; !ok && i < len(bases); i++ {
		if rest, ok = strings.CutPrefix(path, bases[i]); ok {
			rest, ok = strings.CutPrefix(rest, "models")
		}
	}
	if !ok || rest != "" && rest[0] != '/' {
		return "", OpenAI, false
	}
	return strings.TrimPrefix(rest, "/"), f, true
}

// elsewhere finds OpenAI's operations below other bases than /v1. Without any (DeepSeek,
// llama.cpp) only those are taken whose paths say what they are.
func elsewhere(path string) *API {
	switch path {
	case "/chat/completions":
		return &openaiChat
	case "/completions":
		return &openaiCompletion
	case "/embeddings":
		return &openaiEmbeddings
	}
	for _, base := range bases {
		if operation, ok := strings.CutPrefix(path, base); ok {
			switch operation {
			case "chat/completions":
				return &openaiChat
			case "completions":
				return &openaiCompletion
			case "embeddings":
				return &openaiEmbeddings
			case "responses":
				return &openaiResponses
			case "images/generations":
				return &openaiImages
			case "audio/speech":
				return &openaiSpeech
			case "moderations":
				return &openaiModeration
			}
			return nil
		}
	}
	return nil
}

// exact finds the APIs whose path is fixed.
func exact(path string) *API {
	switch path {
	case "/v1/chat/completions":
		return &openaiChat
	case "/v1/completions":
		return &openaiCompletion
	case "/v1/embeddings":
		return &openaiEmbeddings
	case "/v1/responses":
		return &openaiResponses
	case "/v1/images/generations":
		return &openaiImages
	case "/v1/audio/speech":
		return &openaiSpeech
	case "/v1/moderations":
		return &openaiModeration
	case "/v1/messages", "/anthropic/v1/messages":
		return &anthropicMessages
	case "/v1/messages/count_tokens", "/anthropic/v1/messages/count_tokens":
		return &anthropicCount
	case "/api/chat":
		return &ollamaChat
	case "/api/generate":
		return &ollamaGenerate
	case "/api/embed", "/api/embeddings":
		return &ollamaEmbed
	case "/generate":
		return &tgiGenerate
	case "/generate_stream":
		return &tgiStream
	case "/score", "/v1/score":
		return &vllmScore
	case "/rerank", "/v1/rerank", "/v2/rerank":
		return &vllmRerank
	case "/pooling":
		return &vllmPooling
	case "/tokenize", "/detokenize":
		return &vllmTokens
	case "/invocations":
		return &vllmInvoke
	}
	return nil
}

// segment cuts a path at the next slash and decodes the first part; ok is false if it is
// empty or badly escaped.
func segment(rest string) (name, tail string, ok bool) {
	raw := rest
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		raw, tail = rest[:i], rest[i:]
	}
	name, err := url.PathUnescape(raw)
	return name, tail, err == nil && name != ""
}

func matchOIP(rest string) (Route, bool) {
	name, tail, ok := segment(rest)
	if !ok {
		return Route{}, false
	}
	if after, found := strings.CutPrefix(tail, "/versions/"); found {
		// What version is meant is for policy to say; the name's is dropped.
		if _, tail, ok = segment(after); !ok {
			return Route{}, false
		}
	}
	r := Route{Model: name, suffix: tail}
	switch tail {
	case "/infer":
		r.API = &oipInfer
	case "/generate":
		r.API = &oipGenerate
	case "/generate_stream":
		r.API = &oipStream
	case "", "/ready", "/config", "/stats":
		r.API = &oipMeta
	}
	return r, r.API != nil
}

func matchAzure(rest string) (Route, bool) {
	name, tail, ok := segment(rest)
	r := Route{Model: name, suffix: tail}
	switch tail {
	case "/chat/completions":
		r.API = &azureChat
	case "/completions":
		r.API = &azureCompletion
	case "/embeddings":
		r.API = &azureEmbeddings
	}
	return r, ok && r.API != nil
}

// matchGemini takes {model}:{method}; the colon is never escaped in these APIs.
func matchGemini(rest string) (Route, bool) {
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return Route{}, false
	}
	name, tail, ok := segment(rest[:i])
	r := Route{Model: name, suffix: rest[i:]}
	switch r.suffix {
	case ":generateContent":
		r.API = &geminiGenerate
	case ":streamGenerateContent":
		r.API = &geminiStream
	case ":embedContent", ":batchEmbedContents":
		r.API = &geminiEmbed
	case ":countTokens":
		r.API = &geminiCount
	}
	return r, ok && tail == "" && r.API != nil
}

// Rewrite returns the escaped path that names upstream instead of the logical model, ""
// if the path holds no name or upstream is empty. For the Open Inference Protocol
// upstream is name or name/versions/version (see SplitUpstream); a version that the
// caller named is replaced with the policy's, or dropped.
func (r *Route) Rewrite(upstream string) string {
	if r.Model == "" || upstream == "" {
		return ""
	}
	if r.API.Family != OIP {
		return r.prefix + url.PathEscape(upstream) + r.suffix
	}
	name, version := SplitUpstream(upstream)
	out := r.prefix + url.PathEscape(name)
	if version != "" {
		out += "/versions/" + url.PathEscape(version)
	}
	return out + r.suffix
}

// SplitUpstream cuts the name of a model at its servers, written as the paths of the Open
// Inference Protocol have it: name or name/versions/version.
func SplitUpstream(upstream string) (name, version string) {
	name, version, _ = strings.Cut(upstream, "/versions/")
	return name, version
}
