package variables

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// A shared frame is encoded once, and a receiver cannot tell it from an ordinary one.
func TestFrameIsEncodedOnce(t *testing.T) {
	f := &frame{previous: 3, through: 9, changes: []*pb.Change{{Position: 5, Key: &pb.Key{Session: "s", Name: "x"}, KeyPrevious: 2}}}
	a, err := f.bytes(testOrigin)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := f.bytes(testOrigin); err != nil || &a[0] != &b[0] {
		t.Errorf("a second stream got another encoding, %v", err)
	}
	raw, err := proto.Marshal(preEncoded(a))
	if err != nil {
		t.Fatal(err)
	}
	var got pb.FeedFrame
	if err := proto.Unmarshal(raw, &got); err != nil || !proto.Equal(&got, f.plain(testOrigin)) {
		t.Errorf("received %v, %v", &got, err)
	}
}

// Whatever is published, a cursor anywhere in the ring sees an unbroken chain of frames
// with exactly the changes after it, in frames that respect the size bound; between
// agrees; outside the ring both say so. The ring keeps within its bounds.
func TestRingIsAChain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const maxChanges = 20
		start := rapid.Uint64Range(0, 5).Draw(t, "start")
		r := newRing(maxChanges, 1<<20, start)
		var all []uint64
		head := start
		for range rapid.IntRange(1, 30).Draw(t, "batches") {
			var changes []*pb.Change
			for range rapid.IntRange(1, 8).Draw(t, "events") {
				head++
				if rapid.Bool().Draw(t, "variable") {
					pad := strings.Repeat("v", rapid.SampledFrom([]int{0, 10, 100_000}).Draw(t, "size"))
					changes = append(changes, &pb.Change{Position: head, Key: &pb.Key{Name: pad}})
					all = append(all, head)
				}
			}
			r.publish(head, changes)
		}
		if len(r.frames) > 1 && (r.changes > maxChanges || r.bytes > 1<<20) {
			t.Fatalf("the ring holds %d changes and %d bytes", r.changes, r.bytes)
		}
		cursor := rapid.Uint64Range(0, head).Draw(t, "cursor")
		listed, complete, err := r.between(cursor, head, 1<<30)
		if cursor < r.floor {
			if _, _, stale := r.after(cursor, 1); !stale || !outrigger.IsKind(err, outrigger.Stale) {
				t.Fatalf("cursor %d is below the floor %d: stale %v, %v", cursor, r.floor, stale, err)
			}
			return
		}
		if err != nil || complete != head {
			t.Fatalf("between: complete to %d of %d, %v", complete, head, err)
		}
		var got, want []uint64
		for _, p := range all {
			if p > cursor {
				want = append(want, p)
			}
		}
		for cursor < head {
			frames, _, stale := r.after(cursor, 3)
			if stale || len(frames) == 0 {
				t.Fatalf("nothing after %d, head %d", cursor, head)
			}
			for _, f := range frames {
				if f.previous != cursor || f.through <= cursor || f.size > maxFrameBytes && len(f.changes) > 1 {
					t.Fatalf("frame (%d,%d] of %d bytes after %d", f.previous, f.through, f.size, cursor)
				}
				cursor = f.through
				for _, c := range f.changes {
					got = append(got, c.GetPosition())
				}
			}
		}
		if len(got) != len(want) || len(listed) != len(want) {
			t.Fatalf("frames have %v, between %d changes, want %v", got, len(listed), want)
		}
		for i := range want {
			if got[i] != want[i] || listed[i].GetPosition() != want[i] {
				t.Fatalf("frames have %v, want %v", got, want)
			}
		}
	})
}
