package tier

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/cache/internal/admission"
)

func mustNew[V any](t testing.TB, o Options[V]) *Cache[V] {
	t.Helper()
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestOptions(t *testing.T) {
	for _, o := range []Options[int]{
		{Bytes: -1}, {Shards: 3}, {Shards: -1}, {Shards: 512}, {Entries: -5}, {Entries: 3, Shards: 4},
	} {
		if _, err := New(o); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%+v: got %v, want kind invalid", o, err)
		}
	}
	for _, c := range []struct {
		o      Options[int]
		shards int
	}{
		{Options[int]{}, 16}, {Options[int]{Bytes: 4 << 20}, 4}, {Options[int]{Bytes: 1}, 1},
		{Options[int]{Entries: 100}, 1}, {Options[int]{Shards: 1}, 1}, {Options[int]{Shards: 256}, 256},
	} {
		if got := mustNew(t, c.o); len(got.shards) != c.shards {
			t.Errorf("%+v: %d shards, want %d", c.o, len(got.shards), c.shards)
		}
	}
}

// A walk through one shard of 8 entries, of which the least share is one recent.
func TestTwoQueues(t *testing.T) {
	c := mustNew(t, Options[string]{Entries: 8, Shards: 1})
	// Estimates may be too high by collisions, which in so small a sketch are likely. With
	// these seeds there are none.
	c.hasher = hasher{0x9e3779b97f4a7c15, 0xd1b54a32d192ed03}
	put := func(keys ...string) {
		for _, k := range keys {
			c.Put(k, &k)
		}
	}
	want := func(when string, keys ...string) {
		t.Helper()
		s := &c.shards[0]
		var got []string
		for _, l := range []list[string]{s.recent, s.frequent} {
			for _, n := range l.Keys() {
				got = append(got, n.key)
			}
			got = append(got, "|")
		}
		if fmt.Sprint(got) != fmt.Sprint(keys) {
			t.Errorf("%s: recent|frequent| is %v, want %v", when, got, keys)
		}
	}
	put("a", "b", "c", "d", "e", "f", "g", "h")
	want("filled", "h", "|", "a", "b", "c", "d", "e", "f", "g", "|")
	put("i", "j") // asked for as often as a, which stays
	want("newcomers are refused", "j", "|", "a", "b", "c", "d", "e", "f", "g", "|")
	c.Get("a")
	put("i") // asked for twice by now, which is one more than b; j leaves
	want("one more is not enough", "i", "|", "b", "c", "d", "e", "f", "g", "a", "|")
	put("k", "l", "x", "y", "i") // i comes back, but not soon
	put("m")                     // now i takes the place of b
	want("asked for more often", "m", "|", "c", "d", "e", "f", "g", "a", "i", "|")
	c.Get("m")
	put("n") // m was used: frequent unasked, and c leaves for n
	want("used while recent", "n", "|", "d", "e", "f", "g", "a", "i", "m", "|")
	put("o", "p", "q", "r") // a scan passes through recent only
	want("scan", "r", "|", "d", "e", "f", "g", "a", "i", "m", "|")
}

// Of a loop over more than there is room for, a part is held, and a newcomer that is asked
// for again and again gets in.
func TestLoop(t *testing.T) {
	const room, keys, rounds = 1000, 1500, 20
	c := mustNew(t, Options[int]{Entries: room, Shards: 1})
	names := make([]string, keys)
	for i := range names {
		names[i] = fmt.Sprint("key-", i)
	}
	hits := 0
	ask := func(key string) bool {
		hit := c.Get(key) != nil
		if !hit {
			c.Put(key, new(int))
		}
		return hit
	}
	for range rounds {
		for _, k := range names {
			if ask(k) {
				hits++
			}
		}
	}
	if share := float64(hits) / rounds / keys; share < 0.4 { // the optimum is near room/keys
		t.Errorf("%.0f %% of a loop over %d keys with room for %d were hits", 100*share, keys, room)
	}
	newcomer := 0
	for range 20 {
		if ask("newcomer") {
			newcomer++
		}
		for _, k := range names[:room/4] {
			ask(k)
		}
	}
	if newcomer < 10 {
		t.Errorf("a key asked for 20 times was there %d times", newcomer)
	}
}

// A frequent entry passes as many times as it was used, up to twice, before it is the one
// that newcomers are compared with.
func TestUsesAreRounds(t *testing.T) {
	for _, c := range []struct{ uses, passes int }{{0, 0}, {1, 1}, {2, 2}, {10, 2}} {
		cache := mustNew(t, Options[int]{Entries: 20, Shards: 1})
		for i := range 20 {
			cache.Put(fmt.Sprint(i), new(int))
		}
		for range c.uses {
			cache.Get("0")
		}
		s := &cache.shards[0]
		s.mu.Lock()
		first, _, _ := s.frequent.GetOldest()
		passes := 0
		for s.victim() != first {
			// All who are questioned before it take a place behind it.
			for n := s.victim(); n != first; n = s.victim() {
				s.frequent.Add(n, struct{}{})
				if got, _, _ := s.frequent.GetOldest(); got == first {
					break
				}
			}
			passes++
		}
		s.mu.Unlock()
		if first.key != "0" || passes != c.passes {
			t.Errorf("after %d uses %s passed %d times, want %d", c.uses, first.key, passes, c.passes)
		}
	}
}

// Offer takes free room only, and nobody's place.
func TestOffer(t *testing.T) {
	c := mustNew(t, Options[string]{Entries: 4, Shards: 1})
	old, other := "old", "other"
	c.Put("a", &old)
	for _, o := range []struct {
		key string
		ok  bool
	}{{"a", false}, {"b", true}, {"c", true}, {"d", true}, {"e", false}} {
		if got := c.Offer(o.key, &other); got != o.ok {
			t.Errorf("offered %s: stored=%v, want %v", o.key, got, o.ok)
		}
	}
	if c.Peek("a") != &old || c.Peek("e") != nil || c.Peek("b") != &other || c.Stats() != (Stats{}) {
		t.Errorf("a is %v, e is %v, %+v", c.Peek("a"), c.Peek("e"), c.Stats())
	}
	checkShards(t, c)
}

func TestBounds(t *testing.T) {
	const bytes, entries = 64 << 10, 120
	c := mustNew(t, Options[[]byte]{Bytes: bytes, Entries: entries, Shards: 4, Size: func(b *[]byte) int { return len(*b) }})
	rnd := rand.New(rand.NewPCG(1, 2))
	model := map[string]int{}
	for range 50_000 {
		key := fmt.Sprint("k", rnd.IntN(400))
		size := rnd.IntN(2000)
		if rnd.IntN(50) == 0 {
			size = rnd.IntN(40_000)
		}
		switch rnd.IntN(5) {
		case 0:
			was := c.Get(key)
			if c.Remove(key) != (was != nil) {
				t.Fatalf("Remove(%s) and Get disagree", key)
			}
			delete(model, key)
		case 1, 2:
			if got := c.Get(key); got != nil && len(*got) != model[key] {
				t.Fatalf("%s: got %d bytes, put %d", key, len(*got), model[key])
			}
		default:
			value := make([]byte, size)
			stored := c.Put(key, &value)
			ok := c.Get(key) != nil
			if fits := int64(size+len(key)+24+Overhead) <= bytes/4; stored != fits || ok != fits {
				t.Fatalf("Put of %d bytes: stored=%v readable=%v, want %v", size, stored, ok, fits)
			}
			model[key] = size
		}
		if c.Bytes() > bytes || c.Len() > entries {
			t.Fatalf("%d bytes in %d entries, bounds are %d and %d", c.Bytes(), c.Len(), bytes, entries)
		}
	}
	if c.Stats().Evictions == 0 || c.Len() < 20 {
		t.Fatalf("the test put no pressure on the cache: %+v, %d entries", c.Stats(), c.Len())
	}
	checkShards(t, c)
	c.Purge()
	if c.Len() != 0 || c.Bytes() != 0 {
		t.Fatalf("after Purge: %d entries, %d bytes", c.Len(), c.Bytes())
	}
	for k := range model {
		if c.Get(k) != nil {
			t.Fatalf("%s survived Purge", k)
		}
	}
}

// checkShards recounts what the shards keep as totals.
func checkShards[V any](t *testing.T, c *Cache[V]) {
	t.Helper()
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		var bytes, recent int64
		used, live := 0, 0
		x := s.index.Load()
		for j := range x.slots {
			tag, n := x.slots[j].tag.Load(), x.slots[j].node.Load()
			if tag != free {
				used++
			}
			if (tag >= first) != (n != nil) || n != nil && n.hash != tag {
				t.Errorf("shard %d: slot %d has tag %#x and node %+v", i, j, tag, n)
			}
			if n == nil {
				continue
			}
			live++
			bytes += n.charge
			if !n.frequent {
				recent += n.charge
			}
			if in := s.recent.Contains(n); in == n.frequent || in == s.frequent.Contains(n) {
				t.Errorf("shard %d: %q is in the wrong list", i, n.key)
			}
		}
		if bytes != s.bytes.Load() || recent != s.recentBytes || int64(live) != s.count.Load() || used != x.used || live != s.recent.Len()+s.frequent.Len() {
			t.Errorf("shard %d: counted %d bytes, %d recent, %d live, %d used; totals say %d, %d, %d, %d",
				i, bytes, recent, live, used, s.bytes.Load(), s.recentBytes, s.count.Load(), x.used)
		}
		// A little to begin with, then in proportion to the entries.
		if n := s.sketch.Bytes(); n > 64 && n >= 32*s.maxEntries {
			t.Errorf("shard %d: a sketch of %d bytes for at most %d entries", i, n, s.maxEntries)
		}
		if n := s.steer.Bytes(); n > 128 && n >= 16*s.maxEntries {
			t.Errorf("shard %d: %d bytes of departures for at most %d entries", i, n, s.maxEntries)
		}
		if sh := s.steer.Share; sh < admission.LeastShare || sh > admission.MostShare {
			t.Errorf("shard %d: a share of %v", i, sh)
		}
		s.mu.Unlock()
	}
}

// Readers run against a writer that replaces, removes, evicts and purges. Every value
// names its key, and per key the version read by one goroutine never goes back.
func TestConcurrent(t *testing.T) {
	type val struct{ key, version int }
	const keys, rounds = 64, 30_000
	c := mustNew(t, Options[val]{Entries: 48, Shards: 2})
	names := make([]string, keys)
	for i := range names {
		names[i] = fmt.Sprint("key-", i)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	hits := make([]int, 3)
	for g := range hits {
		wg.Go(func() {
			last := make([]int, keys)
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				k := i % keys
				v := c.Get(names[k])
				if v == nil {
					continue
				}
				hits[g]++
				if v.key != k || v.version < last[k] {
					t.Errorf("%s: read %+v after version %d", names[k], *v, last[k])
					return
				}
				last[k] = v.version
			}
		})
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	for i := range rounds {
		k := rnd.IntN(keys)
		switch p := rnd.IntN(1000); {
		case p == 0:
			c.Purge()
		case p < 100:
			c.Remove(names[k])
			if c.Get(names[k]) != nil {
				t.Fatal("removed key is readable")
			}
		default:
			c.Put(names[k], &val{k, i})
			if v := c.Get(names[k]); v == nil || v.version != i {
				t.Fatalf("%s: just put %d, read %v", names[k], i, v)
			}
		}
		if i%4096 == 0 {
			runtime.Gosched()
		}
	}
	close(stop)
	wg.Wait()
	total := 0
	for _, h := range hits {
		total += h
	}
	if total == 0 {
		t.Fatal("readers never hit")
	}
	checkShards(t, c)
}

func TestStatsAreExact(t *testing.T) {
	c := mustNew(t, Options[int]{})
	c.Put("here", new(int))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 1000 {
				c.Get("here")
				c.Get("gone")
			}
		})
	}
	wg.Wait()
	if s := c.Stats(); s.Hits != 4000 || s.Misses != 4000 {
		t.Errorf("%+v, want 4000 hits and misses", s)
	}
}

func TestGetDoesNotAllocate(t *testing.T) {
	c := mustNew(t, Options[[]byte]{})
	c.Put("key", new([]byte))
	if n := testing.AllocsPerRun(1000, func() { c.Get("key"); c.Get("none") }); n != 0 {
		t.Errorf("%v allocations per hit and miss", n)
	}
}

// Overhead must cover what an entry really costs, its part of the sketch included.
func TestOverheadCoversMemory(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector's own memory would be measured")
	}
	const entries, valueBytes = 50_000, 200
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	c := mustNew(t, Options[[]byte]{Bytes: 1 << 30, Entries: entries, Size: func(b *[]byte) int { return len(*b) }})
	for i := range 2 * entries { // the second half competes with the first
		value := make([]byte, valueBytes)
		c.Put(fmt.Sprintf("tenant/session/name-%d", i), &value)
	}
	used := float64(heap()-before) / float64(c.Len())
	charged := float64(c.Bytes()) / float64(c.Len())
	t.Logf("%d entries: %.0f bytes each, charged %.0f", c.Len(), used, charged)
	if used > charged {
		t.Errorf("an entry costs %.0f bytes but is charged %.0f", used, charged)
	}
	runtime.KeepAlive(c)
}
