package variables

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/proto"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
)

// An answer to a heartbeat is, byte for byte, what proto.Marshal makes of it, and costs no
// memory.
func TestAcknowledge(t *testing.T) {
	var room []byte
	for _, c := range []struct {
		selective  bool
		sent, head uint64
	}{{true, 1 << 40, 1 << 20}, {false, 7, 1}, {true, 0, 9}, {false, 9, 0}, {true, 0, 0}} {
		want, err := proto.Marshal(&pb.FeedFrame{
			Incarnation: testOrigin.incarnation, Region: testOrigin.region, Selective: c.selective,
			Kind: &pb.FeedFrame_Ack{Ack: &pb.HeartbeatAck{Sent: c.sent, Head: c.head}},
		})
		if err != nil {
			t.Fatal(err)
		}
		if room = acknowledge(room[:0], testOrigin, c.selective, c.sent, c.head); !bytes.Equal(room, want) {
			t.Errorf("%+v: %x, want %x", c, room, want)
		}
		if n := testing.AllocsPerRun(100, func() { room = acknowledge(room[:0], testOrigin, c.selective, c.sent, c.head) }); n != 0 {
			t.Errorf("%+v: %v allocations", c, n)
		}
	}
}

// A change is encoded for the first stream that takes it; for each further one, putting its
// frame together and answering its heartbeats allocate nothing.
func TestDeliveryAllocatesNothing(t *testing.T) {
	s, err := New(memory.New(), Options{Region: "eu"})
	if err != nil {
		t.Fatal(err)
	}
	r := newRing(1000, 1<<20, 0)
	key := &pb.Key{Tenant: "default", Session: "s", Name: "x"}
	shard := shardOf(&pb.Change{Key: key})
	f := &lean{}
	f.s, f.ring, f.out, f.sel = s, r, (*leanSink)(f), &selection{}
	f.sel.has[shard/64] |= 1 << (shard % 64)
	for position := uint64(1); position <= 4; position++ {
		r.publish(position, []*pb.Change{{Position: position, Key: key, Variable: &pb.Variable{Key: key, Value: &pb.Value{Json: []byte("1")}}}})
	}
	sent := 0
	deliver := func() {
		f.buf = f.buf[:0]
		f.moveTo(0)
		if more, err := f.next(); err != nil || !more || f.cursor != 4 {
			t.Fatalf("more %v, %v, at %d", more, err, f.cursor)
		}
		sent = len(f.buf)
		if err := f.ack(7); err != nil || len(f.buf) <= sent {
			t.Fatalf("no answer to a heartbeat, %v", err)
		}
	}
	deliver() // encodes
	if n := testing.AllocsPerRun(100, deliver); n != 0 {
		t.Errorf("%v allocations for a frame of four changes and an answer", n)
	}
	if sent == 0 {
		t.Error("nothing was put together")
	}
	if got := f.work; got.parts[:1][0].of != nil || got.run[:1][0] != nil {
		t.Error("a stream keeps frames alive that the ring may have dropped")
	}
}
