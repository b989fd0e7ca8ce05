package control

import (
	"context"
	"strconv"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/monitor"
	"github.com/outrigger-mesh/outrigger/deploy/models"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/expr"
	"github.com/outrigger-mesh/outrigger/internal/wire"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// RegisterModelVersion adds an immutable version. The first version of a model goes into
// production at once, because a model that answers nothing helps nobody; later ones wait
// for a rollout, an experiment or an alias. A version without a name is named by its
// number, which the request says afterwards. Registering a version again is Exists, unless
// it is the same request (same request_id), which answers as the first time.
func (a *admin) RegisterModelVersion(ctx context.Context, r *pb.RegisterModelVersionRequest) (*pb.Model, error) {
	named := r.GetVersion() != ""
	if !named {
		r.Version = "1" // what is checked; the number is known when it is decided
	}
	if err := checkRegistration(r); err != nil {
		return nil, err
	}
	beside := &pb.ModelAnnotated{SetTags: r.GetTags()}
	if r.GetDescription() != "" {
		beside.Description = &r.Description
	}
	if err := checkAnnotation(beside); err != nil {
		return nil, err
	}
	f, err := a.change(ctx, r.GetActor(), r.GetRequestId(), func(f *facts.Facts) ([]eventlog.Write, error) {
		m := f.Model(r.GetModel())
		if !named {
			if v := registeredBy(m, r.GetRequestId()); v != nil {
				r.Version = v.Name
				return nil, nil // the same request again
			}
			r.Version = nextName(m)
		}
		switch {
		case m == nil && len(f.Models()) >= MaxModels:
			return nil, outrigger.Errorf(outrigger.Exhausted, "there are %d models, the limit is %d", len(f.Models()), MaxModels)
		case m != nil && len(m.Versions) >= MaxVersions:
			return nil, outrigger.Errorf(outrigger.Exhausted, "model %q has %d versions, the limit is %d", m.Name, len(m.Versions), MaxVersions)
		case m != nil && m.Version(r.GetVersion()) != nil:
			if id := r.GetRequestId(); id != "" && m.Version(r.GetVersion()).RequestID == id {
				return nil, nil
			}
			return nil, outrigger.Errorf(outrigger.Exists, "version %q of model %q is registered already; versions are immutable, choose another name", r.GetVersion(), m.Name)
		}
		if err := checkParents(f, r); err != nil {
			return nil, err
		}
		events := []*pb.Event{{Payload: &pb.Event_ModelVersionRegistered{ModelVersionRegistered: &pb.ModelVersionRegistered{
			Version: r.GetVersion(), UpstreamModel: r.GetUpstreamModel(), Endpoints: r.GetEndpoints(), Metadata: r.GetMetadata(),
			Parameters: r.GetParameters(), Pins: r.GetPins(), Parents: r.GetParents(), Artifact: r.GetArtifact(), Digest: registered(r).Digest(), Tls: r.GetTls()}}}}
		if (m == nil || len(m.Versions) == 0) && len(r.GetEndpoints()) > 0 {
			events = append(events, versionState(r.GetVersion(), facts.Production, "first version"),
				aliasMoved(facts.Champion, "", r.GetVersion()))
		}
		if len(beside.GetSetTags()) > 0 || beside.Description != nil {
			beside.Version = r.GetVersion()
			events = append(events, &pb.Event{Payload: &pb.Event_ModelAnnotated{ModelAnnotated: beside}})
		}
		return []eventlog.Write{toModel(f, r.GetModel(), events...)}, nil
	})
	return a.modelReply(f, err, r.GetModel())
}

// registeredBy finds the version that a request registered before, nil if there is none.
func registeredBy(m *facts.Model, requestID string) *facts.Version {
	if m == nil || requestID == "" {
		return nil
	}
	for i := range m.Versions {
		if m.Versions[i].RequestID == requestID {
			return &m.Versions[i]
		}
	}
	return nil
}

// nextName is the number of the next version, or of the first after it that no version has
// as its name.
func nextName(m *facts.Model) string {
	n := 1
	if m != nil {
		for n = len(m.Versions) + 1; m.Version(strconv.Itoa(n)) != nil; n++ {
		}
	}
	return strconv.Itoa(n)
}

// registered is the content a registration asks for.
func registered(r *pb.RegisterModelVersionRequest) models.Content {
	c := models.Content{Upstream: r.GetUpstreamModel(), Artifact: r.GetArtifact(), Parameters: r.GetParameters(), Pins: r.GetPins()}
	if c.Upstream == "" {
		c.Upstream = r.GetModel()
	}
	return c
}

// checkParents wants a lineage of versions that are registered already, each once.
func checkParents(f *facts.Facts, r *pb.RegisterModelVersionRequest) error {
	if n := len(r.GetParents()); n > models.MaxParents {
		return invalid("parents has %d entries, the limit is %d", n, models.MaxParents)
	}
	seen := map[string]bool{}
	for _, p := range r.GetParents() {
		m, v := models.Parent(r.GetModel(), p)
		if seen[m+"@"+v] {
			return invalid("parents names %s twice", p)
		}
		seen[m+"@"+v] = true
		if _, _, err := version(f, m, v); err != nil {
			return outrigger.Errorf(outrigger.NotFound, "parents: %v", err)
		}
	}
	return nil
}

// ConfigureModel sets what is randomised, how long a request may take, how often it is
// tried, how much of it may be under way and what it costs. Zero fields stay as they are.
func (a *admin) ConfigureModel(ctx context.Context, r *pb.ConfigureModelRequest) (*pb.Model, error) {
	switch experiments.Unit(r.GetUnit()) {
	case "", experiments.UnitUser, experiments.UnitSession, experiments.UnitRequest:
	default:
		return nil, invalid("unit %q is not one of user, session, request", r.GetUnit())
	}
	if n := r.GetMaxAttempts(); n > policy.MaxAttempts {
		return nil, invalid("max_attempts is %d, allowed is 1..%d, or 0 to leave it", n, policy.MaxAttempts)
	}
	timeout := time.Duration(r.GetTimeoutMs()) * time.Millisecond
	if timeout > policy.MaxDuration {
		return nil, invalid("timeout_ms is %d, allowed is 1..%d, or 0 to leave it", r.GetTimeoutMs(), policy.MaxDuration.Milliseconds())
	}
	if r.GetCost() != "" {
		if _, err := expr.CompileFormula(r.GetCost(), monitor.CostNames()); err != nil {
			return nil, err
		}
	}
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		m, err := model(f, r.GetModel())
		if err != nil {
			return nil, err
		}
		next := &pb.ModelConfigured{Unit: r.GetUnit(), MaxAttempts: r.GetMaxAttempts(), Cost: r.Cost, Limits: r.GetLimits()}
		if timeout > 0 {
			next.Timeout = durationpb.New(timeout)
		}
		if changed := next.Unit != "" && next.Unit != string(m.Unit); changed && underTest(m) != "" {
			return nil, locked("unit of model %q cannot change from %q to %q during %s: everybody would be assigned anew", m.Name, m.Unit, next.Unit, underTest(m))
		}
		return []eventlog.Write{toModel(f, m.Name, &pb.Event{Payload: &pb.Event_ModelConfigured{ModelConfigured: next}})}, nil
	})
	return a.modelReply(f, err, r.GetModel())
}

// underTest names what is going on with the model, "" if nothing.
func underTest(m *facts.Model) string {
	switch {
	case m.Rollout != "":
		return "rollout " + m.Rollout
	case m.Experiment != "":
		return "experiment " + m.Experiment
	}
	return ""
}

// SetModelVersionState moves a version between states by hand. "candidate" is set by
// rollouts only. To production promotes at once: the version becomes the champion. A
// shadow gets copies of requests of the share of units that shadow_weight says, none by
// default; given again, the share changes.
func (a *admin) SetModelVersionState(ctx context.Context, r *pb.SetModelVersionStateRequest) (*pb.Model, error) {
	if err := checkReason(r.GetReason()); err != nil {
		return nil, err
	}
	if w := r.GetShadowWeight(); w > experiments.Buckets || w > 0 && r.GetState() != facts.Shadow {
		return nil, invalid("shadow_weight is %d with state %q; allowed is 0..%d, and above 0 with state shadow only", w, r.GetState(), experiments.Buckets)
	}
	if r.GetRetireReplaced() && r.GetState() != facts.Production {
		return nil, invalid("retire_replaced is true with state %q; it goes with production", r.GetState())
	}
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) { return enter(f, r) })
	return a.modelReply(f, err, r.GetModel())
}

// enter decides a change of state by hand.
func enter(f *facts.Facts, r *pb.SetModelVersionStateRequest) ([]eventlog.Write, error) {
	m, v, err := version(f, r.GetModel(), r.GetVersion())
	if err != nil {
		return nil, err
	}
	if v.State == r.GetState() && v.Shadow == r.GetShadowWeight() {
		return nil, nil
	}
	if v.State != r.GetState() {
		if err := mayEnter(f, m, v, r.GetState()); err != nil {
			return nil, err
		}
	}
	if r.GetShadowWeight() > 0 && len(v.Endpoints) == 0 {
		return nil, locked("version %q of model %q has no endpoint and cannot answer copies of requests; register one that has", v.Name, m.Name)
	}
	state := versionState(v.Name, r.GetState(), r.GetReason())
	state.GetModelVersionState().ShadowWeight = r.GetShadowWeight()
	events := []*pb.Event{state}
	if r.GetState() == facts.Production {
		if r.GetRetireReplaced() {
			for i := range m.Versions {
				if o := &m.Versions[i]; o.State == facts.Production && o.Name != v.Name {
					// It left production with the event before, and retires from registered.
					events = append(events, versionState(o.Name, facts.Retired, "replaced by "+v.Name))
				}
			}
		}
		if m.Aliases[facts.Champion] != v.Name {
			events = append(events, aliasMoved(facts.Champion, m.Aliases[facts.Champion], v.Name))
		}
	}
	writes := []eventlog.Write{toModel(f, m.Name, events...)}
	if v.State == facts.Quarantined {
		writes = append(writes, clearAlerts(f, m.Name, v.Name)...)
	}
	return writes, nil
}

// mayEnter applies the rules of states set by hand.
func mayEnter(f *facts.Facts, m *facts.Model, v *facts.Version, state string) error {
	if state == facts.Candidate {
		return invalid("state candidate is set by starting a rollout; by hand there are registered, validated, shadow, production, quarantined, retired")
	}
	if r := f.Rollout(m.Rollout); r != nil && (v.Name == r.Candidate || v.Name == r.LastGood) {
		return locked("version %q takes part in rollout %q of model %q; abort the rollout first", v.Name, r.ID, m.Name)
	}
	if err := models.CheckMove(m.Name, v.Name, models.State(v.State), models.State(state)); err != nil {
		return err
	}
	switch state {
	case facts.Production:
		if len(v.Endpoints) == 0 && othersServe(m, v) {
			return locked("version %q of model %q has no endpoint and cannot take over from versions that answer; register one that has", v.Name, m.Name)
		}
		return mayPromote(m)
	case facts.Registered:
		if m.Aliases[facts.Champion] == v.Name && v.Servable() {
			return locked("version %q is the champion of model %q; promote another version instead", v.Name, m.Name)
		}
		return nil
	case facts.Quarantined, facts.Retired:
		if m.Split.LastGood != "" && m.Aliases[facts.Champion] == v.Name && othersServe(m, v) {
			return locked("version %q is the champion of model %q; move the alias champion to another version first", v.Name, m.Name)
		}
		return nil
	}
	return nil
}

// mayPromote refuses to change the champion under a test that compares with it.
func mayPromote(m *facts.Model) error {
	if what := underTest(m); what != "" {
		return locked("the champion of model %q cannot change during %s; end it first", m.Name, what)
	}
	return nil
}

func othersServe(m *facts.Model, v *facts.Version) bool {
	for i := range m.Versions {
		if o := &m.Versions[i]; o.Name != v.Name && o.Servable() {
			return true
		}
	}
	return false
}

// MoveAlias points champion, challenger or last_good at another version, if it still
// points where the caller expects. Moving champion promotes the version.
func (a *admin) MoveAlias(ctx context.Context, r *pb.MoveAliasRequest) (*pb.Model, error) {
	switch r.GetAlias() {
	case facts.Champion, facts.Challenger, facts.LastGood:
	default:
		return nil, invalid("alias %q is not one of champion, challenger, last_good", r.GetAlias())
	}
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		m, v, err := version(f, r.GetModel(), r.GetTo())
		if err != nil {
			return nil, err
		}
		from := m.Aliases[r.GetAlias()]
		if r.Expected != nil && r.GetExpected() != from {
			return nil, outrigger.Errorf(outrigger.Conflict, "alias %s of model %q points at %q, expected %q; read it and retry", r.GetAlias(), m.Name, from, r.GetExpected())
		}
		if from == v.Name {
			return nil, nil
		}
		switch {
		case v.State == facts.Quarantined || v.State == facts.Retired:
			return nil, locked("version %q of model %q is %s; set it to registered first", v.Name, m.Name, v.State)
		case len(v.Endpoints) == 0 && othersServe(m, v):
			return nil, locked("version %q of model %q has no endpoint and cannot take over from versions that answer; register one that has", v.Name, m.Name)
		}
		events := []*pb.Event{aliasMoved(r.GetAlias(), from, v.Name)}
		switch r.GetAlias() {
		case facts.Champion:
			if err := mayPromote(m); err != nil {
				return nil, err
			}
			events = append(events, versionState(v.Name, facts.Production, "champion"))
		case facts.LastGood:
			if m.Rollout != "" {
				return nil, locked("last_good of model %q is pinned to %q by rollout %q", m.Name, from, m.Rollout)
			}
		}
		return []eventlog.Write{toModel(f, m.Name, events...)}, nil
	})
	return a.modelReply(f, err, r.GetModel())
}

// ServedAt says which versions answered at a moment, by folding the log again up to it.
func (a *admin) ServedAt(ctx context.Context, r *pb.ServedAtRequest) (*pb.ServedAtResponse, error) {
	now := a.now()
	at := now
	if r.GetAt() != nil {
		if err := r.GetAt().CheckValid(); err != nil {
			return nil, invalid("at is not a valid time")
		}
		if at = r.GetAt().AsTime(); at.After(now) {
			return nil, invalid("at is %s, which is after now, %s", at.Format(time.RFC3339Nano), now.UTC().Format(time.RFC3339Nano))
		}
	}
	if _, err := a.facts.Wait(ctx, a.log.Head()); err != nil {
		return nil, err
	}
	s, err := a.facts.ServedAt(r.GetModel(), at)
	if err != nil {
		return nil, err
	}
	return &pb.ServedAtResponse{Model: s.Model.Name, At: wire.TimePB(at), Position: s.Position, Aliases: s.Model.Aliases, Arms: splitPB(s.Model),
		WeightEpoch: s.Model.WeightEpoch, Since: wire.TimePB(s.Since), Actor: s.Actor, Rollout: s.Model.Rollout, Experiment: s.Model.Experiment}, nil
}

// GetModel returns one model with its versions and their statistics.
func (a *admin) GetModel(_ context.Context, r *pb.NameRequest) (*pb.Model, error) {
	return a.modelReply(a.facts.Facts(), nil, r.GetName())
}

// ListModels returns models by name.
func (a *admin) ListModels(_ context.Context, r *pb.ListRequestAll) (*pb.ListModelsResponse, error) {
	limit, err := listLimit(r.GetLimit())
	if err != nil {
		return nil, err
	}
	return &pb.ListModelsResponse{Models: a.models(a.facts.Facts(), limit)}, nil
}

func (a *admin) models(f *facts.Facts, limit int) []*pb.Model {
	var out []*pb.Model
	for _, m := range f.Models() {
		if len(out) == limit {
			break
		}
		out = append(out, a.modelPB(m))
	}
	return out
}

func (a *admin) modelReply(f *facts.Facts, err error, name string) (*pb.Model, error) {
	if err != nil {
		return nil, err
	}
	m, err := model(f, name)
	if err != nil {
		return nil, err
	}
	return a.modelPB(m), nil
}

// model finds a model or says which name is not known.
func model(f *facts.Facts, name string) (*facts.Model, error) {
	if m := f.Model(name); m != nil {
		return m, nil
	}
	return nil, outrigger.Errorf(outrigger.NotFound, "model %q not found; register a version of it first", name)
}

// version finds a version of a model.
func version(f *facts.Facts, name, ver string) (*facts.Model, *facts.Version, error) {
	m, err := model(f, name)
	if err != nil {
		return nil, nil, err
	}
	v := m.Version(ver)
	if v == nil {
		return nil, nil, outrigger.Errorf(outrigger.NotFound, "version %q of model %q not found; registered are %s", ver, name, versionNames(m))
	}
	return m, v, nil
}
