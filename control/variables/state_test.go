package variables

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

var (
	testOrigin = origin{region: "us", incarnation: 7}
	testLimits = foldLimits{graves: 1}
)

// history draws a log of events over few sessions and names, sensible or not: sets of
// unknown variables, sessions created twice, expiries that come too early.
func history(t *rapid.T) []*pb.Event {
	n := rapid.IntRange(1, 120).Draw(t, "events")
	sequences := make(map[string]uint64)
	at := int64(1_700_000_000)
	var out []*pb.Event
	for i := range n {
		s := rapid.SampledFrom([]string{"s", "t"}).Draw(t, "session")
		name := rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f"}).Draw(t, "name")
		at += rapid.Int64Range(0, 5).Draw(t, "seconds")
		e := &pb.Event{Position: uint64(i + 1), At: &timestamppb.Timestamp{Seconds: at}, Hlc: uint64(i + 1), Actor: "x", Source: "y"}
		version := &pb.Version{Counter: int32(i)}
		if rapid.IntRange(0, 4).Draw(t, "foreign") == 0 {
			version.Context = []*pb.ContextEntry{{Region: "eu", Position: uint64(rapid.IntRange(1, 50).Draw(t, "eu"))}}
		}
		aggregate := varAggregate(outrigger.Key{Tenant: "default", Session: s, Name: name})
		switch rapid.IntRange(0, 14).Draw(t, "kind") {
		case 0, 1:
			aggregate = sessionAggregate(sessionID{"default", s})
			e.Payload = &pb.Event_SessionCreated{SessionCreated: &pb.SessionCreated{Ttl: durationpb.New(10e9), Metadata: map[string]string{"k": name}}}
		case 2:
			aggregate = sessionAggregate(sessionID{"default", s})
			e.Payload = &pb.Event_SessionDeleted{SessionDeleted: &pb.SessionDeleted{Reason: rapid.SampledFrom([]string{reasonCleanup, reasonExpired}).Draw(t, "reason")}}
		case 3, 4, 5, 6:
			e.Payload = &pb.Event_VariableRegistered{VariableRegistered: &pb.VariableRegistered{
				Id: variableID(name, i), Value: &pb.Value{Type: "integer", Json: []byte("1")}, ConstraintsJson: `{"max":9}`, Version: version,
				Metadata: map[string]string{"n": fmt.Sprint(i)},
			}}
		case 7, 8:
			e.Payload = &pb.Event_VariableSet{VariableSet: &pb.VariableSet{
				Value: &pb.Value{Type: "integer", Json: []byte("2")}, Version: version, Metadata: map[string]string{fmt.Sprint(i % 3): "v"},
			}}
		case 9, 10:
			e.Payload = &pb.Event_VariableDeleted{VariableDeleted: &pb.VariableDeleted{Version: version}}
		case 12:
			e.Payload = &pb.Event_OptimizationStarted{OptimizationStarted: &pb.OptimizationStarted{Optimizer: name}}
		case 13:
			e.Payload = &pb.Event_OptimizationStopped{OptimizationStopped: &pb.OptimizationStopped{OptimizationId: optimizationID(i, uint64(i))}}
		case 14:
			aggregate = sessionAggregate(sessionID{"default", s})
			to := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "to")
			e.Payload = &pb.Event_DependencyAdded{DependencyAdded: &pb.DependencyAdded{Dependency: &pb.Dependency{From: name, To: to, Type: "data"}}}
		case 11:
			aggregate = "alert/x"
			e.Payload = &pb.Event_AlertRaised{AlertRaised: &pb.AlertRaised{}}
		}
		sequences[aggregate]++
		e.Aggregate, e.Sequence = aggregate, sequences[aggregate]
		out = append(out, e)
	}
	return out
}

func encoded(t interface{ Fatal(...any) }, st *state) []byte {
	raw, err := st.freeze().encode()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// A log snapshot taken anywhere plus the tail is the same state as a full replay.
func TestSnapshotPlusTailIsReplay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		events := history(t)
		cut := rapid.IntRange(0, len(events)).Draw(t, "cut")
		full := newState(testOrigin, testLimits)
		var middle []byte
		for i, e := range events {
			if i == cut {
				middle = encoded(t, full)
			}
			apply(full, e)
		}
		if cut == len(events) {
			middle = encoded(t, full)
		}
		st, err := decodeState(middle, testOrigin, testLimits)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events[cut:] {
			apply(st, e)
		}
		if want, got := encoded(t, full), encoded(t, st); !bytes.Equal(want, got) {
			t.Fatalf("states differ after a cut at %d of %d", cut, len(events))
		}
		if full.live != st.live {
			t.Fatalf("live %d, after restore %d", full.live, st.live)
		}
		checkInvariants(t, full)
	})
}

// checkInvariants compares the indexes of a state with what they are made from.
func checkInvariants(t interface{ Fatalf(string, ...any) }, st *state) {
	live, locked := 0, 0
	for id, s := range st.sessions {
		n, dead := 0, 0
		for name, v := range s.vars {
			if v.pb.GetKey().GetName() != name || s.id != id {
				t.Fatalf("variable %q is filed under %q of %v", v.pb.GetKey().GetName(), name, id)
			}
			if v.deleted {
				dead++
				continue
			}
			n++
			if v.pb.GetOptimization() != nil {
				locked++
				if st.locked[keyOf(v)] != v {
					t.Fatalf("the lock of %q is not indexed", name)
				}
			}
			if s.ids[v.pb.GetId()] != name {
				t.Fatalf("id %q is not indexed", v.pb.GetId())
			}
		}
		if n != s.live || n != len(s.ids) || dead > st.limits.graves {
			t.Fatalf("session %v: live %d, counted %d, ids %d, tombstones %d", id, s.live, n, len(s.ids), dead)
		}
		for e := range s.deps {
			if s.deps.path(e.to, e.from) != nil || s.vars[e.from] == nil || s.vars[e.from].deleted || s.vars[e.to] == nil || s.vars[e.to].deleted {
				t.Fatalf("session %v: edge %v is part of a cycle or of a variable that is gone", id, e)
			}
		}
		live += n
	}
	if locked != len(st.locked) {
		t.Fatalf("%d locks, %d in the index", locked, len(st.locked))
	}
	if live != st.live {
		t.Fatalf("live is %d, counted %d", st.live, live)
	}
}

// A cache that applies the changes (and nothing else) holds what the state holds, and
// key_previous never lies below the key's true previous change.
func TestChangesRebuildTheState(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		st := newState(testOrigin, testLimits)
		type entry struct{ value *pb.Variable }
		cache := make(map[string]entry)
		last := make(map[string]uint64) // true previous change per key, sessions' included
		for _, e := range history(t) {
			c := apply(st, e).change
			if c == nil {
				continue
			}
			if c.GetPosition() != e.GetPosition() || c.GetVersion() == nil || c.GetVersion().GetDot().GetPosition() != e.GetPosition() {
				t.Fatalf("change %v of the event at %d", c, e.GetPosition())
			}
			prefix := c.GetKey().GetSession() + "/"
			if c.GetScope() == pb.Change_SESSION {
				for k := range cache {
					if strings.HasPrefix(k, prefix) {
						delete(cache, k)
					}
				}
				for _, n := range []string{"a", "b", "c", "d", "e", "f"} {
					last[prefix+n] = c.GetPosition()
				}
				continue
			}
			k := prefix + c.GetKey().GetName()
			if c.GetKeyPrevious() < last[k] || c.GetKeyPrevious() >= c.GetPosition() {
				t.Fatalf("%s at %d: key_previous %d, true previous %d", k, c.GetPosition(), c.GetKeyPrevious(), last[k])
			}
			last[k] = c.GetPosition()
			if c.GetDeleted() {
				delete(cache, k)
			} else {
				cache[k] = entry{c.GetVariable()}
			}
		}
		n := 0
		for id, s := range st.sessions {
			for name, v := range s.vars {
				if v.deleted {
					continue
				}
				n++
				if got := cache[id.name+"/"+name].value; !proto.Equal(got, v.pb) {
					t.Fatalf("cache holds %v, state %v", got, v.pb)
				}
			}
		}
		if n != len(cache) {
			t.Fatalf("cache has %d entries, state %d variables", len(cache), n)
		}
	})
}

// Contexts only grow along a variable's versions and always cover the version's own dot.
func TestVersionsDominateTheirPast(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		st := newState(testOrigin, testLimits)
		last := make(map[string]*pb.Version)
		for _, e := range history(t) {
			eff := apply(st, e)
			if eff.next == nil {
				if eff.change.GetDeleted() || eff.change.GetScope() == pb.Change_SESSION {
					clear(last)
				}
				continue
			}
			v, name := eff.next.pb.GetVersion(), eff.session.name+"/"+eff.next.pb.GetKey().GetName()
			if at(v, "us") < v.GetDot().GetPosition() {
				t.Fatalf("context %v does not cover %v", v.GetContext(), v.GetDot())
			}
			session := st.sessions[eff.session]
			if before := last[name]; before != nil && session.floor < before.GetDot().GetPosition() {
				for _, c := range before.GetContext() {
					if at(v, c.GetRegion()) < c.GetPosition() {
						t.Fatalf("%v forgets %v", v, before)
					}
				}
			}
			last[name] = v
		}
	})
}

func at(v *pb.Version, region string) uint64 {
	for _, c := range v.GetContext() {
		if c.GetRegion() == region {
			return c.GetPosition()
		}
	}
	return 0
}

// The fold takes anything: it neither panics nor breaks its indexes, and what it makes
// survives a log snapshot.
func FuzzApply(f *testing.F) {
	key := outrigger.Key{Tenant: "default", Session: "s", Name: "x"}
	for _, e := range []*pb.Event{
		{Aggregate: "session/default/s", Payload: &pb.Event_SessionCreated{SessionCreated: &pb.SessionCreated{}}},
		{Aggregate: "session/default/s", Payload: &pb.Event_SessionDeleted{SessionDeleted: &pb.SessionDeleted{Reason: "expired"}}},
		{Aggregate: varAggregate(key), Payload: &pb.Event_VariableRegistered{VariableRegistered: &pb.VariableRegistered{Id: "var_x_1"}}},
		{Aggregate: varAggregate(key), Payload: &pb.Event_VariableSet{}},
		{Aggregate: varAggregate(key), Payload: &pb.Event_VariableDeleted{VariableDeleted: &pb.VariableDeleted{}}},
	} {
		raw, err := proto.Marshal(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var e pb.Event
		if proto.Unmarshal(raw, &e) != nil {
			return
		}
		st := newState(testOrigin, testLimits)
		apply(st, &pb.Event{Position: 1, Sequence: 1, Aggregate: "session/default/s", Payload: &pb.Event_SessionCreated{SessionCreated: &pb.SessionCreated{}}})
		apply(st, &pb.Event{Position: 2, Sequence: 1, Aggregate: varAggregate(key), Payload: &pb.Event_VariableRegistered{VariableRegistered: &pb.VariableRegistered{Id: "var_x_1"}}})
		e.Position = 3
		apply(st, &e)
		checkInvariants(t, st)
		if st.applied != 3 {
			t.Fatalf("applied %d", st.applied)
		}
		first := encoded(t, st)
		back, err := decodeState(first, testOrigin, testLimits)
		if err != nil {
			t.Fatalf("a state does not survive its snapshot: %v", err)
		}
		if !bytes.Equal(first, encoded(t, back)) {
			t.Fatal("the snapshot of the restored state differs")
		}
	})
}

func FuzzDecodeState(f *testing.F) {
	st := newState(testOrigin, testLimits)
	apply(st, &pb.Event{Position: 1, Sequence: 1, Aggregate: "session/default/s", Payload: &pb.Event_SessionCreated{SessionCreated: &pb.SessionCreated{}}})
	apply(st, &pb.Event{Position: 2, Sequence: 1, Aggregate: "var/default/s/x", Payload: &pb.Event_VariableRegistered{VariableRegistered: &pb.VariableRegistered{Id: "var_x_1"}}})
	f.Add(encoded(f, st))
	f.Add([]byte{snapshotFormat})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := decodeState(raw, testOrigin, testLimits)
		if err != nil {
			return
		}
		again, err := decodeState(encoded(t, got), testOrigin, testLimits)
		if err != nil {
			t.Fatalf("a decoded state does not survive encoding: %v", err)
		}
		if !bytes.Equal(encoded(t, got), encoded(t, again)) {
			t.Fatal("encoding is not stable")
		}
	})
}

func TestSnapshotOfAnotherLogIsRefused(t *testing.T) {
	raw := encoded(t, newState(testOrigin, testLimits))
	for _, o := range []origin{{"us", 8}, {"eu", 7}} {
		if _, err := decodeState(raw, o, testLimits); !errors.Is(err, errOtherLog) {
			t.Errorf("%v: %v", o, err)
		}
	}
	if _, err := decodeState([]byte{99}, testOrigin, testLimits); err == nil {
		t.Error("an unknown format was accepted")
	}
}

// The matcher agrees with an anchored regular expression in which only * is special.
func FuzzMatchGlob(f *testing.F) {
	for _, s := range [][2]string{
		{"*", ""}, {"a*a", "a"}, {"a*b*c", "aXbYc"}, {"**", "x"}, {"*ab*ab", "abab"}, {"*a", "ba"}, {"", "x"}, {"a.c", "abc"}, {"*aab", "aaaab"},
	} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, pattern, name string) {
		if len(pattern) > 100 || len(name) > 1000 || !utf8.ValidString(pattern) || !utf8.ValidString(name) {
			return // names are UTF-8; a regexp matches by characters
		}
		want := pattern == ""
		if !want {
			parts := strings.Split(pattern, "*")
			for i := range parts {
				parts[i] = regexp.QuoteMeta(parts[i])
			}
			want = regexp.MustCompile(`(?s)\A` + strings.Join(parts, ".*") + `\z`).MatchString(name)
		}
		if got := matchGlob(pattern, name); got != want {
			t.Errorf("matchGlob(%q, %q) = %v", pattern, name, got)
		}
	})
}
