package variable_test

import (
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
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
	"github.com/outrigger-mesh/outrigger/api/snakepit"
	"github.com/outrigger-mesh/outrigger/cache"
	"github.com/outrigger-mesh/outrigger/internal/status"
	"github.com/outrigger-mesh/outrigger/proxy/variable"
)

// Every call of the native service, through the sidecar.
func TestNative(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		ok(w, w.native.CreateSession, &pb.CreateSessionRequest{Id: "s"})
		val := func(json string) *pb.Value { return &pb.Value{Type: "float", Json: []byte(json)} }
		g := call(w, w.native.Register, &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: val("1")})
		must(t, g.err)
		has(t, g.head, outrigger.HeaderTier, "origin", outrigger.HeaderVersion, "0", outrigger.HeaderDot, "*")
		v := ok(w, w.native.Set, &pb.SetRequest{Session: "s", Identifier: "x", Value: val("2")})
		if v.Version.Counter != 1 {
			t.Errorf("set: %v", v)
		}
		g = call(w, w.native.Get, &pb.GetRequest{Session: "s", Identifier: v.Id})
		if g.err != nil || string(g.value.Value.Json) != "2" || g.value.Version.Counter != 1 {
			t.Errorf("get: %v, %v", g.value, g.err)
		}
		has(t, g.head, outrigger.HeaderTier, "*", outrigger.HeaderFeed, "live", outrigger.HeaderVersion, "1")
		// A conflict keeps its kind and the present version.
		expected := int32(0)
		var trailer metadata.MD
		_, err := w.native.Set(context.Background(), &pb.SetRequest{Session: "s", Identifier: "x", Value: val("3"), ExpectedVersion: &expected}, grpc.Trailer(&trailer))
		var conflict *outrigger.Error
		if err = status.FromGRPC(err, trailer); !errors.As(err, &conflict) || conflict.Kind != outrigger.Conflict || conflict.Current != 1 {
			t.Errorf("conflict: %#v", err)
		}
		many := call(w, w.native.BatchGet, &pb.BatchGetRequest{Session: "s", Identifiers: []string{"x", "y", v.Id}})
		if many.err != nil || len(many.value.Variables) != 2 || strings.Join(many.value.Missing, ",") != "y" {
			t.Errorf("batch get: %v, %v", many.value, many.err)
		}
		has(t, many.head, outrigger.HeaderTier, "*", outrigger.HeaderFeed, "live")
		b := call(w, w.native.BatchSet, &pb.BatchSetRequest{Session: "s", Items: []*pb.SetItem{{Identifier: "x", Value: val("4")}}})
		if b.err != nil || b.value.Variables["x"].Version.Counter != 2 {
			t.Errorf("batch set: %v, %v", b.value, b.err)
		}
		has(t, b.head, outrigger.HeaderTier, "origin")
		if l := ok(w, w.native.List, &pb.ListRequest{Session: "s", Pattern: "*"}); len(l.Variables) != 1 {
			t.Errorf("list: %v", l)
		}
		if h := ok(w, w.native.History, &pb.HistoryRequest{Session: "s", Identifier: "x", Limit: 10}); len(h.Entries) != 3 {
			t.Errorf("history: %v", h)
		}
		if v := ok(w, w.native.Rollback, &pb.RollbackRequest{Session: "s", Identifier: "x", TargetVersion: 0}); v.Version.Counter != 3 || string(v.Value.Json) != "1" {
			t.Errorf("rollback: %v", v)
		}
		if s := ok(w, w.native.GetSession, &pb.GetSessionRequest{Id: "s"}); s.VariableCount != 1 {
			t.Errorf("session: %v", s)
		}
		if s := ok(w, w.native.ListSessions, &pb.ListSessionsRequest{}); len(s.Sessions) != 1 {
			t.Errorf("sessions: %v", s)
		}
		if s := ok(w, w.native.TouchSessions, &pb.TouchSessionsRequest{Ids: []string{"s", "t"}}); strings.Join(s.Unknown, ",") != "t" {
			t.Errorf("touch: %v", s)
		}
		d := call(w, w.native.Delete, &pb.GetRequest{Session: "s", Identifier: "x"})
		must(t, d.err)
		has(t, d.head, outrigger.HeaderVersion, "*")
		refused(w, w.native.Get, &pb.GetRequest{Session: "s", Identifier: "x"}, codes.NotFound, "Variable not found: x")
		refused(w, w.native.Get, &pb.GetRequest{Session: "s", Identifier: "x"}, codes.InvalidArgument, "consistency", outrigger.HeaderConsistency, "x")
		refused(w, w.native.BatchGet, &pb.BatchGetRequest{Session: "s", Identifiers: make([]string, 1001)}, codes.ResourceExhausted, "identifiers has 1001")
		last := call(w, w.native.DeleteSession, &pb.GetSessionRequest{Id: "s"})
		must(t, last.err)
		if last.value.VariablesRemoved != 0 || last.value.Gone.GetPosition() == 0 {
			t.Errorf("delete session: %v", last.value)
		}
		has(t, last.head, outrigger.HeaderToken, "*")
		if first(last.head, outrigger.HeaderToken) == first(d.head, outrigger.HeaderToken) {
			t.Error("the token of the deletion says no more than the one before")
		}
	})
}

// slow is a Reader whose answers take a while, as those of an origin far away do.
type slow struct {
	variable.Reader
	delay         time.Duration
	now, most     atomic.Int64
	reads         atomic.Int64
	fail          string // this name cannot be read
	near, session bool   // answers come from this process; the session exists
}

func (s *slow) Get(ctx context.Context, r cache.Request) (cache.Answer, error) {
	s.reads.Add(1)
	n := s.now.Add(1)
	defer s.now.Add(-1)
	for m := s.most.Load(); n > m && !s.most.CompareAndSwap(m, n); m = s.most.Load() {
	}
	if r.Key.Name == s.fail {
		return cache.Answer{}, outrigger.Errorf(outrigger.Unavailable, "%s is out of reach", r.Key.Name)
	}
	if s.near {
		return cache.Answer{Tier: outrigger.TierProcess, FeedLive: true, SessionExists: s.session}, nil
	}
	t := time.NewTimer(s.delay)
	defer t.Stop()
	select {
	case <-t.C:
		return cache.Answer{Tier: outrigger.TierOrigin, FeedLive: true, SessionExists: s.session, Age: 1500 * time.Microsecond}, nil
	case <-ctx.Done():
		return cache.Answer{}, outrigger.Wrap(outrigger.Cancelled, ctx.Err(), "read")
	}
}

// Misses of a batch wait side by side, a bounded number at a time; hits stay on one
// goroutine; one failure ends the batch without waiting for the rest.
func TestBatchReadsInParallel(t *testing.T) {
	s := &slow{delay: 100 * time.Millisecond, session: true}
	inWorld(t, worldOptions{reader: func(r variable.Reader) variable.Reader { s.Reader = r; return s }}, func(t *testing.T, w *world) {
		names := make([]string, 161)
		for i := range names {
			names[i] = fmt.Sprint("n", i)
		}
		req := &snakepit.BatchGetVariablesRequest{SessionId: "s", VariableIdentifiers: names}
		start := time.Now()
		g := call(w, w.bridge.GetVariables, req)
		if g.err != nil || len(g.value.MissingVariables) != 161 || g.value.MissingVariables[160] != "n160" {
			t.Fatalf("%v, %v", len(g.value.GetMissingVariables()), g.err)
		}
		// One to learn that the origin is far, then sixteen at a time.
		if took := time.Since(start); took != 1100*time.Millisecond || s.most.Load() != 16 || s.reads.Load() != 161 {
			t.Errorf("%d reads took %v, %d at a time", s.reads.Load(), took, s.most.Load())
		}
		// The first answer has waited for the last.
		has(t, g.head, outrigger.HeaderTier, "origin", outrigger.HeaderAge, "1002")

		s.near = true
		s.most.Store(0)
		if g := call(w, w.bridge.GetVariables, req); g.err != nil || s.most.Load() != 1 {
			t.Errorf("hits were read %d at a time, %v", s.most.Load(), g.err)
		}
		s.near, s.fail = false, "n20"
		s.reads.Store(0)
		start = time.Now()
		refused(w, w.bridge.GetVariables, req, codes.Unavailable, "n20 is out of reach")
		if took := time.Since(start); took > 300*time.Millisecond || s.reads.Load() > 60 {
			t.Errorf("the failure took %v and %d reads", took, s.reads.Load())
		}
		// A caller that gives up ends its reads.
		s.fail, s.delay = "", time.Hour
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if _, err := w.bridge.GetVariables(ctx, req); gstatus.Code(err) != codes.DeadlineExceeded {
			t.Errorf("giving up: %v", err)
		}
	})
}

// A batch in a session that does not exist creates it once, not once per miss.
func TestBatchCreatesSessionOnce(t *testing.T) {
	s := &slow{delay: time.Millisecond}
	inWorld(t, worldOptions{autoCreate: true, reader: func(r variable.Reader) variable.Reader { s.Reader = r; return s }}, func(t *testing.T, w *world) {
		before := w.log.Head()
		ok(w, w.bridge.GetVariables, &snakepit.BatchGetVariablesRequest{SessionId: "s", VariableIdentifiers: []string{"a", "b", "c", "d"}})
		if n := w.log.Head() - before; n != 1 {
			t.Errorf("%d events for one new session", n)
		}
	})
}

func TestCountersAndConcurrency(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		w.register("x", "float", "1")
		w.get("x")
		time.Sleep(time.Second)
		synctest.Wait()
		w.get("x")
		p0 := w.counts.Process.Load()
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				for range 50 {
					if _, err := w.bridge.GetVariable(context.Background(), getReq("x")); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		all.Wait()
		if got := w.counts.Process.Load() - p0; got != 400 {
			t.Errorf("%d of 400 reads counted for the process tier", got)
		}
		e0 := w.counts.Errors.Load()
		refused(w, w.bridge.GetVariable, getReq(""), codes.InvalidArgument, "")
		if w.counts.Errors.Load() != e0+1 {
			t.Error("a refused read is not counted")
		}
	})
}

var update = flag.Bool("update", false, "write golden files")

// The bytes of the bridge's answers, as a client of the published protocol gets them.
func TestGoldenAnswers(t *testing.T) {
	inWorld(t, worldOptions{autoCreate: true}, func(t *testing.T, w *world) {
		var out strings.Builder
		exchange := func(method string, req proto.Message) {
			in, err := proto.MarshalOptions{Deterministic: true}.Marshal(req)
			must(t, err)
			var answer []byte
			err = w.conn.Invoke(context.Background(), "/snakepit.bridge.BridgeService/"+method, &in, &answer, grpc.ForceCodecV2(raw{}))
			// The first read has its session's changes followed; from_cache of what is written
			// before the authority has answered that depends on who was faster.
			synctest.Wait()
			fmt.Fprintf(&out, "%s\n> %s\n", method, hex.EncodeToString(in))
			if err != nil {
				s := gstatus.Convert(err)
				fmt.Fprintf(&out, "! %s %s\n\n", s.Code(), s.Message())
				return
			}
			fmt.Fprintf(&out, "< %s\n\n", canonical(t, method, answer))
		}
		exchange("GetExposedElixirTools", &snakepit.GetSessionRequest{SessionId: "s"})
		exchange("GetVariable", getReq("temperature"))
		exchange("RegisterVariable", &snakepit.RegisterVariableRequest{SessionId: "s", Name: "temperature", Type: "float", InitialValue: value("float", "0.7"), ConstraintsJson: `{"min":0,"max":2}`})
		exchange("RegisterVariable", &snakepit.RegisterVariableRequest{SessionId: "s", Name: "temperature", Type: "float", InitialValue: value("float", "0.7")})
		exchange("GetVariable", getReq("temperature"))
		exchange("SetVariable", setReq("var_temperature_1", "0.9"))
		exchange("SetVariable", setReq("temperature", "2.5"))
		exchange("SetVariable", &snakepit.SetVariableRequest{SessionId: "s", VariableIdentifier: "temperature", Value: value("float", "1"), ExpectedVersion: 9})
		exchange("GetVariables", &snakepit.BatchGetVariablesRequest{SessionId: "s", VariableIdentifiers: []string{"temperature", "none"}})
		exchange("ListVariables", &snakepit.ListVariablesRequest{SessionId: "s", Pattern: "*"})
		exchange("InitializeSession", &snakepit.InitializeSessionRequest{SessionId: "s"})
		exchange("GetSession", &snakepit.GetSessionRequest{SessionId: "none"})
		exchange("CleanupSession", &snakepit.CleanupSessionRequest{SessionId: "s"})

		const file = "testdata/answers.txt"
		if *update {
			must(t, os.MkdirAll("testdata", 0o755))
			must(t, os.WriteFile(file, []byte(out.String()), 0o644))
		}
		want, err := os.ReadFile(file)
		must(t, err)
		if out.String() != string(want) {
			t.Errorf("answers changed (see -update):\n%s", out.String())
		}
	})
}

// canonical sorts the entries of maps, which protobuf writes in any order, and proves
// that nothing but their order was changed: the lengths are equal, and no field is
// unknown.
func canonical(t *testing.T, method string, answer []byte) string {
	t.Helper()
	m := map[string]proto.Message{"RegisterVariable": &snakepit.RegisterVariableResponse{}, "GetVariable": &snakepit.GetVariableResponse{},
		"SetVariable": &snakepit.SetVariableResponse{}, "GetVariables": &snakepit.BatchGetVariablesResponse{}, "ListVariables": &snakepit.ListVariablesResponse{},
		"CleanupSession": &snakepit.CleanupSessionResponse{}}[method]
	if m == nil {
		return hex.EncodeToString(answer)
	}
	must(t, proto.Unmarshal(answer, m))
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	must(t, err)
	if len(b) != len(answer) || len(m.ProtoReflect().GetUnknown()) != 0 {
		t.Errorf("%s: %x is not canonical", method, answer)
	}
	return hex.EncodeToString(b)
}
