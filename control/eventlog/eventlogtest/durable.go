package eventlogtest

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// RunDurable checks what a durable engine promises across lives of a log. open opens
// the log kept at a place, creating it if need be; the suite gives it empty directories.
func RunDurable(t *testing.T, open func(place string) (eventlog.Log, error)) {
	t.Run("ReopenKeepsEverything", func(t *testing.T) { testReopen(t, open) })
	t.Run("IncarnationIsPerLog", func(t *testing.T) { testIncarnation(t, open) })
	t.Run("OneOpenerAtATime", func(t *testing.T) { testExclusive(t, open) })
}

func mustOpen(t *testing.T, open func(string) (eventlog.Log, error), place string) eventlog.Log {
	t.Helper()
	l, err := open(place)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return l
}

func mustClose(t *testing.T, l eventlog.Log) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
}

// Each life appends, and finds everything of the lives before: events with their times,
// sequences to expect, request ids, snapshots, the incarnation.
func testReopen(t *testing.T, open func(string) (eventlog.Log, error)) {
	place := t.TempDir()
	l := mustOpen(t, open, place)
	incarnation := l.Incarnation()
	for life := range 4 {
		id := fmt.Sprintf("life-%d", life)
		mustAppend(t, l, id, write("a", int64(life), id), write(id, 0, "1", "2"))
		state := bytes.Repeat([]byte(id), 400_000)
		if err := l.SaveSnapshot(t.Context(), "s", l.Head(), state); err != nil {
			t.Fatal(err)
		}
		before := CheckWhole(t, l)
		mustClose(t, l)

		l = mustOpen(t, open, place)
		if l.Incarnation() != incarnation {
			t.Fatalf("life %d: incarnation %x, was %x", life, l.Incarnation(), incarnation)
		}
		checkSame(t, CheckWhole(t, l), before)
		if again := mustAppend(t, l, id, write("a", 99, "x")); !again.Duplicate || again.Last != l.Head() {
			t.Fatalf("life %d: request id is forgotten: %+v", life, again)
		}
		_, err := l.Append(t.Context(), "", write("a", int64(life), "stale"))
		wantKind(t, err, outrigger.Conflict)
		if p, s, err := l.LoadSnapshot(t.Context(), "s"); err != nil || p != l.Head() || !bytes.Equal(s, state) {
			t.Fatalf("life %d: snapshot at %d with %d bytes, error %v", life, p, len(s), err)
		}
	}
	f := follow(t, l, 1)
	f.take(t, int(l.Head()))
	mustAppend(t, l, "", write("a", 4, "live"))
	f.take(t, 1)
	if err := f.stop(); err != nil {
		t.Error(err)
	}
	mustClose(t, l)
}

func testIncarnation(t *testing.T, open func(string) (eventlog.Log, error)) {
	a, b := mustOpen(t, open, t.TempDir()), mustOpen(t, open, t.TempDir())
	if a.Incarnation() == b.Incarnation() || a.Incarnation() == 0 || b.Incarnation() == 0 {
		t.Errorf("two logs have incarnations %x and %x", a.Incarnation(), b.Incarnation())
	}
	mustClose(t, a)
	mustClose(t, b)
}

func testExclusive(t *testing.T, open func(string) (eventlog.Log, error)) {
	place := t.TempDir()
	l := mustOpen(t, open, place)
	if second, err := open(place); err == nil {
		mustClose(t, second)
		t.Fatal("a log could be opened twice")
	} else {
		wantKind(t, err, outrigger.Unavailable)
	}
	mustAppend(t, l, "", write("a", 0, "the first opener is not disturbed"))
	mustClose(t, l)
	mustClose(t, mustOpen(t, open, place))
}
