package node

import "google.golang.org/grpc"

// TransportOptions are how a connection that carries a feed is to be dialled: what
// Options.Origin should be made with, beside credentials and the like.
//
// The receive windows are fixed: 4 MiB of one stream and 16 MiB of the connection. By
// default gRPC estimates them, for which it sends a ping with every message it receives
// while no other ping is under way. On a feed, whose messages come one by one, that doubles
// what both sides write and read, and the doubled work was most of the feed's lag under
// load. Fixed windows limit one stream to 4 MiB a round trip, 40 MB/s at 100 ms, and a
// connection to 16 MiB of what was not taken off it yet, as the estimate would.
func TransportOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithStaticStreamWindowSize(4 << 20),
		grpc.WithStaticConnWindowSize(16 << 20),
	}
}
