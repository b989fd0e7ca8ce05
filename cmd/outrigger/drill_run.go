//go:build !dataplane

package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/pause"
)

// drillRun is what one rollback took. Times are milliseconds.
type drillRun struct {
	Candidate   string  `json:"candidate"`
	FirstBadMs  float64 `json:"first_bad_ms"` // bad version → its first bad answer
	DecidedMs   float64 `json:"decided_ms"`   // first bad answer → decision
	ZeroMs      float64 `json:"zero_ms"`      // decision → weight 0 in force at the last sidecar
	PushAckMs   float64 `json:"push_ack_ms"`  // push → the last acknowledgement, as the control plane saw it
	TotalMs     float64 `json:"total_ms"`     // bad version → weight 0 in force at the last sidecar
	BadAnswers  int     `json:"bad_answers"`  // before the decision
	Asked       int     `json:"requests"`     // of the candidate, from the cue to the decision
	Acked       uint32  `json:"acked"`
	Wrong       int     `json:"wrong_after_ack"`    // began after their sidecar had the rollback
	InFlight    int     `json:"in_flight"`          // began before that, arrived after it
	InFlightMs  float64 `json:"in_flight_worst_ms"` // how long after it the last of them arrived
	EnvoyMs     float64 `json:"envoy_ms,omitempty"` // decision → the last request to the bad version begun through an Envoy
	LaggardSeen int     `json:"laggards,omitempty"` // sidecars that did not acknowledge in time
	Reason      string  `json:"reason"`
}

// drillKill is a run in which the control plane was killed.
type drillKill struct {
	Candidate  string  `json:"candidate"`
	KilledMs   float64 `json:"killed_ms"`          // bad version → kill
	Moment     string  `json:"moment"`             // before the decision, before the last sidecar had it, after
	Serving    int     `json:"serving"`            // sidecars that gave the candidate weight then
	LastMs     float64 `json:"last_request_ms"`    // kill → last request to reach the bad version before the restart
	AfterLease int     `json:"after_lease"`        // requests to it that began after the lease, before the restart
	EnvoyMs    float64 `json:"envoy_ms,omitempty"` // kill → last request begun through an Envoy to it, before the restart
	AwayMs     float64 `json:"away_ms"`            // kill → restart
	FinishedMs float64 `json:"finished_ms"`        // restart → weight 0 at every sidecar; 0 = they had it before
	Wrong      int     `json:"wrong_after_ack"`
}

func ms(from, to int64) float64 { return float64(to-from) / 1e6 }

// rehearseAll runs every rollback and adds up.
func (m *drillMesh) rehearseAll(ctx context.Context) (*drillReport, error) {
	r := &drillReport{Sidecars: m.d.sidecars, Processes: m.d.processes, Envoys: m.d.envoys, RequestsPerSecond: m.d.rps, Weight: m.d.weight, ErrorRate: m.d.errorRate,
		DeadManMs: float64(m.d.deadMan.Milliseconds())}
	span := time.Second
	for i := range m.d.runs {
		run, err := m.rehearse(ctx, i)
		if err != nil {
			return nil, fmt.Errorf("run %d: %w", i+1, err)
		}
		r.Runs = append(r.Runs, *run)
		fmt.Fprintf(m.log, "run %d: first bad %.0f ms, decided %.0f ms, zero at %d sidecars %.0f ms, wrong %d\n",
			i+1, run.FirstBadMs, run.DecidedMs, m.d.sidecars, run.ZeroMs, run.Wrong)
	}
	if len(r.Runs) > 0 {
		span = time.Duration(1.2 * median(r.Runs, func(x drillRun) float64 { return x.TotalMs }) * float64(time.Millisecond))
	}
	for i := range m.d.kills {
		after := time.Duration(0)
		if i%2 == 0 {
			after = time.Duration(m.rnd.Int64N(int64(span)))
		}
		k, err := m.rehearseKill(ctx, m.d.runs+i, after)
		if err != nil {
			return nil, fmt.Errorf("kill %d: %w", i+1, err)
		}
		r.Kills = append(r.Kills, *k)
		fmt.Fprintf(m.log, "kill %d, %.0f ms after the version turned bad (%s): %d sidecars served it, its last request came after %.0f ms\n",
			i+1, k.KilledMs, k.Moment, k.Serving, k.LastMs)
	}
	r.Calls = m.fleet.calls()
	if m.envoys != nil {
		r.Calls.add(m.envoys.calls.tally())
	}
	return r, m.dead()
}

// canary rolls a new version out and waits until every sidecar gives it weight, then lets
// it be healthy for a while. It turns bad at any moment of a tick of the monitor.
func (m *drillMesh) canary(ctx context.Context, n int) (id string, dropped <-chan struct{}, err error) {
	candidate := fmt.Sprintf("%s%d", drillCandidate, n)
	id = "drill-" + candidate
	dropped = m.fleet.begin(candidate)
	m.models[1].bad.Store(false)
	m.models[1].take()
	if err := m.register(ctx, candidate, m.models[1]); err != nil {
		return "", nil, err
	}
	if _, err := m.admin.StartRollout(ctx, &pb.StartRolloutRequest{Id: id, Model: drillModelID, Candidate: candidate, Actor: "drill", Reason: "drill", Force: true,
		Phases: []*pb.RolloutPhase{{Name: "canary", Weight: m.d.weight, MinDuration: durationPB(time.Hour)}, {Name: "full", Weight: 10_000}}}); err != nil {
		return "", nil, err
	}
	if err := m.until(ctx, "every sidecar to serve "+candidate, func() (bool, error) {
		with, _, err := m.fleet.count()
		return with == m.d.sidecars, err
	}); err != nil {
		return "", nil, err
	}
	if seen := m.models[1].others.Load(); m.envoys != nil {
		if err := m.until(ctx, "an Envoy to serve "+candidate, func() (bool, error) { return m.models[1].others.Load() > seen, m.dead() }); err != nil {
			return "", nil, err
		}
	}
	if !pause.For(ctx, m.d.warm+time.Duration(m.rnd.Int64N(int64(time.Second)))) {
		return "", nil, ctx.Err()
	}
	return id, dropped, m.dead()
}

// turnBad returns when.
func (m *drillMesh) turnBad() int64 {
	at := time.Now().UnixNano()
	m.models[1].bad.Store(true)
	return at
}

// ended waits for weight 0 at every sidecar and for the end of the rollout, watches on for
// a while, and returns the rollout.
func (m *drillMesh) ended(ctx context.Context, id string) (*pb.Rollout, error) {
	if err := m.until(ctx, "every sidecar to drop the candidate of "+id, func() (bool, error) {
		with, gone, err := m.fleet.count()
		return with == 0 && gone == m.d.sidecars, err
	}); err != nil {
		return nil, err
	}
	var r *pb.Rollout
	if err := m.until(ctx, "the end of "+id, func() (ok bool, err error) {
		if r, err = m.admin.GetRollout(ctx, &pb.NameRequest{Name: id}, grpc.WaitForReady(true)); err != nil {
			return false, err
		}
		return r.State == "rolled_back" && r.RollbackCompleted != nil, nil
	}); err != nil {
		return nil, err
	}
	if !pause.For(ctx, m.d.after) {
		return nil, ctx.Err()
	}
	return r, m.dead()
}

// rehearse is one run without a kill.
func (m *drillMesh) rehearse(ctx context.Context, n int) (*drillRun, error) {
	id, _, err := m.canary(ctx, n)
	if err != nil {
		return nil, err
	}
	cue := m.turnBad()
	r, err := m.ended(ctx, id)
	if err != nil {
		return nil, err
	}
	decided := r.Rollback.GetDecidedAt().AsTime().UnixNano()
	out := &drillRun{Candidate: r.Candidate, Acked: r.RollbackCompleted.Acked, LaggardSeen: len(r.RollbackCompleted.Laggards), Reason: r.Rollback.GetReason()}
	states, arrivals := m.fleet.snapshot(), m.models[1].take()
	first, last := int64(0), int64(0)
	for _, a := range arrivals {
		if a.failed && (first == 0 || a.at < first) {
			first = a.at
		}
		if a.at >= cue && a.at <= decided {
			out.Asked++
			if a.failed {
				out.BadAnswers++
			}
		}
	}
	for _, a := range arrivals {
		if a.sidecar >= len(states) && a.begun > decided {
			out.EnvoyMs = max(out.EnvoyMs, ms(decided, a.begun))
		}
	}
	for _, s := range states {
		last = max(last, s.gone)
	}
	out.FirstBadMs, out.DecidedMs, out.ZeroMs, out.TotalMs = ms(cue, first), ms(first, decided), ms(decided, last), ms(cue, last)
	out.Wrong, out.InFlight, out.InFlightMs = judgeArrivals(arrivals, states)
	out.PushAckMs, err = m.pushAck(ctx, r.RollbackCompleted.Push)
	return out, err
}

// judgeArrivals counts the requests that began after their sidecar had dropped the
// candidate, and those that were under way then.
func judgeArrivals(arrivals []drillArrival, states []drillState) (wrong, inFlight int, worstMs float64) {
	for _, a := range arrivals {
		if a.sidecar >= len(states) {
			continue // an Envoy's, which alone knows when it had the policy
		}
		gone := states[a.sidecar].gone
		switch {
		case gone == 0 || a.at <= gone:
		case a.begun > gone:
			wrong++
		default:
			inFlight++
			worstMs = max(worstMs, ms(gone, a.at))
		}
	}
	return wrong, inFlight, worstMs
}

// pushAck is how long the push of a rollback took until the last acknowledgement, in the
// control plane's own books.
func (m *drillMesh) pushAck(ctx context.Context, position uint64) (float64, error) {
	log, err := pb.NewDeliveryClient(m.conn).XdsPushLog(ctx, &pb.XdsPushLogRequest{Group: "default", Limit: 256}, largeAnswer())
	if err != nil {
		return 0, err
	}
	for _, p := range slices.Backward(log.Pushes) { // oldest first
		if p.Position >= position {
			return p.Seconds * 1000, nil
		}
	}
	return 0, fmt.Errorf("the control plane does not know the push of position %d", position)
}

// rehearseKill is one run in which the control plane is killed some time after the version
// turned bad, or with after 0 when the first sidecar has the rollback, and comes back when
// the dead-man lease is over.
func (m *drillMesh) rehearseKill(ctx context.Context, n int, after time.Duration) (*drillKill, error) {
	id, dropped, err := m.canary(ctx, n)
	if err != nil {
		return nil, err
	}
	cue := m.turnBad()
	if after > 0 {
		dropped = nil // a moment is given
	}
	limit := time.NewTimer(cmp.Or(after, drillPatience))
	defer limit.Stop()
	select {
	case <-dropped:
	case <-limit.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	m.control.kill()
	killed := time.Now().UnixNano()
	if !pause.For(ctx, m.d.deadMan+m.d.after+time.Second) {
		return nil, ctx.Err()
	}
	states := m.fleet.snapshot()
	back := time.Now().UnixNano()
	if err := m.startControl(ctx); err != nil {
		return nil, err
	}
	r, err := m.ended(ctx, id)
	if err != nil {
		return nil, err
	}
	k := &drillKill{Candidate: r.Candidate, KilledMs: ms(cue, killed), AwayMs: ms(killed, back)}
	for _, s := range states {
		if s.gone == 0 || s.gone > killed {
			k.Serving++
		}
	}
	switch {
	case r.Rollback.GetDecidedAt().AsTime().UnixNano() > killed:
		k.Moment = "before the decision"
	case k.Serving > 0:
		k.Moment = "before the last sidecar had it"
	default:
		k.Moment = "after"
	}
	now, arrivals := m.fleet.snapshot(), m.models[1].take()
	for _, a := range arrivals {
		if a.at > killed && a.at < back {
			k.LastMs = max(k.LastMs, ms(killed, a.at))
		}
		if a.begun > killed+m.d.deadMan.Nanoseconds() && a.at < back {
			k.AfterLease++
		}
		if a.sidecar >= len(now) && a.begun > killed && a.at < back {
			k.EnvoyMs = max(k.EnvoyMs, ms(killed, a.begun))
		}
	}
	for _, s := range now {
		if s.gone > back {
			k.FinishedMs = max(k.FinishedMs, ms(back, s.gone))
		}
	}
	k.Wrong, _, _ = judgeArrivals(arrivals, now)
	return k, nil
}
