package replicate

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/pause"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// standPause is how long changes are gathered before the leader is told.
const standPause = 20 * time.Millisecond

// standBatch bounds the nodes of one message.
const standBatch = 1000

// Standings is who follows policy through this replica.
type Standings interface {
	// Standings lists them; Changed returns a channel that the next change closes.
	Standings() []*pb.NodeStanding
	Changed() <-chan struct{}
}

// Stand keeps the leader told of who follows policy here, until ctx ends (then it returns
// nil). Call it beside Run.
func (f *Follower) Stand(ctx context.Context, s Standings) error {
	for failures := 0; ctx.Err() == nil; failures++ {
		told, err := f.stand(ctx, s)
		if told {
			failures = 0
		}
		if ctx.Err() == nil {
			f.opts.Logger.Debug("the leader is not told of this replica's nodes", "error", err)
		}
		if !pause.For(ctx, backoff(failures)) {
			return nil
		}
	}
	return nil
}

// stand tells one stream; told means it was opened and took something.
func (f *Follower) stand(ctx context.Context, s Standings) (told bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if !f.Linked() {
		return false, outrigger.Errorf(outrigger.Unavailable, "the leader is away")
	}
	stream, err := f.client.Stand(ctx)
	if err != nil {
		return false, status.FromGRPC(err, nil)
	}
	ended := make(chan error, 1)
	go func() { // the end of a stream is seen by receiving only; cancel ends this, too
		ended <- status.FromGRPC(stream.RecvMsg(&pb.StandResponse{}), stream.Trailer())
		cancel()
	}()
	known := make(map[string]*pb.NodeStanding)
	for first := true; ; first = false {
		changed := s.Changed()
		var news []*pb.NodeStanding
		for _, n := range s.Standings() {
			if id := n.GetNode().GetId(); !proto.Equal(known[id], n) {
				known[id] = n
				news = append(news, n)
			}
		}
		for first || len(news) > 0 {
			batch := news[:min(len(news), standBatch)]
			if stream.Send(&pb.ReplicaStanding{Replica: f.opts.Name, Nodes: batch}) != nil {
				return told, <-ended
			}
			news, first, told = news[len(batch):], false, true
		}
		select {
		case <-changed:
		case err := <-ended:
			return told, err
		}
		if !pause.For(ctx, standPause) {
			return told, <-ended
		}
	}
}

// disconnected is n as known when its replica went away.
func disconnected(n *pb.NodeStanding, now time.Time) *pb.NodeStanding {
	out := proto.CloneOf(n)
	out.Connected, out.Since = false, timestamppb.New(now)
	return out
}
