package variables

import (
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// bytes returns the frame, encoded for a stream of every change.
func (f *frame) bytes(o origin) ([]byte, error) {
	f.whole.Do(func() {
		raw, err := proto.Marshal(f.plain(o))
		if err != nil {
			f.broken = outrigger.Wrap(outrigger.Internal, err, "encode feed frame")
			return
		}
		f.encoded = raw
	})
	return f.encoded, f.broken
}

func (f *frame) plain(o origin) *pb.FeedFrame {
	return &pb.FeedFrame{
		Incarnation: o.incarnation, Region: o.region,
		Kind: &pb.FeedFrame_Changes{Changes: &pb.Changes{Previous: f.previous, Through: f.through, Changes: f.changes}},
	}
}

// The fields of the messages that are put together by hand.
const (
	frameIncarnation, frameRegion, frameChanges, frameAck, frameSelective = 1, 2, 3, 4, 7
	changesPrevious, changesThrough, changesChanges                       = 1, 2, 3
	ackSent, ackHead                                                      = 1, 2
)

// piece returns the i-th change, encoded as a field of Changes. Every change is encoded
// at most once for all selective streams.
func (f *frame) piece(i int) ([]byte, error) {
	f.parts.Do(func() {
		f.pieces = make([][]byte, len(f.changes))
		buf := make([]byte, 0, f.size+8*len(f.changes))
		for i, c := range f.changes {
			start := len(buf)
			buf = protowire.AppendTag(buf, changesChanges, protowire.BytesType)
			buf = protowire.AppendVarint(buf, uint64(proto.Size(c)))
			var err error
			if buf, err = (proto.MarshalOptions{UseCachedSize: true}).MarshalAppend(buf, c); err != nil {
				f.pieces, f.failed = nil, outrigger.Wrap(outrigger.Internal, err, "encode change")
				return
			}
			f.pieces[i] = buf[start:len(buf):len(buf)]
		}
	})
	if f.pieces == nil {
		return nil, f.failed
	}
	return f.pieces[i], nil
}

// assemble appends to raw a selective frame of encoded changes. All it costs a stream is
// the copying of its own changes.
func assemble(raw []byte, o origin, previous, through uint64, pieces [][]byte) []byte {
	inner := protowire.SizeTag(changesPrevious) + protowire.SizeVarint(previous) + protowire.SizeTag(changesThrough) + protowire.SizeVarint(through)
	for _, p := range pieces {
		inner += len(p)
	}
	raw = slices.Grow(raw, inner+len(o.region)+32)
	raw = protowire.AppendTag(raw, frameIncarnation, protowire.Fixed64Type)
	raw = protowire.AppendFixed64(raw, o.incarnation)
	raw = protowire.AppendTag(raw, frameRegion, protowire.BytesType)
	raw = protowire.AppendString(raw, o.region)
	raw = protowire.AppendTag(raw, frameChanges, protowire.BytesType)
	raw = protowire.AppendVarint(raw, uint64(inner))
	raw = protowire.AppendTag(raw, changesPrevious, protowire.VarintType)
	raw = protowire.AppendVarint(raw, previous)
	raw = protowire.AppendTag(raw, changesThrough, protowire.VarintType)
	raw = protowire.AppendVarint(raw, through)
	for _, p := range pieces {
		raw = append(raw, p...)
	}
	raw = protowire.AppendTag(raw, frameSelective, protowire.VarintType)
	raw = protowire.AppendVarint(raw, 1)
	return raw
}

// acknowledge appends to raw the frame that answers a heartbeat, as proto.Marshal would
// write it: at rest these are all that a feed carries.
func acknowledge(raw []byte, o origin, selective bool, sent, head uint64) []byte {
	raw = protowire.AppendTag(raw, frameIncarnation, protowire.Fixed64Type)
	raw = protowire.AppendFixed64(raw, o.incarnation)
	raw = protowire.AppendTag(raw, frameRegion, protowire.BytesType)
	raw = protowire.AppendString(raw, o.region)
	if selective {
		raw = protowire.AppendTag(raw, frameSelective, protowire.VarintType)
		raw = protowire.AppendVarint(raw, 1)
	}
	inner := 0
	if sent != 0 {
		inner += protowire.SizeTag(ackSent) + protowire.SizeFixed64()
	}
	if head != 0 {
		inner += protowire.SizeTag(ackHead) + protowire.SizeVarint(head)
	}
	raw = protowire.AppendTag(raw, frameAck, protowire.BytesType)
	raw = protowire.AppendVarint(raw, uint64(inner))
	if sent != 0 {
		raw = protowire.AppendTag(raw, ackSent, protowire.Fixed64Type)
		raw = protowire.AppendFixed64(raw, sent)
	}
	if head != 0 {
		raw = protowire.AppendTag(raw, ackHead, protowire.VarintType)
		raw = protowire.AppendVarint(raw, head)
	}
	return raw
}
