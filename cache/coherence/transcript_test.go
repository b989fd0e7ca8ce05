package coherence

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// A transcript is a list of steps: at a time (ms), an input, and exactly the outputs
// it must cause, in order. Lines with only a comment are prose.
type step struct {
	ms   int64
	in   Input
	want string // outputs joined by "; "
}

func play(t *testing.T, s *State, steps []step) {
	t.Helper()
	for i, st := range steps {
		if got := show(s.Step(st.in, st.ms*1_000_000)); got != st.want {
			t.Fatalf("step %d at %d ms, %T:\n got %s\nwant %s", i, st.ms, st.in, got, st.want)
		}
	}
}

func show(outs []Output) string {
	var lines []string
	for _, o := range outs {
		lines = append(lines, showOne(o))
	}
	return strings.Join(lines, "; ")
}

func showOne(o Output) string {
	switch o := o.(type) {
	case Subscribe:
		return fmt.Sprintf("subscribe %x:%d", o.Incarnation, o.From)
	case Resubscribe:
		return "resubscribe"
	case Install:
		if o.Variable == nil {
			return fmt.Sprintf("install %s none(session %v)", o.Key.Name, o.SessionExists)
		}
		return fmt.Sprintf("install %s %s", o.Key.Name, o.Variable.GetValue().GetJson())
	case Invalidate:
		return "invalidate " + o.Key.Name
	case Remove:
		return "remove " + o.Key.Name
	case Flush:
		return "flush"
	case Fetch:
		after := ""
		if o.After > 0 {
			after = fmt.Sprintf(" after %dms", o.After/1_000_000)
		}
		return fmt.Sprintf("fetch %s #%d ≥%d%s", o.Key.Name, o.Flight, o.MinPosition, after)
	case FetchRange:
		return fmt.Sprintf("range #%d (%d,%d]", o.Range, o.From, o.To)
	case Lease:
		return fmt.Sprintf("lease %dms", o.Until/1_000_000)
	case Head:
		return fmt.Sprintf("head %x:%d", o.Incarnation, o.Position)
	case Hit:
		return fmt.Sprintf("hit %s →%v", o.Key.Name, o.Waiters)
	case Answer:
		v := "none"
		if o.Result.GetVariable() != nil {
			v = string(o.Result.GetVariable().GetValue().GetJson())
		}
		return fmt.Sprintf("answer %s %s@%d →%v", o.Key.Name, v, o.AsOf, o.Waiters)
	case Failed:
		return fmt.Sprintf("failed %s %s →%v", o.Key.Name, outrigger.KindOf(o.Err), o.Waiters)
	case Stale:
		return fmt.Sprintf("stale %s %d, is %d", o.Key.Name, o.Shown.Position, o.Current.GetVersion().GetDot().GetPosition())
	}
	return fmt.Sprintf("%T", o)
}

const inc = 0xa

func key(name string) outrigger.Key {
	return outrigger.Key{Tenant: "default", Session: "s", Name: name}
}

func variable(name, json string, position uint64) *pb.Variable {
	return variableIn("eu", inc, name, json, position)
}

func variableIn(region string, incarnation uint64, name, json string, position uint64) *pb.Variable {
	return &pb.Variable{
		Key: &pb.Key{Session: "s", Name: name}, Value: &pb.Value{Json: []byte(json)},
		Version: versionIn(region, incarnation, position),
	}
}

func versionIn(region string, incarnation, position uint64) *pb.Version {
	return &pb.Version{
		Dot:     &pb.Dot{Region: region, Incarnation: incarnation, Position: position},
		Context: []*pb.ContextEntry{{Region: region, Position: position}},
	}
}

// change says that name changed at position; json "" = the value does not ride along.
func change(name, json string, position uint64) *pb.Change {
	c := &pb.Change{Key: &pb.Key{Session: "s", Name: name}, Position: position, Version: versionIn("eu", inc, position)}
	if json != "" {
		c.Variable = variable(name, json, position)
	}
	return c
}

func frame(previous, through uint64, changes ...*pb.Change) Input {
	return frameIn(inc, previous, through, changes...)
}

func frameIn(incarnation, previous, through uint64, changes ...*pb.Change) Input {
	return Frame{Stream: 1, Frame: &pb.FeedFrame{Incarnation: incarnation, Region: "eu",
		Kind: &pb.FeedFrame_Changes{Changes: &pb.Changes{Previous: previous, Through: through, Changes: changes}}}}
}

func acked(sentMs int64, head uint64) Input {
	return Frame{Stream: 1, Frame: &pb.FeedFrame{Incarnation: inc, Region: "eu",
		Kind: &pb.FeedFrame_Ack{Ack: &pb.HeartbeatAck{Sent: uint64(sentMs * 1_000_000), Head: head}}}}
}

func reset(incarnation, from uint64) Input {
	return Frame{Stream: 1, Frame: &pb.FeedFrame{Incarnation: incarnation, Region: "eu",
		Kind: &pb.FeedFrame_Reset_{Reset_: &pb.Reset{From: from}}}}
}

func filled(name string, flight uint64, json string, position, asOf uint64) Input {
	r := &pb.ReadResult{SessionExists: true}
	if json != "" {
		r.Variable = variable(name, json, position)
	}
	return Filled{Key: key(name), Flight: flight, Result: r, AsOf: asOf, Incarnation: inc, Region: "eu"}
}

func get(name string, w Waiter) Input { return Read{Key: key(name), Waiter: w} }

// live returns a State that follows log a at position 100 with a lease until 310 ms.
func live(t *testing.T, o Options) *State {
	t.Helper()
	s := New(o)
	play(t, s, []step{
		{1, Connected{1}, "subscribe 0:0"},
		{2, reset(inc, 100), "head a:100"},
		{12, acked(10, 100), "lease 310ms"},
	})
	return s
}

func TestReadThenServeFromTheTable(t *testing.T) {
	play(t, live(t, Options{}), []step{
		// Three readers of one key cause one fetch; the fourth finds the table filled.
		{20, get("x", 1), "fetch x #1 ≥100"},
		{20, get("x", 2), ""},
		{21, get("x", 3), ""},
		{25, filled("x", 1, "5", 40, 100), "install x 5; answer x 5@100 →[1 2 3]"},
		{26, get("x", 4), "hit x →[4]"},
		// Nothing renews the lease (310 ms). What was asked for at 20 ms is good until 320 all
		// the same; then a reader waits for the feed, which is open, and if that does not
		// prove the value current within a lease the origin is asked again.
		{309, get("x", 5), "hit x →[5]"},
		{319, get("x", 6), "hit x →[6]"},
		{320, get("x", 7), ""},
		{330, get("x", 8), ""},
		{619, Tick{}, ""},
		{620, Tick{}, "fetch x #2 ≥100"},
		{622, filled("x", 2, "5", 40, 100), "install x 5; answer x 5@100 →[7 8]"},
	})
}

func TestFillRacesInvalidation(t *testing.T) {
	play(t, live(t, Options{}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		// The origin reads x=5 as of 100; x changes at 101; the change arrives first.
		{22, frame(100, 101, change("x", "", 101)), "head a:101"},
		{23, filled("x", 1, "5", 40, 100), "fetch x #2 ≥101 after 28ms"},
		{29, filled("x", 2, "6", 101, 101), "install x 6; answer x 6@101 →[1]"},
		// The first answer comes a second time, from a retrying proxy: its number is over.
		{30, filled("x", 1, "5", 40, 100), ""},
		// A change of an untracked key leaves a floor too: y is fetched as of 102 or later.
		{31, frame(101, 102, change("y", "", 102)), "head a:102"},
		{32, get("y", 2), "fetch y #3 ≥102"},
	})
}

func TestFillAheadOfTheFeed(t *testing.T) {
	play(t, live(t, Options{}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		// The answer holds as of 105, the feed is at 100. The change at 103 is inside it.
		{22, filled("x", 1, "7", 103, 105), "install x 7; answer x 7@105 →[1]"},
		{23, frame(100, 103, change("x", "7", 103)), "head a:103"},
		{24, get("x", 2), "hit x →[2]"},
		// One after it is not.
		{25, frame(103, 106, change("x", "", 106)), "invalidate x; head a:106"},
	})
}

func TestDuplicatesAndReordering(t *testing.T) {
	play(t, live(t, Options{}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "1", 50, 100), "install x 1; answer x 1@100 →[1]"},
		// Frames 1 and 2 change places. The later one is applied at once, and shows a gap.
		{22, frame(101, 102, change("x", "3", 102)), "install x 3; range #2 (100,101]"},
		// The earlier one closes it and must not bring the old value back.
		{23, frame(100, 101, change("x", "2", 101)), "head a:102"},
		{24, frame(100, 101, change("x", "2", 101)), ""},
		{25, frame(101, 102, change("x", "3", 102)), ""},
		// The range answer is late and harmless, once and twice.
		{26, RangeArrived{2, &pb.ChangesResponse{CompleteTo: 101, Changes: []*pb.Change{change("x", "2", 101)}}}, ""},
		{27, RangeArrived{2, &pb.ChangesResponse{CompleteTo: 101}}, ""},
		{28, get("x", 2), "hit x →[2]"},
	})
}

func TestLostFrameLeavesAGap(t *testing.T) {
	play(t, live(t, Options{}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "1", 50, 100), "install x 1; answer x 1@100 →[1]"},
		// (100,101] with the change of x is lost. (101,102] shows it.
		{22, frame(101, 102), "range #2 (100,101]"},
		// Heartbeats do not renew the lease (310 ms) while the gap is open.
		{112, acked(110, 102), ""},
		{212, acked(210, 102), ""},
		{321, get("x", 2), "fetch x #3 ≥100"},
		// The range arrives: the change counts, and the newest heartbeat covered renews.
		{322, RangeArrived{2, &pb.ChangesResponse{CompleteTo: 101, Changes: []*pb.Change{change("x", "", 101)}}},
			"invalidate x; lease 510ms; head a:102"},
		// The fill that raced all this holds as of 100 only.
		{323, filled("x", 3, "1", 50, 100), "fetch x #4 ≥101 after 328ms"},
	})
}

func TestLostLastFrame(t *testing.T) {
	play(t, live(t, Options{}), []step{
		// The last frame before silence is lost: only the heartbeat's head tells.
		{112, acked(110, 103), ""}, // it may be right behind
		{130, Tick{}, ""},
		{162, Tick{}, "range #1 (100,103]"}, // it was not, within Patience
		{163, RangeFailed{Range: 1}, ""},
		{200, Tick{}, ""},
		{213, Tick{}, "range #2 (100,103]"},
		// Half an answer: go on from there.
		{214, RangeArrived{2, &pb.ChangesResponse{CompleteTo: 102}}, "range #3 (102,103]; head a:102"},
		{215, RangeArrived{3, &pb.ChangesResponse{CompleteTo: 103}}, "lease 410ms; head a:103"},
	})
}

func TestGapNoLongerKept(t *testing.T) {
	play(t, live(t, Options{}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "1", 50, 100), "install x 1; answer x 1@100 →[1]"},
		{22, frame(900, 901), "range #2 (100,900]"},
		{23, RangeFailed{Range: 2, Gone: true}, "flush; head a:901"},
		{24, get("x", 2), "fetch x #3 ≥901"},
	})
	play(t, live(t, Options{MaxGap: 10}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "1", 50, 100), "install x 1; answer x 1@100 →[1]"},
		{22, frame(111, 112), "flush; head a:112"}, // too long to be worth fetching
	})
}

func TestAgentRestart(t *testing.T) {
	// A new agent knows nothing. The answer to a read before the feed is kept for the next
	// readers for a lease's length, and waits to be stored until the feed says from where
	// on it carries the key's changes.
	s := New(Options{})
	play(t, s, []step{
		{1, get("x", 1), "fetch x #1 ≥0"},
		{2, filled("x", 1, "5", 40, 100), "answer x 5@100 →[1]; head a:100"},
		{3, get("x", 2), "answer x 5@100 →[2]"}, // asked for 2 ms ago
		{301, get("x", 3), "fetch x #2 ≥100"},
		// The feed continues right after what was read.
		{304, Connected{1}, "subscribe a:100"},
		{305, frame(100, 101, change("x", "6", 101)), "install x 5; install x 6; head a:101"},
		{306, acked(304, 101), "lease 604ms"},
		{307, filled("x", 2, "5", 40, 100), "fetch x #3 ≥101 after 312ms"},
		{308, get("x", 4), "hit x →[4]"},
	})
}

func TestAuthorityRestart(t *testing.T) {
	s := live(t, Options{})
	play(t, s, []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "5", 40, 100), "install x 5; answer x 5@100 →[1]"},
		{22, get("y", 2), "fetch y #2 ≥100"},
		// The log was restored: incarnation b starts lower. Everything goes, the lease too.
		{30, Lost{1}, ""},
		{31, Connected{1}, "subscribe a:100"},
		{32, reset(0xb, 60), "lease 0ms; flush; head b:60"},
		{33, get("x", 3), "fetch x #3 ≥60"},
		// What the old log still says is refused for good: a fill, a frame.
		{34, filled("y", 2, "1", 41, 100), "fetch y #4 ≥60 after 39ms"},
		{35, frame(100, 101, change("x", "9", 101)), "resubscribe"},
		{36, frame(101, 102), ""}, // that stream is over
	})
}

func TestNewIncarnationSeenByAWriteFirst(t *testing.T) {
	s := live(t, Options{})
	play(t, s, []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "5", 40, 100), "install x 5; answer x 5@100 →[1]"},
		// A write is acknowledged by log b while the feed still shows a.
		{22, Wrote{key("y"), 2, variableIn("eu", 0xb, "y", "1", 61), versionIn("eu", 0xb, 61)},
			"lease 0ms; flush; install y 1; head b:61"},
		{23, frame(100, 101), "resubscribe"},
	})
}

// A new agent hears of the new log first and of the old one later. Nothing it ever saw
// tells which is older, except when it asked.
func TestLateAnswerFromALogNeverSeen(t *testing.T) {
	s := New(Options{})
	play(t, s, []step{
		{1, get("x", 1), "fetch x #1 ≥0"},
		{2, get("y", 2), "fetch y #2 ≥0"},
		{3, Connected{1}, "subscribe 0:0"},
		{4, Filled{Key: key("y"), Flight: 2, Result: &pb.ReadResult{}, AsOf: 60, Incarnation: 0xb, Region: "eu"},
			"answer y none@60 →[2]; head b:60"},
		{5, filled("x", 1, "5", 40, 100), "fetch x #3 ≥60 after 10ms"}, // log a, asked before b was known
		{7, frame(100, 101), "resubscribe"},
		{8, Connected{1}, "subscribe b:60"},
		// A write sent before b was known is acknowledged by a. Which of the two is newer?
		// Only what is asked from now on can tell.
		{9, Wrote{key("x"), 2, variable("x", "6", 101), versionIn("eu", inc, 101)}, "resubscribe; fetch x #5 ≥0"},
		{10, Filled{Key: key("x"), Flight: 3, Result: &pb.ReadResult{}, AsOf: 60, Incarnation: 0xb, Region: "eu"}, ""},
		{11, Connected{1}, "subscribe 0:0"},
		{12, filled("x", 5, "6", 101, 101), "answer x 6@101 →[1]; head a:101"},
	})
}

func TestClockJumps(t *testing.T) {
	play(t, live(t, Options{}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "5", 40, 100), "install x 5; answer x 5@100 →[1]"},
		// Forward by an hour (the machine slept): the lease is over, and the heartbeat sent
		// before the jump cannot bring it back.
		{3_600_000, acked(110, 100), ""},
		{3_600_001, get("x", 2), ""}, // the feed may tell yet
		// Backward: an answer from the future is not believed. By this clock the value was
		// asked for 80 ms ago, so it may be served.
		{100, acked(200, 100), "hit x →[2]"},
		{210, acked(200, 100), "lease 500ms"},
	})
}

func TestWriteRacesInvalidation(t *testing.T) {
	play(t, live(t, Options{}), []step{
		// The node writes x at 101, somebody else at 102. The acknowledgement and the feed
		// arrive in either order; 102 must win.
		{20, Wrote{key("x"), 0, variable("x", "1", 101), versionIn("eu", inc, 101)}, "install x 1"},
		{21, frame(100, 102, change("x", "", 101), change("x", "", 102)), "invalidate x; head a:102"},
		{22, Wrote{key("y"), 0, variable("y", "1", 103), versionIn("eu", inc, 103)}, "install y 1"},
		{23, frame(102, 104, change("y", "2", 104)), "install y 2; head a:104"},
		{24, Wrote{key("y"), 0, variable("y", "1", 103), versionIn("eu", inc, 103)}, ""},
		// A fetch that began before the write was acknowledged holds as of before it.
		{25, get("z", 1), "fetch z #1 ≥100"},
		{26, Wrote{key("z"), 0, variable("z", "1", 105), versionIn("eu", inc, 105)}, "install z 1"},
		{27, filled("z", 1, "0", 7, 104), "fetch z #2 ≥105 after 32ms"},
		{28, get("z", 2), "hit z →[2]"},
		{29, filled("z", 2, "1", 105, 105), "install z 1; answer z 1@105 →[1]"},
	})
}

func TestUnknownOutcomeRaisesOnlyTheFloor(t *testing.T) {
	play(t, live(t, Options{}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "5", 40, 100), "install x 5; answer x 5@100 →[1]"},
		{22, WriteUnknown{key("x")}, "invalidate x"},
		{23, get("x", 2), "fetch x #3 ≥100"},
		// A second unknown outcome repeats the fetch under way: it began too early.
		{24, WriteUnknown{key("x")}, "fetch x #5 ≥100"},
		{25, filled("x", 3, "5", 40, 100), ""},
		{26, filled("x", 5, "6", 101, 101), "install x 6; answer x 6@101 →[2]"},
	})
}

func TestDeleteAndLateFill(t *testing.T) {
	play(t, live(t, Options{}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		// x is deleted at 101 through this node; the fill that read it before comes late.
		{21, Wrote{Key: key("x"), Version: versionIn("eu", inc, 101)}, "install x none(session true)"},
		{22, filled("x", 1, "5", 40, 100), "fetch x #2 ≥101 after 27ms"},
		{23, get("x", 2), "hit x →[2]"}, // the tombstone: no resurrection
		{24, filled("x", 2, "", 0, 101), "install x none(session true); answer x none@101 →[1]"},
		// The same from the feed, and a negative fill older than a create.
		{25, frame(100, 102, &pb.Change{Key: &pb.Key{Session: "s", Name: "y"}, Position: 102, Deleted: true}), "head a:102"},
		{26, get("y", 3), "fetch y #3 ≥102"},
		{27, frame(102, 103, change("y", "1", 103)), "install y 1; head a:103"},
		{28, filled("y", 3, "", 0, 102), "fetch y #4 ≥103 after 33ms"},
		{29, filled("y", 4, "1", 103, 103), "install y 1; answer y 1@103 →[3]"},
	})
}

func TestSessionDelete(t *testing.T) {
	session := func(p uint64) *pb.Change {
		return &pb.Change{Scope: pb.Change_SESSION, Key: &pb.Key{Session: "s"}, Position: p}
	}
	play(t, live(t, Options{}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "5", 40, 100), "install x 5; answer x 5@100 →[1]"},
		{22, get("y", 2), "fetch y #2 ≥100"},
		// Deleted through this node: no position yet, so what began before is repeated.
		{23, SessionChanged{"default", "s", nil}, "invalidate x; fetch y #4 ≥100"},
		{24, filled("y", 2, "1", 41, 100), ""},
		{25, filled("y", 4, "", 0, 101), "install y none(session true); answer y none@101 →[2]"},
		// The feed says where: keys never seen have that floor as well.
		{26, frame(100, 101, session(101)), "head a:101"},
		{27, get("z", 3), "fetch z #5 ≥101"},
		// Another session is not touched.
		{28, Read{Key: outrigger.Key{Tenant: "default", Session: "t", Name: "x"}, Waiter: 4}, "fetch x #6 ≥100"},
	})
}

func TestNegativeEntriesAgeOut(t *testing.T) {
	s := live(t, Options{})
	none := Filled{Key: key("x"), Flight: 1, Result: &pb.ReadResult{}, AsOf: 100, Incarnation: inc, Region: "eu"}
	play(t, s, []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, none, "install x none(session false); answer x none@100 →[1]"},
		{22, get("x", 2), "hit x →[2]"},
		// Creating a session need not be a change, so this one has a short life.
		{1020, Tick{}, ""},
		{1021, Tick{}, "remove x"},
	})
}

func TestReaderAsksForAPosition(t *testing.T) {
	play(t, live(t, Options{MaxAttempts: 2}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, Read{Key: key("x"), Waiter: 2, Min: 105}, ""},
		// The answer serves the first reader; the second wants more than it holds.
		{22, filled("x", 1, "5", 40, 100), "install x 5; answer x 5@100 →[1]; fetch x #2 ≥105 after 27ms"},
		{28, filled("x", 2, "5", 40, 101), "install x 5; failed x unavailable →[2]"},
		{29, get("x", 3), "hit x →[3]"},
		{30, Read{Key: key("x"), Waiter: 4, Min: 105}, "fetch x #3 ≥105"},
		{31, filled("x", 3, "6", 105, 105), "install x 6; answer x 6@105 →[4]"},
		{32, Read{Key: key("x"), Waiter: 5, Min: 105}, "hit x →[5]"},
	})
}

func TestFailedFetch(t *testing.T) {
	down := errors.New("down")
	play(t, live(t, Options{}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{20, get("x", 2), ""},
		{50, FillFailed{key("x"), 1, down}, "failed x internal →[1 2]"},
		{51, get("x", 3), "fetch x #2 ≥100"},
		// Without a feed, a reader that comes long after the fetch began gets the next one.
		{890, Lost{1}, ""},
		{900, get("x", 4), ""},
		{901, filled("x", 2, "5", 40, 100), "install x 5; answer x 5@100 →[3]; fetch x #3 ≥100"},
		{902, filled("x", 3, "5", 40, 100), "install x 5; answer x 5@100 →[4]"},
	})
}

// Readers that came too late for a fetch are answered from the table only if that has
// what they ask for, like everybody.
func TestLateReaderAsksForAPosition(t *testing.T) {
	play(t, live(t, Options{}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{900, get("x", 2), ""},
		{901, Read{Key: key("x"), Waiter: 3, Min: 105}, ""},
		{902, acked(901, 100), "lease 1201ms"},
		{903, filled("x", 1, "5", 40, 102), "install x 5; answer x 5@102 →[1]; hit x →[2]; fetch x #2 ≥105"},
		{904, filled("x", 2, "6", 105, 105), "install x 6; answer x 6@105 →[3]"},
	})
}

func TestStrongReadMovesTheNode(t *testing.T) {
	s := live(t, Options{})
	offer := func(json string, position, asOf, began uint64) Input {
		return Offered{Key: key("x"), Began: began, AsOf: asOf, Incarnation: inc, Region: "eu",
			Result: &pb.ReadResult{Variable: variable("x", json, position), SessionExists: true}}
	}
	play(t, s, []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "5", 40, 100), "install x 5; answer x 5@100 →[1]"},
	})
	began := s.Begin()
	play(t, s, []step{
		{22, offer("7", 103, 103, began), "install x 7"},
		{23, offer("6", 102, 102, began), ""},
		{24, WriteUnknown{key("y")}, ""},
		// Begun before an unknown write: nothing is stored, yet nothing older is served.
		{25, offer("8", 104, 104, began), "invalidate x"},
		{26, get("x", 2), "fetch x #4 ≥104"},
		// A value seen in a list counts as well.
		{27, filled("x", 4, "8", 104, 104), "install x 8; answer x 8@104 →[2]"},
	})
	began = s.Begin()
	play(t, s, []step{
		{28, Observed{Began: began, Variable: variable("x", "9", 106)}, "install x 9"},
		{29, Observed{Began: began, Variable: variable("x", "8", 104)}, ""},
		{30, Observed{Began: began, Variable: variable("x", "", 107), Deleted: true}, "install x none(session true)"},
		// A list asked for before the doubt of 24 ms may be from before that write.
		{31, Observed{Began: 1, Variable: variable("x", "9", 108)}, "invalidate x"},
	})
}

// A write whose position is not known (a deleted session here) is newer than what comes
// late: a slow acknowledgement and slow frames of what was before it do not bring it back.
func TestDoubtOutlivesWhatComesLate(t *testing.T) {
	s := live(t, Options{})
	began := s.Begin()
	play(t, s, []step{
		{20, get("x", 1), "fetch x #2 ≥100"},
		{21, filled("x", 2, "5", 40, 100), "install x 5; answer x 5@100 →[1]"},
		// x is set at 101, y at 102, the session deleted at 103; the last is heard of first.
		{22, SessionChanged{"default", "s", nil}, "invalidate x"},
		{23, Wrote{key("x"), began, variable("x", "6", 101), versionIn("eu", inc, 101)}, ""},
		{24, frame(100, 101, change("x", "6", 101)), "head a:101"},
		{25, Wrote{key("y"), began, variable("y", "1", 102), versionIn("eu", inc, 102)}, ""},
		{26, get("y", 2), "fetch y #4 ≥102"},
		{27, frame(101, 102, change("y", "1", 102)), "head a:102"},
		{28, filled("y", 4, "", 0, 103), "install y none(session true); answer y none@103 →[2]"},
		// z is new here, and the doubt holds for it too until a heartbeat sent after it.
		{29, get("z", 3), "fetch z #5 ≥100"},
		{30, frame(102, 104, change("z", "1", 104)), "head a:104"},
		{31, filled("z", 5, "1", 104, 104), "install z 1; answer z 1@104 →[3]"},
		{32, acked(25, 104), "lease 325ms"},
		{33, get("w", 4), "fetch w #6 ≥100"},
		{34, frame(104, 105, change("w", "1", 105)), "install w 1; head a:105"},
		// A session created at a known position leaves no doubt.
		{35, SessionChanged{"default", "s", versionIn("eu", inc, 105)}, "invalidate y; invalidate z"},
	})
	play(t, s, []step{
		{36, Wrote{key("y"), s.Begin(), variable("y", "2", 106), versionIn("eu", inc, 106)}, "install y 2"},
	})
}

// A late acknowledgement of an older log casts doubt on the present one. When that
// proves right its floors are back: a replica that is behind is not believed.
func TestDoubtedLogProvesRight(t *testing.T) {
	s := live(t, Options{})
	began := s.Begin()
	play(t, s, []step{
		{20, get("x", 1), "fetch x #2 ≥100"},
		{21, Filled{Key: key("x"), Flight: 2, Result: &pb.ReadResult{Variable: variableIn("eu", inc+1, "x", "5", 90), SessionExists: true},
			AsOf: 93, Incarnation: inc + 1, Region: "eu"}, "lease 0ms; install x 5; answer x 5@93 →[1]; head b:93"},
		{22, Wrote{key("y"), began, variable("y", "1", 101), versionIn("eu", inc, 101)}, "flush; resubscribe"},
		{23, get("x", 2), "fetch x #4 ≥0"},
		{24, Filled{Key: key("x"), Flight: 4, Result: &pb.ReadResult{Variable: variableIn("eu", inc+1, "x", "4", 80), SessionExists: true},
			AsOf: 85, Incarnation: inc + 1, Region: "eu"}, "fetch x #5 ≥93 after 29ms; head b:85"},
	})
}

// A list shows values of a log that replaced the one followed: nothing of the old one
// is served after it.
func TestNewIncarnationSeenInAList(t *testing.T) {
	s := live(t, Options{})
	play(t, s, []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "5", 40, 100), "install x 5; answer x 5@100 →[1]"},
	})
	play(t, s, []step{
		{22, Observed{Began: s.Begin(), Variable: variableIn("eu", inc+1, "y", "1", 90)}, "lease 0ms; flush; head b:90"},
		{23, get("x", 2), "fetch x #3 ≥90"},
	})
	// The same of a list asked for before the present log was found: which is newer is
	// not known, so neither is believed.
	s = live(t, Options{})
	play(t, s, []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "5", 40, 100), "install x 5; answer x 5@100 →[1]"},
		{22, Observed{Variable: variableIn("eu", inc+1, "y", "1", 90)}, "lease 0ms; flush; resubscribe"},
	})
}

// A write forwarded to its owner region is acknowledged there, and this region's log
// shows it later.
func TestWriteInAnotherRegion(t *testing.T) {
	us := func(json string, p uint64) *pb.Variable { return variableIn("us", 0x7, "x", json, p) }
	arrived := func(json string, p, at uint64) *pb.Change {
		return &pb.Change{Key: &pb.Key{Session: "s", Name: "x"}, Position: at, Variable: us(json, p), Version: versionIn("us", 0x7, p)}
	}
	play(t, live(t, Options{Region: "eu"}), []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, Wrote{key("x"), 0, us("2", 9), versionIn("us", 0x7, 9)}, "fetch x #2 ≥100; install x 2"},
		// The local origin has not heard of it; position 100 is reached, us:9 is not.
		{22, Filled{Key: key("x"), Flight: 2, AsOf: 100, Incarnation: inc, Region: "eu",
			Result: &pb.ReadResult{Variable: us("1", 8), SessionExists: true}}, "fetch x #3 ≥100 after 27ms"},
		// An earlier write of the same variable arrives: not news to this node.
		{23, frame(100, 101, arrived("1", 8, 101)), "head a:101"},
		{24, get("x", 2), "hit x →[2]"},
		{25, frame(101, 102, arrived("2", 9, 102)), "install x 2; head a:102"},
		{28, Filled{Key: key("x"), Flight: 3, AsOf: 102, Incarnation: inc, Region: "eu",
			Result: &pb.ReadResult{Variable: us("2", 9), SessionExists: true}}, "install x 2; answer x 2@102 →[1]"},
	})
}

func TestRepairFindsADifference(t *testing.T) {
	s := live(t, Options{RepairEvery: 50_000_000})
	play(t, s, []step{
		{20, get("x", 1), "fetch x #1 ≥100"},
		{21, filled("x", 1, "5", 40, 100), "install x 5; answer x 5@100 →[1]"},
		{60, Tick{}, "fetch x #2 ≥100"},
		{61, filled("x", 2, "5", 40, 100), "install x 5"},
		{100, Tick{}, ""},
		{110, Tick{}, "fetch x #3 ≥100"},
		// The origin's x was written at 50 and no change ever said so.
		{111, filled("x", 3, "6", 50, 100), "stale x 40, is 50; install x 6"},
	})
	if st := s.Stats(); st.Checked != 2 || st.Repaired != 1 {
		t.Errorf("checked %d, repaired %d, want 2 and 1", st.Checked, st.Repaired)
	}
}

func TestBounds(t *testing.T) {
	s := live(t, Options{MaxKeys: 4, MaxFlights: 2, MaxWaiters: 3})
	play(t, s, []step{
		{20, get("a", 1), "fetch a #1 ≥100"},
		{20, get("b", 2), "fetch b #2 ≥100"},
		{20, get("c", 3), "failed c exhausted →[3]"}, // MaxFlights
		{20, get("a", 4), ""},
		{20, get("a", 5), "failed a exhausted →[5]"}, // MaxWaiters
		{21, filled("a", 1, "1", 10, 107), "install a 1; answer a 1@107 →[1 4]"},
		{21, filled("b", 2, "1", 11, 100), "install b 1; answer b 1@100 →[2]"},
	})
	for i, n := range []string{"c", "d"} {
		f := uint64(3 + i)
		play(t, s, []step{
			{22, get(n, 1), fmt.Sprintf("fetch %s #%d ≥100", n, f)},
			{22, filled(n, f, "1", 12, 100), fmt.Sprintf("install %s 1; answer %s 1@100 →[1]", n, n)},
		})
	}
	// The fifth key takes the oldest one's place. Its floor outlives it: a was served as
	// of 107, so nothing older may ever come back.
	play(t, s, []step{
		{23, get("e", 1), "remove a; fetch e #5 ≥100"},
		{24, get("a", 1), "remove b; fetch a #6 ≥107"},
		{25, filled("a", 6, "0", 3, 106), "fetch a #7 ≥107 after 30ms"},
	})
	if st := s.Stats(); st.Keys != 4 || st.Flights != 2 || st.Waiting != 2 || st.Refused != 1 {
		t.Errorf("stats %+v", st)
	}
}

// Spans beyond the limit are forgotten, never invented.
func TestManyGaps(t *testing.T) {
	s := live(t, Options{})
	for i := range uint64(3 * maxSpans) {
		p := 10_000 - 10*i
		s.Step(frame(p, p+1), 20)
	}
	if len(s.spans) > maxSpans {
		t.Fatalf("%d spans are kept, the limit is %d", len(s.spans), maxSpans)
	}
	for i := 1; i < len(s.spans); i++ {
		if s.spans[i].previous <= s.spans[i-1].through {
			t.Fatalf("spans %v touch or are out of order", s.spans[i-1:i+1])
		}
	}
	if s.applied != 100 {
		t.Errorf("applied %d above an open gap, want 100", s.applied)
	}
}

// The feed carries whatever a server sends; no frame may break the machine.
func TestNonsenseFrames(t *testing.T) {
	s := live(t, Options{})
	for _, f := range []Input{
		Frame{Stream: 1}, Frame{Stream: 1, Frame: &pb.FeedFrame{}},
		Frame{Stream: 1, Frame: &pb.FeedFrame{Incarnation: inc, Kind: &pb.FeedFrame_Changes{}}},
		Frame{Stream: 1, Frame: &pb.FeedFrame{Incarnation: inc, Kind: &pb.FeedFrame_Ack{}}},
		frame(105, 101), frame(100, 101, &pb.Change{}), frame(101, 102, nil),
		acked(-5, 1), acked(1<<62/1_000_000, 1),
		RangeArrived{}, RangeFailed{Range: 77}, Filled{}, FillFailed{}, Evicted{}, Observed{}, Lost{9},
	} {
		s.Step(f, 20_000_000)
	}
	if _, _, applied := s.Position(); applied != 102 {
		t.Errorf("applied %d, want 102", applied)
	}
}
