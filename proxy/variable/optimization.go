package variable

import (
	"context"
	"maps"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// optimizationKey is the key of a write's metadata that names the optimisations the
// writer holds. It is about the call and is not kept with the variable.
const optimizationKey = "optimization_id"

// underOptimization takes optimizationKey out of md and adds its ids to the caller's.
func (c *caller) underOptimization(md map[string]string) map[string]string {
	text, ok := md[optimizationKey]
	if !ok {
		return md
	}
	c.optimizations = append(c.optimizations, listed(text)...)
	rest := maps.Clone(md)
	delete(rest, optimizationKey)
	return rest
}

// StartOptimization locks a variable for one optimiser, or renews its lock. A lock held by
// another is FAILED_PRECONDITION, as for a write.
func (b *Bridge) StartOptimization(ctx context.Context, r *snakepit.StartOptimizationRequest) (*snakepit.StartOptimizationResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	v, err := b.o.Authority.StartOptimization(ctx, &pb.StartOptimizationRequest{Tenant: c.tenant, Session: r.SessionId, Identifier: r.VariableIdentifier,
		Optimizer: r.OptimizerId, Config: r.OptimizerConfig, Options: b.writeOptions(c)})
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	setHeader(ctx, b.wrote(c, r.SessionId, v, v.Version))
	return &snakepit.StartOptimizationResponse{Success: true, OptimizationId: v.GetOptimization().GetId()}, nil
}

// StopOptimization releases a variable's lock and answers with its value. The protocol has
// no field for who asks: a caller that names no optimisation of its own ends whichever
// there is. success is false when nothing was being optimised; the value is there all the same.
func (b *Bridge) StopOptimization(ctx context.Context, r *snakepit.StopOptimizationRequest) (*snakepit.StopOptimizationResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	v, err := b.o.Authority.StopOptimization(ctx, &pb.StopOptimizationRequest{Tenant: c.tenant, Session: r.SessionId, Identifier: r.VariableIdentifier,
		Force: r.Force || len(c.optimizations) == 0, Options: b.writeOptions(c)})
	if err == nil {
		setHeader(ctx, b.wrote(c, r.SessionId, v, v.Version))
		return &snakepit.StopOptimizationResponse{Success: true, FinalValue: anyFromValue(v.Value)}, nil
	}
	if err = status.FromGRPC(err, nil); !outrigger.IsKind(err, outrigger.NotFound) {
		return nil, status.ToGRPC(err)
	}
	// Is it the optimisation that is not there, or the variable?
	c.strong()
	want, token := b.o.Tokens.request(c, r.SessionId)
	a, err := b.read(ctx, c.tenant, r.SessionId, r.VariableIdentifier, want)
	setHeader(ctx, b.shown(answerHeaders(a), c, r.SessionId, a, token, a.Seen))
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	return &snakepit.StopOptimizationResponse{FinalValue: anyFromValue(a.Variable.GetValue())}, nil
}

// AddDependency records that to_variable depends on from_variable. An edge that would close
// a cycle is in-band: success=false, the text begins "would_create_cycle".
func (b *Bridge) AddDependency(ctx context.Context, r *snakepit.AddDependencyRequest) (*snakepit.AddDependencyResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, status.ToGRPC(err)
	}
	_, err = b.o.Authority.AddDependency(ctx, &pb.AddDependencyRequest{Tenant: c.tenant, Session: r.SessionId,
		Dependency: &pb.Dependency{From: r.FromVariable, To: r.ToVariable, Type: r.DependencyType}, Options: b.writeOptions(c)})
	err = status.FromGRPC(err, nil)
	if err != nil && !outrigger.IsKind(err, outrigger.Locked) {
		return nil, status.ToGRPC(err)
	}
	setHeader(ctx, authorityHeaders(nil))
	if err != nil {
		return &snakepit.AddDependencyResponse{ErrorMessage: err.Error()}, nil
	}
	return &snakepit.AddDependencyResponse{Success: true}, nil
}
