// Package compile turns facts into policy: what is known about models, experiments,
// rollouts and regions into what every sidecar must obey.
//
// Compile is pure and total: the same facts and position give the same policy, byte for
// byte once encoded, on every replica. One broken model never stops the others: it is
// left out and named in Problems. A Policy it returns has passed policy.Validate.
//
// A Compiler does the same for one change after the other, at the cost of the change.
//
// All functions are safe for concurrent use and keep nothing; a Compiler is for one
// goroutine.
package compile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// DefaultDeadMan is how long a sidecar may be cut off while a candidate is live before
// it returns to the last good version by itself. It must be longer than a control plane
// restart and shorter than anybody's patience with a bad canary nobody can stop.
const DefaultDeadMan = 10 * time.Second

// DefaultMaxAttempts is the number of upstream tries of one logical request for models
// that configure none: one retry survives a single bad endpoint, more multiply an outage.
const DefaultMaxAttempts = 2

// Options change constants of the compilation. Replicas of one region must agree on
// them, or they compile different bytes.
type Options struct {
	// DeadMan is 0 for DefaultDeadMan.
	DeadMan time.Duration
	// Kills are versions taken out before the log knows: see Kill. They differ between
	// replicas for as long as they are needed.
	Kills []Kill
	// Secrets are what versions may name; a Compiler puts those that they do name into the sets.
	Secrets translate.Secrets
}

// Kill is a version of a model that must not serve, whatever the facts say. Its arms go
// to what Instead names, and it travels as quarantined. Where nothing else could serve it
// has no effect.
type Kill struct{ Model, Version string }

// Instead names the version that serves in place of one that is killed: the model's last
// good version or champion or, failing those, one in production; "" if there is none.
func Instead(m *facts.Model, killed string) string {
	candidates := []string{m.Split.LastGood, m.Aliases[facts.Champion], m.Aliases[facts.LastGood]}
	for i := range m.Versions {
		if m.Versions[i].State == facts.Production {
			candidates = append(candidates, m.Versions[i].Name)
		}
	}
	for _, v := range candidates {
		if v != killed && m.Version(v).Servable() {
			return v
		}
	}
	return ""
}

// Held is base for those who are held at it while the facts go on to now: but for models
// of which a version that could serve then may not any more. These are as they are now,
// so that a rollback or a quarantine waits for nobody. at is the position of the newest
// change of such a model, 0 if there is none.
func Held(base, now *facts.Facts) (held *facts.Facts, at uint64) {
	var released []*facts.Model
	for _, was := range base.Models() {
		is := now.Model(was.Name)
		if is == nil || is == was || !slices.ContainsFunc(was.Versions, func(v facts.Version) bool {
			present := is.Version(v.Name)
			return v.Servable() && present != nil && !present.Servable()
		}) {
			continue
		}
		released, at = append(released, is), max(at, is.ChangedAt)
	}
	return base.With(released...), at
}

// without is the model as if the version were quarantined. The model given is not
// modified.
func without(m *facts.Model, killed string) *facts.Model {
	instead := Instead(m, killed)
	if instead == "" || m.Version(killed) == nil {
		return m
	}
	out := *m
	out.Versions = slices.Clone(m.Versions)
	out.Version(killed).State = facts.Quarantined
	if out.Split.LastGood == killed {
		out.Split.LastGood = instead
	}
	if out.Split.Enrolment.Version == killed {
		out.Split.Enrolment.Version = instead
	}
	out.Split.CandidateLive = false
	var arms []policy.Arm
	var moved []experiments.Range
	for _, a := range m.Split.Arms {
		if a.Version == killed || a.Version == instead {
			moved = append(moved, a.Ranges...)
			continue
		}
		arms = append(arms, a)
	}
	slices.SortFunc(moved, func(x, y experiments.Range) int { return cmp.Compare(x.Start, y.Start) })
	joined := moved[:0]
	for _, r := range moved {
		if n := len(joined); n > 0 && joined[n-1].End == r.Start {
			joined[n-1].End = r.End
			continue
		}
		joined = append(joined, r)
	}
	if len(joined) > 0 {
		arms = append(arms, policy.Arm{Name: facts.ArmStable, Version: instead, Ranges: joined})
	}
	slices.SortFunc(arms, func(x, y policy.Arm) int { return cmp.Compare(x.Name, y.Name) })
	out.Split.Arms = arms
	return &out
}

// Problem names a model whose plan could not be followed in full. Out is true when the
// model is missing from the policy.
type Problem struct {
	Model string
	Text  string
	Out   bool
}

// Compile returns the policy of the facts, labelled with position, which should be
// Facts.PolicyPosition: a position that moves with unrelated events would cause pushes
// that change nothing. The error has kind Internal and means that a rule shared by all
// models is broken (too many models, an impossible region); no policy comes with it.
func Compile(f *facts.Facts, position uint64) (*policy.Policy, error) {
	return CompileWith(f, position, Options{})
}

// CompileWith is Compile with other constants.
func CompileWith(f *facts.Facts, position uint64, o Options) (*policy.Policy, error) {
	p := &policy.Policy{Position: position}
	for _, m := range f.Models() {
		if out, text := model(f, m, o); text == "" {
			p.Models = append(p.Models, *out)
		}
	}
	p.Regions = regions(f)
	p = p.Normalise()
	if err := p.Validate(); err != nil {
		return nil, outrigger.Wrap(outrigger.Internal, err, fmt.Sprintf("policy compiled at position %d is not valid", position))
	}
	return p, nil
}

// regions are those of the facts, normalised.
func regions(f *facts.Facts) []policy.Region {
	p := new(policy.Policy)
	for _, r := range f.Regions() {
		p.Regions = append(p.Regions, policy.Region{
			Name: r.GetName(), Gateway: r.GetGateway(),
			Latitude: r.GetLatitude(), Longitude: r.GetLongitude(),
			// Unknown counts as healthy: nothing has been seen to be wrong with it.
			Healthy: r.GetHealth() != "critical",
		})
	}
	return p.Normalise().Regions
}

// Problems lists what an operator should know about the policy of the facts: models that
// are left out, and plans that could not be followed in full. By model name.
func Problems(f *facts.Facts, o Options) []Problem {
	var out []Problem
	for _, m := range f.Models() {
		switch _, text := model(f, m, o); {
		case m.Catalogued(): // nobody expects answers of it
		case text != "":
			out = append(out, Problem{Model: m.Name, Text: text, Out: true})
		case m.Split.Problem != "":
			out = append(out, Problem{Model: m.Name, Text: m.Split.Problem})
		}
	}
	return out
}

// model compiles one model; text says why it must be left out, or is empty.
func model(f *facts.Facts, m *facts.Model, o Options) (out *policy.Model, text string) {
	for _, k := range o.Kills {
		if k.Model == m.Name {
			m = without(m, k.Version)
		}
	}
	if len(m.Split.Arms) == 0 {
		return nil, m.Split.Problem
	}
	out = &policy.Model{
		Name: m.Name, Salt: m.Split.Salt, Unit: m.Unit, WeightEpoch: m.WeightEpoch,
		Experiment: m.Split.Experiment, Arms: m.Split.Arms, LastGood: m.Split.LastGood,
		Timeout: m.Timeout, MaxAttempts: m.MaxAttempts, Enrolment: m.Split.Enrolment,
	}
	if out.MaxAttempts == 0 {
		out.MaxAttempts = DefaultMaxAttempts
	}
	if m.Split.CandidateLive {
		out.DeadMan = o.DeadMan
		if o.DeadMan == 0 {
			out.DeadMan = DefaultDeadMan
		}
	}
	wanted := needed(f, m)
	for _, k := range o.Kills {
		if k.Model == m.Name {
			wanted[k.Version] = true // sidecars must learn that it is out
		}
	}
	for i := range m.Versions {
		v := &m.Versions[i]
		if wanted[v.Name] {
			out.Versions = append(out.Versions, policy.Version{Name: v.Name, Upstream: v.Upstream,
				Quarantined: !v.Servable(), Endpoints: v.Endpoints, TLS: v.TLS, Pins: slices.Sorted(maps.Keys(v.Pins)),
				MaxConnections: m.Limits.MaxConnections, MaxPending: m.Limits.MaxPending, MaxRequests: m.Limits.MaxRequests, MaxRetries: m.Limits.MaxRetries,
				ConsecutiveFailures: m.Limits.ConsecutiveFailures})
		}
	}
	out.Shadows = shadows(m)
	n := out.Normalise()
	if err := n.Validate(); err != nil {
		return nil, strings.TrimSpace(err.Error())
	}
	return &n, ""
}

// shadows are the versions that get copies of requests: those in state shadow with a share,
// in order of registration, as many as a policy holds. One that a test gives requests of
// its own, or that everything falls back to, is none.
func shadows(m *facts.Model) (out []policy.Shadow) {
	for i := range m.Versions {
		v := &m.Versions[i]
		serves := v.Name == m.Split.LastGood || v.Name == m.Split.Enrolment.Version ||
			slices.ContainsFunc(m.Split.Arms, func(a policy.Arm) bool { return a.Version == v.Name })
		if v.State == facts.Shadow && v.Shadow > 0 && v.Servable() && !serves && len(out) < policy.MaxShadows {
			out = append(out, policy.Shadow{Version: v.Name, Share: v.Shadow})
		}
	}
	return out
}

// needed is the versions that travel: those an arm names, the last good one, shadows, and the
// candidate of an unfinished rollout. The candidate stays after its weight fell to 0, so
// that its cluster drains instead of vanishing under requests in flight, and so that
// sidecars learn that it is quarantined.
func needed(f *facts.Facts, m *facts.Model) map[string]bool {
	out := map[string]bool{m.Split.LastGood: true}
	for _, a := range m.Split.Arms {
		out[a.Version] = true
	}
	if e := m.Split.Enrolment; e.Limited() {
		out[e.Version] = true
	}
	for _, s := range shadows(m) {
		out[s.Version] = true
	}
	if r := f.Rollout(m.Rollout); r != nil {
		out[r.Candidate] = true
	}
	return out
}
