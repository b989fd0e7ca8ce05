package variable

import (
	"context"

	"google.golang.org/grpc"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Counted returns to with its writes counted in c; everything else is passed on as it is.
func Counted(to pb.VariablesClient, c *Counters) pb.VariablesClient {
	return countedAuthority{VariablesClient: to, counters: c}
}

type countedAuthority struct {
	pb.VariablesClient
	counters *Counters
}

func counted[T any](c *Counters, out T, err error) (T, error) {
	if err != nil {
		c.WriteErrors.Add(1)
	} else {
		c.Writes.Add(1)
	}
	return out, err
}

// Register implements pb.VariablesClient.
func (a countedAuthority) Register(ctx context.Context, r *pb.RegisterRequest, o ...grpc.CallOption) (*pb.Variable, error) {
	out, err := a.VariablesClient.Register(ctx, r, o...)
	return counted(a.counters, out, err)
}

// Set implements pb.VariablesClient.
func (a countedAuthority) Set(ctx context.Context, r *pb.SetRequest, o ...grpc.CallOption) (*pb.Variable, error) {
	out, err := a.VariablesClient.Set(ctx, r, o...)
	return counted(a.counters, out, err)
}

// BatchSet implements pb.VariablesClient. A call that was answered is a write, though some
// of its variables may have been refused.
func (a countedAuthority) BatchSet(ctx context.Context, r *pb.BatchSetRequest, o ...grpc.CallOption) (*pb.BatchSetResponse, error) {
	out, err := a.VariablesClient.BatchSet(ctx, r, o...)
	return counted(a.counters, out, err)
}

// Delete implements pb.VariablesClient.
func (a countedAuthority) Delete(ctx context.Context, r *pb.GetRequest, o ...grpc.CallOption) (*pb.DeleteResponse, error) {
	out, err := a.VariablesClient.Delete(ctx, r, o...)
	return counted(a.counters, out, err)
}

// Rollback implements pb.VariablesClient.
func (a countedAuthority) Rollback(ctx context.Context, r *pb.RollbackRequest, o ...grpc.CallOption) (*pb.Variable, error) {
	out, err := a.VariablesClient.Rollback(ctx, r, o...)
	return counted(a.counters, out, err)
}

// StartOptimization implements pb.VariablesClient.
func (a countedAuthority) StartOptimization(ctx context.Context, r *pb.StartOptimizationRequest, o ...grpc.CallOption) (*pb.Variable, error) {
	out, err := a.VariablesClient.StartOptimization(ctx, r, o...)
	return counted(a.counters, out, err)
}

// StopOptimization implements pb.VariablesClient.
func (a countedAuthority) StopOptimization(ctx context.Context, r *pb.StopOptimizationRequest, o ...grpc.CallOption) (*pb.Variable, error) {
	out, err := a.VariablesClient.StopOptimization(ctx, r, o...)
	return counted(a.counters, out, err)
}

// AddDependency implements pb.VariablesClient.
func (a countedAuthority) AddDependency(ctx context.Context, r *pb.AddDependencyRequest, o ...grpc.CallOption) (*pb.Dependencies, error) {
	out, err := a.VariablesClient.AddDependency(ctx, r, o...)
	return counted(a.counters, out, err)
}
