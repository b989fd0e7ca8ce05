package control

import (
	"context"

	"google.golang.org/grpc"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
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
