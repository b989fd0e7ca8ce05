package variables

import (
	"sort"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// maxFrameBytes bounds one feed frame, so that a heartbeat's answer never waits behind
// more than this on the wire and a frame always fits gRPC's default message limit.
const maxFrameBytes = 256 << 10

// frame is the changes of a run of positions. It is immutable but for the encoding,
// which the first stream that sends it makes for all of them.
type frame struct {
	previous, through uint64
	changes           []*pb.Change
	size              int // encoded bytes of the changes

	once    sync.Once
	encoded *pb.FeedFrame
	failed  error
}

// message returns the frame as a message that is already encoded: an empty FeedFrame
// whose unknown fields are the bytes of the full one, which every codec copies out as
// they are. A receiver decodes it like any other. It must only be sent, not read.
func (f *frame) message(o origin) (*pb.FeedFrame, error) {
	f.once.Do(func() {
		raw, err := proto.Marshal(f.plain(o))
		if err != nil {
			f.failed = outrigger.Wrap(outrigger.Internal, err, "encode feed frame")
			return
		}
		f.encoded = &pb.FeedFrame{}
		f.encoded.ProtoReflect().SetUnknown(raw)
	})
	return f.encoded, f.failed
}

func (f *frame) plain(o origin) *pb.FeedFrame {
	return &pb.FeedFrame{
		Incarnation: o.incarnation, Region: o.region,
		Kind: &pb.FeedFrame_Changes{Changes: &pb.Changes{Previous: f.previous, Through: f.through, Changes: f.changes}},
	}
}

// from returns the part of f after cursor; f itself when that is all of it.
func (f *frame) from(cursor uint64) *frame {
	if cursor <= f.previous {
		return f
	}
	i := sort.Search(len(f.changes), func(i int) bool { return f.changes[i].GetPosition() > cursor })
	return &frame{previous: cursor, through: f.through, changes: f.changes[i:]}
}

// ring keeps the youngest frames, back to back: each begins where the one before ended.
// One goroutine publishes; any number read.
type ring struct {
	maxChanges, maxBytes int

	mu      sync.RWMutex
	frames  []*frame
	changes int           // in frames; a frame without any counts as one
	bytes   int           // of all changes in frames
	floor   uint64        // changes at or below it are not kept
	head    uint64        // end of the last frame
	grown   chan struct{} // closed and replaced by publish

	merged merges
}

func newRing(maxChanges, maxBytes int, start uint64) *ring {
	return &ring{maxChanges: maxChanges, maxBytes: maxBytes, floor: start, head: start, grown: make(chan struct{})}
}

// publish appends the changes of the positions after head up to through, which may be
// none, and wakes the streams.
func (r *ring) publish(through uint64, changes []*pb.Change) {
	fresh := split(r.head, through, changes) // only this goroutine changes head
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range fresh {
		r.frames = append(r.frames, f)
		r.changes += max(1, len(f.changes))
		r.bytes += f.size
	}
	r.head = through
	drop := 0
	for ; drop < len(r.frames)-1 && (r.changes > r.maxChanges || r.bytes > r.maxBytes); drop++ {
		f := r.frames[drop]
		r.changes -= max(1, len(f.changes))
		r.bytes -= f.size
		r.floor = f.through
		r.frames[drop] = nil
	}
	r.frames = r.frames[drop:]
	close(r.grown)
	r.grown = make(chan struct{})
}

// split cuts changes into frames of at most maxFrameBytes.
func split(previous, through uint64, changes []*pb.Change) []*frame {
	var out []*frame
	f := &frame{previous: previous}
	start := 0
	for i, c := range changes {
		n := proto.Size(c)
		if f.size > 0 && f.size+n > maxFrameBytes {
			f.changes, f.through = changes[start:i:i], changes[i-1].GetPosition()
			out = append(out, f)
			f, start = &frame{previous: f.through}, i
		}
		f.size += n
	}
	f.changes, f.through = changes[start:], through
	return append(out, f)
}

// after returns up to limit frames that continue at cursor. When there are none, grown
// is closed as soon as there may be more. stale says that the cursor has left the ring
// and only a reset to head helps.
func (r *ring) after(cursor uint64, limit int) (frames []*frame, grown <-chan struct{}, head uint64, stale bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if cursor < r.floor {
		return nil, r.grown, r.head, true
	}
	i := sort.Search(len(r.frames), func(i int) bool { return r.frames[i].through > cursor })
	if i == len(r.frames) {
		return nil, r.grown, r.head, false
	}
	frames = append(frames, r.frames[i:min(i+limit, len(r.frames))]...)
	frames[0] = frames[0].from(cursor)
	return frames, r.grown, r.head, false
}

// between returns the changes with from < position ≤ to, as many as fit maxBytes (at
// least one), and the position up to which that is all of them.
func (r *ring) between(from, to uint64, maxBytes int) ([]*pb.Change, uint64, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if from < r.floor {
		return nil, 0, outrigger.Errorf(outrigger.Stale, "changes after position %d are no longer kept (the oldest kept is %d); flush and start over", from, r.floor+1)
	}
	to = min(to, r.head)
	var out []*pb.Change
	size, complete := 0, from
	for i := sort.Search(len(r.frames), func(i int) bool { return r.frames[i].through > from }); i < len(r.frames); i++ {
		for _, c := range r.frames[i].changes {
			switch p := c.GetPosition(); {
			case p <= from:
				continue
			case p > to:
				return out, to, nil
			}
			n := proto.Size(c)
			if len(out) > 0 && size+n > maxBytes {
				return out, complete, nil
			}
			out, size, complete = append(out, c), size+n, c.GetPosition()
		}
	}
	return out, to, nil
}
