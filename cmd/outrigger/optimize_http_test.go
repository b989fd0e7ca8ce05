//go:build !dataplane

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/experiments/algorithms"
)

// A server that is asked for losses: what it answers, and what of that is a failed trial.
func TestObjectiveOverHTTP(t *testing.T) {
	release := make(chan struct{})
	elsewhere := 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var p map[string]any
		raw, err := io.ReadAll(r.Body)
		if err != nil || json.Unmarshal(raw, &p) != nil || r.Method != http.MethodPost {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		switch r.URL.Path {
		case "/number":
			fmt.Fprint(w, p["x"].(float64)*2)
		case "/object":
			fmt.Fprintf(w, `{"loss": %v, "seconds": 3}`, p["x"])
		case "/redirect":
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		case "/elsewhere":
			elsewhere++
		case "/hang":
			select {
			case <-release:
			case <-r.Context().Done():
			}
		case "/long":
			fmt.Fprint(w, strings.Repeat(" ", maxObjectiveOutput+1))
		case "/error":
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprint(w, 1)
		default:
			fmt.Fprint(w, map[string]string{"/null": "null", "/text": `"3"`, "/huge": "1e300", "/other": `{"cost": 1}`}[r.URL.Path])
		}
	}))
	defer srv.Close()
	defer close(release)
	for path, want := range map[string]float64{"/number": 3, "/object": 1.5} {
		o := &tuner{objective: []string{srv.URL + path}, trialTimeout: time.Minute}
		if loss, failed := o.evaluate(t.Context(), algorithms.Params{"x": 1.5}); failed || loss != want {
			t.Errorf("%s: %v, failed %v, want %v", path, loss, failed, want)
		}
	}
	for _, path := range []string{"/null", "/text", "/huge", "/other", "/long", "/error", "/redirect", "/hang"} {
		o := &tuner{objective: []string{srv.URL + path}, trialTimeout: time.Minute}
		if path == "/hang" {
			o.trialTimeout = 20 * time.Millisecond
		}
		if loss, failed := o.evaluate(t.Context(), algorithms.Params{"x": 1.5}); !failed {
			t.Errorf("%s: loss %v, want a failed trial", path, loss)
		}
	}
	if elsewhere != 0 {
		t.Error("the setting was sent on to where the server pointed")
	}
	if isURL([]string{"curl", "http://x"}) || isURL([]string{"./objective"}) || !isURL([]string{"https://x/y"}) {
		t.Error("commands and URLs are mistaken for each other")
	}
}
