package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/heap"
	"github.com/outrigger-mesh/outrigger/internal/pause"
)

const (
	lagNodes  = 100
	lagRate   = 1000
	broadcast = "plain TCP broadcast"
)

func feedRows() []row {
	return []row{{id: "cache.invalidation_lag", unit: "ms p99", better: "lower", run: runInvalidationLag,
		what: fmt.Sprintf("durable commit at the authority to the last stale read any process could make on the nodes that hold the variable; %d writes/s, %d node agents with a feed each over TCP loopback, authority (log on disk) in one process and agents in another, not pinned, every write watched: a node is done with a frame when it takes the next one off its stream. The peer has the same two processes, connections, schedule of writes and notes, and no log, lease or table: 300 bytes are written to each holding node's connection, and it is timed from before the first write to the last read", lagRate, lagNodes)}}
}

func runInvalidationLag(ctx context.Context, e *env, r row) ([]result, error) {
	var out []result
	kept := map[string]comparison{}
	for _, holders := range []int{1, 10, 100} {
		rounds := min(e.rounds, 3)
		slice := e.slice(3*2*rounds, 3*time.Second).String()
		args := []string{"-nodes", strconv.Itoa(lagNodes), "-holders", strconv.Itoa(holders), "-rate", strconv.Itoa(lagRate), "-slice", slice}
		cs := []contender{
			{name: us, sample: func(ctx context.Context) (map[string]float64, error) {
				dir, err := e.dir("lag")
				if err != nil {
					return nil, err
				}
				return e.values(ctx, e.ours("invalidation", append(args, "-dir", dir)...)...)
			}},
			{name: broadcast, sample: func(ctx context.Context) (map[string]float64, error) {
				return e.values(ctx, e.ours("broadcast", args...)...)
			}},
		}
		c, err := e.compare(ctx, fmt.Sprintf("%s to %d", r.id, holders), rounds, cs)
		if err != nil {
			return nil, err
		}
		kept[strconv.Itoa(holders)] = c
		side := func(metric string) float64 { s, _ := summarise(c.Rounds, us, "", metric); return figures(s.Ours) }
		rows, err := c.rows(r, "p99_ms", peerNames(cs), func(string) string {
			return fmt.Sprintf("%s; each variable is held by %d of the nodes; our p50 is %v ms, %v writes/s were made; of one core the authority took %v %% and the nodes %v %%, and idle %v and %v %%; durable to applied at the authority took %v ms (p50) and %v ms (p99); writes began %v ms late (p99); %v times a node without a lease showed a write",
				r.what, holders, side("p50_ms"), side("rate"), side("authority_percent"), side("nodes_percent"), side("idle_authority_percent"), side("idle_nodes_percent"),
				side("applied_p50_ms"), side("applied_p99_ms"), side("late_p99_ms"), side("shown_without_lease"))
		})
		if err != nil {
			return nil, err
		}
		out = append(out, rows...)
	}
	return out, e.keep(r.id, kept)
}

// lagFlags are common to both sides.
type lagFlags struct {
	nodes, holders, rate int
	slice                time.Duration
	dir                  string
	grpc                 bool   // feeds are gRPC streams
	profile              string // directory for CPU profiles and execution traces; "" = none
}

func parseLag(f *flag.FlagSet, args []string) (l lagFlags, err error) {
	f.IntVar(&l.nodes, "nodes", lagNodes, "nodes")
	f.IntVar(&l.holders, "holders", 10, "nodes that hold one variable")
	f.IntVar(&l.rate, "rate", lagRate, "writes per second")
	f.DurationVar(&l.slice, "slice", 3*time.Second, "how long to measure")
	f.StringVar(&l.dir, "dir", "", "directory of the log; none = in memory")
	f.BoolVar(&l.grpc, "grpc", false, "let the feeds be gRPC streams")
	f.StringVar(&l.profile, "profile", "", "directory for CPU profiles and execution traces of both processes; costs time itself; none = do not")
	if err = f.Parse(args); err == nil && (l.nodes < l.holders || l.holders < 1 || l.rate < 1) {
		err = fmt.Errorf("%d holders of %d nodes, %d writes/s", l.holders, l.nodes, l.rate)
	}
	return l, err
}

const lagSessions = 64 // each is written by one goroutine

// lagRun is one run of either side, as the writing process sees it.
type lagRun struct {
	lagFlags
	// set makes write n of a session; at is when it was durable, or began to be sent where
	// there is no log.
	set     func(ctx context.Context, session, n int) (at int64, err error)
	durable [][]int64 // by session and number: when the write was durable
	mu      sync.Mutex
	applied histogram // ns from durable to handed to the feeds and applied
	late    histogram // ns a write began after its time
}

func childInvalidation(ctx context.Context, args []string, _ io.Reader) (any, error) {
	l, err := parseLag(flag.NewFlagSet("lag", flag.ContinueOnError), args)
	if err != nil {
		return nil, err
	}
	go heap.Keep(ctx, 64<<20) // as "outrigger control" does
	f, err := newFleet(ctx, l.dir)
	if err != nil {
		return nil, err
	}
	out, err := l.measure(ctx, f)
	return out, errors.Join(err, f.close())
}

func (l lagFlags) measure(ctx context.Context, f *fleet) (map[string]float64, error) {
	set := func(ctx context.Context, session, n int) (int64, error) {
		var done committed
		_, err := f.svc.Set(context.WithValue(ctx, committedKey{}, &done), &pb.SetRequest{Session: lagSession(session), Identifier: "x", Value: &pb.Value{Json: []byte(lagValue(n))}})
		return done.at.Load(), err
	}
	for s := range lagSessions {
		if err := f.session(ctx, lagSession(s), lagValue(0)); err != nil {
			return nil, err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	nodes, err := startFeedNodes(self, f.origin.Target(), l, false)
	if err != nil {
		return nil, err
	}
	out, err := l.load(ctx, set, nodes)
	return out, errors.Join(err, nodes.close())
}

// load measures an idle second, then writes.
func (l lagFlags) load(ctx context.Context, set func(context.Context, int, int) (int64, error), nodes *feedProcess) (map[string]float64, error) {
	if _, err := nodes.next(); err != nil { // they hold their sessions
		return nil, err
	}
	idle, idleNodes, err := l.cost(nodes, func() error { pause.For(ctx, time.Second); return ctx.Err() })
	if err != nil {
		return nil, err
	}
	r := &lagRun{lagFlags: l, set: set, durable: make([][]int64, lagSessions)}
	profiled, err := l.startProfile("authority")
	if err != nil {
		return nil, err
	}
	if _, err := nodes.ask("profile"); err != nil {
		return nil, err
	}
	var took time.Duration
	loaded, loadedNodes, err := l.cost(nodes, func() error {
		var writers sync.WaitGroup
		errs := make([]error, lagSessions)
		start := time.Now()
		for s := range lagSessions {
			writers.Go(func() { errs[s] = r.write(ctx, s, start) })
		}
		writers.Wait()
		took = time.Since(start)
		return errors.Join(append(errs, profiled())...)
	})
	if err != nil {
		return nil, err
	}
	lags, made, unfresh, err := r.collect(ctx, nodes)
	if err != nil {
		return nil, err
	}
	percent := func(d, of time.Duration) float64 { return 100 * float64(d) / float64(of) }
	return map[string]float64{
		"p50_ms": float64(lags.quantile(0.5)) / 1e6, "p99_ms": float64(lags.quantile(0.99)) / 1e6, "rate": float64(made) / took.Seconds(),
		"authority_percent": percent(loaded, took), "nodes_percent": percent(loadedNodes, took),
		"idle_authority_percent": percent(idle, time.Second), "idle_nodes_percent": percent(idleNodes, time.Second),
		"applied_p50_ms": float64(r.applied.quantile(0.5)) / 1e6, "applied_p99_ms": float64(r.applied.quantile(0.99)) / 1e6,
		"late_p99_ms": float64(r.late.quantile(0.99)) / 1e6, "shown_without_lease": float64(unfresh),
	}, nil
}

// cost is the processor time of the authority and of the nodes during do.
func (l lagFlags) cost(nodes *feedProcess, do func() error) (authority, agents time.Duration, err error) {
	before, err := nodes.ask("busy")
	if err != nil {
		return 0, 0, err
	}
	mine := busy()
	if err := do(); err != nil {
		return 0, 0, err
	}
	mine = busy() - mine
	after, err := nodes.ask("busy")
	return mine, after.Busy - before.Busy, err
}

// collect waits until every write is shown by all of its nodes, and joins when with when it
// was durable.
func (r *lagRun) collect(ctx context.Context, nodes *feedProcess) (lags histogram, made, unfresh int, err error) {
	for range 30 {
		report, err := nodes.ask("shown")
		if err != nil {
			return lags, 0, 0, err
		}
		lags, made, missing := histogram{}, 0, 0
		for s, durable := range r.durable {
			for i, at := range durable {
				n := i + 1
				if n >= len(report.Shown[s]) || report.Shown[s][n] < r.holders {
					missing++
					continue
				}
				lags.record(max(0, report.Seen[s][n]-at))
				made++
			}
		}
		if missing == 0 {
			return lags, made, report.Unfresh, nil
		}
		if !pause.For(ctx, time.Second) {
			return lags, 0, 0, ctx.Err()
		}
	}
	return lags, 0, 0, fmt.Errorf("not every write was shown by all of its nodes within 30 s")
}

func lagSession(s int) string { return fmt.Sprintf("session-%02d", s) }

// lagValue is 200 bytes of JSON that begin with a number.
func lagValue(n int) string {
	text := strconv.Itoa(n) + "|"
	return `"` + text + strings.Repeat("v", valueBytes-2-len(text)) + `"`
}

// holdersOf spreads the sessions over the nodes.
func (l lagFlags) holdersOf(session int) []int {
	out := make([]int, l.holders)
	for i := range out {
		out[i] = (session*l.holders + i) % l.nodes
	}
	return out
}

// write sets one session's variable at its share of the rate.
func (r *lagRun) write(ctx context.Context, session int, start time.Time) error {
	every := time.Duration(lagSessions) * time.Second / time.Duration(r.rate)
	next := start.Add(every * time.Duration(session) / lagSessions)
	for n := 1; next.Before(start.Add(r.slice)); n++ {
		pause.For(ctx, time.Until(next))
		late := time.Since(next)
		next = next.Add(every)
		at, err := r.set(ctx, session, n)
		if err != nil {
			return err
		}
		r.mu.Lock()
		r.durable[session] = append(r.durable[session], at)
		r.applied.record(max(0, time.Now().UnixNano()-at))
		r.late.record(int64(max(0, late)))
		r.mu.Unlock()
	}
	return nil
}

// numberOf is the number a lagValue begins with, -1 for other bytes.
func numberOf(json []byte) int {
	digits, _, ok := bytes.Cut(bytes.TrimPrefix(json, []byte(`"`)), []byte("|"))
	n, err := strconv.Atoi(string(digits))
	if !ok || err != nil {
		return -1
	}
	return n
}

// busy is the processor time this process has used.
func busy() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
