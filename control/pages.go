package control

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/dashboard"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/internal/authz"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

// Bounds of what one page shows.
const (
	pageEvents      = 100
	pageExperiments = 50
	pagePlaces      = 500
	pageAlertEvents = 500 // looked through for the alerts of the past
)

// view is what the dashboard shows, now or as of a moment.
func (a *admin) view(ctx context.Context, m dashboard.Moment) (*dashboard.View, error) {
	if m == (dashboard.Moment{}) {
		return a.viewNow(ctx)
	}
	return a.viewThen(ctx, m)
}

func (a *admin) viewNow(ctx context.Context) (*dashboard.View, error) {
	s, err := a.Status(ctx, nil)
	if err != nil {
		return nil, err
	}
	events, err := a.Audit(ctx, &pb.AuditRequest{NewestFirst: true, Limit: pageEvents})
	if err != nil {
		return nil, err
	}
	f := a.facts.Facts()
	v := &dashboard.View{Status: s, Events: events.GetEvents(), Forecasts: map[string][]*pb.GateForecast{}, Position: s.GetHead(), Optimisers: optimisers(f)}
	for _, model := range f.Models() {
		v.Rate += a.monitor.RequestsPerSecond(model.Name)
	}
	a.priceAll(f, s.GetModels())
	v.Places = a.places()
	for _, r := range f.RunningRollouts() {
		v.Forecasts[r.ID], _ = deploy.Forecast(r.Phases, a.monitor.RequestsPerSecond(r.Model))
	}
	for _, e := range f.Experiments()[:min(pageExperiments, len(f.Experiments()))] {
		shown, err := a.ExperimentResults(ctx, &pb.NameRequest{Name: e.Name})
		if err != nil {
			shown = &pb.ExperimentResultsResponse{Experiment: experimentPB(e)} // a draft has no results
		}
		v.Experiments = append(v.Experiments, shown)
	}
	return v, nil
}

// priceAll adds what versions cost to their counts.
func (a *admin) priceAll(f *facts.Facts, models []*pb.Model) {
	for _, m := range models {
		if known := f.Model(m.GetName()); known != nil && known.Cost != "" {
			price := a.price(known)
			for _, x := range m.GetVersions() {
				x.GetStats().Cost = price(a.monitor.VersionStats(m.GetName(), x.GetVersion()).Lifetime).GetCost()
			}
		}
	}
}

// places are the versions that answered in each region within the last minute. Quantiles are
// of the weight epoch with most requests: those of different epochs cannot be added up.
func (a *admin) places() (out []dashboard.Place) {
	for _, c := range a.monitor.Cells() {
		if c.Shadow || c.Window.Requests == 0 {
			continue
		}
		i := slices.IndexFunc(out, func(p dashboard.Place) bool {
			return p.Model == c.Model && p.Version == c.Version && p.Region == c.Region
		})
		if i < 0 {
			out = append(out, dashboard.Place{Model: c.Model, Version: c.Version, Region: c.Region})
			i = len(out) - 1
		}
		p := &out[i]
		p.Requests, p.Failures = p.Requests+c.Window.Requests, p.Failures+c.Window.Failures
		if c.Window.Requests > p.Of {
			p.Of, p.P50, p.P99 = c.Window.Requests, c.Window.P50, c.Window.P99
		}
	}
	return out[:min(pagePlaces, len(out))]
}

// viewThen is what the log says of the past: what was only measured (evidence, gates second by
// second, counters, connections) is not in it.
func (a *admin) viewThen(ctx context.Context, m dashboard.Moment) (*dashboard.View, error) {
	head := a.log.Head()
	if m.Position > head {
		return nil, invalid("position %d is beyond the head of the log, %d", m.Position, head)
	}
	if m.Position == 0 {
		next, err := a.searchLog(ctx, head, func(e *pb.Event) bool { return e.GetAt().AsTime().After(m.Time) })
		if err != nil {
			return nil, err
		}
		if m.Position = next - 1; m.Position == 0 {
			return nil, invalid("nothing had happened by %s", m.Time.UTC().Format(time.RFC3339))
		}
	}
	f, err := a.facts.At(m.Position, time.Time{})
	if err != nil {
		return nil, err
	}
	events, err := a.auditDown(ctx, auditFilter{}, 1, m.Position, pageEvents)
	if err != nil {
		return nil, err
	}
	v := &dashboard.View{Events: events.GetEvents(), Position: m.Position, At: m.Time, Optimisers: optimisers(f),
		Status: &pb.StatusResponse{Region: a.region.GetName(), Head: m.Position, PolicyPosition: f.PolicyPosition(), Regions: f.Regions()}}
	if len(v.Events) > 0 && v.At.IsZero() {
		v.At = v.Events[0].GetAt().AsTime()
	}
	for _, model := range f.Models() {
		shown := &pb.Model{Name: model.Name, Aliases: model.Aliases, Unit: string(model.Unit), WeightEpoch: model.WeightEpoch, Arms: splitPB(model)}
		for i := range model.Versions {
			shown.Versions = append(shown.Versions, &pb.ModelVersion{Version: model.Versions[i].Name, State: model.Versions[i].State})
		}
		v.Status.Models = append(v.Status.Models, shown)
	}
	rollouts := f.Rollouts()
	slices.SortStableFunc(rollouts, func(x, y *facts.Rollout) int { return y.StartedAt.Compare(x.StartedAt) })
	for _, r := range rollouts[:min(statusRollouts, len(rollouts))] {
		v.Status.Rollouts = append(v.Status.Rollouts, r.PB(nil))
	}
	for _, e := range f.Experiments() {
		v.Experiments = append(v.Experiments, &pb.ExperimentResultsResponse{Experiment: experimentPB(e)})
	}
	v.Status.Alerts, err = a.alertsThen(ctx, m.Position)
	return v, err
}

// alertsThen folds the last events of alerts up to a position: what stood, what was over.
func (a *admin) alertsThen(ctx context.Context, position uint64) ([]*pb.Alert, error) {
	found, err := a.auditDown(ctx, auditFilter{prefix: facts.AlertPrefix}, 1, position, pageAlertEvents)
	if err != nil {
		return nil, err
	}
	byID := map[string]*pb.Alert{}
	var out []*pb.Alert
	for _, e := range slices.Backward(found.GetEvents()) {
		id := strings.TrimPrefix(e.GetAggregate(), facts.AlertPrefix)
		switch p := e.GetPayload().(type) {
		case *pb.Event_AlertRaised:
			if byID[id] == nil {
				byID[id] = &pb.Alert{Id: id}
				out = append(out, byID[id])
			}
			x := byID[id]
			x.Severity, x.Summary, x.Numbers, x.RaisedAt, x.ResolvedAt = p.AlertRaised.GetSeverity(), p.AlertRaised.GetSummary(), p.AlertRaised.GetNumbers(), e.GetAt(), nil
		case *pb.Event_AlertResolved:
			if x := byID[id]; x != nil {
				x.ResolvedAt = e.GetAt()
			}
		case *pb.Event_AlertSilenced:
			if x := byID[id]; x != nil {
				x.SilencedUntil = timestamppb.New(wire.Time(p.AlertSilenced.GetUntil()))
			}
		}
	}
	slices.Reverse(out)
	return out, nil
}

func optimisers(f *facts.Facts) []string {
	var out []string
	for _, o := range known(f) {
		name := cmp.Or(o.GetInfo().GetName(), o.GetInfo().GetId())
		if o.GetAddress() != "" {
			name += ", plugin at " + o.GetAddress()
		}
		out = append(out, name)
	}
	return out
}

// who is looking at a page.
func (s *Server) who(r *http.Request) dashboard.Who {
	c, _ := authz.CallerFrom(r.Context())
	_, signedIn := s.guard.sessions.caller(r, s.guard.rules())
	return dashboard.Who{Name: c.Name, Role: c.Role.String(), CanAct: c.Role >= authz.Operator, SignedIn: signedIn,
		SignIn: !signedIn && !s.guard.rules().Open(), CSRF: s.guard.sessions.csrf(r)}
}

// decide carries out what somebody decided on a page, through the same gate as every other
// call: the role suffices, the actor is the session's person, refusals are recorded.
func (s *Server) decide(ctx context.Context, d dashboard.Action) (err error) {
	verbs := map[string]string{"approve": "ApproveRollout", "promote": "AdvanceRollout", "hold": "HoldRollout",
		"resume": "ResumeRollout", "abort": "AbortRollout", "silence": "SilenceAlert"}
	verb, ok := verbs[d.Verb]
	if !ok {
		return invalid("verb %q is not one of a page", d.Verb)
	}
	check, done, err := s.guard.begin(ctx, verb)
	if done != nil {
		defer func() { done(err) }()
	}
	if err != nil {
		return err
	}
	action := &pb.RolloutActionRequest{Id: d.ID, Reason: d.Reason, ExpectedSequence: d.Sequence}
	switch verb {
	case "ApproveRollout":
		r := &pb.ApproveRolloutRequest{Id: d.ID, Gate: d.Gate, Comment: d.Reason, ExpectedSequence: d.Sequence}
		if err = check(r); err == nil {
			_, err = s.admin.ApproveRollout(ctx, r)
		}
		return err
	case "SilenceAlert":
		r := &pb.SilenceAlertRequest{Id: d.ID, Reason: d.Reason, For: durationpb.New(time.Hour)}
		if err = check(r); err == nil {
			_, err = s.admin.SilenceAlert(ctx, r)
		}
		return err
	}
	if err = check(action); err != nil {
		return err
	}
	switch verb {
	case "AdvanceRollout":
		_, err = s.admin.AdvanceRollout(ctx, action)
	case "HoldRollout":
		_, err = s.admin.HoldRollout(ctx, action)
	case "ResumeRollout":
		_, err = s.admin.ResumeRollout(ctx, action)
	case "AbortRollout":
		_, err = s.admin.AbortRollout(ctx, action)
	}
	return err
}
