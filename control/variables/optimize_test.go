package variables

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// What a start, a write and a stop are told, for every state of the lock.
func TestLockDecisions(t *testing.T) {
	t0 := time.Unix(1_700_000_000, 0)
	held := func(renewed time.Time) *variable {
		return &variable{pb: &pb.Variable{Id: "var_x_3", Key: &pb.Key{Tenant: "default", Session: "s", Name: "x"}, Value: &pb.Value{Type: "float", Json: []byte("1")},
			Version: &pb.Version{Counter: 4}, Optimization: &pb.Optimization{Id: "opt_3_17", Optimizer: "ann", Priority: 5, StartedAt: timestamppb.New(t0), RenewedAt: timestamppb.New(renewed)}}}
	}
	free := func() *variable {
		v := held(t0)
		v.pb.Optimization = nil
		return v
	}
	fresh, old := held(t0), held(t0.Add(-StaleAfter))
	by := func(ids ...string) author { return author{actor: "x", now: t0, optimizations: ids} }
	start := func(optimizer string, config ...string) func(*variable, author) (string, error) {
		c := map[string]string{}
		for i := 0; i < len(config); i += 2 {
			c[config[i]] = config[i+1]
		}
		return func(v *variable, a author) (string, error) {
			e, err := decideStart(v, &pb.StartOptimizationRequest{Optimizer: optimizer, Config: c}, a)
			if err != nil {
				return "", err
			}
			if id := e.GetOptimizationStarted().GetRenews(); id != "" {
				return "renews " + id, nil
			}
			return "starts", nil
		}
	}
	set := func(v *variable, a author) (string, error) {
		e, err := decideSet(testOrigin, v, setInput{value: &pb.Value{Json: []byte("2")}}, a)
		return "under " + e.GetVariableSet().GetOptimizationId(), err
	}
	remove := func(v *variable, a author) (string, error) {
		_, err := decideDelete(testOrigin, v, a)
		return "deletes", err
	}
	stop := func(force bool) func(*variable, author) (string, error) {
		return func(v *variable, a author) (string, error) {
			e, err := decideStop(v, force, a)
			return e.GetOptimizationStopped().GetReason(), err
		}
	}
	locked := "variable_locked_for_optimization: lock_held_by \"ann\""
	for _, tt := range []struct {
		name   string
		v      *variable
		who    author
		decide func(*variable, author) (string, error)
		want   string // outcome, or the beginning of the error
		kind   outrigger.Kind
	}{
		{"start, free", free(), by(), start("bob"), "starts", 0},
		{"start, held by another", fresh, by(), start("bob"), locked, outrigger.Locked},
		{"start, held by the same", fresh, by(), start("ann"), "renews opt_3_17", 0},
		{"start, stale lock of another", old, by(), start("bob"), "starts", 0},
		{"start, own stale lock: a new id, the old holder may be another process", old, by(), start("ann"), "starts", 0},
		{"preempt with more", fresh, by(), start("bob", "on_conflict", "preempt", "priority", "6"), "starts", 0},
		{"preempt with as much", fresh, by(), start("bob", "on_conflict", "preempt", "priority", "5"), locked, outrigger.Locked},
		{"priority without preempt", fresh, by(), start("bob", "priority", "9"), locked, outrigger.Locked},
		{"unknown policy", free(), by(), start("bob", "on_conflict", "wait"), "config on_conflict", outrigger.Invalid},
		{"priority is no number", free(), by(), start("bob", "priority", "high"), "config priority", outrigger.Invalid},
		{"no optimizer", free(), by(), start(""), "optimizer is empty", outrigger.Invalid},

		{"set, free", free(), by(), set, "under ", 0},
		{"set by others", fresh, by(), set, locked, outrigger.Locked},
		{"set by the holder", fresh, by("opt_9_1", "opt_3_17"), set, "under opt_3_17", 0},
		{"set under an optimisation of another variable", fresh, by("opt_30_17"), set, locked, outrigger.Locked},
		{"set by others, stale", old, by(), set, "under ", 0},
		{"set by the holder, stale but not taken over", old, by("opt_3_17"), set, "under opt_3_17", 0},
		{"set by the holder of before, taken over", fresh, by("opt_3_11"), set, "optimization opt_3_11 of x has ended", outrigger.Locked},
		{"set by the holder of before, free", free(), by("opt_3_11"), set, "optimization opt_3_11 of x has ended", outrigger.Locked},
		{"set of a free variable beside one that is held", free(), by("opt_4_11"), set, "under ", 0},
		{"delete by others", fresh, by(), remove, locked, outrigger.Locked},
		{"delete by the holder", fresh, by("opt_3_17"), remove, "deletes", 0},

		{"stop, free", free(), by(), stop(true), "optimization not found", outrigger.NotFound},
		{"stop by others", fresh, by(), stop(false), locked, outrigger.Locked},
		{"stop by others, forced", fresh, by(), stop(true), "forced", 0},
		{"stop by the holder", fresh, by("opt_3_17"), stop(false), "stopped", 0},
		{"stop by the holder, forced", fresh, by("opt_3_17"), stop(true), "stopped", 0},
		{"stop by the holder of before", fresh, by("opt_3_11"), stop(false), "optimization opt_3_11", outrigger.Locked},
	} {
		got, err := tt.decide(tt.v, tt.who)
		if err != nil {
			got = err.Error()
		}
		if kind := outrigger.KindOf(err); err != nil && kind != tt.kind || err == nil && tt.kind != 0 || !strings.HasPrefix(got, tt.want) || err == nil && got != tt.want {
			t.Errorf("%s: %q, %v; want %q of kind %v", tt.name, got, err, tt.want, tt.kind)
		}
	}
	if !stale(old.pb.Optimization, t0) || stale(held(t0.Add(1-StaleAfter)).pb.Optimization, t0) {
		t.Errorf("a lock is stale exactly %v after its last sign", StaleAfter)
	}
}

// The fold of a lock's life: ids follow from positions, a write under the lock renews it,
// one that is not (which only a stale lock lets through) ends it.
func TestLockFold(t *testing.T) {
	st := newState(testOrigin, testLimits)
	aggregate := varAggregate(outrigger.Key{Tenant: "default", Session: "s", Name: "x"})
	position, sequence := uint64(0), uint64(0)
	put := func(aggregate string, e *pb.Event) {
		position++
		if strings.HasPrefix(aggregate, "var/") {
			sequence++
			e.Sequence = sequence
		}
		e.Aggregate, e.Position, e.At = aggregate, position, timestamppb.New(time.Unix(int64(position), 0))
		apply(st, e)
	}
	started := func(optimizer, renews string) {
		put(aggregate, &pb.Event{Payload: &pb.Event_OptimizationStarted{OptimizationStarted: &pb.OptimizationStarted{Optimizer: optimizer, Renews: renews}}})
	}
	set := func(id string) {
		put(aggregate, &pb.Event{Payload: &pb.Event_VariableSet{VariableSet: &pb.VariableSet{Value: &pb.Value{Type: "float", Json: []byte("1")}, OptimizationId: id}}})
	}
	shows := func(want string) {
		t.Helper()
		v := st.sessions[sessionID{"default", "s"}].vars["x"]
		got := "free"
		if o := v.pb.GetOptimization(); o != nil {
			got = o.Optimizer + " " + o.Id + " " + o.StartedAt.AsTime().Format("05") + " " + o.RenewedAt.AsTime().Format("05")
		}
		if got != want || (len(st.locked) == 1) != (want != "free") {
			t.Fatalf("at %d: %s (%d in the index), want %s", position, got, len(st.locked), want)
		}
		if v.seq != sequence || v.position != position || v.pb.GetVersion().GetDot().GetPosition() != position {
			t.Fatalf("at %d: sequence %d position %d dot %v", position, v.seq, v.position, v.pb.GetVersion().GetDot())
		}
	}
	put("session/default/s", &pb.Event{Payload: &pb.Event_SessionCreated{SessionCreated: &pb.SessionCreated{}}})
	put(aggregate, &pb.Event{Payload: &pb.Event_VariableRegistered{VariableRegistered: &pb.VariableRegistered{Id: "var_x_1", Value: &pb.Value{Type: "float", Json: []byte("0")}}}})
	shows("free")
	started("ann", "")
	shows("ann opt_1_3 03 03")
	set("opt_1_3")
	shows("ann opt_1_3 03 04")
	started("ann", "opt_1_3")
	shows("ann opt_1_3 03 05")
	started("bob", "opt_1_2") // renews what is gone: a lock of its own
	shows("bob opt_1_6 06 06")
	set("")
	shows("free")
	started("bob", "")
	put(aggregate, &pb.Event{Payload: &pb.Event_VariableDeleted{VariableDeleted: &pb.VariableDeleted{}}})
	shows("free")
	put(aggregate, &pb.Event{Payload: &pb.Event_VariableRegistered{VariableRegistered: &pb.VariableRegistered{Id: "var_x_2", Value: &pb.Value{Type: "float", Json: []byte("0")}}}})
	started("eve", "")
	put("session/default/s", &pb.Event{Payload: &pb.Event_SessionDeleted{SessionDeleted: &pb.SessionDeleted{Reason: reasonCleanup}}})
	if len(st.locked) != 0 {
		t.Errorf("a deleted session leaves %d locks in the index", len(st.locked))
	}
}

func TestDependencyDecisions(t *testing.T) {
	graph := dependencies{{"a", "b"}: "data", {"b", "c"}: "compute", {"a", "d"}: "data", {"d", "c"}: "data", {"x", "y"}: "data"}
	for _, tt := range []struct {
		from, to, kind string
		want           string
	}{
		{"c", "e", "", "data"},
		{"c", "e", "compute", "compute"},
		{"c", "e", "magic", `dependency type is "magic"`},
		{"a", "b", "data", ""}, // there already
		{"a", "b", "compute", "b depends on a already"},
		{"b", "a", "", "would_create_cycle: a → b → a"},
		{"c", "a", "", "would_create_cycle: a → b → c → a"},
		{"a", "a", "", "would_create_cycle: a → a"},
		{"y", "a", "", "data"},
	} {
		e, err := decideDependency(graph, edge{tt.from, tt.to}, tt.kind, author{})
		got := e.GetDependencyAdded().GetDependency().GetType()
		if err != nil {
			got = err.Error()
		}
		if !strings.HasPrefix(got, tt.want) || tt.want == "" && got != "" {
			t.Errorf("%s → %s (%s): %q, want %q", tt.from, tt.to, tt.kind, got, tt.want)
		}
	}
	for from, want := range map[string]string{"": "a b d c x y", "a": "b d c", "b": "c", "c": "", "x": "y", "nobody": ""} {
		if got := strings.Join(graph.order(from), " "); got != want {
			t.Errorf("order from %q is %q, want %q", from, got, want)
		}
	}
	if got := graph.without("b"); len(got) != 3 || len(graph) != 5 {
		t.Errorf("without b: %v", got)
	}
	full := make(dependencies)
	for i := range maxDependencies {
		full[edge{"a", strings.Repeat("b", i+1)}] = "data"
	}
	if _, err := decideDependency(full, edge{"a", "c"}, "", author{}); !outrigger.IsKind(err, outrigger.Exhausted) {
		t.Errorf("an edge beyond the limit: %v", err)
	}
	if got := full.order("a"); len(got) != maxDependencies || !slices.IsSorted(got) {
		t.Errorf("%d dependents", len(got))
	}
}
