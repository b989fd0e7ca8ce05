package experiments

import (
	"cmp"
	"slices"
	"strings"

	"github.com/outrigger-mesh/outrigger"
)

// Stratum is a region in one weight epoch: the smallest population in which the split
// was constant, and the only one in which arms may be compared directly.
type Stratum struct {
	Region string
	Epoch  uint64
}

// Compare orders strata by epoch, then region.
func (s Stratum) Compare(o Stratum) int {
	if c := cmp.Compare(s.Epoch, o.Epoch); c != 0 {
		return c
	}
	return strings.Compare(s.Region, o.Region)
}

// UnitRow is what one reporter saw of one unit in one arm and stratum since its last
// report: sums over its requests of whatever the metric's x and y are.
type UnitRow struct {
	Unit    uint32 // UnitHash
	Arm     string
	Stratum Stratum
	X, Y    float64
}

// Ledger puts the rows of all reporters together again per unit. Requests of one unit
// are not independent, and squares of a unit's totals cannot be added up from parts, so
// it is the ledger's totals, not the requests, that the statistics are computed over.
//
// A unit seen in several arms is counted (Exposure) and left out; a unit seen in several
// strata counts in the first epoch, where it was assigned. The result does not depend on
// the order or the split of rows, up to rounding. Units are told apart by 32-bit hashes:
// of a million units about 120 pairs collide. Not safe for concurrent use.
type Ledger struct {
	limit int
	index map[uint32]int
	units []ledgerUnit // in order of first appearance, so that sums are reproducible
	arms  []string
}

type ledgerUnit struct {
	arm      int
	multiple bool
	stratum  Stratum
	x, y     float64
}

// NewLedger returns a ledger of at most limit units (about 100 bytes each).
func NewLedger(limit int) *Ledger {
	return &Ledger{limit: limit, index: make(map[uint32]int)}
}

// Add adds a row; it must be called once per row (reports are deduplicated by sequence
// before). Kinds: Invalid for an empty arm or values that are not finite or beyond
// ±1e60, Exhausted for a new unit when the ledger is full. Nothing changes on failure.
func (l *Ledger) Add(r UnitRow) error {
	if r.Arm == "" || !storable(r.X) || !storable(r.Y) {
		return invalid("unit row of arm %q has x = %v, y = %v; the arm is named and values are within ±%g", r.Arm, r.X, r.Y, float64(maxMagnitude))
	}
	i, known := l.index[r.Unit]
	if !known {
		if len(l.units) >= l.limit {
			return outrigger.Errorf(outrigger.Exhausted, "the unit ledger is full: %d units", l.limit)
		}
		l.index[r.Unit] = len(l.units)
		l.units = append(l.units, ledgerUnit{arm: l.arm(r.Arm), stratum: r.Stratum, x: r.X, y: r.Y})
		return nil
	}
	u := &l.units[i]
	if !storable(u.x+r.X) || !storable(u.y+r.Y) {
		return invalid("unit %#x totals x = %v, y = %v; the limit is ±%g", r.Unit, u.x+r.X, u.y+r.Y, float64(maxMagnitude))
	}
	u.x, u.y = u.x+r.X, u.y+r.Y
	u.multiple = u.multiple || l.arms[u.arm] != r.Arm
	if r.Stratum.Compare(u.stratum) < 0 {
		u.stratum = r.Stratum
	}
	return nil
}

func (l *Ledger) arm(name string) int {
	if i := slices.Index(l.arms, name); i >= 0 {
		return i
	}
	l.arms = append(l.arms, name)
	return len(l.arms) - 1
}

// Exposure counts the units seen and those seen in several arms.
func (l *Ledger) Exposure() Exposure {
	out := Exposure{Units: uint64(len(l.units))}
	for i := range l.units {
		if l.units[i].multiple {
			out.Multiple++
		}
	}
	return out
}

// LedgerCell is the summary of one arm in one stratum.
type LedgerCell struct {
	Arm     string
	Stratum Stratum
	Sums    Sums
}

// Cells summarises the units that were seen in one arm only, by arm and stratum in
// ascending order. view turns a unit's totals into the metric's x and y (for instance
// "any failure" into 0 or 1); nil takes them as they are. It visits every unit. The
// error has kind Invalid if view returns what Sums.Add refuses.
func (l *Ledger) Cells(view func(x, y float64) (float64, float64)) ([]LedgerCell, error) {
	type key struct {
		arm     int
		stratum Stratum
	}
	index := make(map[key]int)
	var out []LedgerCell
	for i := range l.units {
		u := &l.units[i]
		if u.multiple {
			continue
		}
		k := key{u.arm, u.stratum}
		c, ok := index[k]
		if !ok {
			c = len(out)
			index[k] = c
			out = append(out, LedgerCell{Arm: l.arms[u.arm], Stratum: u.stratum})
		}
		x, y := u.x, u.y
		if view != nil {
			x, y = view(x, y)
		}
		if err := out[c].Sums.Add(x, y); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(out, func(a, b LedgerCell) int {
		if c := strings.Compare(a.Arm, b.Arm); c != 0 {
			return c
		}
		return a.Stratum.Compare(b.Stratum)
	})
	return out, nil
}
