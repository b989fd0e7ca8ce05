package pebble

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/eventlogtest"
)

// slowDisk is a memory file system whose syncs wait while it is held.
type slowDisk struct {
	mu      sync.Mutex
	held    chan struct{} // nil, or closed by release
	broken  error         // outcome of syncs from the release on
	entered chan struct{} // gets a value when a sync begins to wait
}

func (d *slowDisk) hook(op string) error {
	d.mu.Lock()
	held := d.held
	d.mu.Unlock()
	if op == "sync" && held != nil {
		select {
		case d.entered <- struct{}{}:
		default:
		}
		<-held
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if op == "sync" {
		return d.broken
	}
	return nil
}

func (d *slowDisk) hold() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.held = make(chan struct{})
}

func (d *slowDisk) release(outcome error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.broken = outcome
	close(d.held)
	d.held = nil
}

func openSlow(t *testing.T, opts Options) (*Log, *slowDisk) {
	d := &slowDisk{entered: make(chan struct{}, 1)}
	opts.fs = hookFS{vfs.NewMem(), d.hook}
	l := mustOpen(t, "log", opts)
	t.Cleanup(func() {
		if err := l.Close(); err != nil && d.broken == nil {
			t.Error(err)
		}
	})
	return l, d
}

func one(aggregate string, expect int64) eventlog.Write {
	return eventlog.Write{Aggregate: aggregate, Expect: expect, Events: []*outriggerv1.Event{{Actor: "x"}}}
}

// While the disk has not answered, nobody sees the event and nobody is told anything
// that follows from it: not its append, not a duplicate of it, not a conflict with it.
func TestNothingIsToldBeforeTheSync(t *testing.T) {
	synctest.Test(t, testNothingIsTold)
}

func testNothingIsTold(t *testing.T) {
	l, disk := openSlow(t, Options{})
	disk.hold()
	type answer struct {
		who string
		got eventlog.Appended
		err error
	}
	answers := make(chan answer, 3)
	call := func(who, id string, w eventlog.Write) {
		got, err := l.Append(t.Context(), id, w)
		answers <- answer{who, got, err}
	}
	go call("append", "id", one("a", 0))
	<-disk.entered // the append is in the write-ahead log and waits for its sync
	go call("duplicate", "id", one("a", 0))
	go call("conflict", "", one("a", 0))
	synctest.Wait() // the other two have gone as far as they can
	for range l.ReadAll(t.Context(), 1) {
		t.Error("a reader saw an event that is not durable")
	}
	for range l.Read(t.Context(), "a", 1) {
		t.Error("a reader saw an event that is not durable")
	}
	if l.Head() != 0 || len(answers) != 0 {
		t.Errorf("head %d and %d answers before the sync", l.Head(), len(answers))
	}
	disk.release(nil)
	for range 3 {
		switch a := <-answers; a.who {
		case "append", "duplicate":
			// Which of the two with the same id is the duplicate is decided by arrival,
			// and the first was in the log before the second was made.
			if a.err != nil || a.got.First != 1 || a.got.Duplicate != (a.who == "duplicate") {
				t.Errorf("%s: %+v, %v", a.who, a.got, a.err)
			}
		case "conflict":
			wantKind(t, a.err, outrigger.Conflict)
		}
	}
}

// When the sync fails, what waited behind it is not believed: the append and its
// duplicate may or may not be on the disk, the conflict certainly wrote nothing.
func TestFailedSyncTakesItsFollowersAlong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, disk := openSlow(t, Options{})
		disk.hold()
		var first, duplicate, conflict error
		var wg sync.WaitGroup
		wg.Go(func() { _, first = l.Append(t.Context(), "id", one("a", 0)) })
		<-disk.entered
		wg.Go(func() { _, duplicate = l.Append(t.Context(), "id", one("a", 0)) })
		synctest.Wait()
		wg.Go(func() { _, conflict = l.Append(t.Context(), "", one("a", 0)) })
		synctest.Wait()
		disk.release(errDisk)
		wg.Wait()
		wantKind(t, first, outrigger.Unknown)
		wantKind(t, duplicate, outrigger.Unknown)
		wantKind(t, conflict, outrigger.Unavailable)
		if l.Head() != 0 {
			t.Errorf("head %d after a failed sync", l.Head())
		}
	})
}

// What a save that did not finish left behind does not get into the next one.
func TestUnfinishedSnapshotIsReplaced(t *testing.T) {
	l, _ := openSlow(t, Options{})
	if _, err := l.Append(t.Context(), "", one("a", 0)); err != nil {
		t.Fatal(err)
	}
	if err := l.writeChunks(t.Context(), "s", 1, make([]byte, 3*snapshotChunk)); err != nil {
		t.Fatal(err)
	}
	if p, state, err := l.LoadSnapshot(t.Context(), "s"); p != 0 || state != nil || err != nil {
		t.Errorf("an unfinished save is visible: %d, %d bytes, %v", p, len(state), err)
	}
	if err := l.SaveSnapshot(t.Context(), "s", 1, []byte("short")); err != nil {
		t.Fatal(err)
	}
	if p, state, err := l.LoadSnapshot(t.Context(), "s"); p != 1 || string(state) != "short" || err != nil {
		t.Errorf("loaded %d, %d bytes, %v", p, len(state), err)
	}
}

// With the disk stuck, the pipeline fills to its bounds and callers who give up are told
// the truth: Unavailable was never written, Unknown is found again by its request id.
// Each append fills a group by itself, so at most one group being synced, maxInFlight
// behind it and one in the committer's hands have been taken.
func TestGivingUpTellsTheTruth(t *testing.T) {
	l, disk := openSlow(t, Options{Queue: 1})
	const callers, atMostTaken = 20, maxInFlight + 2
	disk.hold()
	ctx, cancel := context.WithCancel(t.Context())
	full := func(i int) eventlog.Write {
		w := eventlog.Write{Aggregate: fmt.Sprint("a", i), Expect: 0}
		for range maxGroupEvents {
			w.Events = append(w.Events, &outriggerv1.Event{})
		}
		return w
	}
	errs := make([]error, callers)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() { _, errs[i] = l.Append(ctx, fmt.Sprint("id", i), full(i)) })
	}
	<-disk.entered
	cancel()
	wg.Wait()
	disk.release(nil)
	unknown := 0
	for i, err := range errs {
		if outrigger.IsKind(err, outrigger.Unknown) {
			unknown++
		} else {
			wantKind(t, err, outrigger.Unavailable)
		}
		got, again := l.Append(t.Context(), fmt.Sprint("id", i), full(i))
		if again != nil || got.Duplicate != outrigger.IsKind(err, outrigger.Unknown) {
			t.Errorf("append %d failed with %v; repeated it gives duplicate %v, %v", i, err, got.Duplicate, again)
		}
	}
	if unknown == 0 || unknown > atMostTaken {
		t.Errorf("%d of %d appends were taken, want 1 to %d", unknown, callers, atMostTaken)
	}
	eventlogtest.CheckWhole(t, l)
}

// Close with appends in flight: each is either done or refused, and none is lost.
func TestCloseUnderLoad(t *testing.T) {
	disk := vfs.NewMem()
	l := mustOpen(t, "log", Options{fs: disk})
	acked := make([]uint64, 16)
	started := make(chan struct{}, len(acked))
	var wg sync.WaitGroup
	for w := range acked {
		wg.Go(func() {
			for i := 0; ; i++ {
				got, err := l.Append(t.Context(), "", one(fmt.Sprint(w), int64(i)))
				if err != nil {
					if !outrigger.IsKind(err, outrigger.Unavailable) {
						t.Errorf("writer %d: %v", w, err)
					}
					return
				}
				acked[w] = got.Events[0].Sequence
				if i == 5 {
					started <- struct{}{}
				}
			}
		})
	}
	for range acked {
		<-started
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	l = mustOpen(t, "log", Options{fs: disk})
	have := map[string]uint64{}
	for _, e := range eventlogtest.CheckWhole(t, l) {
		have[e.Aggregate] = e.Sequence
	}
	for w, want := range acked {
		if have[fmt.Sprint(w)] != want {
			t.Errorf("writer %d: last sequence %d, acknowledged %d", w, have[fmt.Sprint(w)], want)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// Exactly the last Window request ids are remembered, across restarts, and a smaller
// window after a restart forgets the oldest for good.
func TestWindowAcrossRestarts(t *testing.T) {
	disk := vfs.NewMem()
	remembered := func(l *Log, id string) bool {
		t.Helper()
		// An append that must conflict unless it is a duplicate, so that asking adds nothing.
		got, err := l.Append(t.Context(), id, one("a", 1<<40))
		if err != nil {
			wantKind(t, err, outrigger.Conflict)
		}
		return got.Duplicate
	}
	check := func(l *Log, from, to int) {
		t.Helper()
		for i := range 20 {
			if got, want := remembered(l, fmt.Sprint(i)), i >= from && i < to; got != want {
				t.Errorf("id %d remembered: %v, want %v", i, got, want)
			}
		}
	}
	l := mustOpen(t, "log", Options{fs: disk, Window: 10})
	for i := range 15 {
		if _, err := l.Append(t.Context(), fmt.Sprint(i), one("a", int64(i))); err != nil {
			t.Fatal(err)
		}
	}
	check(l, 5, 15)
	for _, window := range []struct{ size, from int }{{10, 5}, {4, 11}, {10, 11}} {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l = mustOpen(t, "log", Options{fs: disk, Window: window.size})
		check(l, window.from, 15)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// Event times come from Options.Now, and a clock that is behind after a restart does
// not turn them back.
func TestClockAcrossRestarts(t *testing.T) {
	disk := vfs.NewMem()
	day := time.Date(2030, 5, 1, 0, 0, 0, 0, time.UTC)
	for i, now := range []time.Time{day, day.Add(-time.Hour), day.Add(time.Hour)} {
		l := mustOpen(t, "log", Options{fs: disk, Now: func() time.Time { return now }})
		got, err := l.Append(t.Context(), "", one("a", int64(i)))
		if err != nil {
			t.Fatal(err)
		}
		want := now
		if now.Before(day) {
			want = day
		}
		if at := got.Events[0].At.AsTime(); !at.Equal(want) {
			t.Errorf("life %d: event is dated %v, want %v", i, at, want)
		}
		eventlogtest.CheckWhole(t, l)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
