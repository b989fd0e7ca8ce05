package replicate_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/pebble"
	"github.com/outrigger-mesh/outrigger/control/replicate"
)

// patience bounds every wait of a test; nothing is concluded from its length.
const patience = time.Minute

// leading is a leader whose server can be taken away and brought back.
type leading struct {
	t      *testing.T
	log    *pebble.Log
	leader *replicate.Leader
	mu     sync.Mutex
	server *grpc.Server
	listen *bufconn.Listener
	// lose makes the server carry an append out and lose its answer, so many times.
	lose atomic.Int32
}

func newLeading(t *testing.T) *leading {
	log, err := pebble.Open(t.TempDir(), pebble.Options{})
	if err != nil {
		t.Fatal(err)
	}
	l := &leading{t: t, log: log}
	if l.leader, err = replicate.NewLeader(replicate.LeaderOptions{Log: log}); err != nil {
		t.Fatal(err)
	}
	l.start()
	t.Cleanup(func() {
		l.stop()
		if err := log.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func (l *leading) start() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.listen = bufconn.Listen(1 << 20)
	l.server = grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		out, err := next(ctx, req)
		if info.FullMethod == pb.Replication_Append_FullMethodName && l.lose.Add(-1) >= 0 {
			return nil, errors.New("the answer is lost")
		}
		return out, err
	}))
	pb.RegisterReplicationServer(l.server, l.leader)
	server, listen := l.server, l.listen
	go func() { _ = server.Serve(listen) }() // ends with stop
}

func (l *leading) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.server.Stop()
}

func (l *leading) dial(ctx context.Context, _ string) (net.Conn, error) {
	l.mu.Lock()
	listen := l.listen
	l.mu.Unlock()
	return listen.DialContext(ctx)
}

func (l *leading) append(id string, w ...eventlog.Write) eventlog.Appended {
	l.t.Helper()
	out, err := l.log.Append(l.t.Context(), id, w...)
	if err != nil {
		l.t.Fatal(err)
	}
	return out
}

func one(aggregate string, expect int64) eventlog.Write {
	return eventlog.Write{Aggregate: aggregate, Expect: expect, Events: []*pb.Event{{Actor: "x", Schema: 1}}}
}

func (l *leading) options(t *testing.T, dir string) replicate.FollowerOptions {
	conn, err := grpc.NewClient("passthrough:///leader", grpc.WithContextDialer(l.dial), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return replicate.FollowerOptions{Conn: conn, Leader: "the leader", Name: "two", Check: 10 * time.Millisecond,
		Store: func(incarnation uint64) (replicate.Store, error) {
			c, err := pebble.OpenCopy(dir, incarnation, pebble.Options{})
			if err != nil {
				return nil, err
			}
			return c, nil
		}}
}

// follow runs a follower until the test, or stop, ends it; its Run must not fail.
func (l *leading) follow(t *testing.T, dir string) (f *replicate.Follower, stop func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	f, err := replicate.Open(ctx, l.options(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	run, end := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(run) }()
	stop = sync.OnceFunc(func() {
		end()
		if err := errors.Join(<-done, f.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return f, stop
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
		<-tick.C
	}
}

func events(t *testing.T, l eventlog.Reader) (out []*pb.Event) {
	t.Helper()
	for e, err := range l.ReadAll(t.Context(), 1) {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, e)
	}
	return out
}

// A follower has the leader's log, what is appended through it as well, and goes on after a
// restart of either where it was.
func TestFollow(t *testing.T) {
	l, dir := newLeading(t), t.TempDir()
	for i := range 1500 { // more than a shipment
		l.append("", one(fmt.Sprint("a/", i%7), eventlog.Any))
	}
	f, stop := l.follow(t, dir)
	eventually(t, "the copy is complete", func() bool { return f.Head() == l.log.Head() })

	out, err := f.Append(t.Context(), "mine", one("b/1", 0), one("b/2", 0))
	if err != nil || out.Last-out.First != 1 || len(out.Events) != 2 || out.Duplicate {
		t.Fatalf("append through the follower: %v, %v", out, err)
	}
	if f.Head() < out.Last {
		t.Fatal("the writer was answered before its follower had the events")
	}
	if again, err := f.Append(t.Context(), "mine", one("b/1", 0)); err != nil || !again.Duplicate || again.First != out.First || len(again.Events) != 2 {
		t.Fatalf("the same request id again: %v, %v", again, err)
	}
	if _, err := f.Append(t.Context(), "", one("b/1", 0)); !outrigger.IsKind(err, outrigger.Conflict) {
		t.Fatalf("an outdated expectation: %v", err)
	}
	if _, err := f.Append(t.Context(), "", eventlog.Write{}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Fatalf("an empty write: %v", err)
	}

	stop()
	for range 10 {
		l.append("", one("a/1", eventlog.Any))
	}
	f, _ = l.follow(t, dir)
	if f.Head() == 0 {
		t.Fatal("the restarted follower had to begin anew")
	}
	eventually(t, "it has caught up", func() bool { return f.Head() == l.log.Head() })
	l.stop()
	eventually(t, "it has noticed", func() bool { return !f.Linked() })
	l.start()
	l.append("", one("a/1", eventlog.Any))
	eventually(t, "it follows again", func() bool { return f.Linked() && f.Head() == l.log.Head() })
	want, got := events(t, l.log), events(t, f)
	for i := range want {
		if !proto.Equal(want[i], got[i]) {
			t.Fatalf("position %d: %v, the leader has %v", i+1, got[i], want[i])
		}
	}
}

// With the leader away a write fails at once and a confirmation, too; what is there is read.
func TestLeaderAway(t *testing.T) {
	l := newLeading(t)
	l.append("", one("a/1", 0))
	f, _ := l.follow(t, t.TempDir())
	eventually(t, "linked", func() bool { return f.Linked() && f.Head() == 1 })
	l.stop()
	eventually(t, "it has noticed", func() bool { return !f.Linked() })
	if _, err := f.Append(t.Context(), "", one("a/2", 0)); !outrigger.IsKind(err, outrigger.Unavailable) {
		t.Errorf("append: %v", err)
	}
	if _, err := f.Confirm(t.Context()); !outrigger.IsKind(err, outrigger.Unavailable) {
		t.Errorf("confirm: %v", err)
	}
	if len(events(t, f)) != 1 {
		t.Error("the copy cannot be read")
	}
	eventually(t, "the silence grows", func() bool { return f.Silence(time.Now()) > 50*time.Millisecond })
	heard := f.Heard()
	l.start()
	<-heard
	if got := f.Silence(time.Now()); got > patience {
		t.Errorf("heard, and silent for %v", got)
	}
}

// An answer that is lost is asked for again under the same id: the events are there once, and
// the caller is told that it wrote them.
func TestLostAnswer(t *testing.T) {
	l := newLeading(t)
	f, _ := l.follow(t, t.TempDir())
	eventually(t, "linked", f.Linked)
	l.lose.Store(2)
	out, err := f.Append(t.Context(), "", one("a/1", 0))
	if err != nil || out.First != 1 || out.Duplicate {
		t.Fatalf("%v, %v", out, err)
	}
	l.lose.Store(1 << 20)
	if _, err := f.Append(t.Context(), "", one("a/2", 0)); !outrigger.IsKind(err, outrigger.Unknown) {
		t.Errorf("with every answer lost: %v", err)
	}
	if n := l.log.Head(); n != 2 {
		t.Errorf("the log has %d events, want 2", n)
	}
}

// What Confirm returns is not older than the call: every append acknowledged before is in it.
func TestConfirm(t *testing.T) {
	l := newLeading(t)
	f, _ := l.follow(t, t.TempDir())
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for range 50 {
				done, err := l.log.Append(context.Background(), "", one(fmt.Sprint("c/", w), eventlog.Any))
				if err != nil {
					t.Error(err)
					return
				}
				if head, err := f.Confirm(context.Background()); err != nil || head < done.Last {
					t.Errorf("confirmed %d (%v) after %d was acknowledged", head, err, done.Last)
					return
				}
			}
		})
	}
	wg.Wait()
}

// A copy of another log, or one that has more than the leader, is not served from.
func TestOtherLog(t *testing.T) {
	one1, two, dir := newLeading(t), newLeading(t), t.TempDir()
	one1.append("", one("a/1", 0))
	f, stop := one1.follow(t, dir)
	eventually(t, "copied", func() bool { return f.Head() == 1 })
	stop()
	o := two.options(t, dir)
	g, err := replicate.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := g.Run(ctx); !outrigger.IsKind(err, outrigger.Conflict) {
		t.Errorf("following another log: %v", err)
	}
}

// standings is what a follower's ADS server would say.
type standings struct {
	mu      sync.Mutex
	nodes   []*pb.NodeStanding
	changed chan struct{}
}

func (s *standings) Standings() []*pb.NodeStanding {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nodes
}

func (s *standings) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

func (s *standings) set(nodes ...*pb.NodeStanding) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nodes = nodes
	close(s.changed)
	s.changed = make(chan struct{})
}

func standing(id string, connected bool, acked uint64) *pb.NodeStanding {
	return &pb.NodeStanding{Node: &pb.Node{Id: id}, Connected: connected, Acked: acked, Since: timestamppb.Now(), Sidecar: true}
}

// The leader knows who follows policy through a follower, and that nobody does once the
// follower is gone.
func TestStand(t *testing.T) {
	l := newLeading(t)
	f, _ := l.follow(t, t.TempDir())
	s := &standings{changed: make(chan struct{})}
	s.set(standing("pod-1", true, 3), standing("pod-2", true, 3))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Stand(ctx, s) }()
	has := func(want ...*pb.NodeStanding) func() bool {
		return func() bool {
			got := l.leader.Nodes()
			for i := range want {
				if len(got) != len(want) || got[i].GetNode().GetId() != want[i].GetNode().GetId() ||
					got[i].GetConnected() != want[i].GetConnected() || got[i].GetAcked() != want[i].GetAcked() {
					return false
				}
			}
			return true
		}
	}
	eventually(t, "the leader knows both", has(standing("pod-1", true, 3), standing("pod-2", true, 3)))
	changed := l.leader.Changed()
	s.set(standing("pod-1", true, 9), standing("pod-2", false, 3))
	<-changed
	eventually(t, "and what has changed", has(standing("pod-1", true, 9), standing("pod-2", false, 3)))
	l.stop()
	eventually(t, "a follower that is gone has nobody", has(standing("pod-1", false, 9), standing("pod-2", false, 3)))
	l.start()
	eventually(t, "until it is back", has(standing("pod-1", true, 9), standing("pod-2", false, 3)))
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
