// Package report streams what a process observed to the control plane: mergeable
// deltas at 1 Hz, failures within 100 ms.
//
// Deltas are numbered per process life; one that was not acknowledged is sent again
// with its number after a reconnect and counted once by the receiver. While the stream
// is down nothing is collected, so observations stay where they are aggregated and
// bounded; at most MaxUnacked deltas wait for acknowledgement, then collecting pauses
// too. A delta the receiver calls invalid is dropped and logged. What a crash loses is at most what was not yet collected or acknowledged.
package report

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// MaxUnacked bounds deltas that were sent and not yet acknowledged.
const MaxUnacked = 32

// Options configure a Reporter.
type Options struct {
	Conn grpc.ClientConnInterface // to the control plane
	Node *pb.Node
	// Start distinguishes lives of the process; unique per start.
	Start time.Time
	// Collect drains what was observed since the last call into d (reporter, sequence and
	// window are filled in). It reports whether there is anything to send. One caller.
	Collect func(now time.Time, d *pb.Delta) bool
	// Urgent receives when a failure should be sent within 100 ms; may be nil.
	Urgent <-chan struct{}
	// Period between deltas, default 1 s; UrgentDelay gathers a burst of failures,
	// default 50 ms.
	Period, UrgentDelay time.Duration
	Logger              *slog.Logger
}

// Reporter sends deltas while Run runs.
type Reporter struct {
	opts     Options
	id       string
	sequence uint64
	last     time.Time   // end of the last window
	unacked  []*pb.Delta // oldest first
}

// New returns a reporter that has sent nothing.
func New(o Options) *Reporter {
	if o.Period == 0 {
		o.Period = time.Second
	}
	if o.UrgentDelay == 0 {
		o.UrgentDelay = 50 * time.Millisecond
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Reporter{opts: o, last: o.Start, id: o.Node.GetId() + "@" + strconv.FormatInt(o.Start.UnixNano(), 36)}
}

// Run keeps a stream open until ctx ends; then it sends what is left, within a second.
func (r *Reporter) Run(ctx context.Context) error {
	failures := 0
	for ctx.Err() == nil {
		start := time.Now()
		err := r.session(ctx)
		if ctx.Err() != nil {
			break
		}
		r.giveUp(err)
		if time.Since(start) > 10*time.Second {
			failures = 0
		}
		if failures++; failures == 1 {
			r.opts.Logger.Info("report stream ended; retrying", "error", err)
		}
		t := time.NewTimer(backoff(failures))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
	return nil
}

// giveUp drops the oldest delta when the receiver says that it can never be taken:
// repeating it would hold up everything behind it for ever.
func (r *Reporter) giveUp(err error) {
	if gstatus.Code(err) != codes.InvalidArgument || len(r.unacked) == 0 {
		return
	}
	r.opts.Logger.Error("report refused and dropped", "sequence", r.unacked[0].Sequence, "error", err)
	r.unacked = r.unacked[1:]
}

// backoff is 100 ms doubling to 5 s, half of it random.
func backoff(failures int) time.Duration {
	d := min(5*time.Second, 50*time.Millisecond<<min(failures, 10))
	return d/2 + time.Duration(rand.Int64N(int64(d/2)+1))
}

// session is one stream's life.
func (r *Reporter) session(ctx context.Context) error {
	// The stream outlives ctx by up to a second so that the last delta can be sent.
	sctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stream, err := pb.NewReportsClient(r.opts.Conn).Push(sctx)
	if err != nil {
		cancel()
		return err
	}
	acks := make(chan uint64, MaxUnacked)
	broken := make(chan error, 1)
	received := make(chan struct{})
	go func() {
		defer close(received)
		receive(sctx, stream, acks, broken)
	}()
	defer func() {
		cancel()
		<-received
	}()
	for _, d := range r.unacked {
		if err := stream.Send(d); err != nil {
			return r.refused(err, acks, broken)
		}
	}

	period := time.NewTicker(r.opts.Period)
	defer period.Stop()
	soon := time.NewTimer(time.Hour)
	defer soon.Stop()
	for {
		select {
		case seq := <-acks:
			r.acknowledge(seq)
			continue
		case err := <-broken:
			return err
		case <-r.opts.Urgent:
			soon.Reset(r.opts.UrgentDelay)
			continue
		case <-soon.C:
		case <-period.C:
		case <-ctx.Done():
			return r.farewell(stream, acks, broken)
		}
		if err := r.send(stream); err != nil {
			return r.refused(err, acks, broken)
		}
	}
}

func receive(ctx context.Context, stream grpc.BidiStreamingClient[pb.Delta, pb.DeltaAck], acks chan<- uint64, broken chan<- error) {
	for {
		a, err := stream.Recv()
		if err != nil {
			broken <- err
			return
		}
		select {
		case acks <- a.Sequence:
		case <-ctx.Done():
			return
		}
	}
}

// refused turns the error of a Send into that of the stream: io.EOF says only that it has
// ended, and the status is what the one goroutine that may receive gets.
func (r *Reporter) refused(err error, acks <-chan uint64, broken <-chan error) error {
	if !errors.Is(err, io.EOF) {
		return err
	}
	for {
		select {
		case seq := <-acks:
			r.acknowledge(seq)
		case err := <-broken:
			return err
		}
	}
}

func (r *Reporter) acknowledge(seq uint64) {
	for len(r.unacked) > 0 && r.unacked[0].Sequence <= seq {
		r.unacked = r.unacked[1:]
	}
}

// send collects and sends one delta, unless too many are unacknowledged.
func (r *Reporter) send(stream grpc.BidiStreamingClient[pb.Delta, pb.DeltaAck]) error {
	if len(r.unacked) >= MaxUnacked {
		return nil
	}
	now := time.Now()
	d := &pb.Delta{Reporter: r.id, Node: r.opts.Node, WindowStartUnixNano: uint64(r.last.UnixNano()), WindowEndUnixNano: uint64(now.UnixNano())}
	if !r.opts.Collect(now, d) {
		return nil
	}
	r.last = now
	r.sequence++
	d.Sequence = r.sequence
	r.unacked = append(r.unacked, d)
	return stream.Send(d)
}

// farewell sends the rest and waits for its acknowledgement.
func (r *Reporter) farewell(stream grpc.BidiStreamingClient[pb.Delta, pb.DeltaAck], acks <-chan uint64, broken <-chan error) error {
	if err := r.send(stream); err != nil {
		return r.refused(err, acks, broken)
	}
	limit := time.NewTimer(time.Second)
	defer limit.Stop()
	for len(r.unacked) > 0 {
		select {
		case seq := <-acks:
			r.acknowledge(seq)
		case err := <-broken:
			return err
		case <-limit.C:
			r.opts.Logger.Warn("reports left unacknowledged at the end", "deltas", len(r.unacked))
			return nil
		}
	}
	return stream.CloseSend()
}
