package pebble

import (
	"encoding/binary"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger"
	outriggerv1 "github.com/outrigger-mesh/outrigger/api/outrigger/v1"
	"github.com/outrigger-mesh/outrigger/control/eventlog"
)

// layoutVersion is the version of the keys and records below, kept with the incarnation.
const layoutVersion = 1

// The first byte of a key says what it is; numbers are big endian so that the byte order
// is the numeric order. Aggregates and names hold no control characters, so the zero
// byte ends them unambiguously.
const (
	prefixEvent     = 'e' // e position → record
	prefixIndex     = 'i' // i aggregate 0 sequence → position
	prefixSequence  = 'h' // h aggregate → last sequence
	prefixRequest   = 'q' // q first position → events-1 (varint), request id
	prefixManifest  = 'S' // S name → snapshot manifest
	prefixSnapshot  = 's' // s name 0 generation chunk → bytes
	recordVersion   = 1   // first byte of a record; the event's encoding follows
	recordOverhead  = 64  // room for the version and the stamp
	fieldSequence   = 2   // field numbers of outrigger.v1.Event
	fieldPosition   = 3
	fieldHLC        = 4
	fieldAt         = 5
	fieldAtSeconds  = 1 // of google.protobuf.Timestamp
	fieldAtNanos    = 2
	keyNumber       = 8
	requestValueMin = 1
)

// metaKey holds the layout version and the incarnation.
var metaKey = []byte("meta")

func eventKey(position uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{prefixEvent}, position)
}

func requestKey(first uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{prefixRequest}, first)
}

func sequenceKey(aggregate string) []byte { return append([]byte{prefixSequence}, aggregate...) }

func indexKey(aggregate string, sequence uint64) []byte {
	k := make([]byte, 0, 2+len(aggregate)+keyNumber)
	k = append(k, prefixIndex)
	k = append(k, aggregate...)
	return binary.BigEndian.AppendUint64(append(k, 0), sequence)
}

func number(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

// parseNumber reads what number wrote; what names the value in the error.
func parseNumber(what string, b []byte) (uint64, error) {
	if len(b) != keyNumber {
		return 0, outrigger.Errorf(outrigger.Internal, "event log is damaged: %s has %d bytes, want %d", what, len(b), keyNumber)
	}
	return binary.BigEndian.Uint64(b), nil
}

// encodeBody encodes everything the committer does not decide, with room to append the
// stamp. The concatenation of encodings of disjoint fields is an encoding of the whole
// message, so the expensive part runs in the caller's goroutine and the committer only
// appends some 40 bytes. Equal events give equal bytes: maps are sorted.
func encodeBody(e *outriggerv1.Event) ([]byte, error) {
	b := make([]byte, 1, proto.Size(e)+recordOverhead)
	b[0] = recordVersion
	return proto.MarshalOptions{Deterministic: true}.MarshalAppend(b, e)
}

// appendStamp finishes a record with what the committer decides.
func appendStamp(b []byte, sequence, position, hlc uint64, at time.Time) []byte {
	b = protowire.AppendVarint(protowire.AppendTag(b, fieldSequence, protowire.VarintType), sequence)
	b = protowire.AppendVarint(protowire.AppendTag(b, fieldPosition, protowire.VarintType), position)
	b = protowire.AppendFixed64(protowire.AppendTag(b, fieldHLC, protowire.Fixed64Type), hlc)
	var ts [24]byte
	t := protowire.AppendVarint(protowire.AppendTag(ts[:0], fieldAtSeconds, protowire.VarintType), uint64(at.Unix()))
	t = protowire.AppendVarint(protowire.AppendTag(t, fieldAtNanos, protowire.VarintType), uint64(at.Nanosecond()))
	return protowire.AppendBytes(protowire.AppendTag(b, fieldAt, protowire.BytesType), t)
}

// decodeRecord reads the record stored at a position. Anything but a whole, well-formed
// event that claims that very position is an error of kind Internal.
func decodeRecord(position uint64, b []byte) (*outriggerv1.Event, error) {
	if len(b) == 0 || b[0] != recordVersion {
		return nil, damaged(position, "unknown record version")
	}
	e := new(outriggerv1.Event)
	if err := proto.Unmarshal(b[1:], e); err != nil {
		return nil, damaged(position, err.Error())
	}
	switch {
	case e.Position != position:
		return nil, damaged(position, "record claims another position")
	case e.Sequence == 0 || e.Sequence > e.Position:
		return nil, damaged(position, "sequence is not between 1 and the position")
	case eventlog.CheckAggregate("aggregate", e.Aggregate) != nil:
		return nil, damaged(position, "aggregate breaks the naming rules")
	case !e.At.IsValid():
		return nil, damaged(position, "time is missing or out of range")
	}
	return e, nil
}

func damaged(position uint64, why string) error {
	return outrigger.Errorf(outrigger.Internal, "event log is damaged at position %d: %s; restore from the archive", position, why)
}

// encodeRequest is the value under requestKey(o.First).
func encodeRequest(id string, o eventlog.Outcome) []byte {
	return append(binary.AppendUvarint(nil, o.Last-o.First), id...)
}

// decodeRequest reads one remembered request id.
func decodeRequest(key, value []byte) (string, eventlog.Outcome, error) {
	first, err := parseNumber("request key", key[1:])
	if err != nil {
		return "", eventlog.Outcome{}, err
	}
	n, used := binary.Uvarint(value)
	if used < requestValueMin || n >= eventlog.MaxBatchEvents || used == len(value) {
		return "", eventlog.Outcome{}, outrigger.Errorf(outrigger.Internal, "event log is damaged: request id stored for position %d cannot be read", first)
	}
	return string(value[used:]), eventlog.Outcome{First: first, Last: first + n}, nil
}
