package variables_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/status"
)

type watching struct {
	t      testing.TB
	stream grpc.ServerStreamingClient[pb.WatchEvent]
	close  func()
}

func (w *world) watch(req *pb.WatchRequest) *watching {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.ctx)
	stream, err := w.vars.Watch(ctx, req)
	if err != nil {
		w.t.Fatal(err)
	}
	return &watching{t: w.t, stream: stream, close: cancel}
}

func (w *watching) expect(lines ...string) {
	w.t.Helper()
	for _, want := range lines {
		e, err := w.stream.Recv()
		got := ""
		switch {
		case err != nil:
			got = status.FromGRPC(err, nil).Error()
		case e.GetType() == pb.WatchEvent_HEARTBEAT:
			got = "HEARTBEAT"
		default:
			v := e.GetVariable()
			got = fmt.Sprintf("%v %s=%s@%d %s", e.GetType(), v.GetKey().GetName(), v.GetValue().GetJson(), v.GetVersion().GetCounter(), e.GetActor())
		}
		if got != want {
			w.t.Fatalf("received %q, want %q", got, want)
		}
	}
}

// The whole life of a watch on two of three variables.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.session("s")
		for _, n := range []string{"a", "b", "c"} {
			w.register("s", n, value("integer", "0"))
		}
		x := w.watch(&pb.WatchRequest{Session: "s", Identifiers: []string{"var_b_2", "a"}, IncludeInitial: true})
		x.expect("INITIAL a=0@0 ", "INITIAL b=0@0 ")
		w.set("s", "c", "1") // not watched
		w.set("s", "a", "0") // unchanged
		req := setReq("s", "b", "5")
		req.Options = &pb.WriteOptions{Actor: "ann"}
		must(w, w.vars.Set, req)
		x.expect("CHANGED b=5@1 ann")
		must(w, w.vars.Delete, getReq("s", "a"))
		x.expect("DELETED a=@2 API")
		w.register("s", "a", value("integer", "0"))
		x.expect("CHANGED a=0@3 API")
		start := time.Now()
		x.expect("HEARTBEAT", "HEARTBEAT")
		if d := time.Since(start); d != time.Minute {
			t.Errorf("two heartbeats took %v, want 1m", d)
		}
		must(w, w.vars.DeleteSession, &pb.GetSessionRequest{Id: "s"})
		x.expect("DELETED a=@3 API", "DELETED b=@1 API", "Session not found: s")
	})
}

// Watching a whole session covers variables registered later; without initial values the
// present ones still count as known.
func TestWatchSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.session("s")
		w.register("s", "a", value("integer", "0"))
		x := w.watch(&pb.WatchRequest{Session: "s"})
		synctest.Wait()
		w.set("s", "a", "0")
		w.register("s", "b", value("integer", "1"))
		x.expect("CHANGED b=1@0 API")
		x.close()
		synctest.Wait()
		if n := w.svc.Stats().Watches; n != 0 {
			t.Errorf("%d watches after the client went away", n)
		}
		for text, req := range map[string]*pb.WatchRequest{
			"Session not found: t":  {Session: "t"},
			"Variable not found: x": {Session: "s", Identifiers: []string{"x"}},
		} {
			w.watch(req).expect(text)
		}
	})
}

// A watcher that does not read while a value changes 1,000 times gets the last one, and
// far fewer messages than changes.
func TestSlowWatcherCoalesces(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	w.register("s", "a", value("string", `"start"`))
	w.register("s", "b", value("integer", "0"))
	x := w.watch(&pb.WatchRequest{Session: "s", IncludeInitial: true})
	x.expect(`INITIAL a="start"@0 `, "INITIAL b=0@0 ")
	w.set("s", "b", "1") // must survive everything that follows
	pad := make([]byte, 4000)
	for i := range pad {
		pad[i] = 'v'
	}
	const writes = 1000
	for i := range writes {
		w.set("s", "a", fmt.Sprintf(`"%d%s"`, i, pad))
	}
	messages, sawB := 0, false
	for {
		e, err := x.stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		messages++
		sawB = sawB || e.GetVariable().GetKey().GetName() == "b"
		if e.GetVariable().GetVersion().GetCounter() == writes {
			break
		}
	}
	if !sawB || messages > writes/2 {
		t.Errorf("%d messages for %d writes, b seen: %v", messages, writes, sawB)
	}
}

func TestWatchKeepsTheSessionAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.session("s")
		x := w.watch(&pb.WatchRequest{Session: "s"})
		time.Sleep(3 * outrigger.DefaultSessionTTL)
		must(w, w.vars.GetSession, &pb.GetSessionRequest{Id: "s"})
		x.close()
		time.Sleep(2 * outrigger.DefaultSessionTTL)
		refused(w, w.vars.GetSession, &pb.GetSessionRequest{Id: "s"}, outrigger.NotFound, "Session not found: s")
	})
}
