package control

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"time"

	colmetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/compile"
	"github.com/outrigger-mesh/outrigger/control/facts"
	"github.com/outrigger-mesh/outrigger/control/replicate"
	"github.com/outrigger-mesh/outrigger/control/variables"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// Following makes a replica one that follows: Options.Log must be Log.
type Following struct {
	Log *replicate.Follower
	// Conn goes to the leader with an administrator's credential: evidence that arrives here
	// is passed on, because the leader alone decides on it.
	Conn grpc.ClientConnInterface
}

// catchUpPatience is how long a follower that has a copy waits for its leader before it serves
// what it has.
const catchUpPatience = 5 * time.Second

// currentLimit bounds how long an operator's call waits to be current.
const currentLimit = time.Second

// parts are what Run runs, by what this replica is. The leader alone weighs evidence and
// decides; what only answers, compiles and watches its own clients runs everywhere.
func (s *Server) parts() []func(context.Context) error {
	out := []func(context.Context) error{s.facts.Run, s.vars.Run, s.glass.run, s.publisher.run, s.nacks.run, s.strangers.run, s.dashboard.Run, s.fleet.run}
	if s.opts.Secrets != nil {
		out = append(out, s.opts.Secrets.Run)
	}
	if f := s.opts.Follow; f != nil {
		return append(out, s.lease.run, func(ctx context.Context) error { return f.Log.Stand(ctx, standings{s.ads}) })
	}
	return append(out, s.monitor.Run, s.trials.Run, s.checks.Run, s.alerts.Run, s.canary.run, s.publisher.record)
}

// catchUp runs a follower's link and waits until the copy has what the leader had when it was
// asked, or until it is clear that the leader is away and there is a copy to serve from.
func (s *Server) catchUp(ctx context.Context, g *errgroup.Group) {
	f := s.opts.Follow
	if f == nil {
		return
	}
	g.Go(func() error { return f.Log.Run(ctx) })
	err := f.Log.CatchUp(ctx, catchUpPatience)
	if err != nil && ctx.Err() == nil {
		s.opts.Logger.Warn("serving the copy as it is", "head", s.opts.Log.Head(), "error", err)
	}
	s.lease.look() // before anything is published: a restart is no news from the leader
}

// shown waits until every answer of this replica shows a position.
func (s *Server) shown(ctx context.Context, position uint64) error {
	if err := s.vars.Wait(ctx, position); err != nil {
		return err
	}
	_, err := s.facts.Wait(ctx, position)
	return err
}

// current brings what an operator is shown up to what was acknowledged before; variables are
// promised to be current, the rest is as current as the leader can be asked.
func (s *Server) current(ctx context.Context, verb string) error {
	f := s.opts.Follow
	if f == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, currentLimit)
	defer cancel()
	if variableVerb(verb) {
		return s.vars.Current(ctx)
	}
	if !f.Log.Linked() {
		return nil
	}
	if position, err := f.Log.Confirm(ctx); err == nil {
		// What cannot be waited for is shown as it is, with its position.
		_, _ = s.facts.Wait(ctx, position)
	}
	return nil
}

func variableVerb(verb string) bool {
	return strings.Contains(verb, "Variable") || strings.Contains(verb, "Session") || verb == "GetHistory"
}

// currently registers services whose calls see what was acknowledged anywhere before them.
type currently struct {
	grpc.ServiceRegistrar
	vars *variables.Service
}

// RegisterService implements grpc.ServiceRegistrar.
func (c currently) RegisterService(desc *grpc.ServiceDesc, impl any) {
	out := *desc
	out.Methods = make([]grpc.MethodDesc, len(desc.Methods))
	for i, m := range desc.Methods {
		handler := m.Handler
		m.Handler = func(srv any, ctx context.Context, dec func(any) error, next grpc.UnaryServerInterceptor) (any, error) {
			if err := c.vars.Current(ctx); err != nil {
				return nil, status.ToGRPC(err)
			}
			return handler(srv, ctx, dec, next)
		}
		out.Methods[i] = m
	}
	c.ServiceRegistrar.RegisterService(&out, impl)
}

// registerEvidence adds what takes evidence: the leader's own services, or their relays.
func (s *Server) registerEvidence(r grpc.ServiceRegistrar) {
	f := s.opts.Follow
	if f == nil {
		pb.RegisterReportsServer(r, reports{s.monitor, s})
		pb.RegisterOutcomesServer(r, outcomes{s: s})
		colmetrics.RegisterMetricsServiceServer(r, s.otlp)
		pb.RegisterReplicationServer(registrar{r, s.guard}, s.leader)
		return
	}
	pb.RegisterReportsServer(r, reportRelay{to: pb.NewReportsClient(f.Conn)})
	pb.RegisterOutcomesServer(r, outcomeRelay{to: pb.NewOutcomesClient(f.Conn)})
	colmetrics.RegisterMetricsServiceServer(r, metricRelay{to: colmetrics.NewMetricsServiceClient(f.Conn)})
}

// reportRelay passes deltas on to the leader and its acknowledgements back, so that a delta is
// acknowledged only after it has been counted where it counts.
type reportRelay struct {
	pb.UnimplementedReportsServer
	to pb.ReportsClient
}

// Push implements pb.ReportsServer.
func (r reportRelay) Push(stream grpc.BidiStreamingServer[pb.Delta, pb.DeltaAck]) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	up, err := r.to.Push(ctx)
	if err != nil {
		return err
	}
	go func() { // ends with the stream's context
		for {
			d, err := stream.Recv()
			if err != nil {
				if errors.Is(err, io.EOF) {
					_ = up.CloseSend() // its failure is seen by Recv
				} else {
					cancel()
				}
				return
			}
			if up.Send(d) != nil {
				return // why is seen by Recv
			}
		}
	}()
	for {
		ack, err := up.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = stream.Send(ack)
		}
		if err != nil {
			return err
		}
	}
}

type outcomeRelay struct {
	pb.UnimplementedOutcomesServer
	to pb.OutcomesClient
}

// Record implements pb.OutcomesServer.
func (r outcomeRelay) Record(ctx context.Context, req *pb.RecordOutcomesRequest) (*pb.RecordOutcomesResponse, error) {
	return r.to.Record(ctx, req)
}

// record is Record for callers that want an outrigger.Error.
func (r outcomeRelay) record(ctx context.Context, req *pb.RecordOutcomesRequest) (*pb.RecordOutcomesResponse, error) {
	out, err := r.to.Record(ctx, req)
	return out, status.FromGRPC(err, nil)
}

type metricRelay struct {
	colmetrics.UnimplementedMetricsServiceServer
	to colmetrics.MetricsServiceClient
}

// Export implements colmetrics.MetricsServiceServer.
func (r metricRelay) Export(ctx context.Context, req *colmetrics.ExportMetricsServiceRequest) (*colmetrics.ExportMetricsServiceResponse, error) {
	return r.to.Export(ctx, req)
}

// takesOTLP says why OTLP over HTTP is not taken here, if it is not.
func (s *Server) takesOTLP() error {
	if f := s.opts.Follow; f != nil {
		return outrigger.Errorf(outrigger.Unavailable, "this replica follows %s; export to that one, or to the gRPC port here", f.Log.Leader())
	}
	return s.isReady()
}

// lease is how a follower keeps the promise of the dead-man lease: while it has heard nothing
// from its leader for that long, a rollback may have been decided that it does not know of, so
// it compiles policy as if every candidate were out.
type lease struct {
	follower *replicate.Follower
	limit    time.Duration
	now      func() time.Time
	lapsed   atomic.Bool
	wake     chan struct{} // capacity 1: the publisher
}

func newLease(f *Following, limit time.Duration, now func() time.Time) *lease {
	if f == nil {
		return nil
	}
	if limit == 0 {
		limit = compile.DefaultDeadMan
	}
	return &lease{follower: f.Log, limit: limit, now: now, wake: make(chan struct{}, 1)}
}

// run watches until ctx ends.
func (l *lease) run(ctx context.Context) error {
	t := time.NewTimer(l.limit)
	defer t.Stop()
	for {
		heard := l.follower.Heard()
		left := l.look()
		var due <-chan time.Time
		if left > 0 {
			t.Reset(left)
			due = t.C
		}
		select {
		case <-heard:
		case <-due:
		case <-ctx.Done():
			return nil
		}
	}
}

// look says how much of the lease is left, and wakes the publisher if it has lapsed or come
// back since the last look.
func (l *lease) look() (left time.Duration) {
	left = l.left()
	if l.lapsed.Swap(left <= 0) != (left <= 0) {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
	return left
}

// left is how much longer this replica may speak for candidates: what its heartbeats to
// Envoys promise. One that owns its log always may.
func (l *lease) left() time.Duration {
	if l == nil {
		return 1<<63 - 1
	}
	return l.limit - l.follower.Silence(l.now())
}

// without are the candidates that policy is compiled without while the lease has lapsed.
func (l *lease) without(f *facts.Facts) (kills []compile.Kill, lapsed bool) {
	if l == nil || !l.lapsed.Load() {
		return nil, false
	}
	for _, r := range f.RunningRollouts() {
		kills = append(kills, compile.Kill{Model: r.Model, Version: r.Candidate})
	}
	return kills, true
}
