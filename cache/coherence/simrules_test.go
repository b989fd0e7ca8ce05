package coherence

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// simRule is one rule of the protocol, as what remains without it: step stands in for
// State.Step, or is nil when the rule belongs to another part of the simulation, which
// asks simWorld.off by name.
type simRule struct {
	name string
	step func(s *State, in Input, now int64, step stepper) []Output
	// focus turns the set-up to where a rule that is seldom needed is needed more often;
	// nil = as TestSimulation draws it.
	focus func(*simSetup)
}

type stepper = func(Input, int64) []Output

// simRules are the rules that keep the protocol right, each with how it is broken.
var simRules = []simRule{
	{name: "floors rise with changes", step: withoutFloors},
	{name: "fills below the floor are refused", step: func(s *State, in Input, now int64, step stepper) []Output {
		if f, ok := in.(Filled); ok {
			if e := s.find(f.Key); e != nil && s.flights[e] != nil && f.Incarnation == s.incarnation {
				f.AsOf = max(f.AsOf, e.floor)
			}
			in = f
		}
		return step(in, now)
	}},
	{name: "gaps are noticed", step: withChanges(func(s *State, c *pb.Changes) { c.Previous = min(c.Previous, s.applied) })},
	{name: "gaps are closed", step: func(_ *State, in Input, now int64, step stepper) []Output {
		return slices.DeleteFunc(slices.Clone(step(in, now)), func(o Output) bool { _, ok := o.(FetchRange); return ok })
	}},
	{name: "changes that are no longer kept cost a flush", step: func(s *State, in Input, now int64, step stepper) []Output {
		if f, ok := in.(RangeFailed); ok && f.Gone {
			in = RangeArrived{f.Range, &pb.ChangesResponse{CompleteTo: s.seen}}
		}
		return step(in, now)
	}},
	{name: "a reset costs a flush", step: func(s *State, in Input, now int64, step stepper) []Output {
		if f, ok := in.(Frame); ok && f.Frame.GetReset_() != nil && f.Frame.GetIncarnation() == s.incarnation {
			f.Frame = &pb.FeedFrame{Incarnation: f.Frame.GetIncarnation(), Region: f.Frame.GetRegion(), Kind: &pb.FeedFrame_Changes{
				Changes: &pb.Changes{Previous: s.applied, Through: max(s.applied, f.Frame.GetReset_().GetFrom())}}}
			in = f
		}
		return step(in, now)
	}},
	{name: "the lease counts from the sending", step: withAck(func(_ *State, a *pb.HeartbeatAck, now int64) { a.Sent = uint64(now) })},
	{name: "the lease waits for the head", step: withAck(func(s *State, a *pb.HeartbeatAck, _ int64) { a.Head = min(a.Head, s.applied) })},
	{name: "heartbeats are answered with the true head"},
	{name: "a new incarnation costs a flush", step: func(s *State, in Input, now int64, step stepper) []Output {
		if i := incarnationOf(in); i != 0 && i != s.incarnation && s.incarnation != 0 && i > s.incarnation {
			s.incarnation, s.streamOf = i, 0
		}
		return step(in, now)
	}},
	{name: "late answers of older logs", step: func(s *State, in Input, now int64, step stepper) []Output {
		s.adopted = 0
		return step(in, now)
	}},
	{name: "a deletion leaves a floor", step: withoutTombstones},
	{name: "changes of sessions reach their keys", step: withChanges(func(_ *State, c *pb.Changes) {
		c.Changes = slices.DeleteFunc(c.Changes, func(c *pb.Change) bool { return c.GetScope() == pb.Change_SESSION })
	})},
	{name: "old changes are recognised", step: withOldChanges},
	{name: "one fetch per key", step: withStampede},
	{name: "late readers wait for the next fetch", step: func(s *State, in Input, now int64, step stepper) []Output {
		out := step(in, now)
		if r, ok := in.(Read); ok {
			if e := s.find(r.Key); e != nil && s.flights[e] != nil {
				f := s.flights[e]
				f.waiters, f.late = append(f.waiters, f.late...), nil
			}
		}
		return out
	}, focus: func(s *simSetup) { s.slow, s.slowest, s.lag, s.hot = 40, 560*simMs, 0, 70 }},
	{name: "acknowledged writes are visible before the reply", step: without[Wrote]},
	{name: "an unknown outcome raises the floor", step: without[WriteUnknown]},
	{name: "a session changed here raises its floors", step: without[SessionChanged]},
	{name: "a doubt repeats the fetches under way", step: func(s *State, in Input, now int64, step stepper) []Output {
		switch in.(type) {
		case WriteUnknown, SessionChanged:
		default:
			return step(in, now)
		}
		numbers := map[*flight]uint64{}
		for _, f := range s.flights {
			numbers[f] = f.number
		}
		out := step(in, now)
		for f, n := range numbers {
			f.number = n
		}
		return slices.DeleteFunc(slices.Clone(out), func(o Output) bool { _, ok := o.(Fetch); return ok })
	}},
	{name: "a doubt holds until it is asked", step: func(s *State, in Input, now int64, step stepper) []Output {
		s.voided = 0
		for e := range s.all() {
			e.setUnasked(false)
		}
		return step(in, now)
	}, focus: func(s *simSetup) { s.slow, s.slowest, s.lag, s.hot, s.deletions = 40, 60*simMs, 0, 70, 30 }},
	{name: "what is evicted leaves its floor", step: func(s *State, in Input, now int64, step stepper) []Output {
		switch in.(type) {
		case Tick, Read:
		default:
			return step(in, now)
		}
		evicted, floors := s.stats.Evicted, slices.Clone(s.byKey)
		out := step(in, now)
		if s.stats.Evicted != evicted {
			copy(s.byKey, floors)
		}
		return out
	}},
	{name: "strong reads move the table", step: without[Offered]},
	{name: "lists move the table", step: without[Observed]},
	{name: "tokens are minimums", step: func(_ *State, in Input, now int64, step stepper) []Output {
		if r, ok := in.(Read); ok {
			r.Min = 0
			in = r
		}
		return step(in, now)
	}},
	{name: "hold only what is selected", step: func(s *State, in Input, now int64, step stepper) []Output {
		for x := range s.selection.state {
			if s.selection.state[x] == pending {
				s.selection.state[x] = active
			}
		}
		return step(in, now)
	}},
	{name: "hold only from the position selected", step: func(s *State, in Input, now int64, step stepper) []Output {
		clear(s.selection.floor[:])
		return step(in, now)
	}},
	{name: "what leaves the selection leaves the table", step: func(s *State, in Input, now int64, step stepper) []Output {
		if _, ok := in.(Tick); ok {
			idle := s.opt.ShardIdle
			for x, st := range s.selection.state {
				if st == active && now-s.selection.used[x] >= idle {
					s.selection.state[x] = inactive
					s.selection.unwanted = append(s.selection.unwanted, uint32(x))
				}
			}
		}
		return step(in, now)
	}, focus: func(s *simSetup) { s.options.ShardIdle, s.whole = 100*simMs, false }},
	{name: "strong reads are answered by the authority"},
	{name: "idempotency keys"},
	{name: "stamps of process copies"},
	{name: "readers check the lease"},
	{name: "bounded reads check the age"},
	{name: "fences between tables"},
}

// without drops an input.
func without[T Input](_ *State, in Input, now int64, step stepper) []Output {
	if _, ok := in.(T); ok {
		return nil
	}
	return step(in, now)
}

// withChanges alters the changes that arrive, by feed or by range. What arrives is
// shared, so a copy is altered.
func withChanges(alter func(*State, *pb.Changes)) func(*State, Input, int64, stepper) []Output {
	return func(s *State, in Input, now int64, step stepper) []Output {
		switch x := in.(type) {
		case Frame:
			if c := x.Frame.GetChanges(); c != nil {
				c = &pb.Changes{Previous: c.GetPrevious(), Through: c.GetThrough(), Changes: slices.Clone(c.GetChanges())}
				alter(s, c)
				x.Frame = &pb.FeedFrame{Incarnation: x.Frame.GetIncarnation(), Region: x.Frame.GetRegion(), Kind: &pb.FeedFrame_Changes{Changes: c}}
				in = x
			}
		case RangeArrived:
			c := &pb.Changes{Changes: slices.Clone(x.Response.GetChanges())}
			alter(s, c)
			in = RangeArrived{x.Range, &pb.ChangesResponse{CompleteTo: x.Response.GetCompleteTo(), Changes: c.Changes}}
		}
		return step(in, now)
	}
}

// withAck alters the acknowledgements of heartbeats.
func withAck(alter func(s *State, a *pb.HeartbeatAck, now int64)) func(*State, Input, int64, stepper) []Output {
	return func(s *State, in Input, now int64, step stepper) []Output {
		if f, ok := in.(Frame); ok && f.Frame.GetAck() != nil {
			a := &pb.HeartbeatAck{Sent: f.Frame.GetAck().GetSent(), Head: f.Frame.GetAck().GetHead()}
			alter(s, a, now)
			f.Frame = &pb.FeedFrame{Incarnation: f.Frame.GetIncarnation(), Region: f.Frame.GetRegion(), Kind: &pb.FeedFrame_Ack{Ack: a}}
			in = f
		}
		return step(in, now)
	}
}

func changesOf(in Input) []*pb.Change {
	switch x := in.(type) {
	case Frame:
		return x.Frame.GetChanges().GetChanges()
	case RangeArrived:
		return x.Response.GetChanges()
	}
	return nil
}

func incarnationOf(in Input) uint64 {
	switch x := in.(type) {
	case Frame:
		return x.Frame.GetIncarnation()
	case Filled:
		return x.Incarnation
	case Offered:
		return x.Incarnation
	case Wrote:
		return dotOf(x.Version).Incarnation
	case Observed:
		return dotOf(x.Variable.GetVersion()).Incarnation
	}
	return 0
}

// withoutFloors makes a change delete what is held and leave nothing behind.
func withoutFloors(s *State, in Input, now int64, step stepper) []Output {
	if len(changesOf(in)) == 0 {
		return step(in, now)
	}
	global, byKey, bySession := s.global, slices.Clone(s.byKey), slices.Clone(s.bySession)
	floors := map[*entry]uint64{}
	for e := range s.all() {
		floors[e] = e.floor
	}
	incarnation := s.incarnation
	out := step(in, now)
	if s.incarnation != incarnation {
		return out // another rule's business
	}
	s.global = global
	copy(s.byKey, byKey)
	copy(s.bySession, bySession)
	for e := range s.all() {
		e.floor = floors[e]
	}
	return out
}

// withoutTombstones forgets the floor of what was deleted, and that it was.
func withoutTombstones(s *State, in Input, now int64, step stepper) []Output {
	var deleted []outrigger.Key
	for _, c := range changesOf(in) {
		if c.GetDeleted() && c.GetScope() == pb.Change_KEY {
			deleted = append(deleted, keyOf(c.GetKey()))
		}
	}
	if w, ok := in.(Wrote); ok && w.Variable == nil {
		deleted = append(deleted, w.Key)
	}
	if len(deleted) == 0 {
		return step(in, now)
	}
	floors, byKey := map[outrigger.Key]uint64{}, map[outrigger.Key]uint64{}
	for _, k := range deleted {
		byKey[k] = s.byKey[bucketOf(k)]
		if e := s.find(k); e != nil {
			floors[k] = e.floor
		}
	}
	out := slices.Clone(step(in, now))
	for _, k := range deleted {
		s.byKey[bucketOf(k)] = byKey[k]
		if e := s.find(k); e != nil {
			e.floor = floors[k]
			if e.held() == negative {
				e.hold(nothing)
				out = append(out, Remove{k})
			}
		}
	}
	return out
}

// withOldChanges applies every change of a frame whatever is known already.
func withOldChanges(s *State, in Input, now int64, step stepper) []Output {
	out := slices.Clone(step(in, now))
	if incarnationOf(in) != s.incarnation {
		return out
	}
	for _, c := range changesOf(in) {
		if e := s.find(keyOf(c.GetKey())); e != nil && c.GetScope() == pb.Change_KEY && e.held() != nothing && c.GetVariable() != nil {
			s.out = s.out[:0]
			e.floor, e.at = 0, 0
			s.applyKey(s.key(e), c, now)
			out = append(out, s.out...)
		}
	}
	return out
}

// withStampede sends a fetch for every reader; the last one answers all.
func withStampede(s *State, in Input, now int64, step stepper) []Output {
	r, ok := in.(Read)
	if !ok {
		return step(in, now)
	}
	e := s.find(r.Key)
	if e == nil || s.flights[e] == nil || e.held() != nothing || len(s.flights) > s.opt.MaxFlights {
		return step(in, now)
	}
	old := s.flights[e]
	delete(s.flights, e)
	out := step(in, now)
	f := s.flights[e]
	f.waiters, f.late = append(f.waiters, old.waiters...), old.late
	return out
}

// simFinding is what the simulation says about one missing rule.
type simFinding struct {
	seeds     uint64 // played until the first violation
	violation *simViolation
}

// Without each rule the simulation finds a violation; the table says how soon, and what
// breaks first. This is what makes a quiet run of TestSimulation worth something.
func TestSimulationNoticesMissingRules(t *testing.T) {
	if raceEnabled {
		t.Skip("nothing here is shared between goroutines; the run without the detector is the test")
	}
	const limit = 3000
	base := simBase()
	found := make([]simFinding, len(simRules))
	var next atomic.Int64
	var workers sync.WaitGroup
	start := time.Now()
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for i := next.Add(1) - 1; int(i) < len(simRules); i = next.Add(1) - 1 {
				f := &found[i]
				for f.violation == nil && f.seeds < limit {
					_, f.violation = run(base+f.seeds, &simRules[i], nil)
					f.seeds++
				}
			}
		})
	}
	workers.Wait()
	var table strings.Builder
	for i, f := range found {
		if f.violation == nil {
			t.Errorf("%d seeds from %d without the rule %q and nothing was noticed", limit, base, simRules[i].name)
			continue
		}
		fmt.Fprintf(&table, "%-50s %5d  %s\n", simRules[i].name, f.seeds, f.violation.kind)
	}
	t.Logf("%v; seeds until the first violation, and its kind:\n%s", time.Since(start).Round(time.Millisecond), table.String())
}

func showInput(in Input) string { return fmt.Sprintf("%T%+v", in, in) }
