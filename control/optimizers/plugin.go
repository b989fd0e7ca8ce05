package optimizers

import (
	"bytes"
	"context"
	"encoding/json"
	"hash/fnv"
	"math"
	"slices"
	"time"

	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments/algorithms"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// Plugin is an optimiser behind a connection.
type Plugin struct {
	algorithms.Algorithm
	About *pb.OptimizerInfo
}

// Connect asks a plugin what it is. ctx is that of the plugin's use: its end ends every
// optimisation. Errors have kind Invalid for a description that cannot be used, which names
// the field, else that of the call (Unavailable if nobody is there).
func Connect(ctx context.Context, conn grpc.ClientConnInterface) (Plugin, error) {
	client := pb.NewOptimizerPluginClient(conn)
	dctx, cancel := context.WithTimeout(ctx, CallTimeout)
	defer cancel()
	about, err := client.Describe(dctx, &pb.DescribeOptimizerRequest{})
	if err != nil {
		return Plugin{}, status.FromGRPC(err, nil)
	}
	info, err := Info(about)
	if err != nil {
		return Plugin{}, err
	}
	p := Plugin{About: about}
	p.Info = info
	p.New = func(cfg algorithms.Config) (algorithms.Optimizer, error) { return begin(ctx, client, info, cfg) }
	p.Restore = func(state []byte) (algorithms.Optimizer, error) { return restore(ctx, client, info, state) }
	return p, nil
}

// remote is one optimisation of a plugin.
type remote struct {
	id      string
	cfg     algorithms.Config
	stream  grpc.BidiStreamingClient[pb.OptimizerQuestion, pb.OptimizerAnswer]
	end     context.CancelFunc
	asked   int64
	pending map[int64]algorithms.Params
	best    *algorithms.Evaluated
	steps   []step
	err     error
}

// step is one question, with what is needed to ask it again.
type step struct {
	Ask    int                 `json:"ask,omitempty"`
	Trials uint64              `json:"trials,omitempty"` // hash of the answer
	Tell   []algorithms.Result `json:"tell,omitempty"`
}

// saved is the state of a remote.
type saved struct {
	Algorithm string            `json:"algorithm"`
	Config    algorithms.Config `json:"config"`
	Steps     []step            `json:"steps"`
}

func begin(ctx context.Context, client pb.OptimizerPluginClient, info algorithms.Info, cfg algorithms.Config) (*remote, error) {
	switch {
	case cfg.Space == nil || cfg.Space.Len() == 0:
		return nil, outrigger.Errorf(outrigger.Invalid, "config: space is missing; build one with NewSpace")
	case cfg.Budget < 1 || cfg.Budget > algorithms.MaxBudget:
		return nil, outrigger.Errorf(outrigger.Invalid, "config: budget %d evaluations, want 1 to %d", cfg.Budget, algorithms.MaxBudget)
	case len(cfg.Settings) > 0:
		return nil, outrigger.Errorf(outrigger.Invalid, "config: plugin %s takes no settings", info.ID)
	}
	if err := info.Accepts(cfg.Space); err != nil {
		return nil, err
	}
	start, err := startPB(cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := client.Optimize(ctx)
	if err != nil {
		cancel()
		return nil, status.FromGRPC(err, nil)
	}
	r := &remote{id: info.ID, cfg: cfg, stream: stream, end: cancel, pending: map[int64]algorithms.Params{}}
	a, err := r.exchange(&pb.OptimizerQuestion{Question: &pb.OptimizerQuestion_Start{Start: start}})
	if err == nil && a.GetStarted() == nil {
		err = r.fail("answered start with %T instead of started", a.GetAnswer())
	}
	if err != nil {
		cancel()
		return nil, err
	}
	return r, nil
}

// fail ends the optimisation.
func (r *remote) fail(format string, args ...any) error {
	return r.ended(outrigger.Errorf(outrigger.Invalid, "plugin "+r.id+" "+format, args...))
}

func (r *remote) ended(err error) error {
	r.err = err
	r.end()
	return err
}

// Err implements Failing.
func (r *remote) Err() error { return r.err }

// exchange asks one question, within CallTimeout.
func (r *remote) exchange(q *pb.OptimizerQuestion) (*pb.OptimizerAnswer, error) {
	if r.err != nil {
		return nil, r.err
	}
	timer := time.AfterFunc(CallTimeout, r.end)
	err := r.stream.Send(q)
	var a *pb.OptimizerAnswer
	if a, err = r.received(err); err != nil {
		if !timer.Stop() {
			return nil, r.ended(outrigger.Errorf(outrigger.Timeout, "plugin %s did not answer within %v", r.id, CallTimeout))
		}
		return nil, r.ended(failure(r.id, err))
	}
	timer.Stop()
	return a, nil
}

// failure is a plugin's error: Unavailable, Timeout or Cancelled as they are, all others are
// the plugin's own and Invalid.
func failure(id string, err error) error {
	err = status.FromGRPC(err, nil)
	kind := outrigger.KindOf(err)
	if kind != outrigger.Unavailable && kind != outrigger.Timeout && kind != outrigger.Cancelled {
		kind = outrigger.Invalid
	}
	return outrigger.Wrap(kind, err, "plugin "+id+" failed")
}

// received is the answer, or how the stream ended: a failed Send does not say.
func (r *remote) received(sent error) (*pb.OptimizerAnswer, error) {
	a, err := r.stream.Recv()
	if err == nil {
		err = sent
	}
	return a, err
}

// Ask implements algorithms.Optimizer.
func (r *remote) Ask(n int) []algorithms.Trial {
	n = min(n, r.cfg.Budget-int(r.asked), algorithms.MaxPending-len(r.pending))
	if n <= 0 || r.err != nil {
		return nil
	}
	a, err := r.exchange(&pb.OptimizerQuestion{Question: &pb.OptimizerQuestion_Ask{Ask: &pb.OptimizerAsk{N: int32(n)}}})
	if err != nil {
		return nil
	}
	if a.GetTrials() == nil {
		_ = r.fail("answered ask with %T instead of trials", a.GetAnswer()) // Err tells
		return nil
	}
	out, err := r.check(n, a.GetTrials().GetTrials())
	if err != nil {
		return nil
	}
	for _, t := range out {
		r.pending[t.ID] = t.Params
	}
	r.asked += int64(len(out))
	r.steps = append(r.steps, step{Ask: n, Trials: hash(out)})
	return out
}

// check reads trials that answer a question for n.
func (r *remote) check(n int, trials []*pb.OptimizerTrial) ([]algorithms.Trial, error) {
	if len(trials) > n {
		return nil, r.fail("answered ask for %d with %d trials", n, len(trials))
	}
	if len(trials) == 0 && len(r.pending) == 0 {
		return nil, r.fail("has no trial although none is pending and %d of %d were asked", r.asked, r.cfg.Budget)
	}
	var out []algorithms.Trial
	for i, t := range trials {
		if want := r.asked + int64(i) + 1; t.GetId() != want {
			return nil, r.fail("gave trial id %d, the next one is %d", t.GetId(), want)
		}
		p, err := r.cfg.Space.Normalise(t.GetParams().AsMap())
		if err != nil {
			return nil, r.fail("gave trial %d outside the space: %v", t.GetId(), err)
		}
		out = append(out, algorithms.Trial{ID: t.GetId(), Params: p})
	}
	return out, nil
}

// hash tells trials apart; json writes maps in order.
func hash(trials []algorithms.Trial) uint64 {
	h := fnv.New64a()
	_ = json.NewEncoder(h).Encode(trials) // numbers within bounds, strings and booleans
	return h.Sum64()
}

// Tell implements algorithms.Optimizer.
func (r *remote) Tell(results []algorithms.Result) error {
	seen := map[int64]bool{}
	q := &pb.OptimizerTell{}
	for _, x := range results {
		if _, ok := r.pending[x.ID]; !ok || seen[x.ID] {
			return outrigger.Errorf(outrigger.NotFound, "trial %d not found among the %d pending ones: told twice, or of another optimiser", x.ID, len(r.pending))
		}
		seen[x.ID] = true
		if !x.Failed && !(math.Abs(x.Loss) <= 1e100) {
			return outrigger.Errorf(outrigger.Invalid, "trial %d: loss %v is not a number within ±1e100; report it as failed", x.ID, x.Loss)
		}
		q.Results = append(q.Results, &pb.OptimizerResult{Id: x.ID, Loss: x.Loss, Failed: x.Failed})
	}
	a, err := r.exchange(&pb.OptimizerQuestion{Question: &pb.OptimizerQuestion_Tell{Tell: q}})
	if err != nil {
		return err
	}
	if a.GetTold() == nil {
		return r.fail("answered tell with %T instead of told", a.GetAnswer())
	}
	for _, x := range results {
		if !x.Failed && (r.best == nil || x.Loss < r.best.Loss) {
			r.best = &algorithms.Evaluated{Trial: algorithms.Trial{ID: x.ID, Params: r.pending[x.ID]}, Loss: x.Loss}
		}
		delete(r.pending, x.ID)
	}
	r.steps = append(r.steps, step{Tell: slices.Clone(results)})
	if int(r.asked) == r.cfg.Budget && len(r.pending) == 0 {
		r.end() // nothing is left to ask; the plugin need not keep it
	}
	return nil
}

// Best implements algorithms.Optimizer.
func (r *remote) Best() (algorithms.Evaluated, bool) {
	if r.best == nil {
		return algorithms.Evaluated{}, false
	}
	return *r.best, true
}

// State implements algorithms.Optimizer.
func (r *remote) State() []byte {
	out, err := json.Marshal(saved{Algorithm: r.id, Config: r.cfg, Steps: r.steps})
	if err != nil {
		// Finite numbers, strings and slices of them always marshal; silence would lose the
		// optimisation.
		panic("optimizers: state of " + r.id + " cannot be written: " + err.Error())
	}
	return out
}

func restore(ctx context.Context, client pb.OptimizerPluginClient, info algorithms.Info, state []byte) (*remote, error) {
	var s saved
	d := json.NewDecoder(bytes.NewReader(state))
	if err := d.Decode(&s); err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, "state of "+info.ID)
	}
	if s.Algorithm != info.ID {
		return nil, outrigger.Errorf(outrigger.Invalid, "state is that of %q, not of plugin %s", s.Algorithm, info.ID)
	}
	r, err := begin(ctx, client, info, s.Config)
	if err != nil {
		return nil, err
	}
	for i, x := range s.Steps {
		if x.Ask == 0 {
			err = r.Tell(x.Tell)
		} else if got := r.Ask(x.Ask); r.err != nil {
			err = r.err
		} else if hash(got) != x.Trials {
			err = r.fail("answers otherwise than before (question %d of %d): the same seed must give the same trials", i+1, len(s.Steps))
		}
		if err != nil {
			r.end()
			return nil, err
		}
	}
	return r, nil
}
