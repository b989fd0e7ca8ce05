package inference

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/proxy/loop"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// onLoop has tests that need a whole mesh serve it from event loops that carry calls.
var onLoop = flag.Bool("on-loop", false, "serve from event loops")

// TestMain runs every test twice where there are event loops: with the handler alone, and
// with loops that carry the simple calls.
func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if runtime.GOOS == "linux" && code == 0 && flag.Lookup("test.fuzz").Value.String() == "" && flag.Lookup("test.bench").Value.String() == "" {
		*onLoop = true
		code = m.Run()
	}
	os.Exit(code)
}

// serveOnLoop serves h from an event loop, which carries calls over d's connections unless
// d is nil.
func serveOnLoop(tb testing.TB, h *Handler, d *upstream.Direct) (address string, s *loop.Server, end func()) {
	tb.Helper()
	o := loop.Options{Slow: h, Loops: 1, Grace: 5 * time.Second, BodyPatience: 20 * time.Second}
	if d != nil {
		o.Relay = h.Relay(d)
	}
	s, err := loop.New(o)
	if err != nil {
		tb.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, l) }()
	var once sync.Once
	end = func() {
		once.Do(func() {
			cancel()
			if err := <-ended; err != nil {
				tb.Error(err)
			}
		})
	}
	tb.Cleanup(end)
	return l.Addr().String(), s, end
}

// script is a model server that answers its n-th request with the n-th step, byte for
// byte; the last repeats.
type script struct {
	steps []exchangeStep
	l     net.Listener
	wg    sync.WaitGroup

	mu   sync.Mutex
	n    int
	seen []string     // requests, in a normal form
	left map[int]bool // by request: the other side closed before the answer was due
	open map[net.Conn]bool
}

type exchangeStep struct {
	pieces []string      // written one by one
	gap    time.Duration // before each piece after the first
	wait   bool          // no answer: until the other side closes
	end    bool          // close the connection afterwards
}

func says(pieces ...string) exchangeStep { return exchangeStep{pieces: pieces} }

func newScript(tb testing.TB, steps ...exchangeStep) *script {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	s := &script{steps: steps, l: l, left: map[int]bool{}, open: map[net.Conn]bool{}}
	s.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.open[c] = true
			s.mu.Unlock()
			s.wg.Go(func() { s.serve(c) })
		}
	})
	tb.Cleanup(s.stop)
	return s
}

func (s *script) stop() {
	s.l.Close()
	s.mu.Lock()
	for c := range s.open {
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *script) address() string { return s.l.Addr().String() }

func (s *script) serve(c net.Conn) {
	defer c.Close()
	br := bufio.NewReader(c)
	for {
		r, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		s.mu.Lock()
		n := s.n
		s.n++
		s.seen = append(s.seen, fmt.Sprintf("%s %s host-ok=%v %v length=%d %s", r.Method, r.RequestURI, r.Host == s.address(), plain(r.Header), r.ContentLength, body))
		st := s.steps[min(n, len(s.steps)-1)]
		s.mu.Unlock()
		if st.wait {
			_, err := br.ReadByte()
			s.mu.Lock()
			s.left[n] = err != nil
			s.mu.Unlock()
			return
		}
		for i, p := range st.pieces {
			if i > 0 && st.gap > 0 {
				t := time.NewTimer(st.gap)
				<-t.C
			}
			if _, err := io.WriteString(c, p); err != nil {
				return
			}
		}
		if st.end {
			return
		}
	}
}

// plain is a head in an order of its own, without what differs from run to run.
func plain(h http.Header) string {
	var lines []string
	for k, v := range h {
		if k == hdrTimeout && len(v) == 1 { // what is left of it, in ms: the last few differ
			if left, err := strconv.ParseFloat(v[0], 64); err == nil {
				v = []string{fmt.Sprint("about ", math.Ceil(left/20)*20)}
			}
		}
		if k != "Date" {
			lines = append(lines, fmt.Sprintf("%s=%q", http.CanonicalHeaderKey(k), v))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, " ")
}

// seenBy is one case as everybody sees it.
type seenBy struct {
	client   string
	servers  [2][]string
	outcomes string
}

// A call carried by a loop looks the same to the client, the model servers and the
// statistics as one that the handler serves, whatever the server does.
func TestOnLoopAsByHandler(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("event loops exist on Linux")
	}
	good := answerOf("gpt-v1", "one two three")
	json := func(status, body string, more ...string) string {
		return "HTTP/1.1 " + status + "\r\nContent-Type: application/json\r\n" + strings.Join(more, "") + fmt.Sprintf("Content-Length: %d\r\n\r\n", len(body)) + body
	}
	ok := says(json("200 OK", good))
	long := `{"x":"` + strings.Repeat("y", 400<<10) + `"}`
	chat := func(more ...string) string { return chatRequestOf(chatPath, chatBody("user-1", false), more...) }
	asksStream := chatRequestOf(chatPath, chatBody("user-1", true))
	failure := `{"error":{"message":"m","type":"server_error","code":"c","param":null}}`
	for _, c := range []struct {
		name    string
		request string // default chat()
		pieces  []string
		first   []exchangeStep // of the first endpoint, after a call that went well
		second  []exchangeStep // of the second; default: it answers
		tune    func(*policy.Policy, *Options)
		cut     time.Duration // the client leaves after so long
		relayed bool          // the loop carries it to its end
		refused bool          // a loop does not even begin
	}{
		{name: "whole answer", first: []exchangeStep{ok}, relayed: true},
		{name: "in pieces", first: []exchangeStep{{pieces: []string{"HTTP/1.1 200 OK\r\nConte", "nt-Type: application/json\r\nContent-Length: 11\r\n\r\n", `{"a":`, `"bcd"}`}, gap: 5 * time.Millisecond}}, relayed: true},
		{name: "long, in pieces", first: []exchangeStep{says(json("200 OK", long[:100<<10]))}, relayed: true},
		{name: "fields", first: []exchangeStep{says("HTTP/1.1 200 Sure\r\ncontent-type: application/json; charset=utf-8\r\nX-Outrigger-Arm: forged\r\nX-One: 1\r\nX-One: 2\r\nKeep-Alive: timeout=5\r\nDate: Mon, 01 Jan 2024 00:00:00 GMT\r\nConnection: keep-alive\r\nProxy-Authenticate: Basic\r\nServer: m\r\nExpect: x\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}")}, relayed: true},
		{name: "bad request", first: []exchangeStep{says(json("400 Bad Request", failure))}, relayed: true},
		{name: "not found", first: []exchangeStep{says(json("404 Not Found", failure))}, relayed: true},
		{name: "empty", first: []exchangeStep{says(json("200 OK", ""))}, relayed: true},
		{name: "server closes after it", first: []exchangeStep{{pieces: []string{json("200 OK", good, "Connection: close\r\n")}, end: true}}, relayed: true},
		{name: "something follows", first: []exchangeStep{says(json("200 OK", good) + json("200 OK", `{"stolen":1}`)), ok}, relayed: true},
		{name: "HTTP/1.0", first: []exchangeStep{{pieces: []string{"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"}, end: true}}, relayed: true},
		{name: "client says close", request: chat("Connection: close\r\n"), first: []exchangeStep{ok}, relayed: true},
		{name: "user in a candidate", tune: func(p *policy.Policy, _ *Options) {
			p.Models[0].Arms = []policy.Arm{{Name: "b", Version: "v1", Ranges: p.Models[0].Arms[0].Ranges}}
		}, first: []exchangeStep{ok}, relayed: true},
		{name: "fields of the request", request: chat("Accept-Encoding: gzip\r\nX-Outrigger-Bucket: 1\r\nX-Outrigger-Hops: 3\r\nX-Stainless-Retry-Count: 1\r\nConnection: keep-alive\r\nKeep-Alive: 3\r\nProxy-Authorization: x\r\nX-User-Id: u9\r\nx-lower: a\r\nUser-Agent: t\r\nX-Lower: b\r\n"), first: []exchangeStep{ok}, relayed: true},
		{name: "body of 60 KiB", request: chatRequestOf(chatPath, `{"model":"gpt","messages":[{"role":"user","content":"`+strings.Repeat("z", 60<<10)+`"}]}`), first: []exchangeStep{ok}, relayed: true},
		{name: "body after the head", pieces: []string{"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n", `{"model":`, `"gpt"}`}, first: []exchangeStep{ok}, relayed: true},
		{name: "path with the name", request: chatRequestOf("/v2/models/gpt/versions/7/infer", `{"id":"1","inputs":[],"parameters":{"user_id":5}}`), first: []exchangeStep{ok}, relayed: true},
		{name: "deployment and query", request: chatRequestOf("/openai/deployments/gpt/chat/completions?api-version=2024-10-21", `{"model":"gpt","messages":[]}`), first: []exchangeStep{ok}, relayed: true},
		{name: "gemini", request: chatRequestOf("/v1beta/models/gpt:generateContent", `{"contents":[]}`), first: []exchangeStep{ok}, relayed: true},
		{name: "adaptive limit", tune: func(_ *policy.Policy, o *Options) { o.Adaptive = true }, first: []exchangeStep{ok}, relayed: true},

		{name: "busy", first: []exchangeStep{says(json("429 Too Many Requests", failure))}},
		{name: "fails", first: []exchangeStep{says(json("500 Internal Server Error", failure))}},
		{name: "fails, one attempt", tune: func(p *policy.Policy, _ *Options) { p.Models[0].MaxAttempts = 1 }, first: []exchangeStep{says(json("503 Service Unavailable", failure))}},
		{name: "not implemented", first: []exchangeStep{says(json("501 Not Implemented", failure))}},
		{name: "no content", first: []exchangeStep{says("HTTP/1.1 204 No Content\r\n\r\n")}},
		{name: "chunked", first: []exchangeStep{says(chunked(inChunk(good), "0\r\n\r\n"))}, relayed: true},
		{name: "chunked, in pieces", first: []exchangeStep{{gap: 5 * time.Millisecond, pieces: []string{chunked(), "10;a=b\r\n", `{"usage":{"promp`, "\r\n1", "9\r\n" + `t_tokens":3,"completion_t`, "\r\n", "0A\r\n" + `okens":4}}`, "\r\n0\r", "\n\r\n"}}}, relayed: true},
		{name: "chunked, empty", first: []exchangeStep{says(chunked("000\r\n\r\n"))}, relayed: true},
		{name: "chunked, with a trailer", first: []exchangeStep{says(chunked(inChunk("{}"), "0\r\nX-Sum: 5\r\n\r\n")), ok}, relayed: true},
		{name: "chunked, server closes after it", first: []exchangeStep{{pieces: []string{chunked(inChunk(good), "0\r\n\r\n")}, end: true}}, relayed: true},
		{name: "chunked, something follows", first: []exchangeStep{says(chunked(inChunk(good), "0\r\n\r\n") + json("200 OK", `{"stolen":1}`)), ok}, relayed: true},
		{name: "chunked, just short enough", first: []exchangeStep{says(chunked(inChunk(long[:250<<10]), "0\r\n\r\n"))}, relayed: true},
		{name: "chunked, too long for a loop", first: []exchangeStep{says(chunked(inChunk(long), "0\r\n\r\n"))}},
		{name: "chunked, fails", first: []exchangeStep{says(strings.Replace(chunked(inChunk("{}"), "0\r\n\r\n"), "200", "503", 1))}},
		{name: "chunked, its client's fault", first: []exchangeStep{says(strings.Replace(chunked(inChunk("{}"), "0\r\n\r\n"), "200", "404", 1))}, relayed: true},
		{name: "chunked, a length that is none", first: []exchangeStep{says(chunked("zz\r\n{}\r\n0\r\n\r\n"))}},
		{name: "chunked, a length of two kinds", first: []exchangeStep{says(chunked("0x2\r\n{}\r\n0\r\n\r\n"))}},
		{name: "chunked, a signed length", first: []exchangeStep{says(chunked("+2\r\n{}\r\n0\r\n\r\n"))}},
		{name: "chunked, a space before the length", first: []exchangeStep{says(chunked(" 2\r\n{}\r\n0\r\n\r\n"))}},
		{name: "chunked, a length that overflows", first: []exchangeStep{says(chunked("10000000000000002\r\n{}\r\n0\r\n\r\n"))}},
		{name: "chunked, more than its length", first: []exchangeStep{says(chunked("2\r\n{}}\r\n0\r\n\r\n"))}},
		{name: "chunked, bare LF", first: []exchangeStep{says(chunked("2\n{}\n0\n\n"))}},
		{name: "chunked, a huge line", first: []exchangeStep{says(chunked("2;" + strings.Repeat("x", 8<<10) + "\r\n{}\r\n0\r\n\r\n"))}},
		{name: "chunked, extensions without end", first: []exchangeStep{says(chunked(strings.Repeat("1;x="+strings.Repeat("y", 90)+"\r\n \r\n", 100) + "0\r\n\r\n"))}},
		{name: "chunked, a huge trailer", first: []exchangeStep{says(chunked(inChunk("{}"), "0\r\nX: "+strings.Repeat("t", 16<<10)+"\r\n\r\n"))}},
		{name: "chunked, a length as trailer", first: []exchangeStep{says(chunked(inChunk("{}"), "0\r\nContent-Length: 2\r\n\r\n"))}},
		{name: "chunked and cut", first: []exchangeStep{{pieces: []string{chunked("2\r\n{")}, end: true}}},
		{name: "chunked and cut before its end", first: []exchangeStep{{pieces: []string{chunked(inChunk(good), "0\r\n")}, end: true}}},
		{name: "chunked twice", first: []exchangeStep{says(strings.Replace(chunked(inChunk("{}"), "0\r\n\r\n"), "\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n", 1))}},
		{name: "chunked and gzip", first: []exchangeStep{says(strings.Replace(chunked(inChunk("{}"), "0\r\n\r\n"), ": chunked", ": gzip, chunked", 1))}},
		{name: "chunked in HTTP/1.0", first: []exchangeStep{{pieces: []string{strings.Replace(chunked(inChunk("{}"), "0\r\n\r\n"), "1.1", "1.0", 1)}, end: true}}},
		{name: "chunked with a length", first: []exchangeStep{says(strings.Replace(chunked(inChunk("{}"), "0\r\n\r\n"), "\r\n\r\n", "\r\nContent-Length: 2\r\n\r\n", 1))}},
		{name: "a stream nobody asked for", first: []exchangeStep{says("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 14\r\n\r\ndata: [DONE]\n\n")}},
		{name: "without type", first: []exchangeStep{says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")}},
		{name: "without length", first: []exchangeStep{{pieces: []string{"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{}"}, end: true}}},
		{name: "interim answer", first: []exchangeStep{says("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + json("200 OK", good))}},
		{name: "switches protocols", first: []exchangeStep{says("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n")}},
		{name: "cut in the head", first: []exchangeStep{{pieces: []string{"HTTP/1.1 200 OK\r\nContent-"}, end: true}}},
		{name: "cut in the content", first: []exchangeStep{{pieces: []string{json("200 OK", good)[:200]}, end: true}}},
		{name: "two lengths", first: []exchangeStep{says("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}")}},
		{name: "length and coding", first: []exchangeStep{says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}")}},
		{name: "no HTTP", first: []exchangeStep{says("SSH-2.0-OpenSSH_9.6\r\n")}},
		{name: "closed before a byte", first: []exchangeStep{{end: true}, ok}},
		{name: "too long for a loop", first: []exchangeStep{says(json("200 OK", long))}},
		{name: "names a field in Connection", first: []exchangeStep{says(json("200 OK", good, "Connection: x-gone\r\nX-Gone: 1\r\n"))}},
		{name: "too late", tune: func(p *policy.Policy, _ *Options) { p.Models[0].Timeout = 150 * time.Millisecond }, first: []exchangeStep{{wait: true}}},
		{name: "too late for one attempt", tune: func(_ *policy.Policy, o *Options) { o.TryTimeout = 100 * time.Millisecond }, first: []exchangeStep{{wait: true}}},
		{name: "client leaves", cut: 50 * time.Millisecond, first: []exchangeStep{{wait: true}}, relayed: true},

		{name: "both fail", first: []exchangeStep{says(json("500 Internal Server Error", failure))}, second: []exchangeStep{says(json("503 Service Unavailable", failure, "Retry-After: 7\r\n"))}},
		{name: "fails, then busy", first: []exchangeStep{says(json("502 Bad Gateway", failure))}, second: []exchangeStep{says(json("429 Too Many Requests", failure))}},
		{name: "both cut", first: []exchangeStep{{pieces: []string{json("200 OK", good)[:200]}, end: true}}, second: []exchangeStep{{end: true}, {end: true}}},
		{name: "the second has no answer in time", tune: func(p *policy.Policy, _ *Options) { p.Models[0].Timeout = 300 * time.Millisecond },
			first: []exchangeStep{says(json("500 Internal Server Error", failure))}, second: []exchangeStep{{wait: true}}},
		{name: "the first failure opens the breaker", tune: func(p *policy.Policy, _ *Options) { p.Models[0].Versions[0].ConsecutiveFailures = 1 },
			first: []exchangeStep{says(json("500 Internal Server Error", failure))}},
		{name: "one retry at a time", tune: func(p *policy.Policy, _ *Options) { p.Models[0].Versions[0].MaxRetries = 1 },
			first: []exchangeStep{says(json("500 Internal Server Error", failure))}},
		{name: "not reached: the last good version answers", tune: candidateFirst, first: []exchangeStep{{end: true}}},
		{name: "not reached, nor is the last good version", tune: candidateFirst, first: []exchangeStep{{end: true}}, second: []exchangeStep{{end: true}, {end: true}, {end: true}}},
		{name: "not reached, the last good version is busy", tune: candidateFirst, first: []exchangeStep{{end: true}}, second: []exchangeStep{says(json("429 Too Many Requests", failure))}},
		{name: "cut, and no last good version hides it", tune: candidateFirst, first: []exchangeStep{{pieces: []string{json("200 OK", good)[:200]}, end: true}}},
		{name: "a bad answer is passed on, not hidden", tune: candidateFirst, first: []exchangeStep{says(json("500 Internal Server Error", failure))}},
		{name: "a candidate that answers", tune: candidateFirst, first: []exchangeStep{ok}, relayed: true},

		{name: "stream", request: asksStream, first: []exchangeStep{says(events(finish))}, relayed: true},
		{name: "stream, with all there is", request: asksStream, first: []exchangeStep{says(events(role + word + word + counted + finish))}, relayed: true},
		{name: "stream, in pieces", request: asksStream, first: []exchangeStep{{pieces: []string{sseOf(inChunk(role), inChunk(word[:20])), inChunk(word[20:] + word), inChunk(word[:9])[:8], inChunk(word[:9])[8:] + inChunk(word[9:]+finish) + "0\r\n", "\r\n"}, gap: 5 * time.Millisecond}}, relayed: true},
		{name: "stream, lines that end otherwise", request: asksStream, first: []exchangeStep{says(events(strings.ReplaceAll(role+word, "\n", "\r\n") + strings.ReplaceAll(word, "\n", "\r") + finish))}, relayed: true},
		{name: "stream, signs of life first", request: asksStream, first: []exchangeStep{{pieces: []string{sseOf(inChunk(": one\n\n")), inChunk(": two\n\n"), inChunk(role + word + finish), "0\r\n\r\n"}, gap: 5 * time.Millisecond}}, relayed: true},
		{name: "stream, without a mark of the end", request: asksStream, first: []exchangeStep{says(events(word))}, relayed: true},
		{name: "stream, server closes after it", request: asksStream, first: []exchangeStep{{pieces: []string{strings.Replace(events(word+finish), "\r\n", "\r\nConnection: close\r\n", 1)}, end: true}}, relayed: true},
		{name: "stream, something follows", request: asksStream, first: []exchangeStep{says(events(word+finish) + json("200 OK", `{"stolen":1}`)), ok}, relayed: true},
		{name: "stream, longer than one attempt may take", request: asksStream, tune: func(_ *policy.Policy, o *Options) { o.TryTimeout = time.Second },
			first: []exchangeStep{{pieces: []string{sseOf(inChunk(word)), inChunk(word), inChunk(finish) + "0\r\n\r\n"}, gap: 600 * time.Millisecond}}, relayed: true},
		{name: "stream, client leaves", request: asksStream, cut: onFirstByte, first: []exchangeStep{{pieces: []string{sseOf(inChunk(word)), inChunk(word)}, gap: time.Second}}, relayed: true},
		{name: "stream, answered whole", request: asksStream, first: []exchangeStep{ok}, relayed: true},
		{name: "stream nobody asked for, in chunks", first: []exchangeStep{says(events(word + finish))}, relayed: true},
		{name: "stream, its connection closes", request: strings.Replace(asksStream, "Host", "Connection: close\r\nHost", 1), first: []exchangeStep{says(events(word + finish))}, relayed: true},
		{name: "stream, fails at once", request: asksStream, first: []exchangeStep{says(events(broken))}},
		{name: "stream, fails after its announcement", request: asksStream, first: []exchangeStep{{pieces: []string{sseOf(inChunk(role)), inChunk(broken) + "0\r\n\r\n"}, gap: 5 * time.Millisecond}}},
		{name: "stream, fails in the middle", request: asksStream, first: []exchangeStep{says(events(word + broken + finish))}},
		{name: "stream, fails later", request: asksStream, first: []exchangeStep{{pieces: []string{sseOf(inChunk(word)), inChunk(word + broken)}, gap: 5 * time.Millisecond}}},
		{name: "stream, refused at once", request: asksStream, first: []exchangeStep{says(events(refusal))}},
		{name: "stream, refused later", request: asksStream, first: []exchangeStep{{pieces: []string{sseOf(inChunk(word)), inChunk(word + refusal)}, gap: 5 * time.Millisecond}}},
		{name: "stream, cut before content", request: asksStream, first: []exchangeStep{{pieces: []string{sseOf(inChunk(role))}, end: true}}},
		{name: "stream, cut after content", request: asksStream, first: []exchangeStep{{pieces: []string{sseOf(inChunk(word))}, end: true}}},
		{name: "stream, cut in an event", request: asksStream, first: []exchangeStep{{pieces: []string{sseOf(inChunk(word+word[:10]), "ff\r\ndata: {")}, end: true}}},
		{name: "stream, too late", request: asksStream, tune: func(p *policy.Policy, _ *Options) { p.Models[0].Timeout = time.Second },
			first: []exchangeStep{{pieces: []string{sseOf(inChunk(word)), inChunk(finish)}, gap: 1500 * time.Millisecond}}},
		{name: "stream, a length that is none", request: asksStream, first: []exchangeStep{{pieces: []string{sseOf(inChunk(word)), inChunk(word) + "zz\r\n"}, gap: 5 * time.Millisecond}}},
		{name: "stream, an end without a blank line", request: asksStream, first: []exchangeStep{says(events(word + "data: [DONE]"))}},
		{name: "stream, empty", request: asksStream, first: []exchangeStep{says(events(""))}},
		{name: "stream, announcement only", request: asksStream, first: []exchangeStep{says(events(role))}},
		{name: "stream, a long event", request: asksStream, first: []exchangeStep{says(events("data: " + strings.Repeat("x", 300<<10) + "\n\n" + finish))}},
		{name: "stream, encoded", request: asksStream, first: []exchangeStep{says(strings.Replace(events(word+finish), "\r\n", "\r\nContent-Encoding: br\r\n", 1))}},
		{name: "stream, of known length", request: asksStream, first: []exchangeStep{says(strings.Replace(json("200 OK", word+finish), "application/json", "text/event-stream", 1))}},
		{name: "stream, answered in text", request: asksStream, first: []exchangeStep{says(strings.Replace(json("200 OK", "text"), "application/json", "text/plain", 1))}},
		{name: "stream, fails with a status", request: asksStream, first: []exchangeStep{says(strings.Replace(events(word), "200", "503", 1))}},
		{name: "caller's time limit", request: chat("X-Request-Timeout: 30\r\n"), first: []exchangeStep{ok}, refused: true},
		{name: "unknown model", request: chatRequestOf(chatPath, `{"model":"other"}`), first: []exchangeStep{ok}, refused: true},
		{name: "no JSON", request: chatRequestOf(chatPath, `{"model":"gpt"`), first: []exchangeStep{ok}, refused: true},
		{name: "model twice", request: chatRequestOf(chatPath, `{"model":"gpt","model":"other"}`), first: []exchangeStep{ok}, refused: true},
		{name: "a loop of sidecars", request: chat("X-Outrigger-Hops: 8\r\n"), first: []exchangeStep{ok}, refused: true},
		{name: "no number of hops", request: chat("X-Outrigger-Hops: x\r\n"), first: []exchangeStep{ok}, refused: true},
		{name: "encoded body", request: chat("Content-Encoding: gzip\r\n"), first: []exchangeStep{ok}, refused: true},
		{name: "trailers", request: chat("TE: trailers\r\nConnection: te\r\n"), first: []exchangeStep{ok}, refused: true},
		{name: "other method", request: strings.Replace(chat(), "POST", "PUT", 1), first: []exchangeStep{ok}, refused: true},
		{name: "expects", pieces: []string{"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 15\r\n\r\n", `{"model":"gpt"}`}, first: []exchangeStep{ok}, refused: true},
		{name: "body never comes", pieces: []string{"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n", `{"model":"gpt"}`, ""}, first: []exchangeStep{ok}, refused: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			pieces := c.pieces
			if pieces == nil {
				if c.request == "" {
					c.request = chat()
				}
				pieces = []string{c.request}
			}
			// What a time limit decides is decided otherwise when the machine stalls for as long:
			// such a case is tried again, with ten times the limits.
			for scale, tries := time.Duration(1), 3; ; scale, tries = 10*scale, tries-1 {
				var limited bool
				try := exchange{c.first, c.second, pieces, c.cut * scale, c.relayed, func(p *policy.Policy, o *Options) {
					whole := p.Models[0].Timeout
					if c.tune != nil {
						c.tune(p, o)
					}
					limited = c.cut > 0 || p.Models[0].Timeout != whole || o.TryTimeout != 0
					if p.Models[0].Timeout != whole {
						p.Models[0].Timeout *= scale
					}
					o.TryTimeout *= scale
				}}
				wrong := try.compare(t, chat())
				if wrong == nil {
					return
				}
				if !limited || tries == 1 {
					t.Fatal(strings.Join(wrong, "\n"))
				}
				t.Logf("limits times %d: %.300s", scale, wrong)
			}
		})
	}
}

// exchange is one case of TestOnLoopAsByHandler.
type exchange struct {
	first, second []exchangeStep
	pieces        []string
	cut           time.Duration
	relayed       bool
	tune          func(*policy.Policy, *Options)
}

// compare has the exchange served by the handler and by a loop, and tells where they differ.
func (x exchange) compare(t *testing.T, before string) (wrong []string) {
	t.Helper()
	fault := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	ok := says(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(answerOf("gpt-v1", "one")), answerOf("gpt-v1", "one")))
	var seen [2]seenBy
	for i, carried := range []bool{false, true} {
		a, b := newScript(t, append([]exchangeStep{ok}, x.first...)...), newScript(t, append(slices.Clone(x.second), ok)...)
		p := newPolicy(0, []policy.Endpoint{at(a.address(), "eu"), at(b.address(), "us")}, nil)
		d := upstream.NewDirect(upstream.TransportOptions{}, upstream.NewTransport(upstream.TransportOptions{}))
		tel, err := telemetry.New(t.Context(), telemetry.Options{Service: "test", LogTo: io.Discard})
		if err != nil {
			t.Fatal(err)
		}
		o := Options{Transport: d, Policy: newSource(p).get, Meter: tel.Meter("inference")}
		x.tune(p, &o)
		h := mustNew(t, o)
		on := d
		if !carried {
			on = nil
		}
		address, s, end := serveOnLoop(t, h, on)
		// The first call is the handler's and leaves a connection for the loop.
		if got := talk(t, address, 0, before); !strings.HasPrefix(got, "200 ") {
			fault("the first call: %s", got)
		}
		h.Recorder().Drain(time.Now())
		counts := s.Counts()
		seen[i].client = talk(t, address, x.cut, x.pieces...)
		end() // waits for handlers and calls
		d.CloseIdleConnections()
		a.stop()
		b.stop()
		seen[i].servers = [2][]string{a.seen, b.seen}
		seen[i].outcomes = recorded(h) + measured(tel)
		if n := h.inflight.Load() + h.plan.Load().load(); n != 0 {
			t.Errorf("%d places are still taken", n)
		}
		if got := s.Counts(); carried && (got.Relayed-counts.Relayed == 1) != x.relayed {
			fault("%d calls were relayed by the loop, want %v", got.Relayed-counts.Relayed, x.relayed)
		}
	}
	if seen[0].client != seen[1].client {
		fault("the client got\n %.900s\nfrom the handler, and\n %.900s\nfrom the loop", seen[0].client, seen[1].client)
	}
	for i := range seen[0].servers {
		if !slices.Equal(seen[0].servers[i], seen[1].servers[i]) {
			fault("server %d got\n %.900q\nfrom the handler, and\n %.900q\nfrom the loop", i, seen[0].servers[i], seen[1].servers[i])
		}
	}
	if seen[0].outcomes != seen[1].outcomes {
		fault("the handler recorded\n %s\nthe loop\n %s", seen[0].outcomes, seen[1].outcomes)
	}
	return wrong
}

// candidateFirst gives the first endpoint to a candidate with everybody in it, and the
// second to the last good version.
func candidateFirst(p *policy.Policy, _ *Options) {
	m := &p.Models[0]
	both := m.Versions[0].Endpoints
	m.Versions[0].Endpoints, m.Versions[1].Endpoints = both[1:], both[:1]
	m.Arms = []policy.Arm{{Name: "candidate", Version: "v2", Ranges: m.Arms[0].Ranges}}
}

// load is what a plan's limits hold.
func (p *plan) load() (n int64) {
	for _, t := range p.targets {
		n += t.inflight.Load()
	}
	for _, g := range p.gates {
		g.conns.mu.Lock()
		n += g.inflight.Load() + g.retries.Load() + int64(g.conns.used)
		g.conns.mu.Unlock()
	}
	for _, g := range p.shares {
		n += g.inflight.Load()
	}
	return n
}

// chunked is an answer whose content is in chunks, which are the parts.
func chunked(parts ...string) string {
	return "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Join(parts, "")
}

// sseOf is a stream whose content is in chunks, which are the parts; events a whole one.
func sseOf(parts ...string) string {
	return strings.Replace(chunked(parts...), "application/json", "text/event-stream", 1)
}

func events(s string) string {
	if s == "" {
		return sseOf("0\r\n\r\n")
	}
	return sseOf(inChunk(s), "0\r\n\r\n")
}

// Events of a chat.
const (
	role    = `data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}` + "\n\n"
	word    = `data: {"choices":[{"index":0,"delta":{"content":"word "}}]}` + "\n\n"
	counted = `data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}` + "\n\n"
	finish  = "data: [DONE]\n\n"
	broken  = `data: {"error":{"message":"boom","type":"server_error"}}` + "\n\n"
	refusal = `data: {"error":{"message":"too long","type":"invalid_request_error"}}` + "\n\n"
)

func inChunk(s string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(s), s) }

func chatRequestOf(path, body string, more ...string) string {
	return "POST " + path + " HTTP/1.1\r\nHost: front\r\nContent-Type: application/json\r\n" + strings.Join(more, "") + fmt.Sprintf("Content-Length: %d\r\n\r\n", len(body)) + body
}

// onFirstByte, as a cut, is when the first byte of the answer is there.
const onFirstByte = -1

// talk sends the pieces on a new connection, waiting a moment between them, and tells what
// came back; an empty piece half-closes. With cut it closes the connection so long after.
func talk(t *testing.T, address string, cut time.Duration, pieces ...string) string {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	for i, p := range pieces {
		if i > 0 {
			timer := time.NewTimer(20 * time.Millisecond)
			<-timer.C
		}
		if p == "" {
			c.(*net.TCPConn).CloseWrite()
		} else if _, err := io.WriteString(c, p); err != nil {
			return "write: " + err.Error()
		}
	}
	if cut == onFirstByte {
		if _, err := c.Read(make([]byte, 1)); err != nil {
			return err.Error()
		}
		return "left"
	}
	if cut > 0 {
		timer := time.NewTimer(cut)
		<-timer.C
		return "left"
	}
	br := bufio.NewReader(c)
	var resp *http.Response
	for { // interim answers are none
		if resp, err = http.ReadResponse(br, &http.Request{Method: "POST"}); err != nil {
			return "head: " + plainError(err)
		}
		if resp.StatusCode >= 200 {
			break
		}
	}
	body, err := io.ReadAll(resp.Body)
	return fmt.Sprintf("%s %v %s close=%v %s", resp.Status, plain(resp.Header), body, resp.Close, plainError(err))
}

func plainError(err error) string {
	var n net.Error
	if errors.As(err, &n) && n.Timeout() {
		return "timeout"
	} else if err != nil {
		return err.Error()
	}
	return ""
}

// recorded is what the recorder has, without times.
func recorded(h *Handler) string {
	var out bytes.Buffer
	for _, d := range h.Recorder().Drain(time.Now()) {
		d = proto.CloneOf(d)
		d.LatencySumMs, d.LatencySketch, d.TtftSketch = 0, nil, nil
		if d.FirstFailureUnixNano > 0 {
			d.FirstFailureUnixNano = 1
		}
		d.Units = slices.DeleteFunc(d.Units, func(u *pb.UnitRow) bool { u.SumY = 0; return false })
		fmt.Fprintf(&out, "%v\n", d)
	}
	// Messages print with random spaces.
	return strings.Join(strings.Fields(out.String()), " ")
}

// measured is what the GenAI metrics say, without times.
func measured(tel *telemetry.Telemetry) (out string) {
	w := httptest.NewRecorder()
	tel.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	var lines []string
	for line := range strings.Lines(w.Body.String()) {
		if strings.HasPrefix(line, "gen_ai_") && strings.Contains(line, "_count{") || strings.HasPrefix(line, "gen_ai_client_token_usage_sum") {
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	return "\n" + strings.Join(lines, "")
}
