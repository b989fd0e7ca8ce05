package control

import (
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/delivery"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// deliveryAPI is the view of configuration delivery, and the configuration canary.
type deliveryAPI struct {
	*delivery.Service
	admin *admin
	watch *canaryWatch
}

// XdsCanary says what is tried, on whom, and what is waited for.
func (d *deliveryAPI) XdsCanary(context.Context, *pb.XdsCanaryRequest) (*pb.XdsCanaryResponse, error) {
	return d.watch.status(d.admin.facts.Facts()), nil
}

// XdsCanaryStart has later policy changes go to the chosen clients first. After a roll back
// what is in force stays so for the others, and the newest policy is tried anew.
func (d *deliveryAPI) XdsCanaryStart(ctx context.Context, r *pb.XdsCanaryStartRequest) (*pb.XdsCanaryResponse, error) {
	e, err := canaryOf(r)
	if err != nil {
		return nil, err
	}
	return d.change(ctx, r.GetActor(), func(f *facts.Facts) (*pb.Event, error) {
		if c := f.Canary(); c != nil && !c.RolledBack {
			return nil, locked("a configuration canary stands since %v; end it first", c.StartedAt.UTC().Format(time.RFC3339))
		}
		return &pb.Event{Payload: &pb.Event_ConfigCanaryStarted{ConfigCanaryStarted: e}}, nil
	})
}

// XdsCanaryEnd widens the newest policy to everybody, or gives everybody that of before.
func (d *deliveryAPI) XdsCanaryEnd(ctx context.Context, r *pb.XdsCanaryEndRequest) (*pb.XdsCanaryResponse, error) {
	if err := checkReason(r.GetReason()); err != nil {
		return nil, err
	}
	return d.change(ctx, r.GetActor(), func(f *facts.Facts) (*pb.Event, error) {
		switch c := f.Canary(); {
		case c == nil:
			return nil, outrigger.Errorf(outrigger.NotFound, "no configuration canary found; every client has the newest policy")
		case c.RolledBack && !r.GetWiden():
			return nil, locked("the configuration canary is rolled back already: %s", c.Reason)
		}
		return &pb.Event{Payload: &pb.Event_ConfigCanaryEnded{ConfigCanaryEnded: &pb.ConfigCanaryEnded{
			Widened: r.GetWiden(), Reason: r.GetReason(), Policy: f.PolicyPosition()}}}, nil
	})
}

func (d *deliveryAPI) change(ctx context.Context, actor string, decide func(*facts.Facts) (*pb.Event, error)) (*pb.XdsCanaryResponse, error) {
	f, err := d.admin.change(ctx, actor, "", func(f *facts.Facts) ([]eventlog.Write, error) {
		e, err := decide(f)
		if err != nil {
			return nil, err
		}
		return []eventlog.Write{{Aggregate: facts.CanaryAggregate, Expect: int64(f.Sequence(facts.CanaryAggregate)), Events: []*pb.Event{e}}}, nil
	})
	if err != nil {
		return nil, err
	}
	return d.watch.status(f), nil
}

// canaryOf checks a request and applies the defaults.
func canaryOf(r *pb.XdsCanaryStartRequest) (*pb.ConfigCanaryStarted, error) {
	out := &pb.ConfigCanaryStarted{Share: r.GetShare(), Kinds: r.GetKinds(), Nodes: r.GetNodes(), Dwell: r.GetDwell(), Patience: r.GetPatience(), Reason: r.GetReason()}
	if out.Share > experiments.Buckets || out.Share == 0 && len(out.Nodes) == 0 {
		return nil, invalid("share is %d ten-thousandths; give 1 to %d, or name nodes", out.Share, experiments.Buckets)
	}
	if len(out.Nodes) > maxCanaryNodes {
		return nil, invalid("%d nodes are named, the limit is %d; give a share", len(out.Nodes), maxCanaryNodes)
	}
	for _, n := range out.Nodes {
		if n == "" || len(n) > outrigger.MaxNameBytes {
			return nil, invalid("nodes holds an id of %d bytes, allowed is 1 to %d", len(n), outrigger.MaxNameBytes)
		}
	}
	for _, k := range out.Kinds {
		if !slices.Contains(translate.Kinds(), translate.Kind(k)) {
			return nil, invalid("kinds holds %q; one of %v", k, translate.Kinds())
		}
	}
	if len(out.Kinds) > maxCanaryKinds {
		return nil, invalid("%d kinds are named, there are %d", len(out.Kinds), maxCanaryKinds)
	}
	for _, t := range []struct {
		name  string
		field **durationpb.Duration
		usual time.Duration
	}{{"dwell", &out.Dwell, canaryDwell}, {"patience", &out.Patience, canaryPatience}} {
		if *t.field == nil || (*t.field).AsDuration() == 0 {
			*t.field = durationpb.New(t.usual)
		}
		if got := (*t.field).AsDuration(); got < 0 || got > maxCanaryTime {
			return nil, invalid("%s is %v, allowed is 0 (%v) to %v", t.name, got, t.usual, maxCanaryTime)
		}
	}
	return out, checkReason(out.Reason)
}

// States of a configuration canary, as people read them.
const (
	canaryOff        = "off"
	canaryStaging    = "staging"
	canaryRolledBack = "rolled_back"
)

// status is the canary as of f with the clients as they are.
func (w *canaryWatch) status(f *facts.Facts) *pb.XdsCanaryResponse {
	c := f.Canary()
	if c == nil {
		return &pb.XdsCanaryResponse{State: canaryOff, Policy: f.PolicyPosition(), Base: f.PolicyPosition()}
	}
	out := &pb.XdsCanaryResponse{State: canaryStaging, Share: c.Share, Kinds: c.Kinds, Nodes: c.Nodes, Dwell: durationpb.New(c.Dwell), Patience: durationpb.New(c.Patience),
		StartedAt: wire.TimePB(c.StartedAt), Base: c.Base.PolicyPosition(), Policy: f.PolicyPosition()}
	if c.RolledBack {
		out.State = canaryRolledBack
	}
	now := w.now()
	v := w.view(c, f, &canarySeen{}, now)
	_, out.Reason = canaryStep(c, v, now)
	for _, n := range v.chosen[:min(maxCanaryShown, len(v.chosen))] {
		x := &pb.XdsCanaryNode{Node: n.Node.ID, Connected: n.Connected, AckedPosition: n.Acked}
		if n.Nack != nil {
			x.Nack = &pb.XdsNack{Type: n.Nack.Type, Resource: n.Nack.Resource, Message: n.Nack.Message, At: wire.TimePB(n.Nack.At)}
		}
		out.Chosen = append(out.Chosen, x)
	}
	return out
}
