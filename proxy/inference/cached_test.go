package inference

import (
	"bufio"
	"cmp"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/inference/answers"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

func newAnswers(tb testing.TB) *answers.Cache {
	c, err := answers.New(answers.Options{Bytes: 8 << 20, TTL: time.Minute})
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

const zero = `{"model":"gpt","temperature":0,"messages":[{"content":"one two"}]}`

// cachedWorld is a handler with a cache in front of one scripted endpoint per version.
func cachedWorld(t *testing.T, steps ...step) (*Handler, *scripted, *source) {
	rt := &scripted{steps: map[string][]step{"a:1": steps, "b:1": {{status: 200, body: `{"v":2}`}}}}
	src := newSource(newPolicy(5000, eps("a:1"), eps("b:1")))
	return mustNew(t, Options{Policy: src.get, Transport: rt, Answers: newAnswers(t)}), rt, src
}

func TestAnswersFromMemory(t *testing.T) {
	ok := step{status: 200, body: `{"v":1}`, header: http.Header{"X-Request-Id": {"r1"}, "X-Kept": {"k"}}}
	stable := []string{"x-user-id", unitIn("salt-1", 5000, 10000)}
	other := []string{"x-user-id", unitIn("salt-1", 0, 5000)}
	with := func(kv ...string) []string { return append(append([]string{}, stable...), kv...) }
	tests := []struct {
		name   string
		steps  []step
		first  []string // header of the first request
		second []string
		body   string // of the second; "" = the same
		asked  int    // requests the models saw
		how    string // of the second
	}{
		{"the same question", []step{ok}, stable, stable, "", 1, "hit"},
		{"other spelling", []step{ok}, stable, stable, ` {"temperature":0, "messages":[{"content":"one two"}],"model":"gpt"}`, 1, "hit"},
		{"other question", []step{ok}, stable, stable, `{"model":"gpt","temperature":0}`, 2, "miss"},
		{"other arm", []step{ok}, stable, other, "", 2, "miss"},
		{"other tenant", []step{ok}, with("authorization", "Bearer a"), with("authorization", "Bearer b"), "", 2, "miss"},
		{"same tenant", []step{ok}, with("authorization", "Bearer a"), with("authorization", "Bearer a"), "", 1, "hit"},
		{"other pins", []step{ok}, with("x-outrigger-pins", "t@1"), with("x-outrigger-pins", "t@2"), "", 2, "miss"},
		{"no-store asked", []step{ok}, with("cache-control", "no-store"), stable, "", 2, "miss"},
		{"no-cache asked", []step{ok}, stable, with("cache-control", "no-cache"), "", 2, ""},
		{"max-age=0 asked", []step{ok}, stable, with("cache-control", "max-age=0"), "", 1, "hit"}, // stored in the same second
		{"no-store answered", []step{{status: 200, body: `{}`, header: http.Header{"Cache-Control": {"no-store"}}}}, stable, stable, "", 2, "miss"},
		{"an error", []step{{status: 400, body: `{"error":{}}`}}, stable, stable, "", 2, "miss"},
		{"half an answer", []step{{status: 200, body: `{"v":`}}, stable, stable, "", 2, "miss"},
		{"only if cached", []step{ok}, with("cache-control", "only-if-cached"), stable, "", 1, "miss"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // time stands still between the two
				h, rt, _ := cachedWorld(t, tt.steps...)
				post(h, chatPath, zero, tt.first...)
				body := tt.body
				if body == "" {
					body = zero
				}
				w := post(h, chatPath, body, tt.second...)
				if len(rt.log) != tt.asked || w.Header().Get("x-outrigger-cache") != tt.how {
					t.Errorf("models asked %d times, second answer from %q: %d %s", len(rt.log), w.Header().Get("x-outrigger-cache"), w.Code, w.Body)
				}
				if tt.how == "hit" && (w.Body.String() != `{"v":1}` || w.Header().Get("x-kept") != "k" || w.Header().Get("x-request-id") != "" ||
					w.Header().Get("age") != "0" || w.Header().Get("x-outrigger-version") != "v1" || w.Header().Get("x-outrigger-arm") != "stable") {
					t.Errorf("replayed %v %s", w.Header(), w.Body)
				}
			})
		})
	}
}

// A version pins variables: an answer counts only while they are what they were, and
// none does while that is not known.
func TestPinnedVariables(t *testing.T) {
	ok := step{status: 200, body: `{"v":1}`}
	h, rt, src := cachedWorld(t, ok)
	p := *src.p.Load()
	p.Models = []policy.Model{p.Models[0]}
	p.Models[0].Versions = append([]policy.Version(nil), p.Models[0].Versions...)
	p.Models[0].Versions[0].Pins = []string{"prompts/system", "prompts/tone"}
	src.p.Store(&p)
	now := map[string]string{"prompts/system": "eu:1:10", "prompts/tone": "eu:1:11"}
	h.o.Pinned = func(_ context.Context, session, name string) (string, bool) {
		v, known := now[session+"/"+name]
		return v, known
	}
	stable := []string{"x-user-id", unitIn("salt-1", 5000, 10000)}
	asked := 0
	step := func(what, how string) {
		t.Helper()
		w := post(h, chatPath, zero, stable...)
		if how != "hit" {
			asked++
		}
		if got := w.Header().Get("x-outrigger-cache"); w.Code != 200 || got != how || len(rt.log) != asked {
			t.Fatalf("%s: %d from %q, want %q; models asked %d times, want %d", what, w.Code, got, how, len(rt.log), asked)
		}
	}
	step("the first", "miss")
	step("again", "hit")
	now["prompts/tone"] = "eu:1:20"
	step("a pinned variable has changed", "miss")
	step("again", "hit")
	now["prompts/tone"] = "absent"
	step("it is gone", "miss")
	delete(now, "prompts/system")
	step("nothing current is known of the other", "")
	now["prompts/system"], now["prompts/tone"] = "eu:1:10", "eu:1:20"
	step("both are back as they were", "hit")
	now["prompts/system"], now["prompts/tone"] = now["prompts/tone"], now["prompts/system"]
	step("the same versions, the other way round", "miss")
	h.o.Pinned = nil
	step("nobody can tell", "")
}

func TestUndeterminedIsNotKept(t *testing.T) {
	h, rt, _ := cachedWorld(t, step{status: 200, body: `{"v":1}`})
	const warm = `{"model":"gpt","temperature":0.7}`
	post(h, chatPath, warm)
	if w := post(h, chatPath, warm); len(rt.log) != 2 || w.Header().Get("x-outrigger-cache") != "" {
		t.Errorf("asked %d times, cache %q", len(rt.log), w.Header().Get("x-outrigger-cache"))
	}
	post(h, chatPath, warm, "x-outrigger-cache", "on")
	if w := post(h, chatPath, warm, "x-outrigger-cache", "on"); len(rt.log) != 3 || w.Header().Get("x-outrigger-cache") != "hit" {
		t.Errorf("opted in: asked %d times, cache %q", len(rt.log), w.Header().Get("x-outrigger-cache"))
	}
}

// From the moment a version is quarantined nothing it said is found, and nothing of it
// when it comes back; what memory says counts in no statistics.
func TestQuarantineEmptiesTheCache(t *testing.T) {
	h, rt, src := cachedWorld(t, step{status: 200, body: `{"v":1}`})
	user := []string{"x-user-id", unitIn("salt-1", 0, 5000)} // the candidate's
	ask := func() *httptest.ResponseRecorder { return post(h, chatPath, zero, user...) }
	ask()
	if w := ask(); w.Header().Get("x-outrigger-cache") != "hit" || w.Body.String() != `{"v":2}` {
		t.Fatalf("no hit: %v %s", w.Header(), w.Body)
	}
	if d := only(t, h); d.Requests != 1 {
		t.Errorf("%d requests counted, a hit is none", d.Requests)
	}
	change := func(f func(*policy.Model)) {
		p := newPolicy(5000, eps("a:1"), eps("b:1"))
		f(&p.Models[0])
		src.p.Store(p)
	}
	change(func(m *policy.Model) { m.WeightEpoch++ })
	if w := ask(); w.Header().Get("x-outrigger-cache") != "hit" {
		t.Error("a policy that leaves the version alone lost its answers")
	}
	change(func(m *policy.Model) { m.Versions[1].Quarantined = true })
	if w := ask(); w.Body.String() != `{"v":1}` || w.Header().Get("x-outrigger-cache") != "miss" {
		t.Errorf("quarantined: %v %s", w.Header(), w.Body)
	}
	change(func(m *policy.Model) {})
	asked := len(rt.log)
	if w := ask(); w.Header().Get("x-outrigger-cache") != "miss" || len(rt.log) != asked+1 {
		t.Errorf("after the quarantine: %v", w.Header())
	}
}

// A client that asks for a stream gets the stream that was recorded, event for event; one
// that asks for JSON does not get it.
func TestStreamReplay(t *testing.T) {
	sse := step{status: 200, ctype: "text/event-stream", body: streamOf("gpt-v1", "a b c")}
	h, rt, _ := cachedWorld(t, sse)
	body := strings.Replace(zero, "{", `{"stream":true,`, 1)
	first := post(h, chatPath, body)
	second := post(h, chatPath, body)
	if len(rt.log) != 1 || second.Body.String() != first.Body.String() || second.Body.String() != sse.body || second.Header().Get("Content-Type") != "text/event-stream" {
		t.Errorf("asked %d times, replayed %q", len(rt.log), second.Body)
	}
	if post(h, chatPath, zero); len(rt.log) != 2 {
		t.Error("a JSON question was answered with a stream")
	}
	// A stream that ended in an error, or without its mark, is no answer.
	for _, bad := range []step{
		{status: 200, ctype: "text/event-stream", body: chunkOf("m", `{"content":"a"}`), cut: true},
		{status: 200, ctype: "text/event-stream", body: chunkOf("m", `{"content":"a"}`)},
		{status: 200, ctype: "text/event-stream", body: chunkOf("m", `{"content":"a"}`) + "data: {\"error\":{\"message\":\"x\"}}\n\n"},
	} {
		h, rt, _ := cachedWorld(t, bad)
		post(h, chatPath, body)
		if post(h, chatPath, body); len(rt.log) != 2 {
			t.Errorf("%+v was kept", bad)
		}
	}
}

// gated streams words as the test lets it, over pipes.
type gated struct {
	ctype string // "" = text/event-stream
	mu    sync.Mutex
	asked int
	pipe  *io.PipeWriter
	ctx   context.Context
}

func (g *gated) RoundTrip(r *http.Request) (*http.Response, error) {
	pr, pw := io.Pipe()
	g.mu.Lock()
	g.asked, g.pipe, g.ctx = g.asked+1, pw, r.Context()
	g.mu.Unlock()
	context.AfterFunc(r.Context(), func() { pr.CloseWithError(r.Context().Err()) })
	return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {cmp.Or(g.ctype, "text/event-stream")}}, Body: pr, ContentLength: -1, TransferEncoding: []string{"chunked"}}, nil
}

// live is a client that reads an answer while it is written.
type live struct {
	http.ResponseWriter
	out *bufio.Reader
	pw  *io.PipeWriter
}

func (l *live) Write(b []byte) (int, error) { return l.pw.Write(b) }
func (l *live) FlushError() error           { return nil }

func (l *live) event(t *testing.T) string {
	t.Helper()
	var s string
	for !strings.HasSuffix(s, "\n\n") {
		line, err := l.out.ReadString('\n')
		s += line
		if err != nil {
			return s
		}
	}
	return s
}

// askLive puts the stream's question to h, in a synctest bubble: cancel is the client's leaving.
func askLive(t *testing.T, h http.Handler, header ...string) (l *live, cancel context.CancelFunc, over chan struct{}) {
	ctx, cancel := context.WithCancel(t.Context())
	r := httptest.NewRequest("POST", chatPath, strings.NewReader(strings.Replace(zero, "{", `{"stream":true,`, 1))).WithContext(ctx)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	pr, pw := io.Pipe()
	l = &live{ResponseWriter: httptest.NewRecorder(), out: bufio.NewReader(pr), pw: pw}
	over = make(chan struct{})
	context.AfterFunc(ctx, func() { pr.CloseWithError(io.ErrClosedPipe) })
	go func() { defer close(over); h.ServeHTTP(l, r); pw.Close() }()
	synctest.Wait()
	return l, cancel, over
}

// Everybody who asks the same while it is answered reads along, from the first event; the
// model is asked once, and goes on when the one who asked first leaves.
func TestSingleFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gated{}
		h := mustNew(t, Options{Policy: newSource(newPolicy(0, eps("a:1"), nil)).get, Transport: g, Answers: newAnswers(t)})
		ask := func() (*live, context.CancelFunc, chan struct{}) { return askLive(t, h) }
		one, leave, over1 := ask()
		two, _, over2 := ask()
		say := func(s string) {
			t.Helper()
			if _, err := io.WriteString(g.pipe, s); err != nil {
				t.Fatalf("the model was cut off: %v", err)
			}
		}
		a, b := chunkOf("m", `{"content":"a"}`), chunkOf("m", `{"content":"b"}`)
		say(a)
		if e1, e2 := one.event(t), two.event(t); e1 != a || e2 != a {
			t.Fatalf("first events %q and %q", e1, e2)
		}
		leave()
		synctest.Wait()
		say(b)
		if e := two.event(t); e != b {
			t.Fatalf("second event after the leader left: %q", e)
		}
		three, _, over3 := ask()
		if e := three.event(t) + three.event(t); e != a+b {
			t.Fatalf("who comes late reads %q", e)
		}
		say(streamDone)
		g.pipe.Close()
		if e2, e3 := two.event(t), three.event(t); e2 != streamDone || e3 != streamDone {
			t.Fatalf("last events %q and %q", e2, e3)
		}
		<-over2
		<-over3
		<-over1
		if g.asked != 1 {
			t.Errorf("the model was asked %d times", g.asked)
		}
		if d := only(t, h); d.Requests != 1 || d.Cancelled+d.Failures != 0 {
			t.Errorf("recorded %v", d)
		}

		// When nobody is left, the model's work is cut short.
		h = mustNew(t, Options{Policy: newSource(newPolicy(0, eps("a:1"), nil)).get, Transport: g, Answers: newAnswers(t)})
		_, leave1, over1 := ask()
		_, leave2, over2 := ask()
		leave1()
		synctest.Wait()
		if g.ctx.Err() != nil {
			t.Error("the model was cut off while somebody waited")
		}
		leave2()
		<-over1
		<-over2
		if g.ctx.Err() == nil {
			t.Error("the model works for nobody")
		}
	})
}

// Readers of a flight that is lost see the error its leader sees, and the next asks anew.
func TestFlightLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gated{}
		p := newPolicy(0, eps("a:1"), nil)
		p.Models[0].MaxAttempts = 1
		h := mustNew(t, Options{Policy: newSource(p).get, Transport: g, Answers: newAnswers(t)})
		body := strings.Replace(zero, "{", `{"stream":true,`, 1)
		got := make(chan string, 2)
		for range 2 {
			go func() { got <- post(h, chatPath, body).Body.String() }()
			synctest.Wait()
		}
		io.WriteString(g.pipe, chunkOf("m", `{"content":"a"}`))
		synctest.Wait()
		g.pipe.CloseWithError(errCut)
		for range 2 {
			if s := <-got; strings.Count(s, `"upstream_lost"`) != 1 || strings.Contains(s, "[DONE]") {
				t.Errorf("answered %q", s)
			}
		}
		go func() { got <- post(h, chatPath, body).Body.String() }()
		synctest.Wait()
		if g.asked != 2 {
			t.Errorf("asked %d times", g.asked)
		}
		io.WriteString(g.pipe, streamDone)
		g.pipe.Close()
		<-got
	})
}

// An answer that outgrows what a flight holds: a stream goes on for who reads it, JSON is
// asked for by everybody himself; nobody gets half of it.
func TestFlightOutgrown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gated{}
		h := mustNew(t, Options{Policy: newSource(newPolicy(0, eps("a:1"), nil)).get, Transport: g, Answers: newAnswers(t)})
		one, _, over1 := askLive(t, h)
		two, _, over2 := askLive(t, h)
		event := chunkOf("m", `{"content":"`+strings.Repeat("x", 64<<10)+`"}`)
		for range 40 {
			go io.WriteString(g.pipe, event)
			if e1, e2 := one.event(t), two.event(t); e1 != event || e2 != event {
				t.Fatalf("events of %d and %d bytes, want %d", len(e1), len(e2), len(event))
			}
		}
		go func() { io.WriteString(g.pipe, streamDone); g.pipe.Close() }()
		if e1, e2 := one.event(t), two.event(t); e1 != streamDone || e2 != streamDone {
			t.Errorf("ended with %q and %q", e1, e2)
		}
		<-over1
		<-over2
		if g.asked != 1 {
			t.Errorf("the model was asked %d times", g.asked)
		}
	})
	large := `{"v":"` + strings.Repeat("x", 3<<20) + `"}`
	synctest.Test(t, func(t *testing.T) {
		g := &gated{ctype: "application/json"}
		h := mustNew(t, Options{Policy: newSource(newPolicy(0, eps("a:1"), nil)).get, Transport: g, Answers: newAnswers(t)})
		got := make(chan string, 2)
		for range 2 {
			go func() { got <- post(h, chatPath, zero).Body.String() }()
			synctest.Wait()
		}
		for range 2 {
			pipe := g.pipe
			io.WriteString(pipe, large)
			pipe.Close()
			if s := <-got; s != large {
				t.Errorf("answered %d bytes, want %d", len(s), len(large))
			}
			synctest.Wait()
		}
		if g.asked != 2 {
			t.Errorf("the model was asked %d times", g.asked)
		}
	})
}
