package answers

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/proxy/inference/shape"
)

func api(path string) *shape.API {
	r, ok := shape.Match(path)
	if !ok {
		panic(path)
	}
	return r.API
}

const chat = "/v1/chat/completions"

func TestDeterministic(t *testing.T) {
	tests := []struct {
		path, body    string
		deterministic bool
		ok            bool
	}{
		{chat, `{"temperature":0}`, true, true},
		{chat, `{"temperature":0.0,"stream":true}`, true, true},
		{chat, `{"temperature":0.1}`, false, true},
		{chat, `{"temperature":"0"}`, false, true},
		{chat, `{}`, false, true},
		{chat, `{"seed":7}`, true, true},
		{chat, `{"seed":null}`, false, true},
		{chat, `{"temperature":0,"store":true}`, false, false},
		{"/v1/responses", `{"temperature":0}`, false, false},
		{"/v1/responses", `{"temperature":0,"store":false}`, true, true},
		{"/v1/responses", `{"temperature":0,"store":false,"previous_response_id":"r"}`, false, false},
		{"/v1/responses", `{"temperature":0,"store":false,"tools":[{"type":"web_search"}]}`, false, false},
		{"/v1/embeddings", `{"input":"x"}`, true, true},
		{"/v1/messages", `{"temperature":0}`, true, true},
		{"/v1beta/models/m:generateContent", `{"temperature":0}`, false, true},
		{"/v1beta/models/m:generateContent", `{"generationConfig":{"temperature":0}}`, true, true},
		{"/v1beta/models/m:generateContent", `{"generationConfig":{"seed":1},"cachedContent":"c"}`, false, false},
		{"/api/chat", `{"options":{"temperature":0}}`, true, true},
		{"/api/chat", `{"options":{"temperature":0},"keep_alive":0}`, false, false},
		{"/generate", `{"inputs":"x"}`, true, true},
		{"/generate", `{"parameters":{"do_sample":true}}`, false, true},
		{"/generate", `{"parameters":{"top_p":0.9}}`, false, true},
		{"/generate", `{"parameters":{"do_sample":true,"seed":3}}`, true, true},
		{"/v2/models/m/infer", `{"inputs":[]}`, false, true},
		{"/v2/models/m/infer", `{"parameters":{"sequence_id":1}}`, false, false},
		{"/v2/models/m/generate", `{"parameters":{"temperature":0}}`, true, true},
		{chat, `[1]`, false, false},
		{chat, `{"temperature":0} {}`, false, false},
		{chat, `{"temperature":1,"temperature":0}`, false, false},
		{chat, `{"messages":[{"a":1,"a":2}],"temperature":0}`, false, false},
		{chat, `{"messages":[{"a":"\":\\"}],"temperature":0}`, true, true},
	}
	for _, tt := range tests {
		_, deterministic, ok := Question(Asked{API: api(tt.path), Body: []byte(tt.body)})
		if deterministic != tt.deterministic || ok != tt.ok {
			t.Errorf("%s %s: %v %v", tt.path, tt.body, deterministic, ok)
		}
	}
}

// The key is the same for the same question however it is written, and another when
// anything differs that an answer depends on.
func TestQuestionKeys(t *testing.T) {
	ask := func(change func(*Asked)) Keys {
		q := Asked{API: api(chat), Path: chat, Body: []byte(`{"model":"m","temperature":0,"n":1}`), Model: "m", Version: "v1", Generation: 1, Arm: "stable", Tenant: "t", Pins: "p"}
		if change != nil {
			change(&q)
		}
		k, _, ok := Question(q)
		if !ok {
			t.Fatal("no key")
		}
		return k
	}
	base := ask(nil)
	if base.Process == base.Node {
		t.Error("both tiers have one key")
	}
	if k := ask(func(q *Asked) { q.Body = []byte(" {\"n\":1,\n\"temperature\":0, \"model\":\"\\u006d\"}") }); k != base {
		t.Error("order of keys, white space and escapes made another question")
	}
	for name, change := range map[string]func(*Asked){
		"api":        func(q *Asked) { q.API = api("/v1/completions") },
		"path":       func(q *Asked) { q.Path += "?x=1" },
		"body":       func(q *Asked) { q.Body = []byte(`{"model":"m","temperature":0,"n":2}`) },
		"number":     func(q *Asked) { q.Body = []byte(`{"model":"m","temperature":0,"n":1.0}`) },
		"stream":     func(q *Asked) { q.Body = []byte(`{"model":"m","temperature":0,"n":1,"stream":true}`) },
		"model":      func(q *Asked) { q.Model = "n" },
		"version":    func(q *Asked) { q.Version = "v2" },
		"generation": func(q *Asked) { q.Generation = 2 },
		"stretch":    func(q *Asked) { q.Stretch = StretchOf("m", "v1", "up", 2) },
		"arm":        func(q *Asked) { q.Arm = "candidate" },
		"tenant":     func(q *Asked) { q.Tenant = "u" },
		"pins":       func(q *Asked) { q.Pins = "q" },
		"shifted":    func(q *Asked) { q.Version, q.Model = "mv1", "" },
	} {
		k := ask(change)
		if (k.Process == base.Process) != (name == "stretch") {
			t.Errorf("%s: the process tier's key changed: %v", name, k.Process != base.Process)
		}
		if (k.Node == base.Node) != (name == "generation") {
			t.Errorf("%s: the node tier's key changed: %v", name, k.Node != base.Node)
		}
	}
}

// FuzzQuestion: what has a key keeps it when written in canonical form, and no input
// breaks it.
func FuzzQuestion(f *testing.F) {
	f.Add([]byte(`{"a":[1,{"b":"\\\":"}],"temperature":0}`))
	f.Add([]byte(`{"a":1,"a":1}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		q := Asked{API: api(chat), Body: body}
		k, d, ok := Question(q)
		if !ok {
			return
		}
		q.Body = append(append([]byte(" \n"), body...), '\t')
		if k2, d2, ok2 := Question(q); k2 != k || d2 != d || !ok2 {
			t.Fatalf("%q: white space matters", body)
		}
	})
}

func TestKeepAndControl(t *testing.T) {
	const ttl = time.Minute
	h := func(kv ...string) http.Header {
		out := http.Header{}
		for i := 0; i < len(kv); i += 2 {
			out.Add(kv[i], kv[i+1])
		}
		return out
	}
	for _, tt := range []struct {
		h    http.Header
		want time.Duration
	}{
		{h(), ttl},
		{h("Cache-Control", "max-age=5"), 5 * time.Second},
		{h("Cache-Control", "max-age=3600"), ttl},
		{h("Cache-Control", "s-maxage=7, max-age=5"), 7 * time.Second},
		{h("Cache-Control", "max-age=5", "Cache-Control", "S-MaxAge=\"7\""), 7 * time.Second},
		{h("Cache-Control", "max-age=x"), 0},
		{h("Cache-Control", "No-Store"), 0},
		{h("Cache-Control", "public, private"), 0},
		{h("Cache-Control", "no-cache"), 0},
		{h("Set-Cookie", "a=b"), 0},
		{h("Vary", "Accept-Encoding, Origin"), ttl},
		{h("Vary", "*"), 0},
		{h("Vary", "User-Agent"), 0},
	} {
		if got := Keep(tt.h, ttl); got != tt.want {
			t.Errorf("%v: kept for %v, want %v", tt.h, got, tt.want)
		}
	}
}

func mustNew(t *testing.T, o Options) *Cache {
	t.Helper()
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func put(c *Cache, key Key, body string, now time.Time, keep time.Duration) {
	f, _ := c.Join(key)
	f.Begin(http.Header{}, true)
	f.Write([]byte(body))
	f.Finish(now, keep)
}

func TestExpiryAndBounds(t *testing.T) {
	c := mustNew(t, Options{Bytes: 4 << 20, TTL: time.Minute})
	t0 := time.Unix(1000, 0)
	put(c, "a", "answer", t0, time.Hour)
	for _, tt := range []struct {
		after, maxAge time.Duration
		hit           bool
	}{{0, -1, true}, {59 * time.Second, -1, true}, {time.Minute, -1, false}, {10 * time.Second, 9 * time.Second, false}, {10 * time.Second, 10 * time.Second, true}} {
		if got := c.Get("a", t0.Add(tt.after), tt.maxAge); (got != nil) != tt.hit {
			t.Errorf("after %v with max-age %v: %v", tt.after, tt.maxAge, got)
		}
	}
	put(c, "b", "answer", t0, 0)
	if c.Get("b", t0, -1) != nil {
		t.Error("kept what may not be kept")
	}
	big := make([]byte, 100<<10)
	for i := range 200 {
		put(c, Key(fmt.Sprint("k", i)), string(big), t0, time.Hour)
	}
	if s := c.Stats(); s.Bytes > 4<<20 || s.Entries == 0 {
		t.Errorf("%d bytes in %d entries, the bound is 4 MiB", s.Bytes, s.Entries)
	}
	for _, o := range []Options{{}, {Bytes: 1 << 10}, {Bytes: 1 << 20, TTL: -1}} {
		if _, err := New(o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}

// Readers get the bytes as they come, in order, whenever they join; what is too long or
// fails is not kept, and the next to ask leads again.
func TestFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := mustNew(t, Options{Bytes: 4 << 20})
		f, leader := c.Join("k")
		if !leader || f == nil {
			t.Fatal("the first does not lead")
		}
		results := make(chan string, 3)
		read := func() {
			g, leads := c.Join("k")
			if leads {
				results <- "leads"
				return
			}
			defer g.Leave()
			out, begun := "", false
			for {
				p, err := g.Read(context.Background(), begun, len(out))
				begun = begun || p.Begun
				out += string(p.New)
				if err != nil || p.Whole || p.Lost {
					results <- fmt.Sprint(out, p.Whole, p.Lost, err)
					return
				}
			}
		}
		go read()
		synctest.Wait()
		if !f.Followed() {
			t.Error("nobody follows")
		}
		f.Begin(http.Header{"A": {"b"}}, true)
		f.Write([]byte("one "))
		go read()
		synctest.Wait()
		f.Write([]byte("two"))
		f.Finish(time.Now(), time.Minute)
		for range 2 {
			if got := <-results; got != "one twotrue false <nil>" {
				t.Errorf("read %q", got)
			}
		}
		if a := c.Get("k", time.Now(), -1); a == nil || string(a.Body) != "one two" || a.Header.Get("A") != "b" {
			t.Errorf("kept %+v", a)
		}
		synctest.Wait()
		if f.Followed() {
			t.Error("readers did not leave")
		}

		f, _ = c.Join("long")
		f.Begin(http.Header{}, true)
		f.Write(make([]byte, MaxAnswer))
		f.Write([]byte("x"))
		f.Finish(time.Now(), time.Minute)
		if c.Get("long", time.Now(), -1) != nil {
			t.Error("kept more than MaxAnswer")
		}
		if _, leader := c.Join("long"); !leader {
			t.Error("a failed flight still has followers")
		}

		g, _ := c.Join("left")
		h, leads := c.Join("left")
		if leads {
			t.Fatal("two lead")
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := h.Read(ctx, false, 0); err != context.Canceled {
			t.Errorf("a reader whose time is up: %v", err)
		}
		idle := 0
		g.OnIdle(func() { idle++ })
		h.Leave()
		if idle != 1 {
			t.Errorf("told of no readers %d times", idle)
		}
		g.Finish(time.Now(), time.Minute) // never began
		if c.Get("left", time.Now(), -1) != nil {
			t.Error("kept an answer that never began")
		}
	})
}
