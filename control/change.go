package control

import (
	"context"
	"net"

	"google.golang.org/grpc/peer"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
)

// anonymous is recorded as the actor of a change whose caller named nobody.
const anonymous = "anonymous"

// sourceAdmin is the Event.source of every change made through the admin API.
const sourceAdmin = "admin"

// decision is what a verb wants to write, decided on one version of the facts. No
// writes means that the wanted state is there already.
type decision func(*facts.Facts) ([]eventlog.Write, error)

// change carries a decision out: decide on the facts as they are, append with the
// sequences it was decided on, wait until the own projection shows the result. If
// somebody else was faster it decides once more on the newer facts; a second conflict
// goes to the caller.
func (a *admin) change(ctx context.Context, actor, requestID string, decide decision) (*facts.Facts, error) {
	if err := checkActor(actor); err != nil {
		return nil, err
	}
	for attempt := 0; ; attempt++ {
		f := a.facts.Facts()
		writes, err := decide(f)
		if err != nil || len(writes) == 0 {
			return f, err
		}
		stamp(ctx, actor, requestID, writes)
		done, err := a.log.Append(ctx, scoped(requestID), writes...)
		if err == nil {
			return a.facts.Wait(ctx, done.Last)
		}
		if attempt > 0 || !outrigger.IsKind(err, outrigger.Conflict) {
			return nil, err
		}
		// The log is ahead of what was decided on; all of it is visible after this.
		if _, err := a.facts.Wait(ctx, a.log.Head()); err != nil {
			return nil, err
		}
	}
}

// scoped keeps request ids of admin calls apart from those of variable writes, which
// share the log's window.
func scoped(requestID string) string {
	if requestID == "" {
		return ""
	}
	return "admin/" + requestID
}

// stamp records who asked, from where.
func stamp(ctx context.Context, actor, requestID string, writes []eventlog.Write) {
	if actor == "" {
		actor = anonymous
	}
	for _, w := range writes {
		for _, e := range w.Events {
			e.Actor, e.Source, e.RequestId, e.Schema = actor, sourceAdmin, requestID, 1
			if from := peerHost(ctx); from != "" {
				if e.Metadata == nil {
					e.Metadata = make(map[string]string, 1)
				}
				e.Metadata["peer"] = from
			}
		}
	}
}

// peerHost is the caller's address without the port, "" when it has none.
func peerHost(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return ""
	}
	host, _, err := net.SplitHostPort(p.Addr.String())
	if err != nil {
		return ""
	}
	return host
}

func checkActor(actor string) error {
	if actor == "" {
		return nil
	}
	return outrigger.CheckName("actor", actor)
}

// Builders of the writes of a decision.

// write appends events to an aggregate as it is in the facts. Without events it only
// checks that nobody else has written to it.
func write(f *facts.Facts, aggregate string, events ...*pb.Event) eventlog.Write {
	return eventlog.Write{Aggregate: aggregate, Expect: int64(f.Sequence(aggregate)), Events: events}
}

func toModel(f *facts.Facts, name string, events ...*pb.Event) eventlog.Write {
	return write(f, facts.ModelPrefix+name, events...)
}

func versionState(version, state, reason string) *pb.Event {
	return &pb.Event{Payload: &pb.Event_ModelVersionState{ModelVersionState: &pb.ModelVersionState{Version: version, State: state, Reason: reason}}}
}

func aliasMoved(alias, from, to string) *pb.Event {
	return &pb.Event{Payload: &pb.Event_AliasMoved{AliasMoved: &pb.AliasMoved{Alias: alias, From: from, To: to}}}
}
