package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
)

const (
	lagNodes  = 100
	lagRate   = 1000
	broadcast = "plain TCP broadcast"
)

func feedRows() []row {
	return []row{{id: "cache.invalidation_lag", unit: "ms p99", better: "lower", run: runInvalidationLag,
		what: fmt.Sprintf("durable commit at the authority to the last stale read on any of the nodes that hold the variable; %d writes/s, %d nodes with a gRPC feed each over TCP loopback, authority (log on disk) and nodes in one process, not pinned, a tenth of the writes watched by polling the nodes' tables every 50 µs. The peer writes 300 bytes to a connection per holding node and gets 4 bytes back, without log, and is timed from its first write to its last read", lagRate, lagNodes)}}
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
			return fmt.Sprintf("%s; each variable is held by %d of the nodes (every node is sent every change); our p50 is %v ms, %v writes/s were made, one core was busy %v %% with all of it, and %v %% with the idle fleet; of %v watched writes, nodes had %v times nothing to serve (no copy or no lease), which is not stale and has a process ask",
				r.what, holders, side("p50_ms"), side("rate"), side("cpu_percent"), side("idle_cpu_percent"), side("watched"), side("nothing_to_serve"))
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
}

func parseLag(args []string) (l lagFlags, err error) {
	f := flag.NewFlagSet("lag", flag.ContinueOnError)
	f.IntVar(&l.nodes, "nodes", lagNodes, "nodes")
	f.IntVar(&l.holders, "holders", 10, "nodes that hold one variable")
	f.IntVar(&l.rate, "rate", lagRate, "writes per second")
	f.DurationVar(&l.slice, "slice", 3*time.Second, "how long to measure")
	f.StringVar(&l.dir, "dir", "", "directory of the log; none = in memory")
	if err = f.Parse(args); err == nil && (l.nodes < l.holders || l.holders < 1 || l.rate < 1) {
		err = fmt.Errorf("%d holders of %d nodes, %d writes/s", l.holders, l.nodes, l.rate)
	}
	return l, err
}

const lagSessions = 64 // each is written by one goroutine

// lagRun is one run of ours.
type lagRun struct {
	lagFlags
	fleet *fleet
	mu    sync.Mutex
	clock func() int64 // of leases
	lags  histogram    // ns
	made  int
	// missed counts the watched nodes that had nothing to serve: no copy, or no lease.
	missed int
}

func childInvalidation(ctx context.Context, args []string, _ io.Reader) (any, error) {
	l, err := parseLag(args)
	if err != nil {
		return nil, err
	}
	f, err := newFleet(ctx, l.dir)
	if err != nil {
		return nil, err
	}
	out, err := l.measure(ctx, f)
	if end := f.close(); err == nil {
		err = end
	}
	return out, err
}

func (l lagFlags) measure(ctx context.Context, f *fleet) (map[string]float64, error) {
	if err := f.addNodes(ctx, l.nodes); err != nil {
		return nil, err
	}
	for s := range lagSessions {
		if err := f.session(ctx, lagSession(s), lagValue(0)); err != nil {
			return nil, err
		}
		for _, n := range l.holdersOf(s) {
			if _, err := f.nodes[n].Read(ctx, &pb.ReadRequest{Keys: []*pb.Key{{Session: lagSession(s), Name: "x"}}}); err != nil {
				return nil, err
			}
		}
	}
	idle := busy()
	pause(ctx, time.Second)
	idle = busy() - idle
	r := &lagRun{lagFlags: l, fleet: f, clock: node.Clock()}
	var writers sync.WaitGroup
	errs := make([]error, lagSessions)
	before, start := busy(), time.Now()
	for s := range lagSessions {
		writers.Go(func() { errs[s] = r.write(ctx, s, start) })
	}
	writers.Wait()
	took := time.Since(start)
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	return map[string]float64{
		"p50_ms": float64(r.lags.quantile(0.5)) / 1e6, "p99_ms": float64(r.lags.quantile(0.99)) / 1e6,
		"rate": float64(r.made) / took.Seconds(), "cpu_percent": 100 * float64(busy()-before) / float64(took),
		"idle_cpu_percent": 100 * idle.Seconds(), "watched": float64(r.lags.total), "nothing_to_serve": float64(r.missed),
	}, nil
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

// write sets one session's variable at its share of the rate; every tenth write is watched.
func (r *lagRun) write(ctx context.Context, session int, start time.Time) error {
	every := time.Duration(lagSessions) * time.Second / time.Duration(r.rate)
	next := start.Add(every * time.Duration(session) / lagSessions)
	for n := 1; time.Since(start) < r.slice; n++ {
		pause(ctx, time.Until(next))
		next = next.Add(every)
		var done committed
		fresh := make(chan int64, 1)
		watch := (n+session)%10 == 0
		stop, end := context.WithCancel(ctx)
		if watch {
			go func() { fresh <- r.watch(stop, session, n) }()
		}
		_, err := r.fleet.svc.Set(context.WithValue(ctx, committedKey{}, &done), &pb.SetRequest{Session: lagSession(session), Identifier: "x", Value: &pb.Value{Json: []byte(lagValue(n))}})
		if err == nil && watch {
			t := time.AfterFunc(30*time.Second, end)
			at := <-fresh
			t.Stop()
			if at == 0 {
				err = fmt.Errorf("write %d of session %d was not seen on all its nodes within 30 s", n, session)
			}
			r.mu.Lock()
			r.lags.record(at - done.at.Load())
			r.mu.Unlock()
		}
		end()
		if err != nil {
			return err
		}
		r.mu.Lock()
		r.made++
		r.mu.Unlock()
	}
	return nil
}

// watch reads the tables of the session's nodes until none would serve a value older than
// write n, and returns when that was; 0 when stop ends before.
func (r *lagRun) watch(stop context.Context, session, n int) int64 {
	id := outrigger.Key{Tenant: outrigger.DefaultTenant, Session: lagSession(session), Name: "x"}.String()
	waiting := r.holdersOf(session)
	seen := make([]uint64, r.nodes) // stamps that were looked into
	var again []int                 // nodes that had no copy to serve
	var buf []byte
	for len(waiting) > 0 {
		left := waiting[:0]
		for _, w := range waiting {
			table := r.fleet.nodes[w].Table()
			live := r.clock() < table.Lease()
			e, b := table.Get(id, buf[:0])
			buf = b
			if !live || e.State != shm.Present {
				// No process would be served this copy, it would ask the agent.
				again = append(again, w)
				continue
			}
			if e.Stamp == seen[w] {
				left = append(left, w)
				continue
			}
			seen[w] = e.Stamp
			if v := (&pb.Variable{}); proto.Unmarshal(b, v) != nil || numberOf(v.GetValue().GetJson()) < n {
				left = append(left, w)
			}
		}
		if waiting = left; len(waiting) > 0 && !pause(stop, 50*time.Microsecond) {
			return 0
		}
	}
	at := time.Now().UnixNano()
	for _, w := range again { // as a process would, so that the node holds the variable again
		if _, err := r.fleet.nodes[w].Read(stop, &pb.ReadRequest{Keys: []*pb.Key{{Session: lagSession(session), Name: "x"}}}); err != nil {
			return 0
		}
	}
	r.mu.Lock()
	r.missed += len(again)
	r.mu.Unlock()
	return at
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

// pause waits for d; false when ctx ended before.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// busy is the processor time this process has used.
func busy() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// childBroadcast is the floor: the same messages to as many nodes over bare TCP.
func childBroadcast(ctx context.Context, args []string, _ io.Reader) (any, error) {
	l, err := parseLag(args)
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	acks := make(chan int64, 1<<16) // when a node had read a message
	servers := make([]net.Conn, l.nodes)
	for i := range servers {
		client, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			return nil, err
		}
		defer client.Close()
		if servers[i], err = listener.Accept(); err != nil {
			return nil, err
		}
		defer servers[i].Close()
		go reader(client, acks)
		go io.Copy(io.Discard, servers[i]) // the acknowledgements
	}
	var lags histogram
	message, start := make([]byte, 300), time.Now()
	for n := 0; time.Since(start) < l.slice; n++ {
		if !pause(ctx, time.Until(start.Add(time.Duration(n)*time.Second/time.Duration(l.rate)))) {
			return nil, ctx.Err()
		}
		before := time.Now().UnixNano()
		for _, s := range l.holdersOf(n % lagSessions) {
			if _, err := servers[s].Write(message); err != nil {
				return nil, err
			}
		}
		last := int64(0)
		for range l.holders {
			last = max(last, <-acks)
		}
		lags.record(last - before)
	}
	return map[string]float64{"p50_ms": float64(lags.quantile(0.5)) / 1e6, "p99_ms": float64(lags.quantile(0.99)) / 1e6, "rate": float64(lags.total) / l.slice.Seconds()}, nil
}

// reader is one node of the floor. It ends with its connection.
func reader(c net.Conn, acks chan<- int64) {
	buf := make([]byte, 300)
	for n := uint32(1); ; n++ {
		if _, err := io.ReadFull(c, buf); err != nil {
			return
		}
		acks <- time.Now().UnixNano()
		if _, err := c.Write(binary.LittleEndian.AppendUint32(nil, n)); err != nil {
			return
		}
	}
}
