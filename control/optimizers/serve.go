package optimizers

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments/algorithms"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// Serve makes a plugin of an algorithm written in Go.
func Serve(a algorithms.Algorithm) pb.OptimizerPluginServer { return server{a: a} }

type server struct {
	pb.UnimplementedOptimizerPluginServer
	a algorithms.Algorithm
}

// Describe implements pb.OptimizerPluginServer.
func (s server) Describe(context.Context, *pb.DescribeOptimizerRequest) (*pb.OptimizerInfo, error) {
	return About(s.a.Info), nil
}

// Optimize implements pb.OptimizerPluginServer.
func (s server) Optimize(stream grpc.BidiStreamingServer[pb.OptimizerQuestion, pb.OptimizerAnswer]) error {
	var o algorithms.Optimizer
	for {
		q, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		var a *pb.OptimizerAnswer
		switch q := q.GetQuestion().(type) {
		case *pb.OptimizerQuestion_Start:
			o, err = s.begin(q.Start)
			a = &pb.OptimizerAnswer{Answer: &pb.OptimizerAnswer_Started{Started: &pb.OptimizerStarted{}}}
		case *pb.OptimizerQuestion_Ask:
			a, err = ask(o, int(q.Ask.GetN()))
		case *pb.OptimizerQuestion_Tell:
			a, err = tell(o, q.Tell.GetResults())
		default:
			err = outrigger.Errorf(outrigger.Invalid, "question is neither start, ask nor tell")
		}
		if err != nil {
			return status.ToGRPC(err)
		}
		if err := stream.Send(a); err != nil {
			return err
		}
	}
}

func (s server) begin(q *pb.OptimizerStart) (algorithms.Optimizer, error) {
	space, err := Space(q.GetParams())
	if err != nil {
		return nil, err
	}
	cfg := algorithms.Config{Space: space, Seed: q.GetSeed(), Budget: int(q.GetBudget()), Noisy: q.GetNoisy()}
	if q.Start != nil {
		cfg.Start = q.GetStart().AsMap()
	}
	return s.a.New(cfg)
}

var errNotStarted = outrigger.Errorf(outrigger.Invalid, "the first question is not start")

func ask(o algorithms.Optimizer, n int) (*pb.OptimizerAnswer, error) {
	if o == nil {
		return nil, errNotStarted
	}
	out := &pb.OptimizerTrials{}
	for _, t := range o.Ask(n) {
		p, err := settingPB(t.Params)
		if err != nil {
			return nil, err
		}
		out.Trials = append(out.Trials, &pb.OptimizerTrial{Id: t.ID, Params: p})
	}
	return &pb.OptimizerAnswer{Answer: &pb.OptimizerAnswer_Trials{Trials: out}}, nil
}

func tell(o algorithms.Optimizer, results []*pb.OptimizerResult) (*pb.OptimizerAnswer, error) {
	if o == nil {
		return nil, errNotStarted
	}
	var rs []algorithms.Result
	for _, r := range results {
		rs = append(rs, algorithms.Result{ID: r.GetId(), Loss: r.GetLoss(), Failed: r.GetFailed()})
	}
	if err := o.Tell(rs); err != nil {
		return nil, err
	}
	return &pb.OptimizerAnswer{Answer: &pb.OptimizerAnswer_Told{Told: &pb.OptimizerTold{}}}, nil
}
