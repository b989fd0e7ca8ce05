package control

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// A log that has lost its disk is an empty log like that of a mesh just installed; the
// difference shows by the clients, which come back with models that the log never had. They
// keep them (adsserver.Server.Know), and this is the alert that says so: without it nobody
// would know that changes do not reach them.
const (
	// alertStrangers is the alert's id; replicas over one log share it.
	alertStrangers = "unknown-configuration"
	// strangersPatience is how long a client is sent nothing before it is an alert, and how
	// long there must be none before it is over: clients come and go.
	strangersPatience = 3 * time.Second
)

// strangers is what the watch remembers between two looks.
type strangers struct {
	started time.Time
	mine    raised    // the alert this replica raised; zero = none
	quiet   time.Time // since when there is nobody; zero = there is
}

// step decides what to append at now: held are the clients that are sent nothing, standing
// says that the alert stands in the log.
func (s *strangers) step(held []adsserver.NodeState, standing bool, now time.Time) (raise *pb.AlertRaised, resolve bool) {
	var here []adsserver.NodeState
	oldest := now
	for _, n := range held {
		if !n.Connected && now.Sub(n.Since) >= nackGone {
			continue
		}
		here = append(here, n)
		if n.HeldSince.Before(oldest) {
			oldest = n.HeldSince
		}
	}
	if len(here) == 0 {
		if s.quiet.IsZero() {
			s.quiet = now
		}
		known := !s.mine.at.IsZero() || now.Sub(s.started) >= nackGone
		return nil, standing && known && now.Sub(s.quiet) >= strangersPatience
	}
	s.quiet = time.Time{}
	switch {
	case now.Sub(oldest) < strangersPatience:
		return nil, false
	case standing && (s.mine.nodes == len(here) || now.Sub(s.mine.at) < nackAgain || s.mine.at.IsZero() && now.Sub(s.started) < nackGone):
		return nil, false
	}
	return strangersAlert(here), false
}

// strangersAlert says who, what, and what can be done.
func strangersAlert(nodes []adsserver.NodeState) *pb.AlertRaised {
	var names []string
	for _, n := range nodes[:min(nackNodes, len(nodes))] {
		names = append(names, n.Node.ID)
	}
	first := nodes[0]
	return &pb.AlertRaised{Severity: "critical",
		Summary: fmt.Sprintf("%d clients came back with configuration that this log has never had (%s at %s): they are sent nothing and go on with what they have. "+
			"If the log was lost, restore its directory or register those versions again; "+
			"if what they have is to go, restart the control plane with --adopt-clients", len(nodes), first.Held, first.Node.ID),
		Numbers: map[string]string{"nodes": strconv.Itoa(len(nodes)), "named": strings.Join(names, " "), "resource": first.Held}}
}

// strangerWatch raises and resolves the alert.
type strangerWatch struct {
	out    interface{ Held() []adsserver.NodeState }
	facts  *facts.Projection
	log    eventlog.Appender
	now    func() time.Time
	logger *slog.Logger
}

func (w *strangerWatch) run(ctx context.Context) error {
	select {
	case <-w.facts.Ready():
	case <-ctx.Done():
		return nil
	}
	s := &strangers{started: w.now()}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		w.look(ctx, s)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (w *strangerWatch) look(ctx context.Context, s *strangers) {
	now := w.now()
	a := w.facts.Facts().Alert(alertStrangers)
	raise, resolve := s.step(w.out.Held(), a != nil && a.ResolvedAt.IsZero(), now)
	e := &pb.Event{Actor: sourceControl, Source: sourceControl, Schema: 1}
	switch {
	case raise != nil:
		e.Payload = &pb.Event_AlertRaised{AlertRaised: raise}
	case resolve:
		e.Payload = &pb.Event_AlertResolved{AlertResolved: &pb.AlertResolved{Reason: "every client is sent what this log says"}}
	default:
		return
	}
	ctx, cancel := context.WithTimeout(ctx, appendTimeout)
	defer cancel()
	done, err := w.log.Append(ctx, "", eventlog.Write{Aggregate: facts.AlertPrefix + alertStrangers, Expect: eventlog.Any, Events: []*pb.Event{e}})
	if err != nil {
		w.logger.Warn("alert about unknown configuration not appended; retrying at the next look", "error", err)
		return
	}
	s.mine = raised{}
	if raise != nil {
		nodes, _ := strconv.Atoi(raise.Numbers["nodes"]) // written above
		s.mine = raised{nodes: nodes, at: now}
	}
	// The next look must see it, or it would be appended again; if that fails, ctx is over.
	_, _ = w.facts.Wait(ctx, done.Last)
}
