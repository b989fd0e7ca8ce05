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

	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/cache/tier"
)

const (
	cacheKeys  = 1024 // a power of two: pick shifts
	valueBytes = 200
)

func cacheRows() []row {
	return []row{
		{id: "cache.process_read", unit: "ns/op", better: "lower", run: runProcessRead,
			what: fmt.Sprintf("hit in the process tier, proof by the node's table that the value is current included; %d keys, %d-byte values, wall time per read", cacheKeys, valueBytes)},
		{id: "cache.shm_read", unit: "ns", better: "lower", run: runShmRead,
			what: fmt.Sprintf("p50 of one %d-byte value read from another process, one reading goroutine, each read timed on its own with the clock's cost included, %d keys, not pinned", valueBytes, cacheKeys)},
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

// benchKeys are the keys of every cache under test.
func benchKeys() []string {
	keys := make([]string, cacheKeys)
	for i := range keys {
		keys[i] = fmt.Sprintf("default/session/name-%04d", i)
	}
	return keys
}

// proven is what the process tier holds: ready bytes and where the node's table proves
// them current.
type proven struct {
	bytes []byte
	slot  uint32
	stamp uint64
}

// childCacheRead measures the process tier. The loop is the one of bench/peers/cacheread.
func childCacheRead(_ context.Context, args []string, _ io.Reader) (any, error) {
	f := flag.NewFlagSet("cacheread", flag.ContinueOnError)
	slice := f.Duration("slice", 400*time.Millisecond, "how long to measure each number of goroutines")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	w, table, err := benchTable()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	c, err := tier.New(tier.Options[proven]{Entries: 4 * cacheKeys, Size: func(p proven) int { return len(p.bytes) }})
	if err != nil {
		return nil, err
	}
	keys := benchKeys()
	for _, k := range keys {
		e, value := table.Get(k, nil)
		if e.State != shm.Present || !c.Put(k, proven{value, e.Slot, e.Stamp}) {
			return nil, fmt.Errorf("%s is %v in the table or does not fit the cache", k, e.State)
		}
	}
	loop := func(i uint32, until time.Time) int {
		return spin(until, func() (hits int) {
			for range spinBatch {
				i++
				if v, ok := c.Get(keys[pick(i)]); ok && table.Stamp(v.slot) == v.stamp && len(v.bytes) == valueBytes {
					hits++
				}
			}
			return hits
		})
	}
	measureLoop(1, *slice/4, loop) // warm up
	return map[string]float64{"ns1": measureLoop(1, *slice, loop), "ns2": measureLoop(2, *slice, loop)}, nil
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
func benchTable() (*shm.Writer, *shm.Reader, error) {
	w, err := shm.Create(shm.Options{Bytes: 4 << 20})
	if err != nil {
		return nil, nil, err
	}
	for _, k := range benchKeys() {
		if _, _, err := w.Put(k, shm.Present, []byte(strings.Repeat("v", valueBytes))); err != nil {
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

func runShmRead(ctx context.Context, e *env, r row) ([]result, error) {
	slice := e.slice(3*e.rounds, time.Second)
	w, _, err := benchTable()
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

// socketPeer starts a cache server on a Unix socket.
func (e *env) socketPeer(ctx context.Context, name, program string, args func(string) []string, slice time.Duration) (contender, func()) {
	c, nothing := contender{name: name}, func() {}
	bin, err := tool(program)
	if err != nil {
		c.missing = err
		return c, nothing
	}
	socket := filepath.Join(os.TempDir(), fmt.Sprintf("outrigger-bench-%d-%s.sock", os.Getpid(), program)) // paths of sockets are short
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
