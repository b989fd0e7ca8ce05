// Command httpproxy is the peer of a proxied call: httputil.ReverseProxy with a tuned
// transport and buffer pool, or fasthttp's server in front of its HostClient.
package main

import (
	"errors"
	"flag"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/outrigger-mesh/outrigger/bench/peers/internal/serve"
)

func main() {
	server := flag.String("server", "nethttp", "nethttp or fasthttp")
	upstream := flag.String("upstream", "", "host:port to forward to")
	flag.Parse()
	serve.Main(run(*server, *upstream))
}

func run(server, upstream string) error {
	switch server {
	case "nethttp":
		target := &url.URL{Scheme: "http", Host: upstream}
		return serve.HTTP(&httputil.ReverseProxy{
			Rewrite:    func(r *httputil.ProxyRequest) { r.SetURL(target) },
			BufferPool: &buffers{sync.Pool{New: func() any { return make([]byte, 16<<10) }}},
			Transport: &http.Transport{MaxIdleConns: 512, MaxIdleConnsPerHost: 512, IdleConnTimeout: time.Minute,
				DisableCompression: true, ReadBufferSize: 16 << 10, WriteBufferSize: 16 << 10},
		})
	case "fasthttp":
		client := &fasthttp.HostClient{Addr: upstream, MaxConns: 512, ReadTimeout: time.Minute, WriteTimeout: time.Minute,
			NoDefaultUserAgentHeader: true, DisableHeaderNamesNormalizing: true, DisablePathNormalizing: true}
		return serve.Fast(func(c *fasthttp.RequestCtx) {
			c.Request.Header.Del("Connection") // hop by hop
			if err := client.Do(&c.Request, &c.Response); err != nil {
				c.Error(err.Error(), fasthttp.StatusBadGateway)
				return
			}
			c.Response.Header.Del("Connection")
		})
	}
	return errors.New("-server must be nethttp or fasthttp")
}

// buffers is a httputil.BufferPool.
type buffers struct{ p sync.Pool }

func (b *buffers) Get() []byte  { return b.p.Get().([]byte) }
func (b *buffers) Put(x []byte) { b.p.Put(x) } // as a slice, since the interface wants one
