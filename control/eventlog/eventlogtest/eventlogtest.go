// Package eventlogtest is the conformance suite of event log engines: what package
// eventlog promises, as tests. An engine runs it from its own tests:
//
//	func TestConformance(t *testing.T) {
//		eventlogtest.Run(t, func(t *testing.T) eventlog.Log { return memory.New() })
//	}
//
// Durable engines also run RunDurable. Neither waits for real time to pass, so both may
// be run with the race detector in seconds.
package eventlogtest

import (
	"context"
	"fmt"
	"iter"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// Run checks every promise that holds within one life of a log. open returns a new,
// empty log; the suite closes it.
func Run(t *testing.T, open func(t *testing.T) eventlog.Log) {
	cases := []struct {
		name string
		test func(*testing.T, eventlog.Log)
	}{
		{"EmptyLog", testEmpty},
		{"AppendNumbersAndDates", testAppend},
		{"CallersMessagesStayTheirs", testCallersMessages},
		{"Expect", testExpect},
		{"ManyAggregatesAllOrNothing", testAtomic},
		{"SameAggregateTwiceInOneAppend", testSameAggregate},
		{"PureCheck", testPureCheck},
		{"RequestID", testRequestID},
		{"RequestIDRace", testRequestIDRace},
		{"RefusedInput", testRefusedInput},
		{"Limits", testLimits},
		{"Read", testRead},
		{"ReadManyChunks", testReadChunks},
		{"ReadEndsWithContext", testReadContext},
		{"AppendEndsWithContext", testAppendContext},
		{"SubscribeCatchesUpAndFollows", testSubscribe},
		{"SubscribeFromTheFuture", testSubscribeFuture},
		{"SubscribeSlowAndFast", testSubscribeSlow},
		{"ConcurrentWritersLeaveNoGap", testConcurrent},
		{"ConcurrentExpectHasOneWinner", testConcurrentExpect},
		{"Linearizable", testLinearizable},
		{"Snapshots", testSnapshots},
		{"SnapshotsAreWhole", testSnapshotsWhole},
		{"Close", testClose},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			l := open(t)
			t.Cleanup(func() {
				if err := l.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			})
			c.test(t, l)
		})
	}
}

// event returns an event with a recognisable payload.
func event(text string) *outriggerv1.Event {
	return &outriggerv1.Event{
		Actor: "tester", Source: "suite", Schema: 1,
		Metadata: map[string]string{"text": text, "b": "2", "a": "1"},
		Payload:  &outriggerv1.Event_AlertRaised{AlertRaised: &outriggerv1.AlertRaised{Severity: "low", Summary: text}},
	}
}

// text is what event was given.
func text(e *outriggerv1.Event) string { return e.GetAlertRaised().GetSummary() }

// write builds a Write of events with the given texts.
func write(aggregate string, expect int64, texts ...string) eventlog.Write {
	w := eventlog.Write{Aggregate: aggregate, Expect: expect}
	for _, s := range texts {
		w.Events = append(w.Events, event(s))
	}
	return w
}

func mustAppend(t *testing.T, l eventlog.Appender, id string, writes ...eventlog.Write) eventlog.Appended {
	t.Helper()
	got, err := l.Append(t.Context(), id, writes...)
	if err != nil {
		t.Fatalf("append: %v", err)
	}
	return got
}

func wantKind(t *testing.T, err error, kind outrigger.Kind) {
	t.Helper()
	if !outrigger.IsKind(err, kind) {
		t.Fatalf("error %v (kind %v), want kind %v", err, outrigger.KindOf(err), kind)
	}
}

// collect reads a sequence to its end and fails on an error.
func collect(t *testing.T, seq iter.Seq2[*outriggerv1.Event, error]) []*outriggerv1.Event {
	t.Helper()
	var out []*outriggerv1.Event
	for e, err := range seq {
		if err != nil {
			t.Fatalf("read: %v", err)
		}
		out = append(out, e)
	}
	return out
}

// lines lists "aggregate/sequence@position text" of events, for comparison in one go.
func lines(events []*outriggerv1.Event) []string {
	var out []string
	for _, e := range events {
		out = append(out, fmt.Sprintf("%s/%d@%d %s", e.Aggregate, e.Sequence, e.Position, text(e)))
	}
	return out
}

// CheckWhole reads the whole log and fails unless it is gapless in both numberings,
// its times never run backwards, and reading by aggregate gives the same events. It
// returns the events.
func CheckWhole(t *testing.T, l eventlog.Reader) []*outriggerv1.Event {
	t.Helper()
	all := collect(t, l.ReadAll(t.Context(), 1))
	if uint64(len(all)) != l.Head() {
		t.Fatalf("log yields %d events, head is %d", len(all), l.Head())
	}
	byAggregate := map[string][]*outriggerv1.Event{}
	for i, e := range all {
		if e.Position != uint64(i)+1 {
			t.Fatalf("event %d has position %d", i, e.Position)
		}
		byAggregate[e.Aggregate] = append(byAggregate[e.Aggregate], e)
		if want := uint64(len(byAggregate[e.Aggregate])); e.Sequence != want {
			t.Fatalf("position %d: %s has sequence %d, want %d", e.Position, e.Aggregate, e.Sequence, want)
		}
		if i > 0 && (e.Hlc <= all[i-1].Hlc || e.At.AsTime().Before(all[i-1].At.AsTime())) {
			t.Fatalf("position %d: time runs backwards: %v/%x after %v/%x", e.Position, e.At.AsTime(), e.Hlc, all[i-1].At.AsTime(), all[i-1].Hlc)
		}
	}
	for aggregate, want := range byAggregate {
		checkSame(t, collect(t, l.Read(t.Context(), aggregate, 1)), want)
	}
	return all
}

func checkSame(t *testing.T, got, want []*outriggerv1.Event) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("got %d events %v, want %d %v", len(got), lines(got), len(want), lines(want))
	}
	for i := range want {
		if !proto.Equal(got[i], want[i]) {
			t.Fatalf("event %d is\n%v, want\n%v", i, got[i], want[i])
		}
	}
}

// follower runs a subscription in the background and hands out its events.
type follower struct {
	events chan *outriggerv1.Event
	err    chan error // the yielded error or nil, when the sequence ended
	cancel context.CancelFunc
}

func follow(t *testing.T, l eventlog.Subscriber, from uint64) *follower {
	ctx, cancel := context.WithCancel(t.Context())
	f := &follower{events: make(chan *outriggerv1.Event), err: make(chan error, 1), cancel: cancel}
	go func() {
		var failed error
		for e, err := range l.Subscribe(ctx, from) {
			if err != nil {
				failed = err
				continue
			}
			select {
			case f.events <- e:
			case <-ctx.Done():
			}
		}
		f.err <- failed
	}()
	return f
}

// take waits for n events.
func (f *follower) take(t *testing.T, n int) []*outriggerv1.Event {
	t.Helper()
	var out []*outriggerv1.Event
	for len(out) < n {
		select {
		case e := <-f.events:
			out = append(out, e)
		case err := <-f.err:
			t.Fatalf("subscription ended after %d of %d events: %v", len(out), n, err)
		}
	}
	return out
}

// stop cancels and returns what the sequence yielded last.
func (f *follower) stop() error {
	f.cancel()
	return <-f.err
}
