package variables_test

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/variables"
)

// A replica that keeps a copy answers no heartbeat, and takes no subscription, that its leader
// did not confirm after it came; changes it has go on being sent.
func TestFollowerProvesItsFeed(t *testing.T) { overBoth(t, testFollowerProvesItsFeed) }

func testFollowerProvesItsFeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var away atomic.Bool
		var asked atomic.Int32
		log := memory.New()
		w := startWorld(t, log, variables.Options{Confirm: func(context.Context) (uint64, error) {
			asked.Add(1)
			if away.Load() {
				return 0, outrigger.Errorf(outrigger.Unavailable, "away")
			}
			return log.Head(), nil
		}})
		w.session("shop")
		w.register("shop", "n", value(outrigger.Integer, "0"))
		n := w.subscribe(log.Incarnation(), log.Head())
		n.next()
		before := asked.Load()
		n.beat(7)
		n.expect("ack 7 head 2")
		if asked.Load() == before {
			t.Fatal("a heartbeat was answered without a proof")
		}

		away.Store(true)
		n.beat(8)
		synctest.Wait()
		w.set("shop", "n", "1")
		if got := n.next(); strings.HasPrefix(got, "ack 8") {
			t.Fatalf("%q: an answer that nothing proves", got)
		}
		other := w.subscribe(log.Incarnation(), log.Head())
		if _, err := other.stream.Recv(); !outrigger.IsKind(endedBy(err), outrigger.Unavailable) {
			t.Errorf("a subscription that cannot be proven: %v", err)
		}
		other.close()
		away.Store(false)
		n.beat(9)
		n.expect("ack 9 head 3")
		n.close()
	})
}

// A watch at a replica that keeps a copy does not begin with values older than what its watcher
// may have been told by the leader.
func TestFollowerWatchBeginsCurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var away atomic.Bool
		var ahead atomic.Uint64 // what the leader has and the copy has not
		log := memory.New()
		w := startWorld(t, log, variables.Options{Confirm: func(context.Context) (uint64, error) {
			if away.Load() {
				return 0, outrigger.Errorf(outrigger.Unavailable, "away")
			}
			return log.Head() + ahead.Load(), nil
		}})
		w.session("shop")
		w.register("shop", "n", value(outrigger.Integer, "0"))
		ahead.Store(1)
		x := w.watch(&pb.WatchRequest{Session: "shop", IncludeInitial: true})
		synctest.Wait()
		w.set("shop", "n", "5") // now it has it
		x.expect("INITIAL n=5@1 ")
		x.close()
		away.Store(true)
		w.watch(&pb.WatchRequest{Session: "shop", IncludeInitial: true}).expect("away")
	})
}
