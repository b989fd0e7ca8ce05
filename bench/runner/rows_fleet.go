package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/outrigger-mesh/outrigger/internal/pause"
	"github.com/outrigger-mesh/outrigger/xds"
)

// The fleet row.
const (
	fleetFit       = 1500 // streams of one kind the coefficients are taken from
	fleetFitPushes = 20
	fleetPushes    = 6
	fleetRefuseOf  = 20 // every so many-th client rejects each push
	fleetSlowOf    = 50
	fleetChurn     = 0.01
	fleetCostFile  = "fleet-cost.json" // beside the results
)

// fleetSizes are the fleets the model is held against; one in five is a gRPC client.
func fleetSizes() []int { return []int{1000, 5000, 10_000} }

func fleetRows() []row {
	r := row{id: "xds.fleet", unit: "% error of server CPU per push, worst size", better: "lower", run: runFleet,
		what: fmt.Sprintf("what the cost model predicts for fleets of 1,000, 5,000 and 10,000 clients, against what they cost: coefficients from %d sidecars alone and %d gRPC clients alone in the same round, then fleets with four sidecars to a gRPC client in which a client in %d rejects every push, one in %d reads and answers nothing and %.0f %% are replaced between two pushes, and in the end all are cut off at once; 50 clusters of 10 endpoints, a TCP connection each, clients and server sharing the cores",
			fleetFit, fleetFit, fleetRefuseOf, fleetSlowOf, 100*fleetChurn)}
	for _, f := range fleetFigureList() {
		r.bars = append(r.bars, bar{what: "% error of " + strings.ReplaceAll(f.key, "_", " ") + ", worst size", metric: f.key + "_error", of: absolute, must: f.tolerance, aim: math.NaN()})
	}
	return []row{r}
}

func runFleet(ctx context.Context, e *env, r row) ([]result, error) {
	sizes := fleetSizes()
	if _, err := roomFor(sizes[len(sizes)-1] + 300); err != nil {
		return nil, err
	}
	var costs []serverCost
	c, err := e.compare(ctx, r.id, min(e.rounds, 2), []contender{{name: us, sample: func(ctx context.Context) (map[string]float64, error) {
		cost, out, err := e.fleetSample(ctx, sizes)
		costs = append(costs, cost)
		return out, err
	}}})
	if err != nil {
		return nil, err
	}
	cost := costs[len(costs)-1]
	cost.Machine = machineName()
	if cost.Commit, err = commitOf(ctx, e.root); err != nil {
		return nil, err
	}
	if err := errors.Join(e.keep(r.id, c), writeJSON(filepath.Join(filepath.Dir(e.rawDir), fleetCostFile), cost)); err != nil {
		return nil, err
	}
	return c.rows(r, "push_cpu_error", []string{""}, func(string) string { return r.what + fleetText(c.Rounds, sizes, cost) })
}

// fleetText tells predictions and measurements, and what follows for 100,000 sidecars.
func fleetText(rounds []round, sizes []int, cost serverCost) (text string) {
	for _, f := range fleetFigureList() {
		text += "; " + strings.ReplaceAll(f.key, "_", " ") + " predicted/measured, " + f.unit
		for i, n := range sizes {
			p, okP := summarise(rounds, us, "", fleetKey(f.key, "predicted", n))
			m, okM := summarise(rounds, us, "", fleetKey(f.key, "measured", n))
			if okP && okM {
				text += fmt.Sprintf("%s %d: %.3g/%.3g", []string{":", ","}[min(i, 1)], n, p.Ours, m.Ours)
			}
		}
	}
	g := cost.predict(fleetShape{Delta: 100_000}, 1)
	return text + fmt.Sprintf("; predicted for 100,000 sidecars on one server: %.3g GiB in use, %.3g CPU seconds and %.3g MB a push, %.3g CPU seconds to take all in, %.3g when all come back",
		g.MemoryMiB/1024, g.PushS, g.PushMB, g.ConnectS, g.StormS)
}

func fleetKey(figure, what string, n int) string { return fmt.Sprintf("%s_%s_%d", figure, what, n) }

// fleetSample is one round: the coefficients, then every size.
func (e *env) fleetSample(ctx context.Context, sizes []int) (serverCost, map[string]float64, error) {
	cost, out := serverCost{}, map[string]float64{}
	var err error
	if cost.Delta, cost.BaseUS, err = e.fitStream(ctx, fleetShape{Delta: fleetFit}); err != nil {
		return cost, nil, err
	}
	if cost.State, _, err = e.fitStream(ctx, fleetShape{State: fleetFit}); err != nil {
		return cost, nil, err
	}
	for _, n := range sizes {
		shape := fleetShape{Delta: n - n/5, State: n / 5, SlowOf: fleetSlowOf, Churn: fleetChurn}
		measured, err := e.fleetRun(ctx, shape)
		if err != nil {
			return cost, nil, fmt.Errorf("a fleet of %d: %w", n, err)
		}
		predicted := cost.predict(shape, runtime.NumCPU())
		for _, f := range fleetFigureList() {
			p, m := f.of(predicted), f.of(measured)
			out[fleetKey(f.key, "predicted", n)], out[fleetKey(f.key, "measured", n)] = p, m
			out[f.key+"_error"] = max(out[f.key+"_error"], off(p, m))
		}
	}
	return cost, out, nil
}

// fleetPair is a server and its clients.
type fleetPair struct {
	server  *lineProcess[xdsReport]
	clients *lineProcess[xdsSeen]
	shape   fleetShape
	emptyKB float64 // resident memory before the clients came
	baseUS  float64
	end     func()
}

// startFleet starts both and returns what it cost to connect all. A few pushes without
// clients come first: they are the fixed cost of a push, and warm the server.
func (e *env) startFleet(ctx context.Context, shape fleetShape) (p *fleetPair, cpuUS, bytes float64, err error) {
	p = &fleetPair{shape: shape}
	if p.server, err = startLines[xdsReport](ctx, e.ours("xdsserver", "-grpc")); err != nil {
		return nil, 0, 0, err
	}
	p.end = p.server.kill
	defer func() {
		if err != nil {
			p.end()
		}
	}()
	ready, err := p.server.next()
	if err != nil {
		return nil, 0, 0, err
	}
	var start, alone, end xdsReport
	start, err = p.server.ask("stat")
	for range fleetFitPushes {
		_, pushed := p.server.ask("push")
		err = errors.Join(err, pushed)
	}
	last, read := p.server.ask("collect") // its time is read before it collects
	err = errors.Join(err, read)
	alone, read = p.server.ask("stat")
	empty, _, resident := residentUnder(p.server.cmd.Process.Pid)
	if err := errors.Join(err, read, resident); err != nil {
		return nil, 0, 0, err
	}
	p.baseUS, p.emptyKB = (last.CPUUS-start.CPUUS)/fleetFitPushes, empty*1024
	if p.clients, err = startLines[xdsSeen](ctx, e.ours("xdsclients", "-address", ready.Address, "-streams", strconv.Itoa(shape.count()), "-grpc", strconv.Itoa(shape.State),
		"-types", strings.Join(xds.Types(), ","), "-mark", xds.TypeMeshPolicy)); err != nil {
		return nil, 0, 0, err
	}
	p.end = func() { p.clients.kill(); p.server.kill() }
	seen, err := p.clients.next()
	if err == nil {
		end, err = p.settled(ctx)
	}
	return p, end.CPUUS - alone.CPUUS, float64(seen.Down + seen.Up), err
}

// settled is the server's time once it has had the last answers.
func (p *fleetPair) settled(ctx context.Context) (xdsReport, error) {
	if !pause.For(ctx, xdsSettle) {
		return xdsReport{}, ctx.Err()
	}
	return p.server.ask("stat")
}

// pushed is what pushes cost, each.
type pushed struct {
	cpuUS, clientUS, bytes, convergeMS float64
}

// pushAll makes n pushes and waits for each to be answered by all who answer; between
// them some clients are replaced.
func (p *fleetPair) pushAll(ctx context.Context, n, answering int) (out pushed, err error) {
	start, err := p.server.ask("stat")
	if err != nil {
		return out, err
	}
	before, err := p.clients.ask("count")
	if err != nil {
		return out, err
	}
	var latency []float64
	for range n {
		ms, bytes, err := p.push(answering)
		if err != nil {
			return out, err
		}
		latency, out.bytes = append(latency, ms), out.bytes+bytes
		if k := p.shape.replaced(); k > 0 {
			seen, err := p.clients.ask(fmt.Sprint("churn ", k))
			if err != nil {
				return out, err
			}
			out.bytes += float64(seen.Down + seen.Up)
		}
	}
	end, err := p.settled(ctx)
	if err != nil {
		return out, err
	}
	after, err := p.clients.ask("count")
	out.bytes = (out.bytes + float64(after.Down+after.Up)) / float64(n)
	out.cpuUS, out.clientUS = (end.CPUUS-start.CPUUS)/float64(n), (after.CPUUS-before.CPUUS)/float64(n)
	out.convergeMS = median(latency)
	return out, err
}

func (p *fleetPair) push(answering int) (ms, bytes float64, err error) {
	if _, err := p.clients.ask("expect"); err != nil {
		return 0, 0, err
	}
	r, err := p.server.ask("push")
	if err != nil {
		return 0, 0, err
	}
	seen, err := p.clients.ask(fmt.Sprint("turn ", answering))
	return float64(seen.Last-r.At) / 1e6, float64(seen.Down + seen.Up), err
}

// replace has n clients leave and as many come.
func (p *fleetPair) replace(ctx context.Context, n int) (cpuUS float64, err error) {
	start, err := p.server.ask("stat")
	if err != nil {
		return 0, err
	}
	if _, err := p.clients.ask(fmt.Sprint("churn ", n)); err != nil {
		return 0, err
	}
	end, err := p.settled(ctx)
	return end.CPUUS - start.CPUUS, err
}

// storm cuts everybody off.
func (p *fleetPair) storm(ctx context.Context) (cpuUS, bytes float64, err error) {
	start, err := p.server.ask("stat")
	if err != nil {
		return 0, 0, err
	}
	seen, err := p.clients.ask("storm")
	if err != nil {
		return 0, 0, err
	}
	end, err := p.settled(ctx)
	return end.CPUUS - start.CPUUS, float64(seen.Down + seen.Up), err
}

// memory is what the server has resident beyond its own, in KiB: as it is, and once
// collected.
func (p *fleetPair) memory() (resident, collected float64, err error) {
	pid := p.server.cmd.Process.Pid
	before, _, err := residentUnder(pid)
	if err != nil {
		return 0, 0, err
	}
	if _, err := p.server.ask("collect"); err != nil {
		return 0, 0, err
	}
	after, _, err := residentUnder(pid)
	return before*1024 - p.emptyKB, after*1024 - p.emptyKB, err
}

// fitStream takes the coefficients of one kind from a fleet of nothing else.
func (e *env) fitStream(ctx context.Context, shape fleetShape) (c streamCost, baseUS float64, err error) {
	n := float64(shape.count())
	p, connect, connectBytes, err := e.startFleet(ctx, shape)
	if err != nil {
		return c, 0, err
	}
	defer p.end()
	each, err := p.pushAll(ctx, fleetFitPushes, shape.count())
	if err != nil {
		return c, 0, err
	}
	resident, kib, err := p.memory()
	if err != nil {
		return c, 0, err
	}
	leave := shape.count() / 5
	churn, err := p.replace(ctx, leave)
	if err != nil {
		return c, 0, err
	}
	storm, stormBytes, err := p.storm(ctx)
	return streamCost{ConnectUS: connect / n, PushUS: (each.cpuUS - p.baseUS) / n, StormUS: storm / n, ChurnUS: churn / float64(leave), MemoryKiB: kib / n, ResidentKiB: resident / n,
		ConnectBytes: connectBytes / n, PushBytes: each.bytes / n, StormBytes: stormBytes / n, ClientUS: each.clientUS / n}, p.baseUS, err
}

// fleetRun measures a fleet that misbehaves. It fails if the slow readers, once they read
// again, are not up to date with the next push.
func (e *env) fleetRun(ctx context.Context, shape fleetShape) (out fleetFigures, err error) {
	p, connect, connectBytes, err := e.startFleet(ctx, shape)
	if err != nil {
		return out, err
	}
	defer p.end()
	for _, line := range []string{fmt.Sprintf("conduct %d %d", fleetRefuseOf, fleetSlowOf), "slow"} {
		if _, err := p.clients.ask(line); err != nil {
			return out, err
		}
	}
	each, err := p.pushAll(ctx, fleetPushes, shape.count()-shape.slow())
	if err != nil {
		return out, err
	}
	resident, kib, err := p.memory()
	if err != nil {
		return out, err
	}
	if _, err := p.clients.ask("read"); err != nil {
		return out, err
	}
	if _, _, err := p.push(shape.count()); err != nil {
		return out, err
	}
	storm, stormBytes, err := p.storm(ctx)
	return fleetFigures{ConnectS: connect / 1e6, PushS: each.cpuUS / 1e6, StormS: storm / 1e6, MemoryMiB: kib / 1024, ResidentMiB: resident / 1024,
		ConnectMB: connectBytes / 1e6, PushMB: each.bytes / 1e6, StormMB: stormBytes / 1e6, ConvergeMS: each.convergeMS}, err
}

// plan prints what a fleet costs by the coefficients of the last run of the row.
func plan(results, text string, w io.Writer) error {
	shape, err := parsePlan(text)
	if err != nil {
		return err
	}
	path := filepath.Join(filepath.Dir(cmp.Or(results, ".")), fleetCostFile)
	raw, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("%w; make bench BENCH='^xds.fleet$' measures it", err)
	}
	var cost serverCost
	if err := json.Unmarshal(raw, &cost); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return printPlan(w, cost, shape)
}
