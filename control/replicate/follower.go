package replicate

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"math"
	mrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/internal/pause"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// FollowerOptions configure a Follower; Conn, Name and Store are required.
type FollowerOptions struct {
	// Conn goes to the leader and carries an administrator's credential.
	Conn grpc.ClientConnInterface
	// Leader is what to call the leader in messages.
	Leader string
	// Name of this replica, unique among those of a log.
	Name string
	// Store opens the copy: with incarnation 0 an existing one (kind NotFound if there is
	// none), else it makes one of that log.
	Store func(incarnation uint64) (Store, error)
	// Check is how often the leader is asked for its head when nobody waits for it; 0 = 1 s.
	Check  time.Duration
	Now    func() time.Time // nil = time.Now
	Logger *slog.Logger     // nil = discard
}

// Follower is an eventlog.Log: a copy to read from, the leader to write to.
type Follower struct {
	Store
	opts   FollowerOptions
	client pb.ReplicationClient
	link   atomic.Bool  // the leader is shipping
	heard  atomic.Int64 // when the last answered question to the leader was asked, Unix ns; 0 = none was
	ended  chan struct{}

	mu      sync.Mutex
	grown   chan struct{} // closed and replaced when the copy grew
	round   *round        // the next question to the leader, nil = nobody waits
	asked   chan struct{} // capacity 1: somebody waits
	silence chan struct{} // closed and replaced when an answer came
}

// round is one question to the leader, shared by those who wait for it.
type round struct {
	done chan struct{}
	head uint64
	err  error
}

var _ eventlog.Log = (*Follower)(nil)

// Open opens the copy; for a new one it waits for the leader until ctx ends. Close closes it.
func Open(ctx context.Context, o FollowerOptions) (*Follower, error) {
	if o.Conn == nil || o.Store == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "replicate: FollowerOptions.Conn or Store is nil")
	}
	if err := outrigger.CheckName("replica", o.Name); err != nil {
		return nil, err
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Check <= 0 {
		o.Check = time.Second
	}
	f := &Follower{opts: o, client: pb.NewReplicationClient(o.Conn), ended: make(chan struct{}),
		grown: make(chan struct{}), asked: make(chan struct{}, 1), silence: make(chan struct{})}
	var err error
	if f.Store, err = o.Store(0); !outrigger.IsKind(err, outrigger.NotFound) {
		return f, err
	}
	incarnation, err := f.meet(ctx)
	if err != nil {
		return nil, err
	}
	f.Store, err = o.Store(incarnation)
	return f, err
}

// meet waits for the leader and returns which log it has.
func (f *Follower) meet(ctx context.Context) (uint64, error) {
	for failures := 0; ; failures++ {
		out, err := f.ask(ctx)
		if err == nil {
			return out.GetIncarnation(), nil
		}
		if k := outrigger.KindOf(err); k == outrigger.Denied || k == outrigger.Unauthorised {
			return 0, err
		}
		f.opts.Logger.Warn("waiting for the leader to copy its log", "leader", f.opts.Leader, "error", err)
		if !pause.For(ctx, backoff(failures)) {
			return 0, err
		}
	}
}

func (f *Follower) ask(ctx context.Context) (*pb.HeadResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, confirmLimit)
	defer cancel()
	var trailer metadata.MD
	out, err := f.client.Head(ctx, &pb.HeadRequest{}, grpc.Trailer(&trailer))
	return out, status.FromGRPC(err, trailer)
}

// Run tails the leader and answers Confirm until ctx ends (then it returns nil) or the two
// logs turn out not to be one (kind Conflict). It owns every goroutine it starts.
func (f *Follower) Run(ctx context.Context) error {
	defer close(f.ended)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return f.tail(ctx) })
	g.Go(func() error { f.confirmer(ctx); return nil })
	return g.Wait()
}

// tail follows the leader, over as many links as it takes.
func (f *Follower) tail(ctx context.Context) error {
	for failures := 0; ctx.Err() == nil; failures++ {
		before := f.Head()
		err := f.follow(ctx)
		f.link.Store(false)
		if ctx.Err() != nil {
			return nil
		}
		if k := outrigger.KindOf(err); k == outrigger.Stale || k == outrigger.Conflict || k == outrigger.Invalid {
			return outrigger.Errorf(outrigger.Conflict, "cannot follow %s: %v", f.opts.Leader, err)
		}
		if f.Head() > before {
			failures = 0
		}
		f.opts.Logger.Warn("not following the leader", "leader", f.opts.Leader, "head", f.Head(), "error", err)
		if !pause.For(ctx, backoff(failures)) {
			return nil
		}
	}
	return nil
}

// follow takes shipments from one link.
func (f *Follower) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := f.client.Follow(ctx, &pb.FollowRequest{Replica: f.opts.Name, Incarnation: f.Incarnation(), From: f.Head() + 1})
	if err != nil {
		return status.FromGRPC(err, nil)
	}
	for {
		s, err := stream.Recv()
		if err != nil {
			return status.FromGRPC(err, stream.Trailer())
		}
		if s.GetIncarnation() != f.Incarnation() {
			return outrigger.Errorf(outrigger.Conflict, "the leader ships log %x, the copy is of %x", s.GetIncarnation(), f.Incarnation())
		}
		if f.link.CompareAndSwap(false, true) {
			f.opts.Logger.Info("following the leader", "leader", f.opts.Leader, "head", f.Head(), "leader_head", s.GetHead())
		}
		if len(s.GetEvents()) == 0 {
			continue
		}
		if err := f.Ingest(ctx, s.GetEvents()); err != nil {
			return err
		}
		f.mu.Lock()
		close(f.grown)
		f.grown = make(chan struct{})
		f.mu.Unlock()
	}
}

// reach waits until the copy has position.
func (f *Follower) reach(ctx context.Context, position uint64) error {
	for {
		f.mu.Lock()
		grown := f.grown
		f.mu.Unlock()
		if f.Head() >= position {
			return nil
		}
		select {
		case <-grown:
		case <-f.ended:
			return outrigger.Errorf(outrigger.Unavailable, "this replica has stopped")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// CatchUp waits until the copy has what the leader had when it was asked. If the leader says
// nothing for patience, and there is something in the copy, it gives up with kind Unavailable;
// an empty copy is waited for until ctx ends.
func (f *Follower) CatchUp(ctx context.Context, patience time.Duration) error {
	begun := f.opts.Now()
	for {
		head, err := f.Confirm(ctx)
		if err == nil {
			return f.reach(ctx, head)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if f.Head() > 0 && f.opts.Now().Sub(begun) >= patience {
			return err
		}
		if !pause.For(ctx, backoff(0)) {
			return ctx.Err()
		}
	}
}

// Linked reports whether the leader is shipping its log.
func (f *Follower) Linked() bool { return f.link.Load() }

// Leader is what the leader is called.
func (f *Follower) Leader() string { return f.opts.Leader }

// Append implements eventlog.Appender: the leader appends.
func (f *Follower) Append(ctx context.Context, requestID string, writes ...eventlog.Write) (eventlog.Appended, error) {
	if err := eventlog.Check(requestID, writes); err != nil {
		return eventlog.Appended{}, err
	}
	if ctx.Err() != nil {
		return eventlog.Appended{}, eventlog.ErrNotQueued(ctx)
	}
	if !f.Linked() {
		return eventlog.Appended{}, outrigger.Errorf(outrigger.Unavailable, "the leader of this replica, %s, is away; nothing was changed, retry when it is back", f.opts.Leader)
	}
	req := &pb.AppendRequest{RequestId: requestID}
	own := requestID == ""
	if own {
		req.RequestId = "replica/" + rand.Text()
	}
	for _, w := range writes {
		req.Writes = append(req.Writes, &pb.AggregateWrite{Aggregate: w.Aggregate, Expect: w.Expect, Events: w.Events})
	}
	out, err := f.send(ctx, req)
	if err != nil {
		return eventlog.Appended{}, err
	}
	if r := out.GetRefusal(); r != nil {
		return eventlog.Appended{}, refused(r)
	}
	if err := f.reach(ctx, out.GetLast()); err != nil {
		return eventlog.Appended{}, outrigger.Wrap(outrigger.Unknown, err, "the leader has the write, this replica not yet; read to see it")
	}
	return f.appended(ctx, out, own)
}

// send appends on the leader, and asks again under the same request id when an answer was
// lost.
func (f *Follower) send(ctx context.Context, req *pb.AppendRequest) (*pb.AppendResponse, error) {
	deadline := f.opts.Now().Add(RetryFor)
	for failures := 0; ; failures++ {
		var trailer metadata.MD
		out, err := f.client.Append(ctx, req, grpc.Trailer(&trailer))
		if err == nil {
			if out.GetIncarnation() != f.Incarnation() {
				return nil, outrigger.Errorf(outrigger.Unknown, "the leader's log has become another one; this replica must be stopped")
			}
			return out, nil
		}
		err = status.FromGRPC(err, trailer)
		switch outrigger.KindOf(err) {
		case outrigger.Denied, outrigger.Unauthorised, outrigger.Exhausted, outrigger.Invalid:
			return nil, err // the transport or the guard: the log was not asked
		}
		if !f.opts.Now().Before(deadline) || !pause.For(ctx, backoff(failures)) {
			return nil, outrigger.Wrap(outrigger.Unknown, err, "the leader went away with the write under way; repeat it with the same request id to learn the outcome")
		}
	}
}

// appended is the result of an append, read from the copy.
func (f *Follower) appended(ctx context.Context, r *pb.AppendResponse, own bool) (eventlog.Appended, error) {
	// A repetition of ours that met the first attempt's events is not a duplicate to the caller.
	out := eventlog.Appended{First: r.GetFirst(), Last: r.GetLast(), Duplicate: r.GetDuplicate() && !own}
	for e, err := range f.ReadAll(ctx, out.First) {
		if err != nil {
			return eventlog.Appended{}, outrigger.Wrap(outrigger.Unknown, err, "the write is durable, but cannot be read back here")
		}
		if e.GetPosition() > out.Last {
			break
		}
		out.Events = append(out.Events, e)
	}
	return out, nil
}

// Confirm returns the position of the leader's head at some instant after the call, or why
// it is not known: kind Unavailable, or ctx's.
func (f *Follower) Confirm(ctx context.Context) (uint64, error) {
	f.mu.Lock()
	if f.round == nil {
		f.round = &round{done: make(chan struct{})}
	}
	r := f.round
	f.mu.Unlock()
	select {
	case f.asked <- struct{}{}:
	default:
	}
	select {
	case <-r.done:
		return r.head, r.err
	case <-f.ended:
		return 0, outrigger.Errorf(outrigger.Unavailable, "this replica has stopped")
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// confirmer asks the leader for its head whenever somebody waits, and now and then.
func (f *Follower) confirmer(ctx context.Context) {
	t := time.NewTicker(f.opts.Check)
	defer t.Stop()
	for {
		select {
		case <-f.asked:
		case <-t.C:
		case <-ctx.Done():
			return
		}
		f.mu.Lock()
		r := f.round
		f.round = nil
		f.mu.Unlock()
		begun := f.opts.Now()
		out, err := f.ask(ctx)
		if err == nil && out.GetIncarnation() != f.Incarnation() {
			err = outrigger.Errorf(outrigger.Unavailable, "the leader's log is another one now")
		}
		if err == nil {
			f.heard.Store(begun.UnixNano())
			f.mu.Lock()
			close(f.silence)
			f.silence = make(chan struct{})
			f.mu.Unlock()
		}
		if r != nil {
			if err != nil && !errors.Is(err, context.Canceled) {
				err = outrigger.Wrap(outrigger.Unavailable, err, "the leader of this replica, "+f.opts.Leader+", does not answer")
			}
			r.head, r.err = out.GetHead(), err
			close(r.done)
		}
		if !pause.For(ctx, confirmPause) {
			return
		}
	}
}

// Silence is how long ago the last question was asked that the leader answered; before the
// first answer of this life it is longer than any limit, because what an earlier life heard,
// and when, is not known.
func (f *Follower) Silence(now time.Time) time.Duration {
	heard := f.heard.Load()
	if heard == 0 {
		return math.MaxInt64
	}
	return max(0, now.Sub(time.Unix(0, heard)))
}

// Heard returns a channel that is closed by the leader's next answer.
func (f *Follower) Heard() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.silence
}

// backoff is 100 ms doubling to 3 s, half of it random.
func backoff(failures int) time.Duration {
	d := min(3*time.Second, 100*time.Millisecond<<min(failures, 5))
	return d/2 + mrand.N(d/2)
}
