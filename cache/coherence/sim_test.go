package coherence

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var (
	simSeed  = flag.Uint64("seed", 0, "the one seed the simulation runs, with its last events on failure; 0 = a range that changes by the day")
	simSeeds = flag.Uint64("seeds", 0, "how many seeds the simulation runs; 0 = 2,000, or 10,000 with OUTRIGGER_LONG=1")
)

// simBase is the first seed of today's range.
func simBase() uint64 { return uint64(time.Now().Unix()) / 86400 * 1_000_000 }

func simRange() (base, count uint64) {
	base, count = simBase(), 2000
	if raceEnabled {
		count = 200 // one seed is one goroutine; the detector has little to see
	}
	if os.Getenv("OUTRIGGER_LONG") == "1" {
		count = 10_000
	}
	if *simSeeds > 0 {
		count = *simSeeds
	}
	if *simSeed > 0 {
		base, count = *simSeed, 1
	}
	return base, count
}

func TestSimulation(t *testing.T) {
	base, count := simRange()
	defer debug.SetGCPercent(debug.SetGCPercent(400)) // short-lived worlds: half the time would go into collecting them
	var next, done atomic.Uint64
	var failed atomic.Bool
	var mu sync.Mutex
	var sum simTally
	var workers sync.WaitGroup
	start := time.Now()
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for !failed.Load() {
				i := next.Add(1) - 1
				if i >= count {
					return
				}
				w, v := run(base+i, nil, nil)
				if v != nil && !failed.Swap(true) {
					t.Errorf("seed %d: %v\nrepeat with: go test -run 'TestSimulation$' ./cache/coherence -seed %d\n%s", base+i, v, base+i, replay(base+i, nil, 40))
				}
				done.Add(1)
				mu.Lock()
				sum.add(&w.tally)
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	took := time.Since(start)
	t.Logf("%d seeds from %d in %v, %.0f a second", done.Load(), base, took.Round(time.Millisecond), float64(done.Load())/took.Seconds())
	t.Log(sum.String())
	if count >= 100 && !failed.Load() {
		sum.busy(t)
	}
}

// A seed is one run: what differs between two runs of it would make every failure a
// riddle.
func TestSimulationRepeats(t *testing.T) {
	for seed := simBase(); seed < simBase()+5; seed++ {
		var first, second []string
		run(seed, nil, func(l string) { first = append(first, l) })
		run(seed, nil, func(l string) { second = append(second, l) })
		if len(first) != len(second) {
			t.Fatalf("seed %d: %d and %d events", seed, len(first), len(second))
		}
		for i := range first {
			if first[i] != second[i] {
				t.Fatalf("seed %d: event %d differs:\n%s\n%s", seed, i, first[i], second[i])
			}
		}
	}
}

// add counts another agent's work.
func (s *Stats) add(o *Stats) {
	s.Hits += o.Hits
	s.Fetches += o.Fetches
	s.Joined += o.Joined
	s.Refused += o.Refused
	s.Changes += o.Changes
	s.Gaps += o.Gaps
	s.Flushes += o.Flushes
	s.Checked += o.Checked
	s.Evicted += o.Evicted
}

func (t *simTally) String() string { return fmt.Sprintf("%+v", *t) }

func (t *simTally) add(o *simTally) {
	add := func(to *int, n int) { *to += n }
	add(&t.reads, o.reads)
	add(&t.processHits, o.processHits)
	add(&t.tableHits, o.tableHits)
	add(&t.unleased, o.unleased)
	add(&t.fetched, o.fetched)
	add(&t.strong, o.strong)
	add(&t.bounded, o.bounded)
	add(&t.stale, o.stale)
	add(&t.failed, o.failed)
	add(&t.roamed, o.roamed)
	add(&t.writes, o.writes)
	add(&t.acked, o.acked)
	add(&t.unknown, o.unknown)
	add(&t.repeated, o.repeated)
	add(&t.sessions, o.sessions)
	add(&t.selects, o.selects)
	add(&t.unselected, o.unselected)
	add(&t.restores, o.restores)
	add(&t.restarts, o.restarts)
	add(&t.agentCrashes, o.agentCrashes)
	add(&t.processCrashes, o.processCrashes)
	add(&t.pauses, o.pauses)
	add(&t.jumps, o.jumps)
	add(&t.cuts, o.cuts)
	add(&t.checked, o.checked)
	add(&t.events, o.events)
	t.protocol.add(&o.protocol)
}

// busy fails when what the simulation is about did not happen: such a run proves nothing.
func (t *simTally) busy(test *testing.T) {
	p := &t.protocol
	for what, n := range map[string]int{
		"process hits": t.processHits, "table hits": t.tableHits, "hits without a lease": t.unleased, "fetched answers": t.fetched, "strong reads": t.strong,
		"bounded reads": t.bounded, "marked answers": t.stale, "failed reads": t.failed, "roaming reads": t.roamed,
		"acknowledged writes": t.acked, "unknown outcomes": t.unknown, "repeated writes": t.repeated, "session changes": t.sessions,
		"shards selected": t.selects, "shards given up": t.unselected,
		"restores": t.restores, "restarts": t.restarts, "agent crashes": t.agentCrashes, "process crashes": t.processCrashes,
		"pauses": t.pauses, "clock jumps": t.jumps, "cuts": t.cuts,
		"joined readers": int(p.Joined), "refused fills": int(p.Refused), "gaps": int(p.Gaps), "flushes": int(p.Flushes),
		"sampled comparisons": int(p.Checked), "evictions": int(p.Evicted),
	} {
		if n == 0 {
			test.Errorf("there were no %s", what)
		}
	}
	if hits := t.processHits + t.tableHits; 5*hits < t.reads {
		test.Errorf("only %d of %d reads were hits", hits, t.reads)
	}
}
