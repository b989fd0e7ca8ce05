package eventlogtest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

func testEmpty(t *testing.T, l eventlog.Log) {
	if l.Head() != 0 {
		t.Errorf("head %d, want 0", l.Head())
	}
	if l.Incarnation() == 0 {
		t.Error("incarnation is 0")
	}
	if got := collect(t, l.ReadAll(t.Context(), 0)); len(got) != 0 {
		t.Errorf("read %v", got)
	}
	if got := collect(t, l.Read(t.Context(), "a", 0)); len(got) != 0 {
		t.Errorf("read %v", got)
	}
}

func testAppend(t *testing.T, l eventlog.Log) {
	a := mustAppend(t, l, "", write("a", 0, "one", "two"))
	if a.First != 1 || a.Last != 2 || a.Duplicate {
		t.Fatalf("first append landed at %d..%d, duplicate %v", a.First, a.Last, a.Duplicate)
	}
	b := mustAppend(t, l, "", write("b", eventlog.Any, "three"), write("a", 2, "four"))
	got := append(slices.Clone(a.Events), b.Events...)
	want := []string{"a/1@1 one", "a/2@2 two", "b/1@3 three", "a/3@4 four"}
	if !slices.Equal(lines(got), want) {
		t.Fatalf("appended %v, want %v", lines(got), want)
	}
	for _, e := range got {
		if e.At.AsTime().UnixNano() <= 0 || e.Hlc == 0 {
			t.Errorf("position %d is not dated: %v, hlc %x", e.Position, e.At, e.Hlc)
		}
	}
	checkSame(t, CheckWhole(t, l), got)
	if l.Head() != 4 {
		t.Errorf("head %d, want 4", l.Head())
	}
}

// The caller's messages keep what the caller put there, and changing them later does
// not change the log. What the caller put into the engine's fields is not believed.
func testCallersMessages(t *testing.T, l eventlog.Log) {
	e := event("mine")
	e.Aggregate, e.Sequence, e.Position, e.Hlc, e.At = "other", 77, 88, 99, timestamppb.New(timestamppb.Now().AsTime().AddDate(50, 0, 0))
	before := proto.CloneOf(e)
	mustAppend(t, l, "", eventlog.Write{Aggregate: "a", Expect: 0, Events: []*outriggerv1.Event{e}})
	if !proto.Equal(e, before) {
		t.Fatalf("append changed the caller's message to %v", e)
	}
	e.GetAlertRaised().Summary = "changed"
	e.Metadata["text"] = "changed"
	got := CheckWhole(t, l)
	if w := []string{"a/1@1 mine"}; !slices.Equal(lines(got), w) || got[0].Metadata["text"] != "mine" {
		t.Fatalf("log holds %v %v, want %v", lines(got), got[0].Metadata, w)
	}
	if got[0].Hlc == 99 || got[0].At.AsTime().Equal(before.At.AsTime()) {
		t.Fatalf("log believed the caller's time: %v", got[0])
	}
}

func testExpect(t *testing.T, l eventlog.Log) {
	mustAppend(t, l, "", write("a", 0, "1", "2"))
	for _, c := range []struct {
		name      string
		aggregate string
		expect    int64
		conflict  bool
	}{
		{"too low", "a", 1, true},
		{"too high", "a", 3, true},
		{"must not exist but does", "a", 0, true},
		{"must exist but does not", "b", 1, true},
		{"right", "a", 2, false},
		{"no check", "a", eventlog.Any, false},
		{"no check on a new one", "c", eventlog.Any, false},
		{"new", "d", 0, false},
	} {
		head := l.Head()
		_, err := l.Append(t.Context(), "", write(c.aggregate, c.expect, c.name))
		if !c.conflict {
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if !outrigger.IsKind(err, outrigger.Conflict) || !strings.Contains(err.Error(), c.aggregate) {
			t.Errorf("%s: error %v, want a conflict naming %q", c.name, err, c.aggregate)
		}
		if l.Head() != head {
			t.Errorf("%s: a refused append moved the head to %d", c.name, l.Head())
		}
	}
	CheckWhole(t, l)
}

func testAtomic(t *testing.T, l eventlog.Log) {
	mustAppend(t, l, "", write("a", 0, "1"))
	_, err := l.Append(t.Context(), "", write("x", 0, "no"), write("y", eventlog.Any, "no"), write("a", 0, "no"))
	wantKind(t, err, outrigger.Conflict)
	mustAppend(t, l, "", write("x", 0, "2"), write("y", 0, "3"), write("a", 1, "4"))
	want := []string{"a/1@1 1", "x/1@2 2", "y/1@3 3", "a/2@4 4"}
	if got := lines(CheckWhole(t, l)); !slices.Equal(got, want) {
		t.Fatalf("log holds %v, want %v", got, want)
	}
}

func testSameAggregate(t *testing.T, l eventlog.Log) {
	mustAppend(t, l, "", write("a", 0, "1", "2"), write("b", 0, "x"), write("a", 2, "3"), write("a", eventlog.Any, "4"))
	_, err := l.Append(t.Context(), "", write("a", 4, "5"), write("a", 4, "6"))
	wantKind(t, err, outrigger.Conflict)
	want := []string{"a/1@1 1", "a/2@2 2", "b/1@3 x", "a/3@4 3", "a/4@5 4"}
	if got := lines(CheckWhole(t, l)); !slices.Equal(got, want) {
		t.Fatalf("log holds %v, want %v", got, want)
	}
}

// A write without events checks another aggregate in the same atomic step.
func testPureCheck(t *testing.T, l eventlog.Log) {
	mustAppend(t, l, "", write("session", 0, "created"))
	mustAppend(t, l, "", write("session", 1), write("v", 0, "set"))
	mustAppend(t, l, "", write("session", 1, "deleted"))
	_, err := l.Append(t.Context(), "", write("session", 1), write("v", 1, "set after deletion"))
	wantKind(t, err, outrigger.Conflict)
	_, err = l.Append(t.Context(), "", write("absent", 0), write("v", 1, "fine"))
	if err != nil {
		t.Fatalf("checking that an aggregate is absent: %v", err)
	}
	CheckWhole(t, l)
}

func testRequestID(t *testing.T, l eventlog.Log) {
	first := mustAppend(t, l, "req-1", write("a", 0, "1", "2"))
	mustAppend(t, l, "req-2", write("a", 2, "3"))
	again := mustAppend(t, l, "req-1", write("a", 0, "1", "2"))
	if !again.Duplicate || again.First != 1 || again.Last != 2 {
		t.Fatalf("repeated append: %d..%d duplicate %v", again.First, again.Last, again.Duplicate)
	}
	checkSame(t, again.Events, first.Events)
	if other := mustAppend(t, l, "req-1", write("z", 9, "different")); !other.Duplicate || other.First != 1 {
		t.Fatalf("the same id with other writes: %+v", other)
	}
	// A refusal is not remembered: the id is free for the corrected request.
	_, err := l.Append(t.Context(), "req-3", write("a", 0, "stale"))
	wantKind(t, err, outrigger.Conflict)
	if got := mustAppend(t, l, "req-3", write("a", 3, "4")); got.Duplicate {
		t.Fatal("append after a refusal with the same id was taken for a duplicate")
	}
	// No id, no deduplication.
	mustAppend(t, l, "", write("a", eventlog.Any, "5"))
	mustAppend(t, l, "", write("a", eventlog.Any, "5"))
	if got := CheckWhole(t, l); len(got) != 6 {
		t.Fatalf("log holds %v, want 6 events", lines(got))
	}
}

// The same id at the same time from many goroutines is written once, and everybody
// gets the same answer.
func testRequestIDRace(t *testing.T, l eventlog.Log) {
	const callers, ids = 16, 20
	for i := range ids {
		id := fmt.Sprintf("id-%d", i)
		results := make([]eventlog.Appended, callers)
		var wg sync.WaitGroup
		for c := range callers {
			wg.Go(func() {
				got, err := l.Append(t.Context(), id, write("a", eventlog.Any, id, id))
				if err != nil {
					t.Errorf("append: %v", err)
				}
				results[c] = got
			})
		}
		wg.Wait()
		written := 0
		for _, r := range results {
			if !r.Duplicate {
				written++
			}
			if r.First != results[0].First || len(r.Events) != 2 || r.Events[1].Position != r.Last {
				t.Fatalf("%s: answers differ: %+v and %+v", id, r, results[0])
			}
		}
		if written != 1 {
			t.Fatalf("%s was written %d times", id, written)
		}
	}
	if got := CheckWhole(t, l); len(got) != 2*ids {
		t.Fatalf("log holds %d events, want %d", len(got), 2*ids)
	}
}

func testRefusedInput(t *testing.T, l eventlog.Log) {
	long := strings.Repeat("x", eventlog.MaxAggregateBytes)
	ok := write("a", eventlog.Any, "ok")
	for _, c := range []struct {
		name   string
		id     string
		writes []eventlog.Write
		kind   outrigger.Kind
	}{
		{"no writes", "", nil, outrigger.Invalid},
		{"no events", "", []eventlog.Write{write("a", 0)}, outrigger.Invalid},
		{"neither events nor expect", "", []eventlog.Write{ok, write("b", eventlog.Any)}, outrigger.Invalid},
		{"empty aggregate", "", []eventlog.Write{ok, write("", 0, "x")}, outrigger.Invalid},
		{"long aggregate", "", []eventlog.Write{write(long+"x", 0, "x")}, outrigger.Invalid},
		{"zero byte in aggregate", "", []eventlog.Write{write("a\x00b", 0, "x")}, outrigger.Invalid},
		{"bad UTF-8 in aggregate", "", []eventlog.Write{write("a\xff", 0, "x")}, outrigger.Invalid},
		{"bad expect", "", []eventlog.Write{write("a", -2, "x")}, outrigger.Invalid},
		{"nil event", "", []eventlog.Write{{Aggregate: "a", Expect: eventlog.Any, Events: []*outriggerv1.Event{nil}}}, outrigger.Invalid},
		{"event that cannot be encoded", "", []eventlog.Write{ok, write("a", eventlog.Any, "\xff")}, outrigger.Invalid},
		{"long request id", strings.Repeat("r", eventlog.MaxRequestIDBytes+1), []eventlog.Write{ok}, outrigger.Exhausted},
		{"bad UTF-8 in request id", "\xff", []eventlog.Write{ok}, outrigger.Invalid},
	} {
		_, err := l.Append(t.Context(), c.id, c.writes...)
		if !outrigger.IsKind(err, c.kind) {
			t.Errorf("%s: error %v, want kind %v", c.name, err, c.kind)
		}
	}
	if l.Head() != 0 {
		t.Fatalf("refused appends moved the head to %d", l.Head())
	}
	mustAppend(t, l, "", write(long, 0, "longest name that is allowed"))
	CheckWhole(t, l)
}

func testLimits(t *testing.T, l eventlog.Log) {
	many := write("a", 0)
	for i := range eventlog.MaxBatchEvents {
		many.Events = append(many.Events, event(fmt.Sprint(i)))
	}
	_, err := l.Append(t.Context(), "", many, write("b", 0, "one more"))
	wantKind(t, err, outrigger.Exhausted)
	if got := mustAppend(t, l, "", many); got.Last != eventlog.MaxBatchEvents {
		t.Fatalf("largest batch ends at %d", got.Last)
	}
	big := func(size int) *outriggerv1.Event {
		e := &outriggerv1.Event{Cause: strings.Repeat("x", size)}
		e.Cause = e.Cause[:2*size-proto.Size(e)] // minus tag and length
		return e
	}
	_, err = l.Append(t.Context(), "", eventlog.Write{Aggregate: "b", Events: []*outriggerv1.Event{big(eventlog.MaxEventBytes + 1)}})
	wantKind(t, err, outrigger.Exhausted)
	var full []*outriggerv1.Event
	for range eventlog.MaxBatchBytes / eventlog.MaxEventBytes {
		full = append(full, big(eventlog.MaxEventBytes))
	}
	_, err = l.Append(t.Context(), "", eventlog.Write{Aggregate: "b", Events: append(slices.Clone(full), event("x"))})
	wantKind(t, err, outrigger.Exhausted)
	mustAppend(t, l, "", eventlog.Write{Aggregate: "b", Events: full})
	mustAppend(t, l, "", write("b", int64(len(full)), "after the big ones"))
	CheckWhole(t, l)
}

func testAppendContext(t *testing.T, l eventlog.Log) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := l.Append(ctx, "id", write("a", 0, "x"))
	wantKind(t, err, outrigger.Unavailable)
	if got := mustAppend(t, l, "id", write("a", 0, "x")); got.Duplicate || got.First != 1 {
		t.Fatalf("an append that gave up was written: %+v", got)
	}
}
