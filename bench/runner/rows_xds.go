package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/internal/pause"
	"github.com/outrigger-mesh/outrigger/xds"
)

// Contenders of the ADS rows.
const (
	xdsSnapshot = "go-control-plane SnapshotCache"
	xdsLinear   = "go-control-plane LinearCache"
	xdsFloor    = "pre-marshalled floor"
	xdsSidecar  = "outrigger, as sidecars follow it"
	xdsLarge    = "outrigger, 500 clusters"
)

const xdsSetting = "delta ADS streams with a TCP connection each, clients and server sharing the cores; one set for all, one RouteConfiguration changed per push; the floor sends the same bytes, marshalled once, to everyone and understands nothing"

func xdsRows() []row {
	measured := func(id, unit, metric string, streams, pushes int, what string, bars ...bar) row {
		for i := range bars {
			bars[i].aim = math.NaN()
		}
		return row{id: id, unit: unit, better: "lower", what: fmt.Sprintf("%s; %d %s, 50 clusters of 10 endpoints", what, streams, xdsSetting), bars: bars,
			run: func(ctx context.Context, e *env, r row) ([]result, error) {
				return runXDS(ctx, e, r, xdsRun{metric: metric, streams: streams, pushes: pushes})
			}}
	}
	return []row{
		measured("xds.push_cpu", "us CPU/stream", "push_cpu_us", 1000, 12, "processor time of the server for one push and its ACK, per stream",
			bar{what: "us CPU per stream and push", metric: "push_cpu_us", of: absolute, must: 75},
			bar{what: "with 50 clusters / with 500", peer: xdsLarge, metric: "push_cpu_us", higher: true, must: 1 / 1.15}),
		measured("xds.push_latency", "ms", "push_ms", 1000, 12, "from the call that publishes until the last stream has sent its ACK",
			bar{what: "ms to the last ACK", metric: "push_ms", of: absolute, must: 100}),
		measured("xds.set_call", "ms", "set_ms", 5000, 6, "how long the call that publishes blocks its caller",
			bar{what: "ms in the call", metric: "set_ms", of: absolute, must: 10}),
		measured("xds.memory", "KiB/stream", "stream_kib", 5000, 2, "resident memory of the server beyond what it has without clients, per stream, after the first sync and two pushes",
			bar{what: "KiB per stream", metric: "stream_kib", of: absolute, must: 64}),
		measured("xds.storm", "us CPU/stream", "storm_cpu_us", 5000, 1, "processor time of the server when all clients are cut off and come back with the versions they hold, per stream; then every client rejects a push and is watched for 2 s",
			bar{what: "unchanged resources sent again", metric: "storm_resources", of: absolute, must: 0},
			bar{what: "responses after a rejection", metric: "nack_resends", of: absolute, must: 0}),
	}
}

// xdsRun is the measurement of one row.
type xdsRun struct {
	metric          string
	streams, pushes int
}

// rounds keeps a row of thousands of streams, which take seconds to connect, short.
func (x xdsRun) rounds(e *env) int {
	if x.streams > 1000 {
		return min(e.rounds, 2)
	}
	return min(e.rounds, 3)
}

func runXDS(ctx context.Context, e *env, r row, x xdsRun) ([]result, error) {
	if _, err := roomFor(x.streams + 200); err != nil {
		return nil, err
	}
	dir, err := e.dir("xds")
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "resources.json")
	var none struct{}
	if err := e.measureIn(ctx, child{argv: e.ours("xdsserver", "-dump", file)}, &none); err != nil {
		return nil, err
	}
	stock, missing := e.peer(ctx, "xdsstock")
	server := func(name string, types []string, argv ...string) contender {
		return contender{name: name, sample: func(ctx context.Context) (map[string]float64, error) { return x.sample(ctx, e, types, argv) }}
	}
	cs := []contender{server(us, xdsStandard(), e.ours("xdsserver")...)}
	for _, c := range []struct{ name, cache string }{{xdsSnapshot, "snapshot"}, {xdsLinear, "linear"}} {
		peer := server(c.name, xdsStandard(), stock, "-resources", file, "-cache", c.cache)
		peer.missing = missing
		cs = append(cs, peer)
	}
	if x.metric != "storm_cpu_us" { // the floor knows no versions
		cs = append(cs, server(xdsFloor, xdsStandard(), e.ours("xdsserver", "-floor")...))
	}
	if x.metric == "push_cpu_us" {
		cs = append(cs, server(xdsLarge, xdsStandard(), e.ours("xdsserver", "-clusters", "500")...))
	}
	peers := peerNames(cs)
	if x.metric == "push_cpu_us" {
		cs = append(cs, server(xdsSidecar, xds.Types(), e.ours("xdsserver")...))
	}
	c, err := e.compare(ctx, r.id, x.rounds(e), cs)
	if err != nil {
		return nil, err
	}
	if err := e.keep(r.id, c); err != nil {
		return nil, err
	}
	return c.rows(r, x.metric, peers, func(peer string) string { return r.what + x.also(c.Rounds, peer) })
}

// also tells the row's other figures.
func (x xdsRun) also(rounds []round, peer string) (text string) {
	tell := func(of, metric, format string) {
		if s, ok := summarise(rounds, of, "", metric); ok {
			text += "; " + fmt.Sprintf(format, s.Ours)
		}
	}
	switch x.metric {
	case "push_cpu_us":
		tell(xdsSidecar, "push_cpu_us", "with ModelPolicy and MeshPolicy, so two responses and ACKs a push, %.3g")
	case "storm_cpu_us":
		for _, who := range slices.Compact([]string{us, peer}) {
			if who == "" {
				continue
			}
			tell(who, "storm_resources", who+": unchanged resources sent again %.0f")
			tell(who, "storm_ms", "all back after %.0f ms")
			tell(who, "nack_resends", "responses after the rejection %.0f")
		}
	}
	return text
}

// sample starts a server and its clients and measures what the row is about.
func (x xdsRun) sample(ctx context.Context, e *env, types, argv []string) (map[string]float64, error) {
	server, err := startLines[xdsReport](ctx, argv)
	if err != nil {
		return nil, err
	}
	defer server.kill()
	ready, err := server.next()
	if err != nil {
		return nil, err
	}
	before, _, err := residentUnder(server.cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	mark := xds.TypeRoute
	if slices.Contains(types, xds.TypeMeshPolicy) {
		mark = xds.TypeMeshPolicy // the last response of a push
	}
	clients, err := startLines[xdsSeen](ctx, e.ours("xdsclients", "-address", ready.Address, "-streams", strconv.Itoa(x.streams), "-types", strings.Join(types, ","), "-mark", mark))
	if err != nil {
		return nil, err
	}
	defer clients.kill()
	if _, err := clients.next(); err != nil {
		return nil, err
	}
	out := map[string]float64{}
	if x.metric == "storm_cpu_us" {
		return out, errors.Join(x.storm(ctx, server, clients, out), x.nacks(ctx, server, clients, out))
	}
	if err := x.push(ctx, server, clients, out); err != nil {
		return nil, err
	}
	after, _, err := residentUnder(server.cmd.Process.Pid)
	out["stream_kib"] = (after - before) * 1024 / float64(x.streams)
	return out, err
}

// xdsSettle lets a server take the ACKs of the last push before its time is read.
const xdsSettle = 200 * time.Millisecond

// push makes the pushes one after the other and takes medians.
func (x xdsRun) push(ctx context.Context, server *lineProcess[xdsReport], clients *lineProcess[xdsSeen], out map[string]float64) error {
	var latency, call []float64
	start, err := server.ask("stat")
	if err != nil {
		return err
	}
	for n := range x.pushes {
		r, err := server.ask("push")
		if err != nil {
			return err
		}
		seen, err := clients.ask(fmt.Sprint("wait ", n+1))
		if err != nil {
			return err
		}
		latency, call = append(latency, float64(seen.Last-r.At)/1e6), append(call, r.SetUS/1e3)
	}
	if !pause.For(ctx, xdsSettle) {
		return ctx.Err()
	}
	end, err := server.ask("stat")
	out["push_cpu_us"] = (end.CPUUS - start.CPUUS) / float64(x.pushes*x.streams)
	out["push_ms"], out["set_ms"] = median(latency), median(call)
	return err
}

// storm cuts every connection once.
func (x xdsRun) storm(ctx context.Context, server *lineProcess[xdsReport], clients *lineProcess[xdsSeen], out map[string]float64) error {
	start, err := server.ask("stat")
	if err != nil {
		return err
	}
	seen, err := clients.ask("storm")
	if err != nil {
		return err
	}
	if !pause.For(ctx, xdsSettle) {
		return ctx.Err()
	}
	end, err := server.ask("stat")
	out["storm_cpu_us"] = (end.CPUUS - start.CPUUS) / float64(x.streams)
	out["storm_ms"], out["storm_resources"] = float64(seen.Last-seen.Began)/1e6, float64(seen.Resources)
	return err
}

// nackWatch is how long a rejected push is watched for resends.
const nackWatch = 2 * time.Second

// nacks has every client reject one push and counts what it is sent after that.
func (x xdsRun) nacks(ctx context.Context, server *lineProcess[xdsReport], clients *lineProcess[xdsSeen], out map[string]float64) error {
	if _, err := clients.ask("nack"); err != nil {
		return err
	}
	if _, err := server.ask("push"); err != nil {
		return err
	}
	if _, err := clients.ask("wait 1"); err != nil {
		return err
	}
	if !pause.For(ctx, nackWatch) {
		return ctx.Err()
	}
	after, err := clients.ask("count")
	out["nack_resends"] = float64(after.Responses)
	return err
}
