package variables

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	"pgregory.net/rapid"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// receiver applies frames as a cache does: per key the position of the last change and
// its value; the end of a session changes every key of it.
type receiver struct {
	applied uint64
	floor   map[string]uint64 // "session/name", and "session/" for the session itself
	value   map[string]string
}

func newReceiver(at uint64) *receiver {
	return &receiver{applied: at, floor: map[string]uint64{}, value: map[string]string{}}
}

func (r *receiver) take(t interface{ Fatalf(string, ...any) }, f *frame) {
	if f.previous != r.applied {
		t.Fatalf("frame (%d,%d] after %d", f.previous, f.through, r.applied)
	}
	last := f.previous
	for _, c := range f.changes {
		if c.GetPosition() <= last || c.GetPosition() > f.through {
			t.Fatalf("position %d after %d in (%d,%d]", c.GetPosition(), last, f.previous, f.through)
		}
		last = c.GetPosition()
		r.change(t, c)
	}
	r.applied = f.through
}

func (r *receiver) change(t interface{ Fatalf(string, ...any) }, c *pb.Change) {
	id := c.GetKey().GetSession() + "/" + c.GetKey().GetName()
	if c.GetScope() == pb.Change_SESSION {
		for k := range r.floor {
			if strings.HasPrefix(k, id) {
				delete(r.value, k)
				r.floor[k] = c.GetPosition()
			}
		}
	} else if known := max(r.applied, r.floor[id], r.floor[c.GetKey().GetSession()+"/"]); c.GetKeyPrevious() > known {
		t.Fatalf("%s@%d follows %d, the last one received is %d", id, c.GetPosition(), c.GetKeyPrevious(), known)
	}
	r.floor[id] = c.GetPosition()
	if v := c.GetVariable(); v != nil {
		r.value[id] = string(v.GetValue().GetJson())
	} else {
		delete(r.value, id)
	}
}

// Whatever is published, a stream that is behind and gets coalesced frames knows at the
// end of each frame exactly what one that got everything knows there: every floor and
// every value. key_previous never points at a change that was left out. A key is in a
// frame once for each region that writes it, and frames keep their size.
func TestCoalescingKeepsFloorsAndValues(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := newRing(1<<20, 1<<30, 0)
		truth := map[uint64]*receiver{0: newReceiver(0)} // by position
		now, head := newReceiver(0), uint64(0)
		previous := map[string]uint64{}
		for range rapid.IntRange(0, 80).Draw(t, "batches") {
			var changes []*pb.Change
			for range rapid.IntRange(1, 4).Draw(t, "events") {
				head++
				k := &pb.Key{Session: rapid.SampledFrom([]string{"s", "u"}).Draw(t, "session"), Name: rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "name")}
				c := &pb.Change{Position: head, Key: k, Version: &pb.Version{Dot: &pb.Dot{Region: rapid.SampledFrom([]string{"eu", "us"}).Draw(t, "writer")}}}
				switch rapid.IntRange(0, 9).Draw(t, "kind") {
				case 0:
					c.Scope, k.Name, c.Deleted = pb.Change_SESSION, "", rapid.Bool().Draw(t, "deleted")
				case 1:
					c.Deleted = true
				case 2: // too large to ride along
				default:
					pad := strings.Repeat("v", rapid.SampledFrom([]int{0, 10, 4000, 60_000}).Draw(t, "size"))
					c.Variable = &pb.Variable{Key: k, Value: &pb.Value{Json: fmt.Appendf(nil, "%d%s", head, pad)}}
				}
				id := k.Session + "/" + k.Name
				c.KeyPrevious = previous[id]
				previous[id] = head
				if c.Scope == pb.Change_SESSION {
					for other := range previous {
						if strings.HasPrefix(other, id) {
							previous[other] = head
						}
					}
				}
				changes = append(changes, c)
				now.change(t, c)
				truth[head] = &receiver{applied: head, floor: maps.Clone(now.floor), value: maps.Clone(now.value)}
			}
			r.publish(head, changes)
		}
		got := newReceiver(rapid.Uint64Range(0, head).Draw(t, "cursor"))
		if start := truth[got.applied]; start != nil {
			got.floor, got.value = maps.Clone(start.floor), maps.Clone(start.value)
		}
		for got.applied < head {
			f := r.latest(got.applied)
			if f == nil {
				frames, _, stale := r.after(got.applied, 1)
				if stale || len(frames) == 0 {
					t.Fatalf("nothing after %d, head %d", got.applied, head)
				}
				f = frames[0]
			} else {
				if f.size > maxFrameBytes && len(f.changes) > 4 {
					t.Fatalf("%d changes in %d bytes", len(f.changes), f.size)
				}
				once := map[string]bool{}
				for _, c := range f.changes {
					id := fmt.Sprint(c.GetScope(), c.GetKey().GetSession(), c.GetKey().GetName(), c.GetVersion().GetDot().GetRegion())
					if once[id] {
						t.Fatalf("%s twice in one frame", id)
					}
					once[id] = true
				}
			}
			got.take(t, f)
			want := truth[got.applied]
			if !maps.Equal(got.floor, want.floor) || !maps.Equal(got.value, want.value) {
				t.Fatalf("at %d: floors %v, want %v", got.applied, got.floor, want.floor)
			}
		}
	})
}

// Streams that lag alike are given the same frame, encoded once.
func TestCoalescedFramesAreShared(t *testing.T) {
	r := newRing(1<<20, 1<<30, 0)
	for p := uint64(1); p <= 100; p++ {
		r.publish(p, []*pb.Change{{Position: p, Key: &pb.Key{Session: "s", Name: "x"}, KeyPrevious: p - 1}})
	}
	a, b := r.latest(10), r.latest(10)
	if a == nil || a != b || len(a.changes) != 1 || a.through != 100 || a.changes[0].GetKeyPrevious() != 10 {
		t.Fatalf("got %+v and %+v", a, b)
	}
	if r.latest(100-lagging) != nil {
		t.Error("a stream that does not lag is coalesced")
	}
	if c := r.latest(11); c == a || c.previous != 11 {
		t.Errorf("another cursor got %+v", c)
	}
}
