package monitor

import (
	"hash/maphash"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/deploy"
	"github.com/outrigger-mesh/outrigger/experiments"
	"github.com/outrigger-mesh/outrigger/internal/expr"
)

// Bounds of scores.
const (
	maxScoreIDs = 131_072 // remembered ids; the oldest are forgotten first
	maxScoreSum = 1e15
)

// Score is what applications report about answers of one version: the values of one of
// deploy.Reported for one unit. user_satisfaction and accuracy lie within 0 to 1,
// cost_per_request is not negative.
type Score struct {
	Model, Version, Metric string
	Unit                   uint32  // hash of the unit, the same for all its scores of a model
	N                      uint64  // values
	Sum                    float64 // of the values
	At                     time.Time
	ID                     string // a second score of it with the same id is not counted; "" = always counts
}

func (s *Score) check() error {
	if !slices.Contains(deploy.Reported(), s.Metric) {
		return outrigger.Errorf(outrigger.NotFound, "metric %q not found; what a version did is told as %s", s.Metric, strings.Join(deploy.Reported(), ", "))
	}
	switch {
	case s.Metric == deploy.MetricCost && !(s.Sum >= 0 && s.Sum <= maxScoreSum):
		return outrigger.Errorf(outrigger.Invalid, "%s is %v; it lies within 0 and %g", s.Metric, s.Sum, float64(maxScoreSum))
	case s.Metric != deploy.MetricCost && !(s.Sum >= 0 && s.Sum <= float64(s.N)):
		return outrigger.Errorf(outrigger.Invalid, "%s is %v in %d values; each lies within 0 and 1", s.Metric, s.Sum, s.N)
	}
	return nil
}

// Score counts one. It belongs to the last minute if At does, and to the gates of a rollout
// of the model if At is not before the present phase. Kinds: NotFound for an unknown metric,
// Invalid for a value that cannot be, Exhausted beyond Options.MaxScores units, and then it
// may be sent again.
func (m *Monitor) Score(s Score) (repeated bool, err error) {
	if err := s.check(); err != nil {
		return false, err
	}
	var epoch uint64
	rollouts := m.opts.Rollouts.RunningRollouts()
	for i := range rollouts {
		if r := &rollouts[i]; r.Model == s.Model && !s.At.Before(r.PhaseSince) {
			epoch = max(epoch, r.WeightEpoch)
		}
	}
	return m.scores.add(&s, epoch, m.opts.Now())
}

// score is the sum of one unit's values.
type score struct {
	n   uint64
	sum float64
}

type scoreKey struct{ model, version, metric string }

// series are the scores of one version and metric by unit: of the last minute in slots, as
// counts are, and since the weight of a running rollout last changed.
type series struct {
	slot  [slots]map[uint32]score
	of    [slots]int64
	epoch uint64 // of since; 0 = no rollout was running
	since map[uint32]score
	seen  time.Time
}

// scores is everything applications told about versions. One lock, held for map work.
type scores struct {
	seed      maphash.Seed
	max       int // entries, over all maps of all series
	maxSeries int

	mu     sync.Mutex
	held   int
	series map[scoreKey]*series
	ids    map[uint64]struct{}
	ring   []uint64 // the same in order of arrival
	next   int      // where the ring is written
}

func newScores(o Options) *scores {
	return &scores{seed: maphash.MakeSeed(), max: o.MaxScores, maxSeries: o.MaxCells, series: make(map[scoreKey]*series), ids: make(map[uint64]struct{})}
}

func (c *scores) add(s *Score, epoch uint64, now time.Time) (repeated bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := scoreKey{s.Model, s.Version, s.Metric}
	var id uint64
	if s.ID != "" {
		id = maphash.Comparable(c.seed, struct {
			scoreKey
			unit uint32
			id   string
		}{key, s.Unit, s.ID})
		if _, known := c.ids[id]; known {
			return true, nil
		}
	}
	if c.held+2 > c.max || len(c.series) >= c.maxSeries && c.series[key] == nil {
		c.sweep(now)
	}
	if c.held+2 > c.max || len(c.series) >= c.maxSeries && c.series[key] == nil {
		return false, outrigger.Errorf(outrigger.Exhausted, "%d units and %d series have scores, the limits are %d and %d; send it again in a minute", c.held, len(c.series), c.max, c.maxSeries)
	}
	t := c.series[key]
	if t == nil {
		t = &series{}
		c.series[key] = t
	}
	t.seen = now
	if at := earlier(s.At, now); now.Sub(at) < Window {
		c.put(t.recent(c, at), s)
	}
	if epoch != 0 && epoch >= t.epoch {
		if epoch > t.epoch || t.since == nil {
			c.held -= len(t.since)
			t.epoch, t.since = epoch, make(map[uint32]score)
		}
		c.put(t.since, s)
	}
	if s.ID != "" {
		c.remember(id)
	}
	return false, nil
}

func earlier(a, b time.Time) time.Time {
	if a.After(b) {
		return b
	}
	return a
}

func (c *scores) put(in map[uint32]score, s *Score) {
	was, known := in[s.Unit]
	if !known {
		c.held++
	}
	in[s.Unit] = score{was.n + s.N, was.sum + s.Sum}
}

// recent finds or makes the slot of a time within the window.
func (t *series) recent(c *scores, at time.Time) map[uint32]score {
	n := at.Unix() / slotSeconds
	i := int(n % slots)
	if t.of[i] != n || t.slot[i] == nil {
		c.held -= len(t.slot[i])
		t.slot[i], t.of[i] = make(map[uint32]score), n
	}
	return t.slot[i]
}

// sweep lets go of slots that left the window and of series nobody added to for long.
func (c *scores) sweep(now time.Time) {
	n := now.Unix() / slotSeconds
	for key, t := range c.series {
		for i := range t.slot {
			if t.of[i] <= n-slots {
				c.held -= len(t.slot[i])
				t.slot[i] = nil
			}
		}
		if now.Sub(t.seen) >= cellIdle {
			c.held -= len(t.since)
			delete(c.series, key)
		}
	}
}

func (c *scores) remember(id uint64) {
	if len(c.ring) < maxScoreIDs {
		c.ring = append(c.ring, id)
	} else {
		delete(c.ids, c.ring[c.next])
		c.ring[c.next] = id
		c.next = (c.next + 1) % maxScoreIDs
	}
	c.ids[id] = struct{}{}
}

// scored is a summary of units: each counts once, with the mean of its values (x) or with
// their sum and number (x and y).
type scored struct {
	means float64
	units experiments.Sums
}

func summarise(units map[uint32]score) (out scored) {
	keys := make([]uint32, 0, len(units))
	for u := range units {
		keys = append(keys, u)
	}
	slices.Sort(keys) // the same scores give the same sums, to the last bit
	for _, u := range keys {
		s := units[u]
		out.means += s.sum / float64(s.n)
		if err := out.units.Add(s.sum, float64(s.n)); err != nil {
			continue // beyond any cost; check bounds each value, not what they add up to
		}
	}
	return out
}

// lately summarises what was told about a version in the last minute, by metric; nil if
// nothing was.
func (c *scores) lately(version versionKey, now time.Time) (out map[string]scored) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := now.Unix() / slotSeconds
	for _, metric := range deploy.Reported() {
		t := c.series[scoreKey{version.model, version.version, metric}]
		if t == nil {
			continue
		}
		all := make(map[uint32]score)
		for i := range t.slot {
			if t.of[i] <= n-slots {
				continue
			}
			for u, s := range t.slot[i] {
				was := all[u]
				all[u] = score{was.n + s.n, was.sum + s.sum}
			}
		}
		if len(all) > 0 {
			if out == nil {
				out = make(map[string]scored)
			}
			out[metric] = summarise(all)
		}
	}
	return out
}

// sinceEpoch summarises what was told since a rollout's weight changed.
func (c *scores) sinceEpoch(key scoreKey, epoch uint64) scored {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.series[key]; t != nil && t.epoch == epoch {
		return summarise(t.since)
	}
	return scored{}
}

// recentVersions adds the versions about which something was told within the window.
func (c *scores) recentVersions(now time.Time, found map[versionKey]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, t := range c.series {
		if now.Sub(t.seen) < Window {
			found[versionKey{model: key.model, version: key.version}] = true
		}
	}
}

// rated is the mean over units of what lies between 0 and 1. The interval is that of a
// proportion, which is the widest such values can need (a [0, 1] variable varies at most as
// much as a coin of its mean), with the sum rounded outwards.
func rated(s scored, alpha float64) expr.Measure {
	n := s.units.N
	if n == 0 {
		return expr.Measure{}
	}
	const rounding = 1e-9
	low, err1 := sequence(alpha).Proportion(min(uint64(s.means+rounding), n), n)
	high, err2 := sequence(alpha).Proportion(min(uint64(math.Ceil(max(0, s.means-rounding))), n), n)
	return expr.Measure{Low: low.Low, High: high.High, Point: s.means / float64(n), N: n, Known: err1 == nil && err2 == nil}
}

// minCosts is how many units must have told costs for an interval of their mean.
const minCosts = 20

// toldCost is the mean of told costs per value, over units.
func toldCost(s scored, alpha float64) expr.Measure {
	if s.units.N < minCosts {
		return expr.Measure{}
	}
	ratio, err := s.units.Ratio()
	if err != nil {
		return expr.Measure{}
	}
	in, err := experiments.Sequence{Alpha: alpha, Tuning: reportTuning}.Interval(ratio.Value, ratio.Variance, ratio.N)
	return expr.Measure{Low: in.Low, High: in.High, Point: ratio.Value, N: ratio.N, Known: err == nil}
}

// told is what is known of one version beside what sidecars count.
type told struct {
	price *expr.Formula // of the model; nil: costs are those that applications tell
	score func(metric string) scored
}

// measure answers one of deploy.Reported.
func (t told) measure(name string, counts *experiments.Moments) expr.Measure {
	switch {
	case name == deploy.MetricCost && t.price != nil:
		return costPerRequest(t.price, counts, deploy.GateAlpha)
	case t.score == nil:
		return expr.Measure{}
	case name == deploy.MetricCost:
		return toldCost(t.score(name), deploy.GateAlpha)
	}
	return rated(t.score(name), deploy.GateAlpha)
}
