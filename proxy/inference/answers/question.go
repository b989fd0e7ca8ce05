package answers

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
)

// Asked is a question and everything its answer may depend on.
type Asked struct {
	API        *shape.API
	Path       string // escaped, with its query
	Body       []byte // JSON
	Model      string // logical
	Version    string
	Generation uint64  // of the version in this process
	Stretch    Stretch // of the version in all processes
	Arm        string
	Tenant     string // who may share answers: credentials, organisation
	Pins       string // versions of variables the caller has pinned
	Pinned     string // what the variables are that the version pins
}

// Keys are those of a question in the process tier and in the node tier.
type Keys struct{ Process, Node Key }

// Question returns the keys of a question, and whether the protocol's own parameters make
// its answer the same every time. ok is false, and there are no keys, if the body is not a
// JSON object if it has a key twice (readers differ on which one counts), or if asking has an effect
// besides the answer.
func Question(q Asked) (keys Keys, deterministic, ok bool) {
	body := map[string]any{}
	d := json.NewDecoder(bytes.NewReader(q.Body))
	d.UseNumber() // 1.0 and 1 may be different parameters to a model server
	if err := d.Decode(&body); err != nil || d.More() || keysIn(body) != colons(q.Body) || hasEffects(q.API, body) {
		return Keys{}, false, false
	}
	canonical, err := json.Marshal(body) // keys sorted
	if err != nil {
		return Keys{}, false, false
	}
	base := digest(q.API.Family.Provider(), q.API.Operation, q.Path, q.Model, q.Version, q.Arm, q.Tenant, q.Pins, q.Pinned, string(canonical))
	return Keys{Process: digest("process", string(base), strconv.FormatUint(q.Generation, 10)), Node: digest("node", string(base), string(q.Stretch[:]))},
		Deterministic(q.API, body), true
}

// digest hashes parts, each with its length, so that none runs into the next.
func digest(parts ...string) Key {
	h := sha256.New()
	for _, s := range parts {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(s)))
		h.Write(n[:])
		h.Write([]byte(s))
	}
	return Key(h.Sum(nil))
}

// colons counts the keys of valid JSON text, every one of them.
func colons(text []byte) (n int) {
	inside := false
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == '\\':
			i++ // escapes occur in strings only
		case c == '"':
			inside = !inside
		case c == ':' && !inside:
			n++
		}
	}
	return n
}

// keysIn counts the keys of a decoded value, which has each only once.
func keysIn(v any) (n int) {
	switch v := v.(type) {
	case map[string]any:
		n = len(v)
		for _, e := range v {
			n += keysIn(e)
		}
	case []any:
		for _, e := range v {
			n += keysIn(e)
		}
	}
	return n
}

// hasEffects: the question leaves something behind at the server, or goes on from what
// was left there.
func hasEffects(a *shape.API, body map[string]any) bool {
	if store, _ := body["store"].(bool); store {
		return true
	}
	if a.Named { // responses are stored unless told otherwise
		if store, set := body["store"].(bool); !set || store {
			return true
		}
		for _, key := range []string{"previous_response_id", "conversation", "tools"} {
			if body[key] != nil {
				return true
			}
		}
		background, _ := body["background"].(bool)
		return background
	}
	if p, ok := body["parameters"].(map[string]any); ok && p["sequence_id"] != nil {
		return true
	}
	return body["keep_alive"] != nil || body["cachedContent"] != nil || body["container"] != nil
}

// Deterministic reports whether the parameters of a request, decoded with UseNumber, ask
// for the same answer every time:
//
//   - embeddings, scores, rankings, pooling and token counts: always;
//   - OpenAI, Azure, Anthropic, Triton's generate and vLLM's invocations: temperature 0, or a
//     seed (which servers honour as best they can);
//   - Gemini: the same inside generationConfig; Ollama: inside options;
//   - TGI: no sampling (do_sample absent or false and no sampling parameter), or a seed;
//   - Open Inference Protocol inference: never by itself, as nothing in it says so.
func Deterministic(a *shape.API, body map[string]any) bool {
	if a.Idempotent {
		return a.Family != shape.OIP
	}
	inside := func(key string) map[string]any {
		m, _ := body[key].(map[string]any)
		return m
	}
	switch a.Family {
	case shape.Gemini:
		body = inside("generationConfig")
	case shape.Ollama:
		body = inside("options")
	case shape.OIP:
		body = inside("parameters")
	case shape.TGI:
		body = inside("parameters")
		if isNumber(body["seed"]) {
			return true
		}
		for _, key := range []string{"temperature", "top_k", "top_p", "typical_p"} {
			if body[key] != nil {
				return false
			}
		}
		sample, _ := body["do_sample"].(bool)
		return !sample
	}
	return isZero(body["temperature"]) || isNumber(body["seed"])
}

func isNumber(v any) bool {
	_, ok := v.(json.Number)
	return ok
}

func isZero(v any) bool {
	n, ok := v.(json.Number)
	if !ok {
		return false
	}
	f, err := n.Float64()
	return err == nil && f == 0
}

// Control is what a Cache-Control field asks for (RFC 9111 §5.2).
type Control struct {
	NoStore    bool
	NoCache    bool          // request: ask the model; answer: do not keep
	OnlyCached bool          // request: no other answer is wanted
	Private    bool          // answer: for one user only
	MaxAge     time.Duration // -1 = not said; an answer's s-maxage counts before its max-age
}

// ReadControl reads the Cache-Control fields of a request or an answer. Directives it does
// not know, and values it cannot read, are ignored, except that an unreadable age is 0.
func ReadControl(h http.Header) Control {
	c := Control{MaxAge: -1}
	shared := false
	for _, field := range h["Cache-Control"] {
		for directive := range strings.SplitSeq(field, ",") {
			name, value, _ := strings.Cut(strings.TrimSpace(directive), "=")
			switch name = strings.ToLower(name); name {
			case "no-store":
				c.NoStore = true
			case "no-cache":
				c.NoCache = true
			case "only-if-cached":
				c.OnlyCached = true
			case "private":
				c.Private = true
			case "max-age", "s-maxage":
				if shared && name == "max-age" {
					continue
				}
				shared = shared || name == "s-maxage"
				n, err := strconv.ParseUint(strings.Trim(value, `"`), 10, 31)
				if err != nil {
					n = 0
				}
				c.MaxAge = time.Duration(n) * time.Second
			}
		}
	}
	return c
}

// Keep is how long an answer with this header may be kept, 0 = not at all, given the
// cache's own limit.
func Keep(h http.Header, ttl time.Duration) time.Duration {
	c := ReadControl(h)
	if c.NoStore || c.NoCache || c.Private || len(h["Set-Cookie"]) > 0 {
		return 0
	}
	for _, v := range h["Vary"] {
		for name := range strings.SplitSeq(v, ",") {
			if n := strings.ToLower(strings.TrimSpace(name)); n != "" && n != "accept-encoding" && n != "origin" {
				return 0 // it depends on what the key does not hold
			}
		}
	}
	if c.MaxAge >= 0 {
		return min(c.MaxAge, ttl)
	}
	return ttl
}
