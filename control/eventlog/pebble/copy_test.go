package pebble

import (
	"context"
	"fmt"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// source is a log with events of three aggregates.
func source(t *testing.T, n int) *Log {
	t.Helper()
	l := mustOpen(t, t.TempDir(), Options{})
	t.Cleanup(func() { l.Close() })
	for i := range n {
		if _, err := l.Append(t.Context(), fmt.Sprint("id", i), one(fmt.Sprint("a/", i%3), eventlog.Any)); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

func all(t *testing.T, l eventlog.Reader) []*outriggerv1.Event {
	t.Helper()
	var out []*outriggerv1.Event
	for e, err := range l.ReadAll(t.Context(), 1) {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, e)
	}
	return out
}

// A copy holds the same bytes under the same positions, over a restart too; it goes on where
// it was and takes nothing else.
func TestCopyIsTheSameLog(t *testing.T) {
	from, dir := source(t, 30), t.TempDir()
	want := all(t, from)
	c, err := OpenCopy(dir, from.Incarnation(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Ingest(t.Context(), want[:7]); err != nil {
		t.Fatal(err)
	}
	if err := c.Ingest(t.Context(), want[7:20]); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]*outriggerv1.Event{
		"again": want[19:20], "a gap": want[21:23], "nothing": nil,
		"another sequence": {with(want[20], func(e *outriggerv1.Event) { e.Sequence++ })},
		"no time":          {with(want[20], func(e *outriggerv1.Event) { e.At = nil })},
		"half wrong":       {want[20], want[22]},
	} {
		if err := c.Ingest(t.Context(), bad); err == nil || c.Head() != 20 {
			t.Errorf("%s: error %v, head %d", name, err, c.Head())
		}
	}
	if _, err := c.Append(t.Context(), "", one("a/0", eventlog.Any)); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("append to a copy: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}

	if c, err = OpenCopy(dir, 0, Options{}); err != nil { // the leader need not be there
		t.Fatal(err)
	}
	if c.Incarnation() != from.Incarnation() || c.Head() != 20 {
		t.Fatalf("reopened as %x at %d", c.Incarnation(), c.Head())
	}
	if err := c.Ingest(t.Context(), want[20:]); err != nil {
		t.Fatal(err)
	}
	got := all(t, c)
	for i := range want {
		if !proto.Equal(got[i], want[i]) {
			t.Fatalf("position %d: copied\n%v, was\n%v", i+1, got[i], want[i])
		}
		a, errA := from.store.get(eventKey(uint64(i + 1)))
		b, errB := c.store.get(eventKey(uint64(i + 1)))
		if errA != nil || errB != nil || string(a) != string(b) {
			t.Fatalf("position %d is stored as other bytes (%v, %v)", i+1, errA, errB)
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

func with(e *outriggerv1.Event, change func(*outriggerv1.Event)) *outriggerv1.Event {
	c := proto.CloneOf(e)
	change(c)
	return c
}

// A directory is a log of its own or a copy of one log, and nothing turns one into the other
// but Promote, which makes it another log.
func TestCopyIdentity(t *testing.T) {
	from, dir := source(t, 3), t.TempDir()
	if _, err := OpenCopy(dir, 0, Options{}); !outrigger.IsKind(err, outrigger.NotFound) {
		t.Fatalf("a copy of nothing: %v", err)
	}
	c, err := OpenCopy(dir, from.Incarnation(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Ingest(context.Background(), all(t, from)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := OpenCopy(dir, from.Incarnation()+1, Options{}); !outrigger.IsKind(err, outrigger.Conflict) {
		t.Errorf("the copy of another log: %v", err)
	}
	if _, err := Open(dir, Options{}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("a copy opened as a log: %v", err)
	}
	own := t.TempDir()
	mustOpen(t, own, Options{}).Close()
	if _, err := OpenCopy(own, 0, Options{}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("a log opened as a copy: %v", err)
	}
	if err := Promote(own, Options{}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("a log promoted: %v", err)
	}
	if err := Promote(dir, Options{}); err != nil {
		t.Fatal(err)
	}
	l := mustOpen(t, dir, Options{})
	defer l.Close()
	if l.Incarnation() == from.Incarnation() || l.Head() != 3 {
		t.Errorf("promoted: incarnation %x, head %d", l.Incarnation(), l.Head())
	}
	done, err := l.Append(t.Context(), "", one("a/0", 1))
	if err != nil || done.First != 4 || done.Events[0].Hlc <= all(t, from)[2].Hlc {
		t.Errorf("it goes on with %v, %v", done, err)
	}
}
