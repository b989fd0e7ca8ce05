package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// backend counts what reaches it.
func backend(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func loadOf(address string, requests ...string) loadSpec {
	s := loadSpec{Address: address, Connections: 4, Duration: 50 * time.Millisecond}
	for _, r := range requests {
		s.Requests = append(s.Requests, []byte(r))
	}
	return s
}

// Every request counted was answered once, all requests of the list were used, and the
// bodies sent arrived whole.
func TestLoad(t *testing.T) {
	var served atomic.Int64
	var paths sync.Map
	address := backend(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || r.Method == http.MethodPost && string(body) != "hello" {
			w.WriteHeader(http.StatusBadRequest)
		}
		served.Add(1)
		paths.Store(r.URL.Path, true)
		fmt.Fprint(w, strings.Repeat("v", 200))
	})
	rep, err := load(t.Context(), loadOf(address, "GET /a HTTP/1.1\r\nHost: x\r\n\r\n", "POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"))
	if err != nil {
		t.Fatal(err)
	}
	if int64(rep.Requests) != served.Load() || rep.Requests < 4 {
		t.Errorf("%d requests reported, %d served", rep.Requests, served.Load())
	}
	for _, p := range []string{"/a", "/b"} {
		if _, ok := paths.Load(p); !ok {
			t.Errorf("%s was never asked for", p)
		}
	}
	if rep.Seconds < 0.05 || rep.P50Micros <= 0 || rep.P99Micros < rep.P50Micros || rep.AnswerBytes < 200 {
		t.Errorf("report %+v", rep)
	}
}

// Answers that would spoil a figure end the run.
func TestLoadRefusesWrongAnswers(t *testing.T) {
	for name, h := range map[string]http.HandlerFunc{
		"status": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) },
		"closed": func(w http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) },
		"close":  func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Connection", "close") },
	} {
		s := loadOf(backend(t, h), "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		s.Duration = time.Minute // a closed connection shows with the next request on it
		if rep, err := load(t.Context(), s); err == nil {
			t.Errorf("%s: %+v", name, rep)
		}
	}
	for _, s := range []loadSpec{{}, loadOf("localhost:1", "x"), loadOf("127.0.0.1:1", "x"), {Address: "127.0.0.1:1", Connections: 1}} {
		if _, err := load(t.Context(), s); err == nil {
			t.Errorf("%+v was accepted", s)
		}
	}
}

// A silent server does not hold the generator once nobody waits for the result.
func TestLoadEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	release := make(chan struct{})
	defer close(release)
	address := backend(t, func(http.ResponseWriter, *http.Request) {
		cancel()
		<-release
	})
	if _, err := load(ctx, loadOf(address, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")); err == nil {
		t.Error("the run succeeded")
	}
}

func TestWrk(t *testing.T) {
	script := wrkScript([][]byte{[]byte("GET /\"x\" HTTP/1.1\r\nHost: y\r\n\r\n")})
	if want := `"GET /\"x\" HTTP/1.1\r\nHost: y\r\n\r\n",` + "\n"; !strings.Contains(script, want) {
		t.Errorf("script lacks %s:\n%s", want, script)
	}
	got, err := parseWrk([]byte("Running 1s test\n  Transfer/sec: 1\nfigures 1000 0 1.500000 250.000 900.000 300000\n"))
	if want := (loadReport{Requests: 1000, Seconds: 1.5, P50Micros: 250, P99Micros: 900, AnswerBytes: 300}); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "\nfigures x", "\nfigures 10 1 1.0 1.0 1.0 5", "\nfigures 0 0 1.0 0 0 0"} {
		if r, err := parseWrk([]byte(bad)); err == nil {
			t.Errorf("%q was read as %+v", bad, r)
		}
	}
}
