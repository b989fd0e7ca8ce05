package control

import (
	"context"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/monitor"
	"github.com/outrigger-mesh/outrigger/control/variables"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/xds/adsserver"
)

// admin implements pb.AdminServer. Its errors are outrigger.Errors; whoever calls it from
// outside (guard for gRPC, serve for REST) translates them. Who may call is decided there
// too.
type admin struct {
	pb.UnimplementedAdminServer

	log     eventlog.Log
	facts   *facts.Projection
	region  *pb.Region
	now     func() time.Time
	started time.Time

	allowExec bool // gates may run commands
	glass     *breakGlass

	examining sync.Mutex // one plugin at a time

	// Live views, for answers only: nothing is decided on them.
	regions  func() ([]*pb.Region, string) // nil = what the log says
	monitor  monitorView
	told     func(*facts.Facts, *facts.Alert) (notify []string, deliveries []*pb.AlertDelivery)
	trials   trialsView
	ledger   ledgerView
	feeds    feedView
	position func() uint64 // of the policy now published
	problems func(*facts.Facts) []problem
}

type monitorView interface {
	VersionStats(model, version string) monitor.Stats
	CacheStats() *pb.CacheStatus
	Cells() []monitor.CellStats
	Evidence(rollout string) []*pb.Evidence
	Gates(rollout string) (gates []*pb.RolloutGateDecided, waiting string)
	Judge(r *deploy.Rollout) ([]deploy.Result, error)
	RequestsPerSecond(model string) float64
	Cost(formula string, t monitor.Totals) (cost float64, ok bool)
}

type ledgerView interface{ Ledger() []adsserver.NodeState }

type feedView interface{ Stats() variables.Stats }

// evidence returns what the monitor holds against a candidate now.
func (a *admin) evidence(rollout string) []*pb.Evidence { return a.monitor.Evidence(rollout) }

// modelPB shows a model with the split in force.
func (a *admin) modelPB(m *facts.Model) *pb.Model {
	out := &pb.Model{Name: m.Name, Aliases: m.Aliases, Unit: string(m.Unit), WeightEpoch: m.WeightEpoch, MaxAttempts: m.MaxAttempts,
		Limits: limitsPB(m.Limits), Description: m.Description, Tags: m.Tags, Cost: m.Cost, CreatedAt: wire.TimePB(m.CreatedAt), ChangedAt: wire.TimePB(m.TouchedAt)}
	for i := range m.Versions {
		out.Versions = append(out.Versions, a.versionPB(m.Name, &m.Versions[i]))
	}
	out.Arms = splitPB(m)
	return out
}

func limitsPB(l facts.Limits) *pb.Limits {
	if l == (facts.Limits{}) {
		return nil
	}
	return &pb.Limits{MaxConnections: l.MaxConnections, MaxPendingRequests: l.MaxPending, MaxRequests: l.MaxRequests, MaxRetries: l.MaxRetries,
		ConsecutiveFailures: l.ConsecutiveFailures}
}

// splitPB shows how requests are divided.
func splitPB(m *facts.Model) (out []*pb.ExperimentArm) {
	for i := range m.Split.Arms {
		arm := &m.Split.Arms[i]
		out = append(out, &pb.ExperimentArm{Name: arm.Name, Version: arm.Version, Weight: arm.Weight()})
	}
	return out
}

// versionPB shows a version. Counts are since this replica started; quantiles are of the
// last minute while there is traffic, because those of a whole life hide what is wrong now.
func (a *admin) versionPB(model string, v *facts.Version) *pb.ModelVersion {
	s := a.monitor.VersionStats(model, v.Name)
	stats := s.Lifetime.PB()
	if s.Window.Requests > 0 {
		stats.P50Ms, stats.P95Ms, stats.P99Ms = s.Window.P50, s.Window.P95, s.Window.P99
	}
	out := &pb.ModelVersion{Version: v.Name, UpstreamModel: v.Upstream, Metadata: v.Metadata, State: v.State,
		RegisteredAt: wire.TimePB(v.RegisteredAt), Stats: stats, Number: v.Number, Digest: v.Digest, Parameters: v.Parameters,
		Pins: v.Pins, Parents: v.Parents, Artifact: v.Artifact, Reason: v.Reason, Description: v.Description, Tags: v.Tags,
		Tls: facts.TLSPB(v.TLS), ShadowWeight: v.Shadow, ChangedAt: wire.TimePB(v.ChangedAt)}
	for _, e := range v.Endpoints {
		out.Endpoints = append(out.Endpoints, &pb.Endpoint{Address: e.Address, Region: e.Region, Weight: e.Weight})
	}
	return out
}

// ListRegions returns the live view where there is one, else what the log says.
func (a *admin) ListRegions(_ context.Context, r *pb.ListRequestAll) (*pb.ListRegionsResponse, error) {
	limit, err := listLimit(r.GetLimit())
	if err != nil {
		return nil, err
	}
	all, source := a.regionList(a.facts.Facts())
	return &pb.ListRegionsResponse{Regions: all[:min(limit, len(all))], Source: source}, nil
}

func (a *admin) regionList(f *facts.Facts) ([]*pb.Region, string) {
	if a.regions != nil {
		return a.regions()
	}
	var out []*pb.Region
	for _, r := range f.Regions() {
		shown := &pb.Region{Name: r.GetName(), Gateway: r.GetGateway(), Latitude: r.GetLatitude(), Longitude: r.GetLongitude(),
			Health: r.GetHealth(), Local: r.GetName() == a.region.GetName(), SeenAt: r.GetSeenAt()}
		out = append(out, shown)
	}
	return out, "self"
}

// ListAlerts returns alerts: what is wrong with the policy now, then the recorded ones,
// the newest first.
func (a *admin) ListAlerts(_ context.Context, r *pb.ListRequestAll) (*pb.ListAlertsResponse, error) {
	limit, err := listLimit(r.GetLimit())
	if err != nil {
		return nil, err
	}
	all := a.alerts(a.facts.Facts())
	return &pb.ListAlertsResponse{Alerts: all[:min(limit, len(all))]}, nil
}

func (a *admin) alerts(f *facts.Facts) []*pb.Alert {
	var out []*pb.Alert
	for _, p := range a.problems(f) {
		out = append(out, &pb.Alert{Id: p.id, Severity: p.severity, Summary: p.text, State: alertFiring})
	}
	for _, x := range f.Alerts() {
		out = append(out, a.alertPB(f, x))
	}
	return out
}

// States of alerts as they are shown.
const (
	alertFiring   = "firing"
	alertSilenced = "silenced"
	alertResolved = "resolved"
)

func (a *admin) alertPB(f *facts.Facts, x *facts.Alert) *pb.Alert {
	out := &pb.Alert{Id: x.ID, Severity: x.Severity, Summary: x.Summary, Numbers: x.Numbers, Since: wire.TimePB(x.Since),
		RaisedAt: wire.TimePB(x.RaisedAt), ResolvedAt: wire.TimePB(x.ResolvedAt), SilencedUntil: wire.TimePB(x.SilencedUntil), State: a.alertState(x)}
	out.Notify, out.Deliveries = a.told(f, x)
	return out
}

func (a *admin) alertState(x *facts.Alert) string {
	switch {
	case !x.ResolvedAt.IsZero():
		return alertResolved
	case a.now().Before(x.SilencedUntil):
		return alertSilenced
	}
	return alertFiring
}

// maxSilence bounds one silence, so that none is for ever by accident.
const maxSilence = 30 * 24 * time.Hour

// SilenceAlert keeps an alert that stands from notifying anybody for a while.
func (a *admin) SilenceAlert(ctx context.Context, r *pb.SilenceAlertRequest) (*pb.Alert, error) {
	d := r.GetFor().AsDuration()
	if d < 0 || d > maxSilence {
		return nil, invalid("for is %v, allowed is 0 (lift the silence) to %v", d, maxSilence)
	}
	if err := checkReason(r.GetReason()); err != nil {
		return nil, err
	}
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		x := f.Alert(r.GetId())
		switch {
		case x == nil:
			return nil, outrigger.Errorf(outrigger.NotFound, "alert %q not found", r.GetId())
		case !x.ResolvedAt.IsZero():
			return nil, locked("alert %q is resolved; there is nothing to silence", x.ID)
		}
		return []eventlog.Write{{Aggregate: facts.AlertPrefix + x.ID, Expect: eventlog.Any, Events: []*pb.Event{{
			Payload: &pb.Event_AlertSilenced{AlertSilenced: &pb.AlertSilenced{Until: timestamppb.New(a.now().Add(d)), Reason: r.GetReason()}}}}}}, nil
	})
	if err != nil {
		return nil, err
	}
	for _, x := range a.alerts(f) {
		if x.GetId() == r.GetId() {
			return x, nil
		}
	}
	return nil, outrigger.Errorf(outrigger.NotFound, "alert %q not found", r.GetId())
}

// clearAlerts resolves the alerts of rollbacks that blamed a version, when an operator
// clears that version.
func clearAlerts(f *facts.Facts, model, version string) []eventlog.Write {
	var out []eventlog.Write
	for _, x := range f.Alerts() {
		r := f.Rollout(x.ID)
		if r == nil || r.Model != model || r.Candidate != version || r.State == deploy.Running || !x.ResolvedAt.IsZero() {
			continue
		}
		out = append(out, eventlog.Write{Aggregate: facts.AlertPrefix + x.ID, Expect: eventlog.Any, Events: []*pb.Event{{
			Payload: &pb.Event_AlertResolved{AlertResolved: &pb.AlertResolved{Reason: "version " + version + " was cleared"}}}}})
	}
	return out
}
