//go:build !dataplane

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments/algorithms"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// maxObjectiveOutput bounds what an objective may print.
const maxObjectiveOutput = 64 << 10

// Bounds of one optimisation. Its record holds every evaluation and is replaced at every
// step, so it must stay well within what a variable may hold.
const (
	maxTrials = 2000
	maxRecord = outrigger.MaxValueBytes / 2
)

// tuning is the whole state of an optimisation. It is kept in a variable of the session
// being tuned and replaced by compare-and-set at every step: of two runs of one
// optimisation, which share its locks, the slower to save is refused and stops, and the
// winner is written in one append together with the record, so at most once.
type tuning struct {
	Phase string `json:"phase"` // searching, written, done, rolled_back
	engine
	First     *float64                   `json:"first,omitempty"` // loss of the first setting, the one before
	Variables []string                   `json:"variables"`
	Optimizer json.RawMessage            `json:"optimizer"`
	Trial     *algorithms.Trial          `json:"trial,omitempty"` // asked, not yet told
	Done      int                        `json:"done"`
	Best      *algorithms.Evaluated      `json:"best,omitempty"`
	Before    map[string]json.RawMessage `json:"before"`   // values at the start
	Versions  map[string]int32           `json:"versions"` // and their versions: what the winner may replace
}

// tuner runs one optimisation.
type tuner struct {
	cl                *client
	session, record   string
	objective, verify []string
	algorithm         string
	strategy          string // chooses the algorithm; empty = as named
	taskType          string
	budget            int
	seed              uint64
	trialTimeout      time.Duration
	version           int32  // of the record, -1 while there is none
	locks             *locks // while variables are locked
	t                 tuning
	opt               algorithms.Optimizer
	release           func() // of opt's plugin; nil = none
}

func optimizeCommand(g *globals) *cobra.Command {
	var o tuner
	var objective, verify string
	cmd := &cobra.Command{Use: "optimize SESSION ID VARIABLE...", Short: "Tune variables against an objective command and write the best setting back",
		Long: `Searches the values that a session's variables may have by their constraints (min and
max, or choices) for the setting with the lowest loss. The objective command reads the
setting as a JSON object on standard input and prints the loss as its last word. An
objective that begins with http:// or https:// is posted the same object instead and answers
200 with the loss, as a JSON number or as {"loss": number}. An evaluation that fails or takes
longer than --trial-timeout counts as a failed trial.

While it runs it holds the optimisation locks of the variables: writes by others are
refused. The locks are released at the end, interrupted or not; those of a run that was
killed are taken over by the next run of the same optimisation, and refuse nobody any more
after five minutes.

Every step is in the log, in the variable optimize.ID: run the same command again to go
on after a crash. The best setting is written as one change, refused if somebody changed
a tuned variable meanwhile. If --verify then fails, the former values are put back;
"optimize rollback SESSION ID" does that later.`,
		Args: cobra.MinimumNArgs(3)}
	c := addClientFlags(cmd, g)
	cmd.AddCommand(optimizeRollback(c))
	f := cmd.Flags()
	f.StringVar(&objective, "objective", "", "command, split at spaces, that prints the loss of a setting, or a URL that is posted it")
	f.StringVar(&verify, "verify", "", "command that must succeed once the best setting is written")
	f.StringVar(&o.algorithm, "algorithm", "bayesian_optimization", "optimiser, built in or a registered plugin")
	f.StringVar(&o.strategy, "strategy", "", "have the optimiser chosen instead: performance_weighted, feature_matching, adaptive or experimental")
	f.StringVar(&o.taskType, "task-type", "tuning", "kind of task, under which the outcome is remembered for strategies; empty = it is not")
	f.IntVar(&o.budget, "budget", 30, "evaluations")
	f.Uint64Var(&o.seed, "seed", 1, "seed of the search")
	f.DurationVar(&o.trialTimeout, "trial-timeout", time.Minute, "limit for one evaluation")
	cmd.RunE = c.verb(true, func(ctx context.Context, cl *client, args []string) error {
		o.cl, o.session, o.record = cl, args[0], "optimize."+args[1]
		o.objective, o.verify = strings.Fields(objective), strings.Fields(verify)
		if len(o.objective) == 0 || o.trialTimeout <= 0 {
			return usageError{fmt.Errorf("--objective is empty or --trial-timeout is not positive")}
		}
		if o.strategy != "" && (cmd.Flag("algorithm").Changed || o.taskType == "") {
			return usageError{fmt.Errorf("--strategy chooses the algorithm by --task-type: leave --algorithm out, and --task-type not empty")}
		}
		if o.budget < 1 || o.budget > maxTrials {
			return usageError{fmt.Errorf("--budget is %d, allowed is 1..%d", o.budget, maxTrials)}
		}
		return o.run(ctx, args[2:])
	})
	return cmd
}

func (o *tuner) run(ctx context.Context, names []string) error {
	found, err := o.load(ctx)
	if err != nil {
		return err
	}
	if found && !slices.Equal(o.t.Variables, names) {
		return outrigger.Errorf(outrigger.Conflict, "%s tunes %v, not %v; choose another ID", o.record, o.t.Variables, names)
	}
	if !found || o.t.Phase == "searching" || o.t.Phase == "written" {
		if err := o.locked(ctx, names, func(ctx context.Context) error { return o.search(ctx, found, names) }); err != nil {
			return err
		}
	}
	return o.report()
}

// search goes through what is left of the optimisation.
func (o *tuner) search(ctx context.Context, found bool, names []string) (err error) {
	if !found {
		err = o.begin(ctx, names)
	} else if o.t.Phase == "searching" {
		err = o.resume(ctx)
	}
	defer o.letGo()
	for err == nil && o.t.Phase == "searching" {
		err = o.step(ctx)
	}
	if err == nil && o.t.Phase == "written" {
		err = o.settle(ctx)
	}
	return err
}

// letGo ends a plugin's optimisation.
func (o *tuner) letGo() {
	if o.release != nil {
		o.release()
	}
}

// resume continues the search where the record says it is.
func (o *tuner) resume(ctx context.Context) error {
	if o.t.Address == "" {
		var err error
		o.opt, err = algorithms.Restore(o.t.Optimizer)
		return err
	}
	a, release, err := o.t.open(ctx)
	if err != nil {
		return err
	}
	o.release = release
	o.opt, err = a.Restore(o.t.Optimizer)
	return err
}

// load reads the recorded optimisation; found is false when there is none.
func (o *tuner) load(ctx context.Context) (found bool, err error) {
	v, err := o.cl.Get(ctx, o.get(o.record))
	if err = status.FromGRPC(err, nil); outrigger.IsKind(err, outrigger.NotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var text string
	if err := json.Unmarshal(v.GetValue().GetJson(), &text); err != nil {
		return false, outrigger.Wrap(outrigger.Invalid, err, o.record)
	}
	if err := json.Unmarshal([]byte(text), &o.t); err != nil {
		return false, outrigger.Wrap(outrigger.Invalid, err, o.record)
	}
	o.version = v.GetVersion().GetCounter()
	return true, nil
}

func (o *tuner) get(name string) *pb.GetRequest {
	return &pb.GetRequest{Tenant: o.cl.flags.tenant, Session: o.session, Identifier: name}
}

func (o *tuner) begin(ctx context.Context, names []string) error {
	var params []algorithms.Param
	start := algorithms.Params{}
	before, versions := map[string]json.RawMessage{}, map[string]int32{}
	for _, name := range names {
		v, err := o.cl.Get(ctx, o.get(name))
		if err != nil {
			return err
		}
		p, err := parameter(name, v)
		if err != nil {
			return err
		}
		params = append(params, p)
		before[name], versions[name] = v.GetValue().GetJson(), v.GetVersion().GetCounter()
		if start[name], err = settingOf(p, v); err != nil {
			return err
		}
	}
	space, err := algorithms.NewSpace(params...)
	if err != nil {
		return err
	}
	e, err := o.choose(ctx, space)
	if err != nil {
		return err
	}
	a, release, err := e.open(ctx)
	if err != nil {
		return err
	}
	o.release = release
	if o.opt, err = a.New(algorithms.Config{Space: space, Seed: o.seed, Budget: o.budget, Noisy: true, Start: start}); err != nil {
		return err
	}
	o.t = tuning{Phase: "searching", engine: e, Variables: names, Optimizer: o.opt.State(), Before: before, Versions: versions}
	raw, err := o.text()
	if err != nil {
		return err
	}
	v, err := o.cl.Register(ctx, &pb.RegisterRequest{Key: &pb.Key{Tenant: o.cl.flags.tenant, Session: o.session, Name: o.record},
		Value: &pb.Value{Type: "string", Json: raw}, Options: o.cl.options()})
	o.version = v.GetVersion().GetCounter()
	return err
}

// parameter derives what may be searched from a variable's type and constraints.
func parameter(name string, v *pb.Variable) (algorithms.Param, error) {
	p := algorithms.Param{Name: name}
	var c struct {
		Min     *float64 `json:"min"`
		Max     *float64 `json:"max"`
		Choices []string `json:"choices"`
	}
	if raw := v.GetConstraintsJson(); raw != "" {
		if err := json.Unmarshal([]byte(raw), &c); err != nil {
			return p, outrigger.Wrap(outrigger.Invalid, err, "constraints of "+name)
		}
	}
	switch t := v.GetValue().GetType(); t {
	case "float", "integer":
		if c.Min == nil || c.Max == nil {
			return p, outrigger.Errorf(outrigger.Invalid, "variable %q has no min and max; register it with constraints to tune it", name)
		}
		p.Kind, p.Min, p.Max = algorithms.Float, *c.Min, *c.Max
		if t == "integer" {
			p.Kind = algorithms.Int
		}
	case "choice":
		p.Kind, p.Choices = algorithms.Categorical, c.Choices
	case "boolean":
		p.Kind = algorithms.Boolean
	default:
		return p, outrigger.Errorf(outrigger.Invalid, "variable %q is a %s; tunable are float, integer, choice, boolean", name, t)
	}
	return p, nil
}

// settingOf is the variable's present value as a parameter's.
func settingOf(p algorithms.Param, v *pb.Variable) (any, error) {
	var out any
	if err := json.Unmarshal(v.GetValue().GetJson(), &out); err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, "value of "+p.Name)
	}
	return out, nil
}

// text is the record as the value of a string variable.
func (o *tuner) text() ([]byte, error) {
	raw, err := json.Marshal(o.t)
	if err != nil {
		return nil, err
	}
	return json.Marshal(string(raw))
}

// save replaces the record, and other variables in the same append.
func (o *tuner) save(ctx context.Context, others ...*pb.SetItem) error {
	raw, err := o.text()
	if err != nil {
		return err
	}
	if len(raw) > maxRecord && o.t.Phase == "searching" {
		return outrigger.Errorf(outrigger.Exhausted, "%s would have %d bytes, the limit is %d; choose another ID with a smaller --budget or fewer variables, the best so far is kept", o.record, len(raw), maxRecord)
	}
	items := append([]*pb.SetItem{{Identifier: o.record, Value: &pb.Value{Json: raw}, ExpectedVersion: &o.version}}, others...)
	options := o.cl.options()
	if o.locks != nil {
		options.OptimizationIds = o.locks.held()
	}
	r, err := o.cl.BatchSet(ctx, &pb.BatchSetRequest{Tenant: o.cl.flags.tenant, Session: o.session, Items: items, Atomic: true,
		Metadata: map[string]string{"optimization": o.record}, Options: options})
	if err != nil {
		return err
	}
	// All or nothing: the others report that the batch failed, one of them why.
	for _, name := range append([]string{o.record}, o.t.Variables...) {
		if e := r.Errors[name]; e != nil {
			return outrigger.Errorf(outrigger.Conflict, "%s: %s: %s; nothing was written", o.record, name, e.GetMessage())
		}
	}
	o.version = r.Variables[o.record].GetVersion().GetCounter()
	return nil
}

// step asks, evaluates and tells one trial, or writes the winner when the budget is used.
func (o *tuner) step(ctx context.Context) error {
	if o.t.Trial == nil {
		asked := o.opt.Ask(1)
		if len(asked) == 0 {
			if err := broken(o.opt); err != nil {
				return err
			}
			return o.write(ctx)
		}
		o.t.Trial, o.t.Optimizer = &asked[0], o.opt.State()
		if err := o.save(ctx); err != nil {
			return err
		}
	}
	loss, failed := o.evaluate(ctx, o.t.Trial.Params)
	if ctx.Err() != nil {
		return ctx.Err() // interrupted: the trial is evaluated again by the next run
	}
	if err := o.opt.Tell([]algorithms.Result{{ID: o.t.Trial.ID, Loss: loss, Failed: failed}}); err != nil {
		return err
	}
	if best, ok := o.opt.Best(); ok {
		o.t.Best = &best
	}
	if !failed && o.t.First == nil {
		o.t.First = &loss
	}
	o.t.Trial, o.t.Optimizer, o.t.Done = nil, o.opt.State(), o.t.Done+1
	return o.save(ctx)
}

func (o *tuner) evaluate(ctx context.Context, p algorithms.Params) (loss float64, failed bool) {
	if isURL(o.objective) {
		loss, err := o.post(ctx, o.objective[0], p)
		return loss, err != nil
	}
	out, err := o.command(ctx, o.objective, p)
	words := strings.Fields(out)
	if err != nil || len(words) == 0 {
		return 0, true
	}
	loss, err = strconv.ParseFloat(words[len(words)-1], 64)
	return loss, err != nil || !(math.Abs(loss) <= 1e100)
}

// limited keeps the last bytes written to it.
type limited struct{ bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	n := len(p)
	l.Buffer.Write(p)
	if over := l.Len() - maxObjectiveOutput; over > 0 {
		l.Next(over)
	}
	return n, nil
}

// command runs a command with a setting on its standard input.
func (o *tuner) command(ctx context.Context, argv []string, p algorithms.Params) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, o.trialTimeout)
	defer cancel()
	in, err := json.Marshal(p)
	if err != nil {
		return "", err
	}
	var out limited
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.WaitDelay = bytes.NewReader(in), &out, time.Second
	err = cmd.Run()
	return out.String(), err
}

// write sets all tuned variables and the record in one append.
func (o *tuner) write(ctx context.Context) error {
	if o.t.Best == nil {
		return outrigger.Errorf(outrigger.Invalid, "%s: all %d trials failed; nothing was written, correct --objective and choose another ID", o.record, o.t.Done)
	}
	o.t.Phase = "written"
	var items []*pb.SetItem
	for _, name := range o.t.Variables {
		at := o.t.Versions[name]
		raw, err := json.Marshal(o.t.Best.Params[name])
		if err != nil {
			return err
		}
		items = append(items, &pb.SetItem{Identifier: name, Value: &pb.Value{Json: raw}, ExpectedVersion: &at})
	}
	return o.save(ctx, items...)
}

// settle verifies what was written, and puts the former values back if that fails.
func (o *tuner) settle(ctx context.Context) error {
	o.t.Phase = "done"
	var items []*pb.SetItem
	if len(o.verify) > 0 {
		_, err := o.command(ctx, o.verify, o.t.Best.Params)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			o.t.Phase = "rolled_back"
			items = o.former()
		}
	}
	if err := o.remember(ctx); err != nil { // before the end is recorded: it is tried again, and counts once
		return err
	}
	return o.save(ctx, items...)
}

// former are the values from before, for variables that have not changed since the best
// setting was written.
func (o *tuner) former() (items []*pb.SetItem) {
	for _, name := range o.t.Variables {
		at := o.t.Versions[name] + 1
		items = append(items, &pb.SetItem{Identifier: name, Value: &pb.Value{Json: o.t.Before[name]}, ExpectedVersion: &at})
	}
	return items
}

// report prints the outcome; one that did not stay is a failure.
func (o *tuner) report() error {
	if err := o.print(); err != nil {
		return err
	}
	if o.t.Phase == "rolled_back" {
		return answerError{}
	}
	return nil
}

func (o *tuner) print() error {
	best, err := json.Marshal(o.t.Best)
	if err != nil {
		return err
	}
	if o.cl.out.json {
		err = json.NewEncoder(o.cl.out.w).Encode(map[string]any{"phase": o.t.Phase, "trials": o.t.Done, "best": json.RawMessage(best)})
	} else {
		_, err = fmt.Fprintf(o.cl.out.w, "%s after %d trials: best %s\n", o.t.Phase, o.t.Done, best)
	}
	return err
}
