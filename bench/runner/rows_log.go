package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/pebble"
)

const (
	logWriters    = 128
	startupEvents = 100_000
	logAggregates = 1000
)

func logRows() []row {
	return []row{
		{id: "log.append", unit: "events/s", better: "higher", run: runAppend,
			what: fmt.Sprintf("durable appends of one event with a 200-byte value (about 300 bytes encoded), %d writers, group commit, synced before each acknowledgement, 1000 aggregates; all cores shared", logWriters)},
		{id: "log.startup", unit: "ms", better: "lower", run: runStartup,
			what: fmt.Sprintf("opening the store a killed process left with %d events of 200-byte values, files in the page cache", startupEvents)},
	}
}

func runAppend(ctx context.Context, e *env, r row) ([]result, error) {
	slice := e.slice(3*e.rounds, 2*time.Second).String()
	path, missing := e.peer(ctx, "logstore")
	in := func(argv ...string) func(context.Context) (map[string]float64, error) {
		return func(ctx context.Context) (map[string]float64, error) {
			dir, err := e.dir("append")
			if err != nil {
				return nil, err
			}
			defer os.RemoveAll(dir)
			return e.values(ctx, append(argv, "-dir", dir, "-writers", fmt.Sprint(logWriters), "-slice", slice)...)
		}
	}
	const floor = "fdatasync floor"
	cs := []contender{
		{name: us, sample: in(e.ours("append")...)},
		{name: "bbolt", missing: missing, sample: in(path, "-mode", "append", "-engine", "bbolt")},
		{name: floor, missing: missing, sample: in(path, "-mode", "append", "-engine", "wal")},
	}
	c, err := e.compare(ctx, r.id, e.rounds, cs)
	if err != nil {
		return nil, err
	}
	if err := e.keep(r.id, c); err != nil {
		return nil, err
	}
	return c.rows(r, "rate", peerNames(cs), func(peer string) string {
		if peer == floor {
			return r.what + "; the peer is no store but what the disk allows: group-committed fdatasync of 300-byte records into a file written beforehand"
		}
		return r.what
	})
}

func runStartup(ctx context.Context, e *env, r row) ([]result, error) {
	path, missing := e.peer(ctx, "logstore")
	events := fmt.Sprint(startupEvents)
	cs := []contender{{name: us}, {name: "bbolt", missing: missing}}
	for i := range cs {
		argv := e.ours("fill")
		open := e.ours("open")
		if cs[i].name != us {
			argv, open = []string{path, "-mode", "fill"}, []string{path, "-mode", "open"}
		}
		if cs[i].missing != nil {
			continue
		}
		dir, err := e.filled(ctx, append(argv, "-events", events)...)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", cs[i].name, err)
		}
		cs[i].sample = func(ctx context.Context) (map[string]float64, error) {
			// Opening changes the files: each round gets a copy of the same ones.
			fresh, err := e.dir("open")
			if err != nil {
				return nil, err
			}
			defer os.RemoveAll(fresh)
			if err := os.CopyFS(fresh, os.DirFS(dir)); err != nil {
				return nil, err
			}
			return e.values(ctx, append(open, "-events", events, "-dir", fresh)...)
		}
	}
	c, err := e.compare(ctx, r.id, e.rounds, cs)
	if err != nil {
		return nil, err
	}
	if err := e.keep(r.id, c); err != nil {
		return nil, err
	}
	ready, err := c.rows(r, "ready_ms", peerNames(cs), func(string) string { return r.what + ", until a first new event is durable" })
	if err != nil {
		return nil, err
	}
	replayed, err := c.rows(r, "replay_ms", peerNames(cs), func(string) string {
		return r.what + ", until all events were read as well; ours are decoded, bbolt's bytes only looked at"
	})
	return append(ready, replayed...), err
}

// filled runs a filling program, which kills itself at the end, and returns its directory.
func (e *env) filled(ctx context.Context, argv ...string) (string, error) {
	dir, err := e.dir("filled")
	if err != nil {
		return "", err
	}
	s, err := e.start(ctx, "fill", "", false, append(argv, "-dir", dir)...)
	if err != nil {
		return "", err
	}
	t := time.NewTimer(30 * time.Second)
	defer t.Stop()
	select {
	case <-s.done:
	case <-t.C:
		s.stop()
	case <-ctx.Done():
		s.stop()
		return "", ctx.Err()
	}
	if w, ok := s.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || w.Signal() != syscall.SIGKILL {
		return "", fmt.Errorf("filling ended with %v; %s", s.cmd.ProcessState, s.tail())
	}
	return dir, nil
}

// logFlags are the flags of the child modes about the log.
type logFlags struct {
	dir     string
	events  int
	writers int
	slice   time.Duration
}

func parseLogFlags(args []string) (l logFlags, err error) {
	f := flag.NewFlagSet("log", flag.ContinueOnError)
	f.StringVar(&l.dir, "dir", "", "directory of the log")
	f.IntVar(&l.events, "events", startupEvents, "events to fill in or to find")
	f.IntVar(&l.writers, "writers", logWriters, "concurrent writers")
	f.DurationVar(&l.slice, "slice", 2*time.Second, "how long to append")
	return l, f.Parse(args)
}

// benchEvent carries a 200-byte value.
func benchEvent() *pb.Event {
	return &pb.Event{Actor: "bench", Schema: 1, Payload: &pb.Event_VariableSet{VariableSet: &pb.VariableSet{
		Value: &pb.Value{Type: "string", Json: []byte(`"` + strings.Repeat("v", 198) + `"`)}}}}
}

func benchAggregate(i int64) string { return fmt.Sprintf("var/default/s/%d", i%logAggregates) }

func childAppend(ctx context.Context, args []string, _ io.Reader) (any, error) {
	o, err := parseLogFlags(args)
	if err != nil {
		return nil, err
	}
	l, err := pebble.Open(o.dir, pebble.Options{})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	var n, turn atomic.Int64
	var failure atomic.Pointer[error]
	var wg sync.WaitGroup
	start := time.Now()
	for range o.writers {
		wg.Go(func() {
			w := eventlog.Write{Expect: eventlog.Any, Events: []*pb.Event{benchEvent()}}
			for time.Since(start) < o.slice {
				w.Aggregate = benchAggregate(turn.Add(1))
				if _, err := l.Append(ctx, "", w); err != nil {
					failure.Store(&err)
					return
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	wall := time.Since(start)
	if p := failure.Load(); p != nil {
		return nil, *p
	}
	if got := l.Head(); got != uint64(n.Load()) {
		return nil, fmt.Errorf("the log holds %d events, %d were acknowledged", got, n.Load())
	}
	return map[string]float64{"rate": float64(n.Load()) / wall.Seconds()}, nil
}

// childFill leaves a log behind the way a killed process does.
func childFill(ctx context.Context, args []string, _ io.Reader) (any, error) {
	o, err := parseLogFlags(args)
	if err != nil {
		return nil, err
	}
	l, err := pebble.Open(o.dir, pebble.Options{})
	if err != nil {
		return nil, err
	}
	e := benchEvent()
	for done := 0; done < o.events; {
		var ws []eventlog.Write
		for n := min(eventlog.MaxBatchEvents, o.events-done); len(ws) < n; {
			ws = append(ws, eventlog.Write{Aggregate: benchAggregate(int64(done + len(ws))), Expect: eventlog.Any, Events: []*pb.Event{e}})
		}
		if _, err := l.Append(ctx, "", ws...); err != nil {
			return nil, err
		}
		done += len(ws)
	}
	return nil, syscall.Kill(os.Getpid(), syscall.SIGKILL)
}

func childOpen(ctx context.Context, args []string, _ io.Reader) (any, error) {
	o, err := parseLogFlags(args)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	l, err := pebble.Open(o.dir, pebble.Options{})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	if _, err := l.Append(ctx, "", eventlog.Write{Aggregate: benchAggregate(0), Expect: eventlog.Any, Events: []*pb.Event{benchEvent()}}); err != nil {
		return nil, err
	}
	ready := time.Since(start)
	n := 0
	for _, err := range l.ReadAll(ctx, 1) {
		if err != nil {
			return nil, err
		}
		n++
	}
	replay := time.Since(start)
	if n != o.events+1 {
		return nil, fmt.Errorf("found %d events, want %d", n, o.events+1)
	}
	return map[string]float64{"ready_ms": millis(ready), "replay_ms": millis(replay)}, nil
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
