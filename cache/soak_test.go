package cache_test

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/cache/shm"
)

var soakSeeds = flag.Uint64("soak", 2, "how many seeds TestSoak runs")

// A seeded soak over the real parts: links are cut and healed, the agent restarts, the
// private agent comes and goes, frames are lost; other nodes write as well. One writer
// and several readers use one Store, and per reader:
//
//   - values, which only grow, never go back, stale answers included;
//   - an acknowledged write is there for reads that begin after it;
//   - an answer not marked stale was current at most its own age bound ago.
//
// All time is fake.
func TestSoak(t *testing.T) {
	for seed := range *soakSeeds {
		synctest.Test(t, func(t *testing.T) { soak(t, seed) })
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// ledger is when each value was written; values are 1, 2, 3, …
type ledger struct {
	mu      sync.Mutex
	written []time.Time // of value i+1
	acked   int         // highest value acknowledged to the Store's writer
}

func (l *ledger) next() int { l.mu.Lock(); defer l.mu.Unlock(); return len(l.written) + 1 }

func (l *ledger) ack(v int) { l.mu.Lock(); l.acked = max(l.acked, v); l.mu.Unlock() }

// currentAt is the highest value written before a time.
func (l *ledger) currentAt(at time.Time) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for n < len(l.written) && l.written[n].Before(at) {
		n++
	}
	return n
}

func (l *ledger) ackedSoFar() int { l.mu.Lock(); defer l.mu.Unlock(); return l.acked }

func soak(t *testing.T, seed uint64) {
	w := newWorld(t)
	defer w.close()
	w.startAgent()
	l := &ledger{}
	w.origin.OnPut(func(name, json string) {
		l.mu.Lock()
		l.written = append(l.written, time.Now())
		l.mu.Unlock()
	})
	w.origin.Put("x", "1")
	s := w.store(cache.Options{Table: func() *shm.Reader { return w.agent.Load().Table() }, Agent: w.dial("pod", "agent:1"),
		Origin: w.dial("pod", "origin:1"), Private: seed%2 == 0, Timeout: 200 * time.Millisecond})

	end := time.Now().Add(6 * time.Second)
	var all sync.WaitGroup
	all.Go(func() { // the writer, and another node's writes
		r := rand.New(rand.NewPCG(seed, 1))
		for time.Now().Before(end) {
			time.Sleep(time.Duration(r.IntN(60)) * time.Millisecond)
			v := l.next()
			if r.IntN(3) == 0 {
				w.origin.Put("x", strconv.Itoa(v))
				continue
			}
			if err := set(s, "x", strconv.Itoa(v)); err == nil {
				l.ack(v)
			}
		}
	})
	counts := make([]map[string]int, 4)
	for i := range counts {
		counts[i] = map[string]int{}
		all.Go(func() { soakReader(t, seed, s, l, rand.New(rand.NewPCG(seed, uint64(10+i))), end, counts[i]) })
	}
	soakFaults(w, rand.New(rand.NewPCG(seed, 2)), end)
	all.Wait()
	for _, a := range []string{"pod", "node"} {
		w.net.Heal(a, "origin")
	}
	w.net.Heal("pod", "node")
	time.Sleep(3 * time.Second)
	read(t, s, "x", session) // the Store notices that the agent is another one
	time.Sleep(time.Second)
	reads(t, s, "x", strong, strconv.Itoa(l.next()-1)+" origin")
	if got := read(t, s, "x", session); got != strconv.Itoa(l.next()-1)+" process" && got != strconv.Itoa(l.next()-1)+" node" {
		t.Errorf("after healing the Store reads %s, want %d from this node", got, l.next()-1)
	}
	if c := counts[0]; c["process"] == 0 || c["origin"] == 0 {
		t.Errorf("the soak did not reach all tiers: %v", c)
	}
}

func soakReader(t *testing.T, seed uint64, s *cache.Store, l *ledger, r *rand.Rand, end time.Time, counts map[string]int) {
	last := 0
	for time.Now().Before(end) {
		time.Sleep(time.Duration(r.IntN(8)) * time.Millisecond)
		c := []outrigger.Consistency{session, session, session, session, bounded(150 * time.Millisecond), strong}[r.IntN(6)]
		acked, began := l.ackedSoFar(), time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		a, err := s.Get(ctx, cache.Request{Key: key("x"), Consistency: c, Encoding: -1})
		cancel()
		if err != nil {
			counts[outrigger.KindOf(err).String()]++
			continue
		}
		counts[a.Tier.String()]++
		v, err := strconv.Atoi(string(a.Variable.GetValue().GetJson()))
		what := fmt.Sprintf("seed %d: %s read at %v gave %d (%s, stale %v, age %v)", seed, c, began.Format("05.000"), v, a.Tier, a.Stale, a.Age)
		switch {
		case err != nil:
			t.Errorf("%s: %v", what, err)
		case v < last:
			t.Errorf("%s after %d was seen", what, last)
		case v < acked:
			t.Errorf("%s after %d was acknowledged", what, acked)
		case v < l.currentAt(time.Now().Add(-a.Age)):
			t.Errorf("%s, but %d was current then", what, l.currentAt(time.Now().Add(-a.Age)))
		}
		last = max(last, v)
		if t.Failed() {
			return
		}
	}
}

// soakFaults breaks things until end.
func soakFaults(w *world, r *rand.Rand, end time.Time) {
	links := [][2]string{{"pod", "origin"}, {"node", "origin"}, {"pod", "node"}}
	for time.Now().Before(end) {
		time.Sleep(time.Duration(r.IntN(700)) * time.Millisecond)
		switch link := links[r.IntN(3)]; r.IntN(6) {
		case 0, 1:
			w.net.Cut(link[0], link[1])
		case 2, 3:
			w.net.Heal(link[0], link[1])
		case 4:
			w.origin.LoseFrame()
		case 5:
			w.net.SetDelay(link[0], link[1], time.Duration(r.IntN(15))*time.Millisecond)
		}
		if r.IntN(20) == 0 {
			w.stopAgent()
			time.Sleep(time.Duration(r.IntN(3000)) * time.Millisecond)
			w.net.Heal("node", "origin") // startAgent waits for the feed
			w.startAgent()
		}
	}
}
