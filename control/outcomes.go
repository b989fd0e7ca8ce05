package control

import (
	"context"

	"google.golang.org/grpc"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/monitor"
	"github.com/outrigger-mesh/outrigger/control/trials"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// outcomes is the evidence on experiments as a gRPC service. As with Reports, whoever owns
// the listener decides who connects.
type outcomes struct {
	pb.UnimplementedOutcomesServer
	s *Server
}

// Record implements pb.OutcomesServer.
func (o outcomes) Record(ctx context.Context, r *pb.RecordOutcomesRequest) (*pb.RecordOutcomesResponse, error) {
	if err := o.s.isReady(); err != nil {
		return nil, status.ToGRPC(err)
	}
	out, err := o.s.trials.Record(ctx, r)
	return out, status.ToGRPC(err)
}

// answer counts an outcome for the version that answered.
func (s *Server) answer(a trials.Answer) (repeated bool, err error) {
	return s.monitor.Score(monitor.Score{Model: a.Model, Version: a.Version, Metric: a.Metric, Unit: experiments.UnitHash(a.Model, a.Unit),
		N: a.N, Sum: a.Sum, At: a.At, ID: a.ID})
}

// cost is a model's cost formula.
func (s *Server) cost(model string) string {
	if m := s.facts.Facts().Model(model); m != nil {
		return m.Cost
	}
	return ""
}

// reports refuses deltas while the control plane catches up, so that they are sent again
// when their experiments are known.
type reports struct {
	pb.ReportsServer
	s *Server
}

// Push implements pb.ReportsServer.
func (r reports) Push(stream grpc.BidiStreamingServer[pb.Delta, pb.DeltaAck]) error {
	if err := r.s.isReady(); err != nil {
		return status.ToGRPC(err)
	}
	return r.ReportsServer.Push(stream)
}
