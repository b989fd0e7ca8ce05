package shm

import (
	"fmt"
	"math"
	"math/rand/v2"
	"sort"
	"testing"

	"github.com/hashicorp/golang-lru/arc/v2"
	lru "github.com/hashicorp/golang-lru/v2"
)

const ratioKeys, ratioRequests = 20_000, 200_000

// ranks draws ranks 0 to ratioKeys-1 with weight 1/(rank+1)^s.
func ranks(s float64) func(rnd *rand.Rand) int {
	cumulative, sum := make([]float64, ratioKeys), 0.0
	for i := range cumulative {
		sum += math.Pow(float64(i+1), -s)
		cumulative[i] = sum
	}
	return func(rnd *rand.Rand) int { return min(sort.SearchFloat64s(cumulative, rnd.Float64()*sum), ratioKeys-1) }
}

// asker answers whether a key was there, and puts it there if not.
type asker func(key string) bool

// reporting is how hits become touches: one in 2^skip, so many requests together.
type reporting struct {
	skip  uint32
	every int // 0 = never
}

// table replays on a table with room for so many keys, by its index or by its arena. The
// reader is another process in production, so hits go through Samples.
func table(t *testing.T, o Options, rep reporting) asker {
	w := mustCreate(t, o)
	r, value, buf := w.Reader(), make([]byte, 200), []byte(nil)
	var s Samples
	s.skip.Store(rep.skip)
	var hits, asked uint64
	var taken []uint64
	return func(key string) bool {
		e, b := r.Get(key, buf[:0])
		buf = b
		if asked++; rep.every > 0 && asked%uint64(rep.every) == 0 {
			hashes, weight := s.Take(taken[:0])
			w.TouchAll(hashes, weight)
			taken = hashes
			s.skip.Store(rep.skip)
		}
		if e.State == Present {
			if hits++; s.Wants(hits) {
				s.Add(Hash(key))
			}
			return true
		}
		mustPut(t, w, key, Present, string(value))
		return false
	}
}

func replay(keys []string, ask asker) float64 {
	hits := 0
	for i, k := range keys {
		if ask(k) && i >= len(keys)/5 {
			hits++
		}
	}
	return 100 * float64(hits) / float64(len(keys)-len(keys)/5)
}

// With hits reported the way sidecars do, a table keeps what is asked for: as well as the
// best peer when all are reported, and not much worse when few are.
func TestHitRatio(t *testing.T) {
	if raceEnabled {
		t.Skip("a sequential simulation: nothing to race, and slow under the detector")
	}
	z99, z80 := ranks(0.99), ranks(0.8)
	for _, l := range []struct {
		name string
		key  func(rnd *rand.Rand, i int) int
	}{
		{"zipf 0.99", func(rnd *rand.Rand, _ int) int { return z99(rnd) }},
		{"zipf 0.8", func(rnd *rand.Rand, _ int) int { return z80(rnd) }},
		{"scans", func(rnd *rand.Rand, i int) int {
			if i%4 == 0 {
				return i / 4 % ratioKeys
			}
			return z99(rnd)
		}},
		{"shift", func(rnd *rand.Rand, i int) int {
			if i > ratioRequests/2 {
				return (z99(rnd) + ratioKeys/2) % ratioKeys
			}
			return z99(rnd)
		}},
	} {
		rnd := rand.New(rand.NewPCG(5, 6))
		keys := make([]string, ratioRequests)
		for i := range keys {
			keys[i] = fmt.Sprintf("default/session/name-%06d", l.key(rnd, i))
		}
		for _, percent := range []int{2, 5, 10} {
			room := ratioKeys * percent / 100
			recent, _ := lru.New[string, struct{}](room)
			twice, _ := lru.New2Q[string, struct{}](room)
			adaptive, _ := arc.NewARC[string, struct{}](room)
			lruRatio := replay(keys, func(k string) bool {
				_, ok := recent.Get(k)
				recent.Add(k, struct{}{})
				return ok
			})
			best := max(replay(keys, filled(twice)), replay(keys, filled(adaptive)))
			// A record has 31 words. In the first table the index is what is full, in the other
			// the arena.
			byIndex := Options{Heap: true, Bytes: int64(room) * 8 * 31 * 2, Slots: room * 5 / 4}
			byArena := Options{Heap: true, Bytes: int64(room) * 8 * 31 * 8 / 7, Slots: room * 4}
			for _, c := range []struct {
				name         string
				o            Options
				rep          reporting
				below, above float64
			}{
				{"all hits reported", byIndex, reporting{0, room / 4}, 0.5, 4},
				{"one in four", byArena, reporting{2, room / 4}, 1.5, 3},
				{"one in 16, late", byIndex, reporting{4, room}, 3, 2},
				{"none", byIndex, reporting{}, 5.5, 1},
			} {
				got := replay(keys, table(t, c.o, c.rep))
				t.Logf("%-9s room for %2d %%, %-17s: %.1f, LRU %.1f, best of 2Q and ARC %.1f", l.name, percent, c.name, got, lruRatio, best)
				if got < best-c.below || got < lruRatio+c.above {
					t.Errorf("%s, room for %d %%, %s: %.1f is more than %v below %.1f or not %v above LRU's %.1f", l.name, percent, c.name, got, c.below, best, c.above, lruRatio)
				}
			}
		}
	}
}

func filled(c interface {
	Get(string) (struct{}, bool)
	Add(string, struct{})
}) asker {
	return func(k string) bool {
		_, ok := c.Get(k)
		if !ok {
			c.Add(k, struct{}{})
		}
		return ok
	}
}

// A table with room keeps no counts. One without keeps no more than it says.
func TestPolicyMemory(t *testing.T) {
	w := mustCreate(t, Options{Heap: true, Bytes: 1 << 20, Slots: 1280})
	for i := range 1020 {
		mustPut(t, w, fmt.Sprint("key-", i), Present, "v")
	}
	if p := &w.policy; p.judging || len(p.queue) > 0 {
		t.Error("a table with room counts")
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 20_000 {
		key := fmt.Sprint("key-", rnd.IntN(3000))
		switch rnd.IntN(4) {
		case 0:
			w.Remove(key)
		case 1:
			w.Touch(Hash(key))
		default:
			mustPut(t, w, key, Present, "v")
		}
		p, count := &w.policy, 0
		for _, n := range p.queue {
			if w.is(n) {
				count++
			}
		}
		if count < p.newcomers || p.newcomers > max(1, int(0.8*float64(w.live)))+1 || len(p.queue) > 2*p.newcomers+handKeys {
			t.Fatalf("%d newcomers of %d keys, %d of %d in the queue are", p.newcomers, w.live, count, len(p.queue))
		}
		if n := p.sketch.Bytes() + p.steer.Bytes(); n > 32*1024 {
			t.Fatalf("%d bytes for 1024 keys", n)
		}
	}
	if w.Evictions() == 0 {
		t.Fatal("no pressure")
	}
}

// All hits are taken while they are few, a part of them when they are many, and that part
// is evenly spread whatever round the program makes.
func TestSamples(t *testing.T) {
	var s Samples
	hit := uint64(0)
	second := func(hits, round int) (taken []uint64, weight int, by []int) {
		by = make([]int, round)
		for range hits {
			if hit++; s.Wants(hit) {
				s.Add(hit%uint64(round) + 1)
			}
		}
		taken, weight = s.Take(nil)
		for _, h := range taken {
			by[h-1]++
		}
		return taken, weight, by
	}
	if taken, weight, _ := second(1000, 10); len(taken) != 1000 || weight != 1 {
		t.Errorf("%d of 1,000 hits are taken, each for %d", len(taken), weight)
	}
	if taken, weight, _ := second(0, 1); len(taken) != 0 || weight != 1 {
		t.Errorf("%d of no hits are taken, each for %d", len(taken), weight)
	}
	for range 5 {
		second(100_000, 8)
	}
	taken, weight, by := second(100_000, 8)
	if n := len(taken); n < MaxSamples/4 || n > MaxSamples || weight != 16 {
		t.Errorf("%d of 100,000 hits are taken, each for %d", n, weight)
	}
	for k, n := range by {
		if n < len(taken)/16 || n > len(taken)/4 {
			t.Errorf("key %d of a round through 8 is taken %d times of %d", k, n, len(taken))
		}
	}
	for range 40 {
		second(100, 10)
	}
	if taken, weight, _ := second(100, 10); len(taken) != 100 || weight != 1 {
		t.Errorf("later %d of 100 hits are taken, each for %d", len(taken), weight)
	}
	key := "default/session/name"
	if n := testing.AllocsPerRun(2*MaxSamples, func() { s.Add(Hash(key)) }); n != 0 {
		t.Errorf("Add allocates %v times", n)
	}
}
