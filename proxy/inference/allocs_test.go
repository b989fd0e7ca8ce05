package inference

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// sink is a ResponseWriter that keeps nothing.
type sink struct {
	header http.Header
	status int
	n      int
}

func (s *sink) Header() http.Header         { return s.header }
func (s *sink) WriteHeader(status int)      { s.status = status }
func (s *sink) Write(p []byte) (int, error) { s.n += len(p); return len(p), nil }

// mostAllocations is what one JSON call may take on the heap between the request's arrival
// and its answer, without the transport and with the stub's own five.
const mostAllocations = 46

// The price of routing, assignment, breaker, budgets and accounting of one call.
func TestCallAllocations(t *testing.T) {
	answer := answerOf("gpt-v1", "one two three")
	tr := roundTripper(func(r *http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(strings.NewReader(answer)), ContentLength: int64(len(answer))}, nil
	})
	h := mustNew(t, Options{Transport: tr, Policy: newSource(newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil)).get})
	body := chatBody("user-1", false)
	r, err := http.NewRequest("POST", chatPath, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.ContentLength = int64(len(body))
	in := strings.NewReader(body)
	r.Body = io.NopCloser(in)
	w := &sink{header: http.Header{}}
	n := testing.AllocsPerRun(200, func() {
		in.Reset(body)
		clear(w.header)
		h.ServeHTTP(w, r)
		if w.status != 200 {
			t.Fatal(w.status)
		}
	})
	t.Logf("%v allocations", n)
	if n > mostAllocations {
		t.Errorf("%v allocations, want at most %d", n, mostAllocations)
	}
}
