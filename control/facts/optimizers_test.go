package facts

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// The history of a type of task is its last thousand runs, that of types the last hundred,
// and a snapshot holds what a replay gives.
func TestOptimizersAndTheirRuns(t *testing.T) {
	f, at := new(Facts), time.Unix(1_700_000_000, 0)
	apply := func(aggregate string, e *pb.Event) {
		at = at.Add(time.Second)
		e.Aggregate, e.Position, e.At, e.Actor = aggregate, f.Position()+1, timestamppb.New(at), "ann"
		f = Apply(f, e)
	}
	run := func(task string, reached float64) {
		apply(OptimizationPrefix+task, &pb.Event{Payload: &pb.Event_OptimizationRecorded{OptimizationRecorded: &pb.OptimizationRecorded{Optimizer: "random", Task: "x", Baseline: 1e6, Reached: reached}}})
	}
	register := func(id, address string) {
		apply(OptimizerPrefix+id, &pb.Event{Payload: &pb.Event_OptimizerRegistered{OptimizerRegistered: &pb.OptimizerRegistered{Info: &pb.OptimizerInfo{Id: id}, Address: address}}})
	}
	register("mine", "unix:one")
	register("gone", "unix:two")
	before := f
	register("mine", "unix:three")
	apply(OptimizerPrefix+"gone", &pb.Event{Payload: &pb.Event_OptimizerRemoved{OptimizerRemoved: &pb.OptimizerRemoved{}}})
	if before.Optimizer("mine").GetAddress() != "unix:one" || before.Optimizer("gone") == nil {
		t.Error("the facts before have changed")
	}
	if len(f.Optimizers()) != 1 || f.Optimizer("mine").GetAddress() != "unix:three" {
		t.Errorf("plugins %v", f.Optimizers())
	}
	policy := f.PolicyPosition()
	for i := range MaxOptimizations + 5 {
		run("busy", float64(i))
	}
	if rs := f.Optimizations("busy"); len(rs) != MaxOptimizations || rs[0].GetReached() != 5 || rs[len(rs)-1].GetReached() != MaxOptimizations+4 {
		t.Errorf("%d runs are kept", len(rs))
	}
	for i := range MaxTaskTypes {
		run(fmt.Sprintf("type-%03d", i), 1)
	}
	if len(f.TaskTypes()) != MaxTaskTypes || len(f.Optimizations("busy")) != 0 || len(f.Optimizations("type-000")) != 1 {
		t.Errorf("%d types are kept, busy among them: %v", len(f.TaskTypes()), len(f.Optimizations("busy")) > 0)
	}
	if f.PolicyPosition() != policy {
		t.Error("a run moved the policy's position")
	}
	var k kept
	state, err := k.encode(f)
	if err != nil {
		t.Fatal(err)
	}
	again, _, err := decode(state)
	if err != nil {
		t.Fatal(err)
	}
	o := again.Optimizer("mine")
	if o == nil || o.GetAddress() != "unix:three" || o.Actor != "ann" || !o.RegisteredAt.Equal(f.Optimizer("mine").RegisteredAt) || len(again.Optimizers()) != 1 {
		t.Errorf("after a snapshot: %v", again.Optimizers())
	}
	if fmt.Sprint(again.TaskTypes()) != fmt.Sprint(f.TaskTypes()) || again.Optimizations("type-000")[0].GetReached() != 1 || !again.Optimizations("type-007")[0].At.Equal(f.Optimizations("type-007")[0].At) {
		t.Error("after a snapshot the runs are others")
	}
}
