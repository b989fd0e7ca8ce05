package report

import (
	"context"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	gstatus "google.golang.org/grpc/status"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/memnet"
)

// sink is a Reports server that counts like the real one: each (reporter, sequence) once.
type sink struct {
	pb.UnimplementedReportsServer
	mu       sync.Mutex
	got      map[uint64]uint64 // sequence → requests
	order    []uint64          // every arrival, repeats included
	at       []time.Time
	failNext bool   // end the stream after receiving, before acknowledging
	refuse   uint64 // this sequence is never taken
}

func (s *sink) Push(stream grpc.BidiStreamingServer[pb.Delta, pb.DeltaAck]) error {
	for {
		d, err := stream.Recv()
		if err != nil {
			return nil
		}
		s.mu.Lock()
		if d.Sequence == s.refuse {
			s.mu.Unlock()
			return gstatus.Error(codes.InvalidArgument, "no such thing")
		}
		s.order = append(s.order, d.Sequence)
		s.at = append(s.at, time.Now())
		s.got[d.Sequence] = d.Outcomes[0].Requests
		fail := s.failNext
		s.failNext = false
		s.mu.Unlock()
		if fail {
			return gstatus.Error(codes.Unavailable, "restarting")
		}
		if err := stream.Send(&pb.DeltaAck{Sequence: d.Sequence}); err != nil {
			return err
		}
	}
}

func (s *sink) total() (n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.got {
		n += v
	}
	return n
}

// world is a sink behind an in-memory network and a counter to report from.
type world struct {
	sink *sink
	net  *memnet.Network
	conn *grpc.ClientConn
	stop func()

	mu      sync.Mutex
	pending uint64
}

func (w *world) observe(n uint64) { w.mu.Lock(); w.pending += n; w.mu.Unlock() }

func (w *world) collect(_ time.Time, d *pb.Delta) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.pending == 0 {
		return false
	}
	d.Outcomes = []*pb.OutcomeDelta{{Requests: w.pending}}
	w.pending = 0
	return true
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{sink: &sink{got: map[uint64]uint64{}}, net: memnet.New()}
	l, err := w.net.Listen("control", "control:1")
	if err != nil {
		t.Fatal(err)
	}
	gs := grpc.NewServer()
	pb.RegisterReportsServer(gs, w.sink)
	go gs.Serve(l)
	w.conn, err = grpc.NewClient("passthrough:///control:1", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return w.net.Dialer("pod")(ctx, addr) }))
	if err != nil {
		t.Fatal(err)
	}
	w.stop = func() { w.conn.Close(); gs.Stop() }
	return w
}

// run starts a reporter; the returned function ends it.
func (w *world) run(urgent <-chan struct{}) (end func()) {
	r := New(Options{Conn: w.conn, Node: &pb.Node{Id: "pod"}, Start: time.Now(), Collect: w.collect, Urgent: urgent})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	return func() { cancel(); <-done }
}

// Deltas go out each second, a failure within 100 ms, and the end sends what is left.
func TestTiming(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		urgent := make(chan struct{}, 1)
		start := time.Now()
		end := w.run(urgent)
		w.observe(1)
		time.Sleep(1500 * time.Millisecond)
		w.observe(2)
		urgent <- struct{}{}
		time.Sleep(100 * time.Millisecond)
		synctest.Wait()
		w.sink.mu.Lock()
		at := slices.Clone(w.sink.at)
		w.sink.mu.Unlock()
		if len(at) != 2 || at[0].Sub(start) != time.Second || at[1].Sub(start) != 1550*time.Millisecond {
			t.Fatalf("deltas arrived at %v", at)
		}
		w.observe(4)
		end()
		if got := w.sink.total(); got != 7 {
			t.Fatalf("%d of 7 observations arrived", got)
		}
		w.stop()
	})
}

// A delta whose acknowledgement was lost is sent again with the same number; a cut
// link loses nothing: everything arrives, counted once.
func TestNothingIsLostOrCountedTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		end := w.run(nil)
		w.sink.failNext = true
		w.observe(1)
		time.Sleep(3 * time.Second)
		w.net.Cut("pod", "control")
		w.observe(10)
		time.Sleep(20 * time.Second)
		w.observe(100)
		w.net.Heal("pod", "control")
		time.Sleep(20 * time.Second)
		end()
		if got := w.sink.total(); got != 111 {
			t.Errorf("counted %d observations, want 111", got)
		}
		w.sink.mu.Lock()
		if !slices.Equal(w.sink.order[:2], []uint64{1, 1}) {
			t.Errorf("sequence numbers arrived as %v; 1 should have come twice", w.sink.order)
		}
		w.sink.mu.Unlock()
		w.stop()
	})
}

// A delta that can never be taken does not hold up those behind it.
func TestRefusedDeltaIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.sink.refuse = 1
		end := w.run(nil)
		w.observe(1)
		time.Sleep(3 * time.Second)
		w.observe(10)
		time.Sleep(3 * time.Second)
		end()
		if got := w.sink.total(); got != 10 {
			t.Errorf("counted %d, want the 10 of the second delta", got)
		}
		w.stop()
	})
}

// The connection is closed or cut while the last delta is sent: Run ends all the same,
// at the latest when it has waited a second for an acknowledgement.
func TestEndsWithoutItsConnection(t *testing.T) {
	for name, lose := range map[string]func(*world){
		"closed": func(w *world) { w.conn.Close() },
		"cut":    func(w *world) { w.net.Cut("pod", "control") },
		"server": func(w *world) { w.stop() },
	} {
		t.Run(name, func(t *testing.T) {
			for range 40 { // which of the two comes first is chance
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					defer w.stop()
					end := w.run(nil)
					time.Sleep(time.Second)
					w.observe(1)
					start := time.Now()
					go lose(w)
					end()
					if took := time.Since(start); took > time.Second {
						t.Errorf("the end took %v", took)
					}
				})
			}
		})
	}
}

// lame is a connection whose streams end as soon as something is sent, and say so to the
// sender a little before they do to the receiver, as real ones may.
type lame struct {
	grpc.ClientConnInterface
	t         *testing.T
	receivers atomic.Int32
}

type lameStream struct {
	grpc.ClientStream
	c    *lame
	ctx  context.Context
	sent chan struct{}
}

func (c *lame) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	return &lameStream{c: c, ctx: ctx, sent: make(chan struct{}, 1)}, nil
}

func (s *lameStream) CloseSend() error { return nil }

func (s *lameStream) SendMsg(any) error {
	s.sent <- struct{}{}
	return io.EOF
}

func (s *lameStream) RecvMsg(any) error {
	// gRPC allows one receiver; a second one may wait for ever.
	if s.c.receivers.Add(1) > 1 {
		s.c.t.Error("two goroutines receive from one stream")
	}
	defer s.c.receivers.Add(-1)
	select {
	case <-s.sent:
		time.Sleep(10 * time.Millisecond)
		return gstatus.Error(codes.Unavailable, "gone")
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

func TestOneGoroutineReceives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{}
		r := New(Options{Conn: &lame{t: t}, Node: &pb.Node{Id: "pod"}, Start: time.Now(), Collect: w.collect})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		w.observe(1)
		time.Sleep(5 * time.Second) // sent and sent again
		w.observe(1)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
