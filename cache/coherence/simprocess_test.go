package coherence

import (
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// simScope is somebody who was promised not to see older things than before: a process,
// a node's agent in one life, a client that carries its token from node to node.
type simScope struct {
	era  uint64
	last [len(simKeys)]uint64 // position of the oldest state still allowed
}

// saw notes what was shown or acknowledged within the scope.
func (s *simScope) saw(era uint64, key int, position uint64) {
	if era > s.era {
		*s = simScope{era: era}
	}
	if era == s.era {
		s.last[key] = max(s.last[key], position)
	}
}

// simAsk is a scope as it was when a read began.
type simAsk struct {
	scope *simScope
	era   uint64
	from  uint64
}

// simAnswer is an answer with what is claimed of it.
type simAnswer struct {
	res     *pb.ReadResult
	era     uint64
	asOf    uint64
	oldest  int64 // it was current at some (true) time after this
	how     string
	strong  bool
	at      int64 // when the authority served it, if strong
	stale   bool  // marked: no promise about time
	bounded bool
}

// simRead is one read under way.
type simRead struct {
	w        *simWorld
	key      int
	began    int64
	asks     [2]simAsk
	doubted  simDoubt // of the agent that answers
	through  bool     // the agent or its table answers
	answered func(simAnswer)
	failed   func()
}

func (w *simWorld) newRead(key int, scopes ...*simScope) *simRead {
	r := &simRead{w: w, key: key, began: w.now}
	for i, s := range scopes {
		r.asks[i] = simAsk{s, s.era, s.last[key]}
	}
	w.tally.reads++
	return r
}

// simCopy is an entry of the process tier: the proof is the slot's stamp.
type simCopy struct {
	table *simTable
	stamp uint64
	res   *pb.ReadResult
}

// simProcess is a sidecar: package cache's Store over the node's table.
type simProcess struct {
	n      *simNode
	life   int
	copies [len(simKeys)]simCopy
	view   *simTable
	fence  int64 // tables whose proof is older are not used
	scope  *simScope
}

func newProcess(n *simNode) *simProcess {
	p := &simProcess{n: n}
	p.boot()
	for range n.w.simSetup.clients {
		n.w.every(22*simMs, p.act)
	}
	return p
}

func (p *simProcess) boot() {
	p.life++
	p.copies, p.view, p.fence, p.scope = [len(simKeys)]simCopy{}, nil, p.n.clock()-1, &simScope{}
}

func (p *simProcess) crash() {
	p.n.w.tally.processCrashes++
	p.boot()
}

// act is one request of a client of this process.
func (p *simProcess) act() {
	w := p.n.w
	key := w.pick()
	switch d := w.r.IntN(40); {
	case d < 3:
		if w.now < w.calm+300*simMs {
			p.write(w.newOp())
		}
	case d < 7:
		p.strong(key)
	case d < 10:
		p.read(key, []int64{40, 120, 350}[w.r.IntN(3)]*simMs)
	case d < 11:
		p.list(key)
	case d < 14: // a herd
		for range 4 {
			p.read(key, 0)
		}
	default:
		p.read(key, 0)
	}
}

// current is the table in use: the agent's, while there is one. Going over to another
// fences, because the old one's lease may have time left that the new one cannot prove.
func (p *simProcess) current() *simTable {
	if t := p.n.table; t != p.view && !t.closed {
		if p.view != nil {
			p.raise()
		}
		p.view = t
	}
	return p.view
}

func (p *simProcess) raise() {
	if !p.n.w.off("fences between tables") {
		p.fence = max(p.fence, p.n.clock())
	}
}

// live returns when the table was proved current, in node clock, and whether that is
// proof enough now.
func (p *simProcess) live(t *simTable) (base int64, ok bool) {
	if t == nil || t.lease == 0 {
		return 0, false
	}
	base, now := t.lease-simLease, p.n.clock()
	return base, (now < t.lease || p.n.w.off("readers check the lease")) && base > p.fence
}

// read is a session read, or with a bound a bounded one.
func (p *simProcess) read(key int, bound int64) {
	n, w := p.n, p.n.w
	t := p.current()
	r := w.newRead(key, p.scope, n.scope)
	r.doubted, r.through = n.doubted[key], true
	life := p.life
	began := n.clock()
	r.answered = func(a simAnswer) {
		if p.life != life {
			return
		}
		if bound > 0 {
			w.tally.bounded++
			a.oldest, a.bounded = max(a.oldest, w.now-bound-bound*2*simDrift/1_000_000), true
			if age := n.clock() - began; a.strong && age > bound {
				return // refused: the answer took too long
			}
		}
		w.oracle.check(n, r, a)
	}
	if base, live := p.live(t); live && (bound == 0 || n.clock()-base <= bound || w.off("bounded reads check the age")) {
		if a, ok := p.local(t, key); ok {
			a.oldest = n.trueTime(base)
			if w.off("readers check the lease") {
				a.oldest = n.trueTime(n.clock() - simLease)
			}
			r.answered(a)
			return
		}
	}
	r.failed = func() {
		if p.life == life && bound == 0 {
			p.withoutOrigin(r, life)
		}
	}
	asked := n.agent(func() {
		if bound > 0 || n.clock() < p.fence+simLease {
			n.strong(r, 1)
		} else {
			n.read(r, 0)
		}
	})
	if !asked {
		r.failed = func() {}
		p.direct(r, life)
	}
}

// local looks into the process tier, then into the table.
func (p *simProcess) local(t *simTable, key int) (simAnswer, bool) {
	slot, c := t.slots[key], p.copies[key]
	a := simAnswer{era: t.incarnation - 100}
	if c.table == t && (c.stamp == slot.stamp || p.n.w.off("stamps of process copies")) {
		p.n.w.tally.processHits++
		a.res, a.how = c.res, "process copy"
		return a, true
	}
	if !slot.held {
		return a, false
	}
	p.n.w.tally.tableHits++
	p.copies[key] = simCopy{t, slot.stamp, slot.res}
	a.res, a.how = slot.res, "table"
	return a, true
}

// withoutOrigin answers with the last value known, marked.
func (p *simProcess) withoutOrigin(r *simRead, life int) {
	w, t := p.n.w, p.view
	w.tally.failed++
	if t == nil || t.closed || !t.slots[r.key].held || t.lease-simLease <= p.fence || t != p.n.table || p.life != life {
		return
	}
	w.tally.stale++
	r.asks[0] = simAsk{p.scope, r.asks[0].era, r.asks[0].from}
	w.oracle.check(p.n, r, simAnswer{res: t.slots[r.key].res, era: t.incarnation - 100, stale: true, how: "last known"})
}

// direct asks the authority because there is no agent. The answer proves nothing later.
func (p *simProcess) direct(r *simRead, life int) {
	w := p.n.w
	r.asks[1], r.through, r.doubted = simAsk{}, false, simDoubt{}
	p.call(life, func() func() {
		asOf, era := w.origin.authoritative("strong reads are answered by the authority"), w.origin.now
		result, at := era.result(r.key, asOf), w.now
		return func() {
			p.raise()
			r.answered(simAnswer{res: result, era: era.number, asOf: asOf, oldest: r.began, how: "direct", strong: true, at: at})
		}
	}, simLong, r.failed)
}

// call is a request from the process itself to the authority.
func (p *simProcess) call(life int, server func() (answer func()), limit int64, failed func()) {
	w, open := p.n.w, true
	end := func(do func()) func() {
		return func() {
			if open && p.life == life {
				open = false
				do()
			}
		}
	}
	w.origin.serve(&p.n.link, func() {
		answer := server()
		w.send(&p.n.link, end(answer))
	})
	w.after(limit, end(failed))
}

func (p *simProcess) strong(key int) {
	n, w := p.n, p.n.w
	p.current()
	r := w.newRead(key, p.scope, n.scope)
	life := p.life
	r.through = true
	r.answered = func(a simAnswer) {
		if p.life == life {
			w.oracle.check(n, r, a)
		}
	}
	r.failed = func() {}
	w.tally.strong++
	if !n.agent(func() { n.strong(r, 1) }) {
		p.direct(r, life)
	}
}

// write goes through the agent, or to the authority when there is none. A write whose
// outcome is unknown is repeated with the same key now and then.
func (p *simProcess) write(op *simOp) {
	n, w, life := p.n, p.n.w, p.life
	agentLife, limit := n.life, w.r.Int64N(w.patience)+10*simMs
	p.current()
	done := func(reply simReply) {
		if w.trace != nil {
			w.logf("process of node %d: op %d acknowledged at %d:%d", n.number, op.number, reply.era+100, reply.position)
		}
		scopes := []*simScope{p.scope}
		if n.life == agentLife {
			scopes = append(scopes, n.scope)
		}
		if p.life == life {
			w.oracle.acked(op, reply, scopes...)
			p.look(op, life)
		} else {
			w.oracle.acked(op, reply, scopes[1:]...)
		}
	}
	failed := func() {
		w.tally.unknown++
		p.look(op, life)
		if p.life == life && w.r.IntN(2) == 0 && w.now < simEnd {
			w.tally.repeated++
			p.write(op)
		}
	}
	asked := n.agent(func() { n.write(op, limit, done, failed) })
	if asked {
		return
	}
	agentLife = -1 // other processes of the node are promised nothing
	p.call(life, func() func() {
		reply := w.origin.write(op)
		return func() {
			p.raise()
			done(reply)
		}
	}, limit, func() { p.raise(); failed() })
}

// look reads what was just written, as clients do.
func (p *simProcess) look(op *simOp, life int) {
	w := p.n.w
	from, to := op.keys()
	key := from + w.r.IntN(to-from)
	w.after(w.r.Int64N(4*simMs), func() {
		if p.life == life && w.now < simEnd {
			p.read(key, 0)
		}
	})
}

// list shows the variables of a session.
func (p *simProcess) list(key int) {
	n, w, life := p.n, p.n.w, p.life
	n.agent(func() {
		node := n.scope
		n.list(key, func(vs []*pb.Variable, era *simEra) {
			for _, v := range vs {
				k, at := simKeyOf(v.GetKey()), v.GetVersion().GetDot().GetPosition()
				if era != w.origin.now {
					continue // the list is of a log that was replaced; nothing is promised
				}
				node.saw(era.number, k, at)
				if p.life == life {
					p.scope.saw(era.number, k, at)
				}
			}
		})
	})
}
