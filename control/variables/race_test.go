package variables_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/variables"
)

// raceLog lets a test act between the decision of a write and its append.
type raceLog struct {
	eventlog.Log
	beforeExpiry atomic.Pointer[func()] // called once, before the sweep's first append
	beforeAppend atomic.Pointer[func()] // called once, before any append
}

func (l *raceLog) Append(ctx context.Context, requestID string, writes ...eventlog.Write) (eventlog.Appended, error) {
	for _, w := range writes {
		if len(w.Events) == 1 && w.Events[0].GetSessionDeleted().GetReason() == "expired" {
			if f := l.beforeExpiry.Swap(nil); f != nil {
				(*f)()
			}
		}
	}
	if f := l.beforeAppend.Swap(nil); f != nil {
		(*f)()
	}
	return l.Log.Append(ctx, requestID, writes...)
}

// 16 writers do 10 successful compare-and-sets each on one counter, rereading after
// every conflict. Every success is counted exactly once in the value and the version.
func TestCompareAndSetRace(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	w.register("s", "n", value("integer", "0"))
	const writers, each = 16, 10
	var wg sync.WaitGroup
	var conflicts atomic.Int64
	for range writers {
		wg.Go(func() {
			for won := 0; won < each; {
				v, err := w.vars.Get(w.ctx, getReq("s", "n"))
				if err != nil {
					t.Error(err)
					return
				}
				var n int
				fmt.Sscan(string(v.GetValue().GetJson()), &n)
				req := setReq("s", "n", fmt.Sprint(n+1))
				req.ExpectedVersion = &v.GetVersion().Counter
				_, err = call(w.ctx, w.vars.Set, req)
				switch {
				case err == nil:
					won++
				case outrigger.IsKind(err, outrigger.Conflict):
					conflicts.Add(1)
				default:
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	w.holds("s", "n", fmt.Sprint(writers*each), writers*each)
	if got := w.log.Head(); got != 2+writers*each {
		t.Errorf("the log has %d events, want %d", got, 2+writers*each)
	}
	if conflicts.Load() == 0 {
		t.Error("16 writers never met; the test shows nothing")
	}
}

// One round: 16 writers expect the same version; exactly one wins, the others are told
// the version it made.
func TestOneWinnerPerVersion(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	w.register("s", "n", value("integer", "0"))
	for round := range int32(20) {
		var wg sync.WaitGroup
		var wins atomic.Int64
		for i := range 16 {
			wg.Go(func() {
				req := setReq("s", "n", fmt.Sprint(i))
				req.ExpectedVersion = &round
				_, err := call(w.ctx, w.vars.Set, req)
				if err == nil {
					wins.Add(1)
				} else if want := fmt.Sprintf("version_mismatch: current=%d", round+1); err.Error() != want {
					t.Errorf("loser got %v, want %s", err, want)
				}
			})
		}
		wg.Wait()
		if wins.Load() != 1 {
			t.Fatalf("round %d had %d winners", round, wins.Load())
		}
	}
}

// Two services over one log (no shared gates): unconditional writers of one key all get
// through, each version once.
func TestTwoServicesOneLog(t *testing.T) {
	log := memory.New()
	a, b := startWorld(t, log, variables.Options{}), startWorld(t, log, variables.Options{SweepEvery: -1})
	a.session("s")
	a.register("s", "n", value("integer", "0"))
	must(b, b.coh.Read, &pb.ReadRequest{MinPosition: log.Head()}) // b has caught up
	const writers, each = 4, 20
	seen := make([]atomic.Int64, 2*writers*each+1)
	var wg sync.WaitGroup
	for _, w := range []*world{a, b} {
		for range writers {
			wg.Go(func() {
				for range each {
					v, err := call(w.ctx, w.vars.Set, setReq("s", "n", "1"))
					if err != nil {
						t.Error(err)
						return
					}
					seen[v.GetVersion().GetCounter()].Add(1)
				}
			})
		}
	}
	wg.Wait()
	for i := 1; i < len(seen); i++ {
		if n := seen[i].Load(); n != 1 {
			t.Errorf("version %d was acknowledged %d times", i, n)
		}
	}
}

// A set whose session is deleted, or deleted and created again, between decision and
// append must not land in the log.
func TestSetNeverLandsInADeadSession(t *testing.T) {
	for _, recreate := range []bool{false, true} {
		log := &raceLog{Log: memory.New()}
		w := startWorld(t, log, variables.Options{})
		w.session("s")
		w.register("s", "x", value("integer", "0"))
		log.beforeAppend.Store(ptr(func() {
			must(w, w.vars.DeleteSession, &pb.GetSessionRequest{Id: "s"})
			if recreate {
				w.session("s")
			}
		}))
		want := "Session not found: s"
		if recreate {
			want = "Variable not found: x"
		}
		refused(w, w.vars.Set, setReq("s", "x", "1"), outrigger.NotFound, want)
		for e, err := range log.Read(w.ctx, "var/default/s/x", 1) {
			if err != nil || e.GetVariableSet() != nil {
				t.Errorf("the log holds %v, %v", e, err)
			}
		}
	}
}

// An atomic batch that loses a race for one of its variables is decided again as a whole.
func TestBatchIsDecidedAgain(t *testing.T) {
	log := &raceLog{Log: memory.New()}
	w := startWorld(t, log, variables.Options{})
	w.session("s")
	w.register("s", "a", value("integer", "0"))
	w.register("s", "b", value("integer", "0"))
	rival := startWorld(t, log.Log, variables.Options{SweepEvery: -1})
	log.beforeAppend.Store(ptr(func() { rival.set("s", "b", "5") }))
	req := &pb.BatchSetRequest{Session: "s", Atomic: true, Items: []*pb.SetItem{
		{Identifier: "a", Value: &pb.Value{Json: []byte("1")}},
		{Identifier: "b", Value: &pb.Value{Json: []byte("1")}, ExpectedVersion: ptr[int32](0)},
	}}
	got := must(w, w.vars.BatchSet, req)
	if e := got.GetErrors()["b"]; e.GetKind() != "conflict" || e.GetCurrentVersion() != 1 || len(got.GetVariables()) != 0 {
		t.Errorf("batch %v, want a conflict with version 1 and nothing written", got)
	}
	w.holds("s", "a", "0", 0)
	w.holds("s", "b", "5", 1)
}

// Registrations race for names and create the session together: each name once, all ids
// different.
func TestRegisterRace(t *testing.T) {
	w := newWorld(t)
	var wg sync.WaitGroup
	var exists atomic.Int64
	for i := range 64 {
		wg.Go(func() {
			_, err := call(w.ctx, w.vars.Register, &pb.RegisterRequest{
				Key: &pb.Key{Session: "s", Name: fmt.Sprint("v", i/2)}, Value: value("integer", "0"), Options: &pb.WriteOptions{AutoCreateSession: true},
			})
			if outrigger.IsKind(err, outrigger.Exists) {
				exists.Add(1)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if exists.Load() != 32 {
		t.Errorf("%d registrations were told the name exists, want 32", exists.Load())
	}
	numbers := make(map[string]string)
	for _, v := range must(w, w.vars.List, &pb.ListRequest{Session: "s"}).GetVariables() {
		n := v.GetId()[len("var_")+len(v.GetKey().GetName())+1:]
		if other, twice := numbers[n]; twice {
			t.Errorf("%s and %s share the number %s", other, v.GetId(), n)
		}
		numbers[n] = v.GetId()
	}
	if len(numbers) != 32 {
		t.Errorf("%d variables, want 32", len(numbers))
	}
}
