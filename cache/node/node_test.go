package node_test

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/internal/origintest"
	"github.com/outrigger-mesh/outrigger/cache/node"
	"github.com/outrigger-mesh/outrigger/cache/shm"
	"github.com/outrigger-mesh/outrigger/internal/memnet"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// world is an origin, a network and one agent, in a synctest bubble.
type world struct {
	t      *testing.T
	net    *memnet.Network
	origin *origintest.Origin
	agent  *node.Agent
	vars   pb.VariablesClient // of the agent, over gRPC
	coh    pb.CoherenceClient
	clock  func() int64
	stop   func()

	timed, sent atomic.Int64 // see counted
}

// bubble runs do with a running world whose lease is live, with a feed over gRPC and one
// without.
func bubble(t *testing.T, o node.Options, do func(t *testing.T, w *world)) {
	for _, way := range []string{"grpc", "lean"} {
		t.Run(way, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, o)
				defer func() { w.stop() }()
				<-w.agent.Ready()
				if s := w.agent.Stats(); !s.FeedUp || !s.LeaseLive {
					t.Fatalf("the feed does not open: %+v", s)
				}
				if leans := w.origin.Leans(); (leans > 0) != (way == "lean") {
					t.Fatalf("%d feeds without gRPC", leans)
				}
				do(t, w)
			})
		})
	}
}

func newWorld(t *testing.T, o node.Options) *world {
	w := &world{t: t, net: memnet.New(), origin: origintest.New()}
	stopOrigin, err := w.origin.Serve(w.net, "origin", "origin:1")
	must(t, err)
	cc, err := origintest.Dial(w.net, "node", "origin:1")
	must(t, err)
	start := time.Now()
	w.clock = func() int64 { return int64(time.Since(start)) + int64(time.Hour) }
	o.Node = outrigger.Node{ID: "node-a", Kind: "agent", Region: origintest.Region}
	o.Origin, o.Table, o.Clock = cc, shm.Options{Heap: true, Bytes: 1 << 20}, w.clock
	if strings.Contains(t.Name(), "/lean") {
		dial := w.net.Dialer("node")
		o.DialFeed = func(ctx context.Context) (net.Conn, error) {
			conn, err := dial(ctx, "origin:1")
			return &counted{conn, w}, err
		}
	}
	w.agent, err = node.New(o)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- w.agent.Run(ctx) }()

	l, err := w.net.Listen("node", "agent:1")
	must(t, err)
	g := grpc.NewServer()
	pb.RegisterVariablesServer(g, w.agent)
	pb.RegisterCoherenceServer(g, w.agent)
	go g.Serve(l)
	local, err := origintest.Dial(w.net, "pod", "agent:1")
	must(t, err)
	w.vars, w.coh = pb.NewVariablesClient(local), pb.NewCoherenceClient(local)
	w.stop = func() {
		local.Close()
		g.Stop()
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("Run: %v", err)
		}
		cc.Close()
		stopOrigin()
	}
	return w
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// table says what the shared table shows for a name of session s, as a sidecar sees it.
func (w *world) table(name string) string {
	r := w.agent.Table()
	e, b := r.Get("default/s/"+name, nil)
	switch e.State {
	case shm.Present:
		v := &pb.Variable{}
		must(w.t, proto.Unmarshal(b, v))
		return string(v.GetValue().GetJson())
	case shm.Negative:
		return fmt.Sprintf("none, session %v", b[0] == 1)
	}
	return e.State.String()
}

func (w *world) shows(name, want string) {
	w.t.Helper()
	if got := w.table(name); got != want {
		w.t.Fatalf("table shows %s = %s, want %s", name, got, want)
	}
}

func get(name string) *pb.GetRequest { return &pb.GetRequest{Session: "s", Identifier: name} }

func set(name, json string) *pb.SetRequest {
	return &pb.SetRequest{Session: "s", Identifier: name, Value: &pb.Value{Json: []byte(json)}}
}

func (w *world) read(name, want string) {
	w.t.Helper()
	v, err := w.vars.Get(w.t.Context(), get(name))
	if err != nil || string(v.GetValue().GetJson()) != want {
		w.t.Fatalf("Get %s = %s, %v, want %s", name, v.GetValue().GetJson(), err, want)
	}
}

func (w *world) refused(err error, code codes.Code, text string) {
	w.t.Helper()
	if s := gstatus.Convert(err); s.Code() != code || s.Message() != text {
		w.t.Fatalf("got %v %q, want %v %q", s.Code(), s.Message(), code, text)
	}
}

// A read fills the table once; changes elsewhere arrive by the feed, with the value when
// it is small and without when it is not.
func TestReadAndFeed(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		synctest.Wait()
		w.read("x", "1")
		w.shows("x", "1")
		w.read("x", "1")
		if calls, _ := w.origin.Reads(); calls != 1 {
			t.Errorf("%d reads at the origin, want 1", calls)
		}
		w.origin.Put("x", "2")
		synctest.Wait()
		w.shows("x", "2")
		large := `"` + fmt.Sprintf("%0100d", 3) + `"`
		w.origin.Put("x", large)
		synctest.Wait()
		w.shows("x", "invalid")
		w.read("x", large)

		_, err := w.vars.Get(t.Context(), get("y"))
		w.refused(err, codes.NotFound, "Variable not found: y")
		w.shows("y", "none, session true")
		_, err = w.vars.Get(t.Context(), &pb.GetRequest{Session: "t", Identifier: "y"})
		w.refused(err, codes.NotFound, "Session not found: t")
		w.origin.Put("y", "5")
		synctest.Wait()
		w.shows("y", "5")
		if s := w.agent.Stats(); s.Lag.GetCount() != 4 || s.Flushes != 0 || s.Gaps != 0 {
			t.Errorf("%v lags, %d flushes, %d gaps; want 4, 0, 0", s.Lag.GetCount(), s.Flushes, s.Gaps)
		}
	})
}

func TestIdentifiers(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.origin.Put("var_y_1", "2") // a name that looks like the id of y
		w.read("var_x_1", "1")
		w.read("var_y_1", "2")
		w.origin.Put("y", "3")
		synctest.Wait()
		w.read("var_y_1", "3") // ids are tried first
		out, err := w.vars.BatchGet(t.Context(), &pb.BatchGetRequest{Session: "s", Identifiers: []string{"var_x_1", "x", "var_x_9", "nope"}})
		if err != nil || len(out.GetVariables()) != 2 || fmt.Sprint(out.GetMissing()) != "[var_x_9 nope]" {
			t.Errorf("got %v, %v", out, err)
		}
		for id, want := range map[string]string{"var_x_1": "x", "var_a_b_12": "a_b", "var__1": "", "var_x_": "", "var_x_1a": "", "x": ""} {
			if name, ok := node.NameOfID(id); name != want || ok != (want != "") {
				t.Errorf("NameOfID(%q) = %q, %v, want %q", id, name, ok, want)
			}
		}
	})
}

// A thousand readers of one cold key are one read at the origin.
func TestStampede(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		synctest.Wait()
		release := w.origin.HoldReads()
		var readers sync.WaitGroup
		for range 1000 {
			readers.Go(func() {
				if v, err := w.agent.Get(t.Context(), get("x")); err != nil || string(v.GetValue().GetJson()) != "1" {
					t.Errorf("got %v, %v", v, err)
				}
			})
		}
		synctest.Wait()
		release()
		readers.Wait()
		if calls, keys := w.origin.Reads(); calls != 1 || keys != 1 {
			t.Errorf("%d reads of %d keys at the origin, want 1 of 1", calls, keys)
		}
		if s := w.agent.Stats(); s.Joined != 999 || s.Waiting != 0 {
			t.Errorf("%d joined, %d still wait", s.Joined, s.Waiting)
		}
	})
}

// Many keys at once are one call.
func TestBatchIsOneFetch(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		r := &pb.BatchGetRequest{Session: "s"}
		for i := range 300 {
			r.Identifiers = append(r.Identifiers, w.origin.Put(fmt.Sprint("k", i), "1").GetKey().GetName())
		}
		out, err := w.vars.BatchGet(t.Context(), r)
		if err != nil || len(out.GetVariables()) != 300 {
			t.Fatalf("%d variables, %v", len(out.GetVariables()), err)
		}
		if calls, keys := w.origin.Reads(); calls != 1 || keys != 300 {
			t.Errorf("%d reads of %d keys at the origin, want 1 of 300", calls, keys)
		}
	})
}

// Whatever a write was, the table shows it when the caller hears of it, although the
// feed is late.
func TestWritesAreVisibleBeforeTheReply(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		ctx := t.Context()
		w.net.SetDelay("origin", "node", 20*time.Millisecond)
		_, err := w.vars.Register(ctx, &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: &pb.Value{Json: []byte("1")}})
		must(t, err)
		w.shows("x", "1")
		v, err := w.vars.Set(ctx, set("x", "2"))
		must(t, err)
		if v.GetVersion().GetCounter() != 1 {
			t.Errorf("answer %v", v)
		}
		w.shows("x", "2")
		_, err = w.vars.Set(ctx, set("var_x_1", "3"))
		must(t, err)
		w.shows("x", "3")
		_, err = w.vars.BatchSet(ctx, &pb.BatchSetRequest{Session: "s", Items: []*pb.SetItem{
			{Identifier: "x", Value: &pb.Value{Json: []byte("4")}}, {Identifier: "absent", Value: &pb.Value{Json: []byte("4")}}}})
		must(t, err)
		w.shows("x", "4")
		_, err = w.vars.Delete(ctx, get("x"))
		must(t, err)
		w.shows("x", "none, session true")
		w.origin.Put("x", "5")
		time.Sleep(30 * time.Millisecond)
		w.read("x", "5")
		_, err = w.vars.Delete(ctx, get("var_x_1"))
		must(t, err)
		if got := w.table("x"); got == "5" { // invalid, or none if the feed was faster
			t.Error("a deletion by id leaves the value in the table")
		}
		_, err = w.vars.Get(ctx, get("x"))
		w.refused(err, codes.NotFound, "Variable not found: x")

		w.origin.Put("x", "6")
		time.Sleep(30 * time.Millisecond)
		w.read("x", "6")
		_, err = w.vars.DeleteSession(ctx, &pb.GetSessionRequest{Id: "s"})
		must(t, err)
		w.shows("x", "invalid")
		_, err = w.vars.Get(ctx, get("x"))
		w.refused(err, codes.NotFound, "Session not found: s")
		_, err = w.vars.CreateSession(ctx, &pb.CreateSessionRequest{Id: "s"})
		must(t, err)
		_, err = w.vars.Get(ctx, get("x"))
		w.refused(err, codes.NotFound, "Variable not found: x")
	})
}

func TestRefusedWriteChangesNothing(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.read("x", "1")
		r := set("x", "2")
		r.ExpectedVersion = proto.Int32(7)
		var trailer metadata.MD
		_, err := w.vars.Set(t.Context(), r, grpc.Trailer(&trailer))
		e := status.FromGRPC(err, trailer).(*outrigger.Error)
		if e.Kind != outrigger.Conflict || e.Current != 0 || e.Message != "version_mismatch: current=0" {
			t.Errorf("got %+v", e)
		}
		if len(trailer.Get("x-outrigger-current")) != 1 {
			t.Errorf("the trailer %v does not carry the current version", trailer)
		}
		w.shows("x", "1")
	})
}

func TestUnknownOutcome(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.read("x", "1")
		// The write is made, the connection breaks before the answer.
		w.origin.AfterWrite(func() { w.net.Cut("node", "origin") })
		_, err := w.vars.Set(t.Context(), set("x", "2"))
		if gstatus.Code(err) != codes.Unknown {
			t.Fatalf("got %v, want Unknown", err)
		}
		// The old value is not shown any more; the new one is if the feed was faster than the cut.
		if got := w.table("x"); got != "invalid" && got != "2" {
			t.Fatalf("table shows x = %s after a write that may have been made", got)
		}
		// Nothing leaves a node that is cut off, and that is certain.
		var trailer metadata.MD
		_, err = w.vars.Set(t.Context(), set("x", "3"), grpc.Trailer(&trailer))
		if gstatus.Code(err) != codes.Unavailable || trailer.Get("x-outrigger-outcome") == nil {
			t.Fatalf("got %v, trailer %v, want Unavailable and a certain outcome", err, trailer)
		}
		w.net.Heal("node", "origin")
		time.Sleep(2 * time.Second)
		w.read("x", "2")
		w.shows("x", "2")
	})
}

// Cut off, the node notices within the lease; healed, it closes the gap and is fresh
// within about a second, without dropping the table.
func TestPartition(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.origin.Put("y", "1")
		w.read("x", "1")
		w.read("y", "1")
		w.net.Cut("node", "origin")
		time.Sleep(301 * time.Millisecond)
		if w.agent.Table().Lease() > w.clock() {
			t.Error("the lease outlives 300 ms without a heartbeat")
		}
		w.shows("x", "1") // kept for readers that accept it
		_, err := w.vars.Get(t.Context(), get("x"))
		w.refused(err, codes.Unavailable, "the origin cannot be read")
		w.origin.Put("x", "2")
		w.net.Heal("node", "origin")
		healed := time.Now()
		for w.agent.Table().Lease() <= w.clock() {
			time.Sleep(time.Millisecond)
		}
		if d := time.Since(healed); d > 1500*time.Millisecond {
			t.Errorf("fresh %v after healing, want at most 1.5 s", d)
		}
		w.shows("x", "2")
		w.shows("y", "1")
		if s := w.agent.Stats(); s.Flushes != 0 {
			t.Errorf("%d flushes: resuming must not drop the table", s.Flushes)
		}
	})
}

func TestLostFrame(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.read("x", "1")
		w.origin.LoseFrame()
		w.origin.Put("x", "2")
		synctest.Wait()
		w.shows("x", "1")
		// The next heartbeat tells of the head; half a heartbeat later the range is fetched.
		time.Sleep(200 * time.Millisecond)
		w.shows("x", "2")
		w.origin.LoseFrame()
		w.origin.Put("x", "3")
		synctest.Wait()
		w.origin.Put("y", "1") // shows the gap at once
		synctest.Wait()
		w.shows("x", "3")
		if s := w.agent.Stats(); s.Gaps != 1 || s.Flushes != 0 {
			t.Errorf("%d gaps, %d flushes; want 1 and 0", s.Gaps, s.Flushes)
		}
	})
}

func TestOriginRestored(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.read("x", "1")
		w.origin.Restore()
		time.Sleep(2 * time.Second)
		w.shows("x", "absent")
		_, err := w.vars.Get(t.Context(), get("x"))
		w.refused(err, codes.NotFound, "Variable not found: x")
		w.origin.Put("x", "9")
		synctest.Wait()
		w.read("x", "9")
		if s := w.agent.Stats(); s.Flushes != 1 || s.Incarnation != 0xb || !s.LeaseLive {
			t.Errorf("%d flushes, incarnation %x, lease %v", s.Flushes, s.Incarnation, s.LeaseLive)
		}
	})
}

func TestStrongRead(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.read("x", "1")
		w.net.SetDelay("origin", "node", 0)
		w.origin.LoseFrame()
		w.origin.Put("x", "2") // the node does not hear of it
		synctest.Wait()
		w.shows("x", "1")
		strong := metadata.AppendToOutgoingContext(t.Context(), outrigger.HeaderConsistency, "strong")
		v, err := w.vars.Get(strong, get("x"))
		if err != nil || string(v.GetValue().GetJson()) != "2" {
			t.Fatalf("got %v, %v", v, err)
		}
		w.shows("x", "2") // nobody on the node goes back behind it
		_, err = w.vars.Get(metadata.AppendToOutgoingContext(t.Context(), outrigger.HeaderConsistency, "often"), get("x"))
		if gstatus.Code(err) != codes.InvalidArgument {
			t.Errorf("got %v", err)
		}
	})
}

func TestListAndWatchMoveTheTable(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.read("x", "1")
		w.origin.LoseFrame()
		w.origin.Put("x", "2")
		synctest.Wait()
		_, err := w.vars.List(t.Context(), &pb.ListRequest{Session: "s"})
		must(t, err)
		w.shows("x", "2")

		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		watch, err := w.vars.Watch(ctx, &pb.WatchRequest{Session: "s"})
		must(t, err)
		synctest.Wait()
		w.origin.LoseFrame()
		w.origin.Put("x", "3")
		e, err := watch.Recv()
		must(t, err)
		if string(e.GetVariable().GetValue().GetJson()) != "3" {
			t.Errorf("event %v", e)
		}
		w.shows("x", "3")
		w.origin.LoseFrame()
		_, err = w.vars.Delete(t.Context(), get("x"))
		must(t, err)
		if e, err = watch.Recv(); err != nil || e.GetType() != pb.WatchEvent_DELETED {
			t.Errorf("event %v, %v", e, err)
		}
		w.shows("x", "none, session true")
	})
}

func TestRepair(t *testing.T) {
	bubble(t, node.Options{RepairEvery: time.Second}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.origin.Put("x", "2")
		w.read("x", "2")
		w.origin.Tamper("x", "7")
		time.Sleep(3 * time.Second)
		w.shows("x", "7")
		if s := w.agent.Stats(); s.Repaired != 1 || s.Checked < 2 {
			t.Errorf("%d repaired of %d checked, want 1 of at least 2", s.Repaired, s.Checked)
		}
	})
}

func TestTouches(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.read("x", "1")
		w.read("x", "1")
		time.Sleep(1100 * time.Millisecond)
		if got := fmt.Sprint(w.origin.Touched()); got != "[default/s]" {
			t.Errorf("touched %s", got)
		}
	})
}

func TestLargeValuesAreNotKept(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.read("x", "1")
		large := `"` + strings.Repeat("7", shm.MaxValueBytes) + `"`
		_, err := w.vars.Set(t.Context(), set("x", large))
		must(t, err)
		w.shows("x", "absent")
		w.read("x", large)
		w.read("x", large)
		if calls, _ := w.origin.Reads(); calls != 3 {
			t.Errorf("%d reads at the origin, want 3", calls)
		}
	})
}

func TestCallerGoesAway(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		release := w.origin.HoldReads()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := w.agent.Get(ctx, get("x"))
		if gstatus.Code(err) != codes.DeadlineExceeded {
			t.Errorf("got %v", err)
		}
		release()
		synctest.Wait()
		w.shows("x", "none, session true") // the fetch was everybody's and went on
		if s := w.agent.Stats(); s.Waiting != 0 || s.Flights != 0 {
			t.Errorf("%d wait, %d fetches", s.Waiting, s.Flights)
		}
	})
}

func TestFeedIsNotRelayed(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		s, err := w.coh.Feed(t.Context())
		must(t, err)
		if _, err := s.Recv(); gstatus.Code(err) != codes.Unimplemented {
			t.Errorf("got %v", err)
		}
		w.origin.Put("x", "1")
		c, err := w.coh.Changes(t.Context(), &pb.ChangesRequest{Incarnation: 0xa, To: 1})
		if err != nil || len(c.GetChanges()) != 1 {
			t.Errorf("got %v, %v", c, err)
		}
	})
}

func TestRotate(t *testing.T) {
	bubble(t, node.Options{}, func(t *testing.T, w *world) {
		w.origin.Put("x", "1")
		w.read("x", "1")
		old := w.agent.Table()
		must(t, w.agent.Rotate(shm.Options{Heap: true, Bytes: 2 << 20}))
		if !old.Closed() || old.Lease() > w.clock() {
			t.Error("readers of the old table are not told")
		}
		w.shows("x", "absent")
		w.read("x", "1")
		w.shows("x", "1")
		time.Sleep(150 * time.Millisecond)
		if w.agent.Table().Lease() <= w.clock() {
			t.Error("the new table gets no lease")
		}
		if err := w.agent.Rotate(shm.Options{Heap: true, Bytes: 1}); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("got %v", err)
		}
	})
}

// After Run nothing is left, calls fail, and the table is retired.
func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, node.Options{})
		time.Sleep(10 * time.Millisecond)
		w.origin.HoldReads()
		failed := make(chan error, 1)
		go func() {
			_, err := w.agent.Get(context.Background(), get("x"))
			failed <- err
		}()
		synctest.Wait()
		table := w.agent.Table()
		w.stop()
		if err := <-failed; gstatus.Code(err) != codes.Unavailable {
			t.Errorf("a waiting read got %v", err)
		}
		if _, err := w.agent.Get(context.Background(), get("x")); gstatus.Code(err) != codes.Unavailable {
			t.Errorf("a later read got %v", err)
		}
		if !table.Closed() || table.Lease() > w.clock() {
			t.Error("the table is not retired")
		}
	})
}

func TestOptions(t *testing.T) {
	good := node.Options{Node: outrigger.Node{ID: "n", Region: "eu"}, Origin: &grpc.ClientConn{}, Table: shm.Options{Heap: true}}
	for name, spoil := range map[string]func(*node.Options){
		"no id":           func(o *node.Options) { o.Node.ID = "" },
		"no origin":       func(o *node.Options) { o.Origin = nil },
		"negative":        func(o *node.Options) { o.TTL = -1 },
		"hasty lease":     func(o *node.Options) { o.Lease = 200 * time.Millisecond },
		"impossible size": func(o *node.Options) { o.Table.Bytes = 1 },
	} {
		o := good
		spoil(&o)
		if _, err := node.New(o); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := node.New(good); err != nil {
		t.Error(err)
	}
}
