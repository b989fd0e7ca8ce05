package node

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/coherence"
	"github.com/outrigger-mesh/outrigger/cache/feed"
	"github.com/outrigger-mesh/outrigger/internal/pause"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

const (
	// Reconnecting waits at most this long, so that a healed network is noticed within
	// about a second; full jitter keeps a fleet from arriving together.
	minBackoff, maxBackoff = 20 * time.Millisecond, 800 * time.Millisecond

	// silentBeats is how many heartbeats may stay without any frame before the stream is
	// taken for dead: a connection that lost its peer without a word.
	silentBeats = 5
)

// follow keeps one feed stream open until ctx ends.
func (a *Agent) follow(ctx context.Context) {
	backoff := minBackoff
	for ctx.Err() == nil {
		frames, err := a.followOnce(ctx)
		if frames > 0 {
			backoff = minBackoff
		}
		if a.feedUp.Swap(false) {
			a.o.Logger.Warn("feed lost", "error", err, "frames", frames)
		} else {
			a.o.Logger.Debug("feed cannot be opened", "error", err)
		}
		pause.For(ctx, time.Duration(rand.Int64N(int64(backoff)))+backoff/4)
		backoff = min(2*backoff, maxBackoff)
	}
}

// source is a feed as the agent uses it, whatever carries it.
type source interface {
	// Recv returns the next frame, which is valid until the next Recv.
	Recv() (*pb.FeedFrame, error)
	Send(*pb.FeedRequest) error
}

// followOnce opens a stream and applies its frames until it ends.
func (a *Agent) followOnce(ctx context.Context) (frames int, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The watchdog covers opening as well: a black hole answers nothing.
	watchdog := time.AfterFunc(a.silence(), cancel)
	defer watchdog.Stop()
	stream, err := a.openFeed(ctx)
	if err != nil {
		return 0, err
	}
	t := &listening{a: a, number: a.streams.Add(1), fed: a.o.Clock(), watchdog: watchdog}
	t.lean, _ = stream.(*feed.Client)
	subscribe, selects := a.connect(t.number, t.lean, cancel)
	defer func() {
		cancel()
		a.step(coherence.Lost{Stream: t.number})
	}()
	if t.lean != nil {
		err = a.converse(t, subscribe, selects)
	} else {
		err = a.listen(ctx, cancel, t, stream, subscribe, selects)
	}
	return t.frames, err
}

// listening is the taking of frames from one stream.
type listening struct {
	a        *Agent
	number   uint64
	lean     *feed.Client // nil = a gRPC stream
	frames   int
	fed      int64 // when the watchdog was, by Options.Clock
	watchdog *time.Timer
}

// silence is how long a stream may bring nothing.
func (a *Agent) silence() time.Duration { return silentBeats * a.o.Heartbeat }

// take applies a frame.
func (t *listening) take(f *pb.FeedFrame) {
	a := t.a
	if now := a.o.Clock(); now-t.fed >= int64(a.o.Heartbeat)/2 || now < t.fed {
		t.fed = now
		t.watchdog.Reset(a.silence())
	}
	a.mu.Lock()
	a.feed = t.lean
	a.run(coherence.Frame{Stream: t.number, Frame: f})
	a.feed = nil
	a.mu.Unlock()
	if t.frames++; !a.feedUp.Load() && !a.feedUp.Swap(true) {
		a.o.Logger.Info("feed open", "region", f.GetRegion(), "incarnation", f.GetIncarnation())
	}
	if a.o.Applied != nil {
		a.o.Applied(f)
	}
	a.observeLag(f.GetChanges().GetChanges())
}

// listen takes frames from a gRPC stream until it ends, while another goroutine sends.
func (a *Agent) listen(ctx context.Context, cancel func(), t *listening, stream source, s *pb.Subscribe, selects <-chan *pb.Select) error {
	sender := make(chan struct{})
	go func() {
		defer close(sender)
		a.beat(ctx, stream, s, selects)
	}()
	defer func() {
		cancel()
		<-sender
	}()
	for {
		f, err := stream.Recv()
		if err != nil {
			return err
		}
		t.take(f)
	}
}

// converse takes frames from a feed without gRPC until it ends, and sends on it what beat
// sends, in the same goroutine: one that waits for frames or for the time to send,
// whichever comes first. A heartbeat that is due within an eighth of the interval goes with
// the frame just taken, so that a node that hears of changes all the time is woken for
// nothing else.
func (a *Agent) converse(t *listening, s *pb.Subscribe, selects <-chan *pb.Select) error {
	c := t.lean
	if err := c.Send(&pb.FeedRequest{Kind: &pb.FeedRequest_Subscribe{Subscribe: s}}); err != nil {
		return err
	}
	due, first, arm := time.Now(), true, false
	for {
		if now := time.Now(); due.Sub(now) <= a.o.Heartbeat/8 {
			if err := c.SendHeartbeat(uint64(a.o.Clock())); err != nil {
				return err
			}
			if due, arm = now.Add(a.o.Heartbeat), true; first {
				due, first = now.Add(1+rand.N(a.o.Heartbeat)), false
			} else {
				a.ticked(a.o.Heartbeat)
			}
		}
		if arm { // before looking for selects: one that comes later ends the waiting again
			if err := c.Until(due); err != nil {
				return err
			}
		}
		select {
		case sel := <-selects:
			arm = true
			if err := c.Send(&pb.FeedRequest{Kind: &pb.FeedRequest_Select{Select: sel}}); err != nil {
				return err
			}
			continue
		default:
		}
		f, err := c.Recv()
		if arm = errors.Is(err, os.ErrDeadlineExceeded); arm {
			continue
		}
		if err != nil {
			return err
		}
		t.take(f)
	}
}

// openFeed opens a feed of its own if the agent may, and a gRPC stream otherwise or when the
// origin refuses that. An origin that does not answer at all is asked by gRPC the next time:
// something between may swallow what it does not know.
func (a *Agent) openFeed(ctx context.Context) (source, error) {
	if a.o.DialFeed == nil || a.o.Heartbeat > feed.MaxSilence/3 || a.swallowed {
		a.swallowed = false
		return a.coh.Feed(ctx)
	}
	conn, err := a.o.DialFeed(ctx)
	if err != nil {
		return nil, outrigger.Wrap(outrigger.Unavailable, err, "dial the feed")
	}
	c, err := feed.Connect(ctx, conn, a.o.FeedHost)
	if feed.IsRefused(err) {
		a.o.Logger.Info("feed over gRPC", "reason", err)
		return a.coh.Feed(ctx)
	}
	if err != nil {
		a.swallowed = ctx.Err() != nil
		return nil, outrigger.Wrap(outrigger.Unavailable, err, "open the feed")
	}
	context.AfterFunc(ctx, c.Close)
	return c, nil
}

// connect begins stream number: what to send first, and where selects for it come.
func (a *Agent) connect(number uint64, lean *feed.Client, cancel context.CancelFunc) (*pb.Subscribe, <-chan *pb.Select) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.endStream, a.selects, a.conversing = cancel, make(chan *pb.Select, 1), lean
	a.run(coherence.Connected{Stream: number})
	s := a.batch.subscribe
	a.batch.subscribe = nil
	return &pb.Subscribe{Node: wire.NodePB(a.o.Node), Incarnation: s.Incarnation, From: s.From,
		Select: &pb.Select{Number: s.Number, Add: s.Shards}}, a.selects
}

// beat sends Subscribe and then a heartbeat per interval, and selects as they come, on a
// gRPC stream. The second heartbeat comes anywhere within the first interval, so that nodes that connected
// together do not keep beating together: changes would wait behind their answers.
// Nothing else is ever sent on the stream, so a heartbeat waits for nothing; a failed
// send ends the stream, which Recv reports.
func (a *Agent) beat(ctx context.Context, stream source, s *pb.Subscribe, selects <-chan *pb.Select) {
	if stream.Send(&pb.FeedRequest{Kind: &pb.FeedRequest_Subscribe{Subscribe: s}}) != nil {
		return
	}
	t := time.NewTicker(1 + rand.N(a.o.Heartbeat))
	defer t.Stop()
	for first := true; ; first = false {
		hb := &pb.Heartbeat{Sent: uint64(a.o.Clock())}
		if stream.Send(&pb.FeedRequest{Kind: &pb.FeedRequest_Heartbeat{Heartbeat: hb}}) != nil {
			return
		}
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				return
			case sel := <-selects:
				if stream.Send(&pb.FeedRequest{Kind: &pb.FeedRequest_Select{Select: sel}}) != nil {
					return
				}
			case <-t.C:
				if waiting = false; first {
					t.Reset(a.o.Heartbeat)
				}
				a.ticked(a.o.Heartbeat)
			}
		}
	}
}

// observeLag records, per change, the time from its commit to now, when the table has
// it. The commit was stamped by another machine's wall clock: good for a dashboard, and
// the reason why nothing is decided by it.
func (a *Agent) observeLag(changes []*pb.Change) {
	if len(changes) == 0 {
		return
	}
	now := time.Now().UnixNano()
	for _, c := range changes {
		at := int64(c.GetCommittedUnixNano())
		if at == 0 {
			continue
		}
		lag := time.Duration(max(0, now-at))
		if lag > time.Hour {
			continue // a clock that is wrong, or a replay
		}
		a.lag.add(lag.Seconds())
		a.metrics.lag.Record(context.Background(), lag.Seconds())
	}
}
