package outriggerv1_test

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

// golden is a kind of message whose bytes are kept: on disk in a log, in flight between
// programs of different versions, or in a policy that outlives its writer. Its examples
// are testdata/<name>.bin, the bytes, with testdata/<name>.txtpb saying what they mean.
// Examples are never rewritten: when a message gets a new field, -update writes another
// one, <name>_2, beside them.
type golden struct {
	name    string
	message proto.Message
	choice  protoreflect.Name // of the top message's oneof, if it has one
}

func goldens() []golden {
	out := []golden{
		{"feed_changes", &pb.FeedFrame{}, "changes"},
		{"feed_ack", &pb.FeedFrame{}, "ack"},
		{"feed_reset", &pb.FeedFrame{}, "reset"},
		{"feed_selected", &pb.FeedFrame{}, "selected"},
		{"feed_subscribe", &pb.FeedRequest{}, "subscribe"},
		{"feed_heartbeat", &pb.FeedRequest{}, "heartbeat"},
		{"feed_select", &pb.FeedRequest{}, "select"},
		{"report_delta", &pb.Delta{}, ""},
		{"report_ack", &pb.DeltaAck{}, ""},
		{"xds_model_policy", &pb.ModelPolicy{}, ""},
		{"xds_mesh_policy", &pb.MeshPolicy{}, ""},
	}
	payloads := (&pb.Event{}).ProtoReflect().Descriptor().Oneofs().ByName("payload").Fields()
	for i := range payloads.Len() {
		n := payloads.Get(i).Name()
		out = append(out, golden{"event_" + string(n), &pb.Event{}, n})
	}
	return out
}

// TestGoldenBytes: every example is read without a rest, means what its text says, and is
// written as the same bytes again; together the examples use every field.
func TestGoldenBytes(t *testing.T) {
	known := map[string]bool{filepath.Base(fieldsFile): true}
	for _, g := range goldens() {
		t.Run(g.name, func(t *testing.T) {
			used := map[protoreflect.FullName]bool{}
			examples := g.examples(t)
			for _, e := range examples {
				known[e+".bin"], known[e+".txtpb"] = true, true
				note(g.check(t, e).ProtoReflect(), used)
			}
			var missing []string
			full := g.fill()
			wanted := map[protoreflect.FullName]bool{}
			note(full.ProtoReflect(), wanted)
			for n := range maps.Keys(wanted) {
				if !used[n] {
					missing = append(missing, string(n))
				}
			}
			slices.Sort(missing)
			switch {
			case len(missing) == 0:
			case !*update:
				t.Errorf("no example uses %s; run go test -update and commit the new example", strings.Join(missing, ", "))
			default:
				known[g.write(t, len(examples)+1, full)+".bin"] = true
			}
		})
	}
	if t.Failed() || *update {
		return
	}
	entries, err := os.ReadDir("testdata")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !known[e.Name()] {
			t.Errorf("testdata/%s is no example of anything: was a kind of message removed?", e.Name())
		}
	}
}

// examples lists the names of a kind's examples.
func (g golden) examples(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, pattern := range []string{g.name + ".txtpb", g.name + "_[0-9]*.txtpb"} {
		found, err := filepath.Glob(filepath.Join("testdata", pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			out = append(out, strings.TrimSuffix(filepath.Base(f), ".txtpb"))
		}
	}
	return out
}

func (g golden) check(t *testing.T, example string) proto.Message {
	t.Helper()
	path := filepath.Join("testdata", example)
	text, err := os.ReadFile(path + ".txtpb")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path + ".bin")
	if err != nil {
		t.Fatal(err)
	}
	meant, read := g.message.ProtoReflect().New().Interface(), g.message.ProtoReflect().New().Interface()
	if err := prototext.Unmarshal(text, meant); err != nil {
		t.Fatalf("%s.txtpb: %v", path, err)
	}
	if err := proto.Unmarshal(raw, read); err != nil {
		t.Fatalf("%s.bin: %v", path, err)
	}
	if rest := unknown(read.ProtoReflect()); rest != "" {
		t.Errorf("%s.bin: %s is not understood any more", path, rest)
	}
	if !proto.Equal(meant, read) {
		t.Errorf("%s.bin is read as\n%s\nbut was written as\n%s", path, prototext.Format(read), prototext.Format(meant))
	}
	again, err := proto.MarshalOptions{Deterministic: true}.Marshal(meant)
	if err != nil || !bytes.Equal(again, raw) {
		t.Errorf("%s is written as\n%x\nbut was written as\n%x, %v", path, again, raw, err)
	}
	return read
}

func (g golden) write(t *testing.T, n int, m proto.Message) string {
	t.Helper()
	example := g.name
	if n > 1 {
		example = fmt.Sprintf("%s_%d", g.name, n)
	}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	// prototext varies its spacing; files should not.
	text := strings.ReplaceAll(prototext.MarshalOptions{Multiline: true}.Format(m), ":  ", ": ")
	for suffix, content := range map[string][]byte{".bin": raw, ".txtpb": []byte(text)} {
		if err := os.WriteFile(filepath.Join("testdata", example+suffix), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return example
}

// fill sets every field of the message and of all below it to something that says where
// it came from: strings their field's name, numbers their field's number.
func (g golden) fill() proto.Message {
	m := g.message.ProtoReflect().New()
	fill(m, g.choice)
	return m.Interface()
}

func fill(m protoreflect.Message, choice protoreflect.Name) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if f.ContainingOneof() != nil && !f.HasOptionalKeyword() && f.Name() != choice {
			continue
		}
		switch {
		case f.IsMap():
			v := m.NewField(f)
			v.Map().Set(protoreflect.ValueOfString("key").MapKey(), example(f.MapValue(), v.Map().NewValue))
			m.Set(f, v)
		case f.IsList():
			v := m.NewField(f)
			v.List().Append(example(f, v.List().NewElement))
			m.Set(f, v)
		default:
			m.Set(f, example(f, func() protoreflect.Value { return m.NewField(f) }))
		}
	}
}

func example(f protoreflect.FieldDescriptor, fresh func() protoreflect.Value) protoreflect.Value {
	n := int64(f.Number())
	switch f.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(string(f.Name()))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(f.Name()))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(100 + n))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(1_700_000_000 + n) // seconds of times and durations
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(uint32(1000 + n))
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(1<<40 + uint64(n))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(float64(n) + 0.25)
	case protoreflect.EnumKind:
		values := f.Enum().Values()
		return protoreflect.ValueOfEnum(values.Get(values.Len() - 1).Number())
	case protoreflect.MessageKind:
		v := fresh()
		fill(v.Message(), "")
		return v
	}
	panic(fmt.Sprintf("%s has the kind %s, which no message had so far; say here what an example is", f.FullName(), f.Kind()))
}

// note collects the fields that are set in m and below.
func note(m protoreflect.Message, used map[protoreflect.FullName]bool) {
	walk(m, func(_ protoreflect.Message, f protoreflect.FieldDescriptor) { used[f.FullName()] = true })
}

// unknown names a message that holds bytes its schema does not explain.
func unknown(m protoreflect.Message) (found string) {
	look := func(m protoreflect.Message) {
		if len(m.GetUnknown()) > 0 {
			found = fmt.Sprintf("%x in %s", m.GetUnknown(), m.Descriptor().FullName())
		}
	}
	look(m)
	walk(m, func(below protoreflect.Message, _ protoreflect.FieldDescriptor) { look(below) })
	return found
}

// walk visits every set field of m and below, with the message it holds or m itself.
func walk(m protoreflect.Message, visit func(protoreflect.Message, protoreflect.FieldDescriptor)) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		visit(m, f)
		below := func(v protoreflect.Value) {
			visit(v.Message(), f)
			walk(v.Message(), visit)
		}
		switch {
		case f.IsMap() && f.MapValue().Message() != nil:
			v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { below(v); return true })
		case f.IsMap() || f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				below(v.List().Get(i))
			}
		default:
			below(v)
		}
		return true
	})
}
