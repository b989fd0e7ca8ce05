package main

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"net/http"
	"strings"
	"time"
)

// heldStreams are open at once in the memory part of the row, where descriptors suffice: a
// proxy needs two for each.
const heldStreams = 10_000

func sseRows() []row {
	return []row{{id: "proxy.sse_ttfb", unit: "us added p50", better: "lower", run: runSSE,
		what: "time to the first event of a streamed chat completion, one connection, one request after the other, less the same without a proxy in the same round (difference of the medians); the model sends an event each millisecond, the first at once; all share the cores",
		bars: []bar{{what: "added p50 in us", metric: "added_us", of: absolute, must: 100, aim: math.NaN()}}}}
}

// streamWork asks for streams; hold for such that do not end.
func streamWork(hold bool) workload {
	w := chatWork()
	text := "Say something short about outriggers."
	if hold {
		text = "hold"
	}
	ask := func(model string) string {
		return `{"model":"` + model + `","stream":true,"messages":[{"role":"user","content":"` + text + `"}]}`
	}
	body := ask(chatModel)
	w.requests = func(run *running) (out [][]byte) {
		if !hold {
			return [][]byte{run.post("/v1/chat/completions", body)}
		}
		for _, model := range heldModels() {
			out = append(out, run.post("/v1/chat/completions", ask(model)))
		}
		return out
	}
	w.probe = func(ctx context.Context, run *running) (*http.Request, error) {
		return run.request(ctx, "/v1/chat/completions", strings.Replace(body, "hold", "probe", 1))
	}
	w.good = func(got []byte) error {
		if bytes.Count(got, []byte("data: ")) != 3 || !bytes.Contains(got, []byte("[DONE]")) {
			return fmt.Errorf("not the model's three events: %.300q", got)
		}
		return nil
	}
	return w
}

// heldModels are asked in turn for streams that do not end.
func heldModels() []string {
	out := []string{chatModel}
	for i := range 9 {
		out = append(out, fmt.Sprintf("%s-%d", chatModel, i))
	}
	return out
}

func streamServers(e *env) []httpServer {
	return []httpServer{
		{us, func(ctx context.Context, cpus, upstream string) (*running, error) {
			return e.startMesh(ctx, cpus, registerModels(upstream, heldModels()...), "--model-max-in-flight", fmt.Sprint(2*heldStreams))
		}},
		{"nginx", e.nginxStreaming}, {"haproxy", e.haproxyStreaming}, {"envoy", e.envoy},
	}
}

func runSSE(ctx context.Context, e *env, r row) ([]result, error) {
	allowed, err := roomFor(2500)
	if err != nil {
		return nil, err
	}
	held := min(heldStreams, (allowed-500)/2)
	times, err := e.firstEvents(ctx, r.id)
	if err != nil {
		return nil, err
	}
	memory, err := e.holdStreams(ctx, r.id+" held", min(e.rounds, 2), held)
	if err != nil {
		return nil, err
	}
	if err := e.keep(r.id, map[string]comparison{"times": times, "memory": memory}); err != nil {
		return nil, err
	}
	out, err := times.rows(r, "added_us", []string{"nginx", "haproxy", "envoy"}, func(peer string) string {
		text := r.what
		for _, m := range []struct {
			c          comparison
			key, label string
		}{{times, "p50_us", "p50 with the way itself, us"}, {times, "p99_us", "p99 with the way itself, us"}, {memory, "held_mib", fmt.Sprintf("MiB resident with %d streams open", held)}, {memory, "idle_mib", "MiB before"}} {
			if s, ok := summarise(m.c.Rounds, us, peer, m.key); ok && peer != "" {
				text += fmt.Sprintf("; %s %.4g against %.4g", m.label, s.Ours, s.Peer)
			} else if ok {
				text += fmt.Sprintf("; %s %.4g", m.label, s.Ours)
			}
		}
		return text
	})
	withBars(out, []bar{{what: fmt.Sprintf("MiB resident with %d streams open", held), metric: "held_mib", of: absolute, must: 1024, aim: math.NaN()}}, memory.Rounds)
	return out, err
}

// firstEvents measures the time to the first event through each and without a proxy.
func (e *env) firstEvents(ctx context.Context, label string) (comparison, error) {
	w := streamWork(false)
	model, err := e.upstream(ctx, "", "sse")
	if err != nil {
		return comparison{}, err
	}
	defer model.stop()
	servers := append(streamServers(e), bare(model))
	slice := e.slice(2*len(servers)*e.rounds, time.Second)
	var cs []contender
	for _, s := range servers {
		c := contender{name: s.name}
		run, err := s.start(ctx, "", model.addresses["listen"])
		if err == nil {
			defer run.stop()
			if err = e.answers(ctx, run, w); err == nil {
				spec := loadSpec{Address: run.address, Requests: w.requests(run), Duration: slice}
				first := func(spec loadSpec) (map[string]float64, error) {
					var rep loadReport
					err := e.measureIn(ctx, child{argv: e.ours("ttfb"), in: spec}, &rep)
					return map[string]float64{"p50_us": rep.P50Micros, "p99_us": rep.P99Micros, "streams": float64(rep.Requests)}, err
				}
				_, err = first(warm(spec))
				c.sample = func(context.Context) (map[string]float64, error) { return first(spec) }
			}
		}
		c.missing = err
		cs = append(cs, c)
	}
	c, err := e.compare(ctx, label, e.rounds, cs)
	c.lessDirect("p50_us", "added_us")
	return c, err
}

// holdStreams reads the memory of each with many streams open that do not end. Server and
// model are started anew for every sample.
func (e *env) holdStreams(ctx context.Context, label string, rounds, held int) (comparison, error) {
	w := streamWork(true)
	var cs []contender
	for _, s := range streamServers(e) {
		cs = append(cs, contender{name: s.name, sample: func(ctx context.Context) (map[string]float64, error) {
			model, err := e.upstream(ctx, "", "sse")
			if err != nil {
				return nil, err
			}
			defer model.stop()
			run, err := s.start(ctx, "", model.addresses["listen"])
			if err != nil {
				return nil, err
			}
			defer run.stop()
			if err := e.answers(ctx, run, w); err != nil {
				return nil, err
			}
			return memoryWith(ctx, run, held, w.requests(run), []byte("data: "), "held_mib")
		}})
	}
	return e.compare(ctx, label, rounds, cs)
}
