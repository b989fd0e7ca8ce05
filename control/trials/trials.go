// Package trials judges running experiments: it puts together per unit what sidecars
// report, and appends to the log what the frozen plan's rule says.
//
//	t, err := trials.New(trials.Options{Log: log, Facts: projection.Facts, Ready: projection.Ready()})
//	monitor.Options{Outcomes: t.Ingest}
//	go t.Run(ctx)
//
// # Evidence
//
// Ingest takes deltas that were counted for the first time (package monitor tells
// repetitions by reporter and sequence). Of a running, planned experiment it keeps one
// record per unit: arm, stratum (region × weight epoch), requests, failures,
// milliseconds. Only weight epochs whose split is the experiment's count; requests that
// no split assigned never do. A unit seen in several arms is counted and left out; one
// seen in several strata counts in the earliest. Reports that arrive up to Late after
// the end still count for the results, not for the decision, which stands.
//
// A report's units count together: a look that falls into the middle of one leaves them for
// the next, so that arms are not seen unequal which are not.
//
// Record adds outcomes that come from elsewhere and later (an order, a rating): values of
// the metrics that the plan names and sidecars do not report. They belong to units that
// were exposed, and an outcome with an id counts once; the last 131,072 ids of an
// experiment are remembered. An outcome that says how well a version answers (its metric is one
// of deploy.Reported) is handed on to Answers: for the version of the arm; or, without an
// experiment, for the version it names or its unit is assigned to.
//
// # Decisions
//
// Every Tick experiments.Step judges each experiment of which something new is known or
// whose time is up. What follows is one atomic append that expects the experiment's and
// the model's last known sequence, so on any number of replicas an experiment concludes
// once:
//
//	experiment/<name>  ExperimentChanged  concluded or stopped, with all numbers
//	model/<name>       AliasMoved …       challenger released; if it ships: last_good, champion
//
// # Failure
//
// Crash: evidence is stored every SaveEvery as one snapshot, with the last sequence of
// every reporter, so that what a reporter sends again after a restart is counted once. What
// was counted after the last snapshot is lost, from all arms alike; an orderly end stores
// all. A snapshot that cannot be read is logged and evidence starts empty, while the plan,
// its looks and the time since the start are in the log. Counting pauses while a snapshot
// is copied in memory, for longer the more units there are. Partition from the log: the append is
// tried again every Tick. Several replicas judge what is reported to them alone.
// Overload: MaxUnits bounds the units of all experiments together (about 100 bytes
// each; one with outcomes counts for several); a report whose units might not all find room brings
// none, whatever their arm (if others do not take the last of it meanwhile), and they are counted. Bad input: rows that
// cannot be (more failures than requests, negative or infinite time) are left out and
// counted.
//
// All methods may be called concurrently.
package trials

import (
	"cmp"
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/experiments"
)

// appendTimeout bounds one append, so that a stuck log delays other experiments by no more.
const appendTimeout = 5 * time.Second

// Options of a Service. Log, Facts and Ready are required.
type Options struct {
	Log   eventlog.Appender
	Facts func() *facts.Facts
	Ready <-chan struct{} // closed once the facts hold the whole log
	// Tick is how often experiments are judged. Default 1 s.
	Tick time.Duration
	// Late is how long after the end reports still count. Default 10 min.
	Late time.Duration
	// Snapshots keeps evidence over a restart; nil = it starts empty. SaveEvery is how often
	// it is stored while there is news, default 30 s, and at the end of Run.
	Snapshots Snapshots
	SaveEvery time.Duration
	// Answers is told outcomes that say how well a version answers, and reports whether one
	// was told before, by its id. It must not block. nil = nobody wants to know.
	Answers func(Answer) (repeated bool, err error)
	// MaxUnits bounds the units of all experiments. Default 1 000 000.
	MaxUnits int
	Now      func() time.Time // default time.Now
	Logger   *slog.Logger     // default: discard
}

// Service holds the evidence. Build it with New, start it with Run.
type Service struct {
	opts   Options
	budget atomic.Int64
	loaded chan struct{}
	news   atomic.Bool // something to store

	// counting is held for reading while something is counted, and for writing while all
	// of it is copied.
	counting sync.RWMutex
	heardMu  sync.Mutex
	heard    map[string]heard // by reporter; guarded by heardMu

	mu     sync.RWMutex
	trials map[string]*trial // by experiment
}

// trial is one experiment with its evidence.
type trial struct {
	name, model string
	arms        []experiments.Weighted
	metrics     []view
	ledger      *ledger
	ended       atomic.Int64 // unix nanoseconds, 0 while running
}

// New starts nothing. The error has kind Invalid if a required option is missing.
func New(o Options) (*Service, error) {
	if o.Log == nil || o.Facts == nil || o.Ready == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "trials needs Log, Facts and Ready; one is nil")
	}
	o.Tick = cmp.Or(o.Tick, time.Second)
	o.SaveEvery = cmp.Or(o.SaveEvery, 30*time.Second)
	o.Late = cmp.Or(o.Late, 10*time.Minute)
	o.MaxUnits = cmp.Or(o.MaxUnits, 1_000_000)
	if o.MaxUnits < 0 || o.Tick < 0 || o.Late < 0 {
		return nil, outrigger.Errorf(outrigger.Invalid, "MaxUnits %d, Tick %v and Late %v must not be negative", o.MaxUnits, o.Tick, o.Late)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Service{opts: o, trials: map[string]*trial{}, loaded: make(chan struct{}), heard: map[string]heard{}}
	s.budget.Store(int64(o.MaxUnits))
	return s, nil
}

// Ingest counts a delta's unit rows. It must be called once per delta; the delta is
// neither kept nor modified.
func (s *Service) Ingest(d *pb.Delta) {
	if len(d.GetOutcomes()) == 0 {
		return
	}
	s.counting.RLock()
	defer s.counting.RUnlock()
	if s.repeated(d.GetReporter(), d.GetSequence(), s.opts.Now()) {
		return
	}
	s.news.Store(true)
	f, rows := s.opts.Facts(), 0
	for _, o := range d.GetOutcomes() {
		rows += len(o.GetUnits())
	}
	turns := map[*ledger]turn{}
	defer func() {
		for _, t := range turns {
			t.end()
		}
	}()
	for _, o := range d.GetOutcomes() {
		if len(o.GetUnits()) == 0 && o.GetUnitsDropped() == 0 {
			continue
		}
		t, arm := s.find(f, o)
		if t == nil {
			continue
		}
		if end := t.ended.Load(); end != 0 && s.opts.Now().Sub(time.Unix(0, end)) > s.opts.Late {
			t.ledger.late.Add(uint64(len(o.GetUnits())))
			continue
		}
		now, ok := turns[t.ledger]
		if !ok {
			now = t.ledger.begin(rows)
			turns[t.ledger] = now
		}
		now.add(arm, experiments.Stratum{Region: o.GetRegion(), Epoch: o.GetWeightEpoch()}, o)
	}
}

// find returns the experiment that an outcome is evidence for, and the arm's number.
func (s *Service) find(f *facts.Facts, o *pb.OutcomeDelta) (*trial, uint16) {
	name := f.ExperimentAt(o.GetModel(), o.GetWeightEpoch())
	if name == "" {
		return nil, 0
	}
	t := s.trial(f.Experiment(name))
	if t == nil {
		return nil, 0
	}
	for i, a := range t.arms {
		if a.Name == o.GetArm() {
			return t, uint16(i)
		}
	}
	return nil, 0
}

// trial finds an experiment's evidence, or begins to collect it if it is running.
func (s *Service) trial(e *facts.Experiment) *trial {
	s.mu.RLock()
	t := s.trials[e.Name]
	s.mu.RUnlock()
	if t != nil || e.State != facts.Running || e.Life.Plan == nil {
		return t
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if t = s.trials[e.Name]; t != nil {
		return t
	}
	t = s.newTrial(e)
	s.trials[e.Name] = t
	return t
}

func (s *Service) newTrial(e *facts.Experiment) *trial {
	views, named := viewsOf(e.Life.Plan)
	t := &trial{name: e.Name, model: e.Model, metrics: views, ledger: newLedger(&s.budget, named)}
	for _, a := range e.Arms {
		t.arms = append(t.arms, experiments.Weighted{Name: a.Name, Weight: a.Weight})
	}
	t.ledger.changed.Store(true)
	return t
}

// Loaded is closed once the evidence of the last life has been taken up: reports that come
// earlier must be refused, so that they are sent again.
func (s *Service) Loaded() <-chan struct{} { return s.loaded }

// Run judges until ctx ends and then returns nil. Call it once.
func (s *Service) Run(ctx context.Context) error {
	select {
	case <-s.opts.Ready: // half of an experiment's events would be judged as if they were all
	case <-ctx.Done():
		return nil
	}
	s.load(ctx)
	close(s.loaded)
	tick := time.NewTicker(s.opts.Tick)
	defer tick.Stop()
	saved := s.opts.Now()
	for {
		select {
		case <-ctx.Done():
			s.save(context.WithoutCancel(ctx))
			return nil
		case <-tick.C:
			s.look(ctx)
			if now := s.opts.Now(); now.Sub(saved) >= s.opts.SaveEvery {
				saved = now
				s.save(ctx)
			}
		}
	}
}

// look judges what is running and lets go of what ended long ago.
func (s *Service) look(ctx context.Context) {
	f, now := s.opts.Facts(), s.opts.Now()
	for _, e := range f.Experiments() {
		if e.State == facts.Running && e.Life.Plan != nil {
			s.judge(ctx, f, e, now)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, t := range s.trials {
		e := f.Experiment(name)
		switch {
		case e == nil || e.State == facts.Running:
		case t.ended.Load() == 0:
			t.ended.Store(e.Life.EndedAt.UnixNano())
		case now.Sub(e.Life.EndedAt) > s.opts.Late:
			t.ledger.release()
			delete(s.trials, name)
		}
	}
}

func (s *Service) judge(ctx context.Context, f *facts.Facts, e *facts.Experiment, now time.Time) {
	t := s.trial(e)
	timeUp := !now.Before(e.Life.StartedAt.Add(e.Life.Plan.MaxDuration))
	// Before the minimum duration only stops happen, and they need new evidence too; at
	// that moment a verdict may fall due without any.
	fresh := t.ledger.changed.Swap(false)
	due := now.Sub(e.Life.StartedAt.Add(e.Life.Plan.MinDuration)).Abs() <= 2*s.opts.Tick
	if !fresh && !timeUp && !due {
		return
	}
	v, err := s.verdict(t, e, now)
	if err != nil {
		s.opts.Logger.Error("experiment not judged", "experiment", e.Name, "error", err)
		return
	}
	if len(v.Next) == 0 {
		return
	}
	writes, err := s.writes(f, e, t, v)
	if err == nil {
		actx, cancel := context.WithTimeout(ctx, appendTimeout)
		defer cancel()
		_, err = s.opts.Log.Append(actx, "", writes...)
	}
	if err != nil && !outrigger.IsKind(err, outrigger.Conflict) {
		s.opts.Logger.Warn("decision on experiment not recorded; trying again", "experiment", e.Name, "error", err)
	}
	if err != nil {
		t.ledger.changed.Store(true) // somebody was faster, or the log is away: look again
	}
}

func (s *Service) verdict(t *trial, e *facts.Experiment, now time.Time) (experiments.Verdict, error) {
	data, err := t.ledger.evidence(t.arms, t.metrics)
	if err != nil {
		return experiments.Verdict{}, err
	}
	return experiments.Step(e.Life, data, now)
}
