package monitor

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/deploy"
)

// watch is what Run's goroutine remembers about one rollout.
type watch struct {
	id    string
	acted uint64 // rollout sequences up to this one need nothing more from us
	phase int
	since time.Time        // the phase began; with phase it tells one stay from the next
	det   *deploy.Detector // nil until the first look at the phase
	gates *deploy.Keeper   // of the phase; nil if they cannot be judged, which no rollout starts with
	seen  map[*cell]seen   // how much of each cell the detector has had

	rolling   bool
	waitSince time.Time // since when acknowledgements are awaited

	alerted bool  // the alert about the absolute limit is raised
	episode int64 // names it: the minute it was first tried in, 0 = none
}

// seen is a reading of a cell's counters.
type seen struct{ requests, failed uint64 }

func newWatch(id string) *watch { return &watch{id: id, seen: make(map[*cell]seen)} }

// judge feeds the detector of a live rollout and does what Decide says.
func (m *Monitor) judge(ctx context.Context, r *deploy.Rollout, w *watch) {
	if w.det == nil || w.phase != r.Phase || !w.since.Equal(r.PhaseSince) {
		cfg := m.opts.Detector
		cfg.Alpha, cfg.WeightEpoch = r.Alpha, r.WeightEpoch
		cfg.Horizon = uint64(max(1, 24*time.Hour/m.opts.Tick))
		w.det, w.phase, w.since = deploy.NewDetector(cfg), r.Phase, r.PhaseSince
		w.gates = m.keeper(r)
	}
	if samples := m.counts.collect(r, w); len(samples) > 0 {
		w.det.Observe(samples)
	}
	now := m.opts.Now()
	d := deploy.Decide(*r, w.det, deploy.Look(r, w.gates, m.observe(r, now), now), now)
	m.publish(r, d)
	switch {
	case d.Breach && !w.alerted:
		m.raiseAlert(ctx, w, d)
	case !d.Breach && w.alerted:
		m.resolveAlert(ctx, w, d.Kind.String()+": "+d.Reason)
	}
	switch d.Kind {
	case deploy.Rollback:
		w.rolling = m.step(ctx, r, w, d.Kind.String(), m.rollback(r, d)...)
	case deploy.Advance:
		m.step(ctx, r, w, d.Kind.String(), eventlog.Write{Aggregate: aggregate(r), Events: []*pb.Event{{
			Payload: &pb.Event_RolloutAdvanced{RolloutAdvanced: deploy.Advanced(r, r.Phase+1, d.Reason, d.Gates)}}}})
	case deploy.Complete:
		m.step(ctx, r, w, d.Kind.String(),
			eventlog.Write{Aggregate: aggregate(r), Events: []*pb.Event{{
				Payload: &pb.Event_RolloutEnded{RolloutEnded: &pb.RolloutEnded{Outcome: string(deploy.Completed), Reason: d.Reason}}}}},
			eventlog.Write{Aggregate: "model/" + r.Model, Events: []*pb.Event{{
				Payload: &pb.Event_AliasMoved{AliasMoved: &pb.AliasMoved{Alias: "champion", From: r.LastGood, To: r.Candidate}}}}})
	default:
		m.drain(ctx, r, w, now)
	}
}

// keeper compiles the gates of the present phase. The log holds only rollouts whose gates
// were checked when they started; one that cannot be judged all the same (written by a
// newer version) is left to people: without its gates it would advance unasked.
func (m *Monitor) keeper(r *deploy.Rollout) *deploy.Keeper {
	k, err := deploy.NewKeeper(r.CurrentPhase())
	if err != nil {
		m.opts.Logger.Error("the gates of a phase cannot be judged; it is not ended", "rollout", r.ID, "phase", r.CurrentPhase().Name, "error", err)
		return deploy.Closed(r.CurrentPhase().Name, err)
	}
	return k
}

// drain takes the next step of a graceful rollback.
func (m *Monitor) drain(ctx context.Context, r *deploy.Rollout, w *watch, now time.Time) {
	if r.State != deploy.Draining {
		return
	}
	weight, change, over := deploy.NextRamp(r, m.idle(r, now), now)
	switch {
	case change:
		m.step(ctx, r, w, "ramp", eventlog.Write{Aggregate: aggregate(r), Events: []*pb.Event{{
			Payload: &pb.Event_RolloutRamped{RolloutRamped: &pb.RolloutRamped{Weight: weight}}}}})
	case over:
		started := &pb.RollbackStarted{Reason: r.Reason, FromVersion: r.Candidate, ToVersion: r.LastGood, DecidedAt: timestamppb.New(now),
			Mode: "graceful", ReturnPhase: uint32(r.ReturnPhase), Blameless: r.Drain.GetBlameless(), Metadata: r.Drain.GetMetadata(), Notify: r.Notify}
		w.rolling = m.step(ctx, r, w, "drained", eventlog.Write{Aggregate: aggregate(r), Events: []*pb.Event{{
			Payload: &pb.Event_RollbackStarted{RollbackStarted: started}}}})
	}
}

// quiet is how long a candidate without weight must have reported nothing to be taken for
// idle: several report intervals. A longer stream goes on undisturbed all the same.
const quiet = 5 * time.Second

// idle reports whether every sidecar has the weight 0 and none has finished a request of
// the candidate for a while.
func (m *Monitor) idle(r *deploy.Rollout, now time.Time) bool {
	acked, _, done := m.opts.Ledger.Acked(r.WeightEpoch)
	return done && len(acked) > 0 && now.Sub(r.RampedAt) >= quiet && now.Sub(m.counts.lastSeen(r.Model, r.Candidate)) >= quiet
}

// drill ends a rehearsal once every sidecar has the policy that came with it.
func (m *Monitor) drill(ctx context.Context, r *deploy.Rollout, w *watch) {
	now := m.opts.Now()
	acked, laggards, done := m.opts.Ledger.Acked(r.DrillAt)
	if took := now.Sub(r.DrillSince); done && len(acked) > 0 || took >= m.opts.AckTimeout {
		m.step(ctx, r, w, "drilled", eventlog.Write{Aggregate: aggregate(r), Events: []*pb.Event{{
			Payload: &pb.Event_RollbackDrillCompleted{RollbackDrillCompleted: &pb.RollbackDrillCompleted{
				Push: r.DrillAt, Acked: uint32(len(acked)), Laggards: laggards, TotalMs: float64(took) / float64(time.Millisecond)}}}}})
	}
}

// rollback builds the writes that start a rollback. Sidecars act on the first event; the
// others are for people.
func (m *Monitor) rollback(r *deploy.Rollout, d deploy.Decision) []eventlog.Write {
	started := &pb.RollbackStarted{Reason: d.Reason, FromVersion: r.Candidate, ToVersion: r.LastGood,
		Evidence: d.Evidence, DecidedAt: timestamppb.New(m.opts.Now()), Mode: "automatic", ReturnPhase: uint32(r.ReturnPhase), Notify: r.Notify}
	if !d.FirstBad.IsZero() {
		started.FirstBadAt = timestamppb.New(d.FirstBad)
	}
	return []eventlog.Write{
		{Aggregate: aggregate(r), Events: []*pb.Event{{Payload: &pb.Event_RollbackStarted{RollbackStarted: started}}}},
		{Aggregate: "model/" + r.Model, Events: []*pb.Event{{Payload: &pb.Event_ModelVersionState{
			ModelVersionState: &pb.ModelVersionState{Version: r.Candidate, State: "quarantined", Reason: d.Reason}}}}},
		{Aggregate: "alert/" + r.ID, Events: []*pb.Event{{Payload: &pb.Event_AlertRaised{AlertRaised: &pb.AlertRaised{
			Severity: "critical", Summary: fmt.Sprintf("rollout %s of %s rolled back: %s", r.ID, r.Model, d.Reason),
			Numbers: numbers(d.Evidence), Notify: r.Notify}}}}},
	}
}

// settle ends a rollback once every sidecar runs a policy that has it.
func (m *Monitor) settle(ctx context.Context, r *deploy.Rollout, w *watch) {
	now := m.opts.Now()
	if w.waitSince.IsZero() {
		w.waitSince = now
	}
	waited := now.Sub(w.waitSince) >= m.opts.AckTimeout
	acked, laggards, done := m.opts.Ledger.Acked(r.WeightEpoch)
	if !waited && (!done || len(acked) == 0) {
		// Nobody connected proves nothing: after a restart the sidecars are still on
		// their way back.
		return
	}
	outcome := &pb.RolloutEnded{Outcome: string(deploy.RolledBack), Reason: r.Reason}
	var events []*pb.Event
	if r.Completed == nil {
		events = append(events, &pb.Event{Payload: &pb.Event_RollbackCompleted{RollbackCompleted: &pb.RollbackCompleted{
			Push: r.WeightEpoch, Acked: uint32(len(acked)), Laggards: laggards, AckedAt: timestamppb.New(now)}}})
	}
	events = append(events, &pb.Event{Payload: &pb.Event_RolloutEnded{RolloutEnded: outcome}})
	if m.step(ctx, r, w, "settle", eventlog.Write{Aggregate: aggregate(r), Events: events}) && len(laggards) > 0 {
		m.opts.Logger.Warn("rollback ended without every acknowledgement; laggards fall back by their dead-man lease",
			"rollout", r.ID, "push", r.WeightEpoch, "acked", len(acked), "laggards", laggards)
	}
}

// step appends writes of which the first is to the rollout's aggregate, if the rollout
// is still where we saw it. It returns false only if it must be tried again: losing a
// race means that somebody else has taken a step, which the projection will show.
func (m *Monitor) step(ctx context.Context, r *deploy.Rollout, w *watch, kind string, writes ...eventlog.Write) bool {
	for i := range writes {
		writes[i].Expect = eventlog.Any
	}
	writes[0].Expect = int64(r.Sequence)
	got, err := m.append(ctx, fmt.Sprintf("monitor/%s/%d/%s", r.ID, r.Sequence, kind), aggregate(r), writes)
	log := m.opts.Logger.With("rollout", r.ID, "model", r.Model, "step", kind, "sequence", r.Sequence)
	switch {
	case err == nil && !got.Duplicate:
		m.inst.decisions.Add(ctx, 1, metric.WithAttributes(attribute.String("kind", kind)))
		log.Info("rollout step appended", "position", got.First)
	case err == nil:
		log.Debug("rollout step was appended before")
	case outrigger.IsKind(err, outrigger.Conflict):
		log.Info("rollout has moved on; waiting for the projection", "error", err)
	default:
		log.Warn("rollout step not appended; retrying at the next look", "error", err)
		return false
	}
	w.acted = r.Sequence
	return true
}

func (m *Monitor) append(ctx context.Context, requestID, cause string, writes []eventlog.Write) (eventlog.Appended, error) {
	for _, w := range writes {
		for _, e := range w.Events {
			e.Actor, e.Source, e.RequestId, e.Cause, e.Schema = "monitor", "monitor", requestID, cause, 1
		}
	}
	ctx, cancel := context.WithTimeout(ctx, appendTimeout)
	defer cancel()
	return m.opts.Log.Append(ctx, requestID, writes...)
}

// raiseAlert says that the candidate is over the absolute limit without being the proven
// cause. Replicas that see it in the same minute write it once.
func (m *Monitor) raiseAlert(ctx context.Context, w *watch, d deploy.Decision) {
	m.alert(ctx, w, "raise", &pb.Event{Payload: &pb.Event_AlertRaised{AlertRaised: &pb.AlertRaised{
		Severity: "high", Summary: fmt.Sprintf("rollout %s is on hold: %s", w.id, d.Reason), Numbers: numbers(d.Evidence)}}})
}

func (m *Monitor) resolveAlert(ctx context.Context, w *watch, reason string) bool {
	return m.alert(ctx, w, "resolve", &pb.Event{Payload: &pb.Event_AlertResolved{AlertResolved: &pb.AlertResolved{Reason: reason}}})
}

// alert appends to the alert about the absolute limit and flips its state.
func (m *Monitor) alert(ctx context.Context, w *watch, verb string, ev *pb.Event) bool {
	if w.episode == 0 {
		w.episode = m.opts.Now().Unix() / 60
	}
	id := fmt.Sprintf("monitor/%s/limit/%d/%s", w.id, w.episode, verb)
	_, err := m.append(ctx, id, deploy.AggregatePrefix+w.id, []eventlog.Write{
		{Aggregate: "alert/" + w.id + "-limit", Expect: eventlog.Any, Events: []*pb.Event{ev}}})
	if err != nil {
		m.opts.Logger.Warn("alert not appended; retrying at the next look", slog.String("rollout", w.id), slog.String("verb", verb), slog.Any("error", err))
		return false
	}
	if w.alerted {
		w.episode = 0
	}
	w.alerted = !w.alerted
	return true
}

func aggregate(r *deploy.Rollout) string { return deploy.AggregatePrefix + r.ID }

// numbers flattens evidence into "<stratum> <what>" → value.
func numbers(evidence []*pb.Evidence) map[string]string {
	out := make(map[string]string, 5*len(evidence))
	for _, e := range evidence {
		ratio := func(failures, requests uint64) string { return fmt.Sprintf("%d/%d", failures, requests) }
		real := func(x float64) string { return strconv.FormatFloat(x, 'g', 4, 64) }
		out[e.GetStratum()+" candidate"] = ratio(e.GetCandidateFailures(), e.GetCandidateRequests())
		out[e.GetStratum()+" baseline"] = ratio(e.GetBaselineFailures(), e.GetBaselineRequests())
		out[e.GetStratum()+" e_value"] = real(e.GetEValue())
		out[e.GetStratum()+" sr_value"] = real(e.GetSrValue())
		out[e.GetStratum()+" threshold"] = real(e.GetThreshold())
	}
	return out
}
