package main

import (
	"bufio"
	"bytes"
	"net"
	"time"

	"github.com/valyala/fasthttp"
)

// Pauses of a stream: between two events, and between two signs of life of a held one.
const (
	eventPause = time.Millisecond
	holdPause  = 20 * time.Second
)

// stream answers with three events, the first one at once. A request whose body says
// "hold" gets the first event only and then a comment now and then, until it is gone.
func stream(c *fasthttp.RequestCtx) {
	hold := bytes.Contains(c.PostBody(), []byte("hold"))
	c.SetContentType("text/event-stream")
	c.SetBodyStreamWriter(func(w *bufio.Writer) {
		const event = `data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"bench-v1","choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}` + "\n\n"
		texts, pause := []string{event, event, "data: [DONE]\n\n"}, eventPause
		if hold {
			texts, pause = []string{event, ": held\n\n"}, holdPause
		}
		t := time.NewTicker(pause)
		defer t.Stop()
		for i := 0; hold || i < len(texts); i++ {
			if i > 0 {
				<-t.C
			}
			if _, err := w.WriteString(texts[min(i, len(texts)-1)]); err != nil {
				return
			}
			if w.Flush() != nil {
				return // the client left
			}
		}
	})
}

// flood sends to every connection, once it has said something, until it is closed.
func flood(l net.Listener) error {
	block := make([]byte, 256<<10)
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			if _, err := c.Read(make([]byte, 64)); err != nil {
				return
			}
			for {
				if _, err := c.Write(block); err != nil {
					return
				}
			}
		}()
	}
}
