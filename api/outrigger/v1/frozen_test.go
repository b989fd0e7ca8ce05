package outriggerv1_test

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

var update = flag.Bool("update", false, "add what is new to testdata; what is there already never changes")

// The wire format is kept by logs, policies on disk and programs of other versions. So
// testdata/fields.txt says of every field, enum value and method what it is, and lines
// are only ever added to it.

const fieldsFile = "testdata/fields.txt"

// files are the .proto files of this package.
var files = []protoreflect.FileDescriptor{
	pb.File_outrigger_v1_types_proto, pb.File_outrigger_v1_variables_proto, pb.File_outrigger_v1_coherence_proto,
	pb.File_outrigger_v1_events_proto, pb.File_outrigger_v1_reports_proto, pb.File_outrigger_v1_admin_proto,
	pb.File_outrigger_v1_xds_proto, pb.File_outrigger_v1_node_proto, pb.File_outrigger_v1_delivery_proto, pb.File_outrigger_v1_outcomes_proto, pb.File_outrigger_v1_optimizer_proto, pb.File_outrigger_v1_replication_proto,
}

// summary maps every name that the wire format depends on to what it is.
func summary(files ...protoreflect.FileDescriptor) map[string]string {
	out := map[string]string{}
	for _, f := range files {
		for i := range f.Messages().Len() {
			summariseMessage(out, f.Messages().Get(i))
		}
		for i := range f.Enums().Len() {
			summariseEnum(out, f.Enums().Get(i))
		}
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				out[name(m)] = fmt.Sprintf("rpc %s%s returns %s%s", stream(m.IsStreamingClient()), name(m.Input()), stream(m.IsStreamingServer()), name(m.Output()))
			}
		}
	}
	return out
}

func name(d protoreflect.Descriptor) string {
	return strings.TrimPrefix(string(d.FullName()), "outrigger.v1.")
}

func stream(yes bool) string {
	if yes {
		return "stream "
	}
	return ""
}

func summariseMessage(out map[string]string, m protoreflect.MessageDescriptor) {
	if m.IsMapEntry() {
		return // said by the field
	}
	for i := range m.Fields().Len() {
		f := m.Fields().Get(i)
		out[name(f)] = fmt.Sprintf("%d %s", f.Number(), typeAndLabel(f))
	}
	for i := range m.ReservedRanges().Len() {
		r := m.ReservedRanges().Get(i)
		for n := r[0]; n < r[1]; n++ {
			out[fmt.Sprintf("%s reserved %d", name(m), n)] = "number"
		}
	}
	for i := range m.ReservedNames().Len() {
		out[fmt.Sprintf("%s reserved %s", name(m), m.ReservedNames().Get(i))] = "name"
	}
	for i := range m.Enums().Len() {
		summariseEnum(out, m.Enums().Get(i))
	}
	for i := range m.Messages().Len() {
		summariseMessage(out, m.Messages().Get(i))
	}
}

func summariseEnum(out map[string]string, e protoreflect.EnumDescriptor) {
	for i := range e.Values().Len() {
		v := e.Values().Get(i)
		out[name(e)+"."+string(v.Name())] = fmt.Sprint(v.Number())
	}
}

func typeAndLabel(f protoreflect.FieldDescriptor) string {
	one := func(f protoreflect.FieldDescriptor) string {
		switch {
		case f.Message() != nil:
			return name(f.Message())
		case f.Enum() != nil:
			return name(f.Enum())
		}
		return f.Kind().String()
	}
	switch {
	case f.IsMap():
		return fmt.Sprintf("map<%s,%s> singular", one(f.MapKey()), one(f.MapValue()))
	case f.IsList():
		return one(f) + " repeated"
	case f.HasOptionalKeyword():
		return one(f) + " optional"
	case f.ContainingOneof() != nil:
		return one(f) + " oneof:" + string(f.ContainingOneof().Name())
	}
	return one(f) + " singular"
}

// changes compares the committed summary with the present one. Additions are fine;
// everything else breaks readers or writers that exist. A field may go when both its
// number and its name stay reserved.
func changes(was, is map[string]string) (broken, retired, added []string) {
	for _, n := range slices.Sorted(maps.Keys(was)) {
		now, there := is[n]
		message, field, isField := cutLast(n)
		number, _, hasType := strings.Cut(was[n], " ")
		switch {
		case there && now == was[n]:
		case there:
			broken = append(broken, fmt.Sprintf("%s was %q and is %q: bytes already written would be misread; keep it and add a field with a new number", n, was[n], now))
		case isField && hasType && is[message+" reserved "+number] != "" && is[message+" reserved "+field] != "":
			retired = append(retired, n)
		default:
			broken = append(broken, fmt.Sprintf("%s (%s) is gone: a removed field needs `reserved` for its number and its name; renamed, renumbered or removed otherwise, it breaks what is out there", n, was[n]))
		}
	}
	for _, n := range slices.Sorted(maps.Keys(is)) {
		if _, there := was[n]; !there {
			added = append(added, n)
		}
	}
	return broken, retired, added
}

func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, '.')
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

func readSummary(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile(fieldsFile)
	if os.IsNotExist(err) && *update {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(text)) {
		n, what, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " = ")
		if !ok {
			t.Fatalf("%s: cannot read the line %q", fieldsFile, line)
		}
		out[n] = what
	}
	return out
}

func TestFieldsAreFrozen(t *testing.T) {
	was, is := readSummary(t), summary(files...)
	broken, retired, added := changes(was, is)
	for _, b := range broken {
		t.Error(b)
	}
	if len(broken) > 0 || len(retired)+len(added) == 0 {
		return
	}
	if !*update {
		t.Fatalf("new: %v\nretired: %v\nrun go test -update and commit %s", added, retired, fieldsFile)
	}
	var text strings.Builder
	for _, n := range slices.Sorted(maps.Keys(is)) {
		fmt.Fprintf(&text, "%s = %s\n", n, is[n])
	}
	if err := os.WriteFile(fieldsFile, []byte(text.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestChangesAreFound: one small file, changed in each way that matters.
func TestChangesAreFound(t *testing.T) {
	const before = `
		name: "x.proto" package: "outrigger.v1" syntax: "proto3"
		message_type {
			name: "M"
			field { name: "a" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
			field { name: "b" number: 2 type: TYPE_UINT64 label: LABEL_OPTIONAL oneof_index: 0 }
			oneof_decl { name: "kind" }
			reserved_range { start: 5 end: 6 }
			reserved_name: "old"
		}
		enum_type { name: "E" value { name: "ZERO" number: 0 } value { name: "ONE" number: 1 } }
		service { name: "S" method { name: "Do" input_type: ".outrigger.v1.M" output_type: ".outrigger.v1.M" } }`
	const a = `field { name: "a" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }`
	cases := []struct {
		name, old, new          string
		broken, retired, adding string
	}{
		{"nothing", "", "", "", "", ""},
		{"new field", a, a + ` field { name: "c" number: 3 type: TYPE_BOOL label: LABEL_OPTIONAL }`, "", "", "M.c"},
		{"renumbered", `name: "a" number: 1`, `name: "a" number: 3`, `M.a was "1 string singular" and is "3 string singular"`, "", ""},
		{"renamed", `name: "a" number`, `name: "aa" number`, "M.a (1 string singular) is gone", "", "M.aa"},
		{"other type", `1 type: TYPE_STRING`, `1 type: TYPE_BYTES`, `M.a was "1 string singular" and is "1 bytes singular"`, "", ""},
		{"other width", `TYPE_UINT64`, `TYPE_FIXED64`, "M.b was", "", ""},
		{"repeated", `TYPE_STRING label: LABEL_OPTIONAL`, `TYPE_STRING label: LABEL_REPEATED`, `is "1 string repeated"`, "", ""},
		{"moved into the oneof", `TYPE_STRING label: LABEL_OPTIONAL`, `TYPE_STRING label: LABEL_OPTIONAL oneof_index: 0`, `is "1 string oneof:kind"`, "", ""},
		{"removed", a, ``, "M.a (1 string singular) is gone", "", ""},
		{"removed, number reserved", a, `reserved_range { start: 1 end: 2 }`, "M.a (1 string singular) is gone", "", "M reserved 1"},
		{"removed, both reserved", a, `reserved_range { start: 1 end: 2 } reserved_name: "a"`, "", "M.a", "M reserved 1"},
		{"reservation dropped", `reserved_range { start: 5 end: 6 }`, ``, "M reserved 5 (number) is gone", "", ""},
		{"reserved name dropped", `reserved_name: "old"`, ``, "M reserved old (name) is gone", "", ""},
		{"enum value renumbered", `name: "ONE" number: 1`, `name: "ONE" number: 2`, `E.ONE was "1" and is "2"`, "", ""},
		{"enum value removed", `value { name: "ONE" number: 1 }`, ``, "E.ONE (1) is gone", "", ""},
		{"method streams", `name: "Do"`, `name: "Do" server_streaming: true`, `S.Do was "rpc M returns M" and is "rpc M returns stream M"`, "", ""},
		{"method renamed", `name: "Do"`, `name: "Make"`, "S.Do (rpc M returns M) is gone", "", "S.Make"},
	}
	was := summary(parseFile(t, before))
	for _, c := range cases {
		text := strings.Replace(before, c.old, c.new, 1)
		if c.name != "nothing" && text == before {
			t.Fatalf("%s: the case changes nothing", c.name)
		}
		broken, retired, added := changes(was, summary(parseFile(t, text)))
		for _, got := range []struct {
			what string
			list []string
			want string
		}{{"broken", broken, c.broken}, {"retired", retired, c.retired}, {"added", added, c.adding}} {
			if all := strings.Join(got.list, "; "); got.want == "" && all != "" || !strings.Contains(all, got.want) {
				t.Errorf("%s: %s %q, want %q", c.name, got.what, all, got.want)
			}
		}
	}
}

func parseFile(t *testing.T, text string) protoreflect.FileDescriptor {
	t.Helper()
	var fdp descriptorpb.FileDescriptorProto
	if err := prototext.Unmarshal([]byte(text), &fdp); err != nil {
		t.Fatal(err)
	}
	fd, err := protodesc.NewFile(&fdp, nil)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}
