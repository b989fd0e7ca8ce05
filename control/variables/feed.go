package variables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

const (
	// feedStep is the number of frames a stream takes from the ring at a time.
	feedStep = 16
	// heartbeatQueue bounds the unanswered heartbeats of one stream; beyond it the
	// oldest is dropped, because the newest answer is worth the longest lease.
	heartbeatQueue = 16
	// selectQueue bounds the selects of one stream that are not taken yet. A node sends
	// the next one when the last is answered, so more are an error of its.
	selectQueue = 16
)

// feeds lists the open feed streams.
type feeds struct {
	mu   sync.Mutex
	open map[*feed]struct{}
}

func (f *feeds) add(x *feed) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.open == nil {
		f.open = make(map[*feed]struct{})
	}
	f.open[x] = struct{}{}
}

func (f *feeds) remove(x *feed) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.open, x)
}

func (f *feeds) list() []FeedStat {
	f.mu.Lock()
	all := slices.Collect(maps.Keys(f.open))
	f.mu.Unlock()
	out := make([]FeedStat, 0, len(all))
	for _, x := range all {
		out = append(out, FeedStat{Node: x.node, Since: x.since, Sent: x.sent.Load(), Reset: int(x.resets.Load())})
	}
	slices.SortFunc(out, func(a, b FeedStat) int {
		return cmp.Or(cmp.Compare(a.Node.ID, b.Node.ID), a.Since.Compare(b.Since))
	})
	return out
}

// feed is one Feed call. Only the handler's goroutine sends; it holds a cursor into the
// ring and no queue of changes.
type feed struct {
	s      *Service
	ring   *ring
	stream grpc.BidiStreamingServer[pb.FeedRequest, pb.FeedFrame]
	node   outrigger.Node
	since  time.Time
	beats  chan *pb.Heartbeat
	ended  chan error // one element: why receiving ended

	wake    chan struct{}   // one element: there may be something to send
	selects chan *pb.Select // of a selective stream
	sel     *selection      // nil = every change

	cursor uint64        // every change up to here was sent
	sent   atomic.Uint64 // cursor, for Stats
	resets atomic.Int64
}

// Feed implements pb.CoherenceServer. It ends without an error when the client closes
// its side, and with Unavailable when the service stops.
func (s *Service) Feed(stream grpc.BidiStreamingServer[pb.FeedRequest, pb.FeedFrame]) error {
	return status.ToGRPC(s.feed(stream))
}

func (s *Service) feed(stream grpc.BidiStreamingServer[pb.FeedRequest, pb.FeedFrame]) error {
	if err := s.isReady(); err != nil {
		return err
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	sub := first.GetSubscribe()
	if sub == nil {
		return outrigger.Errorf(outrigger.Invalid, "the first message of a feed must be subscribe")
	}
	if n := len(sub.GetNode().GetId()); n == 0 || n > outrigger.MaxNameBytes {
		return outrigger.Errorf(outrigger.Invalid, "subscribe.node.id is %d bytes long; give 1 to %d", n, outrigger.MaxNameBytes)
	}
	f := &feed{
		s: s, ring: s.ring.Load(), stream: stream, node: wire.Node(sub.GetNode()), since: s.opt.Now(),
		beats: make(chan *pb.Heartbeat, heartbeatQueue), ended: make(chan error, 1),
		wake: make(chan struct{}, 1), selects: make(chan *pb.Select, selectQueue),
	}
	if err := f.listen(sub.GetSelect()); err != nil {
		return err
	}
	defer f.unlisten()
	s.feeds.add(f)
	defer s.feeds.remove(f)
	go f.receive() // ends with the stream's context, which ends when this handler returns
	s.opt.Logger.Info("feed opened", "node", f.node.ID, "from", sub.GetFrom(), "incarnation", sub.GetIncarnation())
	err = endOf(f.run(sub))
	s.opt.Logger.Info("feed closed", "node", f.node.ID, "sent", f.cursor, "open", s.opt.Now().Sub(f.since), "error", err)
	return err
}

// receive takes heartbeats and selects off the stream as they come.
func (f *feed) receive() {
	for {
		req, err := f.stream.Recv()
		if err == nil && req.GetSelect() != nil && f.sel != nil {
			if err = f.queue(req.GetSelect()); err == nil {
				continue
			}
		}
		if err == nil && req.GetHeartbeat() == nil {
			err = outrigger.Errorf(outrigger.Invalid, "a feed takes one subscribe and then heartbeats only, and selects if the subscribe had one; open another stream")
		}
		if err != nil {
			f.ended <- err
			return
		}
		for queued := false; !queued; {
			select {
			case f.beats <- req.GetHeartbeat():
				queued = true
			default:
				select {
				case <-f.beats:
				default: // the handler was faster
				}
			}
		}
	}
}

func (f *feed) run(sub *pb.Subscribe) error {
	if err := f.begin(sub); err != nil {
		return err
	}
	if f.sel != nil && f.resets.Load() > 0 {
		// It had to hear of the log first.
		if err := f.answerSelect(); err != nil {
			return err
		}
	}
	for {
		if err := f.answer(); err != nil {
			return err
		}
		if f.sel != nil {
			more, err := f.advance(false)
			if err == nil && !more {
				err = f.idle()
			}
			if err != nil {
				return err
			}
			continue
		}
		if merged := f.ring.latest(f.cursor); merged != nil {
			if err := f.send([]*frame{merged}); err != nil {
				return err
			}
			continue
		}
		frames, head, stale := f.ring.after(f.cursor, feedStep)
		if stale {
			if err := f.reset(head, fmt.Sprintf("position %d is no longer kept", f.cursor)); err != nil {
				return err
			}
			continue
		}
		if err := f.send(frames); err != nil {
			return err
		}
		if len(frames) > 0 {
			continue
		}
		if err := f.idle(); err != nil {
			return err
		}
	}
}

// begin answers Subscribe: with a reset, or with a frame that continues where it says.
func (f *feed) begin(sub *pb.Subscribe) error {
	o := f.s.origin
	f.moveTo(sub.GetFrom())
	frames, head, stale := f.ring.after(sub.GetFrom(), 1)
	switch {
	case sub.GetIncarnation() == 0:
		return f.reset(head, "first subscription")
	case sub.GetIncarnation() != o.incarnation:
		return f.reset(head, fmt.Sprintf("the log is now incarnation %x", o.incarnation))
	case stale:
		return f.reset(head, fmt.Sprintf("position %d is no longer kept", sub.GetFrom()))
	case sub.GetFrom() > f.s.log.Head():
		return f.reset(head, fmt.Sprintf("position %d is beyond the log's end", sub.GetFrom()))
	case f.sel != nil:
		return f.answerSelect()
	case len(frames) == 0: // nothing new, or this replica is behind the subscriber
		nothing := &frame{previous: sub.GetFrom(), through: sub.GetFrom()}
		return f.stream.Send(nothing.plain(o))
	}
	return f.send(frames)
}

func (f *feed) moveTo(position uint64) {
	f.cursor = position
	f.sent.Store(position)
}

func (f *feed) reset(from uint64, reason string) error {
	f.resets.Add(1)
	f.s.metrics.resets.Add(f.stream.Context(), 1)
	f.moveTo(from)
	o := f.s.origin
	return f.stream.Send(&pb.FeedFrame{
		Incarnation: o.incarnation, Region: o.region, Selective: f.sel != nil,
		Kind: &pb.FeedFrame_Reset_{Reset_: &pb.Reset{From: from, Reason: reason}},
	})
}

// send sends frames one by one, with the heartbeats that have come in before each.
func (f *feed) send(frames []*frame) error {
	for _, x := range frames {
		if err := f.answer(); err != nil {
			return err
		}
		msg, err := x.message(f.s.origin)
		if err != nil {
			return err
		}
		if err := f.stream.Send(msg); err != nil {
			return err
		}
		f.s.metrics.frames.Add(f.stream.Context(), 1)
		f.moveTo(x.through)
	}
	return nil
}

// answer acknowledges every heartbeat that has arrived, and ends the stream when the
// client has.
func (f *feed) answer() error {
	for {
		select {
		case err := <-f.ended:
			return err
		case hb := <-f.beats:
			if err := f.ack(hb); err != nil {
				return err
			}
		case sel := <-f.selects:
			if err := f.choose(sel); err != nil {
				return err
			}
		default:
			return nil
		}
	}
}

// ack answers a heartbeat. A selective stream is brought up to the head before, because
// nothing else moves it while nothing concerns it; a stream that lags is not waited for.
func (f *feed) ack(hb *pb.Heartbeat) error {
	o, head := f.s.origin, f.s.Applied()
	if f.sel != nil {
		if _, err := f.advance(true); err != nil {
			return err
		}
	}
	return f.stream.Send(&pb.FeedFrame{
		Incarnation: o.incarnation, Region: o.region, Selective: f.sel != nil,
		Kind: &pb.FeedFrame_Ack{Ack: &pb.HeartbeatAck{Sent: hb.GetSent(), Head: head}},
	})
}

// idle waits for something to do.
func (f *feed) idle() error {
	select {
	case <-f.wake:
		return nil
	case sel := <-f.selects:
		return f.choose(sel)
	case hb := <-f.beats:
		return f.ack(hb)
	case err := <-f.ended:
		return err
	case <-f.stream.Context().Done():
		return context.Cause(f.stream.Context())
	case <-f.s.stopped:
		return f.s.isReady()
	}
}

// endOf turns the client's orderly goodbye into success.
func endOf(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
