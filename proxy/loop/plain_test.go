package loop

import (
	"io"
	"net/http"
	"testing"
)

// A handler that passes on another server's answer adds nothing to it: the client is asked
// for its body once, whoever asks first, and no type of the content is guessed.
func TestPassedOnAnswers(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			s := start(t, kind, Options{Fast: declineAll, Slow: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/before" {
					w.WriteHeader(http.StatusContinue)
				}
				body, err := io.ReadAll(r.Body)
				if err != nil {
					return
				}
				if r.URL.Path == "/after" {
					w.WriteHeader(http.StatusContinue)
				}
				w.Header()["Content-Type"] = nil
				_, _ = w.Write(body)
			})})
			for _, path := range []string{"/before", "/after", "/none"} {
				c := s.dial(t)
				c.send("POST " + path + " HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
				for _, want := range []string{"HTTP/1.1 100 Continue\r\n", "\r\n"} {
					if l, err := c.r.ReadString('\n'); err != nil || l != want {
						t.Fatalf("%s: %q, %v", path, l, err)
					}
				}
				c.send("ok")
				if r := c.want("POST", 200, "ok"); r.Header["Content-Type"] != nil {
					t.Errorf("%s: %v", path, r.Header)
				}
			}
		})
	}
}
