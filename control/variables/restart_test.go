package variables_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/variables"
)

// everything reads all that clients can see.
func everything(w *world) string {
	var out strings.Builder
	for _, s := range must(w, w.vars.ListSessions, &pb.ListSessionsRequest{}).GetSessions() {
		s.LastUsedAt = nil // soft state
		out.WriteString(marshal(w, s))
		for _, v := range must(w, w.vars.List, &pb.ListRequest{Session: s.GetId()}).GetVariables() {
			out.WriteString(marshal(w, v))
		}
		out.WriteString(marshal(w, must(w, w.vars.ListDependencies, &pb.ListDependenciesRequest{Session: s.GetId()})))
	}
	return out.String()
}

func marshal(w *world, m proto.Message) string {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		w.t.Fatal(err)
	}
	return string(raw)
}

// A service is stopped and started over the same log after random calls, with log
// snapshots every few events: clients see the same as before, and as without snapshots.
func TestRestartGivesTheSameState(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		log := memory.New()
		w := startWorld(t, log, variables.Options{SnapshotEvery: rapid.IntRange(1, 20).Draw(rt, "every"), VariableLimit: 5})
		for range rapid.IntRange(1, 40).Draw(rt, "calls") {
			s := rapid.SampledFrom([]string{"s", "t"}).Draw(rt, "session")
			name := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "name")
			// Whether a call succeeds is not the question here.
			switch rapid.IntRange(0, 9).Draw(rt, "call") {
			case 0, 1, 2:
				w.vars.Register(w.ctx, &pb.RegisterRequest{Key: &pb.Key{Session: s, Name: name}, Value: value("integer", "1"), Options: &pb.WriteOptions{AutoCreateSession: true}})
			case 3, 4:
				w.vars.Set(w.ctx, setReq(s, name, fmt.Sprint(rapid.IntRange(0, 9).Draw(rt, "value"))))
			case 5:
				w.vars.Delete(w.ctx, getReq(s, name))
			case 6:
				w.vars.DeleteSession(w.ctx, &pb.GetSessionRequest{Id: s})
			case 7:
				w.vars.StartOptimization(w.ctx, &pb.StartOptimizationRequest{Session: s, Identifier: name, Optimizer: "ann"})
			case 8:
				w.vars.StopOptimization(w.ctx, &pb.StopOptimizationRequest{Session: s, Identifier: name, Force: true})
			case 9:
				w.vars.AddDependency(w.ctx, &pb.AddDependencyRequest{Session: s, Dependency: &pb.Dependency{From: name, To: rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "to")}})
			}
		}
		before := everything(w)
		w.stop()
		restarted := startWorld(t, log, variables.Options{VariableLimit: 5})
		if everything(restarted) != before {
			rt.Fatal("the state after a restart differs")
		}
		restarted.stop()
		full := startWorld(t, noSnapshots{log}, variables.Options{VariableLimit: 5})
		if everything(full) != before {
			rt.Fatal("the state after a full replay differs")
		}
		full.stop()
	})
}

type noSnapshots struct{ eventlog.Log }

func (noSnapshots) LoadSnapshot(context.Context, string) (uint64, []byte, error) { return 0, nil, nil }

// A restart from a log snapshot does not read what the snapshot covers; a damaged
// snapshot, or one ahead of the log, costs a full replay and nothing else.
func TestSnapshotsAreUsedAndNotTrusted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &countingLog{Log: memory.New()}
		w := startWorld(t, log, variables.Options{SnapshotEvery: 10})
		w.session("s")
		w.register("s", "x", value("integer", "0"))
		for i := range 100 {
			w.set("s", "x", fmt.Sprint(i))
			synctest.Wait() // lets a snapshot being saved be saved
		}
		w.stop()
		position, state, err := log.LoadSnapshot(t.Context(), "variables")
		if err != nil || position != 100 {
			t.Fatalf("snapshot at %d, %v; want it at 100", position, err)
		}
		w = startWorld(t, log, variables.Options{})
		w.holds("s", "x", "99", 100)
		if log.from != position+1 {
			t.Errorf("followed the log from %d, want %d", log.from, position+1)
		}
		w.stop()
		for name, damaged := range map[string][]byte{"garbage": []byte("garbage"), "cut": state[:len(state)/2], "empty": {}} {
			if err := log.SaveSnapshot(t.Context(), "variables", position, damaged); err != nil {
				t.Fatal(err)
			}
			w = startWorld(t, log, variables.Options{})
			w.holds("s", "x", "99", 100)
			if log.from != 1 {
				t.Errorf("%s: followed the log from %d, want 1", name, log.from)
			}
			w.stop()
		}
	})
}

// countingLog remembers where it was followed from, and fails on demand.
type countingLog struct {
	eventlog.Log
	from uint64
	fail error
}

func (l *countingLog) Subscribe(ctx context.Context, from uint64) iter.Seq2[*pb.Event, error] {
	l.from = from
	if l.fail != nil {
		return func(yield func(*pb.Event, error) bool) { yield(nil, l.fail) }
	}
	return l.Log.Subscribe(ctx, from)
}

// A node that was up to date before a restart continues after it without a reset.
func TestFeedResumesOverARestart(t *testing.T) {
	log := memory.New()
	w := startWorld(t, log, variables.Options{SnapshotEvery: 2})
	w.session("s")
	w.register("s", "x", value("integer", "0"))
	w.set("s", "x", "1") // 3
	w.stop()
	w = startWorld(t, log, variables.Options{})
	n := w.subscribe(log.Incarnation(), 3)
	n.expect("(3,3]")
	w.set("s", "x", "2")
	n.expect("(3,4] s/x@4<3=2")
}

// When the log fails, Run says so and calls are refused instead of going stale.
func TestRunReportsTheLogsFailure(t *testing.T) {
	broken := outrigger.Errorf(outrigger.Unavailable, "disk on fire")
	svc, err := variables.New(&countingLog{Log: memory.New(), fail: broken}, variables.Options{Region: "us"})
	if err != nil {
		t.Fatal(err)
	}
	if err := svc.Run(t.Context()); !errors.Is(err, broken) {
		t.Errorf("Run = %v, want the log's error", err)
	}
	if _, err := svc.Get(t.Context(), getReq("s", "x")); err == nil || !strings.Contains(err.Error(), "has stopped") {
		t.Errorf("Get after the failure: %v", err)
	}
	if err := svc.Run(t.Context()); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("second Run = %v", err)
	}
}
