package monitor

import (
	"cmp"
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger/internal/expr"
)

// Subject is one version of a model and what is known of its last minute, by the names of
// deploy.Metrics. Comparisons (baseline_…, performance_degradation) are with Baseline, the
// last good version of the rollout that the version is the candidate of; without one they
// are not known. Failures are distinct units, as everywhere. A Subject does not change.
type Subject struct {
	Model, Version    string
	Rollout, Baseline string // empty: the version is no candidate
	Requests          uint64
	regions           map[string]*region
	all               side
	price             *expr.Formula
	scores            map[string]scored
}

// Measure answers one metric. Its interval is that of a sequence of looks within a minute
// (deploy.GateAlpha); windows slide, so over hours a healthy version may be outside now and
// then: what follows from it should tell people, not change traffic.
func (s *Subject) Measure(name string) expr.Measure {
	return measure(name, s.regions, &s.all, told{s.price, func(metric string) scored { return s.scores[metric] }})
}

// Subjects are the versions that have answered requests within the last minute, or about
// which applications told something, sorted by model and version. Requests that the split did not assign count, too; copies (shadows) do not. It costs a merge of
// sketches per cell; the lock on counts is held for one version at a time.
func (m *Monitor) Subjects() []Subject {
	now := m.opts.Now()
	baseline := make(map[versionKey][2]string)
	rollouts := m.opts.Rollouts.RunningRollouts()
	for i := range rollouts {
		r := &rollouts[i]
		baseline[versionKey{model: r.Model, version: r.Candidate}] = [2]string{r.ID, r.LastGood}
	}
	var out []Subject
	for _, key := range m.recent(now) {
		s := Subject{Model: key.model, Version: key.version, regions: make(map[string]*region), price: m.price(key.model), scores: m.scores.lately(key, now)}
		if b, ok := baseline[key]; ok {
			s.Rollout, s.Baseline = b[0], b[1]
		}
		m.counts.lately(key, s.regions, func(r *region) *side { return &r.candidate }, now)
		if s.Baseline != "" {
			m.counts.lately(versionKey{model: s.Model, version: s.Baseline}, s.regions, func(r *region) *side { return &r.baseline }, now)
		}
		for _, r := range s.regions {
			s.all.add(r.candidate)
		}
		if s.Requests = s.all.requests; s.Requests > 0 || s.scores != nil {
			out = append(out, s)
		}
	}
	return out
}

// recent lists the versions that were heard of within the window.
func (m *Monitor) recent(now time.Time) []versionKey {
	found := make(map[versionKey]bool)
	m.counts.recent(now, found)
	m.scores.recentVersions(now, found)
	out := make([]versionKey, 0, len(found))
	for key := range found {
		out = append(out, key)
	}
	slices.SortFunc(out, func(a, b versionKey) int {
		return cmp.Or(cmp.Compare(a.model, b.model), cmp.Compare(a.version, b.version))
	})
	return out
}

// recent adds the versions with a cell that was heard of within the window.
func (c *counts) recent(now time.Time, found map[versionKey]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, t := range c.cells {
		if !key.shadow && now.Sub(t.lastSeen) <= Window {
			found[versionKey{model: key.model, version: key.version}] = true
		}
	}
}

// lately adds the last minute of one version to a side of each region.
func (c *counts) lately(version versionKey, regions map[string]*region, of func(*region) *side, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, t := range c.cells {
		if key.model != version.model || key.version != version.version || key.shadow {
			continue
		}
		var last totals
		t.window.addTo(&last, now)
		if last.Requests == 0 {
			continue
		}
		if regions[key.region] == nil {
			regions[key.region] = new(region)
		}
		of(regions[key.region]).add(side{requests: last.Requests, failed: min(last.units, last.Requests), latency: last.latency,
			recent: last.Requests, bad: last.Failures, counts: last.counts})
	}
}
