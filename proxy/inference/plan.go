package inference

import (
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/outrigger-mesh/outrigger/proxy/inference/balance"
	"github.com/outrigger-mesh/outrigger/proxy/upstream"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// plan is a policy with the run-time state that belongs to its parts. A new policy
// pointer makes a new plan; state of parts that stay is carried over, state of parts
// that go is dropped with the old plan. Immutable apart from the state it points to.
type plan struct {
	policy  *policy.Policy
	models  map[*policy.Model]*modelPlan
	targets map[targetKey]*target
	gates   map[gateKey]*gate
	budgets map[string]*budget
	shares  map[string]*gate
	labels  labelSets // bounded by the policy
}

type modelPlan struct {
	inflight *gate // of all its versions, see Handler.bulkhead
	budget   *budget
	versions map[*policy.Version]*versionPlan
	// enrolment says who takes part in the experiment; nil = everybody.
	enrolment *Enrolment
}

type versionPlan struct {
	gate *gate
	// generation names one stretch of this version's life: what was cached in an earlier
	// one, before a quarantine or under another upstream name, is not found again.
	generation uint64
	targets    []*target
	endpoints  []policy.Endpoint // the same, as the policy has them
}

type gateKey struct{ model, version string }

// targetKey includes the breaker's settings: changed settings mean a new breaker.
type targetKey struct {
	gateKey
	region, address string
	failures        uint32
	openFor         time.Duration
}

// gate bounds concurrent requests of one version, by circuit_breakers and by
// what the version was seen to take if concurrency is adaptive. It also paces the look
// for outliers among the version's endpoints.
type gate struct {
	inflight atomic.Int64
	mu       sync.Mutex // of limit; held for arithmetic only
	limit    balance.Limit
	sweep    atomic.Int64 // Unix ns of the next look for outliers; 0 = none yet
	conns    places
	retries  atomic.Int64 // retries and hedges in flight
}

// full reports whether the adaptive limit refuses another request.
func (g *gate) full() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !g.limit.Allows(g.inflight.Load())
}

// learn adapts the limit to a request that took d.
func (g *gate) learn(d time.Duration, dropped bool) {
	n := g.inflight.Load()
	g.mu.Lock()
	g.limit = g.limit.Observe(d, n, dropped)
	g.mu.Unlock()
}

// eject looks for outliers among the endpoints of the version once per interval, on the
// goroutine of whatever request comes by.
func (v *versionPlan) eject(now time.Time, log *slog.Logger) {
	at := now.UnixNano()
	next := v.gate.sweep.Load()
	if at < next || len(v.targets) < balance.OutlierHosts || !v.gate.sweep.CompareAndSwap(next, at+int64(balance.OutlierInterval)) || next == 0 {
		return
	}
	ws := make([]balance.Window, len(v.targets))
	for i, t := range v.targets {
		ws[i] = balance.Window{OK: t.good.Swap(0), Failed: t.bad.Swap(0), Ejected: t.out(at)}
		if !ws[i].Ejected && ws[i].OK >= balance.OutlierRequests && ws[i].Failed == 0 {
			t.outRow.Store(0)
		}
	}
	for _, i := range balance.Outliers(ws) {
		t := v.targets[i]
		row := min(t.outRow.Add(1), 10)
		t.outTill.Store(at + row*int64(balance.OutlierEject))
		log.Warn("endpoint ejected", "model", t.key.model, "version", t.key.version, "region", t.key.region, "endpoint", t.key.address,
			"ok", ws[i].OK, "failed", ws[i].Failed, "for", time.Duration(row)*balance.OutlierEject)
	}
}

func (g *gate) enter(limit uint32) bool {
	if g.inflight.Add(1) > int64(limit) {
		g.inflight.Add(-1)
		return false
	}
	return true
}

func (g *gate) leave() { g.inflight.Add(-1) }

// target is one endpoint of one version with its breaker and load.
type target struct {
	key      targetKey
	endpoint policy.Endpoint
	breaker  *gobreaker.TwoStepCircuitBreaker[struct{}]
	inflight atomic.Int64
	silent   atomic.Int64  // of them, attempts that have neither failed nor begun to answer
	openTill atomic.Int64  // Unix ns until which the breaker refuses; 0 = not open
	state    atomic.Int32  // the breaker's gobreaker.State as last entered: it is asked without its lock
	ewma     atomic.Uint64 // float64 bits: seconds to the response head; 0 = not measured
	peak     atomic.Uint64 // balance.Peak of the same

	good, bad atomic.Uint64 // attempts of the present window of outlier detection
	outTill   atomic.Int64  // Unix ns until which it is ejected as an outlier
	outRow    atomic.Int64  // ejections in a row

	dial   string       // host:port, for the pool of connections
	misfit atomic.Int64 // Unix ns until which calls are not carried by a loop
	bound  atomic.Pointer[bound]
}

// out reports whether the endpoint is ejected at now (Unix ns).
func (t *target) out(now int64) bool { return t.outTill.Load() > now }

// judge counts an attempt for outlier detection.
func (t *target) judge(ok bool) {
	if ok {
		t.good.Add(1)
	} else {
		t.bad.Add(1)
	}
}

// ewmaWeight of a new observation: about the last ten count.
const ewmaWeight = 0.2

// failurePenalty is what a failed attempt counts as in the latency estimate, so that an
// endpoint that fails fast does not look attractive.
const failurePenalty = time.Second

func (t *target) observe(d time.Duration, now time.Time) {
	for {
		old := t.peak.Load()
		if t.peak.CompareAndSwap(old, uint64(balance.Peak(old).Observe(d, now))) {
			break
		}
	}
	for {
		old := t.ewma.Load()
		next := d.Seconds()
		if old != 0 {
			was := math.Float64frombits(old)
			next = was + ewmaWeight*(next-was)
		}
		if t.ewma.CompareAndSwap(old, math.Float64bits(next)) {
			return
		}
	}
}

func (t *target) latency() float64 { return math.Float64frombits(t.ewma.Load()) }

// budget is a token bucket without a clock: every logical request puts in a fifth of a
// retry, every retry takes one out. So retries are at most 20 % of requests, plus the
// reserve that lets an idle sidecar retry at all.
type budget struct{ milli atomic.Int64 }

const (
	budgetPerRequest = 200    // thousandths of a retry
	budgetReserve    = 10_000 // also the initial level
)

func newBudget() *budget {
	b := &budget{}
	b.milli.Store(budgetReserve)
	return b
}

func (b *budget) deposit() {
	for {
		old := b.milli.Load()
		if old >= budgetReserve || b.milli.CompareAndSwap(old, min(old+budgetPerRequest, budgetReserve)) {
			return
		}
	}
}

func (b *budget) withdraw() bool {
	for {
		old := b.milli.Load()
		if old < 1000 {
			return false
		}
		if b.milli.CompareAndSwap(old, old-1000) {
			return true
		}
	}
}

// empty reports whether the next retry would be refused.
func (b *budget) empty() bool { return b.milli.Load() < 1000 }

// planFor returns the plan of p, compiling it when p is new.
func (h *Handler) planFor(p *policy.Policy) *plan {
	if cur := h.plan.Load(); cur != nil && cur.policy == p {
		return cur
	}
	h.compile.Lock()
	defer h.compile.Unlock()
	old := h.plan.Load()
	if old != nil && old.policy == p {
		return old
	}
	next := h.compilePlan(p, old)
	h.plan.Store(next)
	h.endStretches(old, next)
	return next
}

func (h *Handler) compilePlan(p *policy.Policy, old *plan) *plan {
	next := &plan{
		policy: p, models: make(map[*policy.Model]*modelPlan, len(p.Models)),
		targets: map[targetKey]*target{}, gates: map[gateKey]*gate{}, budgets: map[string]*budget{}, shares: map[string]*gate{},
	}
	if old == nil {
		old = &plan{}
	}
	for i := range p.Models {
		m := &p.Models[i]
		mp := &modelPlan{budget: carry(old.budgets, next.budgets, m.Name, newBudget), versions: map[*policy.Version]*versionPlan{},
			inflight: carry(old.shares, next.shares, m.Name, func() *gate { return &gate{} })}
		next.models[m] = mp
		var err error
		if mp.enrolment, err = CompileEnrolment(&m.Enrolment); err != nil {
			h.log.Error("nobody takes part in the experiment: its target does not compile", "model", m.Name, "experiment", m.Experiment, "error", err)
		}
		for j := range m.Versions {
			v := &m.Versions[j]
			gk := gateKey{m.Name, v.Name}
			vp := &versionPlan{gate: carry(old.gates, next.gates, gk, func() *gate { return &gate{} }), endpoints: v.Endpoints, generation: h.generationOf(old, m.Name, v)}
			for _, e := range v.Endpoints {
				k := targetKey{gk, e.Region, e.Address, orDefault(v.ConsecutiveFailures, policy.DefaultConsecutiveFailures), orDefault(v.OpenFor, policy.DefaultOpenFor)}
				vp.targets = append(vp.targets, carry(old.targets, next.targets, k, func() *target { return newTarget(k, e, h.log) }))
			}
			mp.versions[v] = vp
		}
	}
	return next
}

// generationOf keeps a version's generation as long as it serves under the same name at
// its servers, without interruption.
func (h *Handler) generationOf(old *plan, model string, v *policy.Version) uint64 {
	if !v.Quarantined && old.policy != nil {
		if m := old.policy.Model(model); m != nil {
			if was := m.Version(v.Name); was != nil && !was.Quarantined && was.Upstream == v.Upstream {
				return old.models[m].versions[was].generation
			}
		}
	}
	h.generations++
	return h.generations
}

// carry takes a piece of state from the old plan to the new, or makes it.
func carry[K comparable, V any](old, next map[K]V, k K, make func() V) V {
	if v, ok := next[k]; ok {
		return v
	}
	v, ok := old[k]
	if !ok {
		v = make()
	}
	next[k] = v
	return v
}

func orDefault[T comparable](v, d T) T {
	var zero T
	if v == zero {
		return d
	}
	return v
}

func newTarget(k targetKey, e policy.Endpoint, log *slog.Logger) *target {
	t := &target{key: k, endpoint: e, dial: upstream.AddressOf(e.Address)}
	t.breaker = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		Name:        e.Address,
		MaxRequests: 1, // one probe at a time while half open
		Timeout:     k.openFor,
		// Failures are fast and successes slow. In the order of their ends a stall looks like
		// a dead endpoint, because what will succeed is still under way: the failures must be
		// as many as what might yet prove them wrong.
		ReadyToTrip: func(c gobreaker.Counts) bool {
			return c.ConsecutiveFailures >= k.failures && int64(c.ConsecutiveFailures) >= t.silent.Load()
		},
		IsExcluded: func(err error) bool { return err == errExcluded },
		// Called with the breaker's lock held: store and log, nothing else.
		OnStateChange: func(_ string, from, to gobreaker.State) {
			until := int64(0)
			if to == gobreaker.StateOpen {
				until = time.Now().Add(k.openFor).UnixNano()
			}
			t.openTill.Store(until)
			t.state.Store(int32(to))
			log.Info("breaker", "model", k.model, "version", k.version, "region", k.region, "endpoint", k.address, "from", from.String(), "to", to.String())
		},
	})
	return t
}
