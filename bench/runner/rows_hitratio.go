package main

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"github.com/outrigger-mesh/outrigger/bench/trace"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/cache/tier"
)

const (
	ratioKeys     = 100_000
	ratioRequests = 1_000_000
	ratioSeed     = 5
)

// keySequence is a sequence of keys that caches are replayed on.
type keySequence struct {
	name     string
	keys     int
	percents []int // capacities, in per cent of the keys; nil = 1, 5 and 10
	make     func(rnd *rand.Rand) ([]uint32, error)
}

func hitRatioRow() row {
	return row{id: "cache.hit_ratio", unit: "% hits", better: "higher", run: runHitRatio,
		what: "requests the process tier's policy (cache/tier: recent and frequent entries, admission by frequency, an adaptive share of recent ones) answers, in a sequential replay of the same keys for all; the first fifth warms up; the aim is within two points of the best peer"}
}

func madeSequences() []keySequence {
	synthetic := fmt.Sprintf("%d requests for %d keys", ratioRequests, ratioKeys)
	return []keySequence{
		{"zipf 0.99, " + synthetic, ratioKeys, nil, func(rnd *rand.Rand) ([]uint32, error) { return draws(rnd, 0.99, nil), nil }},
		{"zipf 0.8, " + synthetic, ratioKeys, nil, func(rnd *rand.Rand) ([]uint32, error) { return draws(rnd, 0.8, nil), nil }},
		{"zipf 0.99 with a sequential scan in every fourth request, " + synthetic, ratioKeys, nil, func(rnd *rand.Rand) ([]uint32, error) {
			return draws(rnd, 0.99, func(i int, k uint32) uint32 {
				if i%4 == 0 {
					return uint32(i / 4 % ratioKeys)
				}
				return k
			}), nil
		}},
		{"zipf 0.99 whose popular keys change half-way, " + synthetic, ratioKeys, nil, func(rnd *rand.Rand) ([]uint32, error) {
			return draws(rnd, 0.99, func(i int, k uint32) uint32 {
				if i > ratioRequests/2 {
					return (k + ratioKeys/2) % ratioKeys
				}
				return k
			}), nil
		}},
		{fmt.Sprintf("recorded request trace (bench/trace), its %d users as keys, who come round in turn: nobody is more popular and recency misleads", trace.Users), trace.Users, nil, traceUsers},
	}
}

// draws is a sequence of ranks 0 to ratioKeys-1 with weight 1/(rank+1)^s, each passed
// through change.
func draws(rnd *rand.Rand, s float64, change func(i int, k uint32) uint32) []uint32 {
	cumulative, sum := make([]float64, ratioKeys), 0.0
	for i := range cumulative {
		sum += math.Pow(float64(i+1), -s)
		cumulative[i] = sum
	}
	out := make([]uint32, ratioRequests)
	for i := range out {
		out[i] = uint32(min(sort.SearchFloat64s(cumulative, rnd.Float64()*sum), ratioKeys-1))
		if change != nil {
			out[i] = change(i, out[i])
		}
	}
	return out
}

func traceUsers(*rand.Rand) ([]uint32, error) {
	requests, err := trace.Load()
	if err != nil {
		return nil, err
	}
	out := make([]uint32, len(requests))
	for i, r := range requests {
		n, err := strconv.Atoi(strings.TrimPrefix(r.User(), "user-"))
		if err != nil {
			return nil, err
		}
		out[i] = uint32(n)
	}
	return out, nil
}

// runHitRatio replays each workload at three capacities, recorded traces too when there are
// any. There is no noise in it: the
// same sequence gives the same figure, so it is done once.
func runHitRatio(ctx context.Context, e *env, r row) ([]result, error) {
	path, missing := e.peer(ctx, "hitratio")
	dir, err := e.dir("hitratio")
	if err != nil {
		return nil, err
	}
	sequences, which := madeSequences(), "; of the repository's own sequences, without recorded traces (-traces)"
	if e.traces != "" {
		recorded, err := recordedTraces(e.traces)
		if err != nil {
			return nil, err
		}
		sequences, which = append(sequences, recorded...), ""
	}
	kept := map[string]comparison{}
	var out []result
	for n, w := range sequences {
		keys, err := w.make(rand.New(rand.NewPCG(ratioSeed, uint64(n))))
		if err != nil {
			return nil, err
		}
		file := filepath.Join(dir, strconv.Itoa(n))
		if err := os.WriteFile(file, encodeKeys(keys), 0o600); err != nil {
			return nil, err
		}
		percents := w.percents
		if percents == nil {
			percents = []int{1, 5, 10}
		}
		for _, percent := range percents {
			capacity, warm := max(16, w.keys*percent/100), len(keys)/5
			args := []string{"-sequence", file, "-capacity", strconv.Itoa(capacity), "-warm", strconv.Itoa(warm)}
			cs := []contender{{name: us, sample: func(ctx context.Context) (map[string]float64, error) {
				return e.values(ctx, e.ours("hitratio", args...)...)
			}}}
			for _, p := range nodeTierReports {
				cs = append(cs, contender{name: p.name(), sample: func(ctx context.Context) (map[string]float64, error) {
					return e.values(ctx, e.ours("hitratio", append([]string{"-reported", strconv.Itoa(p.oneIn)}, args...)...)...)
				}})
			}
			for _, p := range []struct{ name, flag string }{{"golang-lru LRU", "lru"}, {"golang-lru 2Q", "2q"}, {"golang-lru ARC", "arc"}, {"otter v2", "otter"}} {
				cs = append(cs, contender{name: p.name, missing: missing, sample: func(ctx context.Context) (map[string]float64, error) {
					return e.values(ctx, append([]string{path, "-cache", p.flag}, args...)...)
				}})
			}
			what := fmt.Sprintf("%s, room for %d %% of the keys", w.name, percent)
			c, err := e.compare(ctx, r.id+" "+what, 1, cs)
			if err != nil {
				return nil, err
			}
			kept[what] = c
			text := fmt.Sprintf("%s; knowing the future (Belady) gives %.1f %%; node tier: %s", what, optimal(keys, capacity, warm), nodeTierReporting)
			rows, err := c.rows(r, "percent", peerNames(cs), func(string) string { return r.what + which + "; " + text })
			if err != nil {
				return nil, err
			}
			out = append(out, rows...)
		}
	}
	return out, e.keep(r.id, kept)
}

func encodeKeys(keys []uint32) []byte {
	raw := make([]byte, 0, 4*len(keys))
	for _, k := range keys {
		raw = binary.LittleEndian.AppendUint32(raw, k)
	}
	return raw
}

// childHitRatio is bench/peers/hitratio for the process tier, or the node tier.
func childHitRatio(_ context.Context, args []string, _ io.Reader) (any, error) {
	f := flag.NewFlagSet("hitratio", flag.ContinueOnError)
	reported := f.Int("reported", -1, "replay on the node tier, with one in so many hits reported to it (a power of two; 0 = none)")
	sequence := f.String("sequence", "", "file of key numbers")
	capacity := f.Int("capacity", 1000, "entries the cache may hold")
	warm := f.Int("warm", 0, "requests that are not counted")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(*sequence)
	if err != nil {
		return nil, err
	}
	ask, err := processTier(*capacity)
	if *reported >= 0 {
		ask, err = nodeTier(max(*capacity, minNodeTier), *reported)
	}
	if err != nil {
		return nil, err
	}
	hits, counted := 0, 0
	for i := 0; 4*i < len(raw); i++ {
		k := "default/session/name-" + strconv.Itoa(int(binary.LittleEndian.Uint32(raw[4*i:])))
		hit, err := ask(k)
		if err != nil {
			return nil, err
		}
		if i >= *warm {
			counted++
			if hit {
				hits++
			}
		}
	}
	if counted == 0 {
		return nil, fmt.Errorf("%d requests, all of them warm-up", len(raw)/4)
	}
	return map[string]float64{"percent": 100 * float64(hits) / float64(counted)}, nil
}

// asker answers whether a key is stored, and stores it if not.
type asker func(key string) (hit bool, err error)

func processTier(capacity int) (asker, error) {
	c, err := tier.New(tier.Options[struct{}]{Bytes: 1 << 32, Entries: capacity})
	return func(k string) (bool, error) {
		hit := c.Get(k) != nil
		if !hit {
			c.Put(k, &struct{}{})
		}
		return hit, nil
	}, err
}

// nodeTierReport is a setting of the node tier's replay.
type nodeTierReport struct{ oneIn int }

func (r nodeTierReport) name() string {
	switch r.oneIn {
	case 0:
		return "our node tier, no hits reported"
	case 1:
		return "our node tier, all hits reported"
	}
	return fmt.Sprintf("our node tier, one in %d hits reported", r.oneIn)
}

// nodeTierReports: a process reports all hits up to shm.MaxSamples a second, one in 16 of
// them from some 30,000 a second on.
var nodeTierReports = []nodeTierReport{{1}, {16}, {0}}

const (
	nodeTierReporting = "a shared table (cache/shm) of as many keys, at least 208, whose reader reports hits as sidecars do, in one report for every capacity/4 requests"
	minNodeTier       = 208 // keys of the smallest index
)

// nodeTier replays on a table of that many keys; its arena, with values of 16 bytes, has
// room for twice as many.
func nodeTier(capacity, oneIn int) (asker, error) {
	w, err := shm.Create(shm.Options{Heap: true, Bytes: max(4096, int64(capacity)*160), Slots: (capacity + 3) / 4 * 5})
	if err != nil {
		return nil, err
	}
	r, s := w.Reader(), samples{oneIn: uint64(oneIn)}
	var value [16]byte
	asked, buf := 0, make([]byte, 0, len(value))
	return func(k string) (bool, error) {
		if asked++; asked%max(1, capacity/4) == 0 {
			w.TouchAll(s.take(), oneIn)
		}
		if e, _ := r.Get(k, buf); e.State == shm.Present {
			s.hit(k)
			return true, nil
		}
		_, _, err := w.Put(k, shm.Present, value[:])
		return false, err
	}, nil
}

// samples takes one in so many hits the way shm.Samples does, which chooses how many by
// how many there are in a second; a replay has no seconds.
type samples struct {
	oneIn, hits uint64
	hashes      []uint64
}

func (s *samples) hit(key string) {
	s.hits++
	if s.oneIn > 0 && s.hits*0x9e3779b97f4a7c15 <= math.MaxUint64/s.oneIn {
		s.hashes = append(s.hashes, shm.Hash(key))
	}
}

func (s *samples) take() []uint64 {
	out := s.hashes[max(0, len(s.hashes)-shm.MaxSamples):]
	s.hashes = nil
	return out
}
