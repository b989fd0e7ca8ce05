package node

import "google.golang.org/grpc"

// TransportOptions are how a connection that carries a feed is to be dialled: what
// Options.Origin should be made with, beside credentials and the like.
//
// The receive windows are fixed: 64 KiB of one stream and 16 MiB of the connection. By
// default gRPC estimates them, for which it sends a ping with every message it receives
// while no other ping is under way. On a feed, whose messages come one by one, that doubles
// what both sides write and read. The window of a stream is small so that a node that
// cannot keep up stops the sender soon: what is held back there is coalesced, what is on its
// way is not, and the answers to heartbeats wait behind it; at 100,000 frames a second on
// two cores no gain over 4 MiB could be measured. So a fetch gets 64 KiB a round
// trip, 64 MB/s within a region.
func TransportOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithStaticStreamWindowSize(64 << 10),
		grpc.WithStaticConnWindowSize(16 << 20),
	}
}
