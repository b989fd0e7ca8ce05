package variables_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/feed"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/variables"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

// node is a feed client; next describes what arrives in one line.
type node struct {
	w      *world
	stream carrier
	close  func()
}

// carrier is what a feed comes over.
type carrier interface {
	Send(*pb.FeedRequest) error
	Recv() (*pb.FeedFrame, error)
}

// overBoth runs a test with feeds over gRPC and without.
func overBoth(t *testing.T, do func(*testing.T)) {
	t.Run("grpc", do)
	t.Run("lean", do)
}

// feed opens what overBoth says.
func (w *world) feed(ctx context.Context) carrier {
	w.t.Helper()
	if !strings.HasSuffix(w.t.Name(), "/lean") {
		stream, err := w.coh.Feed(ctx)
		if err != nil {
			w.t.Fatal(err)
		}
		return stream
	}
	conn, err := w.dial(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := feed.Connect(ctx, conn, "origin")
	if err != nil {
		w.t.Fatal(err)
	}
	context.AfterFunc(ctx, c.Close)
	return c
}

func (w *world) subscribe(incarnation, from uint64) *node {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.ctx)
	n := &node{w: w, stream: w.feed(ctx), close: cancel}
	n.send(&pb.FeedRequest{Kind: &pb.FeedRequest_Subscribe{Subscribe: &pb.Subscribe{
		Node: &pb.Node{Id: "node-a"}, Incarnation: incarnation, From: from,
	}}})
	return n
}

// endedBy is why a feed ended, as an outrigger.Error.
func endedBy(err error) error {
	if _, ok := gstatus.FromError(err); ok {
		return status.FromGRPC(err, nil)
	}
	return err
}

func (n *node) send(req *pb.FeedRequest) {
	n.w.t.Helper()
	if err := n.stream.Send(req); err != nil {
		n.w.t.Fatal(err)
	}
}

func (n *node) beat(sent uint64) {
	n.send(&pb.FeedRequest{Kind: &pb.FeedRequest_Heartbeat{Heartbeat: &pb.Heartbeat{Sent: sent}}})
}

func (n *node) recv() *pb.FeedFrame {
	n.w.t.Helper()
	f, err := n.stream.Recv()
	if err != nil {
		n.w.t.Fatal(err)
	}
	if f.GetRegion() != "us" || f.GetIncarnation() != n.w.log.Incarnation() {
		n.w.t.Fatalf("frame of region %q incarnation %d", f.GetRegion(), f.GetIncarnation())
	}
	return f
}

func (n *node) next() string { return describe(n.recv()) }

// expect compares the next frames with lines of a transcript.
func (n *node) expect(lines ...string) {
	n.w.t.Helper()
	for _, want := range lines {
		if got := n.next(); got != want {
			n.w.t.Fatalf("received %q, want %q", got, want)
		}
	}
}

func describe(f *pb.FeedFrame) string {
	switch k := f.GetKind().(type) {
	case *pb.FeedFrame_Reset_:
		return fmt.Sprintf("reset to %d: %s", k.Reset_.GetFrom(), k.Reset_.GetReason())
	case *pb.FeedFrame_Ack:
		return fmt.Sprintf("ack %d head %d", k.Ack.GetSent(), k.Ack.GetHead())
	case *pb.FeedFrame_Selected:
		return fmt.Sprintf("selected %d at %d", k.Selected.GetNumber(), k.Selected.GetPosition())
	case *pb.FeedFrame_Changes:
		out := fmt.Sprintf("(%d,%d]", k.Changes.GetPrevious(), k.Changes.GetThrough())
		for _, c := range k.Changes.GetChanges() {
			out += " " + describeChange(c)
		}
		return out
	}
	return fmt.Sprintf("unknown frame %v", f)
}

// describeChange prints "key@position<previous=value", "key@…:deleted" or "key@…:invalid".
func describeChange(c *pb.Change) string {
	k := c.GetKey()
	out := fmt.Sprintf("%s/%s@%d<%d", k.GetSession(), k.GetName(), c.GetPosition(), c.GetKeyPrevious())
	switch {
	case c.GetDeleted():
		return out + ":deleted"
	case c.GetVariable() != nil:
		return out + "=" + string(c.GetVariable().GetValue().GetJson())
	case c.GetScope() == pb.Change_SESSION:
		return out + ":created"
	}
	return out + ":invalid"
}

// 1. A node without state subscribes: it is reset to the head.
// 2. Changes arrive in order with the position of the key's previous change.
// 3. The stream is cut; while it is away the log goes on.
// 4. It subscribes from where it was: what it missed follows, without a reset.
func TestFeedResumes(t *testing.T) { overBoth(t, testFeedResumes) }

func testFeedResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.session("s") // 1
		n := w.subscribe(0, 0)
		n.expect("reset to 1: first subscription")
		w.register("s", "x", value("integer", "1")) // 2
		n.expect("(1,2] s/x@2<1=1")                 // the session's creation was the last change of s/x
		w.set("s", "x", "2")                        // 3
		n.expect("(2,3] s/x@3<2=2")
		w.register("s", "y", value("integer", "7")) // 4
		n.expect("(3,4] s/y@4<1=7")
		n.close()
		synctest.Wait()
		if feeds := w.svc.Stats().Feeds; len(feeds) != 0 {
			t.Fatalf("feeds after the cut: %v", feeds)
		}
		w.set("s", "x", "3")                                                                                               // 5
		must(w, w.vars.Delete, getReq("s", "y"))                                                                           // 6
		must(w, w.vars.DeleteSession, &pb.GetSessionRequest{Id: "s"})                                                      // 7
		w.session("s")                                                                                                     // 8
		must(w, w.vars.Register, &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "y"}, Value: value("integer", "9")}) // 9

		m := w.subscribe(w.log.Incarnation(), 4)
		m.expect("(4,5] s/x@5<3=3", "(5,6] s/y@6<4:deleted", "(6,7] s/@7<6:deleted", "(7,8] s/@8<0:created", "(8,9] s/y@9<8=9")
		m.beat(42)
		m.expect("ack 42 head 9")
		stat := w.svc.Stats().Feeds
		if len(stat) != 1 || stat[0].Node.ID != "node-a" || stat[0].Sent != 9 || stat[0].Reset != 0 {
			t.Errorf("stats %+v", stat)
		}
	})
}

// A subscriber that is up to date is told so, one in the middle of a frame gets the rest
// of it, and a deletion and a new life keep the chain of previous positions.
func TestFeedContinuesInsideAnAtomicBatch(t *testing.T) {
	overBoth(t, testFeedContinuesInsideAnAtomicBatch)
}

func testFeedContinuesInsideAnAtomicBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.session("s") // 1
		for _, name := range []string{"a", "b", "c"} {
			w.register("s", name, value("integer", "0")) // 2 3 4
		}
		up := w.subscribe(w.log.Incarnation(), 4)
		up.expect("(4,4]")
		must(w, w.vars.BatchSet, &pb.BatchSetRequest{Session: "s", Atomic: true, Items: []*pb.SetItem{
			{Identifier: "a", Value: &pb.Value{Json: []byte("1")}},
			{Identifier: "b", Value: &pb.Value{Json: []byte("1")}},
			{Identifier: "c", Value: &pb.Value{Json: []byte("1")}},
		}}) // 5 6 7
		joined := ""
		for through := ""; through != "7]"; { // one frame, or as many as the applier took batches
			line := up.next()
			joined += " " + line
			through = strings.Fields(strings.Split(line, ",")[1])[0]
		}
		for _, want := range []string{"s/a@5<2=1", "s/b@6<3=1", "s/c@7<4=1"} {
			if !strings.Contains(joined, want) {
				t.Errorf("%q lacks %s", joined, want)
			}
		}
		middle := w.subscribe(w.log.Incarnation(), 5)
		first := middle.next()
		if !strings.HasPrefix(first, "(5,") || strings.Contains(first, "s/a@") || !strings.Contains(first, "s/b@6") {
			t.Errorf("continuing at 5 begins with %q", first)
		}
	})
}

func TestFeedResets(t *testing.T) { overBoth(t, testFeedResets) }

func testFeedResets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startWorld(t, memory.New(), variables.Options{FeedRing: 4})
		w.session("s")
		w.register("s", "x", value("integer", "0"))
		for i := range 10 {
			w.set("s", "x", fmt.Sprint(i))
			synctest.Wait()
		} // head 12, kept 9..12
		for _, c := range []struct {
			incarnation, from uint64
			want              string
		}{
			{0, 0, "reset to 12: first subscription"},
			{99, 12, "reset to 12: the log is now incarnation 1"},
			{1, 3, "reset to 12: position 3 is no longer kept"},
			{1, 50, "reset to 12: position 50 is beyond the log's end"},
			{1, 8, "(8,9] s/x@9<8=6"},
			{1, 12, "(12,12]"},
		} {
			n := w.subscribe(c.incarnation, c.from)
			n.expect(c.want)
			n.close()
		}
	})
}

// A feed that does not begin with subscribe, or subscribes twice, is refused.
func TestFeedProtocol(t *testing.T) { overBoth(t, testFeedProtocol) }

func testFeedProtocol(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		fails := func(stream carrier, kind outrigger.Kind) {
			t.Helper()
			for {
				if _, err := stream.Recv(); err != nil {
					if !outrigger.IsKind(endedBy(err), kind) {
						t.Errorf("got %v, want %v", err, kind)
					}
					return
				}
			}
		}
		stream := w.feed(w.ctx)
		(&node{w: w, stream: stream}).beat(1)
		fails(stream, outrigger.Invalid)
		n := w.subscribe(0, 0)
		n.send(&pb.FeedRequest{Kind: &pb.FeedRequest_Subscribe{Subscribe: &pb.Subscribe{Node: &pb.Node{Id: "x"}}}})
		fails(n.stream, outrigger.Invalid)
		nameless := w.feed(w.ctx)
		(&node{w: w, stream: nameless}).send(&pb.FeedRequest{Kind: &pb.FeedRequest_Subscribe{Subscribe: &pb.Subscribe{}}})
		fails(nameless, outrigger.Invalid)
	})
}

// 1. A node reads nothing while 1,000 values of 4 KiB are written, far beyond what
// flow control lets into its connection, and its cursor falls out of a small ring.
// 2. It then reads everything there is: frames, one reset, frames, with no gap except at
// the reset, and ends at the head.
func TestSlowNodeIsResetNotQueued(t *testing.T) { overBoth(t, testSlowNodeIsResetNotQueued) }

func testSlowNodeIsResetNotQueued(t *testing.T) {
	w := startWorld(t, memory.New(), variables.Options{FeedRing: 64})
	w.session("s")
	n := w.subscribe(0, 0)
	if got := n.next(); !strings.HasPrefix(got, "reset to 1") {
		t.Fatal(got)
	}
	big := `"` + strings.Repeat("v", 3500) + `"`
	w.register("s", "x", value("string", big))
	const writes = 1000
	for range writes {
		w.set("s", "x", big)
	}
	head := w.log.Head()
	at, resets, frames := uint64(1), 0, 0
	for at < head {
		f := n.recv()
		if r := f.GetReset_(); r != nil {
			resets++
			at = r.GetFrom()
			continue
		}
		c := f.GetChanges()
		if c.GetPrevious() != at {
			t.Fatalf("frame continues at %d, applied is %d", c.GetPrevious(), at)
		}
		at = c.GetThrough()
		frames++
	}
	if resets == 0 || frames == 0 {
		t.Errorf("%d resets and %d frames; want both for a node this slow", resets, frames)
	}
}

// Large values travel as invalidations, and frames stay small.
func TestFrameSizes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.session("s") // 1
		n := w.subscribe(w.log.Incarnation(), 1)
		n.expect("(1,1]")
		w.register("s", "big", value("string", `"`+strings.Repeat("v", 5000)+`"`))
		n.expect("(1,2] s/big@2<1:invalid")
	})
}

// Heartbeats are answered while writes pour in: each answer comes with the head of its
// moment, and heads never go back.
func TestHeartbeatsWhileWritesPourIn(t *testing.T) { overBoth(t, testHeartbeatsWhileWritesPourIn) }

func testHeartbeatsWhileWritesPourIn(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	w.register("s", "x", value("integer", "0"))
	n := w.subscribe(0, 0)
	n.next()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 1000 {
			if _, err := w.vars.Set(w.ctx, setReq("s", "x", fmt.Sprint(i))); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	var head uint64
	acks := 0
	for beat := uint64(1); acks < 100; beat++ {
		before := w.svc.Applied()
		n.beat(beat)
		for {
			f := n.recv()
			if f.GetAck() == nil {
				continue
			}
			if f.GetAck().GetSent() != beat || f.GetAck().GetHead() < max(before, head) {
				t.Fatalf("beat %d: answer %v, applied before was %d, last head %d", beat, f.GetAck(), before, head)
			}
			head = f.GetAck().GetHead()
			acks++
			break
		}
	}
	within(t, 30*time.Second, "writers", done)
}

func TestChangesFillsGaps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startWorld(t, memory.New(), variables.Options{FeedRing: 4})
		w.session("s")
		w.register("s", "x", value("integer", "0"))
		for i := range 10 {
			w.set("s", "x", fmt.Sprint(i))
			synctest.Wait()
		} // head 12, kept 9..12
		show := func(from, to uint64) string {
			got := must(w, w.coh.Changes, &pb.ChangesRequest{Incarnation: 1, From: from, To: to})
			out := fmt.Sprintf("to %d:", got.GetCompleteTo())
			for _, c := range got.GetChanges() {
				out += " " + describeChange(c)
			}
			return out
		}
		for _, c := range []struct {
			from, to uint64
			want     string
		}{
			{9, 11, "to 11: s/x@10<9=7 s/x@11<10=8"}, {8, 9, "to 9: s/x@9<8=6"}, {12, 12, "to 12:"}, {11, 90, "to 12: s/x@12<11=9"},
		} {
			if got := show(c.from, c.to); got != c.want {
				t.Errorf("changes (%d,%d] = %q, want %q", c.from, c.to, got, c.want)
			}
		}
		refused(w, w.coh.Changes, &pb.ChangesRequest{Incarnation: 1, From: 7, To: 12}, outrigger.Stale,
			"changes after position 7 are no longer kept (the oldest kept is 9); flush and start over")
		refused(w, w.coh.Changes, &pb.ChangesRequest{Incarnation: 2, From: 9, To: 12}, outrigger.Stale,
			"incarnation is 2, this log is 1; flush and subscribe again")
		refused(w, w.coh.Changes, &pb.ChangesRequest{Incarnation: 1, From: 9, To: 8}, outrigger.Invalid, "from 9 is above to 8")
		refused(w, w.coh.Changes, &pb.ChangesRequest{Incarnation: 1, From: 13, To: 14}, outrigger.Unavailable, "from is 13, applied is 12; retry or ask the leader")
	})
}

// An answer is cut at about 1 MiB; the client goes on from complete_to and misses nothing.
func TestChangesAreCutBySize(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	w.register("s", "x", value("string", `""`))
	for range 650 {
		w.set("s", "x", `"`+strings.Repeat("v", 3500)+`"`)
	}
	head, next, calls := w.log.Head(), uint64(1), 0
	for from := uint64(1); from < head; calls++ {
		got := must(w, w.coh.Changes, &pb.ChangesRequest{Incarnation: 1, From: from, To: head})
		for _, c := range got.GetChanges() {
			if next++; c.GetPosition() != next {
				t.Fatalf("change at %d, want %d", c.GetPosition(), next)
			}
		}
		from = got.GetCompleteTo()
	}
	if next != head || calls < 3 {
		t.Errorf("%d calls reached %d of %d; over 2 MiB need at least three", calls, next, head)
	}
}

// Events that are no business of variables move the feed's positions on.
func TestFeedPassesOverOtherEvents(t *testing.T) { overBoth(t, testFeedPassesOverOtherEvents) }

func testFeedPassesOverOtherEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		n := w.subscribe(0, 0)
		n.expect("reset to 0: first subscription")
		_, err := w.log.Append(w.ctx, "", eventlog.Write{Aggregate: "alert/1", Expect: 0, Events: []*pb.Event{
			{Payload: &pb.Event_AlertRaised{AlertRaised: &pb.AlertRaised{}}},
		}})
		if err != nil {
			t.Fatal(err)
		}
		n.expect("(0,1]")
		synctest.Wait() // nobody waited for the append to be applied, which is after it is fed
		n.beat(1)
		n.expect("ack 1 head 1")
	})
}

func TestRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.session("s")                              // 1
		w.register("s", "x", value("integer", "1")) // 2
		got := must(w, w.coh.Read, &pb.ReadRequest{MinPosition: 2, Keys: []*pb.Key{
			{Session: "s", Name: "x"}, {Session: "s", Name: "y"}, {Session: "t", Name: "x"}, {Session: "s", Name: "var_x_1"},
		}})
		if got.GetAsOf() != 2 || got.GetRegion() != "us" || got.GetIncarnation() != w.log.Incarnation() {
			t.Errorf("answer %v", got)
		}
		shape := ""
		for _, r := range got.GetResults() {
			shape += fmt.Sprintf("%s/%v ", r.GetVariable().GetValue().GetJson(), r.GetSessionExists())
		}
		if shape != "1/true /true /false /true " {
			t.Errorf("results %q", shape)
		}
		start := time.Now()
		refused(w, w.coh.Read, &pb.ReadRequest{MinPosition: 3}, outrigger.Unavailable, "min_position is 3, applied is 2 after waiting 50ms; retry or ask the leader")
		if d := time.Since(start); d != 50*time.Millisecond {
			t.Errorf("waited %v, want 50ms", d)
		}
		// A write during the wait satisfies it.
		go func() {
			time.Sleep(20 * time.Millisecond)
			w.vars.Set(w.ctx, setReq("s", "x", "2"))
		}()
		start = time.Now()
		if got := must(w, w.coh.Read, &pb.ReadRequest{MinPosition: 3}); got.GetAsOf() != 3 || time.Since(start) != 20*time.Millisecond {
			t.Errorf("as of %d after %v", got.GetAsOf(), time.Since(start))
		}
		refused(w, w.coh.Read, &pb.ReadRequest{Keys: []*pb.Key{{Session: "s"}}}, outrigger.Invalid, "name is empty; give 1 to 256 bytes")
	})
}
