package variable_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/api/snakepit"
)

func TestSessions(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		if p := ok(w, w.bridge.Ping, &snakepit.PingRequest{Message: "hi"}); p.Message != "hi" || !p.ServerTime.AsTime().Equal(time.Now()) {
			t.Errorf("ping: %v", p)
		}
		start := time.Now()
		init := ok(w, w.bridge.InitializeSession, &snakepit.InitializeSessionRequest{SessionId: "s", Metadata: map[string]string{"k": "v"},
			Config: &snakepit.SessionConfig{EnableCaching: true, CacheTtlSeconds: 9}})
		if !init.Success || init.ErrorMessage != "" || len(init.InitialVariables) != 0 {
			t.Errorf("initialize: %v", init)
		}
		refused(w, w.bridge.InitializeSession, &snakepit.InitializeSessionRequest{SessionId: "s"}, codes.AlreadyExists, "Session already exists: s")
		refused(w, w.bridge.InitializeSession, &snakepit.InitializeSessionRequest{SessionId: ""}, codes.InvalidArgument, "empty")

		w.register("x", "float", "1")
		w.register("y", "string", `"a"`)
		g := call(w, w.bridge.GetSession, &snakepit.GetSessionRequest{SessionId: "s"})
		if s := g.value; s.SessionId != "s" || s.VariableCount != 2 || s.Metadata["k"] != "v" || !s.CreatedAt.AsTime().Equal(start) {
			t.Errorf("session: %v, %v", s, g.err)
		}
		has(t, g.head, outrigger.HeaderTier, "origin")
		refused(w, w.bridge.GetSession, &snakepit.GetSessionRequest{SessionId: "none"}, codes.NotFound, "Session not found: none")

		if h := ok(w, w.bridge.Heartbeat, &snakepit.HeartbeatRequest{SessionId: "s"}); !h.SessionValid || h.ServerTime == nil {
			t.Errorf("heartbeat: %v", h)
		}
		if h := ok(w, w.bridge.Heartbeat, &snakepit.HeartbeatRequest{SessionId: "none"}); h.SessionValid {
			t.Errorf("heartbeat of nobody: %v", h)
		}
		c := call(w, w.bridge.CleanupSession, &snakepit.CleanupSessionRequest{SessionId: "s"})
		must(t, c.err)
		if !c.value.Success || c.value.ResourcesCleaned != 2 {
			t.Errorf("cleanup: %v", c.value)
		}
		has(t, c.head, outrigger.HeaderToken, "*")
		if c := ok(w, w.bridge.CleanupSession, &snakepit.CleanupSessionRequest{SessionId: "s", Force: true}); !c.Success || c.ResourcesCleaned != 0 {
			t.Errorf("second cleanup: %v", c)
		}
		refused(w, w.bridge.GetVariable, getReq("x"), codes.NotFound, "Session not found: s")
	})
}

// Every type of the protocol goes in and comes out, under both type URLs.
func TestTypes(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		for _, tt := range []struct{ kind, in, out, constraints string }{
			{"float", "0.7", "0.7", `{"min":0,"max":2}`}, {"float", "3", "3", ""}, {"float", `"NaN"`, `"NaN"`, ""},
			{"integer", "3", "3", `{"min":1}`}, {"string", `"hi <&>"`, `"hi <&>"`, `{"max_length":10}`},
			{"boolean", "true", "true", ""}, {"choice", `"a"`, `"a"`, `{"choices":["a","b"]}`}, {"module", `"Predict"`, `"Predict"`, ""},
			{"embedding", "[1.0,2.5]", "[1.0,2.5]", ""}, {"tensor", `{"shape":[2],"data":[1,2]}`, `{"shape":[2],"data":[1,2]}`, ""},
		} {
			name := fmt.Sprintf("%s-%d", tt.kind, len(tt.in))
			r := ok(w, w.bridge.RegisterVariable, &snakepit.RegisterVariableRequest{SessionId: "s", Name: name, Type: tt.kind,
				InitialValue: value(tt.kind, tt.in), ConstraintsJson: tt.constraints, Metadata: map[string]string{"m": "1"}})
			v := w.get(name)
			if v.Id != r.VariableId || v.Name != name || v.Type != tt.kind || v.Value.TypeUrl != "type.googleapis.com/snakepit."+tt.kind ||
				string(v.Value.Value) != tt.out || v.ConstraintsJson != tt.constraints || v.Source != snakepit.Variable_PYTHON || v.Metadata["m"] != "1" ||
				!v.LastUpdatedAt.AsTime().Equal(time.Now()) || v.Version != 0 {
				t.Errorf("%s %s: %v", tt.kind, tt.in, v)
			}
		}
		// The type may be named by the URL alone, in the old form too.
		for i, url := range []string{"type.googleapis.com/snakepit.integer", "dspex.variables/integer"} {
			name := fmt.Sprint("by-url-", i)
			ok(w, w.bridge.RegisterVariable, &snakepit.RegisterVariableRequest{SessionId: "s", Name: name, InitialValue: &anypb.Any{TypeUrl: url, Value: []byte("7")}})
			if v := w.get(name); v.Type != "integer" {
				t.Errorf("%s: %v", url, v)
			}
			if s := ok(w, w.bridge.SetVariable, &snakepit.SetVariableRequest{SessionId: "s", VariableIdentifier: name, Value: &anypb.Any{TypeUrl: url, Value: []byte("8")}}); s.NewVersion != 1 {
				t.Errorf("set by %s: %v", url, s)
			}
		}
		// The declared type decides, whatever the setter takes the value for: Python sends 1
		// as an integer.
		w.register("f", "float", "0.5")
		ok(w, w.bridge.SetVariable, &snakepit.SetVariableRequest{SessionId: "s", VariableIdentifier: "f", Value: value("integer", "1")})
		w.holds("f", "1", 1)
		for _, tt := range []struct {
			req  *snakepit.RegisterVariableRequest
			code codes.Code
			text string
		}{
			{&snakepit.RegisterVariableRequest{SessionId: "s", Name: "a", Type: "float", InitialValue: value("float", "1.5"), ConstraintsJson: `{"max":1}`}, codes.InvalidArgument, "value 1.5 is above maximum 1.0"},
			{&snakepit.RegisterVariableRequest{SessionId: "s", Name: "a", Type: "float", InitialValue: value("float", `"x"`)}, codes.InvalidArgument, "x"},
			{&snakepit.RegisterVariableRequest{SessionId: "s", Name: "a", Type: "nosuch", InitialValue: value("float", "1")}, codes.InvalidArgument, "nosuch"},
			{&snakepit.RegisterVariableRequest{SessionId: "s", Name: "a", Type: "float"}, codes.InvalidArgument, "no value"},
			{&snakepit.RegisterVariableRequest{SessionId: "s", Name: "a/b", Type: "float", InitialValue: value("float", "1")}, codes.InvalidArgument, "'/'"},
			{&snakepit.RegisterVariableRequest{SessionId: "s", Name: "f", Type: "float", InitialValue: value("float", "1")}, codes.AlreadyExists, "Variable already exists: f"},
			{&snakepit.RegisterVariableRequest{SessionId: "none", Name: "a", Type: "float", InitialValue: value("float", "1")}, codes.NotFound, "Session not found: none"},
		} {
			refused(w, w.bridge.RegisterVariable, tt.req, tt.code, tt.text)
		}
	})
}

func TestSet(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		r := ok(w, w.bridge.RegisterVariable, &snakepit.RegisterVariableRequest{SessionId: "s", Name: "x", Type: "float", InitialValue: value("float", "0.5"), ConstraintsJson: `{"max":1}`})
		g := call(w, w.bridge.SetVariable, setReq("x", "0.6"))
		if g.err != nil || !g.value.Success || g.value.NewVersion != 1 {
			t.Fatalf("set: %v, %v", g.value, g.err)
		}
		has(t, g.head, outrigger.HeaderTier, "origin", outrigger.HeaderVersion, "1", outrigger.HeaderDot, "*")
		if s := ok(w, w.bridge.SetVariable, setReq(r.VariableId, "0.7")); s.NewVersion != 2 {
			t.Errorf("set by id: %v", s)
		}
		w.holds("x", "0.7", 2)

		// Compare-and-set: the field from 1 on, the metadata key from 0 on.
		stale := setReq("x", "0.8")
		stale.ExpectedVersion = 1
		if s := ok(w, w.bridge.SetVariable, stale); s.Success || s.NewVersion != 2 || !strings.HasPrefix(s.ErrorMessage, "version_mismatch: current=2") {
			t.Errorf("stale set: %v", s)
		}
		stale = setReq("x", "0.8")
		stale.Metadata = map[string]string{"expected_version": "0"}
		if s := ok(w, w.bridge.SetVariable, stale); s.Success || s.NewVersion != 2 || !strings.Contains(s.ErrorMessage, "version_mismatch") {
			t.Errorf("stale set by metadata: %v", s)
		}
		right := setReq("x", "0.8")
		right.Metadata = map[string]string{"expected_version": "2", "why": "tuned"}
		if s := ok(w, w.bridge.SetVariable, right); !s.Success || s.NewVersion != 3 {
			t.Errorf("right version: %v", s)
		}
		if v := w.get("x"); v.Metadata["why"] != "tuned" || v.Metadata["expected_version"] != "" {
			t.Errorf("metadata %v", v.Metadata)
		}
		right = setReq("x", "0.9")
		right.ExpectedVersion = 3
		if s := ok(w, w.bridge.SetVariable, right); !s.Success || s.NewVersion != 4 {
			t.Errorf("right version: %v", s)
		}
		for _, bad := range []string{"x", "-1", "", "99999999999"} {
			q := setReq("x", "0.1")
			q.Metadata = map[string]string{"expected_version": bad}
			refused(w, w.bridge.SetVariable, q, codes.InvalidArgument, "expected_version")
		}
		q := setReq("x", "0.1")
		q.ExpectedVersion = -1
		refused(w, w.bridge.SetVariable, q, codes.InvalidArgument, "expected_version is -1")

		refused(w, w.bridge.SetVariable, setReq("x", "1.5"), codes.InvalidArgument, "value 1.5 is above maximum 1.0")
		refused(w, w.bridge.SetVariable, setReq("y", "1"), codes.NotFound, "Variable not found: y")
		refused(w, w.bridge.SetVariable, &snakepit.SetVariableRequest{SessionId: "t", VariableIdentifier: "x", Value: value("float", "1")}, codes.NotFound, "Session not found: t")
		refused(w, w.bridge.SetVariable, &snakepit.SetVariableRequest{SessionId: "s", VariableIdentifier: "x"}, codes.InvalidArgument, "no value")
		w.holds("x", "0.9", 4) // what failed changed nothing
	})
}

func TestBatchSet(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		for _, name := range []string{"a", "b", "c"} {
			ok(w, w.bridge.RegisterVariable, &snakepit.RegisterVariableRequest{SessionId: "s", Name: name, Type: "float", InitialValue: value("float", "0"), ConstraintsJson: `{"max":1}`})
		}
		batch := func(atomic bool, kv ...string) *snakepit.BatchSetVariablesRequest {
			r := &snakepit.BatchSetVariablesRequest{SessionId: "s", Atomic: atomic, Updates: map[string]*anypb.Any{}, Metadata: map[string]string{"by": "batch"}}
			for i := 0; i < len(kv); i += 2 {
				r.Updates[kv[i]] = value("float", kv[i+1])
			}
			return r
		}
		if r := ok(w, w.bridge.SetVariables, batch(true, "a", "0.1", "b", "0.2")); !r.Success || r.NewVersions["a"] != 1 || r.NewVersions["b"] != 1 || len(r.Errors) != 0 {
			t.Errorf("atomic: %v", r)
		}
		w.holds("a", "0.1", 1)
		if v := w.get("a"); v.Metadata["by"] != "batch" {
			t.Errorf("metadata %v", v.Metadata)
		}
		// Atomic with one bad value: nothing happens, and the answer says which.
		if r := ok(w, w.bridge.SetVariables, batch(true, "a", "0.5", "b", "7")); r.Success || len(r.NewVersions) != 0 || !strings.Contains(r.Errors["b"], "value 7 is above maximum 1.0") || len(r.Errors) != 1 {
			t.Errorf("atomic with a bad value: %v", r)
		}
		w.holds("a", "0.1", 1)
		w.holds("b", "0.2", 1)
		// Otherwise what is good happens.
		if r := ok(w, w.bridge.SetVariables, batch(false, "a", "0.5", "b", "7", "c", "0.3")); r.Success || len(r.NewVersions) != 2 || r.NewVersions["a"] != 2 || len(r.Errors) != 1 || r.Errors["b"] == "" {
			t.Errorf("not atomic with a bad value: %v", r)
		}
		w.holds("a", "0.5", 2)
		w.holds("b", "0.2", 1)
		w.holds("c", "0.3", 1)
		for _, atomic := range []bool{true, false} {
			refused(w, w.bridge.SetVariables, batch(atomic, "a", "0.6", "nobody", "0.1"), codes.InvalidArgument, "Variable not found: nobody")
		}
		w.holds("a", "0.5", 2)
		other := batch(false, "a", "0.6")
		other.SessionId = "t"
		refused(w, w.bridge.SetVariables, other, codes.NotFound, "Session not found: t")

		if r := ok(w, w.bridge.SetVariables, batch(true)); !r.Success {
			t.Errorf("empty batch: %v", r)
		}
		empty := batch(true)
		empty.SessionId = "t"
		refused(w, w.bridge.SetVariables, empty, codes.NotFound, "Session not found: t")
		odd := batch(false, "a", "0.6")
		odd.BinaryUpdates = map[string][]byte{"b": {1}}
		refused(w, w.bridge.SetVariables, odd, codes.InvalidArgument, `binary_updates has "b"`)
		odd = batch(false, "a", "0.6")
		odd.Metadata["expected_version"] = "1"
		refused(w, w.bridge.SetVariables, odd, codes.InvalidArgument, "one variable")
		odd = batch(true, "a", "0.6")
		odd.Updates["b"] = &anypb.Any{}
		if r := ok(w, w.bridge.SetVariables, odd); r.Success || r.Errors["b"] == "" {
			t.Errorf("a value without bytes: %v", r)
		}
		w.holds("a", "0.5", 2)
	})
}

func TestBatchGet(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		id := w.register("a", "float", "1")
		w.register("b", "float", "2")
		req := &snakepit.BatchGetVariablesRequest{SessionId: "s", VariableIdentifiers: []string{"b", id, "none", "a", "nope", "none"}}
		g := call(w, w.bridge.GetVariables, req)
		if g.err != nil || len(g.value.Variables) != 3 || g.value.Variables[id].Name != "a" || g.value.Variables["a"].Id != id || string(g.value.Variables["b"].Value.Value) != "2" ||
			!slices.Equal(g.value.MissingVariables, []string{"none", "nope"}) {
			t.Errorf("batch: %v, %v", g.value, g.err)
		}
		has(t, g.head, outrigger.HeaderTier, "origin", outrigger.HeaderFeed, "live", outrigger.HeaderAge, "*")
		g = call(w, w.bridge.GetVariables, req)
		has(t, g.head, outrigger.HeaderTier, "process", outrigger.HeaderFeed, "live")
		req.BypassCache = true
		g = call(w, w.bridge.GetVariables, req)
		has(t, g.head, outrigger.HeaderTier, "origin")

		empty := call(w, w.bridge.GetVariables, &snakepit.BatchGetVariablesRequest{SessionId: "s"})
		if empty.err != nil || len(empty.value.Variables)+len(empty.value.MissingVariables) != 0 {
			t.Errorf("empty batch: %v", empty)
		}
		refused(w, w.bridge.GetVariables, &snakepit.BatchGetVariablesRequest{SessionId: "t", VariableIdentifiers: []string{"a"}}, codes.NotFound, "Session not found: t")
		refused(w, w.bridge.GetVariables, &snakepit.BatchGetVariablesRequest{SessionId: "s", VariableIdentifiers: []string{"a", ""}}, codes.InvalidArgument, "empty")
		refused(w, w.bridge.GetVariables, &snakepit.BatchGetVariablesRequest{SessionId: "", VariableIdentifiers: []string{"a"}}, codes.InvalidArgument, "session is empty")
		refused(w, w.bridge.GetVariables, &snakepit.BatchGetVariablesRequest{SessionId: "s", VariableIdentifiers: make([]string, outrigger.MaxBatch+1)}, codes.ResourceExhausted, "limit is 1000")
	})
}

// Tiers, age and feed of an answer, and what each consistency asks for.
func TestHeaders(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		w.register("x", "float", "1")
		g := call(w, w.bridge.GetVariable, getReq("x"))
		has(t, g.head, outrigger.HeaderTier, "*", outrigger.HeaderVersion, "0", outrigger.HeaderDot, "*", outrigger.HeaderAge, "*", outrigger.HeaderFeed, "live", outrigger.HeaderStale, "-")
		call(w, w.bridge.GetVariable, getReq("x"))
		g = call(w, w.bridge.GetVariable, getReq("x"))
		has(t, g.head, outrigger.HeaderTier, "process")
		if !g.value.FromCache {
			t.Error("from_cache is false for an answer of the process tier")
		}
		if !strings.HasPrefix(first(g.head, outrigger.HeaderDot), "eu@") {
			t.Errorf("dot %q", first(g.head, outrigger.HeaderDot))
		}
		bypass := getReq("x")
		bypass.BypassCache = true
		for _, g := range []got[*snakepit.GetVariableResponse]{
			call(w, w.bridge.GetVariable, bypass),
			call(w, w.bridge.GetVariable, getReq("x"), outrigger.HeaderConsistency, "strong"),
			call(w, w.bridge.GetVariable, bypass, outrigger.HeaderConsistency, "eventual"),
		} {
			has(t, g.head, outrigger.HeaderTier, "origin", outrigger.HeaderAge, "0")
			if g.value.FromCache {
				t.Error("from_cache is true for an answer of the origin")
			}
		}
		has(t, call(w, w.bridge.GetVariable, getReq("x"), outrigger.HeaderConsistency, "bounded(1s)").head, outrigger.HeaderTier, "process")
		refused(w, w.bridge.GetVariable, getReq("x"), codes.InvalidArgument, "consistency", outrigger.HeaderConsistency, "later")
		refused(w, w.bridge.SetVariable, setReq("x", "2"), codes.InvalidArgument, "consistency", outrigger.HeaderConsistency, "later")

		// That there is no such variable is an answer, too.
		refused(w, w.bridge.GetVariable, getReq("none"), codes.NotFound, "Variable not found: none")
		head := refused(w, w.bridge.GetVariable, getReq("none"), codes.NotFound, "Variable not found: none")
		has(t, head, outrigger.HeaderTier, "process", outrigger.HeaderFeed, "live", outrigger.HeaderAge, "*", outrigger.HeaderVersion, "-", outrigger.HeaderDot, "-")
		// A refused request was answered by nobody, and claims nothing about freshness.
		head = refused(w, w.bridge.GetVariable, getReq(""), codes.InvalidArgument, "variable identifier is empty")
		has(t, head, outrigger.HeaderTier, "none", outrigger.HeaderFeed, "-", outrigger.HeaderAge, "-")

		// Control plane away: known variables are served and marked, the rest fails.
		time.Sleep(time.Second)
		synctest.Wait()
		w.stopAuthority()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		g = call(w, w.bridge.GetVariable, getReq("x"))
		if g.err != nil || string(g.value.Variable.Value.Value) != "1" {
			t.Fatalf("away: %v", g.err)
		}
		has(t, g.head, outrigger.HeaderTier, "*", outrigger.HeaderFeed, "down", outrigger.HeaderStale, "true", outrigger.HeaderVersion, "0")
		batch := call(w, w.bridge.GetVariables, &snakepit.BatchGetVariablesRequest{SessionId: "s", VariableIdentifiers: []string{"x", "none"}})
		if batch.err != nil || len(batch.value.Variables) != 1 || len(batch.value.MissingVariables) != 1 {
			t.Errorf("batch away: %v, %v", batch.value, batch.err)
		}
		has(t, batch.head, outrigger.HeaderFeed, "down", outrigger.HeaderStale, "true")
		has(t, refused(w, w.bridge.GetVariable, getReq("never"), codes.Unavailable, ""), outrigger.HeaderTier, "none")
		refused(w, w.bridge.GetVariable, bypass, codes.Unavailable, "")
		refused(w, w.bridge.GetVariable, getReq("x"), codes.OutOfRange, "", outrigger.HeaderConsistency, "bounded(1s)")
		refused(w, w.bridge.SetVariable, setReq("x", "2"), codes.Unavailable, "")
		refused(w, w.bridge.GetVariables, &snakepit.BatchGetVariablesRequest{SessionId: "s", VariableIdentifiers: []string{"x", "never"}}, codes.Unavailable, "")
	})
}

// An identifier is an id or a name; ids come first.
func TestIdentifiers(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		// A variable whose name looks like an id, and is no id.
		w.register("var_x_1", "string", `"a name"`)
		w.holds("var_x_1", `"a name"`, 0)
		id := w.register("x", "string", `"the variable"`)
		if id == "var_x_1" {
			t.Fatalf("the id %s hides a variable of that name", id)
		}
		w.holds(id, `"the variable"`, 0)
		w.holds("x", `"the variable"`, 0)
		w.holds("var_x_1", `"a name"`, 0)
		// The id of one variable cannot become the name of another.
		refused(w, w.bridge.RegisterVariable, &snakepit.RegisterVariableRequest{SessionId: "s", Name: id, Type: "float", InitialValue: value("float", "1")}, codes.AlreadyExists, id)

		// A deleted and registered variable has a new id; the old one names nothing.
		ok(w, w.bridge.DeleteVariable, &snakepit.DeleteVariableRequest{SessionId: "s", VariableIdentifier: id})
		again := w.register("x", "string", `"another"`)
		if again == id {
			t.Errorf("the id %s was given out twice", id)
		}
		refused(w, w.bridge.GetVariable, getReq(id), codes.NotFound, "Variable not found: "+id)
		w.holds(again, `"another"`, 2)
		for _, none := range []string{"var_x_99", "var_y_1", "var_", "var__1", "var_x_"} {
			refused(w, w.bridge.GetVariable, getReq(none), codes.NotFound, "Variable not found: "+none)
		}
		// One read is one answer, however many look-ups it took.
		before := w.counts.Process.Load() + w.counts.Node.Load() + w.counts.Origin.Load()
		w.get("var_x_1")
		if n := w.counts.Process.Load() + w.counts.Node.Load() + w.counts.Origin.Load() - before; n != 1 {
			t.Errorf("one read counted as %d", n)
		}
	})
}

func TestListDeleteHistoryRollback(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		for _, n := range []string{"temp_b", "temp_a", "a_temp_", "other"} {
			w.register(n, "float", "0")
		}
		names := func(pattern string) string {
			var out []string
			for _, v := range ok(w, w.bridge.ListVariables, &snakepit.ListVariablesRequest{SessionId: "s", Pattern: pattern}).Variables {
				out = append(out, v.Name)
			}
			return strings.Join(out, " ")
		}
		for pattern, want := range map[string]string{"": "a_temp_ other temp_a temp_b", "*": "a_temp_ other temp_a temp_b", "temp_*": "temp_a temp_b", "temp_": "", "*e*": "a_temp_ other temp_a temp_b"} {
			if got := names(pattern); got != want {
				t.Errorf("list %q: %s, want %s", pattern, got, want)
			}
		}
		refused(w, w.bridge.ListVariables, &snakepit.ListVariablesRequest{SessionId: "t"}, codes.NotFound, "Session not found: t")

		for _, v := range []string{"1", "2", "3"} {
			ok(w, w.bridge.SetVariable, setReq("temp_a", v))
		}
		h := ok(w, w.bridge.GetVariableHistory, &snakepit.GetVariableHistoryRequest{SessionId: "s", VariableIdentifier: "temp_a"}).Entries
		var got []string
		for _, e := range h {
			got = append(got, fmt.Sprintf("%d=%s", e.Version, e.Value.Value))
		}
		if strings.Join(got, " ") != "3=3 2=2 1=1 0=0" || h[0].ChangedBy != "bridge" || h[0].Timestamp == nil || h[0].Value.TypeUrl != "type.googleapis.com/snakepit.float" {
			t.Errorf("history %v: %v", got, h[0])
		}
		if h := ok(w, w.bridge.GetVariableHistory, &snakepit.GetVariableHistoryRequest{SessionId: "s", VariableIdentifier: "temp_a", Limit: 2}).Entries; len(h) != 2 || h[1].Version != 2 {
			t.Errorf("limited history %v", h)
		}
		refused(w, w.bridge.GetVariableHistory, &snakepit.GetVariableHistoryRequest{SessionId: "s", VariableIdentifier: "none"}, codes.NotFound, "not found")

		r := ok(w, w.bridge.RollbackVariable, &snakepit.RollbackVariableRequest{SessionId: "s", VariableIdentifier: "temp_a", TargetVersion: 1})
		if !r.Success || r.Variable.Version != 4 || string(r.Variable.Value.Value) != "1" {
			t.Errorf("rollback: %v", r)
		}
		w.holds("temp_a", "1", 4)
		refused(w, w.bridge.RollbackVariable, &snakepit.RollbackVariableRequest{SessionId: "s", VariableIdentifier: "temp_a", TargetVersion: 99}, codes.NotFound, "99")

		g := call(w, w.bridge.DeleteVariable, &snakepit.DeleteVariableRequest{SessionId: "s", VariableIdentifier: "temp_a"})
		if g.err != nil || !g.value.Success {
			t.Errorf("delete: %v", g.err)
		}
		has(t, g.head, outrigger.HeaderTier, "origin", outrigger.HeaderVersion, "*")
		refused(w, w.bridge.GetVariable, getReq("temp_a"), codes.NotFound, "Variable not found: temp_a")
		refused(w, w.bridge.DeleteVariable, &snakepit.DeleteVariableRequest{SessionId: "s", VariableIdentifier: "temp_a"}, codes.NotFound, "Variable not found: temp_a")
	})
}

// Binary parts are neither decoded nor altered: pickle and ETF bytes come back as they
// went in, the description beside them too, and hostile ones do nothing.
func TestBinaryIsOpaque(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		w.session("s")
		describe := func(format string) *anypb.Any {
			return &anypb.Any{TypeUrl: "type.googleapis.com/snakepit.tensor.binary", Value: []byte(`{"shape":[2,2],"dtype":"float32","binary_format":"` + format + `","type":"tensor"}`)}
		}
		payloads := map[string][]byte{
			"pickle":        []byte("cos\nsystem\n(S'touch /tmp/owned'\ntR."), // would run a command if loaded
			"erlang_binary": {131, 80, 0, 0, 0, 255, 120, 156, 0},             // compressed ETF that lies about its size
			"raw_le":        bytes.Repeat([]byte{0, 255, 1}, 1<<16),
		}
		for format, payload := range payloads {
			ok(w, w.bridge.RegisterVariable, &snakepit.RegisterVariableRequest{SessionId: "s", Name: format, Type: "tensor", InitialValue: describe(format), InitialBinaryValue: payload})
			v := w.get(format)
			if !bytes.Equal(v.BinaryValue, payload) || !bytes.Equal(v.Value.Value, describe(format).Value) || v.Value.TypeUrl != describe(format).TypeUrl || v.Type != "tensor" {
				t.Errorf("%s came back as %.200v", format, v)
			}
			next := append([]byte{7}, payload...)
			ok(w, w.bridge.SetVariable, &snakepit.SetVariableRequest{SessionId: "s", VariableIdentifier: format, Value: describe(format), BinaryValue: next})
			if v := w.get(format); !bytes.Equal(v.BinaryValue, next) || v.Version != 1 {
				t.Errorf("%s: set lost bytes", format)
			}
			r := ok(w, w.bridge.SetVariables, &snakepit.BatchSetVariablesRequest{SessionId: "s", Atomic: true,
				Updates: map[string]*anypb.Any{format: describe(format)}, BinaryUpdates: map[string][]byte{format: payload}})
			got := ok(w, w.bridge.GetVariables, &snakepit.BatchGetVariablesRequest{SessionId: "s", VariableIdentifiers: []string{format}})
			if !r.Success || !bytes.Equal(got.Variables[format].GetBinaryValue(), payload) {
				t.Errorf("%s: batch lost bytes: %v", format, r)
			}
		}
	})
}

// The published client never creates a session; with the option its first use does.
func TestAutoCreateSessions(t *testing.T) {
	exists := func(w *world, session string) bool {
		_, err := w.direct.GetSession(context.Background(), &pb.GetSessionRequest{Id: session})
		return err == nil
	}
	inWorld(t, worldOptions{autoCreate: true}, func(t *testing.T, w *world) {
		uses := map[string]func(session string) codes.Code{
			"get": func(s string) codes.Code {
				refused(w, w.bridge.GetVariable, &snakepit.GetVariableRequest{SessionId: s, VariableIdentifier: "x"}, codes.NotFound, "Variable not found: x")
				return 0
			},
			"batch get": func(s string) codes.Code {
				r := ok(w, w.bridge.GetVariables, &snakepit.BatchGetVariablesRequest{SessionId: s, VariableIdentifiers: []string{"x", "y"}})
				if len(r.MissingVariables) != 2 {
					t.Errorf("batch: %v", r)
				}
				return 0
			},
			"register": func(s string) codes.Code {
				ok(w, w.bridge.RegisterVariable, &snakepit.RegisterVariableRequest{SessionId: s, Name: "x", Type: "float", InitialValue: value("float", "1")})
				return 0
			},
			"list": func(s string) codes.Code {
				if r := ok(w, w.bridge.ListVariables, &snakepit.ListVariablesRequest{SessionId: s}); len(r.Variables) != 0 {
					t.Errorf("list: %v", r)
				}
				return 0
			},
			"empty batch": func(s string) codes.Code {
				ok(w, w.bridge.SetVariables, &snakepit.BatchSetVariablesRequest{SessionId: s})
				return 0
			},
			"native register": func(s string) codes.Code {
				ok(w, w.native.Register, &pb.RegisterRequest{Key: &pb.Key{Session: s, Name: "x"}, Value: &pb.Value{Type: "float", Json: []byte("1")}})
				return 0
			},
			"native get": func(s string) codes.Code {
				refused(w, w.native.Get, &pb.GetRequest{Session: s, Identifier: "x"}, codes.NotFound, "Variable not found: x")
				return 0
			},
		}
		for name, use := range uses {
			session := "by " + name
			use(session)
			if !exists(w, session) {
				t.Errorf("%s did not create the session", name)
			}
		}
		// A write to a variable that does not exist names the variable: the client registers it.
		refused(w, w.bridge.SetVariable, setReq("x", "1"), codes.NotFound, "Variable not found: x")
		refused(w, w.bridge.SetVariables, &snakepit.BatchSetVariablesRequest{SessionId: "s", Updates: map[string]*anypb.Any{"x": value("float", "1")}}, codes.InvalidArgument, "Variable not found: x")
		// Asking about a session is no use of it.
		refused(w, w.bridge.GetSession, &snakepit.GetSessionRequest{SessionId: "asked"}, codes.NotFound, "Session not found: asked")
		if ok(w, w.bridge.Heartbeat, &snakepit.HeartbeatRequest{SessionId: "asked"}).SessionValid || exists(w, "asked") {
			t.Error("asking created the session")
		}
		// A session that a read created is one that exists already: clients tolerate that code.
		refused(w, w.bridge.InitializeSession, &snakepit.InitializeSessionRequest{SessionId: "by get"}, codes.AlreadyExists, "Session already exists: by get")
	})
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		refused(w, w.bridge.GetVariable, getReq("x"), codes.NotFound, "Session not found: s")
		refused(w, w.native.Get, &pb.GetRequest{Session: "s", Identifier: "x"}, codes.NotFound, "Session not found: s")
		refused(w, w.bridge.ListVariables, &snakepit.ListVariablesRequest{SessionId: "s"}, codes.NotFound, "Session not found: s")
		if exists(w, "s") {
			t.Error("a session was created without the option")
		}
	})
}

// Tenants do not see each other's sessions, and no tenant is the default tenant.
func TestTenants(t *testing.T) {
	inWorld(t, worldOptions{}, func(t *testing.T, w *world) {
		for i, tenant := range []string{"red", "blue"} {
			ok(w, w.bridge.InitializeSession, &snakepit.InitializeSessionRequest{SessionId: "s"}, outrigger.HeaderTenant, tenant)
			ok(w, w.bridge.RegisterVariable, &snakepit.RegisterVariableRequest{SessionId: "s", Name: "x", Type: "string", InitialValue: value("string", `"`+tenant+`"`)}, outrigger.HeaderTenant, tenant)
			if i == 0 {
				refused(w, w.bridge.GetVariable, getReq("x"), codes.NotFound, "Session not found: s", outrigger.HeaderTenant, "blue")
			}
		}
		for _, tenant := range []string{"red", "blue"} {
			if v := ok(w, w.bridge.GetVariable, getReq("x"), outrigger.HeaderTenant, tenant).Variable; string(v.Value.Value) != `"`+tenant+`"` {
				t.Errorf("%s reads %s", tenant, v.Value.Value)
			}
			if v := ok(w, w.native.Get, &pb.GetRequest{Tenant: tenant, Session: "s", Identifier: "x"}); string(v.Value.Json) != `"`+tenant+`"` {
				t.Errorf("%s reads %s natively", tenant, v.Value.Json)
			}
		}
		refused(w, w.bridge.GetVariable, getReq("x"), codes.NotFound, "Session not found: s")
		refused(w, w.bridge.GetVariable, getReq("x"), codes.InvalidArgument, "tenant", outrigger.HeaderTenant, "a/b")
		ok(w, w.bridge.InitializeSession, &snakepit.InitializeSessionRequest{SessionId: "s"})
		w.register("x", "string", `"default"`)
		if v := ok(w, w.bridge.GetVariable, getReq("x"), outrigger.HeaderTenant, outrigger.DefaultTenant).Variable; string(v.Value.Value) != `"default"` {
			t.Errorf("the default tenant reads %s", v.Value.Value)
		}
		// Sessions that reads used are reported, of known sessions only.
		if w.touched["red/s"] == 0 || w.touched["blue/s"] == 0 || w.touched["default/s"] == 0 || len(w.touched) != 3 {
			t.Errorf("touched %v", w.touched)
		}
	})
}
