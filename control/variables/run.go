package variables

import (
	"context"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// applyBatch bounds the events applied under one lock and announced in one go.
const applyBatch = 512

// saveTimeout bounds the saving of one log snapshot, and so the end of Run.
const saveTimeout = 30 * time.Second

// applier is the one goroutine that changes the state.
type applier struct {
	s        *Service
	ring     *ring
	target   uint64 // head at start; Ready when applied
	snapAt   uint64 // position of the last log snapshot taken or tried
	saving   chan struct{}
	sweep    chan found
	isReady  bool
	effects  []effect     // scratch
	changes  []*pb.Change // of the batch; handed to the ring
	snapshot func(frozen) // starts saving; nil when snapshots are off
}

// Run follows the log, sweeps expired sessions and takes log snapshots until ctx ends
// (then it returns nil) or the log fails. It owns every goroutine it starts. A second
// call fails with kind Invalid.
func (s *Service) Run(ctx context.Context) error {
	if s.started.Swap(true) {
		return outrigger.Errorf(outrigger.Invalid, "variables: Run was called before; build a new Service")
	}
	defer s.leans.close()
	defer close(s.stopped)
	err := s.run(ctx)
	if ctx.Err() != nil {
		err = nil
	}
	s.progress.stop(err)
	return err
}

func (s *Service) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	a := &applier{
		s: s, target: s.log.Head(),
		saving: make(chan struct{}, 1), sweep: make(chan found, 1),
	}
	s.restore(ctx)
	a.snapAt = s.state.applied
	a.ring = newRing(s.opt.FeedRing, s.opt.FeedBytes, s.state.applied)
	s.ring.Store(a.ring)
	s.progress.advance(s.state.applied)
	if s.opt.SnapshotEvery > 0 {
		a.snapshot = func(f frozen) {
			group.Go(func() error { s.save(ctx, f); <-a.saving; return nil })
		}
	}
	unregister, err := s.metrics.observe(s)
	if err != nil {
		return err
	}
	defer unregister()
	events := make(chan *pb.Event, applyBatch)
	group.Go(func() error { return s.follow(ctx, s.state.applied+1, events) })
	group.Go(func() error { return s.sweeper(ctx, a.sweep) })
	group.Go(func() error { return a.run(ctx, events) })
	for _, w := range s.fanouts.all {
		group.Go(func() error { w.run(ctx); return nil })
	}
	return group.Wait()
}

// restore loads the log snapshot, if there is a usable one. Without it the whole log is
// replayed, which is slower and otherwise the same.
func (s *Service) restore(ctx context.Context) {
	position, raw, err := s.log.LoadSnapshot(ctx, snapshotName)
	if err != nil || raw == nil {
		if err != nil {
			s.opt.Logger.Warn("log snapshot cannot be read; replaying the whole log", "error", err)
		}
		return
	}
	st, err := decodeState(raw, s.origin, s.foldLimits())
	if err != nil || st.applied != position || position > s.log.Head() {
		s.opt.Logger.Warn("log snapshot is not usable; replaying the whole log", "position", position, "error", err)
		return
	}
	s.mu.Lock()
	s.state = st
	s.mu.Unlock()
}

// save encodes and stores a log snapshot. A failure costs start-up time only. A save
// that has begun is finished even when the service stops: that start-up is the next thing.
func (s *Service) save(ctx context.Context, f frozen) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), saveTimeout)
	defer cancel()
	raw, err := f.encode()
	if err == nil {
		err = s.log.SaveSnapshot(ctx, snapshotName, f.applied, raw)
	}
	if err != nil {
		s.opt.Logger.Warn("log snapshot was not saved", "position", f.applied, "error", err)
	}
}

// follow hands the log's events to the applier.
func (s *Service) follow(ctx context.Context, from uint64, out chan<- *pb.Event) error {
	for e, err := range s.log.Subscribe(ctx, from) {
		if err != nil {
			return outrigger.Wrap(outrigger.KindOf(err), err, "variables: follow the log")
		}
		select {
		case out <- e:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if ctx.Err() == nil {
		return outrigger.Errorf(outrigger.Internal, "variables: the log's subscription ended by itself")
	}
	return ctx.Err()
}

func (a *applier) run(ctx context.Context, events <-chan *pb.Event) error {
	a.checkReady()
	var tick <-chan time.Time
	if every := a.s.opt.SweepEvery; every > 0 {
		t := time.NewTicker(every)
		defer t.Stop()
		tick = t.C
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-events:
			if err := a.batch(e, events); err != nil {
				return err
			}
		case <-tick:
			a.scan()
		}
	}
}

// batch applies e and whatever else has arrived, then tells everybody: feeds and
// watches first, so that a change is on its way before its writer is answered.
func (a *applier) batch(e *pb.Event, more <-chan *pb.Event) error {
	s := a.s
	a.effects, a.changes = a.effects[:0], nil
	s.mu.Lock()
	for n := 1; ; n++ {
		if last := s.state.applied; last > 0 && e.GetPosition() != last+1 {
			s.mu.Unlock()
			return outrigger.Errorf(outrigger.Internal, "variables: the log went from position %d to %d", last, e.GetPosition())
		}
		eff := apply(s.state, e)
		a.effects = append(a.effects, eff)
		if eff.change != nil {
			a.changes = append(a.changes, eff.change)
		}
		if n == applyBatch || len(more) == 0 {
			break
		}
		e = <-more
	}
	applied := s.state.applied
	s.mu.Unlock()

	a.ring.publish(applied, a.changes)
	s.hub.publish(a.effects)
	clear(a.effects) // keep no event alive until the next batch
	s.progress.advance(applied)
	a.checkReady()
	a.maybeSnapshot(applied)
	return nil
}

func (a *applier) checkReady() {
	if a.isReady || a.s.state.applied < a.target {
		return
	}
	a.isReady = true
	now := a.s.opt.Now().UnixNano()
	for _, sess := range a.s.state.sessions {
		sess.touch(now) // uses before the start are unknown; see the package comment
	}
	close(a.s.ready)
}

func (a *applier) maybeSnapshot(applied uint64) {
	if a.snapshot == nil || applied < a.snapAt+uint64(a.s.opt.SnapshotEvery) {
		return
	}
	select {
	case a.saving <- struct{}{}:
		a.snapAt = applied
		a.snapshot(a.s.state.freeze())
	default: // the one before is still being written
	}
}
