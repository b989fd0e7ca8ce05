package feed

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	pb "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
)

func message(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := AppendMessage(nil, m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Frames come out as they went in, however the bytes are cut, and memory for a large one
// is let go of after it.
func TestReaderCutsFrames(t *testing.T) {
	large := &pb.FeedFrame{Region: strings.Repeat("r", 3*keepBuffer)}
	small := &pb.FeedFrame{Incarnation: 7}
	var all []byte
	for _, m := range []*pb.FeedFrame{small, {}, large, small, small} {
		all = append(all, message(t, m)...)
	}
	for name, from := range map[string]io.Reader{
		"whole": bytes.NewReader(all), "bytes": iotest.OneByteReader(bytes.NewReader(all)), "halves": iotest.HalfReader(bytes.NewReader(all)),
	} {
		r := reader{from: from, max: MaxFrame}
		for i, want := range []*pb.FeedFrame{small, {}, large, small, small} {
			raw, err := r.next()
			if err != nil {
				t.Fatalf("%s, frame %d: %v", name, i, err)
			}
			got := &pb.FeedFrame{}
			if err := proto.Unmarshal(raw, got); err != nil || !proto.Equal(got, want) {
				t.Fatalf("%s, frame %d: %v, %v", name, i, got, err)
			}
		}
		if _, err := r.next(); err != io.EOF {
			t.Errorf("%s: ends with %v, want EOF", name, err)
		}
		if name == "bytes" && len(r.buf) > keepBuffer {
			t.Errorf("%s: %d bytes are kept", name, len(r.buf))
		}
	}
}

func TestReaderRefuses(t *testing.T) {
	for _, c := range []struct {
		in, want string
		kind     outrigger.Kind
	}{
		{"m\x00\x01\x01", "a feed frame has 257 bytes, at most 256 are allowed", outrigger.Invalid},
		{"PRI * HTTP/2.0\r\n", "a feed frame of kind 0x50 with 5392672 bytes: this is not outrigger-feed/1", outrigger.Invalid},
		{"e\x00\x04\x01", "a feed frame of kind 0x65 with 1025 bytes: this is not outrigger-feed/1", outrigger.Invalid},
		{string(AppendEnd(nil, outrigger.Errorf(outrigger.Exhausted, "too: many"))), "too: many", outrigger.Exhausted},
		{string(AppendEnd(nil, errors.New("secret"))), "internal error", outrigger.Internal},
		{"e\x00\x00\x03wh?", `the feed was ended: "wh?"`, outrigger.Unavailable},
	} {
		r := reader{from: strings.NewReader(c.in), max: 256}
		if _, err := r.next(); err == nil || err.Error() != c.want || outrigger.KindOf(err) != c.kind {
			t.Errorf("%q: %v, want %v %s", c.in, err, c.kind, c.want)
		}
	}
	for _, cut := range []string{"m", "m\x00\x00\x05", "m\x00\x00\x05abcd"} {
		r := reader{from: strings.NewReader(cut), max: 256}
		if _, err := r.next(); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%q: %v, want an unexpected end", cut, err)
		}
	}
}

// Heartbeats written by hand are what proto.Marshal writes, and are read as such.
func TestHeartbeats(t *testing.T) {
	for _, sent := range []uint64{0, 1, 1 << 63} {
		want := &pb.FeedRequest{Kind: &pb.FeedRequest_Heartbeat{Heartbeat: &pb.Heartbeat{Sent: sent}}}
		b, err := appendRequest(nil, want)
		if err != nil || !bytes.Equal(b, message(t, want)) {
			t.Fatalf("%d: %x, %v, want %x", sent, b, err, message(t, want))
		}
		if got, ok := heartbeat(b[headerBytes:]); ok != (sent != 0) || got != sent {
			t.Errorf("%d is read as %d, %v", sent, got, ok)
		}
	}
}

// What a table keeps of a variable as it came is the variable without its key, and nothing
// is taken from frames that were decoded by proto.
func TestAppendStored(t *testing.T) {
	d := &decoder{}
	raw, err := proto.Marshal(samples()["changes"])
	if err != nil {
		t.Fatal(err)
	}
	f, err := d.frame(raw)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range f.GetChanges().GetChanges() {
		want := proto.Clone(c.GetVariable()).(*pb.Variable)
		want.Key = nil
		got := &pb.Variable{}
		b, ok := d.appendStored([]byte("x"), c.GetVariable())
		if !ok || b[0] != 'x' || proto.Unmarshal(b[1:], got) != nil || !proto.Equal(got, want) {
			t.Errorf("change %d: %v %v, want %v", i, ok, got, want)
		}
	}
	if b, ok := d.appendStored(nil, &pb.Variable{}); ok || b != nil {
		t.Errorf("%x was taken for another variable", b)
	}
}

// FuzzReader feeds what may come from anybody who may connect.
func FuzzReader(f *testing.F) {
	f.Add(message(f, samples()["changes"]), uint8(3))
	f.Add(AppendEnd(nil, errors.New("x")), uint8(1))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), uint8(9))
	f.Fuzz(func(t *testing.T, in []byte, step uint8) {
		whole, cut := reader{from: bytes.NewReader(in), max: 1 << 10}, reader{from: &steps{in, int(step)%16 + 1}, max: 1 << 10}
		d := &decoder{}
		for {
			a, errA := whole.next()
			b, errB := cut.next()
			if (errA == nil) != (errB == nil) || !bytes.Equal(a, b) {
				t.Fatalf("%x %v, cut %x %v", a, errA, b, errB)
			}
			if errA != nil {
				return
			}
			if f, err := d.frame(a); err == nil {
				for _, c := range f.GetChanges().GetChanges() {
					if stored, ok := d.appendStored(nil, c.GetVariable()); ok && proto.Unmarshal(stored, &pb.Variable{}) != nil {
						t.Fatalf("%x is stored as %x", a, stored)
					}
				}
			}
		}
	})
}

// steps reads a few bytes at a time.
type steps struct {
	rest []byte
	n    int
}

func (s *steps) Read(b []byte) (int, error) {
	if len(s.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(b[:min(len(b), s.n)], s.rest)
	s.rest = s.rest[n:]
	return n, nil
}
