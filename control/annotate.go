package control

import (
	"context"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/monitor"
)

// Bounds of what is written beside models and versions.
const (
	MaxTags             = 100    // of one model or version
	MaxTagName          = 250    // bytes
	MaxTagValue         = 5000   // bytes
	MaxDescriptionBytes = 16_384 // UTF-8
)

// CreateModel makes a model without versions. One that is there already is Exists.
func (a *admin) CreateModel(ctx context.Context, r *pb.CreateModelRequest) (*pb.Model, error) {
	if err := checkModelName(r.GetModel()); err != nil {
		return nil, err
	}
	e := &pb.ModelAnnotated{SetTags: r.GetTags()}
	if r.GetDescription() != "" {
		e.Description = &r.Description
	}
	if err := checkAnnotation(e); err != nil {
		return nil, err
	}
	f, err := a.change(ctx, r.GetActor(), r.GetRequestId(), func(f *facts.Facts) ([]eventlog.Write, error) {
		if f.Model(r.GetModel()) != nil {
			return nil, outrigger.Errorf(outrigger.Exists, "model %q exists already", r.GetModel())
		}
		if len(f.Models()) >= MaxModels {
			return nil, outrigger.Errorf(outrigger.Exhausted, "there are %d models, the limit is %d", len(f.Models()), MaxModels)
		}
		return []eventlog.Write{toModel(f, r.GetModel(), &pb.Event{Payload: &pb.Event_ModelAnnotated{ModelAnnotated: e}})}, nil
	})
	return a.modelReply(f, err, r.GetModel())
}

// AnnotateModel changes the description and the tags of a model, or of one version of it.
func (a *admin) AnnotateModel(ctx context.Context, r *pb.AnnotateModelRequest) (*pb.Model, error) {
	e := &pb.ModelAnnotated{Version: r.GetVersion(), Description: r.Description, SetTags: r.GetSetTags(), DeleteTags: r.GetDeleteTags()}
	if err := checkAnnotation(e); err != nil {
		return nil, err
	}
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		m, err := model(f, r.GetModel())
		if err != nil {
			return nil, err
		}
		have := m.Tags
		if r.GetVersion() != "" {
			_, v, err := version(f, r.GetModel(), r.GetVersion())
			if err != nil {
				return nil, err
			}
			have = v.Tags
		}
		n := len(have)
		for k := range r.GetSetTags() {
			if _, ok := have[k]; !ok {
				n++
			}
		}
		if n > MaxTags {
			return nil, invalid("tags would be %d, the limit is %d", n, MaxTags)
		}
		return []eventlog.Write{toModel(f, m.Name, &pb.Event{Payload: &pb.Event_ModelAnnotated{ModelAnnotated: e}})}, nil
	})
	return a.modelReply(f, err, r.GetModel())
}

func checkAnnotation(e *pb.ModelAnnotated) error {
	if n := len(e.GetDescription()); n > MaxDescriptionBytes || !utf8.ValidString(e.GetDescription()) {
		return invalid("description is %d bytes long or not UTF-8; the limit is %d bytes of UTF-8", n, MaxDescriptionBytes)
	}
	if n := len(e.GetSetTags()); n > MaxTags {
		return invalid("tags has %d entries, the limit is %d", n, MaxTags)
	}
	for k, v := range e.GetSetTags() {
		if k == "" || len(k) > MaxTagName || !utf8.ValidString(k) {
			return invalid("tag %.40q is %d bytes long or not UTF-8; allowed is 1..%d bytes of UTF-8", k, len(k), MaxTagName)
		}
		if len(v) > MaxTagValue || !utf8.ValidString(v) {
			return invalid("tag %q has a value of %d bytes, or not in UTF-8; the limit is %d bytes of UTF-8", k, len(v), MaxTagValue)
		}
	}
	if n := len(e.GetDeleteTags()); n > MaxTags {
		return invalid("delete_tags has %d entries, the limit is %d", n, MaxTags)
	}
	return nil
}

// DeleteAlias takes an alias away, if it still points where the caller expects. One that
// is not there is NotFound. The champion answers requests and can only be moved.
func (a *admin) DeleteAlias(ctx context.Context, r *pb.DeleteAliasRequest) (*pb.Model, error) {
	switch r.GetAlias() {
	case facts.Challenger, facts.LastGood:
	case facts.Champion:
		return nil, locked("alias champion of model %q cannot be deleted, because it says who answers; move it to another version", r.GetModel())
	default:
		return nil, invalid("alias %q is not one of challenger, last_good", r.GetAlias())
	}
	f, err := a.change(ctx, r.GetActor(), "", func(f *facts.Facts) ([]eventlog.Write, error) {
		m, err := model(f, r.GetModel())
		if err != nil {
			return nil, err
		}
		from, ok := m.Aliases[r.GetAlias()]
		switch {
		case !ok:
			return nil, outrigger.Errorf(outrigger.NotFound, "alias %s of model %q not found", r.GetAlias(), m.Name)
		case r.Expected != nil && r.GetExpected() != from:
			return nil, outrigger.Errorf(outrigger.Conflict, "alias %s of model %q points at %q, expected %q; read it and retry", r.GetAlias(), m.Name, from, r.GetExpected())
		case r.GetAlias() == facts.LastGood && m.Rollout != "":
			return nil, locked("last_good of model %q is pinned to %q by rollout %q", m.Name, from, m.Rollout)
		}
		return []eventlog.Write{toModel(f, m.Name, aliasMoved(r.GetAlias(), from, ""))}, nil
	})
	return a.modelReply(f, err, r.GetModel())
}

// ModelMetrics says how each version does: over the last minute and since this replica
// started, copies of requests apart.
func (a *admin) ModelMetrics(_ context.Context, r *pb.NameRequest) (*pb.ModelMetricsResponse, error) {
	m, err := model(a.facts.Facts(), r.GetName())
	if err != nil {
		return nil, err
	}
	out := &pb.ModelMetricsResponse{Model: m.Name, Cost: m.Cost, Window: durationpb.New(monitor.Window)}
	price := a.price(m)
	for i := range m.Versions {
		v := &m.Versions[i]
		s := a.monitor.VersionStats(m.Name, v.Name)
		out.Versions = append(out.Versions, &pb.VersionMetrics{Version: v.Name, State: v.State,
			Window: price(s.Window), Lifetime: price(s.Lifetime), ShadowWindow: price(s.ShadowWindow), ShadowLifetime: price(s.ShadowLifetime)})
	}
	return out, nil
}

// price shows totals with what they cost. A formula that does not compile here (a newer
// control plane wrote it) costs nothing.
func (a *admin) price(m *facts.Model) func(monitor.Totals) *pb.VersionStats {
	return func(t monitor.Totals) *pb.VersionStats {
		out := t.PB()
		out.Cost, _ = a.monitor.Cost(m.Cost, t) // 0 without one
		return out
	}
}
