package coherence

import (
	"fmt"
	"math/rand/v2"
	"strings"

	"github.com/outrigger-mesh/outrigger"
)

// The simulation runs an authority with one log, nodes with an agent (a State) and its
// table, processes with a tier of stamp-checked copies, clients that roam between nodes
// with a session token, and writers that go to the authority directly. The network
// between nodes and the authority loses, delays, reorders and duplicates messages and is
// cut; agents, processes and the authority crash and come back, the authority also as a
// copy that lacks its last writes, under a new incarnation; agents pause; the clocks of
// nodes are skewed, drift and jump ahead.
//
// Everything is drawn from one seed, and nothing else decides: the same seed is the same
// run, event for event. What is checked is in simoracle_test.go.

const (
	simMs    = int64(1_000_000)
	simLease = 300 * simMs
	simBeat  = 100 * simMs
	simEnd   = 1850 * simMs // nothing new begins after
	simLong  = 600 * simMs  // limit of a read at the origin

	// simDrift bounds how fast a node's clock may run, in parts per million: a lease of
	// 300 ms may be 0.15 ms longer in true time.
	simDrift = 500
)

var simKeys = func() (keys [6]outrigger.Key) {
	for i := range keys {
		keys[i] = outrigger.Key{Tenant: "t", Session: "su"[i/3 : i/3+1], Name: "abc"[i%3 : i%3+1]}
	}
	return keys
}()

const simPerSession = len(simKeys) / 2

// simIDs are the keys as tables name them.
var simIDs = func() map[string]int {
	ids := map[string]int{}
	for i, k := range simKeys {
		ids[k.String()] = i
	}
	return ids
}()

// simSetup is what a seed decides before anything happens.
type simSetup struct {
	nodes, processes, clients int // processes per node, clients per process
	roamers, writers          int
	loss, twice, slow         int   // per cent of the messages, while faults last
	slowest                   int64 // delay of the slow ones
	patience                  int64 // of writers
	hot                       int   // per cent of the requests that go to one key
	deletions                 int   // of sessions, per cent of the writes
	lag                       int64 // how far replicas that answer fetches may be behind
	calm                      int64 // when faults end
	options                   Options
	ring                      uint64 // changes the authority keeps for the feed
	ride                      int    // per cent of the changes that carry their value
	whole                     bool   // the authority does not know shards
}

func setup(r *rand.Rand) simSetup {
	s := simSetup{
		nodes: 2 + r.IntN(2), processes: 1 + r.IntN(2), clients: 1 + r.IntN(2), roamers: 1 + r.IntN(2), writers: 1 + r.IntN(2),
		loss: r.IntN(8), twice: r.IntN(8), slow: r.IntN(12), slowest: []int64{60, 200, 560}[r.IntN(3)] * simMs, patience: []int64{25, 100, 400}[r.IntN(3)] * simMs,
		lag:  []int64{0, 20 * simMs, 60 * simMs}[r.IntN(3)],
		calm: (700 + r.Int64N(300)) * simMs, ring: 8 + r.Uint64N(40), ride: r.IntN(101),
	}
	s.options = Options{Region: "eu", Lease: simLease, Patience: (10 + r.Int64N(40)) * simMs, MaxFlights: 2 + r.IntN(8), MaxGap: 5 + r.Uint64N(30)}
	if r.IntN(3) == 0 {
		s.slow += 20
	}
	if r.IntN(3) == 0 {
		s.hot = 70
	}
	s.deletions = []int{5, 10, 30}[r.IntN(3)]
	if r.IntN(2) == 0 {
		s.options.MaxKeys = 4 // fewer than there are
		s.options.MaxFlights = 2
	}
	if r.IntN(2) == 0 {
		s.options.TTL, s.options.NegativeTTL = 500*simMs, 150*simMs
	}
	if r.IntN(2) == 0 {
		s.options.RepairEvery = 70 * simMs
	}
	s.whole = r.IntN(6) == 0
	if r.IntN(2) == 0 {
		s.options.ShardIdle = (60 + r.Int64N(200)) * simMs
	}
	return s
}

type simEvent struct {
	at, seq int64
	do      func()
}

func (e simEvent) before(o simEvent) bool { return e.at < o.at || e.at == o.at && e.seq < o.seq }

// simQueue is a binary heap of events.
type simQueue []simEvent

func (q *simQueue) push(e simEvent) {
	h := append(*q, e)
	i := len(h) - 1
	for p := (i - 1) / 2; i > 0 && e.before(h[p]); i, p = p, (p-1)/2 {
		h[i] = h[p]
	}
	h[i] = e
	*q = h
}

func (q *simQueue) pop() simEvent {
	h := *q
	top, last := h[0], h[len(h)-1]
	h[len(h)-1] = simEvent{}
	h = h[:len(h)-1]
	*q = h
	i := 0
	for len(h) > 0 {
		c := 2*i + 1
		if c+1 < len(h) && h[c+1].before(h[c]) {
			c++
		}
		if c >= len(h) || !h[c].before(last) {
			h[i] = last
			break
		}
		h[i] = h[c]
		i = c
	}
	return top
}

type simWorld struct {
	simSetup
	seed  uint64
	rule  *simRule // the one that is switched off, nil = none
	r     *rand.Rand
	now   int64
	queue simQueue
	seq   int64

	origin *simOrigin
	nodes  []*simNode
	ops    []*simOp
	oracle simOracle

	trace func(line string) // nil = nobody looks
	tally simTally
}

// simTally counts what happened, so that a test can tell a run from an idle one.
type simTally struct {
	reads, processHits, tableHits, unleased, fetched, strong, bounded, stale, failed, roamed int
	writes, acked, unknown, repeated, sessions                                               int
	selects, unselected                                                                      int
	restores, restarts, agentCrashes, processCrashes, pauses, jumps, cuts                    int
	protocol                                                                                 Stats
	checked, events                                                                          int
}

func (w *simWorld) after(d int64, do func()) {
	w.seq++
	w.queue.push(simEvent{w.now + d, w.seq, do})
}

// every calls do about each d until the end, starting at random.
func (w *simWorld) every(d int64, do func()) {
	var next func()
	next = func() {
		do()
		if w.now < simEnd {
			w.after(d/2+w.r.Int64N(d), next)
		}
	}
	w.after(w.r.Int64N(d), next)
}

// pick chooses the key of a request.
func (w *simWorld) pick() int {
	if w.r.IntN(100) < w.hot {
		return 0
	}
	return w.r.IntN(len(simKeys))
}

func (w *simWorld) faulty() bool { return w.now < w.calm }

// chance is true in per cent of the calls while faults last.
func (w *simWorld) chance(percent int) bool { return w.faulty() && w.r.IntN(100) < percent }

func (w *simWorld) off(rule string) bool { return w.rule != nil && w.rule.name == rule }

func (w *simWorld) logf(format string, args ...any) {
	w.trace(fmt.Sprintf("%9.3f ms  ", float64(w.now)/float64(simMs)) + fmt.Sprintf(format, args...))
}

// send carries a message over a link; it may be lost, late, or come twice.
func (w *simWorld) send(link *simLink, arrive func()) {
	copies := 1
	if w.faulty() {
		if w.now < link.cut || w.chance(w.loss) {
			return
		}
		if w.chance(w.twice) {
			copies = 2
		}
	}
	for range copies {
		d := w.r.Int64N(6 * simMs)
		if w.chance(w.slow) {
			d = min(d+w.r.Int64N(w.slowest), w.calm+200*simMs-w.now)
		}
		w.after(d, arrive)
	}
}

// simLink is the way between one host and the authority.
type simLink struct{ cut int64 }

// run plays one seed and returns the first violation, if any.
func run(seed uint64, rule *simRule, trace func(string)) (*simWorld, *simViolation) {
	r := rand.New(rand.NewPCG(seed, 1))
	setup := setup(r)
	if rule != nil && rule.focus != nil {
		rule.focus(&setup)
	}
	w := &simWorld{simSetup: setup, seed: seed, rule: rule, r: r, now: simMs, trace: trace}
	w.oracle.w = w
	w.origin = newOrigin(w)
	for i := range w.simSetup.nodes {
		w.nodes = append(w.nodes, newNode(w, i))
	}
	for i := range w.roamers {
		newRoamer(w, i)
	}
	for i := range w.writers {
		newWriter(w, i)
	}
	w.every(250*simMs, w.origin.disturb)
	for w.oracle.found == nil && len(w.queue) > 0 {
		e := w.queue.pop()
		w.now = e.at
		e.do()
		if w.tally.events++; w.tally.events > 60_000 {
			w.oracle.fail("liveness", "the events do not end")
		}
	}
	if w.oracle.found == nil {
		w.oracle.settled()
	}
	if w.oracle.found == nil {
		w.oracle.linearizable()
	}
	for _, n := range w.nodes {
		n.count()
	}
	return w, w.oracle.found
}

// replay runs a seed again and returns its last lines, for people.
func replay(seed uint64, rule *simRule, lines int) string {
	var tail []string
	run(seed, rule, func(line string) {
		if tail = append(tail, line); len(tail) > 2*lines {
			tail = append(tail[:0], tail[lines:]...)
		}
	})
	return strings.Join(tail[max(0, len(tail)-lines):], "\n")
}
