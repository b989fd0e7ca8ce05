package coherence

import (
	"slices"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Shards is the number of parts the sessions of a log are divided into for its feed. It
// is part of the protocol: see Select in coherence.proto.
const Shards = 4096

// ShardOf returns the shard of a session of a tenant ("" = default), from 0 to Shards-1.
func ShardOf(tenant, session string) int {
	if tenant == "" {
		tenant = outrigger.DefaultTenant
	}
	return int(hash(hash(hash(fnvBasis, tenant), "/"), session) % Shards)
}

const (
	// maxEarly bounds the answers that wait for their shard to be selected.
	maxEarly = 256
	// selectPatience is how long a Select stays unanswered before its shards are asked for
	// again. The transport loses nothing, so this is for a peer that does.
	selectPatience = 500_000_000
)

// Select is an output: ask the stream for more shards, and for others no longer.
// Answered by a frame with selected. At most one is unanswered at a time.
type Select struct {
	Stream, Number uint64
	Add, Remove    []uint32
}

func (Select) output() {}

// selection is what is known of the shards of the feed. Of a shard that is not active
// nothing is held: its changes need not be in the stream.
type selection struct {
	stream feedKind
	from   uint64 // the stream subscribed from there

	state       [Shards]shardState
	floor       [Shards]uint64 // of an active shard: nothing older may be held
	used        [Shards]int64  // when somebody last wanted it
	incarnation uint64         // that floor is of
	active      int
	swept       int64 // when idle shards were last looked for

	wanted, unwanted []uint32 // for the next Select
	asked            []uint32 // in the unanswered one
	askedAt          int64    // 0 = all are answered
	number           uint64

	early []earlyAnswer
}

type feedKind uint8

const (
	unheard   feedKind = iota // no frame has come yet
	selective                 // it carries the selected shards
	whole                     // it carries everything: its server does not know shards
)

type shardState uint8

const (
	inactive shardState = iota
	pending             // wanted or asked
	active
)

// earlyAnswer is one that came before its shard was selected.
type earlyAnswer struct {
	key    outrigger.Key
	shard  int
	result *pb.ReadResult
	asOf   uint64
	issued int64
}

// want notes that a shard is used, and asks for it if need be.
func (s *State) want(key outrigger.Key, now int64) {
	x := ShardOf(key.Tenant, key.Session)
	l := &s.selection
	l.used[x] = now
	switch {
	case l.state[x] != inactive:
	case l.stream == whole:
		s.activate(x, l.from)
	default:
		l.state[x] = pending
		l.wanted = append(l.wanted, uint32(x))
	}
}

// activate makes a shard one whose every change after position is in the stream.
func (s *State) activate(x int, position uint64) {
	l := &s.selection
	if l.state[x] != active {
		l.active++
	}
	l.state[x], l.floor[x] = active, position
}

// mayHold reports whether something current as of a position may be held for e: the
// stream carries its shard from there on. If it only is too old for that, the key's floor
// says so from then on.
func (s *State) mayHold(e *entry, at uint64) bool {
	l, x := &s.selection, s.shardOf(e)
	if l.state[x] != active {
		return false
	}
	if at < l.floor[x] {
		e.floor = max(e.floor, l.floor[x])
		return false
	}
	return true
}

// heardOf reports whether the stream carries the changes of e, so that a fetch that is
// older than one of them is noticed.
func (s *State) heardOf(e *entry) bool { return s.selection.state[s.shardOf(e)] == active }

// raiseToShard raises e's floor to where its shard begins: what changed before was not
// heard of, and readers may have joined a fetch since in the belief that it would be.
func (s *State) raiseToShard(e *entry) {
	if s.heardOf(e) {
		e.floor = max(e.floor, s.selection.floor[s.shardOf(e)])
	}
}

func (s *State) shardOf(e *entry) int {
	of := s.sessions.at(e.session)
	return ShardOf(of.tenant, of.id)
}

// putAside keeps an answer whose readers have it until its shard is selected. It was
// asked for after whatever was in doubt; what comes into doubt from here on marks the key
// again.
func (s *State) putAside(e *entry, in Filled, issued int64) {
	l, x := &s.selection, s.shardOf(e)
	if l.state[x] != pending {
		return
	}
	e.setUnasked(false)
	l.early = slices.DeleteFunc(l.early, func(a earlyAnswer) bool { return a.key == in.Key })
	l.early = append(l.early, earlyAnswer{in.Key, x, in.Result, in.AsOf, issued})
	if len(l.early) > maxEarly {
		l.early = slices.Delete(l.early, 0, 1)
	}
}

// holds reports whether an early answer is as new as all that is known of its key.
func (s *State) holds(e *entry, a earlyAnswer) bool {
	return e.held() == nothing && !e.unasked() && a.asOf >= e.floor && s.coversForeign(a.key, a.result.GetVariable().GetVersion())
}

// answerEarly answers a reader from an early answer, for as long as the answer by itself
// proves that it is current enough (see State.current).
func (s *State) answerEarly(e *entry, in Read, now int64) bool {
	i := slices.IndexFunc(s.selection.early, func(a earlyAnswer) bool { return a.key == in.Key })
	if i < 0 {
		return false
	}
	a := s.selection.early[i]
	if !s.holds(e, a) || a.asOf < in.Min || a.issued > now || now-a.issued >= s.opt.Lease {
		return false
	}
	s.stats.Hits++
	s.emit(Answer{Key: a.key, Waiters: []Waiter{in.Waiter}, Result: a.result, AsOf: a.asOf, Incarnation: s.incarnation, Issued: a.issued})
	return true
}

// storeEarly stores what waited for shards that are active now, unless something has
// happened to the key since.
func (s *State) storeEarly(now int64) {
	l := &s.selection
	early := l.early
	l.early = nil
	for _, a := range early {
		if l.state[a.shard] == pending {
			l.early = append(l.early, a)
		} else if e := s.find(a.key); e != nil && s.holds(e, a) {
			s.install(e, a.result.GetVariable(), a.result.GetSessionExists(), a.asOf, now)
		}
	}
}

// subscription begins the selection of a new stream: what is active goes on without a
// break, because the stream continues where the last one was left, and the rest is asked
// for with it.
func (s *State) subscription(now int64) (number uint64, add []uint32) {
	l := &s.selection
	l.stream, l.from = unheard, s.applied
	l.asked = append(l.asked, l.wanted...)
	l.wanted, l.unwanted = nil, nil
	for x, st := range l.state {
		if st != inactive {
			add = append(add, uint32(x))
		}
	}
	l.number++
	l.askedAt = now
	return l.number, add
}

// heard learns from a frame what kind of stream it came on.
func (s *State) heard(f *pb.FeedFrame, now int64) {
	l := &s.selection
	if l.stream != unheard {
		return
	}
	if l.stream = selective; f.GetSelective() {
		return
	}
	l.stream = whole
	for x, st := range l.state {
		if st == pending {
			s.activate(x, l.from)
		}
	}
	l.wanted, l.unwanted, l.asked, l.askedAt = nil, nil, nil, 0
	s.storeEarly(now)
}

// selected takes the answer to a Select.
func (s *State) selected(in *pb.Selected, now int64) {
	l := &s.selection
	if l.askedAt == 0 || in.GetNumber() != l.number {
		return // a copy, or the answer to one that was given up
	}
	for _, x := range l.asked {
		if l.state[x] == pending {
			s.activate(int(x), in.GetPosition())
		}
	}
	l.asked, l.askedAt = nil, 0
	s.storeEarly(now)
}

// selectMore asks for what is wanted by now.
func (s *State) selectMore(now int64) {
	l := &s.selection
	if len(l.wanted)+len(l.unwanted) == 0 || l.askedAt != 0 || l.stream != selective || s.stream == 0 {
		return
	}
	l.number++
	l.asked, l.askedAt = l.wanted, now
	// One that is wanted again by now is not taken out.
	remove := slices.DeleteFunc(l.unwanted, func(x uint32) bool { return l.state[x] != inactive })
	l.wanted, l.unwanted = nil, nil
	s.emit(Select{Stream: s.stream, Number: l.number, Add: slices.Clone(l.asked), Remove: remove})
}

// tickShards gives up what is not answered and takes out what is not used.
func (s *State) tickShards(now int64) {
	l := &s.selection
	if l.askedAt != 0 && now-l.askedAt >= selectPatience {
		l.wanted, l.asked, l.askedAt = append(l.wanted, l.asked...), nil, 0
	}
	if now-l.swept < s.opt.ShardIdle/8 {
		return
	}
	l.swept = now
	idle := map[int]bool{}
	for x, st := range l.state {
		if st == active && now-l.used[x] >= s.opt.ShardIdle {
			idle[x] = true
		}
	}
	if len(idle) == 0 {
		return
	}
	for e := range s.flights {
		x := s.shardOf(e)
		l.used[x] = now
		delete(idle, x)
	}
	for e := range s.all() {
		if idle[s.shardOf(e)] {
			s.evict(e)
		}
	}
	for x := range l.state {
		if idle[x] {
			l.state[x] = inactive
			l.active--
			l.unwanted = append(l.unwanted, uint32(x))
		}
	}
}

// flushShards forgets floors of a log that was left, and answers that wait.
func (s *State) flushShards() {
	l := &s.selection
	l.early = nil
	if l.incarnation != s.incarnation {
		l.incarnation = s.incarnation
		clear(l.floor[:])
	}
}
