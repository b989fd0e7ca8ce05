package node

import (
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

func TestRecordHasNoKey(t *testing.T) {
	key := &pb.Key{Tenant: "default", Session: "s", Name: "x"}
	if f := key.ProtoReflect().Descriptor(); (&pb.Variable{}).ProtoReflect().Descriptor().Fields().ByNumber(keyField).Message() != f {
		t.Fatalf("field %d of a variable is not its key", keyField)
	}
	for _, v := range []*pb.Variable{
		{},
		{Key: key},
		{Id: "var_x_1", Key: key, Value: &pb.Value{Type: "string", Json: []byte(`"v"`)}, Metadata: map[string]string{"a": "b"},
			Version: &pb.Version{Counter: 3, Dot: &pb.Dot{Region: "eu", Incarnation: 1, Position: 2}}, UpdatedAt: timestamppb.New(timestamppb.Now().AsTime())},
		{Value: &pb.Value{Json: []byte("1")}},
	} {
		whole, err := proto.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		b, err := AppendVariable([]byte("before"), v)
		if err != nil || string(b[:6]) != "before" {
			t.Fatalf("%q, %v", b, err)
		}
		b = b[6:]
		if saved := proto.Size(&pb.Variable{Key: v.Key}); len(b) != len(whole)-saved {
			t.Errorf("%d bytes of %d are left, want %d less", len(b), len(whole), saved)
		}
		got, err := ParseVariable("default/s/x", b)
		want := proto.CloneOf(v)
		want.Key = key
		if err != nil || !proto.Equal(got, want) {
			t.Errorf("read back %v, %v; want %v", got, err, want)
		}
		// Of a release that left the key in.
		if got, err := ParseVariable("default/s/x", whole); err != nil || !proto.Equal(got, want) {
			t.Errorf("with the key in it: %v, %v", got, err)
		}
	}
	if _, err := ParseVariable("default/s/x", []byte{0xff}); err == nil {
		t.Error("garbage was read as a variable")
	}
}
