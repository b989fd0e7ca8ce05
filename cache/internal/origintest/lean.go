package origintest

import (
	"context"
	"net"

	"google.golang.org/grpc"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/feed"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// RefuseLean makes the origin refuse feeds without gRPC that are opened from here on.
func (o *Origin) RefuseLean() { o.mu.Lock(); o.onlyGRPC = true; o.mu.Unlock() }

// Leans returns how many feeds without gRPC were opened.
func (o *Origin) Leans() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.leans
}

// serveFeed serves a feed without gRPC as Feed serves a stream.
func (o *Origin) serveFeed(conn net.Conn) {
	defer conn.Close()
	o.mu.Lock()
	refused := o.onlyGRPC
	o.mu.Unlock()
	if refused {
		return // as a server does that knows HTTP/2 only
	}
	s, err := feed.Accept(conn, o.failing)
	if err != nil {
		return
	}
	o.mu.Lock()
	o.leans++
	o.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if err := o.Feed(&leanStream{server: s, ctx: ctx}); err != nil {
		_, _ = conn.Write(feed.AppendEnd(nil, status.FromGRPC(err, nil))) // the client may have gone
	}
}

// leanStream is a feed without gRPC in the guise of a stream.
type leanStream struct {
	grpc.ServerStream // nothing but what is overridden is used
	server            *feed.Server
	ctx               context.Context
}

func (l *leanStream) Context() context.Context       { return l.ctx }
func (l *leanStream) Recv() (*pb.FeedRequest, error) { return l.server.Recv() }
func (l *leanStream) Send(f *pb.FeedFrame) error {
	b, err := feed.AppendMessage(nil, f)
	if err == nil {
		_, err = l.server.Conn.Write(b)
	}
	return err
}
