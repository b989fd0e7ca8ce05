package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/coarse"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

const (
	cacheKeys  = 1024 // a power of two: pick shifts
	valueBytes = 200
)

func cacheRows() []row {
	return []row{
		{id: "cache.process_read", unit: "ns/op", better: "lower", run: runProcessRead,
			what: fmt.Sprintf("a sidecar's hit in its process tier (cache.Store.Hit), with the proof that the value is current: lease, clock and stamp of the node's table; %d keys, %d-byte values, wall time per read", cacheKeys, valueBytes)},
		{id: "cache.shm_read", unit: "ns", better: "lower", run: runShmRead,
			what: fmt.Sprintf("p50 of one %d-byte value read from another process, one reading goroutine, each read timed on its own with the clock's cost included, %d keys, not pinned", valueBytes, cacheKeys)},
		hitRatioRow(),
	}
}

func runProcessRead(ctx context.Context, e *env, r row) ([]result, error) {
	slice := e.slice(10*e.rounds, 400*time.Millisecond).String()
	path, missing := e.peer(ctx, "cacheread")
	cs := []contender{{name: us, sample: func(ctx context.Context) (map[string]float64, error) {
		return e.values(ctx, e.ours("cacheread", "-slice", slice)...)
	}}}
	for _, p := range []struct{ name, flag string }{{"golang-lru LRU", "lru"}, {"golang-lru 2Q", "2q"}, {"otter v2", "otter"}} {
		cs = append(cs, contender{name: p.name, missing: missing, sample: func(ctx context.Context) (map[string]float64, error) {
			return e.values(ctx, path, "-cache", p.flag, "-slice", slice)
		}})
	}
	c, err := e.compare(ctx, r.id, e.rounds, cs)
	if err != nil {
		return nil, err
	}
	if err := e.keep(r.id, c); err != nil {
		return nil, err
	}
	var out []result
	for _, g := range []int{1, 2} {
		rows, err := c.rows(r, fmt.Sprintf("ns%d", g), peerNames(cs), func(string) string {
			return fmt.Sprintf("%s, %d goroutine(s), not pinned; peers prove nothing", r.what, g)
		})
		if err != nil {
			return nil, err
		}
		out = append(out, rows...)
	}
	return out, nil
}

// benchKeys are the keys of every cache under test, in the form of outrigger.Key.
func benchKeys() []string {
	keys := make([]string, cacheKeys)
	for i := range keys {
		keys[i] = fmt.Sprintf("default/session/name-%04d", i)
	}
	return keys
}

// childCacheRead measures Store.Hit, what a sidecar does first for every read. The table
// it proves its copies by is filled here instead of by an agent, with a lease that
// outlives the run; the loop is the one of bench/peers/cacheread.
func childCacheRead(ctx context.Context, args []string, _ io.Reader) (any, error) {
	f := flag.NewFlagSet("cacheread", flag.ContinueOnError)
	slice := f.Duration("slice", 400*time.Millisecond, "how long to measure each number of goroutines")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	store, end, err := benchStore(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	keys := benchKeys()
	loop := func(i uint32, until time.Time) int {
		return spin(until, func() (hits int) {
			for range spinBatch {
				i++
				if h, ok := store.Hit(keys[pick(i)], 0); ok && len(h.Encoded) == valueBytes {
					hits++
				}
			}
			return hits
		})
	}
	measureLoop(1, *slice/4, loop) // warm up
	return map[string]float64{"ns1": measureLoop(1, *slice, loop), "ns2": measureLoop(2, *slice, loop)}, nil
}

// benchStore is a sidecar's cache in front of a table with every key, each of which it
// has read once.
func benchStore(ctx context.Context) (store *cache.Store, end func(), err error) {
	clock := node.Clock()
	w, table, err := benchTable(func(k outrigger.Key) ([]byte, error) {
		return proto.Marshal(&pb.Variable{Key: wire.KeyPB(k), Value: &pb.Value{Type: "string", Json: benchValue()}})
	})
	if err != nil {
		return nil, nil, err
	}
	nobody, err := grpc.NewClient("passthrough:///nobody", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	store, err = cache.New(cache.Options{Table: func() *shm.Reader { return table }, Agent: nobody, Lease: time.Hour, Clock: clock, Coarse: coarse.New(clock),
		Encoders: []cache.Encoder{func(v *pb.Variable) []byte { return v.Value.Json }}})
	if err != nil {
		return nil, nil, err
	}
	w.SetLease(clock() + int64(time.Hour)) // a store trusts only what was proved after it began
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- store.Run(ctx) }()
	end = func() {
		cancel()
		<-ended // it was cancelled; nothing else can be wrong with a store nobody writes to
		nobody.Close()
		w.Close()
	}
	for _, k := range benchKeys() {
		key, err := outrigger.ParseKey(k)
		if err == nil {
			_, err = store.Get(ctx, cache.Request{Key: key})
		}
		if err != nil {
			end()
			return nil, nil, err
		}
	}
	return store, end, nil
}

const spinBatch = 512 // reads between two looks at the clock

// pick spreads consecutive numbers over the keys without a division.
func pick(i uint32) uint32 { return i * 2654435761 >> 22 }

// spin runs batches until the time is over and returns the number of reads.
func spin(until time.Time, one func() (hits int)) int {
	n := 0
	for time.Now().Before(until) {
		if one() != spinBatch {
			panic("a read missed; every key was put and there is room for all")
		}
		n += spinBatch
	}
	return n
}

// measureLoop returns wall nanoseconds per read with g goroutines.
func measureLoop(g int, slice time.Duration, loop func(uint32, time.Time) int) float64 {
	counts := make([]int, g)
	var wg sync.WaitGroup
	start := time.Now()
	for i := range g {
		wg.Go(func() { counts[i] = loop(uint32(i)*511, start.Add(slice)) })
	}
	wg.Wait()
	wall := time.Since(start)
	total := 0
	for _, n := range counts {
		total += n
	}
	return float64(wall) / float64(total)
}

// benchTable is a node's table with every key, and a reader of it through a descriptor,
// as a sidecar has it.
func benchTable(render func(outrigger.Key) ([]byte, error)) (*shm.Writer, *shm.Reader, error) {
	w, err := shm.Create(shm.Options{Bytes: 4 << 20})
	if err != nil {
		return nil, nil, err
	}
	for _, k := range benchKeys() {
		key, err := outrigger.ParseKey(k)
		if err != nil {
			return nil, nil, err
		}
		value, err := render(key)
		if err != nil {
			return nil, nil, err
		}
		if _, _, err := w.Put(k, shm.Present, value); err != nil {
			return nil, nil, err
		}
	}
	f, err := w.Descriptor()
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	r, err := shm.Open(f)
	return w, r, err
}

// benchValue is valueBytes of JSON.
func benchValue() []byte { return []byte(`"` + strings.Repeat("v", valueBytes-2) + `"`) }

func runShmRead(ctx context.Context, e *env, r row) ([]result, error) {
	slice := e.slice(3*e.rounds, time.Second)
	w, _, err := benchTable(func(outrigger.Key) ([]byte, error) { return benchValue(), nil })
	if err != nil {
		return nil, err
	}
	defer w.Close()
	cs := []contender{{name: us, sample: func(ctx context.Context) (map[string]float64, error) {
		f, err := w.Descriptor()
		if err != nil {
			return nil, err
		}
		defer f.Close()
		out := map[string]float64{}
		return out, e.measureIn(ctx, child{argv: e.ours("shmread", "-slice", slice.String()), files: []*os.File{f}}, &out)
	}}}
	for _, p := range []struct {
		name, program string
		args          func(socket string) []string
	}{
		{"redis over a Unix socket", "redis-server", func(s string) []string {
			return []string{"--port", "0", "--unixsocket", s, "--save", "", "--appendonly", "no", "--daemonize", "no"}
		}},
		{"memcached over a Unix socket", "memcached", func(s string) []string { return []string{"-s", s, "-t", "1", "-u", "root"} }},
	} {
		c, stop := e.socketPeer(ctx, p.name, p.program, p.args, slice)
		defer stop()
		cs = append(cs, c)
	}
	c, err := e.compare(ctx, r.id, e.rounds, cs)
	if err != nil {
		return nil, err
	}
	if err := e.keep(r.id, c); err != nil {
		return nil, err
	}
	return c.rows(r, "p50_ns", peerNames(cs), func(string) string {
		s, _ := summarise(c.Rounds, us, "", "p99_ns")
		return fmt.Sprintf("%s; our p99 is %.0f ns", r.what, s.Ours)
	})
}

// peerSocket is where this runner's server of a program listens; paths of sockets are short.
func peerSocket(program string) string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("outrigger-bench-%d-%s.sock", os.Getpid(), program))
}

// socketPeer starts a cache server on a Unix socket.
func (e *env) socketPeer(ctx context.Context, name, program string, args func(string) []string, slice time.Duration) (contender, func()) {
	c, nothing := contender{name: name}, func() {}
	bin, err := tool(program)
	if err != nil {
		c.missing = err
		return c, nothing
	}
	socket := peerSocket(program)
	s, err := e.start(ctx, program, "", false, append([]string{bin}, args(socket)...)...)
	if err != nil {
		c.missing = err
		return c, nothing
	}
	stop := func() {
		s.stop()
		_ = os.Remove(socket) // the server may have removed it itself
	}
	c.missing = s.until(ctx, accepts("unix", socket))
	c.sample = func(ctx context.Context) (map[string]float64, error) {
		return e.values(ctx, e.ours("udsread", "-server", program, "-socket", socket, "-slice", slice.String())...)
	}
	return c, stop
}

// childShmRead reads the table its parent passed as descriptor 3.
func childShmRead(_ context.Context, args []string, _ io.Reader) (any, error) {
	f := flag.NewFlagSet("shmread", flag.ContinueOnError)
	slice := f.Duration("slice", time.Second, "how long to measure")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	table, err := shm.Open(os.NewFile(3, "table"))
	if err != nil {
		return nil, err
	}
	keys, buf := benchKeys(), make([]byte, 0, valueBytes)
	return timedReads(*slice, func(i uint32) error {
		e, v := table.Get(keys[pick(i)], buf)
		if e.State != shm.Present || len(v) != valueBytes {
			return fmt.Errorf("%s is %v with %d bytes", keys[pick(i)], e.State, len(v))
		}
		return nil
	})
}

// timedReads times every read on its own, after a tenth of the time to warm up.
func timedReads(slice time.Duration, read func(i uint32) error) (map[string]float64, error) {
	start := time.Now()
	var h histogram
	for i := uint32(0); ; i++ {
		before := time.Now()
		if err := read(i); err != nil {
			return nil, err
		}
		after := time.Now()
		if since := after.Sub(start); since > slice {
			break
		} else if since > slice/10 {
			h.record(int64(after.Sub(before)))
		}
	}
	return map[string]float64{"p50_ns": float64(h.quantile(0.5)), "p99_ns": float64(h.quantile(0.99))}, nil
}
