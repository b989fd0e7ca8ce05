package eventlogtest

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// 64 writers, some to aggregates of their own and some to shared ones, with readers
// that check that what they see never has a gap.
func testConcurrent(t *testing.T, l eventlog.Log) {
	const writers, each = 64, 20
	f := follow(t, l, 1)
	var seen sync.WaitGroup
	seen.Go(func() {
		for i, e := range f.take(t, writers*each*2) {
			if e.Position != uint64(i)+1 {
				t.Errorf("subscriber saw position %d, want %d", e.Position, i+1)
				return
			}
		}
	})
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			own := fmt.Sprintf("own-%d", w)
			for i := range each {
				got, err := l.Append(t.Context(), "", write(own, int64(i), "own"), write(fmt.Sprintf("shared-%d", i%3), eventlog.Any, own))
				if err != nil {
					t.Errorf("writer %d: %v", w, err)
					return
				}
				if got.Last != got.First+1 || got.Events[0].Sequence != uint64(i)+1 || l.Head() < got.Last {
					t.Errorf("writer %d: %d..%d, sequence %d, head %d", w, got.First, got.Last, got.Events[0].Sequence, l.Head())
				}
			}
		})
	}
	wg.Wait()
	seen.Wait()
	if err := f.stop(); err != nil {
		t.Errorf("a cancelled subscription yielded %v", err)
	}
	if got := CheckWhole(t, l); len(got) != writers*each*2 {
		t.Fatalf("log holds %d events, want %d", len(got), writers*each*2)
	}
}

// Many writers expect the same sequence at once, so that they meet in one group
// commit: exactly one wins each round.
func testConcurrentExpect(t *testing.T, l eventlog.Log) {
	const rounds, writers = 30, 32
	for r := range rounds {
		var won, lost atomic.Int32
		var wg sync.WaitGroup
		for range writers {
			wg.Go(func() {
				_, err := l.Append(t.Context(), "", write("a", int64(r), "x"))
				switch {
				case err == nil:
					won.Add(1)
				case outrigger.IsKind(err, outrigger.Conflict):
					lost.Add(1)
				default:
					t.Errorf("append: %v", err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 || lost.Load() != writers-1 {
			t.Fatalf("round %d: %d winners, %d conflicts of %d", r, won.Load(), lost.Load(), writers)
		}
	}
	if got := CheckWhole(t, l); len(got) != rounds {
		t.Fatalf("log holds %d events, want %d", len(got), rounds)
	}
}

// step is one operation on one aggregate: an append that expects a sequence, or a read
// of the last sequence.
type step struct {
	aggregate string
	append    bool
	expect    uint64
}

// seen is what it returned: appended or not, and the last sequence for a read.
type seen struct {
	ok   bool
	last uint64
}

// sequenceModel is an aggregate as a register holding its last sequence.
func sequenceModel() porcupine.Model {
	return porcupine.Model{
		Partition: func(h []porcupine.Operation) [][]porcupine.Operation {
			parts := map[string][]porcupine.Operation{}
			for _, o := range h {
				a := o.Input.(step).aggregate
				parts[a] = append(parts[a], o)
			}
			var out [][]porcupine.Operation
			for _, p := range parts {
				out = append(out, p)
			}
			return out
		},
		Init: func() any { return uint64(0) },
		Step: func(state, input, output any) (bool, any) {
			last, in, out := state.(uint64), input.(step), output.(seen)
			switch {
			case !in.append:
				return out.last == last, last
			case out.ok:
				return in.expect == last, last + 1
			default: // a conflict is evidence that the sequence was another one
				return in.expect != last, last
			}
		},
	}
}

// testLinearizable records a history of compare-and-append and reads by 8 clients on 3
// aggregates and lets porcupine look for an order that explains it.
func testLinearizable(t *testing.T, l eventlog.Log) {
	const clients, each, aggregates = 8, 60, 3
	start := time.Now()
	histories := make([][]porcupine.Operation, clients)
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			known := map[string]uint64{}
			for i := range each {
				in := step{aggregate: fmt.Sprint("a", (c+i)%aggregates), append: i%2 == 1}
				in.expect = known[in.aggregate]
				call := time.Since(start).Nanoseconds()
				out, err := perform(t, l, in)
				if err != nil {
					t.Errorf("%+v: %v", in, err)
					return
				}
				histories[c] = append(histories[c], porcupine.Operation{ClientId: c, Input: in, Output: out, Call: call, Return: time.Since(start).Nanoseconds()})
				if !in.append {
					known[in.aggregate] = out.last
				}
			}
		})
	}
	wg.Wait()
	var all []porcupine.Operation
	for _, h := range histories {
		all = append(all, h...)
	}
	if got := porcupine.CheckOperationsTimeout(sequenceModel(), all, 20*time.Second); got != porcupine.Ok {
		t.Fatalf("history of %d operations is %v", len(all), got)
	}
}

func perform(t *testing.T, l eventlog.Log, in step) (seen, error) {
	if in.append {
		_, err := l.Append(t.Context(), "", write(in.aggregate, int64(in.expect), "x"))
		if outrigger.IsKind(err, outrigger.Conflict) {
			return seen{}, nil
		}
		return seen{ok: true}, err
	}
	var last uint64
	for e, err := range l.Read(t.Context(), in.aggregate, 1) {
		if err != nil {
			return seen{}, err
		}
		last = e.Sequence
	}
	return seen{last: last}, nil
}
