package coherence

import (
	"cmp"
	"container/heap"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// The simulation runs an authority with one log, several agents and readers over a
// network that loses, delays, reorders and duplicates, cuts agents off, restarts agents
// and restores the authority from an older copy under a new incarnation. An oracle
// that knows the log checks every answer:
//
//   - a hit is a value that was current at most one feed lease ago;
//   - an answer is a value that was current after its fetch was issued, less the lag
//     the origin's read replicas are allowed here;
//   - per reader and key, values never go back (monotonic reads), and a write
//     acknowledged to a reader is there for it afterwards (read-your-writes);
//   - nobody goes back to an incarnation that was replaced;
//   - after the faults end, every table equals the log, is fresh, and nobody waits.
//
// Everything is drawn from one seed.

const (
	simMs      = int64(1_000_000)
	simLease   = 300 * simMs
	simBeat    = 100 * simMs
	simTimeout = 250 * simMs
	replicaLag = 60 * simMs
	simFaults  = 1500 * simMs // faults until here
	simEnd     = 2800 * simMs
	simAgents  = 3
	simReaders = 2 // per agent
)

var simKeys = []outrigger.Key{
	{Tenant: "t", Session: "s", Name: "a"}, {Tenant: "t", Session: "s", Name: "b"}, {Tenant: "t", Session: "s", Name: "c"},
	{Tenant: "t", Session: "u", Name: "a"}, {Tenant: "t", Session: "u", Name: "b"},
}

// sabotage turns one rule off, to show that the oracle would notice.
type sabotage uint8

const (
	honest        sabotage = iota
	ignoreFloors           // fills pretend to be as new as anything
	ignoreGaps             // frames pretend to follow the applied position
	ignoreWrites           // acknowledged writes are not made visible
	ignoreRestore          // a new incarnation goes unnoticed
)

type simEvent struct {
	at  int64
	seq int
	do  func()
}

type simQueue []simEvent

func (q simQueue) Len() int { return len(q) }
func (q simQueue) Less(i, j int) bool {
	return cmp.Or(cmp.Compare(q[i].at, q[j].at), cmp.Compare(q[i].seq, q[j].seq)) < 0
}
func (q simQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *simQueue) Push(x any)   { *q = append(*q, x.(simEvent)) }
func (q *simQueue) Pop() any     { old := *q; x := old[len(old)-1]; *q = old[:len(old)-1]; return x }

// simWrite is one position of the log; it changes one or all keys of a session.
type simWrite struct {
	keys    []outrigger.Key
	scope   pb.Change_Scope
	deleted bool
	at      int64
	ride    bool
}

type sim struct {
	r     *rand.Rand
	mode  sabotage
	now   int64
	queue simQueue
	seq   int

	era    uint64          // incarnation = era + 100
	log    []simWrite      // position i+1
	born   int64           // when this era began
	subs   map[int]*simSub // by agent
	agents []*simAgent
	err    error

	reads, hits int
}

// simSub is the origin's end of one feed stream.
type simSub struct{ stream, sent uint64 }

type simAgent struct {
	sim     *sim
	id      int
	s       *State
	life    int // restarts
	stream  uint64
	heard   int64
	cut     int64 // unreachable until
	table   map[string]*pb.ReadResult
	lease   int64
	waiting map[Waiter]*simRead
	waiter  Waiter
	readers []*simReader
}

type simReader struct {
	last map[string]uint64 // per key: position of the oldest value still allowed
	era  uint64
}

// simRead is one read under way, with what its reader had seen when it asked.
type simRead struct {
	reader *simReader
	key    outrigger.Key
	floor  uint64
	era    uint64
}

func (m *sim) after(d int64, do func()) {
	m.seq++
	heap.Push(&m.queue, simEvent{m.now + d, m.seq, do})
}

func (m *sim) faulty() bool { return m.now < simFaults }

func (m *sim) fail(format string, args ...any) {
	if m.err == nil {
		m.err = fmt.Errorf("at %d ms: "+format, append([]any{m.now / simMs}, args...)...)
	}
}

// send carries a message between agent a (in its present life) and the authority.
func (m *sim) send(a *simAgent, do func()) {
	life := a.life
	copies := 1
	if m.faulty() {
		if m.now < a.cut || m.r.IntN(100) < 4 {
			return
		}
		if m.r.IntN(100) < 5 {
			copies = 2
		}
	}
	for range copies {
		d := m.r.Int64N(8 * simMs)
		if m.faulty() && m.r.IntN(100) < 6 {
			d += m.r.Int64N(200 * simMs)
		}
		m.after(d, func() {
			if a.life == life {
				do()
			}
		})
	}
}

func (m *sim) incarnation() uint64 { return m.era + 100 }
func (m *sim) head() uint64        { return uint64(len(m.log)) }

func (m *sim) version(p uint64) *pb.Version { return versionIn("eu", m.incarnation(), p) }

// at returns the position of the write that determines key as of a position, and
// whether it left a value.
func (m *sim) at(key outrigger.Key, asOf uint64) (position uint64, present bool) {
	for p := asOf; p > 0; p-- {
		if slices.Contains(m.log[p-1].keys, key) {
			return p, !m.log[p-1].deleted
		}
	}
	return 0, false
}

// headAt is the head at a time (the present era's positions before it began are the
// restored ones).
func (m *sim) headAt(t int64) uint64 {
	i, _ := slices.BinarySearchFunc(m.log, t, func(w simWrite, t int64) int {
		if w.at <= t {
			return -1
		}
		return 1
	})
	return uint64(i)
}

func (m *sim) variable(key outrigger.Key, p uint64) *pb.Variable {
	return &pb.Variable{Key: &pb.Key{Tenant: key.Tenant, Session: key.Session, Name: key.Name}, Version: m.version(p)}
}

func (m *sim) result(key outrigger.Key, asOf uint64) *pb.ReadResult {
	p, ok := m.at(key, asOf)
	if !ok {
		return &pb.ReadResult{SessionExists: true}
	}
	return &pb.ReadResult{Variable: m.variable(key, p), SessionExists: true}
}

func (m *sim) change(p uint64) *pb.Change {
	w := m.log[p-1]
	k := w.keys[0]
	c := &pb.Change{Scope: w.scope, Key: &pb.Key{Tenant: k.Tenant, Session: k.Session, Name: k.Name},
		Position: p, Deleted: w.deleted && w.scope == pb.Change_KEY, Version: m.version(p)}
	if w.ride && !w.deleted {
		c.Variable = m.variable(k, p)
	}
	return c
}

// append commits one write and sends it to every subscriber.
func (m *sim) append(w simWrite) uint64 {
	w.at, w.ride = m.now, m.r.IntN(2) == 0
	m.log = append(m.log, w)
	for _, a := range m.agents {
		if m.r.IntN(4) > 0 {
			m.feed(a)
		}
	}
	return m.head()
}

// feed sends an agent the positions it was not sent yet; frames of more than one arise
// because append sometimes leaves an agent out.
func (m *sim) feed(a *simAgent) {
	sub := m.subs[a.id]
	if sub == nil || sub.sent >= m.head() {
		return
	}
	c := &pb.Changes{Previous: sub.sent, Through: m.head()}
	for p := sub.sent + 1; p <= m.head(); p++ {
		c.Changes = append(c.Changes, m.change(p))
	}
	sub.sent = m.head()
	m.toAgent(a, sub.stream, &pb.FeedFrame{Kind: &pb.FeedFrame_Changes{Changes: c}})
}

func (m *sim) toAgent(a *simAgent, stream uint64, f *pb.FeedFrame) {
	f.Incarnation, f.Region = m.incarnation(), "eu"
	m.send(a, func() {
		if stream != a.stream {
			return
		}
		a.heard = m.now
		if c := f.GetChanges(); m.mode == ignoreGaps && c != nil {
			_, _, applied := a.s.Position()
			c.Previous = min(c.GetPrevious(), applied)
		}
		if m.mode == ignoreRestore {
			f.Incarnation = 100
		}
		a.step(Frame{Stream: stream, Frame: f})
	})
}

// subscribe is the origin's side of a new stream.
func (m *sim) subscribe(a *simAgent, o Subscribe) {
	old := m.subs[a.id]
	if old != nil && old.stream >= o.Stream {
		return // a duplicate or a late one
	}
	sub := &simSub{stream: o.Stream, sent: o.From}
	m.subs[a.id] = sub
	if m.mode != ignoreRestore && o.Incarnation != m.incarnation() || o.From > m.head() || m.head()-o.From > 40 {
		sub.sent = m.head()
		m.toAgent(a, o.Stream, &pb.FeedFrame{Kind: &pb.FeedFrame_Reset_{Reset_: &pb.Reset{From: m.head()}}})
		return
	}
	m.feed(a)
}

// restore brings back a copy of the log that lacks its last writes.
func (m *sim) restore() {
	m.era++
	m.log = m.log[:len(m.log)-m.r.IntN(min(len(m.log), 6)+1)]
	m.born = m.now
	for _, a := range m.agents {
		delete(m.subs, a.id) // the streams break
	}
}

func (a *simAgent) start() {
	a.life++
	a.s = New(Options{Region: "eu", Lease: simLease, Patience: 30 * simMs, MaxKeys: 4, MaxFlights: 2, RepairEvery: 70 * simMs,
		TTL: 900 * simMs, MaxGap: 30})
	a.table, a.waiting, a.lease = map[string]*pb.ReadResult{}, map[Waiter]*simRead{}, 0
	a.readers = nil
	for range simReaders {
		a.readers = append(a.readers, &simReader{last: map[string]uint64{}})
	}
	a.connect()
}

func (a *simAgent) connect() {
	a.stream++
	a.heard = a.sim.now
	a.step(Connected{a.stream})
}

func (a *simAgent) step(in Input) {
	m := a.sim
	// The slice is reused by the next Step, and carrying an output out may cause one.
	for _, o := range slices.Clone(a.s.Step(in, m.now)) {
		a.carry(o)
	}
}

func (a *simAgent) carry(o Output) {
	m := a.sim
	switch o := o.(type) {
	case Subscribe:
		m.send(a, func() { m.subscribe(a, o) })
	case Resubscribe:
		a.connect()
	case Install:
		a.table[o.Key.String()] = &pb.ReadResult{Variable: o.Variable, SessionExists: o.SessionExists}
		if m.r.IntN(12) == 0 { // the table has no room
			delete(a.table, o.Key.String())
		}
	case Invalidate:
		delete(a.table, o.Key.String())
	case Remove:
		delete(a.table, o.Key.String())
	case Flush:
		clear(a.table)
	case Lease:
		a.lease = o.Until
	case Fetch:
		a.fetch(o)
	case FetchRange:
		a.fetchRange(o)
	case Hit:
		a.hit(o)
	case Answer:
		for _, w := range o.Waiters {
			a.answered(w, o.Result, o.Incarnation, o.Issued-replicaLag, "answer")
		}
	case Failed:
		for _, w := range o.Waiters {
			delete(a.waiting, w)
		}
	}
}

func (a *simAgent) hit(o Hit) {
	r, held := a.table[o.Key.String()]
	if !held {
		a.step(Evicted{o.Key})
	}
	for _, w := range o.Waiters {
		if held {
			// Without a lease this is a fill that met something newer, at most a fetch old.
			oldest := a.sim.now - simLease
			if !a.s.Fresh(a.sim.now) {
				oldest -= 2*simTimeout + replicaLag
			}
			_, incarnation, _ := a.s.Position()
			a.answered(w, r, incarnation, oldest, "hit")
			continue
		}
		a.step(Read{Key: o.Key, Waiter: w})
	}
}

// call is a request to the origin that fails after a time-out unless it answers; the
// server's part runs at the origin and returns what the agent does with the answer.
func (a *simAgent) call(server func() (deliver func()), failed func()) {
	m, life, open := a.sim, a.life, true
	once := func(do func()) func() {
		return func() {
			if open && a.life == life {
				open = false
				do()
			}
		}
	}
	m.send(a, func() {
		deliver := server()
		m.send(a, once(deliver))
	})
	m.after(simTimeout, once(failed))
}

// serve reads as a replica that may be behind, but not below the minimum.
func (m *sim) serve(minimum uint64) (asOf uint64) {
	asOf = m.headAt(m.now - m.r.Int64N(replicaLag))
	if m.now-m.born < replicaLag {
		asOf = m.head()
	}
	return min(max(asOf, minimum), m.head())
}

func (a *simAgent) fetch(o Fetch) {
	m := a.sim
	a.sim.after(max(0, o.After-m.now), func() {
		a.call(func() func() {
			asOf, incarnation := m.serve(o.MinPosition), m.incarnation()
			result := m.result(o.Key, asOf)
			if m.mode == ignoreFloors {
				asOf = max(asOf, m.head()+1000)
			}
			if m.mode == ignoreRestore {
				incarnation = 100
			}
			return func() {
				a.step(Filled{Key: o.Key, Flight: o.Flight, Result: result, AsOf: asOf, Incarnation: incarnation, Region: "eu"})
			}
		}, func() { a.step(FillFailed{o.Key, o.Flight, errors.New("no answer")}) })
	})
}

func (a *simAgent) fetchRange(o FetchRange) {
	m := a.sim
	a.call(func() func() {
		if m.mode != ignoreRestore && o.Incarnation != m.incarnation() || m.head()-min(o.From, m.head()) > 25 {
			return func() { a.step(RangeFailed{Range: o.Range, Gone: true}) }
		}
		resp := &pb.ChangesResponse{CompleteTo: min(o.To, m.head(), o.From+7)}
		for p := o.From + 1; p <= resp.CompleteTo; p++ {
			resp.Changes = append(resp.Changes, m.change(p))
		}
		return func() { a.step(RangeArrived{o.Range, resp}) }
	}, func() { a.step(RangeFailed{Range: o.Range}) })
}

func (a *simAgent) read(r *simReader, key outrigger.Key) {
	m := a.sim
	m.reads++
	a.waiter++
	a.waiting[a.waiter] = r.ask(key)
	// A sidecar looks into the table itself first.
	if v, ok := a.table[key.String()]; ok && m.now < a.lease {
		m.hits++
		_, incarnation, _ := a.s.Position()
		a.answered(a.waiter, v, incarnation, m.now-simLease, "table")
		return
	}
	a.step(Read{Key: key, Waiter: a.waiter})
}

func (a *simAgent) strong(r *simReader, key outrigger.Key) {
	m := a.sim
	a.waiter++
	w := a.waiter
	a.waiting[w] = r.ask(key)
	began, issued := a.s.Begin(), m.now
	a.call(func() func() {
		asOf, incarnation := m.head(), m.incarnation()
		result := m.result(key, asOf)
		return func() {
			if m.mode == ignoreRestore {
				incarnation = 100
			}
			if !a.s.Current(incarnation, began) {
				delete(a.waiting, w) // the reader is told to retry
				return
			}
			a.step(Offered{Key: key, Began: began, Result: result, AsOf: asOf, Incarnation: incarnation, Region: "eu"})
			a.answered(w, result, incarnation, issued, "strong")
		}
	}, func() { delete(a.waiting, w) })
}

func (a *simAgent) write(r *simReader) {
	m := a.sim
	key := simKeys[m.r.IntN(len(simKeys))]
	kind := m.r.IntN(20)
	session := kind == 0
	w := simWrite{keys: []outrigger.Key{key}, deleted: kind < 4}
	if session {
		w = simWrite{keys: sessionKeys(key), scope: pb.Change_SESSION, deleted: true}
	}
	began := a.s.Begin()
	done := false // a duplicated request is one write: it carries an idempotency key
	a.call(func() func() {
		if done {
			return func() {}
		}
		done = true
		era, p := m.era, m.append(w)
		version := m.version(p)
		return func() { a.acked(r, w, began, era, p, version) }
	}, func() {
		if session {
			a.step(SessionChanged{key.Tenant, key.Session})
		} else {
			a.step(WriteUnknown{key})
		}
	})
}

func sessionKeys(k outrigger.Key) []outrigger.Key {
	return slices.DeleteFunc(slices.Clone(simKeys), func(x outrigger.Key) bool { return x.Session != k.Session })
}

func (a *simAgent) acked(r *simReader, w simWrite, began, era, p uint64, v *pb.Version) {
	m := a.sim
	switch {
	case m.mode == ignoreWrites:
	case w.scope == pb.Change_SESSION:
		a.step(SessionChanged{w.keys[0].Tenant, w.keys[0].Session})
	default:
		in := Wrote{Key: w.keys[0], Began: began, Version: v}
		if !w.deleted {
			in.Variable = &pb.Variable{Key: &pb.Key{Tenant: in.Key.Tenant, Session: in.Key.Session, Name: in.Key.Name}, Version: v}
		}
		a.step(in)
	}
	// Session deletions answer no position, so the guarantee for them is the feed's, not
	// read-your-writes behind a lagging replica.
	if w.scope == pb.Change_KEY && era >= r.era {
		r.enter(era)
		r.last[w.keys[0].String()] = max(r.last[w.keys[0].String()], p)
	}
}

func (r *simReader) ask(key outrigger.Key) *simRead {
	return &simRead{reader: r, key: key, floor: r.last[key.String()], era: r.era}
}

func (r *simReader) enter(era uint64) {
	if era > r.era {
		r.era = era
		clear(r.last)
	}
}

// answered is the oracle.
func (a *simAgent) answered(w Waiter, res *pb.ReadResult, incarnation uint64, oldest int64, how string) {
	m, rd := a.sim, a.waiting[w]
	if rd == nil {
		m.fail("agent %d answered reader %d twice (%s)", a.id, w, how)
		return
	}
	delete(a.waiting, w)
	if m.mode == ignoreRestore {
		incarnation = m.incarnation()
	}
	era := incarnation - 100
	if era < rd.era {
		m.fail("agent %d: %s of %s from incarnation %d after %d was seen", a.id, how, rd.key, era, rd.era)
		return
	}
	rd.reader.enter(era)
	if era != m.era {
		// A replaced log is served for the rest of a lease at most.
		if m.now-m.born > max(simLease, m.now-oldest) {
			m.fail("agent %d: %s of %s from a log replaced %d ms ago", a.id, how, rd.key, (m.now-m.born)/simMs)
		}
		return
	}
	floor := rd.floor
	if rd.era < era {
		floor = 0
	}
	position, ok := m.match(rd.key, res, max(floor, m.headAt(oldest)))
	if !ok {
		m.fail("agent %d: %s of %s gave %s, which was over at position %d (reader had seen %d, current %d ms ago)",
			a.id, how, rd.key, showResult(res), max(floor, m.headAt(oldest)), floor, (m.now-oldest)/simMs)
		return
	}
	if last := rd.reader.last; rd.reader.era == era {
		last[rd.key.String()] = max(last[rd.key.String()], position)
	}
}

// match finds the earliest position ≥ from as of which res is right; the write behind
// it is what the reader has now seen.
func (m *sim) match(key outrigger.Key, res *pb.ReadResult, from uint64) (position uint64, ok bool) {
	for p := from; p <= m.head(); p++ {
		at, present := m.at(key, p)
		v := res.GetVariable()
		if v == nil && !present || v != nil && present && v.GetVersion().GetDot().GetPosition() == at {
			return at, true
		}
	}
	return 0, false
}

func showResult(r *pb.ReadResult) string {
	if r.GetVariable() == nil {
		return "nothing"
	}
	return "the write of " + strconv.FormatUint(r.GetVariable().GetVersion().GetDot().GetPosition(), 10)
}

// schedule runs the agents' and readers' clocks.
func (m *sim) schedule() {
	for _, a := range m.agents {
		m.every(10*simMs, func() { a.step(Tick{}) })
		m.every(simBeat, a.heartbeat)
		for i := range simReaders {
			m.every(15*simMs, func() {
				r := a.readers[i]
				switch m.r.IntN(24) {
				case 0:
					a.strong(r, simKeys[m.r.IntN(len(simKeys))])
				case 1:
					if m.now < simFaults+500*simMs {
						a.write(r)
					}
				default:
					a.read(r, simKeys[m.r.IntN(len(simKeys))])
				}
			})
		}
		m.every(150*simMs, func() {
			if m.faulty() {
				m.disturb(a)
			}
		})
	}
	m.every(500*simMs, func() {
		if m.faulty() && m.r.IntN(3) == 0 {
			m.restore()
		}
	})
}

func (m *sim) disturb(a *simAgent) {
	switch m.r.IntN(20) {
	case 0:
		a.start() // readers start over too: their sessions were this agent's
	case 1, 2:
		a.cut = m.now + m.r.Int64N(900*simMs)
	case 3:
		a.step(Lost{a.stream})
		a.connect()
	}
}

func (a *simAgent) heartbeat() {
	m := a.sim
	if m.now-a.heard > 350*simMs {
		a.step(Lost{a.stream})
		a.connect()
		return
	}
	sent, stream := uint64(m.now), a.stream
	m.send(a, func() {
		if sub := m.subs[a.id]; sub != nil && sub.stream == stream {
			m.feed(a)
			m.toAgent(a, stream, &pb.FeedFrame{Kind: &pb.FeedFrame_Ack{Ack: &pb.HeartbeatAck{Sent: sent, Head: m.head()}}})
		}
	})
}

func (m *sim) every(d int64, do func()) {
	m.after(m.r.Int64N(d), func() { m.repeat(d, do) })
}

func (m *sim) repeat(d int64, do func()) {
	do()
	if m.now < simEnd {
		m.after(d/2+m.r.Int64N(d), func() { m.repeat(d, do) })
	}
}

func simulate(seed uint64, mode sabotage) (*sim, error) {
	m := &sim{r: rand.New(rand.NewPCG(seed, 1)), mode: mode, now: simMs, subs: map[int]*simSub{}}
	for _, k := range simKeys {
		m.log = append(m.log, simWrite{keys: []outrigger.Key{k}})
	}
	for i := range simAgents {
		a := &simAgent{sim: m, id: i}
		m.agents = append(m.agents, a)
		a.start()
	}
	m.schedule()
	for steps := 0; m.err == nil && len(m.queue) > 0; steps++ {
		if steps > 40_000 {
			m.fail("the events do not end")
		}
		e := heap.Pop(&m.queue).(simEvent)
		m.now = e.at
		e.do()
	}
	if m.err == nil {
		m.settled()
	}
	return m, m.err
}

// settled checks that the faults left no trace.
func (m *sim) settled() {
	for _, a := range m.agents {
		_, incarnation, applied := a.s.Position()
		st := a.s.Stats()
		switch {
		case mode(m) && (incarnation != m.incarnation() || applied != m.head()):
			m.fail("agent %d ends at %d:%d, the log at %d:%d", a.id, incarnation, applied, m.incarnation(), m.head())
		case a.lease < simEnd:
			m.fail("agent %d has no lease at the end", a.id)
		case st.Flights != 0 || st.Waiting != 0 || len(a.waiting) != 0:
			m.fail("agent %d: %d fetches, %d waiters, %d readers are left", a.id, st.Flights, st.Waiting, len(a.waiting))
		case st.Repaired != 0:
			m.fail("agent %d repaired %d entries that nothing should have broken", a.id, st.Repaired)
		}
		for _, k := range simKeys {
			if r, ok := a.table[k.String()]; ok {
				if _, right := m.match(k, r, m.head()); !right {
					m.fail("agent %d ends with %s for %s", a.id, showResult(r), k)
				}
			}
		}
	}
}

func mode(m *sim) bool { return m.mode == honest }

var simSeeds = flag.Uint64("seeds", 300, "how many seeds TestSimulation runs")

func TestSimulation(t *testing.T) {
	seeds := *simSeeds
	var reads, hits, eras int
	var total Stats
	for seed := range seeds {
		m, err := simulate(seed, honest)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		reads, hits, eras = reads+m.reads, hits+m.hits, eras+int(m.era)
		for _, a := range m.agents {
			st := a.s.Stats()
			total.Refused += st.Refused
			total.Gaps += st.Gaps
			total.Joined += st.Joined
			total.Checked += st.Checked
			total.Evicted += st.Evicted
		}
	}
	t.Logf("%d seeds: %d reads, %d table hits, %d restores, %d fills refused, %d gaps, %d joined, %d checked, %d evicted",
		seeds, reads, hits, eras, total.Refused, total.Gaps, total.Joined, total.Checked, total.Evicted)
	// A simulation in which nothing happens proves nothing.
	if hits*4 < reads || total.Refused == 0 || total.Gaps == 0 || total.Joined == 0 || total.Checked == 0 || total.Evicted == 0 || eras == 0 {
		t.Errorf("the faults did not reach the protocol")
	}
}

// Without each rule the oracle must complain: it can tell.
func TestSimulationNoticesBrokenRules(t *testing.T) {
	for name, mode := range map[string]sabotage{
		"floors": ignoreFloors, "gaps": ignoreGaps, "write-through": ignoreWrites, "incarnations": ignoreRestore,
	} {
		caught := 0
		for seed := uint64(0); seed < 40 && caught < 5; seed++ {
			if _, err := simulate(seed, mode); err != nil {
				caught++
			}
		}
		if caught < 5 {
			t.Errorf("without %s only %d of 40 seeds fail", name, caught)
		}
	}
}
