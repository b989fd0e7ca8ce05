package variable_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	gstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
)

// line describes an update.
func line(u *snakepit.VariableUpdate) string {
	if u.UpdateType == "heartbeat" {
		return fmt.Sprintf("heartbeat %q", u.VariableId)
	}
	name := strings.TrimPrefix(u.VariableId, "var_")
	if u.Variable == nil {
		return fmt.Sprintf("%s %s deleted=%s", u.UpdateType, name, u.UpdateMetadata["deleted"])
	}
	return fmt.Sprintf("%s %s %s@%d", u.UpdateType, name, u.Variable.Value.Value, u.Variable.Version)
}

// The transcript of a watch: present values, changes, a deletion, a new variable, and a
// heartbeat after 30 s of silence.
func TestWatch(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		w.register("a", "float", "1")
		id := w.register("b", "float", "2")
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		stream, err := w.bridge.WatchVariables(ctx, &snakepit.WatchVariablesRequest{SessionId: "s", IncludeInitialValues: true})
		must(t, err)
		next := func(s grpc.ServerStreamingClient[snakepit.VariableUpdate], want string) *snakepit.VariableUpdate {
			t.Helper()
			u, err := s.Recv()
			if err != nil {
				t.Fatalf("%v, want %s", err, want)
			}
			if got := line(u); got != want {
				t.Fatalf("got %s, want %s", got, want)
			}
			return u
		}
		next(stream, "initial_value a_1 1@0")
		next(stream, "initial_value b_2 2@0")
		head, err := stream.Header()
		must(t, err)
		has(t, head, outrigger.HeaderTier, "origin")

		ok(w, w.bridge.SetVariable, setReq("a", "3"))
		if u := next(stream, "value_change a_1 3@1"); u.UpdateSource != "bridge" || !u.Timestamp.AsTime().Equal(time.Now()) {
			t.Errorf("change: %v", u)
		}
		ok(w, w.bridge.SetVariable, setReq("a", "3")) // the same value: not worth a message
		ok(w, w.bridge.SetVariable, setReq(id, "4"))
		next(stream, "value_change b_2 4@1")
		ok(w, w.bridge.DeleteVariable, &snakepit.DeleteVariableRequest{SessionId: "s", VariableIdentifier: "b"})
		next(stream, "value_change b_2 deleted=true")
		w.register("c", "float", "5")
		next(stream, "value_change c_3 5@0")

		quiet := time.Now()
		u := next(stream, `heartbeat ""`)
		if waited := time.Since(quiet); waited != 30*time.Second || u.Variable != nil || u.Timestamp == nil {
			t.Errorf("heartbeat after %v: %v", waited, u)
		}

		// One variable, by id, without what is there already.
		one, err := w.bridge.WatchVariables(ctx, &snakepit.WatchVariablesRequest{SessionId: "s", VariableIdentifiers: []string{"var_a_1"}})
		must(t, err)
		synctest.Wait()
		ok(w, w.bridge.SetVariable, setReq("c", "6"))
		ok(w, w.bridge.SetVariable, setReq("a", "7"))
		next(one, "value_change a_1 7@3")

		// The end of the session ends the watch; so does leaving.
		ok(w, w.bridge.CleanupSession, &snakepit.CleanupSessionRequest{SessionId: "s"})
		next(one, "value_change a_1 deleted=true")
		if _, err := one.Recv(); gstatus.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "Session not found: s") {
			t.Errorf("end: %v", err)
		}
	})
}

func TestWatchRefused(t *testing.T) {
	for _, auto := range []bool{false, true} {
		inWorld(t, worldOptions{autoCreate: auto}, func(t *testing.T, w *world) {
			open := func(r *snakepit.WatchVariablesRequest, kv ...string) error {
				ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), kv...))
				defer cancel()
				s, err := w.bridge.WatchVariables(ctx, r)
				must(t, err)
				_, err = s.Recv()
				return err
			}
			want, text := codes.NotFound, "Session not found: s"
			if auto {
				text = "Variable not found: x"
			}
			if err := open(&snakepit.WatchVariablesRequest{SessionId: "s", VariableIdentifiers: []string{"x"}}); gstatus.Code(err) != want || !strings.Contains(err.Error(), text) {
				t.Errorf("auto %v: %v", auto, err)
			}
			if err := open(&snakepit.WatchVariablesRequest{SessionId: ""}); gstatus.Code(err) != codes.InvalidArgument {
				t.Errorf("no session: %v", err)
			}
			if err := open(&snakepit.WatchVariablesRequest{SessionId: "s"}, outrigger.HeaderConsistency, "soon"); gstatus.Code(err) != codes.InvalidArgument {
				t.Errorf("bad consistency: %v", err)
			}
		})
	}
}

// A watch has no end of its own: the authority's and the sidecar's are errors that tell
// the watcher to come back.
func TestWatchEndsWithTheSidecar(t *testing.T) {
	inWorld(t, worldOptions{autoCreate: true}, func(t *testing.T, w *world) {
		bridge, err := w.bridge.WatchVariables(context.Background(), &snakepit.WatchVariablesRequest{SessionId: "s"})
		must(t, err)
		native, err := w.native.Watch(context.Background(), &pb.WatchRequest{Session: "s"})
		must(t, err)
		synctest.Wait()
		close(w.draining)
		_, err1 := bridge.Recv()
		_, err2 := native.Recv()
		for _, err := range []error{err1, err2} {
			if gstatus.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "shutting down") {
				t.Errorf("draining: %v", err)
			}
		}
	})
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		stream, err := w.bridge.WatchVariables(context.Background(), &snakepit.WatchVariablesRequest{SessionId: "s"})
		must(t, err)
		synctest.Wait()
		w.stopAuthority()
		if _, err := stream.Recv(); gstatus.Code(err) != codes.Unavailable {
			t.Errorf("authority gone: %v", err)
		}
	})
}
