package eventlogtest

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

func testRead(t *testing.T, l eventlog.Log) {
	// Names that are prefixes of one another must not see each other's events.
	mustAppend(t, l, "", write("a", 0, "1"), write("ab", 0, "2"), write("a", 1, "3"), write("a\u0080", 0, "4"), write("a ", 0, "5"))
	for _, c := range []struct {
		aggregate string
		from      uint64
		want      []string
	}{
		{"a", 0, []string{"a/1@1 1", "a/2@3 3"}},
		{"a", 1, []string{"a/1@1 1", "a/2@3 3"}},
		{"a", 2, []string{"a/2@3 3"}},
		{"a", 3, nil},
		{"ab", 1, []string{"ab/1@2 2"}},
		{"a\u0080", 1, []string{"a\u0080/1@4 4"}},
		{"a ", 1, []string{"a /1@5 5"}},
		{"absent", 1, nil},
		{"", 1, nil},
		{"a\x00", 1, nil},
	} {
		if got := lines(collect(t, l.Read(t.Context(), c.aggregate, c.from))); !slices.Equal(got, c.want) {
			t.Errorf("read %q from %d: %v, want %v", c.aggregate, c.from, got, c.want)
		}
	}
	for from, want := range map[uint64]int{0: 5, 1: 5, 5: 1, 6: 0, 1 << 63: 0} {
		if got := collect(t, l.ReadAll(t.Context(), from)); len(got) != want {
			t.Errorf("read all from %d: %d events, want %d", from, len(got), want)
		}
	}
	// What is appended after the call is not part of it.
	all, one := l.ReadAll(t.Context(), 1), l.Read(t.Context(), "a", 1)
	mustAppend(t, l, "", write("a", 2, "later"))
	if a, o := len(collect(t, all)), len(collect(t, one)); a != 5 || o != 2 {
		t.Errorf("sequences made before an append yield %d and %d events, want 5 and 2", a, o)
	}
	// A sequence may be stopped early and used again.
	for e := range l.ReadAll(t.Context(), 2) {
		if e.Position != 2 {
			t.Errorf("first event is at %d, want 2", e.Position)
		}
		break
	}
	CheckWhole(t, l)
}

// Enough events that an engine which reads in pieces needs several, with appends from
// inside the loop body to show that nothing is locked while the consumer works.
func testReadChunks(t *testing.T, l eventlog.Log) {
	const events = 700
	for i := range events / 10 {
		w := write("a", eventlog.Any)
		for j := range 9 {
			w.Events = append(w.Events, event(fmt.Sprint(i, j)))
		}
		mustAppend(t, l, "", w, write("b", eventlog.Any, fmt.Sprint(i)))
	}
	n := 0
	for e, err := range l.Read(t.Context(), "a", 1) {
		if err != nil {
			t.Fatal(err)
		}
		n++
		if e.Sequence != uint64(n) {
			t.Fatalf("sequence %d, want %d", e.Sequence, n)
		}
		if n%100 == 0 {
			mustAppend(t, l, "", write("c", eventlog.Any, "while reading"))
		}
	}
	if n != events/10*9 {
		t.Fatalf("read %d events of the aggregate, want %d", n, events/10*9)
	}
	CheckWhole(t, l)
}

func testReadContext(t *testing.T, l eventlog.Log) {
	mustAppend(t, l, "", write("a", 0, "1", "2", "3"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	seen, failed := 0, error(nil)
	for _, err := range l.ReadAll(ctx, 1) {
		if err != nil {
			failed = err
			continue
		}
		seen++
		cancel()
	}
	if seen != 1 {
		t.Errorf("%d events after cancelling at the first", seen)
	}
	wantKind(t, failed, outrigger.Cancelled)
	expired, cancel2 := context.WithTimeout(t.Context(), 0)
	defer cancel2()
	for _, err := range l.Read(expired, "a", 1) {
		wantKind(t, err, outrigger.Timeout)
	}
	if _, _, err := l.LoadSnapshot(ctx, "s"); !outrigger.IsKind(err, outrigger.Cancelled) {
		t.Errorf("load with a cancelled context: %v", err)
	}
}

func testSubscribe(t *testing.T, l eventlog.Log) {
	mustAppend(t, l, "", write("a", 0, "1", "2", "3"))
	all, tail := follow(t, l, 0), follow(t, l, 3)
	got := all.take(t, 3)
	mustAppend(t, l, "", write("b", 0, "4"))
	mustAppend(t, l, "", write("b", 1, "5"), write("a", 3, "6"))
	got = append(got, all.take(t, 3)...)
	checkSame(t, got, CheckWhole(t, l))
	checkSame(t, tail.take(t, 4), got[2:])
	for _, f := range []*follower{all, tail} {
		if err := f.stop(); err != nil {
			t.Errorf("a cancelled subscription yielded %v", err)
		}
	}
}

func testSubscribeFuture(t *testing.T, l eventlog.Log) {
	f := follow(t, l, 3)
	for i := range 4 {
		mustAppend(t, l, "", write("a", int64(i), fmt.Sprint(i+1)))
	}
	if got := lines(f.take(t, 2)); !slices.Equal(got, []string{"a/3@3 3", "a/4@4 4"}) {
		t.Fatalf("subscriber from 3 saw %v", got)
	}
	if err := f.stop(); err != nil {
		t.Errorf("a cancelled subscription yielded %v", err)
	}
}

// A subscriber that does not take its events delays neither writers nor others, and
// misses nothing when it goes on.
func testSubscribeSlow(t *testing.T, l eventlog.Log) {
	slow, fast := follow(t, l, 1), follow(t, l, 1)
	const n = 600
	for i := range n {
		mustAppend(t, l, "", write("a", int64(i), fmt.Sprint(i)))
		if i%100 == 99 {
			fast.take(t, 100)
		}
	}
	checkSame(t, slow.take(t, n), CheckWhole(t, l))
	for _, f := range []*follower{slow, fast} {
		if err := f.stop(); err != nil {
			t.Errorf("a cancelled subscription yielded %v", err)
		}
	}
}

func testSnapshots(t *testing.T, l eventlog.Log) {
	ctx := t.Context()
	load := func(name string, position uint64, state []byte) {
		t.Helper()
		p, s, err := l.LoadSnapshot(ctx, name)
		if err != nil || p != position || !bytes.Equal(s, state) {
			t.Fatalf("load %q: position %d, %d bytes, error %v; want %d, %d bytes", name, p, len(s), err, position, len(state))
		}
	}
	save := func(name string, position uint64, state []byte) {
		t.Helper()
		if err := l.SaveSnapshot(ctx, name, position, state); err != nil {
			t.Fatal(err)
		}
	}
	load("variables", 0, nil)
	wantKind(t, l.SaveSnapshot(ctx, "variables", 1, nil), outrigger.Invalid) // beyond the head
	mustAppend(t, l, "", write("a", 0, "1", "2"))
	wantKind(t, l.SaveSnapshot(ctx, "variables", 0, nil), outrigger.Invalid)
	wantKind(t, l.SaveSnapshot(ctx, "", 1, nil), outrigger.Invalid)

	state := []byte("first")
	save("variables", 1, state)
	state[0] = 'X' // the log has its own copy
	load("variables", 1, []byte("first"))
	big := bytes.Repeat([]byte("0123456789abcdef"), 3<<20/16+1) // more than any one chunk
	save("variables", 2, big)
	save("variables2", 2, []byte("other"))
	load("variables", 2, big)
	save("variables", 1, []byte("last save wins"))
	load("variables", 1, []byte("last save wins"))
	save("variables", 2, nil)
	load("variables", 2, nil)
	load("variables2", 2, []byte("other"))
	CheckWhole(t, l)
}

// A load during saves gets one of the saved states whole, never a mixture.
func testSnapshotsWhole(t *testing.T, l eventlog.Log) {
	mustAppend(t, l, "", write("a", 0, "1"))
	save := func(i int) {
		if err := l.SaveSnapshot(t.Context(), "s", 1, bytes.Repeat([]byte{byte(i)}, 5<<20)); err != nil {
			t.Error(err)
		}
	}
	save(0)
	saved := make(chan struct{})
	go func() {
		defer close(saved)
		for i := range 8 {
			save(i)
		}
	}()
	for done := false; !done; {
		select {
		case <-saved:
			done = true
		default:
		}
		_, state, err := l.LoadSnapshot(t.Context(), "s")
		if err != nil {
			t.Errorf("load: %v", err)
		} else if len(state) != 5<<20 || bytes.Count(state, state[:1]) != len(state) {
			t.Errorf("loaded a mixture of states, %d bytes", len(state))
		}
		if t.Failed() {
			<-saved
			return
		}
	}
}

func testClose(t *testing.T, l eventlog.Log) {
	ctx := t.Context()
	mustAppend(t, l, "", write("a", 0, "1"))
	f := follow(t, l, 1)
	f.take(t, 1)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	wantKind(t, <-f.err, outrigger.Unavailable)
	if err := l.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	_, err := l.Append(ctx, "", write("a", 1, "2"))
	wantKind(t, err, outrigger.Unavailable)
	wantKind(t, l.SaveSnapshot(ctx, "s", 1, nil), outrigger.Unavailable)
	_, _, err = l.LoadSnapshot(ctx, "s")
	wantKind(t, err, outrigger.Unavailable)
	for name, seq := range map[string]func(func(error)){
		"read": func(f func(error)) {
			for _, err := range l.Read(ctx, "a", 1) {
				f(err)
			}
		},
		"read all": func(f func(error)) {
			for _, err := range l.ReadAll(ctx, 1) {
				f(err)
			}
		},
		"subscribe": func(f func(error)) {
			for _, err := range l.Subscribe(ctx, 2) {
				f(err)
			}
		},
	} {
		yields := 0
		seq(func(err error) {
			yields++
			wantKind(t, err, outrigger.Unavailable)
		})
		if yields != 1 {
			t.Errorf("%s after close yields %d times, want once", name, yields)
		}
	}
}
