package variables_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
	"github.com/outrigger-mesh/outrigger/control/eventlog/memory"
	"github.com/outrigger-mesh/outrigger/control/variables"
)

func TestSessions(t *testing.T) {
	w := newWorld(t)
	got := must(w, w.vars.CreateSession, &pb.CreateSessionRequest{Id: "s", Ttl: durationpb.New(time.Minute), Metadata: map[string]string{"app": "x"}})
	if got.GetTenant() != "default" || got.GetTtl().AsDuration() != time.Minute || got.GetMetadata()["app"] != "x" || got.GetVariableCount() != 0 {
		t.Fatalf("created session %v", got)
	}
	refused(w, w.vars.CreateSession, &pb.CreateSessionRequest{Id: "s"}, outrigger.Exists, "Session already exists: s")
	again := must(w, w.vars.CreateSession, &pb.CreateSessionRequest{Id: "s", IfAbsent: true, Ttl: durationpb.New(time.Hour)})
	if again.GetTtl().AsDuration() != time.Minute {
		t.Errorf("if_absent changed the ttl to %v", again.GetTtl().AsDuration())
	}
	refused(w, w.vars.GetSession, &pb.GetSessionRequest{Id: "nope"}, outrigger.NotFound, "Session not found: nope")
	refused(w, w.vars.GetSession, &pb.GetSessionRequest{Id: "s", Tenant: "other"}, outrigger.NotFound, "Session not found: s")
	for name, req := range map[string]*pb.CreateSessionRequest{
		"empty id": {}, "slash": {Id: "a/b"}, "negative ttl": {Id: "x", Ttl: durationpb.New(-1)},
		"control": {Id: "a\nb"}, "tenant": {Id: "x", Tenant: "a/b"},
		"ttl out of range": {Id: "x", Ttl: &durationpb.Duration{Seconds: 1 << 60}},
	} {
		if _, err := call(w.ctx, w.vars.CreateSession, req); !outrigger.IsKind(err, outrigger.Invalid) {
			t.Errorf("%s: %v, want invalid", name, err)
		}
	}
	w.register("s", "a", value(outrigger.Integer, "1"))
	w.register("s", "b", value(outrigger.Integer, "2"))
	if n := must(w, w.vars.GetSession, &pb.GetSessionRequest{Id: "s"}).GetVariableCount(); n != 2 {
		t.Errorf("variable_count = %d, want 2", n)
	}
	w.session("r")
	list := must(w, w.vars.ListSessions, &pb.ListSessionsRequest{}).GetSessions()
	if len(list) != 2 || list[0].GetId() != "r" || list[1].GetId() != "s" {
		t.Errorf("ListSessions = %v, want r and s", list)
	}
	if one := must(w, w.vars.ListSessions, &pb.ListSessionsRequest{Limit: 1}).GetSessions(); len(one) != 1 || one[0].GetId() != "r" {
		t.Errorf("ListSessions limit 1 = %v", one)
	}
	refused(w, w.vars.ListSessions, &pb.ListSessionsRequest{Limit: 1001}, outrigger.Invalid, "limit is 1001; give 1 to 1000, or 0 for 1000")
	unknown := must(w, w.vars.TouchSessions, &pb.TouchSessionsRequest{Ids: []string{"s", "x", "r"}}).GetUnknown()
	if !slices.Equal(unknown, []string{"x"}) {
		t.Errorf("unknown sessions %q, want x", unknown)
	}
	gone := must(w, w.vars.DeleteSession, &pb.GetSessionRequest{Id: "s"})
	if n := gone.GetVariablesRemoved(); n != 2 {
		t.Errorf("removed %d variables, want 2", n)
	}
	if d := gone.GetGone(); d.GetPosition() != w.svc.Applied() || d.GetRegion() == "" || d.GetIncarnation() == 0 {
		t.Errorf("gone at %v, the deletion is the last event, %d", d, w.svc.Applied())
	}
	w.session("later")
	absent := must(w, w.vars.DeleteSession, &pb.GetSessionRequest{Id: "s"})
	if n := absent.GetVariablesRemoved(); n != 0 {
		t.Errorf("second delete removed %d", n)
	}
	// Somebody else's deletion counts as seen, too.
	if p := absent.GetGone().GetPosition(); p < gone.GetGone().GetPosition() || p > w.svc.Applied() {
		t.Errorf("absent at %d, want %d or later", p, gone.GetGone().GetPosition())
	}
	must(w, w.vars.DeleteSession, &pb.GetSessionRequest{Id: "later"})
	refused(w, w.vars.Get, getReq("s", "a"), outrigger.NotFound, "Session not found: s")
	if st := w.svc.Stats(); st.Sessions != 1 || st.Variables != 0 || !st.Ready || st.Applied != st.Head {
		t.Errorf("stats %+v", st)
	}
}

func TestSessionLimits(t *testing.T) {
	w := startWorld(t, memory.New(), variables.Options{SessionLimit: 2, VariableLimit: 2})
	w.session("a")
	w.session("b")
	refused(w, w.vars.CreateSession, &pb.CreateSessionRequest{Id: "c"}, outrigger.Exhausted, "there are 2 sessions, the limit is 2; delete some or raise the limit")
	refused(w, w.vars.Register, &pb.RegisterRequest{
		Key: &pb.Key{Session: "c", Name: "x"}, Value: value(outrigger.Integer, "1"), Options: &pb.WriteOptions{AutoCreateSession: true},
	}, outrigger.Exhausted, "there are 2 sessions, the limit is 2; delete some or raise the limit")
	w.register("a", "x", value(outrigger.Integer, "1"))
	w.register("a", "y", value(outrigger.Integer, "1"))
	refused(w, w.vars.Register, &pb.RegisterRequest{Key: &pb.Key{Session: "a", Name: "z"}, Value: value(outrigger.Integer, "1")},
		outrigger.Exhausted, "session a has 2 variables, the limit is 2; delete some or raise the limit")
	must(w, w.vars.Delete, getReq("a", "x"))
	w.register("a", "z", value(outrigger.Integer, "1"))
}

func TestRegister(t *testing.T) {
	w := newWorld(t)
	refused(w, w.vars.Register, &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: value(outrigger.Float, "1")},
		outrigger.NotFound, "Session not found: s")
	v := must(w, w.vars.Register, &pb.RegisterRequest{
		Key: &pb.Key{Session: "s", Name: "temperature"}, Value: value(outrigger.Float, "0.7"), ConstraintsJson: `{"min": 0, "max": 1}`,
		Metadata: map[string]string{"source": "forged", "k": "v"},
		Options:  &pb.WriteOptions{Actor: "ann", Source: "PYTHON", AutoCreateSession: true},
	})
	if v.GetId() != "var_temperature_1" || v.GetVersion().GetCounter() != 0 || v.GetSource() != "PYTHON" || v.GetConstraintsJson() != `{"min":0,"max":1}` {
		t.Fatalf("registered %v", v)
	}
	md := v.GetMetadata()
	if md["source"] != "PYTHON" || md["created_by"] != "ann" || md["k"] != "v" {
		t.Errorf("metadata %v", md)
	}
	if at, err := time.Parse(time.RFC3339Nano, md["updated_at"]); err != nil || at.Location() != time.UTC || time.Since(at) > time.Minute {
		t.Errorf("updated_at %q: %v", md["updated_at"], err)
	}
	dot := v.GetVersion().GetDot()
	if dot.GetRegion() != "us" || dot.GetIncarnation() != w.log.Incarnation() || dot.GetPosition() != 2 {
		t.Errorf("dot %v, want the second event of the log", dot)
	}
	if c := v.GetVersion().GetContext(); len(c) != 1 || c[0].GetRegion() != "us" || c[0].GetPosition() != 2 {
		t.Errorf("context %v, want us:2", c)
	}
	if !proto.Equal(v, w.get("s", "temperature")) || !proto.Equal(v, w.get("s", v.GetId())) {
		t.Error("the answer differs from what a read gives")
	}
	refused(w, w.vars.Register, &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "temperature"}, Value: value(outrigger.Float, "1")},
		outrigger.Exists, "Variable already exists: temperature")
	refused(w, w.vars.Register, &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: v.GetId()}, Value: value(outrigger.Float, "1")},
		outrigger.Exists, "name var_temperature_1 is the id of another variable of the session; choose another")
	if second := w.register("s", "k", value(outrigger.Choice, `"a"`)); second.GetId() != "var_k_2" {
		t.Errorf("second id %q, want var_k_2: n counts per session", second.GetId())
	}
	// A name that looks like the next id makes the id skip a number.
	w.register("s", "var_z_4", value(outrigger.Integer, "1")) // n = 3
	if z := w.register("s", "z", value(outrigger.Integer, "1")); z.GetId() != "var_z_5" {
		t.Errorf("id %q, want var_z_5: var_z_4 is a name", z.GetId())
	}
}

func TestRegisterRefuses(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	long := strings.Repeat("n", outrigger.MaxNameBytes+1)
	big := map[string]string{"k": strings.Repeat("x", outrigger.MaxMetadataBytes)}
	many := make(map[string]string)
	for i := range outrigger.MaxMetadataPairs {
		many[fmt.Sprint(i)] = "v"
	}
	for _, c := range []struct {
		name string
		req  *pb.RegisterRequest
		kind outrigger.Kind
		text string // part of the message
	}{
		{"no name", &pb.RegisterRequest{Key: &pb.Key{Session: "s"}}, outrigger.Invalid, "name is empty"},
		{"long name", &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: long}}, outrigger.Invalid, "name is 257 bytes long"},
		{"no type", &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: value("", "1")}, outrigger.Invalid, "unknown type"},
		{"bad value", &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: value("integer", "1.5")}, outrigger.Invalid, "whole number"},
		{"alien limit", &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: value("boolean", "true"), ConstraintsJson: `{"min":1}`}, outrigger.Invalid, "does not apply"},
		{"misspelt limit", &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: value("float", "1"), ConstraintsJson: `{"mni":1}`}, outrigger.Invalid, "mni"},
		{"above limit", &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: value("float", "1.5"), ConstraintsJson: `{"max":1}`}, outrigger.Invalid, "value 1.5 is above maximum 1.0"},
		{"metadata bytes", &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: value("float", "1"), Metadata: big}, outrigger.Exhausted, "the limit is 16384"},
		{"metadata pairs", &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: value("float", "1"), Metadata: many}, outrigger.Exhausted, "the limit is 64"},
		{"long request id", &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: value("float", "1"), Options: &pb.WriteOptions{RequestId: long}}, outrigger.Invalid, "options.request_id is 257 bytes"},
	} {
		_, err := call(w.ctx, w.vars.Register, c.req)
		if !outrigger.IsKind(err, c.kind) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v (%v), want %v with %q", c.name, err, outrigger.KindOf(err), c.kind, c.text)
		}
	}
	if head := w.log.Head(); head != 1 {
		t.Errorf("refused registrations wrote %d events", head-1)
	}
}

func TestSet(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	first := must(w, w.vars.Register, &pb.RegisterRequest{
		Key: &pb.Key{Session: "s", Name: "t"}, Value: value("float", "0.5"), ConstraintsJson: `{"max":1}`, Metadata: map[string]string{"a": "1", "b": "1"},
	})
	req := setReq("s", first.GetId(), "0.75")
	req.Metadata = map[string]string{"b": "2"}
	req.Options = &pb.WriteOptions{Actor: "bob", Source: "REST"}
	v := must(w, w.vars.Set, req)
	if v.GetVersion().GetCounter() != 1 || v.GetValue().GetType() != "float" || v.GetSource() != "REST" {
		t.Fatalf("set gave %v", v)
	}
	md := v.GetMetadata()
	if md["a"] != "1" || md["b"] != "2" || md["source"] != "REST" || md["created_by"] != "API" || md["updated_at"] < first.GetMetadata()["updated_at"] {
		t.Errorf("merged metadata %v", md)
	}
	if !proto.Equal(v, w.get("s", "t")) {
		t.Error("read after write differs from the answer")
	}
	refused(w, w.vars.Set, setReq("s", "t", "1.5"), outrigger.Invalid, "value 1.5 is above maximum 1.0")
	w.holds("s", "t", "0.75", 1)
	typed := setReq("s", "t", `"x"`)
	typed.Value.Type = "string"
	refused(w, w.vars.Set, typed, outrigger.Invalid, `variable t has type float, which a set cannot change to "string"; delete and register it again`)
	refused(w, w.vars.Set, setReq("s", "nope", "1"), outrigger.NotFound, "Variable not found: nope")
	refused(w, w.vars.Set, setReq("gone", "t", "1"), outrigger.NotFound, "Session not found: gone")
	auto := setReq("gone", "t", "1")
	auto.Options = &pb.WriteOptions{AutoCreateSession: true}
	refused(w, w.vars.Set, auto, outrigger.NotFound, "Variable not found: t")
	refused(w, w.vars.Set, setReq("s", "", "1"), outrigger.Invalid, "identifier is empty; give 1 to 256 bytes")

	cas := setReq("s", "t", "0.1")
	cas.ExpectedVersion = ptr[int32](0)
	if e := refused(w, w.vars.Set, cas, outrigger.Conflict, "version_mismatch: current=1"); e.Current != 1 {
		t.Errorf("conflict carries current %d, want 1", e.Current)
	}
	cas.ExpectedVersion = ptr[int32](1)
	if v := must(w, w.vars.Set, cas); v.GetVersion().GetCounter() != 2 {
		t.Errorf("CAS gave version %d", v.GetVersion().GetCounter())
	}
	cas.ExpectedVersion = ptr[int32](-1)
	refused(w, w.vars.Set, cas, outrigger.Invalid, "expected_version is -1; versions start at 0, leave it unset for no check")
}

func TestBinaryTravelsUntouched(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	v := &pb.Value{Type: "embedding", Json: []byte(`{"binary_format":"pickle"}`), Binary: []byte{0x80, 0, 255}}
	w.register("s", "e", v)
	if got := w.get("s", "e").GetValue(); !proto.Equal(got, v) {
		t.Errorf("got %v, want %v", got, v)
	}
}

func TestDeleteAndRegisterAgain(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	w.register("s", "x", value("integer", "1"))
	w.set("s", "x", "2")
	gone := must(w, w.vars.Delete, getReq("s", "x")).GetVersion()
	if gone.GetCounter() != 2 || gone.GetDot().GetPosition() != w.svc.Applied() {
		t.Errorf("deletion has version %v, want counter 2 at the head", gone)
	}
	refused(w, w.vars.Get, getReq("s", "x"), outrigger.NotFound, "Variable not found: x")
	refused(w, w.vars.Delete, getReq("s", "x"), outrigger.NotFound, "Variable not found: x")
	again := w.register("s", "x", value("string", `"new"`))
	if again.GetVersion().GetCounter() != 3 || again.GetId() != "var_x_2" {
		t.Errorf("registered again as %v, want counter 3 and a new id", again)
	}
	// The session's deletion forgets the name; the log does not.
	must(w, w.vars.DeleteSession, &pb.GetSessionRequest{Id: "s"})
	w.session("s")
	v := w.register("s", "x", value("integer", "5"))
	if v.GetVersion().GetCounter() != 4 {
		t.Errorf("counter after the session's deletion is %d, want 4", v.GetVersion().GetCounter())
	}
	if c := v.GetVersion().GetContext(); len(c) != 1 || c[0].GetPosition() != v.GetVersion().GetDot().GetPosition() {
		t.Errorf("context %v does not cover the dot %v", c, v.GetVersion().GetDot())
	}
	hist := must(w, w.vars.History, &pb.HistoryRequest{Session: "s", Identifier: "x"}).GetEntries()
	if len(hist) != 1 || hist[0].GetVersion().GetCounter() != 4 {
		t.Errorf("history reaches into the session's earlier life: %v", hist)
	}
	refused(w, w.vars.Rollback, &pb.RollbackRequest{Session: "s", Identifier: "x", TargetVersion: 3}, outrigger.NotFound,
		"version not found: x has no version 3 in this session (the newest is 4)")
}

func TestTombstonesAreBoundedAndCountersGoOn(t *testing.T) {
	w := startWorld(t, memory.New(), variables.Options{VariableLimit: 20}) // 16 tombstones
	w.session("s")
	for i := range 20 {
		name := fmt.Sprint("v", i)
		w.register("s", name, value("integer", "0"))
		must(w, w.vars.Delete, getReq("s", name))
	}
	if v := w.register("s", "v0", value("integer", "0")); v.GetVersion().GetCounter() != 2 {
		t.Errorf("a name without a tombstone continues at %d, want 2", v.GetVersion().GetCounter())
	}
	if v := w.register("s", "v19", value("integer", "0")); v.GetVersion().GetCounter() != 2 {
		t.Errorf("a name with a tombstone continues at %d, want 2", v.GetVersion().GetCounter())
	}
}

func TestListAndBatchGet(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	for _, n := range []string{"user_a", "evil_user_b", "user_", "other"} {
		w.register("s", n, value("integer", "1"))
	}
	names := func(pattern string) []string {
		var out []string
		for _, v := range must(w, w.vars.List, &pb.ListRequest{Session: "s", Pattern: pattern}).GetVariables() {
			out = append(out, v.GetKey().GetName())
		}
		return out
	}
	for pattern, want := range map[string]string{
		"": "evil_user_b other user_ user_a", "*": "evil_user_b other user_ user_a", "user_*": "user_ user_a",
		"*_b": "evil_user_b", "*user*": "evil_user_b user_ user_a", "user.a": "", "other": "other",
	} {
		if got := strings.Join(names(pattern), " "); got != want {
			t.Errorf("List %q = %q, want %q", pattern, got, want)
		}
	}
	got := must(w, w.vars.BatchGet, &pb.BatchGetRequest{Session: "s", Identifiers: []string{"other", "var_other_4", "nope"}})
	if keys := slices.Sorted(maps.Keys(got.GetVariables())); !slices.Equal(keys, []string{"other", "var_other_4"}) || !slices.Equal(got.GetMissing(), []string{"nope"}) {
		t.Errorf("BatchGet = %v", got)
	}
	refused(w, w.vars.BatchGet, &pb.BatchGetRequest{Session: "s", Identifiers: make([]string, 1001)}, outrigger.Exhausted, "identifiers has 1001 entries, the limit is 1000; split the call")
	refused(w, w.vars.List, &pb.ListRequest{Session: "no"}, outrigger.NotFound, "Session not found: no")
}

func TestBatchSet(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	for _, n := range []string{"a", "b", "c"} {
		must(w, w.vars.Register, &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: n}, Value: value("integer", "0"), ConstraintsJson: `{"max":9}`})
	}
	items := func(pairs ...string) (out []*pb.SetItem) {
		for i := 0; i < len(pairs); i += 2 {
			out = append(out, &pb.SetItem{Identifier: pairs[i], Value: &pb.Value{Json: []byte(pairs[i+1])}})
		}
		return out
	}
	// Atomic and valid: one append, contiguous positions, keys as asked.
	got := must(w, w.vars.BatchSet, &pb.BatchSetRequest{Session: "s", Atomic: true, Items: items("var_a_1", "1", "b", "2"), Metadata: map[string]string{"m": "x"}})
	if len(got.GetErrors()) != 0 || len(got.GetVariables()) != 2 {
		t.Fatalf("batch %v", got)
	}
	a, b := got.GetVariables()["var_a_1"], got.GetVariables()["b"]
	if a.GetVersion().GetDot().GetPosition()+1 != b.GetVersion().GetDot().GetPosition() || a.GetMetadata()["m"] != "x" {
		t.Errorf("batch wrote %v and %v", a, b)
	}
	// Atomic with anything invalid: nothing.
	bad := items("a", "5", "b", "10", "c", "1")
	bad[2].ExpectedVersion = ptr[int32](7)
	head := w.log.Head()
	got = must(w, w.vars.BatchSet, &pb.BatchSetRequest{Session: "s", Atomic: true, Items: bad})
	if len(got.GetVariables()) != 0 || len(got.GetErrors()) != 2 || w.log.Head() != head {
		t.Errorf("refused atomic batch %v, head moved %d", got, w.log.Head()-head)
	}
	if e := got.GetErrors()["b"]; e.GetKind() != "invalid" || e.GetMessage() != "value 10 is above maximum 9" {
		t.Errorf("error of b: %v", e)
	}
	if e := got.GetErrors()["c"]; e.GetKind() != "conflict" || e.GetCurrentVersion() != 0 || e.GetMessage() != "version_mismatch: current=0" {
		t.Errorf("error of c: %v", e)
	}
	// Not atomic: the valid ones.
	got = must(w, w.vars.BatchSet, &pb.BatchSetRequest{Session: "s", Items: bad})
	if len(got.GetVariables()) != 1 || len(got.GetErrors()) != 2 || got.GetVariables()["a"].GetVersion().GetCounter() != 2 {
		t.Errorf("batch per item %v", got)
	}
	w.holds("s", "a", "5", 2)
	w.holds("s", "b", "2", 1)
	w.holds("s", "c", "0", 0)
	for _, atomic := range []bool{true, false} {
		refused(w, w.vars.BatchSet, &pb.BatchSetRequest{Session: "s", Atomic: atomic, Items: items("a", "1", "x", "1")}, outrigger.NotFound, "Variable not found: x")
		refused(w, w.vars.BatchSet, &pb.BatchSetRequest{Session: "s", Atomic: atomic, Items: items("a", "1", "var_a_1", "1")}, outrigger.Invalid,
			`items "a" and "var_a_1" are the same variable; name it once`)
		refused(w, w.vars.BatchSet, &pb.BatchSetRequest{Session: "s", Atomic: atomic}, outrigger.Invalid, "items is empty; give 1 to 1000")
	}
	w.holds("s", "a", "5", 2)
}

func TestBatchSetFull(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	req := &pb.BatchSetRequest{Session: "s", Atomic: true}
	for i := range outrigger.MaxBatch {
		name := fmt.Sprintf("v%04d", i)
		w.register("s", name, value("integer", "0"))
		req.Items = append(req.Items, &pb.SetItem{Identifier: name, Value: &pb.Value{Json: []byte("1")}})
	}
	if got := must(w, w.vars.BatchSet, req); len(got.GetVariables()) != outrigger.MaxBatch {
		t.Errorf("a full batch set %d variables, errors %v", len(got.GetVariables()), got.GetErrors())
	}
	req.Items = append(req.Items, req.Items[0])
	refused(w, w.vars.BatchSet, req, outrigger.Exhausted, "items has 1001 entries, the limit is 1000; split the call")
}

func TestHistoryAndRollback(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	must(w, w.vars.Register, &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: value("integer", "10"), ConstraintsJson: `{"max":50}`})
	req := setReq("s", "x", "20")
	req.Options = &pb.WriteOptions{Actor: "ann"}
	req.Metadata = map[string]string{"why": "tuning"}
	must(w, w.vars.Set, req)
	w.set("s", "x", "30")
	back := must(w, w.vars.Rollback, &pb.RollbackRequest{Session: "s", Identifier: "x", TargetVersion: 1, Options: &pb.WriteOptions{Actor: "op"}})
	if back.GetVersion().GetCounter() != 3 || string(back.GetValue().GetJson()) != "20" {
		t.Fatalf("rollback gave %v, want 20 as version 3", back)
	}
	refused(w, w.vars.Rollback, &pb.RollbackRequest{Session: "s", Identifier: "x", TargetVersion: 4}, outrigger.NotFound,
		"version not found: x has no version 4 in this session (the newest is 3)")
	refused(w, w.vars.Rollback, &pb.RollbackRequest{Session: "s", Identifier: "x", TargetVersion: -1}, outrigger.Invalid, "target_version is -1; versions start at 0")

	must(w, w.vars.Delete, getReq("s", "x"))
	show := func(limit int32) string {
		var out []string
		for _, e := range must(w, w.vars.History, &pb.HistoryRequest{Session: "s", Identifier: "x", Limit: limit}).GetEntries() {
			out = append(out, fmt.Sprintf("%d=%s by %s deleted=%v %s%s", e.GetVersion().GetCounter(), e.GetValue().GetJson(), e.GetActor(), e.GetDeleted(), e.GetMetadata()["why"], e.GetMetadata()["rolled_back_to"]))
		}
		return strings.Join(out, "\n")
	}
	want := strings.Join([]string{
		"4= by API deleted=true ", "3=20 by op deleted=false 1", "2=30 by API deleted=false ",
		"1=20 by ann deleted=false tuning", "0=10 by API deleted=false ",
	}, "\n")
	if got := show(0); got != want {
		t.Errorf("history\n%s\nwant\n%s", got, want)
	}
	if got := show(2); got != strings.Join(strings.Split(want, "\n")[:2], "\n") {
		t.Errorf("history of two\n%s", got)
	}
	refused(w, w.vars.History, &pb.HistoryRequest{Session: "s", Identifier: "x", Limit: 1001}, outrigger.Invalid, "limit is 1001; give 1 to 1000, or 0 for 50")
	refused(w, w.vars.History, &pb.HistoryRequest{Session: "s", Identifier: "y"}, outrigger.NotFound, "Variable not found: y")

	// Registered again with a tighter limit: an old value must satisfy it.
	must(w, w.vars.Register, &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: value("integer", "1"), ConstraintsJson: `{"max":15}`})
	refused(w, w.vars.Rollback, &pb.RollbackRequest{Session: "s", Identifier: "x", TargetVersion: 2}, outrigger.Invalid, "value 30 is above maximum 15")
	refused(w, w.vars.Rollback, &pb.RollbackRequest{Session: "s", Identifier: "x", TargetVersion: 4}, outrigger.Invalid, "version 4 of x is its deletion, which has no value; choose another version")
	if v := must(w, w.vars.Rollback, &pb.RollbackRequest{Session: "s", Identifier: "x", TargetVersion: 0}); string(v.GetValue().GetJson()) != "10" || v.GetVersion().GetCounter() != 6 {
		t.Errorf("rollback to 0 gave %v", v)
	}
}

func TestHistoryDefaultsToFifty(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	w.register("s", "x", value("integer", "0"))
	for i := 1; i <= 60; i++ {
		w.set("s", "x", fmt.Sprint(i))
	}
	h := must(w, w.vars.History, &pb.HistoryRequest{Session: "s", Identifier: "x"}).GetEntries()
	if len(h) != 50 || h[0].GetVersion().GetCounter() != 60 || h[49].GetVersion().GetCounter() != 11 {
		t.Errorf("%d entries from %v", len(h), h[0].GetVersion().GetCounter())
	}
}

// A request id never writes twice: repeating a call gives the first answer, even when
// the same call without the id would fail by now.
func TestRequestIDs(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	id := func(s string) *pb.WriteOptions { return &pb.WriteOptions{RequestId: s} }
	reg := &pb.RegisterRequest{Key: &pb.Key{Session: "s", Name: "x"}, Value: value("integer", "0"), Options: id("r1")}
	first := must(w, w.vars.Register, reg)
	head := w.log.Head()
	if again := must(w, w.vars.Register, reg); !proto.Equal(first, again) {
		t.Errorf("repeated register gave %v, first %v", again, first)
	}
	set := setReq("s", "x", "1")
	set.ExpectedVersion, set.Options = ptr[int32](0), id("r2")
	v1 := must(w, w.vars.Set, set)
	w.set("s", "x", "2")
	if again := must(w, w.vars.Set, set); !proto.Equal(v1, again) {
		t.Errorf("repeated set gave %v, first %v", again, v1)
	}
	w.holds("s", "x", "2", 2)
	del := getReq("s", "x")
	del.Options = id("r3")
	gone := must(w, w.vars.Delete, del)
	if again := must(w, w.vars.Delete, del); !proto.Equal(gone, again) {
		t.Errorf("repeated delete gave %v, first %v", again, gone)
	}
	if got := w.log.Head(); got != head+3 {
		t.Errorf("%d events, want 3 (set, set, delete)", got-head)
	}
	// Reuse for something else is refused, in another session it is another id.
	other := setReq("s", "x", "9")
	other.Options = id("r3")
	refused(w, w.vars.Set, other, outrigger.Invalid, `options.request_id "r3" was used for another write of this session; use a new one`)
	w.session("t")
	w.register("t", "x", value("integer", "0"))
	elsewhere := setReq("t", "x", "9")
	elsewhere.Options = id("r3")
	must(w, w.vars.Set, elsewhere)

	// Batches.
	w.register("t", "y", value("integer", "0"))
	batch := &pb.BatchSetRequest{Session: "t", Options: id("b1"), Items: []*pb.SetItem{
		{Identifier: "x", Value: &pb.Value{Json: []byte("10")}}, {Identifier: "y", Value: &pb.Value{Json: []byte(`"bad"`)}},
	}}
	b1 := must(w, w.vars.BatchSet, batch)
	w.set("t", "x", "11")
	b2 := must(w, w.vars.BatchSet, batch)
	if !proto.Equal(b1.GetVariables()["x"], b2.GetVariables()["x"]) || b2.GetErrors()["y"].GetKind() != "invalid" {
		t.Errorf("repeated batch gave %v, first %v", b2, b1)
	}
	w.holds("t", "x", "11", 3)
}

// The first answer is folded from the log when other writes lie between; the deletion of
// a session in an earlier life of the name, which its own events do not show, is no
// obstacle.
func TestRequestIDAfterASecondLife(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	w.register("s", "x", value("integer", "0"))
	must(w, w.vars.DeleteSession, &pb.GetSessionRequest{Id: "s"})
	w.session("s")
	w.register("s", "x", value("string", `"a"`))
	req := setReq("s", "x", `"b"`)
	req.Options = &pb.WriteOptions{RequestId: "r"}
	first := must(w, w.vars.Set, req)
	w.set("s", "x", `"c"`)
	if again := must(w, w.vars.Set, req); !proto.Equal(first, again) {
		t.Errorf("repeated set gave %v, first %v", again, first)
	}
}

// Events the service would never append do not stop a variable from being written.
func TestAlienEventsAreSteppedOver(t *testing.T) {
	w := newWorld(t)
	w.session("s")
	w.register("s", "x", value("integer", "0"))
	alien := &pb.Event{Payload: &pb.Event_VariableRegistered{VariableRegistered: &pb.VariableRegistered{Id: "other"}}}
	app, err := w.log.Append(w.ctx, "", eventlog.Write{Aggregate: "var/default/s/x", Expect: eventlog.Any, Events: []*pb.Event{alien}})
	if err != nil {
		t.Fatal(err)
	}
	must(w, w.coh.Read, &pb.ReadRequest{MinPosition: app.Last})
	w.holds("s", "x", "0", 0)
	if v := w.set("s", "x", "1"); v.GetVersion().GetCounter() != 1 || w.log.Head() != app.Last+1 {
		t.Errorf("set after an alien event gave %v", v)
	}
}

func TestNotReady(t *testing.T) {
	svc, err := variables.New(memory.New(), variables.Options{Region: "us"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := svc.Get(t.Context(), getReq("s", "x")); err == nil || !strings.Contains(err.Error(), "catching up") {
		t.Errorf("before Run: %v", err)
	}
	if _, err := variables.New(memory.New(), variables.Options{}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("without a region: %v", err)
	}
	if _, err := variables.New(nil, variables.Options{Region: "us"}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("without a log: %v", err)
	}
	if _, err := variables.New(memory.New(), variables.Options{Region: "us", FeedRing: -1}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("with a negative ring: %v", err)
	}
}
