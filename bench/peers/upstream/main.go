// Command upstream stands behind every proxy under test. It answers each request with the
// same chat completion of 1 KiB, as fast as fasthttp can (-kind json), or with a stream of
// events (-kind sse); or it sends bytes to whoever connects (-kind tcp).
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"strings"

	"github.com/valyala/fasthttp"

	"github.com/outrigger-mesh/outrigger/bench/peers/internal/serve"
)

const size = 1024

func main() {
	kind := flag.String("kind", "json", "json, sse or tcp")
	flag.Parse()
	switch *kind {
	case "json":
		body := answer(size)
		serve.Main(serve.Fast(func(c *fasthttp.RequestCtx) {
			c.SetContentType("application/json")
			c.Response.SetBodyRaw(body)
		}))
	case "sse":
		serve.Main(serve.FastEverywhere(stream))
	case "tcp":
		serve.Main(serve.Server(flood))
	}
	serve.Main(errors.New("-kind must be json, sse or tcp"))
}

// answer is a chat completion of exactly n bytes.
func answer(n int) []byte {
	render := func(text string) []byte {
		out, err := json.Marshal(map[string]any{
			"id": "chatcmpl-bench", "object": "chat.completion", "created": 1700000000, "model": "bench-v1",
			"choices": []any{map[string]any{"index": 0, "finish_reason": "stop",
				"message": map[string]any{"role": "assistant", "content": text}}},
			"usage": map[string]any{"prompt_tokens": 12, "completion_tokens": 180, "total_tokens": 192},
		})
		if err != nil {
			serve.Main(err)
		}
		return out
	}
	return render(strings.Repeat("w", n-len(render(""))))
}
