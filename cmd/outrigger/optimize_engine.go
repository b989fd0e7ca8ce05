//go:build !dataplane

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/optimizers"
	"github.com/outrigger-mesh/outrigger/experiments/algorithms"
)

// engine is what searches: a built-in algorithm, or a plugin that the control plane knows.
type engine struct {
	Algorithm string `json:"algorithm,omitempty"`
	Address   string `json:"address,omitempty"` // of a plugin
	TaskType  string `json:"task_type,omitempty"`
}

// choose settles which engine a new optimisation has: the one asked for by name, or that of
// a strategy.
func (o *tuner) choose(ctx context.Context, space *algorithms.Space) (engine, error) {
	if o.strategy != "" {
		params, err := optimizers.ParamsPB(space)
		if err != nil {
			return engine{}, err
		}
		s, err := o.cl.admin.SelectOptimizer(ctx, &pb.SelectOptimizerRequest{Strategy: o.strategy, TaskType: o.taskType, Task: o.session + "/" + o.record, Params: params, Budget: int32(o.budget), Noisy: true})
		if err != nil {
			return engine{}, err
		}
		return engine{s.GetOptimizer().GetInfo().GetId(), s.GetOptimizer().GetAddress(), o.taskType}, nil
	}
	for _, b := range algorithms.Builtin() {
		if b.ID == o.algorithm {
			return engine{o.algorithm, "", o.taskType}, nil
		}
	}
	all, err := o.cl.admin.ListOptimizers(ctx, &pb.ListRequestAll{})
	if err != nil {
		return engine{}, err
	}
	for _, x := range all.GetOptimizers() {
		if x.GetInfo().GetId() == o.algorithm {
			return engine{o.algorithm, x.GetAddress(), o.taskType}, nil
		}
	}
	return engine{}, outrigger.Errorf(outrigger.NotFound, "algorithm %q not found among the built-in ones and the registered plugins; `outrigger optimizer list` names them", o.algorithm)
}

// open returns the engine's algorithm, and what lets go of it.
func (e engine) open(ctx context.Context) (algorithms.Algorithm, func(), error) {
	if e.Address == "" {
		for _, b := range algorithms.Builtin() {
			if b.ID == e.Algorithm {
				return b, func() {}, nil
			}
		}
		return algorithms.Algorithm{}, nil, outrigger.Errorf(outrigger.NotFound, "algorithm %q not found among the built-in ones", e.Algorithm)
	}
	conn, err := grpc.NewClient(e.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return algorithms.Algorithm{}, nil, outrigger.Wrap(outrigger.Invalid, err, "plugin at "+e.Address)
	}
	ctx, cancel := context.WithCancel(ctx)
	release := func() {
		cancel()
		conn.Close()
	}
	p, err := optimizers.Connect(ctx, conn)
	if err == nil && p.ID != e.Algorithm {
		err = outrigger.Errorf(outrigger.Conflict, "the plugin at %s is %q now; register it anew", e.Address, p.ID)
	}
	if err != nil {
		release()
		return algorithms.Algorithm{}, nil, outrigger.Wrap(outrigger.KindOf(err), err, "plugin "+e.Algorithm+" at "+e.Address)
	}
	return p.Algorithm, release, nil
}

// broken is why an optimiser has nothing more to ask, nil if it is only finished.
func broken(opt algorithms.Optimizer) error {
	if f, ok := opt.(optimizers.Failing); ok {
		return f.Err()
	}
	return nil
}

// remember adds the run to the history that strategies choose by. What was optimised is told
// by session, variables and objective: their losses can be compared.
func (o *tuner) remember(ctx context.Context) error {
	if o.t.Best == nil || o.t.First == nil || o.t.TaskType == "" {
		return nil
	}
	what, err := json.Marshal([]any{o.session, o.t.Variables, o.objective})
	if err != nil {
		return err
	}
	h := fnv.New64a()
	_, _ = h.Write(what) // never fails
	_, err = o.cl.admin.RecordOptimization(ctx, &pb.RecordOptimizationRequest{TaskType: o.t.TaskType, Task: fmt.Sprintf("%016x", h.Sum64()), Optimizer: o.t.Algorithm,
		Baseline: *o.t.First, Reached: o.t.Best.Loss, Evaluations: int32(o.t.Done), Actor: o.cl.flags.actor,
		RequestId: fmt.Sprintf("optimize/%s/%s/%s", o.cl.flags.tenant, o.session, o.record)})
	if gstatus.Code(err) == codes.Unimplemented {
		return nil // a node agent, which has no history
	}
	return err
}
