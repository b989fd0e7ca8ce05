package control

import (
	"context"

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
