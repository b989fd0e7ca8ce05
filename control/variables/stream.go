package variables

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

const (
	// heartbeatQueue bounds the unanswered heartbeats of one stream; beyond it the
	// oldest is dropped, because the newest answer is worth the longest lease.
	heartbeatQueue = 16
	// selectQueue bounds the selects of one stream that are not taken yet. A node sends
	// the next one when the last is answered, so more are an error of its.
	selectQueue = 16
)

// stream is one Feed call. Only the handler's goroutine sends.
type stream struct {
	feed
	grpc   grpc.BidiStreamingServer[pb.FeedRequest, pb.FeedFrame]
	beats  chan *pb.Heartbeat
	ended  chan error // one element: why receiving ended
	proofs proofs

	wake    chan struct{}   // one element: there may be something to send
	selects chan *pb.Select // of a selective stream
}

// Feed implements pb.CoherenceServer. It ends without an error when the client closes
// its side, and with Unavailable when the service stops.
func (s *Service) Feed(call grpc.BidiStreamingServer[pb.FeedRequest, pb.FeedFrame]) error {
	return status.ToGRPC(s.feed(call))
}

func (s *Service) feed(call grpc.BidiStreamingServer[pb.FeedRequest, pb.FeedFrame]) error {
	if err := s.isReady(); err != nil {
		return err
	}
	first, err := call.Recv()
	if err != nil {
		return err
	}
	f := &stream{
		grpc: call, beats: make(chan *pb.Heartbeat, heartbeatQueue), ended: make(chan error, 1),
		wake: make(chan struct{}, 1), selects: make(chan *pb.Select, selectQueue),
	}
	f.out, f.rouse = grpcSink{call}, func() {
		select {
		case f.wake <- struct{}{}:
		default: // the handler will look anyway
		}
	}
	sub := first.GetSubscribe()
	if err := s.proven(call.Context()); err != nil {
		return err
	}
	if err := f.open(s, sub); err != nil {
		return err
	}
	go f.receive() // ends with the stream's context, which ends when this handler returns
	err = endOf(f.run(sub))
	f.close(err)
	return err
}

// receive takes heartbeats and selects off the stream as they come.
func (f *stream) receive() {
	for {
		req, err := f.grpc.Recv()
		if err == nil && req.GetSelect() != nil && f.sel != nil {
			if err = f.queue(req.GetSelect()); err == nil {
				continue
			}
		}
		if err == nil && req.GetHeartbeat() == nil {
			err = errTurn()
		}
		if err != nil {
			f.ended <- err
			return
		}
		if f.s.opt.Confirm != nil {
			f.proofs.ask(f.s, func() { f.beat(req.GetHeartbeat()) })
			continue
		}
		f.beat(req.GetHeartbeat())
	}
}

// beat queues a heartbeat for its answer; of too many the oldest goes.
func (f *stream) beat(hb *pb.Heartbeat) {
	for {
		select {
		case f.beats <- hb:
			return
		default:
			select {
			case <-f.beats:
			default: // the handler was faster
			}
		}
	}
}

// queue hands a select to the handler.
func (f *stream) queue(sel *pb.Select) error {
	if err := checkSelect(sel); err != nil {
		return err
	}
	select {
	case f.selects <- sel:
		return nil
	default:
		return errSelects()
	}
}

func (f *stream) run(sub *pb.Subscribe) error {
	if err := f.start(sub); err != nil {
		return err
	}
	for {
		if err := f.answer(); err != nil {
			return err
		}
		more, err := f.next()
		if err == nil && !more {
			err = f.idle()
		}
		if err != nil {
			return err
		}
	}
}

// answer acknowledges every heartbeat that has arrived, and ends the stream when the
// client has.
func (f *stream) answer() error {
	for {
		select {
		case err := <-f.ended:
			return err
		case hb := <-f.beats:
			if err := f.ack(hb.GetSent()); err != nil {
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

// idle waits for something to do.
func (f *stream) idle() error {
	select {
	case <-f.wake:
		return nil
	case sel := <-f.selects:
		return f.choose(sel)
	case hb := <-f.beats:
		return f.ack(hb.GetSent())
	case err := <-f.ended:
		return err
	case <-f.grpc.Context().Done():
		return context.Cause(f.grpc.Context())
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

// grpcSink sends on a gRPC stream.
type grpcSink struct {
	call grpc.BidiStreamingServer[pb.FeedRequest, pb.FeedFrame]
}

func (g grpcSink) send(m *pb.FeedFrame) error { return g.call.Send(m) }

func (g grpcSink) sendFrame(f *frame, o origin) error {
	raw, err := f.bytes(o)
	if err != nil {
		return err
	}
	return g.call.Send(preEncoded(raw))
}

func (g grpcSink) sendPieces(o origin, previous, through uint64, pieces [][]byte) error {
	return g.call.Send(preEncoded(assemble(nil, o, previous, through, pieces)))
}

func (g grpcSink) sendAck(o origin, selective bool, sent, head uint64) error {
	return g.call.Send(&pb.FeedFrame{
		Incarnation: o.incarnation, Region: o.region, Selective: selective,
		Kind: &pb.FeedFrame_Ack{Ack: &pb.HeartbeatAck{Sent: sent, Head: head}},
	})
}

// preEncoded is a message that is already encoded: an empty FeedFrame whose unknown fields
// are the bytes of the full one, which every codec copies out as they are. A receiver
// decodes it like any other. It must only be sent, not read.
func preEncoded(raw []byte) *pb.FeedFrame {
	m := &pb.FeedFrame{}
	m.ProtoReflect().SetUnknown(raw)
	return m
}
