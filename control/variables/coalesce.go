package variables

import (
	"cmp"
	"maps"
	"slices"
	"sort"
	"sync"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// lagging is the number of waiting frames beyond which a stream gets them coalesced.
const lagging = 16

// mergedKept is how many coalesced frames are remembered for streams that lag alike, as
// those of a fleet do after a burst.
const mergedKept = 8

// merges remembers the last coalesced frames.
type merges struct {
	mu     sync.Mutex
	frames [mergedKept]*frame
	next   int
}

// latest returns one frame that takes a lagging stream from cursor as far as fits a
// frame, with the newest change of each key only. nil means that the stream does not
// lag: after has what it needs.
func (r *ring) latest(cursor uint64) *frame {
	r.mu.RLock()
	i := sort.Search(len(r.frames), func(i int) bool { return r.frames[i].through > cursor })
	if cursor < r.floor || len(r.frames)-i <= lagging {
		r.mu.RUnlock()
		return nil
	}
	// Frames are immutable, so the merging needs no lock.
	waiting := slices.Clone(r.frames[i:])
	r.mu.RUnlock()

	m := &r.merged
	m.mu.Lock()
	defer m.mu.Unlock() // streams that lag alike wait for the first of them
	for _, f := range m.frames {
		// A little behind the head is no reason to merge anew: the rest follows.
		if f != nil && f.previous == cursor && f.through >= waiting[lagging].through {
			return f
		}
	}
	waiting[0] = waiting[0].from(cursor)
	f := coalesce(waiting)
	m.frames[m.next] = f
	m.next = (m.next + 1) % mergedKept
	return f
}

// coalesce makes one frame of a run of frames, of as many from its beginning as fit
// maxFrameBytes (at least one). Whole frames are taken, and of each key every change but
// the last in the taken ones is left out: then all floors up to through are what they
// would be had everything been sent, and a lease may be renewed there.
//
// Changes of one key that come from different regions' writers are kept apart, because
// receivers learn from the dot of a change that a write of another region has arrived.
func coalesce(run []*frame) *frame {
	newest := map[standsFor]standing{}
	size, taken := 0, 0
	for _, f := range run {
		fresh, more := f.newest(newest)
		if taken > 0 && size+more > maxFrameBytes {
			break
		}
		maps.Copy(newest, fresh)
		size += more
		taken++
	}
	out := &frame{previous: run[0].previous, through: run[taken-1].through, size: size, changes: make([]*pb.Change, 0, len(newest))}
	for _, x := range newest {
		out.changes = append(out.changes, x.change)
	}
	slices.SortFunc(out.changes, func(a, b *pb.Change) int { return cmp.Compare(a.GetPosition(), b.GetPosition()) })
	last := map[standsFor]uint64{} // position of a key's change before, whoever wrote it
	for i, c := range out.changes {
		k := keyOnly(c)
		if known := max(out.previous, last[k]); known < c.GetKeyPrevious() {
			out.changes[i] = shallow(c)
			out.changes[i].KeyPrevious = known // what the key changed at was left out
		}
		last[k] = c.GetPosition()
	}
	return out
}

// standsFor is what changes must share for the later to stand for the earlier.
type standsFor struct {
	scope                         pb.Change_Scope
	tenant, session, name, writer string
}

func keyOnly(c *pb.Change) standsFor {
	k := c.GetKey()
	return standsFor{scope: c.GetScope(), tenant: k.GetTenant(), session: k.GetSession(), name: k.GetName()}
}

// standing is a change that stands for itself and the earlier ones alike.
type standing struct {
	change *pb.Change
	bytes  int
}

// newest returns the last change of f for each of them, given those of the frames
// before, and by how many bytes it grows them.
func (f *frame) newest(before map[standsFor]standing) (fresh map[standsFor]standing, more int) {
	fresh = make(map[standsFor]standing, len(f.changes))
	for _, c := range f.changes {
		id := keyOnly(c)
		id.writer = c.GetVersion().GetDot().GetRegion()
		x := standing{change: c, bytes: proto.Size(c)}
		old, had := fresh[id]
		if !had {
			old = before[id]
		}
		fresh[id] = x
		more += x.bytes - old.bytes
	}
	return fresh, more
}

// shallow copies a change; what it points to is shared.
func shallow(c *pb.Change) *pb.Change {
	out := &pb.Change{}
	to := out.ProtoReflect()
	c.ProtoReflect().Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		to.Set(fd, v)
		return true
	})
	return out
}
