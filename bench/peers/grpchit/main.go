// Command grpchit is the peer of a cached variable read over gRPC: a grpc-go server with
// its defaults that answers /peer.Map/Get, StringValue to BytesValue, from an in-memory
// map.
package main

import (
	"context"
	"flag"
	"fmt"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/bench/peers/internal/serve"
)

// values is the map; it is not changed once it serves.
type values map[string]*wrapperspb.BytesValue

func (v values) get(_ context.Context, key string) (*wrapperspb.BytesValue, error) {
	b, ok := v[key]
	if !ok {
		return nil, status.Errorf(codes.NotFound, "%s not found", key)
	}
	return b, nil
}

// handle is what generated code does for a unary call.
func handle(srv any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	in := new(wrapperspb.StringValue)
	if err := dec(in); err != nil {
		return nil, err
	}
	return srv.(values).get(ctx, in.GetValue())
}

func main() {
	keys := flag.Int("keys", 1000, "number of keys")
	size := flag.Int("body", 200, "value bytes")
	flag.Parse()
	v := values{}
	for i := range *keys {
		v[fmt.Sprintf("name-%04d", i)] = wrapperspb.Bytes([]byte(strings.Repeat("v", *size)))
	}
	s := grpc.NewServer()
	s.RegisterService(&grpc.ServiceDesc{ServiceName: "peer.Map", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Get", Handler: handle}}}, v)
	serve.Main(serve.Server(s.Serve))
}
