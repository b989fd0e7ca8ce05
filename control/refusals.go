package control

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/internal/authz"
)

// Refused changes are recorded in the log under this aggregate, which nothing is derived
// from. Whoever can reach the port can cause refusals, so their number is bounded: a burst,
// then one in two seconds; the next one recorded says how many were not.
const (
	refusalAggregate = "audit/refused"
	refusalBurst     = 60
	refusalEvery     = 2 * time.Second
	maxRefusalText   = 300
)

// refusals writes them. All methods may be called concurrently.
type refusals struct {
	log    eventlog.Appender
	now    func() time.Time
	logger *slog.Logger

	mu         sync.Mutex
	allowance  int // how many may be recorded at once; grows by one every refusalEvery
	since      time.Time
	unrecorded uint64
}

// note records that a change was not made, if err says that it was refused: for who asked
// (unauthorised, denied), or for when (a stale sequence, a state it is illegal in, a value
// that is not one).
func (l *refusals) note(ctx context.Context, t *attempt, err error) {
	kind := outrigger.KindOf(err)
	who := kind == outrigger.Unauthorised || kind == outrigger.Denied
	when := kind == outrigger.Conflict || kind == outrigger.Locked || kind == outrigger.Invalid
	if err == nil || !who && !(when && transition(t.verb)) {
		return
	}
	before, ok := l.take()
	if !ok {
		return
	}
	refused := &pb.ActionRefused{Verb: t.verb, Target: clipRefusal(t.target), Kind: kind.String(), Reason: clipRefusal(err.Error()), Unrecorded: before}
	if t.caller.Role != authz.Nobody {
		refused.Role = t.caller.Role.String()
	}
	if t.claimed != t.caller.Name {
		refused.Claimed = clipRefusal(t.claimed)
	}
	w := eventlog.Write{Aggregate: refusalAggregate, Expect: eventlog.Any,
		Events: []*pb.Event{{Payload: &pb.Event_ActionRefused{ActionRefused: refused}}}}
	stamp(ctx, t.caller.Name, "", []eventlog.Write{w})
	// The caller may have gone; what it tried is of interest all the same.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), appendTimeout)
	defer cancel()
	if _, err := l.log.Append(ctx, "", w); err != nil {
		l.logger.Warn("refused change not recorded in the log", "verb", t.verb, "actor", t.caller.Name, "kind", kind.String(), "error", err)
	}
}

// transition reports whether a method moves something from one state to another. Of others
// only who was refused is recorded: a registration with a typing error is no incident.
func transition(verb string) bool {
	return strings.HasSuffix(verb, "Rollout") || slices.Contains([]string{"BreakGlass", "SetExperimentState", "SilenceAlert"}, verb)
}

// take reports whether one more may be recorded, and how many were not since the last.
func (l *refusals) take() (unrecorded uint64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if l.since.IsZero() {
		l.since, l.allowance = now, refusalBurst
	}
	if n := int(now.Sub(l.since) / refusalEvery); n > 0 {
		l.allowance, l.since = min(refusalBurst, l.allowance+n), now
	}
	if l.allowance == 0 {
		l.unrecorded++
		return 0, false
	}
	l.allowance--
	unrecorded, l.unrecorded = l.unrecorded, 0
	return unrecorded, true
}

func clipRefusal(s string) string {
	if len(s) > maxRefusalText {
		s = s[:maxRefusalText]
	}
	return strings.ToValidUTF8(s, "")
}
