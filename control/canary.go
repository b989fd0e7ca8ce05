package control

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/compile"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/internal/pause"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// A configuration canary tries policy changes on a few xDS clients first. While it stands
// the chosen ones get the newest policy and the others keep the one of before; a model
// of which a version is quarantined or retired meanwhile changes everywhere at once, so
// that a rollback waits for nobody. It is over when
//
//   - all chosen clients that are connected have accepted the newest policy for the dwell:
//     it is widened to everybody;
//   - one of them rejects it, is cut off for longer than its dead-man lease after it was
//     sent it, or has not accepted it within the patience: everybody gets the policy of
//     before, whatever else is decided, until a canary is started anew or the policy is
//     widened by hand. The event and an alert say why, in the client's words.
//
// Both are events, so that restarts and other replicas go on from there. The leader
// decides, about the clients of all replicas; with none of the chosen connected it decides
// nothing.

// Defaults and bounds of a canary.
const (
	canaryDwell    = 30 * time.Second
	canaryPatience = time.Minute
	maxCanaryTime  = 24 * time.Hour
	maxCanaryNodes = 100
	maxCanaryKinds = 3
	maxCanaryShown = 1000
	// canaryLook is how often a canary is looked at when nothing changes.
	canaryLook = time.Second
	// alertCanary stands while a policy change is rolled back.
	alertCanary = "config-canary"
)

// canaryView is what a decision is made of.
type canaryView struct {
	policy   uint64    // position of the newest policy
	since    time.Time // when the watch saw it first
	accepted time.Time // since when all chosen clients have it; zero if they have not
	lease    time.Duration
	chosen   []adsserver.NodeState
}

// canaryStep says what to do at now: nil for nothing, and what is waited for.
func canaryStep(c *facts.Canary, v canaryView, now time.Time) (end *pb.ConfigCanaryEnded, waits string) {
	if c.RolledBack {
		return nil, c.Reason
	}
	if v.policy == c.Started && !c.Anew {
		return nil, "no policy change yet"
	}
	rollBack := func(node, format string, args ...any) (*pb.ConfigCanaryEnded, string) {
		return &pb.ConfigCanaryEnded{Reason: fmt.Sprintf(format, args...), Policy: v.policy, Node: node}, ""
	}
	accepted, behind, gone := uint32(0), "", ""
	for i := range v.chosen {
		n := &v.chosen[i]
		sent := n.Sent >= v.policy || n.Acked >= v.policy
		told := sent || n.Sent == 0 // what a client of a follower was sent is not known here
		switch {
		case n.Nack != nil && told && !n.Nack.At.Before(c.StartedAt):
			return rollBack(n.Node.ID, "%s rejected %s: %s", n.Node.ID, strings.TrimSpace(xds.ShortType(n.Nack.Type)+" "+n.Nack.Resource), n.Nack.Message)
		case !n.Connected && sent && now.Sub(n.Since) >= v.lease:
			return rollBack(n.Node.ID, "%s was sent the policy and has been cut off for %v", n.Node.ID, now.Sub(n.Since).Round(time.Second))
		case !n.Connected && sent:
			gone = n.Node.ID
		case !n.Connected: // left before this policy: none of its business
		case n.Acked >= v.policy:
			accepted++
		case now.Sub(v.since) >= c.Patience:
			return rollBack(n.Node.ID, "%s has not accepted the policy within %v", n.Node.ID, c.Patience)
		default:
			behind = n.Node.ID
		}
	}
	switch {
	case behind != "":
		return nil, behind + " has not accepted the policy yet"
	case gone != "":
		return nil, gone + " was sent the policy and is cut off"
	case accepted == 0:
		return nil, "none of the chosen clients is connected"
	case v.accepted.IsZero() || now.Sub(v.accepted) < c.Dwell:
		return nil, fmt.Sprintf("%d clients have the policy; it is widened when they have had it for %v", accepted, c.Dwell)
	}
	return &pb.ConfigCanaryEnded{Widened: true, Policy: v.policy, Accepted: accepted,
		Reason: fmt.Sprintf("%d clients have had it for %v", accepted, c.Dwell)}, ""
}

// allAccepted reports whether somebody chosen is connected and all of them have the policy.
func (v *canaryView) allAccepted() bool {
	some := false
	for _, n := range v.chosen {
		if n.Connected && n.Acked < v.policy {
			return false
		}
		some = some || n.Connected
	}
	return some
}

// canaryClients is what a canary needs of the ADS server.
type canaryClients interface {
	Ledger() []adsserver.NodeState
	Changed() <-chan struct{}
}

// canaryWatch decides about the configuration canary that stands.
type canaryWatch struct {
	out    canaryClients
	facts  *facts.Projection
	log    eventlog.Appender
	lease  time.Duration
	now    func() time.Time
	logger *slog.Logger
}

// canarySeen is what the watch remembers of one policy that is tried.
type canarySeen struct {
	started, policy uint64
	since, accepted time.Time
}

func (w *canaryWatch) run(ctx context.Context) error {
	select {
	case <-w.facts.Ready():
	case <-ctx.Done():
		return nil
	}
	var seen canarySeen
	timer := time.NewTimer(canaryLook)
	defer timer.Stop()
	for {
		changed := w.out.Changed()
		if c := w.facts.Facts().Canary(); c == nil || c.RolledBack {
			changed = nil // nothing hangs on the ledger
		}
		w.look(ctx, &seen)
		timer.Reset(canaryLook)
		select {
		case <-changed:
			if !pause.For(ctx, DefaultDebounce) { // as in nackWatch
				return nil
			}
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (w *canaryWatch) look(ctx context.Context, seen *canarySeen) {
	f, now := w.facts.Facts(), w.now()
	w.alert(ctx, f)
	c := f.Canary()
	if c == nil || c.RolledBack {
		*seen = canarySeen{}
		return
	}
	v := w.view(c, f, seen, now)
	end, _ := canaryStep(c, v, now)
	if end == nil {
		return
	}
	w.logger.Info("configuration canary ends", "widened", end.Widened, "policy", end.Policy, "reason", end.Reason)
	done, err := w.append(ctx, fmt.Sprintf("canary/%d/end", c.Started), eventlog.Write{Aggregate: facts.CanaryAggregate, Expect: int64(f.Sequence(facts.CanaryAggregate)),
		Events: []*pb.Event{{Payload: &pb.Event_ConfigCanaryEnded{ConfigCanaryEnded: end}}}})
	if err != nil {
		if !outrigger.IsKind(err, outrigger.Conflict) { // else somebody else decided first
			w.logger.Warn("the end of a configuration canary is not appended; retrying at the next look", "error", err)
		}
		return
	}
	_, _ = w.facts.Wait(ctx, done.Last) // ends early with ctx, and then nothing is looked at any more
}

// view brings what is remembered up to date.
func (w *canaryWatch) view(c *facts.Canary, f *facts.Facts, seen *canarySeen, now time.Time) canaryView {
	if seen.started != c.Started || seen.policy != f.PolicyPosition() {
		*seen = canarySeen{started: c.Started, policy: f.PolicyPosition(), since: now}
	}
	v := canaryView{policy: seen.policy, since: seen.since, lease: w.lease, chosen: chosenOf(c, w.out.Ledger())}
	switch {
	case !v.allAccepted():
		seen.accepted = time.Time{}
	case seen.accepted.IsZero():
		seen.accepted = now
	}
	v.accepted = seen.accepted
	return v
}

func chosenOf(c *facts.Canary, nodes []adsserver.NodeState) (out []adsserver.NodeState) {
	for _, n := range nodes {
		if c.Chooses(n.Decisive()) {
			out = append(out, n)
		}
	}
	return out
}

// alert stands exactly while the policy of before is kept by a rollback.
func (w *canaryWatch) alert(ctx context.Context, f *facts.Facts) {
	a, c := f.Alert(alertCanary), f.Canary()
	stands, should := a != nil && a.ResolvedAt.IsZero(), c != nil && c.RolledBack
	if stands == should {
		return
	}
	e := &pb.Event{Payload: &pb.Event_AlertResolved{AlertResolved: &pb.AlertResolved{Reason: "policy changes are in force again or tried anew"}}}
	if should {
		e.Payload = &pb.Event_AlertRaised{AlertRaised: &pb.AlertRaised{Severity: "high",
			Summary: "a policy change was rolled back and every client keeps the policy of before: " + c.Reason,
			Numbers: map[string]string{"base": strconv.FormatUint(c.Base.PolicyPosition(), 10), "policy": strconv.FormatUint(f.PolicyPosition(), 10)}}}
	}
	done, err := w.append(ctx, fmt.Sprintf("canary-alert/%d/%t", f.Sequence(facts.CanaryAggregate), should),
		eventlog.Write{Aggregate: facts.AlertPrefix + alertCanary, Expect: eventlog.Any, Events: []*pb.Event{e}})
	if err != nil {
		w.logger.Warn("alert about a configuration canary not appended; retrying at the next look", "error", err)
		return
	}
	_, _ = w.facts.Wait(ctx, done.Last) // as in look
}

func (w *canaryWatch) append(ctx context.Context, id string, write eventlog.Write) (eventlog.Appended, error) {
	ctx, cancel := context.WithTimeout(ctx, appendTimeout)
	defer cancel()
	for _, e := range write.Events {
		e.Actor, e.Source, e.RequestId, e.Schema = sourceControl, sourceControl, id, 1
	}
	return w.log.Append(ctx, "control/"+id, write)
}

// leaseOf is how long a client may be cut off before it acts by itself.
func leaseOf(o compile.Options) time.Duration {
	if o.DeadMan > 0 {
		return o.DeadMan
	}
	return compile.DefaultDeadMan
}
