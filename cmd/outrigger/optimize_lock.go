//go:build !dataplane

package main

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

const (
	// renewEvery is how often a run says that it still holds its locks, which are stale five
	// minutes after the last word.
	renewEvery = time.Minute
	// releaseTimeout bounds the release of the locks at the end of a run; what could not be
	// released becomes stale by itself.
	releaseTimeout = 5 * time.Second
)

// locks are the optimisation locks of one run, by variable.
type locks struct {
	cl      *client
	session string
	holder  string // two runs of one optimisation are one holder: its record tells them apart
	names   []string
	ids     map[string]string
}

// lock takes the locks of all names, or of none. A lock that a killed run of the same
// optimisation left behind is taken over.
func (o *tuner) lock(ctx context.Context, names []string) (*locks, error) {
	l := &locks{cl: o.cl, session: o.session, holder: o.record, names: slices.Sorted(slices.Values(names)), ids: map[string]string{}}
	for _, name := range l.names {
		if err := l.start(ctx, name); err != nil {
			l.release(ctx)
			return nil, err
		}
	}
	return l, nil
}

// start takes or renews one lock.
func (l *locks) start(ctx context.Context, name string) error {
	v, err := l.cl.StartOptimization(ctx, &pb.StartOptimizationRequest{Tenant: l.cl.flags.tenant, Session: l.session, Identifier: name,
		Optimizer: l.holder, Options: l.cl.options()})
	if err != nil {
		return err
	}
	if id := l.ids[name]; id != "" && id != v.GetOptimization().GetId() {
		return outrigger.Errorf(outrigger.Locked, "the optimisation lock %s of %s has ended and somebody else had it meanwhile; the search stops", id, name)
	}
	l.ids[name] = v.GetOptimization().GetId()
	return nil
}

// held are the ids to name in writes.
func (l *locks) held() (ids []string) {
	for _, name := range l.names {
		ids = append(ids, l.ids[name])
	}
	return ids
}

// keep renews the locks until ctx ends, and ends it by stop when one cannot be kept because
// somebody else has it. A control plane that is away is no reason to stop: the next write
// tells.
func (l *locks) keep(ctx context.Context, stop context.CancelCauseFunc) {
	tick := time.NewTicker(renewEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, name := range l.names {
			rctx, cancel := context.WithTimeout(ctx, releaseTimeout)
			err := l.start(rctx, name)
			cancel()
			if outrigger.IsKind(status.FromGRPC(err, nil), outrigger.Locked) {
				stop(err)
				return
			}
		}
	}
}

// release ends the locks that are still this run's, interrupted or not.
func (l *locks) release(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	for _, name := range l.names {
		if l.ids[name] == "" {
			continue
		}
		o := l.cl.options()
		o.OptimizationIds = []string{l.ids[name]}
		// One that ended meanwhile is refused, and one that cannot be reached goes stale.
		_, _ = l.cl.StopOptimization(ctx, &pb.StopOptimizationRequest{Tenant: l.cl.flags.tenant, Session: l.session, Identifier: name, Options: o})
	}
}

// locked runs do while the locks of names are held and kept, and releases them after it
// whatever its end.
func (o *tuner) locked(ctx context.Context, names []string, do func(context.Context) error) error {
	l, err := o.lock(ctx, names)
	if err != nil {
		return err
	}
	o.locks = l
	defer func() { o.locks = nil }()
	defer l.release(ctx)
	ctx, stop := context.WithCancelCause(ctx)
	kept := make(chan struct{})
	go func() {
		defer close(kept)
		l.keep(ctx, stop)
	}()
	defer func() { <-kept }()
	defer stop(nil)
	if err = do(ctx); err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// optimizeRollback puts back what an optimisation replaced.
func optimizeRollback(c *clientFlags) *cobra.Command {
	return &cobra.Command{Use: "rollback SESSION ID", Short: "Put the values from before an optimisation back, as one change",
		Long: `Puts the values that the tuned variables had before the optimisation back, in one change,
and marks the optimisation as rolled back. It is refused, and nothing is written, if one of
them was changed since the best setting was written, or is being optimised again.`,
		Args: exactArgs("SESSION", "ID"),
		RunE: c.verb(false, func(ctx context.Context, cl *client, args []string) error {
			o := tuner{cl: cl, session: args[0], record: "optimize." + args[1]}
			found, err := o.load(ctx)
			switch {
			case err != nil:
				return err
			case !found:
				return outrigger.Errorf(outrigger.NotFound, "optimisation %s of session %s not found", args[1], args[0])
			case o.t.Phase != "done" && o.t.Phase != "written":
				return outrigger.Errorf(outrigger.Locked, "%s is %s; only an optimisation that has written its best setting can be rolled back", o.record, o.t.Phase)
			}
			err = o.locked(ctx, o.t.Variables, func(ctx context.Context) error {
				o.t.Phase = "rolled_back"
				return o.save(ctx, o.former()...)
			})
			if err != nil {
				return err
			}
			return o.print()
		})}
}
