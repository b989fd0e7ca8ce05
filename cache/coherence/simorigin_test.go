package coherence

import (
	"math"
	"slices"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// simKind is what an operation wants.
type simKind uint8

const (
	simPut simKind = iota // creates the session and the variable if need be
	simDelete
	simDeleteSession
	simCreateSession
)

// simOp is one write as its client made it. Copies and repetitions of the request carry
// the same number, which is its idempotency key.
type simOp struct {
	number int
	kind   simKind
	key    int // of a session: its first key
	began  int64
	acked  int64 // 0 = the client does not know
	era    uint64
}

func (w *simWorld) newOp() *simOp {
	op := &simOp{number: len(w.ops) + 1, key: w.pick(), began: w.now}
	switch k := w.r.IntN(100); {
	case k < 20:
		op.kind = simDelete
	case k < 24:
		op.kind = simCreateSession
	case k < 24+w.deletions:
		op.kind = simDeleteSession
	}
	if op.kind >= simDeleteSession {
		op.key -= op.key % simPerSession
		w.tally.sessions++
	}
	w.ops = append(w.ops, op)
	w.tally.writes++
	return op
}

// keys are those the operation concerns.
func (op *simOp) keys() (from, to int) {
	if op.kind >= simDeleteSession {
		return op.key, op.key + simPerSession
	}
	return op.key, op.key + 1
}

// simReply is the authority's answer to a write: the position it has, or 0 when it was
// refused or changed nothing, and then what it saw.
type simReply struct {
	era      uint64
	position uint64
	saw      simState
	at       int64
}

// simState is what a key is from a position on.
type simState struct {
	from   uint64
	op     int  // the write that left a value, 0 = there is none
	exists bool // the session
}

type simRecord struct {
	op     *simOp
	side   bool // the session a put created
	scope  pb.Change_Scope
	key    int
	state  simState // what it leaves behind
	at     int64
	ride   bool
	change *pb.Change
}

// simExecuted is an operation that was made in an era.
type simExecuted struct {
	*simOp
	created bool  // the session, too
	at      int64 // when
}

// simEra is one incarnation of the log.
type simEra struct {
	number    uint64
	log       []simRecord
	keys      [len(simKeys)][]simState
	done      map[int]uint64 // position of every operation in the log
	inherited uint64         // positions it began with
	ended     int64          // when it was replaced
	executed  []simExecuted
	strong    []simStrong
}

func (e *simEra) incarnation() uint64 { return e.number + 100 }
func (e *simEra) head() uint64        { return uint64(len(e.log)) }

// headAt is the head at a time.
func (e *simEra) headAt(t int64) uint64 {
	i, _ := slices.BinarySearchFunc(e.log, t, func(r simRecord, t int64) int {
		if r.at <= t {
			return -1
		}
		return 1
	})
	return uint64(i)
}

// at is what a key was as of a position.
func (e *simEra) at(key int, asOf uint64) simState {
	h := e.keys[key]
	i := len(h) - 1
	for h[i].from > asOf {
		i--
	}
	return h[i]
}

func (e *simEra) version(p uint64) *pb.Version { return versionIn("eu", e.incarnation(), p) }

func (e *simEra) variable(key int, p uint64) *pb.Variable {
	k := simKeys[key]
	return &pb.Variable{Key: &pb.Key{Tenant: k.Tenant, Session: k.Session, Name: k.Name}, Version: e.version(p)}
}

func (e *simEra) result(key int, asOf uint64) *pb.ReadResult {
	s := e.at(key, asOf)
	if s.op == 0 {
		return &pb.ReadResult{SessionExists: s.exists}
	}
	return &pb.ReadResult{Variable: e.variable(key, s.from), SessionExists: true}
}

// change is the feed's view of a position.
func (e *simEra) change(p uint64) *pb.Change {
	r := &e.log[p-1]
	if r.change == nil {
		k := simKeys[r.key]
		r.change = &pb.Change{Scope: r.scope, Key: &pb.Key{Tenant: k.Tenant, Session: k.Session, Name: k.Name},
			Position: p, Deleted: r.state.op == 0 && (r.scope == pb.Change_KEY || !r.state.exists), Version: e.version(p)}
		if r.ride && r.state.op != 0 {
			r.change.Variable = e.variable(r.key, p)
		}
	}
	return r.change
}

// add puts one record at the end of the log.
func (e *simEra) add(r simRecord) {
	p := e.head() + 1
	r.change = nil
	e.log = append(e.log, r)
	from, to := r.key, r.key+1
	if r.scope == pb.Change_SESSION {
		to = from + simPerSession
	}
	for k := from; k < to; k++ {
		s := r.state
		s.from = p
		e.keys[k] = append(e.keys[k], s)
	}
	if r.op != nil && !r.side {
		e.done[r.op.number] = p
	}
}

// simSub is the origin's end of one feed stream.
type simSub struct {
	stream, sent uint64
	selective    bool
	number       uint64 // of the last select taken
	shards       map[uint32]bool
}

// concerns reports whether a change goes into the stream.
func (s *simSub) concerns(c *pb.Change) bool {
	return !s.selective || s.shards[uint32(ShardOf(c.GetKey().GetTenant(), c.GetKey().GetSession()))]
}

// simOrigin is the authority and its replicas.
type simOrigin struct {
	w    *simWorld
	eras []*simEra
	now  *simEra // the present one
	down int64
	kept uint64 // changes above it are kept for the feed
	subs []simSub
	// opened are the streams that were ever opened: one that broke does not come back.
	opened []uint64
}

func newOrigin(w *simWorld) *simOrigin {
	o := &simOrigin{w: w, subs: make([]simSub, w.simSetup.nodes), opened: make([]uint64, w.simSetup.nodes)}
	first := o.open(nil)
	for k := range simKeys {
		if k%simPerSession == 0 {
			first.add(simRecord{scope: pb.Change_SESSION, key: k, at: math.MinInt64, state: simState{exists: true}})
		}
		op := &simOp{number: -k - 1, key: k}
		first.add(simRecord{op: op, key: k, at: math.MinInt64, state: simState{op: op.number, exists: true}})
	}
	first.inherited = first.head()
	return o
}

// open begins an era with the records of an older one.
func (o *simOrigin) open(log []simRecord) *simEra {
	e := &simEra{number: uint64(len(o.eras)), ended: math.MaxInt64, done: map[int]uint64{}}
	for k := range e.keys {
		e.keys[k] = []simState{{}}
	}
	for _, r := range log {
		e.add(r)
	}
	e.inherited = e.head()
	o.eras, o.now = append(o.eras, e), e
	return e
}

// serve runs a request at the authority, unless it is down.
func (o *simOrigin) serve(link *simLink, request func()) {
	o.w.send(link, func() {
		if o.w.now >= o.down {
			request()
		}
	})
}

// disturb lets the authority crash now and then: with its log, or with an older copy.
func (o *simOrigin) disturb() {
	w := o.w
	if !w.faulty() {
		return
	}
	switch w.r.IntN(6) {
	case 0:
		w.tally.restores++
		lost := w.r.IntN(min(len(o.now.log), 6) + 1)
		o.now.ended = w.now
		old := o.now
		o.open(old.log[:len(old.log)-lost])
	case 1:
		w.tally.restarts++
	default:
		return
	}
	o.down = w.now + w.r.Int64N(120*simMs)
	clear(o.subs) // the streams break
	o.kept = o.now.head() - w.r.Uint64N(o.now.head()/2+1)
	if w.trace != nil {
		w.logf("authority restarts as incarnation %d, head %d", o.now.incarnation(), o.now.head())
	}
}

// write executes an operation once, whoever asks how often.
func (o *simOrigin) write(op *simOp) simReply {
	w, e := o.w, o.now
	if p := e.done[op.number]; p != 0 && !w.off("idempotency keys") {
		return simReply{era: e.number, position: p}
	}
	s := e.at(op.key, e.head())
	r := simRecord{op: op, key: op.key, at: w.now, ride: w.r.IntN(100) < w.ride}
	switch {
	case op.kind == simPut:
		if !s.exists {
			from := op.key - op.key%simPerSession
			e.add(simRecord{op: op, side: true, scope: pb.Change_SESSION, key: from, at: w.now, state: simState{exists: true}})
		}
		r.state = simState{op: op.number, exists: true}
	case op.kind == simDelete && s.op != 0:
		r.state = simState{exists: true}
	case op.kind == simDeleteSession && s.exists:
		r.scope = pb.Change_SESSION
	case op.kind == simCreateSession && !s.exists:
		r.scope, r.state = pb.Change_SESSION, simState{exists: true}
	default:
		return simReply{era: e.number, saw: s, at: w.now}
	}
	if e.done[op.number] == 0 {
		e.executed = append(e.executed, simExecuted{op, op.kind == simPut && !s.exists, w.now})
	}
	e.add(r)
	if e.head() > o.kept+w.ring {
		o.kept = e.head() - w.ring
	}
	if w.trace != nil {
		w.logf("authority: op %d kind %d on %s at %d:%d", op.number, op.kind, simKeys[op.key], e.incarnation(), e.head())
	}
	for _, n := range w.nodes {
		if w.r.IntN(4) > 0 {
			o.feed(n)
		}
	}
	return simReply{era: e.number, position: e.head()}
}

// replica answers a fetch as a copy that may be behind, but not below the minimum.
func (o *simOrigin) replica(minimum uint64) (asOf uint64) {
	e := o.now
	asOf = e.head()
	if o.w.lag > 0 {
		asOf = e.headAt(o.w.now - o.w.r.Int64N(o.w.lag))
	}
	return min(max(asOf, minimum), e.head())
}

// authoritative is what strong reads and heartbeats are answered from.
func (o *simOrigin) authoritative(rule string) uint64 {
	if o.w.off(rule) {
		return o.now.headAt(o.w.now - 150*simMs)
	}
	return o.now.head()
}

// feed sends a node the positions it was not sent yet; frames of more than one arise
// because write sometimes leaves a node out.
func (o *simOrigin) feed(n *simNode) {
	sub, e := &o.subs[n.number], o.now
	if sub.stream == 0 || sub.sent >= e.head() {
		return
	}
	if sub.sent < o.kept {
		o.reset(n, sub)
		return
	}
	c := &pb.Changes{Previous: sub.sent, Through: e.head()}
	for p := sub.sent + 1; p <= e.head(); p++ {
		if x := e.change(p); sub.concerns(x) {
			c.Changes = append(c.Changes, x)
		}
	}
	if len(c.Changes) == 0 && o.w.r.IntN(2) == 0 {
		return // nothing for this node: it hears of it before a heartbeat's answer
	}
	sub.sent = e.head()
	o.push(n, sub.stream, &pb.FeedFrame{Kind: &pb.FeedFrame_Changes{Changes: c}})
}

func (o *simOrigin) reset(n *simNode, sub *simSub) {
	sub.sent = o.now.head()
	o.push(n, sub.stream, &pb.FeedFrame{Kind: &pb.FeedFrame_Reset_{Reset_: &pb.Reset{From: sub.sent}}})
}

func (o *simOrigin) push(n *simNode, stream uint64, f *pb.FeedFrame) {
	f.Incarnation, f.Region, f.Selective = o.now.incarnation(), "eu", o.subs[n.number].selective
	n.receive(func() { n.frame(stream, f) })
}

// subscribe is the origin's side of a new stream.
func (o *simOrigin) subscribe(n *simNode, s Subscribe) {
	sub := &o.subs[n.number]
	if o.opened[n.number] >= s.Stream {
		return // a copy, or late
	}
	o.opened[n.number] = s.Stream
	*sub = simSub{stream: s.Stream, sent: s.From, selective: !o.w.whole, number: s.Number, shards: map[uint32]bool{}}
	for _, x := range s.Shards {
		sub.shards[x] = true
	}
	if s.Incarnation != o.now.incarnation() || s.From > o.now.head() || s.From < o.kept {
		o.reset(n, sub)
		o.selected(n, sub)
		return
	}
	o.selected(n, sub)
	o.push(n, s.Stream, &pb.FeedFrame{Kind: &pb.FeedFrame_Changes{Changes: &pb.Changes{Previous: s.From, Through: s.From}}})
	o.feed(n)
}

// choose takes a select, and ignores those that are overtaken.
func (o *simOrigin) choose(n *simNode, s Select) {
	sub := &o.subs[n.number]
	if sub.stream != s.Stream || s.Number <= sub.number {
		return
	}
	sub.number = s.Number
	for _, x := range s.Remove {
		delete(sub.shards, x)
	}
	for _, x := range s.Add {
		sub.shards[x] = true
	}
	o.selected(n, sub)
}

func (o *simOrigin) selected(n *simNode, sub *simSub) {
	if sub.selective {
		o.push(n, sub.stream, &pb.FeedFrame{Kind: &pb.FeedFrame_Selected{Selected: &pb.Selected{Number: sub.number, Position: sub.sent}}})
	}
}

func (o *simOrigin) heartbeat(n *simNode, stream uint64, sent uint64) {
	if o.subs[n.number].stream != stream {
		return
	}
	if o.w.r.IntN(2) == 0 {
		o.feed(n)
	}
	o.push(n, stream, &pb.FeedFrame{Kind: &pb.FeedFrame_Ack{Ack: &pb.HeartbeatAck{Sent: sent, Head: o.authoritative("heartbeats are answered with the true head")}}})
}

// changes answers a range fetch; nil = no longer kept.
func (o *simOrigin) changes(f FetchRange) *pb.ChangesResponse {
	e := o.now
	if f.Incarnation != e.incarnation() || f.From < o.kept || f.From > e.head() {
		return nil
	}
	resp := &pb.ChangesResponse{CompleteTo: min(f.To, e.head(), f.From+7)}
	for p := f.From + 1; p <= resp.CompleteTo; p++ {
		resp.Changes = append(resp.Changes, e.change(p))
	}
	return resp
}

// listed are the variables of a session as a list shows them.
func (o *simOrigin) listed(key int) (out []*pb.Variable) {
	from := key - key%simPerSession
	for k := from; k < from+simPerSession; k++ {
		if s := o.now.at(k, o.now.head()); s.op != 0 {
			out = append(out, o.now.variable(k, s.from))
		}
	}
	return out
}

func simKeyOf(k *pb.Key) int {
	return simIDs[outrigger.Key{Tenant: k.GetTenant(), Session: k.GetSession(), Name: k.GetName()}.String()]
}
