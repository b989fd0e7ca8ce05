package unary_test

import (
	"context"
	"net"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/internal/unary"
	"github.com/outrigger-mesh/outrigger/internal/memnet"
)

// server answers each Delete as the test says.
type server struct {
	pb.UnimplementedVariablesServer
	delete func(ctx context.Context) error
}

func (s *server) Delete(ctx context.Context, r *pb.GetRequest) (*pb.DeleteResponse, error) {
	if err := s.delete(ctx); err != nil {
		return nil, err
	}
	return &pb.DeleteResponse{Version: &pb.Version{Counter: 7}}, nil
}

func TestOutcomes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		network := memnet.New()
		listener, err := network.Listen("origin", "origin:1")
		if err != nil {
			t.Fatal(err)
		}
		s := &server{}
		g := grpc.NewServer()
		pb.RegisterVariablesServer(g, s)
		go g.Serve(listener)
		defer g.Stop()
		dial := network.Dialer("node")
		cc, err := grpc.NewClient("passthrough:///origin:1", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) { return dial(ctx, a) }))
		if err != nil {
			t.Fatal(err)
		}
		defer cc.Close()
		client := pb.NewVariablesClient(unary.Conn(cc))

		for _, c := range []struct {
			name     string
			delete   func(context.Context) error
			code     codes.Code
			want     unary.Outcome
			answered bool
		}{
			{"done", func(context.Context) error { return nil }, codes.OK, unary.Done, false},
			{"refused", func(context.Context) error { return status.Error(codes.NotFound, "no") }, codes.NotFound, unary.Refused, true},
			{"server unavailable", func(context.Context) error { return status.Error(codes.Unavailable, "busy") }, codes.Unavailable, unary.Unsure, true},
			{"relayed certainty", func(ctx context.Context) error {
				if err := grpc.SetTrailer(ctx, unary.NothingDone()); err != nil {
					return err
				}
				return status.Error(codes.Unavailable, "origin away")
			}, codes.Unavailable, unary.Nothing, true},
			{"cut while answering", func(context.Context) error { network.Cut("node", "origin"); return nil }, codes.Unavailable, unary.Unsure, false},
			{"cut before asking", func(context.Context) error { t.Error("the request arrived"); return nil }, codes.Unavailable, unary.Nothing, false},
		} {
			s.delete = c.delete
			var trailer metadata.MD
			out, err := client.Delete(t.Context(), &pb.GetRequest{}, grpc.Trailer(&trailer))
			if status.Code(err) != c.code || unary.Judge(err, trailer) != c.want {
				t.Errorf("%s: got %v, outcome %d, want %v and %d", c.name, err, unary.Judge(err, trailer), c.code, c.want)
			}
			if err == nil && out.GetVersion().GetCounter() != 7 {
				t.Errorf("%s: got %v", c.name, out)
			}
			if err != nil && unary.Answered(trailer) != c.answered {
				t.Errorf("%s: answered %v with trailer %v", c.name, !c.answered, trailer)
			}
			synctest.Wait()
		}
	})
}
