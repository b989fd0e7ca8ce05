package cache_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/cache/internal/origintest"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/memnet"
)

// world is an origin, a node with an agent, and stores of two pods on it. Hosts are
// "origin", "node" and "pod"; every link can be cut.
type world struct {
	t           *testing.T
	net         *memnet.Network
	origin      *origintest.Origin
	clock       func() int64
	agent       atomic.Pointer[node.Agent]
	table       shm.Options // of the next agent
	admin       bool        // it takes reports
	stops       []func()
	repairEvery time.Duration // of the agent

	stopAgent func()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, net: memnet.New(), origin: origintest.New(), table: shm.Options{Heap: true, Bytes: 1 << 20}}
	start := time.Now()
	w.clock = func() int64 { return int64(time.Since(start)) + int64(time.Hour) }
	stop, err := w.origin.Serve(w.net, "origin", "origin:1")
	must(t, err)
	w.stops = append(w.stops, stop)
	return w
}

func (w *world) close() {
	if w.stopAgent != nil {
		w.stopAgent()
	}
	for i := len(w.stops) - 1; i >= 0; i-- {
		w.stops[i]()
	}
}

func (w *world) dial(from, to string) *grpc.ClientConn {
	cc, err := origintest.Dial(w.net, from, to)
	must(w.t, err)
	w.stops = append(w.stops, func() { cc.Close() })
	return cc
}

// startAgent runs the node's agent, with a new table, until stopAgent is called.
func (w *world) startAgent() {
	cc, err := origintest.Dial(w.net, "node", "origin:1")
	must(w.t, err)
	a, err := node.New(node.Options{Node: outrigger.Node{ID: "n", Region: origintest.Region}, Origin: cc,
		Table: w.table, Clock: w.clock, RepairEvery: w.repairEvery})
	must(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- a.Run(ctx) }()
	l, err := w.net.Listen("node", "agent:1")
	must(w.t, err)
	g := grpc.NewServer()
	pb.RegisterVariablesServer(g, a)
	pb.RegisterCoherenceServer(g, a)
	if w.admin {
		pb.RegisterNodeAdminServer(g, a.Admin())
	}
	go g.Serve(l)
	w.agent.Store(a)
	w.stopAgent = func() {
		w.stopAgent = nil
		g.Stop()
		l.Close()
		cancel()
		if err := <-ran; err != nil {
			w.t.Error(err)
		}
		cc.Close()
		// The pods have noticed. What is sent into a connection that is just ending has an
		// unknown outcome, and rightly so.
		synctest.Wait()
	}
	<-a.Ready()
}

// store builds a running Store of one pod.
func (w *world) store(o cache.Options) *cache.Store {
	o.Clock = w.clock
	s, err := cache.New(o)
	must(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- s.Run(ctx) }()
	w.stops = append(w.stops, func() {
		cancel()
		if err := <-ran; err != nil {
			w.t.Error(err)
		}
	})
	return s
}

// pod is a Store with everything: table, agent, origin.
func (w *world) pod() *cache.Store {
	return w.store(cache.Options{Table: func() *shm.Reader { return w.agent.Load().Table() }, Agent: w.dial("pod", "agent:1"),
		Origin: w.dial("pod", "origin:1"), Encoders: []cache.Encoder{encode},
		WarmUp: cache.WarmUp{Off: true}})
}

func encode(v *pb.Variable) []byte { return append([]byte("="), v.GetValue().GetJson()...) }

// bubble runs do with an agent and one pod.
func bubble(t *testing.T, do func(t *testing.T, w *world, s *cache.Store)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.close()
		w.startAgent()
		do(t, w, w.pod())
	})
}

var (
	session  = outrigger.Consistency{}
	strong   = outrigger.Consistency{Level: outrigger.Strong}
	eventual = outrigger.Consistency{Level: outrigger.Eventual}
)

func bounded(d time.Duration) outrigger.Consistency {
	return outrigger.Consistency{Level: outrigger.Bounded, MaxAge: d}
}

func key(name string) outrigger.Key {
	return outrigger.Key{Tenant: outrigger.DefaultTenant, Session: "s", Name: name}
}

// read describes one answer: value, tier, and what is wrong with it.
func read(t *testing.T, s *cache.Store, name string, c outrigger.Consistency) string {
	t.Helper()
	a, err := s.Get(t.Context(), cache.Request{Key: key(name), Consistency: c, Encoding: -1})
	if err != nil {
		return outrigger.KindOf(err).String()
	}
	out := "none"
	if a.Found {
		out = string(a.Variable.GetValue().GetJson())
	}
	out += " " + a.Tier.String()
	if a.Stale {
		out += " stale"
		if a.Reason == "" || a.FeedLive {
			t.Errorf("a stale answer without a reason, or with a live feed: %+v", a)
		}
	}
	if a.Age < 0 || !a.Stale && a.Age > 2*time.Second {
		t.Errorf("age %v of a fresh answer", a.Age)
	}
	return out
}

func reads(t *testing.T, s *cache.Store, name string, c outrigger.Consistency, want string) {
	t.Helper()
	if got := read(t, s, name, c); got != want {
		t.Fatalf("%s %s: got %q, want %q", c, name, got, want)
	}
}

func set(s *cache.Store, name, json string) error {
	_, err := s.Variables().Set(context.Background(), &pb.SetRequest{Session: "s", Identifier: name, Value: &pb.Value{Json: []byte(json)}})
	return err
}

// One read at the origin, then the process; another pod of the node gets it from the
// node's table.
func TestTiers(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		synctest.Wait()
		reads(t, s, "x", session, "1 origin")
		reads(t, s, "x", session, "1 process")
		other := w.pod()
		reads(t, other, "x", session, "1 node")
		reads(t, other, "x", session, "1 process")
		reads(t, other, "absent", session, "none origin")
		reads(t, other, "absent", session, "none process")
		reads(t, s, "absent", eventual, "none node")
		if calls, _ := w.origin.Reads(); calls != 2 {
			t.Errorf("%d reads at the origin, want 2", calls)
		}
		a, err := s.Get(t.Context(), cache.Request{Key: outrigger.Key{Tenant: "default", Session: "nope", Name: "x"}, Encoding: -1})
		if err != nil || a.Found || a.SessionExists || !a.FeedLive {
			t.Errorf("a session that does not exist: %+v, %v", a, err)
		}
		if st := s.Stats(); !st.Attached || st.Node != 1 || st.Origin != 2 || st.Failed != 0 {
			t.Errorf("stats %+v", st)
		}
	})
}

func TestEncodings(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		synctest.Wait()
		if _, ok := s.Hit("default/s/x", 0); ok {
			t.Error("a hit before anything was read")
		}
		reads(t, s, "x", session, "1 origin")
		if h, ok := s.Hit("default/s/x", -1); !ok || string(h.Variable.GetValue().GetJson()) != "1" || h.Age > 300*time.Millisecond {
			t.Errorf("Hit gave %+v, %v", h, ok)
		}
		if _, ok := s.Hit("default/s/x", 0); ok {
			t.Error("a hit in an encoding nobody has asked for")
		}
		a, err := s.Get(t.Context(), cache.Request{Key: key("x"), Encoding: 0})
		if err != nil || string(a.Encoded) != "=1" {
			t.Errorf("Get gave %+v, %v", a, err)
		}
		if h, ok := s.Hit("default/s/x", 0); !ok || string(h.Encoded) != "=1" {
			t.Errorf("Hit gave %+v, %v", h, ok)
		}
		for _, r := range []cache.Request{{Key: key("x"), Encoding: 1}, {Key: key("x"), Encoding: -2}, {Key: key(""), Encoding: -1},
			{Key: key("x"), Encoding: -1, Consistency: bounded(0)}} {
			if _, err := s.Get(t.Context(), r); !outrigger.IsKind(err, outrigger.Invalid) {
				t.Errorf("%+v: got %v", r, err)
			}
		}
	})
}

// A change elsewhere is one store of the agent, and no process serves its copy after it.
func TestInvalidationReachesTheProcess(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		synctest.Wait()
		reads(t, s, "x", session, "1 origin")
		w.origin.Put("x", "2")
		synctest.Wait()
		if _, ok := s.Hit("default/s/x", -1); ok {
			t.Fatal("the old copy still counts as current")
		}
		reads(t, s, "x", session, "2 node") // it rode along
		reads(t, s, "x", session, "2 process")
	})
}

func TestWritesThroughTheAgent(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		synctest.Wait()
		other := w.pod()
		reads(t, other, "x", session, "1 origin")
		w.net.SetDelay("origin", "node", 30*time.Millisecond) // the feed is late
		must(t, set(s, "x", "2"))
		reads(t, s, "x", session, "2 node")
		reads(t, other, "x", session, "2 node") // all pods of the node see it
		_, err := s.Variables().Delete(t.Context(), &pb.GetRequest{Session: "s", Identifier: "x"})
		must(t, err)
		reads(t, s, "x", session, "none node")
		reads(t, other, "x", session, "none node")
		if err := set(s, "x", "3"); gstatus.Code(err) != codes.NotFound {
			t.Errorf("got %v", err)
		}
	})
}

// Strong and narrowly bounded reads ask the origin although the table is fresh.
func TestStrongAndBounded(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		synctest.Wait()
		reads(t, s, "x", session, "1 origin")
		w.origin.LoseFrame()
		w.origin.Put("x", "2") // the node does not hear of it yet
		synctest.Wait()
		reads(t, s, "x", session, "1 process")
		reads(t, s, "x", bounded(300*time.Millisecond), "1 process")
		reads(t, s, "x", strong, "2 origin")
		reads(t, s, "x", session, "2 process") // nobody goes back behind it
		time.Sleep(90 * time.Millisecond)
		reads(t, s, "x", bounded(10*time.Millisecond), "2 origin")
		w.net.SetDelay("node", "origin", 20*time.Millisecond)
		reads(t, s, "x", bounded(10*time.Millisecond), "stale")
	})
}

// Control plane away.
func TestOriginAway(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		for _, n := range []string{"x", "y", "z"} {
			w.origin.Put(n, "1")
		}
		synctest.Wait()
		reads(t, s, "x", session, "1 origin")
		reads(t, s, "y", session, "1 origin")
		reads(t, s, "nothing", session, "none origin")
		cut := time.Now()
		w.net.Cut("node", "origin")
		w.net.Cut("pod", "origin")
		reads(t, s, "x", session, "1 process") // the lease holds
		time.Sleep(400 * time.Millisecond)
		reads(t, s, "x", session, "1 node stale")
		reads(t, s, "x", eventual, "1 node stale")
		reads(t, s, "nothing", session, "none node stale")
		reads(t, s, "z", session, "unavailable") // never seen
		reads(t, s, "z", eventual, "unavailable")
		reads(t, s, "x", strong, "unavailable")
		reads(t, s, "x", bounded(200*time.Millisecond), "stale")
		reads(t, s, "x", bounded(time.Hour), "1 node")
		a, err := s.Get(t.Context(), cache.Request{Key: key("x"), Encoding: -1})
		if since := time.Since(cut); err != nil || a.Age < since || a.Age > since+110*time.Millisecond {
			t.Errorf("age %v, %v after the cut (%v)", a.Age, since, err)
		}
		if err := set(s, "x", "2"); gstatus.Code(err) != codes.Unavailable {
			t.Errorf("a write got %v, want Unavailable", err)
		}
		reads(t, s, "x", session, "1 node stale") // it certainly changed nothing
		w.net.Heal("node", "origin")
		w.net.Heal("pod", "origin")
		time.Sleep(2 * time.Second)
		reads(t, s, "x", session, "1 node")
		if st := s.Stats(); st.Stale == 0 || st.Failed == 0 {
			t.Errorf("stats %+v", st)
		}
	})
}

// An acknowledgement that comes when the value has long been replaced says nothing of
// the present: what it told is as old as the call.
func TestSlowAcknowledgement(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		w.stopAgent()
		w.origin.AfterWrite(func() {
			w.origin.Put("x", "3")
			time.Sleep(500 * time.Millisecond)
		})
		must(t, set(s, "x", "2"))
		w.net.Cut("pod", "origin")
		reads(t, s, "x", bounded(200*time.Millisecond), "stale")
		reads(t, s, "x", bounded(time.Hour), "2 process")
		reads(t, s, "x", session, "2 process stale")
	})
}

// A session is deleted while an earlier write is on its way back: its late
// acknowledgement does not bring the value back.
func TestSlowAcknowledgementOfWhatWasDeleted(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		w.stopAgent()
		w.origin.AfterWrite(func() {
			time.Sleep(time.Millisecond)
			_, err := s.Variables().DeleteSession(context.Background(), &pb.GetSessionRequest{Id: "s"})
			if err != nil {
				t.Error(err)
			}
			time.Sleep(100 * time.Millisecond)
		})
		must(t, set(s, "x", "2"))
		w.net.Cut("pod", "origin")
		reads(t, s, "x", session, "unavailable")
	})
}

// A value that is known to have changed is not given to session readers.
func TestKnownToHaveChanged(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		synctest.Wait()
		reads(t, s, "x", session, "1 origin")
		w.origin.Put("x", `"`+fmt.Sprintf("%0100d", 2)+`"`) // too large to ride along
		synctest.Wait()
		w.net.Cut("node", "origin")
		w.net.Cut("pod", "origin")
		reads(t, s, "x", session, "unavailable")
		reads(t, s, "x", eventual, "1 process stale")
	})
}

// A black hole answers nothing: the first reader waits once, the next ones do not.
func TestBlackHole(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		synctest.Wait()
		reads(t, s, "x", session, "1 origin")
		release := w.origin.HoldReads()
		defer release()
		w.net.Cut("node", "origin")
		time.Sleep(400 * time.Millisecond)
		start := time.Now()
		reads(t, s, "x", session, "1 node stale")
		first := time.Since(start)
		start = time.Now()
		reads(t, s, "x", session, "1 node stale")
		if again := time.Since(start); first > 1100*time.Millisecond || again > time.Millisecond {
			t.Errorf("the first reader waited %v, the next %v", first, again)
		}
	})
}

// Node agent away: the origin is asked directly, each time, and the guarantees hold.
func TestAgentAway(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		synctest.Wait()
		reads(t, s, "x", session, "1 origin")
		w.stopAgent()
		reads(t, s, "x", session, "1 origin")
		reads(t, s, "x", session, "1 origin") // nothing proves a copy
		must(t, set(s, "x", "2"))
		reads(t, s, "x", session, "2 origin")
		must(t, set(s, "x", "3"))
		w.net.Cut("pod", "origin")
		reads(t, s, "x", session, "3 process stale") // the write, not the old table
		w.net.Heal("pod", "origin")
		time.Sleep(time.Second)
		_, err := s.Variables().Delete(t.Context(), &pb.GetRequest{Session: "s", Identifier: "x"})
		must(t, err)
		w.net.Cut("pod", "origin")
		reads(t, s, "x", session, "unavailable") // deleted: no resurrection
		w.net.Heal("pod", "origin")
		time.Sleep(time.Second)
		w.startAgent()
		w.origin.Put("x", "4")
		time.Sleep(time.Second) // the connection to the agent is back
		reads(t, s, "x", session, "4 origin")
		time.Sleep(200 * time.Millisecond) // the new table is proved newer than the change of tables
		reads(t, s, "x", session, "4 node")
		reads(t, s, "x", session, "4 process")
	})
}

// A write the agent does not know of keeps its table from being used until the table is
// proved to be newer.
func TestDirectWriteFencesTheTable(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		synctest.Wait()
		reads(t, s, "x", session, "1 origin")
		w.net.Cut("pod", "node") // this pod cannot talk to the agent; the shared table is there
		synctest.Wait()
		reads(t, s, "x", session, "1 process")
		w.origin.LoseFrame()
		must(t, set(s, "x", "2"))
		if e, _ := w.agent.Load().Table().Get("default/s/x", nil); e.State != shm.Present {
			t.Fatal("the table should still hold the old value")
		}
		reads(t, s, "x", session, "2 origin")
		if _, ok := s.Hit("default/s/x", -1); ok {
			t.Error("a hit behind the write")
		}
		time.Sleep(400 * time.Millisecond)
		reads(t, s, "x", session, "2 node")
	})
}

// A session deleted behind the agent's back is not served from what is left of it.
func TestDirectSessionDelete(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		synctest.Wait()
		reads(t, s, "x", session, "1 origin")
		w.stopAgent()
		_, err := s.Variables().DeleteSession(t.Context(), &pb.GetSessionRequest{Id: "s"})
		must(t, err)
		w.net.Cut("pod", "origin")
		reads(t, s, "x", session, "unavailable")
		reads(t, s, "x", eventual, "1 process stale")
	})
}

// A write whose outcome is unknown is not sent to a second place.
func TestUnknownOutcomeIsNotRepeated(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		w.origin.Put("x", "1")
		synctest.Wait()
		reads(t, s, "x", session, "1 origin")
		w.origin.AfterWrite(func() { w.net.Cut("pod", "node") })
		err := set(s, "x", "2")
		if gstatus.Code(err) != codes.Unknown {
			t.Fatalf("got %v, want Unknown", err)
		}
		synctest.Wait()
		a, err := s.Get(t.Context(), cache.Request{Key: key("x"), Consistency: strong, Encoding: -1})
		if err != nil || a.Variable.GetVersion().GetCounter() != 1 {
			t.Errorf("the variable is at %v, %v: written %d times, want once", a.Variable.GetVersion(), err, a.Variable.GetVersion().GetCounter())
		}
		// The agent is unreachable now, so this one certainly was not sent to it.
		must(t, set(s, "x", "3"))
		reads(t, s, "x", session, "3 origin")
	})
}

// Without an agent on the node, the process follows the feed by itself.
func TestPrivateAgentAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.close()
		w.origin.Put("x", "1")
		s := w.store(cache.Options{Origin: w.dial("pod", "origin:1"), Private: true})
		time.Sleep(200 * time.Millisecond)
		reads(t, s, "x", session, "1 origin")
		reads(t, s, "x", session, "1 process")
		w.origin.Put("x", "2")
		synctest.Wait()
		reads(t, s, "x", session, "2 node")
		must(t, set(s, "x", "3"))
		reads(t, s, "x", session, "3 node")
		var trailer = int32(7)
		_, err := s.Variables().Set(t.Context(), &pb.SetRequest{Session: "s", Identifier: "x", ExpectedVersion: &trailer})
		if gstatus.Code(err) != codes.Aborted {
			t.Errorf("got %v", err)
		}
		watch, err := s.Variables().Watch(t.Context(), &pb.WatchRequest{Session: "s"})
		must(t, err)
		synctest.Wait()
		w.origin.Put("x", "4")
		if e, err := watch.Recv(); err != nil || string(e.GetVariable().GetValue().GetJson()) != "4" {
			t.Errorf("watch gave %v, %v", e, err)
		}
		if !s.Stats().Private {
			t.Error("no private agent runs")
		}
	})
}

// The private agent takes over a second after the node's has gone and yields when it is
// back; the value never goes back on the way.
func TestPrivateAgentTakesOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.close()
		w.startAgent()
		w.origin.Put("x", "1")
		s := w.store(cache.Options{Table: func() *shm.Reader { return w.agent.Load().Table() }, Agent: w.dial("pod", "agent:1"),
			Origin: w.dial("pod", "origin:1"), Private: true})
		synctest.Wait()
		reads(t, s, "x", session, "1 origin")
		time.Sleep(2 * time.Second)
		if s.Stats().Private {
			t.Error("a private agent beside the node's")
		}
		w.stopAgent()
		time.Sleep(500 * time.Millisecond)
		reads(t, s, "x", session, "1 origin")
		time.Sleep(time.Second)
		reads(t, s, "x", session, "1 origin")
		time.Sleep(200 * time.Millisecond)
		reads(t, s, "x", session, "1 node")
		must(t, set(s, "x", "2"))
		reads(t, s, "x", session, "2 node")
		if !s.Stats().Private {
			t.Error("no private agent runs")
		}
		w.startAgent()
		time.Sleep(2 * time.Second)
		if s.Stats().Private {
			t.Error("the private agent does not yield")
		}
		reads(t, s, "x", session, "2 origin")
		reads(t, s, "x", session, "2 process")
	})
}

// Readers of one key share one direct call; a write in between separates them.
func TestDirectStampede(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.close()
		w.origin.Put("x", "1")
		s := w.store(cache.Options{Origin: w.dial("pod", "origin:1")})
		release := w.origin.HoldReads()
		var readers sync.WaitGroup
		for range 100 {
			readers.Go(func() { reads(t, s, "x", session, "1 origin") })
		}
		synctest.Wait()
		release()
		readers.Wait()
		if calls, _ := w.origin.Reads(); calls != 1 {
			t.Errorf("%d reads at the origin, want 1", calls)
		}
		release = w.origin.HoldReads()
		readers.Go(func() { read(t, s, "x", session) })
		synctest.Wait()
		must(t, set(s, "x", "2"))
		readers.Go(func() { reads(t, s, "x", session, "2 origin") })
		synctest.Wait()
		release()
		readers.Wait()
		if calls, _ := w.origin.Reads(); calls != 3 {
			t.Errorf("%d reads at the origin, want 3", calls)
		}
	})
}

func TestCallerGoesAway(t *testing.T) {
	bubble(t, func(t *testing.T, w *world, s *cache.Store) {
		release := w.origin.HoldReads()
		defer release()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		if _, err := s.Get(ctx, cache.Request{Key: key("x"), Encoding: -1}); !outrigger.IsKind(err, outrigger.Timeout) {
			t.Errorf("got %v", err)
		}
	})
}

func TestOptions(t *testing.T) {
	cc := &grpc.ClientConn{}
	for name, o := range map[string]cache.Options{
		"nobody to ask":          {},
		"private without origin": {Agent: cc, Private: true},
		"two tables":             {Agent: cc, TablePath: "x", Table: func() *shm.Reader { return nil }},
		"negative":               {Agent: cc, Timeout: -1},
		"impossible size":        {Agent: cc, ProcessBytes: -5},
	} {
		if _, err := cache.New(o); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
