package optimizers_test

import (
	"context"
	"math"
	"math/rand/v2"
	"net"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/optimizers"
	"github.com/outrigger-mesh/outrigger/experiments/algorithms"
)

// builtin is a built-in algorithm under a name that a plugin may have.
func builtin(t testing.TB, id string) algorithms.Algorithm {
	t.Helper()
	for _, a := range algorithms.Builtin() {
		if a.ID == id {
			a.ID = "mine"
			return a
		}
	}
	t.Fatalf("no built-in algorithm %s", id)
	return algorithms.Algorithm{}
}

// dial serves a plugin on this machine and connects to it.
func dial(t testing.TB, s pb.OptimizerPluginServer) *grpc.ClientConn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gs := grpc.NewServer()
	pb.RegisterOptimizerPluginServer(gs, s)
	served := make(chan error, 1)
	go func() { served <- gs.Serve(l) }()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		gs.Stop()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return conn
}

func connect(t testing.TB, ctx context.Context, s pb.OptimizerPluginServer) optimizers.Plugin {
	t.Helper()
	p, err := optimizers.Connect(ctx, dial(t, s))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// A plugin passes the examination that its algorithm passes, and asks what the algorithm
// would have asked, also when it is restored half-way by another connection.
func TestPluginIsItsAlgorithm(t *testing.T) {
	a := builtin(t, "simulated_annealing")
	p := connect(t, t.Context(), optimizers.Serve(a))
	if p.ID != "mine" || !reflect.DeepEqual(p.Kinds, a.Kinds) || !p.Conditional {
		t.Fatalf("connected to %+v", p.Info)
	}
	if err := optimizers.Examine(t.Context(), p.Algorithm, time.Minute); err != nil {
		t.Fatalf("examination: %v", err)
	}
	space, err := algorithms.NewSpace(algorithms.Param{Name: "x", Kind: algorithms.Float, Min: -5, Max: 5},
		algorithms.Param{Name: "style", Kind: algorithms.Categorical, Choices: []string{"plain", "debate"}},
		algorithms.Param{Name: "rounds", Kind: algorithms.Int, Min: 1, Max: 9, When: &algorithms.Condition{Param: "style", In: []any{"debate"}}})
	if err != nil {
		t.Fatal(err)
	}
	cfg := algorithms.Config{Space: space, Seed: 11, Budget: 30, Start: algorithms.Params{"x": 3.5, "style": "debate", "rounds": int64(4)}}
	loss := func(p algorithms.Params) float64 { return math.Abs(p["x"].(float64) - 1) }
	direct, err := a.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	over, err := p.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; ; n++ {
		want, got := direct.Ask(2), over.Ask(2)
		if !reflect.DeepEqual(want, got) {
			t.Fatalf("round %d: the plugin asks %v, the algorithm %v", n, got, want)
		}
		if len(want) == 0 {
			break
		}
		if n == 7 {
			again := connect(t, t.Context(), optimizers.Serve(a))
			if over, err = again.Restore(over.State()); err != nil {
				t.Fatalf("restore: %v", err)
			}
		}
		for _, x := range want {
			r := []algorithms.Result{{ID: x.ID, Loss: loss(x.Params), Failed: x.ID%7 == 0}}
			if err := over.Tell(r); err != nil {
				t.Fatal(err)
			}
			if err := direct.Tell(r); err != nil {
				t.Fatal(err)
			}
		}
	}
	want, _ := direct.Best()
	if got, ok := over.Best(); !ok || !reflect.DeepEqual(got, want) {
		t.Errorf("best %v, want %v", got, want)
	}
	if err := over.Tell([]algorithms.Result{{ID: 1}}); !outrigger.IsKind(err, outrigger.NotFound) {
		t.Errorf("a result told twice: %v", err)
	}
}

// wrong answers as a sound plugin does, but for one thing.
type wrong struct {
	pb.OptimizerPluginServer
	trials func(*pb.OptimizerTrials)
	hang   bool
	leave  bool
}

type meddler struct {
	grpc.BidiStreamingServer[pb.OptimizerQuestion, pb.OptimizerAnswer]
	w     wrong
	asked int
}

func (m *meddler) Send(a *pb.OptimizerAnswer) error {
	if ts := a.GetTrials(); ts != nil {
		m.asked++
		switch {
		case m.w.trials != nil:
			m.w.trials(ts)
		case m.w.hang && m.asked > 3:
			<-m.Context().Done()
			return m.Context().Err()
		case m.w.leave && m.asked > 3:
			return outrigger.Errorf(outrigger.Internal, "out of memory")
		}
	}
	return m.BidiStreamingServer.Send(a)
}

func (w wrong) Optimize(s grpc.BidiStreamingServer[pb.OptimizerQuestion, pb.OptimizerAnswer]) error {
	return w.OptimizerPluginServer.Optimize(&meddler{BidiStreamingServer: s, w: w})
}

// What a plugin may do wrong, and what its registration is told.
func TestExaminationRefusesPlugins(t *testing.T) {
	field := func(name string, f func(float64) float64) func(*pb.OptimizerTrials) {
		return func(ts *pb.OptimizerTrials) {
			for _, x := range ts.GetTrials() {
				if v, ok := x.GetParams().GetFields()[name]; ok {
					x.Params.Fields[name] = structpb.NewNumberValue(f(v.GetNumberValue()))
				}
			}
		}
	}
	wild := rand.New(rand.NewPCG(1, 2))
	for name, c := range map[string]struct {
		w    wrong
		kind outrigger.Kind
		want string
	}{
		"outside the space": {wrong{trials: field("x", func(x float64) float64 { return x + 20 })}, outrigger.Invalid, "outside the space"},
		"not a number":      {wrong{trials: field("x", func(float64) float64 { return math.NaN() })}, outrigger.Invalid, "outside the space"},
		"another parameter": {wrong{trials: func(ts *pb.OptimizerTrials) {
			for _, x := range ts.GetTrials() {
				x.Params.Fields["z"] = structpb.NewNumberValue(1)
			}
		}}, outrigger.Invalid, `"z" is not in the space`},
		"half of a whole number": {wrong{trials: field("shots", func(x float64) float64 { return x + .5 })}, outrigger.Invalid, `"shots"`},
		"not by seed":            {wrong{trials: field("x", func(float64) float64 { return .001 + 4*wild.Float64() })}, outrigger.Invalid, "same seed gave different trials"},
		"worse than random":      {wrong{trials: field("x", func(x float64) float64 { return 4.9 + x/100 })}, outrigger.Invalid, "random search reaches"},
		"misnumbers": {wrong{trials: func(ts *pb.OptimizerTrials) {
			for _, x := range ts.GetTrials() {
				x.Id += 7
			}
		}}, outrigger.Invalid, "gave trial id 8, the next one is 1"},
		"gives up":      {wrong{trials: func(ts *pb.OptimizerTrials) { ts.Trials = nil }}, outrigger.Invalid, "has no trial although none is pending"},
		"does not come": {wrong{hang: true}, outrigger.Timeout, "within 2s"},
		"falls over":    {wrong{leave: true}, outrigger.Invalid, "plugin mine failed: "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c.w.OptimizerPluginServer = optimizers.Serve(builtin(t, "simulated_annealing"))
			limit := time.Minute
			if c.w.hang {
				limit = 2 * time.Second
			}
			err := optimizers.Examine(t.Context(), connect(t, t.Context(), c.w).Algorithm, limit)
			if !outrigger.IsKind(err, c.kind) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("examination: %v, want %v with %q", err, c.kind, c.want)
			}
		})
	}
}

// rude is an algorithm of this process that does not return, or not orderly.
type rude struct {
	algorithms.Optimizer
	ask func() []algorithms.Trial
}

func (r rude) Ask(int) []algorithms.Trial { return r.ask() }

// A panic and a call that never returns are results of the examination, too.
func TestExaminationOutlivesTheExaminee(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	for name, c := range map[string]struct {
		ask   func() []algorithms.Trial
		limit time.Duration
		kind  outrigger.Kind
		want  string
	}{
		"panics": {func() []algorithms.Trial { panic("index out of range") }, time.Minute, outrigger.Invalid, `optimiser "mine" panicked: index out of range`},
		"hangs":  {func() []algorithms.Trial { <-release; return nil }, 50 * time.Millisecond, outrigger.Timeout, "within 50ms; a call to it may not return"},
	} {
		a := builtin(t, "random")
		a.New = func(algorithms.Config) (algorithms.Optimizer, error) { return rude{ask: c.ask}, nil }
		if err := optimizers.Examine(t.Context(), a, c.limit); !outrigger.IsKind(err, c.kind) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %v with %q", name, err, c.kind, c.want)
		}
	}
}

// A plugin that answers otherwise after a restart than before is found out.
func TestRestoreFindsAnotherPlugin(t *testing.T) {
	a := builtin(t, "simulated_annealing")
	space, err := algorithms.NewSpace(algorithms.Param{Name: "x", Kind: algorithms.Float, Min: -5, Max: 5})
	if err != nil {
		t.Fatal(err)
	}
	o, err := connect(t, t.Context(), optimizers.Serve(a)).New(algorithms.Config{Space: space, Seed: 3, Budget: 20})
	if err != nil {
		t.Fatal(err)
	}
	for range 4 {
		for _, x := range o.Ask(1) {
			if err := o.Tell([]algorithms.Result{{ID: x.ID, Loss: x.Params["x"].(float64)}}); err != nil {
				t.Fatal(err)
			}
		}
	}
	other := builtin(t, "random")
	p := connect(t, t.Context(), optimizers.Serve(other))
	if _, err := p.Restore(o.State()); !outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), "answers otherwise than before") {
		t.Errorf("restore by another algorithm: %v", err)
	}
	for _, state := range []string{"", "{}", `{"algorithm":"mine"}`, `{"algorithm":"mine","config":{"space":[{"name":"x","kind":"float","min":0,"max":1}],"budget":2},"steps":[{"tell":[{"id":9}]}]}`} {
		if _, err := p.Restore([]byte(state)); err == nil {
			t.Errorf("state %q was accepted", state)
		}
	}
}

// Descriptions that cannot be used are refused by field.
func TestDescriptions(t *testing.T) {
	good := func() *pb.OptimizerInfo {
		return &pb.OptimizerInfo{Id: "mine", Family: "sampling", Kinds: []string{"float"}, MaxBudget: 10}
	}
	for want, change := range map[string]func(*pb.OptimizerInfo){
		"":                  func(*pb.OptimizerInfo) {},
		`id is "Mine"`:      func(i *pb.OptimizerInfo) { i.Id = "Mine" },
		"built-in":          func(i *pb.OptimizerInfo) { i.Id = "random" },
		`family is "magic"`: func(i *pb.OptimizerInfo) { i.Family = "magic" },
		`kinds has "text"`:  func(i *pb.OptimizerInfo) { i.Kinds = append(i.Kinds, "text") },
		"kinds is empty":    func(i *pb.OptimizerInfo) { i.Kinds = nil },
		"max_budget 0":      func(i *pb.OptimizerInfo) { i.MaxBudget = 0 },
	} {
		i := good()
		change(i)
		_, err := optimizers.Info(i)
		if want == "" && err != nil || want != "" && (!outrigger.IsKind(err, outrigger.Invalid) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%v: %v, want %q", i, err, want)
		}
	}
}
