// Package serve starts the servers of the benchmark peers the way the benchmark runner
// expects: on a free loopback port, announced as one JSON line on standard output.
package serve

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/valyala/fasthttp"
)

// listen binds a free port of an address and announces it as one of 127.0.0.1.
func listen(on string) (net.Listener, error) {
	l, err := net.Listen("tcp4", on+":0")
	if err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		return nil, err
	}
	line := map[string]any{"listening": map[string]string{"listen": net.JoinHostPort(loopback, port)}}
	return l, json.NewEncoder(os.Stdout).Encode(line)
}

const loopback = "127.0.0.1"

// HTTP serves h with net/http until the process is killed.
func HTTP(h http.Handler) error {
	l, err := listen(loopback)
	if err != nil {
		return err
	}
	s := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	return s.Serve(l)
}

// Server serves with whatever takes a listener, until the process is killed.
func Server(serve func(net.Listener) error) error {
	l, err := listen(loopback)
	if err != nil {
		return err
	}
	return serve(l)
}

// Fast serves h with fasthttp until the process is killed, with the settings its
// documentation recommends for throughput.
func Fast(h fasthttp.RequestHandler) error { return fast(h, loopback) }

// FastEverywhere is Fast on every address of the machine, 127.0.0.2 and its like among
// them, so that one program can be many endpoints.
func FastEverywhere(h fasthttp.RequestHandler) error { return fast(h, "0.0.0.0") }

func fast(h fasthttp.RequestHandler, on string) error {
	l, err := listen(on)
	if err != nil {
		return err
	}
	s := &fasthttp.Server{Handler: h, NoDefaultServerHeader: true, NoDefaultDate: false, ReadTimeout: time.Minute}
	return s.Serve(l)
}

// Main reports err and ends the process with a failure; nil never comes from a server.
func Main(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
