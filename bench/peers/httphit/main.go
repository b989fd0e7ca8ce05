// Command httphit is the peer of a cached variable read over HTTP/1.1: it answers
// GET /v1/variables/bench/name-NNNN with a fixed body from an in-memory map, by
// net/http or by fasthttp.
package main

import (
	"errors"
	"flag"
	"fmt"
	"net/http"
	"strings"

	"github.com/valyala/fasthttp"

	"github.com/outrigger-mesh/outrigger/bench/peers/internal/serve"
)

func main() {
	server := flag.String("server", "nethttp", "nethttp or fasthttp")
	keys := flag.Int("keys", 1000, "number of keys")
	size := flag.Int("body", 200, "body bytes")
	flag.Parse()
	values := make(map[string][]byte, *keys)
	for i := range *keys {
		values[fmt.Sprintf("/v1/variables/bench/name-%04d", i)] = []byte(strings.Repeat("v", *size))
	}
	serve.Main(run(*server, values))
}

func run(server string, values map[string][]byte) error {
	switch server {
	case "nethttp":
		return serve.HTTP(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			v, ok := values[r.URL.Path]
			if !ok {
				http.NotFound(w, r)
				return
			}
			w.Header()["Content-Type"] = []string{"application/json"}
			w.Write(v)
		}))
	case "fasthttp":
		return serve.Fast(func(c *fasthttp.RequestCtx) {
			v, ok := values[string(c.Path())]
			if !ok {
				c.SetStatusCode(fasthttp.StatusNotFound)
				return
			}
			c.SetContentType("application/json")
			c.Response.SetBodyRaw(v)
		})
	}
	return errors.New("-server must be nethttp or fasthttp")
}
