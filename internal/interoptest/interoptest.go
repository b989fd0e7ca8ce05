// Package interoptest runs gRPC's interoperability suite, client and server unmodified, for
// tests of what stands between the two.
package interoptest

import (
	"context"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/interop"
	testpb "google.golang.org/grpc/interop/grpc_testing"
)

// Register adds the suite's server to s.
func Register(s *grpc.Server) { testpb.RegisterTestServiceServer(s, interop.NewTestServer()) }

// Run runs the cases that need neither TLS nor credentials over conn, each as a test of t; ctx
// bounds them all. The functions of the suite end the process when a case fails.
func Run(ctx context.Context, t *testing.T, conn *grpc.ClientConn) {
	tc := testpb.NewTestServiceClient(conn)
	for name, do := range map[string]func(context.Context, testpb.TestServiceClient, ...grpc.CallOption){
		"empty_unary": interop.DoEmptyUnaryCall, "large_unary": interop.DoLargeUnaryCall, "client_streaming": interop.DoClientStreaming,
		"server_streaming": interop.DoServerStreaming, "ping_pong": interop.DoPingPong, "empty_stream": interop.DoEmptyStream,
		"timeout_on_sleeping_server": interop.DoTimeoutOnSleepingServer, "cancel_after_begin": interop.DoCancelAfterBegin,
		"cancel_after_first_response": interop.DoCancelAfterFirstResponse, "custom_metadata": interop.DoCustomMetadata,
		"status_code_and_message": interop.DoStatusCodeAndMessage, "special_status_message": interop.DoSpecialStatusMessage,
		"unimplemented_service": func(ctx context.Context, _ testpb.TestServiceClient, _ ...grpc.CallOption) {
			interop.DoUnimplementedService(ctx, testpb.NewUnimplementedServiceClient(conn))
		},
		"unimplemented_method": func(ctx context.Context, _ testpb.TestServiceClient, _ ...grpc.CallOption) {
			interop.DoUnimplementedMethod(ctx, conn)
		},
	} {
		t.Run(name, func(t *testing.T) { do(ctx, tc) })
	}
}
