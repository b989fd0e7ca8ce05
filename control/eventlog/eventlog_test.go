package eventlog_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// Every payload of the schema has its field name as kind, so that a new one cannot be
// forgotten by filters and metrics.
func TestEventKind(t *testing.T) {
	oneof := (&outriggerv1.Event{}).ProtoReflect().Descriptor().Oneofs().ByName("payload")
	if oneof.Fields().Len() < 19 {
		t.Fatalf("schema has %d payloads", oneof.Fields().Len())
	}
	for i := range oneof.Fields().Len() {
		fd := oneof.Fields().Get(i)
		e := new(outriggerv1.Event)
		m := e.ProtoReflect()
		m.Set(fd, m.NewField(fd))
		if got := eventlog.EventKind(e); got != string(fd.Name()) {
			t.Errorf("kind of %s is %q", fd.Name(), got)
		}
	}
	if got := eventlog.EventKind(&outriggerv1.Event{Payload: &outriggerv1.Event_RollbackStarted{}}); got != "rollback_started" {
		t.Errorf("kind is %q, want rollback_started", got)
	}
	for _, e := range []*outriggerv1.Event{nil, {}} {
		if got := eventlog.EventKind(e); got != "" {
			t.Errorf("kind of %v is %q, want empty", e, got)
		}
	}
	e := &outriggerv1.Event{Payload: &outriggerv1.Event_AlertRaised{AlertRaised: &outriggerv1.AlertRaised{}}}
	if n := testing.AllocsPerRun(100, func() { eventlog.EventKind(e) }); n > 0 {
		t.Errorf("EventKind allocates %v times", n)
	}
}

// A transcript of clock readings: time stands still while the wall clock is behind, and
// stamps grow by one inside a millisecond.
func TestClock(t *testing.T) {
	base := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	ms := uint64(base.UnixMilli()) << 16
	var c eventlog.Clock
	for i, step := range []struct {
		now  time.Duration
		at   time.Duration
		hlcs []uint64
	}{
		{0, 0, []uint64{ms, ms + 1, ms + 2}},
		{500 * time.Microsecond, 500 * time.Microsecond, []uint64{ms + 3}},         // same millisecond
		{time.Millisecond, time.Millisecond, []uint64{ms + 1<<16, ms + 1<<16 + 1}}, // next one
		{-time.Hour, time.Millisecond, []uint64{ms + 1<<16 + 2}},                   // clock set back
		{time.Second, time.Second, []uint64{ms + 1000<<16}},
	} {
		if got := c.Advance(base.Add(step.now)); !got.Equal(base.Add(step.at)) {
			t.Errorf("step %d: at %v, want %v", i, got, base.Add(step.at))
		}
		for _, want := range step.hlcs {
			if got := c.Next(); got != want {
				t.Errorf("step %d: stamp %x, want %x", i, got, want)
			}
		}
	}
	// After a restart on a clock that went back an hour.
	var r eventlog.Clock
	r.Resume(&outriggerv1.Event{At: timestamppb.New(base.Add(time.Second)), Hlc: ms + 1000<<16})
	if got := r.Advance(base.Add(-time.Hour)); !got.Equal(base.Add(time.Second)) {
		t.Errorf("resumed clock says %v", got)
	}
	if got := r.Next(); got != ms+1000<<16+1 {
		t.Errorf("resumed stamp %x, want %x", got, ms+1000<<16+1)
	}
	// A clock before 1970 must not wrap into the far future.
	var old eventlog.Clock
	old.Advance(time.Unix(-1e6, 0))
	if got := old.Next(); got != 1 {
		t.Errorf("stamp before 1970 is %x, want 1", got)
	}
	var empty eventlog.Clock
	empty.Resume(nil)
	if got := empty.Advance(base); !got.Equal(base) {
		t.Errorf("clock of an empty log says %v", got)
	}
}

// The window against a plain list of everything ever added.
func TestWindow(t *testing.T) {
	for _, size := range []int{0, 1, 2, 7} {
		w := eventlog.NewWindow(size)
		keep := max(size, 1)
		for i := range 30 {
			o := eventlog.Outcome{First: uint64(i), Last: uint64(i + 1)}
			forgotten, evicted := w.Add(fmt.Sprint(i), o)
			if want := i >= keep; evicted != want || (want && forgotten.First != uint64(i-keep)) {
				t.Fatalf("size %d, add %d: forgot %+v, %v", size, i, forgotten, evicted)
			}
			for j := range i + 1 {
				got, ok := w.Get(fmt.Sprint(j))
				if want := j > i-keep; ok != want || (ok && got.First != uint64(j)) {
					t.Fatalf("size %d after %d adds: get %d is %+v, %v", size, i+1, j, got, ok)
				}
			}
			if w.Len() != min(i+1, keep) {
				t.Fatalf("size %d after %d adds: %d remembered", size, i+1, w.Len())
			}
		}
	}
}

// Messages name the field, the value, the limit and the remedy.
func TestErrorTexts(t *testing.T) {
	event := []*outriggerv1.Event{{}}
	expired, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	cancelled, stop := context.WithCancel(t.Context())
	stop()
	var many eventlog.Write
	many.Aggregate = "a"
	for range eventlog.MaxBatchEvents + 1 {
		many.Events = append(many.Events, &outriggerv1.Event{})
	}
	for _, c := range []struct {
		err  error
		kind outrigger.Kind
		text string
	}{
		{eventlog.Check("", nil), outrigger.Invalid, "append has no events; give 1 to 1000"},
		{eventlog.Check("", []eventlog.Write{many}), outrigger.Exhausted, "append has 1001 events, the limit is 1000; split it"},
		{eventlog.Check(strings.Repeat("r", 513), nil), outrigger.Exhausted, "request id is 513 bytes long, the limit is 512; use a hash of it"},
		{eventlog.Check("", []eventlog.Write{{Aggregate: "a", Expect: -3, Events: event}}), outrigger.Invalid, `expect of "a" is -3; give a sequence ≥ 0 or Any (-1)`},
		{eventlog.Check("", []eventlog.Write{{Aggregate: "a\n", Events: event}}), outrigger.Invalid, `aggregate "a\n" contains '\n'; control characters are not allowed`},
		{eventlog.CheckSnapshot("s", 5, 4, nil), outrigger.Invalid, `snapshot "s" is at position 5; the log has 1 to 4`},
		{eventlog.ErrConflict("a", 3, 7), outrigger.Conflict, `aggregate "a" is at sequence 7, expected 3; read it and retry`},
		{eventlog.ErrClosed(), outrigger.Unavailable, "event log is closed; nothing was changed"},
		{eventlog.ErrNotQueued(expired), outrigger.Unavailable, "append gave up before its commit began; nothing was written: context deadline exceeded"},
		{eventlog.ErrRead(expired), outrigger.Timeout, "event log read stopped: context deadline exceeded"},
		{eventlog.ErrRead(cancelled), outrigger.Cancelled, "event log read stopped: context canceled"},
	} {
		if !outrigger.IsKind(c.err, c.kind) || c.err.Error() != c.text {
			t.Errorf("got %v: %v\nwant %v: %v", outrigger.KindOf(c.err), c.err, c.kind, c.text)
		}
	}
}

// Whatever the strings, Check decides without panicking, and what it accepts obeys the
// naming rules engines build their keys on.
func FuzzCheck(f *testing.F) {
	f.Add("a", "id", int64(0), 1)
	f.Add("a\x00", "\xff", int64(-2), 0)
	f.Fuzz(func(t *testing.T, aggregate, id string, expect int64, n int) {
		w := eventlog.Write{Aggregate: aggregate, Expect: expect}
		for range min(max(n, 0), eventlog.MaxBatchEvents+1) {
			w.Events = append(w.Events, &outriggerv1.Event{})
		}
		err := eventlog.Check(id, []eventlog.Write{w})
		if err != nil {
			if k := outrigger.KindOf(err); k != outrigger.Invalid && k != outrigger.Exhausted {
				t.Fatalf("kind %v: %v", k, err)
			}
			return
		}
		if aggregate == "" || strings.ContainsRune(aggregate, 0) || expect < eventlog.Any || len(w.Events) == 0 || len(w.Events) > eventlog.MaxBatchEvents {
			t.Fatalf("accepted %q expect %d with %d events", aggregate, expect, len(w.Events))
		}
	})
}
