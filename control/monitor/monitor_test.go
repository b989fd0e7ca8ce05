package monitor

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/deploy"
)

// world is one log with any number of monitors on it, inside a synctest bubble.
type world struct {
	t   *testing.T
	log *memory.Log
	seq map[string]uint64 // next sequence per reporter

	mu     sync.Mutex
	acked  map[string]uint64 // policy position per sidecar
	sight  uint64            // the projection has not seen events after this one; 0 = has seen all
	failed error             // what Append answers, if not nil
	tries  int               // calls of Append
}

func newWorld(t *testing.T) *world {
	return &world{t: t, log: memory.New(), seq: map[string]uint64{}, acked: map[string]uint64{}}
}

// RunningRollouts folds the log, as a projection that may lag would.
func (w *world) RunningRollouts() []deploy.Rollout {
	w.mu.Lock()
	defer w.mu.Unlock()
	head := w.log.Head()
	if w.sight > 0 {
		head = w.sight
	}
	r := deploy.Rollout{}
	for ev, err := range w.log.ReadAll(context.Background(), 1) {
		if err != nil {
			w.t.Error(err)
		}
		if ev.GetPosition() > head || !strings.HasPrefix(ev.GetAggregate(), deploy.AggregatePrefix) {
			continue
		}
		if err := r.Apply(ev); err != nil {
			w.t.Errorf("illegal event in the log: %v", err)
		}
	}
	if r.State == "" || r.State.Ended() {
		return nil
	}
	return []deploy.Rollout{r}
}

// Acked implements Ledger.
func (w *world) Acked(position uint64) (acked, laggards []string, done bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range []string{"side-1", "side-2", "side-3"} {
		at, known := w.acked[name]
		switch {
		case !known:
		case at >= position:
			acked = append(acked, name)
		default:
			laggards = append(laggards, name)
		}
	}
	return acked, laggards, len(laggards) == 0
}

func (w *world) ack(name string, position uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.acked[name] = position
}

func (w *world) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

func (w *world) Append(ctx context.Context, id string, writes ...eventlog.Write) (eventlog.Appended, error) {
	w.mu.Lock()
	err := w.failed
	w.tries++
	w.mu.Unlock()
	if err != nil {
		return eventlog.Appended{}, err
	}
	return w.log.Append(ctx, id, writes...)
}

func (w *world) monitor(change ...func(*Options)) *Monitor {
	opts := Options{Log: w, Rollouts: w, Ledger: w}
	for _, f := range change {
		f(&opts)
	}
	m, err := New(opts)
	if err != nil {
		w.t.Fatal(err)
	}
	return m
}

// run starts monitors and returns what stops them and waits.
func run(t *testing.T, ms ...*Monitor) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, m := range ms {
		wg.Go(func() {
			if err := m.Run(ctx); err != nil {
				t.Errorf("Run = %v", err)
			}
		})
	}
	return func() { cancel(); wg.Wait() }
}

// start appends RolloutStarted: v1 → v2 in phases of 10 %, 10 % and 50 %.
func (w *world) start() {
	phase := func(name string, weight uint32) *pb.RolloutPhase {
		return &pb.RolloutPhase{Name: name, Weight: weight, MinDuration: durationpb.New(10 * time.Second), MinRequests: 50}
	}
	w.append("rollout/r1", &pb.Event{Payload: &pb.Event_RolloutStarted{RolloutStarted: &pb.RolloutStarted{
		Model: "m", Candidate: "v2", LastGood: "v1", Alpha: .01,
		Phases: []*pb.RolloutPhase{phase("canary", 1000), phase("again", 1000), phase("half", 5000)}}}})
}

func (w *world) append(aggregate string, ev *pb.Event) {
	w.t.Helper()
	if _, err := w.log.Append(context.Background(), "", eventlog.Write{Aggregate: aggregate, Expect: eventlog.Any, Events: []*pb.Event{ev}}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) epoch() uint64 {
	if rs := w.RunningRollouts(); len(rs) > 0 {
		return rs[0].WeightEpoch
	}
	return 0
}

// second is one second of traffic of one region as a delta: 100 requests, a tenth of
// them to the candidate. Failed units are fresh unless named.
func (w *world) second(reporter, region string, epoch uint64, badCandidate, badBaseline int) *pb.Delta {
	w.seq[reporter]++
	n := w.seq[reporter]
	units := func(bad int, salt uint32) (out []uint32) {
		for i := range bad {
			out = append(out, salt+uint32(n)*100+uint32(i))
		}
		return out
	}
	now := uint64(time.Now().UnixNano())
	cell := func(version string, requests uint64, bad int, salt uint32) *pb.OutcomeDelta {
		o := &pb.OutcomeDelta{Model: "m", Version: version, Region: region, WeightEpoch: epoch,
			Requests: requests, Failures: uint64(bad), Attempts: requests, FailedUnits: units(bad, salt)}
		if bad > 0 {
			o.FirstFailureUnixNano = now
		}
		return o
	}
	return &pb.Delta{Reporter: reporter, Sequence: n, Node: &pb.Node{Id: reporter},
		Outcomes: []*pb.OutcomeDelta{cell("v2", 10, badCandidate, 1<<20), cell("v1", 90, badBaseline, 1<<21)}}
}

func ingest(t *testing.T, m *Monitor, d *pb.Delta) {
	t.Helper()
	if err := m.Ingest(context.Background(), d); err != nil {
		t.Fatal(err)
	}
}

// story returns the log's events in one line each, without those of `start`.
func (w *world) story() string {
	var b strings.Builder
	for ev, err := range w.log.ReadAll(context.Background(), 2) {
		if err != nil {
			w.t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s ", ev.GetAggregate())
		switch p := ev.GetPayload().(type) {
		case *pb.Event_RolloutAdvanced:
			fmt.Fprintf(&b, "advanced to %d", p.RolloutAdvanced.GetPhase())
		case *pb.Event_RollbackStarted:
			fmt.Fprintf(&b, "rollback started %s to %s", p.RollbackStarted.GetFromVersion(), p.RollbackStarted.GetToVersion())
		case *pb.Event_RollbackCompleted:
			c := p.RollbackCompleted
			fmt.Fprintf(&b, "rollback completed push %d acked %d laggards %v", c.GetPush(), c.GetAcked(), c.GetLaggards())
		case *pb.Event_RolloutEnded:
			fmt.Fprintf(&b, "ended %s", p.RolloutEnded.GetOutcome())
		case *pb.Event_ModelVersionState:
			fmt.Fprintf(&b, "%s %s", p.ModelVersionState.GetVersion(), p.ModelVersionState.GetState())
		case *pb.Event_AliasMoved:
			fmt.Fprintf(&b, "%s from %s to %s", p.AliasMoved.GetAlias(), p.AliasMoved.GetFrom(), p.AliasMoved.GetTo())
		case *pb.Event_AlertRaised:
			fmt.Fprintf(&b, "raised %s", p.AlertRaised.GetSeverity())
		case *pb.Event_AlertResolved:
			b.WriteString("resolved")
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func (w *world) want(story string) {
	w.t.Helper()
	if got := w.story(); got != story {
		w.t.Errorf("log:\n%swant:\n%s", got, story)
	}
}

const rolledBack = `rollout/r1 rollback started v2 to v1
model/m v2 quarantined
alert/r1 raised critical
`

func TestBadCandidateIsRolledBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		m := w.monitor()
		defer run(t, m)()
		w.ack("side-1", 1)
		w.ack("side-2", 1)

		for range 5 { // healthy
			ingest(t, m, w.second("a", "eu", 1, 0, 1))
			time.Sleep(time.Second)
		}
		w.want("")
		bad := time.Now()
		for len(w.story()) == 0 && time.Since(bad) < 10*time.Second {
			ingest(t, m, w.second("a", "eu", 1, 5, 1))
			time.Sleep(250 * time.Millisecond)
		}
		synctest.Wait()
		w.want(rolledBack)
		if took := time.Since(bad); took > 2*time.Second {
			t.Errorf("decided after %v of half the candidate's requests failing", took)
		}
		var started *pb.RollbackStarted
		for ev := range w.log.Read(context.Background(), "rollout/r1", 2) {
			started = ev.GetRollbackStarted()
			if ev.GetActor() != "monitor" || ev.GetRequestId() != "monitor/r1/1/rollback" || ev.GetPosition() != 2 {
				t.Errorf("envelope %v", ev)
			}
		}
		if !started.GetFirstBadAt().AsTime().Equal(bad) || started.GetDecidedAt().AsTime().Before(bad) {
			t.Errorf("first bad %v (traffic turned bad %v), decided %v", started.GetFirstBadAt().AsTime(), bad, started.GetDecidedAt().AsTime())
		}
		ev := started.GetEvidence()
		if len(ev) != 2 || ev[0].Stratum != deploy.All || ev[1].Stratum != "eu/1" || ev[0].GetCandidateFailures() < 5 ||
			max(ev[0].GetEValue(), ev[0].GetSrValue()) < ev[0].GetThreshold() && max(ev[1].GetEValue(), ev[1].GetSrValue()) < ev[1].GetThreshold() {
			t.Errorf("evidence %v", ev)
		}

		// One sidecar acknowledges: not done. The second does: done within the poll.
		w.ack("side-1", 4)
		time.Sleep(3 * time.Second)
		w.want(rolledBack)
		w.ack("side-2", 2)
		time.Sleep(2 * ackPoll)
		synctest.Wait()
		w.want(rolledBack + "rollout/r1 rollback completed push 2 acked 2 laggards []\nrollout/r1 ended rolled_back\n")
		time.Sleep(time.Minute)
		w.want(rolledBack + "rollout/r1 rollback completed push 2 acked 2 laggards []\nrollout/r1 ended rolled_back\n")
		if m.Evidence("r1") != nil || len(m.watches) != 0 {
			t.Error("an ended rollout is still watched")
		}
	})
}

// A failure is looked at within a quarter tick, not at the next one.
func TestFailuresAreLookedAtEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		m := w.monitor(func(o *Options) { o.Tick = 20 * time.Second })
		defer run(t, m)()
		time.Sleep(time.Second)
		ingest(t, m, w.second("a", "eu", 1, 0, 0))
		time.Sleep(5 * time.Second)
		if m.Evidence("r1") != nil {
			t.Error("a delta without failures was looked at before the tick")
		}
		bad := time.Now()
		ingest(t, m, w.second("a", "eu", 1, 10, 0))
		for w.story() == "" && time.Since(bad) < 20*time.Second {
			time.Sleep(time.Millisecond)
		}
		w.want(rolledBack)
		if took := time.Since(bad); took > 5*time.Second {
			t.Errorf("decided %v after the failures arrived; a quarter tick is 5s", took)
		}
	})
}

// Failures of the weights before arrive late, after the weight has changed.
func TestLateDataOfAnOlderEpochIsIgnored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.append("rollout/r1", &pb.Event{Payload: &pb.Event_RolloutAdvanced{RolloutAdvanced: &pb.RolloutAdvanced{Phase: 2}}})
		m := w.monitor()
		defer run(t, m)()
		for range 5 {
			ingest(t, m, w.second("a", "eu", 2, 0, 1))
			ingest(t, m, w.second("b", "eu", 1, 10, 0)) // late
			time.Sleep(time.Second)
		}
		w.want("rollout/r1 advanced to 2\n")
		ev := m.Evidence("r1")
		if len(ev) != 2 || ev[0].GetCandidateRequests() != 50 || ev[0].GetCandidateFailures() != 0 || ev[1].GetStratum() != "eu/2" {
			t.Errorf("evidence %v, want the 50 candidate requests of epoch 2 alone", ev)
		}
		if got := m.VersionStats("m", "v2").Lifetime; got.Failures != 50 {
			t.Errorf("late failures are missing from the statistics: %+v", got)
		}
	})
}

// A region where both versions fail says nothing against the candidate, although most
// of the candidate's failures are there.
func TestRegionsAreComparedWithThemselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		m := w.monitor(func(o *Options) { o.Detector.MaxFailureRate = .9 })
		defer run(t, m)()
		for range 9 {
			d := w.second("a", "eu", 1, 9, 0)
			d.Outcomes[0].Requests, d.Outcomes[1].Requests, d.Outcomes[1].Failures = 30, 30, 9
			d.Outcomes[1].FailedUnits = d.Outcomes[0].FailedUnits
			ingest(t, m, d)
			big := w.second("b", "us", 1, 0, 0)
			big.Outcomes[1].Requests = 3000
			ingest(t, m, big)
			time.Sleep(time.Second)
		}
		w.want("")
		if ev := m.Evidence("r1"); len(ev) != 3 || ev[1].GetStratum() != "eu/1" || ev[1].GetCandidateFailures() != 81 || ev[1].GetBaselineFailures() != 81 {
			t.Errorf("evidence %v", ev)
		}
	})
}

func TestLaggardsAreNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		m := w.monitor()
		defer run(t, m)()
		w.ack("side-1", 9)
		w.ack("side-2", 1)
		ingest(t, m, w.second("a", "eu", 1, 10, 0))
		time.Sleep(9 * time.Second)
		w.want(rolledBack)
		time.Sleep(2 * time.Second)
		w.want(rolledBack + "rollout/r1 rollback completed push 2 acked 1 laggards [side-2]\nrollout/r1 ended rolled_back\n")
	})
}

func TestHealthyCandidateCompletes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		m := w.monitor()
		defer run(t, m)()
		for i := range 100 {
			if epoch := w.epoch(); epoch > 0 {
				ingest(t, m, w.second("a", "eu", epoch, i%20/19, i%2))
			}
			time.Sleep(time.Second)
		}
		w.want(`rollout/r1 advanced to 1
rollout/r1 advanced to 2
rollout/r1 ended completed
model/m champion from v1 to v2
`)
	})
}

// Traffic that stops leaves the rollout where it is: no data is no evidence.
func TestNoDataWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		m := w.monitor()
		defer run(t, m)()
		for range 4 { // 40 candidate requests of the 50 the phase needs
			ingest(t, m, w.second("a", "eu", 1, 0, 0))
		}
		time.Sleep(time.Hour)
		w.want("")
		ingest(t, m, w.second("a", "eu", 1, 0, 0))
		time.Sleep(2 * time.Second)
		w.want("rollout/r1 advanced to 1\n")
	})
}

// Two monitors see the same reports and the same log; each step is taken once. The
// projection lags, so both also see their own step late.
func TestReplicasActOnce(t *testing.T) {
	for _, sight := range []uint64{0, 2} { // 2: the projection stops at the advance
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			w.start()
			a, b := w.monitor(), w.monitor()
			defer run(t, a, b)()
			w.ack("side-1", 9)
			both := func(bad int, epoch uint64) {
				d := w.second("a", "eu", epoch, bad, 1)
				ingest(t, a, d)
				ingest(t, b, d)
				time.Sleep(time.Second)
			}
			for range 12 {
				both(0, 1)
			}
			w.want("rollout/r1 advanced to 1\n")
			w.set(func() { w.sight = sight })
			for range 3 {
				both(8, 1)
			}
			w.want("rollout/r1 advanced to 1\n" + rolledBack + func() string {
				if sight > 0 {
					return "" // nobody may see the rollback yet
				}
				return "rollout/r1 rollback completed push 3 acked 1 laggards []\nrollout/r1 ended rolled_back\n"
			}())
			w.set(func() { w.sight = 0 })
			time.Sleep(20 * time.Second)
			w.want("rollout/r1 advanced to 1\n" + rolledBack +
				"rollout/r1 rollback completed push 3 acked 1 laggards []\nrollout/r1 ended rolled_back\n")
		})
	}
}

// An operator advances in the moment the monitor decides: the monitor's append expects
// the old sequence, loses, and judges the new phase by its own traffic.
func TestLosingARaceIsHarmless(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.append("rollout/r1", &pb.Event{Payload: &pb.Event_RolloutAdvanced{RolloutAdvanced: &pb.RolloutAdvanced{Phase: 2}}})
		w.sight = 1 // the monitor still sees phase 0
		m := w.monitor()
		defer run(t, m)()
		ingest(t, m, w.second("a", "eu", 1, 10, 0))
		time.Sleep(5 * time.Second)
		w.want("rollout/r1 advanced to 2\n")
		w.set(func() {
			if w.tries != 1 {
				t.Errorf("%d appends while the projection lags; the first conflict says it all", w.tries)
			}
			w.sight = 0
		})
		time.Sleep(5 * time.Second)
		w.want("rollout/r1 advanced to 2\n") // the bad requests were of the older epoch
		ingest(t, m, w.second("a", "eu", 2, 10, 0))
		time.Sleep(5 * time.Second)
		w.want("rollout/r1 advanced to 2\n" + rolledBack)
	})
}

// Killed between RollbackStarted and RollbackCompleted: the next process finishes, but
// not before sidecars had the time to come back.
func TestRestartResumesARollback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		first := w.monitor()
		w.ack("side-1", 1)
		stop := run(t, first)
		ingest(t, first, w.second("a", "eu", 1, 10, 0))
		time.Sleep(time.Second)
		stop()
		w.want(rolledBack)

		w.set(func() { clear(w.acked) }) // nobody is connected to the new process yet
		second := w.monitor()
		defer run(t, second)()
		time.Sleep(5 * time.Second)
		w.want(rolledBack)
		w.ack("side-1", 4)
		time.Sleep(time.Second)
		w.want(rolledBack + "rollout/r1 rollback completed push 2 acked 1 laggards []\nrollout/r1 ended rolled_back\n")
	})
}

// A restart loses the evidence gathered: the candidate is judged afresh.
func TestRestartStartsEvidenceAfresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		second := func(m *Monitor) {
			ingest(t, m, w.second("a", "eu", 1, 1, 0))
			time.Sleep(time.Second)
		}
		for range 20 { // each process sees one second, too little to convict
			m := w.monitor()
			stop := run(t, m)
			second(m)
			stop()
		}
		w.want("")
		m := w.monitor()
		defer run(t, m)()
		for range 8 {
			second(m)
		}
		w.want(rolledBack)
	})
}

func TestUnavailableLogIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.failed = outrigger.Errorf(outrigger.Unavailable, "disk is gone")
		m := w.monitor()
		defer run(t, m)()
		ingest(t, m, w.second("a", "eu", 1, 10, 0))
		time.Sleep(5 * time.Second)
		w.want("")
		w.set(func() { w.failed = nil })
		time.Sleep(time.Second + time.Millisecond)
		w.want(rolledBack)
	})
}

// Both versions fail: hold and alert, no rollback; the alert resolves when it is over.
func TestGlobalIncidentHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		m := w.monitor()
		defer run(t, m)()
		traffic := func(seconds, badCandidate, badBaseline int) {
			for range seconds {
				if epoch := w.epoch(); epoch > 0 {
					ingest(t, m, w.second("a", "eu", epoch, badCandidate, badBaseline))
				}
				time.Sleep(time.Second)
			}
		}
		traffic(30, 3, 27)
		w.want("alert/r1-limit raised high\n")
		traffic(200, 0, 0)
		if got := w.story(); !strings.HasPrefix(got, "alert/r1-limit raised high\nalert/r1-limit resolved\nrollout/r1 advanced to 1\n") {
			t.Errorf("after the incident:\n%s", got)
		}
	})
}

// Only units the split assigned are evidence. A candidate that is down sends its users to
// the last good version under the arm last-good; were those counted for the baseline, and
// were requests without a unit, both would shift what the candidate is compared with.
func TestOnlyAssignedUnitsAreEvidence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		m := w.monitor()
		defer run(t, m)()
		w.ack("side-1", 1)
		for i := range 20 { // nothing but failures, none of an assigned unit
			d := w.second("a", "eu", 1, 0, 0)
			for _, arm := range []string{"unassigned", "last-good"} {
				for _, version := range []string{"v1", "v2"} {
					d.Outcomes = append(d.Outcomes, &pb.OutcomeDelta{Model: "m", Version: version, Arm: arm, Region: "eu", WeightEpoch: 1,
						Requests: 50, Failures: 50, Attempts: 50, FailedUnits: []uint32{uint32(i)*4 + 1<<22}, FirstFailureUnixNano: uint64(time.Now().UnixNano())})
				}
			}
			ingest(t, m, d)
			time.Sleep(250 * time.Millisecond)
		}
		synctest.Wait()
		w.want("")
		var requests uint64
		for _, e := range m.Evidence("r1") {
			if e.GetStratum() != "all" && e.GetStratum() != "" {
				requests += e.GetCandidateRequests() + e.GetBaselineRequests()
			}
			if e.GetCandidateFailures() != 0 || e.GetBaselineFailures() != 0 {
				t.Errorf("evidence has failures nobody was assigned to: %v", e)
			}
		}
		if requests == 0 {
			t.Error("no evidence at all")
		}
		// They do count for what a version served, in cells of their own.
		if got := m.VersionStats("m", "v1").Lifetime; got.Requests != 20*(90+100) || got.Failures != 20*100 {
			t.Errorf("version 1: %+v", got)
		}
		cells := m.Cells()
		if len(cells) != 4 || !cells[0].Assigned || cells[1].Assigned || cells[1].Lifetime.Requests != 20*100 {
			t.Errorf("cells %+v", cells)
		}
		// Assigned failures are still found.
		for range 40 {
			if w.story() != "" {
				break
			}
			ingest(t, m, w.second("a", "eu", 1, 5, 1))
			time.Sleep(250 * time.Millisecond)
		}
		synctest.Wait()
		w.want(rolledBack)
	})
}
