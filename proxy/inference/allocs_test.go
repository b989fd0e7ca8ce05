package inference

import (
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/proxy/http1"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
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

// mostRelayAllocations: the strings of the request, the breaker's report, the quoted name.
const mostRelayAllocations = 13

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

// The same on an event loop, with the head of the answer and without a connection.
func TestRelayAllocations(t *testing.T) {
	d := upstream.NewDirect(upstream.TransportOptions{}, http.DefaultTransport)
	h := mustNew(t, Options{Transport: d, Policy: newSource(newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil)).get})
	body := []byte(chatBody("user-1", false))
	var q http1.Request
	var a http1.Answer
	seen := 0
	if _, err := q.Parse([]byte("POST "+chatPath+" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "+strconv.Itoa(len(body))+"\r\n\r\n"), &seen, http1.Limits{}); err != nil {
		t.Fatal(err)
	}
	content := []byte(answerOf("gpt-v1", "one two three"))
	if _, err := a.Parse([]byte("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "+strconv.Itoa(len(content))+"\r\n\r\n"), &seen, "POST", http1.Limits{}); err != nil {
		t.Fatal(err)
	}
	relay := h.Relay(d)
	up, down, date := make([]byte, 0, 4096), make([]byte, 0, 4096), []byte("date")
	n := testing.AllocsPerRun(200, func() {
		if !relay.Wants(&q) {
			t.Fatal("not wanted")
		}
		c := relay.Route(&q, body)
		if c == nil {
			t.Fatal("no route")
		}
		if _, _, ok := c.Start(&q, body, up); !ok || !c.Fits(&a) || len(c.Finish(&a, content, down, date, false)) < len(content) {
			t.Fatal("not carried")
		}
	})
	t.Logf("%v allocations", n)
	if n > mostRelayAllocations {
		t.Errorf("%v allocations, want at most %d", n, mostRelayAllocations)
	}
}

// mostEventAllocations: an event of a stream under way is looked at and passed on.
const mostEventAllocations = 0

// The price of an event that a loop passes on.
func TestPassAllocations(t *testing.T) {
	d := upstream.NewDirect(upstream.TransportOptions{}, http.DefaultTransport)
	h := mustNew(t, Options{Transport: d, Policy: newSource(newPolicy(0, []policy.Endpoint{at("a:1", "eu")}, nil)).get})
	body := []byte(chatBody("user-1", true))
	var q http1.Request
	var a http1.Answer
	seen := 0
	if _, err := q.Parse([]byte("POST "+chatPath+" HTTP/1.1\r\nHost: x\r\nContent-Length: "+strconv.Itoa(len(body))+"\r\n\r\n"), &seen, http1.Limits{}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Parse([]byte("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"), &seen, "POST", http1.Limits{}); err != nil {
		t.Fatal(err)
	}
	c := h.Relay(d).Route(&q, body)
	if c == nil {
		t.Fatal("no route")
	}
	buf, event := make([]byte, 0, 4096), []byte(word)
	if _, _, ok := c.Start(&q, body, buf); !ok {
		t.Fatal("not begun")
	}
	if _, ok := c.Streams(&a); !ok {
		t.Fatal("not a stream")
	}
	if out, used, _ := c.Pass(&a, event, false, buf, []byte("Date: x\r\n"), false); used != len(event) || len(out) < used {
		t.Fatalf("%q", out)
	}
	n := testing.AllocsPerRun(200, func() {
		if out, used, _ := c.Pass(nil, event, false, buf, nil, false); used != len(event) || len(out) < used {
			t.Fatalf("%q", out)
		}
	})
	if n > mostEventAllocations {
		t.Errorf("%v allocations, want at most %d", n, mostEventAllocations)
	}
	c.Gone()
}
