package facts

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// Names of the arms of a split that is not an experiment's.
const (
	ArmStable    = "stable"
	ArmCandidate = "candidate"
)

// Prefixes of salts. A salt follows the rules of names (policy.Validate), which reserve
// '/', so these are not the prefixes of the aggregates.
const (
	saltModel      = "model:"
	saltExperiment = "experiment:"
)

// modelSalt is the salt of a model's split. Names of models may hold '/', salts may not;
// that two names could come to share one does no harm, as buckets of different models
// need not be independent.
func modelSalt(model string) string { return saltModel + strings.ReplaceAll(model, "/", ":") }

// Split is how the requests of one model are divided. Arms together cover the buckets
// [0, experiments.Buckets) exactly once, or there are none and Problem says why.
type Split struct {
	// Salt of the bucket rule: an experiment has its own, so that who is in which arm of
	// one test says nothing about the next.
	Salt string
	// Experiment is the running one that decides; empty if none does.
	Experiment string
	Arms       []policy.Arm
	// LastGood is what to return to; empty only without a servable version.
	LastGood string
	// CandidateLive is true while a rollout sends anything to its candidate.
	CandidateLive bool
	// Enrolment says who takes part in Experiment; units outside get the stable version.
	Enrolment policy.Enrolment
	// Problem says why a model is not servable, or which part of its plan could not be
	// followed; empty if all is well.
	Problem string
}

// resplit recomputes the split of a model whose facts changed, and starts a new weight
// epoch if any bucket now goes to another version.
func (d *draft) resplit(m *Model) {
	next := d.split(m)
	if next.Salt != m.Split.Salt || !sameTargets(next.Arms, m.Split.Arms) {
		m.WeightEpoch = d.event.GetPosition()
	}
	m.Split = next
	d.rememberEpoch(m)
}

// rememberEpoch notes with a running experiment that the split in force is the one it
// asked for, so that reports of this epoch may be compared.
func (d *draft) rememberEpoch(m *Model) {
	e := d.experiments[m.Experiment]
	if e == nil || len(e.Epochs) >= MaxEpochs || slices.Contains(e.Epochs, m.WeightEpoch) || m.Split.Salt != saltExperiment+e.Name {
		return
	}
	served := map[string]uint32{}
	for i := range m.Split.Arms {
		served[m.Split.Arms[i].Name] = m.Split.Arms[i].Weight()
	}
	for _, a := range e.Arms {
		if served[a.Name] != a.Weight {
			return
		}
	}
	next := *e
	next.Epochs = append(slices.Clone(e.Epochs), m.WeightEpoch)
	d.experiments = with(d.experiments, e.Name, &next)
	d.epochs = with(d.epochs, m.WeightEpoch, e.Name)
}

// ExperimentSalt is the salt of the bucket rule while an experiment runs.
func ExperimentSalt(name string) string { return saltExperiment + name }

// sameTargets compares what each bucket gets. Names of arms do not matter: a rollout
// that completes turns the candidate into the stable arm without moving a request.
func sameTargets(a, b []policy.Arm) bool {
	return slices.EqualFunc(a, b, func(x, y policy.Arm) bool {
		return x.Version == y.Version && slices.Equal(x.Ranges, y.Ranges)
	})
}

// split decides, in this order: an unfinished rollout, a running experiment, the
// champion.
func (d *draft) split(m *Model) Split {
	s := Split{Salt: modelSalt(m.Name)}
	stable := m.stable()
	if r := d.rollouts[m.Rollout]; r != nil {
		return d.splitRollout(m, r, stable)
	}
	if stable == "" {
		s.Problem = fmt.Sprintf("model %q has no servable version; register one, or clear and promote one of its %d", m.Name, len(m.Versions))
		return s
	}
	s.LastGood = stable
	if lg := m.Aliases[LastGood]; m.Version(lg).Servable() {
		s.LastGood = lg
	}
	if e := d.experiments[m.Experiment]; e != nil {
		s.Salt, s.Experiment = saltExperiment+e.Name, e.Name
		s.Arms, s.Problem = splitExperiment(m, e, stable)
		s.Enrolment = enrolment(e, stable)
		return s
	}
	s.Arms = []policy.Arm{whole(stable)}
	return s
}

// splitRollout gives the candidate the first buckets and the last good version the rest.
// A growing weight extends the candidate's one range, so nobody who has seen the
// candidate goes back while it grows.
func (d *draft) splitRollout(m *Model, r *Rollout, stable string) Split {
	s := Split{Salt: modelSalt(m.Name)}
	weight := min(r.CandidateWeight(), experiments.Buckets)
	if !m.Version(r.Candidate).Servable() {
		weight = 0
	}
	s.LastGood = r.LastGood
	if !m.Version(s.LastGood).Servable() {
		s.LastGood = stable
		s.Problem = fmt.Sprintf("last good version %q of rollout %q is not servable", r.LastGood, r.ID)
	}
	if s.LastGood == "" {
		if weight == 0 {
			s.Problem += "; nothing else is"
			return s
		}
		// The candidate is all there is: serving it beats refusing every request.
		s.LastGood, weight = r.Candidate, experiments.Buckets
	}
	s.CandidateLive = weight > 0
	if weight > 0 {
		s.Arms = append(s.Arms, policy.Arm{Name: ArmCandidate, Version: r.Candidate, Ranges: []experiments.Range{{Start: 0, End: weight}}})
	}
	if weight < experiments.Buckets {
		s.Arms = append(s.Arms, policy.Arm{Name: ArmStable, Version: s.LastGood, Ranges: []experiments.Range{{Start: weight, End: experiments.Buckets}}})
	}
	return s
}

// splitExperiment follows the arms; the buckets of an arm whose version may not serve go
// to the stable version under their own name, so they are never counted as that arm.
func splitExperiment(m *Model, e *Experiment, stable string) (arms []policy.Arm, problem string) {
	var rest []experiments.Range
	for _, a := range e.Arms {
		switch {
		case len(a.Ranges) == 0: // weight 0
		case m.Version(a.Version).Servable():
			arms = append(arms, policy.Arm{Name: a.Name, Version: a.Version, Ranges: a.Ranges, Settings: settings(a.Configuration)})
		default:
			rest = append(rest, a.Ranges...)
			problem = fmt.Sprintf("arm %q of experiment %q names version %q, which is not servable; its requests go to %q", a.Name, e.Name, a.Version, stable)
		}
	}
	if len(rest) > 0 {
		arms = append(arms, policy.Arm{Name: fallbackName(e), Version: stable, Ranges: join(rest)})
	}
	slices.SortFunc(arms, byName)
	return arms, problem
}

// settings are an arm's configuration by name. A name that no policy takes, of an event
// from before names were checked, is left out: the model must not go with it.
func settings(configuration map[string]string) (out []policy.Setting) {
	for _, name := range slices.Sorted(maps.Keys(configuration)) {
		if outrigger.CheckName("configuration", name) != nil {
			continue
		}
		out = append(out, policy.Setting{Name: name, JSON: configuration[name]})
	}
	return out
}

// join sorts ranges and merges neighbours, in place.
func join(rs []experiments.Range) []experiments.Range {
	slices.SortFunc(rs, func(a, b experiments.Range) int { return cmp.Compare(a.Start, b.Start) })
	out := rs[:1]
	for _, r := range rs[1:] {
		if last := &out[len(out)-1]; last.End == r.Start {
			last.End = r.End
			continue
		}
		out = append(out, r)
	}
	return out
}

// fallbackName is a name no arm of the experiment has.
func fallbackName(e *Experiment) string {
	name := "fallback"
	for slices.ContainsFunc(e.Arms, func(a ExperimentArm) bool { return a.Name == name }) {
		name += "-"
	}
	return name
}

func byName(a, b policy.Arm) int { return cmp.Compare(a.Name, b.Name) }

func whole(version string) policy.Arm {
	return policy.Arm{Name: ArmStable, Version: version, Ranges: []experiments.Range{{Start: 0, End: experiments.Buckets}}}
}

// stable returns the version that serves what is not under test: the champion, else the
// version in production, else the last good one; "" if none of them may serve.
func (m *Model) stable() string {
	if v := m.Aliases[Champion]; m.Version(v).Servable() {
		return v
	}
	for i := range m.Versions {
		if v := &m.Versions[i]; v.State == Production && v.Servable() {
			return v.Name
		}
	}
	if v := m.Aliases[LastGood]; m.Version(v).Servable() {
		return v
	}
	return ""
}
