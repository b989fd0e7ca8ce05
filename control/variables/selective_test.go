package variables_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/coherence"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/variables"
)

func shards(sessions ...string) (out []uint32) {
	for _, s := range sessions {
		out = append(out, uint32(coherence.ShardOf("", s)))
	}
	return out
}

// selecting opens a selective stream.
func (w *world) selecting(incarnation, from uint64, sessions ...string) *node {
	w.t.Helper()
	n := &node{w: w, stream: w.feed(w.ctx)}
	n.send(&pb.FeedRequest{Kind: &pb.FeedRequest_Subscribe{Subscribe: &pb.Subscribe{
		Node: &pb.Node{Id: "node-a"}, Incarnation: incarnation, From: from, Select: &pb.Select{Number: 1, Add: shards(sessions...)},
	}}})
	return n
}

func (n *node) selects(number uint64, add, remove []uint32) {
	n.w.t.Helper()
	n.send(&pb.FeedRequest{Kind: &pb.FeedRequest_Select{Select: &pb.Select{Number: number, Add: add, Remove: remove}}})
}

// 1. A node that uses no session yet hears of no change; before a heartbeat's answer it is
// told that it missed nothing.
// 2. It selects a session: from the position answered on, it hears of its changes, those
// before included that it was not told to have missed, and of no other's.
// 3. It takes the session out again, and hears nothing more.
func TestFeedCarriesWhatIsSelected(t *testing.T) { overBoth(t, testFeedCarriesWhatIsSelected) }

func testFeedCarriesWhatIsSelected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.session("s") // 1
		w.session("u") // 2
		n := w.selecting(0, 0)
		n.expect("reset to 2: first subscription", "selected 1 at 2")
		w.register("s", "x", value("integer", "1")) // 3
		w.register("u", "x", value("integer", "1")) // 4
		synctest.Wait()
		n.beat(1)
		n.expect("(2,4]", "ack 1 head 4")
		w.set("s", "x", "2") // 5
		synctest.Wait()
		n.selects(2, shards("s"), nil)
		n.expect("selected 2 at 4", "(4,5] s/x@5<3=2")
		w.set("u", "x", "2") // 6
		w.set("s", "x", "3") // 7
		n.expect("(5,7] s/x@7<5=3")
		w.set("u", "x", "3") // 8
		synctest.Wait()
		n.beat(2)
		n.expect("(7,8]", "ack 2 head 8")
		n.beat(3)
		n.expect("ack 3 head 8")                                      // nothing to cover
		must(w, w.vars.DeleteSession, &pb.GetSessionRequest{Id: "s"}) // 9
		n.expect("(8,9] s/@9<7:deleted")
		n.selects(3, nil, shards("s"))
		n.expect("selected 3 at 9")
		w.session("s") // 10
		synctest.Wait()
		n.beat(4)
		n.expect("(9,10]", "ack 4 head 10")
	})
}

// A stream that continues carries everything of its selection since `from`, atomic writes
// over several sessions included, and is reset by the same rules as any other.
func TestSelectiveFeedResumes(t *testing.T) { overBoth(t, testSelectiveFeedResumes) }

func testSelectiveFeedResumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startWorld(t, memory.New(), variables.Options{FeedRing: 6})
		w.session("s")                              // 1
		w.session("u")                              // 2
		w.register("s", "x", value("integer", "0")) // 3
		w.register("u", "x", value("integer", "0")) // 4
		for i := range 4 {                          // 5 to 12
			w.set("s", "x", fmt.Sprint(i))
			w.set("u", "x", fmt.Sprint(i))
			synctest.Wait()
		}
		n := w.selecting(w.log.Incarnation(), 8, "s")
		n.expect("selected 1 at 8", "(8,12] s/x@9<7=2 s/x@11<9=3")
		n = w.selecting(w.log.Incarnation(), 3, "s")
		n.expect("reset to 12: position 3 is no longer kept", "selected 1 at 12")
		n = w.selecting(99, 12, "s", "u")
		n.expect("reset to 12: the log is now incarnation 1", "selected 1 at 12")
		n = w.selecting(w.log.Incarnation(), 12, "s")
		n.expect("selected 1 at 12")
		for i := range 8 { // falls out of the ring while nothing concerns it
			w.set("u", "x", fmt.Sprint(i))
			synctest.Wait()
		}
		n.beat(1)
		n.expect("reset to 20: position 12 is no longer kept", "ack 1 head 20")
	})
}

// A selective stream that lags gets of each key the newest change only.
func TestSelectiveFeedCoalesces(t *testing.T) { overBoth(t, testSelectiveFeedCoalesces) }

func testSelectiveFeedCoalesces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.session("s")                              // 1
		w.session("u")                              // 2
		w.register("s", "x", value("integer", "0")) // 3
		w.register("s", "y", value("integer", "0")) // 4
		for i := range 30 {                         // 5 to 64
			w.set("s", "x", fmt.Sprint(i))
			w.set("s", "y", fmt.Sprint(i))
		}
		n := w.selecting(w.log.Incarnation(), 4, "s")
		n.expect("selected 1 at 4", fmt.Sprintf("(4,%d] s/x@%d<4=29 s/y@%d<4=29", w.log.Head(), w.log.Head()-1, w.log.Head()))
	})
}

// Every frame of a selective stream says so, and only of such.
func TestFramesSaySelective(t *testing.T) { overBoth(t, testFramesSaySelective) }

func testFramesSaySelective(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.session("s")
		w.register("s", "y", value("integer", "0"))
		streams := map[string]*node{"selective": w.selecting(0, 0, "s"), "whole": w.subscribe(0, 0)}
		synctest.Wait() // both are reset before anything is written
		for name, n := range streams {
			n.expect("reset to 2: first subscription")
			n.beat(1)
			w.set("s", "y", "1")
			for seen := ""; !strings.Contains(seen, "ack") || !strings.Contains(seen, "s/y"); {
				f := n.recv()
				seen += describe(f)
				if f.GetSelective() != (name == "selective") {
					t.Errorf("%s: %v", name, f)
				}
			}
		}
	})
}

func TestSelectIsRefused(t *testing.T) { overBoth(t, testSelectIsRefused) }

func testSelectIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		for what, n := range map[string]*node{
			"a stream of everything": w.subscribe(0, 0), "a shard there is none of": w.selecting(0, 0, "s"), "a number twice": w.selecting(0, 0, "s"),
		} {
			switch what {
			case "a shard there is none of":
				n.selects(2, []uint32{coherence.Shards}, nil)
			case "a number twice":
				n.selects(1, shards("s"), nil)
			default:
				n.selects(2, shards("s"), nil)
			}
			for {
				if _, err := n.stream.Recv(); err != nil {
					if !outrigger.IsKind(endedBy(err), outrigger.Invalid) {
						t.Errorf("%s: %v", what, err)
					}
					break
				}
			}
		}
	})
}

// A write wakes the streams it concerns and no other: those stay where they were.
func TestWritesWakeWhomTheyConcern(t *testing.T) { overBoth(t, testWritesWakeWhomTheyConcern) }

func testWritesWakeWhomTheyConcern(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.session("s")
		w.register("s", "x", value("integer", "0"))
		w.selecting(0, 0, "s").expect("reset to 2: first subscription", "selected 1 at 2")
		time.Sleep(time.Millisecond) // of the bubble: opened later, listed later
		w.selecting(0, 0, "u").expect("reset to 2: first subscription", "selected 1 at 2")
		w.set("s", "x", "1")
		synctest.Wait()
		if f := w.svc.Stats().Feeds; len(f) != 2 || f[0].Sent != 3 || f[1].Sent != 2 {
			t.Errorf("feeds %+v", f)
		}
	})
}
