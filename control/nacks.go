package control

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/internal/pause"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// A rejection of configuration is an alert at once: id "nack-<type>-<resource>", one per
// rejected resource whatever the number of nodes, so that a push the whole fleet rejects
// is one alert and not thousands. It names the first node and its reason, and is raised
// anew, at most once per nackAgain, while the number of nodes changes. It is resolved when no
// node of this replica rejects the resource any more. Replicas over one log share an
// alert; one that a replica resolves too early is raised again by the other.
const (
	nackAlertPrefix = "nack-"
	nackAgain       = time.Minute
	// nackGone is how long a rejection stands after its node has gone, and how long a
	// restarted replica leaves alerts alone that it knows nothing of: the nodes are on
	// their way back.
	nackGone = time.Minute
	// maxNackAlerts bounds the alerts that stand at a time. More different resources
	// rejected at once are one problem; the ledger has them all.
	maxNackAlerts = 50
	// nackLook is how often alerts are looked at when nothing changes.
	nackLook = 10 * time.Second
	// nackNodes bounds the nodes named in one alert, maxNackSummary its text.
	nackNodes      = 20
	maxNackSummary = 1000
)

// rejection is what nodes reject alike.
type rejection struct {
	id              string
	group, resource string // resource with its type, as people say it
	reason          string // of the first
	nodes           []string
	at              time.Time // of the first
}

// rejections sorts what stands in a ledger by what is rejected; nodes by id.
func rejections(ledger []adsserver.NodeState, now time.Time) map[string]*rejection {
	out := make(map[string]*rejection)
	for _, n := range ledger {
		if n.Nack == nil || !n.Connected && now.Sub(n.Since) >= nackGone {
			continue
		}
		id := nackID(n.Nack)
		r := out[id]
		if r == nil {
			r = &rejection{id: id, resource: strings.TrimSpace(xds.ShortType(n.Nack.Type) + " " + n.Nack.Resource)}
			out[id] = r
		}
		if r.at.IsZero() || n.Nack.At.Before(r.at) {
			r.at, r.reason, r.group = n.Nack.At, n.Nack.Message, n.Group
			r.nodes = append([]string{n.Node.ID}, r.nodes...)
			continue
		}
		r.nodes = append(r.nodes, n.Node.ID)
	}
	return out
}

// nackID is a name for aggregates: names of resources may be paths or too long.
func nackID(n *adsserver.Nack) string {
	id := nackAlertPrefix + xds.ShortType(n.Type)
	if n.Resource != "" {
		id += "-" + strings.ReplaceAll(n.Resource, "/", "-")
	}
	if len(id) > outrigger.MaxNameBytes-len(facts.AlertPrefix) || outrigger.CheckName("alert", id) != nil {
		id = nackAlertPrefix + xds.ShortType(n.Type)
	}
	return id
}

// raised is what the watch remembers of an alert it raised.
type raised struct {
	nodes int
	at    time.Time
}

// nackStep is one thing to append.
type nackStep struct {
	id    string
	raise *rejection // nil = resolve
}

// nackSteps decides what to append at now: present is what is rejected, mine what this
// replica raised, standing the alerts of this kind that stand in the log.
func nackSteps(present map[string]*rejection, mine map[string]raised, standing []string, started, now time.Time) (out []nackStep) {
	ids := make([]string, 0, len(present))
	for id := range present {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	open := len(standing)
	for _, id := range ids {
		r := present[id]
		m, known := mine[id]
		switch {
		case slices.Contains(standing, id):
			if known && (m.nodes == len(r.nodes) || now.Sub(m.at) < nackAgain) || !known && now.Sub(started) < nackGone {
				continue
			}
		case open >= maxNackAlerts:
			continue
		default:
			open++
		}
		out = append(out, nackStep{id: id, raise: r})
	}
	for _, id := range standing {
		_, known := mine[id]
		if present[id] == nil && (known || now.Sub(started) >= nackGone) {
			out = append(out, nackStep{id: id})
		}
	}
	return out
}

// nackWatch raises and resolves the alerts.
type nackWatch struct {
	out    pusher
	facts  *facts.Projection
	log    eventlog.Appender
	now    func() time.Time
	logger *slog.Logger
}

func (w *nackWatch) run(ctx context.Context) error {
	select {
	case <-w.facts.Ready():
	case <-ctx.Done():
		return nil
	}
	started, mine := w.now(), make(map[string]raised)
	timer := time.NewTimer(nackLook)
	defer timer.Stop()
	for {
		changed := w.out.Changed()
		w.look(ctx, mine, started)
		timer.Reset(nackLook)
		select {
		case <-changed:
			// The ledger changes thousands of times in a push; a pause bounds the cost.
			if !pause.For(ctx, DefaultDebounce) {
				return nil
			}
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (w *nackWatch) look(ctx context.Context, mine map[string]raised, started time.Time) {
	now := w.now()
	var standing []string
	for _, a := range w.facts.Facts().Alerts() {
		if strings.HasPrefix(a.ID, nackAlertPrefix) && a.ResolvedAt.IsZero() {
			standing = append(standing, a.ID)
		}
	}
	for _, step := range nackSteps(rejections(w.out.Rejecting(), now), mine, standing, started, now) {
		e := &pb.Event{Actor: sourceControl, Source: sourceControl, Schema: 1}
		if r := step.raise; r != nil {
			e.Payload = &pb.Event_AlertRaised{AlertRaised: r.alert()}
		} else {
			e.Payload = &pb.Event_AlertResolved{AlertResolved: &pb.AlertResolved{Reason: "no client rejects it any more"}}
		}
		done, err := w.append(ctx, step.id, e)
		if err != nil {
			w.logger.Warn("alert about a rejection not appended; retrying at the next look", "alert", step.id, "error", err)
			continue
		}
		if step.raise != nil {
			mine[step.id] = raised{nodes: len(step.raise.nodes), at: now}
		} else {
			delete(mine, step.id)
		}
		// The next look must see it, or it would be appended again.
		if _, err := w.facts.Wait(ctx, done.Last); err != nil {
			return
		}
	}
}

func (w *nackWatch) append(ctx context.Context, id string, e *pb.Event) (eventlog.Appended, error) {
	ctx, cancel := context.WithTimeout(ctx, appendTimeout)
	defer cancel()
	return w.log.Append(ctx, "", eventlog.Write{Aggregate: facts.AlertPrefix + id, Expect: eventlog.Any, Events: []*pb.Event{e}})
}

// alert says what, who and why.
func (r *rejection) alert() *pb.AlertRaised {
	who := "node " + r.nodes[0]
	if n := len(r.nodes) - 1; n > 0 {
		who += fmt.Sprintf(" and %d more", n)
	}
	summary := fmt.Sprintf("%s is rejected by %s (group %s): %s; what it had before stays in force there", r.resource, who, r.group, r.reason)
	if len(summary) > maxNackSummary {
		summary = strings.ToValidUTF8(summary[:maxNackSummary], "") + "…"
	}
	return &pb.AlertRaised{Severity: "high", Summary: summary, Numbers: map[string]string{
		"nodes": strconv.Itoa(len(r.nodes)), "named": strings.Join(r.nodes[:min(nackNodes, len(r.nodes))], " "), "resource": r.resource}}
}
