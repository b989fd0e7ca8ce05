// Command upstream stands behind every proxy under test: it answers each request with
// the same chat completion of 1 KiB, as fast as fasthttp can.
package main

import (
	"encoding/json"
	"strings"

	"github.com/valyala/fasthttp"

	"github.com/outrigger-mesh/outrigger/bench/peers/internal/serve"
)

const size = 1024

func main() {
	body := answer(size)
	serve.Main(serve.Fast(func(c *fasthttp.RequestCtx) {
		c.SetContentType("application/json")
		c.Response.SetBodyRaw(body)
	}))
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
