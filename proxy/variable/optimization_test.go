package variable_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
)

func startReq(name, optimizer string, config ...string) *snakepit.StartOptimizationRequest {
	r := &snakepit.StartOptimizationRequest{SessionId: "s", VariableIdentifier: name, OptimizerId: optimizer, OptimizerConfig: map[string]string{}}
	for i := 0; i < len(config); i += 2 {
		r.OptimizerConfig[config[i]] = config[i+1]
	}
	return r
}

func stopReq(name string) *snakepit.StopOptimizationRequest {
	return &snakepit.StopOptimizationRequest{SessionId: "s", VariableIdentifier: name}
}

// optimizing checks what a reader is shown, from the nearest tier and from the authority.
func (w *world) optimizing(name, optimizer string) {
	w.t.Helper()
	for _, bypass := range []bool{false, true} {
		r := getReq(name)
		r.BypassCache = bypass
		s := ok(w, w.bridge.GetVariable, r).Variable.OptimizationStatus
		if s.GetOptimizing() != (optimizer != "") || s.GetOptimizerId() != optimizer || s.GetOptimizing() && s.StartedAt == nil {
			w.t.Fatalf("bypassing the cache %v: status %v, want optimizer %q", bypass, s, optimizer)
		}
	}
}

// A whole optimisation over the bridge: lock, refusals on every path, writes of the holder,
// release.
func TestOptimization(t *testing.T) {
	const lockedText = "variable_locked_for_optimization"
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		w.register("x", "float", "0.5")
		w.register("y", "float", "0")
		ok(w, w.bridge.SetVariable, setReq("x", "0.6"))
		w.optimizing("x", "")

		started := ok(w, w.bridge.StartOptimization, startReq("x", "ann"))
		if !started.Success || started.OptimizationId == "" {
			t.Fatalf("start: %v", started)
		}
		w.optimizing("x", "ann")
		w.holds("x", "0.6", 1) // the value's version is what it was

		// Nobody else gets the lock, the holder gets the same one.
		refused(w, w.bridge.StartOptimization, startReq("x", "bob"), codes.FailedPrecondition, lockedText)
		if again := ok(w, w.bridge.StartOptimization, startReq("x", "ann")); again.OptimizationId != started.OptimizationId {
			t.Errorf("asked again: %v, before %v", again, started)
		}

		// Every way to write is closed to others: the bridge, our own API, a batch, rollback, delete.
		refused(w, w.bridge.SetVariable, setReq("x", "0.7"), codes.FailedPrecondition, lockedText)
		refused(w, w.native.Set, &pb.SetRequest{Session: "s", Identifier: "x", Value: &pb.Value{Json: []byte("0.7")}}, codes.FailedPrecondition, lockedText)
		refused(w, w.direct.Set, &pb.SetRequest{Session: "s", Identifier: "x", Value: &pb.Value{Json: []byte("0.7")}}, codes.FailedPrecondition, lockedText)
		refused(w, w.bridge.RollbackVariable, &snakepit.RollbackVariableRequest{SessionId: "s", VariableIdentifier: "x"}, codes.FailedPrecondition, lockedText)
		refused(w, w.bridge.DeleteVariable, &snakepit.DeleteVariableRequest{SessionId: "s", VariableIdentifier: "x"}, codes.FailedPrecondition, lockedText)
		both := &snakepit.BatchSetVariablesRequest{SessionId: "s", Updates: map[string]*anypb.Any{"x": value("float", "0.7"), "y": value("float", "0.7")}}
		if r := ok(w, w.bridge.SetVariables, both); r.Success || !strings.HasPrefix(r.Errors["x"], lockedText) || r.NewVersions["y"] != 1 {
			t.Errorf("batch: %v", r)
		}
		both.Atomic = true
		if r := ok(w, w.bridge.SetVariables, both); r.Success || !strings.HasPrefix(r.Errors["x"], lockedText) || len(r.NewVersions) != 0 {
			t.Errorf("atomic batch: %v", r)
		}
		w.holds("x", "0.6", 1)

		// The holder writes by the metadata key or the header, in a batch too, and the key does not stay.
		mine := setReq("x", "0.8")
		mine.Metadata = map[string]string{"optimization_id": started.OptimizationId, "trial": "1"}
		if r := ok(w, w.bridge.SetVariable, mine); !r.Success || r.NewVersion != 2 {
			t.Errorf("the holder's write: %v", r)
		}
		if v := w.get("x"); v.Metadata["optimization_id"] != "" || v.Metadata["trial"] != "1" {
			t.Errorf("metadata %v", v.Metadata)
		}
		if r := ok(w, w.bridge.SetVariables, both, outrigger.HeaderOptimization, "opt_9_9, "+started.OptimizationId); !r.Success || r.NewVersions["x"] != 3 || r.NewVersions["y"] != 2 {
			t.Errorf("the holder's batch: %v", r)
		}
		w.optimizing("x", "ann")

		// History is of versions; locks are not among them, however many there were.
		for range 5 {
			ok(w, w.bridge.StartOptimization, startReq("x", "ann"))
		}
		h := ok(w, w.bridge.GetVariableHistory, &snakepit.GetVariableHistoryRequest{SessionId: "s", VariableIdentifier: "x", Limit: 3}).Entries
		if len(h) != 3 || h[0].Version != 3 || h[2].Version != 1 {
			t.Errorf("history %v", h)
		}

		// A stop with an optimisation that is not the present one is refused; one with none ends it.
		refused(w, w.bridge.StopOptimization, stopReq("x"), codes.FailedPrecondition, "lock_held_by", outrigger.HeaderOptimization, "opt_9_9")
		if r := ok(w, w.bridge.StopOptimization, stopReq("x")); !r.Success || string(r.FinalValue.Value) != "0.7" {
			t.Errorf("stop: %v", r)
		}
		w.optimizing("x", "")
		if r := ok(w, w.bridge.StopOptimization, stopReq("x")); r.Success || string(r.FinalValue.Value) != "0.7" {
			t.Errorf("stop of nothing: %v", r)
		}
		refused(w, w.bridge.StopOptimization, stopReq("nobody"), codes.NotFound, "Variable not found: nobody")
		refused(w, w.bridge.StartOptimization, startReq("nobody", "ann"), codes.NotFound, "Variable not found: nobody")
		refused(w, w.bridge.StartOptimization, startReq("x", ""), codes.InvalidArgument, "optimizer")
		ok(w, w.bridge.SetVariable, setReq("x", "0.1"))

		// The holder of before is fenced, though nobody holds the lock now.
		mine.Value = value("float", "0.9")
		refused(w, w.bridge.SetVariable, mine, codes.FailedPrecondition, "has ended")
		w.holds("x", "0.1", 4)

		// A start of higher priority takes over if it says so.
		ok(w, w.bridge.StartOptimization, startReq("x", "ann", "priority", "1"))
		refused(w, w.bridge.StartOptimization, startReq("x", "bob", "on_conflict", "preempt"), codes.FailedPrecondition, lockedText)
		ok(w, w.bridge.StartOptimization, startReq("x", "bob", "on_conflict", "preempt", "priority", "2"))
		w.optimizing("x", "bob")
	})
}

// A lock outlives the authority's process, and five minutes without a sign end it: at once
// for whoever writes, and for readers with the sweep.
func TestOptimizationLockSurvivesARestartAndGoesStale(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		w.register("x", "float", "0.5")
		w.register("y", "float", "0.5")
		id := ok(w, w.bridge.StartOptimization, startReq("x", "ann")).OptimizationId
		ok(w, w.bridge.StartOptimization, startReq("y", "ann"))
		ok(w, w.bridge.AddDependency, &snakepit.AddDependencyRequest{SessionId: "s", FromVariable: "x", ToVariable: "y"})

		w.stopAuthority()
		origin, stop := w.startAuthority()
		w.stopAuthority = stop
		again := pb.NewVariablesClient(origin)
		set := &pb.SetRequest{Session: "s", Identifier: "x", Value: &pb.Value{Json: []byte("0.7")}}
		refused(w, again.Set, set, codes.FailedPrecondition, "variable_locked_for_optimization")
		if v := ok(w, again.Get, &pb.GetRequest{Session: "s", Identifier: "x"}); v.GetOptimization().GetId() != id || v.GetOptimization().GetOptimizer() != "ann" {
			t.Fatalf("after the restart: %v", v)
		}
		if d := ok(w, again.ListDependencies, &pb.ListDependenciesRequest{Session: "s", From: "x"}); len(d.Dependencies) != 1 || len(d.Order) != 1 || d.Order[0] != "y" {
			t.Fatalf("after the restart: %v", d)
		}
		time.Sleep(4 * time.Minute)
		refused(w, again.Set, set, codes.FailedPrecondition, "variable_locked_for_optimization")
		// A sign of the holder of x: five minutes from here.
		set.Options = &pb.WriteOptions{OptimizationIds: []string{id}}
		ok(w, again.Set, set)
		set.Options = nil
		time.Sleep(2*time.Minute + time.Second) // the lock of y is stale and swept
		refused(w, again.Set, set, codes.FailedPrecondition, "variable_locked_for_optimization")
		if v := ok(w, again.Get, &pb.GetRequest{Session: "s", Identifier: "y"}); v.GetOptimization() != nil || v.GetVersion().GetCounter() != 0 {
			t.Fatalf("the sweep left the stale lock: %v", v)
		}
		time.Sleep(3 * time.Minute)
		synctest.Wait() // the sweep is over, if it ran
		ok(w, again.Set, set)
		if v := ok(w, again.Get, &pb.GetRequest{Session: "s", Identifier: "x"}); v.GetOptimization() != nil {
			t.Fatalf("a write past a stale lock left it: %v", v)
		}
	})
}

func TestDependencies(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		for _, name := range []string{"a", "b", "c"} {
			w.register(name, "float", "0")
		}
		add := func(from, to, kind string) *snakepit.AddDependencyResponse {
			return ok(w, w.bridge.AddDependency, &snakepit.AddDependencyRequest{SessionId: "s", FromVariable: from, ToVariable: to, DependencyType: kind})
		}
		for _, e := range [][2]string{{"a", "b"}, {"b", "c"}, {"a", "b"}} { // twice is once
			if r := add(e[0], e[1], "compute"); !r.Success || r.ErrorMessage != "" {
				t.Errorf("%v: %v", e, r)
			}
		}
		if r := add("c", "a", "data"); r.Success || r.ErrorMessage != "would_create_cycle: a → b → c → a" {
			t.Errorf("cycle: %v", r)
		}
		list := ok(w, w.native.ListDependencies, &pb.ListDependenciesRequest{Session: "s", From: "a"})
		if len(list.Dependencies) != 2 || strings.Join(list.Order, " ") != "b c" || list.Dependencies[0].Type != "compute" {
			t.Errorf("dependencies %v", list)
		}
		refused(w, w.native.AddDependency, &pb.AddDependencyRequest{Session: "s", Dependency: &pb.Dependency{From: "c", To: "b"}}, codes.FailedPrecondition, "would_create_cycle: b → c → b")
		refused(w, w.bridge.AddDependency, &snakepit.AddDependencyRequest{SessionId: "s", FromVariable: "a", ToVariable: "nobody"}, codes.NotFound, "Variable not found: nobody")
		refused(w, w.bridge.AddDependency, &snakepit.AddDependencyRequest{SessionId: "s", FromVariable: "a", ToVariable: "c", DependencyType: "magic"}, codes.InvalidArgument, "magic")
		refused(w, w.bridge.AddDependency, &snakepit.AddDependencyRequest{SessionId: "t", FromVariable: "a", ToVariable: "b"}, codes.NotFound, "Session not found: t")
		// A variable takes its edges with it.
		ok(w, w.bridge.DeleteVariable, &snakepit.DeleteVariableRequest{SessionId: "s", VariableIdentifier: "b"})
		if r := add("c", "a", "data"); !r.Success {
			t.Errorf("after b is gone: %v", r)
		}
	})
}
