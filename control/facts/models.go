package facts

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// editModel runs edit on a copy of the model the event's aggregate names, stores it and
// brings its split up to date. edit returns why the event makes no sense, or "".
func (d *draft) editModel(edit func(*Model) string) string {
	name, ok := d.subject(ModelPrefix)
	if !ok {
		return fmt.Sprintf("%q is not the aggregate of a model", d.event.GetAggregate())
	}
	return d.edit(name, edit)
}

// edit is editModel for events of other aggregates that touch a model.
func (d *draft) edit(name string, edit func(*Model) string) string {
	next := &Model{Name: name, Unit: DefaultUnit}
	if old := d.models[name]; old != nil {
		*next = *old
		next.Versions = slices.Clone(old.Versions)
		next.Aliases = maps.Clone(old.Aliases)
	}
	if next.Aliases == nil {
		next.Aliases = map[string]string{}
	}
	if why := edit(next); why != "" {
		return why
	}
	next.ChangedAt, next.TouchedAt = d.event.GetPosition(), d.at()
	if next.CreatedAt.IsZero() {
		next.CreatedAt = d.at()
	}
	d.resplit(next)
	d.models = with(d.models, name, next)
	return ""
}

func (d *draft) versionRegistered(p *pb.ModelVersionRegistered) string {
	return d.editModel(func(m *Model) string {
		if m.Version(p.GetVersion()) != nil || p.GetVersion() == "" {
			return fmt.Sprintf("version %q of model %q is registered already or has no name", p.GetVersion(), m.Name)
		}
		v := Version{Name: p.GetVersion(), Upstream: p.GetUpstreamModel(), Metadata: p.GetMetadata(),
			State: Registered, RegisteredAt: d.at(), ChangedAt: d.at(), RequestID: d.event.GetRequestId(), Number: int32(len(m.Versions) + 1),
			Parameters: p.GetParameters(), Pins: p.GetPins(), Parents: p.GetParents(), Artifact: p.GetArtifact(), Digest: p.GetDigest(), TLS: TLS(p.GetTls())}
		if v.Upstream == "" {
			v.Upstream = m.Name
		}
		if v.Digest == "" { // registered before digests were recorded
			v.Digest = v.Content().Digest()
		}
		for _, e := range p.GetEndpoints() {
			v.Endpoints = append(v.Endpoints, policy.Endpoint{Address: e.GetAddress(), Region: e.GetRegion(), Weight: max(e.GetWeight(), 1)})
		}
		m.Versions = append(m.Versions, v)
		return ""
	})
}

// TLS is what policy has of it; nil for nil.
func TLS(t *pb.EndpointTLS) *policy.TLS {
	if t == nil {
		return nil
	}
	return &policy.TLS{ServerName: t.GetServerName(), CA: t.GetCa(), SANs: t.GetSubjectNames(), ClientCert: t.GetClientCertificate(), ALPN: t.GetAlpn()}
}

// TLSPB is the inverse of TLS.
func TLSPB(t *policy.TLS) *pb.EndpointTLS {
	if t == nil {
		return nil
	}
	return &pb.EndpointTLS{ServerName: t.ServerName, Ca: t.CA, SubjectNames: t.SANs, ClientCertificate: t.ClientCert, Alpn: t.ALPN}
}

func (d *draft) versionState(p *pb.ModelVersionState) string {
	return d.editModel(func(m *Model) string {
		if m.Version(p.GetVersion()) == nil {
			return fmt.Sprintf("model %q has no version %q", m.Name, p.GetVersion())
		}
		m.setState(p.GetVersion(), p.GetState(), p.GetReason())
		v := m.Version(p.GetVersion())
		v.ChangedAt = d.at()
		if p.GetState() == Shadow {
			v.Shadow = min(p.GetShadowWeight(), experiments.Buckets)
		}
		return ""
	})
}

// modelAnnotated changes descriptions and tags, and makes a model that is not there.
func (d *draft) modelAnnotated(p *pb.ModelAnnotated) string {
	return d.editModel(func(m *Model) string {
		if p.GetVersion() == "" {
			m.Description, m.Tags = annotated(m.Description, m.Tags, p)
			return ""
		}
		v := m.Version(p.GetVersion())
		if v == nil {
			return fmt.Sprintf("model %q has no version %q", m.Name, p.GetVersion())
		}
		v.Description, v.Tags = annotated(v.Description, v.Tags, p)
		v.ChangedAt = d.at()
		return ""
	})
}

func annotated(description string, tags map[string]string, p *pb.ModelAnnotated) (string, map[string]string) {
	if p.Description != nil {
		description = p.GetDescription()
	}
	next := make(map[string]string, len(tags)+len(p.GetSetTags()))
	maps.Copy(next, tags)
	maps.Copy(next, p.GetSetTags())
	for _, k := range p.GetDeleteTags() {
		delete(next, k)
	}
	return description, next
}

// setState keeps the rule that one version is in production: the one it replaces goes
// back to registered, from where it can still serve as last good.
func (m *Model) setState(version, state, reason string) {
	for i := range m.Versions {
		v := &m.Versions[i]
		switch {
		case v.Name == version:
			v.State, v.Reason, v.Shadow = state, reason, 0
		case state == Production && v.State == Production:
			v.State, v.Reason = Registered, "replaced by "+version
		}
	}
}

func (d *draft) aliasMoved(p *pb.AliasMoved) string {
	return d.editModel(func(m *Model) string {
		switch {
		case p.GetTo() == "":
			delete(m.Aliases, p.GetAlias())
		case m.Version(p.GetTo()) == nil:
			return fmt.Sprintf("model %q has no version %q", m.Name, p.GetTo())
		default:
			m.Aliases[p.GetAlias()] = p.GetTo()
		}
		return ""
	})
}

func (d *draft) modelConfigured(p *pb.ModelConfigured) string {
	return d.editModel(func(m *Model) string {
		if p.GetUnit() != "" {
			m.Unit = experiments.Unit(p.GetUnit())
		}
		if p.GetTimeout() != nil {
			m.Timeout = p.GetTimeout().AsDuration()
		}
		if p.GetMaxAttempts() != 0 {
			m.MaxAttempts = p.GetMaxAttempts()
		}
		if p.Cost != nil {
			m.Cost = p.GetCost()
		}
		l := p.GetLimits()
		m.Limits = Limits{
			MaxConnections: cmp.Or(l.GetMaxConnections(), m.Limits.MaxConnections), MaxPending: cmp.Or(l.GetMaxPendingRequests(), m.Limits.MaxPending),
			MaxRequests: cmp.Or(l.GetMaxRequests(), m.Limits.MaxRequests), MaxRetries: cmp.Or(l.GetMaxRetries(), m.Limits.MaxRetries),
			ConsecutiveFailures: cmp.Or(l.GetConsecutiveFailures(), m.Limits.ConsecutiveFailures),
		}
		return ""
	})
}

func (d *draft) experimentChanged(p *pb.ExperimentChanged) string {
	name, ok := d.subject(ExperimentPrefix)
	if !ok {
		return fmt.Sprintf("%q is not the aggregate of an experiment", d.event.GetAggregate())
	}
	next := &Experiment{Name: name}
	if old := d.experiments[name]; old != nil {
		*next = *old
	}
	// Model and arms are given when they change; a pure change of state leaves them out.
	if p.GetModel() != "" {
		next.Model = p.GetModel()
	}
	if d.models[next.Model] == nil {
		return fmt.Sprintf("experiment %q is about the unknown model %q", name, next.Model)
	}
	if e := p.GetEnrolment(); e != nil {
		next.Enrolment = e
		if why := d.crowded(next); why != "" {
			return why
		}
	}
	if len(p.GetArms()) > 0 {
		arms, err := allocate(next.Arms, p.GetArms())
		if err != nil {
			return fmt.Sprintf("experiment %q: %v", name, err)
		}
		next.Arms = arms
	}
	if step, ok, err := transition(next, p, d.at()); err != nil {
		return fmt.Sprintf("experiment %q: %v", name, err)
	} else if ok {
		life, err := next.Life.Apply(step)
		if err != nil {
			return fmt.Sprintf("experiment %q: %v", name, err)
		}
		next.Life = life
	}
	if p.GetPlan() != nil {
		next.Plan = p.GetPlan()
	}
	if p.GetResults() != nil {
		next.Results = p.GetResults()
	}
	next.State, next.Reason = p.GetState(), p.GetReason()
	next.ChangedAt = d.at()
	d.experiments = with(d.experiments, name, next)
	return d.edit(next.Model, func(m *Model) string {
		switch {
		case next.State == Running:
			m.Experiment = name
		case m.Experiment == name:
			m.Experiment = ""
		}
		return ""
	})
}

// allocate gives the arms their buckets, moving as few as possible from what they had.
func allocate(prev []ExperimentArm, arms []*pb.ExperimentArm) ([]ExperimentArm, error) {
	var had []experiments.Allocation
	for _, a := range prev {
		had = append(had, experiments.Allocation{Name: a.Name, Ranges: a.Ranges})
	}
	weights := make([]experiments.Weighted, len(arms))
	for i, a := range arms {
		weights[i] = experiments.Weighted{Name: a.GetName(), Weight: a.GetWeight()}
	}
	got, err := experiments.Reallocate(had, weights)
	if err != nil {
		return nil, err
	}
	out := make([]ExperimentArm, len(arms))
	for i, a := range arms {
		out[i] = ExperimentArm{Name: a.GetName(), Version: a.GetVersion(), Weight: a.GetWeight(), Ranges: got[i].Ranges, Configuration: a.GetConfiguration()}
	}
	return out, nil
}
