//go:build !dataplane

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
)

// soakSessions are the sessions with a variable v each; worker i of the load writes to
// session i, everybody reads all.
const soakSessions = 32

// Patience of clients: how long they wait for what must come, and for what never will.
const (
	soakPatience = time.Minute
	soakLeave    = 30 * time.Millisecond
)

// book is what clients saw, by outcome.
type book struct {
	mu    sync.Mutex
	seen  map[string]uint64
	wrong []string // what must not happen, the first few
	count int      // of them
}

func (b *book) add(outcome string, n uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seen[outcome] += n
}

func (b *book) fault(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.count++; len(b.wrong) < 20 {
		b.wrong = append(b.wrong, fmt.Sprintf(format, args...))
	}
}

func (b *book) snapshot() map[string]uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make(map[string]uint64, len(b.seen))
	for k, v := range b.seen {
		out[k] = v
	}
	return out
}

// soakLoad is mixed load on one sidecar. Workers take a permit per operation.
type soakLoad struct {
	address string
	book    *book
	permits chan struct{}
	done    atomic.Uint64 // operations
	stop    chan struct{}
	workers sync.WaitGroup
}

// feed gives out permits: as many as are taken while rate is 0, else rate per second.
func (l *soakLoad) feed(rate float64) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	due, last := 0.0, time.Now()
	for {
		if rate == 0 {
			select {
			case l.permits <- struct{}{}:
				continue
			case <-l.stop:
				return
			}
		}
		select {
		case <-l.stop:
			return
		case now := <-tick.C:
			// What nobody takes in time is not made up for: a backlog would be a burst.
			due, last = min(due+now.Sub(last).Seconds()*rate, rate/10+1), now
		}
		for ; due >= 1; due-- {
			select {
			case l.permits <- struct{}{}:
			default:
			}
		}
	}
}

func (l *soakLoad) permit() bool {
	select {
	case <-l.stop:
		return false
	case <-l.permits:
		return true
	}
}

// run starts all clients; it returns when they have ended, after rest closes l.stop.
func (l *soakLoad) run(seed uint64, rate float64, rest func()) {
	l.stop, l.permits = make(chan struct{}), make(chan struct{}, 64)
	l.workers.Go(func() { l.feed(rate) })
	for i := range soakSessions / 2 {
		l.workers.Go(func() { l.httpWorker(i, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	for i := soakSessions / 2; i < soakSessions*3/4; i++ {
		l.workers.Go(func() { l.grpcWorker(i, rand.New(rand.NewPCG(seed, uint64(i)))) })
	}
	l.workers.Go(func() { l.idlers(rand.New(rand.NewPCG(seed, 1<<32))) })
	rest()
	close(l.stop)
	l.workers.Wait()
}

// idlers keeps connections that say nothing, or one thing, coming and going.
func (l *soakLoad) idlers(rng *rand.Rand) {
	var open []net.Conn
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-l.stop:
			for _, c := range open {
				c.Close()
			}
			return
		case <-tick.C:
		}
		if len(open) == 64 || len(open) > 0 && rng.IntN(3) == 0 {
			i := rng.IntN(len(open))
			open[i].Close()
			open[i] = open[len(open)-1]
			open = open[:len(open)-1]
			continue
		}
		c, err := net.DialTimeout("tcp", l.address, soakPatience)
		if err != nil {
			l.book.fault("an idle connection: %v", err)
			continue
		}
		open = append(open, c)
		if rng.IntN(2) == 0 {
			(&httpClient{l: l, c: c, r: bufio.NewReader(c)}).read(rng)
		}
	}
}

// httpClient is one connection; nil c = not open.
type httpClient struct {
	l    *soakLoad
	c    net.Conn
	r    *bufio.Reader
	left int // requests until it closes
}

func (l *soakLoad) httpWorker(own int, rng *rand.Rand) {
	h := &httpClient{l: l}
	for l.permit() {
		if h.c == nil {
			c, err := net.DialTimeout("tcp", l.address, soakPatience)
			if err != nil {
				l.book.fault("connect: %v", err)
				continue
			}
			h.c, h.r, h.left = c, bufio.NewReader(c), 1+rng.IntN(200)
		}
		switch n := rng.IntN(100); {
		case n < 50:
			h.read(rng)
		case n < 58:
			h.write(own, rng)
		case n < 84:
			h.infer("", false, "")
		case n < 97:
			h.infer("", true, "")
		case n < 98:
			h.infer("x-request-timeout: 50ms\r\n", rng.IntN(2) == 0, "hang")
		default:
			h.leave(rng.IntN(2) == 0)
		}
		l.done.Add(1)
		if h.left--; h.left <= 0 && h.c != nil {
			h.close()
		}
	}
	if h.c != nil {
		h.close()
	}
}

func (h *httpClient) close() {
	h.c.Close()
	h.c = nil
}

// send counts a request and writes it.
func (h *httpClient) send(request string) bool {
	h.l.book.add("http1", 1)
	err := h.c.SetDeadline(time.Now().Add(soakPatience))
	if err == nil {
		_, err = io.WriteString(h.c, request)
	}
	if err != nil {
		h.l.book.fault("send: %v", err)
		h.close()
	}
	return err == nil
}

// answer reads one; nothing is a fault but for requests that were given up.
func (h *httpClient) answer(what string) (*http.Response, []byte) {
	resp, err := http.ReadResponse(h.r, nil)
	var body []byte
	if err == nil {
		body, err = io.ReadAll(resp.Body)
	}
	if err != nil {
		h.l.book.fault("%s: no whole answer: %v", what, err)
		h.close()
		return nil, nil
	}
	if resp.Close {
		h.close()
	}
	return resp, body
}

func (h *httpClient) read(rng *rand.Rand) {
	name := "v"
	if rng.IntN(20) == 0 {
		name = "none"
	}
	if !h.send(fmt.Sprintf("GET /v1/variables/s%d/%s HTTP/1.1\r\nHost: x\r\n\r\n", rng.IntN(soakSessions), name)) {
		return
	}
	resp, body := h.answer("read")
	if resp == nil {
		return
	}
	if want := map[string]int{"v": 200, "none": 404}[name]; resp.StatusCode != want {
		h.l.book.fault("read of %s: %d %s", name, resp.StatusCode, body)
	}
	h.l.book.read(resp.Header.Get(outrigger.HeaderTier), resp.Header.Get(outrigger.HeaderStale))
}

// read counts an answer by what it says of itself.
func (b *book) read(tier, stale string) {
	b.add("read "+tier, 1)
	if stale != "" {
		b.add("read stale", 1)
	}
}

func (b *book) wrote(session int, ok bool) {
	if ok {
		b.add("write", 1)
		b.add(fmt.Sprintf("write to %d", session), 1)
	} else {
		b.add("write error", 1)
		b.add(fmt.Sprintf("write error to %d", session), 1)
	}
}

func (h *httpClient) write(own int, rng *rand.Rand) {
	body := fmt.Sprintf(`{"value":%d}`, rng.IntN(1000))
	if !h.send(fmt.Sprintf("PUT /v1/variables/s%d/v HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", own, len(body), body)) {
		return
	}
	if resp, _ := h.answer("write"); resp != nil {
		h.l.book.wrote(own, resp.StatusCode == http.StatusOK)
	}
}

func (h *httpClient) ask(fields string, stream bool, prompt string) bool {
	body := fmt.Sprintf(`{"model":"soak","stream":%t,"messages":[{"role":"user","content":%q}]}`, stream, prompt)
	return h.send(fmt.Sprintf("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n%s", fields, len(body), body))
}

func (h *httpClient) infer(fields string, stream bool, prompt string) {
	if !h.ask(fields, stream, prompt) {
		return
	}
	if resp, body := h.answer("inference"); resp != nil {
		h.l.book.add("call "+outcomeOf(resp, body), 1)
	}
}

// leave asks what is never answered to its end, and half-closes. What has come until then
// is read: an answer that was under way counts as what it is.
func (h *httpClient) leave(stream bool) {
	if !h.ask("", stream, "hang") {
		return
	}
	defer func() {
		if h.c != nil {
			h.close()
		}
	}()
	var got []byte
	err := h.c.SetReadDeadline(time.Now().Add(soakLeave))
	buf := make([]byte, 4096)
	for err == nil {
		var n int
		n, err = h.r.Read(buf)
		got = append(got, buf[:n]...)
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		err = h.c.(*net.TCPConn).CloseWrite()
		if err == nil {
			err = h.c.SetReadDeadline(time.Now().Add(soakPatience))
		}
		if err == nil {
			var rest []byte
			rest, err = io.ReadAll(h.r)
			got = append(got, rest...)
		}
	} else if err == io.EOF {
		err = nil
	}
	if err != nil {
		h.l.book.fault("leaving: %v after %q", err, got)
		return
	}
	outcome := "cancelled"
	if resp, rerr := http.ReadResponse(bufio.NewReader(strings.NewReader(string(got))), nil); rerr == nil {
		body, _ := io.ReadAll(resp.Body)                   // cut, if it was cancelled
		if o := outcomeOf(resp, body); o != "unfinished" { // a stream that was cut off by us
			outcome = o
		}
	}
	h.l.book.add("call "+outcome, 1)
}

// outcomeOf puts an answer to a model call into the words of soakOutcome.
func outcomeOf(resp *http.Response, body []byte) string {
	text := string(body)
	if strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream") {
		last := text[strings.LastIndex(strings.TrimRight(text, "\n"), "\n")+1:]
		switch {
		case strings.HasPrefix(last, "data: [DONE]"):
			return "ok"
		case !strings.Contains(last, `"error"`):
			return "unfinished"
		}
		text = strings.TrimPrefix(last, "data: ")
	} else if resp.StatusCode == http.StatusOK {
		if !json.Valid(body) || !strings.Contains(text, `"usage"`) {
			return "damaged"
		}
		return "ok"
	}
	var e struct{ Error struct{ Code string } }
	if err := json.Unmarshal([]byte(text), &e); err != nil || e.Error.Code == "" {
		return resp.Status[:3] // the model's own
	}
	switch code := e.Error.Code; code {
	case "soak":
		return "stream_error"
	case "upstream_lost", "upstream_unreachable":
		return "lost"
	case "no_healthy_endpoint":
		return "breaker_open"
	default:
		return code
	}
}

// soakOutcome is outcomeOf for error.type of the sidecar's metrics.
func soakOutcome(tag string) string {
	switch tag {
	case "":
		return "ok"
	case "transport", "stream_lost":
		return "lost"
	}
	return tag
}

func (l *soakLoad) grpcWorker(own int, rng *rand.Rand) {
	var conn *grpc.ClientConn
	left := 0
	for l.permit() {
		if left == 0 {
			if conn != nil {
				conn.Close()
			}
			var err error
			if conn, err = grpc.NewClient(l.address, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
				l.book.fault("gRPC client: %v", err)
				return
			}
			left = 1 + rng.IntN(2000)
		}
		left--
		l.call(conn, own, rng)
		l.done.Add(1)
	}
	if conn != nil {
		conn.Close()
	}
}

func (l *soakLoad) call(conn *grpc.ClientConn, own int, rng *rand.Rand) {
	ctx, cancel := context.WithTimeout(context.Background(), soakPatience)
	defer cancel()
	l.book.add("http2", 1)
	session := fmt.Sprintf("s%d", rng.IntN(soakSessions))
	var md metadata.MD
	var err error
	switch n := rng.IntN(100); {
	case n < 10:
		_, err = pb.NewVariablesClient(conn).Set(ctx, &pb.SetRequest{Tenant: outrigger.DefaultTenant, Session: fmt.Sprintf("s%d", own), Identifier: "v",
			Value: &pb.Value{Type: "integer", Json: fmt.Appendf(nil, "%d", n)}, Options: &pb.WriteOptions{Actor: "soak", Source: "test"}})
		l.book.wrote(own, err == nil)
		return
	case n < 40:
		_, err = snakepit.NewBridgeServiceClient(conn).GetVariable(ctx, &snakepit.GetVariableRequest{SessionId: session, VariableIdentifier: "v"}, grpc.Header(&md))
	default:
		_, err = pb.NewVariablesClient(conn).Get(ctx, &pb.GetRequest{Session: session, Identifier: "v"}, grpc.Header(&md))
	}
	if err != nil {
		l.book.fault("gRPC read: %v", err)
	}
	first := func(key string) string {
		if v := md.Get(key); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	l.book.read(first(outrigger.HeaderTier), first(outrigger.HeaderStale))
}
