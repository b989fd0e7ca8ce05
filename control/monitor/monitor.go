// Package monitor watches what sidecars report and acts on it: it counts outcomes,
// feeds the detectors of running rollouts, and appends what follows (advance, roll back,
// complete, alert) to the log.
//
//	m, err := monitor.New(monitor.Options{Log: log, Rollouts: facts, Ledger: ads})
//	pb.RegisterReportsServer(server, m)
//	go m.Run(ctx)
//
// # Reports
//
// Push takes mergeable deltas. Each is counted once per (reporter, sequence) and
// acknowledged after it has been counted; a sequence that is not above the reporter's
// last is acknowledged again and not counted. Sequences may skip: what a reporter sent
// to another replica is not awaited. A delta must carry everything its reporter has seen
// since its previous one, successes and both versions included, also when it is sent
// early because of a failure; evidence weighs failures against requests of the same
// span.
//
// Distinct failed units are counted per cell (model, version, region, weight epoch, and
// whether the split assigned them) once in 60 s. Failures without unit hashes count one by
// one. Requests under the arms "unassigned" and "last-good" count for the totals of their
// version and for no rollout: a sample is an assigned unit. Those under "shadow-copy" are
// copies that a shadow version answered to nobody, and count apart.
//
// # Decisions
//
// Every Tick, and within a quarter of it after a failure arrives, each running rollout's
// new counts go to its deploy.Detector and deploy.Step decides. The outcome is one
// atomic append that expects the rollout's last known sequence and carries a request id
// made of rollout, sequence and decision, so any number of replicas may run a Monitor on
// one log and each step is taken once. A rollback is
//
//	rollout/<id>  RollbackStarted      evidence, first_bad_at, decided_at, from, to
//	model/<name>  ModelVersionState    candidate quarantined
//	alert/<id>    AlertRaised          critical, with the numbers
//
// in that order; sidecars have it once they acknowledge a policy position at or after
// RollbackStarted. When all have, or after AckTimeout with the laggards named, follow
// RollbackCompleted and RolloutEnded. A laggard has by then been cut off for longer than
// its dead-man lease and has returned to the last good version by itself.
//
// Gates and rollback conditions of a phase are judged in the same look, over the counts of
// the candidate since its weight last changed: see deploy.Decide for the order, and
// deploy.Metrics for what they may name. Comparisons with the last good version are made
// region by region and weighted by where the candidate served, so that serving in a
// worse region is no difference. What sidecars cannot see (satisfaction, accuracy) comes by
// Score, from applications, and counts for the version that answered; a unit counts once, with
// the mean of its values. cost_per_request is the model's formula over what sidecars count,
// per logical request in the formula's currency. A held rollout is watched, too: it does not advance, but
// a proven regression rolls it back. A graceful rollback takes its steps here, and a drill
// ends when every sidecar has acknowledged it.
//
// # Freshness
//
// A node that finds an entry it served as current outdated reports it; the alert
// freshness-<node> (severity high) says which, at most once a minute per node with the
// number of them.
//
// # Failure
//
// Crash: counts and evidence live in memory and start empty, which can only delay a
// decision, never cause one; transitions resume from the log's events. Partition from
// the log: decisions are retried every Tick with the same request id. Several replicas
// count what is reported to them alone; a delta resent to another replica because its
// acknowledgement was lost counts on both. Overload: reporters, cells, nodes and units
// are bounded by Options. A new reporter beyond the bound is refused (Exhausted); a cell
// beyond it is dropped, counted and logged; beyond MaxUnits a cell's failures count one
// by one. Bad input: a delta without reporter or sequence is refused (Invalid); a cell
// or sketch that does not make sense is dropped and counted, and the rest of its delta
// is used, because it would be resent for ever otherwise.
//
// All methods may be called concurrently.
package monitor

import (
	"cmp"
	"context"
	"log/slog"
	"sync"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/deploy"
)

// RolloutSource knows the rollouts that have not ended: running and rolling back. The
// values are a projection of the log and may lag behind it.
type RolloutSource interface {
	RunningRollouts() []deploy.Rollout
}

// Ledger knows which policy position each sidecar acknowledged: acked are the nodes at
// or past position, laggards those that are not, done is true when there are none of
// the latter.
type Ledger interface {
	Acked(position uint64) (acked, laggards []string, done bool)
}

// Options of a Monitor. Log, Rollouts and Ledger are required; zero values of the rest
// get the defaults named.
type Options struct {
	Log      eventlog.Appender
	Rollouts RolloutSource
	Ledger   Ledger
	// Tick is how often rollouts are looked at. Default 1 s.
	Tick time.Duration
	// AckTimeout is how long a rollback waits for acknowledgements before it names the
	// laggards and ends; it must not be below the sidecars' dead-man lease. Default 10 s.
	AckTimeout time.Duration
	// Detector overrides the detector's settings; Alpha, Horizon and WeightEpoch are set
	// per rollout.
	Detector deploy.Config
	// Experiment says whether an experiment has concluded for a candidate of a model; nil =
	// no experiment is known.
	Experiment func(name, model, candidate string) (deploy.Outcome, string)
	// Touch is told which sessions were used; at is the end of the window they were used
	// in. It is called without locks held and must not block. May be nil.
	Touch func(tenant, session string, at time.Time)
	// Outcomes is told every delta, once, after it was counted. It is called without locks
	// held, must not block and not keep the delta. May be nil.
	Outcomes func(*pb.Delta)
	// Cost is the cost formula of a model (see CostNames), "" if it has none; nil = none has.
	Cost func(model string) string
	// MaxReporters bounds reporters and nodes each (default 10 000); one that has been
	// silent for 15 minutes makes room. MaxCells bounds cells (default 2 048); one that
	// has been silent for 10 minutes makes room. MaxUnits bounds the failed units
	// remembered per cell and minute (default 65 536).
	// MaxScores bounds the units of which scores are remembered, over all versions and
	// metrics (default 200 000, some 40 bytes each; one is two during a rollout).
	MaxReporters, MaxCells, MaxUnits, MaxScores int
	Now                                         func() time.Time // default time.Now
	Logger                                      *slog.Logger     // default: discard
	Meter                                       metric.Meter     // default: no metrics
}

// How long something must be silent before it may be forgotten to make room.
const (
	reporterIdle = 15 * time.Minute
	cellIdle     = 10 * time.Minute
)

// appendTimeout bounds one append, so that a stuck log delays other rollouts by no more.
const appendTimeout = 5 * time.Second

// ackPoll is how often acknowledgements are looked at while a rollback is under way.
const ackPoll = 20 * time.Millisecond

// Monitor is the Reports server and the loop that acts. Build it with New, start it with
// Run; it takes reports and answers queries before and after as well.
type Monitor struct {
	pb.UnimplementedReportsServer
	opts     Options
	inst     instruments
	wake     chan struct{} // capacity 1: failures arrived
	counts   *counts
	scores   *scores
	stale    staleness
	formulas formulas

	mu    sync.Mutex
	looks map[string]look // by rollout; replaced, never modified

	// Only Run's goroutine.
	watches map[string]*watch
}

// New starts nothing. The error has kind Invalid if a required option is missing, and is
// that of the Meter otherwise.
func New(opts Options) (*Monitor, error) {
	if opts.Log == nil || opts.Rollouts == nil || opts.Ledger == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "monitor needs Log, Rollouts and Ledger; one is nil")
	}
	opts.Tick = cmp.Or(opts.Tick, time.Second)
	opts.AckTimeout = cmp.Or(opts.AckTimeout, 10*time.Second)
	opts.MaxReporters = cmp.Or(opts.MaxReporters, 10_000)
	opts.MaxCells = cmp.Or(opts.MaxCells, 2_048)
	opts.MaxUnits = cmp.Or(opts.MaxUnits, 65_536)
	opts.MaxScores = cmp.Or(opts.MaxScores, 200_000)
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.Meter == nil {
		opts.Meter = noop.Meter{}
	}
	inst, err := newInstruments(opts.Meter)
	if err != nil {
		return nil, err
	}
	counts, err := newCounts(opts)
	if err != nil {
		return nil, err
	}
	return &Monitor{opts: opts, inst: inst, counts: counts, scores: newScores(opts), wake: make(chan struct{}, 1),
		looks: make(map[string]look), watches: make(map[string]*watch)}, nil
}

// Run looks at the rollouts until ctx ends and then returns nil. Call it once.
func (m *Monitor) Run(ctx context.Context) error {
	timer := time.NewTimer(m.opts.Tick)
	defer timer.Stop()
	for {
		// due is when the next look happens at the latest; a failure brings it forward,
		// but not closer than a quarter tick to the last look.
		last := time.Now()
		due := last.Add(m.opts.Tick)
		if m.lookAll(ctx) {
			due = last.Add(min(m.opts.Tick, ackPoll))
		}
		timer.Reset(time.Until(due))
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				return nil
			case <-timer.C:
				waiting = false
			case <-m.wake:
				if early := last.Add(m.opts.Tick / 4); early.Before(due) {
					due = early
					timer.Reset(time.Until(due))
				}
			}
		}
	}
}

// lookAll takes one look at every rollout and reports whether a rollback is under way.
func (m *Monitor) lookAll(ctx context.Context) (rollingBack bool) {
	m.alertStale(ctx)
	rollouts := m.opts.Rollouts.RunningRollouts()
	m.forgetAllBut(ctx, rollouts)
	for i := range rollouts {
		r := &rollouts[i]
		w := m.watches[r.ID]
		if w == nil {
			w = newWatch(r.ID)
			m.watches[r.ID] = w
		}
		if r.Sequence <= w.acted {
			// The log has moved on and the projection has not seen it yet.
			rollingBack = rollingBack || w.rolling
			continue
		}
		switch r.State {
		case deploy.Running, deploy.Held, deploy.Draining:
			w.rolling = false // we lost a race for the rollback, and the winner chose otherwise
			if m.judge(ctx, r, w); r.DrillAt != 0 && r.Sequence > w.acted {
				m.drill(ctx, r, w)
				rollingBack = true
			}
		case deploy.RollingBack:
			w.rolling = true
			m.settle(ctx, r, w)
		}
		rollingBack = rollingBack || w.rolling
	}
	return rollingBack
}

// forgetAllBut drops the watches of rollouts that have ended.
func (m *Monitor) forgetAllBut(ctx context.Context, rollouts []deploy.Rollout) {
	live := make(map[string]bool, len(rollouts))
	for i := range rollouts {
		live[rollouts[i].ID] = true
	}
	for id, w := range m.watches {
		if live[id] {
			continue
		}
		if w.alerted && !m.resolveAlert(ctx, w, "the rollout ended") {
			continue // try again at the next look
		}
		delete(m.watches, id)
		m.mu.Lock()
		delete(m.looks, id)
		m.mu.Unlock()
	}
}

// Evidence returns the evidence on a rollout as of the last look, the combination of all
// strata first; nil if the rollout is not running or nothing was seen yet. The caller
// must not modify it.
func (m *Monitor) Evidence(rolloutID string) []*pb.Evidence {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.looks[rolloutID].evidence
}

// Gates returns what the gates of the present phase said at the last look and what is
// waited for; nothing if the rollout is not live. The caller must not modify it.
func (m *Monitor) Gates(rolloutID string) (gates []*pb.RolloutGateDecided, waiting string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := m.looks[rolloutID]
	return l.gates, l.waiting
}

// look is what the last look at a rollout found, for answers.
type look struct {
	evidence []*pb.Evidence
	gates    []*pb.RolloutGateDecided
	waiting  string
}

func (m *Monitor) publish(r *deploy.Rollout, d deploy.Decision) {
	l := look{evidence: d.Evidence, waiting: d.Reason}
	for _, g := range d.Gates {
		l.gates = append(l.gates, g.PB(r.Phase))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.looks[r.ID] = l
}

// instruments are the monitor's own metrics.
type instruments struct {
	deltas    metric.Int64Counter
	dropped   metric.Int64Counter
	decisions metric.Int64Counter
}

func newInstruments(meter metric.Meter) (i instruments, err error) {
	if i.deltas, err = meter.Int64Counter("outrigger.monitor.deltas",
		metric.WithDescription("Report deltas by result: counted, duplicate, refused"), metric.WithUnit("{delta}")); err != nil {
		return i, err
	}
	if i.dropped, err = meter.Int64Counter("outrigger.monitor.dropped",
		metric.WithDescription("Parts of deltas that were not counted, by reason: cell, sketch, cells_full, units_full, touch"), metric.WithUnit("{part}")); err != nil {
		return i, err
	}
	i.decisions, err = meter.Int64Counter("outrigger.monitor.decisions",
		metric.WithDescription("Steps appended to rollouts, by kind"), metric.WithUnit("{decision}"))
	return i, err
}
