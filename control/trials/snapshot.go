package trials

import (
	"bytes"
	"context"
	"encoding/gob"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// SnapshotName is the name evidence is kept under in the log's snapshots.
const SnapshotName = "trials"

// maxReporters bounds the reporters whose last sequence is remembered; those not heard of
// for an hour are forgotten first.
const maxReporters = 100_000

// snapshotTimeout bounds one save.
const snapshotTimeout = 10 * time.Second

// The stored form, in encoding/gob. Fields may be added, never changed.
type (
	stored struct {
		Format    int
		Reporters map[string]heard
		Trials    []storedTrial
	}
	heard struct {
		Sequence uint64
		At       int64 // Unix nanoseconds
	}
	storedTrial struct {
		Name      string
		Strata    []experiments.Stratum
		Units     []storedUnit
		IDs       [shards][]uint64 // oldest first
		Described []storedSample
		Counts    [7]uint64
	}
	storedUnit struct {
		Unit, Stratum, Arm uint32
		Multiple           bool
		N                  uint64
		Failures, Ms       float64
		Values             []storedSample
	}
	storedSample struct {
		Arm, Metric int // of Described
		N           uint64
		Sum         float64
	}
)

const storedFormat = 1

// repeated says whether a reporter's delta was counted in this life or, as far as the last
// snapshot knows, in one before; else it notes the sequence.
func (s *Service) repeated(reporter string, sequence uint64, now time.Time) bool {
	s.heardMu.Lock()
	defer s.heardMu.Unlock()
	last, known := s.heard[reporter]
	if known && sequence <= last.Sequence {
		return true
	}
	if !known && len(s.heard) >= maxReporters {
		for name, h := range s.heard {
			if now.UnixNano()-h.At > int64(time.Hour) || len(s.heard) >= maxReporters {
				delete(s.heard, name)
			}
		}
	}
	s.heard[reporter] = heard{sequence, now.UnixNano()}
	return false
}

// save stores the evidence if there is any news. A failure costs what a crash before the
// next save would lose.
func (s *Service) save(ctx context.Context) {
	if s.opts.Snapshots == nil || !s.news.Swap(false) {
		return
	}
	f := s.opts.Facts()
	if f.Position() == 0 {
		return // no event, so no experiment
	}
	var buf bytes.Buffer
	err := gob.NewEncoder(&buf).Encode(s.copied())
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, snapshotTimeout)
		defer cancel()
		err = s.opts.Snapshots.SaveSnapshot(ctx, SnapshotName, f.Position(), buf.Bytes())
	}
	if err != nil {
		s.news.Store(true)
		s.opts.Logger.Warn("evidence on experiments not stored; trying again", "error", err)
	}
}

// copied takes the evidence as of one moment: nothing is counted meanwhile, so that what
// the reporters' sequences say is what the units hold.
func (s *Service) copied() stored {
	s.counting.Lock()
	defer s.counting.Unlock()
	out := stored{Format: storedFormat, Reporters: make(map[string]heard, len(s.heard))}
	for k, v := range s.heard {
		out.Reporters[k] = v
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, t := range s.trials {
		out.Trials = append(out.Trials, t.copied())
	}
	return out
}

func (t *trial) copied() storedTrial {
	l := t.ledger
	out := storedTrial{Name: t.name, Strata: l.strata}
	for i, c := range l.counters() {
		out.Counts[i] = c.Load()
	}
	for k, v := range l.described {
		out.Described = append(out.Described, storedSample{k[0], k[1], v.n, v.sum})
	}
	for i := range l.shards {
		sh := &l.shards[i]
		out.IDs[i] = append(append([]uint64(nil), sh.ring[sh.next:]...), sh.ring[:sh.next]...)
		for hash, u := range sh.units {
			su := storedUnit{Unit: hash, Stratum: u.stratum, Arm: uint32(u.arm), Multiple: u.multiple, N: u.n, Failures: u.failures, Ms: u.ms}
			for m, v := range u.values {
				su.Values = append(su.Values, storedSample{Metric: m, N: v.n, Sum: v.sum})
			}
			out.Units = append(out.Units, su)
		}
	}
	return out
}

// load takes the evidence of the last life up again. A snapshot that cannot be read is as
// good as none: evidence is collected anew.
func (s *Service) load(ctx context.Context) {
	if s.opts.Snapshots == nil {
		return
	}
	_, raw, err := s.opts.Snapshots.LoadSnapshot(ctx, SnapshotName)
	if err == nil && raw == nil {
		return
	}
	var in stored
	if err == nil {
		err = gob.NewDecoder(bytes.NewReader(raw)).Decode(&in)
	}
	if err == nil && in.Format != storedFormat {
		err = outrigger.Errorf(outrigger.Invalid, "format is %d, known is %d", in.Format, storedFormat)
	}
	if err != nil {
		s.opts.Logger.Error("stored evidence on experiments cannot be read; collecting anew", "error", err)
		return
	}
	for k, v := range in.Reporters {
		s.heard[k] = v
	}
	f, now := s.opts.Facts(), s.opts.Now()
	for _, st := range in.Trials {
		e := f.Experiment(st.Name)
		if e == nil || e.Life.Plan == nil || e.Life.StartedAt.IsZero() || !e.Life.EndedAt.IsZero() && now.Sub(e.Life.EndedAt) > s.opts.Late {
			continue
		}
		s.restore(e, st)
	}
}

func (s *Service) restore(e *facts.Experiment, st storedTrial) {
	t := s.newTrial(e)
	l := t.ledger
	for i, x := range st.Strata {
		l.index[x] = uint32(i)
	}
	l.strata = st.Strata
	for i, c := range l.counters() {
		c.Store(st.Counts[i])
	}
	for _, d := range st.Described {
		if d.Arm < len(t.arms) && d.Metric < l.named {
			l.described[[2]int{d.Arm, d.Metric}] = sample{d.N, d.Sum}
		}
	}
	for _, u := range st.Units {
		if int(u.Arm) >= len(t.arms) || int(u.Stratum) >= len(st.Strata) || len(u.Values) > l.named {
			continue // of another plan: names are not used twice, so this cannot be
		}
		sh := &l.shards[u.Unit%shards]
		cost := int64(1)
		if u.Values != nil {
			cost += l.valuesCost()
		}
		if !l.take(sh, cost) {
			l.full.Add(1)
			continue
		}
		known := &unit{arm: uint16(u.Arm), multiple: u.Multiple, stratum: u.Stratum, n: u.N, failures: u.Failures, ms: u.Ms}
		if u.Values != nil {
			known.values = make([]sample, l.named)
			for _, v := range u.Values {
				known.values[v.Metric] = sample{v.N, v.Sum}
			}
		}
		sh.units[u.Unit] = known
	}
	for i := range l.shards {
		for _, id := range st.IDs[i] {
			l.shards[i].remember(id)
		}
	}
	if !e.Life.EndedAt.IsZero() {
		t.ended.Store(e.Life.EndedAt.UnixNano())
	}
	s.trials[e.Name] = t
}

// Snapshots is where evidence is kept between the lives of the process; eventlog.Log has it.
type Snapshots = eventlog.Snapshots
