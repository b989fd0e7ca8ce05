package main

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"google.golang.org/grpc"
)

// tcpConnections are open at once in the row of TCP.
const tcpConnections = 4

func tcpRows() []row {
	return []row{{id: "proxy.tcp", unit: "CPU s/GB", better: "lower", run: runTCP,
		what: fmt.Sprintf("bytes that are neither HTTP nor TLS, passed through from a server that sends as fast as it can to a reader, %d connections; server CPU per 10^9 bytes the reader got, ours summed over sidecar, node agent and control plane; haproxy in tcp mode with splice-auto; all share the cores", tcpConnections),
		bars: []bar{{what: "CPU per GB / haproxy", peer: "haproxy", metric: "cpu_s_gb", must: 0.7, aim: 0.5}}}}
}

func tcpServers(e *env) []httpServer {
	return []httpServer{
		{us, func(ctx context.Context, cpus, upstream string) (*running, error) {
			return e.startMesh(ctx, cpus, func(context.Context, *grpc.ClientConn) error { return nil }, "--upstream-tcp", upstream)
		}},
		{"haproxy", e.haproxyTCP},
		{"envoy", e.envoyTCP},
	}
}

// runTCP measures sharing the machine, then pinned: proxy on core 0, the rest on core 1.
func runTCP(ctx context.Context, e *env, r row) ([]result, error) {
	places := []placement{{name: "shared"}}
	if _, err := tool("taskset"); err == nil && runtime.NumCPU() > 1 {
		places = append(places, placement{"pinned", "0", "1"})
	}
	got := map[string]comparison{}
	var peers []string
	for _, p := range places {
		rounds := e.rounds
		if p.name == "pinned" {
			rounds = min(rounds, 3)
		}
		c, names, err := e.tcpAt(ctx, r.id+" "+p.name, p, rounds)
		if err != nil {
			return nil, err
		}
		got[p.name], peers = c, names
	}
	if err := e.keep(r.id, got); err != nil {
		return nil, err
	}
	return got["shared"].rows(r, "cpu_s_gb", peers, func(peer string) string {
		text := r.what
		for _, m := range []struct{ place, key, label string }{{"shared", "gb_s", "GB/s"}, {"pinned", "cpu_s_gb", "pinned (proxy core 0, the rest core 1) CPU s/GB"}, {"pinned", "gb_s", "pinned GB/s"}} {
			if s, ok := summarise(got[m.place].Rounds, us, peer, m.key); ok && peer != "" {
				text += fmt.Sprintf("; %s %.3g against %.3g", m.label, s.Ours, s.Peer)
			}
		}
		return text
	})
}

func (e *env) tcpAt(ctx context.Context, label string, p placement, rounds int) (comparison, []string, error) {
	servers := tcpServers(e)
	source, err := e.upstream(ctx, p.load, "tcp")
	if err != nil {
		return comparison{}, nil, err
	}
	defer source.stop()
	slice := e.slice(2*len(servers)*rounds, 2*time.Second)
	var cs []contender
	for _, s := range servers {
		c := contender{name: s.name}
		run, err := s.start(ctx, p.server, source.addresses["listen"])
		if err == nil {
			defer run.stop()
			spec := loadSpec{Address: run.address, Connections: tcpConnections, Duration: slice}
			_, err = e.drain(ctx, p.load, run, warm(spec))
			c.sample = func(ctx context.Context) (map[string]float64, error) { return e.drain(ctx, p.load, run, spec) }
		}
		c.missing = err
		cs = append(cs, c)
	}
	c, err := e.compare(ctx, label, rounds, cs)
	return c, peerNames(cs), err
}

// drain reads through a proxy and counts the CPU time the proxy used for it.
func (e *env) drain(ctx context.Context, cpus string, run *running, spec loadSpec) (map[string]float64, error) {
	sum := func() (total float64, err error) {
		each, err := run.cpu()
		for _, c := range each {
			total += c
		}
		return total, err
	}
	before, err := sum()
	if err != nil {
		return nil, err
	}
	var d drained
	if err := e.measureIn(ctx, child{cpus: cpus, argv: e.ours("drain"), in: spec}, &d); err != nil {
		return nil, err
	}
	after, err := sum()
	if err != nil {
		return nil, err
	}
	if d.Bytes == 0 || after-before <= 0 {
		return nil, fmt.Errorf("%.0f bytes used %v s of CPU; nothing can be said", d.Bytes, after-before)
	}
	return map[string]float64{"cpu_s_gb": (after - before) / (d.Bytes / 1e9), "gb_s": d.Bytes / 1e9 / d.Seconds}, nil
}
