package variable

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/cache/node"
)

func TestNameOfID(t *testing.T) {
	for id, want := range map[string]string{
		"var_x_1": "x", "var_a_b_12": "a_b", "var_var_x_1_2": "var_x_1", "var___7": "_", "var_é_1": "é", "var_x_00": "x",
		"": "-", "x": "-", "var_": "-", "var_x": "-", "var_x_": "-", "var__1": "-", "var_1": "-", "var_x_1a": "-", "var_x_-1": "-", "var_x_١": "-", "Var_x_1": "-", " var_x_1": "-",
	} {
		name, ok := nameOfID(id)
		if got := map[bool]string{true: name, false: "-"}[ok]; got != want {
			t.Errorf("%q: %q, want %q", id, got, want)
		}
	}
}

// FuzzNameOfID: a name is found in every id of the authority's form, in nothing else,
// and the node agent, which resolves ids in its own way, agrees.
func FuzzNameOfID(f *testing.F) {
	for _, s := range []string{"var_x_1", "var__1", "var_", "x", "var_a_b_2", "var_x_1_", "var_\xff_0"} {
		f.Add(s, uint32(1))
	}
	f.Fuzz(func(t *testing.T, s string, n uint32) {
		name, ok := nameOfID(s)
		if ok {
			rest, number := strings.CutPrefix(s, "var_"+name+"_")
			if !number || name == "" || rest == "" || strings.Trim(rest, "0123456789") != "" {
				t.Errorf("%q: found %q", s, name)
			}
		}
		if other, same := node.NameOfID(s); same != ok || other != name {
			t.Errorf("%q: %q, %v here and %q, %v at the node agent", s, name, ok, other, same)
		}
		if s != "" {
			if got, ok := nameOfID("var_" + s + "_" + strconv.FormatUint(uint64(n), 10)); !ok || got != s {
				t.Errorf("the id of %q gives %q, %v", s, got, ok)
			}
		}
	})
}

// FuzzValueFromAny: never a panic, never a changed byte, and the type is the declared
// one, or what stands between a known prefix and the binary suffix.
func FuzzValueFromAny(f *testing.F) {
	f.Add("type.googleapis.com/snakepit.float", []byte("0.7"), "", []byte(nil))
	f.Add("dspex.variables/tensor.binary", []byte(`{"shape":[1]}`), "", []byte{0x80, 4})
	f.Add("type.googleapis.com/google.protobuf.StringValue", []byte{0x0a, 1}, "string", []byte(nil))
	f.Add("type.googleapis.com/snakepit.", []byte(nil), "", []byte{131})
	f.Fuzz(func(t *testing.T, url string, json []byte, declared string, binary []byte) {
		given := &anypb.Any{TypeUrl: url, Value: bytes.Clone(json)}
		v, err := valueFromAny(given, declared, bytes.Clone(binary))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(v.Json, json) || !bytes.Equal(v.Binary, binary) {
			t.Errorf("bytes changed: %q %q", v.Json, v.Binary)
		}
		known := strings.HasPrefix(url, typePrefix) || strings.HasPrefix(url, legacyPrefix)
		switch {
		case declared != "" && v.Type != declared, declared == "" && !known && v.Type != "":
			t.Errorf("type %q of %q, declared %q", v.Type, url, declared)
		case declared == "" && known && !strings.Contains(url, v.Type):
			t.Errorf("type %q is not in %q", v.Type, url)
		}
		// What is one of our types goes out as it came in, in the present form.
		if strings.HasPrefix(url, typePrefix) && declared == "" && strings.HasSuffix(url, binarySuffix) == (len(binary) > 0) && !strings.HasSuffix(v.Type, binarySuffix) {
			if out := anyFromValue(v); !proto.Equal(out, given) {
				t.Errorf("%v came back as %v", given, out)
			}
		}
	})
}

func TestValueFromAny(t *testing.T) {
	if _, err := valueFromAny(nil, "float", []byte{1}); !outrigger.IsKind(err, outrigger.Invalid) {
		t.Errorf("no value: %v", err)
	}
	for url, want := range map[string]string{"type.googleapis.com/snakepit.tensor.binary": "tensor", "dspex.variables/embedding.binary": "embedding",
		"type.googleapis.com/snakepit.float": "float", "type.googleapis.com/google.protobuf.StringValue": "", "snakepit.float": "", "": ""} {
		if v, err := valueFromAny(&anypb.Any{TypeUrl: url}, "", nil); err != nil || v.Type != want {
			t.Errorf("%s: %v, %v", url, v, err)
		}
	}
	v := &pb.Value{Type: "tensor", Json: []byte("{}"), Binary: []byte{1}}
	if a := anyFromValue(v); a.TypeUrl != "type.googleapis.com/snakepit.tensor.binary" {
		t.Errorf("binary value as %s", a.TypeUrl)
	}
	if got := fmt.Sprint(distinct([]string{"b", "a", "b", "", "a", ""})); got != "[b a ]" {
		t.Errorf("distinct: %s", got)
	}
}
