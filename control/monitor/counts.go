package monitor

import (
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/deploy"
)

// unitMemory is how long a failed unit is remembered: it counts once in that time.
const unitMemory = time.Minute

// cellKey names what outcomes are counted by.
type cellKey struct {
	model, version, region string
	epoch                  uint64
	// assigned tells units that the split put there from requests that came another way:
	// without a unit, or moved from a version that could not serve.
	assigned bool
	// shadow: copies of requests, which are nobody's answers.
	shadow bool
}

// cell counts the outcomes of one key.
type cell struct {
	key      cellKey
	lifetime totals
	window   window
	lastSeen time.Time

	// failed counts distinct failed units; only ever grows.
	failed uint64
	// firstFailure is the first failure since the last collect, 0 = none known.
	firstFailure int64
	// recent and older map failed units to when they were counted. With the first failure
	// of every minute recent becomes older, and what was older is let go.
	recent, older map[uint32]time.Time
	rotated       time.Time
}

// reporter is the dedupe state of one process.
type reporter struct {
	last uint64
	node *pb.Node
	seen time.Time
}

// counts is everything reported. One lock, held for map work and merges only.
type counts struct {
	opts Options

	mu        sync.Mutex
	reporters map[string]*reporter
	cells     map[cellKey]*cell
	// gone holds the lifetime totals of cells that made room, by version, so that a
	// version's totals never fall.
	gone   map[versionKey]*totals
	pasts  map[string]*past // by model
	nodes  map[string]*nodeCache
	caches nodeCache // all nodes, also those forgotten
}

type versionKey struct {
	model, version string
	shadow         bool
}

func newCounts(opts Options) (*counts, error) {
	if opts.MaxReporters < 1 || opts.MaxCells < 1 || opts.MaxUnits < 1 {
		return nil, outrigger.Errorf(outrigger.Invalid, "MaxReporters %d, MaxCells %d and MaxUnits %d must be at least 1", opts.MaxReporters, opts.MaxCells, opts.MaxUnits)
	}
	return &counts{opts: opts, reporters: make(map[string]*reporter), cells: make(map[cellKey]*cell),
		gone: make(map[versionKey]*totals), nodes: make(map[string]*nodeCache), pasts: make(map[string]*past)}, nil
}

// added says what became of a delta.
type added struct {
	duplicate bool
	failures  bool // at least one failure was counted
	cellsFull int  // cells dropped for want of room
	unitsFull int  // failed units counted without being remembered
}

// add counts a delta once.
func (c *counts) add(d *pb.Delta, p parsed, now time.Time) (res added, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, err := c.reporter(d.GetReporter(), now)
	if err != nil {
		return res, err
	}
	r.seen = now
	if d.GetSequence() <= r.last {
		return added{duplicate: true}, nil
	}
	r.last = d.GetSequence()
	if r.node == nil && d.GetNode() != nil {
		r.node = proto.CloneOf(d.GetNode()) // the same for the whole life of a reporter
	}
	for _, o := range p.outcomes {
		c.remember(o, now)
		t := c.cell(o.key, now)
		if t == nil {
			res.cellsFull++
			continue
		}
		res.unitsFull += t.add(o, now, c.opts.MaxUnits)
		res.failures = res.failures || o.delta.GetFailures() > 0
	}
	if d.GetCache() != nil {
		c.caches.add(d.GetCache(), p.lag, now)
		if n := c.node(d.GetNode().GetId(), now); n != nil {
			n.add(d.GetCache(), p.lag, now)
		}
	}
	return res, nil
}

// reporter finds or makes the state of a reporter.
func (c *counts) reporter(id string, now time.Time) (*reporter, error) {
	if r := c.reporters[id]; r != nil {
		return r, nil
	}
	if len(c.reporters) >= c.opts.MaxReporters {
		for name, r := range c.reporters {
			if now.Sub(r.seen) >= reporterIdle {
				delete(c.reporters, name)
			}
		}
	}
	if len(c.reporters) >= c.opts.MaxReporters {
		return nil, outrigger.Errorf(outrigger.Exhausted, "reporter %q is one more than the limit of %d; raise MaxReporters or add a control replica", id, c.opts.MaxReporters)
	}
	r := &reporter{}
	c.reporters[id] = r
	return r, nil
}

// cell finds or makes a cell; nil if there is no room.
func (c *counts) cell(key cellKey, now time.Time) *cell {
	if t := c.cells[key]; t != nil {
		return t
	}
	if len(c.cells) >= c.opts.MaxCells {
		for k, t := range c.cells {
			if now.Sub(t.lastSeen) < cellIdle {
				continue
			}
			c.goneBy(versionKey{k.model, k.version, k.shadow}).add(&t.lifetime)
			delete(c.cells, k)
		}
	}
	if len(c.cells) >= c.opts.MaxCells {
		return nil
	}
	t := &cell{key: key, rotated: now, recent: make(map[uint32]time.Time)}
	c.cells[key] = t
	return t
}

// goneBy finds or makes the remainder of a version. When there are as many remainders as
// cells allowed, the rest share the unnamed one.
func (c *counts) goneBy(k versionKey) *totals {
	if c.gone[k] == nil {
		if len(c.gone) >= c.opts.MaxCells {
			k = versionKey{}
		}
		if c.gone[k] == nil {
			c.gone[k] = new(totals)
		}
	}
	return c.gone[k]
}

// add counts one outcome and returns how many failed units could not be remembered.
func (t *cell) add(o outcome, now time.Time, maxUnits int) (unitsFull int) {
	before := t.failed
	unitsFull = t.addFailures(o.delta, now, maxUnits)
	one := totalsOf(o)
	one.units = t.failed - before
	t.lifetime.add(&one)
	t.window.add(&one, now)
	t.lastSeen = now
	return unitsFull
}

func (t *cell) addFailures(d *pb.OutcomeDelta, now time.Time, maxUnits int) (unitsFull int) {
	if d.GetFailures() == 0 {
		return 0
	}
	if first := int64(d.GetFirstFailureUnixNano()); first > 0 && (t.firstFailure == 0 || first < t.firstFailure) {
		t.firstFailure = first
	}
	if len(d.GetFailedUnits()) == 0 {
		t.failed += d.GetFailures()
		return 0
	}
	for now.Sub(t.rotated) >= unitMemory {
		t.older, t.recent = t.recent, make(map[uint32]time.Time)
		t.rotated = t.rotated.Add(unitMemory)
		if now.Sub(t.rotated) >= 2*unitMemory {
			t.rotated = now // a long silence: both generations are empty after two turns
			t.older = nil
		}
	}
	for _, u := range d.GetFailedUnits() {
		if t.remembers(u, now) {
			continue
		}
		t.failed++
		if len(t.recent) < maxUnits {
			t.recent[u] = now
		} else {
			unitsFull++
		}
	}
	return unitsFull
}

func (t *cell) remembers(unit uint32, now time.Time) bool {
	at, ok := t.recent[unit]
	if !ok {
		at, ok = t.older[unit]
	}
	return ok && now.Sub(at) < unitMemory
}

// collect returns what a rollout's candidate and last good version did since w last
// asked, one sample per stratum, sorted. Cells of an older weight epoch are left alone:
// late deltas must not count for the new weights. So is what nobody assigned: requests
// moved away from a candidate that is down would otherwise weigh in for the last good
// version, and those without a unit only ever for it.
func (c *counts) collect(r *deploy.Rollout, w *watch) []deploy.Sample {
	c.mu.Lock()
	defer c.mu.Unlock()
	for t := range w.seen {
		if t.key.epoch < r.WeightEpoch || c.cells[t.key] != t {
			delete(w.seen, t)
		}
	}
	strata := make(map[deploy.Stratum]*deploy.Sample)
	for key, t := range c.cells {
		candidate := key.version == r.Candidate
		if !key.assigned || key.model != r.Model || key.epoch < r.WeightEpoch || !candidate && key.version != r.LastGood {
			continue
		}
		before := w.seen[t]
		if t.lifetime.Requests == before.requests {
			continue
		}
		w.seen[t] = seen{t.lifetime.Requests, t.failed}
		at := deploy.Stratum{Region: key.region, WeightEpoch: key.epoch}
		s := strata[at]
		if s == nil {
			s = &deploy.Sample{Stratum: at}
			strata[at] = s
		}
		n, e := t.lifetime.Requests-before.requests, t.failed-before.failed
		if !candidate {
			s.BaselineRequests, s.BaselineFailures = n, e
			continue
		}
		s.CandidateRequests, s.CandidateFailures = n, e
		if e > 0 && t.firstFailure > 0 {
			s.FirstFailure = time.Unix(0, t.firstFailure)
		}
		t.firstFailure = 0
	}
	out := make([]deploy.Sample, 0, len(strata))
	for _, s := range strata {
		out = append(out, *s)
	}
	slices.SortFunc(out, func(a, b deploy.Sample) int { return strings.Compare(a.Stratum.String(), b.Stratum.String()) })
	return out
}
