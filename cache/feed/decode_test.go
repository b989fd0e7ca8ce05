package feed

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

func sampleVersion() *pb.Version {
	return &pb.Version{Counter: 7, Dot: &pb.Dot{Region: "eu", Incarnation: 9, Position: 41}, Hlc: 1 << 50,
		Context: []*pb.ContextEntry{{Region: "eu", Position: 41}, {Region: "us", Position: 3}}}
}

func sampleChange(position uint64) *pb.Change {
	key := &pb.Key{Tenant: "default", Session: "session-07", Name: "x"}
	return &pb.Change{Key: key, Position: position, KeyPrevious: position - 1, CommittedUnixNano: 1 << 60, Version: sampleVersion(),
		Variable: &pb.Variable{Id: "var_1", Key: key, Value: &pb.Value{Type: "string", Json: []byte(`"v"`), Binary: []byte{0, 1}},
			ConstraintsJson: `{"min":1}`, Source: "sdk", Version: sampleVersion(),
			CreatedAt: timestamppb.New(timestamppb.Now().AsTime()), UpdatedAt: &timestamppb.Timestamp{Seconds: -5, Nanos: 7}}}
}

func samples() map[string]*pb.FeedFrame {
	changes := func(c ...*pb.Change) *pb.FeedFrame {
		return &pb.FeedFrame{Incarnation: 9, Region: "eu", Selective: true,
			Kind: &pb.FeedFrame_Changes{Changes: &pb.Changes{Previous: 40, Through: 44, Changes: c}}}
	}
	many := make([]*pb.Change, maxSlots+1)
	for i := range many {
		many[i] = sampleChange(uint64(41 + i))
	}
	noted := sampleChange(41)
	noted.Variable.Metadata = map[string]string{"a": "b"}
	wide := sampleChange(41)
	for range 5 {
		wide.Version.Context = append(wide.Version.Context, &pb.ContextEntry{Region: "ap", Position: 1})
	}
	return map[string]*pb.FeedFrame{
		"changes":   changes(sampleChange(41), sampleChange(44)),
		"none":      changes(),
		"deleted":   changes(&pb.Change{Key: &pb.Key{Session: "s"}, Position: 41, Deleted: true, Scope: pb.Change_SESSION, Version: &pb.Version{Counter: -1}}),
		"all":       changes(&pb.Change{Scope: pb.Change_ALL, Position: 41, Key: &pb.Key{}, Variable: &pb.Variable{Value: &pb.Value{}}}),
		"ack":       {Incarnation: 9, Region: "eu", Kind: &pb.FeedFrame_Ack{Ack: &pb.HeartbeatAck{Sent: 5, Head: 44}}},
		"reset":     {Incarnation: 9, Region: "eu", Kind: &pb.FeedFrame_Reset_{Reset_: &pb.Reset{From: 5, Reason: "why"}}},
		"selected":  {Incarnation: 9, Region: "eu", Kind: &pb.FeedFrame_Selected{Selected: &pb.Selected{Number: 5, Position: 44}}},
		"empty":     {},
		"many":      changes(many...),
		"metadata":  changes(noted),
		"wide":      changes(wide),
		"long name": {Region: string(bytes.Repeat([]byte("r"), maxName+1)), Kind: &pb.FeedFrame_Ack{Ack: &pb.HeartbeatAck{}}},
	}
}

// Whatever a frame holds, decoding it into used memory gives what proto.Unmarshal gives,
// and the frames of every day are decoded without it.
func TestDecode(t *testing.T) {
	slow := map[string]bool{"reset": true, "selected": true, "many": true, "wide": true}
	for name, want := range samples() {
		raw, err := proto.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		d := &decoder{}
		for _, before := range samples() { // leave something of everything behind
			old, err := proto.Marshal(before)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := d.frame(old); err != nil {
				t.Fatal(err)
			}
		}
		got, err := d.frame(raw)
		if err != nil || !proto.Equal(got, want) {
			t.Errorf("%s: got %v, %v, want %v", name, got, err, want)
		}
		if d.fast(raw) == slow[name] {
			t.Errorf("%s: decoded by hand: %v", name, !slow[name])
		}
	}
}

// Strings are kept by the receiver; everything else is used again.
func TestDecodedStringsStay(t *testing.T) {
	raw, err := proto.Marshal(samples()["changes"])
	if err != nil {
		t.Fatal(err)
	}
	d := &decoder{}
	f, err := d.frame(raw)
	if err != nil {
		t.Fatal(err)
	}
	session := f.GetChanges().GetChanges()[0].GetKey().GetSession()
	clear(raw)
	if session != "session-07" {
		t.Errorf("the name became %q with its frame's memory", session)
	}
}

func TestDecodeDoesNotAllocate(t *testing.T) {
	raw, err := proto.Marshal(samples()["changes"])
	if err != nil {
		t.Fatal(err)
	}
	d := &decoder{}
	if n := testing.AllocsPerRun(100, func() {
		if _, err := d.frame(raw); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations a frame", n)
	}
}

// FuzzDecode compares with proto.Unmarshal: what one accepts the other does, with the
// same meaning.
func FuzzDecode(f *testing.F) {
	for _, s := range samples() {
		raw, err := proto.Marshal(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
		f.Add(append(raw, raw...)) // merged by proto
	}
	d := &decoder{}
	f.Fuzz(func(t *testing.T, raw []byte) {
		want := &pb.FeedFrame{}
		wrong := proto.Unmarshal(raw, want)
		got, err := d.frame(raw)
		if (err == nil) != (wrong == nil) {
			t.Fatalf("%x: %v, proto says %v", raw, err, wrong)
		}
		if err == nil && !proto.Equal(got, want) {
			t.Fatalf("%x: got %v, want %v", raw, got, want)
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	raw, err := proto.Marshal(&pb.FeedFrame{Incarnation: 9, Region: "eu", Selective: true,
		Kind: &pb.FeedFrame_Changes{Changes: &pb.Changes{Previous: 40, Through: 44, Changes: []*pb.Change{sampleChange(41)}}}})
	if err != nil {
		b.Fatal(err)
	}
	d := &decoder{}
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.frame(raw); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("proto", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := proto.Unmarshal(raw, &pb.FeedFrame{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}
