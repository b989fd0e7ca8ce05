package wire_test

import (
	"bytes"
	"math"
	"reflect"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/internal/wire"
)

var (
	word  = rapid.StringN(1, 12, -1)
	words = rapid.MapOf(word, word)
	// What protobuf's Timestamp holds: years 1 to 9999, in UTC, to the nanosecond.
	instant = rapid.Custom(func(t *rapid.T) time.Time {
		s := rapid.Int64Range(-62135596800+1, 253402300799).Draw(t, "seconds")
		return time.Unix(s, rapid.Int64Range(0, 999_999_999).Draw(t, "nanos")).UTC()
	})
	key = rapid.Custom(func(t *rapid.T) outrigger.Key {
		return outrigger.Key{Tenant: word.Draw(t, "tenant"), Session: word.Draw(t, "session"), Name: word.Draw(t, "name")}
	})
	value = rapid.Custom(func(t *rapid.T) outrigger.Value {
		return outrigger.Value{Type: rapid.SampledFrom(outrigger.Types()).Draw(t, "type"),
			JSON: some(rapid.SliceOf(rapid.Byte()).Draw(t, "json")), Binary: some(rapid.SliceOf(rapid.Byte()).Draw(t, "binary"))}
	})
	dot = rapid.Custom(func(t *rapid.T) outrigger.Dot {
		return outrigger.Dot{Region: word.Draw(t, "region"), Incarnation: rapid.Uint64().Draw(t, "incarnation"), Position: rapid.Uint64().Draw(t, "position")}
	})
	version = rapid.Custom(func(t *rapid.T) outrigger.Version {
		v := outrigger.Version{Counter: rapid.Int32().Draw(t, "counter"), Dot: dot.Draw(t, "dot"), HLC: rapid.Uint64().Draw(t, "hlc")}
		if c := rapid.MapOf(word, rapid.Uint64()).Draw(t, "context"); len(c) > 0 {
			v.Context = c
		}
		return v
	})
	constraints = rapid.Custom(func(t *rapid.T) outrigger.Constraints {
		var c outrigger.Constraints
		if rapid.Bool().Draw(t, "limited") {
			limit := rapid.Float64Range(-math.MaxFloat64, math.MaxFloat64).Draw(t, "min")
			c.Min = &limit
		}
		if rapid.Bool().Draw(t, "sized") {
			n := rapid.IntRange(0, 100).Draw(t, "max_length")
			c.MaxLength = &n
		}
		c.Pattern = rapid.StringN(0, 8, -1).Draw(t, "pattern")
		if s := rapid.SliceOfN(word, 0, 3).Draw(t, "choices"); len(s) > 0 {
			c.Choices = s
		}
		return c
	})
	variable = rapid.Custom(func(t *rapid.T) outrigger.Variable {
		return outrigger.Variable{ID: word.Draw(t, "id"), Key: key.Draw(t, "key"), Value: value.Draw(t, "value"),
			Constraints: constraints.Draw(t, "constraints"), Metadata: someMap(words.Draw(t, "metadata")), Source: word.Draw(t, "source"),
			Version: version.Draw(t, "version"), CreatedAt: instant.Draw(t, "created"), UpdatedAt: instant.Draw(t, "updated")}
	})
	session = rapid.Custom(func(t *rapid.T) outrigger.Session {
		return outrigger.Session{Tenant: word.Draw(t, "tenant"), ID: word.Draw(t, "id"), TTL: time.Duration(rapid.Int64().Draw(t, "ttl")),
			Metadata: someMap(words.Draw(t, "metadata")), CreatedAt: instant.Draw(t, "created"), LastUsedAt: instant.Draw(t, "used"),
			Variables: int(rapid.Int32().Draw(t, "variables"))}
	})
	node = rapid.Custom(func(t *rapid.T) outrigger.Node {
		return outrigger.Node{ID: word.Draw(t, "id"), Kind: word.Draw(t, "kind"), Region: word.Draw(t, "region"),
			Zone: word.Draw(t, "zone"), Labels: someMap(words.Draw(t, "labels"))}
	})
)

// some and someMap make the empty ones nil: protobuf does not tell them apart.
func some(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	return b
}

func someMap(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	return m
}

// law is the round trip of one message: the vocabulary survives the way through the
// message and its bytes, every field of it, and equal values have equal bytes.
func law[V any, M proto.Message](name string, gen *rapid.Generator[V], to func(V) M, from func(M) V) func(*testing.T) {
	return func(t *testing.T) {
		changed := map[string]bool{} // fields whose content was seen to travel
		rapid.Check(t, func(t *rapid.T) {
			v := gen.Draw(t, name)
			m := to(v)
			if got := from(m); !reflect.DeepEqual(got, v) {
				t.Fatalf("through the message:\n%#v\n%#v", v, got)
			}
			opts := proto.MarshalOptions{Deterministic: true}
			raw, err := opts.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			fresh := m.ProtoReflect().New().Interface().(M)
			if err := proto.Unmarshal(raw, fresh); err != nil {
				t.Fatal(err)
			}
			if got := from(fresh); !reflect.DeepEqual(got, v) {
				t.Fatalf("through its bytes:\n%#v\n%#v", v, got)
			}
			again, err := opts.Marshal(to(from(fresh)))
			if err != nil || !bytes.Equal(again, raw) {
				t.Fatalf("equal values, different bytes:\n%x\n%x, %v", raw, again, err)
			}
			for i := range reflect.TypeFor[V]().NumField() {
				if !reflect.ValueOf(v).Field(i).IsZero() {
					changed[reflect.TypeFor[V]().Field(i).Name] = true
				}
			}
		})
		// A field that the generator leaves out would be converted by nobody, unnoticed.
		for i := range reflect.TypeFor[V]().NumField() {
			if f := reflect.TypeFor[V]().Field(i).Name; !changed[f] && !t.Failed() {
				t.Errorf("the generator never sets %s.%s", name, f)
			}
		}
	}
}

func TestRoundTrips(t *testing.T) {
	t.Run("Key", law("Key", key, wire.KeyPB, wire.Key))
	t.Run("Value", law("Value", value, wire.ValuePB, wire.Value))
	t.Run("Dot", law("Dot", dot, wire.DotPB, wire.Dot))
	t.Run("Version", law("Version", version, wire.VersionPB, wire.Version))
	t.Run("Variable", law("Variable", variable, wire.VariablePB, wire.Variable))
	t.Run("Session", law("Session", session, wire.SessionPB, wire.Session))
	t.Run("Node", law("Node", node, wire.NodePB, wire.Node))
}

func TestTime(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		at := instant.Draw(t, "at")
		if got := wire.Time(wire.TimePB(at)); !got.Equal(at) || got.Location() != time.UTC {
			t.Fatalf("%s became %s", at, got)
		}
	})
	// Unset and zero are the same; the beginning of Unix time is neither.
	if wire.TimePB(time.Time{}) != nil || !wire.Time(nil).IsZero() {
		t.Error("the zero time is not unset")
	}
	epoch := time.Unix(0, 0)
	if got := wire.TimePB(epoch); got == nil || !wire.Time(got).Equal(epoch) || wire.Time(&timestamppb.Timestamp{}).IsZero() {
		t.Errorf("the epoch became %v", got)
	}
}

// Context entries are sorted by region and unique, whatever the order of the map, so that
// equal versions are equal bytes in logs and policies.
func TestContextIsCanonical(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := version.Draw(t, "version")
		entries := wire.VersionPB(v).GetContext()
		if len(entries) != len(v.Context) {
			t.Fatalf("%d entries for %d regions", len(entries), len(v.Context))
		}
		for i, e := range entries {
			if e.GetPosition() != v.Context[e.GetRegion()] || i > 0 && entries[i-1].GetRegion() >= e.GetRegion() {
				t.Fatalf("%v of %v", entries, v.Context)
			}
		}
		shuffled := wire.VersionPB(v)
		slices.Reverse(shuffled.Context)
		if got := wire.Version(shuffled); !reflect.DeepEqual(got, v) {
			t.Fatalf("order matters to the reader: %v, %v", got, v)
		}
	})
	double := &pb.Version{Context: []*pb.ContextEntry{{Region: "eu", Position: 9}, {Region: "eu", Position: 3}}}
	if got := wire.Version(double).Context; got["eu"] != 9 || len(got) != 1 {
		t.Errorf("a region named twice: %v", got)
	}
}

// Messages of other programs may leave anything out.
func TestUnset(t *testing.T) {
	if got := wire.Key(&pb.Key{Session: "s", Name: "n"}); got != (outrigger.Key{Tenant: outrigger.DefaultTenant, Session: "s", Name: "n"}) {
		t.Errorf("key: %v", got)
	}
	if wire.Tenant("") != "default" || wire.Tenant("t") != "t" {
		t.Error("tenants")
	}
	if got := wire.Key(nil); got != (outrigger.Key{Tenant: "default"}) {
		t.Errorf("no key: %v", got)
	}
	if got := wire.Variable(nil); !reflect.DeepEqual(got, outrigger.Variable{Key: outrigger.Key{Tenant: "default"}}) {
		t.Errorf("no variable: %+v", got)
	}
	if got := wire.Session(nil); !reflect.DeepEqual(got, outrigger.Session{Tenant: "default"}) {
		t.Errorf("no session: %+v", got)
	}
	if !reflect.DeepEqual(wire.Version(nil), outrigger.Version{}) || !reflect.DeepEqual(wire.Node(nil), outrigger.Node{}) || !wire.Dot(nil).IsZero() {
		t.Error("no version, node or dot")
	}
	if got := wire.Variable(&pb.Variable{Id: "v", ConstraintsJson: `{"unheard_of":1}`}); got.ID != "v" || got.Constraints.JSON() != "" {
		t.Errorf("constraints of a newer program: %+v", got)
	}
}
