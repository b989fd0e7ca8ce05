package inference

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
)

func gzipped(s string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	io.WriteString(w, s)
	w.Close()
	return b.String()
}

func deflated(s string) string {
	var b bytes.Buffer
	w := zlib.NewWriter(&b)
	io.WriteString(w, s)
	w.Close()
	return b.String()
}

// What Triton's clients send with request_compression_algorithm, and what may hide in it.
func TestEncodedBodies(t *testing.T) {
	const limit = 2 << 20
	plain := `{"inputs":[{"name":"in","shape":[1],"datatype":"FP32","data":[1]}]}`
	big := `{"model":"gpt","x":"` + strings.Repeat("x", limit) + `"}`
	for _, tt := range []struct {
		name, path, coding, body string
		status                   int
		arrives                  string
	}{
		{"gzip", "/v2/models/gpt/infer", "gzip", gzipped(plain), 200, plain},
		{"deflate", "/v2/models/gpt/infer", "deflate", deflated(plain), 200, plain},
		{"in capitals", chatPath, "X-GZIP", gzipped(`{"model":"gpt"}`), 200, `{"model":"gpt-v1"}`},
		{"identity", chatPath, "identity", `{"model":"gpt"}`, 200, `{"model":"gpt-v1"}`},
		{"not gzip", chatPath, "gzip", `{"model":"gpt"}`, 400, ""},
		{"cut", chatPath, "gzip", gzipped(`{"model":"gpt"}`)[:20], 400, ""},
		{"a bomb", chatPath, "gzip", gzipped(big), 413, ""},
		{"two codings", chatPath, "gzip, gzip", gzipped(gzipped(`{"model":"gpt"}`)), 415, ""},
		{"unknown here: as it came", chatPath, "gzip", gzipped(`{"model":"other"}`), 418, ""},
	} {
		arrived, coding := "", ""
		h := mustNew(t, Options{Policy: newSource(newPolicy(0, eps("a:1"), nil)).get, MaxBody: limit,
			Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
				b, err := io.ReadAll(r.Body)
				arrived, coding = string(b), r.Header.Get("Content-Encoding")
				if r.ContentLength != int64(len(b)) {
					t.Errorf("%s: %d bytes announced, %d sent", tt.name, r.ContentLength, len(b))
				}
				return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader("{}"))}, err
			}),
			Passthrough: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if b, err := io.ReadAll(r.Body); err != nil || string(b) != tt.body || r.Header.Get("Content-Encoding") != tt.coding {
					t.Errorf("%s: passed on as %q, %v", tt.name, b, err)
				}
				w.WriteHeader(418)
			})})
		r := httptest.NewRequest("POST", tt.path, strings.NewReader(tt.body))
		r.Header.Set("Content-Encoding", tt.coding)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != tt.status || arrived != tt.arrives || coding != "" && coding != "identity" {
			t.Errorf("%s: %d, %q arrived as %q\n%s", tt.name, w.Code, arrived, coding, w.Body)
		}
		if n := h.large.Load(); n != 0 {
			t.Errorf("%s: %d bytes of room are not given back", tt.name, n)
		}
	}
}

// Large bodies share a room: what does not fit is told to come again, small ones go on.
func TestRoomForLargeBodies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 2 << 20
		h := mustNew(t, Options{Policy: newSource(newPolicy(0, eps("a:1"), nil)).get, MaxBody: limit,
			Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
				_, err := io.Copy(io.Discard, r.Body)
				return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader("{}"))}, err
			})})
		ask := func(body io.Reader) *httptest.ResponseRecorder {
			w := httptest.NewRecorder()
			r := httptest.NewRequest("POST", chatPath, body)
			r.ContentLength = -1
			h.ServeHTTP(w, r)
			return w
		}
		begin := `{"model":"gpt","x":"` + strings.Repeat("x", smallBody)
		var open []*io.PipeWriter
		ends := make(chan int, largeBodies)
		for range largeBodies { // of unknown length: each may become as large as any
			r, w := io.Pipe()
			go func() { ends <- ask(r).Code }()
			if _, err := io.WriteString(w, begin); err != nil {
				t.Fatal(err)
			}
			open = append(open, w)
		}
		synctest.Wait()
		if w := ask(strings.NewReader(begin + `"}`)); w.Code != 503 || errorCode(t, w.Body.Bytes()) != "overloaded" || w.Header().Get("retry-after") == "" {
			t.Errorf("one more: %d %s", w.Code, w.Body)
		}
		if w := ask(strings.NewReader(`{"model":"gpt"}`)); w.Code != 200 {
			t.Errorf("a small one: %d %s", w.Code, w.Body)
		}
		for _, w := range open {
			if _, err := io.WriteString(w, `"}`); err != nil {
				t.Fatal(err)
			}
			w.Close()
		}
		for range open {
			if code := <-ends; code != 200 {
				t.Errorf("a large one ended with %d", code)
			}
		}
		if w := ask(strings.NewReader(begin + `"}`)); w.Code != 200 {
			t.Errorf("afterwards: %d %s", w.Code, w.Body)
		}
	})
}
