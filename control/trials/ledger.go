package trials

import (
	"slices"
	"sync"
	"sync/atomic"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// shards divide a ledger, so that reports of many sidecars go on beside one another.
const shards = 16

// maxStrata bounds regions × epochs of one experiment.
const maxStrata = 1024

// maxTotal bounds a unit's sums; beyond it a row is not believed.
const maxTotal = 1e15

// maxIDs bounds the outcome ids a shard remembers; the oldest are forgotten first.
const maxIDs = 8192

// unit is what is known of one unit of randomisation.
type unit struct {
	arm      uint16
	multiple bool
	stratum  uint32
	turn     uint64   // that it came with
	n        uint64   // requests; 0 = exposed without one
	failures float64  // of them
	ms       float64  // their time
	values   []sample // by number of the named metric; nil while there are none
}

// sample adds up the values of one named metric of one unit.
type sample struct {
	n   uint64
	sum float64
}

type shard struct {
	mu    sync.Mutex
	units map[uint32]*unit
	held  int64               // budget taken
	ids   map[uint64]struct{} // of outcomes, hashed
	ring  []uint64            // the same in order of arrival
	next  int                 // where the ring is written
}

// ledger puts the rows of all sidecars together per unit, for one experiment. Safe for
// concurrent use.
type ledger struct {
	budget *atomic.Int64 // units that may still be added, over all ledgers
	shards [shards]shard

	turnMu   sync.Mutex
	lastTurn uint64
	turns    map[uint64]struct{} // not ended

	mu     sync.RWMutex
	index  map[experiments.Stratum]uint32
	strata []experiments.Stratum // in order of appearance, which must not change

	rows, full, bad, late atomic.Uint64 // rows counted and left out
	dropped               atomic.Uint64 // rows sidecars could not keep
	changed               atomic.Bool

	outcomes, repeated atomic.Uint64     // values counted, and known before
	named              int               // named metrics
	described          map[[2]int]sample // by arm and named metric, of values without a unit; guarded by mu
}

func newLedger(budget *atomic.Int64, named int) *ledger {
	l := &ledger{budget: budget, named: named, turns: map[uint64]struct{}{}, index: map[experiments.Stratum]uint32{}, described: map[[2]int]sample{}}
	for i := range l.shards {
		l.shards[i].units = map[uint32]*unit{}
	}
	return l
}

// stratum finds or makes a stratum's number; ok is false if there is no room.
func (l *ledger) stratum(s experiments.Stratum) (n uint32, all []experiments.Stratum, ok bool) {
	l.mu.RLock()
	n, ok = l.index[s]
	all = l.strata
	l.mu.RUnlock()
	if ok {
		return n, all, true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if n, ok = l.index[s]; ok {
		return n, l.strata, true
	}
	if len(l.strata) >= maxStrata {
		return 0, nil, false
	}
	n = uint32(len(l.strata))
	l.index[s] = n
	l.strata = append(slices.Clip(l.strata), s) // never written to what a reader holds
	return n, l.strata, true
}

// turn is one report on its way into a ledger. Its units count together or not at all: of
// half a report, one arm's users would seem to be missing.
type turn struct {
	l    *ledger
	n    uint64
	room bool // for all the units it may bring
}

// begin starts the turn of a report of at most rows new units; end must follow.
func (l *ledger) begin(rows int) turn {
	l.turnMu.Lock()
	defer l.turnMu.Unlock()
	l.lastTurn++
	l.turns[l.lastTurn] = struct{}{}
	return turn{l, l.lastTurn, l.budget.Load() >= int64(rows)}
}

func (t turn) end() {
	t.l.turnMu.Lock()
	delete(t.l.turns, t.n)
	t.l.turnMu.Unlock()
	t.l.changed.Store(true) // last: a look that falls in between must not be the one for these rows
}

// ended returns the number below which all turns have ended.
func (l *ledger) ended() uint64 {
	l.turnMu.Lock()
	defer l.turnMu.Unlock()
	first := l.lastTurn + 1
	for n := range l.turns {
		first = min(first, n)
	}
	return first
}

// add counts the rows of one cell of a report.
func (t turn) add(arm uint16, s experiments.Stratum, o *pb.OutcomeDelta) {
	t.l.dropped.Add(o.GetUnitsDropped())
	n, all, ok := t.l.stratum(s)
	if !ok {
		t.l.full.Add(uint64(len(o.GetUnits())))
		return
	}
	for _, r := range o.GetUnits() {
		t.row(arm, n, all, r)
	}
}

func (t turn) row(arm uint16, stratum uint32, all []experiments.Stratum, r *pb.UnitRow) {
	l := t.l
	if !(r.GetSumX() >= 0 && r.GetSumX() <= float64(r.GetN()) && r.GetSumY() >= 0 && r.GetSumY() <= maxTotal) || r.GetN() == 0 && r.GetSumY() > 0 {
		l.bad.Add(1)
		return
	}
	sh := &l.shards[r.GetUnit()%shards]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	u := sh.units[r.GetUnit()]
	switch {
	case u == nil:
		if !t.room || !l.take(sh, 1) {
			l.full.Add(1)
			return
		}
		u = &unit{arm: arm, stratum: stratum, turn: t.n}
		sh.units[r.GetUnit()] = u
	case u.ms+r.GetSumY() > maxTotal:
		l.bad.Add(1)
		return
	}
	u.multiple = u.multiple || u.arm != arm
	if int(u.stratum) < len(all) && all[stratum].Compare(all[u.stratum]) < 0 {
		u.stratum = stratum // it was assigned there first; the report only came later
	}
	u.n += uint64(r.GetN())
	u.failures += r.GetSumX()
	u.ms += r.GetSumY()
	l.rows.Add(1)
}

// take reserves room in the shard, whose lock is held.
func (l *ledger) take(sh *shard, n int64) bool {
	if l.budget.Add(-n) < 0 {
		l.budget.Add(n)
		return false
	}
	sh.held += n
	return true
}

// counters are all that is counted, in the order of the stored form.
func (l *ledger) counters() []*atomic.Uint64 {
	return []*atomic.Uint64{&l.rows, &l.full, &l.bad, &l.late, &l.dropped, &l.outcomes, &l.repeated}
}

// valuesCost is what a unit's first value takes of the budget: a unit with values is
// several times the size of one without.
func (l *ledger) valuesCost() int64 { return 1 + int64(l.named)/6 }

// release gives the units back to the budget; the ledger must not be used afterwards.
func (l *ledger) release() {
	for i := range l.shards {
		sh := &l.shards[i]
		sh.mu.Lock()
		l.budget.Add(sh.held)
		sh.held, sh.units, sh.ids, sh.ring = 0, map[uint32]*unit{}, nil, nil
		sh.mu.Unlock()
	}
}

// evidence sums the units up: arms[i] is the arm of number i, metrics are those wanted.
// It visits every unit and holds one shard at a time, so reports go on meanwhile; units of
// those that have not ended when it begins are left for the next time.
func (l *ledger) evidence(arms []experiments.Weighted, metrics []view) (experiments.Data, error) {
	before := l.ended()
	l.mu.RLock()
	strata := l.strata
	l.mu.RUnlock()
	var out experiments.Data
	sums := make([][][]experiments.Sums, len(strata)) // by stratum, arm, metric
	for i, s := range strata {
		sums[i] = make([][]experiments.Sums, len(arms))
		d := experiments.StratumData{Stratum: s, Arms: make([]experiments.ArmData, len(arms))}
		for a := range arms {
			sums[i][a] = make([]experiments.Sums, len(metrics))
			d.Arms[a] = experiments.ArmData{Name: arms[a].Name, Weight: arms[a].Weight}
		}
		out.Strata = append(out.Strata, d)
	}
	for i := range l.shards {
		if err := l.shards[i].sum(&out, before, sums, metrics); err != nil {
			return out, err
		}
	}
	for i := range out.Strata {
		for a := range arms {
			cells := map[string]experiments.Cell{}
			for m, v := range metrics {
				cells[v.name] = experiments.Cell{Sums: sums[i][a][m]}
			}
			out.Strata[i].Arms[a].Cells = cells
		}
	}
	return out, nil
}

func (sh *shard) sum(out *experiments.Data, before uint64, sums [][][]experiments.Sums, metrics []view) error {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for _, key := range sortedKeys(sh.units) { // the same units give the same sums, to the last bit
		u := sh.units[key]
		if u.turn >= before || int(u.stratum) >= len(sums) {
			continue // it, or its stratum, came while we were looking
		}
		out.Exposure.Units++
		if u.multiple {
			out.Exposure.Multiple++
			continue
		}
		out.Strata[u.stratum].Arms[u.arm].Units++
		for m, v := range metrics {
			if x, y, ok := v.of(u); ok {
				if err := sums[u.stratum][u.arm][m].Add(x, y); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
