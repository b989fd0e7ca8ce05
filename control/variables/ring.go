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

// frame is the changes of a run of positions. It is immutable but for the encodings,
// which the first stream that needs them makes for all.
type frame struct {
	previous, through uint64
	changes           []*pb.Change
	shards            []uint16 // of the changes; nil = nobody selects from this frame
	size              int      // encoded bytes of the changes

	whole sync.Once // makes encoded
	parts sync.Once // makes pieces

	encoded []byte
	broken  error    // why there is no encoded
	pieces  [][]byte // each change as a field of Changes
	failed  error    // why there are no pieces
}

// from returns the part of f after cursor; f itself when that is all of it.
func (f *frame) from(cursor uint64) *frame {
	if cursor <= f.previous {
		return f
	}
	i := sort.Search(len(f.changes), func(i int) bool { return f.changes[i].GetPosition() > cursor })
	rest := &frame{previous: cursor, through: f.through, changes: f.changes[i:]}
	if f.shards != nil {
		rest.shards = f.shards[i:]
	}
	return rest
}

// ring keeps the youngest frames, back to back: each begins where the one before ended.
// One goroutine publishes; any number read.
type ring struct {
	maxChanges, maxBytes int

	mu      sync.RWMutex
	frames  []*frame
	changes int    // in frames; a frame without any counts as one
	bytes   int    // of all changes in frames
	floor   uint64 // changes at or below it are not kept
	head    uint64 // end of the last frame

	merged    merges
	listeners listeners
}

func newRing(maxChanges, maxBytes int, start uint64) *ring {
	return &ring{maxChanges: maxChanges, maxBytes: maxBytes, floor: start, head: start}
}

// publish appends the changes of the positions after head up to through, which may be
// none, and wakes the streams.
func (r *ring) publish(through uint64, changes []*pb.Change) {
	fresh := split(r.head, through, changes) // only this goroutine changes head
	r.mu.Lock()
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
	r.mu.Unlock()

	woken := map[uint16]bool{everyShard: true}
	r.listeners.wake(everyShard)
	for _, f := range fresh {
		for _, x := range f.shards {
			if x == everyShard {
				r.listeners.wakeAll()
				return
			}
			if !woken[x] {
				woken[x] = true
				r.listeners.wake(x)
			}
		}
	}
}

// split cuts changes into frames of at most maxFrameBytes.
func split(previous, through uint64, changes []*pb.Change) []*frame {
	var out []*frame
	f := &frame{previous: previous}
	start := 0
	shards := make([]uint16, len(changes))
	for i, c := range changes {
		shards[i] = shardOf(c)
		n := proto.Size(c)
		if f.size > 0 && f.size+n > maxFrameBytes {
			f.changes, f.shards, f.through = changes[start:i:i], shards[start:i:i], changes[i-1].GetPosition()
			out = append(out, f)
			f, start = &frame{previous: f.through}, i
		}
		f.size += n
	}
	f.changes, f.shards, f.through = changes[start:], shards[start:], through
	return append(out, f)
}

// after returns up to limit frames that continue at cursor. stale says that the cursor
// has left the ring and only a reset to head helps.
func (r *ring) after(cursor uint64, limit int) (frames []*frame, head uint64, stale bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if cursor < r.floor {
		return nil, r.head, true
	}
	i := sort.Search(len(r.frames), func(i int) bool { return r.frames[i].through > cursor })
	if i == len(r.frames) {
		return nil, r.head, false
	}
	frames = append(frames, r.frames[i:min(i+limit, len(r.frames))]...)
	frames[0] = frames[0].from(cursor)
	return frames, r.head, false
}

// since puts what a selective stream needs after cursor into w: up to limit changes that
// concern it. It returns the position up to which that is all of them.
func (r *ring) since(cursor uint64, sel *selection, limit int, w *work) (through uint64, stale bool) {
	w.parts = w.parts[:0]
	r.mu.RLock()
	if cursor < r.floor {
		defer r.mu.RUnlock()
		return r.head, true
	}
	i := sort.Search(len(r.frames), func(i int) bool { return r.frames[i].through > cursor })
	w.run = append(w.run[:0], r.frames[i:]...) // publish clears what it drops
	through = max(cursor, r.head)              // a subscriber may be ahead of a replica
	r.mu.RUnlock()

	// Frames are immutable, so looking through them needs no lock.
	for _, f := range w.run {
		for i, x := range f.shards {
			switch p := f.changes[i].GetPosition(); {
			case p <= cursor || !sel.concerns(x):
			case len(w.parts) == limit:
				return p - 1, false
			default:
				w.parts = append(w.parts, part{f, i})
			}
		}
	}
	return through, false
}

// work is memory that putting a frame together for a selective stream takes. It is used
// again as long as it is small.
type work struct {
	run    []*frame
	parts  []part
	pieces [][]byte
}

// done lets go of what the memory points to.
func (w *work) done() {
	if len(w.run) > 8*lagging || len(w.parts) > 8*lagging {
		*w = work{}
		return
	}
	clear(w.run)
	clear(w.parts)
	clear(w.pieces)
}

// part is one change of a frame.
type part struct {
	of *frame
	i  int
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
