package pebble

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/eventlogtest"
)

// childEnv makes the test binary a writer on the directory it names; with a leading
// "open:" a process that only tries to open it, with "fail:" a writer whose disk fails.
const childEnv = "OUTRIGGER_EVENTLOG_CHILD"

func TestMain(m *testing.M) {
	dir := os.Getenv(childEnv)
	switch {
	case dir == "":
		os.Exit(m.Run())
	case strings.HasPrefix(dir, "open:"):
		_, err := Open(strings.TrimPrefix(dir, "open:"), Options{})
		fmt.Println(outrigger.KindOf(err), err)
	case strings.HasPrefix(dir, "fail:"):
		childFails(strings.TrimPrefix(dir, "fail:"))
	default:
		childWrites(dir)
	}
}

// childWrites appends from 16 goroutines until it is killed and prints
// "<first> <id>" after each acknowledgement, in one write so that lines stay whole.
func childWrites(dir string) {
	l, err := Open(dir, Options{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf("incarnation %x\n", l.Incarnation())
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := 0; ; i++ {
				id := fmt.Sprintf("%d-%d-%d", os.Getpid(), w, i)
				got, err := l.Append(context.Background(), id, twoEvents(id, w)...)
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(1)
				}
				_, _ = os.Stdout.WriteString(fmt.Sprintf("%d %s\n", got.First, id))
			}
		})
	}
	wg.Wait()
}

// childFails acknowledges ten appends, then its disk fails just as an append too large
// for the present write-ahead log makes Pebble rotate it.
func childFails(dir string) {
	var broken atomic.Bool
	fs := hookFS{vfs.Default, func(op string) error {
		if broken.Load() && op == "sync" {
			return errDisk
		}
		return nil
	}}
	l, err := Open(dir, Options{fs: fs, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		fmt.Println(err)
		os.Exit(0)
	}
	for i := range 10 {
		id := fmt.Sprint(i)
		got, err := l.Append(context.Background(), id, twoEvents(id, i)...)
		if err != nil {
			fmt.Println(err)
			os.Exit(0)
		}
		fmt.Println(got.First, id)
	}
	broken.Store(true)
	large := &outriggerv1.Event{Cause: strings.Repeat("x", eventlog.MaxEventBytes-100)}
	_, err = l.Append(context.Background(), "lost", eventlog.Write{Aggregate: "lost", Expect: 0, Events: []*outriggerv1.Event{large, large}})
	fmt.Println("survived:", err)
	os.Exit(0)
}

// twoEvents writes one event to an aggregate of the writer and one to a shared one.
func twoEvents(id string, w int) []eventlog.Write {
	return []eventlog.Write{
		{Aggregate: fmt.Sprintf("own/%d", w), Expect: eventlog.Any, Events: []*outriggerv1.Event{{RequestId: id}}},
		{Aggregate: "shared", Expect: eventlog.Any, Events: []*outriggerv1.Event{{RequestId: id}}},
	}
}

// checkAcked fails unless every acknowledged append is in the log where it was said to
// be, whole, and its request id is remembered.
func checkAcked(t *testing.T, l *Log, acked map[string]uint64) {
	t.Helper()
	all := eventlogtest.CheckWhole(t, l)
	n := 0
	for id, first := range acked {
		if first+1 > uint64(len(all)) || all[first-1].RequestId != id || all[first].RequestId != id {
			t.Fatalf("append %s was acknowledged at %d but is not there (head %d)", id, first, len(all))
		}
		if n++; n > 100 {
			continue // the map's order is random, so this is a sample
		}
		got, err := l.Append(t.Context(), id, twoEvents(id, 0)...)
		if err != nil || !got.Duplicate || got.First != first {
			t.Fatalf("append %s repeated: %+v, %v; want the first outcome, %d", id, got, err, first)
		}
	}
}

// Kill -9 at a random moment, several times on the same directory: nothing that was
// acknowledged is lost, nothing is half there, and the log is still the same log.
func TestKill9(t *testing.T) {
	dir := t.TempDir()
	acked := map[string]uint64{}
	incarnation := ""
	for round := range 5 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		before := len(acked)
		killAfter := 20 + rand.IntN(600)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			var first uint64
			var word string
			if strings.HasPrefix(lines.Text(), "incarnation") {
				if incarnation == "" {
					incarnation = lines.Text()
				} else if incarnation != lines.Text() {
					t.Fatalf("round %d: %s, was %s", round, lines.Text(), incarnation)
				}
				continue
			}
			if n, err := fmt.Sscanf(lines.Text(), "%d %s", &first, &word); n != 2 {
				t.Fatalf("child said %q: %v", lines.Text(), err)
			}
			acked[word] = first
			// The child writes on while the kill is on its way; what it still printed counts.
			if len(acked) == before+killAfter {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := cmd.Wait(); err == nil || cmd.ProcessState.Exited() {
			t.Fatalf("child ended by itself: %v", err)
		}
		l := mustOpen(t, dir, Options{})
		checkAcked(t, l, acked)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d acknowledged appends survived 5 kills", len(acked))
}

// Another process gets a clear refusal while the log is open.
func TestLockedByAnotherProcess(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, dir, Options{})
	defer l.Close()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"=open:"+dir)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := string(out); !strings.HasPrefix(got, "unavailable ") || !strings.Contains(got, "in use by another process") || !strings.Contains(got, dir) {
		t.Fatalf("second process got %q", got)
	}
}

// A disk that fails while the write-ahead log is rotated ends the process; the cause is
// logged, the append is not acknowledged, and what was acknowledged is there.
func TestDiskFailureDuringRotation(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"=fail:"+dir)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err == nil {
		t.Fatalf("child went on after its disk failed: %s", out)
	}
	if !strings.Contains(stderr.String(), "event log disk error") || !strings.Contains(stderr.String(), errDisk.Error()) {
		t.Errorf("the cause is not in the log: %s", stderr.String())
	}
	acked := map[string]uint64{}
	for line := range strings.Lines(string(out)) {
		var first uint64
		var id string
		if _, err := fmt.Sscanf(line, "%d %s", &first, &id); err != nil {
			t.Fatalf("child said %q", line)
		}
		acked[id] = first
	}
	if len(acked) != 10 {
		t.Fatalf("child acknowledged %d appends, want 10", len(acked))
	}
	l := mustOpen(t, dir, Options{})
	checkAcked(t, l, acked)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// Power loss on a file system that forgets a random part of what was not synced: taken
// at random moments under 16 writers, the clone must hold everything acknowledged
// before it was taken, and everything a reader had seen, down to the directories.
func TestPowerLoss(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
	for round := range 15 {
		disk := vfs.NewCrashableMem()
		l := mustOpen(t, "new/parent/log", Options{fs: disk})
		var mu sync.Mutex
		acked := map[string]uint64{}
		ctx, cancel := context.WithCancel(t.Context())
		enough := make(chan struct{})
		target := 50 + rng.IntN(400)
		var wg sync.WaitGroup
		for w := range 16 {
			wg.Go(func() {
				for i := 0; ctx.Err() == nil; i++ {
					id := fmt.Sprintf("%d-%d", w, i)
					got, err := l.Append(ctx, id, twoEvents(id, w)...)
					if err != nil {
						continue // cancelled
					}
					mu.Lock()
					if acked[id] = got.First; len(acked) == target {
						close(enough)
					}
					mu.Unlock()
				}
			})
		}
		<-enough
		mu.Lock()
		before := make(map[string]uint64, len(acked))
		for id, first := range acked {
			before[id] = first
		}
		mu.Unlock()
		seen := l.Head()
		clone := disk.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(4) * 33, RNG: rand.New(rand.NewPCG(uint64(round), 7))})
		cancel()
		wg.Wait()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		after := mustOpen(t, "new/parent/log", Options{fs: clone})
		if after.Head() < seen {
			t.Fatalf("round %d: readers had seen head %d, after power loss it is %d", round, seen, after.Head())
		}
		if after.Incarnation() != l.Incarnation() {
			t.Fatalf("round %d: incarnation changed", round)
		}
		checkAcked(t, after, before)
		if err := after.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// A failed sync or write stops the log: the append in flight is unknown, later ones are
// refused, nothing undurable is ever shown, reads go on, and a new process on the same
// disk finds what was acknowledged.
func TestFailStop(t *testing.T) {
	for _, writes := range []bool{false, true} {
		for _, size := range []int{10, 100 << 10} {
			t.Run(fmt.Sprintf("writes=%v/size=%d", writes, size), func(t *testing.T) {
				disk := vfs.NewCrashableMem()
				var broken atomic.Bool
				l := mustOpen(t, "log", Options{fs: hookFS{disk, func(op string) error {
					if broken.Load() && (writes || op == "sync") {
						return errDisk
					}
					return nil
				}}})
				acked := map[string]uint64{}
				for i := range 10 {
					id := fmt.Sprint(i)
					got, err := l.Append(t.Context(), id, twoEvents(id, i)...)
					if err != nil {
						t.Fatal(err)
					}
					acked[id] = got.First
				}
				broken.Store(true)
				large := eventlog.Write{Aggregate: "lost", Expect: 0, Events: []*outriggerv1.Event{{Cause: strings.Repeat("x", size)}}}
				_, err := l.Append(t.Context(), "lost", large)
				wantKind(t, err, outrigger.Unknown)
				for range 3 {
					_, err = l.Append(t.Context(), "late", large)
					wantKind(t, err, outrigger.Unavailable)
				}
				wantKind(t, l.SaveSnapshot(t.Context(), "s", 1, []byte("x")), outrigger.Unavailable)
				if l.Head() != 20 {
					t.Errorf("head %d, want 20", l.Head())
				}
				if got := eventlogtest.CheckWhole(t, l); len(got) != 20 {
					t.Errorf("readers see %d events, want 20", len(got))
				}
				for range l.Read(t.Context(), "lost", 1) {
					t.Error("a reader saw an event that is not durable")
				}
				_ = l.Close() // may report that the store could not be closed; must return

				after := mustOpen(t, "log", Options{fs: disk.CrashClone(vfs.CrashCloneCfg{})})
				checkAcked(t, after, acked)
				if err := after.Close(); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}
