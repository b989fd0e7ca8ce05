package control

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/metric"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/compile"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/secrets"
	"github.com/outrigger-mesh/outrigger/internal/pause"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// alertPolicy is the alert that stands while the newest facts could not be published.
const alertPolicy = "policy"

// pushSettle is how long a push may stay unanswered before it is recorded with whoever
// has not accepted it.
const pushSettle = 10 * time.Second

// appendTimeout bounds one append of the control plane's own.
const appendTimeout = 5 * time.Second

// pusher is where compiled policy goes; adsserver.Server is one.
type pusher interface {
	Publish(group string, res *translate.Resources, position uint64) error
	PublishForced(group string, res *translate.Resources, position uint64) error
	Stage(group string, res *translate.Resources, position uint64, chosen func(outrigger.Node) bool) error
	Unstage(group string)
	Know(known func(model, version string) bool)
	Connected() map[translate.Kind]int
	Rejecting() []adsserver.NodeState
	Follow(position uint64) *adsserver.Progress
	Changed() <-chan struct{}
}

// publisher turns changes of the facts into pushes and records how they went. A policy
// that cannot be compiled or pushed leaves the last good one in force and raises one alert.
type publisher struct {
	facts *facts.Projection
	log   eventlog.Appender
	out   pusher
	// elsewhere is how many sidecars of other replicas have accepted a position; nil = none.
	elsewhere func(position uint64) int
	compile   compile.Options
	glass     *breakGlass    // nil = no overlay
	lease     *lease         // nil = this replica owns the log
	secrets   *secrets.Watch // nil = there are none
	adopt     bool           // clients drop what the log never had, see Options.AdoptClients
	debounce  time.Duration  // the longest pause between pushes of a burst
	logger    *slog.Logger
	took      metric.Float64Histogram
	pushes    metric.Int64Counter

	published atomic.Uint64
	first     chan struct{} // closed by the first attempt, also a failed one; see publish
	pushed    chan struct{} // capacity 1: wakes the recorder

	// Only run's goroutine.
	tried   uint64       // the last position that was tried
	turn    uint64       // of the overlay that went with it
	any     bool         // a position was tried
	lapsed  bool         // and whether the leader was silent then
	gave    *secrets.Set // the secrets that went with it
	failing bool
	// What the last policy asks of connected clients that they do not fully do.
	problems  []string
	translate translate.Options
	compiler  *compile.Compiler
	linter    *translate.Linter
	// held compiles what a configuration canary holds others at; nil while there is none.
	held *compile.Compiler
}

// run publishes until ctx ends.
func (p *publisher) run(ctx context.Context) error {
	select {
	case <-p.facts.Ready():
		// Not earlier: half of the log is not a policy anybody decided.
	case <-ctx.Done():
		return nil
	}
	for {
		// A lone change goes out at once; in a burst every push is followed by a pause as
		// long as the push took, within the limit, so that bursts cost at most half a core.
		if !pause.For(ctx, min(p.publish(ctx), p.debounce)) {
			return nil
		}
		var wake, lapse, rotated <-chan struct{}
		if p.secrets != nil {
			rotated = p.secrets.Changed()
		}
		if p.glass != nil {
			wake = p.glass.wake
		}
		if p.lease != nil {
			lapse = p.lease.wake
		}
		select {
		case <-p.facts.Changes():
		case <-wake:
		case <-lapse:
		case <-rotated:
		case <-ctx.Done():
			return nil
		}
	}
}

// publish pushes the present facts if policy may depend on what changed, and returns how
// long that took.
func (p *publisher) publish(ctx context.Context) time.Duration {
	f := p.facts.Facts()
	position := f.PolicyPosition()
	options, turn := p.compile, uint64(0)
	if p.glass != nil {
		options.Kills, turn = p.glass.overlay()
	}
	out, lapsed := p.lease.without(f)
	options.Kills = append(options.Kills, out...)
	given := p.gave
	if p.secrets != nil {
		given = p.secrets.Set()
		options.Secrets = given.Secrets
	}
	rotated := given != nil && (p.gave == nil || !given.Secrets.Same(p.gave.Secrets))
	if p.any && position == p.tried && turn == p.turn && lapsed == p.lapsed && !rotated {
		return 0
	}
	start := time.Now()
	p.any, p.tried, p.turn, p.lapsed, p.gave = true, position, turn, lapsed, given
	err := p.push(f, position, options)
	took := time.Since(start)
	p.took.Record(ctx, took.Seconds())
	if p.first != nil {
		// Also after a failure: a server that refuses calls until its policy is good would
		// refuse the very call that repairs it.
		close(p.first)
		p.first = nil
	}
	if err != nil {
		p.logger.Error("policy not published; the last good one stays in force", "position", position, "in_force", p.published.Load(), "error", err)
		p.fail(ctx, f, position, err)
		return took
	}
	p.pushes.Add(ctx, 1)
	p.logger.Info("policy published", "position", position, "took", took)
	p.published.Store(position)
	p.recovered(ctx, f, position)
	select {
	case p.pushed <- struct{}{}:
	default:
	}
	return took
}

func (p *publisher) push(f *facts.Facts, position uint64, options compile.Options) error {
	sets, err := p.compiler.Compile(f, position, options)
	if err != nil {
		return err
	}
	p.relint(sets)
	if !p.adopt {
		p.out.Know(f.Had)
	}
	c := f.Canary()
	if c != nil {
		err = p.pushHeld(f, c, options)
	} else {
		p.held = nil
		err = p.give(f, sets, position)
	}
	if err != nil {
		return err
	}
	for _, kind := range translate.Kinds() {
		group := adsserver.KindGroup(kind)
		if c == nil || c.RolledBack {
			p.out.Unstage(group)
		} else if err := p.out.Stage(group, sets.ByKind[kind], position, c.Chooses); err != nil {
			return err
		}
	}
	p.lint()
	return nil
}

// give publishes a set of each kind.
func (p *publisher) give(f *facts.Facts, sets *compile.Sets, position uint64) error {
	publish := p.out.Publish
	if sets.Models == 0 && f.ModelCount() > 0 {
		// The ADS server refuses to remove every model, because that is what a bug looks
		// like. Here each one's reason to be out is an event somebody decided.
		publish = p.out.PublishForced
	}
	for _, kind := range translate.Kinds() { // sidecars first: what they refuse nobody gets
		if err := publish(adsserver.KindGroup(kind), sets.ByKind[kind], position); err != nil {
			return err
		}
	}
	return nil
}

// pushHeld publishes what clients that are not chosen are to have: the policy of before,
// but for what was taken out since.
func (p *publisher) pushHeld(f *facts.Facts, c *facts.Canary, options compile.Options) error {
	base, at := compile.Held(c.Base, f)
	if p.held == nil {
		p.held = compile.NewCompiler(p.translate)
	}
	label := max(c.Label, at)
	sets, err := p.held.Compile(base, label, options)
	if err != nil {
		return err
	}
	return p.give(base, sets, label)
}

// relint tells the linter what changed.
func (p *publisher) relint(sets *compile.Sets) {
	if sets.Whole {
		p.linter = translate.NewLinter()
	}
	for _, m := range sets.Changed {
		p.linter.Set(m)
	}
	for _, name := range sets.Removed {
		p.linter.Remove(name)
	}
}

// lint names, in the log and once per change, what connected clients do not fully obey.
func (p *publisher) lint() {
	connected := p.out.Connected()
	var problems []string
	for _, kind := range translate.Kinds() {
		if connected[kind] == 0 {
			continue
		}
		for _, problem := range p.linter.Problems(kind) {
			problems = append(problems, problem.String())
		}
	}
	if slices.Equal(problems, p.problems) {
		return
	}
	p.problems = problems
	for _, text := range problems {
		p.logger.Warn("policy not fully obeyed", "problem", text)
	}
}

// fail raises the alert, once for as long as pushes fail.
func (p *publisher) fail(ctx context.Context, f *facts.Facts, position uint64, cause error) {
	if p.failing {
		return
	}
	if a := f.Alert(alertPolicy); a != nil && a.ResolvedAt.IsZero() {
		p.failing = true
		return
	}
	p.failing = p.append(ctx, fmt.Sprintf("policy/%d/raise", position), facts.AlertPrefix+alertPolicy, &pb.Event{
		Payload: &pb.Event_AlertRaised{AlertRaised: &pb.AlertRaised{Severity: "critical",
			Summary: fmt.Sprintf("the policy of position %d cannot be published, %d stays in force: %v", position, p.published.Load(), cause)}}})
}

func (p *publisher) recovered(ctx context.Context, f *facts.Facts, position uint64) {
	if a := f.Alert(alertPolicy); !p.failing && (a == nil || !a.ResolvedAt.IsZero()) {
		return
	}
	p.failing = !p.append(ctx, fmt.Sprintf("policy/%d/resolve", position), facts.AlertPrefix+alertPolicy, &pb.Event{
		Payload: &pb.Event_AlertResolved{AlertResolved: &pb.AlertResolved{Reason: fmt.Sprintf("position %d is published", position)}}})
}

// append writes one event of the control plane itself. The request id makes replicas over
// one log write it once.
func (p *publisher) append(ctx context.Context, requestID, aggregate string, e *pb.Event) bool {
	ctx, cancel := context.WithTimeout(ctx, appendTimeout)
	defer cancel()
	e.Actor, e.Source, e.RequestId, e.Schema = sourceControl, sourceControl, requestID, 1
	_, err := p.log.Append(ctx, "control/"+requestID, eventlog.Write{Aggregate: aggregate, Expect: eventlog.Any, Events: []*pb.Event{e}})
	if err != nil && !outrigger.IsKind(err, outrigger.Cancelled) {
		p.logger.Warn("event not appended", "aggregate", aggregate, "error", err)
	}
	return err == nil
}

// record writes one PushRecorded per settled push: when every sidecar has accepted it, or
// after pushSettle with those that rejected it. Pushes that were overtaken meanwhile are
// not recorded; the one that overtook them is.
func (p *publisher) record(ctx context.Context) error {
	timer := time.NewTimer(pushSettle)
	defer timer.Stop()
	for {
		select {
		case <-p.pushed:
		case <-ctx.Done():
			return nil
		}
		timer.Reset(pushSettle)
		for settled := false; !settled; {
			position := p.published.Load()
			progress := p.out.Follow(position)
			select {
			case <-progress.Done():
				settled = true
			case <-timer.C:
				settled = true
			case <-p.pushed:
				timer.Reset(pushSettle)
			case <-ctx.Done():
			}
			acked := progress.Acked()
			progress.Close()
			if ctx.Err() != nil {
				return nil
			}
			if settled {
				p.recordPush(ctx, position, acked)
			}
		}
	}
}

func (p *publisher) recordPush(ctx context.Context, position uint64, acked int) {
	if p.elsewhere != nil {
		acked += p.elsewhere(position)
	}
	var nacked []string
	for _, n := range p.out.Rejecting() {
		if len(nacked) < maxNacked {
			nacked = append(nacked, n.Node.ID)
		}
	}
	if acked+len(nacked) == 0 || position == 0 || p.facts.Facts().Pushed() >= position {
		return // nobody is there to have it, or it is recorded
	}
	p.append(ctx, fmt.Sprintf("push/%d", position), "push/policy", &pb.Event{
		Payload: &pb.Event_PushRecorded{PushRecorded: &pb.PushRecorded{Push: position, Acked: uint32(acked), Nacked: nacked}}})
}

// maxNacked bounds the names in one PushRecorded.
const maxNacked = 1000

// sourceControl is the actor and source of what the control plane writes by itself.
const sourceControl = "control"
