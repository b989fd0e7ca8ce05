package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"sync"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

const (
	stampedeSize = 10_000
	direct       = "no single flight"
)

func nodeTierRows() []row {
	return []row{
		{id: "cache.memory", unit: "MiB", better: "lower", run: runMemory, bars: []bar{{what: "MiB resident", metric: "mib", of: absolute, must: 400, aim: math.NaN()}},
			what: fmt.Sprintf("resident memory of a node agent (outrigger-dataplane node) that holds %d variables of %d bytes: table in shared memory and everything of the process's own, %v after the last of them came", memoryKeys, valueBytes, memorySettle)},
		{id: "cache.stampede", unit: "ms", better: "lower", run: runStampede,
			what: fmt.Sprintf("%d goroutines miss the same variable at once on one node, until the last has its answer from the authority over TCP loopback; the peer is each of them asking the authority over the same connection", stampedeSize)},
	}
}

func runStampede(ctx context.Context, e *env, r row) ([]result, error) {
	cs := []contender{
		{name: us, sample: func(ctx context.Context) (map[string]float64, error) {
			return e.values(ctx, e.ours("stampede")...)
		}},
		{name: direct, sample: func(ctx context.Context) (map[string]float64, error) {
			return e.values(ctx, e.ours("stampede", "-direct")...)
		}},
	}
	c, err := e.compare(ctx, r.id, e.rounds, cs)
	if err == nil {
		err = e.keep(r.id, c)
	}
	if err != nil {
		return nil, err
	}
	return c.rows(r, "ms", peerNames(cs), func(peer string) string {
		o, _ := summarise(c.Rounds, us, "", "reads")
		p, _ := summarise(c.Rounds, direct, "", "reads")
		return fmt.Sprintf("%s; reads that reached the authority: %v at most, the peer's %v", r.what, o.OursMax, p.OursMax)
	})
}

// childStampede lets everybody ask for a variable the node does not hold.
func childStampede(ctx context.Context, args []string, _ io.Reader) (any, error) {
	f := flag.NewFlagSet("stampede", flag.ContinueOnError)
	without := f.Bool("direct", false, "each asks the authority")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	fl, err := newFleet(ctx, "")
	if err != nil {
		return nil, err
	}
	out, err := fl.stampede(ctx, *without)
	return out, errors.Join(err, fl.close())
}

func (f *fleet) stampede(ctx context.Context, without bool) (map[string]float64, error) {
	if err := f.addNodes(ctx, 1); err != nil {
		return nil, err
	}
	if err := f.session(ctx, "s", lagValue(1)); err != nil {
		return nil, err
	}
	read, origin := f.nodes[0].Read, pb.NewCoherenceClient(f.origin)
	if without {
		read = func(ctx context.Context, r *pb.ReadRequest) (*pb.ReadResponse, error) { return origin.Read(ctx, r) }
	}
	// The connection is up and both sides are warm before it counts.
	if _, err := read(ctx, &pb.ReadRequest{Keys: []*pb.Key{{Session: "s", Name: "y"}}}); err != nil {
		return nil, err
	}
	before := f.reads.Load()
	start := make(chan struct{})
	errs := make(chan error, stampedeSize)
	var ready sync.WaitGroup
	for range stampedeSize {
		ready.Add(1)
		go func() {
			ready.Done()
			<-start
			got, err := read(ctx, &pb.ReadRequest{Keys: []*pb.Key{{Session: "s", Name: "x"}}})
			if err == nil && got.GetResults()[0].GetVariable() == nil {
				err = fmt.Errorf("a reader was told that there is no variable")
			}
			errs <- err
		}()
	}
	ready.Wait()
	began := time.Now()
	close(start)
	var err error
	for range stampedeSize {
		err = errors.Join(err, <-errs)
	}
	return map[string]float64{"ms": float64(time.Since(began)) / 1e6, "reads": float64(f.reads.Load() - before)}, err
}
