package control

import (
	"cmp"
	"context"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"net"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/optimizers"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/experiments/algorithms"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// maxRecordedLoss is the largest loss an optimiser may have been told, either sign.
const maxRecordedLoss = 1e100

// RegisterOptimizer asks the plugin at an address what it is, examines it (package
// optimizers) and makes it known; one that is known already is replaced. What is wrong
// with it is an error of kind Invalid, Timeout or Unavailable, and nothing is written. The
// connection is neither encrypted nor authenticated: a plugin belongs on the same machine
// or in a network of its own.
func (a *admin) RegisterOptimizer(ctx context.Context, r *pb.RegisterOptimizerRequest) (*pb.Optimizer, error) {
	if err := checkReason(r.GetReason()); err != nil {
		return nil, err
	}
	if err := checkTarget(r.GetAddress()); err != nil {
		return nil, err
	}
	if !a.examining.TryLock() {
		return nil, outrigger.Errorf(outrigger.Unavailable, "another plugin is being examined, which takes up to %v; retry", optimizers.ExamineTimeout)
	}
	defer a.examining.Unlock()
	conn, err := grpc.NewClient(r.GetAddress(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, invalid("address is %.300q: %v", r.GetAddress(), err)
	}
	defer conn.Close()
	p, err := optimizers.Connect(ctx, conn)
	if err != nil {
		return nil, outrigger.Errorf(outrigger.KindOf(err), "plugin at %s: %v", r.GetAddress(), err)
	}
	if err := optimizers.Examine(ctx, p.Algorithm, optimizers.ExamineTimeout); err != nil {
		return nil, outrigger.Errorf(outrigger.KindOf(err), "plugin at %s is not registered: %v", r.GetAddress(), err)
	}
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		known := f.Optimizer(p.ID)
		if known != nil && known.GetAddress() == r.GetAddress() && proto.Equal(known.GetInfo(), p.About) {
			return nil, nil
		}
		if known == nil && len(f.Optimizers()) >= facts.MaxOptimizers {
			return nil, outrigger.Errorf(outrigger.Exhausted, "%d plugins are registered, the limit; remove one", facts.MaxOptimizers)
		}
		return []eventlog.Write{anyhow(facts.OptimizerPrefix+p.ID, &pb.Event{Payload: &pb.Event_OptimizerRegistered{
			OptimizerRegistered: &pb.OptimizerRegistered{Info: p.About, Address: r.GetAddress(), Reason: r.GetReason()}}})}, nil
	})
	if err != nil {
		return nil, err
	}
	if o := f.Optimizer(p.ID); o != nil {
		return optimizerPB(o), nil
	}
	return nil, outrigger.Errorf(outrigger.Conflict, "plugin %s was removed meanwhile", p.ID)
}

// anyhow is a write whose order among others does not matter.
func anyhow(aggregate string, e *pb.Event) eventlog.Write {
	return eventlog.Write{Aggregate: aggregate, Expect: eventlog.Any, Events: []*pb.Event{e}}
}

// checkTarget refuses what is neither host:port nor unix:path.
func checkTarget(address string) error {
	if path, ok := strings.CutPrefix(address, "unix:"); ok && path != "" && len(address) <= 256 {
		return nil
	}
	if host, port, err := net.SplitHostPort(address); err != nil || host == "" || port == "" || len(address) > 256 {
		return invalid("address is %.300q; give host:port or unix:path of at most 256 bytes", address)
	}
	return nil
}

// RemoveOptimizer forgets a plugin. What it recorded stays.
func (a *admin) RemoveOptimizer(ctx context.Context, r *pb.RemoveOptimizerRequest) (*pb.Optimizer, error) {
	if err := checkReason(r.GetReason()); err != nil {
		return nil, err
	}
	var was *facts.Optimizer
	_, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		if was = f.Optimizer(r.GetName()); was == nil {
			return nil, outrigger.Errorf(outrigger.NotFound, "optimiser %q not found among the %d plugins; built-in ones cannot be removed", r.GetName(), len(f.Optimizers()))
		}
		return []eventlog.Write{anyhow(facts.OptimizerPrefix+r.GetName(), &pb.Event{Payload: &pb.Event_OptimizerRemoved{
			OptimizerRemoved: &pb.OptimizerRemoved{Reason: r.GetReason()}}})}, nil
	})
	if err != nil {
		return nil, err
	}
	return optimizerPB(was), nil
}

func optimizerPB(o *facts.Optimizer) *pb.Optimizer {
	return &pb.Optimizer{Info: o.GetInfo(), Address: o.GetAddress(), Actor: o.Actor, RegisteredAt: wire.TimePB(o.RegisteredAt)}
}

// known are all optimisers, built in first.
func known(f *facts.Facts) (out []*pb.Optimizer) {
	for _, b := range algorithms.Builtin() {
		out = append(out, &pb.Optimizer{Info: optimizers.About(b.Info)})
	}
	for _, o := range f.Optimizers() {
		out = append(out, optimizerPB(o))
	}
	return out
}

// infos are the same for Select.
func infos(f *facts.Facts) (out []algorithms.Info) {
	for _, b := range algorithms.Builtin() {
		out = append(out, b.Info)
	}
	for _, o := range f.Optimizers() {
		if i, err := optimizers.Info(o.GetInfo()); err == nil { // else a newer program's, which this one cannot use
			out = append(out, i)
		}
	}
	return out
}

// ListOptimizers returns all optimisers and how they did.
func (a *admin) ListOptimizers(_ context.Context, r *pb.ListRequestAll) (*pb.ListOptimizersResponse, error) {
	limit, err := listLimit(r.GetLimit())
	if err != nil {
		return nil, err
	}
	f := a.facts.Facts()
	all := known(f)
	out := &pb.ListOptimizersResponse{Optimizers: all[:min(limit, len(all))]}
	for _, task := range f.TaskTypes() {
		h, err := history(f, task)
		if err != nil {
			return nil, err
		}
		for _, o := range all {
			rs := h.Records(task, o.GetInfo().GetId())
			if len(rs) == 0 {
				continue
			}
			sum := 0.0
			for _, x := range rs {
				sum += x.Score
			}
			out.History = append(out.History, &pb.OptimizerHistory{TaskType: task, Optimizer: o.GetInfo().GetId(), Runs: int32(len(rs)), MeanScore: sum / float64(len(rs))})
		}
	}
	return out, nil
}

// history scores the records of a type of task: of each run the share of the way from the
// loss before to the best known of the same task. A better one found later lowers the
// scores of those before, so they are made anew each time.
func history(f *facts.Facts, taskType string) (*algorithms.History, error) {
	best := map[string]float64{}
	for _, r := range f.Optimizations(taskType) {
		if b, ok := best[r.GetTask()]; !ok || r.GetReached() < b {
			best[r.GetTask()] = r.GetReached()
		}
	}
	h := new(algorithms.History)
	for _, r := range f.Optimizations(taskType) {
		score := 0.0
		if r.GetReached() < r.GetBaseline() {
			score = algorithms.Score(r.GetReached(), best[r.GetTask()], r.GetBaseline())
		}
		if err := h.Add(taskType, r.GetOptimizer(), algorithms.Record{Task: r.GetTask(), Score: score}); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// SelectOptimizer chooses among the known optimisers. The same task with the same history
// gets the same answer.
func (a *admin) SelectOptimizer(_ context.Context, r *pb.SelectOptimizerRequest) (*pb.SelectOptimizerResponse, error) {
	strategy, err := algorithms.ParseStrategy(cmp.Or(r.GetStrategy(), string(algorithms.PerformanceWeighted)))
	if err != nil {
		return nil, err
	}
	if err := outrigger.CheckName("task_type", r.GetTaskType()); err != nil {
		return nil, err
	}
	if r.GetBudget() < 0 || r.GetBudget() > algorithms.MaxBudget || r.GetParallel() < 0 {
		return nil, invalid("budget is %d and parallel %d; allowed are 0 to %d and 0 or more", r.GetBudget(), r.GetParallel(), algorithms.MaxBudget)
	}
	t := algorithms.Task{Type: r.GetTaskType(), Unit: r.GetTask(), Budget: int(r.GetBudget()), Noisy: r.GetNoisy(), Smooth: r.GetSmooth(), Parallel: int(r.GetParallel()), Wants: r.GetWants()}
	if len(r.GetParams()) > 0 {
		if t.Space, err = optimizers.Space(r.GetParams()); err != nil {
			return nil, err
		}
	}
	f := a.facts.Facts()
	s := algorithms.Selector{Strategy: strategy, Algorithms: infos(f)}
	if s.History, err = history(f, t.Type); err != nil {
		return nil, err
	}
	if strategy == algorithms.Experimental {
		if s.Running, err = comparison(s.Algorithms, t); err != nil {
			return nil, err
		}
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(t.Type + "\x00" + t.Unit)) // never fails
	c := s.Select(t, rand.New(rand.NewPCG(h.Sum64(), uint64(len(f.Optimizations(t.Type))))))
	all := known(f)
	i := slices.IndexFunc(all, func(o *pb.Optimizer) bool { return o.GetInfo().GetId() == c.Algorithm })
	if i < 0 {
		return nil, outrigger.Errorf(outrigger.Internal, "strategy %s chose the unknown optimiser %q", strategy, c.Algorithm)
	}
	return &pb.SelectOptimizerResponse{Optimizer: all[i], Reason: c.Reason, Fallback: c.Fallback, Probability: c.Probability}, nil
}

// comparison is the experiment of the strategy experimental: every optimiser that works on
// the task's space is an arm of the same weight, and tasks are its units.
func comparison(all []algorithms.Info, t algorithms.Task) (map[string]algorithms.Comparison, error) {
	var arms []experiments.Weighted
	for _, i := range all {
		if !i.Baseline && (t.Space == nil || i.Accepts(t.Space) == nil) {
			arms = append(arms, experiments.Weighted{Name: i.ID, Weight: 1})
		}
	}
	if len(arms) == 0 {
		return nil, nil // Select falls back
	}
	for i := range arms {
		arms[i].Weight = experiments.Buckets / uint32(len(arms))
	}
	arms[0].Weight += experiments.Buckets % uint32(len(arms))
	split, err := experiments.Allocate(arms)
	if err != nil {
		return nil, err
	}
	return map[string]algorithms.Comparison{t.Type: {Salt: "optimizers/" + t.Type, Arms: split}}, nil
}

// RecordOptimization adds a run to the history of its type of task, once per request id.
func (a *admin) RecordOptimization(ctx context.Context, r *pb.RecordOptimizationRequest) (*pb.RecordOptimizationResponse, error) {
	for field, v := range map[string]string{"task_type": r.GetTaskType(), "task": r.GetTask(), "optimizer": r.GetOptimizer()} {
		if err := outrigger.CheckName(field, v); err != nil {
			return nil, err
		}
	}
	if !(math.Abs(r.GetBaseline()) <= maxRecordedLoss && math.Abs(r.GetReached()) <= maxRecordedLoss) || r.GetEvaluations() < 1 {
		return nil, invalid("baseline is %v, reached %v and evaluations %d; losses are within ±%g and there is at least one evaluation", r.GetBaseline(), r.GetReached(), r.GetEvaluations(), maxRecordedLoss)
	}
	f, err := a.change(ctx, r.GetActor(), r.GetRequestId(), func(f *facts.Facts) ([]eventlog.Write, error) {
		if !slices.ContainsFunc(known(f), func(o *pb.Optimizer) bool { return o.GetInfo().GetId() == r.GetOptimizer() }) {
			return nil, outrigger.Errorf(outrigger.NotFound, "optimizer %q not found; `outrigger optimizer list` names them", r.GetOptimizer())
		}
		return []eventlog.Write{anyhow(facts.OptimizationPrefix+r.GetTaskType(), &pb.Event{Payload: &pb.Event_OptimizationRecorded{OptimizationRecorded: &pb.OptimizationRecorded{
			Optimizer: r.GetOptimizer(), Task: r.GetTask(), Baseline: r.GetBaseline(), Reached: r.GetReached(), Evaluations: r.GetEvaluations()}}})}, nil
	})
	if err != nil {
		return nil, err
	}
	h, err := history(f, r.GetTaskType())
	if err != nil {
		return nil, err
	}
	rs := h.Records(r.GetTaskType(), r.GetOptimizer())
	if len(rs) == 0 {
		return nil, outrigger.Errorf(outrigger.Internal, "the record of %s is not shown", r.GetOptimizer())
	}
	return &pb.RecordOptimizationResponse{Score: rs[len(rs)-1].Score}, nil
}
