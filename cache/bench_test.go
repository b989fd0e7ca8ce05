package cache

import (
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/coarse"
)

// warm is a Store with one current entry of 200 bytes, rendered, over a table with a
// long lease.
func warm(tb testing.TB) (s *Store, id string) {
	tb.Helper()
	w, err := shm.Create(shm.Options{Heap: true, Bytes: 1 << 20})
	if err != nil {
		tb.Fatal(err)
	}
	r := w.Reader()
	clock := node.Clock()
	s, err = New(Options{Origin: &grpc.ClientConn{}, Table: func() *shm.Reader { return r }, Lease: time.Hour,
		Clock: clock, Coarse: coarse.New(clock),
		Encoders: []Encoder{func(v *pb.Variable) []byte { return v.GetValue().GetJson() }}})
	if err != nil {
		tb.Fatal(err)
	}
	k := outrigger.Key{Tenant: "default", Session: "session-0001", Name: "temperature"}
	v := &pb.Variable{Key: &pb.Key{Session: k.Session, Name: k.Name}, Value: &pb.Value{Type: "string", Json: make([]byte, 200)},
		Version: &pb.Version{Dot: &pb.Dot{Region: "eu", Incarnation: 1, Position: 1}}}
	b, err := proto.Marshal(v)
	if err != nil {
		tb.Fatal(err)
	}
	if _, _, err := w.Put(k.String(), shm.Present, b); err != nil {
		tb.Fatal(err)
	}
	w.SetLease(s.clock() + int64(time.Hour))
	if a, err := s.Get(tb.Context(), Request{Key: k}); err != nil || a.Tier != outrigger.TierNode || len(a.Encoded) != 200 {
		tb.Fatalf("got %+v, %v", a, err)
	}
	return s, k.String()
}

func TestHitAllocatesNothing(t *testing.T) {
	s, id := warm(t)
	if n := testing.AllocsPerRun(1000, func() {
		if h, ok := s.Hit(id, 0); !ok || len(h.Encoded) != 200 {
			t.Fatal("no hit")
		}
	}); n != 0 {
		t.Errorf("Hit allocates %v times", n)
	}
}

// A hit ends with the lease by the coarse clock, which is never behind the clock; that
// this one reads ahead costs hits, and is what a copy's age is counted with.
func TestHitUsesTheCoarseClock(t *testing.T) {
	s, id := warm(t)
	until := s.view.Load().reader.Lease()
	now := until - 1
	s.coarse = func() int64 { return now }
	if h, ok := s.Hit(id, 0); !ok || h.Age != time.Hour-1 {
		t.Errorf("within the lease: %v, age %v", ok, h.Age)
	}
	now = until
	if _, ok := s.Hit(id, 0); ok {
		t.Error("a hit at the end of the lease")
	}
}

func BenchmarkHit(b *testing.B) {
	s, id := warm(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := s.Hit(id, 0); !ok {
			b.Fatal("no hit")
		}
	}
}

// BenchmarkHitClock is BenchmarkHit with the operating system's clock in each read.
func BenchmarkHitClock(b *testing.B) {
	s, id := warm(b)
	s.coarse = s.clock
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := s.Hit(id, 0); !ok {
			b.Fatal("no hit")
		}
	}
}

func BenchmarkHitParallel(b *testing.B) {
	s, id := warm(b)
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if _, ok := s.Hit(id, 0); !ok {
				b.Fatal("no hit")
			}
		}
	})
}

func BenchmarkGetProcess(b *testing.B) {
	s, _ := warm(b)
	r := Request{Key: outrigger.Key{Tenant: "default", Session: "session-0001", Name: "temperature"}}
	b.ReportAllocs()
	for b.Loop() {
		if a, err := s.Get(b.Context(), r); err != nil || a.Tier != outrigger.TierProcess {
			b.Fatal(a, err)
		}
	}
}
