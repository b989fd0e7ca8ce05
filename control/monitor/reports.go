package monitor

import (
	"context"
	"errors"
	"io"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/xds/policy"
)

// maxTouched bounds the sessions one delta may touch; further ones are dropped.
const maxTouched = 10_000

// Push implements pb.ReportsServer: one acknowledgement per delta, in order, after the
// delta has been counted. The stream ends with an error at the first refused delta.
func (m *Monitor) Push(stream grpc.BidiStreamingServer[pb.Delta, pb.DeltaAck]) error {
	for {
		d, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := m.Ingest(stream.Context(), d); err != nil {
			return status.ToGRPC(err)
		}
		if err := stream.Send(&pb.DeltaAck{Sequence: d.GetSequence()}); err != nil {
			return err
		}
	}
}

// Ingest counts one delta, as Push does for each. A nil error means "counted, now or
// before": it may be acknowledged. Errors: Invalid (no reporter or sequence), Exhausted
// (a new reporter beyond MaxReporters). The delta is not kept and not modified.
func (m *Monitor) Ingest(ctx context.Context, d *pb.Delta) error {
	// A reporter's name begins with its node's, and those are paths ("node-a/pod-1").
	if err := outrigger.CheckName("reporter", strings.ReplaceAll(d.GetReporter(), "/", "-")); err != nil {
		m.count(ctx, "refused")
		return err
	}
	if d.GetSequence() == 0 {
		m.count(ctx, "refused")
		return outrigger.Errorf(outrigger.Invalid, "delta of reporter %q has sequence 0; sequences start at 1", d.GetReporter())
	}
	// Sketches are decoded before the lock is taken: it is most of the work.
	parsed := m.parse(ctx, d)
	now := m.opts.Now()
	res, err := m.counts.add(d, parsed, now)
	if err != nil {
		m.count(ctx, "refused")
		return err
	}
	if res.duplicate {
		m.count(ctx, "duplicate")
		return nil
	}
	m.count(ctx, "counted")
	if m.opts.Outcomes != nil {
		m.opts.Outcomes(d)
	}
	m.drop(ctx, "cells_full", res.cellsFull)
	m.drop(ctx, "units_full", res.unitsFull)
	if res.cellsFull > 0 {
		m.opts.Logger.Warn("report cells dropped: too many models, versions, regions and epochs at once",
			"reporter", d.GetReporter(), "dropped", res.cellsFull, "limit", m.opts.MaxCells)
	}
	if m.stale.violated(d) || res.failures {
		select {
		case m.wake <- struct{}{}:
		default: // a wake-up is pending already
		}
	}
	m.touch(ctx, d, now)
	return nil
}

// touch hands the used sessions on.
func (m *Monitor) touch(ctx context.Context, d *pb.Delta, now time.Time) {
	touched := d.GetCache().GetTouchedSessions()
	if m.opts.Touch == nil || len(touched) == 0 {
		return
	}
	at := now
	if end := d.GetWindowEndUnixNano(); end > 0 && int64(end) > 0 && int64(end) < now.UnixNano() {
		at = time.Unix(0, int64(end))
	}
	bad := max(0, len(touched)-maxTouched)
	for _, s := range touched[:len(touched)-bad] {
		tenant, session, ok := strings.Cut(s, "/")
		if !ok || outrigger.CheckName("tenant", tenant) != nil || outrigger.CheckName("session", session) != nil {
			bad++
			continue
		}
		m.opts.Touch(tenant, session, at)
	}
	m.drop(ctx, "touch", bad)
}

func (m *Monitor) count(ctx context.Context, result string) {
	m.inst.deltas.Add(ctx, 1, metric.WithAttributes(attribute.String("result", result)))
}

func (m *Monitor) drop(ctx context.Context, reason string, n int) {
	if n > 0 {
		m.inst.dropped.Add(ctx, int64(n), metric.WithAttributes(attribute.String("reason", reason)))
	}
}

// parsed is a delta with its names checked and its sketches decoded.
type parsed struct {
	outcomes []outcome
	lag      sketch
}

type outcome struct {
	key           cellKey
	delta         *pb.OutcomeDelta
	latency, ttft sketch
}

func (m *Monitor) parse(ctx context.Context, d *pb.Delta) (p parsed) {
	decode := func(raw []byte) sketch {
		s, err := decodeSketch(raw)
		if err != nil {
			m.drop(ctx, "sketch", 1)
			m.opts.Logger.Warn("sketch dropped", "reporter", d.GetReporter(), "error", err)
		}
		return s
	}
	p.lag = decode(d.GetCache().GetInvalidationLagSketch())
	for _, o := range d.GetOutcomes() {
		key := cellKey{o.GetModel(), o.GetVersion(), o.GetRegion(), o.GetWeightEpoch(), policy.Assigned(o.GetArm()), o.GetArm() == policy.ArmShadow}
		if err := key.check(o); err != nil {
			m.drop(ctx, "cell", 1)
			m.opts.Logger.Warn("report cell dropped", "reporter", d.GetReporter(), "error", err)
			continue
		}
		p.outcomes = append(p.outcomes, outcome{key: key, delta: o,
			latency: decode(o.GetLatencySketch()), ttft: decode(o.GetTtftSketch())})
	}
	return p
}

// check refuses names no policy could hold and counts that cannot be.
func (k cellKey) check(o *pb.OutcomeDelta) error {
	if err := policy.CheckModelName(k.model); err != nil {
		return err
	}
	if err := outrigger.CheckName("version", k.version); err != nil {
		return err
	}
	if k.region != "" {
		if err := outrigger.CheckName("region", k.region); err != nil {
			return err
		}
	}
	if x := o.GetLatencySumMs(); !(x >= 0 && x < 1e18) {
		return outrigger.Errorf(outrigger.Invalid, "latency_sum_ms of %s/%s is %v", k.model, k.version, x)
	}
	const most = 1 << 40 // a second's worth of anything; keeps sums from wrapping
	if o.GetRequests() > most || o.GetFailures() > o.GetRequests() || o.GetCancelled() > o.GetRequests() ||
		o.GetAttempts() > most || o.GetTokensIn() > most || o.GetTokensOut() > most {
		return outrigger.Errorf(outrigger.Invalid, "counts of %s/%s do not fit: %d requests, %d failures, %d cancelled",
			k.model, k.version, o.GetRequests(), o.GetFailures(), o.GetCancelled())
	}
	return nil
}
