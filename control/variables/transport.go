package variables

import "google.golang.org/grpc"

// TransportOptions are how a server that carries feeds is to be made, beside limits,
// credentials and the like. It fixes the receive windows, 1 MiB of one stream and 4 MiB of
// a connection, because estimating them costs a ping and its answer for each heartbeat of
// each node; see TransportOptions in cache/node. A request of 16 MiB takes 16 round trips.
func TransportOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.StaticStreamWindowSize(1 << 20),
		grpc.StaticConnWindowSize(4 << 20),
	}
}
