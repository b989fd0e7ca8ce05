package variables

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
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

// feed is one open feed: what it was sent, and where it is sent. It holds a cursor into
// the ring and no queue of changes. One goroutine at a time uses it, but for what its
// fields' types allow.
type feed struct {
	s     *Service
	ring  *ring
	out   sink
	node  outrigger.Node
	since time.Time
	rouse func()     // there may be something to send; it does not wait
	sel   *selection // nil = every change
	work  work       // of a selective one

	cursor uint64        // every change up to here was sent
	sent   atomic.Uint64 // cursor, for Stats
	resets atomic.Int64
}

// sink takes frames to a node, in order.
type sink interface {
	send(*pb.FeedFrame) error
	// sendFrame sends a frame of the ring to a node that takes every change.
	sendFrame(*frame, origin) error
	// sendPieces sends encoded changes, those from previous to through that were selected.
	sendPieces(o origin, previous, through uint64, pieces [][]byte) error
	// sendAck answers the heartbeat sent at sent.
	sendAck(o origin, selective bool, sent, head uint64) error
}

// open makes the feed that sub asks for. unlisten must be called when it ends.
func (f *feed) open(s *Service, sub *pb.Subscribe) error {
	if sub == nil {
		return outrigger.Errorf(outrigger.Invalid, "the first message of a feed must be subscribe")
	}
	if n := len(sub.GetNode().GetId()); n == 0 || n > outrigger.MaxNameBytes {
		return outrigger.Errorf(outrigger.Invalid, "subscribe.node.id is %d bytes long; give 1 to %d", n, outrigger.MaxNameBytes)
	}
	f.s, f.ring, f.node, f.since = s, s.ring.Load(), wire.Node(sub.GetNode()), s.opt.Now()
	if err := f.listen(sub.GetSelect()); err != nil {
		return err
	}
	s.feeds.add(f)
	s.opt.Logger.Info("feed opened", "node", f.node.ID, "from", sub.GetFrom(), "incarnation", sub.GetIncarnation())
	return nil
}

func (f *feed) close(why error) {
	f.s.feeds.remove(f)
	f.unlisten()
	f.s.opt.Logger.Info("feed closed", "node", f.node.ID, "sent", f.sent.Load(), "open", f.s.opt.Now().Sub(f.since), "error", why)
}

// errTurn answers what a feed's client may not send.
func errTurn() error {
	return outrigger.Errorf(outrigger.Invalid, "a feed takes one subscribe and then heartbeats only, and selects if the subscribe had one; open another stream")
}

func errSelects() error {
	return outrigger.Errorf(outrigger.Exhausted, "%d selects wait already; wait for the answer before sending the next", selectQueue)
}

// start sends what answers sub.
func (f *feed) start(sub *pb.Subscribe) error {
	if err := f.begin(sub); err != nil {
		return err
	}
	if f.sel != nil && f.resets.Load() > 0 {
		return f.answerSelect() // it had to hear of the log first
	}
	return nil
}

// next sends one frame of what waits; more is false when nothing does.
func (f *feed) next() (more bool, err error) {
	if f.sel != nil {
		return f.advance(false)
	}
	x := f.ring.latest(f.cursor)
	if x == nil {
		frames, head, stale := f.ring.after(f.cursor, 1)
		switch {
		case stale:
			return true, f.reset(head, fmt.Sprintf("position %d is no longer kept", f.cursor))
		case len(frames) == 0:
			return false, nil
		}
		x = frames[0]
	}
	return true, f.sendRing(x)
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
		return f.out.send(nothing.plain(o))
	}
	return f.sendRing(frames[0])
}

func (f *feed) moveTo(position uint64) {
	f.cursor = position
	f.sent.Store(position)
}

func (f *feed) reset(from uint64, reason string) error {
	f.resets.Add(1)
	f.s.metrics.resets.Add(context.Background(), 1)
	f.moveTo(from)
	o := f.s.origin
	return f.out.send(&pb.FeedFrame{
		Incarnation: o.incarnation, Region: o.region, Selective: f.sel != nil,
		Kind: &pb.FeedFrame_Reset_{Reset_: &pb.Reset{From: from, Reason: reason}},
	})
}

func (f *feed) sendRing(x *frame) error {
	if err := f.out.sendFrame(x, f.s.origin); err != nil {
		return err
	}
	f.s.metrics.frames.Add(context.Background(), 1)
	f.moveTo(x.through)
	return nil
}

// ack answers a heartbeat. A selective stream is brought up to the head before, because
// nothing else moves it while nothing concerns it; a stream that lags is not waited for.
func (f *feed) ack(sent uint64) error {
	head := f.s.Applied()
	if f.sel != nil {
		if _, err := f.advance(true); err != nil {
			return err
		}
	}
	return f.out.sendAck(f.s.origin, f.sel != nil, sent, head)
}
