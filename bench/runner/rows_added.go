package main

import (
	"context"
	"time"
)

// straight is the contender that stands for no proxy at all.
const straight = "no proxy"

// bare is the model itself among the servers.
func bare(model *server) httpServer {
	return httpServer{straight, func(context.Context, string, string) (*running, error) {
		return &running{address: model.addresses["listen"]}, nil
	}}
}

// lessDirect sets metric to what came on top of the way without a proxy, round by round.
func (c comparison) lessDirect(from, metric string) {
	for _, r := range c.Rounds {
		floor, ok := r[straight]
		for name, s := range r {
			if ok && name != straight {
				s.Values[metric] = s.Values[from] - floor.Values[from]
			}
		}
	}
}

func addedRow() row {
	return row{id: "proxy.http_added", unit: "us added p50", better: "lower", run: runAdded,
		what: "POST of a small chat completion to a model that answers 1 KiB of JSON at once, one connection, one request after the other: median time less the same without a proxy in the same round; all share the cores; portkey is the LLM gateway of that name (npm) in front of the same model",
		bars: []bar{
			{what: "added p50 above nginx's in us", peer: "nginx", metric: "added_us", of: difference, must: 30, aim: 10},
			{what: "added p50 / the LLM gateway's", peer: "portkey", metric: "added_us", must: 1.0 / 20, aim: 1.0 / 20},
		}}
}

func runAdded(ctx context.Context, e *env, r row) ([]result, error) {
	w := chatWork()
	model, err := e.upstream(ctx, "", "json")
	if err != nil {
		return nil, err
	}
	defer model.stop()
	servers := append(streamServers(e), httpServer{"portkey", e.portkey}, bare(model))
	slice := e.slice(2*len(servers)*e.rounds, time.Second)
	var cs []contender
	for _, s := range servers {
		c := contender{name: s.name}
		run, err := s.start(ctx, "", model.addresses["listen"])
		if err == nil {
			defer run.stop()
			if err = e.answers(ctx, run, w); err == nil {
				spec := loadSpec{Address: run.address, Requests: w.requests(run), Connections: 1, Duration: slice}
				_, err = e.load(ctx, "", warm(spec))
				c.sample = func(ctx context.Context) (map[string]float64, error) {
					rep, err := e.load(ctx, "", spec)
					return map[string]float64{"p50_us": rep.P50Micros, "p99_us": rep.P99Micros, "rps": float64(rep.Requests) / max(rep.Seconds, 1e-9)}, err
				}
			}
		}
		c.missing = err
		cs = append(cs, c)
	}
	c, err := e.compare(ctx, r.id, e.rounds, cs)
	if err != nil {
		return nil, err
	}
	c.lessDirect("p50_us", "added_us")
	if err := e.keep(r.id, c); err != nil {
		return nil, err
	}
	return c.rows(r, "added_us", []string{"nginx", "haproxy", "envoy", "portkey"}, func(peer string) string {
		return r.what + aside(c, comparison{}, peer)
	})
}
