package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"strconv"
	"time"

	"github.com/DataDog/sketches-go/ddsketch"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/pause"
)

// What the pods of the ingest row report.
const (
	ingestPods  = 100
	ingestUnits = 50 // distinct users of one pod, arm and second
)

func ingestRow() row {
	return row{id: "experiments.ingest", unit: "CPU ms/s", better: "lower", run: runIngest,
		what: fmt.Sprintf("CPU time of `outrigger control` in a second in which %d sidecars report once each, on a stream of their own, %d users in each of the two arms of a running experiment (unit rows, latency sketch, counts): evidence is counted per unit and judged every second; less what the same streams cost without reports. The row fails unless every unit row sent has been counted", ingestPods, ingestUnits),
		bars: []bar{{what: "ms of CPU for a second of 100 pods", metric: "cpu_ms", of: absolute, must: 100, aim: 50}}}
}

// runIngest has no peer: nobody else keeps a ledger of units in its control plane.
func runIngest(ctx context.Context, e *env, r row) ([]result, error) {
	rounds := min(e.rounds, 3)
	slice := e.slice(2*rounds, 8*time.Second)
	c, err := e.compare(ctx, r.id, rounds, []contender{{name: us, sample: func(ctx context.Context) (map[string]float64, error) {
		return e.ingest(ctx, slice)
	}}})
	if err != nil {
		return nil, err
	}
	if err := e.keep(r.id, c); err != nil {
		return nil, err
	}
	return c.rows(r, "cpu_ms", []string{""}, func(string) string {
		text := r.what
		for _, m := range []struct{ key, label string }{{"delta_us", "us for a report"}, {"row_us", "us for a unit row"}, {"idle_ms", "ms in a second without reports"}} {
			if s, ok := summarise(c.Rounds, us, "", m.key); ok {
				text += fmt.Sprintf("; %s %.3g", m.label, s.Ours)
			}
		}
		return text
	})
}

// ingest is one sample: a fresh control plane, first with silent streams, then with
// reports.
func (e *env) ingest(ctx context.Context, slice time.Duration) (map[string]float64, error) {
	bin, err := e.mesh()
	if err != nil {
		return nil, err
	}
	dir, err := e.dir("ingest")
	if err != nil {
		return nil, err
	}
	s, err := e.start(ctx, us+"-control", "", true, bin, "control", "--log-level", "warn", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer s.stop()
	if err := s.until(ctx, isReady(ctx, s)); err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(s.addresses["listen"], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	epoch, err := startExperiment(ctx, conn)
	if err != nil {
		return nil, err
	}
	report := func(sending bool) (cpuMillis float64, sent map[string]float64, err error) {
		before, err := observe()
		if err != nil {
			return 0, nil, err
		}
		sent, err = e.values(ctx, e.ours("report", "-address", s.addresses["listen"], "-slice", slice.String(), "-epoch", strconv.FormatUint(epoch, 10), "-send="+strconv.FormatBool(sending))...)
		if err != nil {
			return 0, nil, err
		}
		after, err := observe()
		if err != nil {
			return 0, nil, err
		}
		return float64(after.under(s.pid)-before.under(s.pid)) * 1000 / ticksPerSecond, sent, nil
	}
	silent, silence, err := report(false)
	if err != nil {
		return nil, err
	}
	busy, sent, err := report(true)
	if err != nil {
		return nil, err
	}
	if err := counted(ctx, conn, sent["rows"]); err != nil {
		return nil, err
	}
	idle := silent / silence["seconds"]
	ms := busy/sent["seconds"] - idle
	perReport := ms * 1000 * sent["seconds"] / sent["deltas"]
	return map[string]float64{"cpu_ms": ms, "idle_ms": idle, "delta_us": perReport, "row_us": perReport / (2 * ingestUnits)}, nil
}

// startExperiment begins an experiment that does not end by itself while it is measured,
// and returns the weight epoch under which its arms are reported.
func startExperiment(ctx context.Context, conn *grpc.ClientConn) (epoch uint64, err error) {
	admin := pb.NewAdminClient(conn)
	for _, v := range []string{"v1", "v2"} {
		if _, err := admin.RegisterModelVersion(ctx, &pb.RegisterModelVersionRequest{Model: chatModel, Version: v, UpstreamModel: "bench", Actor: "bench",
			Endpoints: []*pb.Endpoint{{Address: "127.0.0.1:9", Region: "local", Weight: 1}}}); err != nil {
			return 0, err
		}
	}
	_, err = admin.CreateExperiment(ctx, &pb.CreateExperimentRequest{Name: "bench", Model: chatModel, Actor: "bench",
		Arms: []*pb.ExperimentArm{{Name: "control", Version: "v1", Weight: 5000}, {Name: "treatment", Version: "v2", Weight: 5000}}})
	if err == nil {
		_, err = admin.PlanExperiment(ctx, &pb.PlanExperimentRequest{Name: "bench", Actor: "bench", Plan: &pb.ExperimentPlan{
			Metrics: []*pb.ExperimentMetric{{Name: "success_rate"}}, Baseline: .9, Mde: .01,
			MinDuration: durationpb.New(24 * time.Hour), MaxDuration: durationpb.New(48 * time.Hour)}})
	}
	if err == nil {
		_, err = admin.SetExperimentState(ctx, &pb.SetExperimentStateRequest{Name: "bench", State: "running", Actor: "bench"})
	}
	if err != nil {
		return 0, err
	}
	m, err := admin.GetModel(ctx, &pb.NameRequest{Name: chatModel})
	return m.GetWeightEpoch(), err
}

// counted fails unless the ledger has as many unit rows as were sent and acknowledged, and
// left none out.
func counted(ctx context.Context, conn *grpc.ClientConn, rows float64) error {
	r, err := pb.NewAdminClient(conn).ExperimentResults(ctx, &pb.NameRequest{Name: "bench"})
	if err != nil {
		return err
	}
	if r.GetExperiment().GetState() != "running" {
		return fmt.Errorf("the experiment is %s", r.GetExperiment().GetState())
	}
	l := r.GetLedger().AsMap()
	for _, left := range []string{"rows_bad", "rows_without_room", "rows_too_late"} {
		if l[left] != 0.0 {
			return fmt.Errorf("%s is %v", left, l[left])
		}
	}
	if l["rows"] != rows {
		return fmt.Errorf("%v unit rows were counted, %v were sent", l["rows"], rows)
	}
	return nil
}

// childReport is the sidecars' side: a connection and a stream for each pod, a report a
// second, spread over the second.
func childReport(ctx context.Context, args []string, _ io.Reader) (any, error) {
	f := flag.NewFlagSet("report", flag.ContinueOnError)
	address := f.String("address", "", "of the control plane")
	slice := f.Duration("slice", time.Second, "how long to report")
	epoch := f.Uint64("epoch", 0, "weight epoch")
	send := f.Bool("send", true, "false: only hold the streams")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	sketch, err := latencySketch()
	if err != nil {
		return nil, err
	}
	seconds := max(1, int(slice.Round(time.Second)/time.Second))
	g, ctx := errgroup.WithContext(ctx)
	start := time.Now()
	deltas := make([]int, ingestPods)
	for pod := range ingestPods {
		g.Go(func() (err error) {
			deltas[pod], err = reportAs(ctx, pod, *address, *epoch, seconds, *send, sketch)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	total := 0
	for _, n := range deltas {
		total += n
	}
	return map[string]float64{"deltas": float64(total), "rows": float64(total * 2 * ingestUnits), "seconds": time.Since(start).Seconds()}, nil
}

// reportAs is one pod. It returns how many reports were acknowledged.
func reportAs(ctx context.Context, pod int, address string, epoch uint64, seconds int, send bool, sketch []byte) (acknowledged int, err error) {
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	stream, err := pb.NewReportsClient(conn).Push(ctx)
	if err != nil {
		return 0, err
	}
	name := fmt.Sprintf("n%02d/pod-%d", pod/10, pod)
	if !pause.For(ctx, time.Duration(pod)*time.Second/ingestPods) {
		return 0, ctx.Err()
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for n := range seconds {
		if send {
			if err := stream.Send(podDelta(name, pod, n, epoch, sketch)); err != nil {
				return acknowledged, errors.Join(err, lastOf(stream))
			}
			if _, err := stream.Recv(); err != nil {
				return acknowledged, err
			}
			acknowledged++
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return acknowledged, ctx.Err()
		}
	}
	if err := stream.CloseSend(); err != nil {
		return acknowledged, err
	}
	if err := lastOf(stream); err != nil && !errors.Is(err, io.EOF) {
		return acknowledged, err
	}
	return acknowledged, nil
}

// lastOf is how a stream ended.
func lastOf(stream grpc.BidiStreamingClient[pb.Delta, pb.DeltaAck]) error {
	_, err := stream.Recv()
	return err
}

// podDelta is the report of a pod in second n: the users come back now and then, some of
// them to other pods, one in twenty calls fails.
func podDelta(name string, pod, n int, epoch uint64, sketch []byte) *pb.Delta {
	d := &pb.Delta{Reporter: name, Sequence: uint64(n + 1), Node: &pb.Node{Id: name, Region: "local"}}
	for a, arm := range []string{"control", "treatment"} {
		o := &pb.OutcomeDelta{Model: chatModel, Version: fmt.Sprint("v", a+1), Arm: arm, Region: "local", WeightEpoch: epoch,
			Requests: ingestUnits, Attempts: ingestUnits, LatencySumMs: 20 * ingestUnits, LatencySketch: sketch, TtftSketch: sketch, TokensIn: 5000, TokensOut: 9000}
		for i := range ingestUnits {
			user := uint32(pod/2*1000+n%20*ingestUnits+i)*2 + uint32(a) // arms never share a user
			u := &pb.UnitRow{Unit: user * 2654435761, N: 1, SumY: 20}
			if (i+n)%20 == 0 {
				u.SumX = 1
				o.Failures++
				o.FailedUnits = append(o.FailedUnits, u.Unit)
			}
			o.Units = append(o.Units, u)
		}
		d.Outcomes = append(d.Outcomes, o)
	}
	return d
}

// latencySketch is that of fifty calls, lognormal around 400 ms by their quantiles.
func latencySketch() ([]byte, error) {
	s, err := ddsketch.NewDefaultDDSketch(0.01)
	if err != nil {
		return nil, err
	}
	for i := range ingestUnits {
		z := math.Erfinv(2*(float64(i)+.5)/ingestUnits-1) * math.Sqrt2
		if err := s.Add(400 * math.Exp(.5*z)); err != nil {
			return nil, err
		}
	}
	return proto.Marshal(s.ToProto())
}
