package variables

import (
	"context"
	"slices"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// Reasons of a SessionDeleted event.
const (
	reasonCleanup = "cleanup" // asked for by a client
	reasonExpired = "expired" // unused for its TTL
)

// sweepBatch is the number of sessions one append of the sweep removes.
const sweepBatch = 100

// candidate is a session that looked expired.
type candidate struct {
	session *session
	id      sessionID
	seq     uint64
	touched int64 // last soft use when it was looked at
}

// found is what one scan leaves to the sweeper.
type found struct {
	expired []candidate
	locked  []*variable // with a stale optimisation lock
}

// scan looks for expired sessions and stale optimisation locks; it runs on the applier,
// which may read without the lock, and leaves the work to the sweeper. A scan is skipped
// while the last one is still being worked off.
func (a *applier) scan() {
	if !a.isReady || len(a.sweep) > 0 {
		return
	}
	at := a.s.opt.Now()
	now := at.UnixNano()
	var f found
	for id, sess := range a.s.state.sessions {
		touched := sess.touched.Load()
		if touched != closing && max(touched, sess.lastAt.UnixNano())+int64(sess.effectiveTTL()) < now {
			f.expired = append(f.expired, candidate{session: sess, id: id, seq: sess.seq, touched: touched})
		}
	}
	for _, v := range a.s.state.locked {
		if stale(v.pb.GetOptimization(), at) {
			f.locked = append(f.locked, v)
		}
	}
	if len(f.expired)+len(f.locked) > 0 {
		a.sweep <- f // has room: only this goroutine sends
	}
}

func (s *Service) sweeper(ctx context.Context, in <-chan found) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case f := <-in:
			for batch := range slices.Chunk(f.expired, sweepBatch) {
				s.sweep(ctx, batch)
			}
			s.release(ctx, f.locked)
		}
	}
}

// sweep removes the sessions of one batch. From the moment touched says closing, a use
// is too late; any use before that makes the swap fail and the session stays.
func (s *Service) sweep(ctx context.Context, batch []candidate) {
	batch = slices.DeleteFunc(batch, func(c candidate) bool { return !c.session.touched.CompareAndSwap(c.touched, closing) })
	if len(batch) == 0 {
		return
	}
	err := s.expire(ctx, batch)
	if outrigger.IsKind(err, outrigger.Conflict) { // somebody deleted one of them: each on its own
		for _, c := range batch {
			if err = s.expire(ctx, []candidate{c}); err != nil && !outrigger.IsKind(err, outrigger.Conflict) {
				break
			}
		}
	}
	if err != nil && !outrigger.IsKind(err, outrigger.Conflict) && ctx.Err() == nil {
		s.opt.Logger.Warn("expired sessions were not removed; the next sweep tries again", "sessions", len(batch), "error", err)
	}
	for _, c := range batch { // no effect on those that are gone
		c.session.touched.CompareAndSwap(closing, c.touched)
	}
}

func (s *Service) expire(ctx context.Context, batch []candidate) error {
	writes := make([]eventlog.Write, 0, len(batch))
	for _, c := range batch {
		writes = append(writes, eventlog.Write{
			Aggregate: sessionAggregate(c.id), Expect: int64(c.seq),
			Events: []*pb.Event{{
				Actor: "outrigger", Source: "sweep", Schema: 1,
				Payload: &pb.Event_SessionDeleted{SessionDeleted: &pb.SessionDeleted{Reason: reasonExpired}},
			}},
		})
	}
	app, err := s.log.Append(ctx, "", writes...)
	if err != nil {
		return err
	}
	if err := s.progress.wait(ctx, app.Last); err != nil {
		return err
	}
	s.metrics.expired(ctx, len(batch))
	return nil
}
