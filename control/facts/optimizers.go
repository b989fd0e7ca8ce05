package facts

import (
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Aggregates of optimisers; the id or the type of task follows.
const (
	OptimizerPrefix    = "optimizer/"
	OptimizationPrefix = "optimization/"
)

// Bounds on what is remembered of optimisers.
const (
	MaxOptimizers    = 100  // plugins; bounded where they are registered
	MaxTaskTypes     = 100  // those used last
	MaxOptimizations = 1000 // of each type of task, the last
)

// Optimizer is a registered plugin.
type Optimizer struct {
	*pb.OptimizerRegistered
	Actor        string
	RegisteredAt time.Time
}

// Optimization is how far one run came.
type Optimization struct {
	*pb.OptimizationRecorded
	Actor string
	At    time.Time
}

// Optimizers returns the registered plugins by id.
func (f *Facts) Optimizers() []*Optimizer { return sorted(f.optimizers) }

// Optimizer returns the plugin of that id, or nil.
func (f *Facts) Optimizer(id string) *Optimizer { return f.optimizers[id] }

// TaskTypes lists the types of task with records, sorted.
func (f *Facts) TaskTypes() []string { return keys(f.optimizations) }

// Optimizations returns the last MaxOptimizations runs of a type of task, oldest first.
func (f *Facts) Optimizations(taskType string) []Optimization { return f.optimizations[taskType] }

func keys[T any](m map[string]T) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func (d *draft) optimizerRegistered(p *pb.OptimizerRegistered) bool {
	id, ok := d.subject(OptimizerPrefix)
	if !ok || p.GetInfo().GetId() != id {
		return false
	}
	d.optimizers = with(d.optimizers, id, &Optimizer{p, d.event.GetActor(), d.at()})
	return true
}

func (d *draft) optimizerRemoved() bool {
	id, _ := d.subject(OptimizerPrefix)
	if d.optimizers[id] == nil {
		return false
	}
	next := map[string]*Optimizer{}
	for k, v := range d.optimizers {
		if k != id {
			next[k] = v
		}
	}
	d.optimizers = next
	return true
}

func (d *draft) optimizationRecorded(p *pb.OptimizationRecorded) bool {
	task, ok := d.subject(OptimizationPrefix)
	if !ok {
		return false
	}
	old := d.optimizations[task]
	old = old[max(0, len(old)-MaxOptimizations+1):]
	// A new slice: readers hold the one before.
	d.optimizations = with(d.optimizations, task, slices.Concat(old, []Optimization{{p, d.event.GetActor(), d.at()}}))
	if len(d.optimizations) > MaxTaskTypes {
		oldest := ""
		for _, k := range keys(d.optimizations) {
			if k != task && (oldest == "" || lastOf(d.optimizations[k]).Before(lastOf(d.optimizations[oldest]))) {
				oldest = k
			}
		}
		delete(d.optimizations, oldest) // of the clone that with made
	}
	return true
}

func lastOf(rs []Optimization) time.Time { return rs[len(rs)-1].At }

// latestOptimizers are events that lead to the present plugins and records.
func (f *Facts) latestOptimizers() (out []*pb.Event) {
	for _, o := range f.Optimizers() {
		out = append(out, &pb.Event{Aggregate: OptimizerPrefix + o.Info.GetId(), At: wire.TimePB(o.RegisteredAt), Actor: o.Actor,
			Payload: &pb.Event_OptimizerRegistered{OptimizerRegistered: o.OptimizerRegistered}})
	}
	for _, task := range f.TaskTypes() {
		for _, r := range f.optimizations[task] {
			out = append(out, &pb.Event{Aggregate: OptimizationPrefix + task, At: timestamppb.New(r.At), Actor: r.Actor,
				Payload: &pb.Event_OptimizationRecorded{OptimizationRecorded: r.OptimizationRecorded}})
		}
	}
	return out
}
