package inference

import (
	"bytes"
	"cmp"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/DataDog/sketches-go/ddsketch"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// Outcome is the end of one logical request.
type Outcome struct {
	Model, Version, Arm, Region string
	WeightEpoch                 uint64
	// Unit is experiments.UnitHash of the randomisation unit, if HasUnit.
	HasUnit bool
	Unit    uint32
	// Sample is false for a client's own retry of a request already counted: then only
	// Attempts and LLM tokens are added.
	Sample            bool
	Failed, Cancelled bool // never both
	Attempts          int
	Latency           time.Duration // request read to last byte of the answer
	TTFT              time.Duration // to the first content; 0 = not a stream, or none came
	TokensIn          uint64
	TokensOut         uint64
	At                time.Time
}

// RecorderOptions bound a Recorder. Zero fields take the defaults.
type RecorderOptions struct {
	MaxCells       int // model × version × arm × region × epoch between drains, default 1024
	MaxUnits       int // unit rows over all cells between drains, default 8192
	MaxFailedUnits int // failed unit hashes over all cells between drains, default 8192
}

// recorderShards spread concurrent requests; a unit always lands on the same shard, so
// unit rows of different shards never need merging.
const recorderShards = 8

// Recorder aggregates outcomes between two drains. Memory is bounded by its options:
// rows beyond them are counted as dropped (units_dropped, Stats.CellsDropped), counts
// and sketches of existing cells stay exact. Safe for concurrent use.
type Recorder struct {
	o       RecorderOptions
	urgent  chan struct{}
	dropped atomic.Uint64
	shards  [recorderShards]recorderShard
}

type recorderShard struct {
	mu     sync.Mutex
	cells  map[cellKey]*cell
	units  int // rows in all cells
	failed int // failed unit hashes in all cells
	totals map[totalKey]*Total
	_      [64]byte // keep the locks on different cache lines
}

type cellKey struct {
	model, version, arm, region string
	epoch                       uint64
}

type totalKey struct{ model, version, arm string }

type cell struct {
	delta         pb.OutcomeDelta
	latency, ttft *ddsketch.DDSketch
	units         map[uint32]*pb.UnitRow
	failed        map[uint32]struct{}
}

// Total is what this process has relayed for one arm since it started.
type Total struct {
	Model        string `json:"model"`
	Version      string `json:"version"`
	Arm          string `json:"arm"`
	Requests     uint64 `json:"requests"`
	Failures     uint64 `json:"failures"`
	Cancelled    uint64 `json:"cancelled"`
	Attempts     uint64 `json:"attempts"`
	TokensIn     uint64 `json:"tokens_in"`
	TokensOut    uint64 `json:"tokens_out"`
	LatencySumMS int64  `json:"latency_sum_ms"` // of requests neither cancelled nor retried by the client
}

// NewRecorder returns an empty Recorder.
func NewRecorder(o RecorderOptions) *Recorder {
	o.MaxCells, o.MaxUnits, o.MaxFailedUnits = orDefault(o.MaxCells, 1024), orDefault(o.MaxUnits, 8192), orDefault(o.MaxFailedUnits, 8192)
	r := &Recorder{o: o, urgent: make(chan struct{}, 1)}
	for i := range r.shards {
		r.shards[i].cells, r.shards[i].totals = map[cellKey]*cell{}, map[totalKey]*Total{}
	}
	return r
}

// Urgent receives when a failure has been recorded since the last Drain; the caller
// should drain and flush within 100 ms. Signals do not queue.
func (r *Recorder) Urgent() <-chan struct{} { return r.urgent }

// Record adds one outcome.
func (r *Recorder) Record(o Outcome) {
	n := o.Unit
	if !o.HasUnit {
		n = rand.Uint32()
	}
	s := &r.shards[n%recorderShards]
	s.mu.Lock()
	r.add(s, &o)
	s.mu.Unlock()
	if o.Sample && o.Failed {
		select {
		case r.urgent <- struct{}{}:
		default: // one is waiting already
		}
	}
}

func share(limit int) int { return max(limit/recorderShards, 1) }

// add runs with the shard's lock held.
func (r *Recorder) add(s *recorderShard, o *Outcome) {
	if t := r.total(s, o); t != nil {
		t.Attempts += uint64(o.Attempts)
		t.TokensIn += o.TokensIn
		t.TokensOut += o.TokensOut
		if o.Sample {
			count(o, &t.Requests, &t.Failures, &t.Cancelled)
			if !o.Cancelled {
				t.LatencySumMS += o.Latency.Milliseconds()
			}
		}
	}
	k := cellKey{o.Model, o.Version, o.Arm, o.Region, o.WeightEpoch}
	c := s.cells[k]
	if c == nil {
		if len(s.cells) >= share(r.o.MaxCells) {
			r.dropped.Add(1)
			return
		}
		c = &cell{}
		s.cells[k] = c
	}
	d := &c.delta
	d.Attempts += uint64(o.Attempts)
	d.TokensIn += o.TokensIn
	d.TokensOut += o.TokensOut
	if !o.Sample {
		return
	}
	count(o, &d.Requests, &d.Failures, &d.Cancelled)
	if o.Failed && d.FirstFailureUnixNano == 0 {
		d.FirstFailureUnixNano = uint64(o.At.UnixNano())
	}
	if o.TTFT > 0 {
		sketch(&c.ttft, o.TTFT)
	}
	if o.Cancelled {
		return // how long the user had patience is not the model's latency
	}
	ms := float64(o.Latency) / float64(time.Millisecond)
	d.LatencySumMs += ms
	sketch(&c.latency, o.Latency)
	if o.HasUnit {
		r.addUnit(s, c, o, ms)
	}
}

func count(o *Outcome, requests, failures, cancelled *uint64) {
	*requests++
	if o.Failed {
		*failures++
	}
	if o.Cancelled {
		*cancelled++
	}
}

func (r *Recorder) addUnit(s *recorderShard, c *cell, o *Outcome, ms float64) {
	row := c.units[o.Unit]
	switch {
	case row != nil:
	case s.units >= share(r.o.MaxUnits):
		c.delta.UnitsDropped++
	default:
		if c.units == nil {
			c.units = map[uint32]*pb.UnitRow{}
		}
		row = &pb.UnitRow{Unit: o.Unit}
		c.units[o.Unit] = row
		s.units++
	}
	if row != nil {
		row.N++
		row.SumY += ms
		if o.Failed {
			row.SumX++
		}
	}
	if !o.Failed {
		return
	}
	if _, ok := c.failed[o.Unit]; !ok && s.failed < share(r.o.MaxFailedUnits) {
		if c.failed == nil {
			c.failed = map[uint32]struct{}{}
		}
		c.failed[o.Unit] = struct{}{}
		s.failed++
	}
}

// Expose records that a unit was exposed to an arm without a request to a model: a unit
// row of no requests. Bounds are those of Record; a unit that has a row is exposed already.
func (r *Recorder) Expose(model, version, arm, region string, epoch uint64, unit uint32) {
	s := &r.shards[unit%recorderShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	k := cellKey{model, version, arm, region, epoch}
	c := s.cells[k]
	if c == nil {
		if len(s.cells) >= share(r.o.MaxCells) {
			r.dropped.Add(1)
			return
		}
		c = &cell{}
		s.cells[k] = c
	}
	switch {
	case c.units[unit] != nil:
	case s.units >= share(r.o.MaxUnits):
		c.delta.UnitsDropped++
	default:
		if c.units == nil {
			c.units = map[uint32]*pb.UnitRow{}
		}
		c.units[unit] = &pb.UnitRow{Unit: unit}
		s.units++
	}
}

func (r *Recorder) total(s *recorderShard, o *Outcome) *Total {
	k := totalKey{o.Model, o.Version, o.Arm}
	t := s.totals[k]
	if t == nil && len(s.totals) < r.o.MaxCells {
		t = &Total{Model: o.Model, Version: o.Version, Arm: o.Arm}
		s.totals[k] = t
	}
	return t
}

// sketchAccuracy is the relative error of every quantile; with 1 % and 2048 bins the
// sketch spans 17 decades, far more than any latency, before it collapses the lowest.
const (
	sketchAccuracy = 0.01
	sketchBins     = 2048
)

func sketch(s **ddsketch.DDSketch, d time.Duration) {
	if *s == nil {
		// Fails only for an accuracy outside (0, 1).
		*s, _ = ddsketch.LogCollapsingLowestDenseDDSketch(sketchAccuracy, sketchBins)
	}
	// Fails only for values beyond the indexable 1e308.
	_ = (*s).Add(max(float64(d)/float64(time.Millisecond), 0))
}

// Drain returns what was recorded since the last Drain, sorted by cell, and forgets it.
// requests counts every sample; failures and cancelled are disjoint parts of it.
// latency_sum_ms, the latency sketch and unit rows (sum_x failures, sum_y milliseconds)
// leave cancelled requests out.
func (r *Recorder) Drain(time.Time) []*pb.OutcomeDelta {
	select {
	case <-r.urgent: // before looking: a failure recorded from here on signals again
	default:
	}
	merged := map[cellKey]*cell{}
	for i := range r.shards {
		s := &r.shards[i]
		s.mu.Lock()
		cells := s.cells
		if len(cells) == 0 {
			s.mu.Unlock() // the map stays in use: nothing of it may be touched from here
			continue
		}
		s.cells, s.units, s.failed = make(map[cellKey]*cell, len(cells)), 0, 0
		s.mu.Unlock()
		for k, c := range cells {
			if m := merged[k]; m != nil {
				m.merge(c)
			} else {
				merged[k] = c
			}
		}
	}
	out := make([]*pb.OutcomeDelta, 0, len(merged))
	for k, c := range merged {
		out = append(out, c.finish(k))
	}
	slices.SortFunc(out, func(a, b *pb.OutcomeDelta) int {
		return cmp.Or(cmp.Compare(a.Model, b.Model), cmp.Compare(a.Version, b.Version), cmp.Compare(a.Arm, b.Arm),
			cmp.Compare(a.Region, b.Region), cmp.Compare(a.WeightEpoch, b.WeightEpoch))
	})
	return out
}

func (c *cell) merge(o *cell) {
	d, e := &c.delta, &o.delta
	d.Requests += e.Requests
	d.Failures += e.Failures
	d.Cancelled += e.Cancelled
	d.Attempts += e.Attempts
	d.LatencySumMs += e.LatencySumMs
	d.TokensIn += e.TokensIn
	d.TokensOut += e.TokensOut
	d.UnitsDropped += e.UnitsDropped
	if d.FirstFailureUnixNano == 0 || e.FirstFailureUnixNano != 0 && e.FirstFailureUnixNano < d.FirstFailureUnixNano {
		d.FirstFailureUnixNano = e.FirstFailureUnixNano
	}
	mergeSketch(&c.latency, o.latency)
	mergeSketch(&c.ttft, o.ttft)
	if c.units == nil {
		c.units = map[uint32]*pb.UnitRow{}
	}
	for u, row := range o.units {
		c.units[u] = row // a unit is on one shard only
	}
	if c.failed == nil {
		c.failed = map[uint32]struct{}{}
	}
	for u := range o.failed {
		c.failed[u] = struct{}{}
	}
}

func mergeSketch(into **ddsketch.DDSketch, from *ddsketch.DDSketch) {
	if *into == nil {
		*into = from
	} else if from != nil {
		_ = (*into).MergeWith(from) // fails only for different mappings; ours are equal
	}
}

func (c *cell) finish(k cellKey) *pb.OutcomeDelta {
	d := &c.delta
	d.Model, d.Version, d.Arm, d.Region, d.WeightEpoch = k.model, k.version, k.arm, k.region, k.epoch
	d.LatencySketch, d.TtftSketch = encodeSketch(c.latency), encodeSketch(c.ttft)
	for _, row := range c.units {
		d.Units = append(d.Units, row)
	}
	slices.SortFunc(d.Units, func(a, b *pb.UnitRow) int { return cmp.Compare(a.Unit, b.Unit) })
	for u := range c.failed {
		d.FailedUnits = append(d.FailedUnits, u)
	}
	slices.Sort(d.FailedUnits)
	return d
}

func encodeSketch(s *ddsketch.DDSketch) []byte {
	if s == nil {
		return nil
	}
	var b bytes.Buffer
	s.EncodeProto(&b) // writes to memory: cannot fail
	return b.Bytes()
}

// Totals returns the sums since start per model, version and arm, sorted.
func (r *Recorder) Totals() []Total {
	sum := map[totalKey]*Total{}
	for i := range r.shards {
		s := &r.shards[i]
		s.mu.Lock()
		for k, t := range s.totals {
			m := sum[k]
			if m == nil {
				m = &Total{Model: k.model, Version: k.version, Arm: k.arm}
				sum[k] = m
			}
			m.Requests += t.Requests
			m.Failures += t.Failures
			m.Cancelled += t.Cancelled
			m.Attempts += t.Attempts
			m.TokensIn += t.TokensIn
			m.TokensOut += t.TokensOut
			m.LatencySumMS += t.LatencySumMS
		}
		s.mu.Unlock()
	}
	out := make([]Total, 0, len(sum))
	for _, t := range sum {
		out = append(out, *t)
	}
	slices.SortFunc(out, func(a, b Total) int {
		return cmp.Or(cmp.Compare(a.Model, b.Model), cmp.Compare(a.Version, b.Version), cmp.Compare(a.Arm, b.Arm))
	})
	return out
}

// CellsDropped counts outcomes that found no room for their cell since start.
func (r *Recorder) CellsDropped() uint64 { return r.dropped.Load() }
