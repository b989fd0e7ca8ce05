package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// The time to the first event is that event's, not the end's, and a stream that breaks
// off or is none is an error.
func TestTTFB(t *testing.T) {
	kind := "good"
	address := backend(t, func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			t.Error(err)
		}
		if kind == "none" {
			fmt.Fprint(w, "no event")
			return
		}
		fmt.Fprint(w, "data: first\n\n")
		w.(http.Flusher).Flush()
		if kind == "broken" {
			panic(http.ErrAbortHandler)
		}
		pause := time.NewTimer(20 * time.Millisecond) // the server's: the measured time must not contain it
		<-pause.C
		fmt.Fprint(w, "data: [DONE]\n\n")
	})
	for _, kind = range []string{"good", "none", "broken"} {
		spec := loadOf(address, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
		raw, err := json.Marshal(spec)
		if err != nil {
			t.Fatal(err)
		}
		got, err := childTTFB(t.Context(), nil, strings.NewReader(string(raw)))
		if kind != "good" {
			if err == nil {
				t.Errorf("%s: %+v", kind, got)
			}
			continue
		}
		rep, _ := got.(loadReport)
		if err != nil || rep.Requests == 0 || rep.P50Micros <= 0 || rep.Seconds < float64(rep.Requests)*0.02 {
			t.Errorf("%+v, %v", got, err)
		}
	}
}

// What is passed through arrives, by whatever passes it, and the proxy's CPU is counted.
func TestDrain(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // the test is over
			}
			go func() {
				defer c.Close()
				if _, err := c.Read(make([]byte, 8)); err != nil {
					return // a probe
				}
				for err == nil {
					_, err = c.Write(make([]byte, 64<<10))
				}
			}()
		}
	}()
	e := testEnv(t)
	for name, start := range map[string]func(context.Context, string, string) (*running, error){"haproxy": e.haproxyTCP, "envoy": e.envoyTCP} {
		run, err := start(t.Context(), "", l.Addr().String())
		if err != nil && strings.Contains(err.Error(), "not installed") {
			t.Logf("not tested: %v", err)
			continue
		} else if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := e.drain(t.Context(), "", run, loadSpec{Address: run.address, Connections: 2, Duration: 300 * time.Millisecond})
		if err != nil && strings.Contains(err.Error(), "nothing can be said") {
			t.Logf("%s: %v", name, err) // starved of CPU: a refusal to measure is right
		} else if err != nil || got["gb_s"] <= 0 || got["cpu_s_gb"] <= 0 {
			t.Errorf("%s: %v, %v", name, got, err)
		}
		run.stop()
	}
}

// What is added is reckoned within a round, and only where the way without a proxy is known.
func TestLessDirect(t *testing.T) {
	at := func(v float64) sample { return sample{Values: map[string]float64{"p": v}} }
	c := comparison{Rounds: []round{{us: at(90), straight: at(50)}, {us: at(100)}}}
	c.lessDirect("p", "added")
	if v := c.Rounds[0][us].Values["added"]; v != 40 {
		t.Errorf("added %v", v)
	}
	if _, ok := c.Rounds[1][us].Values["added"]; ok {
		t.Errorf("added to nothing: %+v", c.Rounds[1])
	}
}
