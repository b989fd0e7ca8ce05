package facts

import (
	"encoding/binary"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// A snapshot is events, each in protobuf after its length, that are folded again on
// load. That is slower than decoding the state itself, but there is no second encoding
// that could disagree with the log, and control events are few. Alerts and pushes are
// many over the years and only their latest matter, so those are written from the state;
// the same goes for optimisers and their runs.

// snapshotFormat is the first byte of a snapshot; another one makes it unreadable, which
// costs a full replay.
const snapshotFormat = 1

// kept is the events policy depends on, encoded. failed is set when one could not be
// encoded: then there are no more snapshots.
type kept struct {
	events []byte
	failed bool
}

func (k *kept) add(e *pb.Event) {
	switch e.GetPayload().(type) {
	case *pb.Event_AlertRaised, *pb.Event_AlertResolved, *pb.Event_AlertSilenced, *pb.Event_AlertNotified, *pb.Event_PushRecorded,
		*pb.Event_OptimizerRegistered, *pb.Event_OptimizerRemoved, *pb.Event_OptimizationRecorded:
		return
	}
	out, err := appendEvent(k.events, e)
	if err != nil {
		k.failed = true
		return
	}
	k.events = out
}

func appendEvent(b []byte, e *pb.Event) ([]byte, error) {
	b = binary.AppendUvarint(b, uint64(proto.Size(e)))
	return proto.MarshalOptions{}.MarshalAppend(b, e)
}

// encode writes the snapshot of f, which the kept events led to.
func (k *kept) encode(f *Facts) ([]byte, error) {
	if k.failed {
		return nil, outrigger.Errorf(outrigger.Internal, "an event could not be encoded for the facts snapshot")
	}
	out := []byte{snapshotFormat}
	out = binary.AppendUvarint(out, f.position)
	out = binary.AppendUvarint(out, uint64(len(k.events)))
	out = append(out, k.events...)
	for _, e := range f.latest() {
		var err error
		if out, err = appendEvent(out, e); err != nil {
			return nil, outrigger.Wrap(outrigger.Internal, err, "encode the facts snapshot")
		}
	}
	return out, nil
}

// latest returns events that lead to the present alerts, push and optimisers.
func (f *Facts) latest() []*pb.Event {
	out := append([]*pb.Event{{Payload: &pb.Event_PushRecorded{PushRecorded: &pb.PushRecorded{Push: f.pushed}}}}, f.latestOptimizers()...)
	for _, a := range f.alerts {
		raised := &pb.AlertRaised{Severity: a.Severity, Summary: a.Summary, Numbers: a.Numbers, Notify: a.Notify}
		if !a.Since.Equal(a.RaisedAt) { // raised again: Since is of the first time
			out = append(out, &pb.Event{Aggregate: AlertPrefix + a.ID, At: timestamppb.New(a.Since), Payload: &pb.Event_AlertRaised{AlertRaised: raised}})
		}
		out = append(out, &pb.Event{Aggregate: AlertPrefix + a.ID, At: timestamppb.New(a.RaisedAt), Payload: &pb.Event_AlertRaised{AlertRaised: raised}})
		for _, x := range a.Deliveries {
			out = append(out, &pb.Event{Aggregate: AlertPrefix + a.ID, At: timestamppb.New(x.At), Payload: &pb.Event_AlertNotified{AlertNotified: x.AlertNotified}})
		}
		if !a.SilencedUntil.IsZero() {
			out = append(out, &pb.Event{Aggregate: AlertPrefix + a.ID, At: timestamppb.New(a.RaisedAt), Payload: &pb.Event_AlertSilenced{
				AlertSilenced: &pb.AlertSilenced{Until: timestamppb.New(a.SilencedUntil)}}})
		}
		if !a.ResolvedAt.IsZero() {
			out = append(out, &pb.Event{Aggregate: AlertPrefix + a.ID, At: timestamppb.New(a.ResolvedAt),
				Payload: &pb.Event_AlertResolved{AlertResolved: &pb.AlertResolved{}}})
		}
	}
	return out
}

// decode folds a snapshot; an empty one is the state of an empty log. Errors have kind
// Invalid.
func decode(state []byte) (*Facts, kept, error) {
	f := new(Facts)
	if len(state) == 0 {
		return f, kept{}, nil
	}
	if state[0] != snapshotFormat {
		return nil, kept{}, outrigger.Errorf(outrigger.Invalid, "facts snapshot has format %d, expected %d", state[0], snapshotFormat)
	}
	position, rest, ok1 := uvarint(state[1:])
	size, rest, ok2 := uvarint(rest)
	if !ok1 || !ok2 || size > uint64(len(rest)) {
		return nil, kept{}, outrigger.Errorf(outrigger.Invalid, "facts snapshot of %d bytes is cut off in its header", len(state))
	}
	k := kept{events: rest[:size:size]}
	f, err := fold(f, k.events)
	if err != nil {
		return nil, kept{}, err
	}
	if f, err = fold(f, rest[size:]); err != nil {
		return nil, kept{}, err
	}
	f.position = position // f is not shared yet
	return f, k, nil
}

// fold applies length-prefixed events.
func fold(f *Facts, b []byte) (*Facts, error) {
	for len(b) > 0 {
		size, rest, ok := uvarint(b)
		if !ok || size > uint64(len(rest)) {
			return nil, outrigger.Errorf(outrigger.Invalid, "facts snapshot is cut off %d bytes before its end", len(b))
		}
		e := new(pb.Event)
		if err := proto.Unmarshal(rest[:size], e); err != nil {
			return nil, outrigger.Wrap(outrigger.Invalid, err, "facts snapshot holds an event that cannot be read")
		}
		f = Apply(f, e)
		b = rest[size:]
	}
	return f, nil
}

func uvarint(b []byte) (value uint64, rest []byte, ok bool) {
	v, n := binary.Uvarint(b)
	if n <= 0 {
		return 0, nil, false
	}
	return v, b[n:], true
}
