package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"runtime"
	"strings"
	"time"
)

const (
	connections = 64
	hitKeys     = 1000
	chatModel   = "bench"
)

func proxyRows() []row {
	common := fmt.Sprintf("HTTP/1.1 kept alive, %d connections, closed loop; server CPU, ours summed over sidecar, node agent and control plane; servers, generator and upstream share all cores", connections)
	return []row{
		{id: "proxy.http_hit", unit: "us CPU/request", better: "lower", run: runHit,
			what: fmt.Sprintf("GET of a cached %d-byte variable out of %d, ", valueBytes, hitKeys) + common,
			bars: []bar{{what: "CPU / nginx", peer: "nginx", metric: "cpu_us", must: 0.95, aim: 0.8}, {what: "p99 / nginx", peer: "nginx", metric: "p99_us", must: 1.1, aim: math.NaN()}}},
		{id: "proxy.http_proxy", unit: "us CPU/request", better: "lower", run: runProxy,
			what: "POST of a small chat completion to a model that answers 1 KiB of JSON at once, " + common,
			bars: []bar{{what: "CPU / haproxy", peer: "haproxy", metric: "cpu_us", must: 1.0, aim: 0.85}, {what: "CPU / envoy", peer: "envoy", metric: "cpu_us", must: 0.6, aim: math.NaN()}}},
		addedRow(),
	}
}

// httpServer is one contender of an HTTP comparison.
type httpServer struct {
	name string
	// start brings it up on the given cores ("" = all) in front of upstream.
	start func(ctx context.Context, cpus, upstream string) (*running, error)
}

// running is a started contender.
type running struct {
	address string
	headers []string  // further lines of every request's head
	servers []*server // in start order; their CPU time is what counts
}

func (r *running) stop() {
	for i := len(r.servers) - 1; i >= 0; i-- {
		r.servers[i].stop()
	}
}

// cpu returns CPU seconds of each of its servers, with what is below them.
func (r *running) cpu() ([]float64, error) {
	a, err := observe()
	if err != nil {
		return nil, err
	}
	var out []float64
	for _, s := range r.servers {
		out = append(out, float64(a.under(s.pid))/ticksPerSecond)
	}
	return out, nil
}

// workload is what is sent to every server of a row.
type workload struct {
	requests func(run *running) [][]byte
	probe    func(ctx context.Context, run *running) (*http.Request, error)
	good     func(body []byte) error // checks the answer to probe
	upstream bool                    // servers stand in front of one
}

// placement says which cores run what.
type placement struct{ name, server, load string }

func runHit(ctx context.Context, e *env, r row) ([]result, error) {
	return e.compareHTTP(ctx, r, hitWork(), hitServers(e))
}

// hitWork reads every variable in turn.
func hitWork() workload {
	return workload{
		requests: func(run *running) (out [][]byte) {
			for i := range hitKeys {
				out = append(out, fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\nAccept: application/json\r\n\r\n", hitPath(i), run.address))
			}
			return out
		},
		probe: func(ctx context.Context, run *running) (*http.Request, error) {
			return http.NewRequestWithContext(ctx, http.MethodGet, "http://"+run.address+hitPath(hitKeys/2), nil)
		},
		good: func(body []byte) error {
			if !bytes.Contains(body, bytes.Repeat([]byte("v"), valueBytes-2)) {
				return fmt.Errorf("the value is not in %.300q", body)
			}
			return nil
		},
	}
}

func hitPath(i int) string { return fmt.Sprintf("/v1/variables/bench/name-%04d", i) }

func runProxy(ctx context.Context, e *env, r row) ([]result, error) {
	return e.compareHTTP(ctx, r, chatWork(), proxyServers(e))
}

// chatWork sends the same small chat completion again and again.
func chatWork() workload {
	body := `{"model":"` + chatModel + `","messages":[{"role":"user","content":"Say something short about outriggers."}]}`
	return workload{
		upstream: true,
		requests: func(run *running) [][]byte { return [][]byte{run.post("/v1/chat/completions", body)} },
		probe: func(ctx context.Context, run *running) (*http.Request, error) {
			return run.request(ctx, "/v1/chat/completions", body)
		},
		good: func(body []byte) error {
			if len(body) != 1024 || !bytes.Contains(body, []byte(`"chat.completion"`)) {
				return fmt.Errorf("the upstream's answer came as %d bytes: %.300q", len(body), body)
			}
			return nil
		},
	}
}

// post is a whole request as the load generators send it.
func (r *running) post(path, body string) []byte {
	head := fmt.Sprintf("POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nX-User-Id: user-1\r\nContent-Length: %d\r\n", path, r.address, len(body))
	for _, line := range r.headers {
		head += line + "\r\n"
	}
	return []byte(head + "\r\n" + body)
}

// request is the same for a client of net/http.
func (r *running) request(ctx context.Context, path, body string) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+r.address+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	for _, line := range r.headers {
		name, value, _ := strings.Cut(line, ": ")
		req.Header.Set(name, value)
	}
	return req, nil
}

// compareHTTP measures all servers sharing the machine, then pinned: server on core 0,
// generator and upstream on core 1. The row's value is the shared run's.
func (e *env) compareHTTP(ctx context.Context, r row, w workload, servers []httpServer) ([]result, error) {
	places := []placement{{name: "shared"}}
	if _, err := tool("taskset"); err == nil && runtime.NumCPU() > 1 {
		places = append(places, placement{"pinned", "0", "1"})
	}
	got := map[string]comparison{}
	for _, p := range places {
		rounds := e.rounds
		if p.name == "pinned" {
			rounds = min(rounds, 3) // told beside the value, not the value itself
		}
		c, err := e.atPlace(ctx, r.id+" "+p.name, p, rounds, e.slice(2*len(servers)*rounds, time.Second), w, servers)
		if err != nil {
			return nil, err
		}
		got[p.name] = c
	}
	if err := e.keep(r.id, got); err != nil {
		return nil, err
	}
	var peers []string
	for _, s := range servers {
		if s.name != us {
			peers = append(peers, s.name)
		}
	}
	return got["shared"].rows(r, "cpu_us", peers, func(peer string) string {
		return r.what + aside(got["shared"], got["pinned"], peer) + "; generator: " + e.generator
	})
}

// aside tells what else was measured against one peer.
func aside(shared, pinned comparison, peer string) string {
	text := ""
	pair := func(label, metric string, c comparison) {
		s, ok := summarise(c.Rounds, us, peer, metric)
		if s.Ours == 0 {
			return // the row has no such figure
		}
		switch {
		case ok && peer == "":
			text += fmt.Sprintf("; %s %.4g", label, s.Ours)
		case ok:
			text += fmt.Sprintf("; %s %.4g against %.4g", label, s.Ours, s.Peer)
		}
	}
	if s, ok := summarise(shared.Rounds, us, "", "cpu_us "+us+"-sidecar"); ok && s.Ours > 0 {
		text += fmt.Sprintf("; the sidecar alone %.4g", s.Ours)
	}
	pair("requests/s", "rps", shared)
	pair("p50 us", "p50_us", shared)
	pair("p99 us", "p99_us", shared)
	pair("bytes of an answer with its head", "answer_bytes", shared)
	if s, ok := summarise(pinned.Rounds, us, peer, "cpu_us"); ok && peer != "" {
		text += fmt.Sprintf("; pinned (server core 0, load core 1): %.4g against %.4g us, ratio %.3g", s.Ours, s.Peer, s.Ratio)
	}
	return text
}

// atPlace starts every server, checks that each answers rightly, and measures.
func (e *env) atPlace(ctx context.Context, label string, p placement, rounds int, slice time.Duration, w workload, servers []httpServer) (comparison, error) {
	upstream := ""
	if w.upstream {
		s, err := e.upstream(ctx, p.load, "json")
		if err != nil {
			return comparison{}, err
		}
		defer s.stop()
		upstream = s.addresses["listen"]
	}
	var cs []contender
	for _, s := range servers {
		c := contender{name: s.name}
		run, err := s.start(ctx, p.server, upstream)
		if err == nil {
			defer run.stop()
			if err = e.answers(ctx, run, w); err == nil {
				spec := loadSpec{Address: run.address, Requests: w.requests(run), Connections: connections, Duration: slice}
				_, err = e.load(ctx, p.load, warm(spec))
				c.sample = func(ctx context.Context) (map[string]float64, error) { return e.loaded(ctx, p.load, run, spec) }
			}
		}
		c.missing = err
		cs = append(cs, c)
	}
	return e.compare(ctx, label, rounds, cs)
}

// warm is a short run of the same load.
func warm(s loadSpec) loadSpec {
	s.Duration = min(s.Duration, 300*time.Millisecond)
	return s
}

// upstream starts the model behind every proxy; kind is what it answers.
func (e *env) upstream(ctx context.Context, cpus, kind string) (*server, error) {
	bin, err := e.peer(ctx, "upstream")
	if err != nil {
		return nil, err
	}
	return e.start(ctx, "upstream", cpus, true, bin, "-kind", kind)
}

// answers waits for the first right answer, e.g. until policy has reached a sidecar.
func (e *env) answers(ctx context.Context, run *running, w workload) error {
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	ask := func() error {
		req, err := w.probe(ctx, run)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("status %d: %.300q", resp.StatusCode, body)
		}
		return w.good(body)
	}
	if len(run.servers) == 0 { // the model itself, which is up
		return ask()
	}
	return run.servers[len(run.servers)-1].until(ctx, ask)
}

// minCPU is the least CPU time, in seconds, that a quotient is formed from: /proc counts
// it in hundredths.
const minCPU = 0.1

// loaded measures one run of the load and the CPU time the server used for it, the
// set-up of the connections and the last answers included. On a machine so busy that
// the server hardly got to run, the load is repeated up to three times.
func (e *env) loaded(ctx context.Context, cpus string, run *running, spec loadSpec) (map[string]float64, error) {
	return e.measured(ctx, run, func(ctx context.Context) (loadReport, error) { return e.load(ctx, cpus, spec) })
}

// measured is loaded for any generator.
func (e *env) measured(ctx context.Context, run *running, load func(context.Context) (loadReport, error)) (map[string]float64, error) {
	before, err := run.cpu()
	if err != nil {
		return nil, err
	}
	used, total, requests, rep := make([]float64, len(before)), 0.0, 0, loadReport{}
	for range 3 {
		if rep, err = load(ctx); err != nil {
			return nil, err
		}
		after, err := run.cpu()
		if err != nil {
			return nil, err
		}
		requests, total = requests+rep.Requests, 0
		for i := range used {
			used[i] = after[i] - before[i]
			total += used[i]
		}
		if total >= minCPU {
			break
		}
	}
	if total <= 0 || requests == 0 {
		return nil, fmt.Errorf("%d requests used %v s of CPU; nothing can be said", requests, total)
	}
	perRequest := 1e6 / float64(requests)
	out := map[string]float64{"cpu_us": total * perRequest, "rps": float64(rep.Requests) / rep.Seconds,
		"p50_us": rep.P50Micros, "p99_us": rep.P99Micros, "answer_bytes": float64(rep.AnswerBytes)}
	if len(used) > 1 {
		for i, s := range run.servers {
			out["cpu_us "+s.name] = used[i] * perRequest
		}
	}
	return out, nil
}

func (e *env) load(ctx context.Context, cpus string, spec loadSpec) (loadReport, error) {
	if e.generator == "wrk" {
		return e.wrk(ctx, cpus, spec)
	}
	var rep loadReport
	return rep, e.measureIn(ctx, child{cpus: cpus, argv: e.ours("load"), in: spec}, &rep)
}
