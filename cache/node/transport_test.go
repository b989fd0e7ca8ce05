package node_test

import (
	"context"
	"encoding/binary"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/internal/origintest"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/internal/memnet"
)

// pingCounter counts the HTTP/2 PING frames that are written to a connection (RFC 9113,
// sections 3.4, 4.1 and 6.7), but no answers to pings.
type pingCounter struct {
	net.Conn
	pings *atomic.Int64
	rest  []byte // of a frame that is not whole yet
	skip  int
}

func (c *pingCounter) Write(b []byte) (int, error) {
	c.rest = append(c.rest, b...)
	for len(c.rest) > 0 {
		n := min(c.skip, len(c.rest))
		c.rest, c.skip = c.rest[n:], c.skip-n
		if len(c.rest) < 9 {
			break
		}
		if c.rest[3] == 6 && c.rest[4]&1 == 0 {
			c.pings.Add(1)
		}
		c.skip = 9 + int(binary.BigEndian.Uint32(append([]byte{0}, c.rest[:3]...)))
	}
	return c.Conn.Write(b)
}

// The frames of a feed are not answered with pings on a connection with TransportOptions.
// One without sends them, so the counting counts.
func TestAFeedSendsNoPings(t *testing.T) {
	count := func(o ...grpc.DialOption) int64 {
		var pings atomic.Int64
		synctest.Test(t, func(t *testing.T) {
			n, origin := memnet.New(), origintest.New()
			stop, err := origin.Serve(n, "origin", "origin:1")
			must(t, err)
			defer stop()
			dial := n.Dialer("node")
			o = append(o, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) {
				c, err := dial(ctx, a)
				return &pingCounter{Conn: c, pings: &pings, skip: len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")}, err
			}))
			cc, err := grpc.NewClient("passthrough:///origin:1", o...)
			must(t, err)
			defer cc.Close()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			feed, err := pb.NewCoherenceClient(cc).Feed(ctx)
			must(t, err)
			must(t, feed.Send(&pb.FeedRequest{Kind: &pb.FeedRequest_Subscribe{Subscribe: &pb.Subscribe{Node: &pb.Node{Id: "node-a"}}}}))
			for i := range 20 {
				_, err := feed.Recv() // the reset, then changes
				must(t, err)
				origin.Put("x", string(rune('0'+i%10)))
				synctest.Wait()
			}
		})
		return pings.Load()
	}
	if with := count(node.TransportOptions()...); with != 0 {
		t.Errorf("%d pings were sent, want none", with)
	}
	if without := count(); without == 0 {
		t.Error("no pings were counted on a connection with default options")
	}
}
