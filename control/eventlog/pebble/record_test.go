package pebble

import (
	"bytes"
	"math"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

func sample() *outriggerv1.Event {
	return &outriggerv1.Event{
		Aggregate: "var/default/s/temperature", Actor: "a", Schema: 1,
		Metadata: map[string]string{"z": "1", "a": "2", "m": "3", "b": "4"},
		Payload:  &outriggerv1.Event_VariableSet{VariableSet: &outriggerv1.VariableSet{Metadata: map[string]string{"x": "1", "y": "2"}}},
	}
}

// A record is body plus stamp; together they decode to the event with every field the
// committer decides, at the edges of their ranges too, and the bytes are reproducible.
func TestRecordRoundTrip(t *testing.T) {
	for _, c := range []struct {
		sequence, position, hlc uint64
		at                      time.Time
	}{
		{1, 1, 1, time.Unix(0, 0)},
		{1, 1, 0, time.Unix(-5, 7)},
		{7, 300, 1 << 60, time.Date(2030, 1, 2, 3, 4, 5, 999999999, time.UTC)},
		{math.MaxUint64, math.MaxUint64, math.MaxUint64, time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)},
	} {
		body, err := encodeBody(sample())
		if err != nil {
			t.Fatal(err)
		}
		rec := appendStamp(body, c.sequence, c.position, c.hlc, c.at)
		if len(rec) > proto.Size(sample())+recordOverhead {
			t.Errorf("stamp outgrew its room: %d bytes", len(rec)-proto.Size(sample()))
		}
		for range 20 { // map order is random per call
			again, _ := encodeBody(sample())
			if !bytes.Equal(appendStamp(again, c.sequence, c.position, c.hlc, c.at), rec) {
				t.Fatal("the same event was encoded differently")
			}
		}
		got, err := decodeRecord(c.position, rec)
		if err != nil {
			t.Fatal(err)
		}
		want := sample()
		want.Sequence, want.Position, want.Hlc, want.At = c.sequence, c.position, c.hlc, timestamppb.New(c.at)
		if !proto.Equal(got, want) {
			t.Errorf("got %v\nwant %v", got, want)
		}
	}
}

func TestDecodeRefusesDamage(t *testing.T) {
	body, _ := encodeBody(sample())
	good := appendStamp(body, 2, 9, 5, time.Unix(1, 1))
	badName := sample()
	badName.Aggregate = ""
	nameless, _ := encodeBody(badName)
	unstamped, _ := encodeBody(sample())
	for name, c := range map[string]struct {
		position uint64
		record   []byte
	}{
		"empty":          {9, nil},
		"version":        {9, append([]byte{9}, good[1:]...)},
		"truncated":      {9, good[:len(good)-3]},
		"other position": {8, good},
		"no stamp":       {9, unstamped},
		"no aggregate":   {9, appendStamp(nameless, 2, 9, 5, time.Unix(1, 1))},
		"sequence 0":     {9, appendStamp(bytes.Clone(unstamped), 0, 9, 5, time.Unix(1, 1))},
		"sequence > pos": {9, appendStamp(bytes.Clone(unstamped), 10, 9, 5, time.Unix(1, 1))},
		"impossible day": {9, appendStamp(bytes.Clone(unstamped), 2, 9, 5, time.Unix(1<<40, 1))},
	} {
		if _, err := decodeRecord(c.position, c.record); !outrigger.IsKind(err, outrigger.Internal) {
			t.Errorf("%s: error %v, want kind internal", name, err)
		}
	}
	if _, err := decodeRecord(9, good); err != nil {
		t.Fatal(err)
	}
}

// Whatever the bytes, decoding neither panics nor accepts an event that breaks the
// log's rules.
func FuzzDecodeRecord(f *testing.F) {
	body, _ := encodeBody(sample())
	f.Add(uint64(9), appendStamp(body, 2, 9, 5, time.Unix(1, 1)))
	f.Add(uint64(1), []byte{recordVersion})
	f.Fuzz(func(t *testing.T, position uint64, b []byte) {
		e, err := decodeRecord(position, b)
		if err != nil {
			return
		}
		if e.Position != position || e.Sequence == 0 || e.Sequence > position || eventlog.CheckAggregate("", e.Aggregate) != nil || !e.At.IsValid() {
			t.Fatalf("accepted %v at %d", e, position)
		}
	})
}

func FuzzDecodeRequest(f *testing.F) {
	f.Add(requestKey(5), encodeRequest("id", eventlog.Outcome{First: 5, Last: 9}))
	f.Add([]byte{prefixRequest}, []byte{})
	f.Fuzz(func(t *testing.T, key, value []byte) {
		if len(key) == 0 {
			return // keys come from a scan over their prefix
		}
		id, o, err := decodeRequest(key, value)
		if err != nil {
			return
		}
		if id == "" || o.Last-o.First >= eventlog.MaxBatchEvents {
			t.Fatalf("accepted %q %+v", id, o)
		}
		if k, v := requestKey(o.First), encodeRequest(id, o); !bytes.Equal(k[1:], key[1:]) || !sameRequest(k, v, id, o) {
			t.Fatalf("%q %+v does not survive encoding", id, o)
		}
	})
}

func sameRequest(k, v []byte, id string, o eventlog.Outcome) bool {
	id2, o2, err := decodeRequest(k, v)
	return err == nil && id2 == id && o2 == o
}

func FuzzDecodeManifest(f *testing.F) {
	f.Add(manifest{1, 2, 3}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := decodeManifest("s", b); err == nil && !bytes.Equal(m.encode(), b) {
			t.Fatalf("%x was read as %+v", b, m)
		}
	})
}
