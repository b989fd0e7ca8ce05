// Package checks asks the automated_test gates of rollouts: it calls a web hook, a gRPC
// health check or a program, and appends what came of it to the rollout's log.
//
//	r, err := checks.New(checks.Options{Log: log, Rollouts: facts, Ended: ended})
//	go r.Run(ctx)
//
// # What is asked
//
// HTTP: a POST of {"name", "namespace", "phase", "checksum", "metadata"} as Flagger sends
// it (https://docs.flagger.app/usage/webhooks): model, environment, hook, candidate, and
// the check's metadata with rollout, last_good, stage and weight. 200, 201 and 202 pass,
// any other status fails; redirects are not followed. gRPC: grpc.health.v1 Check of the
// service in the path; SERVING passes. A command: exit code 0 passes; it gets the same
// JSON on standard input and no environment but PATH, and only where AllowExec says so.
// No answer within the timeout, or nobody there, is inconclusive.
//
// A check that passed is not asked again in its phase, except with the hooks rollout and
// rollback, which are asked every interval; others are asked every interval until they
// pass. Hook post-rollout is called once when a rollout ends, event at each change of its
// state; both tell and their answers change nothing.
//
// # Promises
//
// An answer that differs from the one before is one durable RolloutGateDecided. Checks are
// asked at least once: after a crash, or by several replicas over one log, the same
// question may be asked again, so checks must be repeatable. Hooks event and post-rollout
// are best effort: what happens while no Runner runs is not told. At most MaxRunning
// checks run at a time; further ones wait for the next tick. At most 64 KiB of an answer
// are read.
//
// New starts nothing; Run owns every goroutine and returns when all have ended.
package checks

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/deploy"
)

// RolloutSource knows the rollouts that have not ended.
type RolloutSource interface {
	RunningRollouts() []deploy.Rollout
}

// Options of a Runner. Log and Rollouts are required; zero values of the rest get the
// defaults named.
type Options struct {
	Log      eventlog.Appender
	Rollouts RolloutSource
	// Ended returns a rollout that has ended, for post-rollout hooks; nil = none is told.
	Ended      func(id string) (deploy.Rollout, bool)
	AllowExec  bool
	Tick       time.Duration // default 1 s
	MaxRunning int           // default 16
	Now        func() time.Time
	Logger     *slog.Logger
}

// Runner asks checks. Build it with New, start it with Run.
type Runner struct {
	opts Options
	ask  func(ctx context.Context, c *pb.RolloutCheck, q question) (deploy.Outcome, string)

	// Only Run's goroutine.
	asked map[string]time.Time // by rollout/phase/gate: when it was asked last
	busy  map[string]bool
	seen  map[string]deploy.Rollout // live ones at the last tick
}

// answer is what one check said.
type answer struct {
	key     string
	rollout deploy.Rollout
	gate    *pb.RolloutGate
	outcome deploy.Outcome
	reason  string
}

// New starts nothing. The error has kind Invalid if a required option is missing.
func New(o Options) (*Runner, error) {
	if o.Log == nil || o.Rollouts == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "checks need Log and Rollouts; one is nil")
	}
	o.Tick, o.MaxRunning = cmp.Or(o.Tick, time.Second), cmp.Or(o.MaxRunning, 16)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Runner{opts: o, asked: make(map[string]time.Time), busy: make(map[string]bool), seen: make(map[string]deploy.Rollout)}
	r.ask = r.askOne
	return r, nil
}

// Run asks until ctx ends and then returns nil. Call it once.
func (r *Runner) Run(ctx context.Context) error {
	timer := time.NewTicker(r.opts.Tick)
	defer timer.Stop()
	answers := make(chan answer)
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		for _, c := range r.due() {
			running.Add(1)
			go func() {
				defer running.Done()
				c.outcome, c.reason = r.ask(ctx, c.gate.GetCheck(), questionOf(&c.rollout, c.gate.GetCheck()))
				select {
				case answers <- c:
				case <-ctx.Done():
				}
			}()
		}
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				return nil
			case <-timer.C:
				waiting = false
			case a := <-answers:
				delete(r.busy, a.key)
				r.record(ctx, a)
			}
		}
	}
}

// due lists what is to be asked now and marks it busy.
func (r *Runner) due() (out []answer) {
	now := r.opts.Now()
	live := make(map[string]deploy.Rollout)
	add := func(ro deploy.Rollout, g *pb.RolloutGate, key string) {
		if len(r.busy) < r.opts.MaxRunning && !r.busy[key] {
			r.busy[key], r.asked[key] = true, now
			out = append(out, answer{key: key, rollout: ro, gate: g})
		}
	}
	for _, ro := range r.opts.Rollouts.RunningRollouts() {
		live[ro.ID] = ro
		if before, known := r.seen[ro.ID]; !known || before.State != ro.State || before.Phase != ro.Phase {
			tell(ro, deploy.HookEvent, add)
		}
		if ro.State != deploy.Running && ro.State != deploy.Held {
			continue
		}
		for _, g := range ro.CurrentPhase().Gates {
			key := keyOf(&ro, g)
			if g.GetKind() == deploy.GateTest && r.wanted(&ro, g, r.asked[key], now) {
				add(ro, g, key)
			}
		}
	}
	for id := range r.seen {
		if _, on := live[id]; on || r.opts.Ended == nil {
			continue
		}
		if ro, ended := r.opts.Ended(id); ended {
			tell(ro, deploy.HookEvent, add)
			tell(ro, deploy.HookPostRollout, add)
			r.forget(id)
		}
	}
	r.seen = live
	return out
}

// tell calls the gates of one hook in every phase.
func tell(ro deploy.Rollout, hook string, add func(deploy.Rollout, *pb.RolloutGate, string)) {
	for _, p := range ro.Phases {
		for _, g := range p.Gates {
			if g.GetKind() == deploy.GateTest && g.GetCheck().GetHook() == hook {
				add(ro, g, fmt.Sprintf("%s/%s/%s/%d", ro.ID, p.Name, g.GetName(), ro.Sequence))
			}
		}
	}
}

func keyOf(ro *deploy.Rollout, g *pb.RolloutGate) string {
	return fmt.Sprintf("%s/%d/%d/%s", ro.ID, ro.Phase, ro.PhaseSince.UnixNano(), g.GetName())
}

// forget drops when the checks of an ended rollout were asked.
func (r *Runner) forget(id string) {
	for key := range r.asked {
		if len(key) > len(id) && key[:len(id)+1] == id+"/" {
			delete(r.asked, key)
		}
	}
}

// wanted reports whether a gate is to be asked.
func (r *Runner) wanted(ro *deploy.Rollout, g *pb.RolloutGate, last, now time.Time) bool {
	c := g.GetCheck()
	d := ro.Decided[g.GetName()]
	switch c.GetHook() {
	case deploy.HookEvent, deploy.HookPostRollout:
		return false
	case "", deploy.HookRollout, deploy.HookRollback:
	default:
		if deploy.Outcome(d.GetOutcome()) == deploy.Pass {
			return false
		}
	}
	return last.IsZero() || now.Sub(last) >= cmp.Or(c.GetInterval().AsDuration(), deploy.DefaultCheckInterval)
}

// appendTimeout bounds one append.
const appendTimeout = 5 * time.Second

// record appends an answer that differs from the one before. Losing a race (the rollout
// moved on) needs nothing more: a gate that is still wanted is asked again.
func (r *Runner) record(ctx context.Context, a answer) {
	hook := a.gate.GetCheck().GetHook()
	log := r.opts.Logger.With("rollout", a.rollout.ID, "gate", a.gate.GetName(), "hook", hook, "outcome", a.outcome, "reason", a.reason)
	before := deploy.Outcome(a.rollout.Decided[a.gate.GetName()].GetOutcome())
	switch {
	case hook == deploy.HookEvent || hook == deploy.HookPostRollout:
		log.Debug("hook told")
		return
	case a.outcome == deploy.Inconclusive:
		log.Warn("check gave no answer; it is asked again")
		return
	case a.outcome == before:
		return
	}
	id := fmt.Sprintf("checks/%s/%s>%s/%d", a.key, before, a.outcome, a.rollout.Sequence)
	ctx, cancel := context.WithTimeout(ctx, appendTimeout)
	defer cancel()
	result := &pb.RolloutGateDecided{Phase: uint32(a.rollout.Phase), Gate: a.gate.GetName(), Outcome: string(a.outcome), Reason: a.reason, DryRun: a.gate.GetDryRun()}
	_, err := r.opts.Log.Append(ctx, id, eventlog.Write{Aggregate: deploy.AggregatePrefix + a.rollout.ID, Expect: eventlog.Any, Events: []*pb.Event{{
		Actor: "checks", Source: "checks", RequestId: id, Schema: 1, Payload: &pb.Event_RolloutGateDecided{RolloutGateDecided: result}}}})
	if err != nil {
		log.Warn("answer of a check not appended; it is asked again", "error", err)
		return
	}
	log.Info("gate decided")
}
