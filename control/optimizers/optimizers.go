// Package optimizers is the shell around experiments/algorithms: it examines optimisers
// that others wrote, and speaks to those that are programs of their own.
//
//	p, err := optimizers.Connect(ctx, conn)          // who is there
//	err = optimizers.Examine(ctx, p.Algorithm, limit) // does it keep its promises
//	opt, err := p.New(algorithms.Config{…})           // as any other algorithm
//
//	pb.RegisterOptimizerPluginServer(grpcServer, optimizers.Serve(algorithm)) // the other side, in Go
//
// # Promises
//
// Examine runs algorithms.SanityTask and answers within its limit, whatever the optimiser
// does: a panic, a call that does not return, trials outside the space or in a wrong order,
// a loss that is worse than random search's and answers that differ for the same seed are
// each an error that says so. A call into a Go optimiser that never returns leaves its
// goroutine behind, since nothing can end it; one to a plugin ends with the stream.
//
// A plugin's optimiser checks every answer itself: a trial outside the space, misnumbered or
// beyond the budget never comes out of Ask, also after the examination. Its State is what it
// was asked and told; Restore asks and tells it again, and refuses one that answers
// otherwise than before. So a plugin keeps nothing, and an optimisation outlives both ends.
//
// # Failure
//
// A plugin that fails, is away, or takes longer than CallTimeout for one answer ends the
// optimisation: Ask returns nothing and Err says why. Nothing is tried again here. Messages
// are bounded by gRPC (4 MiB), trials by the budget, the transcript by both.
//
// Examine and Connect may be called concurrently; an optimiser belongs to one goroutine.
package optimizers

import (
	"context"
	"fmt"
	"time"

	"github.com/outrigger-mesh/outrigger"
	"github.com/outrigger-mesh/outrigger/experiments/algorithms"
)

// Limits.
const (
	// CallTimeout bounds one answer of a plugin.
	CallTimeout = 30 * time.Second
	// ExamineTimeout is a good limit for Examine: the usual task makes some 2,500 calls.
	ExamineTimeout = time.Minute
)

// Failing is an optimiser that can end before its budget: a plugin's.
type Failing interface {
	// Err is why it ended, nil if it has not.
	Err() error
}

// Examine returns nil for an optimiser that passes the sanity task within the limit. Errors
// have kind Invalid and name the promise that is not kept, or Timeout.
func Examine(ctx context.Context, a algorithms.Algorithm, limit time.Duration) error {
	return examine(ctx, a, algorithms.SanityTask{}, limit)
}

func examine(ctx context.Context, a algorithms.Algorithm, task algorithms.SanityTask, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	late := func() error {
		return outrigger.Errorf(outrigger.Timeout, "optimiser %q did not pass its examination within %v; a call to it may not return", a.ID, limit)
	}
	var why error // of the optimiser's own end; written before done is
	own := a
	watch := func(o algorithms.Optimizer, err error) (algorithms.Optimizer, error) {
		if f, ok := o.(Failing); ok && err == nil {
			return watched{o, f, &why}, nil
		}
		return o, err
	}
	a.New = nil
	if own.New != nil {
		a.New = func(c algorithms.Config) (algorithms.Optimizer, error) { return watch(own.New(c)) }
	}
	a.Restore = nil
	if own.Restore != nil {
		a.Restore = func(s []byte) (algorithms.Optimizer, error) { return watch(own.Restore(s)) }
	}
	task.Stop = func() bool { return ctx.Err() != nil }
	done := make(chan error, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				done <- outrigger.Errorf(outrigger.Invalid, "optimiser %q panicked: %v", own.ID, p)
			}
		}()
		err := task.Check(a)
		if err != nil && why != nil {
			err = outrigger.Wrap(outrigger.KindOf(why), why, fmt.Sprintf("optimiser %q", own.ID))
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil && ctx.Err() != nil {
			return late()
		}
		return err
	case <-ctx.Done():
		return late()
	}
}

// watched notes why an optimiser ended.
type watched struct {
	algorithms.Optimizer
	f   Failing
	why *error
}

// Ask implements algorithms.Optimizer.
func (w watched) Ask(n int) []algorithms.Trial {
	out := w.Optimizer.Ask(n)
	w.note()
	return out
}

// Tell implements algorithms.Optimizer.
func (w watched) Tell(rs []algorithms.Result) error {
	err := w.Optimizer.Tell(rs)
	w.note()
	return err
}

func (w watched) note() {
	if err := w.f.Err(); err != nil && *w.why == nil {
		*w.why = err
	}
}
