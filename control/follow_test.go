package control_test

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/replicate"
	"github.com/outrigger-mesh/outrigger/xds"
	"github.com/outrigger-mesh/outrigger/xds/translate"
)

// link is a connection to a leader that can be cut and mended.
type link struct {
	mu     sync.Mutex
	listen *bufconn.Listener
	cut    bool
	open   []net.Conn
}

func (l *link) dial(ctx context.Context, _ string) (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut {
		return nil, fmt.Errorf("cut")
	}
	c, err := l.listen.DialContext(ctx)
	if err == nil {
		l.open = append(l.open, c)
	}
	return c, err
}

func (l *link) set(cut bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = cut
	if !cut {
		return
	}
	for _, c := range l.open {
		_ = c.Close()
	}
	l.open = nil
}

// follow runs a replica that follows leader; its clients use its own plane.
func (leader *plane) follow(t *testing.T, name string) (*plane, *link) {
	return leader.followWith(t, name, nil, false)
}

// followWith is follow with the copy of an earlier life, and with the link cut from the start.
func (leader *plane) followWith(t *testing.T, name string, have *memory.Copy, cut bool) (*plane, *link) {
	t.Helper()
	l := &link{listen: bufconn.Listen(1 << 20), cut: cut}
	gs := grpc.NewServer()
	leader.srv.RegisterGRPC(gs)
	go func() { _ = gs.Serve(l.listen) }() // ends with Stop
	conn, err := grpc.NewClient("passthrough:///leader", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(l.dial))
	if err != nil {
		t.Fatal(err)
	}
	f, err := replicate.Open(t.Context(), replicate.FollowerOptions{Conn: conn, Leader: "leader", Name: name,
		Store: func(incarnation uint64) (replicate.Store, error) {
			if have != nil {
				return have, nil
			}
			if incarnation == 0 {
				return nil, outrigger.Errorf(outrigger.NotFound, "no copy")
			}
			return &memory.Copy{Log: memory.New(memory.WithIncarnation(incarnation))}, nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, f, func(o *control.Options) { o.Follow = &control.Following{Log: f, Conn: conn} })
	stop := p.stop
	p.stop = func() { stop(); _ = conn.Close(); gs.Stop() }
	t.Cleanup(p.stop)
	return p, l
}

// A follower has the leader's policy to the byte, and takes every kind of write.
func TestFollowerServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leader := newPlane(t)
		defer leader.stop()
		leader.register("chat", "v1", "v2")
		follower, _ := leader.follow(t, "two")
		defer follower.stop()

		// Operators may use either.
		if _, err := follower.admin.RegisterModelVersion(t.Context(), &pb.RegisterModelVersionRequest{Model: "embed", Version: "e1", Actor: "ann",
			Endpoints: []*pb.Endpoint{{Address: "10.0.0.9:80", Region: "eu"}}}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(leader.model("embed").GetVersions()) != 1 {
			t.Error("the leader does not have what was registered through the follower")
		}
		a, b := leader.join("pod-a"), follower.join("pod-b")
		defer a.leave()
		defer b.leave()
		pa, pb2 := a.policy(), b.policy()
		if pa.Position != pb2.Position || len(pa.Models) != 2 || fmt.Sprintf("%+v", pa) != fmt.Sprintf("%+v", pb2) {
			t.Errorf("policies differ:\n%+v\n%+v", pa, pb2)
		}
		a.mu.Lock()
		b.mu.Lock()
		same := a.held.Len() > 0 && a.held.Len() == b.held.Len()
		for _, typeURL := range xds.Types() {
			for _, name := range a.held.Names(typeURL) {
				same = same && proto.Equal(a.held.Get(typeURL, name), b.held.Get(typeURL, name))
			}
		}
		a.mu.Unlock()
		b.mu.Unlock()
		if !same {
			t.Error("the resources differ")
		}

		// What is acknowledged by one is read from the other, in both directions.
		va, vb := pb.NewVariablesClient(leader.conn), pb.NewVariablesClient(follower.conn)
		if _, err := vb.CreateSession(t.Context(), &pb.CreateSessionRequest{Id: "shop"}); err != nil {
			t.Fatal(err)
		}
		if _, err := vb.Register(t.Context(), &pb.RegisterRequest{Key: &pb.Key{Session: "shop", Name: "n"}, Value: &pb.Value{Type: "integer", Json: []byte("0")}}); err != nil {
			t.Fatal(err)
		}
		for i := range 50 {
			to, from := va, vb
			if i%2 == 0 {
				to, from = vb, va
			}
			want := fmt.Sprint(i)
			if _, err := to.Set(t.Context(), &pb.SetRequest{Session: "shop", Identifier: "n", Value: &pb.Value{Type: "integer", Json: []byte(want)}}); err != nil {
				t.Fatal(err)
			}
			if v, err := from.Get(t.Context(), &pb.GetRequest{Session: "shop", Identifier: "n"}); err != nil || string(v.GetValue().GetJson()) != want {
				t.Fatalf("read %v (%v) after %s was acknowledged", v, err, want)
			}
		}
	})
}

// Who moves to another replica and says what it holds is sent nothing again: versions are the
// same there.
func TestFollowerResendsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leader := newPlane(t)
		defer leader.stop()
		leader.register("chat", "v1", "v2")
		follower, _ := leader.follow(t, "two")
		defer follower.stop()
		// held asks a replica for everything, given what is held already, and returns what it sends.
		held := func(p *plane, has map[string]map[string]string) map[string]map[string]string {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			stream, err := discovery.NewAggregatedDiscoveryServiceClient(p.conn).DeltaAggregatedResources(ctx)
			if err != nil {
				t.Fatal(err)
			}
			node := translate.Node(outrigger.Node{ID: "pod", Kind: "sidecar", Region: "eu"})
			for _, typeURL := range xds.Types() {
				if err := stream.Send(&discovery.DeltaDiscoveryRequest{Node: node, TypeUrl: typeURL, ResourceNamesSubscribe: []string{xds.Wildcard}, InitialResourceVersions: has[typeURL]}); err != nil {
					t.Fatal(err)
				}
			}
			got := map[string]map[string]string{}
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					r, err := stream.Recv()
					if err != nil {
						return
					}
					for _, res := range r.GetResources() {
						if got[r.GetTypeUrl()] == nil {
							got[r.GetTypeUrl()] = map[string]string{}
						}
						got[r.GetTypeUrl()][res.GetName()] = res.GetVersion()
					}
					if stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()}) != nil {
						return
					}
				}
			}()
			time.Sleep(time.Second)
			cancel()
			<-done
			return got
		}
		first := held(leader, nil)
		if len(first[xds.TypeModelPolicy]) != 1 || len(first) < 2 {
			t.Fatalf("the leader sent %v", first)
		}
		if again := held(follower, first); len(again) != 0 {
			t.Errorf("the follower sent %v to one that had it", again)
		}
		if all := held(follower, nil); len(all) != len(first) {
			t.Errorf("to one that had nothing the follower sent %v", all)
		}
	})
}

// A rollback is complete when the clients of every replica have it, and evidence that comes to
// a follower counts.
func TestFollowerTakesPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leader := newPlane(t)
		defer leader.stop()
		leader.register("chat", "v1", "v2")
		follower, _ := leader.follow(t, "two")
		defer follower.stop()
		near, far := leader.join("near"), follower.join("far")
		defer near.leave()
		defer far.leave()
		if _, err := leader.admin.StartRollout(t.Context(), &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "v2", Actor: "ann",
			Phases: []*pb.RolloutPhase{{Name: "half", Weight: 5000, MinDuration: durationpb.New(time.Hour)}}}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if shares(far.policy().Model("chat"))["v2"] != 5000 {
			t.Fatal("the follower's sidecar does not divide")
		}
		time.Sleep(time.Second)
		names := map[string]bool{}
		for _, n := range leader.status().GetNodes() {
			names[n.GetNode().GetId()] = n.GetConnected() && n.GetAckedPosition() > 0
		}
		if !names["near"] || !names["far"] {
			t.Fatalf("the leader knows of %v", names)
		}

		reports, err := pb.NewReportsClient(follower.conn).Push(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		epoch := far.policy().Model("chat").WeightEpoch
		bad := &pb.Delta{Reporter: "far/1", Sequence: 1, Node: &pb.Node{Id: "far", Kind: "sidecar", Region: "eu"}, Outcomes: []*pb.OutcomeDelta{
			{Model: "chat", Version: "v2", Arm: "candidate", Region: "eu", WeightEpoch: epoch, Requests: 60, Failures: 60},
			{Model: "chat", Version: "v1", Arm: "stable", Region: "eu", WeightEpoch: epoch, Requests: 60}}}
		if err := reports.Send(bad); err != nil {
			t.Fatal(err)
		}
		if ack, err := reports.Recv(); err != nil || ack.GetSequence() != 1 {
			t.Fatalf("%v, %v", ack, err)
		}
		time.Sleep(5 * time.Second)
		r := leader.rollout("r")
		if c := r.GetRollbackCompleted(); r.GetState() != "rolled_back" || c.GetAcked() != 2 || len(c.GetLaggards()) != 0 {
			t.Fatalf("%v", r)
		}
		if shares(far.policy().Model("chat"))["v2"] != 0 {
			t.Error("the follower's sidecar still divides")
		}
	})
}

// A follower that is cut off serves what it has; writes fail at once, reads that promise to be
// current fail, and after the dead-man lease no candidate is served, until the leader is back.
func TestFollowerCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leader := newPlane(t)
		defer leader.stop()
		leader.register("chat", "v1", "v2")
		follower, wire := leader.follow(t, "two")
		defer follower.stop()
		far := follower.join("far")
		defer far.leave()
		if _, err := leader.admin.StartRollout(t.Context(), &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "v2", Actor: "ann",
			Phases: []*pb.RolloutPhase{{Name: "half", Weight: 5000, MinDuration: durationpb.New(time.Hour)}}}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		if shares(far.policy().Model("chat"))["v2"] != 5000 {
			t.Fatal("the follower's sidecar does not divide")
		}
		wire.set(true)
		synctest.Wait()
		_, err := follower.srv.Admin().RegisterModelVersion(t.Context(), &pb.RegisterModelVersionRequest{Model: "chat", Version: "v3", Actor: "ann",
			Endpoints: []*pb.Endpoint{{Address: "10.0.0.9:80", Region: "eu"}}})
		wantKind(t, err, outrigger.Unavailable)
		if _, err := pb.NewVariablesClient(follower.conn).List(t.Context(), &pb.ListRequest{Session: "shop"}); err == nil {
			t.Error("a list that may be outdated was given as current")
		}
		if n := len(follower.model("chat").GetVersions()); n != 2 {
			t.Errorf("operators are shown %d versions", n)
		}
		time.Sleep(5 * time.Second)
		if shares(far.policy().Model("chat"))["v2"] != 5000 {
			t.Fatal("the candidate was given up before the lease had run out")
		}
		time.Sleep(6 * time.Second)
		if got := shares(far.policy().Model("chat")); got["v2"] != 0 || got["v1"] != 10000 {
			t.Fatalf("after the lease the sidecar gives %v", got)
		}
		wire.set(false)
		time.Sleep(time.Minute) // gRPC's own pauses between attempts
		if got := shares(far.policy().Model("chat")); got["v2"] != 5000 {
			t.Fatalf("with the leader back the sidecar gives %v", got)
		}
	})
}

// A follower that starts while its leader is away has heard nothing: it serves no candidate,
// however often it is started, and the candidate is back with the leader.
func TestFollowerStartsWithoutLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leader := newPlane(t)
		defer leader.stop()
		leader.register("chat", "v1", "v2")
		if _, err := leader.admin.StartRollout(t.Context(), &pb.StartRolloutRequest{Id: "r", Model: "chat", Candidate: "v2", Actor: "ann",
			Phases: []*pb.RolloutPhase{{Name: "half", Weight: 5000, MinDuration: durationpb.New(time.Hour)}}}); err != nil {
			t.Fatal(err)
		}
		have := &memory.Copy{Log: memory.New(memory.WithIncarnation(leader.log.Incarnation()))}
		for e, err := range leader.log.ReadAll(t.Context(), 1) {
			if err != nil {
				t.Fatal(err)
			}
			if err := have.Ingest(t.Context(), []*pb.Event{e}); err != nil {
				t.Fatal(err)
			}
		}
		follower, wire := leader.followWith(t, "two", have, true)
		defer follower.stop()
		far := follower.join("far")
		defer far.leave()
		if got := shares(far.policy().Model("chat")); got["v2"] != 0 || got["v1"] != 10000 {
			t.Fatalf("started without a leader it gives %v", got)
		}
		wire.set(false)
		time.Sleep(time.Minute)
		if got := shares(far.policy().Model("chat")); got["v2"] != 5000 {
			t.Fatalf("with the leader there it gives %v", got)
		}
	})
}
