package replicate

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"math"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// LeaderOptions configure a Leader; Log is required.
type LeaderOptions struct {
	Log eventlog.Log
	// Shown waits until the leader's own answers show a position, so that what a follower's
	// writer was told is done is read at the leader, too; nil = they always do.
	Shown  func(ctx context.Context, position uint64) error
	Now    func() time.Time // nil = time.Now
	Logger *slog.Logger     // nil = discard
}

// Leader serves followers. It has no goroutine of its own.
type Leader struct {
	pb.UnimplementedReplicationServer
	opts LeaderOptions

	mu        sync.Mutex
	following int
	replicas  map[string]*replica
	changed   chan struct{} // closed and replaced when a standing changed
}

// replica is who follows policy through one follower.
type replica struct {
	stream int // counts: a stream that was overtaken must not end its successor
	nodes  map[string]*pb.NodeStanding
}

// NewLeader checks the options; it starts nothing. Errors have kind Invalid.
func NewLeader(o LeaderOptions) (*Leader, error) {
	if o.Log == nil {
		return nil, outrigger.Errorf(outrigger.Invalid, "replicate: LeaderOptions.Log is nil")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Leader{opts: o, replicas: make(map[string]*replica), changed: make(chan struct{})}, nil
}

// Follow implements pb.ReplicationServer.
func (l *Leader) Follow(req *pb.FollowRequest, stream grpc.ServerStreamingServer[pb.LogShipment]) error {
	return status.ToGRPC(l.follow(req, stream))
}

func (l *Leader) follow(req *pb.FollowRequest, stream grpc.ServerStreamingServer[pb.LogShipment]) error {
	log := l.opts.Log
	if err := outrigger.CheckName("replica", req.GetReplica()); err != nil {
		return err
	}
	switch head := log.Head(); {
	case req.GetIncarnation() != 0 && req.GetIncarnation() != log.Incarnation():
		return outrigger.Errorf(outrigger.Stale, "the copy is of log %x, this log is %x; remove the follower's directory to copy this one", req.GetIncarnation(), log.Incarnation())
	case req.GetFrom() == 0 || req.GetFrom() > head+1:
		return outrigger.Errorf(outrigger.Stale, "from is %d, the log has 1 to %d; a copy that has more than its leader is not of this log any more", req.GetFrom(), head)
	}
	if err := l.enter(); err != nil {
		return err
	}
	defer l.leave()
	l.opts.Logger.Info("follower connected", "replica", req.GetReplica(), "from", req.GetFrom())
	err := l.ship(req.GetFrom(), stream)
	l.opts.Logger.Info("follower gone", "replica", req.GetReplica(), "error", err)
	return err
}

func (l *Leader) enter() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.following >= MaxFollowers {
		return outrigger.Errorf(outrigger.Exhausted, "%d replicas follow already, the limit is %d; follow one of them", l.following, MaxFollowers)
	}
	l.following++
	return nil
}

func (l *Leader) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.following--
}

// ship sends what the log has, gathering what waits.
func (l *Leader) ship(from uint64, stream grpc.ServerStreamingServer[pb.LogShipment]) error {
	log := l.opts.Log
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	events := make(chan *pb.Event, shipmentEvents)
	ended := make(chan error, 1)
	go func() { // ends with the stream
		ended <- feed(ctx, log, from, events)
	}()
	shipment := &pb.LogShipment{Incarnation: log.Incarnation(), Head: log.Head()}
	for {
		if err := stream.Send(shipment); err != nil {
			return err
		}
		select {
		case err := <-ended:
			return err
		case e := <-events:
			shipment = &pb.LogShipment{Incarnation: log.Incarnation(), Events: gather(e, events)}
			shipment.Head = log.Head()
		}
	}
}

// feed hands the log's events on until ctx ends or the log fails.
func feed(ctx context.Context, log eventlog.Subscriber, from uint64, out chan<- *pb.Event) error {
	for e, err := range log.Subscribe(ctx, from) {
		if err != nil {
			return err
		}
		select {
		case out <- e:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return ctx.Err()
}

// gather takes what else is there, up to the bounds of a shipment.
func gather(first *pb.Event, more <-chan *pb.Event) []*pb.Event {
	out, size := []*pb.Event{first}, proto.Size(first)
	for len(out) < shipmentEvents && size < shipmentBytes {
		select {
		case e := <-more:
			out, size = append(out, e), size+proto.Size(e)
		default:
			return out
		}
	}
	return out
}

// Append implements pb.ReplicationServer.
func (l *Leader) Append(ctx context.Context, req *pb.AppendRequest) (*pb.AppendResponse, error) {
	out := &pb.AppendResponse{Incarnation: l.opts.Log.Incarnation()}
	if req.GetRequestId() == "" {
		out.Refusal = refusal(outrigger.Errorf(outrigger.Invalid, "request_id is empty; give one that is unique, so that the request may be repeated"))
		return out, nil
	}
	var writes []eventlog.Write
	for _, w := range req.GetWrites() {
		writes = append(writes, eventlog.Write{Aggregate: w.GetAggregate(), Expect: w.GetExpect(), Events: w.GetEvents()})
	}
	done, err := l.opts.Log.Append(ctx, req.GetRequestId(), writes...)
	if err == nil && l.opts.Shown != nil {
		if err := l.opts.Shown(ctx, done.Last); err != nil {
			return nil, status.ToGRPC(outrigger.Wrap(outrigger.Unknown, err, "the write is durable, but not shown yet"))
		}
	}
	switch {
	case err == nil:
		out.First, out.Last, out.Duplicate = done.First, done.Last, done.Duplicate
	case outrigger.IsKind(err, outrigger.Unknown) || ctx.Err() != nil:
		return nil, status.ToGRPC(err) // not a refusal: the caller must ask again
	default:
		out.Refusal = refusal(err)
	}
	return out, nil
}

func refusal(err error) *pb.Refusal {
	r := &pb.Refusal{Kind: outrigger.KindOf(err).String(), Message: err.Error()}
	var e *outrigger.Error
	if errors.As(err, &e) {
		r.Message, r.Current = e.Message, int64(e.Current)
	}
	return r
}

// refused is the error a refusal stands for.
func refused(r *pb.Refusal) error {
	e := outrigger.Errorf(outrigger.Internal, "%s", r.GetMessage())
	for _, k := range outrigger.Kinds() {
		if k.String() == r.GetKind() {
			e.Kind = k
		}
	}
	e.Current = int32(min(max(r.GetCurrent(), math.MinInt32), math.MaxInt32))
	return e
}

// Head implements pb.ReplicationServer.
func (l *Leader) Head(context.Context, *pb.HeadRequest) (*pb.HeadResponse, error) {
	return &pb.HeadResponse{Incarnation: l.opts.Log.Incarnation(), Head: l.opts.Log.Head()}, nil
}

// Stand implements pb.ReplicationServer.
func (l *Leader) Stand(stream grpc.ClientStreamingServer[pb.ReplicaStanding, pb.StandResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	name := first.GetReplica()
	if err := outrigger.CheckName("replica", name); err != nil {
		return status.ToGRPC(err)
	}
	number, err := l.stand(name, first)
	if err != nil {
		return status.ToGRPC(err)
	}
	defer l.fall(name, number)
	for {
		more, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&pb.StandResponse{})
		}
		if err != nil {
			return err
		}
		if err := l.update(name, number, more); err != nil {
			return status.ToGRPC(err)
		}
	}
}

// stand begins a follower's standing anew.
func (l *Leader) stand(name string, first *pb.ReplicaStanding) (number int, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.replicas[name]
	if r == nil {
		if len(l.replicas) >= MaxFollowers {
			return 0, outrigger.Errorf(outrigger.Exhausted, "%d replicas are known already, the limit is %d", len(l.replicas), MaxFollowers)
		}
		r = &replica{}
		l.replicas[name] = r
	}
	r.stream++
	r.nodes = make(map[string]*pb.NodeStanding)
	return r.stream, l.merge(r, first)
}

func (l *Leader) update(name string, number int, more *pb.ReplicaStanding) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.replicas[name]
	if r == nil || r.stream != number {
		return outrigger.Errorf(outrigger.Conflict, "replica %s has opened another stream", name)
	}
	return l.merge(r, more)
}

// merge takes what a message says; the mutex is held.
func (l *Leader) merge(r *replica, m *pb.ReplicaStanding) error {
	for _, n := range m.GetNodes() {
		id := n.GetNode().GetId()
		if id == "" || len(id) > outrigger.MaxNameBytes {
			return outrigger.Errorf(outrigger.Invalid, "a node's id is %d bytes long; give 1 to %d", len(id), outrigger.MaxNameBytes)
		}
		if r.nodes[id] == nil && len(r.nodes) >= MaxStandingNodes {
			return outrigger.Errorf(outrigger.Exhausted, "a replica stands for %d nodes already, the limit is %d", len(r.nodes), MaxStandingNodes)
		}
		r.nodes[id] = n
	}
	close(l.changed)
	l.changed = make(chan struct{})
	return nil
}

// fall ends a follower's standing: its nodes are known to be nobody's from now on.
func (l *Leader) fall(name string, number int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.replicas[name]
	if r == nil || r.stream != number {
		return
	}
	now := l.opts.Now()
	for id, n := range r.nodes {
		if n.GetConnected() {
			r.nodes[id] = disconnected(n, now)
		}
	}
	close(l.changed)
	l.changed = make(chan struct{})
}

// Nodes lists who follows policy through followers, by node id. The messages must not be
// modified. Of a node that several followers name, the one it is connected to counts, else
// the one that saw it last.
func (l *Leader) Nodes() []*pb.NodeStanding {
	l.mu.Lock()
	defer l.mu.Unlock()
	best := make(map[string]*pb.NodeStanding)
	for _, name := range slices.Sorted(maps.Keys(l.replicas)) {
		for id, n := range l.replicas[name].nodes {
			if have := best[id]; have == nil || newer(n, have) {
				best[id] = n
			}
		}
	}
	return slices.SortedFunc(maps.Values(best), func(a, b *pb.NodeStanding) int { return cmp.Compare(a.GetNode().GetId(), b.GetNode().GetId()) })
}

// Changed returns a channel that is closed by the next change of Nodes. Take it before
// reading.
func (l *Leader) Changed() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

// newer reports whether a tells more about where a node stands now than b.
func newer(a, b *pb.NodeStanding) bool {
	if a.GetConnected() != b.GetConnected() {
		return a.GetConnected()
	}
	return a.GetSince().AsTime().After(b.GetSince().AsTime())
}
