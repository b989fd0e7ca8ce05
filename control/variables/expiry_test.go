package variables_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/variables"
)

// The sweep runs at 60 s, 120 s, … after the start. A session with a TTL of 90 s that is
// not used again is readable until the sweep at 120 s, and gone after it.
func TestExpirySlidesAndSweeps(t *testing.T) {
	uses := map[string]func(w *world){
		"get":     func(w *world) { w.get("s", "x") },
		"set":     func(w *world) { w.set("s", "x", "1") },
		"list":    func(w *world) { must(w, w.vars.List, &pb.ListRequest{Session: "s"}) },
		"history": func(w *world) { must(w, w.vars.History, &pb.HistoryRequest{Session: "s", Identifier: "x"}) },
		"session": func(w *world) { must(w, w.vars.GetSession, &pb.GetSessionRequest{Id: "s"}) },
		"touch":   func(w *world) { must(w, w.vars.TouchSessions, &pb.TouchSessionsRequest{Ids: []string{"s"}}) },
		"report":  func(w *world) { w.svc.Touch("", "s", time.Now()) },
		"future":  func(w *world) { w.svc.Touch("", "s", time.Now().Add(time.Hour)) }, // counts as now
		"read":    func(w *world) { must(w, w.coh.Read, &pb.ReadRequest{Keys: []*pb.Key{{Session: "s", Name: "y"}}}) },
	}
	for name, use := range uses {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				must(w, w.vars.CreateSession, &pb.CreateSessionRequest{Id: "s", Ttl: durationpb.New(90 * time.Second)})
				w.register("s", "x", value("integer", "0"))
				time.Sleep(80 * time.Second)
				use(w) // expires at 170 s, so the sweep at 180 s takes it
				time.Sleep(95 * time.Second)
				synctest.Wait()
				if n := w.svc.Stats().Sessions; n != 1 {
					t.Fatalf("at 175 s the session is gone, but the sweep is at 180 s")
				}
				time.Sleep(6 * time.Second)
				synctest.Wait()
				if st := w.svc.Stats(); st.Sessions != 0 || st.Variables != 0 {
					t.Fatalf("at 181 s there are %d sessions with %d variables", st.Sessions, st.Variables)
				}
				var last *pb.Event
				for e, err := range w.log.ReadAll(w.ctx, w.log.Head()) {
					if err != nil {
						t.Fatal(err)
					}
					last = e
				}
				if last.GetSessionDeleted().GetReason() != "expired" {
					t.Errorf("the last event is %v, want the expiry", last)
				}
			})
		})
	}
}

func TestExpiredIsReadableUntilSwept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		must(w, w.vars.CreateSession, &pb.CreateSessionRequest{Id: "s", Ttl: durationpb.New(time.Second)})
		w.register("s", "x", value("integer", "0"))
		time.Sleep(30 * time.Second)
		w.holds("s", "x", "0", 0) // and used again by this
		refused(w, w.vars.CreateSession, &pb.CreateSessionRequest{Id: "s"}, outrigger.Exists, "Session already exists: s")
		time.Sleep(31 * time.Second)
		refused(w, w.vars.Get, getReq("s", "x"), outrigger.NotFound, "Session not found: s")
		w.session("s")
		if v := w.register("s", "x", value("integer", "0")); v.GetVersion().GetCounter() != 1 {
			t.Errorf("counter after the expiry is %d, want 1", v.GetVersion().GetCounter())
		}
	})
}

// A write that reaches the log before the sweep's event wins: the session stays, and a
// service that replays the log comes to the same result.
func TestRacingWriteBeatsTheSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &raceLog{Log: memory.New()}
		w := startWorld(t, log, variables.Options{})
		must(w, w.vars.CreateSession, &pb.CreateSessionRequest{Id: "s", Ttl: durationpb.New(time.Second)})
		w.register("s", "x", value("integer", "0"))
		var won atomic.Bool
		log.beforeExpiry.Store(ptr(func() {
			if _, err := w.vars.Set(w.ctx, setReq("s", "x", "7")); err != nil {
				t.Errorf("racing set: %v", err)
			}
			won.Store(true)
		}))
		time.Sleep(60500 * time.Millisecond)
		synctest.Wait()
		if !won.Load() {
			t.Fatal("the sweep did not try")
		}
		w.holds("s", "x", "7", 1)
		w.set("s", "x", "8") // the session's sequence has moved; writes go on
		w.stop()
		again := startWorld(t, log, variables.Options{})
		again.holds("s", "x", "8", 2)
	})
}

// 250 sessions expire in one sweep, in batches; one that is deleted by a client in
// between makes its batch fall back to single appends.
func TestSweepInBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &raceLog{Log: memory.New()}
		w := startWorld(t, log, variables.Options{})
		for i := range 250 {
			must(w, w.vars.CreateSession, &pb.CreateSessionRequest{Id: fmt.Sprint("s", i), Ttl: durationpb.New(time.Second)})
		}
		log.beforeExpiry.Store(ptr(func() {
			for i := range 250 {
				if i%50 == 0 {
					if _, err := w.vars.DeleteSession(w.ctx, &pb.GetSessionRequest{Id: fmt.Sprint("s", i)}); err != nil {
						t.Error(err)
					}
				}
			}
		}))
		time.Sleep(61 * time.Second)
		synctest.Wait()
		if n := w.svc.Stats().Sessions; n != 0 {
			t.Errorf("%d sessions are left", n)
		}
	})
}

// 250 sessions look expired and are removed in batches of 100. While the first batch is
// being appended all sessions are used: for the first batch that is too late, the other
// 150 sessions stay.
func TestUseBeforeItsBatchKeepsASession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &raceLog{Log: memory.New()}
		w := startWorld(t, log, variables.Options{})
		for i := range 250 {
			must(w, w.vars.CreateSession, &pb.CreateSessionRequest{Id: fmt.Sprint("s", i), Ttl: durationpb.New(2 * time.Second)})
		}
		log.beforeExpiry.Store(ptr(func() {
			for i := range 250 {
				w.svc.Touch("", fmt.Sprint("s", i), time.Now())
			}
		}))
		time.Sleep(61 * time.Second)
		synctest.Wait()
		if n := w.svc.Stats().Sessions; n != 150 {
			t.Errorf("%d sessions are left, want 150", n)
		}
	})
}

// A restart forgets reads; therefore it counts as a use.
func TestRestartDoesNotShortenLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := memory.New()
		w := startWorld(t, log, variables.Options{})
		must(w, w.vars.CreateSession, &pb.CreateSessionRequest{Id: "s", Ttl: durationpb.New(10 * time.Minute)})
		time.Sleep(9 * time.Minute)
		must(w, w.vars.GetSession, &pb.GetSessionRequest{Id: "s"})
		w.stop()
		w = startWorld(t, log, variables.Options{})
		time.Sleep(9 * time.Minute)
		must(w, w.vars.GetSession, &pb.GetSessionRequest{Id: "s"})
	})
}

// A follower with SweepEvery < 0 never removes anything.
func TestNoSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := startWorld(t, memory.New(), variables.Options{SweepEvery: -1})
		w.session("s")
		time.Sleep(24 * time.Hour)
		must(w, w.vars.GetSession, &pb.GetSessionRequest{Id: "s"})
	})
}
