package coherence

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/anishathalye/porcupine"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// What the oracle, which knows the log, demands of every run:
//
//	stale         an answer was current at some time after the one claimed for it: the sending
//	              of the heartbeat behind a lease, the sending of a fetch (less the lag
//	              allowed to replicas); never more than a lease before it was asked for
//	bounded       bounded(d): current at most d before the answer
//	session       nothing older than was shown or acknowledged before to the same process,
//	              through the same agent, or to the same token: monotonic reads and
//	              read-your-writes. Marked answers keep this too
//	resurrected   the same, where what came back had been deleted
//	outcome       reads through an agent that was told of a write with an unknown outcome, or
//	              of a changed session, see it if it was made by then (less the lag)
//	incarnation   nobody goes back to a log that was replaced, and none is served longer
//	              than a lease after
//	linearizable  strong reads and writes have one order per key (porcupine); an unknown
//	              outcome may take effect at any time later
//	stampede      one fetch per key and node at a time
//	convergence   after the faults every table equals the log, is fresh, and nobody waits
//	liveness      every read is answered once; the events end
type simViolation struct {
	kind, text string
	at         int64
}

func (v *simViolation) String() string {
	return fmt.Sprintf("%s, at %.3f ms: %s", v.kind, float64(v.at)/float64(simMs), v.text)
}

type simOracle struct {
	w     *simWorld
	found *simViolation
}

func (o *simOracle) fail(kind, format string, args ...any) {
	if o.found == nil {
		o.found = &simViolation{kind, fmt.Sprintf(format, args...), o.w.now}
	}
}

// check judges one answer.
func (o *simOracle) check(n *simNode, r *simRead, a simAnswer) {
	w := o.w
	o.w.tally.checked++
	if w.trace != nil {
		w.logf("node %d: %s of %s answers %s of incarnation %d", n.number, a.how, simKeys[r.key], showResult(a.res), a.era+100)
	}
	if a.era >= uint64(len(w.origin.eras)) {
		o.fail("incarnation", "node %d: %s of %s from a log that never was", n.number, a.how, simKeys[r.key])
		return
	}
	era := w.origin.eras[a.era]
	for _, ask := range r.asks {
		if ask.scope != nil && ask.era > a.era {
			o.fail("incarnation", "node %d: %s of %s from incarnation %d after %d was seen", n.number, a.how, simKeys[r.key], a.era+100, ask.era+100)
			return
		}
	}
	if !a.stale {
		o.fresh(n, r, a, era)
	}
	// The scopes it was asked in.
	from := uint64(0)
	for _, ask := range r.asks {
		if ask.scope != nil && ask.era == a.era {
			from = max(from, ask.from)
		}
	}
	credited, ok := era.match(r.key, a.res, from)
	if !ok {
		kind := "session"
		if era.revived(r.key, a.res, from) {
			kind = "resurrected"
		}
		o.fail(kind, "node %d: %s of %s gave %s, over by position %d, which had been seen", n.number, a.how, simKeys[r.key], showResult(a.res), from)
		return
	}
	for _, ask := range r.asks {
		if ask.scope != nil {
			ask.scope.saw(a.era, r.key, credited)
		}
	}
	if a.strong {
		era.strong = append(era.strong, simStrong{r.key, r.began, w.now, a.at, era.register(r.key, a.res, a.asOf)})
	}
}

// fresh checks what is promised about time.
func (o *simOracle) fresh(n *simNode, r *simRead, a simAnswer, era *simEra) {
	kind, oldest := "stale", a.oldest
	if r.through {
		if least := r.began - simLease - simLease*2*simDrift/1_000_000 - o.w.lag - simMs; least > oldest {
			oldest = least
		}
		if d := r.doubted; d.position > 0 && d.era == a.era {
			if from := min(d.position, era.headAt(d.at-o.w.lag)); !era.matches(r.key, a.res, from) {
				o.fail("outcome", "node %d: %s of %s gave %s, over by position %d; the outcome of that was reported %.1f ms before the read", n.number, a.how,
					simKeys[r.key], showResult(a.res), from, float64(r.began-d.at)/float64(simMs))
			}
		}
	}
	if oldest >= era.ended {
		o.fail("incarnation", "node %d: %s of %s from a log replaced %.1f ms before what was promised", n.number, a.how, simKeys[r.key],
			float64(oldest-era.ended)/float64(simMs))
		return
	}
	if from := era.headAt(oldest); !era.matches(r.key, a.res, from) {
		if a.bounded {
			kind = "bounded"
		}
		o.fail(kind, "node %d: %s of %s gave %s, over by position %d, %.1f ms ago", n.number, a.how, simKeys[r.key], showResult(a.res), from,
			float64(o.w.now-oldest)/float64(simMs))
	}
}

func (e *simEra) matches(key int, res *pb.ReadResult, from uint64) bool {
	_, ok := e.match(key, res, from)
	return ok
}

// shows reports whether a reader would see a state as res.
func (s simState) shows(res *pb.ReadResult) bool {
	if v := res.GetVariable(); v != nil {
		return s.op != 0 && v.GetVersion().GetDot().GetPosition() == s.from
	}
	return s.op == 0 && s.exists == res.GetSessionExists()
}

// match finds the earliest state that looks like res and held at a position ≥ from.
func (e *simEra) match(key int, res *pb.ReadResult, from uint64) (position uint64, ok bool) {
	h, end := e.keys[key], uint64(math.MaxUint64)
	for i := len(h) - 1; i >= 0 && end > from; i-- {
		if h[i].shows(res) {
			position, ok = h[i].from, true
		}
		end = h[i].from
	}
	return position, ok
}

// revived reports whether a value was deleted at a position ≤ from.
func (e *simEra) revived(key int, res *pb.ReadResult, from uint64) bool {
	if res.GetVariable() == nil {
		return false
	}
	for _, s := range e.keys[key] {
		if s.op == 0 && s.from <= from && s.from > res.GetVariable().GetVersion().GetDot().GetPosition() {
			return true
		}
	}
	return false
}

func showResult(r *pb.ReadResult) string {
	switch {
	case r.GetVariable() != nil:
		return fmt.Sprintf("the write at %d", r.GetVariable().GetVersion().GetDot().GetPosition())
	case r.GetSessionExists():
		return "no variable"
	}
	return "no session"
}

// acked notes that a client heard that its write was made.
func (o *simOracle) acked(op *simOp, reply simReply, scopes ...*simScope) {
	o.w.tally.acked++
	era := o.w.origin.eras[reply.era]
	if reply.position == 0 {
		era.strong = append(era.strong, simStrong{op.key, op.began, o.w.now, reply.at, era.register(op.key, nil, reply.saw.from)})
		return
	}
	if op.acked == 0 {
		op.acked, op.era = o.w.now, reply.era
	}
	if op.kind >= simDeleteSession {
		return // the answer tells no position; see "outcome"
	}
	for _, s := range scopes {
		s.saw(reply.era, op.key, reply.position)
	}
}

// settled checks that the faults left no trace.
func (o *simOracle) settled() {
	now := o.w.origin.now
	for _, n := range o.w.nodes {
		_, incarnation, applied := n.s.Position()
		st := n.s.Stats()
		switch {
		case incarnation != now.incarnation() || applied != now.head():
			o.fail("convergence", "node %d ends at %d:%d, the log at %d:%d", n.number, incarnation, applied, now.incarnation(), now.head())
		case n.table.lease < n.clock()-(o.w.now-simEnd):
			o.fail("convergence", "node %d has no lease at the end", n.number)
		case st.Flights != 0 || st.Waiting != 0 || len(n.waiting) != 0:
			o.fail("liveness", "node %d: %d fetches, %d waiters, %d readers are left", n.number, st.Flights, st.Waiting, len(n.waiting))
		case st.Repaired != 0:
			o.fail("convergence", "node %d repaired %d entries that nothing should have broken", n.number, st.Repaired)
		}
		for k, slot := range n.table.slots {
			if slot.held && !now.matches(k, slot.res, now.head()) {
				o.fail("convergence", "node %d ends with %s for %s", n.number, showResult(slot.res), simKeys[k])
			}
		}
	}
}

// simStrong is a strong read that was answered, or a refused write, which reads.
type simStrong struct {
	key              int
	began, ended, at int64 // asked, answered, and in between served
	saw              simRegister
}

// simRegister is the sequential specification of one key: a register that holds a value
// or nothing, in a session that exists or does not, with the operation that made it so.
// Readers see that of a value by its version; that of "nothing" they are told here by
// the position they read at, which spares porcupine trying all deletions for each.
type simRegister struct {
	by           int // 0 = the state the log began with
	held, exists bool
}

// simAction is an operation of a history: a write, or a read of a state.
type simAction struct {
	read  bool
	kind  simKind
	by    int
	first simRegister // of the action that sets the beginning
}

var simModel = porcupine.Model{
	Init: func() any { return simRegister{} },
	Step: func(state, input, output any) (bool, any) {
		s, in := state.(simRegister), input.(simAction)
		switch {
		case in.read:
			return output.(simRegister) == s, s
		case in.by == 0:
			return true, in.first
		case in.kind == simPut:
			return true, simRegister{in.by, true, true}
		case in.kind == simDelete && s.held:
			return true, simRegister{in.by, false, true}
		case in.kind == simDeleteSession && s.exists:
			return true, simRegister{in.by, false, false}
		case in.kind == simCreateSession && !s.exists:
			return true, simRegister{in.by, false, true}
		}
		return true, s // nothing to do
	},
	Equal: func(a, b any) bool { return a.(simRegister) == b.(simRegister) },
}

// register is how an answer as of a position is seen.
func (e *simEra) register(key int, res *pb.ReadResult, asOf uint64) simRegister {
	s := e.at(key, asOf)
	r := simRegister{held: s.op != 0, exists: s.exists}
	if res != nil {
		r.held, r.exists = res.GetVariable() != nil, res.GetSessionExists()
		if r.held {
			s = e.at(key, res.GetVariable().GetVersion().GetDot().GetPosition())
		}
	}
	if s.from > e.inherited {
		r.by = e.log[s.from-1].op.number
	}
	return r
}

// linearizable hands the history of every incarnation and key to porcupine.
func (o *simOracle) linearizable() {
	for _, e := range o.w.origin.eras {
		for k := range simKeys {
			if len(e.strong) > 0 && !porcupine.CheckOperations(simModel, e.history(k)) {
				o.fail("linearizable", "incarnation %d: no order explains the strong reads of %s", e.incarnation(), simKeys[k])
			}
		}
	}
}

// The search is exponential in what overlaps, so a history is made narrower by what the
// simulation knows: an operation begins at most simWindow before the authority served
// it and ends at most that much after, and of the unknown outcomes only the first few may
// take effect at any later time. The authority's own order stays possible, so a right
// history stays right.
const (
	maxPendingOps = 4
	simWindow     = 15 * simMs
)

func window(began, served, ended int64) (call, ret int64) {
	return max(began, served-simWindow), min(ended, served+simWindow)
}

// history lists what happened to one key in one incarnation. It begins with a write of
// what the log already held.
func (e *simEra) history(key int) []porcupine.Operation {
	h := []porcupine.Operation{{Input: simAction{first: e.register(key, nil, e.inherited)}}}
	pending := 0
	for _, op := range e.executed {
		kind := op.kind
		if from, to := op.keys(); key < from || key >= to {
			if !op.created || key/simPerSession != op.key/simPerSession {
				continue
			}
			kind = simCreateSession // to its neighbours
		}
		o := porcupine.Operation{Input: simAction{kind: kind, by: op.number}}
		o.Call, o.Return = window(op.began, op.at, op.acked)
		if op.acked == 0 || op.era != e.number {
			o.Return = op.at
			if pending++; pending <= maxPendingOps {
				o.Return = math.MaxInt64
			}
		}
		h = append(h, o)
	}
	return e.appendReads(h, key)
}

// appendReads adds the strong reads of a key, without those that another one implies:
// whatever place explains a read explains one of the same state that lasted longer on
// both sides.
func (e *simEra) appendReads(h []porcupine.Operation, key int) []porcupine.Operation {
	var reads []simStrong
	for _, s := range e.strong {
		if s.key == key {
			s.began, s.ended = window(s.began, s.at, s.ended)
			reads = append(reads, s)
		}
	}
	slices.SortStableFunc(reads, func(a, b simStrong) int {
		return cmp.Or(cmp.Compare(a.ended, b.ended), cmp.Compare(b.began, a.began))
	})
	latest := map[simRegister]int64{} // beginning among those that ended earlier
	for _, s := range reads {
		if began, ok := latest[s.saw]; ok && began >= s.began {
			continue
		}
		latest[s.saw] = s.began
		h = append(h, porcupine.Operation{Input: simAction{read: true}, Output: s.saw, Call: s.began, Return: s.ended})
	}
	return h
}
