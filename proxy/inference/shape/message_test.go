package shape

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	oip "github.com/outrigger-mesh/outrigger/api/inference"
)

func request() *oip.ModelInferRequest {
	return &oip.ModelInferRequest{ModelName: "m", ModelVersion: "9", Id: "i",
		Parameters: map[string]*oip.InferParameter{
			"sequence_id": {ParameterChoice: &oip.InferParameter_Uint64Param{Uint64Param: 1 << 63}},
			"user_id":     {ParameterChoice: &oip.InferParameter_StringParam{StringParam: "u"}}},
		Inputs:           []*oip.ModelInferRequest_InferInputTensor{{Name: "x", Datatype: "FP32", Shape: []int64{1, 2}}},
		RawInputContents: [][]byte{{1, 2, 3, 0xff}}}
}

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Only name and version change; tensors, parameters and fields nobody here knows stay.
func TestNames(t *testing.T) {
	in := marshal(t, request())
	in = protowire.AppendTag(in, 4711, protowire.BytesType)
	in = protowire.AppendString(in, "unknown")
	n, err := ScanNames(in, true)
	if err != nil || n.Model != "m" || n.Version != "9" || n.SubUser != "u" || n.Sequence != "9223372036854775808" {
		t.Fatalf("%+v, %v", n, err)
	}
	for upstream, want := range map[string][2]string{"up": {"up", ""}, "org/up/versions/3": {"org/up", "3"}, "": {"m", ""}} {
		p := n.Rewrite(upstream)
		out := bytes.Join(p[:], nil)
		var got oip.ModelInferRequest
		if err := proto.Unmarshal(out, &got); err != nil {
			t.Fatal(err)
		}
		if got.ModelName != want[0] || got.ModelVersion != want[1] {
			t.Errorf("%q: name %q, version %q", upstream, got.ModelName, got.ModelVersion)
		}
		got.ModelName, got.ModelVersion = "m", "9"
		if !bytes.Equal(marshal(t, &got), in) {
			t.Errorf("%q: more than the names changed: %v", upstream, &got)
		}
	}
	for _, bad := range []string{"\x0a", "\x0a\x05ab", "\x00\x01", "\x22\x02\x0a\x05"} {
		if _, err := ScanNames([]byte(bad), true); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

// FuzzNames: what protobuf accepts is accepted with the same names, and rewriting changes
// nothing else.
func FuzzNames(f *testing.F) {
	b, err := proto.Marshal(request())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, "up/versions/1")
	f.Add([]byte("\x0a\x01a\x18\x01\x0a\x01b\x12\x01c\x1a\x01i\x0a\x01d"), "")
	f.Fuzz(func(t *testing.T, in []byte, upstream string) {
		n, err := ScanNames(in, false)
		var want oip.ModelMetadataRequest // only names are known to it: the rest is unknown fields
		if perr := proto.Unmarshal(in, &want); perr != nil {
			return // also names that are no UTF-8, which is for the server to say
		}
		if err != nil {
			t.Fatalf("refused %x: %v", in, err)
		}
		if n.Model != want.Name || n.Version != want.Version {
			t.Fatalf("%x: %q %q, want %q %q", in, n.Model, n.Version, want.Name, want.Version)
		}
		name, version := SplitUpstream(upstream)
		if upstream == "" {
			name = n.Model
		}
		p := n.Rewrite(upstream)
		after, err := ScanNames(bytes.Join(p[:], nil), false)
		if err != nil || after.Model != name || after.Version != version || !bytes.Equal(bytes.Join(after.keep, nil), bytes.Join(n.keep, nil)) {
			t.Fatalf("%x rewritten to %q: %+v, %v", in, upstream, after, err)
		}
	})
}
