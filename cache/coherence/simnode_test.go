package coherence

import (
	"slices"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// simSlot is a table slot: a stamp that is never used twice and what readers find.
type simSlot struct {
	stamp uint64
	held  bool // readers may use it while the lease holds
	res   *pb.ReadResult
}

// simTable is what processes of a node read; one per life of the agent.
type simTable struct {
	slots       [len(simKeys)]simSlot
	stamps      uint64
	lease       int64
	incarnation uint64
	closed      bool
}

func (t *simTable) put(key int, held bool, res *pb.ReadResult) {
	t.stamps++
	t.slots[key] = simSlot{stamp: t.stamps, held: held, res: res}
}

// simNode is a machine: a link, a clock, an agent that crashes and comes back, and
// processes.
type simNode struct {
	w         *simWorld
	number    int
	link      simLink
	ahead     int64 // the clock's offset
	drift     int64 // ppm
	processes []*simProcess

	// The agent, in its present life.
	life    int
	up      bool
	resume  int64 // it stands still until then
	s       *State
	table   *simTable
	stream  uint64
	heard   int64
	waiter  Waiter
	waiting map[Waiter]*simRead
	calls   []*simCall
	flights [len(simKeys)]uint64 // fetch under way, for the stampede check
	issued  [len(simKeys)]int64  // of the last fetch
	doubted [len(simKeys)]simDoubt
	scope   *simScope
}

func newNode(w *simWorld, number int) *simNode {
	n := &simNode{w: w, number: number, ahead: w.r.Int64N(3600_000 * simMs), drift: w.r.Int64N(2*simDrift+1) - simDrift}
	for range w.simSetup.processes {
		n.processes = append(n.processes, newProcess(n))
	}
	n.boot()
	w.every(25*simMs, func() { n.agent(func() { n.step(Tick{}) }) })
	w.every(simBeat, func() { n.agent(n.beat) })
	w.every(150*simMs, n.disturb)
	return n
}

func (n *simNode) clock() int64 { return n.ahead + n.w.now + n.w.now/1_000_000*n.drift }

// boot starts the agent with nothing.
func (n *simNode) boot() {
	n.life++
	n.up, n.resume = true, 0
	n.s, n.table, n.waiting = New(n.w.options), &simTable{}, map[Waiter]*simRead{}
	n.scope = &simScope{}
	n.flights, n.doubted, n.issued = [len(simKeys)]uint64{}, [len(simKeys)]simDoubt{}, [len(simKeys)]int64{}
	n.connect()
}

// crash ends the agent: its table keeps its lease for those who have it, its callers
// are told, its answers are lost.
func (n *simNode) crash() {
	n.w.tally.agentCrashes++
	n.count()
	n.life++
	n.up, n.table.closed = false, true
	for _, p := range n.processes {
		p.raise() // its socket tells
	}
	calls := n.calls
	n.calls = nil
	for _, c := range calls {
		c.end(c.failed)
	}
	ids := make([]Waiter, 0, len(n.waiting))
	for id := range n.waiting {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		n.refused(id)
	}
	n.w.after(n.w.r.Int64N(150*simMs), n.boot)
}

func (n *simNode) disturb() {
	w := n.w
	if !w.faulty() {
		return
	}
	switch w.r.IntN(16) {
	case 0:
		if n.up {
			if w.trace != nil {
				w.logf("node %d: agent crashes", n.number)
			}
			n.crash()
		}
	case 1, 2:
		w.tally.cuts++
		n.link.cut = w.now + w.r.Int64N(500*simMs)
		if w.trace != nil {
			w.logf("node %d: cut off until %d ms", n.number, n.link.cut/simMs)
		}
	case 3:
		w.tally.pauses++
		n.resume = min(w.now+w.r.Int64N(400*simMs), w.calm+100*simMs)
	case 4:
		w.tally.jumps++
		n.ahead += w.r.Int64N(400 * simMs)
	case 5:
		n.agent(n.reconnect)
	case 6, 7:
		n.processes[w.r.IntN(len(n.processes))].crash()
	}
}

// agent runs do in the agent's present life, once it does not stand still; if it is
// down, never.
func (n *simNode) agent(do func()) bool {
	if !n.up {
		return false
	}
	life := n.life
	if n.w.now >= n.resume {
		do()
		return true
	}
	n.w.after(n.resume-n.w.now+n.w.r.Int64N(simMs), func() {
		if n.life == life {
			n.agent(do)
		}
	})
	return true
}

// receive carries a message of the authority to the agent in its present life.
func (n *simNode) receive(do func()) {
	life := n.life
	n.w.send(&n.link, func() {
		if n.life == life {
			n.agent(do)
		}
	})
}

func (n *simNode) reconnect() {
	n.step(Lost{n.stream})
	n.connect()
}

// connect opens a stream; the number grows over lives so that the authority can tell.
func (n *simNode) connect() {
	n.stream++
	n.heard = n.w.now
	n.step(Connected{n.stream})
}

func (n *simNode) beat() {
	if n.w.now-n.heard > 350*simMs {
		n.reconnect()
		return
	}
	sent, stream := uint64(n.clock()), n.stream
	n.w.origin.serve(&n.link, func() { n.w.origin.heartbeat(n, stream, sent) })
}

func (n *simNode) frame(stream uint64, f *pb.FeedFrame) {
	if stream == n.stream {
		n.heard = n.w.now
	}
	n.step(Frame{Stream: stream, Frame: f})
}

// step feeds one input to the protocol and carries out what it answers. Carrying out
// may step again, and Step reuses its slice.
func (n *simNode) step(in Input) {
	var outs []Output
	if wrap := n.w.rule; wrap != nil && wrap.step != nil {
		outs = wrap.step(n.s, in, n.clock(), n.s.Step)
	} else {
		outs = n.s.Step(in, n.clock())
	}
	if n.w.trace != nil {
		n.log(in, outs)
	}
	if len(outs) > 1 {
		outs = slices.Clone(outs)
	}
	for _, o := range outs {
		n.carry(in, o)
	}
}

func (n *simNode) log(in Input, outs []Output) {
	if _, tick := in.(Tick); tick && len(outs) == 0 {
		return
	}
	n.w.logf("node %d: %s → %s", n.number, showInput(in), show(outs))
}

func (n *simNode) carry(in Input, o Output) {
	switch o := o.(type) {
	case Subscribe:
		n.w.origin.serve(&n.link, func() { n.w.origin.subscribe(n, o) })
	case Select:
		n.w.tally.selects += len(o.Add)
		n.w.tally.unselected += len(o.Remove)
		n.w.origin.serve(&n.link, func() { n.w.origin.choose(n, o) })
	case Resubscribe:
		n.connect()
	case Install:
		k := simIDs[o.Key.String()]
		n.table.put(k, true, &pb.ReadResult{Variable: o.Variable, SessionExists: o.SessionExists})
		if n.w.r.IntN(16) == 0 { // no room
			n.table.put(k, false, nil)
		}
	case Invalidate:
		n.table.put(simIDs[o.Key.String()], false, nil)
	case Remove:
		n.table.put(simIDs[o.Key.String()], false, nil)
	case Flush:
		for k := range n.table.slots {
			n.table.put(k, false, nil)
		}
	case Lease:
		n.table.lease = o.Until
	case Head:
		n.table.incarnation = o.Incarnation
	case Fetch:
		n.fetch(in, o)
	case FetchRange:
		n.fetchRange(o)
	case Hit:
		n.hit(o)
	case Answer:
		for _, id := range o.Waiters {
			n.answer(id, simAnswer{res: o.Result, era: o.Incarnation - 100, asOf: o.AsOf,
				oldest: n.trueTime(o.Issued) - n.w.lag, how: "fetch"})
		}
	case Failed:
		for _, id := range o.Waiters {
			n.refused(id)
		}
	}
}

// trueTime is a time not after which the node's clock showed c: jumps only make things
// look older.
func (n *simNode) trueTime(c int64) int64 {
	age := n.clock() - c
	return n.w.now - age - age*2*simDrift/1_000_000 - 1
}

func (n *simNode) hit(o Hit) {
	k := simIDs[o.Key.String()]
	if slot := n.table.slots[k]; slot.held {
		// The feed proves it current as of the sending of a heartbeat, or an answer of the
		// origin as of the sending of a fetch.
		oldest := n.trueTime(n.table.lease - simLease)
		if o.Issued > 0 {
			oldest = n.trueTime(o.Issued) - n.w.lag
			n.w.tally.unleased++
		}
		_, incarnation, _ := n.s.Position()
		for _, id := range o.Waiters {
			n.answer(id, simAnswer{res: slot.res, era: incarnation - 100, asOf: o.AsOf, oldest: oldest, how: "hit"})
		}
		return
	}
	n.step(Evicted{o.Key})
	for _, id := range o.Waiters {
		if r := n.waiting[id]; r != nil {
			n.step(Read{Key: o.Key, Waiter: id, Min: o.AsOf})
		}
	}
}

func (n *simNode) answer(id Waiter, a simAnswer) {
	r := n.waiting[id]
	if r == nil {
		n.w.oracle.fail("liveness", "node %d answered reader %d twice (%s)", n.number, id, a.how)
		return
	}
	delete(n.waiting, id)
	if a.how == "fetch" {
		n.w.tally.fetched++
	}
	r.answered(a)
}

func (n *simNode) refused(id Waiter) {
	if r := n.waiting[id]; r != nil {
		delete(n.waiting, id)
		r.failed()
	}
}

// read asks the agent; the answer comes through r.
func (n *simNode) read(r *simRead, minimum uint64) {
	n.waiter++
	n.waiting[n.waiter] = r
	n.step(Read{Key: simKeys[r.key], Waiter: n.waiter, Min: minimum})
}

// count adds what the agent of this life did to the tally.
func (n *simNode) count() {
	if !n.up {
		return
	}
	st := n.s.Stats()
	n.w.tally.protocol.add(&st)
}
