package inference

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/heap"
	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// modelServer is an honest OpenAI-compatible model: it decodes requests with
// encoding/json, refuses models it does not have, echoes the last message, counts words
// as LLM tokens, and streams word by word.
type modelServer struct {
	name   string
	mu     sync.Mutex
	bodies []string
	header http.Header
}

type chatRequest struct {
	Model    string `json:"model"`
	Stream   bool   `json:"stream"`
	Messages []struct {
		Content string `json:"content"`
	} `json:"messages"`
}

func (s *modelServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	s.mu.Lock()
	s.bodies, s.header = append(s.bodies, string(body)), r.Header.Clone()
	s.mu.Unlock()
	var req chatRequest
	if err := json.Unmarshal(body, &req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if req.Model != s.name {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprintf(w, `{"error":{"message":"I serve %s, not %s","type":"invalid_request_error","param":"model","code":"model_not_found"}}`, s.name, req.Model)
		return
	}
	text := ""
	if n := len(req.Messages); n > 0 {
		text = req.Messages[n-1].Content
	}
	if req.Stream {
		w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
		io.WriteString(w, streamOf(s.name, text))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	io.WriteString(w, answerOf(s.name, text))
}

func quote(s string) string { b, _ := json.Marshal(s); return string(b) }

func answerOf(model, text string) string {
	n := len(strings.Fields(text))
	return fmt.Sprintf(`{"id":"c1","object":"chat.completion","created":1,"model":%s,"choices":[{"index":0,"finish_reason":"stop","message":{"role":"assistant","content":%s}}],"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}`,
		quote(model), quote(text), n, n, 2*n)
}

func chunkOf(model, delta string) string {
	return fmt.Sprintf(`data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":%s,"choices":[{"index":0,"delta":%s,"finish_reason":null}]}`+"\n\n", quote(model), delta)
}

const (
	roleDelta  = `{"role":"assistant","content":""}`
	streamDone = "data: [DONE]\n\n"
)

func streamOf(model, text string) string {
	var b strings.Builder
	b.WriteString(chunkOf(model, roleDelta))
	words := strings.Fields(text)
	for _, w := range words {
		b.WriteString(chunkOf(model, `{"content":`+quote(w+" ")+`}`))
	}
	fmt.Fprintf(&b, `data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":%s,"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}`+"\n\n", quote(model), len(words), len(words))
	b.WriteString(streamDone)
	return b.String()
}

// step scripts one upstream answer.
type step struct {
	status int
	ctype  string
	body   string
	cut    bool // the body ends in an error after body
	err    error
	header http.Header
}

var errCut = errors.New("connection reset by peer")

// scripted is a transport that answers each address from its own list of steps; the
// last step repeats.
type scripted struct {
	mu    sync.Mutex
	steps map[string][]step
	log   []string // addresses in order
	last  *http.Request
	body  string
}

func (s *scripted) RoundTrip(r *http.Request) (*http.Response, error) {
	var body []byte
	if r.Body != nil {
		var err error
		if body, err = io.ReadAll(r.Body); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log, s.last, s.body = append(s.log, r.URL.Host), r, string(body)
	list := s.steps[r.URL.Host]
	if len(list) == 0 {
		return nil, fmt.Errorf("no such host %s", r.URL.Host)
	}
	st := list[0]
	if len(list) > 1 {
		s.steps[r.URL.Host] = list[1:]
	}
	if st.err != nil {
		return nil, st.err
	}
	h := st.header.Clone()
	if h == nil {
		h = http.Header{}
	}
	if st.ctype == "" {
		st.ctype = "application/json"
	}
	h.Set("Content-Type", st.ctype)
	rd := io.Reader(strings.NewReader(st.body))
	if st.cut {
		rd = io.MultiReader(rd, failing{})
	}
	return &http.Response{StatusCode: st.status, Header: h, Body: io.NopCloser(rd), ContentLength: -1, TransferEncoding: []string{"chunked"}, Request: r}, nil
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errCut }

// newPolicy: model "gpt" with a stable version and a candidate at the given share of
// buckets.
func newPolicy(share uint32, stable, candidate []policy.Endpoint) *policy.Policy {
	m := policy.Model{
		Name: "gpt", Salt: "salt-1", Unit: experiments.UnitUser, WeightEpoch: 3, LastGood: "v1", MaxAttempts: 3, DeadMan: 10 * time.Second,
		Versions: []policy.Version{
			{Name: "v1", Upstream: "gpt-v1", Endpoints: stable},
			{Name: "v2", Upstream: "gpt-v2", Endpoints: candidate},
		},
		Arms: []policy.Arm{{Name: "stable", Version: "v1", Ranges: []experiments.Range{{Start: share, End: experiments.Buckets}}}},
	}
	if share > 0 {
		m.Arms = append(m.Arms, policy.Arm{Name: "candidate", Version: "v2", Ranges: []experiments.Range{{Start: 0, End: share}}})
	}
	return &policy.Policy{Position: 1, Models: []policy.Model{m}, Regions: []policy.Region{{Name: "eu", Healthy: true}, {Name: "us", Healthy: true}, {Name: "ap"}}}
}

func at(address, region string) policy.Endpoint {
	return policy.Endpoint{Address: address, Region: region, Weight: 1}
}

// source is a policy that tests can swap.
type source struct {
	p atomic.Pointer[policy.Policy]
	s atomic.Pointer[PolicyStatus]
}

func newSource(p *policy.Policy) *source {
	s := &source{}
	s.p.Store(p)
	s.s.Store(&PolicyStatus{Live: true})
	return s
}

func (s *source) get() (*policy.Policy, PolicyStatus) { return s.p.Load(), *s.s.Load() }

func mustNew(tb testing.TB, o Options) *Handler {
	tb.Helper()
	if o.Region == "" {
		o.Region = "eu"
	}
	if o.Room == nil {
		o.Room = heap.NewRoom(1 << 40)
		tb.Cleanup(func() { // after the servers have ended
			if !o.Room.Empty() {
				tb.Errorf("%d bytes of memory were not given back", o.Room.Held())
			}
		})
	}
	h, err := New(o)
	if err != nil {
		tb.Fatal(err)
	}
	return h
}

// mesh is a handler in front of real model servers, over loopback.
type mesh struct {
	handler *Handler
	front   front
	source  *source
}

// front is where a mesh listens.
type front struct {
	URL   string
	Close func() // waits for the handlers
}

func newMesh(tb testing.TB, p *policy.Policy, o Options) *mesh {
	tb.Helper()
	tr := upstream.NewDirect(upstream.TransportOptions{}, upstream.NewTransport(upstream.TransportOptions{}))
	m := &mesh{source: newSource(p)}
	if o.Transport == nil {
		o.Transport = tr
	}
	o.Policy = m.source.get
	m.handler = mustNew(tb, o)
	if *onLoop && o.Transport == tr {
		addr, _, end := serveOnLoop(tb, m.handler, tr)
		m.front = front{"http://" + addr, end}
	} else {
		s := httptest.NewServer(m.handler)
		m.front = front{s.URL, s.Close}
	}
	tb.Cleanup(func() { m.front.Close(); tr.CloseIdleConnections() })
	return m
}

// serve starts a backend and returns its address.
func serve(tb testing.TB, h http.Handler) string {
	tb.Helper()
	s := httptest.NewServer(h)
	tb.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func chatBody(user string, stream bool) string {
	return fmt.Sprintf(`{"model":"gpt","user":%q,"stream":%v,"messages":[{"role":"user","content":"one two three"}]}`, user, stream)
}

// post serves one request in memory.
func post(h http.Handler, path, body string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest("POST", path, strings.NewReader(body))
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

const chatPath = "/v1/chat/completions"

// only returns the single delta that is waiting.
func only(t *testing.T, h *Handler) *pb.OutcomeDelta {
	t.Helper()
	d := h.Recorder().Drain(time.Now())
	if len(d) != 1 {
		t.Fatalf("%d cells, want 1: %v", len(d), d)
	}
	return d[0]
}

func errorCode(t *testing.T, body []byte) string {
	t.Helper()
	var e struct {
		Error *struct {
			Message, Type, Code string
			Param               *string
		}
	}
	if err := json.Unmarshal(body, &e); err != nil || e.Error == nil || e.Error.Message == "" || e.Error.Type == "" {
		t.Fatalf("not an OpenAI error: %s", body)
	}
	return e.Error.Code
}

// unitIn returns a user whose bucket lies in [from, to).
func unitIn(salt string, from, to uint32) string {
	for i := 0; ; i++ {
		if b := experiments.Bucket(salt, fmt.Sprint("u", i)); b >= from && b < to {
			return fmt.Sprint("u", i)
		}
	}
}

func apiOf(path string) *shape.API {
	r, _ := shape.Match(path)
	return r.API
}

// eps are endpoints in this sidecar's region.
func eps(addresses ...string) (out []policy.Endpoint) {
	for _, a := range addresses {
		out = append(out, at(a, "eu"))
	}
	return out
}

func get(h http.Handler, path string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
	return w
}
