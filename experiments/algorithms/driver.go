package algorithms

import (
	"encoding/binary"
	"encoding/json"
	"maps"
	"math"
	"math/rand/v2"
	"slices"

	"github.com/outrigger-mesh/outrigger"
)

// engine is the search proper, in the unit cube; driver does the bookkeeping around it.
// An engine is a plain struct whose exported fields are its whole state.
type engine interface {
	// next proposes a point; tag comes back with its result. ok is false when the
	// engine must first observe results that are outstanding.
	next(r *rand.Rand) (u []float64, tag int, ok bool)
	// observe takes the result for a proposed point, in canonical coordinates.
	observe(r *rand.Rand, tag int, u []float64, y loss)
	// check validates a restored engine, given the tags of its outstanding points.
	check(tags []int) error
}

// stateVersion changes whenever an engine's fields change meaning.
const stateVersion = 1

type driver struct {
	algo     builtin
	cfg      Config
	p        *problem
	src      *rand.PCG
	rng      *rand.Rand
	eng      engine
	asked    int64
	pending  map[int64]pending
	best     *evaluated
	memoised bool            // no float parameter and no noise: settings need evaluating once
	seen     map[string]loss // results by canonical point, when memoised
}

type pending struct {
	ID  int64     `json:"id"`
	Tag int       `json:"tag"`
	U   []float64 `json:"u"`
}

type evaluated struct {
	ID   int64     `json:"id"`
	U    []float64 `json:"u"`
	Loss float64   `json:"loss"`
}

func newDriver(b builtin, cfg Config) (*driver, error) {
	p, err := newProblem(b.Info, cfg)
	if err != nil {
		return nil, err
	}
	cfg.Settings, cfg.Start = maps.Clone(cfg.Settings), maps.Clone(cfg.Start)
	d := &driver{algo: b, cfg: cfg, p: p, src: rand.NewPCG(cfg.Seed, mix(cfg.Seed)), pending: map[int64]pending{}}
	d.rng = rand.New(d.src)
	d.eng = b.engine(p)
	d.memoised = !cfg.Noisy && !slices.ContainsFunc(p.space.params, func(q dim) bool { return q.Kind == Float })
	if d.memoised {
		d.seen = map[string]loss{}
	}
	return d, nil
}

func (d *driver) Ask(n int) []Trial {
	n = min(n, d.cfg.Budget-int(d.asked), MaxPending-len(d.pending))
	var out []Trial
	for len(out) < n {
		u, tag, ok := d.propose()
		if !ok {
			break
		}
		params, err := d.p.space.Decode(u)
		if err != nil {
			break // cannot happen: engines propose points of the space's dimension
		}
		d.asked++
		d.pending[d.asked] = pending{ID: d.asked, Tag: tag, U: u}
		out = append(out, Trial{ID: d.asked, Params: params})
	}
	return out
}

// propose returns the engine's next point. Where a setting needs evaluating only once,
// a known one is answered from memory, so the budget goes to new ones. An engine that
// has settled, and only proposes what it knows, is sent somewhere new after maxRepeats.
func (d *driver) propose() (u []float64, tag int, ok bool) {
	const maxRepeats = 100
	for repeat := 0; ; repeat++ {
		if u, tag, ok = d.eng.next(d.rng); !ok {
			return nil, 0, false
		}
		u = d.p.space.canonical(u)
		y, known := d.seen[pointKey(d.seen, u)]
		if !known {
			return u, tag, true
		}
		if repeat == maxRepeats {
			return d.unseen(u), tag, true
		}
		d.eng.observe(d.rng, tag, u, y)
	}
}

// unseen draws a point not yet evaluated, or returns u when none turns up, or when the
// engine goes by tags and would take the result for u's.
func (d *driver) unseen(u []float64) []float64 {
	const draws = 200
	if _, ok := d.eng.(interface{ byTag() }); ok {
		return u
	}
	for range draws {
		v := make([]float64, d.p.d)
		for j := range v {
			v[j] = d.rng.Float64()
		}
		v = d.p.space.canonical(v)
		if _, known := d.seen[pointKey(d.seen, v)]; !known {
			return v
		}
	}
	return u
}

func pointKey(seen map[string]loss, u []float64) string {
	if seen == nil {
		return ""
	}
	b := make([]byte, 0, 8*len(u))
	for _, x := range u {
		b = binary.LittleEndian.AppendUint64(b, math.Float64bits(x))
	}
	return string(b)
}

func (d *driver) Tell(results []Result) error {
	ids := make(map[int64]bool, len(results))
	for _, r := range results {
		if _, ok := d.pending[r.ID]; !ok || ids[r.ID] {
			return outrigger.Errorf(outrigger.NotFound, "trial %d not found among the %d pending ones: told twice, or of another optimiser", r.ID, len(d.pending))
		}
		ids[r.ID] = true
		if !r.Failed && !(math.Abs(r.Loss) <= maxLoss) {
			return outrigger.Errorf(outrigger.Invalid, "trial %d: loss %v is not a number within ±%g; report it as failed", r.ID, r.Loss, maxLoss)
		}
	}
	// In order of asking, so that the order within one call does not matter.
	sorted := slices.SortedFunc(slices.Values(results), func(a, b Result) int { return int(a.ID - b.ID) })
	for _, r := range sorted {
		t := d.pending[r.ID]
		delete(d.pending, r.ID)
		y := loss(r.Loss)
		if r.Failed {
			y = loss(math.Inf(1))
		} else if d.best == nil || r.Loss < d.best.Loss {
			d.best = &evaluated{ID: t.ID, U: t.U, Loss: r.Loss}
		}
		if d.memoised {
			d.seen[pointKey(d.seen, t.U)] = y
		}
		d.eng.observe(d.rng, t.Tag, t.U, y)
	}
	return nil
}

func (d *driver) Best() (Evaluated, bool) {
	if d.best == nil {
		return Evaluated{}, false
	}
	params, err := d.p.space.Decode(d.best.U)
	return Evaluated{Trial{d.best.ID, params}, d.best.Loss}, err == nil
}

// saved is the wire form of a driver.
type saved struct {
	Version   int             `json:"version"`
	Algorithm string          `json:"algorithm"`
	Config    Config          `json:"config"`
	RNG       []byte          `json:"rng"`
	Asked     int64           `json:"asked"`
	Pending   []pending       `json:"pending,omitempty"`
	Best      *evaluated      `json:"best,omitempty"`
	Seen      []known         `json:"seen,omitempty"`
	Engine    json.RawMessage `json:"engine"`
}

type known struct {
	Key  []byte `json:"key"`
	Loss loss   `json:"loss"`
}

func (d *driver) State() []byte {
	s := saved{Version: stateVersion, Algorithm: d.algo.ID, Config: d.cfg, Asked: d.asked, Best: d.best}
	for _, id := range slices.Sorted(maps.Keys(d.pending)) {
		s.Pending = append(s.Pending, d.pending[id])
	}
	for _, k := range slices.Sorted(maps.Keys(d.seen)) {
		s.Seen = append(s.Seen, known{[]byte(k), d.seen[k]})
	}
	var err error
	if s.RNG, err = d.src.MarshalBinary(); err == nil {
		if s.Engine, err = json.Marshal(d.eng); err == nil {
			var out []byte
			if out, err = json.Marshal(s); err == nil {
				return out
			}
		}
	}
	// Everything in the state is finite numbers, strings and slices of them, so only a
	// bug in an engine can end here; silence would lose the optimisation.
	panic("algorithms: state of " + d.algo.ID + " cannot be written: " + err.Error())
}

func restoreDriver(b builtin, state []byte) (*driver, error) {
	refuse := func(format string, args ...any) (*driver, error) {
		return nil, outrigger.Errorf(outrigger.Invalid, "state of "+b.ID+": "+format, args...)
	}
	var s saved
	if err := json.Unmarshal(state, &s); err != nil {
		return nil, outrigger.Wrap(outrigger.Invalid, err, "state of "+b.ID)
	}
	if s.Version != stateVersion || s.Algorithm != b.ID {
		return refuse("version %d of algorithm %q, want version %d of %q; start anew from the log", s.Version, s.Algorithm, stateVersion, b.ID)
	}
	d, err := newDriver(b, s.Config)
	if err != nil {
		return nil, err
	}
	if err := d.src.UnmarshalBinary(s.RNG); err != nil {
		return refuse("random source: %v", err)
	}
	if err := json.Unmarshal(s.Engine, d.eng); err != nil {
		return refuse("engine: %v", err)
	}
	if s.Asked < 0 || s.Asked > int64(s.Config.Budget) || len(s.Pending) > MaxPending || len(s.Seen) > MaxBudget {
		return refuse("asked %d of %d, %d pending, %d seen: beyond the limits", s.Asked, s.Config.Budget, len(s.Pending), len(s.Seen))
	}
	d.asked = s.Asked
	var tags []int
	for _, t := range s.Pending {
		if _, twice := d.pending[t.ID]; twice || t.ID < 1 || t.ID > s.Asked || !validPoint(t.U, d.p.d) {
			return refuse("pending trial %d is not valid", t.ID)
		}
		d.pending[t.ID] = t
		tags = append(tags, t.Tag)
	}
	if s.Best != nil && (!validPoint(s.Best.U, d.p.d) || !loss(s.Best.Loss).valid()) {
		return refuse("best trial is not valid")
	}
	d.best = s.Best
	for _, k := range s.Seen {
		if !d.memoised || len(k.Key) != 8*d.p.d || !k.Loss.valid() {
			return refuse("seen points do not fit the space")
		}
		d.seen[string(k.Key)] = k.Loss
	}
	if err := d.eng.check(tags); err != nil {
		return refuse("%v", err)
	}
	return d, nil
}

// validPoint reports whether u is a point of the unit cube of dimension d.
func validPoint(u []float64, d int) bool {
	return len(u) == d && !slices.ContainsFunc(u, func(x float64) bool { return !(x >= 0 && x <= 1) })
}
